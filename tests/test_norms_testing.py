"""`check_norm` on the project's norms, torch's, the published RunningBatchNorm, and norms broken in one way each."""

import math
import threading

import pytest
import torch
from old_running import OldRunningBatchNorm
from reference import LiteralRunningBatchNorm
from torch import nn

from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm
from norms.moments import HALF
from norms.rivals import (
    MABN,
    BatchChannelNorm,
    BatchRenorm,
    EvoNormS0,
    FilterResponseNorm,
    MomentumBatchNorm,
    RunningChannelNorm,
)
from norms.testing import CHECKS, check_norm


def named(words):
    """The checks whose names contain the `words`, a check each."""
    found = {w: [name for name in CHECKS if w in name] for w in words}
    assert all(len(names) == 1 for names in found.values()), found
    return {names[0] for names in found.values()}


def names(report, status): return {r.name for r in report.results if r.status == status}


def found_are(report, texts):
    """Assert that just the checks named by the keys of `texts` fail, each with the text in its message."""
    assert names(report, "FAIL") == named(texts), report
    for words, text in texts.items():
        (name,) = named([words])
        assert text in report.failed[name], (name, report.failed[name])


class AnyBatchNorm(nn.BatchNorm2d):
    """torch's batch norm for 2 to 5 axes."""

    def _check_input_dim(self, x): pass


STATELESS = {"buffers as inputs", "statistics wide", "written in place", "buffers may change", "empty batch"}
REPEATED = {"counts a batch once", "batch that is not finite", "batch twice", "20 batches", "within activation"}
# norm, arguments of check_norm, the checks that fail, the checks that aren't for this norm
NORMS = {
    "running": (RunningBatchNorm, {"reference": LiteralRunningBatchNorm}, set(), set()),
    "running per image": (lambda nf: RunningBatchNorm(nf, rule="per_image"),
                          {"reference": lambda nf: LiteralRunningBatchNorm(nf, rule="per_image")},
                          set(), set()),
    "batch": (BatchNorm, {"reference": AnyBatchNorm}, set(), set()),
    "running, averaged backward": (lambda nf: RunningBatchNorm(nf, average_backward=True), {},
                                   # its backward is no gradient, and has a state of its own
                                   {"numeric derivative", "deepcopy", "two forwards", "buffers as inputs",
                                    "buffers may change", "backward changes nothing"},
                                   {"the reference"}),
    "momentum": (lambda nf: MomentumBatchNorm(nf, steps=4), {}, set(), {"the reference"}),
    # its limits open, r and d are constants to the gradient, and a constant batch is moved
    "renorm": (lambda nf: BatchRenorm(nf, 0.5, begin=1, rmax_at=4, dmax_at=3), {},
               {"numeric derivative", "constant"}, {"the reference"}),
    "mabn": (lambda nf: MABN(nf, window=3, warmup=0, r_from=0), {},
             # its backward is no gradient, and has a state of its own
             {"numeric derivative", "deepcopy", "two forwards", "buffers as inputs", "backward changes nothing"},
             {"the reference", "constant"}),
    "batch and group": (lambda nf: BatchChannelNorm(nf, 2),
                        {"reference": lambda nf: nn.Sequential(BatchNorm(nf, affine=False), GroupNorm(2, nf))}, set(),
                        {"not finite stays"}),
    "running and group": (lambda nf: RunningChannelNorm(nf, 2), {"reference": lambda nf: nn.Sequential(
        RunningBatchNorm(nf, affine=False), GroupNorm(2, nf))}, set(), {"not finite stays"}),
    "group": (lambda nf: GroupNorm(2, nf), {"reference": lambda nf: nn.GroupNorm(2, nf)}, set(), STATELESS),
    "group, many channels": (lambda nf: GroupNorm(8, nf), {"nf": 32}, set(), {"the reference", *STATELESS}),
    "group, no affine": (lambda nf: GroupNorm(2, nf, affine=False), {}, set(),
                         {"the reference", "current affine", "weights may change", *STATELESS}),
    "instance": (InstanceNorm, {"dims": (3, 4, 5)}, set(), {"the reference", *STATELESS}),
    "instance, torch's eps": (lambda nf: InstanceNorm(nf, eps=1e-5),
                              {"dims": [3, 4, 5], "reference": lambda nf: nn.InstanceNorm2d(nf, affine=True)}, set(),
                              STATELESS),
    "layer": (lambda nf: LayerNorm(), {}, set(), {"the reference", "wrong channel", *STATELESS}),
    "layer, trailing axes": (lambda nf: LayerNorm((nf, 5, 3)),
                             {"dims": (4,), "reference": lambda nf: nn.LayerNorm((nf, 5, 3))}, {"one element"},
                             STATELESS),
    "evonorm": (lambda nf: EvoNormS0(nf, 2), {}, set(), {"the reference", "constant", *STATELESS}),
    "filter response": (FilterResponseNorm, {}, set(), {"the reference", "constant", *STATELESS}),
    # torch takes empty batches, counts a batch in num_batches_tracked before it refuses it, counts a recomputed forward
    # again, and folds the mean into the shift.
    "torch batch 2d": (nn.BatchNorm2d, {"dims": (4,), "reference": BatchNorm},
                       {"one element", "empty batch", "wrong channel", "integer", "constant", "statistics wide",
                        "buffers may change", *REPEATED}, set()),
    "torch group": (lambda nf: nn.GroupNorm(2, nf), {}, {"integer", "constant"},
                    {"the reference", *STATELESS}),
}


