"""Averaged weights: torch's averages bit for bit, validated with, and the trained weights back whatever happens."""

import copy
import pickle
import random
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import make_learn
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import norms
from norms import BatchNorm, RunningBatchNorm
from runner import (
    ActivationStats,
    AveragedWeights,
    AvgStatsCallback,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    GradientAccumulation,
    GradientClip,
    MixedPrecision,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    TorchScheduler,
)
from runner.averaged import recalibrate
from runner.compiled import CompiledStep

KINDS = {"torch": nn.BatchNorm1d, "ours": BatchNorm, "running": RunningBatchNorm, "none": lambda nf: nn.Identity()}


def network(kind="torch"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), KINDS[kind](5), nn.ReLU(), nn.Linear(5, 3))


def learner(kind="torch", **kwargs): return make_learn(**{"n_train": 20, "n_valid": 8, "bs": 4, "lr": 0.3,
                                                          "model": network(kind), **kwargs})


def quiet(*cbs, **kwargs):
    run = Runner([AvgStatsCallback(), *cbs], **kwargs)
    run.logger = lambda row: None
    return run


def state(model): return {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def by_hand(learn, epochs, decay, start=0, every=1, by="batch", use_buffers=True):
    """The loop with torch's AveragedModel; per epoch what was averaged, and the loss of validation with it."""
    model, done, history = learn.model, 0, []
    if decay is None: averaged = AveragedModel(model, use_buffers=use_buffers)
    else: averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)

    def update():
        nonlocal done
        done += 1
        if done <= start or (done - start) % every: return
        averaged.update_parameters(model)
        for b, now in zip(averaged.module.buffers(), model.buffers(), strict=True):
            if not b.is_floating_point(): b.copy_(now)
    for _ in range(epochs):
        model.train()
        for xb, yb in learn.data.train_dl:
            learn.loss_func(model(xb), yb).backward()
            learn.opt.step()
            learn.opt.zero_grad()
            if by == "batch": update()
        if by == "epoch": update()
        validated = averaged.module if averaged.n_averaged else model
        validated.eval()
        total = seen = 0
        with torch.no_grad():
            for xb, yb in learn.data.valid_dl:
                total, seen = total + learn.loss_func(validated(xb), yb).item() * len(xb), seen + len(xb)
        history.append(total / seen)
    return averaged, history


@pytest.mark.parametrize("seed", range(25))
def test_averages_validation_and_training_are_those_of_the_loop_by_hand(seed):
    draw = random.Random(seed)
    kind, use_buffers = draw.choice(list(KINDS)), draw.random() < 0.7
    how = {"decay": draw.choice([None, 0.0, 0.5, 0.9, 0.999]), "start": draw.choice([0, 0, 1, 3]),
           "every": draw.choice([1, 1, 2, 3]), "by": draw.choice(["batch", "epoch"])}
    learns = [learner(kind) for _ in range(3)]
    averaged, history = by_hand(learns[0], 3, use_buffers=use_buffers, **how)
    ours = AveragedWeights(norms="average" if use_buffers else "copy", **how)
    run = quiet(ours)
    run.fit(3, learns[1])
    Runner().fit(3, learns[2])
    assert same(state(learns[0].model), state(learns[1].model))
    assert same(state(learns[2].model), state(learns[1].model))
    assert ours.averaged_model.n_averaged == averaged.n_averaged
    if averaged.n_averaged: assert same(state(ours.averaged_model.module), state(averaged.module))
    assert [row["valid_loss"] for row in run.avg_stats.history] == pytest.approx(history, rel=1e-12)


def test_two_steps_computed_by_hand():
    def fit(**how):
        learn = make_learn(n_train=4, bs=2, lr=0.1)
        seen = []

        class Look(Callback):
            def after_step(self): seen.append(self.model[0].weight.detach().clone())
        ours = AveragedWeights(**how)
        Runner([ours, Look()]).fit(1, learn)
        return seen, ours.averaged_model.module[0].weight
    (one, two), average = fit(decay=0.75)
    torch.testing.assert_close(average, 0.75 * one + 0.25 * two)
    (one, two), average = fit(decay=None)
    torch.testing.assert_close(average, (one + two) / 2)


