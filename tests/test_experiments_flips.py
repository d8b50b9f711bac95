"""Flips of training images: drawn for a seed, the same however its run is run."""

import pytest
import torch
from torch import nn

from experiments import flips
from experiments.errors import InputError
from experiments.flips import Flips
from experiments.image_data import ImageData, Pixels
from experiments.side_by_side import EachTransform, SideBySide
from experiments.together import train_together
from experiments.training import train
from runner import SGD, BatchTransformXCallback, Callback, Checkpoint, DataBunch, Dataset, Learner, Runner, get_dls

N = 23


@pytest.fixture
def images():
    """23 images of 3x4x6 to train and 5 to validate, of which no two, flipped or not, are alike."""
    g = torch.Generator().manual_seed(0)

    def ds(n): return Dataset(torch.randint(0, 256, (n, 3, 4, 6), generator=g).byte(), torch.arange(n) % 2)
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    return ImageData("a folder", ds(N), ds(5), ds(5), mean, std, c=2, shape=(3, 4, 6), tfm=Pixels(mean, std))


class Seen(Callback):
    """Keeps each training batch, and leaves the fit after so many."""

    _order = 100

    def __init__(self, batches, stop=None): self.batches, self.stop = batches, stop

    def after_pred(self):
        if not self.in_train: return
        if self.stop == len(self.batches): raise KeyboardInterrupt
        self.batches.append(self.xb.clone())

    def state_dict(self): return {"n": len(self.batches)}
    def load_state_dict(self, state): del self.batches[state["n"]:]


def fit(images, seeds, batch_size, *cbs, epochs=2, fits=1, **kwargs):
    """A fit of networks side by side, or of one from one seed."""
    if isinstance(seeds, int):
        k, tfm, order = 1, images.tfm, torch.Generator().manual_seed(seeds)
        dl = get_dls(images.train, None, batch_size, generator=order)[0]
    else: k, dl, tfm = len(seeds), SideBySide(images.train, batch_size, seeds), EachTransform(len(seeds), images.tfm)
    model = nn.Sequential(nn.Flatten(), nn.Linear(k * 72, 1))
    learn = Learner(model, SGD(model.parameters(), lr=0.01), lambda pred, yb: pred.mean(), DataBunch(dl, None, 2))
    run = Runner([BatchTransformXCallback(tfm), Flips(seeds), *cbs])
    for _ in range(fits): run.fit(epochs, learn, **kwargs)


def bits(images, batches):
    """Which image each of the `batches` of one network holds, and whether it is flipped."""
    known = images.tfm(images.train.x)
    seen = torch.cat(batches)
    straight, flipped = ((seen[:, None] == known).flatten(2).all(2) for known in (known, known.flip(-1)))
    assert (straight ^ flipped).sum(1).tolist() == [1] * len(seen)
    return (straight | flipped).int().argmax(1).tolist(), flipped.any(1).tolist()


def test_each_image_is_flipped_or_not_and_in_another_epoch_seed_and_fit_otherwise(images):
    batches, others = [], []
    fit(images, 3, 4, Seen(batches), fits=2)
    fit(images, 4, 4, Seen(others))
    which, flipped = bits(images, batches)
    epochs = [[f for _, f in sorted(zip(which[i:i + N], flipped[i:i + N], strict=True))] for i in range(0, 4 * N, N)]
    epochs.append([f for _, f in sorted(zip(*bits(images, others[:6]), strict=True))])
    for i in range(0, 4 * N, N): assert sorted(which[i:i + N]) == list(range(N))
    for i, one in enumerate(epochs):
        assert 4 <= sum(one) <= 19
        for other in epochs[:i]: assert 4 <= sum(a != b for a, b in zip(one, other, strict=True)) <= 19
    again = []
    fit(images, 3, 4, Seen(again), fits=2)
    assert all(map(torch.equal, batches, again))


