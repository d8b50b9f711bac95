"""EarlyStopping, KeepBest and TorchScheduler: what they decide on which figures, and the rates of the loop by hand."""

import copy
import math
import os
import pickle
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_runner_averaged import Skip, learner, quiet, same, state
from torch import nn
from torch.optim import lr_scheduler

from runner import (
    AveragedWeights,
    Callback,
    CancelEpochException,
    EarlyStopping,
    KeepBest,
    LR_Find,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    TorchScheduler,
)
from runner.compiled import CompiledStep
from runner.monitors import mode_of

NAN, INF = math.nan, math.inf


class Said(Callback):
    """Writes told figures into the history."""

    _order = 5

    def __init__(self, figures, name="valid_loss"): self.figures, self.at = figures, name

    def after_epoch(self): self.run.avg_stats.history[-1][self.at] = self.figures[self.epoch]


class Weights(Callback):
    """Keeps the model's state at the end of each epoch."""

    def begin_fit(self): self.states = []

    def after_epoch(self): self.states.append(state(self.model))


def told(figures, *cbs, name="valid_loss", learn=None):
    learn, weights = learn or learner(), Weights()
    run = quiet(Said(figures, name), weights, *cbs)
    run.fit(len(figures), learn)
    return run, learn, weights.states


# --- EarlyStopping ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("figures", "kwargs", "stopped", "best"), [
    ([5, 4, 3, 2, 1], {"patience": 1}, None, (1, 4)),
    ([5, 4, 4, 2, 1], {"patience": 1}, 2, (4, 1)),                      # the same is no improvement
    ([5, 6, 6, 4, 6, 6, 6, 1], {"patience": 3}, 6, (4, 3)),
    ([5, 4.9, 4.8, 4.7], {"patience": 2, "min_delta": 0.5}, 2, (5, 0)),
    ([5, 4.8, 4.6, 4.4], {"patience": 3, "min_delta": 0.5}, None, (4.4, 3)),    # slowly, but by more than that in all
    ([5, 4.5, 4.5], {"patience": 1, "min_delta": 0.5}, 1, (5, 0)),      # by no more than that
    ([1, 2, 2, 2], {"mode": "max", "patience": 2}, 3, (2, 1)),
    ([NAN, NAN, 1], {"patience": 2}, 1, (None, None)),
    ([NAN, 3, NAN, 2, NAN, NAN], {"patience": 2}, 5, (2, 3)),
    ([INF, 3, -INF, -INF], {"patience": 2}, 3, (3, 1)),
])
def test_early_stopping_stops_where_it_should(figures, kwargs, stopped, best, capsys):
    stop = EarlyStopping(**kwargs)
    run, _, states = told(figures, stop)
    assert stop.stopped_epoch == stopped
    assert (stop.best, stop.best_epoch) == best
    assert len(states) == (len(figures) if stopped is None else stopped + 1)
    assert run.status == ("ok" if stopped is None else "cancelled")
    assert capsys.readouterr().out == (f"{stop.reason}\n" if stop.reason else "")
    assert bool(stop.reason) == (stopped is not None)


@pytest.mark.parametrize(("figures", "min_delta", "text"), [
    ([1, 2, 3], 0, "EarlyStopping: valid_loss has not improved on 1 of epoch 0 for 2 epochs; the fit ends after epoch "
                   "2, at 3"),
    ([1, 2, 3], 0.1, "EarlyStopping: valid_loss has not improved on 1 of epoch 0 by more than 0.1 for 2 epochs; the "
                     "fit ends after epoch 2, at 3"),
    ([NAN, NAN], 0, "EarlyStopping: valid_loss has not been finite for 2 epochs; the fit ends after epoch 1, at nan"),
])
def test_early_stopping_says_why(figures, min_delta, text):
    stop = EarlyStopping(patience=2, min_delta=min_delta)
    told(figures, stop)
    assert stop.reason == text


