"""The rate finder: what it finds, and that it leaves no trace."""

import array
import copy
import io
import itertools
import math
import pickle
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import make_learn
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from norms import RunningBatchNorm
from runner import (
    AveragedWeights,
    AvgStatsCallback,
    Callback,
    CancelBatchException,
    CSVLogger,
    DataBunch,
    Dataset,
    EarlyStopping,
    GradientAccumulation,
    GradientClip,
    KeepBest,
    Learner,
    LR_Find,
    LRFindResult,
    MixedPrecision,
    ParameterStats,
    ParamScheduler,
    Recorder,
    Rows,
    Runner,
    TerminateOnNonFinite,
    TorchScheduler,
    accuracy,
    get_dls,
    sched_cos,
    sched_no,
)


def noisy_learn():
    """Dropout, shuffling by the global state, running statistics, momentum: all that a finder could disturb."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(6, 8), RunningBatchNorm(8), nn.Dropout(0.3), nn.Linear(8, 2))
    model.register_buffer("unsaved", torch.zeros(1), persistent=False)
    dls = get_dls(Dataset(x[:48], y[:48]), Dataset(x[48:], y[48:]), 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Learner(model, opt, F.cross_entropy, DataBunch(*dls, 2))


class Disturb(Callback):
    """Draws from every generator and writes into a buffer that no state dict holds."""

    def begin_batch(self):
        random.random(), np.random.rand(), torch.rand(1)
        self.model.unsaved += 1


@pytest.mark.parametrize("with_generator", [False, True])
@pytest.mark.parametrize("max_iter", [5, 100])
def test_training_with_and_without_the_finder_is_bit_identical(with_generator, max_iter):
    ends = []
    for find in (False, True):
        learn = noisy_learn()
        if with_generator:
            learn.data = DataBunch(*get_dls(learn.data.train_ds, learn.data.valid_ds, 4,
                                            generator=torch.Generator().manual_seed(1)), 2)
        Runner().fit(1, learn)      # so that there is optimizer state to lose
        if find:
            finder = LR_Find(max_iter=max_iter)
            Runner(Disturb()).fit(3, learn, cbs=finder)
            assert len(finder.losses) >= 5
        run = Runner(Recorder())
        run.fit(2, learn)
        ends.append((run.recorder.losses, copy.deepcopy(learn.model.state_dict()), learn.opt.state_dict(),
                     learn.model.unsaved.item(), random.random(), np.random.rand(), torch.rand(1).item()))
    (losses, state, opt, *rest), (losses2, state2, opt2, *rest2) = ends
    assert losses == losses2
    assert rest == rest2
    assert all(torch.equal(state[k], state2[k]) for k in state)
    assert opt["param_groups"] == opt2["param_groups"]
    for k, v in opt["state"].items(): assert torch.equal(v["momentum_buffer"], opt2["state"][k]["momentum_buffer"])


def test_finder_restores_after_an_exception():
    class Boom(Callback):
        def after_step(self):
            if self.n_iter == 3: raise KeyError("boom")
    learn = noisy_learn()
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(KeyError): Runner(Boom()).fit(1, learn, cbs=LR_Find())
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert learn.opt.param_groups[0]["lr"] == 0.1


def test_finder_sweeps_the_range_and_stops_when_the_loss_explodes():
    finder = LR_Find(max_iter=10, min_lr=1e-4, max_lr=1e-1)
    Runner().fit(1, noisy_learn(), cbs=finder)
    assert finder.lrs == pytest.approx([1e-4 * 1000 ** (i / 9) for i in range(10)])
    wild = LR_Find(max_iter=500, min_lr=1e-3, max_lr=1e8)
    Runner().fit(50, noisy_learn(), cbs=wild)
    assert len(wild.losses) < 500


def fake_search(noise, steps=200):
    """A finder that saw the loss fall from 2.3 by 2 with its steepest point at 1e-2 and rise above 1e-1."""
    finder, g = LR_Find(), torch.Generator().manual_seed(0)
    logs = [-5 + 5 * i / steps for i in range(steps)]
    finder.lrs = [10 ** v for v in logs]
    finder.losses = [2.3 - 2 / (1 + math.exp(-6 * (v + 2))) + (0 if v < -1 else 4 * (v + 1)) + noise
                     * torch.randn((), generator=g).item() for v in logs]
    return finder


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.8])
def test_finder_suggests_the_middle_of_the_fall(noise):
    finder = fake_search(noise)
    assert math.log10(finder.suggestion) == pytest.approx(-2, abs=0.15 + noise / 2)
    assert finder.plot().get_legend().get_texts()[0].get_text() == f"suggestion {finder.suggestion:.2g}"


def test_finder_without_a_fall_says_so():
    flat = fake_search(0.5)
    flat.losses = [2.3 + 0.5 * torch.randn(()).item() for _ in flat.losses]
    with pytest.raises(RuntimeError, match=r"does not stand out of its noise .*: take more steps than 200"):
        _ = flat.suggestion
    assert flat.plot().get_legend() is None     # the picture comes without the mark
    text = r"has 0 finite losses and needs at least 8.*run\.fit\(1, learn, cbs=finder\)"
    with pytest.raises(RuntimeError, match=text): _ = LR_Find().suggestion


def test_finder_restores_what_modules_replace_and_losses_hold():
    class Rebinding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(6))

        def forward(self, x):
            if self.training: self.state = 0.9 * self.state + 0.1 * x.detach().mean(0)
            return x - self.state

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, pred, yb): return F.cross_entropy(pred * self.scale, yb)
    ends = []
    for find in (False, True):
        learn = noisy_learn()
        learn.model.insert(0, Rebinding())
        learn.loss_func = Scaled()
        learn.opt = torch.optim.Adam([*learn.model.parameters(), *learn.loss_func.parameters()], lr=0.01)
        learn.data = DataBunch(*get_dls(learn.data.train_ds, learn.data.valid_ds, 4, num_workers=1,
                                        persistent_workers=True), 2)
        if find: Runner().fit(2, learn, cbs=LR_Find())
        torch.manual_seed(5)
        run = Runner(Recorder())
        run.fit(1, learn)
        ends.append((run.recorder.losses, learn.loss_func.scale.item(), learn.model[0].state.tolist()))
    assert ends[0] == ends[1]


def test_finder_leaves_out_cancelled_batches_and_rules_over_a_scheduler():
    class SkipThird(Callback):
        def begin_batch(self):
            if self.n_iter == 2: raise CancelBatchException
    run, finder, seen = Runner([SkipThird(), ParamScheduler("lr", sched_no(0.5, 0.5))]), LR_Find(max_iter=8), Recorder()
    run.fit(1, noisy_learn(), cbs=[finder, seen])
    assert finder.lrs == seen.lrs[0]
    assert finder.losses == seen.losses
    assert len(set(finder.lrs)) == len(finder.lrs)


@pytest.mark.parametrize(("kwargs", "text"), [
    ({"max_iter": 1}, "max_iter is 1; it must be an integer of at least 2"),
    ({"min_lr": 0}, "min_lr is 0 and max_lr 10; they must satisfy"),
    ({"min_lr": 1, "max_lr": 0.1}, "0 < min_lr < max_lr")])
def test_finder_settings_that_make_no_sense(kwargs, text):
    with pytest.raises(ValueError, match=text): LR_Find(**kwargs)


# --- several groups -----------------------------------------------------------------------------------------------

def grouped(lrs, kind=torch.optim.SGD):
    learn = noisy_learn()
    layers = [list(learn.model[i].parameters()) for i in (0, 1, 3)]
    learn.opt = kind([{"params": ps, "lr": lr} for ps, lr in zip(layers, lrs, strict=True)], lr=0.1)
    return learn


@pytest.mark.parametrize("lrs", [(1e-3, 1e-1, 1e-2), (0.3, 0.3, 0.3), (0.0, 0.1, 0.05), (2, 1, 4)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_groups_keep_the_ratio_of_their_rates(lrs, kind):
    learn, finder, seen = grouped(lrs, kind), LR_Find(max_iter=12, min_lr=1e-4, max_lr=0.1), Recorder()
    Runner().fit(1, learn, cbs=[finder, seen])
    assert finder.ratios == [lr / max(lrs) for lr in lrs]
    for i, lr in enumerate(lrs): assert seen.lrs[i] == pytest.approx([r * lr / max(lrs) for r in finder.lrs])
    assert seen.lrs[lrs.index(max(lrs))] == finder.lrs      # to the last bit
    assert [g["lr"] for g in learn.opt.param_groups] == list(lrs)


def test_rates_that_are_all_zero_grow_together():
    finder, seen = LR_Find(max_iter=5), Recorder()
    Runner().fit(1, grouped((0.0, 0.0, 0.0)), cbs=[finder, seen])
    assert seen.lrs == [finder.lrs] * 3


def test_a_group_that_is_added_during_the_search_takes_part_and_is_gone_afterwards():
    class Add(Callback):
        def begin_batch(self):
            if self.run.n_iter == 2: self.run.opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.05})
    learn, seen = noisy_learn(), []

    class See(Callback):
        _order = 60

        def begin_batch(self): seen.append([g["lr"] for g in self.run.opt.param_groups])
    finder = LR_Find(max_iter=5)
    Runner().fit(1, learn, cbs=[finder, Add(), See()])
    assert seen[:2] == [[lr] for lr in finder.lrs[:2]]
    for lrs, lr in zip(seen[2:], finder.lrs[2:], strict=True): assert lrs == pytest.approx([lr, lr / 2])
    assert len(learn.opt.param_groups) == 1


# --- the result ---------------------------------------------------------------------------------------------------

def test_the_result_is_an_object_of_its_own():
    finder = fake_search(0.1)
    finder.ratios = [0.25, 1.0]
    lr = finder.result
    assert isinstance(lr, LRFindResult)
    assert lr.suggestion == finder.suggestion
    assert lr.suggestion_per_group == finder.suggestion_per_group == [lr.suggestion * 0.25, lr.suggestion]
    assert isinstance(lr.curve, Rows)
    assert lr.curve["lr", "loss"] == list(zip(finder.lrs, finder.losses, strict=True))
    assert lr.curve[100, "smoothed"] == pytest.approx(sum(finder.losses[88:113]) / 25)
    assert repr(lr) == f"LRFindResult(suggestion {lr.suggestion:.2g}, 200 losses at rates from 1e-05 to 0.94)"
    assert lr.plot(skip_last=5).get_xscale() == "log"
    twin = pickle.loads(pickle.dumps(lr))
    assert (twin, copy.deepcopy(lr)) == (lr, lr)
    finder.lrs.clear()
    assert len(lr.lrs) == 200
    assert repr(LR_Find().result) == "LRFindResult(no search yet)"


@pytest.mark.parametrize("cbs", [[], [GradientAccumulation(3)]])
def test_a_runner_searches_as_long_as_it_takes(cbs):
    learn = noisy_learn()
    lr = Runner(cbs).find_lr(learn, max_iter=30, min_lr=1e-5, max_lr=1e-2)      # 12 batches an epoch
    assert len(set(lr.lrs)) == 30
    assert len(lr.losses) == (90 if cbs else 30)
    assert lr.lrs[-1] == pytest.approx(1e-2)


def test_a_loader_without_a_length():
    class Stream:
        def __iter__(self):
            for _ in range(4): yield torch.randn(4, 6), torch.tensor([0, 1, 0, 1])
    learn = noisy_learn()
    learn.data = DataBunch(Stream(), None)
    assert len(Runner().find_lr(learn, max_iter=11, max_lr=0.1).lrs) == 11


# --- no trace -----------------------------------------------------------------------------------------------------

class Own:
    """What a callback may keep: everything that can be changed in place, nested."""

    __slots__ = ("count", "parts")

    def __init__(self): self.count, self.parts = 0, []


class Everything(Callback):
    """Changes all that it keeps, in every event."""

    total, average = 0, None
    log: ClassVar = []
    marks: ClassVar = {"n": 0}

    def __init__(self, model):
        type(self).average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.n, self.rows, self.names, self.last = 0, Rows(), {"a"}, deque([0.0] * 3, maxlen=3)
        self.counter, self.ordered, self.by = Counter(), OrderedDict(a=1), defaultdict(list)
        self.bits, self.numbers, self.own = bytearray(b"ab"), array.array("d", [1.0]), Own()
        self.deep = {"list": [(SimpleNamespace(x=[1]), {2: deque()})]}
        self.deep["self"] = self.deep                                       # a circle
        self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.opt_of_mine = torch.optim.Adam(self.net.parameters())
        self.sched = StepLR(self.opt_of_mine, 1, 0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        self.random, self.gen = random.Random(1), torch.Generator().manual_seed(2)
        self.np_gen, self.np_old, self.array = np.random.default_rng(3), np.random.RandomState(4), np.zeros(3)
        self.t, self.counts = torch.zeros(4), itertools.count(5)
        self.view = self.t[1:]
        self.half, self.expanded = torch.ones(2, dtype=torch.bfloat16), torch.ones(1).expand(3)
        with torch.inference_mode(): self.inference = torch.zeros(2)
        self.file, self.lock = io.StringIO(), threading.Lock()
        self.update = partial(list.append, self.own.parts)

    def __call__(self, event):
        if event in ("begin_fit", "after_fit", "after_batch", "after_step", "begin_epoch", "begin_validate"):
            self.change()

    @torch.enable_grad()
    def change(self):
        cls = type(self)
        cls.total += 1
        cls.log.append(cls.total)
        cls.marks["n"] += 1
        cls.average.update_parameters(self.run.model)
        self.n += 1
        self.rows.append({"n": self.n})
        self.names.add(self.n)
        self.last.append(self.n)
        self.counter[self.n % 3] += 1
        self.ordered.move_to_end("a")
        self.ordered[self.n] = self.n
        self.by[self.n].append(1)
        self.bits.append(7)
        self.numbers.append(self.random.random())
        self.own.count += 1
        self.update(self.n)
        space, inner = self.deep["list"][0]
        space.x[0] += 1
        inner[2].append(next(self.counts))
        self.deep[self.n] = 1
        x = torch.randn(4, 2, generator=self.gen)
        self.scaler.scale(self.net(x).square().mean()).backward()
        self.scaler.step(self.opt_of_mine)
        self.scaler.update()
        self.sched.step()
        self.opt_of_mine.zero_grad()
        self.array += self.np_gen.random() + self.np_old.rand()
        self.view += torch.rand(1, generator=self.gen)
        self.t = self.t + 1 if self.n % 2 else self.t
        self.half *= 2
        with torch.inference_mode(): self.inference += 1
        if self.n == 20: self.fresh = [1]
        if self.n == 30: self.net.append(nn.ReLU())
        self.run.fake = self.n


def told(o, memo=None):
    """All that `o` holds as plain nested tuples, to be compared."""
    memo = {} if memo is None else memo
    if isinstance(o, float): return repr(o)
    if isinstance(o, (type(None), bool, int, str, bytes, type)): return o
    if id(o) in memo: return ("again", memo[id(o)])
    memo[id(o)] = len(memo)
    memo.setdefault("alive", []).append(o)
    if isinstance(o, torch.Tensor):
        return (str(o.dtype), o.detach().float().tolist(), told(o.grad, memo) if o.is_leaf else None, o.requires_grad)
    if isinstance(o, torch.Generator): return o.get_state().tolist()
    if isinstance(o, random.Random): return o.getstate()
    if isinstance(o, np.random.Generator): return str(o.bit_generator.state)
    if isinstance(o, np.random.RandomState): return str(o.get_state())
    if isinstance(o, np.ndarray): return o.tolist()
    if isinstance(o, itertools.count): return repr(o)
    if isinstance(o, (bytearray, array.array)): return bytes(o)
    if isinstance(o, dict): return (type(o).__name__, [(told(k, memo), told(v, memo)) for k, v in o.items()])
    if isinstance(o, (list, tuple, deque)): return (type(o).__name__, [told(v, memo) for v in o])
    if isinstance(o, (set, frozenset)): return sorted(map(repr, o))
    if isinstance(o, Own): return (o.count, told(o.parts, memo))
    if (hasattr(o, "__dict__") and not callable(o)) or isinstance(o, (nn.Module, Callback)):
        return (type(o).__name__, [(k, told(v, memo)) for k, v in vars(o).items() if k != "run"])
    return type(o).__name__


def everything(run, learn):
    """All that a search could leave a trace in."""
    kept = [(cb.name, told(cb), [(k, told(v)) for c in type(cb).__mro__[:-2] for k, v in vars(c).items()
                                 if not k.startswith("__")]) for cb in run.cbs]
    own = [(k, told(v)) for k, v in vars(run).items()
           if k not in {"learn", "cbs", "_answers", "_lasting", *(cb.name for cb in run.cbs)}]
    return (kept, told(learn.model), told(learn.loss_func), told(learn.opt.state_dict()), own, random.random(),
            np.random.rand(), torch.rand(1).item())


class Cfg(nn.Module):
    """A model that keeps plain things too."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen, self.own = net, [0], Own()

    def forward(self, x):
        if self.training:
            self.seen.append(len(x))
            self.own.count += 1
        return self.net(x)