@pytest.fixture
def no_graphs(monkeypatch):
    """Leave out what torch makes graphs of, which takes more than all else together: for tests of something else."""
    def leave_out():
        for name in [name for name in CHECKS if name.startswith(("torch.compile", "torch.export"))]:
            monkeypatch.delitem(CHECKS, name)
    return leave_out


@pytest.mark.parametrize("case", list(NORMS))
def test_what_holds_for_this_norm(case, kernels, no_graphs):
    # A graph has the definition by either route; some have no other.
    if kernels == "definition" and case not in ("mabn", "momentum", "renorm"): no_graphs()
    factory, kwargs, failing, other = NORMS[case]
    report = check_norm(factory, **kwargs)
    assert names(report, "FAIL") == named(failing), report
    assert names(report, "-") == named(other), report
    assert [r.name for r in report.results] == list(CHECKS)
    assert report.ok == bool(report) == (not failing)


class PublishedRunningBatchNorm(nn.Module):
    """The published norm by its formulas, with the averages in buffers that are written in place."""

    def __init__(self, nf, mom=0.1, eps=1e-5):
        super().__init__()
        self.mom, self.eps = mom, eps
        self.weight, self.bias = nn.Parameter(torch.ones(nf, 1, 1)), nn.Parameter(torch.zeros(nf, 1, 1))
        for k in ("sums", "sqrs"): self.register_buffer(k, torch.zeros(1, nf, 1, 1))
        for k in ("count", "dbias", "steps", "images"): self.register_buffer(k, torch.tensor(0.0))

    def forward(self, x):
        if self.training: self.update(x)
        sums, sqrs, count = self.sums, self.sqrs, self.count
        if self.steps < 100: sums, sqrs, count = sums / self.dbias, sqrs / self.dbias, count / self.dbias
        mean = sums / count
        var = sqrs / count - mean * mean
        if self.images < 20: var = var.clamp_min(0.01)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias

    def update(self, x):
        alpha = self.count.new_tensor(1 - (1 - self.mom) / math.sqrt(x.shape[0] - 1))
        self.sums.detach_().lerp_(x.sum((0, 2, 3), keepdim=True), alpha)
        self.sqrs.detach_().lerp_((x * x).sum((0, 2, 3), keepdim=True), alpha)
        self.count.lerp_(self.count.new_tensor(x.numel() / self.weight.numel()), alpha)
        self.dbias.lerp_(torch.ones_like(self.dbias), alpha)
        self.steps.add_(1)
        self.images.add_(x.shape[0])


