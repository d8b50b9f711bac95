"""Any batch, any loader: nests of tensors through everything that takes a batch, batches that are no pair, loaders
without a length, and no validation at all."""

import collections
import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import Log, make_learn
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from runner import (
    ActivationStats,
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    CancelEpochException,
    CPUBackendCallback,
    CudaCallback,
    DataBunch,
    GradientStats,
    Learner,
    LR_Find,
    NormStats,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    accuracy,
    preflight,
    replay,
    sched_lin,
    train_eval_gap,
)
from runner.batches import first_tensor, leaves, map_tensors, part_of, size_of, to_device


@dataclass
class Item:
    image: torch.Tensor
    scale: torch.Tensor
    name: str = "a"


@dataclass(frozen=True)
class Frozen:
    image: torch.Tensor
    scale: torch.Tensor
    seen: list = field(default_factory=list, init=False)

    def __post_init__(self): self.seen.append(1)


Point = collections.namedtuple("Point", "image scale more")


class Own(dict):
    """A dict of the user's, which has attributes too."""


class Moving:
    """What has a method `to` is moved by it."""

    def __init__(self, image, scale): self.image, self.scale = image, scale

    def to(self, device): return Moving(self.image.to(device), self.scale.to(device))


FORMS = {
    "tuple": lambda x, s: (x, s), "list": lambda x, s: [x, s], "dict": lambda x, s: {"image": x, "scale": s, "id": 3},
    "dataclass": lambda x, s: Item(x, s), "frozen": lambda x, s: Frozen(x, s), "named": lambda x, s: Point(x, s, None),
    "ordered": lambda x, s: collections.OrderedDict(image=x, scale=s), "own": lambda x, s: Own(image=x, scale=s),
    "user dict": lambda x, s: collections.UserDict(image=x, scale=s),
    "nested": lambda x, s: {"ids": ["a"], "parts": [Item(x, s), (s, {"deep": x})]},
}


def taken_apart(xb):
    """Image and scale of a batch in any of the forms."""
    if isinstance(xb, dict) and "parts" in xb: xb = xb["parts"][0]
    if isinstance(xb, (collections.UserDict, dict)): return xb["image"], xb["scale"]
    return (xb[0], xb[1]) if type(xb) in (tuple, list) else (xb.image, xb.scale)


