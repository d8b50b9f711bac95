"""Normalising by an image's own statistics: group norm, of which layer norm and instance norm are the two ends.

With the channels of an image in G groups, m and s^2 = var + eps over a group's channels and positions:

    y     = xhat weight + bias                                  xhat = (x - m) / s
    dL/dx = 1 / s [h - mean(h) - xhat mean(h xhat)]             h = weight dL/dy, means over the group

One group is layer norm, as many as channels is instance norm. `plain` leaves the gradient to automatic
differentiation. `_Fused` has it in closed form, by torch's kernels, and `_KernelStep` by the project's own (see
`norms.kernels`), which take a small batch in one call each way. The tests hold the three together.
"""

import torch

from norms.channel import _ONE, bare, eager_cpu
from norms.kernels import channels_last, kernels_for
from norms.moments import moments, scale_shift, wide


def normalise_groups(x, groups, eps, weight=None, bias=None):
    """`(x - mean) / sqrt(var + eps) * weight + bias`, mean and variance per image and group of channels.

    Args:
        x: `(N, C, *spatial)`.
        groups: a divisor of C.
        eps: added to the variance.
        weight, bias: None for none, `()`, `(C,)` for one per channel, or of the shape of an image, `(C, *spatial)`.
    """
    if eager_cpu(x):
        # Where all of an image's values are treated alike, their layout is no matter. Otherwise two copies are cheaper
        # than the plain formula.
        flat = groups == 1 and (weight is None or not weight.ndim)
        if not flat and not x.is_contiguous() and channels_last(x):
            y = normalise_groups(x.contiguous(), groups, eps, weight, bias)
            return y.contiguous(memory_format=torch.channels_last)
        if kernels := kernels_for(x, *([] if weight is None else [affine_size(x, weight), weight, bias])):
            return _KernelStep.apply(x, groups, eps, weight, bias, kernels)
        # Of one value the output is exactly `bias`, which this kernel's rounding would spoil.
        if (x.dtype in (torch.float32, torch.float64) and (weight is None or weight.dtype is x.dtype)
                and x.numel() > len(x) * groups and x.is_contiguous()):
            return _Fused.apply(x, groups, eps, weight, bias)
    return plain(x, groups, eps, weight, bias)


def affine_size(x, weight):
    """How many values `weight` must have on `x`."""
    if weight.ndim > 1: return x.numel() // x.shape[0]
    return x.shape[1] if weight.ndim else 1


def plain(x, groups, eps, weight=None, bias=None):
    """The formula of `normalise_groups`, differentiable any number of times and in any mode."""
    xs = wide(x).unflatten(1, (groups, -1))                             # (N, G, C / G, *spatial), a view
    _, var, centred = moments(xs, tuple(range(2, xs.ndim)))             # (N, G, 1, 1, 1) for var
    if weight is not None and weight.ndim:
        image = (1, *xs.shape[1:]) if weight.ndim == x.ndim - 1 else (1, groups, -1, *[1] * (x.ndim - 2))
        weight, bias = weight.reshape(image), bias.reshape(image)
    return scale_shift(centred, var, eps, weight, bias).flatten(1, 2).to(x.dtype)


_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_group_norm_backward = torch.ops.aten.native_group_norm_backward.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


