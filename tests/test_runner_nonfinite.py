"""Divergence: step, phase and module are those that a plain loop with checks finds, and `replay` finds them again."""

import copy
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from norms import RunningBatchNorm
from runner import (
    Callback,
    CancelBatchException,
    CancelTrainException,
    DataBunch,
    Dataset,
    Hooks,
    Learner,
    ParamScheduler,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    append_stats,
    get_dls,
    replay,
)
from runner.compiled import CompiledStep

TESTS = Path(__file__).parent
N, VALID, BS = 22, 10, 2


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x): return x * self.weight


class Root(nn.Module):
    """Finite forward everywhere; its derivative at 0 is infinite."""

    def forward(self, x): return x.abs().sqrt()


class Picky(nn.Module):
    """NaN for the image that starts with 7."""

    def forward(self, x): return torch.where(x[:, :1] == 7, torch.nan, x)


class Mask(nn.Module):
    """-inf at every step, as a mask before a softmax; NaN for the image that starts with 7."""

    def forward(self, x): return torch.where(x[:, :1] == 7, x.new_tensor(torch.nan), x.clone()).index_fill(
        1, torch.tensor([5]), -torch.inf)


def blind(pred, yb):
    """A loss that is NaN where an image is of class 3."""
    return F.cross_entropy(pred, yb) * torch.where(yb == 3, torch.nan, 1.0).mean()


def learner(*layers, lr=0.05, loss=F.cross_entropy, opt=torch.optim.SGD, special=None, order=1, **kwargs):
    """A learner on fixed images, shuffled by a generator; `special(x, y)` changes an image, layers are made anew."""
    rng = torch.Generator().manual_seed(4)
    x, y = torch.randn(N + VALID, 6, generator=rng), torch.randint(0, 3, (N + VALID,), generator=rng)
    if special: special(x, y)
    dls = get_dls(Dataset(x[:N], y[:N]), Dataset(x[N:], y[N:]), BS, generator=torch.Generator().manual_seed(order))
    torch.manual_seed(2)
    model = nn.Sequential(*[layer() for layer in layers])
    return Learner(model, opt(model.parameters(), lr=lr, **kwargs), loss, DataBunch(*dls, 4))


def linear(i, o=4): return lambda: nn.Linear(i, o)
def dropout(): return nn.Dropout(0.3)


def broken_var():
    bn = nn.BatchNorm1d(8, momentum=0.0)
    bn.running_var.fill_(-1)
    return bn


def seven(x, y): x[13, 0] = 7
def zero(x, y): x[13] = 0
def nan(x, y): x[13, 4] = torch.nan
def three(x, y): y[13] = 3
def empty_column(x, y): x[:, 2] = 0
def seven_in_validation(x, y): x[N + 9, 0] = 7


ADAM = {"opt": torch.optim.Adam, "eps": 0.0}    # 0 / 0 where a gradient is 0

# name: (layers, settings of the learner, what the plain loop finds: phase, index of the layer, training)
CASES = {
    "huge rate": ([linear(6, 8), nn.ReLU, dropout, linear(8)], {"lr": 1e20}, ("forward", 3, True)),
    "one image": ([nn.Identity, Picky, dropout, linear(6)], {"special": seven}, ("forward", 1, True)),
    "backward alone": ([Scale, Root, dropout, linear(6)], {"special": zero}, ("backward", 1, True)),
    "validation alone": ([linear(6, 8), dropout, broken_var, linear(8)], {}, ("forward", 2, False)),
    "one image of validation": ([Picky, dropout, linear(6)], {"special": seven_in_validation}, ("forward", 0, False)),
    "loss function": ([linear(6, 8), dropout, linear(8)], {"loss": blind, "special": three}, ("loss", None, True)),
    "batch": ([dropout, linear(6)], {"special": nan}, ("batch", None, True)),
    "optimizer": ([dropout, linear(6)], {**ADAM, "special": empty_column}, ("step", 1, True)),
    "behind a mask": ([Mask, nn.Sigmoid, dropout, linear(6)], {"special": seven}, ("forward", 0, True)),
    # 0 / 0 for an input that is always 0, once 20 images were seen and the variance is no longer taken as at least 0.01
    "running statistics": ([nn.Identity, lambda: RunningBatchNorm(6, eps=0.0), dropout, Picky, linear(6)],
                           {"special": empty_column}, ("forward", 1, True)),
}


