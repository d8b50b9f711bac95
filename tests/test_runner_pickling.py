"""Everything public that a user keeps pickles and copies: before and after a fit, after an exception, within a fit."""

import copy
import io
import pickle
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR

import runner
from runner import (
    SGD,
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    DataBunch,
    Dataset,
    GradientAccumulation,
    Learner,
    LR_Find,
    NormStats,
    ParamScheduler,
    Recorder,
    Runner,
    accuracy,
    combine_scheds,
    get_dls,
    sched_cos,
    sched_lin,
    sched_no,
    view_tfm,
)


def make_step(opt): return StepLR(opt, 1, 0.5)


def low(run): return F.cross_entropy(run.model(run.xb), run.yb)


def high(run): return low(run) ** 2


# What makes each public callback that can't do without arguments, and what it needs beside it.
MADE = {
    "AveragedWeights": lambda path: [runner.AveragedWeights(0.9)],
    "AvgStatsCallback": lambda path: [AvgStatsCallback(accuracy)],
    "BatchTransformXCallback": lambda path: [BatchTransformXCallback(view_tfm(6))],
    "CSVLogger": lambda path: [AvgStatsCallback(), runner.CSVLogger(path / "history.csv")],
    "Checkpoint": lambda path: [runner.Checkpoint(path / "checkpoints")],
    "CudaCallback": lambda path: [runner.CudaCallback("cpu")],
    "EarlyStopping": lambda path: [AvgStatsCallback(), runner.EarlyStopping()],
    "GradientAccumulation": lambda path: [GradientAccumulation(2)],
    "GradientClip": lambda path: [runner.GradientClip(1.0)],
    "KeepBest": lambda path: [AvgStatsCallback(), runner.KeepBest(path=path / "best.pt")],
    "LR_Find": lambda path: [LR_Find(5)],
    "ParamScheduler": lambda path: [ParamScheduler("lr", combine_scheds([0.4, 0.6], [sched_lin(0, 1), sched_no(1, 0)]))
                                    ],
    "Profile": lambda path: [runner.Profile(steps=(1, 2), path=None)],
    "TensorBoardLogger": lambda path: [AvgStatsCallback(), runner.TensorBoardLogger(path / "runs")],
    "TerminateOnNonFinite": lambda path: [runner.TerminateOnNonFinite(path / "diverged.pt")],
    "TorchScheduler": lambda path: [runner.TorchScheduler(make_step)],
    "Turns": lambda path: [runner.Turns(low=low, high=high)],
}
BASES = {"Callback", "Probe"}       # to be subclassed
PUBLIC = sorted(name for name in {*runner.__all__} - BASES if isinstance(getattr(runner, name), type)
                and issubclass(getattr(runner, name), Callback))


def callbacks(name, path):
    """The public callback `name`, last, after those that it needs."""
    if name in MADE: return MADE[name](path)
    try: return [getattr(runner, name)()]
    except TypeError as e: raise AssertionError(f"{name} can't be made without arguments ({e}): add it to MADE") from e


def learner(cbs=()):
    torch.manual_seed(0)
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    dls = get_dls(Dataset(x[:12], y[:12]), Dataset(x[12:], y[12:]), 4, generator=torch.Generator().manual_seed(0))
    opt = SGD(model.parameters(), lr=0.1)
    if any(isinstance(cb, runner.Turns) for cb in cbs):
        opt = runner.Optimizers(low=SGD(model[:2].parameters(), lr=0.1), high=SGD(model[3].parameters(), lr=0.1))
    return Learner(model, opt, F.cross_entropy, DataBunch(*dls, 3))


class Finder(pickle.Pickler):
    """A pickler that notes what of a fit it comes upon."""

    def __init__(self, learn, runs):
        self.into = io.BytesIO()
        super().__init__(self.into)
        self.found, data = [], learn.data
        self.parts = [learn, learn.model, learn.opt, data, data.train_dl, data.valid_dl, data.train_ds, data.valid_ds,
                      data.train_ds.x, *learn.model.parameters(), *learn.model.modules(), *runs]

    def persistent_id(self, o):
        if any(o is part for part in self.parts): self.found.append(type(o).__name__)
        return None


def parts_in(o, learn, *runs):
    finder = Finder(learn, runs)
    finder.dump(o)
    return finder.found


def twins(o): return [pickle.loads(pickle.dumps(o)), copy.deepcopy(o)]


def fit(cbs, epochs=2, more=None):
    torch.manual_seed(1)
    learn, run = learner(cbs), Runner(cbs)
    run.fit(epochs, learn, cbs=more)
    return learn, run