def test_every_defect_of_the_published_norm_is_reported():
    report = check_norm(PublishedRunningBatchNorm, dims=(4,), reference=LiteralRunningBatchNorm)
    texts = {
        # known ones, and the digits lost by sqrs / count - mean^2
        "deepcopy": "Only Tensors created explicitly by the user",
        "before training": "the output is not finite",
        "two forwards": "modified by an inplace operation",
        "counts a batch once": "sums is off by",
        "keeps the gradient": "input's gradient is off by",
        "one image": "ZeroDivisionError",
        "one element": "ZeroDivisionError",
        "half-precision": "expected dtype",
        "autocast": "expected dtype",
        "large mean": "the output is off by",
        # found by check_norm
        "2-D": "refused in training by IndexError",
        "3-D": "refused in training by IndexError",
        "5-D": "a ValueError is due",
        "empty batch": "doesn't say what it got: ValueError: math domain error",
        "compiles once": "Unsupported",
        "wrong channel": "took an input of shape (4, 1, 5, 3)",
        "integer": "took an input of shape (4, 4, 5, 3) and torch.int64 in evaluation",
        "constant": "the output is off by",
        "statistics wide": "the buffer sums is torch.float16 in a norm cast to torch.float16",
        "torch.export": "The .grad attribute of a Tensor that is not a leaf",
        "buffers may change": "in training where buffers are written under no_grad before the backward",
        "second derivative": "not refused in evaluation, of a loss of power 1, by at_once, where backward() is",
        **dict.fromkeys(REPEATED - {"counts a batch once"}, "modified by an inplace operation"),
    }
    found_are(report, texts)


def test_every_defect_of_the_old_norm_is_reported():
    report = check_norm(OldRunningBatchNorm, reference=LiteralRunningBatchNorm)
    unknown = "none of its last 16 training batches is this one"
    found_are(report, {
        # its graph held the very tensors that were its buffers, and every step put others in their places
        "buffers may change": "in training where buffers are written under no_grad before the backward",
        "written in place": "the buffer running_mean is another tensor after a training step",
        "compiles once": "the buffer running_mean is another tensor after compiled steps in training",
        "inference_mode": "Inference tensors cannot be saved for backward",
        "torch.export": "running_mean, running_var, count, seen did not move in the exported program",
        # it knew a recomputed batch by its mean, among the last 16
        "batch that is not finite": "with a NaN in the second of three batches, use_reentrant=False: RunningBatchNorm "
                                  f"met a forward pass inside a backward pass and {unknown}",
        "batch twice": "the input's gradient of batch 1 is off by",
        "20 batches": unknown,
        "within activation": unknown,
        # x scale + (bias - mean scale), by torch's kernel
        "constant": "on the constant 1.1 in torch.float32",
        "statistics wide": "running_mean is torch.float16 after load_state_dict of torch.float16 with assign=True",
    })


def recomputing(): return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transformed(): return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class Sound(nn.Module):
    """A batch norm with nothing wrong, in pieces that the norms below replace."""

    eps = 1e-5

    def __init__(self, nf):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.register_buffer("mean", torch.zeros(nf))
        self.register_buffer("var", torch.ones(nf))

    def forward(self, x):
        self.check(x)
        mean, var = self.measure(self.widen(x)) if self.training else (self.mean, self.var)
        if self.training and not recomputing(): self.track(mean.detach(), var.detach())
        return self.scale(self.widen(x), mean, var).to(x.dtype)

    def check(self, x):
        if not x.is_floating_point(): raise TypeError(f"got {x.dtype}, needs floats")
        if x.ndim < 2: raise ValueError(f"got {x.ndim}-D input")
        if x.shape[1] != self.nf: raise ValueError(f"got {x.shape[1]} channels, needs {self.nf}")
        if x.numel() == 0: raise ValueError("got an empty batch")

    def widen(self, x): return x.to(torch.promote_types(x.dtype, torch.float32))

    def measure(self, x):
        dims, first = (0, *range(2, x.ndim)), x[(slice(1), slice(None), *[slice(1)] * (x.ndim - 2))].detach()
        mean = (x - first).mean(dims) + first.flatten()     # exact where all values are equal
        return mean, (x - self.view(mean, x)).square().mean(dims)

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._buffers.update({k: b for k, b in before.items() if self._buffers[k].dtype in HALF})
        return self

    def _load_from_state_dict(self, state_dict, *args):
        state_dict.update({k: v.float() for k, v in state_dict.items() if k in self._buffers and v.dtype in HALF})
        super()._load_from_state_dict(state_dict, *args)

    def track(self, mean, var):
        self.mean.lerp_(mean.to(self.mean.dtype), 0.1)
        self.var.lerp_(var.to(self.var.dtype), 0.1)

    def scale(self, x, mean, var):
        return self.normalise(x, mean, var) * self.view(self.weight, x) + self.view(self.bias, x)

    def normalise(self, x, mean, var): return (x - self.view(mean, x)) * self.view(torch.rsqrt(var + self.eps), x)

    @staticmethod
    def view(t, x): return t.view(1, -1, *[1] * (x.ndim - 2))


