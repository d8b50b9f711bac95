"""The backward pass of norms that average their gradient over steps: one gradient at a time, and no second derivative.

What they give is the gradient of no function. So there is nothing to differentiate, and whoever asks must be told.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from norms.fast.dispatch import refuse_many

Gradients = tuple[Tensor | None, ...]


def once(backward: Callable[[Any, Tensor, Tensor], Gradients]) -> Callable[[Any, Tensor], Gradients]:
    """The backward pass `f(ctx, g)` of an `autograd.Function` whose gradients are `backward(ctx, x, g)`.

    `ctx.saved_tensors` must be `(x,)`, and `ctx.of` weight and bias, or None in their places. Many gradients in one are
    refused. Under `create_graph=True` all gradients depend on g, x, weight and bias by a step that raises when it is
    differentiated. (torch's own `once_differentiable` has a step there that leads to none of these. So
    `torch.autograd.grad(loss + penalty, parameters)` goes round it, and gives the gradients without the penalty's.)
    """
    def once_only(ctx: Any, g: Tensor) -> Gradients:
        compiling = torch.compiler.is_compiling()       # torch refuses the second derivative of what it compiles
        if not compiling: refuse_many(g)
        x, = ctx.saved_tensors      # not again: checkpointing gives each tensor back once
        with torch.no_grad(): found = backward(ctx, x, g)
        if compiling or not torch.is_grad_enabled(): return found
        on = [t for t in (g, x, *ctx.of) if t is not None and t.requires_grad]
        return tuple(None if t is None else _NoFurther.apply(t, *on) for t in found)
    return once_only


class _NoFurther(torch.autograd.Function):
    """A gradient as it is; it depends on the tensors behind it, and has no derivative by them."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *on: Tensor) -> Tensor: return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        raise RuntimeError("a second derivative was asked for (as by a gradient penalty or a Hessian) of a norm that "
                           "averages its gradient over steps: average_backward=True, SteadyBatchNorm or MABN. It has "
                           "none, for its gradient is that of no function: take average_backward=False or another norm")