def made(name):
    layers, settings, _ = CASES[name]
    return learner(*layers, **settings)


def fit(learn, cb=None, epochs=2, cbs=()):
    """Fit from a fixed random state: the callback and the runner."""
    torch.manual_seed(6)
    cb = cb or TerminateOnNonFinite()
    run = Runner([*cbs, cb])
    run.fit(epochs, learn)
    return cb, run


# --- the plain loop -----------------------------------------------------------------------------------------------

def finite(*tensors): return all(t is None or bool(torch.isfinite(t).all()) for t in tensors)


def by_hand(learn, epochs=2, usual=()):
    """Train with a look at every value: what was first not finite, and where; and (images, loss) of every batch.

    `usual` are the layers whose outputs may be infinite.
    """
    torch.manual_seed(6)
    model, opt, data, step, seen = learn.model, learn.opt, learn.data, 0, []
    for epoch in range(epochs):
        for training, dl in ((True, data.train_dl), (False, data.valid_dl)):
            model.train(training)
            for batch, (xb, yb) in enumerate(dl):
                def at(phase, i=None, training=training, epoch=epoch, step=step, batch=batch):
                    return (phase, None if i is None else str(i), training, epoch, step, batch), seen
                seen.append((xb, None))
                if not finite(xb): return at("batch")
                acts = [xb]
                with torch.set_grad_enabled(training):
                    for i, layer in enumerate(model):
                        acts.append(layer(acts[-1]))
                        if not finite(acts[-1]) and (i not in usual or acts[-1].isnan().any()): return at("forward", i)
                    loss = learn.loss_func(acts[-1], yb)
                seen[-1] = xb, loss.item()
                if not finite(loss): return at("loss")
                if not training: continue
                kept = [a for a in acts if a.requires_grad]
                for a in kept: a.retain_grad()
                loss.backward()
                for i, layer in reversed(list(enumerate(model))):
                    if not finite(acts[i].grad if acts[i].requires_grad else None,
                                  *(p.grad for p in layer.parameters())): return at("backward", i)
                opt.step()
                opt.zero_grad()
                for i, layer in enumerate(model):
                    if not finite(*layer.parameters()): return at("step", i)
                step += 1
    return None, seen


def same(a, b): return a == b or (math.isnan(a) and math.isnan(b))


def found(record):
    f = record["finding"]
    return tuple(f[k] for k in ("phase", "module", "in_train", "epoch", "step", "batch"))


