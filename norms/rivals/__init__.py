"""Norms that others made for small batches, written out by hand like those one folder up, to compare with.

====================  ==============================================================  ============================
name                  what it computes                                                source
====================  ==============================================================  ============================
`BatchChannelNorm`    batch norm, then group norm, with one affine map                Qiao et al. 2019
`BatchRenorm`         batch norm moved to what running averages would make of it      Ioffe, NeurIPS 2017
`EvoNormS0`           x sigmoid(v x) over the deviation of a group; no ReLU beside    Liu et al. 2020
`FilterResponseNorm`  x over its root mean square, then a threshold; no ReLU beside   Singh et al., CVPR 2020
`MABN`                second moments over the last batches, forward and backward      Yan et al., ICLR 2020
`MomentumBatchNorm`   batch norm by averages whose memory grows during training       Yong et al., ECCV 2020
`RunningChannelNorm`  running batch norm, then group norm, with one affine map        Qiao et al. 2019
====================  ==============================================================  ============================

`CentredConv2d` is the convolution that goes before `MABN`: each output channel's weights less their mean.
"""

from norms.rivals.evonorm import EvoNormS0
from norms.rivals.filter_response import FilterResponseNorm
from norms.rivals.mabn import MABN, CentredConv2d
from norms.rivals.momentum import MomentumBatchNorm
from norms.rivals.pairs import BatchChannelNorm, RunningChannelNorm
from norms.rivals.renorm import BatchRenorm

__all__ = ["MABN", "BatchChannelNorm", "BatchRenorm", "CentredConv2d", "EvoNormS0", "FilterResponseNorm",
           "MomentumBatchNorm", "RunningChannelNorm"]
