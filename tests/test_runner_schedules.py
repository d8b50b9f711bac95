"""Annealers, their combination and the scheduler."""

import copy
import inspect
import math
import pickle
import pydoc

import pytest
import torch
from test_runner_loop import make_learn
from torch import nn

from runner import (
    Callback,
    CancelTrainException,
    ParamScheduler,
    Recorder,
    Runner,
    annealer,
    combine_scheds,
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


# --- schedules as values ------------------------------------------------------------------------------------------

@annealer
def sched_square(start, end, pos):
    """A square."""
    return start + pos ** 2 * (end - start)


def cube(start, end, pos): return start + pos ** 3 * (end - start)


sched_cube = annealer(cube)     # under another name, and the function keeps its own

SCHEDULES = [sched_lin(0.1, 1.0), sched_cos(1, 0.0), sched_no(2, 3), sched_exp(-1e-3, -1), sched_square(1, 3),
             sched_cube(0.5, 2), combine_scheds([0.2, 0.8], [sched_square(0, 1), sched_exp(1, 1e-4)])]


@pytest.mark.parametrize("sched", SCHEDULES, ids=repr)
def test_schedules_pickle_copy_and_compare(sched):
    for twin in (pickle.loads(pickle.dumps(sched)), copy.deepcopy(sched), copy.copy(sched)):
        assert type(twin) is type(sched)
        assert twin == sched
        assert repr(twin) == repr(sched)
        assert [twin(i / 7) for i in range(8)] == [sched(i / 7) for i in range(8)]
    assert sum(sched == other for other in SCHEDULES) == 1


def test_a_schedule_says_what_it_is():
    assert repr(combine_scheds([0.3, 0.7], [sched_lin(0.6, 2.0), sched_cos(2.0, 0.1)])) == (
        "combine_scheds([0.3, 0.7], [sched_lin(0.6, 2.0), sched_cos(2.0, 0.1)])")
    assert repr(sched_square(1, 2)) == "sched_square(1, 2)"


@pytest.mark.parametrize("make", [sched_lin, sched_cos, sched_no, sched_exp, sched_square, sched_cube])
def test_help_shows_start_and_end_and_no_position(make):
    assert list(inspect.signature(make).parameters) == ["start", "end"]
    text = pydoc.plain(pydoc.render_doc(make))
    assert "(start" in text
    assert "pos:" not in text.splitlines()[2]
    assert "pos)" not in text.splitlines()[2]
    assert pickle.loads(pickle.dumps(sched_lin)) is sched_lin


def test_values_are_those_of_the_formulas_to_the_last_bit():
    for i in range(50):
        pos, a, b = i / 49, 0.1 * i + 0.01, 2.7 / (i + 1)
        assert sched_lin(a, b)(pos) == (1 - pos) * a + pos * b
        w = (1 - math.cos(math.pi * pos)) / 2
        assert sched_cos(a, b)(pos) == (1 - w) * a + w * b
        assert sched_exp(a, b)(pos) == a ** (1 - pos) * b ** pos


def test_a_function_inside_of_a_function_makes_a_schedule_that_copies_and_says_why_it_does_not_pickle():
    @annealer
    def inner(start, end, pos): return start
    assert copy.deepcopy(inner(1, 2))(0.5) == 1
    with pytest.raises((AttributeError, pickle.PicklingError), match="inner"): pickle.dumps(inner(1, 2))


# --- groups -------------------------------------------------------------------------------------------------------

def two_groups(lrs=(0.1, 0.01), layers=(0, 2)):
    """A learner whose optimizer has a group for each of two layers; the model has a third one."""
    learn = make_learn(model=nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 3)))
    learn.opt = torch.optim.SGD([{"params": list(learn.model[i].parameters()), "lr": lr}
                                 for i, lr in zip(layers, lrs, strict=True)], lr=1.0)
    return learn


class Rates(Callback):
    """The rates of all groups in each training batch."""

    def __init__(self): self.seen = []

    def after_loss(self):
        if self.run.in_train: self.seen.append([g["lr"] for g in self.run.opt.param_groups])


class Unfreeze(Callback):
    """Adds the last layer to the optimizer at the start of the second epoch."""

    def begin_epoch(self):
        if self.run.epoch == 1:
            self.run.opt.add_param_group({"params": list(self.run.model[3].parameters()), "lr": 0.5})


def rates(learn): return [g["lr"] for g in learn.opt.param_groups]


def test_multiples_of_each_groups_own_rate():
    learn, seen = two_groups(), Rates()
    Runner([ParamScheduler("lr", sched_lin(1, 0), relative=True)]).fit(2, learn, cbs=seen)
    assert seen.seen == [[0.1 * m, 0.01 * m] for m in (1.0, 0.75, 0.5, 0.25)]
    assert rates(learn) == [0.1, 0.01]


def test_multiples_by_a_schedule_of_each_group():
    learn, seen = two_groups(), Rates()
    Runner([ParamScheduler("lr", [sched_no(1, 1), sched_no(3, 3)], relative=True), seen]).fit(1, learn)
    assert seen.seen == [[0.1, 0.03]] * 2