@pytest.mark.parametrize("seed", range(20))
def test_early_stopping_is_the_rule_by_hand(seed):
    draw = random.Random(seed)
    mode, patience, delta = draw.choice(["min", "max"]), draw.randint(1, 3), draw.choice([0, 1, 2])
    figures = [draw.choice([NAN, *range(6)]) for _ in range(12)]
    best, wait, stopped = None, 0, None
    for epoch, value in enumerate(figures):
        if not math.isnan(value) and (best is None or (best - value if mode == "min" else value - best) > delta):
            best, wait = value, 0
        else: wait += 1
        if wait == patience:
            stopped = epoch
            break
    stop = EarlyStopping("valid_loss", patience, delta, mode)
    told(figures, stop)
    assert (stop.stopped_epoch, stop.best) == (stopped, best)


def test_other_callbacks_have_the_epoch_before_it_ends():
    seen = []

    class Late(Callback):
        _order = 1950

        def after_epoch(self): seen.append(self.epoch)
    told([1, 1, 1], EarlyStopping(patience=1), Late())
    assert seen == [0, 1]


class EverySecond(Callback):
    """Validates after every second epoch: returns True, or raises."""

    def __init__(self, raises=False): self.raises = raises

    def begin_validate(self):
        if self.epoch % 2 == 0: return False
        if self.raises: raise CancelEpochException
        return True


@pytest.mark.parametrize("raises", [False, True])
def test_an_epoch_without_validation_is_no_epoch_without_improvement(raises):
    stop = EarlyStopping(patience=2)
    told([1, NAN, 2, NAN, 2, NAN, 2], stop, EverySecond(raises))
    assert stop.stopped_epoch == 4
    stop, keep = EarlyStopping("train_loss", patience=2), KeepBest("train_loss")
    told([1, 2, 2, 2], stop, keep, EverySecond(raises), name="train_loss")
    assert (stop.stopped_epoch, keep.best_epoch) == (2, 0)


# --- KeepBest -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("figures", "kwargs", "best"), [
    ([3, 1, 2], {}, 1), ([3, 1, 1], {}, 1), ([1, 3, 2], {"mode": "max"}, 1), ([NAN, 3, NAN], {}, 1),
    ([-INF, 3, 2], {}, 2), ([3, 2, 1], {}, 2),
])
def test_keep_best_gives_the_model_the_best_weights_and_writes_them(figures, kwargs, best, tmp_path):
    keep = KeepBest(path=tmp_path / "best.pt", **kwargs)
    _, learn, states = told(figures, keep)
    assert (keep.best, keep.best_epoch) == (figures[best], best)
    assert same(state(learn.model), states[best])
    assert os.listdir(tmp_path) == ["best.pt"]
    fresh = learner().model
    fresh.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert same(state(fresh), states[best])


def test_keep_best_without_restore_leaves_the_last_weights():
    keep = KeepBest(restore=False)
    _, learn, states = told([3, 1, 2], keep)
    assert same(state(learn.model), states[2])
    keep.apply()
    assert same(state(learn.model), states[1])


def test_keep_best_keeps_parameters_and_buffers_the_same_objects():
    learn, keep = learner(), KeepBest()
    ids = [id(t) for t in (*learn.model.parameters(), *learn.model.buffers())]
    told([1, 2], keep, learn=learn)
    assert ids == [id(t) for t in (*learn.model.parameters(), *learn.model.buffers())]


def test_keep_best_after_early_stopping():
    _, learn, states = told([3, 1, 2, 2, 2], EarlyStopping(patience=2), KeepBest())
    assert len(states) == 4
    assert same(state(learn.model), states[1])


def test_keep_best_says_that_there_was_none(capsys, tmp_path):
    keep = KeepBest(path=tmp_path / "best.pt")
    _, learn, states = told([NAN, NAN, INF], keep)
    assert capsys.readouterr().out == ("KeepBest: valid_loss was not finite in any of 3 epochs; nothing was kept\n")
    assert (keep.best, keep.kept) == (None, None)
    assert same(state(learn.model), states[2])
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"^KeepBest has kept nothing: there was no epoch with a finite 'valid_loss' "
                                         r"yet$"): keep.apply()


