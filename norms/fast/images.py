"""The steps of the norms per image by the kernels: one call each way.

With the channels of an image in G groups, m and s^2 = var + eps over a group's channels and positions:

    y     = xhat weight + bias                                  xhat = (x - m) / s
    dL/dx = 1 / s [h - mean(h) - xhat mean(h xhat)]             h = weight dL/dy, means over the group

One group is layer norm, as many as channels is instance norm. The graph keeps x, and in `kept` the means, 1 / s and a
copy of the weight.
"""

from typing import Any

import torch
from torch import Tensor

from norms.fast.channels import differentiable
from norms.fast.dispatch import bare
from norms.fast.kernels import Kernels, channels_last, ordinary, pointers
from norms.moments import Norm, moments, scale_shift

Sizes = tuple[int, int, int, int, int, int]     # see `_GroupStep`


def group_norm(norm: Norm, x: Tensor, kernels: Kernels, images: int, groups: int, affine: int | None) -> Tensor | None:
    """A step of a norm whose statistics are an image's own, or None.

    Args:
        images: how many images `x` consists of, in the order of its axes; for layer norm also vectors.
        groups: how many groups the values of an image are in.
        affine: how many values of an image in a row share one of `weight` and `bias`: their number of positions for one
            per channel, 1 for one per value; None for one for all.
    """
    parameters = norm._parameters
    weight, bias, image = parameters["weight"], parameters["bias"], x.numel() // images
    if weight is None or affine is None: sizes = images, groups, 1, image // groups, 0, 0
    elif affine > 1: sizes = images, groups, image // (groups * affine), affine, 1, 0
    else: sizes = images, groups, 1, image // groups, image // groups, 1       # a weight for each value of an image
    if weight is not None:
        if not ordinary((weight, bias), x.dtype, 1 if affine is None else image // affine): return None
    # Where all of an image's values are treated alike, their layout is no matter. Otherwise two copies are cheaper
    # than the definition.
    if x.is_contiguous() or (groups == 1 and sizes[4] == 0 and images == x.shape[0]):
        y: Tensor = _GroupStep.apply(x, weight, bias, kernels, sizes, norm.eps)
        return y
    y = _GroupStep.apply(x.contiguous(), weight, bias, kernels, sizes, norm.eps)
    return y.contiguous(memory_format=torch.channels_last)


class _GroupStep(torch.autograd.Function):
    """`sizes` are those of the kernels: images, groups, rows of a group, values of a row; how many affine values a row
    has, 0 where there is one for all; whether there is one for each of its values.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, kernels: Kernels, sizes: Sizes,
                eps: float) -> Tensor:
        y, kept = torch.empty_like(x), x.new_empty(2 * sizes[0] * sizes[1])
        kernels.group_norm(*pointers(x, weight, bias, y, kept), *sizes, eps)
        ctx.save_for_backward(x)
        then = None if weight is None else weight.clone()
        ctx.of, ctx.kept = (weight, bias), (kernels, kept, then, sizes, eps)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        kernels, kept, then, sizes, eps = ctx.kept
        # A gradient that will be differentiated in turn, many in one, or an x that came back as something else.
        if torch.is_grad_enabled() or not bare(g, x):
            def define(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return define_groups(x, weight, bias, sizes, eps)
            weight, bias = ctx.of
            return *differentiable(define, x, weight, bias, then, g), None, None, None
        # `x` has the layout of the forward, or comes from a hook in another one, which is as good: values that have one
        # affine map, and one group, may come in any order. All others were contiguous.
        flat = sizes[1] == 1 and sizes[4] == 0 and channels_last(x)
        layout = torch.channels_last if flat and not x.is_contiguous() else torch.contiguous_format
        x, g = x.contiguous(memory_format=layout), g.contiguous(memory_format=layout)
        gx = torch.empty_like(x)
        gw, gb = (None, None) if then is None else (torch.empty_like(then), torch.empty_like(then))
        kernels.group_backward(*pointers(g, x, then, kept, gx, gw, gb), *sizes)
        return gx, gw, gb, None, None, None


def define_groups(x: Tensor, weight: Tensor | None, bias: Tensor | None, sizes: Sizes, eps: float) -> Tensor:
    """The definition, on the groups' values in a row: `(N, G, values)` with an affine map of `(1, G, values)`."""
    images, groups, rows, row, of_row, each = sizes
    _, var, centred = moments(x.reshape(images, groups, rows * row), (2,))      # (N, G, 1) for var
    if weight is not None and bias is not None and of_row:
        shared = 1 if each else row                                             # values that share one of a weight
        weight, bias = (t.reshape(1, groups, -1, 1).expand(-1, -1, -1, shared).flatten(2) for t in (weight, bias))
    return scale_shift(centred, var, eps, weight, bias).view(x.shape)