@pytest.mark.parametrize("fits_before", [0, 1])
@pytest.mark.parametrize("search", [lambda run, learn: run.fit(1, learn, cbs=LR_Find(8)),
                                    lambda run, learn: run.fit(4, learn, cbs=LR_Find(40)),
                                    lambda run, learn: run.fit(9, learn, cbs=LR_Find(100, 1e-3, 1e9)),
                                    lambda run, learn: run.find_lr(learn, max_iter=20)])
def test_a_search_leaves_no_trace_in_whatever_a_callback_keeps(fits_before, search):
    learn = noisy_learn()
    learn.model = Cfg(learn.model)
    run = Runner([Everything(learn.model)])
    for _ in range(fits_before): run.fit(1, learn)
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = everything(run, learn)
    random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])
    search(run, learn)
    assert everything(run, learn) == before
    assert run.status == "ok"
    assert list(vars(run.everything)["expanded"]) == [1, 1, 1]


MAKERS = [
    lambda: [Recorder()], lambda: [AvgStatsCallback(accuracy)], lambda: [ParamScheduler("lr", sched_cos(0.3, 0.1))],
    lambda: [AveragedWeights(0.9)], lambda: [AveragedWeights(None, norms="recalibrate")], lambda: [GradientClip(0.5)],
    lambda: [MixedPrecision(torch.float16, verbose=False)], lambda: [GradientAccumulation(3)],
    lambda: [AvgStatsCallback(accuracy), EarlyStopping(patience=1)], lambda: [AvgStatsCallback(accuracy), KeepBest()],
    lambda: [TorchScheduler(lambda opt: OneCycleLR(opt, 0.2, total_steps=100), by="batch")],
    lambda: [TorchScheduler(lambda opt: StepLR(opt, 1, 0.5))], lambda: [ParameterStats(verbose=False)],
    lambda: [TerminateOnNonFinite()]]