class Net(nn.Module):
    """Takes a batch in any of the forms."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, xb):
        x, s = taken_apart(xb)
        return self.linear(self.norm(x * s))


class Plain(Net):
    def forward(self, x): return self.linear(self.norm(x))


def tensors(n=5, size=4):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 4, generator=g), torch.rand(size, 1, generator=g) + 0.5,
             torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


def learner(batches, valid=None, model=Net):
    torch.manual_seed(0)
    model = model()
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, DataBunch(batches, valid))


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- nests --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMS)
def test_a_nest_has_the_size_of_its_first_tensor_and_moves_as_one(form):
    nest = FORMS[form](torch.ones(5, 4), torch.ones(5, 1))
    assert size_of(nest) == 5
    moved = to_device(nest, torch.device("meta"))
    assert type(moved) is type(nest)
    found = [t for t in leaves(moved) if torch.is_tensor(t)]
    assert len(found) == (4 if form == "nested" else 2)
    assert all(t.device.type == "meta" for t in found)
    assert all(t.device.type == "cpu" for t in leaves(nest) if torch.is_tensor(t))      # a copy: ours is as it was
    others = [t for t in leaves(moved) if not torch.is_tensor(t)]
    assert others == [t for t in leaves(nest) if not torch.is_tensor(t)]
    doubled, part = map_tensors(lambda t: t * 2, nest), part_of(nest, 1, 3)
    assert [t.sum().item() for t in leaves(doubled) if torch.is_tensor(t)][:2] == [40, 10]
    assert [t.shape[0] for t in leaves(part) if torch.is_tensor(t)] == [2] * len(found)
    assert first_tensor(nest).shape == (5, 4)


def test_sizes_of_what_is_no_plain_nest():
    assert size_of(torch.ones(3, 2)) == 3
    assert size_of({"temperature": torch.tensor(1.0), "x": torch.ones(7, 2)}) == 7      # one without axes tells nothing
    assert size_of(pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])) == 2            # sequences, not their 5 steps
    assert size_of((pack_sequence([torch.ones(3, 1), torch.ones(2, 1)]), torch.ones(2))) == 2
    assert size_of(["a", "b", "c"]) == size_of({"text": ["a", "b", "c"]}) == 3
    assert size_of(torch.ones(4, 2).numpy()) == 4
    assert size_of({"x": torch.ones(0, 2)}) == 0
    for nothing in ({"a": 1}, 3, torch.tensor(1.0), {}, object()):
        with pytest.raises(TypeError, match="in which no tensor tells how many items it has; put one first"):
            size_of(nothing)


def test_what_has_a_method_to_is_moved_by_it():
    moved = to_device({"a": Moving(torch.ones(2), torch.ones(2))}, torch.device("meta"))
    assert moved["a"].image.device.type == "meta"
    packed = to_device(pack_sequence([torch.ones(3, 1)]), torch.device("meta"))
    assert packed.data.device.type == "meta"
    assert packed.batch_sizes.device.type == "cpu"                  # as its own `to` has it


@pytest.mark.parametrize("form", FORMS)
def test_a_nest_trains_as_its_tensors_do(form):
    """Through the callbacks that look at a batch, and to the last bit what plain tensors give."""
    make = FORMS[form]
    nested = [(make(x, s), y) for x, s, y in tensors()]
    plain = [(x * s, y) for x, s, y in tensors()]
    a, b = learner(nested, nested), learner(plain, plain, Plain)
    runs = [Runner([CudaCallback("cpu"), AvgStatsCallback(accuracy), Recorder(), TerminateOnNonFinite(every=2),
                    ActivationStats(verbose=False), GradientStats(verbose=False), NormStats(verbose=False),
                    CPUBackendCallback()]) for _ in range(2)]
    for run, learn in zip(runs, (a, b), strict=True): run.fit(2, learn)
    assert same_weights(a.model, b.model)
    for x, y in zip(*(run.avg_stats.history for run in runs), strict=True):
        assert {k: v for k, v in x.items() if k != "seconds"} == {k: v for k, v in y.items() if k != "seconds"}
    assert runs[0].recorder.losses == runs[1].recorder.losses
    assert runs[0].norm_stats.rows == runs[1].norm_stats.rows
    rows = [[{k: v for k, v in row.items() if k != "module"} for row in run.activation_stats.rows] for run in runs]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("form", FORMS)
def test_a_nest_moves_with_the_runner(form):
    seen = []

    class Look(Callback):
        def begin_batch(self): seen.extend(t.device.type for t in leaves((self.xb, self.yb)) if torch.is_tensor(t))
    data = [(FORMS[form](x, s), {"label": y, "name": "n"}) for x, s, y in tensors(2)]
    learn = learner(data)
    learn.loss_func = lambda pred, yb: F.cross_entropy(pred, yb["label"])
    Runner([CudaCallback("meta"), Look()]).fit(1, learn)
    assert set(seen) == {"meta"}


def test_targets_may_be_nests():
    data = [(x, {"label": y, "weight": s}) for x, s, y in tensors()]
    learn = learner(data, data, Plain)
    learn.loss_func = lambda pred, yb: (F.cross_entropy(pred, yb["label"], reduction="none") * yb["weight"].T).mean()
    run = Runner([CudaCallback("cpu"), AvgStatsCallback(lambda pred, yb: accuracy(pred, yb["label"]))])
    run.fit(1, learn)
    with torch.no_grad(): preds = [(learn.model(x), yb) for x, yb in data]
    row = run.avg_stats.history[0]
    assert row["valid_<lambda>"] == pytest.approx(sum(accuracy(p, yb["label"]).item() for p, yb in preds) / 5)
    assert row["valid_loss"] == pytest.approx(sum(learn.loss_func(*pair).item() for pair in preds) / 5)


def test_a_transform_gets_the_nest():
    data = [({"image": x, "scale": s}, y) for x, s, y in tensors()]
    learn, twin = learner(data), learner([(x * s, y) for x, s, y in tensors()], model=Plain)
    Runner([BatchTransformXCallback(lambda b: {**b, "image": b["image"] * 1.0})]).fit(1, learn)
    Runner().fit(1, twin)
    assert same_weights(learn.model, twin.model)


@pytest.mark.parametrize("form", FORMS)
def test_preflight_and_the_gap_take_nests(form):
    batches = [(FORMS[form](x, s), y) for x, s, y in tensors()]
    x, s, _ = tensors()[0]
    torch.manual_seed(0)
    net, plain = Net(), Plain()
    plain.load_state_dict(net.state_dict())
    want = preflight(plain, x * s)
    assert str(preflight(net, batches)) == str(want)
    assert str(preflight(net, DataLoader(batches, batch_size=None))) == str(want)
    if form not in ("tuple", "list", "named"): assert str(preflight(net, batches[0][0])) == str(want)
    for size in (None, 2):
        a, b = train_eval_gap(net, batches[0][0], batch_size=size), train_eval_gap(plain, x * s, batch_size=size)
        assert a.rows[0] == b.rows[0]
        assert a.channels == b.channels


def test_preflight_sees_the_smaller_last_batch_of_dicts():
    ds = [{"image": torch.randn(4), "scale": torch.ones(1)} for _ in range(5)]
    found = preflight(Net(), DataLoader(ds, 4)).findings
    assert [(f.batch, f.last) for f in found] == [(4, False), (1, True)]


def test_preflight_says_how_a_model_gets_its_part():
    batch = {"image": torch.randn(40, 4), "label": torch.zeros(40)}
    with pytest.raises(TypeError, match=r"preflight: the model doesn't take a dict with the keys \"image\" \(float32 "
                                        r"tensor of shape \(40, 4\)\).*say what it gets by tfm, such as tfm=lambda b"):
        preflight(Plain(), [batch])
    assert preflight(Plain(), [batch], tfm=lambda b: b["image"]).ok


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("own", "user dict", "dataclass", "frozen", "nested",
                                                                "named")])
def test_a_diverged_nest_is_recorded_and_replayed(form, tmp_path):
    data = [(FORMS[form](x, s), y) for x, s, y in tensors()]
    x, _ = taken_apart(data[3][0])
    x[1, 2] = math.inf
    learn = learner(data)
    run = Runner([TerminateOnNonFinite(tmp_path / "record.pt")])
    run.fit(1, learn)
    assert run.status == "diverged"
    record = run.terminate_on_non_finite.record
    assert record["finding"]["what"] == "the batch"
    assert record["repeats"]
    again = replay(tmp_path / "record.pt", learner(data))
    assert again.same, again.report


@pytest.mark.parametrize("form", ["own", "user dict", "dataclass", "frozen", "nested", "named"])
def test_a_diverged_nest_of_the_users_classes_is_replayed_in_the_same_process(form):
    data = [(FORMS[form](x, s), y) for x, s, y in tensors()]
    x, _ = taken_apart(data[3][0])
    x[1, 2] = math.nan
    run = Runner([TerminateOnNonFinite()])
    run.fit(1, learner(data))
    record = run.terminate_on_non_finite.record
    assert record["finding"]["what"] == "the batch"
    again = replay(record, learner(data))
    assert again.same, again.report


# --- pairs --------------------------------------------------------------------------------------------------------

@dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor


class Bag:
    pass


X, Y = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("batch", "said", "mend"), [
    ({"image": X, "label": Y}, 'a dict with the keys "image" (float32 tensor of shape (2, 4)), "label" (int64 tensor '
     'of shape (2,))', 'self.xb["image"], self.xb["label"]'),
    ({"target": Y, "image": X}, "a dict with the keys", 'self.xb["image"], self.xb["target"]'),
    ({"ids": X, "mask": X, "labels": Y}, 'a dict with the keys "ids" (float32 tensor of shape (2, 4)), "mask"',
     '{k: v for k, v in self.xb.items() if k != "labels"}, self.xb["labels"]'),
    (collections.UserDict(image=X, label=Y), "a UserDict with the keys", 'self.xb["image"], self.xb["label"]'),
    (Sample(X, Y), "a Sample with the fields image (float32 tensor", "self.xb.image, self.xb.label"),
    ((X, X, Y), "a tuple of length 3 (float32 tensor of shape (2, 4), float32 tensor", "self.xb[:-1], self.xb[-1]"),
    ([X], "a list of length 1 (float32 tensor of shape (2, 4))", "self.xb[0], self.xb[0]"),
    (X, "a float32 tensor of shape (2, 4)", "self.xb, self.xb"),
    ((), "a tuple of length 0", "self.xb, self.xb"), ({}, "a dict of length 0", "self.xb, self.xb"),
    (3, "an int", "self.xb, self.xb"), (None, "a NoneType", "self.xb, self.xb"),
    (Bag(), "a Bag", "self.xb, self.xb"),
    (pack_sequence([X]), "a PackedSequence of length 4", "self.xb[:-1], self.xb[-1]"),
])
def test_a_batch_that_is_no_pair_is_refused_with_the_mend(batch, said, mend, compiled):
    for learn, which in ((learner([batch], model=Plain), "training"),
                         (learner([(X, Y)], [batch], Plain), "validation"))[:1 if compiled else 2]:
        with pytest.raises(TypeError) as e: Runner(compile=compiled).fit(1, learn)
        text = str(e.value)
        assert f"the {which} loader gave a batch that is not a pair (xb, yb) but {said}" in text
        assert ("    class Pair(Callback):\n        def begin_batch(self): self.run.xb, self.run.yb = " + mend) in text
        assert "or give the loader a collate_fn that returns (xb, yb)" in text


@pytest.mark.parametrize("batch", [{"image": X, "label": Y}, Sample(X, Y), (X, X, Y), (X, X, X, Y)])
def test_the_mend_that_is_shown_works(batch):
    with pytest.raises(TypeError) as e: Runner().fit(1, learner([batch], model=Plain))
    lines = [line[4:] for line in str(e.value).splitlines() if line.startswith("    ")]
    names = {"Callback": Callback}
    exec("\n".join(lines), names)

    class First(Plain):
        def forward(self, x): return super().forward(x if torch.is_tensor(x) else x[0])
    learn, twin = learner([batch] * 3, [batch], First), learner([(X, Y)] * 3, [(X, Y)], Plain)
    Runner([names["Pair"](), AvgStatsCallback(accuracy)]).fit(2, learn)
    Runner().fit(2, twin)
    assert same_weights(learn.model, twin.model)


@pytest.mark.parametrize("pair", [(X, Y), [X, Y], collections.namedtuple("Two", "image label")(X, Y)])
def test_a_tuple_or_list_of_two_is_a_pair(pair):
    learn, twin = learner([pair], model=Plain), learner([(X, Y)], model=Plain)
    for each in (learn, twin): Runner().fit(1, each)
    assert same_weights(learn.model, twin.model)


def test_a_callback_can_do_without_targets():
    class Restore(Callback):
        def get_loss(self): self.run.loss = F.mse_loss(self.pred, self.xb)
    model = nn.Linear(4, 4)
    twin = copy.deepcopy(model)
    learn = Learner(model, torch.optim.SGD(model.parameters(), 0.1), None, DataBunch([X, 2 * X], [X]))
    run = Runner([Restore(), AvgStatsCallback(lambda pred, xb: (pred - xb).abs().mean())])
    run.fit(1, learn)
    opt = torch.optim.SGD(twin.parameters(), 0.1)
    for x in (X, 2 * X):
        F.mse_loss(twin(x), x).backward()
        opt.step()
        opt.zero_grad()
    assert same_weights(model, twin)
    assert run.avg_stats.history[0]["valid_<lambda>"] == pytest.approx((twin(X) - X).abs().mean().item())
    with pytest.raises(TypeError, match="not a pair"): Runner().fit(1, learn)      # its step is the runner's again


def test_callbacks_can_take_over_prediction_and_loss_of_a_dict():
    class Named(Callback):
        def predict(self): self.run.pred = self.model(self.xb["image"])

        def get_loss(self): self.run.loss = F.cross_entropy(self.pred, self.xb["label"])
    data = [{"image": x, "scale": s, "label": y} for x, s, y in tensors()]
    learn, twin = learner(data, data, Plain), learner([(x, y) for x, _, y in tensors()], model=Plain)
    run = Runner([CudaCallback("cpu"), Named(), AvgStatsCallback(), Recorder(), TerminateOnNonFinite(),
                  ActivationStats(verbose=False)])
    run.fit(2, learn)
    Runner().fit(2, twin)
    assert same_weights(learn.model, twin.model)
    assert run.avg_stats.train_stats.count == 20


def test_a_wrapped_loss_still_needs_targets():
    class Around(Callback):
        def get_loss(self, inner): inner()
    with pytest.raises(TypeError, match="is not a pair"): Runner([Around()]).fit(1, learner([{"image": X, "label": Y}]))


def test_a_model_of_several_arguments_has_its_two_lines():
    class Two(Plain):
        def forward(self, x, s): return super().forward(x * s)

    class Splat(Callback):
        def predict(self): self.run.pred = self.model(*self.xb)
    learn = learner([((x, s), y) for x, s, y in tensors()], model=Two)
    twin = learner([(x * s, y) for x, s, y in tensors()], model=Plain)
    Runner([Splat()]).fit(2, learn)
    Runner().fit(2, twin)
    assert same_weights(learn.model, twin.model)


# --- no validation ------------------------------------------------------------------------------------------------

def test_without_a_validation_loader_there_is_no_validation():
    learn, twin = make_learn(), make_learn()
    learn.data.valid_dl = None
    log, stats, bar = Log(), AvgStatsCallback(accuracy), ProgressCallback(live=False)
    Runner([log, stats, bar, Recorder(), CPUBackendCallback(), TerminateOnNonFinite(), NormOrNone()]).fit(2, learn)
    Runner().fit(2, twin)
    assert same_weights(learn.model, twin.model)
    assert "begin_validate" not in log.events
    assert log.events.count("after_epoch") == 2
    assert [list(row) for row in stats.history] == [["epoch", "train_loss", "train_accuracy", "seconds"]] * 2
    assert learn.model.training


class NormOrNone(ActivationStats):
    def __init__(self): super().__init__(phases=["train", "valid"], verbose=False)


def test_the_last_steps_damage_is_seen_without_a_validation():
    class Damage(Callback):
        def after_step(self):
            if self.n_iter == 1:
                with torch.no_grad(): next(self.model.parameters()).fill_(math.nan)
    learn = make_learn()
    learn.data.valid_dl = None
    run = Runner([Damage(), TerminateOnNonFinite()])
    run.fit(1, learn)
    assert run.status == "diverged"


# --- no length ----------------------------------------------------------------------------------------------------

class Stream(IterableDataset):
    def __iter__(self): yield from ((x, y) for x, _, y in tensors())


class Again:
    """An iterable and nothing more."""

    def __init__(self, batches): self.batches = batches

    def __iter__(self): return iter(self.batches)


class Unknown(Again):
    def __len__(self): raise NotImplementedError


class Lying(Again):
    def __init__(self, batches, length): self.batches, self.length = batches, length

    def __len__(self): return self.length


def pairs(): return [(x, y) for x, _, y in tensors()]


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(), batch_size=None), lambda: Again(pairs()),
                                  lambda: Unknown(pairs())])
@pytest.mark.parametrize("live", [True, False])
def test_a_loader_without_a_length_trains_as_a_list_does(make, live):
    seen = []

    class Look(Callback):
        _order = 5

        def after_batch(self):
            if self.in_train: seen.append((self.iters, self.n_epochs))

        def begin_validate(self): seen.append((self.iters, self.n_epochs))
    learn, twin = learner(make(), make(), Plain), learner(pairs(), pairs(), Plain)
    run = Runner([Look(), AvgStatsCallback(accuracy), Recorder(), TerminateOnNonFinite(), NormStats(verbose=False),
                  CPUBackendCallback(), ProgressCallback(live=live)])
    run.fit(2, learn)
    other = Runner([AvgStatsCallback(accuracy)])
    other.fit(2, twin)
    assert same_weights(learn.model, twin.model)
    assert seen == [(None, 0.0)] * 5 + [(None, 1.0)] + [(None, 1.0)] * 5 + [(None, 2.0)]
    assert run.iters is None
    assert len(run.norm_stats.rows) == 10
    assert run.cpu_backend.reason == "nobody knows how many batches there are"
    for x, y in zip(run.avg_stats.history, other.avg_stats.history, strict=True):
        assert {k: v for k, v in x.items() if k != "seconds"} == {k: v for k, v in y.items() if k != "seconds"}


def test_progress_without_a_total(capsys):
    Runner([ProgressCallback(live=True)]).fit(1, learner(Again(pairs()), model=Plain))
    assert "[5/? " in capsys.readouterr().out


@pytest.mark.parametrize("length", [0, 3, 5, 9])
@pytest.mark.parametrize("live", [True, False])
def test_a_length_that_is_wrong_changes_nothing_but_positions(length, live):
    positions = []

    class Look(Callback):
        def after_batch(self): positions.append(self.n_epochs)
    learn, twin = learner(Lying(pairs(), length), model=Plain), learner(pairs(), model=Plain)
    run = Runner([Look(), Recorder(), NormStats(verbose=False, phases="train"), ProgressCallback(live=live)])
    run.fit(2, learn)
    Runner().fit(2, twin)
    assert same_weights(learn.model, twin.model)
    assert run.n_epochs == 2.0
    assert positions == sorted(positions)
    assert max(positions) <= 2.0
    assert len(run.recorder.losses) == 10


def test_a_pass_that_is_cut_short_counts_what_was_seen():
    class Stop(Callback):
        _order = 5

        def after_batch(self):
            if self.in_train and self.n_iter % 5 == 2: raise CancelEpochException
    for loader, want in ((Again(pairs()), 0.0), (pairs(), 0.4)):
        run = Runner([Stop()])
        run.fit(1, learner(loader, model=Plain))
        assert run.n_epochs == pytest.approx(want)


@pytest.mark.parametrize(("loader", "text"), [
    (Again([]), "the training loader has no batches; it needs at least one"), (iter([]), "which can be read once"),
    (Lying([], 4), "the training loader has no batches"), ([], "the training loader has no batches"),
    (None, "the training loader has no batches")])
def test_a_loader_without_batches_is_refused_at_the_end_of_its_pass(loader, text):
    with pytest.raises(ValueError, match=text): Runner().fit(1, learner(loader, model=Plain))
    if loader is None: return
    with pytest.raises(ValueError, match=text.replace("training", "validation")):
        Runner().fit(1, learner(pairs(), loader, Plain))


def test_an_iterator_is_good_for_one_epoch():
    Runner().fit(1, learner(iter(pairs()), iter(pairs()), Plain))
    with pytest.raises(ValueError, match=r"it is an iterator \(generator\), which can be read once, and each epoch"):
        Runner().fit(2, learner((pair for pair in pairs()), model=Plain))


def test_a_schedule_by_position_needs_a_length():
    learn = learner(Again(pairs()), model=Plain)
    with pytest.raises(ValueError, match=r"the training loader, a Again, has no length, and a schedule goes by the "
                                         r"position in it: give the loader a length \(__len__\)"):
        Runner([ParamScheduler("lr", sched_lin(0.1, 0.2))]).fit(1, learn)
    Runner([ParamScheduler("lr", sched_lin(0.1, 0.2))]).fit(1, learner(pairs(), Again(pairs()), Plain))


def test_the_rate_finder_needs_no_length():
    finder, learn = LR_Find(max_iter=12), learner(Again(pairs()), model=Plain)
    before = copy.deepcopy(learn.model)
    Runner().fit(5, learn, cbs=finder)
    assert len(finder.lrs) == 12
    assert same_weights(learn.model, before)


def test_a_probe_stops_when_its_memory_is_full(capsys):
    data = [(torch.randn(2, 4), Y)] * 50
    stats = NormStats(max_mb=0.002)
    Runner([stats]).fit(1, learner(Again(data), model=Plain))
    n = len(stats.rows)
    assert f"NormStats: 1 module, train, every batch: at most {n} batches, 0.0019 MB" in capsys.readouterr().out
    assert 1 < n < 50
    assert [row["batch"] for row in stats.rows] == list(range(n))
    Runner([stats]).fit(1, learner(Lying(data, 2), model=Plain))     # more than it told
    assert len(stats.rows) <= n


def test_a_tensor_data_set_of_one_tensor_is_no_pair():
    loader = DataLoader(TensorDataset(torch.ones(4, 4)), 2)
    with pytest.raises(TypeError, match="but a list of length 1"): Runner().fit(1, learner(loader, model=Plain))
