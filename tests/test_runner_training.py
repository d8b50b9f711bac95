"""Mixed precision, clipping and accumulation: each, and all together, equal to the loop that one writes by hand."""

import copy
import math
import pickle
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import OwnRunner, make_learn
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from norms import RunningBatchNorm
from runner import (
    AveragedWeights,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    CompileError,
    DataBunch,
    GradientAccumulation,
    GradientClip,
    Learner,
    LR_Find,
    MixedPrecision,
    ParameterStats,
    ParamScheduler,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    TorchScheduler,
    replay,
    sched_cos,
)
from runner.compiled import CompiledStep


@pytest.fixture
def traced(monkeypatch):
    """Compile without code generation, which takes seconds."""
    monkeypatch.setattr(CompiledStep, "backend", "aot_eager")


def network(dtype=torch.float32, norm=None):
    torch.manual_seed(3)
    layers = [nn.Linear(6, 5), *([norm(5)] if norm else []), nn.ReLU(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).to(dtype)


def learner(n=12, bs=2, dtype=torch.float32, norm=None, lr=0.1, momentum=0.9):
    learn = make_learn(n, 4, bs, network(dtype, norm), lr, momentum)
    for dl in (learn.data.train_dl, learn.data.valid_dl): dl.dataset.x = dl.dataset.x.to(dtype)
    return learn


def weights(learn): return list(learn.model.state_dict().values())


def assert_same(learn, other):
    for p, q in zip(weights(learn), weights(other), strict=True): assert torch.equal(p, q)


def assert_close(learn, other, rtol=1e-12):
    for p, q in zip(weights(learn), weights(other), strict=True): torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


def by_hand(learn, epochs, k=1, dtype=None, clip=None, scale=2.0 ** 16, interval=2000):
    """torch's recipe of all; returns the scale, the skipped steps, the norms and the averages."""
    model, opt, params = learn.model, learn.opt, list(learn.model.parameters())
    averages = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    sched = ExponentialLR(opt, 0.99)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval, enabled=dtype == torch.float16)
    skipped, norms, step = [], [], 0
    for _ in range(epochs):
        model.train()
        batches = list(learn.data.train_dl)
        for i in range(0, len(batches), k):
            group = batches[i:i + k]
            for xb, yb in group:
                with torch.autocast("cpu", dtype, enabled=dtype is not None): loss = learn.loss_func(model(xb), yb)
                scaler.scale(loss / len(group)).backward()
            scaler.unscale_(opt)
            finite = all(torch.isfinite(p.grad).all() for p in params)
            if clip and finite:
                kind, limit = clip
                if kind == "max_norm": norms.append(nn.utils.clip_grad_norm_(params, limit).item())
                else:
                    norms.append(max(p.grad.abs().max() for p in params).item())
                    nn.utils.clip_grad_value_(params, limit)
            scaler.step(opt)
            scaler.update()
            if finite: averages.update_parameters(model), sched.step()
            else: skipped.append(step)
            step += finite
            opt.zero_grad()
        list(learn.data.valid_dl)
    return scaler.get_scale(), skipped, norms, averages