@pytest.mark.parametrize("settings", [{"every": 1}, {"every": 4, "grads": False}, {}])
@pytest.mark.parametrize("name", CASES)
def test_names_what_a_plain_loop_finds_and_replay_finds_it_again(name, settings, capsys):
    expected, seen = by_hand(made(name), usual=(0,) if name == "behind a mask" else ())
    phase, layer, training = CASES[name][2]
    assert expected[:3] == (phase, None if layer is None else str(layer), training)    # the case is what it says
    assert expected[3:] != (0, 0, 0) or phase == "step"
    cb, run = fit(made(name), TerminateOnNonFinite(keep=30, **settings))
    record = cb.record
    assert run.status == "diverged"
    if phase == "loss": assert record["finding"]["module"] == "(loss)"
    assert found(record) == (phase, "(loss)" if phase == "loss" else expected[1], *expected[2:])
    assert record["repeats"]
    assert capsys.readouterr().out == record["report"] + "; the record is in run.terminate_on_non_finite.record\n"

    rows = record["rows"]
    for row, (xb, loss) in zip(rows, seen, strict=False):     # images and losses, bit for bit
        assert loss is None or same(row["loss"], loss)
        data = made(name).data
        ds = data.train_ds if row["in_train"] else data.valid_ds
        assert torch.equal(ds[row["indices"]][0].nan_to_num(9), xb.nan_to_num(9))
    assert len(rows) == len(seen) + (phase == "step" or (phase == "backward" and "grads" in settings))
    assert record["indices"] == "drawn anew; the targets of the batches kept agree"

    learn = made(name)
    state = torch.get_rng_state()
    again = replay(record, learn)
    assert again.same
    assert again.finding == record["finding"]
    assert again.report == record["report"]
    at = {k: again.finding[k] for k in ("in_train", "epoch", "step", "batch")}
    assert same(again.loss, next(row["loss"] for row in rows if at.items() <= row.items()))
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())


def test_the_line_that_is_printed(capsys):
    _, run = fit(made("one image"))
    place, _ = by_hand(made("one image"))
    before = run.terminate_on_non_finite.record["rows"][-2]["loss"]
    assert capsys.readouterr().out == (
        f"diverged at step {place[4]} (epoch 0): first non-finite value in the output of 1 Picky (forward, training), "
        f"6 NaN and 0 infinite of 12; the loss was {before:.3g} one step before; the record is in "
        "run.terminate_on_non_finite.record\n")
    fit(made("backward alone"))
    assert "in a gradient that passes SqrtBackward0 of 1 Root (backward, training)" in capsys.readouterr().out
    fit(made("optimizer"))
    out = capsys.readouterr().out
    assert "at step 0 (epoch 0): first non-finite value in the weight of 1 Linear (step, training), 8 NaN" in out
    assert "; seen at step 1 (epoch 0); the record" in out
    fit(made("validation alone"))
    assert "diverged at batch 0 of the validation of epoch 0 (after 11 steps): first" in capsys.readouterr().out
    fit(made("loss function"))
    assert "in the loss, by blind (loss, training), 1 NaN and 0 infinite of 1" in capsys.readouterr().out


