"""`compile=True`: the same numbers and events as without, few compilations, and clear words for what it can't do."""

import copy
import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import ORDERS, Log, make_learn
from torch import nn

from experiments.__main__ import main
from experiments.models import conv_layer, get_learn_run
from norms import GroupNorm, RunningBatchNorm
from runner import (
    AvgStatsCallback,
    Callback,
    CancelBatchException,
    DataBunch,
    Dataset,
    Hooks,
    Learner,
    LR_Find,
    ParamScheduler,
    Recorder,
    Runner,
    accuracy,
    append_stats,
    get_dls,
    sched_cos,
)
from runner.compiled import CompiledStep, CompileError


@pytest.fixture
def traced(monkeypatch):
    """Compile without code generation, which takes seconds; returns a function that counts the compilations."""
    from torch._dynamo.utils import counters
    monkeypatch.setattr(CompiledStep, "backend", "aot_eager")
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


@pytest.fixture
def followed(traced, monkeypatch):
    """Only follow what Python does, for tests of the loop: tracing the backward takes most of what `traced` takes."""
    monkeypatch.setattr(CompiledStep, "backend", "eager")
    return traced


@pytest.fixture
def no_compiler():
    from torch._inductor import config
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}): yield


def network(norm, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), norm(4), nn.Conv2d(4, 8, 3), nn.ReLU(), norm(8),
              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def small(norm, dtype=torch.float64):
    """One layer of each kind that the step may treat in its own way: what is traced takes a second per layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), norm(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1),
                         nn.Linear(4, 3)).to(dtype)


def images(model, n_train=64, n_valid=8, bs=2, dtype=torch.float64, drop_last=False, **sgd):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n_train + n_valid, 1, 9, 9, generator=g, dtype=dtype), torch.arange(n_train + n_valid) % 3
    dls = get_dls(Dataset(x[:n_train], y[:n_train]), Dataset(x[n_train:], y[n_train:]), bs, drop_last=drop_last,
                  generator=torch.Generator().manual_seed(0))
    opt = torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **sgd})
    return Learner(model, opt, F.cross_entropy, DataBunch(*dls, 3))


def fit_both(norm, epochs=1, cbs=lambda: [], make=network, **kwargs):
    """Train twice from the same start, without and with `compile`: two lists of (learner, runner)."""
    both = []
    for compiled in (False, True):
        learn = images(make(norm), **kwargs)
        run = Runner([Recorder(), AvgStatsCallback(accuracy), *cbs()], compile=compiled)
        run.logger = lambda row: None
        torch.manual_seed(1)
        run.fit(epochs, learn)
        both.append((learn, run))
    return both


def assert_alike(both, rtol=1e-9):
    (eager, a), (compiled, b) = both
    assert a.recorder.losses == pytest.approx(b.recorder.losses, rel=rtol)
    for row, other in zip(a.avg_stats.history, b.avg_stats.history, strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=rtol)
    state = compiled.model.state_dict()
    for name, t in eager.model.state_dict().items():
        torch.testing.assert_close(state[name], t, rtol=rtol, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for p in compiled.model.parameters(): assert p.grad is None
    assert a.recorder.lrs == b.recorder.lrs


NORMS = {"BatchNorm2d": nn.BatchNorm2d, "RunningBatchNorm": RunningBatchNorm, "GroupNorm": lambda nf: GroupNorm(2, nf)}


# --- the same numbers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", NORMS)
def test_same_as_eager_and_compiled_once(traced, norm):
    make = network if norm == "RunningBatchNorm" else small
    both = fit_both(NORMS[norm], epochs=2, make=make)       # 64 steps, with dropout
    assert_alike(both)
    assert len(both[0][1].recorder.losses) == 64
    assert traced() == 1                         # validation runs as it is


def test_generated_code_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def small(norm):                                                # half a minute less than `network`
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(81, 3), nn.Dropout(0.1), norm(3)).double()
    skip = Log({"begin_validate": True})
    both = fit_both(RunningBatchNorm, cbs=lambda: [skip], make=small)
    for _, run in both: run.avg_stats.history.clear()               # NaN without a validation
    assert_alike(both)


def test_a_gradient_is_laid_out_as_its_parameter(traced):
    """torch's fused optimizers go through memory in its order; here the gradient comes out transposed."""
    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w): return w.clone()

        @staticmethod
        def backward(ctx, g): return g.t().contiguous().t()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.arange(243.0).view(81, 3) / 300)

        def forward(self, x): return x.flatten(1) @ Turned.apply(self.w)
    both = fit_both(None, make=lambda norm: Model().double(), fused=True)
    assert_alike(both)
    learn, run = both[1]
    seen = []
    see = type("See", (Callback,), {"after_backward": lambda cb: seen.append(cb.model.w.grad.stride())})()
    run.fit(1, learn, cbs=see)
    assert set(seen) == {(3, 1)}


