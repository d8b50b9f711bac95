"""Networks trained as one: each gets the rows that it gets alone."""

import copy
import math

import pytest
import torch
from torch import nn

from experiments import side_by_side, training
from experiments.data import load_data
from experiments.errors import InputError
from experiments.models import Lambda, flatten
from experiments.published.small_batch import build
from experiments.side_by_side import EachTransform, SideBySide
from experiments.together import schedules, train_together
from experiments.training import FIGURES, train
from runner import Callback, get_dls


@pytest.fixture(scope="module")
def images():
    """40 of the digits."""
    return load_data("digits", limit=40)


@pytest.fixture
def doubles(images):
    """In float64."""
    found = copy.deepcopy(images)
    for ds in (found.train, found.valid): ds.x = ds.x.double()
    torch.set_default_dtype(torch.float64)
    yield found
    torch.set_default_dtype(torch.float32)


def rows(n, lr=0.1, **more):
    return [{"norm": "a norm", "batch_size": 3, "lr": lr, "seed": seed, "epochs": 2, **more} for seed in range(n)]


def alike(one, other):
    """Whether two of what `train` returns are equal but for the seconds, and for rounding."""
    (epochs, row, losses), (epochs2, row2, losses2) = one, other
    assert list(row) == list(row2)
    for a, b in zip([*epochs, row], [*epochs2, row2], strict=True):
        assert list(a) == list(b)
        for name in a:
            if name in ("seconds", "backend"): assert type(a[name]) is type(b[name])
            elif isinstance(a[name], (float, list)):
                assert a[name] == pytest.approx(b[name], rel=1e-9, abs=1e-9, nan_ok=True), name
            else: assert a[name] == b[name], name
    assert losses == pytest.approx(losses2, rel=1e-9, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("norm", ["RunningBatchNorm", "GroupNorm", "BatchNorm", "none"])
def test_each_network_gets_the_rows_that_it_gets_alone(doubles, norm):
    size = 10 if norm == "BatchNorm" else 3     # with few values it makes rounding a million times as large
    wanted = rows(3, 0.05, batch_size=size)
    together = train_together([build(norm, r["seed"]) for r in wanted], doubles, wanted, "cpu", "seeds")
    for row, found in zip(wanted, together, strict=True):
        alike(found, train(build(norm, row["seed"]), doubles, row, "cpu", ""))
    assert [len(losses) for _, _, losses in together] == [2 * math.ceil(40 / size)] * 3
    assert len({row["valid_loss"] for _, row, _ in together}) == 3


@pytest.mark.parametrize("rates", [(0.05, 0.01), ((0.05, 0.0), (0.02, 0.01)), ((0.01, 0.1, 0.0), (0.02, 0.05, 0.01))])
def test_networks_may_differ_in_their_rates(doubles, rates):
    wanted = [{**row, "lr": rate} for row, rate in zip(rows(2), rates, strict=True)]
    models = [build("RunningBatchNorm", 5) for _ in wanted]
    for row, found in zip(wanted, train_together(models, doubles, wanted, "cpu", drop_last=True), strict=True):
        alike(found, train(build("RunningBatchNorm", 5), doubles, row, "cpu", "", drop_last=True))


def test_the_models_have_what_was_trained_and_a_transform_is_heard(doubles):
    def make(seed):
        torch.manual_seed(seed)
        return nn.Sequential(Lambda(flatten), nn.Linear(392, 10))
    def halves(x): return x.view(-1, 2, 14, 28)[:, :1] * 2
    together = [make(seed) for seed in range(2)]
    found = train_together(together, doubles, rows(2), "cpu", tfm=halves)
    for seed, model in enumerate(together):
        alone = make(seed)
        alike(found[seed], train(alone, doubles, rows(2)[seed], "cpu", "", tfm=halves))
        for a, b in zip(alone.parameters(), model.parameters(), strict=True): torch.testing.assert_close(b, a)


@pytest.mark.parametrize("norm", ["RunningBatchNorm", "GroupNorm", "none"])
def test_one_that_diverges_is_a_row_and_leaves_the_others_alone(images, norm):
    wanted = rows(3)
    wanted[1]["lr"] = 1e30
    quiet = [{**row, "lr": lr} for row, lr in zip(wanted, (0.1, 0.05, 0.1), strict=True)]
    found, without = (train_together([build(norm, 0) for _ in wanted], images, its, "cpu") for its in (wanted, quiet))
    assert [row["status"] for _, row, _ in found] == ["ok", "diverged", "ok"]
    for k in (0, 2):
        assert [found[k][1][name] for name in FIGURES] == [without[k][1][name] for name in FIGURES]
        assert found[k][2] == without[k][2]
    epochs, row, losses = found[1]
    alone = train(build(norm, 0), images, wanted[1], "cpu", "")
    assert math.isnan(row["train_loss"]) == math.isnan(alone[1]["train_loss"])
    assert row["status"] == alone[1]["status"]
    assert row["valid_accuracies"] == pytest.approx(alone[1]["valid_accuracies"])
    assert not math.isfinite(losses[-1])
    assert len(epochs) == 2


@pytest.mark.parametrize("rates", [(1e30, 0.1), (1e30, 1e30)])
def test_what_is_left_of_a_lost_training_is_left_out_alone_and_together(doubles, rates, monkeypatch):
    def both(look):
        for module in (training, side_by_side): monkeypatch.setattr(module, "LOOK", look)
        monkeypatch.setattr(training.LeaveLost.__init__, "__defaults__", (look,))
        wanted = [{**row, "lr": rate} for row, rate in zip(rows(2), rates, strict=True)]
        return ([train(build("GroupNorm", 0), doubles, row, "cpu", "") for row in wanted],
                train_together([build("GroupNorm", 0) for _ in wanted], doubles, wanted, "cpu"))
    (alone, found), (whole, _) = both(4), both(1000)
    for one, other, full, rate in zip(alone, found, whole, rates, strict=True):
        alike(one, other)
        lost = rate > 1
        # 14 batches an epoch; in the second nothing is trained.
        assert len(one[2]) in ((4, 8) if lost else (28,))
        assert len(full[2]) == 28
        for name in ("valid_loss", "valid_accuracy", "valid_accuracies", "train_loss", "status"):
            assert one[1][name] == pytest.approx(full[1][name], nan_ok=True), name
        assert [math.isnan(epoch["train_accuracy"]) for epoch in one[0]] == [False, lost]


def test_a_norm_that_refuses_its_input_is_a_row_for_each(images):
    found = train_together([build("BatchNorm2d", s) for s in range(2)], images, rows(2, batch_size=1), "cpu")
    alone = train(build("BatchNorm2d", 0), images, rows(1, batch_size=1)[0], "cpu", "")
    assert [row["status"] for _, row, _ in found] == ["failed"] * 2
    assert "more than 1 value per channel" in found[0][1]["error"]
    assert list(found[0][1]) == list(alone[1])
    assert found[0][0] == alone[0] == []


class Killed(Callback):
    """Ends a fit at a batch, as a signal would."""

    _order = 50

    def __init__(self, at): self.at, self.batches = at, 0

    def after_batch(self):
        self.batches += self.run.in_train
        if self.batches == self.at: raise KeyboardInterrupt


@pytest.mark.parametrize(("at", "lr"), [(5, (0.1, 0.0)), (20, 0.1)])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(images, tmp_path, monkeypatch, at, lr):
    monkeypatch.setattr("experiments.training.EVERY_SECONDS", 1e-6)
    wanted = [{**row, "lr": lr if row["seed"] or lr == 0.1 else (0.05, 0.01)} for row in rows(3)]

    def trained(checkpoint=None, cbs=()):
        models = [build("RunningBatchNorm", row["seed"]) for row in wanted]
        found = train_together(models, images, wanted, "cpu", cbs=cbs, checkpoint=checkpoint)
        for epochs, row, _ in found:
            for r in [*epochs, row]: r.pop("seconds")
        return found, [t for m in models for t in m.state_dict().values()]
    straight, values = trained()
    with pytest.raises(KeyboardInterrupt): trained(tmp_path / "kept", [Killed(at)])
    resumed, theirs = trained(tmp_path / "kept")
    assert resumed == straight
    assert all(map(torch.equal, values, theirs))
    again, _ = trained(tmp_path / "kept")               # it is complete
    assert again == straight


@pytest.mark.parametrize("convolutions", ["onednn", "own", "measured", "rule"])
def test_the_convolutions_are_those_asked_for(images, convolutions):
    before = torch.backends.mkldnn.enabled, torch.get_num_threads()
    ((_, row, _),) = train_together([build("none", 0)], images, rows(1, epochs=1), "cpu", convolutions=convolutions)
    assert row["backend"].keys() == {"onednn", "threads", "reason"}
    assert row["backend"]["reason"].startswith({"rule": "by rule", "measured": "too few"}.get(convolutions, "as given"))
    assert convolutions == "measured" or row["backend"]["onednn"] == (convolutions != "own")
    assert (torch.backends.mkldnn.enabled, torch.get_num_threads()) == before


def test_rows_that_cannot_be_trained_as_one_are_refused(images):
    models = [build("none", s) for s in range(2)]
    with pytest.raises(InputError, match="2 models and 1 rows; it needs one row for each"):
        train_together(models, images, rows(1), "cpu")
    with pytest.raises(InputError, match=r"rows whose epochs differ, \[2, 3\]"):
        train_together(models, images, [rows(1)[0], rows(1, epochs=3)[0]], "cpu")
    with pytest.raises(InputError, match=r"the rates \[0\.1, \(0\.1, 0\.0\)\]; .* write \(r, r\)"):
        train_together(models, images, [rows(1)[0], rows(1, (0.1, 0.0))[0]], "cpu")


def test_rates_that_are_alike_are_numbers():
    assert schedules([0.1, 0.1], torch.float32) == (0.1, None)
    rate, sched = schedules([(0.1, 0.0)] * 2, torch.float32)
    assert (rate, sched(0.5)) == (0.1, 0.05)
    rate, sched = schedules([(0.1, 0.0), (0.2, 0.1)], torch.float64)
    assert rate.tolist() == [0.1, 0.2]
    assert sched(0.5).tolist() == pytest.approx([0.05, 0.15])


# --- batches ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("drop_last", [False, True])
def test_each_order_is_that_of_get_dls(images, drop_last):
    both = SideBySide(images.train, 7, (3, 4), drop_last)
    alone = [get_dls(images.train, None, 7, drop_last=drop_last, generator=torch.Generator().manual_seed(s))[0]
             for s in (3, 4)]
    for _ in range(2):
        batches = list(both)
        assert len(batches) == len(both) == 40 // 7 + (not drop_last)
        for k, dl in enumerate(alone):
            for (x, y), (xs, ys) in zip(dl, batches, strict=True):
                assert torch.equal(x, xs[:, k])
                assert torch.equal(y, ys[:, k])


def test_transforms_of_one_batch_of_images_are_those_of_all():
    x = torch.arange(2 * 3 * 784.0).view(2, 3, 784)
    assert EachTransform(3)(x).shape == (2, 3, 28, 28)
    y = EachTransform(3, lambda x: x.view(-1, 2, 392))(x)
    assert y.shape == (2, 6, 392)
    assert torch.equal(y[1, 2:4].flatten(), x[1, 1])
