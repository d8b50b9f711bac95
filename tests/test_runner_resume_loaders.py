"""Where a loader stands: whatever gives the batches, a fit goes on at the right one, or says why it can't."""

import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_runner_checkpoint import Sees, Stop, everything, same, scramble
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data import Dataset as TorchDataset

from runner import (
    AvgStatsCallback,
    Checkpoint,
    CheckpointError,
    DataBunch,
    Dataset,
    Learner,
    Recorder,
    Runner,
    accuracy,
    get_dls,
)
from runner.loading import LoaderError

EPOCHS, ITEMS, BS = 2, 22, 4


class Order(Sampler):
    """Shuffles one order again and again, with a source of its own or Python's."""

    def __init__(self, n, source=random): self.n, self.order, self.epoch, self.source = n, [*range(n)], 0, source

    def __len__(self): return self.n

    def __iter__(self):
        self.source.shuffle(self.order)
        self.epoch += 1
        return iter([(i + self.epoch) % self.n for i in self.order])


class Slowly(Sampler):
    """Draws each index when it is asked for."""

    def __init__(self, n, source): self.n, self.source = n, source

    def __len__(self): return self.n

    def __iter__(self):
        for _ in range(self.n): yield self.source.randrange(self.n)


class Augmented(TorchDataset):
    """Items with noise, from a source of its own or from the common ones."""

    def __init__(self, x, y, own=False):
        self.x, self.y, self.rng, self.calls = x, y, np.random.default_rng(0) if own else None, 0

    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        self.calls += 1
        if self.rng is not None: noise = self.rng.normal() + self.calls
        else: noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return self.x[i] + 0.1 * noise, self.y[i]


class Positioned:
    """A loader of nobody's kind that says where it is."""

    def __init__(self, x, y): self.x, self.y, self.at, self.epoch = x, y, 0, 0

    def __len__(self): return -(-len(self.x) // BS)

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch)).split(BS)
        while self.at < len(order):
            self.at += 1
            yield self.x[order[self.at - 1]], self.y[order[self.at - 1]]
        self.at, self.epoch = 0, self.epoch + 1

    def state_dict(self): return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state): self.at, self.epoch = state["at"], state["epoch"]


class Stream(IterableDataset):
    def __init__(self, x, y): self.x, self.y = x, y

    def __iter__(self): return iter(zip(self.x, self.y, strict=True))


class Wrapper:
    """A loader around a loader, which doesn't say where it is."""

    def __init__(self, dl): self.dl = dl

    def __len__(self): return len(self.dl)

    def __iter__(self): yield from self.dl


def halves(batch): return default_collate([(x / 2, y) for x, y in batch])


def seeded(): return torch.Generator().manual_seed(5)


LOADERS = {
    "torch's": lambda x, y: DataLoader(TensorDataset(x, y), BS, shuffle=True),
    "torch's, with a generator": lambda x, y: DataLoader(TensorDataset(x, y), BS, shuffle=True, generator=seeded()),
    "torch's, in order": lambda x, y: DataLoader(TensorDataset(x, y), BS, drop_last=True),
    "with replacement": lambda x, y: DataLoader(TensorDataset(x, y), BS, sampler=RandomSampler(
        x, replacement=True, num_samples=50, generator=seeded())),
    "more than once": lambda x, y: DataLoader(TensorDataset(x, y), BS, sampler=RandomSampler(x, num_samples=50)),
    "weighted": lambda x, y: DataLoader(TensorDataset(x, y), BS, sampler=WeightedRandomSampler(x[:, 0].abs(), 30)),
    "a part": lambda x, y: DataLoader(TensorDataset(x, y), BS, sampler=SubsetRandomSampler(range(3, 21))),
    "a sampler of batches": lambda x, y: DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(
        Order(len(x)), BS, False)),
    "an order that is shuffled again": lambda x, y: DataLoader(TensorDataset(x, y), BS, sampler=Order(len(x))),
    "a source of its own": lambda x, y: DataLoader(TensorDataset(x, y), BS, sampler=Order(len(x), random.Random(3))),
    "numpy's source": lambda x, y: DataLoader(TensorDataset(x, y), BS, sampler=Order(len(x), np.random)),
    "a slow sampler": lambda x, y: DataLoader(TensorDataset(x, y), BS, sampler=Slowly(len(x), random.Random(3))),
    "noise": lambda x, y: DataLoader(Augmented(x, y), BS, shuffle=True),
    "noise, generator": lambda x, y: DataLoader(Augmented(x, y), BS, shuffle=True, generator=seeded()),
    "noise of its own": lambda x, y: DataLoader(Subset(Augmented(x, y, True), range(2, 20)), BS, shuffle=True),
    "get_dls": lambda x, y: get_dls(Dataset(x, y), None, BS)[0],
    "get_dls, generator": lambda x, y: get_dls(Dataset(x, y), None, BS, generator=seeded(), drop_last=True)[0],
    "get_dls, item by item": lambda x, y: get_dls(Augmented(x, y), None, BS, collate_fn=halves)[0],
    "a list": lambda x, y: [*zip(x.split(BS), y.split(BS), strict=True)],
    "a loader of one's own": Positioned,
}
WORKERS = {
    "workers": lambda x, y: DataLoader(TensorDataset(x, y), BS, shuffle=True, num_workers=1),
    "persistent workers": lambda x, y: DataLoader(TensorDataset(x, y), BS, shuffle=True, num_workers=1,
                                                  persistent_workers=True, generator=seeded()),
    "get_dls, persistent workers": lambda x, y: get_dls(Dataset(x, y), None, BS, num_workers=1,
                                                        persistent_workers=True)[0],
}


