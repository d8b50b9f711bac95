"""The steps of the norms per channel by the kernels: one call each way, the running state's update included.

With m and s^2 = max(var, floor) + eps what the step normalised by, and a the batch's share in them (1 in batch norm):

    y     = xhat weight + bias                                  xhat = (x - m) / s
    dL/dx = weight / s [g - a mean(g) - a xhat mean(g xhat)]    g = dL/dy, means over the batch and its positions

The last term is missing where `floor` holds the variance. With a = 1 this is batch norm's gradient; in general it is
(1 - a) times the gradient with frozen statistics plus a times batch norm's taken at m and s.

The graph keeps x, and in `kept` all else that the backward pass needs, copied by the forward: what was normalised by,
the weight, and the running statistics of before, from which a second derivative is computed by the definition.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from norms.fast.dispatch import bare
from norms.fast.kernels import Kernels, channels_last, laid_out_as, ordinary, pointers
from norms.fast.once import once
from norms.fast.repeats import repeating, state
from norms.moments import all_but_channels, averaged_gradients, merge_moments, moments, per_channel, scale_shift
from norms.running_norm import RunningNorm

STATE = ("unclamped_var", "count", "seen")      # beside the mean and the variance that training normalises by


def batch_norm(norm: RunningNorm, x: Tensor, kernels: Kernels) -> Tensor | None:
    """A step of `BatchNorm`, or None."""
    if not norm.training: return _evaluate(norm, x, kernels)
    written = batch_state(norm, x)
    return None if written is None else _step(norm, x, kernels, "batch_norm", written, (norm.mom, norm.eps))


def running_batch_norm(norm: RunningNorm, x: Tensor, kernels: Kernels, rule: tuple[float, ...],
                       average_backward: bool, trains_by: tuple[str, str]) -> Tensor | None:
    """A step of `RunningBatchNorm`, or None.

    `rule` are the kernel's numbers: images, their weight, the clamp, eps; `trains_by` are the names of the buffers that
    training normalises by.
    """
    if not norm.training: return _evaluate(norm, x, kernels)
    found = running_state(norm, x, average_backward, trains_by)
    return None if found is None else _step(norm, x, kernels, "running_batch_norm", found[0], rule, found[1])


def batch_state(norm: RunningNorm, x: Tensor) -> list[Tensor] | None:
    """What a training step of batch norm on `x` writes, or None where that isn't memory as the kernels take it."""
    buffers = norm._buffers                                             # an attribute is 10 times as slow
    written = [buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked")]
    if not (fit(norm, x, written[:2]) and ordinary(written[2:], torch.int64, 1)): return None
    return [t.clone() for t in written] if repeating() else written     # repeated: the batch is counted already


def running_state(norm: RunningNorm, x: Tensor, average_backward: bool,
                  trains_by: tuple[str, str]) -> tuple[list[Tensor], tuple[Tensor, ...]] | None:
    """What a training step of running batch norm on `x` writes, and what its backward pass does, or None as above."""
    buffers = norm._buffers
    names = *trains_by, *STATE
    mean, var, hidden, count, seen = (buffers[name] for name in names)
    if not (fit(norm, x, (mean, var, hidden)) and ordinary((count,), x.dtype, 1)
            and ordinary((seen,), torch.int64, 1)): return None
    averages: tuple[Tensor, ...] = ()
    if average_backward:
        averages = buffers["grad_mean"], buffers["grad_dot"]
        if not ordinary(averages, x.dtype, norm.nf): return None
    now = state(norm)
    return [now[name] for name in names], averages


def fit(norm: RunningNorm, x: Tensor, statistics: Sequence[Tensor]) -> bool:
    """Whether `x` is for this norm, and the parameters and `statistics` are memory as the kernels take it."""
    nf, dtype, parameters = norm.nf, x.dtype, norm._parameters
    affine = () if parameters["weight"] is None else (parameters["weight"], parameters["bias"])
    return x.shape[1] == nf and ordinary(affine, dtype, nf) and ordinary(statistics, dtype, nf)


def _evaluate(norm: RunningNorm, x: Tensor, kernels: Kernels) -> Tensor | None:
    """Evaluation where nobody asks for a gradient, else None."""
    read = evaluated_by(norm, x)
    if read is None: return None
    weight, bias, mean, var = read
    y = torch.empty_like(x)
    kernels.evaluate(*pointers(x, weight, bias, y, mean, var), *_sizes(x), norm.eps)
    return y


def evaluated_by(norm: RunningNorm, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor] | None:
    """Weight, bias, running mean and variance for an evaluation; None where somebody asks for a gradient, or as above.
    """
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    statistics = norm._buffers["running_mean"], norm._buffers["running_var"]
    asked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, *statistics))
    if asked or not fit(norm, x, statistics): return None
    now = state(norm)
    return weight, bias, now["running_mean"], now["running_var"]


