"""Running batch norm's gradient with its two means averaged over steps: `RunningBatchNorm(average_backward=True)`.

The gradient of a batch of two images estimates, by two means over that batch, what a batch of many images would give.
These are averaged over steps as the forward's statistics are, with the same share a of the batch:

    G <- (1 - a) G + a mean(g)          D <- (1 - a) D + a mean(g xhat)         g = dL/dy
    dL/dx = weight / s [g - G - xhat D]

(without D where the variance is clamped; over several processes, where the loss is the mean of theirs, both means are
taken over all of their values). That is the gradient of no function, but a steadier estimate. It is akin to
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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from norms import fast
from norms.moments import averaged_gradients, scale_shift, wide


def averaged_scale_shift(x: Tensor, mean: Tensor, var: Tensor, a: Tensor, floor: Tensor, eps: float,
                         weight: Tensor | None, bias: Tensor | None, averages: Sequence[Tensor],
                         over: tuple[str, Tensor] | None = None) -> Tensor:
    """`(x - mean) / sqrt(max(var, floor) + eps) * weight + bias` with the gradient at the top of this file.

    Args:
        x: `(N, C, *spatial)`, a training batch that already counts in `mean` and `var`.
        mean, var, weight, bias: `(1, C, 1, ...)` each, the last two or None.
        a, floor: the batch's share of `mean` and `var`, and the least variance, scalar tensors.
        eps: added to the variance.
        averages: G and D, `(C,)` each, which every backward pass updates.
        over: of a batch over several processes, see `norms.moments.averaged_gradients`.
    """
    args = x, weight, bias, mean.detach(), var.detach(), a, floor, eps, *averages, *(over or (None, None))
    # What is compiled or exported needs an operator, whose gradient goes with it; to call one takes longer.
    y: Tensor = _operator(*args) if torch.compiler.is_compiling() else _Averaged.apply(*args)
    return y


def _value(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, a: Tensor, floor: Tensor,
           eps: float, grad_mean: Tensor, grad_dot: Tensor, key: str | None, totals: Tensor | None) -> Tensor:
    return scale_shift(wide(x) - mean, var.clamp_min(floor), eps, weight, bias).to(x.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    """What the backward pass needs: x, and copies of all that may be written until then, but for G and D themselves."""
    x, weight, bias, mean, var, a, floor, eps, *averages, key, totals = inputs
    rstd, free = torch.rsqrt(var.clamp_min(floor) + eps), (var >= floor).to(var.dtype)
    ctx.save_for_backward(x)
    over = None if key is None else (key, totals)
    ctx.kept = mean, rstd, None if weight is None else wide(weight).clone(), a, free, averages, over
    ctx.of, ctx.like = (weight, bias), [None if t is None else (t.shape, t.dtype) for t in (weight, bias)]


@fast.once
def _gradients(ctx: Any, x: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    gx, *affine = averaged_gradients(g, x, *ctx.kept)
    gw, gb = (None if like is None else t.view(like[0]).to(like[1]) for t, like in zip(affine, ctx.like, strict=True))
    return gx, gw, gb, *[None] * 9


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep(ctx, inputs, None)
        return _value(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]: return _gradients(ctx, g)


@torch.library.custom_op("runnernorms::averaged_scale_shift", mutates_args=())
def _operator(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, a: Tensor,
              floor: Tensor, eps: float, grad_mean: Tensor, grad_dot: Tensor, key: str | None,
              totals: Tensor | None) -> Tensor:
    return _value(x, weight, bias, mean, var, a, floor, eps, grad_mean, grad_dot, key, totals)


_operator.register_fake(lambda x, *_: torch.empty_like(x))
_operator.register_autograd(_gradients, setup_context=_keep)