# --- the record ---------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from test_runner_nonfinite import made
from runner import replay
again = replay({path!r}, made({name!r}))
print(again.same, repr(again.loss), again.report, sep="|")
"""


def test_replay_in_another_process_repeats_the_loss_bit_for_bit(tmp_path, forks):
    name, path = "backward alone", tmp_path / "diverged.pt"
    cb, _ = fit(made(name), TerminateOnNonFinite(path, every=5, grads=True))
    code = PROGRAM.format(tests=str(TESTS), path=str(path), name=name)
    out = forks.run("-c", code, cwd=TESTS.parent)
    assert out.returncode == 0, out.stderr
    row = cb.record["rows"][-1]
    assert math.isfinite(row["loss"])                                                   # only the gradient isn't
    assert out.stdout == f"True|{row['loss']!r}|{cb.record['report']}\n"


def types(o):
    """The types of all that a record holds."""
    yield type(o)
    if isinstance(o, dict): o = [*o, *o.values()]
    if isinstance(o, (list, tuple)):
        for item in o: yield from types(item)


def test_the_record_is_plain_and_holds_no_path(tmp_path, capsys):
    path = tmp_path / "diverged.pt"
    learn = made("one image")
    scheduler = ParamScheduler("lr", lambda pos: np.float64(0.1 * (1 - pos)))
    cb, _ = fit(learn, TerminateOnNonFinite(path, keep=4), cbs=[scheduler])
    assert capsys.readouterr().out == f"{cb.record['report']}; the record is in {path}\n"
    record = torch.load(path, weights_only=True)
    assert set(types(record)) <= {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert str(tmp_path).encode() not in path.read_bytes()
    assert str(TESTS.parent).encode() not in path.read_bytes()

    rows, step = record["rows"], record["finding"]["step"]
    assert [r["step"] for r in rows] == [step - 3, step - 2, step - 1, step]
    assert [r["groups"][0]["lr"] for r in rows] == [0.1 * (1 - s / 11 / 2) for s in range(step - 3, step + 1)]
    assert rows[-1]["grad_norm"] is None                            # the loss came first; the others by repetition
    assert all(r["grad_norm"] > 0 for r in rows[:-1])
    assert set(record["random"]) == {"torch", "python", "cuda", "generators", "numpy"}
    for name, p in learn.model.named_parameters():                  # the stop came before the step: the same weights
        assert torch.equal(record["snapshots"][-1]["tensors"][name], p)
    (xb, yb), last = learn.data.train_ds[rows[-1]["indices"]], record["snapshots"][-1]["steps"][-1]
    assert torch.equal(last["xb"], xb)
    assert torch.equal(last["yb"], yb)


@pytest.mark.parametrize("grads", [True, False])
def test_gradient_norms_are_those_of_a_plain_loop(grads):
    learn, twin = made("one image"), made("one image")
    cb, _ = fit(learn, TerminateOnNonFinite(keep=50, grads=grads))
    torch.manual_seed(6)
    for row, (xb, yb) in zip(cb.record["rows"][:-1], twin.data.train_dl, strict=False):
        twin.loss_func(twin.model(xb), yb).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in twin.model.parameters()))
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-6)
        twin.opt.step()
        twin.opt.zero_grad()


class Look(Callback):
    """What the callback keeps, and that no module has a hook, at every event after it."""

    _order = 2000

    def begin_fit(self): self.most = [0, 0, 0]

    def after_batch(self):
        cb = self.run.terminate_on_non_finite
        now = len(cb.ring), max(len(snap["steps"]) for snap in cb.ring), len(cb.rows)
        self.most = [max(a, b) for a, b in zip(self.most, now, strict=True)]
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self.model.modules())


@pytest.mark.parametrize(("every", "keep"), [(1, 20), (4, 3)])
def test_memory_is_bounded_and_given_back(every, keep):
    look = Look()
    cb, run = fit(learner(linear(6, 8), dropout, linear(8)), TerminateOnNonFinite(every=every, keep=keep), 3, [look])
    assert look.most == [2, every, keep]
    assert (run.status, cb.record, len(cb.ring), len(cb.rows)) == ("ok", None, 0, 0)


@pytest.mark.parametrize("settings", [{}, {"every": 1}, {"grads": True}])
@pytest.mark.parametrize("generator", [True, False])
def test_a_run_that_goes_well_is_the_same_bit_for_bit(settings, generator):
    ends = []
    for watched in (False, True):
        learn = learner(linear(6, 8), lambda: RunningBatchNorm(8), dropout, linear(8), momentum=0.9)
        if not generator: learn.data = DataBunch(*get_dls(learn.data.train_ds, learn.data.valid_ds, 3), 4)
        random.seed(1), np.random.seed(1)
        torch.manual_seed(6)
        run = Runner([Recorder(), *([TerminateOnNonFinite(**settings)] if watched else [])])
        run.fit(2, learn)
        assert run.status == "ok"
        state = learn.opt.state_dict()["state"]
        ends.append((run.recorder.losses, [t.tolist() for t in learn.model.state_dict().values()],
                     [s["momentum_buffer"].tolist() for s in state.values()], torch.rand(1).item(), random.random(),
                     np.random.rand(), learn.data.train_dl.generator and torch.rand(
                         1, generator=learn.data.train_dl.generator).item()))
    assert ends[0] == ends[1]


def test_the_stop_leaves_the_last_good_weights_and_the_users_hooks():
    learn, twin = made("one image"), made("one image")
    with Hooks(learn.model, append_stats) as hooks:
        cb, _ = fit(learn)
        steps = cb.record["finding"]["step"]
        assert [len(h.stats[0]) for h in hooks] == [steps + 1] * 4  # the second look isn't among them
    state = torch.get_rng_state()

    class Stop(Callback):
        def after_loss(self):
            if self.n_iter == steps: raise CancelTrainException
    torch.manual_seed(6)
    run = Runner(Stop())
    run.fit(2, twin)
    assert run.status == "cancelled"
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(learn.model.parameters(), twin.model.parameters(), strict=True): assert torch.equal(a, b)


# --- callbacks that take part in a step ---------------------------------------------------------------------------

class Clip(Callback):
    def after_backward(self): nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)


class Augment(Callback):
    """Noise drawn from torch's generator and from Python's."""

    def begin_batch(self): self.run.xb = self.run.xb + 0.1 * torch.randn(self.xb.shape) + 0.1 * random.random()


class EverySecond(Callback):
    """Gradients of two batches for each step."""

    def after_backward(self):
        if self.n_iter % 2 == 0: raise CancelBatchException


class Late(Callback):
    def after_step(self): raise CancelBatchException


class Spoil(Callback):
    """NaN in one image, after the other callbacks."""

    _order = 500

    def begin_batch(self):
        if self.in_train and self.n_iter == 7: self.run.xb = self.xb * torch.tensor([[1.0] * 6, [torch.nan] * 6])


class Far(TerminateOnNonFinite):
    """As on another device: losses and norms are looked at every few batches only."""

    name = "terminate_on_non_finite"

    def begin_fit(self):
        super().begin_fit()
        self.host = False


def noisy(): return learner(nn.Identity, Root, dropout, linear(6), momentum=0.9)


@pytest.mark.parametrize("cb", [Clip, Augment, EverySecond, Late])
@pytest.mark.parametrize("every", [1, 3])
def test_with_callbacks_that_change_batches_gradients_or_steps(cb, every, capsys):
    watch, run = fit(noisy(), TerminateOnNonFinite(every=every), cbs=[cb(), Spoil()])
    assert run.status == "diverged"
    assert found(watch.record) == ("batch", None, True, 0, 7, 7)
    assert watch.record["repeats"]
    assert replay(watch.record, noisy()).same


def test_steps_that_do_not_repeat_are_told():
    """Where the failing step's own start isn't kept, it matters that the steps before it were clipped."""
    watch, _ = fit(noisy(), Far(every=5), cbs=[Clip(), Spoil()])
    assert found(watch.record) == ("batch", None, True, 0, 7, 7)
    assert not watch.record["repeats"]
    first = next(r for r in watch.record["rows"] if r["step"] == 6)     # the first after a clipped one since step 5
    assert f"not repeated bit for bit: the loss of step 6 (epoch 0) was {first['loss']!r} and" in watch.record["report"]
    assert "after steps that a callback may have changed; every=1 needs none of them" in watch.record["report"]
    assert not replay(watch.record, noisy()).same
    watch, _ = fit(noisy(), Far(every=1), cbs=[Clip(), Spoil()])
    assert watch.record["repeats"]


def test_gradients_left_by_a_cancelled_batch_are_looked_at():
    cb, _ = fit(made("backward alone"), TerminateOnNonFinite(grads=True), cbs=[EverySecond()])
    expected, _ = by_hand(made("backward alone"))
    assert found(cb.record)[:2] == expected[:2]
    assert 13 in cb.record["rows"][-1]["indices"]


def test_weights_that_a_callback_spoils():
    class Spoil(Callback):
        def after_step(self):
            if self.n_iter == 4: self.model[0].bias.data[1] = torch.inf
    cb, _ = fit(learner(linear(6, 8), dropout, linear(8)), cbs=[Spoil()])
    assert found(cb.record) == ("step", "0", True, 0, 4, 4)
    assert cb.record["finding"]["what"] == "the bias of 0 Linear"


def test_a_loss_that_a_callback_spoils_is_no_modules_fault():
    class Spoil(Callback):
        def after_loss(self):
            if self.n_iter == 4: self.run.loss = self.run.loss * torch.nan
    cb, _ = fit(learner(linear(6, 8), dropout, linear(8)), cbs=[Spoil()])
    assert cb.record["finding"] is None
    assert cb.record["report"].startswith("diverged at step 4 (epoch 0): the loss is nan and the norm of the gradients "
                                          "None; no module was found; the loss was ")
    assert "when repeated no value is to blame: a callback changes loss, gradients or weights" in cb.record["report"]


def test_a_spoilt_last_step_without_validation_is_seen():
    class NoValidation(Callback):
        def begin_validate(self): return True

        def after_step(self):
            if self.n_iter == 10: self.model[0].bias.data[1] = torch.nan
    cb, run = fit(learner(linear(6, 8), dropout, linear(8)), epochs=1, cbs=[NoValidation()])
    assert run.status == "diverged"
    assert found(cb.record) == ("step", "0", True, 0, 10, 10)


# --- what a module is, and isn't ----------------------------------------------------------------------------------

class Block(nn.Module):
    """Its own logarithm between two parts is NaN for the image that starts with 7."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Identity(), nn.Linear(6, 6)

    def forward(self, x): return self.b((10 - self.a(x).abs().sum(1, keepdim=True)).log().relu() + x)


