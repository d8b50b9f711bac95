"""The arms of `dying`: the published network, what might keep it alive, one change at a time, and other norms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from experiments.lab.networks import GROUPS, How, five_layer
from experiments.models import NormFactory, init_alike
from experiments.results import Row
from norms import BatchNorm, GroupNorm, RunningBatchNorm
from norms.rivals import RunningChannelNorm

BATCH_SIZE = 2
Change = Callable[[nn.Module], None]        # of a network whose weights have just been drawn


@dataclass(frozen=True)
class Arm:
    """One way to begin the training.

    `norm` makes the norms; the rate is `rate` times that of the settings and grows from 0 in the first `warm_up` steps;
    `change` changes the weights that were drawn; with `norm_first` the norm stands before the ReLU. `beside` is the arm
    that it differs from in one thing, with which it is compared seed by seed.
    """

    norm: NormFactory = RunningBatchNorm
    rate: float = 1.0
    warm_up: int = 0
    change: Change | None = None
    norm_first: bool = False
    beside: str = "published"

    def build(self, seed: int, c: int = 10, channels: int = 1) -> nn.Sequential:
        """The five-layer network from `seed`: `(N, channels, 28, 28)` to `(N, c)`."""
        model = five_layer(How(self.norm), self.norm, c, channels)
        if self.norm_first:
            for layer in model[:5]:
                assert isinstance(layer, nn.Sequential)
                layer[1], layer[2] = layer[2], layer[1]
        init_alike(model, seed)
        if self.change is not None: self.change(model)
        return model

    def row(self, name: str, seed: int, lr: float, total: int) -> Row:
        """What the arm called `name` is, the beginning of its row; `total` are the steps of an epoch."""
        lr *= self.rate
        row: Row = {"arm": name, "seed": seed, "lr": lr, "batch_size": BATCH_SIZE, "epochs": 1}
        if not self.warm_up: return row
        if self.warm_up >= total: return {**row, "lr": [0.0, lr * total / self.warm_up]}
        return {**row, "lr": [0.0, lr, lr], "warm_up": self.warm_up / total}


def running(**settings: float | str | bool) -> NormFactory:
    """Makes `RunningBatchNorm`s with these settings."""
    return partial(RunningBatchNorm, **settings)        # type: ignore[arg-type]    # names come with their own types


def clamped(nf: int, images: int, var: float = RunningBatchNorm.clamp_var) -> nn.Module:
    """`RunningBatchNorm(nf)` that takes the variance as at least `var` until it has seen so many `images`."""
    norm = RunningBatchNorm(nf)
    norm.clamp_images, norm.clamp_var = images, var
    return norm


@torch.no_grad()
def scale_filters(model: nn.Module, by: float) -> None:
    """Multiply all filters by `by`."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d): m.weight.mul_(by)


@torch.no_grad()
def centre_filters(model: nn.Module) -> None:
    """Take from every filter its mean, and leave its length."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            w = m.weight.flatten(1)                                         # (out, in * kernel), the same memory
            length = w.norm(dim=1, keepdim=True)
            w.sub_(w.mean(1, keepdim=True))
            w.mul_(length / w.norm(dim=1, keepdim=True))


# The order is that of running them: what is most likely asked for comes first.
ARMS: dict[str, Arm] = {
    "published": Arm(),
    "eps-1e-2": Arm(running(eps=1e-2)),
    "warm-up-1000": Arm(warm_up=1000),
    "clamp-2000-at-0.1": Arm(partial(clamped, images=2000, var=0.1)),
    "eps-0.1": Arm(running(eps=0.1)),
    "averaged-backward": Arm(running(average_backward=True)),
    "filters-doubled": Arm(change=partial(scale_filters, by=2.0)),
    "half-rate": Arm(rate=0.5),
    "mom-0.5": Arm(running(mom=0.5, rule="per_image")),
    "mom-0.05": Arm(running(mom=0.05, rule="per_image")),
    "norm-before-relu": Arm(norm_first=True),
    "GroupNorm-behind": Arm(partial(RunningChannelNorm, num_groups=GROUPS)),
    "GroupNorm": Arm(partial(GroupNorm, GROUPS)),
    "BatchNorm": Arm(BatchNorm),
    "no-clamp": Arm(partial(clamped, images=0)),
    "filters-halved": Arm(change=partial(scale_filters, by=0.5)),
    "eps-1e-3": Arm(running(eps=1e-3)),
    "warm-up-250": Arm(warm_up=250),
    "clamp-2000": Arm(partial(clamped, images=2000)),
    "clamp-200": Arm(partial(clamped, images=200)),
    "mom-0.2": Arm(running(mom=0.2, rule="per_image")),
    "mom-0.02": Arm(running(mom=0.02, rule="per_image")),
    "filters-centred": Arm(change=centre_filters),
}
# At twice the rate more runs die, so that what keeps them alive shows in fewer of them.
TWICE = "published", "eps-1e-2", "warm-up-250", "clamp-2000-at-0.1", "averaged-backward", "GroupNorm-behind"
ARMS |= {f"{name}-at-twice": replace(ARMS[name], rate=2.0, beside="published-at-twice") for name in TWICE}


def beside(names: Sequence[str]) -> dict[str, str]:
    """For each of the arms `names` the one that it is compared with, if that is among them too."""
    return {name: ARMS[name].beside for name in names if ARMS[name].beside in names and ARMS[name].beside != name}