@pytest.mark.parametrize("decay", [0.9, None])
def test_counters_are_copied_and_not_averaged(decay):
    learn, ours = learner(), AveragedWeights(decay)
    Runner(ours).fit(2, learn)
    assert learn.model[1].num_batches_tracked == ours.averaged_model.module[1].num_batches_tracked == 10
    assert not torch.equal(learn.model[1].running_mean, ours.averaged_model.module[1].running_mean)


def test_what_changes_weights_after_the_step_is_in_the_averages():
    class Clamp(Callback):
        def after_step(self):
            with torch.no_grad():
                for p in self.model.parameters(): p.clamp_(-0.1, 0.1)
    ours, learn = AveragedWeights(0.5), make_learn(n_train=8)
    Runner([ours, Clamp()]).fit(1, learn)
    assert all(p.abs().max() <= 0.1 for p in ours.averaged_model.module.parameters())


class Skip(Callback):
    """Makes a step of every second batch only."""

    def step(self, inner):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls % 2: self.run.stepped = False
        else: inner()


def test_a_batch_without_a_step_is_not_averaged():
    ours = AveragedWeights(0.5)
    Runner([ours, Skip()]).fit(1, make_learn(n_train=16))
    assert ours.averaged_model.n_averaged == 4


def test_a_batch_cancelled_before_its_step_is_not_averaged():
    class Cancel(Callback):
        def after_backward(self): raise CancelBatchException
    ours = AveragedWeights(0.5)
    Runner([ours, Cancel()]).fit(1, make_learn(n_train=16))
    assert ours.averaged_model.n_averaged == 0
    with pytest.raises(ValueError, match=r"^AveragedWeights has no averages yet: they begin after 0 steps of a fit "
                                         r"\(start=0\)$"): ours.apply()


# --- whatever happens ---------------------------------------------------------------------------------------------

class Stop(Callback):
    """Raises in a validation, at an event, `_order`ed before or after the averages."""

    def __init__(self, what, event, order): self.what, self.at, self._order = what, event, order

    def __call__(self, event):
        if event == self.at and not self.in_train and self.epoch == 1: raise self.what
        return False


IN_BATCH = "begin_batch", "after_pred", "after_loss"
WAYS_OUT = [*product([CancelBatchException], IN_BATCH), *product(
    [CancelEpochException, CancelTrainException, ZeroDivisionError, KeyboardInterrupt],
    ["begin_validate", *IN_BATCH, "after_batch", "after_epoch"])]


@pytest.mark.parametrize("order", [-9, 5, 3000])
@pytest.mark.parametrize(("what", "event"), WAYS_OUT)
def test_the_trained_weights_are_back_to_the_bit(what, event, order):
    learn, twin, seen = learner(), learner(), []

    class Watch(Callback):
        _order = -1

        def after_batch(self):
            if self.in_train: self.trained = state(self.model)

        def after_cancel_epoch(self): seen.append(same(self.trained, state(self.model)))

        def after_cancel_train(self): seen.append(same(self.trained, state(self.model)))

        def after_epoch(self): seen.append(same(self.trained, state(self.model)))

        def after_fit(self): seen.append(same(self.trained, state(self.model)))
    ids = [id(t) for t in (*learn.model.parameters(), *learn.model.buffers())]
    run = quiet(AveragedWeights(0.9), Watch(), Stop(what(), event, order))
    try: run.fit(3, learn)
    except (ZeroDivisionError, KeyboardInterrupt, CancelEpochException): assert run.status == "failed"
    assert seen
    assert all(seen)
    assert ids == [id(t) for t in (*learn.model.parameters(), *learn.model.buffers())]
    ended = issubclass(what, (CancelTrainException, ZeroDivisionError, KeyboardInterrupt)) or event == "after_epoch"
    Runner().fit(2 if ended else 3, twin)
    assert same(state(learn.model), state(twin.model))