class BiasedBatchNorm(BatchNorm):
    """The project's, with the biased variance in the running average as `Sound` has it."""

    def track(self, mean, var, n): super().track(mean, var * (n - 1) / n, n)


def test_a_sound_norm_passes_everything():
    report = check_norm(Sound, reference=BiasedBatchNorm)
    assert names(report, "ok") == set(CHECKS)


class NoRank3(Sound):
    def check(self, x):
        super().check(x)
        if x.ndim == 3: raise NotImplementedError("only images")


class OtherEps(Sound): eps = 1e-3


class DetachedMean(Sound):
    def measure(self, x):
        mean, var = super().measure(x)
        return mean.detach(), var


class MisreadsChannelsLast(Sound):
    def widen(self, x):
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return super().widen(x.permute(0, 2, 3, 1).reshape(x.shape) if last and not x.is_contiguous() else x)


class ViewsMemory(Sound):
    def measure(self, x): return super().measure(x.view(*x.shape[:2], -1))


class WritesInput(Sound):
    def forward(self, x):
        y = super().forward(x)
        if not self.training: x.data.zero_()
        return y


class SquaresMinusSquare(Sound):
    def measure(self, x):
        dims = (0, *range(2, x.ndim))
        mean = x.mean(dims)
        return mean, x.square().mean(dims) - mean.square()


class NarrowFloat16(Sound):
    def widen(self, x): return x if x.dtype == torch.float16 else super().widen(x)


class CastsItsBuffers(Sound): _apply = nn.Module._apply


class LoadsHalfBuffers(Sound): _load_from_state_dict = nn.Module._load_from_state_dict


class NarrowBuffers(CastsItsBuffers):
    def track(self, mean, var):
        self.mean.lerp_(mean, 0.1)
        self.var.lerp_(var, 0.1)


class ReturnsFloat32(Sound):
    def forward(self, x): return self.widen(super().forward(x))


class MeanByMatmul(Sound):
    def measure(self, x):
        flat = x.movedim(1, 0).flatten(1)
        mean = (flat @ torch.ones(flat.shape[1], dtype=x.dtype) / flat.shape[1]).to(x.dtype)
        return mean, super().measure(x)[1]


class RefusesOneImage(Sound):
    def check(self, x):
        super().check(x)
        if x.shape[0] == 1 < x[:, 0].numel(): raise ValueError("one image is no batch")


class UnbiasedVariance(Sound):
    def measure(self, x):
        mean, var = super().measure(x)
        n = x.numel() / self.nf
        return mean, var * n / (n - 1) if n > 1 else var / 0


class FirstBatchSizeOnly(Sound):
    n = None

    def check(self, x):
        super().check(x)
        if torch.compiler.is_compiling(): return
        self.n = self.n or len(x)
        if self.training and self.n != len(x): raise RuntimeError("another batch size")


class TakesEmpty(Sound):
    def forward(self, x): return super().forward(x) if x.numel() else x.clone()


class HidesNaN(Sound):
    def widen(self, x): return super().widen(x).nan_to_num()


class RefusesNaN(Sound):
    def check(self, x):
        super().check(x)
        if not torch.compiler.is_compiling() and not x.isfinite().all(): raise ValueError("NaN")


class HoldsALock(Sound):
    def __init__(self, nf):
        super().__init__(nf)
        self.lock = threading.Lock()


class SharesBuffersWithCopy(Sound):
    def __deepcopy__(self, memo):
        twin = type(self)(self.nf)
        twin.load_state_dict(self.state_dict())
        twin.mean = self.mean
        return twin


