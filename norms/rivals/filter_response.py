"""Filter response normalization (S. Singh, S. Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737)."""

import torch
from torch import Tensor, nn
from torch.types import Device

from norms import fast
from norms.moments import Norm, check_channels, per_channel, scale_shift, wide


class FilterResponseNorm(Norm):
    """Divide every channel of every image by its root mean square over the positions; then a threshold per channel.

        z = x / sqrt(mean(x^2) + eps) * weight + bias       mean over axes 2 and up, per image and channel
        y = max(z, tau)                                     the thresholded linear unit (TLU)

    The mean stays, so `bias` and `tau` have something to hold on to: behind a ReLU in its place the channels' offsets
    would be lost. The TLU is the layer's activation (`activates`): put no ReLU beside it. With `tau` at 0, as made, it
    is a ReLU.

    No running state: training and evaluation compute the same, and the batch size plays no part. On a 1x1 map, and on
    `(N, C)`, one value is divided by its own size: what passes is its sign, and nearly no gradient. There use another
    norm, or an eps of the size of x^2.

    The authors warm the learning rate up, without which it diverged in some of their networks; their eps is 1e-6,
    timm's 1e-5.

    Args:
        nf: channels, the size of axis 1.
        eps: added to the mean square.
        affine: whether there are a `weight` and a `bias` per channel.
        activation: whether the threshold is applied; without it there is no `tau` and y = z.
        device, dtype: of the parameters.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias` and `tau` `(C,)`.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input (but a batch of no images gives none
            back).
        TypeError: an integer input.
    """

    statistics = "mean square"
    activates = True
    nf: int
    tau: nn.Parameter | None

    def __init__(self, nf: int, eps: float = 1e-6, affine: bool = True, *, activation: bool = True,
                 device: Device = None, dtype: torch.dtype | None = None) -> None:
        check_channels("FilterResponseNorm", nf)
        super().__init__((nf,), eps, affine, device, dtype)
        self.nf, self.activates = nf, activation
        tau = nn.Parameter(torch.empty(nf, device=device, dtype=dtype)) if activation else None
        self.register_parameter("tau", tau)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set `weight` to ones, `bias` and `tau` to zeros, as after construction."""
        super().reset_parameters()
        if self.tau is not None: nn.init.zeros_(self.tau)

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=True)
        xs, dims = wide(x), tuple(range(2, x.ndim))
        # Without positions a mean over no axes would be one over all of them.
        square = (xs * xs).mean(dims, keepdim=True) if dims else xs * xs                # (N, C, 1, 1)
        weight, bias = (per_channel(t, x.ndim) for t in (self.weight, self.bias))       # (1, C, 1, 1)
        z = scale_shift(xs, square, self.eps, weight, bias)                             # (N, C, H, W)
        if self.tau is None: return z.to(x.dtype)
        # A copy of tau: the graph keeps what it compares with, and an optimizer's step may come before the backward.
        return torch.maximum(z, wide(per_channel(self.tau, x.ndim)).clone()).to(x.dtype)

    def statistic_groups(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] * x.shape[1], -1)                                   # (N C, positions)

    def extra_repr(self) -> str:
        return (f"{self.nf}, eps={self.eps}" + ("" if self.weight is not None else ", affine=False")
                + ("" if self.activates else ", activation=False"))
