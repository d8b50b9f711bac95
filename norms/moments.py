"""What all norms share: their statistics, the merging of statistics, the affine map and the checks of the input.

The numerical decisions of the package stand here, once, each with its reason.
"""

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)


def wide(x):
    """`x` in float32 if it is float16 or bfloat16, else `x` itself.

    A sum over 512 images of 28x28 in bfloat16 (8 bits of mantissa) stops growing after a few hundred terms,
    and squares overflow float16 at 256: statistics are never taken in half precision.
    """
    return x.float() if x.dtype in HALF else x


def moments(x, dims):
    """Mean and biased variance of `x` over the axes `dims`, which are kept with size 1, and `x - mean`.

    Two passes: the mean is subtracted before squaring. E[x^2] - E[x]^2 would lose all its digits in float32 where
    |mean| / std is above 1000. (`torch.var_mean` is as exact and on a CPU 2 to 5 times slower.) The variance is
    biased (divided by n): it is that of the very values being normalised, and of one value it is 0, where the
    unbiased one is 0/0.
    """
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return mean, (centred * centred).mean(dims, keepdim=True), centred


def merge_moments(mean, var, batch_mean, batch_var, a):
    """Mean and variance of a mixture: weight `1 - a` on the first pair, `a` on the second.

        d     = batch_mean - mean
        mean' = mean + a d
        var'  = (1 - a) var + a batch_var + a (1 - a) d^2

    (T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.) Equal to averaging x and x^2 and subtracting, without the cancellation; every term of
    the variance is positive, so it can't turn negative. `a` is a number, or a scalar tensor of the moments' dtype.
    """
    d, share = batch_mean - mean, a * (1 - a)
    var = torch.lerp(var, batch_var, a)
    var = var.addcmul_(d, d, value=share) if isinstance(a, float) else var + share * d * d
    return torch.lerp(mean, batch_mean, a), var


def scale_shift(centred, var, eps, weight=None, bias=None):
    """`centred / sqrt(var + eps) * weight + bias` with `centred = x - mean`, everything broadcast against it.

    The mean is subtracted first. Folding it into the shift (`x * scale + (bias - mean * scale)`) saves a pass
    and costs the digits of x when |mean| / std is large.
    """
    scale = torch.rsqrt(var + eps)
    if weight is None: return centred * scale
    return (centred * (weight * scale)).add_(bias)  # in place: one tensor less than `+ bias`


def per_channel(t, ndim):
    """View a `(C,)` tensor as `(1, C, 1, ...)` with `ndim` axes."""
    return t.view(1, -1, *[1] * (ndim - 2))


class Norm(nn.Module):
    """Base of the norms: `eps`, the affine parameters `weight` (ones) and `bias` (zeros), and the input checks.

    Every norm says what it normalises by, to whoever looks at it from outside (`runner.norm_layers` does):

        statistic_groups(x)     `x` as `(statistics, values)`: a row for each mean and variance that a batch has of its
                                own, with the values behind it; where images have their own, image after image
        running_moments(b)      only where training too normalises by running statistics: their mean and variance as
                                used now, `(C,)` each, and how many images they remember at batches of `b`, or None

    Args:
        shape: shape of `weight` and `bias`; None for a norm without them.
        eps: added to the variance before the root, so that a constant input gives 0 and not 0/0.
    """

    def __init__(self, shape, eps):
        super().__init__()
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not eps >= 0:
            raise ValueError(f"{type(self).__name__}: eps is {eps!r}; it must be a number of at least 0, such as 1e-5")
        self.eps = eps
        self.weight = None if shape is None else nn.Parameter(torch.ones(shape))
        self.bias = None if shape is None else nn.Parameter(torch.zeros(shape))

    def check_input(self, x, channels=None, min_dims=2):
        """Raise an error that says what came, what is needed and what to do, unless `x` is fit for this norm."""
        fits = x.is_floating_point() and x.ndim >= min_dims and x.numel()
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


def check_channels(name, nf):
    """Raise unless `nf`, the channel count that the norm called `name` was given, is a positive integer."""
    if not isinstance(nf, int) or isinstance(nf, bool) or nf < 1:
        raise ValueError(f"{name} got {nf!r} as its channel count; it needs a positive integer such as 64")
