"""EvoNorm-S0 (H. Liu, A. Brock, K. Simonyan, Q. V. Le, 2020, https://arxiv.org/abs/2004.02967)."""

import torch
from torch import Tensor, nn
from torch.types import Device

from norms import fast
from norms.group import check_groups
from norms.moments import Norm, moments, per_channel, wide


class EvoNormS0(Norm):
    """Normalization and activation in one, found by a search: a swish over the standard deviation of a group.

        y = x sigmoid(v x) / sqrt(var + eps) * weight + bias        var (biased) per image and group of channels

    It is the layer's activation too (`activates`): put no ReLU beside it. The mean is taken off for the variance alone;
    what is divided still has it.

    No running state: training and evaluation compute the same, and the batch size plays no part. Where a group has one
    value, as with as many groups as channels on a 1x1 map, its variance is 0 and x is divided by sqrt(eps).

    Args:
        nf: channels, the size of axis 1.
        groups: groups of channels; must divide `nf`. The authors take 32 in networks of 64 channels and more; with
            fewer give fewer, so that a group has two channels or more.
        eps: added to the variance.
        affine: whether there are a `weight` and a `bias` per channel.
        device, dtype: of the parameters.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias` and `v` `(C,)`.

    Raises:
        ValueError: groups that don't divide the channels (so also 32 of fewer channels), another channel count, fewer
            than two axes, an empty input (but a batch of no images gives none back).
        TypeError: an integer input.
    """

    statistics = "variance"
    activates = True
    nf: int
    groups: int

    def __init__(self, nf: int, groups: int = 32, eps: float = 1e-5, affine: bool = True, *, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        check_groups("EvoNormS0", groups, nf)
        super().__init__((nf,), eps, affine, device, dtype)
        self.nf, self.groups = nf, groups
        self.v = nn.Parameter(torch.empty(nf, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set `weight` and `v` to ones and `bias` to zeros, as after construction."""
        super().reset_parameters()
        nn.init.ones_(self.v)

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=True)
        xs = wide(x)                                                                    # (N, C, H, W)
        grouped = xs.unflatten(1, (self.groups, -1))                                    # (N, G, C / G, H, W)
        _, var, _ = moments(grouped, tuple(range(2, grouped.ndim)))                     # (N, G, 1, 1, 1)
        scale = torch.rsqrt(var + self.eps).expand(-1, -1, self.nf // self.groups, *[1] * (x.ndim - 2)).flatten(1, 2)
        # Copies of the parameters: the graph keeps them, and an optimizer's step may come before the backward.
        weight, bias = (per_channel(t, x.ndim) for t in (self.weight, self.bias))       # (1, C, 1, 1)
        v = wide(per_channel(self.v, x.ndim)).clone()                                   # (1, C, 1, 1)
        swish = xs * torch.sigmoid(v * xs)                                              # (N, C, H, W)
        if weight is None or bias is None: return (swish * scale).to(x.dtype)
        return torch.addcmul(wide(bias), swish, scale * wide(weight).clone()).to(x.dtype)

    def statistic_groups(self, x: Tensor) -> Tensor:
        return x.reshape(len(x) * self.groups, -1)                                      # (N G, C / G * positions)

    def extra_repr(self) -> str:
        return f"{self.nf}, {self.groups}, eps={self.eps}" + ("" if self.weight is not None else ", affine=False")
