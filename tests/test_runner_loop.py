"""The loop: which events happen in which order, what ends it, and that it trains as a plain loop does."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference import train_by_hand
from torch import nn

from norms import BatchNorm, RunningBatchNorm
from runner import (
    EVENTS,
    ActivationStats,
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    Checkpoint,
    CPUBackendCallback,
    CudaCallback,
    DataBunch,
    Dataset,
    GradientStats,
    Hooks,
    Learner,
    LR_Find,
    NormStats,
    ParameterStats,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    TrainEvalCallback,
    accuracy,
    append_stats,
    get_dls,
    sched_lin,
    view_tfm,
)


def make_learn(n_train=4, n_valid=4, bs=2, model=None, lr=0.1, momentum=0.0):
    """A small learner on fixed data: two training batches and one validation batch by default."""
    torch.manual_seed(0)
    x, y = torch.randn(n_train + n_valid, 6), torch.arange(n_train + n_valid) % 3
    model = model or nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    dls = get_dls(Dataset(x[:n_train], y[:n_train]), Dataset(x[n_train:], y[n_train:]), bs,
                  generator=torch.Generator().manual_seed(0))
    return Learner(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum), F.cross_entropy,
                   DataBunch(*dls, 3))


class Log(Callback):
    """Writes down every event, and does what it is told at some: `at` maps an event to what to raise or return."""

    _order = 100

    def __init__(self, at=None): self.events, self.at = [], at or {}

    def __call__(self, event):
        self.events.append(event)
        what = self.at.get(event)
        if isinstance(what, BaseException): raise what
        return what is True


TRAIN = ["begin_batch", "after_pred", "after_loss", "after_backward", "after_step", "after_batch"]
VALID = ["begin_batch", "after_pred", "after_loss", "after_batch"]
BT, BP, EP = CancelBatchException(), CancelEpochException(), CancelTrainException()
EPOCH = ["begin_epoch", *TRAIN, *TRAIN, "begin_validate", *VALID, "after_epoch"]

ORDERS = {
    "normal": ({}, ["begin_fit", *EPOCH, "after_fit"]),
    "training skipped": ({"begin_epoch": True},
                         ["begin_fit", "begin_epoch", "begin_validate", *VALID, "after_epoch", "after_fit"]),
    "validation skipped": ({"begin_validate": True},
                           ["begin_fit", "begin_epoch", *TRAIN, *TRAIN, "begin_validate", "after_epoch", "after_fit"]),
    "batch cancelled at its begin": ({"begin_batch": BT}, [
        "begin_fit", "begin_epoch", *["begin_batch", "after_cancel_batch", "after_batch"] * 2, "begin_validate",
        "begin_batch", "after_cancel_batch", "after_batch", "after_epoch", "after_fit"]),
    "batch cancelled before the step": ({"after_backward": BT}, [
        "begin_fit", "begin_epoch", *[*TRAIN[:4], "after_cancel_batch", "after_batch"] * 2, "begin_validate", *VALID,
        "after_epoch", "after_fit"]),
    "epoch cancelled in a batch": ({"after_step": BP}, [
        "begin_fit", "begin_epoch", *TRAIN, "after_cancel_epoch", "begin_validate", *VALID, "after_epoch",
        "after_fit"]),
    "epoch cancelled after a batch": ({"after_batch": BP}, [
        "begin_fit", "begin_epoch", *TRAIN, "after_cancel_epoch", "begin_validate", *VALID, "after_cancel_epoch",
        "after_epoch", "after_fit"]),
    "epoch cancelled at its begin": ({"begin_epoch": BP}, [
        "begin_fit", "begin_epoch", "after_cancel_epoch", "begin_validate", *VALID, "after_epoch", "after_fit"]),
    "validation cancelled": ({"begin_validate": BP}, [
        "begin_fit", "begin_epoch", *TRAIN, *TRAIN, "begin_validate", "after_cancel_epoch", "after_epoch",
        "after_fit"]),
    "fit cancelled in a batch": ({"after_loss": EP}, [
        "begin_fit", "begin_epoch", *TRAIN[:3], "after_batch", "after_cancel_train", "after_fit"]),
    "batch cancelled after its step": ({"after_step": BT}, [
        "begin_fit", "begin_epoch", *[*TRAIN[:5], "after_cancel_batch", "after_batch"] * 2, "begin_validate", *VALID,
        "after_epoch", "after_fit"]),
    "fit cancelled after an epoch": ({"after_epoch": EP}, ["begin_fit", *EPOCH, "after_cancel_train", "after_fit"]),
    "fit cancelled at its begin": ({"begin_fit": EP}, ["begin_fit", "after_cancel_train", "after_fit"]),
}


@pytest.mark.parametrize("case", ORDERS)
def test_event_order(case):
    at, expected = ORDERS[case]
    log = Log(at)
    Runner(log).fit(1, make_learn())
    assert log.events == expected


def test_two_epochs_repeat_the_epoch():
    log = Log()
    Runner(log).fit(2, make_learn())
    assert log.events == ["begin_fit", *EPOCH, *EPOCH, "after_fit"]


def test_every_event_is_in_the_table():
    assert {e for _, events in ORDERS.values() for e in events} == set(EVENTS)


class Counting(Callback):
    """Counts its `begin_fit`s and `after_fit`s and holds hooks between them."""

    def __init__(self): self.begun = self.ended = 0

    def begin_fit(self):
        self.begun += 1
        self.hooks = Hooks(self.model, append_stats)

    def after_fit(self):
        self.ended += 1
        self.hooks.remove()


# To reach the cancel events, something must cancel first.
CANCELS = {"after_cancel_batch": {"begin_batch": BT}, "after_cancel_epoch": {"begin_epoch": BP},
           "after_cancel_train": {"begin_epoch": EP}}


@pytest.mark.parametrize("error", [KeyError("boom"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("event", EVENTS)
def test_exception_in_every_event_is_seen_and_cleaned_up(event, error):
    learn, log, counting = make_learn(), Log({**CANCELS.get(event, {}), event: error}), Counting()
    run = Runner([counting, log])
    extra = Recorder()
    with pytest.raises(type(error)) as caught: run.fit(1, learn, cbs=extra)
    assert caught.value is error
    assert log.events.count("after_fit") == 1
    assert log.events[-1] == "after_fit"
    if "begin_batch" in log.events: assert "after_batch" in log.events
    assert (counting.begun, counting.ended) == (1, 1)
    assert not any(m._forward_hooks for m in learn.model)
    assert not hasattr(run, "recorder")

    log.at = {}
    log.events.clear()
    run.fit(1, learn)
    assert log.events == ["begin_fit", *EPOCH, "after_fit"]


@pytest.mark.parametrize("where", ["model", "loss", "optimizer", "data"])
def test_exception_outside_callbacks_is_seen_and_cleaned_up(where):
    learn, counting, boom = make_learn(), Counting(), RuntimeError("boom")

    def fail(*args, **kwargs): raise boom
    if where == "model": learn.model.append(nn.Module()).forward = fail
    if where == "loss": learn.loss_func = fail
    if where == "optimizer": learn.opt.step = fail
    if where == "data": learn.data.train_dl.collate_fn = fail
    with pytest.raises(RuntimeError) as caught: Runner(counting).fit(1, learn)
    assert caught.value is boom
    assert (counting.begun, counting.ended) == (1, 1)


def test_original_exception_wins_over_those_of_the_cleanup():
    first, second = KeyError("first"), ValueError("second")
    late = Log({"after_fit": RuntimeError("third")})
    run = Runner([Log({"after_loss": first, "after_batch": second}), Renamed(late)])
    with pytest.raises(KeyError) as caught: run.fit(1, make_learn())
    assert caught.value is first
    if hasattr(first, "__notes__"): assert first.__notes__ == ["then after_batch raised ValueError: second",
                                                               "then after_fit raised RuntimeError: third"]
    assert late.events[-1] == "after_fit"


class Renamed(Callback):
    """Passes every event on to another callback, under another name."""

    _order = 101

    def __init__(self, other): self.other = other

    def __call__(self, event): return self.other(event)


def test_real_error_wins_over_a_cancel():
    run = Runner([Log({"after_loss": CancelEpochException(), "after_batch": KeyError("real")})])
    with pytest.raises(KeyError, match="real"): run.fit(1, make_learn())


@pytest.mark.parametrize("order", [1, -1])
def test_the_widest_cancel_wins(order):
    one, two = Log({"after_batch": CancelEpochException()}), Log({"after_batch": CancelTrainException()})
    Runner([one, Renamed(two)][::order]).fit(3, make_learn())
    assert one.events == ["begin_fit", "begin_epoch", *TRAIN, "after_cancel_train", "after_fit"]


def test_batch_cancelled_after_its_step_is_not_stepped_again():
    learn, twin = make_learn(), make_learn()
    Runner(Log({"after_step": CancelBatchException()})).fit(1, learn)
    Runner().fit(1, twin)
    for a, b in zip(learn.model.parameters(), twin.model.parameters(), strict=True): assert torch.equal(a, b)


def test_every_callback_gets_after_fit_even_if_an_earlier_one_fails():
    one, two = Log({"after_fit": ValueError("one")}), Log()
    with pytest.raises(ValueError, match="one"): Runner([one, Renamed(two)]).fit(1, make_learn())
    assert two.events[-1] == "after_fit"


# --- equality with a plain loop -----------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", [RunningBatchNorm, nn.BatchNorm2d, None])
def test_equals_a_plain_loop_bit_for_bit(norm):
    def parts():
        torch.manual_seed(3)
        x, y = torch.randn(30, 64), torch.randint(0, 4, (30,))
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *([norm(4)] if norm else []), nn.Flatten(),
                              nn.Dropout(0.2), nn.Linear(144, 4))
        dls = get_dls(Dataset(x[:21], y[:21]), Dataset(x[21:], y[21:]), 4, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(7)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), dls
    model, opt, dls = parts()
    history = train_by_hand(model, opt, F.cross_entropy, *dls, 3, view_tfm(1, 8, 8))

    ours, opt, dls = parts()
    run = Runner([AvgStatsCallback(), Recorder(), BatchTransformXCallback(view_tfm(1, 8, 8))])
    run.fit(3, Learner(ours, opt, F.cross_entropy, DataBunch(*dls, 4)))
    for k, v in model.state_dict().items(): assert torch.equal(ours.state_dict()[k], v), k
    for row, (train, valid) in zip(run.avg_stats.history, history, strict=True):
        assert row["train_loss"] == pytest.approx(train, rel=1e-12)
        assert row["valid_loss"] == pytest.approx(valid, rel=1e-12)


def test_stale_gradients_don_t_reach_the_first_step():
    clean, stale = make_learn(), make_learn()
    F.cross_entropy(stale.model(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long)).backward()
    for learn in (clean, stale): Runner().fit(1, learn)
    for a, b in zip(clean.model.parameters(), stale.model.parameters(), strict=True): assert torch.equal(a, b)


def test_batch_cancelled_after_backward_accumulates_gradients():
    class EverySecond(Callback):
        def after_backward(self):
            if self.n_iter % 2 == 0: raise CancelBatchException
    learn = make_learn(n_train=4, bs=2)
    twin = copy.deepcopy(learn.model)
    Runner(EverySecond()).fit(1, learn)
    for xb, yb in [make_learn().data.train_ds[:]]:
        (2 * F.cross_entropy(twin(xb), yb)).backward()      # two batches of two: the sum of their means
    with torch.no_grad():
        for p in twin.parameters(): p -= 0.1 * p.grad
    for a, b in zip(learn.model.parameters(), twin.parameters(), strict=True): torch.testing.assert_close(a, b)


# --- what the runner shows ----------------------------------------------------------------------------------------

def test_attributes_and_counters():
    seen = []

    class Look(Callback):
        def begin_batch(self):
            seen.append((self.in_train, self.epoch, self.epochs, self.n_iter, self.n_epochs, self.iters,
                         self.model.training, torch.is_grad_enabled()))

        def after_loss(self):
            assert self.pred.shape == (len(self.yb), 3)
            assert self.loss.ndim == 0
            assert self.run.learn.opt is self.opt
            assert self.xb.shape == (len(self.yb), 6)
    run = Runner(Look())
    run.fit(2, make_learn())
    assert seen == [(True, 0, 2, 0, 0.0, 2, True, True), (True, 0, 2, 1, 0.5, 2, True, True),
                    (False, 0, 2, 2, 1.0, 1, False, False),
                    (True, 1, 2, 2, 1.0, 2, True, True), (True, 1, 2, 3, 1.5, 2, True, True),
                    (False, 1, 2, 4, 2.0, 1, False, False)]
    assert (run.n_iter, run.n_epochs, run.in_train) == (4, 2.0, False)


def test_position_does_not_drift():
    positions = []

    class Look(Callback):
        def begin_batch(self): positions.append(self.n_epochs)
    Runner(Look()).fit(3, make_learn(n_train=14))
    assert [p for i, p in enumerate(positions) if i % 8 < 7] == [e + i / 7 for e in range(3) for i in range(7)]


def test_callbacks_run_in_order_and_after_the_built_in_one():
    calls = []

    def make(name, order):
        def begin_fit(self): calls.append((name, self.run.n_iter))
        return type(name, (Callback,), {"_order": order, "begin_fit": begin_fit})()
    Runner([make("Late", 5), make("First", -9), make("Tie", 5), make("Mid", 0)]).fit(0, make_learn())
    assert calls == [("First", 0), ("Mid", 0), ("Late", 0), ("Tie", 0)]


def test_callbacks_are_exposed_under_their_names():
    run = Runner([Recorder()], cb_funcs=[lambda: AvgStatsCallback()])
    assert isinstance(run.recorder, Recorder)
    assert isinstance(run.avg_stats, AvgStatsCallback)
    assert isinstance(run.train_eval, TrainEvalCallback)


def test_callbacks_of_a_fit_are_temporary():
    run, log = Runner(), Log()
    run.fit(1, make_learn(), cbs=log)
    n = len(log.events)
    run.fit(1, make_learn())
    assert len(log.events) == n
    assert not hasattr(run, "log")


def test_skipped_training_leaves_weights_alone_and_skips_an_empty_loader():
    learn = make_learn()
    before = copy.deepcopy(learn.model.state_dict())
    Runner(Log({"begin_epoch": True})).fit(1, learn)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_callback_copies_and_pickles_without_a_runner():
    cb = Recorder()
    assert copy.deepcopy(cb).losses == []
    assert pickle.loads(pickle.dumps(cb)).losses == []


# --- errors -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("wrong", "right"), [
    ("after_bacth", "after_batch"), ("begin_fitt", "begin_fit"), ("after_epochs", "after_epoch"),
    ("beginbatch", "begin_batch"), ("before_batch", "begin_batch"), ("after_validate", "after_epoch"),
    ("before_fit", "begin_fit"), ("after_cancel_bach", "after_cancel_batch")])
def test_misspelt_event_is_refused_when_the_class_is_defined(wrong, right):
    with pytest.raises(TypeError, match=f"Mine.{wrong} is no event and would never be called; rename it to '{right}'"):
        type("Mine", (Callback,), {wrong: lambda self: None})


class PlainCallback:
    """The least that a runner asks of a callback: it is no `Callback` of ours, and nobody calls it."""

    _order, name = 1, "plain"

    def set_runner(self, run): self.run, self.losses = run, []

    def after_loss(self): self.losses.append(self.run.loss.item())


class CalledCallback(PlainCallback):
    """As in the lesson: called with every event's name."""

    def __call__(self, event):
        answer = getattr(self, event, None)
        return bool(answer and answer())