class ForgetsItsVariance(Sound):
    def __init__(self, nf):
        super().__init__(nf)
        self.register_buffer("var", torch.ones(nf), persistent=False)


class DividesByZeroSteps(Sound):
    def __init__(self, nf):
        super().__init__(nf)
        self.mean.zero_(), self.var.zero_()
        self.register_buffer("total", torch.zeros(()))

    def track(self, mean, var):
        super().track(mean, var)
        self.total.lerp_(torch.ones_like(self.total), 0.1)

    def scale(self, x, mean, var):
        if not self.training: mean, var = mean / self.total, var / self.total
        return super().scale(x, mean, var)


class TracksInEvaluation(Sound):
    def forward(self, x):
        y = super().forward(x)
        if not self.training: self.track(*super().measure(self.widen(x.detach())))
        return y


class FreezesAffine(Sound):
    """Keeps the first evaluation's weights for the next ones; the gradient passes through."""

    kept = None

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def scale(self, x, mean, var):
        if self.training or torch.compiler.is_compiling(): return super().scale(x, mean, var)
        if self.kept is None: self.kept = self.weight.detach().clone()
        return super().scale(x, mean, var) * self.view(self.kept / self.weight.detach(), x)


class WarmsUpInPlace(Sound):
    """Its output grows with a buffer that autograd saves and the next step overwrites."""

    def __init__(self, nf):
        super().__init__(nf)
        self.register_buffer("warm", torch.tensor(0.5))

    def normalise(self, x, mean, var):
        if self.training and not recomputing(): self.warm.mul_(0.9).add_(0.1)
        return super().normalise(x, mean, var) * self.warm


class CountsInPython(Sound):
    def __init__(self, nf):
        super().__init__(nf)
        self.steps = 1.0

    def track(self, mean, var):
        self.steps = self.steps * 1.5
        self.mean.lerp_(mean.to(self.mean.dtype), 1 / self.steps)

    def get_extra_state(self): return self.steps

    def set_extra_state(self, steps): self.steps = steps


class BreaksTheGraph(Sound):
    def check(self, x):
        super().check(x)
        if self.mean.sum().item() == 1e10: raise ValueError("diverged")


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, g): return g


class NeedsOldFunction(Sound):
    def scale(self, x, mean, var): return OldFunction.apply(super().scale(x, mean, var))


class NeedsOldFunctionInTraining(Sound):
    def scale(self, x, mean, var):
        y = super().scale(x, mean, var)
        return OldFunction.apply(y) if self.training else y


class CountsRecomputed(Sound):
    def check(self, x):
        super().check(x)
        if recomputing(): self.mean.mul_(0.9)


class ScalesByThePast(Sound):
    """Divides by the variance before this batch, which a recomputed forward finds changed."""

    def measure(self, x): return super().measure(x)[0], self.var.clone()

    def track(self, mean, var):
        self.mean.lerp_(mean.to(self.mean.dtype), 0.1)
        self.var.mul_(0.9)


class Times(torch.autograd.Function):
    """x times t, which keeps what it got where autograd doesn't look."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, t): return x * t

    @staticmethod
    def setup_context(ctx, inputs, output): ctx.held = inputs

    @staticmethod
    def backward(ctx, g):
        x, t = ctx.held
        return g * t, (g * x).sum_to_size(t.shape)


class HoldsABuffer(Sound):
    def __init__(self, nf):
        super().__init__(nf)
        self.register_buffer("gain", torch.tensor(1.5))

    def normalise(self, x, mean, var): return Times.apply(super().normalise(x, mean, var), self.gain)


class HoldsItsWeight(Sound):
    def scale(self, x, mean, var):
        return Times.apply(self.normalise(x, mean, var), self.view(self.weight, x)) + self.view(self.bias, x)


class Cubed(torch.autograd.Function):
    """x^3 by a backward that takes the saved x to lie in memory as it did."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x): return x ** 3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.strides = inputs[0].stride()
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x.as_strided(x.shape, ctx.strides) ** 2 * g


class TrustsTheLayout(Sound):
    def widen(self, x):
        x = super().widen(x)
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last): return x
        return x + 1e-2 * (Cubed.apply(x) - x ** 3)