@pytest.mark.parametrize("relative", [False, True])
def test_a_group_that_is_added_in_mid_fit_is_followed(relative):
    learn, seen = two_groups(), Rates()
    Runner([ParamScheduler("lr", sched_lin(1, 0), relative=relative), seen]).fit(2, learn, cbs=Unfreeze())
    own = [0.1, 0.01, 0.5] if relative else [1, 1, 1]
    assert seen.seen == [[o * m for o in own[:n]] for m, n in ((1.0, 2), (0.75, 2), (0.5, 3), (0.25, 3))]
    assert rates(learn) == [0.1, 0.01, 0.5]


def test_a_group_without_a_schedule_of_its_own_is_an_error_that_says_what_to_do():
    def scheduler(): return ParamScheduler("lr", [sched_no(1, 1), sched_no(2, 2)])
    learn = two_groups()
    with pytest.raises(ValueError, match=r"has 2 schedules for 'lr', and a parameter group was added in mid-fit: give "
                                         r"one schedule for all groups, or append .*run\.param_scheduler_lr\.scheds"):
        Runner(scheduler()).fit(2, learn, cbs=Unfreeze())
    assert rates(learn) == [0.1, 0.01, 0.5]

    class Append(Unfreeze):
        def begin_epoch(self):
            if self.run.epoch == 1: self.run.param_scheduler_lr.scheds.append(sched_no(3, 3))
            super().begin_epoch()
    seen = Rates()
    Runner([scheduler(), seen]).fit(2, two_groups(), cbs=Append())
    assert seen.seen == [[1, 2], [1, 2], [1, 2, 3], [1, 2, 3]]


class Stop(Callback):
    """Raises in the third training batch, at some event."""

    def __init__(self, at, error): self.at, self.error, self.n = at, error, 0

    def __call__(self, event):
        if event == "begin_batch" and self.run.in_train: self.n += 1
        if event == self.at and (self.n == 3 or event in ("begin_fit", "after_fit")): raise self.error


@pytest.mark.parametrize("at", ["begin_fit", "begin_batch", "after_loss", "after_step", "after_batch", "after_epoch",
                                "after_fit"])
@pytest.mark.parametrize("error", [KeyError("boom"), CancelTrainException(), KeyboardInterrupt()])
@pytest.mark.parametrize("order", [0, 1.5])
@pytest.mark.parametrize("lasting", [False, True])
def test_every_group_has_its_own_rate_again_whatever_ends_the_fit(at, error, order, lasting):
    stop = Stop(at, error)
    stop._order = order
    learn, sched = two_groups(), ParamScheduler("lr", sched_cos(3, 2))
    run = Runner([sched] if lasting else None)
    try: run.fit(3, learn, cbs=[stop] if lasting else [stop, sched])
    except (KeyError, KeyboardInterrupt, CancelTrainException): pass
    assert rates(learn) == [0.1, 0.01]


def test_a_second_fit_begins_as_the_first_did():
    learn, seen = two_groups(), Rates()
    run = Runner([ParamScheduler("lr", sched_lin(1, 0), relative=True), seen])
    for _ in range(2): run.fit(1, learn)
    assert seen.seen[:2] == seen.seen[2:] == [[0.1, 0.01], [0.05, 0.005]]


def test_a_rate_that_is_a_tensor_and_momenta_that_are_pairs_come_back():
    learn = make_learn()
    lr = torch.tensor(0.25)
    learn.opt = torch.optim.Adam(learn.model.parameters(), lr=lr, betas=(0.8, 0.9))
    seen = []

    class Look(Callback):
        def after_loss(self):
            group, = self.run.opt.param_groups
            seen.append((float(group["lr"]), group["betas"]))
    run = Runner([ParamScheduler("lr", sched_no(2, 2), relative=True), Look(),
                  ParamScheduler("betas", lambda pos: (0.5 + pos / 2, 0.99))])
    run.fit(1, learn)
    assert seen[:2] == [(0.5, (0.5, 0.99)), (0.5, (0.75, 0.99))]
    assert learn.opt.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25
    assert learn.opt.param_groups[0]["betas"] == (0.8, 0.9)


def test_a_state_dict_that_is_loaded_in_mid_fit_does_not_change_what_is_put_back():
    learn, seen = two_groups(), Rates()

    class Reload(Callback):
        def begin_epoch(self):
            if self.run.epoch == 1: self.run.opt.load_state_dict(copy.deepcopy(self.run.opt.state_dict()))
    Runner([ParamScheduler("lr", sched_lin(1, 0), relative=True), seen, Reload()]).fit(2, learn)
    assert seen.seen[3] == [0.025, 0.0025]
    assert rates(learn) == [0.1, 0.01]


def test_relative_is_true_or_false():
    with pytest.raises(TypeError, match="relative is 'yes'; it must be True or False"):
        ParamScheduler("lr", sched_no(1, 1), relative="yes")
