"""Recipes to train the network of `small-batch` by: what is free, which were tried, and the best of each norm."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn, optim

from experiments.beyond.eigen import EigenAdam
from experiments.models import CHANNELS, conv_layer, get_cnn_model, init_alike
from norms import GroupNorm, RunningBatchNorm

RUNNING, GROUP = "RunningBatchNorm", "GroupNorm"
OPTIMIZERS: dict[str, Callable[[nn.Module, float | Tensor], optim.Optimizer]] = {
    "SGD": lambda net, lr: optim.SGD(net.parameters(), lr),
    "Adam": lambda net, lr: optim.Adam(net.parameters(), lr),
    "EigenAdam": EigenAdam,
}


@dataclass(frozen=True)
class Recipe:
    """How the network is trained: all that is free, and the norm.

    The rate falls from `lr` linearly to 0. `memory` is how many images RunningBatchNorm's statistics remember
    (`running_moments` says how that counts; it is of no use to GroupNorm), `groups` is GroupNorm's; after training
    the statistics are taken anew from the first `recalibrated` training images, for RunningBatchNorm.
    """

    norm: str
    optimizer: str
    lr: float
    batch_size: int = 2
    memory: int = 200
    average_backward: bool = True
    recalibrated: int = 5000
    groups: int = 4
    smoothing: float = 0.0

    def __str__(self) -> str:
        norm = (f"memory {self.memory}{', averaged backward' * self.average_backward}" if self.running
                else f"{self.groups} groups")
        return (f"{self.norm}, {self.optimizer} {self.lr:g}, {norm}"
                + f", smoothing {self.smoothing:g}" * bool(self.smoothing)
                + f", batch {self.batch_size}" * (self.batch_size != 2))

    @property
    def running(self) -> bool: return self.norm == RUNNING

    @property
    def free(self) -> tuple[str, ...]:
        """The fields in which recipes that are trained at once may differ."""
        return ("lr", "smoothing") if self.optimizer == "EigenAdam" else ("smoothing",)

    @property
    def alike(self) -> dict[str, object]: return {k: v for k, v in asdict(self).items() if k not in self.free}

    def build(self, seed: int, c: int = 10) -> nn.Sequential:
        """The network; the same weights from the same seed for every recipe."""
        share = 4 / (self.memory + 2)           # the newest batch's at batch size 2: memory = 2 (2 - share) / share

        def norm(nf: int) -> nn.Module:
            if not self.running: return GroupNorm(self.groups, nf)
            return RunningBatchNorm(nf, share, rule="per_image", average_backward=self.average_backward)
        model = get_cnn_model(argparse.Namespace(c=c), CHANNELS, conv_layer, norm=norm)
        init_alike(model, seed)
        return model


# As many for each norm. The first are the same for both, the last two concern what it alone has.
_COMMON = [("SGD", 0.05, 0.0), ("Adam", 0.001, 0.0), ("EigenAdam", 0.001, 0.0), ("EigenAdam", 0.0015, 0.0),
           ("EigenAdam", 0.0015, 0.05), ("EigenAdam", 0.0015, 0.1), ("EigenAdam", 0.0015, 0.2),
           ("EigenAdam", 0.0015, 0.3), ("EigenAdam", 0.0015, 0.4),
           ("EigenAdam", 0.0025, 0.1), ("EigenAdam", 0.0025, 0.2), ("EigenAdam", 0.0025, 0.3)]
_ALONE: dict[str, list[dict[str, Any]]] = {RUNNING: [{"memory": 800}, {"average_backward": False}],
                                           GROUP: [{"groups": 2}, {"groups": 8}]}
TRIED = [recipe for norm in (RUNNING, GROUP) for recipe in [
    *(Recipe(norm, optimizer, lr, smoothing=smoothing) for optimizer, lr, smoothing in _COMMON),
    *(Recipe(norm, "EigenAdam", 0.0015, smoothing=0.1, **alone) for alone in _ALONE[norm])]]
BEST = {RUNNING: Recipe(RUNNING, "EigenAdam", 0.0015, smoothing=0.2),
        GROUP: Recipe(GROUP, "EigenAdam", 0.0015, smoothing=0.1, groups=2)}
FINAL = [*BEST.values(), replace(BEST[RUNNING], batch_size=1)]
RECIPES = {str(r): r for r in (*TRIED, *FINAL)}