def test_ragged_last_batches(traced):
    both = fit_both(RunningBatchNorm, epochs=3, make=small, n_train=46, n_valid=7, bs=4)
    assert_alike(both)
    first = traced()
    assert first <= 2                               # batches of 4 and any other
    learn, run = both[1]
    run.fit(2, learn)
    assert traced() == first


def test_a_last_batch_of_one(traced):
    assert_alike(fit_both(nn.BatchNorm2d, epochs=2, make=small, n_train=33, n_valid=6, bs=4))
    assert traced() <= 2


def test_schedule_of_the_rate(followed):
    both = fit_both(nn.BatchNorm2d, make=small, cbs=lambda: [ParamScheduler("lr", sched_cos(0.1, 0.001))])
    assert_alike(both)
    assert len(set(both[1][1].recorder.lrs[0])) == 32
    assert followed() == 1


def test_rate_finder_leaves_no_trace(followed):
    learn = images(small(RunningBatchNorm))
    before = copy.deepcopy(learn.model.state_dict())
    run = Runner(compile=True)
    run.fit(1, learn, cbs=LR_Find(12))
    for name, t in learn.model.state_dict().items(): assert torch.equal(t, before[name])
    run.fit(1, learn)
    assert followed() == 1


def test_cancelled_batches_add_their_gradients(traced):
    class EverySecond(Callback):
        def after_backward(self):
            if self.n_iter % 2 == 0: raise CancelBatchException
    assert_alike(fit_both(nn.BatchNorm2d, make=small, cbs=lambda: [EverySecond()]))


def test_frozen_and_unused_parameters(traced):
    class Freeze(Callback):
        def begin_epoch(self): self.model[0].weight.requires_grad_(self.epoch > 0)
    for norm in (nn.BatchNorm2d, lambda nf: Spare(nf)):
        both = fit_both(norm, epochs=2, make=small, cbs=lambda: [Freeze()])
        assert_alike(both)


class Spare(nn.Module):
    """Has a parameter that it does not use, and two with the same gradient."""

    def __init__(self, nf):
        super().__init__()
        self.unused, self.a, self.b = (nn.Parameter(torch.zeros(nf, 1, 1)) for _ in range(3))

    def forward(self, x): return x + self.a + self.b


def test_gradients_can_be_changed_in_place(traced):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.l = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3)), nn.Linear(6, 3)

        def forward(self, x): return self.l(x) + self.a.sum() + self.b.sum()

    class Clip(Callback):
        def after_backward(self): self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), 0.01).item()
    norms = []
    for compiled in (False, True):
        clip = Clip()
        Runner(clip, compile=compiled).fit(1, make_learn(model=(torch.manual_seed(0), Sum())[1]))
        norms.append(clip.norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_prediction_may_be_a_nest_of_tensors(followed):
    class Two(nn.Linear):
        def forward(self, x): return {"a": super().forward(x), "b": [x]}
    learn = make_learn(model=Two(6, 3))
    learn.loss_func = lambda pred, yb: F.cross_entropy(pred["a"], yb)
    run = Runner(compile=True)
    run.fit(1, learn)
    assert run.pred["a"].shape == (4, 3)            # of the validation


def test_loss_with_parameters(traced):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.ones(()))

        def forward(self, pred, yb): return F.cross_entropy(pred * self.s, yb)
    seen = []
    for compiled in (False, True):
        learn = make_learn()
        learn.loss_func = Scaled()
        learn.opt.add_param_group({"params": learn.loss_func.parameters()})
        Runner(compile=compiled).fit(1, learn)
        seen.append(learn.loss_func.s.item())
    assert seen[0] == pytest.approx(seen[1]) != 1