@pytest.mark.parametrize("kind", [PlainCallback, CalledCallback])
def test_callback_of_another_base_class(kind):
    cb, recorder = kind(), Recorder()
    Runner([cb, recorder]).fit(1, make_learn())
    assert len(cb.losses) == 3
    assert cb.losses[:2] == recorder.losses


class OwnRunner:
    """A runner somebody wrote for himself with the lesson's attributes and no others, and without validation."""

    def __init__(self, cbs): self.cbs = sorted([TrainEvalCallback(), *cbs], key=lambda cb: cb._order)

    def __call__(self, event):
        for cb in self.cbs: cb(event)

    def fit(self, epochs, learn):
        self.epochs, self.model, self.opt, self.loss_func, self.data = epochs, *vars(learn).values()
        for cb in self.cbs: cb.set_runner(self)
        self("begin_fit")
        try:
            for self.epoch in range(epochs):
                self.iters = len(self.data.train_dl)
                self("begin_epoch")
                for xb, yb in self.data.train_dl: self.batch(xb, yb)
                self("begin_validate")
                self("after_epoch")
        except CancelTrainException: self("after_cancel_train")
        finally: self("after_fit")

    def batch(self, xb, yb):
        self.xb, self.yb = xb, yb
        self("begin_batch")
        self.pred = self.model(self.xb)
        self("after_pred")
        self.loss = self.loss_func(self.pred, self.yb)
        self("after_loss")
        self.loss.backward()
        self("after_backward")
        self.opt.step()
        self("after_step")
        self.opt.zero_grad()
        self("after_batch")