def test_a_value_that_a_module_computes_between_its_parts():
    def far(x, y): x[13, 0] = 70
    cb, _ = fit(learner(Block, nn.ReLU, dropout, linear(6), special=far))
    assert found(cb.record)[:2] == ("forward", "0")
    assert cb.record["finding"]["what"] == "what 0 Block hands to 0.b Linear"


class Weighted(nn.Module):
    """A loss with a parameter and a part; log(scale) is -inf once the scale is 0."""

    def __init__(self):
        super().__init__()
        self.scale, self.part = nn.Parameter(torch.ones(())), nn.CrossEntropyLoss()

    def forward(self, pred, yb): return self.part(pred, yb) + self.scale.log()


def test_a_loss_that_is_a_module_and_is_trained_and_a_parameter_of_none():
    def make():
        learn = learner(linear(6, 8), dropout, linear(8))
        learn.loss_func = Weighted()
        extra = nn.Parameter(torch.ones(2))
        learn.opt = torch.optim.SGD([*learn.model.parameters(), *learn.loss_func.parameters(), extra], lr=0.25)
        return learn
    cb, _ = fit(make())                                             # 1, 0.75, ..., and past 0 the logarithm is NaN
    scale, steps = 1.0, 0
    while scale > 0: scale, steps = scale - 0.25 / scale, steps + 1
    assert found(cb.record) == ("loss", "(loss)", True, 0, steps, steps)
    assert {"(loss).scale", "(optimizer).5"} <= set(cb.record["snapshots"][-1]["tensors"])
    assert replay(cb.record, make()).same


