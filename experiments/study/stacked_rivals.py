"""The layers of a `stack` in the place of those of `norms.rivals`: of K networks side by side, as in `stacked_layers`.
"""

import torch
from torch import Tensor, nn

from experiments.study.stacked_layers import GroupedConv2d
from norms.rivals import CentredConv2d, WSConv2d


class GroupedWSConv2d(WSConv2d, GroupedConv2d):
    """K weight-standardised convolutions side by side: `WSConv2d`, by the convolution of `GroupedConv2d`.

    A weight is standardised per output channel, so those of K networks along axis 0 are as each alone.
    """


class GroupedCentredConv2d(CentredConv2d, GroupedConv2d):
    """K `CentredConv2d` side by side, in the same way."""


class GroupedSkipInit(nn.Module):
    """K `SkipInit` side by side: `(N, K C, *)` in and out, `scale` `(K,)`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.scale = nn.Parameter(torch.empty(groups))

    def forward(self, x: Tensor) -> Tensor:
        xs = x.unflatten(1, (self.groups, -1))                                              # (N, K, C, *)
        y: Tensor = xs * self.scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return y.flatten(1, 2)

    def extra_repr(self) -> str: return str(self.groups)