# --- events and cleanup -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["normal", "validation skipped", "batch cancelled at its begin",
                                  "batch cancelled before the step", "epoch cancelled in a batch",
                                  "fit cancelled in a batch", "batch cancelled after its step"])
def test_event_order(followed, case):
    at, expected = ORDERS[case]
    log = Log(at)
    Runner(log, compile=True).fit(1, make_learn())
    assert log.events == expected


@pytest.mark.parametrize("event", ["begin_batch", "after_pred", "after_loss", "after_backward", "after_step"])
def test_after_an_exception_the_runner_can_be_used_again(followed, event):
    learn, run = make_learn(), Runner(compile=True)
    with pytest.raises(ZeroDivisionError): run.fit(1, learn, cbs=Log({event: ZeroDivisionError()}))
    fresh = copy.deepcopy(learn)
    run.fit(1, learn)
    Runner().fit(1, fresh)
    torch.testing.assert_close(learn.model.state_dict(), fresh.model.state_dict())


def test_many_models_in_one_runner(followed):
    run = Runner(compile=True)
    for _ in range(9):                              # the compiler's own limit for one function is 8
        learn, fresh = make_learn(), make_learn()
        fresh.model.load_state_dict(learn.model.state_dict())
        run.fit(1, learn)
        Runner().fit(1, fresh)
        torch.testing.assert_close(learn.model.state_dict(), fresh.model.state_dict())


def test_a_copied_runner_trains_the_copied_model(followed):
    learn, run = make_learn(), Runner(compile=True)
    run.fit(1, learn)
    twin = copy.deepcopy(run)
    before = copy.deepcopy(learn.model.state_dict())
    twin.fit(1, twin.learn)
    for name, t in learn.model.state_dict().items():
        assert torch.equal(t, before[name])
        assert not torch.equal(t, twin.model.state_dict()[name])


def test_settings_are_left_as_found(followed):
    import torch._dynamo
    before = torch._dynamo.config.get_config_copy()
    Runner(compile=True).fit(1, make_learn())
    with pytest.raises(ZeroDivisionError):
        Runner(Log({"after_loss": ZeroDivisionError()}), compile=True).fit(1, make_learn())
    assert torch._dynamo.config.get_config_copy() == before


# --- what is refused ----------------------------------------------------------------------------------------------

def refused(text, learn=None, cbs=None):
    with pytest.raises(CompileError, match=text): Runner(compile=True).fit(1, learn or make_learn(), cbs=cbs)




def test_hooks_are_refused_and_may_be_taken_off(followed):
    learn, run = make_learn(), Runner(compile=True)
    with Hooks(learn.model, append_stats):
        with pytest.raises(CompileError, match=r"module '0' \(Linear\) has a hook.*take the hooks off"):
            run.fit(1, learn)
    run.fit(1, learn)

    class Late(Callback):
        def after_batch(self): self.hooks = Hooks(self.model[:1], append_stats)
    with pytest.raises(CompileError, match="has a hook"): run.fit(1, learn, cbs=Late())


def test_gradient_hooks_are_refused(followed):
    learn = make_learn()
    learn.model[0].weight.register_hook(lambda g: g)
    refused("a parameter has a gradient hook.*after_backward", learn)


def test_changes_too_late_are_refused(followed):
    class ChangesPred(Callback):
        def after_pred(self): self.run.pred = self.pred * 2

    class ChangesPredInPlace(Callback):
        def after_pred(self): self.run.pred.mul_(2)

    class ChangesLabel(Callback):
        def after_pred(self): self.run.yb = 1 - self.yb

    class ChangesLoss(Callback):
        def after_loss(self): self.run.loss = self.loss * 2

    for cb, name in ((ChangesPred(), "pred"), (ChangesPredInPlace(), "pred"), (ChangesLabel(), "yb"),
                     (ChangesLoss(), "loss")):
        refused(rf"a callback changed run\.{name} in after_.*begin_batch, or fit without compile=True", cbs=cb)


