"""Normalising per channel by statistics in which the batch has a share: batch norm and running batch norm.

With m = mean, s^2 = max(var, floor) + eps and a the share that this batch has in m and var (1 in batch norm):

    y     = xhat weight + bias                                  xhat = (x - m) / s
    dL/dx = weight / s [g - a mean(g) - a xhat mean(g xhat)]    g = dL/dy, means over the batch and its positions

The last term is missing where `floor` holds the variance. With a = 1 this is batch norm's gradient; in general it is
(1 - a) times the gradient with frozen statistics plus a times batch norm's taken at m and s.

`plain` leaves the gradient to automatic differentiation; `_Fused` has it in closed form. The tests hold the two
together.
"""

import torch
from torch.autograd import forward_ad

from norms.moments import moments, per_channel, scale_shift, wide


def eager_cpu(x):
    """Whether `x` is on a CPU, with no compiler, no `torch.func` transform and no forward-mode derivative at work.

    There a look at a number waits for nothing, and the fused kernels, which know only the backward, may be used.
    """
    return (x.is_cpu and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0)


def in_backward():
    """Whether a backward pass is running: a forward pass within it is activation checkpointing doing one again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.no_grad()
def channel_moments(x):
    """Mean and biased variance of every channel of `x` `(N, C, *spatial)` over images and positions, `(C,)` each."""
    x = wide(x)
    if eager_cpu(x): return torch.batch_norm_update_stats(x, None, None, 0.0)  # two passes in one kernel, no state
    mean, var, _ = moments(x, all_but_channels(x))
    return mean.flatten(), var.flatten()


def all_but_channels(x):
    """The axes of images and positions of `x` `(N, C, *spatial)`."""
    return (0, *range(2, x.ndim))


def normalise_channels(x, weight, bias, mean, var, eps, a=None, floor=None, averages=None):
    """`(x - mean) / sqrt(max(var, floor) + eps) * weight + bias` with the gradient through this batch's share `a`.

    Args:
        x: `(N, C, *spatial)`, a training batch that already counts in `mean` and `var`.
        weight, bias, mean, var: `(C,)` each; the last two without a graph.
        a: this batch's share of `mean` and `var`, a number or a scalar tensor; None means 1.
        floor: least variance, a number or a scalar tensor; None means none.
        averages: two running averages `(C,)` that the backward pass is to update and use for mean(g) and
            mean(g xhat), instead of the batch's own means times `a`; None for the gradient itself.
    """
    if averages is not None: return _AveragedBackward.apply(x, weight, bias, mean, var, eps, a, floor, *averages)
    if not (eager_cpu(x) and x.dtype == weight.dtype == mean.dtype):
        return plain(x, weight, bias, mean, var, eps, a, floor)
    rstd = torch.rsqrt((var if floor is None else var.clamp_min(floor)) + eps)
    return _Fused.apply(x, weight, bias, mean, var, rstd, eps, a, floor)


def as_functions(x, mean, var, a):
    """`x - mean` and `var` as functions of `x`, `(N, C, *spatial)` and `(1, C, 1, 1)`, for automatic differentiation.

    `mean` and `var` are numbers that the batch went into. Written as mean + a (m1 - m1_now) and
    var + a (m2 - m2_now) - shift^2, with m1 and m2 the batch's first two moments about `mean`, they keep their values,
    for the brackets are 0, and get their derivatives, of every order and in either direction.
    """
    dims = all_but_channels(x)
    mean, var = mean.detach(), var.detach()
    u = wide(x) - per_channel(mean, x.ndim)
    m1, m2 = u.mean(dims, keepdim=True), (u * u).mean(dims, keepdim=True)
    shift, grow = m1 - m1.detach(), m2 - m2.detach()
    if a is not None: shift, grow = a * shift, a * grow
    return u - shift, per_channel(var, x.ndim) + grow - shift * shift


def plain(x, weight, bias, mean, var, eps, a=None, floor=None):
    """The formula of `normalise_channels`, differentiable any number of times and in any mode."""
    centred, var = as_functions(x, mean, var, a)
    if floor is not None: var = var.clamp_min(floor)
    return scale_shift(centred, var, eps, per_channel(weight, x.ndim), per_channel(bias, x.ndim)).to(x.dtype)


def gradients(g, xhat, scale, a, free=None):
    """The gradients of x, weight and bias in closed form.

    `g` and `xhat` are `(N, C, *spatial)`, `scale` = weight / s and `free` (where no floor holds) `(1, C, 1, 1)`.
    """
    dims = all_but_channels(g)
    dot, total = (g * xhat).sum(dims, keepdim=True), g.sum(dims, keepdim=True)
    share = (1 if a is None else a) / (g.numel() // g.shape[1])
    through_var = share * dot * xhat if free is None else share * dot * free * xhat
    return scale * (g - share * total - through_var), dot.flatten(), total.flatten()


_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


class _Fused(torch.autograd.Function):
    """`plain` without a graph; its gradient by one kernel, torch's batch norm backward at `mean` and `rstd`.

    torch's forward kernel has no place here: it folds the mean into the shift, and where a channel hardly varies
    that costs the digits (see `scale_shift`).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, rstd, eps, a, floor):
        ctx.save_for_backward(x, weight, mean, var, rstd)
        ctx.eps, ctx.a, ctx.floor = eps, a, floor
        y = x - per_channel(mean, x.ndim)
        return y.mul_(per_channel(weight * rstd, x.ndim)).add_(per_channel(bias, x.ndim))

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, var, rstd = ctx.saved_tensors
        a, floor = ctx.a, ctx.floor
        if torch.is_grad_enabled():  # somebody will differentiate this gradient: mean and var depend on x then
            centred, var = as_functions(x, mean, var, a)
            rstd = torch.rsqrt((var if floor is None else var.clamp_min(floor)) + ctx.eps)
            free = None if floor is None else var >= floor
            return *gradients(g, centred * rstd, per_channel(weight, x.ndim) * rstd, a, free), *[None] * 6
        gx, gw, gb = _batch_norm_backward(g, x, weight, None, None, mean, rstd, True, ctx.eps,
                                          [ctx.needs_input_grad[0], True, True])
        if gx is not None and a is not None:
            scale = weight * rstd                                       # (C,)
            gx.mul_(a).addcmul_(g, per_channel(scale, x.ndim), value=1 - a)
            if floor is not None:  # gw = sum(g xhat): give back the variance's term where the floor holds it
                back = a * scale * rstd * gw / (x.numel() // len(weight)) * (var < floor)
                gx.addcmul_(x - per_channel(mean, x.ndim), per_channel(back, x.ndim))
        return gx, gw, gb, *[None] * 6


class _AveragedBackward(torch.autograd.Function):
    """`plain` with the means in the gradient averaged over steps: see `RunningBatchNorm`."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, a, floor, grad_mean, grad_dot):
        if torch.compiler.is_compiling():
            raise RuntimeError("average_backward keeps state in the backward pass, which torch.compile can't follow; "
                               "train without compiling, or make the norm with average_backward=False")
        ctx.averages, ctx.eps, ctx.a, ctx.floor = (grad_mean, grad_dot), eps, a, floor
        ctx.save_for_backward(x, weight, mean, var)
        return plain(x, weight, bias, mean, var, eps, a, floor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, mean, var = ctx.saved_tensors
        free = 1 if ctx.floor is None else (var >= ctx.floor).to(var.dtype)
        rstd = torch.rsqrt((var if ctx.floor is None else var.clamp_min(ctx.floor)) + ctx.eps)
        xhat = (wide(x) - per_channel(mean, x.ndim)) * per_channel(rstd, x.ndim)
        dims, n = all_but_channels(x), x.numel() // len(weight)
        g = g.to(xhat.dtype)
        dot, total = (g * xhat).sum(dims), g.sum(dims)                  # (C,) each
        for average, new in zip(ctx.averages, (total / n, dot / n), strict=True):
            average.copy_(torch.lerp(average, new.to(average.dtype), ctx.a))
        grad_mean, grad_dot = ctx.averages
        gx = g - per_channel(grad_mean, x.ndim) - xhat * per_channel(grad_dot * free, x.ndim)
        return (per_channel(weight * rstd, x.ndim) * gx).to(x.dtype), dot, total, *[None] * 7