def test_values_that_arithmetic_would_lose_come_back():
    learn = learner()
    learn.model.register_buffer("odd", torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]))
    learn.model.register_buffer("big", torch.tensor([2**53 + 1]), persistent=False)
    before = state(learn.model)
    Runner(AveragedWeights(0.9)).fit(1, learn)
    after = state(learn.model)
    assert torch.equal(before["odd"].view(torch.int32), after["odd"].view(torch.int32))
    assert torch.equal(before["big"], after["big"])


@pytest.mark.parametrize("keep", [lambda m, x: x, lambda m, x: [x], lambda m, x: {"x": (x, 1)}])
def test_a_model_that_keeps_what_it_computed_is_averaged_in_a_second_fit_too(keep):
    class Keeps(nn.Linear):
        def forward(self, x):
            self.last = keep(self, super().forward(x))
            return super().forward(x)
    learn, ours = make_learn(model=nn.Sequential(Keeps(6, 3))), AveragedWeights(0.5)
    Runner(ours).fit(1, learn)
    learn.model.train()
    learn.model(torch.randn(2, 6))
    Runner(ours).fit(1, learn)
    assert ours.averaged_model.n_averaged == 2
    assert learn.model[0].last is not ours.averaged_model.module[0].last


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    ours, learn = AveragedWeights(0.5), make_learn(model=model)
    Runner(ours).fit(1, learn)
    ours.apply()
    assert model[2].weight is model[0].weight
    assert torch.equal(model[0].weight, ours.averaged_model.module[2].weight)


# --- running norms ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_recalibration_is_torch_s_update_bn(kind):
    learn, ours = learner(kind), AveragedWeights(0.5, norms="recalibrate")
    batches = []

    class Keep(Callback):
        def begin_epoch(self): batches.clear()

        def after_pred(self):
            if self.in_train: batches.append((self.xb, self.yb))
    run = quiet(ours, Keep())
    run.fit(2, learn)
    averaged = by_hand(learner("torch"), 2, 0.5, use_buffers=False)[0]
    update_bn(batches, averaged)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours.averaged_model.module[1], name), getattr(averaged.module[1], name))
    averaged.eval()
    with torch.no_grad(): losses = [F.cross_entropy(averaged(xb), yb).item() for xb, yb in learn.data.valid_dl]
    assert run.avg_stats.history[-1]["valid_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("kind", ["torch", "ours", "running"])
@pytest.mark.parametrize("how", ["recalibrate", partial(norms.recalibrate, n_images=20)])
def test_recalibration_changes_no_bit_of_training(kind, how):
    learns, ours = [], AveragedWeights(0.5, norms=how)
    for cbs in ([], [ours]):
        learns.append(learner(kind, model=nn.Sequential(*network(kind), nn.Dropout(0.5))))
        torch.manual_seed(1)
        Runner(cbs).fit(3, learns[-1])
    assert same(state(learns[0].model), state(learns[1].model))
    assert not torch.equal(ours.averaged_model.module[1].running_mean, learns[1].model[1].running_mean)
    assert not any(m.training for m in ours.averaged_model.modules())


def test_a_function_gets_the_averages_and_the_first_images_of_the_epoch():
    got = []
    ours = AveragedWeights(0.5, norms=lambda model, batches: got.append((model, [len(xb) for xb, _ in batches])),
                           n_images=6)
    run = Runner(ours)
    run.fit(2, learner())
    assert [sizes for _, sizes in got] == [[4, 4], [4, 4]]
    assert got[-1][0] is ours.averaged_model
    assert ours._kept == []


def test_a_fit_that_is_cancelled_in_training_has_its_norms_recalibrated():
    class Cancel(Callback):
        def after_batch(self):
            if self.n_iter == 7: raise CancelTrainException
    got = []
    ours = AveragedWeights(0.5, norms=lambda model, batches: got.append(len(batches)))
    Runner([ours, Cancel()]).fit(3, learner())
    assert got == [5, 2]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None),
                                  nn.InstanceNorm1d(4, track_running_stats=True), BatchNorm(4)])
