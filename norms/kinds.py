"""The kinds of norms, torch's and ours: which of them works per channel, over trailing axes, or on images."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from norms.batch import BatchNorm
from norms.group import GroupNorm
from norms.instance import InstanceNorm
from norms.layer import LayerNorm
from norms.rivals.evonorm import EvoNormS0
from norms.rivals.filter_response import FilterResponseNorm
from norms.rivals.mabn import MABN
from norms.rivals.momentum import MomentumBatchNorm
from norms.rivals.pairs import BatchChannelNorm, RunningChannelNorm
from norms.rivals.renorm import BatchRenorm
from norms.running import RunningBatchNorm
from norms.running_norm import RunningNorm

# The norms with an affine map per channel of axis 1. Within a family the formula is the same, at equal eps. (The pairs
# are batch norms with more behind; of the rivals the same holds in evaluation.)
RIVALS = (BatchRenorm, MomentumBatchNorm, MABN)
BATCH = (_BatchNorm, BatchNorm, BatchChannelNorm, RunningBatchNorm, RunningChannelNorm, *RIVALS)
BatchKind = _BatchNorm | RunningNorm                        # as a type
FAMILIES = (BATCH, (_InstanceNorm, InstanceNorm), (nn.GroupNorm, GroupNorm), (FilterResponseNorm,),
            (EvoNormS0,))
CHANNEL_NORMS = tuple(cls for family in FAMILIES for cls in family)
ACTIVATION = ("tau", "v")               # parameters of an activation that is part of a norm
LAYER = (nn.LayerNorm, LayerNorm)       # over trailing axes, with an affine map per value of these
ON_IMAGES = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.SyncBatchNorm, BatchNorm, RunningBatchNorm,
             *RIVALS)                   # or may be


def frozen_class(module: nn.Module | None) -> type[nn.Module] | None:
    """torchvision's FrozenBatchNorm2d if `module` is one, else None; known by its name, to need no torchvision."""
    return next((cls for cls in type(module).__mro__
                 if (cls.__module__, cls.__name__) == ("torchvision.ops.misc", "FrozenBatchNorm2d")), None)


def swappable(module: nn.Module | None, layers: bool) -> bool:
    """Whether `module` is a layer norm of known shape, with `layers`, and else whether it is a norm per channel."""
    if layers: return isinstance(module, LAYER) and module.normalized_shape is not None
    return isinstance(module, CHANNEL_NORMS) or frozen_class(module) is not None


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm by its class's name or base; not a block around norms, nor torch's weight norm."""
    if isinstance(module, (*CHANNEL_NORMS, *LAYER)): return True
    if isinstance(module, nn.Sequential) or type(module).__module__.startswith("torch.nn.utils."): return False
    return "Norm" in type(module).__name__ and not any(is_norm(m) for m in module.children())
