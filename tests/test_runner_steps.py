"""The five steps of a training batch, and the callbacks that take them over."""

import copy

import pytest
import torch
from test_runner_loop import make_learn

from runner import STEPS, Callback, CancelBatchException, Recorder, Runner


class Told(Callback):
    """Writes down which steps are done, and does them."""

    def __init__(self): self.steps = []


def wrapper(step):
    def wrap(self, inner):
        self.steps.append(step)
        inner()
    return wrap


for _step in STEPS: setattr(Told, _step, wrapper(_step))


def test_a_batch_is_five_steps_and_a_validation_batch_two():
    told = Told()
    Runner(told).fit(1, make_learn())
    assert told.steps == [*STEPS, *STEPS, "predict", "get_loss"]


def test_wrapped_steps_change_no_bit():
    learns = [make_learn(n_train=8, momentum=0.9) for _ in range(2)]
    Runner().fit(2, learns[0])
    Runner([Told()]).fit(2, learns[1])
    for p, q in zip(*(learn.model.parameters() for learn in learns), strict=True): assert torch.equal(p, q)


@pytest.mark.parametrize("step", STEPS)
def test_a_callback_takes_a_step_over_for_the_fit_and_no_longer(step):
    class Taker(Callback):
        calls = 0

    def take(self):
        self.calls += 1
        getattr(Runner, step)(self.run)
    setattr(Taker, step, take)
    taker, run = Taker(), Runner()
    learn, twin = make_learn(), make_learn()
    run.fit(1, learn, cbs=taker)
    assert taker.calls == (3 if step in ("predict", "get_loss") else 2)
    Runner().fit(1, twin)
    for p, q in zip(learn.model.parameters(), twin.model.parameters(), strict=True): assert torch.equal(p, q)
    run.fit(1, learn)
    assert taker.calls == (3 if step in ("predict", "get_loss") else 2)
    assert step not in vars(run)


@pytest.mark.parametrize("step", STEPS)
def test_two_that_take_the_same_step_are_refused_before_anything_happens(step):
    def take(self): raise AssertionError("called")
    one, two = (type(name, (Callback,), {step: take, "begin_fit": take})() for name in ("One", "Two"))
    run, learn = Runner([one, two]), make_learn()
    with pytest.raises(ValueError, match=rf"^One and Two take the place of the runner's {step}\(\), which one callback "
                                         rf"at most can do; .* define {step}\(self, inner\) and call inner\(\)"):
        run.fit(1, learn)
    run.cbs.remove(two)
    run.cbs.remove(one)
    run.fit(1, learn)                                           # it can be used again
    assert run.status == "ok"


def test_wrappers_compose_in_their_order_around_the_one_that_does_it():
    said = []

    class Does(Callback):
        _order = -99

        def step(self): said.append("does")

    class Outer(Callback):
        _order = 1

        def step(self, inner):
            said.append("outer in")
            inner()
            said.append("outer out")

    class Inner(Callback):
        _order = 2

        def step(self, inner):
            said.append("inner in")
            inner()
            said.append("inner out")
    Runner([Inner(), Does(), Outer()]).fit(1, make_learn(n_train=2))
    assert said == ["outer in", "inner in", "does", "inner out", "outer out"]


def test_a_step_that_was_none_is_not_counted_and_has_no_after_step():
    class EverySecond(Callback):
        batch = 0

        def step(self, inner):
            self.batch += 1
            if self.batch % 2: self.run.stepped = False
            else: inner()

    class Seen(Callback):
        def __init__(self): self.events, self.counts, self.epochs_seen = [], [], []

        def after_step(self): self.events.append(self.n_iter)

        def after_batch(self):
            if not self.in_train: return
            self.counts.append(self.n_iter)
            self.epochs_seen.append(self.n_epochs)
    seen = Seen()
    Runner([EverySecond(), seen]).fit(1, make_learn(n_train=8))
    assert seen.events == [0, 1]
    assert seen.counts == [0, 1, 1, 2]                          # after the batch was counted
    assert seen.epochs_seen == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("step", STEPS)
def test_a_cancel_in_a_step_ends_the_batch(step):
    class Cancels(Callback):
        ended = 0

        def after_cancel_batch(self): self.ended += 1

    def cancel(self, inner): raise CancelBatchException
    setattr(Cancels, step, cancel)
    cancels = Cancels()
    Runner(cancels).fit(1, make_learn())
    assert cancels.ended == (3 if step in ("predict", "get_loss") else 2)


@pytest.mark.parametrize(("wrong", "right"), [("zero_grads", "zero_grad"), ("get_los", "get_loss"),
                                              ("backwards", "backward"), ("predicts", "predict")])
def test_a_misspelt_step_is_refused_when_the_class_is_defined(wrong, right):
    with pytest.raises(TypeError, match=f"Mine.{wrong} is no step and would never be called; rename it to '{right}'"):
        type("Mine", (Callback,), {wrong: lambda self: None})


def test_inputs_that_are_several_are_splatted_by_two_lines():
    class Splat(Callback):
        def begin_batch(self): self.run.xb = (self.xb, self.xb)

        def predict(self): self.run.pred = self.model(sum(self.xb) / 2)
    learn, twin = make_learn(), make_learn()
    Runner([Splat(), Recorder()]).fit(1, learn)
    Runner().fit(1, twin)
    for p, q in zip(learn.model.parameters(), twin.model.parameters(), strict=True): torch.testing.assert_close(p, q)


def test_explain_says_who_takes_a_step(capsys):
    Runner(Told()).explain()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "pred = model(xb) predict: Told".split() in lines
    assert "opt.step() step: Told".split() in lines


def test_the_compiled_step_and_another_prediction_are_refused_together():
    class Own(Callback):
        def predict(self): self.run.pred = self.model(self.xb)
    with pytest.raises(ValueError, match=r"CompiledStep and Own take the place of the runner's predict\(\)"):
        Runner(Own(), compile=True).fit(1, make_learn())


def test_a_runner_with_steps_taken_over_can_be_copied():
    run = Runner(Told())
    run.fit(1, make_learn())
    copy.deepcopy(run).fit(1, make_learn())


def test_a_callback_is_found_by_its_class():
    class Own(Recorder): pass
    recorder, own = Recorder(), Own()
    run = Runner([recorder, own])
    assert run[Recorder] is recorder is run.recorder
    assert run[Own] is own
    with pytest.raises(KeyError, match=r"the runner has no callback of class Told: TrainEvalCallback, Recorder, Own"):
        run[Told]
    with pytest.raises(KeyError, match="the runner has 3 callbacks of class Callback: TrainEval"):
        run[Callback]
    told = Told()

    class Looks(Callback):
        def begin_fit(self): self.seen = self.run[Told]
    looks = Looks()
    run.fit(1, make_learn(), cbs=[told, looks])                     # for the fit, those of the fit too
    assert looks.seen is told


def test_a_step_of_an_instance_and_of_a_class_that_is_no_callback_wrap_too():
    class Plain:
        _order, name, calls = 0, "plain", 0

        def set_runner(self, run): self.run = run

        def step(self, inner):
            self.calls += 1
            inner()
    plain, own, learn, twin = Plain(), Callback(), make_learn(), make_learn()
    own.backward = lambda inner: inner()
    Runner([plain, own]).fit(1, learn)
    Runner().fit(1, twin)
    assert plain.calls == 2
    for p, q in zip(learn.model.parameters(), twin.model.parameters(), strict=True): assert torch.equal(p, q)
