"""What callbacks keep is in a checkpoint: a fit that is broken off anywhere ends as if it had not been."""

import csv
import random
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_runner_pickling import PUBLIC, high, low, make_step
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

import runner
from runner import (
    SGD,
    ActivationStats,
    AveragedWeights,
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    Checkpoint,
    CSVLogger,
    DataBunch,
    Dataset,
    EarlyStopping,
    GradientAccumulation,
    GradientClip,
    GradientStats,
    KeepBest,
    Learner,
    MixedPrecision,
    NormStats,
    ParameterStats,
    ParamScheduler,
    Profile,
    ProgressCallback,
    Recorder,
    Runner,
    TensorBoardLogger,
    TerminateOnNonFinite,
    TorchScheduler,
    Turns,
    accuracy,
    combine_scheds,
    get_dls,
    sched_cos,
    sched_lin,
    view_tfm,
)
from runner.insight.store import Store
from runner.stateful import Stateful


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """A kill in these tests takes nothing from the disk that was written to it."""
    monkeypatch.setattr("os.fsync", lambda fd: None)


class Seen(nn.Module):
    """A transform with a state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean.lerp_(x.mean(0), 0.1)
        return x - self.mean


class Counts:
    """A metric with state."""

    def reset(self): self.table, self.seen = torch.zeros(3, 3), []

    def update(self, pred, yb):
        self.table.index_put_((yb, pred.argmax(1)), torch.ones(len(yb)), accumulate=True)
        self.seen.append(pred[0])

    def compute(self): return {"trace": self.table.trace(), "first": torch.stack(self.seen).sum()}


one_cycle = partial(OneCycleLR, max_lr=0.3, total_steps=15)
plateau = partial(ReduceLROnPlateau, patience=0, factor=0.5)
two_phases = combine_scheds([0.4, 0.6], [sched_lin(0.1, 0.4), sched_cos(0.4, 0.01)])

# What is fitted with: the callbacks of each public class, with their settings, and of what else they need.
MADE = {
    "ActivationStats": lambda: [ActivationStats(phases=["train", "valid"], every=2, first=2)],
    "AveragedWeights": lambda: [AvgStatsCallback(), AveragedWeights(0.8, start=1, every=2), KeepBest()],
    "AveragedWeights, the mean, recalibrated": lambda: [AveragedWeights(None, norms="recalibrate", n_images=8)],
    "AveragedWeights by the epoch": lambda: [AveragedWeights(0.5, by="epoch", norms="copy")],
    "AvgStatsCallback": lambda: [AvgStatsCallback([accuracy, Counts()])],
    "BatchTransformXCallback": lambda: [BatchTransformXCallback(Seen())],
    "BatchTransformXCallback of a function": lambda: [BatchTransformXCallback(view_tfm(6))],
    "CSVLogger": lambda: [AvgStatsCallback(accuracy), CSVLogger()],
    "CSVLogger, not appending": lambda: [AvgStatsCallback(accuracy), CSVLogger(append=False)],
    "EarlyStopping": lambda: [AvgStatsCallback(), EarlyStopping(patience=1, min_delta=0.02)],
    "GradientAccumulation": lambda: [GradientAccumulation(3), ParamScheduler("lr", two_phases)],
    "GradientClip": lambda: [GradientClip(0.3)],
    "GradientStats": lambda: [GradientStats(every=2)],
    "KeepBest": lambda: [AvgStatsCallback(), KeepBest("train_loss", mode="max", path="best.pt")],
    "MixedPrecision": lambda: [MixedPrecision()],
    "MixedPrecision, float16": lambda: [MixedPrecision("fp16", init_scale=2.0 ** 30, growth_interval=3)],
    "NormStats": lambda: [NormStats(phases=["train", "valid"])],
    "ParamScheduler": lambda: [ParamScheduler("lr", two_phases)],
    "ParamScheduler, relative": lambda: [ParamScheduler("lr", sched_cos(1, 0), relative=True)],
    "Profile": lambda: [Profile(steps=(1, 2), path=None)],
    "ProgressCallback": lambda: [AvgStatsCallback(), ProgressCallback()],
    "ProgressCallback, live": lambda: [AvgStatsCallback(), ProgressCallback(live=True)],
    "TensorBoardLogger": lambda: [AvgStatsCallback(), ParameterStats(every=2), TensorBoardLogger(every=2)],
    "TerminateOnNonFinite": lambda: [TerminateOnNonFinite(keep=4, every=3)],
    "TorchScheduler": lambda: [TorchScheduler(make_step)],
    "TorchScheduler, one cycle": lambda: [TorchScheduler(one_cycle, by="batch")],
    "TorchScheduler, on a plateau": lambda: [AvgStatsCallback(), TorchScheduler(plateau, monitor="train_loss")],
    "Turns": lambda: [Turns(low=low, high=high)],
    "many": lambda: [AvgStatsCallback(accuracy, quiet=True), Recorder(), GradientAccumulation(2), GradientClip(0.5),
                     AveragedWeights(0.7, norms="recalibrate", n_images=6), ParamScheduler("lr", two_phases),
                     ParameterStats(verbose=False), KeepBest(), TerminateOnNonFinite(), EarlyStopping(patience=2)],
}
APART = {"Checkpoint", "LR_Find", "TrainEvalCallback"}      # the tool itself; a fit that is undone; in every runner
FITS = [*MADE, *sorted({*PUBLIC} - {*MADE} - APART)]


def made(name): return MADE[name]() if name in MADE else [getattr(runner, name)()]


def learner(cbs=(), seed=0):
    torch.manual_seed(seed)
    x, y = torch.randn(26, 6), torch.arange(26) % 3
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 3))
    dls = get_dls(Dataset(x[:18], y[:18]), Dataset(x[18:], y[18:]), 4)
    opt = SGD(model.parameters(), lr=0.1, momentum=0.9)
    if any(isinstance(cb, Turns) for cb in cbs):
        opt = runner.Optimizers(low=SGD(model[:2].parameters(), lr=0.1), high=SGD(model[4].parameters(), lr=0.1))
    return Learner(model, opt, F.cross_entropy, DataBunch(*dls, 3))


LEARNERS = {}       # other ones


# --- how a fit is seen --------------------------------------------------------------------------------------------

# Times, files with times in them, and what is at hand within a batch or is to be looked at in the next.
TIMES = {"seconds", "all_seconds", "epoch_start", "_start", "file", "files", "_fit", "table", "writer"}
AT_HAND = {"_handles", "_stance", "_before", "_placed", "_averages"}
OURS = ("Checkpoint", "Resume", "Watch", "Kill")


def seen(o, memo=()):
    """`o` in plain values that can be compared."""
    if o is None or isinstance(o, (bool, int, str, bytes, Path, type)): return o
    if isinstance(o, float): return repr(o)
    if any(o is other for other in memo): return "seen"
    memo = (*memo, o)
    if isinstance(o, torch.Tensor): return str(o.dtype), tuple(o.shape), o.detach().numpy().tobytes()
    if isinstance(o, nn.Module): return {k: seen(v) for k, v in (*o.named_parameters(), *o.named_buffers())}
    if isinstance(o, Store): return list(o.sizes), seen(o.rows())
    if isinstance(o, (LRScheduler, torch.amp.GradScaler)): return seen({k: v for k, v in o.state_dict().items()})
    if isinstance(o, dict): return {str(k): seen(v, memo) for k, v in o.items() if k not in TIMES | AT_HAND}
    if isinstance(o, (set, frozenset)): return sorted(map(str, o))
    if isinstance(o, (list, tuple)) or hasattr(o, "__iter__"): return [seen(v, memo) for v in o]
    if callable(o): return getattr(o, "__name__", type(o).__name__)
    return type(o).__name__, seen(vars(o), memo) if hasattr(o, "__dict__") else None


def differing(a, b, at=""):
    """Where two of them differ, and how."""
    if a == b: return []
    if type(a) is type(b) and isinstance(a, dict):
        return [d for k in dict.fromkeys((*a, *b)) for d in differing(a.get(k, "-"), b.get(k, "-"), f"{at}.{k}")]
    if type(a) is type(b) and isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differing(a[i], b[i], f"{at}[{i}]")]
    return [f"{at}: {a!r:.80} and {b!r:.80}"]


def seen_callbacks(run):
    states = {cb.name: seen(cb.state_dict()) for cb in run.cbs if hasattr(cb, "state_dict")}    # fetches what waits
    return states, {cb.name: seen(cb.__getstate__()) for cb in run.cbs if type(cb).__name__ not in OURS}


class Watch(Callback):
    """How all callbacks look before each training batch and after each epoch."""

    _order = -1000

    def __init__(self): self.seen = {}

    def look(self, what):
        run = self.run
        self.seen[what, run.epoch, run.train_eval.done] = (run.n_iter, run.n_epochs), seen_callbacks(run)

    def begin_batch(self):
        if self.run.in_train: self.look("batch")

    def begin_epoch(self): self.in_epoch = True

    def after_fit(self): self.last = self.run.epoch


class Kill(Callback):
    """An exception at the `at`-th event, before all other callbacks hear of it or, if `late`, after all but Checkpoint.
    """

    def __init__(self, at=None, late=False): self.at, self._order, self.n = at, 9_500 if late else -10_000, 0

    def __call__(self, event):
        self.n += 1
        if self.n == self.at: raise Killed


class Killed(BaseException): pass


def fit(name, kill=None, late=False, epochs=3, **every):
    """A fit in the current folder, which goes on if there is something to go on with, whatever the random state is."""
    cbs = made(name)
    learn, watch, kill = LEARNERS.get(name, learner)(cbs), Watch(), Kill(kill, late)
    torch.manual_seed(99 if any(Path("checkpoints").glob("*.pt")) else 1)
    run = Runner([*cbs, watch, kill, Checkpoint("checkpoints", **{"every_batches": 1} | every)])
    try: run.fit(epochs, learn, resume="checkpoints")
    except Killed: return run, learn, watch, True
    return run, learn, watch, False


def ended(run, learn):
    return (run.n_iter, run.n_epochs, run.status, run.epoch), seen(learn.model), seen(learn.opt.state_dict()), \
        seen_callbacks(run), files()


def files():
    """What callbacks have written, without times."""
    found = {}
    for path in sorted(Path().iterdir()):
        if path.suffix == ".csv":
            rows = csv.DictReader(path.read_text().splitlines())
            found[path.name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        if path.suffix == ".pt": found[path.name] = seen(torch.load(path))
        if path.name == "runs": found[path.name] = events(path)
    return found


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    acc = EventAccumulator(str(folder), {"histograms": 0, "scalars": 0, "images": 0})
    acc.Reload()
    tags = acc.Tags()
    # Files of one second are read in the order of their names.
    scalars = {tag: sorted((e.step, repr(e.value)) for e in acc.Scalars(tag))
               for tag in tags["scalars"] if "seconds" not in tag}
    return scalars, {tag: sorted((e.step, list(e.histogram_value.bucket)) for e in acc.Histograms(tag))
                     for tag in tags["histograms"]}


def check(name, tmp_path, monkeypatch, times=1):
    """Fit once undisturbed, and so many `times` broken off at random moments until it is done; compare."""
    def at(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
    at("whole")
    run, learn, watch, _ = fit(name)
    want, steps, n = ended(run, learn), watch.seen, run.kill.n
    assert len(steps) > 5
    rng = random.Random(zlib.crc32(name.encode()))
    for i in range(times):
        at(f"broken off {i}")
        every = {"every_batches": rng.choice([1, 2, 3, 4]), "every_epochs": rng.choice([1, 2, None])}
        again, parts = True, 0
        while again:
            kill = rng.randrange(20, n) if parts < 4 else None
            run, learn, watch, again = fit(name, kill, rng.random() < 0.5, **every)
            parts += 1
            for where, what in watch.seen.items(): assert not differing(what, steps[where]), where
        assert not differing(ended(run, learn), want)
    run, learn, watch, _ = fit(name)
    assert not watch.seen                       # it was over
    assert not differing(ended(run, learn), want)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_that_is_broken_off_anywhere_ends_as_one_that_was_not(name, tmp_path, monkeypatch, capsys):
    check(name, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", FITS)
def test_there_is_a_state_before_any_fit(name, tmp_path):
    for cb in made(name): assert isinstance(getattr(cb, "state_dict", dict)(), dict)


@pytest.mark.parametrize("keeps", ["epochs", "batches"])
def test_a_callback_without_a_state_does_not_pass(keeps, tmp_path, monkeypatch, capsys):
    class Forgets(Callback):
        def __init__(self): self.counted = 0

        def after_batch(self): self.counted += keeps == "batches"

        def after_epoch(self): self.counted += keeps == "epochs"
    monkeypatch.setitem(MADE, "forgets", lambda: [Forgets()])
    with pytest.raises(AssertionError, match=r"forgets\.counted"): check("forgets", tmp_path, monkeypatch)


def test_a_callback_of_ones_own_that_names_what_it_keeps_passes(tmp_path, monkeypatch, capsys):
    class Worst(Stateful):
        _saved = "loss_then", "at"

        def __init__(self): self.loss_then, self.at = None, (0, 0)

        def after_loss(self):
            if self.loss_then is None or self.loss > self.loss_then:
                self.loss_then, self.at = self.loss.detach(), (self.epoch, self.n_iter)

    class Counting(Worst):
        _saved = ("n",)

        def __init__(self):
            super().__init__()
            self.n = 0

        def after_batch(self): self.n += 1
    monkeypatch.setitem(MADE, "own", lambda: [Counting()])
    check("own", tmp_path, monkeypatch)
    assert fit("own")[0].counting.n == 18           # 5 batches of training and 1 of validation, 3 times


# --- schedulers ---------------------------------------------------------------------------------------------------

class Halves:
    """A function of the epoch, that is an object with a memory."""

    def __init__(self): self.asked = 0

    def __call__(self, epoch):
        self.asked += 1
        return 0.5 ** (self.asked / 5)


class Own(lr_scheduler.LRScheduler):
    """A scheduler of somebody's own, with a memory."""

    def __init__(self, opt, memory):
        self.memory, self.f = memory, abs
        super().__init__(opt)

    def get_lr(self):
        if isinstance(self.memory, list): self.memory.append(len(self.memory))
        return [group["lr"] * 0.9 for group in self.optimizer.param_groups]