def test_parameters_that_were_never_finite():
    learn = learner(linear(6, 8), dropout, linear(8))
    learn.model[2].bias.data[0] = torch.nan
    cb, _ = fit(learn)
    assert found(cb.record) == ("start", "2", True, 0, 0, 0)
    assert cb.record["finding"]["what"] == "the bias of 2 Linear"


def test_a_finite_gradient_whose_square_overflows_is_no_divergence():
    def large(pred, yb): return 1e25 * pred.mean()
    cb, run = fit(learner(linear(6), lr=1e-30, loss=large), epochs=1)
    assert (run.status, cb.record) == ("ok", None)
    twin = learner(linear(6), lr=1e-30, loss=large)
    xb, yb = next(iter(twin.data.train_dl))
    large(twin.model(xb), yb).backward()
    assert torch.linalg.vector_norm(twin.model[0].weight.grad).isinf()


def test_a_model_that_cannot_be_copied_is_told_and_can_be_replayed():
    class Single(Picky):
        def __deepcopy__(self, memo): raise RuntimeError("one of a kind")

    def make(): return learner(nn.Identity, Single, dropout, linear(6), special=seven)
    cb, run = fit(make())
    assert (run.status, cb.record["finding"]) == ("diverged", None)
    assert "the step can't be repeated on a copy (RuntimeError: one of a kind)" in cb.record["report"]
    assert replay(cb.record, make()).finding["module"] == "1"


