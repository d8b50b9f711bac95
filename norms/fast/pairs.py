"""The steps of the pairs, a norm over the batch and group norm behind it, by the kernels: one call each way.

With m, s and the share a of the first norm as in `channels.py`, mu, rho = 1 / sqrt(var + eps) of a group of an image:

    z = (x - m) / s     y = (z - mu) rho weight + bias
    dL/dz = rho [h - mean(h) - xi mean(h xi)]                       h = weight dL/dy, xi = (z - mu) rho, over the group
    dL/dx = 1 / s [dL/dz - a mean(dL/dz) - a z mean(dL/dz z)]       over the batch and its positions

The graph keeps x, and in `kept` (double precision; see `kernels.c`) all else that the backward pass needs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from norms.fast.channels import batch_state, differentiable, evaluated_by, running_state
from norms.fast.dispatch import bare
from norms.fast.images import define_groups
from norms.fast.kernels import Kernels, channels_last, laid_out_as, pointers
from norms.fast.once import once
from norms.moments import all_but_channels, averaged_gradients, merge_moments, moments, per_channel, scale_shift
from norms.running_norm import RunningNorm

Settings = tuple[str, float, int, float]        # the kernel, how much of the share a counts backward, groups, eps


def batch_pair(norm: RunningNorm, x: Tensor, kernels: Kernels, groups: int) -> Tensor | None:
    """A step of `BatchChannelNorm`, or None."""
    if not hasattr(kernels, "pair_backward"): return None
    if not norm.training: return _evaluate(norm, x, kernels, groups)
    written = batch_state(norm, x)
    if written is None: return None
    return _step(norm, x, kernels, written, (norm.mom, norm.eps), (), ("batch_pair", 1.0, groups, norm.eps))


def running_pair(norm: RunningNorm, x: Tensor, kernels: Kernels, groups: int, rule: tuple[float, ...],
                 average_backward: bool, constant: bool, trains_by: tuple[str, str]) -> Tensor | None:
    """A step of `RunningChannelNorm`, or None; `constant` is its `constant_statistics`, else as `running_batch_norm`.
    """
    if not hasattr(kernels, "pair_backward"): return None
    if not norm.training: return _evaluate(norm, x, kernels, groups)
    found = running_state(norm, x, average_backward, trains_by)
    if found is None: return None
    return _step(norm, x, kernels, found[0], rule, found[1], ("running_pair", 1.0 - constant, groups, norm.eps))


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, bool, int]:
    n, c = x.shape[0], x.shape[1]
    return n, c, x.numel() // (n * c), not x.is_contiguous(), groups


def _evaluate(norm: RunningNorm, x: Tensor, kernels: Kernels, groups: int) -> Tensor | None:
    """Evaluation where nobody asks for a gradient, else None."""
    read = evaluated_by(norm, x)
    if read is None: return None
    weight, bias, mean, var = read
    y = torch.empty_like(x)
    work = x.new_empty(3 * norm.nf + 2 * len(x) * (groups + norm.nf), dtype=torch.float64)
    kernels.pair_evaluate(*pointers(x, weight, bias, y, work, mean, var), *_sizes(x, groups), norm.eps)
    return y


def _step(norm: RunningNorm, x: Tensor, kernels: Kernels, written: list[Tensor], numbers: tuple[float, ...],
          averages: tuple[Tensor, ...], settings: Settings) -> Tensor:
    function = _AveragedPairStep if averages else _PairStep
    parameters = norm._parameters
    y: Tensor = function.apply(x, parameters["weight"], parameters["bias"], kernels, written, numbers, averages,
                               settings)
    return y


class _PairStep(torch.autograd.Function):
    """`written` are the tensors that the kernel updates, `numbers` its settings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, kernels: Kernels,
                written: list[Tensor], numbers: tuple[float, ...], averages: tuple[Tensor, ...],
                settings: Settings) -> Tensor:
        name, _, groups, _ = settings
        n, c = x.shape[0], x.shape[1]
        y, kept = torch.empty_like(x), x.new_empty(6 * c + 2 + 2 * n * (groups + c), dtype=torch.float64)
        getattr(kernels, name)(*pointers(x, weight, bias, y, kept, *written), *_sizes(x, groups), *numbers)
        increment_version(written)
        ctx.save_for_backward(x)
        ctx.of, ctx.kept = (weight, bias), (kernels, kept, settings, averages)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        # A gradient that will be differentiated in turn, many in one, or an x that came back as something else.
        if torch.is_grad_enabled() or not bare(g, x): return *_by_definition(ctx, x, g), *[None] * 5
        return *_by_kernel(ctx, x, g), *[None] * 5


