"""Weight standardization by the kernels: one call each way.

With m and s the mean and the biased std of a filter's weights W:

    y     = (W - m) / (s + eps)
    dL/dW = [g - mean(g)] / (s + eps) - y mean(g y) / s         g = dL/dy, means over the filter

The graph keeps y, and in `kept` s, 1 / (s + eps) and 1 / s of each filter; this last is 0 where s is 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from norms.fast.dispatch import bare, plain
from norms.fast.kernels import Kernels, kernels_for, laid_out_as, pointers
from norms.fast.repeats import same_way

Define = Callable[[Tensor, float], Tensor]


def standardized(module: nn.Module, weight: Tensor, eps: float, define: Define) -> Tensor | None:
    """`define(weight, eps)`, the standardized weight of `module`, or None: then the definition is to run."""
    # `plain` knows tensors; a parameter is one, and a tensor of another class stays of that class without its graph.
    if torch.compiler.is_compiling() or not plain(weight.detach()) or not weight.numel(): return None
    kernels = same_way(module, kernels_for(weight))
    if kernels is None or not hasattr(kernels, "standardize"): return None
    y: Tensor = _Standardize.apply(weight, kernels, eps, define)
    return y


class _Standardize(torch.autograd.Function):
    """The graph keeps no weight, only what came of it: a weight may be written before the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kernels: Kernels, eps: float, define: Define) -> Tensor:
        n = len(weight)
        y, kept = torch.empty_like(weight), weight.new_empty(3, n)
        kernels.standardize(*pointers(weight, y, kept), n, weight.numel() // n, eps)
        ctx.save_for_backward(y)
        ctx.of, ctx.kept = weight, (kernels, kept, eps, define)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        kernels, kept, eps, define = ctx.kept
        # A gradient that will be differentiated in turn, many in one, or a y that came back as something else.
        if torch.is_grad_enabled() or not bare(g, y):
            # The weight less its mean, which gives the same: the weight itself may have been written since.
            then = y * (kept[0] + eps).view(-1, *[1] * (y.ndim - 1))
            again, weight = torch.is_grad_enabled(), ctx.of
            with torch.enable_grad():
                out = define(then.detach() + (weight - weight.detach()), eps)
            return *torch.autograd.grad(out, (weight,), g, create_graph=again), None, None, None
        if not (y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)): y = y.contiguous()
        g, gw = laid_out_as(g, y), torch.empty_like(y)
        kernels.standardize_backward(*pointers(g, y, kept, gw), len(y), y.numel() // len(y))
        return gw, None, None, None