@pytest.mark.parametrize("make", MAKERS)
def test_training_beside_every_callback_is_bit_for_bit_that_without_a_search(make, capsys):
    ends = []
    for find in (False, True):
        torch.manual_seed(1)
        learn = grouped((0.05, 0.1, 0.02))
        run = Runner([*make(), *([] if any(isinstance(cb, Recorder) for cb in make()) else [Recorder()])])
        run.fit(2, learn)
        if find:
            kept = everything_kept(run)
            run.fit(3, learn, cbs=LR_Find(30, max_lr=1.0))
            assert everything_kept(run) == kept
            assert run.status == "ok"
        torch.manual_seed(3)
        run.fit(2, learn)
        ends.append((told(learn.model), told(learn.opt.state_dict()), run.recorder.losses, run.recorder.lrs,
                     run.n_iter, run.n_epochs))
    assert ends[0] == ends[1]


def everything_kept(run): return [(cb.name, told(cb)) for cb in run.cbs if not isinstance(cb, ParameterStats)]


def test_no_row_reaches_the_history_nor_its_file(tmp_path, capsys):
    run = Runner([AvgStatsCallback(accuracy), CSVLogger(tmp_path / "h.csv"), Recorder()])
    learn = noisy_learn()
    run.fit(1, learn)
    text, losses, history = (tmp_path / "h.csv").read_text(), list(run.recorder.losses), list(run.avg_stats.history)
    capsys.readouterr()
    run.fit(3, learn, cbs=LR_Find(30))
    assert capsys.readouterr().out == ""
    assert (tmp_path / "h.csv").read_text() == text
    assert run.recorder.losses == losses
    assert run.avg_stats.history == history
    assert (run.n_iter, run.epoch, run.status) == (12, 0, "ok")


