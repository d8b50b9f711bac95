"""States of single callbacks: what is odd about each, seen where it counts."""

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_runner_states import LEARNERS, MADE, Kill, Killed, check, differing, events, fit, learner, no_waiting, seen  # noqa: F401
from torch import nn

import runner.backend
import runner.metrics
from runner import (
    SGD,
    AveragedWeights,
    AvgStatsCallback,
    Callback,
    Checkpoint,
    CPUBackendCallback,
    CSVLogger,
    DataBunch,
    GradientAccumulation,
    KeepBest,
    Optimizers,
    ParameterStats,
    ParamScheduler,
    Profile,
    ProgressCallback,
    Recorder,
    Runner,
    TensorBoardLogger,
    TerminateOnNonFinite,
    accuracy,
    sched_cos,
    sched_lin,
)
from runner.attributes import like, load, state_of
from runner.stateful import columns, rows_of
from runner.values import decoded, encoded


@pytest.fixture
def make(monkeypatch):
    """`make(callbacks, learner)` names a fit for `fit` and `check`."""
    def named(cbs, of=learner):
        monkeypatch.setitem(MADE, "case", cbs)
        monkeypatch.setitem(LEARNERS, "case", of)
        return "case"
    return named


def through(state): return decoded(encoded(state, ""))


# --- metrics ------------------------------------------------------------------------------------------------------

class Base:
    """Counts what was right; `step` of what."""

    def update(self, pred, yb): self.add((pred.argmax(1) == yb).float().sum(), len(yb))

    def add(self, right, n): self.right, self.n = self.right + right, self.n + n

    def reset(self): self.right, self.n = torch.zeros(()), 0

    def compute(self): return self.right / self.n


class AModule(Base, nn.Module):
    """As torchmetrics has it: attributes that the module's state dict leaves out, beside a buffer that is in it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("threshold", torch.tensor(0.5))
        self.register_buffer("last", torch.zeros(2), persistent=False)
        self.count = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.defaults, self.reductions, self.scores = {"right": torch.zeros(())}, {"right": torch.sum}, []

    def reset(self):
        super().reset()
        self.scores = []
        self.count.data.zero_()

    def update(self, pred, yb):
        super().update(pred, yb)
        self.scores.append(pred[:, 0])
        self.last.copy_(pred[-1, :2])
        self.count.data += 1

    def compute(self):
        return {"mean": self.right / self.n, "first": torch.cat(self.scores).sum(), "last": self.last.sum(),
                "count": self.count}


class Shared(nn.Module):
    """A collection of two that share what they gather, of which one gathers, as torchmetrics' does."""

    name = "shared"

    def __init__(self):
        super().__init__()
        self.one, self.two, self.tied = AModule(), AModule(), False

    def reset(self):
        self.one.reset()
        self.two.reset()
        self.tied = False

    def update(self, pred, yb):
        self.one.update(pred, yb)
        if not self.tied: self.two.scores, self.tied = self.one.scores, True

    def compute(self): return {"one": self.one.compute()["first"], "two": torch.cat(self.two.scores).sum()}


class Says(Base):
    """Says itself what its state is, and keeps what no checkpoint can hold."""

    def __init__(self): self.lock = object()

    def state_dict(self): return {"right": self.right, "n": self.n}

    def load_state_dict(self, state): self.right, self.n = state["right"], state["n"]


class SaysAsModule(Says, nn.Module):
    def __init__(self):
        nn.Module.__init__(self)
        self.lock = object()


class Around:
    """Holds another metric, a count that begins with the first batch, and containers of several kinds."""

    def __init__(self): self.inner = AModule()

    def reset(self):
        self.inner.reset()
        self.kinds, self.latest, self.lists, self.pairs = Counter(), deque(maxlen=3), defaultdict(list), OrderedDict()
        for name in ("batches", "unread"): vars(self).pop(name, None)

    def update(self, pred, yb):
        self.inner.update(pred, yb)
        self.batches = getattr(self, "batches", 0) + 1
        self.kinds.update(yb.tolist())
        self.latest.append(len(yb))
        self.lists[int(yb[0])].append(float(pred[0, 0]))
        self.pairs[self.batches] = {float(yb[0])}

    def compute(self):
        most = self.kinds.most_common(1)[0][1]
        return {**self.inner.compute(), "batches": self.batches, "most": most, "latest": sum(self.latest),
                "lists": sum(map(sum, self.lists.values())), "pairs": len(self.pairs)}