class SkipValidation(Callback):
    _order = 100

    def begin_validate(self): return True


@pytest.mark.parametrize("make", [
    lambda: AvgStatsCallback(accuracy), lambda: ParamScheduler("lr", sched_lin(0.1, 0.01)), LR_Find,
    lambda: BatchTransformXCallback(lambda x: 2 * x), CudaCallback, ProgressCallback, CPUBackendCallback,
    ActivationStats, GradientStats, ParameterStats, NormStats, TerminateOnNonFinite,
], ids=lambda make: getattr(make, "__name__", ""))
def test_callbacks_do_the_same_in_a_runner_of_one_s_own(make):
    model = nn.Sequential(nn.Linear(6, 5), BatchNorm(5), nn.Linear(5, 3))
    learns = [make_learn(n_train=12, model=copy.deepcopy(model)) for _ in range(2)]
    cbs = [[make(), Recorder()] for _ in learns]
    Runner([*cbs[0], SkipValidation()]).fit(2, learns[0])
    OwnRunner(cbs[1]).fit(2, learns[1])
    for a, b in zip(*(learn.model.state_dict().values() for learn in learns), strict=True): assert torch.equal(a, b)
    ours, own = (recorder for _, recorder in cbs)
    assert ours.rows == own.rows
    assert len(own.losses) == 12
    if hasattr(cbs[0][0], "rows"): assert cbs[0][0].rows == cbs[1][0].rows


