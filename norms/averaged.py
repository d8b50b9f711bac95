"""Running batch norm's gradient with its two means averaged over steps: `RunningBatchNorm(average_backward=True)`.

The gradient of a batch of two images estimates, by two means over that batch, what a batch of many images would give.
These are averaged over steps as the forward's statistics are, with the same share a of the batch:

    G <- (1 - a) G + a mean(g)          D <- (1 - a) D + a mean(g xhat)         g = dL/dy
    dL/dx = weight / s [g - G - xhat D]

(without D where the variance is clamped). That is the gradient of no function, but a steadier estimate. It is akin to
moving-average batch normalization (MABN: J. Yan et al., "Towards stabilizing batch statistics in backward propagation
of batch normalization", ICLR 2020) and not the same: MABN averages over a window, all steps alike, does not centre, and
so has one mean in its gradient.

G and D are buffers, which the backward pass writes: the one exception to the rule that a backward changes nothing.
Every backward pass takes its gradient in, a second one over the same graph again. A gradient with a value that is not
finite, as in a step that a GradScaler skips, is not taken in. G and D are of the scale of the loss. Where that changes
they must follow; with a GradScaler in a loop of your own:

    old = scaler.get_scale()
    scaler.step(opt), scaler.update()
    for m in model.modules():
        if isinstance(m, RunningBatchNorm): m.rescale_(scaler.get_scale() / old)
"""

import torch

from norms import fast
from norms.moments import all_but_channels, per_channel, scale_shift, wide


def averaged_scale_shift(x, mean, var, a, floor, eps, weight, bias, averages):
    """`(x - mean) / sqrt(max(var, floor) + eps) * weight + bias` with the gradient at the top of this file.

    Args:
        x: `(N, C, *spatial)`, a training batch that already counts in `mean` and `var`.
        mean, var, weight, bias: `(1, C, 1, ...)` each, the last two or None.
        a, floor: the batch's share of `mean` and `var`, and the least variance, scalar tensors.
        eps: added to the variance.
        averages: G and D, `(C,)` each, which every backward pass updates.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        raise RuntimeError("average_backward keeps state in the backward pass, which torch.compile can't follow; "
                           "train without compiling, or make the norm with average_backward=False")
    return _Averaged.apply(x, weight, bias, mean.detach(), var.detach(), a, floor, eps, averages)


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, a, floor, eps, averages):
        held = var.clamp_min(floor)
        ctx.save_for_backward(x)
        scale = torch.rsqrt(held + eps) if weight is None else torch.rsqrt(held + eps) * wide(weight)
        ctx.kept = mean, torch.rsqrt(held + eps), scale, (var >= floor).to(var.dtype), a, averages
        ctx.of = weight, bias
        return scale_shift(wide(x) - mean, held, eps, weight, bias).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,), (mean, rstd, scale, free, a, averages) = ctx.saved_tensors, ctx.kept
        check_one_gradient(g)
        dims, n = all_but_channels(x), x.numel() // x.shape[1]
        g, xhat = wide(g), (wide(x) - mean) * rstd
        total, dot = g.sum(dims), (g * xhat).sum(dims)                                      # (C,) each
        new = []
        for old, s in zip(averages, (total, dot), strict=True):
            new.append(torch.lerp(old, s.to(old.dtype) / n, a.to(old.dtype)))
        finite = total.isfinite().all() & dot.isfinite().all()
        for old, value in zip(averages, new, strict=True): old.copy_(torch.where(finite, value, old))
        grad_mean, grad_dot = (per_channel(t, x.ndim) for t in new)
        gx = (scale * (g - grad_mean - xhat * grad_dot * free)).to(x.dtype)
        gw, gb = (None if t is None else s.view_as(t).to(t.dtype) for t, s in zip(ctx.of, (dot, total), strict=True))
        return gx, gw, gb, *[None] * 6


def check_one_gradient(g):
    """Raise if `g` is many gradients in one, as `vmap` over a backward pass and `is_grads_batched=True` make it."""
    if not fast.bare(g) and not torch.compiler.is_compiling():
        raise RuntimeError("average_backward takes in one gradient at a time and got a batch of them (vmap over a "
                           "backward pass, or is_grads_batched=True); call the backward pass once for each")