def sequential(opt):
    parts = lr_scheduler.ConstantLR(opt, 0.5, 2), lr_scheduler.MultiStepLR(opt, [1, 1, 3])
    return lr_scheduler.SequentialLR(opt, [*parts, lr_scheduler.LambdaLR(opt, Halves())], [4, 8])


def chained(opt):
    return lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(opt), lr_scheduler.CosineAnnealingLR(opt, 5)])


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9 ** epoch),
    "LambdaLR of an object": lambda opt: lr_scheduler.LambdaLR(opt, Halves()),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.9),
    "MultiplicativeLR of an object": lambda opt: lr_scheduler.MultiplicativeLR(opt, Halves()),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 2, 9]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.3, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.3, total_iters=11),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 12, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 9),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, 4, mode="exp_range", gamma=0.9),
    "CyclicLR of a function": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, 4, scale_fn=lambda x: 1 / (1 + x)),
    "CyclicLR of an object": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, 4, scale_fn=Halves()),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.3, total_steps=15),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.01, anneal_epochs=9),
    "one's own": lambda opt: Own(opt, [1]),
}


def test_no_scheduler_of_torch_is_left_out():
    theirs = {name for name in lr_scheduler.__all__ if name not in ("LRScheduler", "ReduceLROnPlateau")}   # it is above
    assert theirs <= set(SCHEDULERS)


@pytest.mark.parametrize(("kind", "tensor"), [*((kind, False) for kind in SCHEDULERS), ("ExponentialLR", True),
                                              ("OneCycleLR", True), ("SequentialLR", True), ("CyclicLR", True)])
def test_every_scheduler_goes_on(kind, tensor, tmp_path, monkeypatch, capsys):
    class Rates(Callback):
        _order = -100       # before the scheduler is made

        def begin_fit(self):
            for group in self.opt.param_groups: group["lr"] = torch.tensor(0.1)
    cbs = [Rates()] if tensor else []
    monkeypatch.setitem(MADE, kind, lambda: [*cbs, TorchScheduler(SCHEDULERS[kind], by="batch"), Recorder()])
    check(kind, tmp_path, monkeypatch)
    assert len(set(fit(kind)[0].recorder.lrs[0])) > 1       # what it did is there when a fit that is over goes on


def test_a_scheduler_that_keeps_something_else_is_refused_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MADE, "odd", lambda: [TorchScheduler(lambda opt: Own(opt, [object()]))])
    with pytest.raises(TypeError, match=r"TorchScheduler: the scheduler keeps \[<object object at .* \(list\) as "
                                        r"'memory', which no checkpoint can hold; give its class Own the methods"):
        fit("odd")