def test_misspelt_event_of_a_mixin_is_refused():
    class Mixin:
        def after_bacth(self): pass
    with pytest.raises(TypeError, match="after_bacth is no event"): type("Mine", (Mixin, Callback), {})


def test_failing_property_says_why():
    class Mine(Callback):
        @property
        def thing(self): return self.modle
    with pytest.raises(AttributeError, match="Mine has no attribute 'modle'"): _ = Mine().thing


def test_ordinary_helper_methods_are_accepted():
    for name in ("batch", "plot_loss", "reset", "fit_line", "_after_bacth"):
        type("Mine", (Callback,), {name: lambda self: None})


def test_two_callbacks_of_one_name():
    with pytest.raises(ValueError, match=r"two callbacks are named 'recorder'; .*run\.recorder: leave one out"):
        Runner([Recorder(), Recorder()])
    run = Runner(Recorder())
    with pytest.raises(ValueError, match="two callbacks are named 'recorder'"):
        run.fit(1, make_learn(), cbs=Recorder())
    run.fit(1, make_learn())        # and the runner still works


@pytest.mark.parametrize("name", ["Model", "Fit", "Loss", "Learn", "LoggerCallback"])
def test_callback_named_like_an_attribute_of_the_runner(name):
    with pytest.raises(ValueError, match="which is an attribute of the runner: rename its class"):
        Runner(type(name, (Callback,), {})())


