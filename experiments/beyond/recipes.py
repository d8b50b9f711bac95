"""Recipes to train the network of `small-batch` by, which were tried, the best of each norm, and training by them."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from experiments.beyond.eigen import EigenAdam
from experiments.image_data import ImageData
from experiments.models import CHANNELS, conv_layer, get_cnn_model, init_alike
from experiments.results import Row
from experiments.side_by_side import EachTransform, SideBySide, each_loss
from experiments.study.stacked import stack, unstack
from experiments.study.stacked_layers import GroupedConv2d
from experiments.training import Stopwatch, fit_from
from norms import GroupNorm, RunningBatchNorm, recalibrate
from runner import (
    BatchTransformXCallback,
    Callback,
    CudaCallback,
    DataBunch,
    Dataset,
    Learner,
    ParamScheduler,
    ProgressCallback,
    Runner,
)

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


# --- training several seeds at once -------------------------------------------------------------------------------

def train_together(recipes: Sequence[Recipe], seeds: Sequence[int], images: ImageData, device: str = "cpu",
                   label: str = "", cbs: Iterable[Callback] = (),
                   checkpoint: Path | None = None) -> list[nn.Sequential]:
    """Networks trained for one epoch, all at once: a list, one for each of the `recipes` and its seed.

    Each is what it would be trained alone, to rounding: `stack` says why. The order of its images is the one that
    `experiments.training.train` has for its seed. `checkpoint` is as there.

    Raises:
        ValueError: recipes that differ in more than `Recipe.free`.
    """
    recipe = recipes[0]
    if any(r.alike != recipe.alike for r in recipes):
        raise ValueError(f"train_together got {[str(r) for r in recipes]}; trained at once they may differ in "
                         f"{' and '.join(recipe.free)} alone")
    models = [r.build(seed, images.c) for r, seed in zip(recipes, seeds, strict=True)]
    net, k = stack(models), len(models)
    for m in net.modules():     # EigenAdam's steps are faster on weights laid out as usual, convolutions by patches not
        if isinstance(m, GroupedConv2d): m.by_rule = False
    smoothing = torch.tensor([r.smoothing for r in recipes], device=device)
    dl = SideBySide(images.train, recipe.batch_size, seeds, drop_last=True)
    rates = torch.tensor([r.lr for r in recipes]) if "lr" in recipe.free else recipe.lr

    def sum_of_losses(pred: Tensor, yb: Tensor) -> Tensor: return each_loss(pred, yb, smoothing).sum()
    opt = OPTIMIZERS[recipe.optimizer](net, rates)
    run = Runner([CudaCallback(device), BatchTransformXCallback(EachTransform(k)),
                  ParamScheduler("lr", lambda pos: rates * (1 - pos)), ProgressCallback(label), *cbs])
    fit_from(checkpoint, run, 1, Learner(net, opt, sum_of_losses, DataBunch(dl, None, images.c)))
    unstack(net, models)
    return models


@torch.no_grad()
def measure(model: nn.Module, data: Dataset) -> tuple[float, float]:
    """Accuracy and mean loss of `model` on the `Dataset` `data`, in evaluation mode: plain floats."""
    device = next(model.parameters()).device
    model.eval()
    pred = torch.cat([model(x.view(-1, 1, 28, 28).to(device)) for x in data.x.split(500)]).cpu()
    return (pred.argmax(1) == data.y).double().mean().item(), F.cross_entropy(pred, data.y).item()


def rows_of(recipes: Sequence[Recipe], seeds: Sequence[int], images: ImageData, device: str, label: str,
            test: bool, checkpoint: Path | None = None) -> list[Row]:
    """The final rows of the `recipes`, each with its seed; `test` is whether to read the test images."""
    watch = Stopwatch()
    models = train_together(recipes, seeds, images, device, label, [watch], checkpoint)
    seconds = watch.seconds / len(seeds)
    rows: list[Row] = []
    for recipe, seed, model in zip(recipes, seeds, models, strict=True):
        row: Row = {"arm": str(recipe), **asdict(recipe), "seed": seed, "seconds": seconds, "status": "ok",
               "parameters": sum(p.numel() for p in model.parameters())}
        row["before"], _ = measure(model, images.valid)
        n = recipe.recalibrated if recipe.running else 0
        try:
            if n: recalibrate(model, (x.view(-1, 1, 28, 28) for x in images.train.x.split(500)), n)
        except ValueError: row["status"] = "diverged"
        for name, data in [("valid", images.valid)] + [("test", images.test)] * test:
            row[f"{name}_accuracy"], row[f"{name}_loss"] = measure(model, data)
            if not math.isfinite(row[f"{name}_loss"]): row["status"] = "diverged"
        rows.append(row)
    return rows