# --- where the losses don't lie on the host -----------------------------------------------------------------------

@pytest.mark.parametrize("name", CASES)
def test_late_looks_find_the_same(name):
    cb, run = fit(made(name), Far(every=4))
    near, _ = fit(made(name), TerminateOnNonFinite(every=4))
    assert cb.record["finding"] == near.record["finding"]
    assert cb.record["repeats"]
    assert cb.record["rows"][-1]["step"] == near.record["rows"][-1]["step"]
    if near.record["rows"][-1]["in_train"]: assert run.n_iter <= near.record["rows"][-1]["step"] + 4
    assert replay(cb.record, made(name)).same


def test_late_looks_are_one_copy_every_few_batches(monkeypatch):
    looks, tolist = [], torch.Tensor.tolist
    learn = learner(linear(6, 8), nn.ReLU, linear(8))
    dl = list(learn.data.train_dl)                                  # a loader's own numbers are its affair
    learn.data = DataBunch(dl, dl[:3], 4)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a value was brought to the host"))

    class Count(Callback):
        _order = 2000

        def begin_batch(self): looks.append(0)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (looks.append(len(self)), tolist(self))[1])
    run = Runner([Far(every=4, grads=True), Count()])
    run.fit(1, learn)
    assert [n for n in looks if n] == [8, 8, 6, 3]                  # 11 losses and norms of training, 3 of validation
    assert run.status == "ok"


# --- indices ------------------------------------------------------------------------------------------------------

class Stream(IterableDataset):
    def __init__(self, ds): self.ds = ds

    def __iter__(self): return iter([self.ds[i] for i in range(N)])

    def __len__(self): return N


def by_items(ds, **kwargs): return DataLoader(ds, BS, shuffle=True, **kwargs)


@pytest.mark.parametrize(("loader", "word"), [
    (by_items, "drawn anew; the targets of the batches kept agree"),
    (lambda ds: by_items(ds, generator=torch.Generator().manual_seed(3)), "drawn anew; the targets of the batches"),
    (lambda ds: by_items(ds, num_workers=1, persistent_workers=True), "drawn anew; the targets of the batches"),
    (lambda ds: DataLoader(Stream(ds), BS), "none: an IterableDataset has none"),
    (lambda ds: list(get_dls(ds, ds, BS)[0]), "none: the loader, a list, has no sampler to draw them from")])
def test_indices_of_other_loaders(loader, word):
    class Second(Callback):
        """NaN in a batch of the second epoch."""
        def begin_batch(self):
            if self.in_train and self.n_iter == 13: self.run.xb = self.xb * torch.nan
            seen.append(self.xb)
    learn, seen = learner(linear(6, 8), dropout, linear(8)), []
    ds = learn.data.train_ds
    learn.data = DataBunch(loader(ds), learn.data.valid_dl, 4)
    cb, _ = fit(learn, TerminateOnNonFinite(keep=3), cbs=[Second()])
    record = cb.record
    assert record["indices"].startswith(word)
    assert found(record) == ("batch", None, True, 1, 13, 2)
    for row, xb in zip(record["rows"][:-1], seen[-3:-1], strict=True):
        assert row["indices"] is None if word.startswith("none") else torch.equal(ds[row["indices"]][0], xb)
    assert replay(record, learner(linear(6, 8), dropout, linear(8))).same