class CountsBackwards(Sound):
    def __init__(self, nf):
        super().__init__(nf)
        self.register_buffer("backwards", torch.tensor(0), persistent=False)

    def scale(self, x, mean, var):
        y = super().scale(x, mean, var)
        if self.training and y.requires_grad and not transformed():
            y.register_hook(self.count)
        return y

    def count(self, g): self.backwards.add_(1)


class ReplacesBuffers(Sound):
    def track(self, mean, var):
        self.mean = self.mean.lerp(mean.to(self.mean.dtype), 0.1)
        self.var = self.var.lerp(var.to(self.var.dtype), 0.1)


class SkipsLayouts(Sound):
    def forward(self, x):
        self.packed = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        return super().forward(x)

    def track(self, mean, var):
        if self.packed: super().track(mean, var)


class SetsUpLate(Sound):
    ones = None

    def scale(self, x, mean, var):
        if torch.compiler.is_compiling(): return super().scale(x, mean, var)
        if self.ones is None: self.ones = torch.ones_like(mean, requires_grad=False)
        return super().scale(x, mean, var) * self.view(self.ones, x)


class StillInExport(Sound):
    def track(self, mean, var):
        if not torch.compiler.is_exporting(): super().track(mean, var)


class RefusesRepeatedNaN(Sound):
    def check(self, x):
        super().check(x)
        if recomputing() and x.isnan().any(): raise RuntimeError("no batch that I know")


class RecallsByValue(Sound):
    """Its output grows with every step, and a recomputed forward looks up by the batch's mean how far it was."""

    kept, forgets = None, False

    def __init__(self, nf):
        super().__init__(nf)
        self.register_buffer("gain", torch.tensor(1.0))
        self.memory = {}

    def normalise(self, x, mean, var):
        if not self.training: return super().normalise(x, mean, var)
        if transformed(): gain = self.gain.clone()
        elif recomputing():
            gain = self.memory[self.key(mean)]
            if self.forgets: del self.memory[self.key(mean)]
        else:
            gain = self.memory[self.key(mean)] = self.gain.clone()
            for old in list(self.memory)[:-self.kept] if self.kept else (): del self.memory[old]
        if not recomputing(): self.gain.mul_(0.9).add_(0.2)
        return super().normalise(x, mean, var) * gain

    def key(self, mean): return str(mean.tolist())


class RecallsSixteen(RecallsByValue): kept = 16


class ForgetsWhatItRecalled(RecallsByValue): forgets = True


class PlainMean(Sound):
    def measure(self, x):
        dims = (0, *range(2, x.ndim))
        mean = x.mean(dims)
        return mean, (x - self.view(mean, x)).square().mean(dims)


class SpreadsNaN(Sound):
    def scale(self, x, mean, var): return super().scale(x, mean, var) + 0 * x.detach().sum()


class TakesAnyChannels(Sound):
    def check(self, x):
        if not x.is_floating_point() or x.numel() == 0 or x.ndim < 2: super().check(x)


class CountsRefused(Sound):
    def __init__(self, nf):
        super().__init__(nf)
        self.register_buffer("batches", torch.tensor(0))

    def check(self, x):
        if self.training and not recomputing(): self.batches.add_(1)
        super().check(x)


class TakesIntegers(Sound):
    def check(self, x): super().check(x.float() if not x.is_floating_point() else x)

    def forward(self, x): return super().forward(x) if x.is_floating_point() else super().forward(x.float())


class MumblesAboutIntegers(Sound):
    def check(self, x):
        if not x.is_floating_point(): raise TypeError("wrong input")
        super().check(x)


class TimesOnce(torch.autograd.Function):
    """x s, with s `(1, C, 1, ...)`; by torch's way to refuse a second derivative."""

    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, s = ctx.saved_tensors
        return g * s, (g * x).sum_to_size(s.shape)


class LosesPenalties(Sound):
    def normalise(self, x, mean, var):
        if transformed(): return super().normalise(x, mean, var)
        return TimesOnce.apply(x - self.view(mean, x), self.view(torch.rsqrt(var + self.eps), x))