def _step(norm: RunningNorm, x: Tensor, kernels: Kernels, name: str, written: list[Tensor], numbers: tuple[float, ...],
          averages: tuple[Tensor, ...] = ()) -> Tensor:
    function = _AveragedStep if averages else _Step
    parameters = norm._parameters
    y: Tensor = function.apply(x, parameters["weight"], parameters["bias"], kernels, name, written, numbers, averages)
    return y


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """`x` as the kernels see it, (N, C, positions); one that is channels last as (N positions, C, 1)."""
    n, c = x.shape[0], x.shape[1]
    return (n, c, x.numel() // (n * c)) if x.is_contiguous() else (x.numel() // c, c, 1)


class _Step(torch.autograd.Function):
    """`name` is the kernel's, `written` the tensors that it updates, `numbers` its settings, eps the last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, kernels: Kernels, name: str,
                written: list[Tensor], numbers: tuple[float, ...], averages: tuple[Tensor, ...]) -> Tensor:
        y, kept = torch.empty_like(x), x.new_empty(5 * x.shape[1] + 2)
        getattr(kernels, name)(*pointers(x, weight, bias, y, kept, *written), *_sizes(x), *numbers)
        increment_version(written)
        ctx.save_for_backward(x)
        ctx.of, ctx.kept = (weight, bias), (kernels, kept, name == "running_batch_norm", numbers[-1], averages)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # A gradient that will be differentiated in turn, many in one, or an x that came back as something else.
        if torch.is_grad_enabled() or not bare(g, x): return *_by_definition(ctx, x, g), *[None] * 5
        return *_by_kernel(ctx, x, g), *[None] * 5


class _AveragedStep(_Step):
    """With G and D: see `norms.averaged`."""

    @staticmethod
    @once
    def backward(ctx: Any, x: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        increment_version(ctx.kept[-1])
        if bare(g, x): return *_by_kernel(ctx, x, g), *[None] * 5
        _, kept, _, eps, averages = ctx.kept
        mean, var, weight, _, _ = (per_channel(t, x.ndim) for t in kept[:-2].view(5, -1))
        a, floor = kept[-2], kept[-1]
        gx, *affine = averaged_gradients(g, x, mean, torch.rsqrt(var.clamp_min(floor) + eps), weight, a, var >= floor,
                                         averages)
        return gx, *(None if t is None else s for t, s in zip(ctx.of, affine, strict=True)), *[None] * 5


def _by_kernel(ctx: Any, x: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    kernels, kept, _, eps, averages = ctx.kept
    if not (x.is_contiguous() or channels_last(x)): x = x.contiguous()      # a hook may have given it back otherwise
    g, gx = laid_out_as(g, x), torch.empty_like(x)
    gw, gb = (None if t is None else x.new_empty(x.shape[1]) for t in ctx.of)
    kernels.channel_backward(*pointers(g, x, kept, gx, gw, gb, *(averages or (None, None))), *_sizes(x), eps)
    return gx, gw, gb


def _by_definition(ctx: Any, x: Tensor, g: Tensor) -> list[Tensor | None]:
    _, kept, running, eps, _ = ctx.kept
    weight, bias = ctx.of
    (_, _, weight_then, old_mean, old_var), a, floor = kept[:-2].view(5, -1), kept[-2], kept[-1]

    def define(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var, centred = moments(x, all_but_channels(x))
        if running:
            mean, var = merge_moments(per_channel(old_mean, x.ndim), per_channel(old_var, x.ndim), mean, var, a)
            centred, var = x - mean, var.clamp_min(floor)
        return scale_shift(centred, var, eps, per_channel(weight, x.ndim), per_channel(bias, x.ndim))
    return differentiable(define, x, weight, bias, weight_then, g)


def differentiable(define: Callable[[Tensor, Tensor | None, Tensor | None], Tensor], x: Tensor, weight: Tensor | None,
                   bias: Tensor | None, weight_then: Tensor | None, g: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight and bias by autograd, as functions of x, weight and g to be differentiated in turn.

    `weight` lends its place in the graph, `weight_then` its values: it may have been written since.
    """
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        w = None if weight is None or weight_then is None else weight_then.view_as(weight) + (weight - weight.detach())
        y = define(x, w, bias)
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=again))
    return [next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias)]
