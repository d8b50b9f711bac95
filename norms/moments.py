"""What all norms share: their statistics, the merging of statistics, the affine map and the checks of the input.

The numerical decisions of the package stand here, once, each with its reason.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.types import Device

HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 if it is float16 or bfloat16, else `x` itself.

    A sum over 512 images of 28x28 in bfloat16 (8 bits of mantissa) stops growing after a few hundred terms,
    and squares overflow float16 at 256: statistics are never taken in half precision.
    """
    return x.float() if x.dtype in HALF else x


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of `x` over the axes `dims`, which are kept with size 1, and `x - mean`.

        mean = r + mean(x - r)        var = mean((x - mean)^2)        r = the first value of each statistic

    Two passes: the mean is subtracted before squaring. E[x^2] - E[x]^2 would lose all its digits in float32 where
    |mean| / std is above 1000. The mean is taken about one of the values: then it is exact where all are equal, so that
    a constant input is centred to 0 and not to the mean's rounding, which a small `eps` would blow up. The variance is
    biased (divided by n): it is that of the very values being normalised, and of one value it is 0, where the unbiased
    one is 0/0.
    """
    r = x.detach()
    for dim in dims: r = r.narrow(dim, 0, 1)
    mean = r + (x - r).mean(dims, keepdim=True)
    centred = x - mean
    return mean, (centred * centred).mean(dims, keepdim=True), centred


def merge_moments(mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor,
                  a: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a mixture: weight `1 - a` on the first pair, `a` on the second.

        d     = batch_mean - mean
        mean' = mean + a d
        var'  = (1 - a) var + a batch_var + a (1 - a) d^2

    (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.) Equal to averaging x and x^2 and subtracting, without the cancellation; every term of
    the variance is positive, so it can't turn negative. `a` is a number, or a scalar tensor of the moments' dtype;
    at a = 1 the result is the second pair to the last bit, which the formula as written would round.
    """
    d = batch_mean - mean
    return torch.lerp(mean, batch_mean, a), torch.lerp(var, batch_var, a) + a * (1 - a) * d * d


def scale_shift(centred: Tensor, var: Tensor, eps: float, weight: Tensor | None = None,
                bias: Tensor | None = None) -> Tensor:
    """`centred / sqrt(var + eps) * weight + bias` with `centred = x - mean`, everything broadcast against it.

    The mean is subtracted first. Folding it into the shift (`x * scale + (bias - mean * scale)`) saves a pass
    and costs the digits of x when |mean| / std is large; and where x is the mean the result is then not `bias`.

    The graph keeps a copy of `weight`, never the parameter: an optimizer's step or a load between this and the backward
    pass changes no gradient.
    """
    scale = torch.rsqrt(var + eps)
    if weight is None: return centred * scale
    assert bias is not None, "a weight comes with a bias"
    return torch.addcmul(wide(bias), centred, scale * wide(weight).clone())