@pytest.mark.parametrize("seed", range(24))
def test_any_of_them_together_in_any_order_is_the_loop_by_hand_to_the_bit(seed, capsys):
    rng = random.Random(seed)
    bs, batches, epochs = rng.choice([1, 2, 3]), rng.randint(1, 7), rng.randint(1, 3)
    k, dtype = rng.choice([1, 2, 3, 4, 9]), rng.choice([None, torch.bfloat16, torch.float16, torch.float16])
    clip = rng.choice([None, ("max_norm", 0.3), ("max_norm", 3.0), ("max_value", 0.1)])
    amp = {"scale": rng.choice([8.0, 2.0 ** 14, 2.0 ** 18]), "interval": rng.choice([2, 2000])}
    cbs = [GradientAccumulation(k)] if k > 1 else []
    if dtype: cbs.append(MixedPrecision(dtype, init_scale=amp["scale"], growth_interval=amp["interval"]))
    if clip: cbs.append(GradientClip(**dict([clip])))
    cbs += [AveragedWeights(0.8), TorchScheduler(partial(ExponentialLR, gamma=0.99), by="batch")]
    if rng.random() < 0.5: cbs += [TerminateOnNonFinite(), Recorder()]
    rng.shuffle(cbs)
    learns = [learner(bs * batches, bs) for _ in range(2)]
    scale, skipped, norms, averages = by_hand(learns[0], epochs, k, dtype, clip, **amp)
    run = Runner(cbs)
    run.fit(epochs, learns[1])
    assert_same(*learns)
    for p, q in zip(averages.module.parameters(), run.averaged_weights.averaged_model.module.parameters(), strict=True):
        assert torch.equal(p, q)
    assert run.status == "ok"
    assert run.n_iter == epochs * -(-batches // k) - len(skipped)
    if dtype == torch.float16:
        assert (run.mixed_precision.scale, run.mixed_precision.skipped_steps) == (scale, skipped)
    if clip: assert run.gradient_clip.norms == norms


# --- accumulation -------------------------------------------------------------------------------------------------

class Longer:
    """A loader that says that it has more batches than it gives."""

    def __init__(self, dl): self.dl = dl

    def __iter__(self): return iter(self.dl)

    def __len__(self): return len(self.dl) + 3


@pytest.mark.parametrize(("n", "bs", "k"), [(12, 2, 3), (12, 2, 1), (13, 2, 3), (14, 2, 3), (15, 2, 3), (11, 4, 3),
                                            (5, 2, 9), (3, 4, 2), (7, 1, 2), (29, 3, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("longer", [False, True])
def test_a_group_is_the_large_batch(n, bs, k, reduction, longer):
    """Partial groups, ragged batches, and a schedule, whose positions are those of the steps."""
    learns = [learner(n, size, torch.float64, lr=0.02) for size in (bs * k, bs)]
    if longer: learns[1].data.train_dl = Longer(learns[1].data.train_dl)
    for learn in learns: learn.loss_func = lambda pred, yb: F.cross_entropy(pred, yb, reduction=reduction)
    sched = [] if longer else [ParamScheduler("lr", sched_cos(0.02, 0.001))]
    runs = Runner([*sched, Recorder()]), Runner([*sched, GradientAccumulation(k, reduction), Recorder()])
    for run, learn in zip(runs, learns, strict=True): run.fit(3, learn)
    assert_close(*learns)
    assert runs[1].n_iter == runs[0].n_iter == 3 * math.ceil(n / (bs * k))
    rows = [p for p in runs[1].recorder.lrs[0]]
    assert list(dict.fromkeys(rows)) == list(dict.fromkeys(runs[0].recorder.lrs[0]))


class Stream:
    """A loader without a length."""

    def __init__(self, dl): self.dl = dl

    def __iter__(self): return iter(self.dl)


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("by", ["batch", "epoch"])
@pytest.mark.parametrize(("n", "k"), [(12, 3), (13, 4), (5, 9)])
def test_without_a_length_or_a_validation_the_last_group_steps_all_the_same(n, k, by, validates):
    learns = [learner(n, size, torch.float64) for size in (2 * k, 2)]
    learns[1].data.train_dl = Stream(learns[1].data.train_dl)
    if not validates:
        for learn in learns: learn.data.valid_dl = None
    Runner(GradientClip(0.5)).fit(3, learns[0])
    run = Runner([GradientAccumulation(k), GradientClip(0.5), TerminateOnNonFinite(), AveragedWeights(0.5, by=by)])
    run.fit(3, learns[1])
    assert_close(*learns)
    assert run.n_iter == 3 * math.ceil(n / (2 * k))
    assert run.averaged_weights.averaged_model.n_averaged == (run.n_iter if by == "batch" else 3)


def test_a_batch_of_several_tensors_is_weighed_by_its_first():
    class Splat(Callback):
        def predict(self): self.run.pred = self.model(self.xb["a"] + self.xb["b"])
    learns = [learner(13, size, torch.float64) for size in (6, 2)]
    for learn in learns:
        inner = learn.data.train_dl
        learn.data.train_dl = [({"a": x / 2, "b": x / 2}, y) for x, y in inner]
        learn.data.valid_dl = None
    Runner([Splat()]).fit(2, learns[0])
    Runner([Splat(), GradientAccumulation(3)]).fit(2, learns[1])
    assert_close(*learns)


class Says(Callback):
    """Raises at some batches, counted over the fit, and writes down after which the optimizer stepped."""

    def __init__(self, event="begin_batch", at=(), what=CancelBatchException):
        self.event, self.at, self.what, self.batch, self.steps = event, at, what, 0, []

    def __call__(self, event):
        if event == "after_step": self.steps.append(self.batch)
        if event == self.event and self.run.in_train and self.batch in self.at: raise self.what()
        if event == "after_batch" and self.run.in_train: self.batch += 1


def grads_by_hand(learn, order, clip=math.inf):
    """Step once for each group of `order`, lists of numbers of batches, weighed by images; averages of the weights."""
    batches = list(learn.data.train_dl)
    averages = AveragedModel(learn.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for group in order:
        total = sum(len(batches[i][0]) for i in group)
        for i in group:
            xb, yb = batches[i]
            (learn.loss_func(learn.model(xb), yb) * (len(xb) / total)).backward()
        nn.utils.clip_grad_norm_(learn.model.parameters(), clip)
        learn.opt.step()
        learn.opt.zero_grad()
        averages.update_parameters(learn.model)
    return averages


@pytest.mark.parametrize(("event", "at", "what", "groups", "steps"), [
    ("begin_batch", (1,), CancelBatchException, [(0, 2, 3), (4, 5)], [3, 5]),
    ("after_loss", (2, 3), CancelBatchException, [(0, 1, 4), (5,)], [4, 5]),
    ("after_backward", (1,), CancelBatchException, [(0, 1, 2), (3, 4, 5)], [2, 5]),
    ("after_backward", (2,), CancelBatchException, [(0, 1, 2, 3), (4, 5)], [3, 5]),     # a group of one more
    ("begin_batch", (5,), CancelBatchException, [(0, 1, 2), (3, 4)], [2, 6]),           # before validation
    ("after_backward", (5,), CancelBatchException, [(0, 1, 2), (3, 4, 5)], [2, 6]),
    ("after_backward", (4,), CancelEpochException, [(0, 1, 2), (3, 4)], [2, 5]),
    ("begin_batch", (3,), CancelEpochException, [(0, 1, 2)], [2]),
    ("after_step", (2,), CancelBatchException, [(0, 1, 2), (3, 4, 5)], [2, 5]),
    ("after_step", (2,), CancelEpochException, [(0, 1, 2)], [2]),
])
def test_cancelled_batches_and_epochs(event, at, what, groups, steps):
    learn, twin, says = learner(11, 2, torch.float64), learner(11, 2, torch.float64), Says(event, at, what)
    run = Runner([GradientAccumulation(3), says])
    run.fit(1, learn)
    grads_by_hand(twin, groups)
    assert_close(learn, twin)
    assert says.steps == steps
    assert run.n_iter == len(groups)
    assert all(p.grad is None for p in learn.model.parameters())


class Cancels(Callback):
    def __init__(self, at, order): self.at, self._order, self.batch = at, order, 0

    def __call__(self, event):
        if not self.run.in_train: return
        if self.at.get(self.batch) == event: raise CancelBatchException
        if event == "after_batch": self.batch += 1


@pytest.mark.parametrize("seed", range(20))
def test_any_batches_cancelled_in_any_way(seed, capsys):
    """float64, which autocast leaves alone: the scale is there and changes nothing."""
    rng = random.Random(seed)
    k, n, bs, clip = rng.randint(1, 5), rng.randint(8, 30), rng.randint(1, 4), rng.choice([0.3, math.inf])
    batches, longer = -(-n // bs), rng.random() < 0.4
    at = {i: rng.choice(["begin_batch", "after_pred", "after_loss", "after_backward"])
          for i in range(batches) if rng.random() < 0.3}
    iters, groups, waiting = batches + 3 * longer, [], []
    for i in range(batches):
        if not waiting: size = min(k, iters - i)
        if at.get(i, "after_backward") == "after_backward": waiting.append(i)
        if i not in at and (len(waiting) >= size or i + 1 == iters): groups, waiting = [*groups, waiting], []
    if waiting: groups.append(waiting)
    learn, twin = learner(n, bs, torch.float64), learner(n, bs, torch.float64)
    if longer: learn.data.train_dl = Longer(learn.data.train_dl)
    cbs = [Cancels(at, rng.choice([-14, 0, 300])), GradientAccumulation(k), GradientClip(clip), TerminateOnNonFinite(),
           AveragedWeights(0.5), *[MixedPrecision("fp16", growth_interval=2)] * rng.randint(0, 1)]
    rng.shuffle(cbs)
    run = Runner(cbs)
    run.fit(1, learn)
    averages = grads_by_hand(twin, groups, clip)
    assert_close(learn, twin)
    for p, q in zip(averages.module.parameters(), run.averaged_weights.averaged_model.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert (run.n_iter, len(run.gradient_clip.norms)) == (len(groups), len(groups))


@pytest.mark.parametrize("what", [CancelTrainException, KeyError])
@pytest.mark.parametrize("event", ["after_backward", "begin_batch", "after_batch"])
def test_gradients_that_wait_are_dropped_when_the_fit_ends(what, event):
    learn, run = learner(dtype=torch.float64), Runner([GradientAccumulation(4), says := Says(event, (2,), what)])
    before = copy.deepcopy(learn.model.state_dict())
    if what is KeyError:
        with pytest.raises(KeyError): run.fit(1, learn)
    else: run.fit(1, learn)
    for p, q in zip(weights(learn), before.values(), strict=True): assert torch.equal(p, q)
    assert all(p.grad is None for p in learn.model.parameters())
    says.at, twin, learn.data = (), learner(dtype=torch.float64), learner(dtype=torch.float64).data
    run.fit(1, learn)                                           # nothing of it is left
    Runner(GradientAccumulation(4)).fit(1, twin)
    assert run.n_iter == 2
    assert_close(learn, twin)


@pytest.mark.parametrize("skip", ["begin_epoch", "begin_validate"])
def test_a_pass_that_is_skipped(skip):
    class Skips(Callback): pass
    setattr(Skips, skip, lambda self: True)
    learn, run = learner(10, 2, torch.float64), Runner([GradientAccumulation(3), Skips()])
    run.fit(2, learn)
    assert run.n_iter == (0 if skip == "begin_epoch" else 4)


class Sees(Callback):
    """What a callback sees in each batch."""

    _order = 200

    def __init__(self): self.seen, self.steps = [], []

    def after_step(self): self.steps.append(self.run.n_iter)

    def after_backward(self): self.seen.append((self.loss.item(), self.n_epochs))


def test_what_others_see():
    learn, run = learner(12, 2), Runner([GradientAccumulation(4), sees := Sees(), Recorder()])
    run.fit(1, learn)
    assert [loss for loss, _ in sees.seen] == run.recorder.losses
    assert [at for _, at in sees.seen] == [0.0] * 4 + [0.5] * 2
    assert sees.steps == [0, 1]
    assert run.n_epochs == 1.0
    batches, model = list(learner(12, 2).data.train_dl), network()
    assert run.recorder.losses[:4] == [F.cross_entropy(model(x), y).item() for x, y in batches[:4]]


@pytest.mark.parametrize(("n", "epochs", "steps"), [(60, 1, 8), (12, 3, 6), (10, 3, 6)])
def test_the_rate_finder_counts_steps(n, epochs, steps):
    learn, twin = learner(n, 2), learner(n, 2)
    finder = LR_Find(max_iter=8, min_lr=1e-4, max_lr=1e-2)
    run = Runner(GradientAccumulation(4))
    run.fit(epochs, learn, cbs=finder)
    assert len(set(finder.lrs)) == steps
    assert list(dict.fromkeys(finder.lrs)) == pytest.approx([1e-4 * 100 ** (i / (steps - 1)) for i in range(steps)])
    assert finder.lrs == sorted(finder.lrs)
    run.fit(1, learn)
    Runner(GradientAccumulation(4)).fit(1, twin)
    assert_same(learn, twin)


@pytest.mark.parametrize("batches", [0, -1, 2.0, True, None])
def test_accumulation_refuses_other_numbers(batches):
    with pytest.raises(ValueError, match=rf"GradientAccumulation: batches is {batches!r}; it must be an integer of "):
        GradientAccumulation(batches)
    with pytest.raises(ValueError, match="reduction is 'none'; it must be 'mean' or 'sum'"):
        GradientAccumulation(2, "none")


# --- mixed precision ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("dtype", "result"), [
    (torch.bfloat16, torch.bfloat16), ("bf16", torch.bfloat16), ("bf16-mixed", torch.bfloat16),
    (torch.float16, torch.float16), ("fp16", torch.float16), ("16-mixed", torch.float16)])
def test_predictions_are_in_the_lower_precision_and_all_else_is_not(dtype, result):
    class Looks(Callback):
        def after_loss(self): found.append((self.in_train, self.pred.dtype, self.loss.dtype))

        def after_step(self): found.append({p.grad.dtype for p in self.model.parameters()})
    found, run = [], Runner([Looks(), MixedPrecision(dtype)])
    run.fit(1, learner(2))
    assert found == [(True, result, torch.float32), {torch.float32}, (False, result, torch.float32)]


def test_the_loss_too_is_under_autocast():
    learn, kinds = learner(2), []

    def loss(pred, yb):
        kinds.append((pred @ pred.float().T).dtype)
        return F.cross_entropy(pred, yb)
    learn.loss_func = loss
    Runner(MixedPrecision()).fit(1, learn)
    assert kinds == [torch.bfloat16] * 2


class Poison(Callback):
    """Puts a value into a gradient at some batches."""

    def __init__(self, at, value=math.inf): self.at, self.value, self.batch = at, value, 0

    def after_backward(self):
        if self.batch in self.at: next(self.model.parameters()).grad.view(-1)[0] = self.value
        self.batch += 1


def test_a_skipped_step_is_none_and_is_told(capsys):
    learn, twin, sees = learner(12), learner(12), Sees()
    run = Runner([Poison((1, 4)), MixedPrecision(torch.float16, init_scale=1024.0), sees])
    run.fit(1, learn)
    assert (run.n_iter, sees.steps) == (4, [0, 1, 2, 3])
    assert (run.mixed_precision.skipped, run.mixed_precision.skipped_steps) == (2, [1, 3])
    assert run.mixed_precision.scale == 256.0
    assert capsys.readouterr().out == ("MixedPrecision: 2 steps were skipped because of gradients that are not finite, "
                                       "4 done; the scale is 256\n")
    run.mixed_precision.verbose = False
    run.fit(1, twin)                                            # the next fit counts anew and keeps the scale
    assert (run.mixed_precision.skipped, run.mixed_precision.scale) == (0, 256.0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d, lambda nf: RunningBatchNorm(nf, average_backward=True)],
                         ids=["none", "batch", "averaged"])
def test_a_scale_that_changes_changes_no_bit(k, norm):
    """float64 is left alone by autocast, and a scale is a power of two: any difference is a fault of the scaling."""
    learns = [learner(24, 4, torch.float64, norm) for _ in range(2)]
    Runner([GradientAccumulation(k), GradientClip(1.0)]).fit(2, learns[0])
    run = Runner([MixedPrecision(torch.float16, growth_interval=2), GradientAccumulation(k), GradientClip(1.0)])
    run.fit(2, learns[1])
    assert run.mixed_precision.scale > 2.0 ** 16
    assert_same(*learns)


def averaged(nf): return RunningBatchNorm(nf, average_backward=True)


def test_a_norm_that_model_and_loss_share_follows_once():
    class Loss(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, pred, yb): return F.cross_entropy(pred, yb) + self.norm.weight.square().sum()
    learns = [learner(24, 4, torch.float64, averaged) for _ in range(2)]
    for learn in learns: learn.loss_func = Loss(learn.model[1])
    Runner().fit(2, learns[0])
    Runner(MixedPrecision("fp16", growth_interval=3)).fit(2, learns[1])
    assert_same(*learns)


def test_averages_of_gradients_are_those_of_the_loss_whatever_it_is_divided_by():
    learns = [learner(24, 4, torch.float64, averaged, lr=0.0) for _ in range(2)]
    Runner().fit(2, learns[0])
    Runner([GradientAccumulation(3)]).fit(2, learns[1])
    assert learns[0].model[1].grad_mean.abs().max() > 0
    assert_close(*learns)


def test_averages_of_gradients_in_float16_are_those_of_float32(capsys):
    learns = [learner(240, 4, torch.float32, averaged, lr=0.01) for _ in range(2)]
    Runner().fit(1, learns[0])
    run = Runner([MixedPrecision(torch.float16, init_scale=2.0 ** 10, growth_interval=10)])
    run.fit(1, learns[1])
    assert (run.mixed_precision.skipped, run.mixed_precision.scale) == (0, 2.0 ** 16)
    for name in ("grad_mean", "grad_dot"):
        one, two = (getattr(learn.model[1], name) for learn in learns)
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05 * one.abs().max().item())


def test_a_state_goes_on_as_if_nothing_had_been(capsys):
    learns = [learner(24) for _ in range(2)]
    amp = MixedPrecision("fp16", init_scale=2.0 ** 17, growth_interval=5)
    for _ in range(2): Runner(amp).fit(1, learns[0])
    first = MixedPrecision("fp16", init_scale=2.0 ** 17, growth_interval=5)
    Runner(first).fit(1, learns[1])
    second = MixedPrecision("fp16")
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    Runner(second).fit(1, learns[1])
    assert_same(*learns)
    assert amp.state_dict() == second.state_dict()
    assert amp.state_dict()["scaler"] == amp.scaler.state_dict()
    second = MixedPrecision("fp16")
    second.load_state_dict(amp.scaler.state_dict())         # a scaler's own
    assert (second.scale, second.skipped_steps) == (amp.scale, [])
    assert MixedPrecision("bf16").state_dict() == {"scaler": None, "skipped_steps": []}
    for state in ({}, MixedPrecision("bf16").state_dict()): MixedPrecision("bf16").load_state_dict(state)
    with pytest.raises(ValueError, match=r"a state with a scale, and the dtype here is torch.bfloat16; make it with"):
        MixedPrecision("bf16").load_state_dict(amp.state_dict())


def test_mixed_precision_refuses():
    with pytest.raises(ValueError, match=r"dtype is torch.float32; it must be torch.bfloat16 or torch.float16, or one "
                                         r"of 'bfloat16', 'bf16'"):
        MixedPrecision(torch.float32)
    with pytest.raises(ValueError, match="dtype is 'half'; it must be"): MixedPrecision("half")
    for name, value in {"init_scale": 0, "growth_factor": 1.0, "backoff_factor": 1, "growth_interval": 0}.items():
        with pytest.raises(ValueError, match=f"MixedPrecision: {name} is {value!r}; it must be "):
            MixedPrecision("fp16", **{name: value})
    learn = make_learn(model=network().half())
    with pytest.raises(ValueError, match=r"4 of 4 parameters are float16; .* call model.float\(\) before the optim"):
        Runner(MixedPrecision("fp16")).fit(1, learn)


def test_a_parameterless_step_is_no_concern_of_the_scaler():
    learn = learner(2)
    learn.opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    run = Runner(MixedPrecision("fp16"))
    with pytest.warns(UserWarning, match="no parameter of the model"): run.fit(1, learn)
    assert (run.n_iter, run.mixed_precision.skipped) == (1, 0)


@pytest.mark.parametrize("k", [1, 2])
def test_a_cancel_within_the_step_leaves_no_gradients(k, capsys):
    class Cancels(Callback):
        calls = 0

        def step(self, inner):
            self.calls += 1
            if self.calls == 2: raise CancelBatchException
            inner()
    run = Runner([Cancels(), MixedPrecision("fp16"), GradientAccumulation(k)])
    run.fit(1, learner(12))
    assert (run.n_iter, run.mixed_precision.skipped) == (6 // k - 1, 0)


# --- with TerminateOnNonFinite ------------------------------------------------------------------------------------

def test_an_infinite_scaled_gradient_does_not_end_the_fit_and_a_loss_does(capsys):
    run = Runner([MixedPrecision("fp16", init_scale=2.0 ** 30), GradientClip(1.0), TerminateOnNonFinite()])
    run.fit(8, learner(12))
    assert run.status == "ok"
    assert run.mixed_precision.skipped > 3
    learn = learner(12)
    learn.data.train_dl.dataset.x[3] = math.nan
    run.fit(1, learn)
    assert run.status == "diverged"
    assert "in the batch" in run.terminate_on_non_finite.record["report"]


def test_a_gradient_that_is_never_finite_ends_the_fit_either_way(capsys):
    class Root(nn.Module):
        def forward(self, x): return x.abs().sqrt()

    def bad():
        learn = learner(96)
        learn.model.append(nn.Sequential(Root(), Root()))
        with torch.no_grad(): learn.model[2].weight.zero_(), learn.model[2].bias.zero_()
        return learn
    run = Runner([MixedPrecision("fp16", init_scale=256.0), TerminateOnNonFinite()])
    run.fit(1, bad())
    assert run.status == "diverged"
    assert run.mixed_precision.scale == 2.0 ** -24
    assert run.terminate_on_non_finite.record["finding"]["phase"] == "backward"
    run = Runner([MixedPrecision("fp16", init_scale=256.0)])
    with pytest.raises(FloatingPointError, match=r"skipped 33 steps and scales by 3.0e-08 now, and there is still a"):
        run.fit(1, bad())
    assert run.status == "failed"


class Far(TerminateOnNonFinite):
    """As on another device: losses and norms are looked at every few batches only."""

    name = "terminate_on_non_finite"

    def begin_fit(self):
        super().begin_fit()
        self.host = False


ALL = {"bf16": lambda: [MixedPrecision()], "fp16": lambda: [MixedPrecision("fp16", init_scale=2.0 ** 18)],
       "clip": lambda: [GradientClip(0.1)], "accumulation": lambda: [GradientAccumulation(3)],
       "all": lambda: [GradientAccumulation(3), MixedPrecision("fp16", init_scale=2.0 ** 18), GradientClip(0.1)]}


@pytest.mark.parametrize("cbs", ALL)
@pytest.mark.parametrize("watch", [TerminateOnNonFinite, lambda: Far(every=1)], ids=["near", "far"])
def test_what_is_repeated_is_what_was_done(cbs, watch, capsys):
    """At a CPU's failing step, and anywhere if each step's start is kept; also from the record alone."""
    def spoilt():
        learn = learner(60, lr=0.01)
        learn.data.train_dl.dataset.x[7] = math.nan
        return learn
    run = Runner([*ALL[cbs](), watch()])
    run.fit(1, spoilt())
    record = run.terminate_on_non_finite.record
    assert (run.status, record["repeats"]) == ("diverged", True)
    assert record["finding"]["phase"] == "batch"
    assert record["autocast"] == {"bf16": "bfloat16", "fp16": "float16", "all": "float16"}.get(cbs)
    assert replay(record, spoilt()).same


@pytest.mark.parametrize("flushed", [False, True])
def test_an_accumulated_step_that_spoils_the_weights_is_found(flushed, capsys):
    learn = learner(10, lr=1e38)
    if flushed: learn.data.train_dl = Longer(learn.data.train_dl)
    run = Runner([GradientAccumulation(5), TerminateOnNonFinite()])
    run.fit(2, learn)
    assert run.status == "diverged"


# --- clipping -----------------------------------------------------------------------------------------------------

def given(*grads):
    """A learner whose gradients are these, batch by batch."""
    w, steps = nn.Parameter(torch.zeros(2)), iter([torch.tensor(g) for g in grads])
    model = nn.Module()
    model.register_parameter("w", w)
    model.forward = lambda xb: w @ xb[0]
    data = DataBunch([(g[None], None) for g in steps], [])
    return Learner(model, torch.optim.SGD([w], lr=1.0), lambda pred, yb: pred, data)


class NoValidation(Callback):
    def begin_validate(self): return True


@pytest.mark.parametrize(("limits", "w", "norms", "clipped"), [
    ({"max_norm": 1.0}, [-0.9, -0.8], [5.0, 0.3], [True, False]),
    ({"max_norm": 1.0, "norm_type": 1}, [-3 / 7 - 0.3, -4 / 7], [7.0, 0.3], [True, False]),
    ({"max_norm": 2.0, "norm_type": math.inf}, [-1.5 - 0.3, -2.0], [4.0, 0.3], [True, False]),
    ({"max_norm": math.inf}, [-3.3, -4.0], [5.0, 0.3], [False, False]),
    ({"max_value": 3.5}, [-3.3, -3.5], [4.0, 0.3], [True, False]),
    ({"max_value": 0.1}, [-0.2, -0.1], [4.0, 0.3], [True, True]),
])
def test_clipping_by_numbers(limits, w, norms, clipped):
    learn, clip = given([3.0, 4.0], [0.3, 0.0]), GradientClip(**limits)
    Runner([clip, NoValidation()]).fit(1, learn)
    assert learn.model.w.tolist() == pytest.approx(w, abs=1e-6)
    assert clip.norms == pytest.approx(norms)
    assert clip.rows["step", "clipped"] == [(0, clipped[0]), (1, clipped[1])]
    assert clip.share == sum(clipped) / 2


def test_clipping_keeps_its_record_on_the_device_within_a_pass_and_for_one_fit():
    class Looks(Callback):
        def after_batch(self):
            if self.in_train: found.append((len(self.run.gradient_clip._waiting), len(self.run.gradient_clip._norms)))
    found, clip = [], GradientClip(1.0)
    run = Runner([clip, Looks()])
    assert math.isnan(clip.share)
    run.fit(2, learner(6))
    assert found == [(1, 0), (2, 0), (3, 0), (1, 3), (2, 3), (3, 3)]
    assert clip.rows["epoch"] == [0, 0, 0, 1, 1, 1]
    run.fit(1, learner(6))
    assert len(clip.norms) == 3
    assert pickle.loads(pickle.dumps(clip.norms)) == copy.deepcopy(clip).norms


@pytest.mark.parametrize("args", [{}, {"max_norm": 1.0, "max_value": 1.0}])
def test_clipping_needs_one_limit(args):
    with pytest.raises(ValueError, match=r"GradientClip got max_norm=.* and max_value=.*; it needs one of the two,"):
        GradientClip(**args)


@pytest.mark.parametrize("args", [{"max_norm": 0.0}, {"max_norm": -1}, {"max_value": math.nan}, {"max_norm": True},
                                  {"max_norm": "1"}, {"max_norm": 1.0, "norm_type": 0}])
def test_clipping_refuses_limits_that_are_none(args):
    with pytest.raises(ValueError, match=r"GradientClip: \w+ is .*; it must be a positive number, such as 1.0"):
        GradientClip(**args)


def test_frozen_parameters_and_several_groups_are_clipped_as_one():
    learns = [learner(4) for _ in range(2)]
    for learn in learns:
        learn.model[0].bias.requires_grad_(False)
        learn.opt = torch.optim.SGD([{"params": learn.model[0].parameters()},
                                     {"params": learn.model[2].parameters(), "lr": 0.5}], lr=0.1)
    norms = by_hand_frozen(learns[0])
    run = Runner(GradientClip(0.5))
    run.fit(1, learns[1])
    assert_same(*learns)
    assert run.gradient_clip.norms == norms


def by_hand_frozen(learn):
    norms = []
    for xb, yb in learn.data.train_dl:
        learn.loss_func(learn.model(xb), yb).backward()
        norms.append(nn.utils.clip_grad_norm_(learn.model.parameters(), 0.5).item())
        learn.opt.step()
        learn.opt.zero_grad()
    return norms


def test_parameter_stats_see_what_the_optimizer_gets():
    found, stats = [], ParameterStats("0.weight", verbose=False)

    class Looks(Callback):
        _order = 1000

        def step(self, inner):
            found.append(self.model[0].weight.grad.std().item())
            inner()
    run = Runner([stats, Looks(), GradientAccumulation(3), MixedPrecision("fp16"), GradientClip(0.1)])
    run.fit(1, learner(12))
    steps, stds = stats.series("0.weight", "std")
    assert steps == [0, 1]
    assert stds == pytest.approx(found)
    assert max(stds) < 0.1


# --- with compile=True --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("n", "k"), [(12, 3), (13, 3), (10, 4)])
def test_compiled_accumulation_and_clipping_are_the_same(n, k, traced):
    learns, runs = [learner(n, 2, torch.float64) for _ in range(2)], []
    for learn, compiled in zip(learns, (False, True), strict=True):
        cbs = [GradientAccumulation(k), GradientClip(0.5), TerminateOnNonFinite()]
        runs.append(Runner(cbs, compile=compiled))
        runs[-1].fit(2, learn)
    assert_close(*learns, rtol=1e-10)
    assert runs[0].gradient_clip.norms == pytest.approx(runs[1].gradient_clip.norms, rel=1e-10)
    assert runs[1].compiled_step.divisor == 1.0


def test_compiled_bfloat16_is_bfloat16(traced):
    learns = [learner(12, 2, lr=0.01) for _ in range(2)]
    losses = []
    for learn, compiled in zip(learns, (False, True), strict=True):
        run = Runner([MixedPrecision(), GradientAccumulation(2), GradientClip(1.0), Recorder()], compile=compiled)
        run.fit(2, learn)
        losses.append(run.recorder.losses)
    plain = learner(12, 2, lr=0.01)
    run = Runner([GradientAccumulation(2), GradientClip(1.0), Recorder()])
    run.fit(2, plain)
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    assert max(abs(a - b) for a, b in zip(losses[1], run.recorder.losses, strict=True)) > 1e-4
    assert_close(*learns, rtol=2e-4)


def test_compiled_float16_is_refused_and_the_runner_goes_on(traced):
    run, learn = Runner(compile=True), learner()
    with pytest.raises(CompileError, match=r"MixedPrecision\(torch.float16\) scales the loss before the backward pass, "
                                           r".* use torch.bfloat16, or fit without compile=True"):
        run.fit(1, learn, cbs=MixedPrecision("fp16"))
    run.fit(1, learn, cbs=MixedPrecision("bf16"))
    assert run.status == "ok"


@pytest.mark.parametrize("cb", [lambda: GradientAccumulation(2), MixedPrecision, lambda: GradientClip(1.0)])
def test_a_loop_without_steps_is_refused(cb):
    with pytest.raises(TypeError, match=r"wraps steps of runner.Runner, and OwnRunner has none; fit with a Runner, "):
        OwnRunner([cb()]).fit(1, learner())


# --- copies -------------------------------------------------------------------------------------------------------

def test_all_can_be_copied_between_fits_and_explained(capsys):
    run, learn = Runner([GradientAccumulation(2), MixedPrecision("fp16"), GradientClip(1.0)]), learner()
    run.fit(1, learn)
    twin, other = copy.deepcopy((run, learn))
    run.fit(1, learn)
    twin.fit(1, other)
    assert_same(learn, other)
    run.explain()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "opt.step() step: GradientAccumulation, MixedPrecision, GradientClip".split() in lines
