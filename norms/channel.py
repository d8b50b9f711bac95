"""Normalising per channel by statistics in which the batch has a share: batch norm and running batch norm.

With m = mean, s^2 = max(var, floor) + eps and a the share that this batch has in m and var (1 in batch norm):

    y     = (x - m) / s * weight + bias
    dL/dx = (1/s) [g - a mean(g) - a xhat mean(g xhat)]     g = weight dL/dy, xhat = (x - m) / s, means over the batch

The last term is missing where `floor` holds the variance. With a = 1 this is batch norm's gradient; in general it
is (1 - a) times the gradient with frozen statistics plus a times batch norm's taken at m and s. `plain` computes it
by automatic differentiation, `_Fused` by torch's fused kernel for batch norm's part; the tests hold them together.
"""

import torch

from norms.moments import moments, per_channel, scale_shift, wide


@torch.no_grad()
def channel_moments(x):
    """Mean and biased variance of every channel of `x` `(N, C, *spatial)` over images and positions, `(C,)` each."""
    x = wide(x)
    if x.is_cpu and not torch.compiler.is_compiling():
        return torch.batch_norm_update_stats(x, None, None, 0.0)  # one two-pass kernel; no running state is given it
    mean, var, _ = moments(x, (0, *range(2, x.ndim)))
    return mean.flatten(), var.flatten()


def normalise_channels(x, weight, bias, mean, var, eps, a=None, floor=None):
    """`(x - mean) / sqrt(max(var, floor) + eps) * weight + bias` with the gradient through this batch's share `a`.

    Args:
        x: `(N, C, *spatial)`, a training batch that already counts in `mean` and `var`.
        weight, bias, mean, var: `(C,)` each; the last two without a graph.
        a: this batch's share of `mean` and `var`, a scalar tensor; None means 1.
        floor: least variance, a scalar tensor; None means none.
    """
    fusable = x.is_cpu and x.dtype == weight.dtype == mean.dtype and not torch.compiler.is_compiling()
    return (_Fused.apply if fusable else plain)(x, weight, bias, mean, var, eps, a, floor)


def plain(x, weight, bias, mean, var, eps, a=None, floor=None):
    """The formula, differentiable any number of times and in any mode.

    `mean` and `var` are numbers that the batch went into. To let the gradient through, they are written as
    functions of it that have these values here: mean + a (m1 - m1_now) and var + a (m2 - m2_now) - shift^2, with m1
    and m2 the batch's first two moments about `mean`. The brackets are 0, and their derivatives are not.
    """
    dims = (0, *range(2, x.ndim))
    u = wide(x) - per_channel(mean, x.ndim)                             # (N, C, *spatial)
    m1, m2 = u.mean(dims, keepdim=True), (u * u).mean(dims, keepdim=True)   # (1, C, 1, 1) each
    shift, grow = m1 - m1.detach(), m2 - m2.detach()
    if a is not None: shift, grow = a * shift, a * grow
    var = per_channel(var, x.ndim) + grow - shift * shift
    if floor is not None: var = var.clamp_min(floor)
    return scale_shift(u - shift, var, eps, per_channel(weight, x.ndim), per_channel(bias, x.ndim)).to(x.dtype)


_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default


class _Fused(torch.autograd.Function):
    """`plain` without a graph, and its gradient by one kernel: torch's batch norm backward at `mean` and `var`.

    torch's forward kernel has no place here: it folds the mean into the shift, and where a channel hardly varies
    that costs the digits (see `scale_shift`). Forward-mode differentiation is refused by torch with its own message;
    second derivatives go through `plain`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, a, floor):
        rstd = torch.rsqrt((var if floor is None else var.clamp_min(floor)) + eps)
        ctx.save_for_backward(x, weight, bias, mean, var, a, floor, rstd)
        ctx.eps = eps
        y = x - per_channel(mean, x.ndim)
        return y.mul_(per_channel(weight * rstd, x.ndim)).add_(per_channel(bias, x.ndim))

    @staticmethod
    def backward(ctx, g):
        x, weight, bias, mean, var, a, floor, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate this gradient
            wanted = [t for t, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
            grads = iter(torch.autograd.grad(plain(x, weight, bias, mean, var, ctx.eps, a, floor), wanted, g,
                                             create_graph=True))
            return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:3]), *[None] * 5
        gx, gw, gb = _batch_norm_backward(g, x, weight, None, None, mean, rstd, True, ctx.eps,
                                          [ctx.needs_input_grad[0], True, True])
        if gx is not None and a is not None:
            scale = weight * rstd                                       # (C,)
            gx.mul_(a).addcmul_(g, per_channel((1 - a) * scale, x.ndim))
            if floor is not None and floor.item() > 0:                  # on a CPU the look costs nothing
                # gw = sum(g xhat): give back the variance's term where the floor holds it.
                back = a * scale * rstd * gw / (x.numel() // len(weight)) * (var < floor)
                gx.addcmul_(x - per_channel(mean, x.ndim), per_channel(back, x.ndim))
        return gx, gw, gb, *[None] * 5