def averaged_gradients(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, a: Tensor, free: Tensor,
                       averages: Sequence[Tensor], over: tuple[str, Tensor] | None = None
                       ) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias with the means over steps that `norms.averaged` defines, which it updates.

    `mean`, `rstd` = 1 / s, `weight` and `free`, 0 where the variance is clamped and else 1, are `(1, C, 1, ...)`;
    `averages` are G and D, `(C,)` each. They stay where the gradient is not finite: one such step would spoil all later
    ones. `over`, of a step over several processes, is the `key` of its `Ranks` and their totals: of images, of values
    per channel, of processes. There the loss is the mean over the processes of theirs, as for
    `DistributedDataParallel`, and G and D are of that loss's scale, the one that a single process would have.
    """
    dims, n = all_but_channels(x), x.numel() // x.shape[1]
    g, xhat = wide(g), (wide(x) - mean) * rstd
    total, dot = g.sum(dims), (g * xhat).sum(dims)                                          # (C,) each
    sums, losses = (total, dot), None
    if over is not None:
        key, (_, values, losses) = over
        sums, n = torch.ops.runnernorms.sum_over_ranks(torch.stack(sums), key).unbind(), values * losses
    finite, new = sums[0].isfinite().all() & sums[1].isfinite().all(), []
    for old, s in zip(averages, sums, strict=True):
        new.append(torch.lerp(old, s.to(old.dtype) / n, a.to(old.dtype)))
        old.copy_(torch.where(finite, new[-1], old))
    grad_mean, grad_dot = (per_channel(t if losses is None else t * losses, x.ndim) for t in new)   # (1, C, 1, 1) each
    scale = rstd if weight is None else rstd * weight
    return (scale * (g - grad_mean - xhat * grad_dot * free)).to(x.dtype), dot, total


@overload
def per_channel(t: Tensor, ndim: int) -> Tensor: ...
@overload
def per_channel(t: None, ndim: int) -> None: ...
def per_channel(t: Tensor | None, ndim: int) -> Tensor | None:
    """View a `(C,)` tensor as `(1, C, 1, ...)` with `ndim` axes; None stays None."""
    return None if t is None else t.view(1, -1, *[1] * (ndim - 2))


def all_but_channels(x: Tensor) -> tuple[int, ...]:
    """The axes of images and positions of `x` `(N, C, *spatial)`."""
    return (0, *range(2, x.ndim))


def channel_groups(x: Tensor) -> Tensor:
    """`x` `(N, C, *spatial)` as `(C, N * positions)`: for each channel the values behind its mean and variance."""
    return x.transpose(0, 1).flatten(1)


class Norm(nn.Module):
    """Base of the norms: `eps`, the affine parameters `weight` (ones) and `bias` (zeros), and the input checks.

    Every norm says what it normalises by, to whoever looks at it from outside (`runner.insight.layers` does):

        statistic_groups(x)     `x` as `(statistics, values)`: a row for each mean and variance that a batch has of its
                                own, with the values behind it; where images have their own, image after image
        running_moments(b)      only where training too normalises by running statistics: their mean and variance as
                                used now, `(C,)` each, and how many images they remember at batches of `b`, or None
        ranks                   only where a batch's statistics may be taken over several processes: how many these are
        pooled_moments(x)       with `ranks`: of all these, the mean and the variance, `(C,)` each, and how many images
                                and values per channel they are of, `x` being this process's batch
        image_groups(x)         only where a norm by each image's own statistics follows behind these in the same layer:
                                `x` as `(statistics, values)` of that one
        statistics              what of these values it takes: their "mean and variance", or only the "variance" or the
                                "mean square", by whose root it divides; then their mean stays
        activates               whether an activation is part of it, so that none is due beside it
        wants_centred           whether it takes no mean away and counts on a convolution that gives none, by weights
                                whose mean is 0: one that says `centred`

    Args:
        shape: shape of `weight` and `bias`.
        eps: added to the variance before the root, so that a constant input gives 0 and not 0/0.
        affine: whether there are a `weight` and a `bias`; without them both are None.
        device, dtype: of the parameters, as in torch's layers.
    """

    statistics = "mean and variance"
    activates = False
    wants_centred = False
    eps: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, ...], eps: float, affine: bool = True, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not eps >= 0:
            raise ValueError(f"{type(self).__name__}: eps is {eps!r}; it must be a number of at least 0, such as 1e-5")
        self.eps = eps
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if affine
                                    else None)
        Norm.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Set `weight` to ones and `bias` to zeros, as after construction."""
        if self.weight is not None: nn.init.ones_(self.weight)
        if self.bias is not None: nn.init.zeros_(self.bias)

    def check_input(self, x: Tensor, channels: int | None = None, min_dims: int = 2, no_images: bool = False) -> None:
        """Raise an error that says what came, what is needed and what to do, unless `x` is fit for this norm.

        `no_images`: whether a batch of no images is: of those whose statistics need none of this batch.
        """
        fits = x.is_floating_point() and x.ndim >= min_dims and (
            x.numel() or (no_images and x.ndim > 1 and x.shape[0] == 0 and all(x.shape[1:])))
        if fits and (channels is None or x.shape[1] == channels): return
        name, shape = type(self).__name__, tuple(x.shape)
        if not x.is_floating_point():
            raise TypeError(f"{name} got an input of {x.dtype}; it needs a floating-point one: convert it by x.float()")
        if x.ndim < min_dims:
            axes = "(N, C) or (N, C, *spatial)" if min_dims == 2 else "(N, C, *spatial) with a spatial axis"
            mend = "add the batch axis by x.unsqueeze(0)" if min_dims == 2 else \
                "statistics over positions need positions: use LayerNorm or GroupNorm here"
            raise ValueError(f"{name} got an input of shape {shape}; it needs {axes}: {mend}")
        if channels is not None and x.shape[1] != channels:
            raise ValueError(f"{name} was made for {channels} channels and got {x.shape[1]} (input of shape {shape}); "
                             f"axis 1 must hold the channels: make the norm with {x.shape[1]} channels, or move "
                             "the channel axis by x.movedim(-1, 1) if it comes last")
        if x.numel() == 0:
            raise ValueError(f"{name} got an empty input of shape {shape}; a mean needs at least one value: "
                             "skip empty batches before the model")


def check_channels(name: str, nf: int) -> None:
    """Raise unless `nf`, the channel count that the norm called `name` was given, is a positive integer."""
    if not isinstance(nf, int) or isinstance(nf, bool) or nf < 1:
        raise ValueError(f"{name} got {nf!r} as its channel count; it needs a positive integer such as 64")