def test_keep_best_says_that_there_was_no_validation(capsys):
    class Never(Callback):
        def begin_validate(self): return True
    told([NAN, NAN], KeepBest(), Never())
    assert capsys.readouterr().out == "KeepBest: valid_loss is of a pass that was skipped; nothing was kept\n"


def test_keep_best_and_averages_beside_a_rate_finder_say_nothing(capsys):
    keep, averaged, learn = KeepBest(), AveragedWeights(0.5), learner()
    before = state(learn.model)
    quiet(keep, averaged, TorchScheduler(MAKERS["step"])).fit(2, learn, cbs=LR_Find(max_iter=7))
    assert same(state(learn.model), before)
    assert learn.opt.param_groups[0]["lr"] == 0.3
    assert capsys.readouterr().out == ""


class Boom(Callback):
    def __init__(self, what): self.what = what

    def begin_validate(self):
        if self.epoch == 2: raise self.what


@pytest.mark.parametrize("what", [ZeroDivisionError(), KeyboardInterrupt()])
def test_after_an_exception_the_model_stays_and_apply_gives_it_the_best(what):
    learn, keep, weights = learner(), KeepBest(), Weights()
    with pytest.raises(type(what)): quiet(Said([1, 2, 3]), weights, keep, Boom(what)).fit(3, learn)
    assert not any(same(state(learn.model), s) for s in weights.states)
    keep.apply()
    assert same(state(learn.model), weights.states[0])


def test_a_diverged_fit_ends_with_the_best_weights():
    class Poison(Callback):
        def after_backward(self):
            if self.epoch == 2: next(self.model.parameters()).grad.fill_(NAN)
    run, learn, states = told([2, 1, 3], KeepBest(), Poison(), TerminateOnNonFinite())
    assert run.status == "diverged"
    assert same(state(learn.model), states[1])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    keep = KeepBest(path=tmp_path / "best.pt")
    told([1, 2], keep)
    before = (tmp_path / "best.pt").read_bytes()

    def fail(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"): told([1, 2], keep)
    assert os.listdir(tmp_path) == ["best.pt"]
    assert (tmp_path / "best.pt").read_bytes() == before


@pytest.mark.parametrize("monitor", ["valid_loss", "train_loss"])
def test_with_averages_it_keeps_what_the_figure_is_of(monitor, tmp_path):
    averaged, keep, averages = AveragedWeights(0.7), KeepBest(monitor, path=tmp_path / "best.pt"), []

    class Averages(Callback):
        def after_epoch(self): averages.append(state(averaged.averaged_model.module))
    _, learn, states = told([3, 1, 2], averaged, keep, Averages(), name=monitor)
    expected = averages if monitor == "valid_loss" else states
    assert same(state(learn.model), expected[1])
    assert not same(averages[1], states[1])
    fresh = learner().model
    fresh.load_state_dict(torch.load(tmp_path / "best.pt"))
    assert same(state(fresh), expected[1])


def test_the_best_weights_have_the_best_figure():
    keep, learn = KeepBest(), learner(lr=2.0)
    run = quiet(keep, AveragedWeights(0.7))
    run.fit(6, learn)
    losses = [row["valid_loss"] for row in run.avg_stats.history]
    assert keep.best == min(losses)
    learn.model.eval()
    with torch.no_grad(): mean = [F.cross_entropy(learn.model(xb), yb).item() for xb, yb in learn.data.valid_dl]
    assert sum(mean) / len(mean) == pytest.approx(keep.best, rel=1e-6)


# --- names and arguments ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("monitor", "mode"), [
    ("valid_loss", "min"), ("train_loss", "min"), ("valid_nll_loss", "min"), ("valid_accuracy", "max"),
    ("valid_top_k_accuracy", "max"), ("valid_f1", "max"), ("valid_mse", "min"), ("valid_acc", "max"),
    ("valid_smoothloss", "min")])
