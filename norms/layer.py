"""Layer normalization (J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, https://arxiv.org/abs/1607.06450)."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.types import Device

from norms import fast
from norms.fast.kernels import Kernels
from norms.moments import Norm, moments, scale_shift, wide


class LayerNorm(Norm):
    """Normalise every image, or every vector of its trailing axes, by its own mean and variance.

        y = (x - mean) / sqrt(var + eps) * weight + bias        mean, var (biased) over the normalised axes

    With a `normalized_shape` this is `torch.nn.LayerNorm`: the axes are the trailing ones of that shape, `weight` and
    `bias` have it, and output, gradients and state dict are torch's. In a transformer, `LayerNorm(features)` on
    `(N, L, features)` normalises every position of its own. Without one it is the lesson's (fastai part 2 v3,
    notebook 07): all axes but the first, an image's channels and positions, with a scalar `weight` and `bias`; there
    the network's conv layers take it as `norm=lambda nf: LayerNorm()`. The lesson's own took the unbiased variance, 0/0
    where an image is a single value; the biased one is 0 there and y = bias.

    No running state: training and evaluation compute the same, and the batch size plays no part.

    Args:
        normalized_shape: sizes of the trailing axes to normalise, an integer or several; None for all but the first.
        eps: added to the variance.
        affine: whether there are a `weight` and a `bias` (torch's `elementwise_affine`).
        device, dtype: of the parameters.

    Shapes: `(*, *normalized_shape)` in and out, and `weight`, `bias` `normalized_shape`; without one `(N, C)` or
        `(N, C, *spatial)`, and scalars.

    Raises:
        ValueError: an input whose trailing axes are not `normalized_shape`, fewer than two axes, an empty input (but a
            batch of no images gives none back).
        TypeError: an integer input; a `normalized_shape` that is no shape; `shape`, as the argument was called before.
    """

    normalized_shape: tuple[int, ...] | None
    values: int | None      # of `normalized_shape`

    def __init__(self, normalized_shape: int | tuple[int, ...] | list[int] | None = None, eps: float = 1e-5,
                 affine: bool = True, *, device: Device = None, dtype: torch.dtype | None = None,
                 shape: Sequence[int] = ()) -> None:
        if shape != (): warnings.warn(RenamedArgument(shape), stacklevel=2)
        if normalized_shape is not None:
            sizes = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
            if not isinstance(sizes, (tuple, list)) or not sizes or not all(type(n) is int and n > 0 for n in sizes):
                raise TypeError(f"LayerNorm got normalized_shape={normalized_shape!r}; it needs the sizes of the "
                                "trailing axes, such as 64 or (64, 7, 7), or None for all axes but the first; eps goes "
                                "by its name, as in LayerNorm(eps=1e-5)")
            normalized_shape = tuple(sizes)
        super().__init__(normalized_shape or tuple(shape), eps, affine, device, dtype)
        self.normalized_shape = normalized_shape
        self.values = None if normalized_shape is None else math.prod(normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, min_dims=2 if self.normalized_shape is None else 1, no_images=True)
        self.check_trailing(x)
        axes = x.ndim - 1 if self.normalized_shape is None else len(self.normalized_shape)
        _, var, centred = moments(wide(x), tuple(range(x.ndim - axes, x.ndim)))     # (N, 1, 1, 1), (N, C, H, W)
        return scale_shift(centred, var, self.eps, self.weight, self.bias).to(x.dtype)

    def statistic_groups(self, x: Tensor) -> Tensor:
        if self.values is None: return x.flatten(1)         # (N, C * positions)
        return x.reshape(-1, self.values)                   # (vectors, values)

    def check_trailing(self, x: Tensor) -> None:
        """Raise unless the trailing axes of `x` are those that the norm was made for."""
        sizes, found = self.normalized_shape, tuple(x.shape)
        if sizes is not None and found[-len(sizes):] != sizes:
            raise ValueError(f"LayerNorm was made for trailing axes of sizes {sizes} and got an input of shape {found};"
                             f" make it with the sizes of the axes to normalise, LayerNorm({found[1:]}) for all but "
                             "the first; as a conv layer's norm write norm=lambda nf: LayerNorm()")
        if sizes is None and self.weight is not None and self.weight.ndim:          # made with `shape`
            if torch.broadcast_shapes(self.weight.shape, found[1:]) != found[1:]:
                raise ValueError(f"LayerNorm has weight and bias of shape {tuple(self.weight.shape)} and got images of "
                                 f"shape {found[1:]}; make it with normalized_shape={found[1:]}")

    def extra_repr(self) -> str:
        shape = "" if self.normalized_shape is None else f"{self.normalized_shape}, "
        return f"{shape}eps={self.eps}" + ("" if self.weight is not None else ", affine=False")


class RenamedArgument(FutureWarning, TypeError):
    """The error of an argument by its old name.

    It is raised by a filter for warnings, the last in their list: so an old script still runs, and means what it meant,
    where warnings are ignored (`python -W ignore`).
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(f"LayerNorm got shape={shape!r}, which is now normalized_shape, as torch's: the sizes of the "
                         "trailing axes to normalise, and of weight and bias. Write LayerNorm(x.shape[1:]) for one of "
                         "each per value of an image, LayerNorm() for scalars, GroupNorm(1, C) for one per channel")


warnings.filterwarnings("error", category=RenamedArgument, append=True)


def _launch(norm: LayerNorm, x: Tensor, kernels: Kernels) -> Tensor | None:
    """Each vector of the trailing axes is an image of one group to the kernels."""
    sizes, values = norm.normalized_shape, norm.values
    if sizes is None or values is None:
        if norm.weight is not None and norm.weight.ndim: return None                # made with `shape`
        return fast.group_norm(norm, x, kernels, len(x), 1, None)
    if tuple(x.shape[-len(sizes):]) != sizes: return None
    return fast.group_norm(norm, x, kernels, x.numel() // values, 1, 1)


fast.register(LayerNorm, _launch)
