"""Weight standardization (S. Qiao, H. Wang, C. Liu, W. Shen, A. Yuille, 2019, https://arxiv.org/abs/1903.10520)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.types import Device

from norms import fast
from norms.moments import wide

Size = int | tuple[int, int]


def standardized(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """`(W - mean) / (std + eps)` with the mean and the biased std of each output channel, of the type of `weight`.

    The paper's formula and timm take the biased std, as do all norms here; the authors' program divides by n - 1, which
    makes the filters of n weights sqrt((n - 1) / n) as large: nothing, to a norm behind them. Where eps stands, beside
    the std, is as in their program; timm has it under the root. A filter whose weights are all equal becomes 0, and the
    gradient that it gets is finite.

    Shapes: `(out, in / groups, height, width)`, or more axes or fewer, in and out.
    """
    w, dims = wide(weight), tuple(range(1, weight.ndim))
    centred = w - w.mean(dims, keepdim=True)                                        # (out, in / groups, h, w)
    # Not the root of a mean of squares, whose derivative is infinite at 0; a norm's is taken to be 0 there.
    std = torch.linalg.vector_norm(centred, dim=dims, keepdim=True) / math.sqrt(centred[0].numel())     # (out, 1, 1, 1)
    out: Tensor = centred / (std + eps)
    return out.to(weight.dtype)


class WSConv2d(nn.Conv2d):
    """`nn.Conv2d` that convolves by its `standardized` weight: each output channel's has mean 0 and std 1.

        y = conv(x, (W - mean) / (std + eps)) + b           mean, std (biased) over all but axis 0 of W

    It goes before a norm per image, as `GroupNorm`: with small batches that is the authors' choice. What the norm takes
    off again, offset and scale of a channel, no longer depends on the weights. What it gives is sqrt(n) times as large
    as what comes in, n being the weights of an output channel; without a norm behind it that is not for long. `weight`
    and `bias`, their names and their initialisation are `nn.Conv2d`'s, so that state dicts move both ways
    (`convert_convs` swaps whole models).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as of `nn.Conv2d`.
        eps: added to the std.

    Shapes: `(N, in, H, W)` or `(in, H, W)` in, `(N, out, H', W')` or `(out, H', W')` out.

    Raises:
        ValueError: one weight for each output channel, which would become 0; an eps below 0; else as `nn.Conv2d`.
    """

    centred = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1,
                 padding: Size | str = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
                 padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros", *, eps: float = 1e-5,
                 device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         device, dtype)
        if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not eps >= 0:
            raise ValueError(f"WSConv2d: eps is {eps!r}; it must be a number of at least 0, such as 1e-5")
        if math.prod(self.weight.shape[1:]) == 1:
            raise ValueError(f"WSConv2d got {in_channels} channels in {groups} groups and a kernel of 1x1, one weight "
                             "for each output channel, which less its mean is 0: use nn.Conv2d here")
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y                          # symbolic tracing: one node
        weight = fast.standardized(self, self.weight, self.eps, standardized)
        if weight is None: weight = standardized(self.weight, self.eps)
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"    # type: ignore[no-untyped-call]  # torch's has no types
