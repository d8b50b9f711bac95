"""Norms that others made for small batches, written out by hand like those one folder up, to compare with.

| name                 | what it computes                                              | source                  |
| -------------------- | ------------------------------------------------------------- | ----------------------- |
| `BatchChannelNorm`   | batch norm, then group norm, with one affine map              | Qiao et al. 2019        |
| `BatchRenorm`        | batch norm moved to what running averages would make of it    | Ioffe, NeurIPS 2017     |
| `EvoNormS0`          | x sigmoid(v x) over the deviation of a group; no ReLU beside  | Liu et al. 2020         |
| `FilterResponseNorm` | x over its root mean square, then a threshold; no ReLU beside | Singh et al., CVPR 2020 |
| `MABN`               | second moments over the last batches, forward and backward    | Yan et al., ICLR 2020   |
| `MomentumBatchNorm`  | batch norm by averages whose memory grows during training     | Yong et al., ECCV 2020  |
| `RunningChannelNorm` | running batch norm, then group norm, with one affine map      | Qiao et al. 2019        |

And what isn't a norm: `CentredConv2d`, the convolution that goes before `MABN`: each output channel's weights less
their mean; `WSConv2d`, by weights of mean 0 and std 1, which goes before `GroupNorm` (Qiao et al. 2019);
`convert_convs`, which swaps the convolutions of a model for such; `SkipInit`, a multiplier at the end of a residual
branch, for networks without norms (De and Smith, NeurIPS 2020).
"""

from norms.rivals.convert_convs import convert_convs
from norms.rivals.evonorm import EvoNormS0
from norms.rivals.filter_response import FilterResponseNorm
from norms.rivals.mabn import MABN, CentredConv2d
from norms.rivals.momentum import MomentumBatchNorm
from norms.rivals.pairs import BatchChannelNorm, RunningChannelNorm
from norms.rivals.renorm import BatchRenorm
from norms.rivals.skip_init import SkipInit
from norms.rivals.weight_standardization import WSConv2d

__all__ = ["MABN", "BatchChannelNorm", "BatchRenorm", "CentredConv2d", "EvoNormS0", "FilterResponseNorm",
           "MomentumBatchNorm", "RunningChannelNorm", "SkipInit", "WSConv2d", "convert_convs"]
