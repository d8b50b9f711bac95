"""Annealers, their combination, the scheduler and the rate finder."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import make_learn
from torch import nn

from norms import RunningBatchNorm
from runner import (
    Callback,
    CancelBatchException,
    DataBunch,
    Dataset,
    Learner,
    LR_Find,
    ParamScheduler,
    Recorder,
    Runner,
    annealer,
    combine_scheds,
    get_dls,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)


@pytest.mark.parametrize(("sched", "start", "middle", "end"), [
    (sched_lin(0.6, 2.0), 0.6, 1.3, 2.0), (sched_lin(0.1, 0.3), 0.1, 0.2, 0.3), (sched_cos(0.3, 0.1), 0.3, 0.2, 0.1),
    (sched_no(0.7, 0.1), 0.7, 0.7, 0.7), (sched_exp(1e-4, 1.0), 1e-4, 1e-2, 1.0), (sched_exp(-4.0, -1.0), -4, -2, -1)])
def test_ends_are_exact_and_the_middle_is_right(sched, start, middle, end):
    assert (sched(0.0), sched(1.0)) == (start, end)
    assert sched(0.5) == pytest.approx(middle)


def test_cosine_quarter_by_hand():
    assert sched_cos(1.0, 0.0)(0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_annealer_makes_a_schedule_of_ones_own():
    @annealer
    def sched_square(start, end, pos): return start + pos ** 2 * (end - start)
    assert sched_square(1, 3)(0.5) == 1.5


def test_exponential_through_zero_is_refused():
    with pytest.raises(ValueError, match=r"sched_exp got start 1 and end 0; .* use sched_lin or sched_cos"):
        sched_exp(1, 0)


def test_combined_schedules_meet_at_their_fractions():
    sched = combine_scheds([0.3, 0.7], [sched_lin(0.6, 2.0), sched_lin(2.0, 0.1)])
    assert sched(0.0) == 0.6
    assert sched(0.15) == pytest.approx(1.3)
    assert sched(0.3) == pytest.approx(2.0)
    assert sched(0.65) == pytest.approx(1.05)
    assert sched(1.0) == 0.1


@pytest.mark.parametrize("pcts", [[0.1] * 10, [1 / 3] * 3, [0.0, 1.0], [1.0, 0.0], [0.5, 0.0, 0.5], [0.7, 0.2, 0.1]])
def test_fractions_that_sum_to_one_up_to_rounding(pcts):
    sched = combine_scheds(pcts, [sched_lin(i, i + 1) for i in range(len(pcts))])
    assert sched(0.0) == next(i for i, p in enumerate(pcts) if p)
    assert sched(1.0) == pytest.approx(max(i for i, p in enumerate(pcts) if p) + 1)


@pytest.mark.parametrize(("pcts", "n", "text"), [
    ([0.3, 0.6], 2, r"got the fractions \[0.3, 0.6\], which sum to 0.9; they must be at least 0 and sum to 1"),
    ([1.2, -0.2], 2, "they must be at least 0"), ([0.5, 0.5], 3, "got 2 fractions and 3 schedules"),
    ([], 0, "got 0 fractions"), ([float("nan"), 1.0], 2, "must be at least 0")])
def test_fractions_that_make_no_sense(pcts, n, text):
    with pytest.raises(ValueError, match=text): combine_scheds(pcts, [sched_no(1, 1)] * n)


@pytest.mark.parametrize("pos", [-0.1, 1.1, float("nan")])
def test_position_outside_training(pos):
    with pytest.raises(ValueError, match=r"positions lie in 0 \(start\) to 1"):
        combine_scheds([1.0], [sched_no(1, 1)])(pos)


def test_scheduler_sets_each_training_batch():
    run = Runner([Recorder(), ParamScheduler("lr", sched_lin(0.0, 1.0))])
    run.fit(2, make_learn())
    assert run.recorder.lrs[0] == [0.0, 0.25, 0.5, 0.75]


def test_two_schedulers_and_parameter_groups():
    learn = make_learn()
    learn.opt = torch.optim.SGD([{"params": learn.model[0].parameters()}, {"params": learn.model[2].parameters()}],
                                lr=0.1, momentum=0.5)
    momenta = []

    class Look(Callback):
        def after_step(self): momenta.append(self.opt.param_groups[1]["momentum"])
    run = Runner([Recorder(), Look(), ParamScheduler("lr", [sched_lin(0, 1), sched_no(0.2, 0)]),
                  ParamScheduler("momentum", sched_lin(0.8, 0.4))])
    run.fit(1, learn)
    assert run.recorder.lrs == [[0.0, 0.5], [0.2, 0.2]]
    assert momenta == pytest.approx([0.8, 0.6])
    assert run.param_scheduler_lr is not run.param_scheduler_momentum


@pytest.mark.parametrize(("scheduler", "text"), [
    (ParamScheduler("mom", sched_no(1, 1)), "the optimizer SGD has no parameter 'mom'; choose one of: lr, momentum"),
    (ParamScheduler("lr", [sched_no(1, 1)] * 2), "has 2 schedules for 'lr' and the optimizer has 1 parameter groups")])
def test_scheduler_that_does_not_fit_the_optimizer(scheduler, text):
    with pytest.raises(ValueError, match=text): Runner(scheduler).fit(1, make_learn())


# --- the rate finder ----------------------------------------------------------------------------------------------

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
    run, finder = Runner([Recorder(), SkipThird(), ParamScheduler("lr", sched_no(0.5, 0.5))]), LR_Find(max_iter=8)
    run.fit(1, noisy_learn(), cbs=finder)
    assert finder.lrs == run.recorder.lrs[0]
    assert finder.losses == run.recorder.losses
    assert len(set(finder.lrs)) == len(finder.lrs)


@pytest.mark.parametrize(("kwargs", "text"), [
    ({"max_iter": 1}, "max_iter is 1; it must be an integer of at least 2"),
    ({"min_lr": 0}, "min_lr is 0 and max_lr 10; they must satisfy"),
    ({"min_lr": 1, "max_lr": 0.1}, "0 < min_lr < max_lr")])
def test_finder_settings_that_make_no_sense(kwargs, text):
    with pytest.raises(ValueError, match=text): LR_Find(**kwargs)