def build(loader, folder=None, **settings):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    x, y = torch.randn(ITEMS + 6, 5), torch.arange(ITEMS + 6) % 3
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))
    dl = loader(x[:ITEMS], y[:ITEMS])
    valid_dl = DataLoader(TensorDataset(x[ITEMS:], y[ITEMS:]), 6)
    learn = Learner(model, torch.optim.Adam(model.parameters(), 0.01), F.cross_entropy, DataBunch(dl, valid_dl, 3))
    cbs = [AvgStatsCallback(accuracy, quiet=True), Recorder(), Sees2()]
    settings = {"every_batches": 1, **settings}
    return learn, Runner([*cbs, *([Checkpoint(folder, **settings)] if folder else [])])


class Sees2(Sees):
    def begin_batch(self):
        if self.run.in_train: self.seen.append((self.run.epoch, self.run.xb[:, 0].tolist()))


def check(loader, moments, tmp_path, **settings):
    """That fits broken off at `moments` and gone on with see the same batches and end alike."""
    learn, run = build(loader)
    run.fit(EPOCHS, learn)
    want, seen = everything(learn, run), run.sees2.seen
    for at in moments:
        at = at if at >= 0 else len(seen) + 1 + at
        learn, run = build(loader, tmp_path / str(at), **settings)
        with pytest.raises(KeyboardInterrupt): run.fit(EPOCHS, learn, cbs=Stop(at))
        learn, run = build(loader, tmp_path / str(at), **settings)
        scramble()
        run.fit(EPOCHS, learn, resume=tmp_path / str(at))
        assert run.sees2.seen == seen[-len(run.sees2.seen):]
        assert len(run.sees2.seen) <= len(seen) - (at if settings.get("every_batches", 1) else 0)
        same(everything(learn, run), want, f"at {at}")


@pytest.mark.parametrize("name", LOADERS)
def test_a_fit_goes_on_at_the_right_batch(name, tmp_path):
    n = len(build(LOADERS[name])[0].data.train_dl)
    check(LOADERS[name], [2, n, n + 3], tmp_path)


@pytest.mark.parametrize("name", WORKERS)
def test_a_fit_with_workers_goes_on_at_the_right_batch(name, tmp_path):
    check(WORKERS[name], [8], tmp_path)      # in the second pass, for which persistent workers draw no seed


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")     # torchdata's, of torch
@pytest.mark.parametrize("kwargs", [{}, {"generator": 5}, {"num_workers": 1}, {"snapshot_every_n_steps": 3}], ids=str)
def test_the_stateful_loader_of_torchdata_goes_on(kwargs, tmp_path):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def made(x, y):
        settings = {**kwargs, **({"generator": seeded()} if "generator" in kwargs else {})}
        return loader(TensorDataset(x, y), BS, shuffle=True, **settings)
    check(made, [8] if "num_workers" in kwargs else [5, 6, 8] if not kwargs else [8], tmp_path)


def test_noise_drawn_in_workers_is_refused_in_the_middle_of_an_epoch_and_goes_on_at_its_end(tmp_path):
    for own in (False, True):
        def made(x, y, own=own, **kwargs): return DataLoader(Augmented(x, y, own), BS, num_workers=1, **kwargs)
        for settings in ({"every_batches": 1}, {"every_seconds": 9}):
            learn, run = build(made, tmp_path / "a", **settings)
            with pytest.raises(ValueError, match=r"draws random numbers in worker processes.*give num_workers=0, or"):
                run.fit(1, learn)
        learn, run = build(partial(made, persistent_workers=True), tmp_path / "b", every_batches=None)
        with pytest.raises(ValueError, match="draws random numbers in persistent workers"): run.fit(1, learn)
    check(lambda x, y: DataLoader(Augmented(x, y), BS, num_workers=1), [7], tmp_path, every_batches=None)