class Slots:
    __slots__ = ("n", "total")

    def reset(self): self.n, self.total = 0, 0.0

    def update(self, pred, yb): self.n, self.total = self.n + 1, self.total + float(pred.sum())

    def compute(self): return self.total / self.n


class Draws(Base):
    """Counts a random part of the items, by a generator of its own."""

    def __init__(self): self.generator = torch.Generator().manual_seed(3)

    def update(self, pred, yb):
        some = torch.rand(len(yb), generator=self.generator) < 0.5
        super().update(pred[some], yb[some])


@pytest.mark.parametrize("kind", [Base, AModule, Shared, Says, SaysAsModule, Around, Slots, Draws])
def test_a_metric_with_state_goes_on_in_the_middle_of_a_pass(kind, make, tmp_path, monkeypatch, capsys):
    check(make(lambda: [AvgStatsCallback([kind(), accuracy, kind()], quiet=True)]), tmp_path, monkeypatch)


def test_a_metric_that_no_checkpoint_can_hold_is_refused_at_the_start_with_the_mend(make, tmp_path, monkeypatch):
    class Locked(Base):
        def __init__(self): self.inner, self.lock = AModule(), object()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"the metric 'locked' keeps <object object at .*> \(object\) as 'lock', which "
                                        r"no checkpoint can hold; give its class Locked the methods state_dict\(\) and "
                                        r"load_state_dict\(state\), for a state of numbers, strings, tensors"):
        fit(make(lambda: [AvgStatsCallback(Locked())]))
    class Mixed(Base):
        def __init__(self): self.of = [torch.sum, 1.0]
    with pytest.raises(TypeError, match=r"the metric 'mixed' keeps \[<built-in .* \(list\) as 'of', which no"):
        fit(make(lambda: [AvgStatsCallback(Mixed())]))
    Runner(AvgStatsCallback(Locked(), quiet=True)).fit(1, learner())        # without a checkpoint it does no harm


def test_an_object_s_state_leaves_out_settings_and_takes_away_what_it_did_not_have():
    class Kept:
        def __init__(self): self.f, self.fs, self.kind, self.n = abs, {"a": abs, "b": None}, torch.float64, 1
    one, other = Kept(), Kept()
    one.n, other.later = 2, 3
    state = state_of(one, "it")
    assert set(state["values"]) == {"n", "kind"}
    load(other, through(state), torch.device("cpu"))
    assert vars(other) == vars(one)
    one.inner = AModule()
    with pytest.raises(ValueError, match=r"the state has 'inner' of a Kept, and this one has no such part; make it as"):
        load(other, through(state_of(one, "it")), torch.device("cpu"))


def test_a_container_has_the_class_that_it_had():
    pair = __import__("collections").namedtuple("pair", "a b")
    assert like(Counter("a"), {"b": 2}) == Counter("bb")
    assert isinstance(like(defaultdict(list), {"b": [2]})["c"], list)
    assert like(pair(1, 2), (3, 4)) == pair(3, 4)
    assert like(None, [1]) == [1]
    assert like([1], (2,)) == (2,)


def test_sums_of_a_pass_are_float64_on_the_loss_s_device_after_a_state():
    stats = runner.metrics.AvgStats([accuracy], True)
    run = SimpleNamespace(xb=torch.zeros(4, 2), yb=torch.tensor([0, 1, 1, 0]), pred=torch.randn(4, 2),
                          loss=torch.tensor(0.1))
    stats.accumulate(run)
    again = runner.metrics.AvgStats([accuracy], True)
    again.load_state_dict(through(stats.state_dict()))
    assert again.avg_stats == stats.avg_stats
    for s in (stats, again): s.accumulate(run)
    assert again.avg_stats == stats.avg_stats
    assert {s.dtype for s in again.sums} == {torch.float64}