def test_the_mode_goes_by_the_name(monitor, mode):
    assert mode_of(Callback(), monitor, None) == mode
    assert EarlyStopping(monitor, mode="min").mode == "min"


@pytest.mark.parametrize("cls", [EarlyStopping, KeepBest])
def test_a_name_that_says_no_mode_is_refused(cls):
    with pytest.raises(ValueError, match=f"^{cls.__name__}: is a lower 'seconds' better, or a higher one\\? Its name "
                                         "doesn't say: give mode='min' or mode='max'$"): cls("seconds")
    with pytest.raises(ValueError, match=f"^{cls.__name__}: mode is 'low'; choose 'min' or 'max'$"): cls(mode="low")


@pytest.mark.parametrize("cb", [EarlyStopping("valid_los", mode="min"), KeepBest("valid_los", mode="min"),
                                TorchScheduler(lr_scheduler.ReduceLROnPlateau, monitor="valid_los")])
def test_a_figure_that_the_history_lacks_is_refused(cb):
    with pytest.raises(ValueError, match=f"^{type(cb).__name__}: the history has no 'valid_los': did you mean "
                                         "'valid_loss'\\? There are: epoch, train_loss, valid_loss, seconds$"):
        quiet(cb).fit(2, learner())


@pytest.mark.parametrize("cb", [EarlyStopping(), KeepBest(), TorchScheduler(lr_scheduler.ReduceLROnPlateau,
                                                                            monitor="valid_loss")])
def test_without_statistics_they_are_refused(cb):
    with pytest.raises(ValueError, match=f"^{type(cb).__name__} reads the history of AvgStatsCallback, and the runner "
                                         "has none: add one"): Runner(cb).fit(1, learner())


@pytest.mark.parametrize(("make", "text"), [
    (partial(EarlyStopping, patience=0), "EarlyStopping: patience is 0; it must be an integer of at least 1"),
    (partial(EarlyStopping, min_delta=-1), "EarlyStopping: min_delta is -1; it must be a number of at least 0"),
    (partial(EarlyStopping, min_delta=NAN), "EarlyStopping: min_delta is nan; it must be a number of at least 0"),
    (partial(TorchScheduler, print, by="step"), "TorchScheduler: by is 'step'; choose 'batch' or 'epoch'"),
    (partial(TorchScheduler, print, by="batch", monitor="valid_loss"),
     "TorchScheduler: monitor is 'valid_loss', of which there is one figure per epoch, and by is 'batch'; give by="),
])
def test_arguments_out_of_range_are_refused(make, text):
    with pytest.raises(ValueError, match=f"^{text}"): make()


def test_a_path_in_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^KeepBest: path is '.*best.pt' and its folder doesn't exist; make the "):
        quiet(KeepBest(path=tmp_path / "none" / "best.pt")).fit(1, learner())


@pytest.mark.parametrize("make", [EarlyStopping, KeepBest,
                                  partial(TorchScheduler, partial(lr_scheduler.StepLR, step_size=2))])
def test_they_copy_and_pickle_and_work_in_a_second_fit(make):
    cb = make()
    run, ends = quiet(cb), []
    for _ in range(2):
        learn = learner()
        run.fit(3, learn)
        ends.append(state(learn.model))
        for twin in (copy.deepcopy(cb), pickle.loads(pickle.dumps(cb))):
            assert twin.run is None
            assert type(twin) is type(cb)
            assert getattr(twin, "best", 0) == getattr(cb, "best", 0)
            quiet(twin).fit(1, learner())
    assert same(*ends)
    copy.deepcopy(run).fit(1, learner())


# --- TorchScheduler -----------------------------------------------------------------------------------------------