def test_looking_for_noise_in_workers_draws_nothing(tmp_path):
    ends = []
    for folder in (None, tmp_path):
        learn, run = build(lambda x, y: DataLoader(TensorDataset(x, y), BS, shuffle=True, num_workers=1), folder)
        run.fit(1, learn)
        ends.append(everything(learn, run))
    same(*ends)


@pytest.mark.parametrize(("loader", "reason"), [
    (lambda x, y: DataLoader(Stream(x, y), BS), r"IterableDataset \(Stream\), whose items can't be skipped"),
    (lambda x, y: Wrapper(DataLoader(TensorDataset(x, y), BS)), "a Wrapper, is no torch DataLoader and doesn't say"),
])
def test_a_loader_that_can_not_go_on_says_so_before_anything_is_trained(loader, reason, tmp_path):
    for settings in ({"every_batches": 2}, {"every_seconds": 1.0}):
        learn, run = build(loader, tmp_path, **{"every_batches": None, **settings})
        with pytest.raises(ValueError, match=reason + ".*state_dict and load_state_dict.*every_batches=None"):
            run.fit(1, learn)
        assert run.sees2.seen == []
    check(loader, [7, 11], tmp_path / "epochs", every_batches=None)
    learn, run = build(loader, tmp_path / "asked", every_batches=None, every_epochs=2)
    run.checkpoint.request()
    run.fit(1, learn)
    held = torch.load(min((tmp_path / "asked").iterdir()), weights_only=True)
    assert (held["epoch"], held["batch"]) == (1, None)


def test_a_sampler_that_draws_between_batches_from_a_common_source_is_told(tmp_path):
    def loader(x, y): return DataLoader(TensorDataset(x, y), BS, sampler=Slowly(len(x), random))
    for at in (1, 6):       # one batch drawn, and none: there is nothing in between
        check(loader, [at], tmp_path)
    learn, run = build(loader, tmp_path / "told")
    with pytest.raises(KeyboardInterrupt): run.fit(2, learn, cbs=Stop(4))
    learn, run = build(loader, tmp_path / "told")
    with pytest.raises(CheckpointError, match=r"sampler, a Slowly, draws random numbers between batches.*of its own"):
        run.fit(2, learn, resume=tmp_path / "told")


# --- get_dls' loaders by themselves ---------------------------------------------------------------------------------

def loaders(**kwargs):
    x = torch.arange(30.0)
    yield lambda: get_dls(Dataset(x, x), None, 4, generator=seeded(), **kwargs)[0]
    yield lambda: get_dls(Dataset(x, x), None, 4, generator=seeded(), collate_fn=halves, **kwargs)[0]


def test_a_loader_goes_on_from_its_state():
    for make in loaders():
        dl, n = make(), 0
        for _ in (*dl, *dl): n += 1
        whole = [x.tolist() for x, _ in dl]
        for at in range(len(dl) + 1):
            dl = make()
            assert len([*dl, *dl]) == n
            batches = iter(dl)
            head = [next(batches)[0].tolist() for _ in range(at)]
            state = dl.state_dict()
            assert state["batch"] == at
            other, before = make(), torch.get_rng_state()
            other.load_state_dict(state)
            tail = [x.tolist() for x, _ in other]
            assert torch.equal(torch.get_rng_state(), before)
            if not at: continue
            assert head + tail == whole
            assert len([*batches]) == len(dl) - at
            assert [x.tolist() for x, _ in other] == [x.tolist() for x, _ in dl]    # and so is the pass after it


def test_a_loader_between_passes_has_nothing_to_go_on_from():
    dl = next(loaders())()
    assert dl.state_dict()["batch"] == 0
    assert len([*dl]) == len(dl)
    assert dl.state_dict()["batch"] == 0
    other = next(loaders())()
    other.load_state_dict(dl.state_dict())
    assert len([*other]) == len(other)


def test_a_state_of_a_loader_of_another_length_is_an_error():
    dl = next(loaders())()
    next(iter(dl))
    other = get_dls(Dataset(torch.zeros(9), torch.zeros(9)), None, 4)[0]
    with pytest.raises(LoaderError, match="with 8 batches and this one has 3"): other.load_state_dict(dl.state_dict())