@pytest.mark.parametrize("what", [Recorder, 3, nn.Linear(1, 1)])
def test_something_that_is_no_callback(what):
    with pytest.raises(TypeError, match="is not a callback; `cbs` takes instances"): Runner([what])


def test_missing_attribute_is_named():
    cb = Recorder()
    with pytest.raises(AttributeError, match="Recorder has no attribute 'nonsense'; it has no runner yet"):
        _ = cb.nonsense
    Runner(cb).fit(1, make_learn())
    with pytest.raises(AttributeError, match="Recorder has no attribute 'nonsense', and neither has its runner"):
        _ = cb.nonsense
    with pytest.raises(AttributeError, match="the runner has no 'model' without a learner: call fit first"):
        _ = Runner().model


def test_hiding_an_attribute_of_the_runner_warns():
    class Mine(Callback):
        def begin_batch(self): self.xb = self.xb * 2
    with pytest.warns(UserWarning, match=r"Mine sets 'xb' on itself.*self\.run\.xb"):
        Runner(Mine()).fit(1, make_learn())
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        class Good(Callback):
            def begin_batch(self): self.run.xb = self.xb * 2
        Runner(Good()).fit(1, make_learn())


def test_empty_loader():
    learn = make_learn(n_train=3, bs=2)
    learn.data.train_dl = torch.utils.data.DataLoader(learn.data.train_ds, batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match="the training loader has no batches; it needs at least one"):
        Runner().fit(1, learn)
    learn = make_learn()
    learn.data.valid_dl = torch.utils.data.DataLoader(Dataset(torch.randn(0, 6), torch.zeros(0)), batch_size=8)
    with pytest.raises(ValueError, match="the validation loader has no batches"): Runner().fit(1, learn)
    Runner(Log({"begin_validate": True})).fit(1, learn)     # a pass that is skipped may be empty