def test_half_of_many_are_flipped_whatever_their_neighbours():
    cb = Flips([0, 1])
    cb.run = type("Run", (), {"fits": 0, "epoch": 0})
    drawn = torch.cat([cb.take(n) for n in (1, 5000, 2, 4097, 9900)]).double()                      # (19000, 2)
    whole = Flips([0, 1])
    whole.run = cb.run
    assert torch.equal(whole.take(19_000).double(), drawn)
    sigma = 0.5 / len(drawn) ** 0.5
    for seen in (drawn, (drawn[1:] == drawn[:-1]).double(), (drawn[:, 0] == drawn[:, 1]).double()):
        assert (seen.mean(0) - 0.5).abs().max() < 4 * sigma


@pytest.mark.parametrize("block", [4096, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_networks_side_by_side_see_what_each_sees_alone(images, batch_size, block, monkeypatch):
    monkeypatch.setattr(flips, "BLOCK", block)
    together, seeds = [], (3, 9, 0)
    fit(images, seeds, batch_size, Seen(together))
    for k, seed in enumerate(seeds):
        alone = []
        fit(images, seed, batch_size, Seen(alone))
        assert all(torch.equal(xs.unflatten(1, (3, 3))[:, k], x) for xs, x in zip(together, alone, strict=True))


@pytest.mark.parametrize(("seeds", "block"), [(5, 4096), ((5, 6), 3)])
def test_a_fit_that_goes_on_sees_the_same_images(images, seeds, block, tmp_path, monkeypatch):
    monkeypatch.setattr(flips, "BLOCK", block)
    whole = []
    fit(images, seeds, 4, Seen(whole))
    assert len(whole) == 12
    for every, stop in ((2, 3), (1, 6), (5, 11)):
        folder, seen = tmp_path / f"{every} {stop}", []
        with pytest.raises(KeyboardInterrupt):
            fit(images, seeds, 4, Seen(seen, stop), Checkpoint(folder, every_batches=every))
        fit(images, seeds, 4, Seen(seen), Checkpoint(folder, every_batches=every), resume=folder)
        assert len(seen) == 12
        assert all(map(torch.equal, seen, whole))


def test_validation_sees_the_images_as_they_are(images):
    seen = []

    class Look(Callback):
        def after_pred(self):
            if not self.in_train: seen.append(self.xb)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 2))
    data = DataBunch(*get_dls(images.train, images.valid, 2), 2)
    learn = Learner(model, SGD(model.parameters(), lr=0.01), nn.functional.cross_entropy, data)
    run = Runner([BatchTransformXCallback(images.tfm), Flips(0), Look()])
    run.fit(1, learn)
    run.evaluate(learn)
    assert torch.equal(torch.cat(seen), images.tfm(images.valid.x).repeat(2, 1, 1, 1))


def test_training_flips_alone_and_together_alike(images):
    torch.set_default_dtype(torch.float64)
    try:
        rows = [{"norm": "none", "batch_size": 3, "lr": 0.05, "seed": seed, "epochs": 2} for seed in (7, 8)]

        def make(seed):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        found = train_together([make(row["seed"]) for row in rows], images, rows, "cpu", flips=True)
        for (_, row, losses), start in zip(found, rows, strict=True):
            _, alone, losses_alone = train(make(start["seed"]), images, start, "cpu", "", flips=True)
            assert losses == pytest.approx(losses_alone, rel=1e-9)
            assert row["valid_loss"] == pytest.approx(alone["valid_loss"], rel=1e-9)
            _, _, plain = train(make(start["seed"]), images, start, "cpu", "")
            assert losses_alone != pytest.approx(plain, rel=1e-3)
    finally: torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("shape", "seeds"), [((2, 72), 0), ((2, 7, 4, 6), (0, 1))])
def test_what_are_no_images_is_refused(shape, seeds):
    cb = Flips(seeds)
    cb.run = type("Run", (), {"in_train": True, "xb": torch.zeros(shape)})
    with pytest.raises(InputError, match=r"Flips got a batch \(2, 7.*; it needs images \(N, C, H, W\), or \(N, . C,"):
        cb.begin_batch()