@pytest.mark.parametrize("name", PUBLIC)
def test_a_callback_pickles_and_copies_before_and_after_a_fit_and_trains_alike(name, tmp_path, capsys):
    cbs = callbacks(name, tmp_path)
    if name == "TrainEvalCallback": cbs = []        # every runner has its own
    fresh = twins(cbs)
    want = fit(cbs)[0].model.state_dict()
    for again in (*fresh, *twins(cbs)):
        got = fit(again)[0].model.state_dict()
        assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_callback_does_not_drag_runner_model_and_data_along(name, tmp_path, capsys):
    cbs = callbacks(name, tmp_path)
    if name == "TrainEvalCallback": cbs = []
    learn, run = fit(cbs)
    for cb in run.cbs:
        assert parts_in(cb, learn, run) == [], cb.name
        assert pickle.loads(pickle.dumps(cb)).run is None
        assert cb.run is run                        # the callback itself still has it
    assert parts_in(run, learn) == []


class Boom(Callback):
    def __init__(self, at): self.at = at

    def __call__(self, event):
        if event == self.at and self.run.in_train: raise KeyError("boom")


@pytest.mark.parametrize("at", ["after_pred", "after_backward", "after_step"])
@pytest.mark.parametrize("name", PUBLIC)
def test_a_runner_pickles_and_copies_after_an_exception_and_can_be_used(name, at, tmp_path, capsys):
    cbs = callbacks(name, tmp_path)
    if name == "TrainEvalCallback": cbs = []
    run, learn = Runner(cbs), learner(cbs)
    with pytest.raises(KeyError, match="boom"): run.fit(2, learn, cbs=Boom(at))
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    for twin in twins(run):
        assert [cb.name for cb in twin.cbs] == [cb.name for cb in run.cbs]
        assert all(getattr(twin, cb.name) is cb for cb in twin.cbs)
        assert parts_in(twin, learn, run) == []
        twin.fit(1, learner(cbs))


class Copy(Callback):
    """Copies the runner, by both ways, at some event."""

    _order = 5000

    def __init__(self, at): self.at, self.made = at, []

    def __call__(self, event):
        if event == self.at and not self.made:
            assert parts_in(self.run, self.run.learn) == []
            self.made = twins(self.run)


@pytest.mark.parametrize("at", ["begin_fit", "after_loss", "after_step", "begin_validate", "after_fit"])
@pytest.mark.parametrize("name", PUBLIC)
def test_a_copy_that_is_made_within_a_fit_is_idle_and_can_be_used(name, at, tmp_path, capsys):
    cbs = callbacks(name, tmp_path)
    if name == "TrainEvalCallback": cbs = []
    copies = Copy(at)
    learn, run = fit(cbs, more=copies)
    want = fit(callbacks(name, tmp_path) if cbs else [])[0].model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in learn.model.state_dict().items())    # the fit went on as without
    if not copies.made: assert (name, at) == ("LR_Find", "begin_validate")
    for twin in copies.made:
        assert [cb.name for cb in twin.cbs] == [cb.name for cb in run.cbs]
        assert not hasattr(twin, "copy")
        assert twin.learn is None
        assert not twin.in_train
        twin.fit(1, learner(cbs))
        assert twin.status in ("ok", "cancelled")


def test_runner_and_learner_together_go_on_alike():
    learn, run = learner(), Runner([Recorder(), NormStats(verbose=False), ParamScheduler("lr", sched_cos(0.3, 0.1))])
    run.fit(1, learn)
    ends = []
    for other, its in (pickle.loads(pickle.dumps((run, learn))), copy.deepcopy((run, learn)), (run, learn)):
        torch.manual_seed(5)
        assert its.opt.param_groups[0]["params"][0] is next(its.model.parameters())
        other.fit(2, its)
        ends.append((other.recorder.losses, other.recorder.lrs, [p.tolist() for p in its.model.parameters()]))
    assert ends[0] == ends[1] == ends[2]


def test_other_things_of_a_fit_pickle():
    learn = learner()
    for o in (learn.data, learn.data.train_dl, accuracy, sched_lin, LR_Find().result, learn.opt): twins(o)
    x = torch.randn(4, 6)
    for twin in twins(view_tfm(2, 3)): assert torch.equal(twin(x), x.view(-1, 2, 3))
    assert repr(view_tfm(1, 28, 28)) == "view_tfm(1, 28, 28)"


def test_a_callback_of_ones_own_leaves_the_runner_out_without_being_told():
    class Keeps(Callback):
        def __init__(self): self.kept = deque(maxlen=3)

        def after_batch(self): self.kept.append(self.n_iter)
    _, run = fit([Keeps()])
    twin = copy.deepcopy(run.keeps)
    assert list(twin.kept) == list(run.keeps.kept)
    with pytest.raises(AttributeError, match="has no attribute 'model'; it has no runner yet"): _ = twin.model