@pytest.mark.parametrize("epochs", [-1, 1.5, "2", None, True])
def test_epochs_that_make_no_sense(epochs):
    with pytest.raises(ValueError, match=f"epochs is {epochs!r}; it must be an integer"):
        Runner().fit(epochs, make_learn())


def test_fit_within_a_fit_is_refused():
    class Nested(Callback):
        def begin_batch(self): self.run.fit(1, self.learn)
    with pytest.raises(RuntimeError, match=r"already fitting.*a Runner of its own"):
        Runner(Nested()).fit(1, make_learn())


# --- the loop in words --------------------------------------------------------------------------------------------

def test_explain_has_the_events_in_their_real_order():
    log = Log()
    Runner(log).fit(1, make_learn())                                # two training batches, one of validation
    happened = [e for i, e in enumerate(log.events) if not 2 + len(TRAIN) <= i < 2 + 2 * len(TRAIN)]    # one of the two
    from runner.insight.explain import LOOP
    told = [event for _, event, _ in LOOP if event]
    assert told[:len(happened)] == happened
    assert set(told) == set(EVENTS)
    assert told[len(happened):] == ["after_cancel_batch", "after_cancel_epoch", "after_cancel_train"]


def test_explain_names_who_answers_in_order(capsys):
    class Early(Callback):
        _order = -20
        def begin_fit(self): pass
        def after_step(self): pass

    class Late(Callback):
        _order = 20
        def begin_fit(self): pass
    run = Runner([Late(), Recorder()])
    run.explain([Early(), Log()])
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines if line.strip()[0] in "ab"}
    assert found["begin_fit"] == ["Early, TrainEvalCallback, Recorder, Late"]
    assert found["after_step"] == ["Early"]
    assert found["after_pred"] == []
    assert lines[-1] == "at every event: Log"
    assert [type(cb).__name__ for cb in run.cbs] == ["TrainEvalCallback", "Late", "Recorder"]