EPOCHS, BATCHES = 4, 5
MAKERS = {
    "step": partial(lr_scheduler.StepLR, step_size=3, gamma=0.5),
    "multi": partial(lr_scheduler.MultiStepLR, milestones=[1, 3], gamma=0.1),
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=EPOCHS),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=EPOCHS * BATCHES + 1),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.3, step_size_up=4),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (n + 1)),
    "sequential": lambda opt: lr_scheduler.SequentialLR(opt, [
        lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]),
    "chained": lambda opt: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(opt, 0.1, 2),
                                                          lr_scheduler.ExponentialLR(opt, 0.9)]),
}


def rates_by_hand(learn, scheduler, by, epochs=EPOCHS):
    found = []
    for _ in range(epochs):
        for xb, yb in learn.data.train_dl:
            learn.loss_func(learn.model(xb), yb).backward()
            found.append(learn.opt.param_groups[0]["lr"])
            learn.opt.step()
            learn.opt.zero_grad()
            if by == "batch": scheduler.step()
        if by == "epoch": scheduler.step()
    return found


@pytest.mark.parametrize("by", ["batch", "epoch"])
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("instance", [False, True])
def test_rates_and_weights_are_those_of_the_loop_by_hand(kind, by, instance):
    learns = [learner("none", momentum=0.9) for _ in range(2)]
    rates = rates_by_hand(learns[0], MAKERS[kind](learns[0].opt), by)
    make = MAKERS[kind](learns[1].opt) if instance else MAKERS[kind]
    run = quiet(Recorder(), TorchScheduler(make, by), TerminateOnNonFinite())
    run.fit(EPOCHS, learns[1])
    assert run.recorder.lrs[0] == rates
    assert same(state(learns[0].model), state(learns[1].model))
    assert [{k: v for k, v in g.items() if k != "params"} for g in learns[0].opt.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in learns[1].opt.param_groups]


def test_reduce_on_plateau_gets_the_figure():
    figures = [3, 2, 2, 2, 1, 1, 1, NAN]
    make = partial(lr_scheduler.ReduceLROnPlateau, factor=0.1, patience=0)
    scheduler = TorchScheduler(make, monitor="valid_loss")
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    by_hand, rates = make(opt), []
    for value in figures:
        rates.append(opt.param_groups[0]["lr"])
        by_hand.step(value)
    seen = []

    class Look(Callback):
        def begin_epoch(self): seen.append(self.opt.param_groups[0]["lr"])
    told(figures, scheduler, Look())
    assert seen == rates
    seen.clear()
    told([1, NAN, 1, NAN, 1], TorchScheduler(make, monitor="valid_loss"), Look(), EverySecond())
    assert seen == pytest.approx([0.3, 0.3, 0.3, 0.03, 0.03])           # no figure, no step


def test_several_groups():
    learn = learner()
    learn.opt = torch.optim.SGD([{"params": learn.model[0].parameters(), "lr": 0.1},
                                 {"params": learn.model[3].parameters(), "lr": 0.4}], lr=1)
    run = quiet(Recorder(), TorchScheduler(partial(lr_scheduler.ExponentialLR, gamma=0.5)))
    run.fit(3, learn)
    assert [lrs[::BATCHES] for lrs in run.recorder.lrs] == [[0.1, 0.05, 0.025], [0.4, 0.2, 0.1]]


def test_only_steps_of_the_optimizer_count():
    run = quiet(Recorder(), TorchScheduler(partial(lr_scheduler.ExponentialLR, gamma=0.5), by="batch"), Skip())
    run.fit(1, learner())
    assert run.recorder.lrs[0] == [0.3, 0.3, 0.15, 0.15, 0.075]


def test_an_epoch_whose_training_is_skipped_counts_for_none_and_torch_doesn_t_warn():
    class Skipped(Callback):
        def begin_epoch(self): return self.epoch < 2
    learn = learner()
    run = quiet(Recorder(), TorchScheduler(partial(lr_scheduler.ExponentialLR, gamma=0.5)), Skipped())
    run.fit(4, learn)
    assert run.recorder.lrs[0][::BATCHES] == [0.3, 0.15]