def test_what_lay_elsewhere_goes_to_the_model_s_device_and_nothing_else_does():
    """The device "meta" stands for a GPU."""
    metric, meta = Base(), torch.device("meta")
    metric.reset()
    metric.right, metric.lists = metric.right.to(meta), [torch.zeros(2, device=meta) for _ in range(2)]
    metric.on_host = torch.ones(2)
    state = state_of(metric, "it")
    assert state["elsewhere"] == ["right", "lists"]
    state["values"] |= {"right": torch.tensor(3.0), "lists": [torch.zeros(2)] * 2}      # as a file has them
    load(metric, state, meta)
    assert (metric.right.device, metric.lists[0].device, metric.on_host.device) == (meta, meta, torch.device("cpu"))

    averaged = AveragedWeights(norms="recalibrate")
    averaged.run = SimpleNamespace(model=nn.Linear(2, 2, device=meta))
    averaged._kept = [((torch.zeros(2, device=meta), torch.ones(2)), torch.zeros(2, device=meta))]
    state = averaged.state_dict()
    state["kept"] = [((torch.zeros(2), torch.ones(2)), torch.zeros(2))]
    averaged.load_state_dict(state)
    (x, lengths), y = averaged._kept[0]
    assert (x.device, lengths.device, y.device) == (meta, torch.device("cpu"), meta)


# --- times and histories ------------------------------------------------------------------------------------------

class Clock(Callback):
    """A second for each batch, and none for anything else."""

    _order = -100
    now = 0.0

    def begin_batch(self): Clock.now += 1


def test_seconds_are_summed_over_the_parts(make, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner.metrics, "time", SimpleNamespace(perf_counter=lambda: Clock.now))
    monkeypatch.chdir(tmp_path)
    name = make(lambda: [AvgStatsCallback(quiet=True), Clock()])
    kill, again = 14, True
    while again:
        run, _, _, again = fit(name, kill)
        Clock.now += 1000                       # until the script is started again
        kill = kill + 7 if kill < 60 else None
    assert run.avg_stats.history["seconds"] == [6.0] * 3        # five training batches and one of validation


@pytest.mark.parametrize("rows", [
    [], [{"a": 1, "b": 0.5, "c": "x", "d": True, "e": 2 ** 70}, {"a": 2, "b": math.nan, "c": None, "d": 1, "e": 3}],
    [{"a": 1}, {"a": 1.0, "b": 2}], [{"a": 1, "b": 2}, {"b": 3, "a": 4}]])
def test_rows_come_back_as_they_were(rows):
    again = rows_of(through(columns(rows)))
    assert repr(again) == repr(rows)            # types, the order of keys, nan