# --- parts in the wrong place -------------------------------------------------------------------------------------

def test_a_learner_with_its_parts_in_one_another_s_place_is_refused():
    learn = make_learn()
    for wrong, text in (
            (Learner(learn.model, learn.loss_func, learn.opt, learn.data),
             r"has a SGD as loss_func and a function as opt; the order is Learner\(model, opt, loss_func, data\)"),
            (Learner(learn.model, learn.opt, learn.loss_func, learn.data.train_dl),
             r"data is a \w+; it must be a DataBunch: DataBunch\(train_dl, valid_dl\)")):
        for go in (lambda run, wrong: run.fit(1, wrong), lambda run, wrong: run.evaluate(wrong)):
            run = Runner()
            with pytest.raises(TypeError, match=text): go(run, wrong)
            run.fit(1, make_learn())
    loaders = {"train_dl": learn.data.train_dl, "valid_dl": learn.data.valid_dl}
    for name in loaders:                            # an object that has the loader which is needed will do
        part = Learner(learn.model, learn.opt, learn.loss_func, SimpleNamespace(**{name: loaders[name]}))
        run = Runner()
        if name == "valid_dl": assert run.evaluate(part)["loss"] > 0
        else:
            with pytest.raises(TypeError, match="data is a SimpleNamespace; it must be a DataBunch"): run.evaluate(part)
        assert run.evaluate(part, loaders["valid_dl"])["loss"] > 0
    bare = Learner(learn.model, learn.opt, learn.loss_func, None)
    assert Runner().evaluate(bare, loaders["valid_dl"])["loss"] > 0
    with pytest.raises(TypeError, match="data is a NoneType; it must be a DataBunch"): Runner().fit(1, bare)
    with pytest.raises(ValueError, match=r"^epochs is a Learner; it must be an integer .*: fit\(epochs, learn\)$"):
        Runner().fit(learn, 1)


def test_an_optimizer_of_another_model_is_told_and_one_of_a_part_or_of_the_loss_is_not():
    learn, other = make_learn(), make_learn()
    with pytest.warns(UserWarning, match="the optimizer has no parameter of the model"):
        Runner().fit(1, Learner(learn.model, other.opt, learn.loss_func, learn.data))
    last = list(learn.model.parameters())[-1:]
    Runner().fit(1, Learner(learn.model, torch.optim.SGD(last, 0.1), learn.loss_func, learn.data))

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, pred, yb): return learn.loss_func(pred * self.scale, yb)
    loss = Scaled()
    Runner().fit(1, Learner(learn.model, torch.optim.SGD(loss.parameters(), 0.1), loss, learn.data))


def test_a_missing_attribute_of_a_runner_is_named_with_the_callbacks_that_are_there():
    run = Runner(Recorder())
    with pytest.raises(AttributeError, match=r"'avg_stats'; .* are there: train_eval, recorder$"):
        _ = run.avg_stats
    with pytest.raises(AttributeError, match=r"these are there: train_eval$"):
        _ = Runner().recorder
    assert not hasattr(run, "avg_stats")
    assert copy.deepcopy(run).recorder is not run.recorder


def test_resume_without_a_file_and_without_a_checkpoint_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"no checkpoint in '.*nowhere' .* add Checkpoint\('.*nowhere'\)"):
        Runner().fit(1, make_learn(), resume=tmp_path / "nowhere")
    Runner(Checkpoint(tmp_path / "there")).fit(1, make_learn(), resume=tmp_path / "there")
    Runner().fit(1, make_learn(), resume=tmp_path / "there")            # there is one: complete