@pytest.mark.parametrize("kind", ["step", "cosine", "lambda", "one cycle", "exponential"])
def test_a_second_fit_has_the_schedule_anew(kind):
    learn, scheduler = learner("none"), TorchScheduler(MAKERS[kind])
    run, rates = quiet(Recorder(), scheduler), []
    for _ in range(2):
        run.fit(EPOCHS, learn, reset_history=True)
        rates.append(run.recorder.lrs[0])
    assert rates[0] == rates[1]
    run = quiet(Recorder())                             # another callback of the same optimizer
    run.fit(EPOCHS, learn, cbs=TorchScheduler(MAKERS[kind]))
    assert rates[0] == run.recorder.lrs[0]


def test_a_second_fit_starts_from_a_rate_that_was_set_since():
    learn = learner("none")
    run = quiet(Recorder(), TorchScheduler(partial(lr_scheduler.CosineAnnealingLR, T_max=2)))
    run.fit(2, learn)
    learn.opt.param_groups[0]["lr"] = 0.1
    run.fit(2, learn)
    assert run.recorder.lrs[0][::BATCHES] == pytest.approx([0.3, 0.15, 0.1, 0.05])


def test_a_scheduler_goes_on_in_a_second_fit():
    learn = learner("none")
    run = quiet(Recorder(), TorchScheduler(lr_scheduler.ExponentialLR(learn.opt, 0.5)))
    run.fit(1, learn)
    run.fit(1, learn)
    assert run.recorder.lrs[0][::BATCHES] == [0.3, 0.15]


def test_a_rate_that_is_a_tensor():
    learn = learner("none")
    learn.opt = torch.optim.SGD(learn.model.parameters(), lr=torch.tensor(0.5))
    run = quiet(Recorder(), TorchScheduler(partial(lr_scheduler.ExponentialLR, gamma=0.5)))
    for _ in range(2):
        run.fit(2, learn)
        assert run.recorder.lrs[0][-2 * BATCHES::BATCHES] == [0.5, 0.25]


@pytest.mark.parametrize(("cb", "kind", "text"), [
    (TorchScheduler(lr_scheduler.ReduceLROnPlateau), ValueError,
     "TorchScheduler: ReduceLROnPlateau goes by a figure of the history; give monitor='valid_loss'"),
    (TorchScheduler(MAKERS["step"], monitor="valid_loss"), ValueError,
     "TorchScheduler: monitor is 'valid_loss' and StepLR goes by no figure; leave it out"),
    (TorchScheduler(MAKERS["step"](learner().opt)), ValueError,
     "TorchScheduler: the scheduler is of another optimizer than the learner's; make it of learn.opt"),
    (TorchScheduler(lambda opt: 3), TypeError, "TorchScheduler: .* gave 3; it must give a scheduler of torch.optim"),
])
def test_a_scheduler_that_doesn_t_fit_is_refused(cb, kind, text):
    with pytest.raises(kind, match=f"^{text}"): quiet(cb).fit(1, learner())


def test_no_scheduler_is_refused():
    with pytest.raises(TypeError, match=r"^TorchScheduler got 0.1; it takes what makes a scheduler of an optimizer"):
        TorchScheduler(0.1)


def test_all_of_them_with_a_compiled_step(monkeypatch, tmp_path):
    monkeypatch.setattr(CompiledStep, "backend", "aot_eager")
    ends = []
    for compiled in (False, True):
        learn, keep = learner("ours"), KeepBest(path=tmp_path / "best.pt")
        run = quiet(Recorder(), TorchScheduler(MAKERS["one cycle"], by="batch"), EarlyStopping(patience=3),
                    AveragedWeights(0.7), keep, TerminateOnNonFinite(), compile=compiled)
        run.fit(EPOCHS, learn)
        ends.append((run.recorder.lrs, keep.best_epoch, learn.model))
    assert ends[0][:2] == ends[1][:2]
    for a, b in zip(ends[0][2].parameters(), ends[1][2].parameters(), strict=True): torch.testing.assert_close(a, b)