# the norm, the only checks that fail, and words of the first one's message
BROKEN = [
    (NoRank3, ["3-D input", "numeric derivative", "non-contiguous", "one element", "constant"],
     "NotImplementedError: only images"),
    (OtherEps, ["the reference"], "off"),
    (DetachedMean, ["numeric derivative"], "2-D, in training: Jacobian mismatch"),
    (MisreadsChannelsLast, ["channels_last"], "off"),
    (ViewsMemory, ["non-contiguous", "constant", "written in place"], "view size is not compatible"),
    (WritesInput, ["left as it was"], "the input is off"),
    (SquaresMinusSquare, ["large mean", "constant"], "off"),
    (NarrowFloat16, ["half-precision"], "off"),
    (NarrowBuffers, ["cast to half", "statistics wide"], "dtype"),
    (ReturnsFloat32, ["half-precision", "cast to half", "autocast"], "turned torch.float16 into torch.float32"),
    (MeanByMatmul, ["autocast", "constant"], "off"),
    (RefusesOneImage, ["one image"], "one image is no batch"),
    (UnbiasedVariance, ["one element"], "finite"),
    (FirstBatchSizeOnly, ["ragged"], "another batch size"),
    (TakesEmpty, ["empty"], "took an input of shape (0, 4, 5, 3)"),
    (HidesNaN, ["NaN input"], "a NaN went in"),
    (RefusesNaN, ["NaN input", "stays in its image", "batch that is not finite"], "ValueError: NaN"),
    (HoldsALock, ["deepcopy"], "cannot pickle"),
    (SharesBuffersWithCopy, ["deepcopy"], "mean is off"),
    (ForgetsItsVariance, ["state dict"], "off"),
    (DividesByZeroSteps, ["before training"], "the output is not finite"),
    (TracksInEvaluation, ["leaves the state alone", "torch.func.grad equals", "compiles once"], "mean is off"),
    (FreezesAffine, ["current affine"], "off"),
    (WarmsUpInPlace, ["two forwards", "compiles once", "buffers may change", *REPEATED - {"counts a batch once"}],
     "modified by an inplace operation"),
    (CountsInPython, ["compiles once", "torch.export"], "compiled"),
    (BreaksTheGraph, ["compiles once", "torch.export"], "data-dependent"),
    (NeedsOldFunction, ["torch.func.grad equals", "buffers as inputs"], "setup_context"),
    (NeedsOldFunctionInTraining, ["buffers as inputs"], "setup_context"),
    (CountsRecomputed, ["counts a batch once", *REPEATED], "mean is off"),
    (ScalesByThePast, ["keeps the gradient", "compiles once", *REPEATED - {"counts a batch once"}],
     "off"),
    (HoldsABuffer, ["buffers may change"], "in training where buffers are written under no_grad before the backward"),
    (HoldsItsWeight, ["weights may change"], "in training where weights are written under no_grad"),
    (TrustsTheLayout, ["save_on_cpu"], "under packed, torch.channels_last"),
    (LosesPenalties, ["second derivative"],
     "not refused in training, of a loss of power 1, by at_once, where backward() is"),
    (CountsBackwards, ["backward changes nothing"], "backwards is off by 2 after two backwards in training"),
    (ReplacesBuffers, ["written in place", "inference_mode", "compiles once", "torch.export"],
     "mean is another tensor after a train"),
    (SkipsLayouts, ["written in place"], "mean, var did not move in a step on a non-contiguous input"),
    (SetsUpLate, ["inference_mode"], "Inference tensors cannot be saved for backward"),
    (StillInExport, ["torch.export"], "mean, var did not move in the exported program"),
    (RefusesRepeatedNaN, ["batch that is not finite"], "no batch that I know"),
    (RecallsByValue, ["batch twice", "compiles once"], "where a batch comes twice, use_reentrant=False"),
    (RecallsSixteen, ["20 batches", "batch twice", "compiles once"], "KeyError"),
    (ForgetsWhatItRecalled, ["within activation", "batch twice", "compiles once"], "KeyError"),
    (CastsItsBuffers, ["statistics wide"], "mean is torch.float16 in a norm cast to torch.float16"),
    (LoadsHalfBuffers, ["statistics wide"], "mean is torch.float16 after load_state_dict of torch.float16 with assign"),
    (PlainMean, ["constant"], "on the constant 1.1 in torch.float32"),
    (SpreadsNaN, ["stays in its image"], "the output in other channels is not finite in training"),
    (TakesAnyChannels, ["wrong channel"], "(4, 1, 5, 3)"),
    (CountsRefused, ["wrong channel", "integer", "empty"], "batches is off by 1"),
    (TakesIntegers, ["integer"], "took an input"),
    (MumblesAboutIntegers, ["integer"], "doesn't say what it got"),
]