class _AveragedPairStep(_PairStep):
    """With G and D: see `norms.averaged`."""

    @staticmethod
    @once
    def backward(ctx: Any, x: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
        increment_version(ctx.kept[-1])
        return *(_by_kernel if bare(g, x) else _averaged)(ctx, x, g), *[None] * 5


def _by_kernel(ctx: Any, x: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    kernels, kept, (_, share, groups, _), averages = ctx.kept
    if not (x.is_contiguous() or channels_last(x)): x = x.contiguous()      # a hook may have given it back otherwise
    g, gx = laid_out_as(g, x), torch.empty_like(x)
    gw, gb = (None if t is None else x.new_empty(x.shape[1]) for t in ctx.of)
    work = kept.new_empty(7 * x.shape[1] + 2 * len(x) * groups)
    kernels.pair_backward(*pointers(g, x, kept, work, gx, gw, gb, *(averages or (None, None))), *_sizes(x, groups),
                          share)
    return gx, gw, gb


def _past(ctx: Any, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """What was: the mean, variance and weight that the step had, the mean and variance of before; a, the floor."""
    c, kept = x.shape[1], ctx.kept[1].to(x.dtype)
    return kept[:5 * c].view(5, -1).unbind(), kept[6 * c], kept[6 * c + 1]


def _groups(ctx: Any, z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    _, _, groups, eps = ctx.kept[2]
    n, c = z.shape[0], z.shape[1]
    return define_groups(z, weight, bias, (n, groups, c // groups, z.numel() // (n * c), 1, 0), eps)


def _by_definition(ctx: Any, x: Tensor, g: Tensor) -> list[Tensor | None]:
    name, share, _, eps = ctx.kept[2]
    weight, bias = ctx.of
    (_, _, weight_then, old_mean, old_var), a, floor = _past(ctx, x)

    def define(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var, centred = moments(x if share else x.detach(), all_but_channels(x))
        if name == "running_pair":
            mean, var = merge_moments(per_channel(old_mean, x.ndim), per_channel(old_var, x.ndim), mean, var, a)
            centred, var = x - mean, var.clamp_min(floor)
        return _groups(ctx, scale_shift(centred, var, eps), weight, bias)
    return differentiable(define, x, weight, bias, weight_then, g)


def _averaged(ctx: Any, x: Tensor, g: Tensor) -> list[Tensor | None]:
    """The averaged gradient where the kernel can't read `x` or `g`: through the groups by autograd, then as defined."""
    eps, averages = ctx.kept[2][-1], ctx.kept[-1]
    weight, bias = ctx.of
    (mean, var, weight_then, _, _), a, floor = _past(ctx, x)
    mean, var = per_channel(mean, x.ndim), per_channel(var, x.ndim)
    z = scale_shift(x.detach() - mean, var.clamp_min(floor), eps).requires_grad_()

    def define(z: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor: return _groups(ctx, z, weight, bias)
    gz, gw, gb = differentiable(define, z, weight, bias, weight_then, g)
    assert gz is not None
    rstd = torch.rsqrt(var.clamp_min(floor) + eps)
    gx, _, _ = averaged_gradients(gz, x, mean, rstd, None, a, (var >= floor).to(var.dtype), averages)
    return [gx, gw, gb]