def test_a_later_fit_goes_on_with_its_history(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def both(kill=None):
        learn = learner()
        run = Runner([AvgStatsCallback(quiet=True), Recorder()])
        run.fit(1, learn)
        try: run.fit(2, learn, [Kill(kill), Checkpoint("second", every_batches=2)], resume="second")
        except Killed: return None
        return run
    want, kill = both(), 12
    assert want.recorder.rows["epoch"] == [e for e in range(3) for _ in range(5)]
    for path in Path("second").iterdir(): path.unlink()
    while (run := both(kill)) is None: kill += 13
    assert kill > 40
    assert run.recorder.rows == want.recorder.rows
    assert run.avg_stats.history["epoch"] == [0, 1, 2]
    assert (run.recorder.past_epochs, run.recorder.past_steps) == (3, 15)


# --- groups, frozen parameters, schedules -------------------------------------------------------------------------

class Thaws(Callback):
    """Lets the first layer train from the second epoch on, in a parameter group of its own."""

    def __init__(self, at="begin_epoch"): self.at = at

    def __call__(self, event):
        opt, layer = self.run.opt, self.run.model[0]
        if event != self.at or self.run.epoch < 1 or layer.weight.requires_grad: return
        layer.requires_grad_(True)
        opt.add_param_group({"params": list(layer.parameters()), "lr": 0.02})


def frozen(cbs=()):
    learn = learner()
    learn.model[0].requires_grad_(False)
    learn.opt = SGD([p for p in learn.model.parameters() if p.requires_grad], lr=0.1)
    return learn


@pytest.mark.parametrize(("at", "relative"), [("begin_epoch", False), ("begin_epoch", True), ("after_step", False),
                                              ("after_epoch", True)])
def test_groups_and_parameters_that_were_added_in_mid_fit(at, relative, make, tmp_path, monkeypatch, capsys):
    schedule = sched_cos(1.0, 0.1)
    cbs = lambda: [Thaws(at), ParamScheduler("lr", schedule, relative=relative), Recorder(),     # noqa: E731
                   ParameterStats(every=2, verbose=False), TerminateOnNonFinite()]
    check(make(cbs, frozen), tmp_path, monkeypatch)
    run, learn, *_ = fit("case")
    assert [group["lr"] for group in learn.opt.param_groups] == [0.1, 0.02]         # their own
    assert list(run.parameter_stats.paths)[-2:] == ["0.weight", "0.bias"]
    late, all_along = (len(run.parameter_stats.series(path, "ratio")[0]) for path in ("0.weight", "4.bias"))
    assert 0 < late < all_along


def test_a_schedule_for_a_group_that_was_added_is_given_in_begin_fit(make, tmp_path, monkeypatch, capsys):
    class Schedules(Callback):
        _order = 5

        def begin_fit(self): self.run.param_scheduler_lr.scheds.append(sched_lin(0.3, 0.2))
    cbs = lambda: [Thaws(), ParamScheduler("lr", [sched_lin(0.1, 0.2)]), Schedules(), Recorder()]    # noqa: E731
    check(make(cbs, frozen), tmp_path, monkeypatch, times=2)
    monkeypatch.chdir(tmp_path / "broken off 0")
    MADE["case"] = lambda: [Thaws(), ParamScheduler("lr", [sched_lin(0.1, 0.2)]), Recorder()]
    with pytest.raises(ValueError, match=r"ParamScheduler has 1 schedules for 'lr', and a parameter group was added in "
                                         r"mid-fit: .* \(a fit to be resumed: in a begin_fit\)"): fit("case")


def adam(cbs=()):
    learn = learner()
    learn.opt = torch.optim.Adam([{"params": learn.model[0].parameters(), "lr": torch.tensor(0.1)},
                                  {"params": learn.model[4].parameters(), "lr": torch.tensor(0.02)}], foreach=False)
    return learn


def test_own_values_that_are_tensors_or_pairs(make, tmp_path, monkeypatch, capsys):
    def betas(pos): return 0.9 - 0.1 * pos, 0.99
    cbs = lambda: [ParamScheduler("lr", sched_cos(1.0, 0.1), relative=True), ParamScheduler("betas", betas),    # noqa: E731
                   Recorder()]
    check(make(cbs, adam), tmp_path, monkeypatch)
    _, learn, *_ = fit("case")
    assert [float(g["lr"]) for g in learn.opt.param_groups] == [pytest.approx(0.1), pytest.approx(0.02)]
    assert all(isinstance(g["lr"], torch.Tensor) and g["betas"] == (0.9, 0.999) for g in learn.opt.param_groups)


def test_a_scheduler_of_several_optimizers_and_a_list_of_schedules(make, tmp_path, monkeypatch, capsys):
    def of(cbs):
        learn = learner()
        learn.opt = Optimizers(SGD(learn.model[0].parameters(), lr=0.1), SGD(learn.model[4].parameters(), lr=0.2))
        return learn
    cbs = lambda: [ParamScheduler("lr", [sched_lin(0.1, 0.4), sched_cos(0.2, 0.1)]), Recorder()]     # noqa: E731
    check(make(cbs, of), tmp_path, monkeypatch, times=2)


# --- files --------------------------------------------------------------------------------------------------------

def broken_off(name, kill, **every):
    """A fit that is broken off, with a Kill after all others."""
    *_, killed = fit(name, kill, True, **every)
    assert killed


def test_a_csv_keeps_what_stood_there_before_and_has_each_row_once(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("history.csv").write_text("epoch,train_loss,note\n7,0.5,before\n")
    name = make(lambda: [AvgStatsCallback(quiet=True), CSVLogger()])
    broken_off(name, 60, every_epochs=None, every_batches=4)
    assert len(Path("history.csv").read_text().splitlines()) == 3
    broken_off(name, 30, every_epochs=None, every_batches=4)
    assert Path("history.csv").read_text().splitlines()[1] == "7,0.5,before,,"
    run, *_ = fit(name, every_epochs=None, every_batches=4)
    rows = Path("history.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "7", "0", "1", "2"]
    assert [float(row.split(",")[1]) for row in rows[2:]] == run.avg_stats.history["train_loss"]
    assert not list(Path().glob("*.part"))


def test_a_csv_that_was_not_there_at_the_checkpoint_is_begun_anew(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = make(lambda: [AvgStatsCallback(quiet=True), CSVLogger(append=False)])
    broken_off(name, 60, every_epochs=None, every_batches=4)
    Path("checkpoints").joinpath(max(p.name for p in Path("checkpoints").iterdir())).unlink()   # back to batch 4
    assert Path("history.csv").exists()
    fit(name, every_epochs=None, every_batches=4)
    assert [row.split(",")[0] for row in Path("history.csv").read_text().splitlines()] == ["epoch", "0", "1", "2"]


class Silent(TensorBoardLogger):
    """As after a kill: nobody closes the file, and a part of what waits in it is written."""

    name = "tensor_board_logger"

    def after_fit(self):
        if not self.run.kill.at: super().after_fit()
        elif self.writer is not None: self.writer.flush()


def test_events_of_a_killed_fit_are_there_once_beside_those_of_others(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Runner([AvgStatsCallback(quiet=True), TensorBoardLogger()]).fit(1, learner())       # another program's
    before = {path.name: path.read_bytes() for path in Path("runs").iterdir()}
    name = make(lambda: [AvgStatsCallback(quiet=True), Silent()])
    for kill in (25, 22, 31, 28, None):
        run, *_ = fit(name, kill, True, every_batches=3)
        run.tensor_board_logger.after_fit() if kill is None else run.tensor_board_logger.writer.close()
    for path, was in before.items(): assert Path("runs", path).read_bytes() == was
    for path in before: Path("runs", path).rename(path)
    scalars, _ = events("runs")
    assert [step for step, _ in scalars["batch/loss"]] == list(range(15))
    assert [step for step, _ in scalars["epoch/train_loss"]] == [0, 1, 2]
    n = len(list(Path("runs").iterdir()))
    for _ in range(3): fit(name)                # it is over
    assert len(list(Path("runs").iterdir())) <= n + 1
    assert events("runs")[0] == scalars


def test_the_best_weights_file_is_put_back(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = make(lambda: [AvgStatsCallback(quiet=True), KeepBest("train_loss", mode="max", path="best.pt")])
    broken_off(name, 60, every_epochs=None, every_batches=4)
    run, *_ = fit(name, 60, True, every_epochs=None, every_batches=4)
    best = torch.load("best.pt")
    assert all(torch.equal(t, kept) for t, kept in zip(list(best.values())[:2], run.keep_best.kept, strict=False))
    torch.save({}, "best.pt")
    run, learn, *_ = fit(name)
    best = torch.load("best.pt")
    assert best.keys() == learn.model.state_dict().keys()
    assert all(torch.equal(t, best[k]) for k, t in learn.model.state_dict().items())    # it has the best ones


def test_a_profile_that_is_broken_off_has_the_rest(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = make(lambda: [Profile(steps=(2, 9), path="trace.json")])
    broken_off(name, 45, every_batches=2, every_epochs=None)
    fit(name, every_batches=2, every_epochs=None)
    trace = json.loads(Path("trace.json").read_text())["traceEvents"]
    named = {e["name"] for e in trace if "batch " in e.get("name", "")}
    assert named == {f"batch {i}" for i in range(4, 9)}
    Path("trace.json").unlink()
    assert fit(name)[0].profile.table           # of a fit that is over
    assert not Path("trace.json").exists()


def test_the_bars_go_on_where_they_were(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = make(lambda: [ProgressCallback(live=True)])
    broken_off(name, 66, every_batches=1)
    capsys.readouterr()
    fit(name)
    lines = capsys.readouterr().out.replace("\r", "\n").splitlines()
    shown = [line for line in lines if "epoch" in line and "/5" in line]
    first = next(line for line in shown if "[0/5" not in line)
    assert "epoch 2/3" in first
    assert "[3/5" in first or "[4/5" in first or "[2/5" in first, first


# --- the choice of convolutions -----------------------------------------------------------------------------------

class Used(Callback):
    """How many threads and whose convolutions each pass has."""

    _order = 200

    def __init__(self): self.threads = []

    def begin_batch(self):
        onednn = bool(torch.backends.mkldnn.enabled)
        self.threads.append((self.in_train, self.epoch, torch.get_num_threads(), onednn))


def test_a_measured_choice_is_taken_over_and_not_measured_again(make, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(self, settings, steps):
        measured.append(1)
        return {s: [0.001 if s == (True, 1) else 0.1 + len(measured)] for s in settings}
    monkeypatch.setattr(CPUBackendCallback, "_measure", measure)
    monkeypatch.setattr(runner.backend, "SHARE", 2.0)
    monkeypatch.setattr(runner.backend, "LARGER", 2)        # the validation batches are twice as large
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        name = make(lambda: [CPUBackendCallback(), Used()])
        first, _, _, killed = fit(name, 50)
        assert killed
        torch.set_num_threads(3)                            # another shell
        learn, cbs = learner(), MADE["case"]()
        run = Runner([*cbs, Checkpoint("checkpoints"), Kill()])
        with pytest.warns(RuntimeWarning, match="threads 2, now 3"):
            run.fit(3, learn, resume="checkpoints", strict=False)
        assert torch.get_num_threads() == 3
        assert measured == [1]
        assert run.cpu_backend.choice == {"onednn": True, "threads": 1} == first.cpu_backend.choice
        for what in ("times", "reason"): assert getattr(run.cpu_backend, what) == getattr(first.cpu_backend, what)
        assert {used[2] for used in cbs[1].threads if used[0]} == {1}
        assert {used[2] for used in cbs[1].threads if not used[0]} == {2}      # the first part's own
    finally: torch.set_num_threads(before)


# --- averages -----------------------------------------------------------------------------------------------------

class Dicts(DataBunch):
    """Batches that are no pairs."""

    def __init__(self, of):
        super().__init__(of.train_dl, of.valid_dl)
        for dl in (self.train_dl, self.valid_dl): dl.collate_fn = lambda b: {"x": b[0], "y": b[1], "kind": "a"}


class OfDicts(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, batch): return self.inner(batch["x"])


class OfDict(Callback):
    def get_loss(self): self.run.loss = F.cross_entropy(self.run.pred, self.run.xb["y"])

    def predict(self): self.run.pred = self.run.model(self.run.xb)


def of_dicts(cbs=()):
    learn = learner()
    learn.model = OfDicts(learn.model)
    learn.data = Dicts(learn.data)
    return learn


def test_kept_batches_that_are_no_pairs_and_a_model_s_own_attributes(make, tmp_path, monkeypatch, capsys):
    def renew(model, batches):
        model.renewed = getattr(model, "renewed", 0) + len(batches)
        for xb, _ in batches: model(xb)
    cbs = lambda: [OfDict(), AveragedWeights(0.7, norms=renew, n_images=9), AvgStatsCallback(quiet=True)]    # noqa: E731
    check(make(cbs, of_dicts), tmp_path, monkeypatch)
    run, *_ = fit("case")
    assert run.averaged_weights.averaged_model.renewed == 9


def test_kept_batches_that_no_checkpoint_can_hold_are_refused(make, tmp_path, monkeypatch, capsys):
    @dataclass
    class Batch:
        x: torch.Tensor

    class Wraps(Callback):
        def begin_batch(self): self.run.xb = Batch(self.run.xb)

        def predict(self): self.run.pred = self.run.model(self.run.xb.x)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"AveragedWeights keeps a Batch with the fields x .* of the batches for the"
                                        r" norms, which no checkpoint can hold: let the loader or a callback make"):
        fit(make(lambda: [Wraps(), AveragedWeights(norms="recalibrate")]))
    leave = AveragedWeights(norms=lambda model, batches: None)
    run = Runner([Wraps(), leave, Checkpoint("at the ends of epochs")])
    run.fit(2, learner())       # between epochs there are none
    assert run.checkpoint.path is not None


# --- what diverges ------------------------------------------------------------------------------------------------

class Breaks(Callback):
    """Makes training diverge, in the step `at` or the epoch's validation."""

    _order = 900

    def __init__(self, how, at=8): self.how, self.at = how, at

    def begin_batch(self):
        run = self.run
        if self.how == "batch" and run.in_train and run.n_iter == self.at: run.xb = run.xb * math.inf
        if self.how == "validation" and not run.in_train and run.n_iter >= self.at: run.xb = run.xb / 0
        if self.how == "rate" and run.in_train:
            now = run.n_iter == self.at
            run.opt.param_groups[0].update(lr=1e38 if now else 0.1, weight_decay=1e9 if now else 0)


def diverged(name, folder, monkeypatch, tmp_path, kill=None, **every):
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / folder)
    run, _, _, killed = fit(name, kill, **every)
    return run.terminate_on_non_finite, run, killed


NO_CHECKPOINTS = {"every_batches": None, "every_epochs": 100}


class OffHost(TerminateOnNonFinite):
    """As on a GPU, where it looks at losses once in a while only."""

    name = "terminate_on_non_finite"

    def begin_fit(self):
        super().begin_fit()
        self.host = False


@pytest.mark.parametrize(("how", "at"), [("batch", 8), ("batch", 10), ("validation", 9), ("rate", 7), ("rate", 9)])
@pytest.mark.parametrize("kind", [TerminateOnNonFinite, OffHost, "two batches a step"])
def test_what_diverges_after_a_checkpoint_is_found_as_without(how, at, kind, make, tmp_path, monkeypatch, capsys):
    if several := isinstance(kind, str): at, kind = at // 2, TerminateOnNonFinite
    more = [GradientAccumulation(2)] if several else []
    name = make(lambda: [Breaks(how, at), kind("diverged.pt", keep=6, every=4), *more])
    whole, run, _ = diverged(name, "whole", monkeypatch, tmp_path, **NO_CHECKPOINTS)
    assert run.status == "diverged"
    assert whole.record["finding"] is not None
    for i, (every, kills) in enumerate([(1, (None, 40, 70)), (3, (55,))]):
        for kill in kills:
            folder = f"{i} {kill}"
            if kill is not None:
                _, _, killed = diverged(name, folder, monkeypatch, tmp_path, kill, every_batches=every)
                if not killed: continue
            found, run, _ = diverged(name, folder, monkeypatch, tmp_path, every_batches=every)
            assert run.status == "diverged"
            for what in ("finding", "indices", "rows"):
                assert not differing(seen(found.record[what]), seen(whole.record[what])), (folder, what)
            # From a copy that is nearer it may repeat where, with parts of a mean, it doesn't from afar.
            reports = [one.record["report"].partition("; not repeated")[0] for one in (found, whole)]
            assert reports[0] == reports[1]
            assert found.record["repeats"] >= whole.record["repeats"]
            again, run, _ = diverged(name, folder, monkeypatch, tmp_path)       # it is over
            assert (run.status, run.n_iter) == ("diverged", found.run.n_iter)
            assert again.record["report"] == found.record["report"]
            assert again.record["snapshots"][-1]["tensors"].keys() == found.record["snapshots"][-1]["tensors"].keys()


def test_no_checkpoint_is_written_of_weights_that_have_diverged(make, tmp_path, monkeypatch, capsys):
    name = make(lambda: [Breaks("rate", 7), TerminateOnNonFinite()])
    found, *_ = diverged(name, "here", monkeypatch, tmp_path)
    states = [torch.load(path, weights_only=True) for path in sorted(Path("checkpoints").iterdir())]
    assert [state["status"] for state in states] == ["ok"] * (len(states) - 1) + ["diverged"]
    assert all(t.isfinite().all() for state in states[:-1] for t in state["learner"]["tensors"].values())
    assert found.record["finding"]["phase"] == "step"