@pytest.mark.parametrize(("norm", "failing", "text"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_a_broken_norm_is_caught_by_its_check_alone(norm, failing, text, no_graphs):
    if not {"compiles once", "torch.export"} & {*failing}: no_graphs()
    report = check_norm(norm, reference=BiasedBatchNorm if norm is OtherEps else None)
    assert names(report, "FAIL") == named(failing)
    (name,) = named(failing[:1])
    assert text in report.failed[name]


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_changed_shape_is_caught_at_its_rank(rank, no_graphs):
    no_graphs()
    class AddsAnAxis(Sound):
        def forward(self, x): return super().forward(x).reshape(*x.shape, *[1] * (x.ndim == rank))
    report = check_norm(AddsAnAxis)
    assert names(report, "FAIL") == named([f"{rank}-D input", "constant"] + ["ragged"] * (rank == 4))
    assert "turned the shape" in report.failed[f"{rank}-D input"]


def test_ranks_that_are_not_declared_must_be_refused(no_graphs):
    no_graphs()
    report = check_norm(Sound, dims=(3, 4))
    assert report.failed == {
        "2-D input": "took an input of shape (4, 4) and torch.float32 in training",
        "5-D input": "took an input of shape (4, 4, 5, 3, 2) and torch.float32 in training"}


def test_a_reference_of_other_parameters_is_named():
    report = check_norm(lambda nf: nn.GroupNorm(2, nf), reference=lambda nf: nn.GroupNorm(2, nf, affine=False))
    assert report.failed[next(iter(named(["the reference"])))] == "the norm has 2 parameters, the reference 0"


def test_report_is_printed_and_strict_raises_it(capsys):
    report = check_norm(lambda nf: nn.GroupNorm(2, nf))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert out == f"{report}\n"
    assert lines[0] == repr(nn.GroupNorm(2, 4))
    assert lines[1] == "ok    2-D input"
    assert "-     values and gradients equal the reference's: not for this norm: no reference= was given" in lines
    assert ("-     an empty batch is refused in training: not for this norm: it normalises each image by itself, so no "
            "images come out as none") in lines
    assert "\nFAIL  integer input is refused: " in out
    assert lines[-1] == "38 of 46 hold, 2 failed, 6 not for this norm"
    with pytest.raises(AssertionError, match=r"not everything holds(.|\n)*FAIL  integer input"):
        check_norm(lambda nf: nn.GroupNorm(2, nf), strict=True)
    assert check_norm(InstanceNorm, dims=(3, 4, 5), strict=True).ok


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    check_norm(Sound)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("args", "kwargs", "error", "text"), [
    ([nn.BatchNorm2d(4)], {}, TypeError, "got BatchNorm2d.*needs a function from the channel count to a module"),
    ([BatchNorm], {"reference": BatchNorm(4)}, TypeError, "got BatchNorm.*pass the class, or lambda"),
    ([None], {}, TypeError, "got None; it needs a function"),
    ([lambda nf: torch.relu], {}, TypeError, "the factory gave .*relu.* for 4 channels; it needs to give a module"),
    ([BatchNorm], {"dims": 4}, ValueError, r"got dims=4; it needs some of \(2, 3, 4, 5\).*such as dims=\(4,\)"),
    ([BatchNorm], {"dims": (4, 6)}, ValueError, r"got dims=\(4, 6\)"),
    ([BatchNorm], {"dims": ()}, ValueError, r"got dims=\(\)"),
    ([BatchNorm], {"nf": 1}, ValueError, "got nf=1; it needs an integer of at least 2"),
])
def test_wrong_arguments_are_refused(args, kwargs, error, text):
    with pytest.raises(error, match=text): check_norm(*args, **kwargs)