class _KernelStep(torch.autograd.Function):
    """`plain` without a graph, in one call each way, by `norms/kernels.c`."""

    @staticmethod
    def forward(ctx, x, groups, eps, weight, bias, kernels):
        n, c = x.shape[0], x.shape[1]
        size = x.numel() // (n * groups)                                # values of a group: rows times row
        if weight is None or not weight.ndim: sizes = n, groups, 1, size, 0, 0
        elif weight.ndim == 1 and size * groups > c: sizes = n, groups, c // groups, size * groups // c, 1, 0
        else: sizes = n, groups, 1, size, size, 1                       # a weight for each value of an image
        y, kept = torch.empty_like(x), x.new_empty(2 * n * groups)
        kernels.group_norm(x.data_ptr(), weight if weight is None else weight.data_ptr(),
                           bias if bias is None else bias.data_ptr(), y.data_ptr(), kept.data_ptr(), *sizes, eps)
        ctx.save_for_backward(x, weight, bias)
        ctx.kept = kernels, kept, sizes, groups, eps
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, bias = ctx.saved_tensors
        kernels, kept, sizes, groups, eps = ctx.kept
        if torch.is_grad_enabled() or not bare(g):          # this gradient will be differentiated, or is many in one
            return *differentiable(x, groups, eps, weight, bias, g), None
        if not x.is_contiguous(): g = g.contiguous(memory_format=torch.channels_last)
        elif not g.is_contiguous(): g = g.contiguous()
        gx, gw, gb = torch.empty_like(x), None, None
        if weight is None:
            kernels.group_backward(g.data_ptr(), x.data_ptr(), None, kept.data_ptr(), gx.data_ptr(), None, None, *sizes)
        else:
            gw, gb = torch.empty_like(weight), torch.empty_like(weight)
            kernels.group_backward(g.data_ptr(), x.data_ptr(), weight.data_ptr(), kept.data_ptr(), gx.data_ptr(),
                                   gw.data_ptr(), gb.data_ptr(), *sizes)
        return gx, None, None, gw, gb, None


def differentiable(x, groups, eps, weight, bias, g):
    """The gradients of `plain`'s arguments, as functions of x, weight and g that can be differentiated in turn."""
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    again = torch.is_grad_enabled()
    with torch.enable_grad(): y = plain(x, groups, eps, weight, bias)
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=again))
    gx, gw, gb = (next(found) if t is not None and t.requires_grad else None for t in (x, weight, bias))
    return gx, None, None, gw, gb


class _Fused(torch.autograd.Function):
    """`plain` without a graph, in three of torch's kernels: the variances in one, (x - m) / s in one, the gradient.

    The second is batch norm's in evaluation with a group of an image in the place of a channel. It folds the mean
    into a shift, x / s - m / s: an error as if x had been rounded once more, 6e-8 |x| / s. The third is the backward
    of batch norm, group norm or layer norm, whichever has this affine map, at the means and 1 / s given.
    """

    @staticmethod
    def forward(ctx, x, groups, eps, weight, bias):
        rows, shape = (1, x.shape[0] * groups, -1), x.shape             # (1, N G, C / G * positions)
        xs = x.view(rows)
        mean, var = torch.batch_norm_update_stats(xs, None, None, 0.0)  # (N G,) each
        ctx.save_for_backward(x, weight, bias)
        ctx.stats = mean, torch.add(var, _ONE[x.dtype], alpha=eps).rsqrt_(), groups, eps
        y = torch.batch_norm(xs, None, None, mean, var, False, 0.0, eps, False).view(shape)
        if weight is None: return y
        if not weight.ndim: return y.mul_(weight).add_(bias)
        if weight.ndim == 1:
            channels = (-1,) + (1,) * (x.ndim - 2)
            weight, bias = weight.view(channels), bias.view(channels)
        return torch.addcmul(bias, y, weight, out=y)                    # a large new tensor would cost more than this

    @staticmethod
    def backward(ctx, g):
        x, weight, bias = ctx.saved_tensors
        mean, rstd, groups, eps = ctx.stats
        if torch.is_grad_enabled(): return differentiable(x, groups, eps, weight, bias, g)
        g, n, c = g.contiguous(), x.shape[0], x.shape[1]
        if weight is None or not weight.ndim:
            rows = (1, n * groups, -1)
            gx, gw, gb = _batch_norm_backward(g.view(rows), x.view(rows), weight if weight is None
                                              else weight.expand(n * groups), None, None, mean, rstd, True, eps,
                                              [True, True, True])
            return gx.view(x.shape), None, None, *((None, None) if weight is None else (gw.sum(), gb.sum()))
        per_group = mean.view(n, groups), rstd.view(n, groups)
        if weight.ndim == 1:
            gx, gw, gb = _group_norm_backward(g, x, *per_group, weight, n, c, x.numel() // (n * c), groups,
                                              [True, True, True])
        else: gx, gw, gb = _layer_norm_backward(g, x, x.shape[1:], *per_group, weight, bias, [True, True, True])
        return gx, None, None, gw, gb