def test_average_backward_is_compiled(traced):
    """Its averages, which the compiled backward pass writes, are those of the plain run."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), RunningBatchNorm(5, average_backward=True), nn.Linear(5, 3))
        learn = make_learn(model=model)
        torch.manual_seed(1)
        Runner(compile=compiled).fit(1, learn)
        ends.append(model.state_dict())
    assert ends[0]["1.grad_dot"].abs().max() > 0
    for name, t in ends[0].items(): torch.testing.assert_close(ends[1][name], t, rtol=1e-4, atol=1e-4)


def test_the_models_own_error_is_the_one_that_is_seen(traced):
    learn = images(network(nn.BatchNorm2d), n_train=4)
    learn.model[6] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8).double())
    learn.data = DataBunch(*get_dls(learn.data.train_ds, learn.data.valid_ds, 1), 3)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"): Runner(compile=True).fit(1, learn)
    for name, t in learn.model.state_dict().items(): assert torch.equal(t, before[name])
    learn = make_learn()
    learn.loss_func = lambda pred, yb: F.cross_entropy(pred, yb, reduction="none")
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar"):
        Runner(compile=True).fit(1, learn)


def test_a_model_that_is_another_at_every_step_says_so(followed):
    class Counts(nn.Linear):
        seen = ""

        def forward(self, x):
            self.seen += "x"
            return super().forward(x) * len(self.seen)
    refused("the training step was compiled 8 times, because", make_learn(n_train=40, model=Counts(6, 3)))


def test_without_a_compiler_nothing_is_begun(no_compiler):
    learn, log = make_learn(), Log()
    before = copy.deepcopy(learn.model.state_dict())
    run = Runner(log, compile=True)
    with pytest.raises(CompileError, match=r"needs a C\+\+ compiler and none was found.*no-such-compiler.*"
                                           r"install one, such as g\+\+.*or fit without compile=True"):
        run.fit(1, learn)
    assert log.events == []
    for name, t in learn.model.state_dict().items(): assert torch.equal(t, before[name])


def test_without_a_compiler_on_the_path(tmp_path, forks):
    code = ("from runner.compiled import CompileError, CompiledStep\n"
            "try: CompiledStep().set_runner(None)\n"
            "except CompileError as e: print(e)")
    env = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("CXX", None)
    out = forks.run("-c", code, env=env)
    assert "compile=True needs a C++ compiler and none was found" in out.stdout


def test_an_older_torch_says_so(monkeypatch):
    import torch._dynamo
    monkeypatch.setattr(torch._dynamo, "config", object())
    refused("needs torch 2.11 or later and this is")


def test_compile_is_true_or_false():
    with pytest.raises(TypeError, match="compile is 'reduce-overhead'; it must be True or False"):
        Runner(compile="reduce-overhead")


def test_importing_the_runner_does_not_import_the_compiler(forks):
    code = ("import sys, runner; runner.Runner(compile=True); "
            "print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])")
    out = forks.run("-c", code, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert out.stdout.strip() == "[]", out.stderr


# --- in the experiments -------------------------------------------------------------------------------------------

def test_small_batch_compiles_and_records_it(followed, tmp_path, capsys):
    args = ["small-batch", "--data", "digits", "--limit", "40", "--norms", "BatchNorm2d", "--epochs", "1",
            "--lr", "0.01"]                         # at 0.4 the last bits of one step are the first of the tenth
    rows = []
    for name, option in (("eager", []), ("compiled", ["--compile"])):
        assert main([*args, *option, "--out", str(tmp_path / name)]) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["config"]["compile"] is bool(option)
        rows.append(json.loads((tmp_path / name / "summary.json").read_text())["rows"][0])
    assert followed() >= 1
    assert "device cpu, compiled" in capsys.readouterr().out
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-3)


def test_small_batch_without_a_compiler(no_compiler, tmp_path, capsys):
    assert main(["small-batch", "--data", "digits", "--compile", "--out", str(tmp_path / "run")]) == 2
    assert "error: compile=True needs a C++ compiler and none was found" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_get_learn_run_passes_it_on(followed):
    data = DataBunch(*get_dls(*[Dataset(torch.randn(4, 1, 28, 28), torch.arange(4) % 3)] * 2, 2), 3)
    learn, run = get_learn_run([4, 4], data, 0.1, conv_layer, norm=RunningBatchNorm, compile=True)
    run.fit(1, learn)
    assert followed() == 1
