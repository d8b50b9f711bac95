"""Group normalization (Y. Wu, K. He, 2018, https://arxiv.org/abs/1803.08494)."""

import torch
from torch import Tensor
from torch.types import Device

from norms import fast
from norms.moments import Norm, check_channels, moments, scale_shift, wide


class GroupNorm(Norm):
    """Normalise every group of channels of every image by its mean and variance over channels and positions.

        y = (x - mean) / sqrt(var + eps) * weight + bias        mean, var (biased) per image and group

    No running state: training and evaluation compute the same, and the batch size plays no part, which is why
    it holds at batch size 2. One group is layer norm with an affine map per channel; as many groups as channels
    is instance norm. Output, gradients and state dict equal those of `torch.nn.GroupNorm`.

    Args:
        num_groups: groups; must divide `num_channels`.
        num_channels: channels, the size of axis 1.
        eps: added to the variance.
        affine: whether there are a `weight` and a `bias` per channel.
        device, dtype: of the parameters.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight` and `bias` `(C,)`.

    Raises:
        ValueError: groups that don't divide the channels, another channel count, fewer than two axes, an empty input
            (but a batch of no images gives none back).
        TypeError: an integer input.
    """

    num_groups: int
    num_channels: int

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, *,
                 device: Device = None, dtype: torch.dtype | None = None) -> None:
        check_groups("GroupNorm", num_groups, num_channels)
        super().__init__((num_channels,), eps, affine, device, dtype)
        self.num_groups, self.num_channels = num_groups, num_channels

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.num_channels, no_images=True)
        groups = (1, self.num_groups, -1, *[1] * (x.ndim - 2))                      # of the channels
        xs = wide(x).unflatten(1, groups[1:3])                                      # (N, G, C / G, H, W)
        _, var, centred = moments(xs, tuple(range(2, xs.ndim)))                     # (N, G, 1, 1, 1), and as xs
        weight, bias = (t if t is None else t.view(groups) for t in (self.weight, self.bias))   # (1, G, C / G, 1, 1)
        return scale_shift(centred, var, self.eps, weight, bias).flatten(1, 2).to(x.dtype)

    def statistic_groups(self, x: Tensor) -> Tensor:
        return x.reshape(len(x) * self.num_groups, -1)                              # (N G, C / G * positions)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.weight is not None}"


def check_groups(name: str, num_groups: int, nf: int) -> None:
    """Raise unless the norm called `name` was given a channel count `nf` and a number of groups that divides it."""
    check_channels(name, nf)
    if not isinstance(num_groups, int) or isinstance(num_groups, bool) or num_groups < 1 or nf % num_groups:
        raise ValueError(f"{name} got {num_groups!r} groups for {nf} channels; the groups must divide the channels: "
                         f"choose one of {[g for g in range(1, nf + 1) if nf % g == 0]}")


fast.register(GroupNorm, lambda norm, x, kernels: None if x.shape[1] != norm.num_channels else
              fast.group_norm(norm, x, kernels, len(x), norm.num_groups, x.numel() // (len(x) * norm.num_channels)))