def test_indices_that_are_not_the_batches_are_not_confirmed():
    class Swap(Callback):
        def begin_batch(self): self.run.yb = (self.yb + 1) % 3
    cb, _ = fit(made("one image"), cbs=[Swap()])
    assert cb.record["indices"] == ("drawn anew and not confirmed: the data set has other targets for them; a callback "
                                    "changes yb, or the loader's order doesn't follow from its generators")


# --- with compile=True, the runner's status, and errors -----------------------------------------------------------

def test_a_compiled_fit_is_repeated_without_the_compiler(monkeypatch):
    pytest.importorskip("torch._inductor.cpp_builder")
    monkeypatch.setattr(CompiledStep, "backend", "aot_eager")
    expected, _ = by_hand(made("one image"))
    torch.manual_seed(6)
    run = Runner(TerminateOnNonFinite(), compile=True)
    run.fit(1, made("one image"))
    assert found(run.terminate_on_non_finite.record) == expected
    assert run.status == "diverged"


def test_status():
    class Leave(Callback):
        def after_loss(self): raise CancelTrainException

    class Fail(Callback):
        def after_loss(self): raise KeyError("boom")
    run, learn = Runner(), learner(linear(6))
    assert run.status == "ok"
    run.fit(1, learn, cbs=Leave())
    assert run.status == "cancelled"
    run.fit(1, learn)
    assert run.status == "ok"
    with pytest.raises(KeyError): run.fit(1, learn, cbs=Fail())
    assert run.status == "failed"
    seen = []

    class Ends(Callback):
        def after_cancel_train(self): seen.append(self.run.status)

        def after_fit(self): seen.append(self.run.status)
    Runner([TerminateOnNonFinite(), Ends()]).fit(2, made("one image"))
    assert seen == ["diverged", "diverged"]


@pytest.mark.parametrize(("settings", "text"), [
    ({"keep": 0}, "keep is 0; it must be an integer of at least 1"), ({"keep": None}, "keep is None; it must"),
    ({"every": 2.0}, "every is 2.0; it must be"), ({"every": True}, "every is True; it must be")])
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError, match=f"TerminateOnNonFinite: {text}"): TerminateOnNonFinite(**settings)


def test_a_folder_that_is_not_there_is_told_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match=r"path is '.*it.pt' and its folder doesn't exist; make the folder first"):
        fit(made("one image"), TerminateOnNonFinite(tmp_path / "nowhere" / "it.pt"))


@pytest.mark.parametrize(("other", "text"), [
    (lambda: learner(nn.Identity, Picky, dropout, linear(6, 5)),
     r"3.weight has the shape \(5, 6\) in the learner and \(4, 6\) in the record .*; build model, loss and optimizer"),
    (lambda: learner(nn.Identity, Picky, linear(6)),
     r"record and learner don't have the same modules \(3 only in one of them\)"),
    (lambda: learner(nn.Identity, Picky, dropout, linear(6), opt=torch.optim.Adam),
     "the learner's optimizer is Adam and the record's SGD; build the optimizer as it was")])
def test_replay_with_another_learner_is_refused_and_leaves_it(other, text):
    cb, _ = fit(made("one image"))
    learn = other()
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=f"replay: {text}"): replay(cb.record, learn)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_replay_without_a_record_is_refused():
    with pytest.raises(TypeError, match="replay got NoneType; it needs the path of a record or the `record` of a"):
        replay(TerminateOnNonFinite().record, made("one image"))


def test_replay_says_what_differs():
    cb, _ = fit(made("one image"))
    layers, settings, _ = CASES["one image"]
    again = replay(cb.record, learner(nn.Identity, nn.Identity, *layers[2:], **settings))
    assert (again.same, again.finding) == (False, None)
    assert "not repeated bit for bit: the loss of step " in again.report
    assert f"recorded was: {cb.record['report']}" in again.report
