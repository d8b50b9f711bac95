"""`Runner.evaluate` and `Runner.predict` on a loader: the numbers, and that nothing is left changed."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import make_learn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from norms import BatchNorm
from runner import (
    ActivationStats,
    AveragedWeights,
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    CancelEpochException,
    CPUBackendCallback,
    CSVLogger,
    CudaCallback,
    EarlyStopping,
    GradientAccumulation,
    GradientClip,
    KeepBest,
    Learner,
    MixedPrecision,
    NormStats,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    accuracy,
    get_dls,
    sched_lin,
)


def learner(n_train=12, n_valid=7):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 5), BatchNorm(5), nn.Dropout(), nn.Linear(5, 3))
    return make_learn(n_train, n_valid, model=model, momentum=0.9)


def everything(path):
    return [EarlyStopping(patience=9), KeepBest(), CSVLogger(path / "history.csv"), AveragedWeights(0.5), Recorder(),
            AvgStatsCallback([accuracy], quiet=True), ParamScheduler("lr", sched_lin(0.1, 0.01)),
            ProgressCallback(live=False), CudaCallback("cpu"), GradientAccumulation(2), GradientClip(0.5),
            MixedPrecision(), CPUBackendCallback(), ActivationStats(verbose=False), NormStats(verbose=False),
            TerminateOnNonFinite()]


def by_hand(model, dl, loss_func=F.cross_entropy):
    """Loss, accuracy, predictions and targets over a loader."""
    mode = model.training
    model.eval()
    with torch.no_grad(): preds, targets = zip(*((model(xb), yb) for xb, yb in dl), strict=True)
    model.train(mode)
    preds, targets = torch.cat(preds), torch.cat(targets)
    return {"loss": loss_func(preds, targets).item(),
            "accuracy": (preds.argmax(1) == targets).float().mean().item()}, preds, targets


@pytest.mark.parametrize("fitted", [False, True])
def test_the_numbers_of_a_plain_loop(fitted):
    learn = learner()
    run = Runner(AvgStatsCallback(accuracy, quiet=True))
    if fitted: run.fit(1, learn)
    want, preds, targets = by_hand(learn.model, learn.data.valid_dl)
    found = run.evaluate(learn)
    assert found == pytest.approx(want, abs=1e-6)
    assert all(type(v) is float for v in found.values())
    if fitted: assert found["loss"] == run.avg_stats.history[-1]["valid_loss"]
    assert torch.equal(run.predict(learn)[0], preds)
    assert torch.equal(run.predict(learn)[1], targets)
    other = DataLoader(TensorDataset(torch.randn(9, 6), torch.arange(9) % 3), 4)
    want, preds, targets = by_hand(learn.model, other)
    assert run.evaluate(learn, other) == pytest.approx(want, abs=1e-6)
    for got, what in zip(run.predict(learn, other), (preds, targets), strict=True): assert torch.equal(got, what)


def test_metrics_given_and_none():
    learn, run = learner(), Runner()
    assert list(run.evaluate(learn)) == ["loss"]

    class Count:
        def reset(self): self.n = 0
        def update(self, pred, yb): self.n += len(yb)
        def compute(self): return self.n
    assert run.evaluate(learn, metrics=[Count(), accuracy])["count"] == 7.0
    assert list(run.evaluate(learn, metrics=accuracy)) == ["loss", "accuracy"]
    stats = AvgStatsCallback(Count())
    assert run.evaluate(learn, cbs=stats)["count"] == 7.0
    assert stats.history == []


def state(run, learn):
    """All that a pass might change, as values to compare."""
    return [{k: v.tolist() for k, v in learn.model.state_dict().items()}, [m.training for m in learn.model.modules()],
            copy.deepcopy(learn.opt.state_dict()["param_groups"]), [p.grad is None for p in learn.model.parameters()],
            run.status, run.in_train, getattr(run, "n_iter", None), getattr(run, "epoch", None),
            getattr(run, "n_epochs", None), id(getattr(run, "pred", None)), run.logger, [*run.cbs], run.learn,
            [(type(cb).__name__, repr({k: v for k, v in vars(cb).items() if k != "run"})) for cb in run.cbs],
            run.recorder.losses[:], run.recorder.lrs[:], run.recorder.rows[:], run.avg_stats.history[:],
            torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("fitted", [False, True])
def test_nothing_is_left_changed(fitted, capsys, tmp_path):
    learn, run = learner(), Runner(everything(tmp_path))
    if fitted: run.fit(2, learn)
    learn.model[0].eval()                   # modes of its own, and gradients
    learn.model(torch.randn(3, 6)).sum().backward()
    before = state(run, learn)
    capsys.readouterr()
    for dl in (None, learn.data.train_dl):
        run.evaluate(learn, dl)
        run.predict(learn, dl)
    for was, now in zip(before, state(run, learn), strict=True): assert was == now
    assert capsys.readouterr().out == ""


def test_training_goes_on_as_if_nothing_had_been_evaluated(tmp_path):
    ends = []
    for evaluate in (False, True):
        learn = learner()
        learn.data.train_dl, learn.data.valid_dl = get_dls(learn.data.train_ds, learn.data.valid_ds, 2)
        run = Runner(everything(tmp_path))
        torch.manual_seed(3)
        run.fit(1, learn)
        if evaluate: run.evaluate(learn), run.predict(learn, learn.data.train_dl)
        run.fit(2, learn)
        ends.append((run.recorder.rows, [t.tolist() for t in learn.model.state_dict().values()],
                     run.avg_stats.history[:, ("epoch", "train_loss", "valid_loss")], torch.rand(1).item()))
    assert ends[0] == ends[1]


def test_the_callbacks_that_make_a_batch_take_part():
    class Splat(Callback):
        def predict(self): self.run.pred = self.model(*self.xb)

    class Pair(Callback):
        _order = 3

        def begin_batch(self): self.run.xb = (self.xb, self.xb)

    class Two(nn.Linear):
        def forward(self, a, b): return super().forward(a) + b[:, :3]
    learn = make_learn(n_valid=7, model=Two(6, 3))
    x, y = learn.data.valid_ds[:]
    with torch.no_grad(): want = learn.model(2 * x, 2 * x)
    run = Runner([BatchTransformXCallback(lambda x: 2 * x), Pair(), Splat(), MixedPrecision()])
    preds, targets = run.predict(learn)
    assert preds.dtype == torch.float32
    assert torch.allclose(preds, want, atol=0.05)
    assert not torch.equal(preds, want)                                     # it was bfloat16 inside
    assert run.evaluate(learn)["loss"] == pytest.approx(F.cross_entropy(want, y).item(), abs=0.05)
    assert torch.equal(targets, y)
    run.fit(1, learn)


def test_the_events_of_an_evaluation():
    said = []

    class Log(Callback):
        def __call__(self, event): said.append((event, self.run.in_train, torch.is_grad_enabled(),
                                                self.model.training))
    learn = make_learn()
    Runner(Log()).evaluate(learn)
    assert [event for event, *_ in said] == ["begin_fit", "begin_validate", "begin_batch", "after_pred", "after_loss",
                                             "after_batch", "after_fit"]
    assert set(said[2:-1]) == {(event, False, False, False) for event, *_ in said[2:-1]}
    said.clear()
    Runner(Log()).predict(learn)
    assert [event for event, *_ in said] == ["begin_fit", "begin_validate", "begin_batch", "after_pred",
                                             "after_cancel_batch", "after_batch", "after_fit"]


def test_a_skipped_validation_is_evaluated_all_the_same():
    class NoValidation(Callback):
        def begin_validate(self): return True
    learn = learner()
    assert Runner(NoValidation()).evaluate(learn) == Runner().evaluate(learn)


def test_predictions_need_no_loss():
    learn = learner()
    learn.loss_func = None
    preds, targets = Runner().predict(learn)
    assert preds.shape == (7, 3)
    assert len(targets) == 7


class Nested(nn.Module):
    def forward(self, x): return {"sum": x.sum(1), "parts": [x[:, :2], (x[:, 2:], "fixed")], "mean": x.mean()}


def test_nested_predictions_and_targets_leaf_by_leaf():
    x, names = torch.randn(5, 4), list("abcde")
    dl = [(x[:2], {"name": names[:2], "y": x[:2, 0]}), (x[2:], {"name": names[2:], "y": x[2:, 0]})]
    preds, targets = Runner().predict(Learner(Nested(), torch.optim.SGD([nn.Parameter(x)], 0.1), None, None), dl)
    assert torch.equal(preds["sum"], x.sum(1))
    assert torch.equal(preds["parts"][0], x[:, :2])
    assert torch.equal(preds["parts"][1][0], x[:, 2:])
    assert preds["parts"][1][1] == "fixed"
    assert torch.equal(preds["mean"], torch.stack([x[:2].mean(), x[2:].mean()]))
    assert targets["name"] == names
    assert torch.equal(targets["y"], x[:, 0])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (x,)])
def test_predictions_of_batches_without_targets(wrap):
    learn, run = learner(), Runner(BatchTransformXCallback(lambda x: 2 * x))
    x, _ = learn.data.valid_ds[:]
    preds, targets = run.predict(learn, [wrap(x[:4]), wrap(x[4:])])
    learn.model.eval()
    assert torch.equal(preds, torch.cat([learn.model(2 * part) for part in (x[:4], x[4:])]))
    assert targets is None
    with pytest.raises(TypeError, match="a batch that is not a pair"): run.evaluate(learn, [wrap(x[:3])])
    with pytest.raises(TypeError, match="a batch that is not a pair"): Runner().predict(learn, [{"x": x}])


def test_predictions_of_the_batches_that_a_callback_takes_apart():
    class Parts(Callback):
        def begin_batch(self): self.run.xb, self.run.yb = self.xb["x"], self.xb["y"]
    learn = learner()
    x, y = learn.data.valid_ds[:]
    found = Runner([Parts(), AvgStatsCallback(accuracy, quiet=True)])
    dl = [{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}]
    assert torch.equal(found.predict(learn, iter(dl))[1], y)
    assert found.evaluate(learn, (batch for batch in dl)) == pytest.approx(Runner().evaluate(
        learn, metrics=accuracy), abs=1e-6)


@pytest.mark.parametrize("by", ["batch", "epoch"])
def test_averaged_weights_are_evaluated(by):
    averaged = AveragedWeights(0.5, by=by)
    run, learn = Runner([averaged, AvgStatsCallback(accuracy, quiet=True)]), learner()
    plain = run.evaluate(learn)
    assert plain == Runner().evaluate(learn, metrics=accuracy)      # there are no averages yet
    run.fit(2, learn)
    before = copy.deepcopy(learn.model.state_dict())
    row = run.avg_stats.history[-1]
    for _ in range(2):
        assert run.evaluate(learn) == {"loss": row["valid_loss"], "accuracy": row["valid_accuracy"]}
    assert run.evaluate(learn) != Runner().evaluate(learn, metrics=accuracy)
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k])
    other = learner()                                               # of another model there are none
    assert run.evaluate(other) == plain
    averaged.apply()
    assert Runner().evaluate(learn)["loss"] == row["valid_loss"]
    run.fit(1, learn)


def test_errors():
    learn, run = learner(), Runner()
    with pytest.raises(TypeError, match=r"predict needs the learner too: run.predict\(learn, dl\)"):
        run.predict(dl=learn.data.valid_dl)
    ragged = [(torch.randn(2, n, 6), torch.zeros(2)) for n in (3, 4)]
    learn.model = nn.Linear(6, 3)
    with pytest.raises(ValueError, match=r"shapes such as \(2, 3, 3\) and \(2, 4, 3\), which can't be put end to end"):
        run.predict(learn, ragged)
    learn.data.valid_dl = None
    with pytest.raises(ValueError, match=r"the learner's data have no valid_dl; give one, run.evaluate\(learn, dl\)"):
        run.evaluate(learn)
    with pytest.raises(ValueError, match="the validation loader has no batches"): run.evaluate(learn, [])

    class Nothing(Callback):
        def begin_validate(self): raise CancelEpochException
    with pytest.raises(ValueError, match="no batch came to a prediction"):
        run.predict(learn, learn.data.train_dl, cbs=Nothing())


def test_after_an_error_all_is_as_it_was(tmp_path):
    class Boom(Callback):
        def after_pred(self): raise KeyError("boom")
    learn, run = learner(), Runner(everything(tmp_path))
    run.fit(1, learn)
    before = state(run, learn)
    with pytest.raises(KeyError): run.evaluate(learn, cbs=Boom())
    assert before == state(run, learn)
    run.fit(1, learn)
    assert run.status == "ok"


def test_within_a_fit_it_needs_a_runner_of_its_own():
    class Nested(Callback):
        def after_epoch(self): self.run.evaluate(self.run.learn)

    class Own(Callback):
        def after_epoch(self): self.found = Runner().evaluate(self.run.learn)["loss"]
    with pytest.raises(RuntimeError, match="a callback that trains or evaluates something needs a Runner of its own"):
        Runner(Nested()).fit(1, make_learn())
    own = Own()
    run = Runner([AvgStatsCallback(quiet=True), own])
    run.fit(1, make_learn())
    assert own.found == run.avg_stats.history[-1]["valid_loss"]


def test_a_temporary_callback_keeps_what_it_has_seen():
    class Look(Callback):
        def __init__(self): self.seen = []

        def after_loss(self): self.seen.append(len(self.xb))
    mine, lasting = Look(), type("Lasting", (Look,), {})()
    run = Runner(lasting)
    run.evaluate(learner(), cbs=mine)
    assert (mine.seen, lasting.seen) == ([4, 3], [])


def test_a_runner_in_a_console_and_in_a_notebook():
    run = Runner([Recorder(), AvgStatsCallback(quiet=True)])
    assert repr(run) == "<Runner, ok: TrainEvalCallback, Recorder, AvgStatsCallback>"
    html = run._repr_html_()
    for said in ("run.recorder", "AvgStatsCallback", "after_epoch", "status: ok"): assert said in html

    class Loud(Callback):
        def __call__(self, event): pass
    assert "every event" in Runner(Loud())._repr_html_()