def test_recalibration_is_the_plain_mean_over_batches_and_leaves_the_momentum(norm):
    weight = getattr(norm, "momentum", getattr(norm, "mom", "none"))
    xs = [torch.randn(3, 4, 7) for _ in range(4)]
    twice = nn.Sequential(norm, nn.Dropout(0.5)).train()
    recalibrate(twice, [(x, None) for x in xs])
    means = [x.mean((0, 2)) for x in xs]
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    assert getattr(norm, "momentum", getattr(norm, "mom", "none")) == weight
    assert twice.training
    assert norm.training
    assert not norm._forward_pre_hooks


def test_recalibration_without_such_a_norm_is_refused():
    with pytest.raises(ValueError, match=r"^AveragedWeights: norms is 'recalibrate' and Sequential has no norm with "
                                         r"running statistics; leave it out$"):
        Runner(AveragedWeights(norms="recalibrate")).fit(1, learner("none"))


# --- with others --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["torch", "ours", "running"])
def test_with_a_compiled_step(monkeypatch, kind):
    monkeypatch.setattr(CompiledStep, "backend", "aot_eager")
    learns, both = [learner(kind), learner(kind)], [AveragedWeights(0.5), AveragedWeights(0.5)]
    runs = [quiet(ours, TerminateOnNonFinite(), compile=compiled)
            for ours, compiled in zip(both, (False, True), strict=True)]
    for run, learn in zip(runs, learns, strict=True): run.fit(2, learn)
    for a, b in zip(both[0].averaged_model.parameters(), both[1].averaged_model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert runs[0].avg_stats.history[-1]["valid_loss"] == pytest.approx(runs[1].avg_stats.history[-1]["valid_loss"],
                                                                        rel=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("length", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("kind", ["ours", "none"])
def test_with_mixed_precision_accumulation_clipping_and_a_schedule(monkeypatch, kind, length, compiled):
    monkeypatch.setattr(CompiledStep, "backend", "aot_eager")
    learns = [learner(kind, lr=0.1, momentum=0.9) for _ in range(2)]
    model, opt = learns[0].model, learns[0].opt
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    schedule = lr_scheduler.ExponentialLR(opt, 0.9)
    for _ in range(3):
        model.train()
        batches = list(learns[0].data.train_dl)
        for i, (xb, yb) in enumerate(batches):                  # 5 batches: groups of 2, 2 and 1
            with torch.autocast("cpu", torch.bfloat16): loss = F.cross_entropy(model(xb), yb)
            (loss / 2 if i < 4 or not length else loss).backward()
            if i % 2 == 0 and i < 4: continue
            if i == 4 and not length:
                for p in model.parameters(): p.grad.mul_(2.0)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            opt.zero_grad()
            schedule.step()
            averaged.update_parameters(model)
            for b, now in zip(averaged.module.buffers(), model.buffers(), strict=True):
                if not b.is_floating_point(): b.copy_(now)
    if not length:
        dl = learns[1].data.train_dl            # shorter than it says: the last step comes after the pass
        dl.__class__ = type("Shorter", (type(dl),), {"__len__": lambda self: 6})
    ours = AveragedWeights(0.7)
    run = quiet(ours, TerminateOnNonFinite(), TorchScheduler(partial(lr_scheduler.ExponentialLR, gamma=0.9), "batch"),
                GradientClip(0.5), MixedPrecision(), GradientAccumulation(2), compile=compiled)
    run.fit(3, learns[1])
    assert (run.status, ours.averaged_model.n_averaged) == ("ok", 9)
    assert learns[1].opt.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    pairs = [*zip(state(learns[1].model).values(), state(model).values(), strict=True),
             *zip(state(ours.averaged_model.module).values(), state(averaged.module).values(), strict=True)]
    for a, b in pairs:
        if compiled: torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)    # bfloat16 rounds at other places
        else: torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_terminate_on_non_finite_finds_what_it_finds_without():
    class Poison(Callback):
        def after_backward(self):
            if self.n_iter == 7: next(self.model.parameters()).grad.fill_(float("nan"))
    reports = []
    for extra in ([], [AveragedWeights(0.5)]):
        watch, learn = TerminateOnNonFinite(), learner()
        run = quiet(watch, Poison(), *extra)
        run.fit(3, learn)
        assert run.status == "diverged"
        reports.append((watch.record["report"], state(learn.model)))
    assert reports[0][0] == reports[1][0]
    assert same(reports[0][1], reports[1][1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_terminate_on_non_finite_finds_what_validation_has_with_the_averages(bad):
    learn, watch = learner(), TerminateOnNonFinite()
    learn.data.valid_dl.dataset.x[5] = bad
    run = quiet(AveragedWeights(0.5), watch)
    run.fit(3, learn)
    twin = learner()
    Runner().fit(1, twin)
    assert run.status == "diverged"
    assert watch.record["repeats"]
    assert watch.record["finding"]["what"].startswith("the batch")
    assert same(state(learn.model), state(twin.model))


def test_hooks_of_the_model_are_not_copied():
    stats, ours = ActivationStats(["0"], verbose=False), AveragedWeights(0.5)
    learn = learner()
    handle = learn.model[0].register_forward_hook(lambda *args: None)
    Runner([ours, stats, Recorder()]).fit(1, learn)
    assert not ours.averaged_model.module[0]._forward_hooks
    handle.remove()


def test_copies_and_pickles_before_and_after_a_fit_and_works_in_a_second():
    ours, learn = AveragedWeights(0.5), learner()
    run = quiet(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))): assert twin.averaged_model is None
    run.fit(1, learn)
    first = state(ours.averaged_model.module)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert same(state(twin.averaged_model.module), first)
        assert twin.run is None
        with pytest.raises(ValueError, match=r"^AveragedWeights\.apply: this is a copy, which has no runner; give it "
                                             r"the model$"): twin.apply()
        other = network()
        twin.apply(other)
        assert same(state(other), first)
    run.fit(1, learn)
    assert ours.averaged_model.n_averaged == 5
    assert not same(state(ours.averaged_model.module), first)
    copy.deepcopy(run).fit(1, learner())


def test_apply_gives_the_model_what_was_validated():
    ours, learn = AveragedWeights(0.9), learner()
    run = quiet(ours)
    run.fit(2, learn)
    ours.apply()
    learn.model.eval()
    with torch.no_grad(): loss = F.cross_entropy(learn.model(torch.cat([x for x, _ in learn.data.valid_dl])),
                                                 torch.cat([y for _, y in learn.data.valid_dl]))
    assert run.avg_stats.history[-1]["valid_loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize(("kwargs", "text"), [
    ({"decay": 1}, "AveragedWeights: decay is 1; it must be at least 0 and below 1, such as 0.999, or None"),
    ({"decay": "ema"}, "AveragedWeights: decay is 'ema'; it must be at least 0"),
    ({"start": -1}, "AveragedWeights: start is -1; it must be an integer of at least 0"),
    ({"every": 0}, "AveragedWeights: every is 0; it must be an integer of at least 1"),
    ({"by": "step"}, "AveragedWeights: by is 'step'; choose 'batch' or 'epoch'"),
    ({"norms": "mean"}, "AveragedWeights: norms is 'mean'; choose 'average', 'recalibrate' or 'copy', or give a "),
])
def test_arguments_out_of_range_are_refused(kwargs, text):
    with pytest.raises(ValueError, match=f"^{text}"): AveragedWeights(**kwargs)