def test_what_is_given_with_the_finder_keeps_what_it_saw():
    seen, finder = Recorder(), LR_Find(8)
    Runner().fit(1, noisy_learn(), cbs=[seen, finder])
    assert seen.losses == finder.losses
    run = Runner(cb_funcs=[lambda: LR_Find(8), Recorder])       # as in the lesson
    run.fit(1, noisy_learn())
    assert run.recorder.losses == run.lr_find.losses != []
    assert run.recorder.lrs[0] == run.lr_find.lrs


def test_a_search_that_fails_leaves_no_trace_either():
    class Boom(Callback):
        def __init__(self): self.n = 0

        def after_step(self):
            self.n += 1
            if self.n == 3: raise KeyError("boom")
    learn = noisy_learn()
    run = Runner([Recorder(), Boom()])
    before = told(learn.model), told(learn.opt.state_dict())
    with pytest.raises(KeyError): run.fit(1, learn, cbs=LR_Find())
    assert (told(learn.model), told(learn.opt.state_dict())) == before
    assert run.boom.n == 0
    assert run.recorder.losses == []
    assert run.status == "failed"
    run.fit(1, make_learn())
    assert run.status == "ok"


def test_the_optimizers_own_objects_stay_and_its_wide_state_stays_wide():
    learn = noisy_learn()
    learn.model.to(torch.bfloat16)
    learn.loss_func = lambda pred, yb: F.cross_entropy(pred.float(), yb)
    learn.data = DataBunch(*get_dls(Dataset(torch.randn(16, 6).bfloat16(), torch.arange(16) % 2),
                                    Dataset(torch.randn(4, 6).bfloat16(), torch.arange(4) % 2), 4))
    group, p = learn.opt.param_groups[0], learn.model[0].weight
    learn.opt.state[p]["momentum_buffer"] = wide = torch.full_like(p, 1 / 3, dtype=torch.float32)
    Runner().fit(1, learn, cbs=LR_Find(4))
    assert learn.opt.param_groups[0] is group
    assert learn.opt.state[p]["momentum_buffer"] is wide
    assert wide.dtype == torch.float32
    assert (wide == 1 / 3).all()
