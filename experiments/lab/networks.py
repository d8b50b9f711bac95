"""The networks of the lab, built with any norm, and how each norm wants its network."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import nn

from experiments.models import (
    CHANNELS,
    AvgPool,
    Lambda,
    NormFactory,
    Residual,
    conv_layer,
    flatten,
    init_alike,
    make_norm,
)
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm, SteadyBatchNorm
from norms.rivals import (
    MABN,
    BatchChannelNorm,
    BatchRenorm,
    CentredConv2d,
    EvoNormS0,
    FilterResponseNorm,
    MomentumBatchNorm,
    RunningChannelNorm,
    SkipInit,
    WSConv2d,
)

NETS = ("five-layer", "resnet")
WIDTH = 16      # channels of the residual network's first block; each later one has twice as many
GROUPS = 4      # of every norm that takes groups


@dataclass(frozen=True)
class How:
    """How a network is normalised.

    `norm` makes the norm, None for a network without; with `of_training` it is called with the training's `steps` and
    `batch_size` too, for a norm whose definition has a schedule, or a batch size to reach. `last` makes the norm where
    no activation may follow, at the end of a residual branch or on a shortcut, if that is another: of norms that hold
    their activation. `conv` is the class of the convolutions. `branch` makes what stands at the end of each residual
    branch, if anything does.
    """

    norm: Callable[..., nn.Module] | None
    of_training: bool = False
    last: NormFactory | None = None
    conv: Callable[..., nn.Module] = nn.Conv2d
    branch: Callable[[], nn.Module] | None = None

    def factory(self, steps: int, batch_size: int) -> NormFactory | None:
        """The norm of a network that is trained for `steps` steps: from a channel count to a module."""
        if self.norm is None or not self.of_training: return self.norm
        return partial(self.norm, steps=steps, batch_size=batch_size)


def group_norm(nf: int) -> nn.Module: return GroupNorm(GROUPS, nf)


def batch_renorm(nf: int, steps: int, batch_size: int) -> nn.Module:
    """Its limits grow over the same parts of the training as in the paper, of 130,000 steps."""
    return BatchRenorm(nf, begin=steps // 26, rmax_at=steps * 4 // 13, dmax_at=steps * 5 // 26)


def momentum_batch_norm(nf: int, steps: int, batch_size: int) -> nn.Module:
    """Its memory grows over the whole training."""
    return MomentumBatchNorm(nf, steps=steps)


def mabn(nf: int, steps: int, batch_size: int) -> nn.Module:
    """It stands for batch norm at a batch size of 32."""
    return MABN(nf, window=max(1, 32 // batch_size))


NORMS: dict[str, How] = {
    "none": How(None, branch=SkipInit),
    "BatchNorm2d": How(nn.BatchNorm2d),
    "BatchNorm": How(BatchNorm),
    "LayerNorm": How(lambda nf: LayerNorm()),
    "InstanceNorm": How(InstanceNorm),
    "GroupNorm": How(group_norm),
    "RunningBatchNorm": How(RunningBatchNorm),
    "RunningBatchNorm-averaged": How(partial(RunningBatchNorm, average_backward=True)),
    "SteadyBatchNorm": How(SteadyBatchNorm),
    "SteadyBatchNorm-WS": How(SteadyBatchNorm, conv=WSConv2d),
    "BatchNorm2d-WS": How(nn.BatchNorm2d, conv=WSConv2d),
    "BatchChannelNorm-WS": How(lambda nf: BatchChannelNorm(nf, GROUPS), conv=WSConv2d),
    "GroupNorm-WS": How(group_norm, conv=WSConv2d),
    "BatchRenorm": How(batch_renorm, of_training=True),
    "MomentumBatchNorm": How(momentum_batch_norm, of_training=True),
    "MomentumBatchNorm-WS": How(momentum_batch_norm, of_training=True, conv=WSConv2d),
    "MABN": How(mabn, of_training=True, conv=CentredConv2d),
    "FilterResponseNorm": How(FilterResponseNorm, last=partial(FilterResponseNorm, activation=False)),
    "EvoNormS0": How(lambda nf: EvoNormS0(nf, GROUPS), last=group_norm),
    "BatchChannelNorm": How(lambda nf: BatchChannelNorm(nf, GROUPS)),
    "RunningChannelNorm": How(lambda nf: RunningChannelNorm(nf, GROUPS)),
    "RunningChannelNorm-averaged": How(lambda nf: RunningChannelNorm(nf, GROUPS, average_backward=True)),
}


def build(net: str, norm: str, seed: int, c: int = 10, channels: int = 1, steps: int = 1,
          batch_size: int = 2) -> nn.Sequential:
    """The network called `net` with the norm called `norm`: `(N, channels, H, W)` to `(N, c)`.

    From one seed all norms get the same convolutions and the same last layer. `steps` and `batch_size` are those of the
    training.
    """
    how = NORMS[norm]
    model = {"five-layer": five_layer, "resnet": resnet}[net](how, how.factory(steps, batch_size), c, channels)
    init_alike(model, seed)
    return model


def five_layer(how: How, norm: NormFactory | None, c: int, channels: int) -> nn.Sequential:
    """The lesson's network: five conv layers of stride 2 (convolution, ReLU, norm), pool, linear."""
    sizes = [channels, *CHANNELS]
    layers = [conv_layer(ni, nf, 3 if i else 5, norm=norm, conv=how.conv)
              for i, (ni, nf) in enumerate(pairwise(sizes))]
    return nn.Sequential(*layers, AvgPool(), Lambda(flatten), nn.Linear(sizes[-1], c))


def resnet(how: How, norm: NormFactory | None, c: int, channels: int, width: int = WIDTH) -> nn.Sequential:
    """A residual network of nine 3x3 convolutions: a stem of stride 2, four basic blocks, pool, linear.

    The blocks have `width`, 2, 4 and 8 times as many channels, and all but the first halve the map. Each is
    convolution, norm, ReLU, convolution, norm; then the sum with the shortcut, which is a 1x1 convolution and a norm
    where the shape changes; then ReLU. `(N, channels, H, W)` to `(N, c)`.
    """
    layers, ni = [unit(how, norm, channels, width, stride=2)], width
    for i in range(4):
        nf, stride = width * 2**i, 2 if i else 1
        branch = [unit(how, norm, ni, nf, stride=stride), unit(how, norm, nf, nf, last=True)]
        if how.branch is not None: branch.append(how.branch())
        shortcut = None if ni == nf and stride == 1 else unit(how, norm, ni, nf, ks=1, stride=stride, last=True)
        layers.append(nn.Sequential(Residual(nn.Sequential(*branch), shortcut), nn.ReLU()))
        ni = nf
    return nn.Sequential(*layers, AvgPool(), Lambda(flatten), nn.Linear(ni, c))


def unit(how: How, norm: NormFactory | None, ni: int, nf: int, ks: int = 3, stride: int = 1,
         last: bool = False) -> nn.Module:
    """Convolution, norm, and ReLU unless it is the `last` of a branch or the norm holds its own activation."""
    layers = [how.conv(ni, nf, ks, stride=stride, padding=ks // 2, bias=norm is None)]
    layer = None if norm is None else make_norm(how.last if last and how.last is not None else norm, nf, "unit")
    if layer is not None: layers.append(layer)
    if not last and not getattr(layer, "activates", False): layers.append(nn.ReLU())
    return nn.Sequential(*layers)
