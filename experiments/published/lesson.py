"""Every training run of the batch norm lesson, in order.

Source: fastai, "Deep Learning from the Foundations" (2019), part 2 v3, notebook 07, run on a GPU. Five conv layers with
the channels 8, 16, 32, 64, 64, each conv, ReLU, norm; plain SGD; MNIST's first 50,000 images, validation on the other
10,000. The last run, of a variant of the network, is the one that `one-epoch` has too.

Where the course's norms and these differ: its BatchNorm detached the batch's statistics from the graph and normalised
by the unbiased variance; its LayerNorm and InstanceNorm did the latter. What that does to one value, and what it does
not explain, is printed beside these two runs.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.arms import run_arms
from experiments.image_data import ImageData
from experiments.images import images_of, load_images
from experiments.models import CHANNELS, conv_layer, get_cnn_layers, init_alike
from experiments.published import one_epoch, runs
from experiments.published.runs import Curves, Run, train_run
from experiments.published.small_batch import build
from experiments.results import Row, Trained
from experiments.settings import add_choice, add_image_arguments, from_args
from experiments.study import grid
from experiments.training import windows
from experiments.verdict import Result
from runner import Hooks, append_stats

HOOKED = "BatchNorm-hooked"
WARM_UP = (0.6, 2.0, 0.1)       # the rate: to 2 over the first 30 %, then to 0.1
RUNS = {
    "none": Run(partial(build, "none"), 512, 0.4, 2, (0.9262, 0.9698), "near"),
    HOOKED: Run(partial(build, "BatchNorm"), 512, 0.9, 1, (0.9520,), "near"),
    "BatchNorm": Run(partial(build, "BatchNorm"), 512, 1.0, 3, (0.9386, 0.9716, 0.9707), "near"),
    "BatchNorm2d": Run(partial(build, "BatchNorm2d"), 512, 1.0, 3, (0.9496, 0.9776, 0.9813), "near"),
    "BatchNorm-warm-up": Run(partial(build, "BatchNorm"), 512, WARM_UP, 8, (0.8394, 0.8514, 0.9788, 0.9740, 0.9773),
                             "near", ", ..."),
    "LayerNorm": Run(partial(build, "LayerNorm"), 512, 0.8, 3, (0.0991,) * 3, note=" (loss NaN)"),
    "InstanceNorm": Run(partial(build, "InstanceNorm"), 512, 0.1, 3, (0.0991,) * 3, note=" (loss NaN)"),
    "BatchNorm2d-batch-2": Run(partial(build, "BatchNorm2d"), 2, 0.4, 1, (0.2604,), "fails", " (0.2348 earlier)"),
    "RunningBatchNorm-batch-2": Run(partial(build, "RunningBatchNorm"), 2, 0.4, 1, (0.9723,), "holds",
                                    " (0.9730 later, at batch 32 by its time)"),
    "RunningBatchNorm-batch-32": one_epoch.RUNS["lesson-batch-32"],
    "variant-batch-16": one_epoch.RUNS["variant-batch-16"],
}
PUBLISHED = {name: list(run.published) for name, run in RUNS.items()}


@dataclass
class Config(runs.RunSettings):
    """Settings of the experiment; `arms` are names in `RUNS`."""

    runs = RUNS
    arms: Sequence[str] = tuple(RUNS)


class LessonCurves(Curves, total=False):
    """Of the hooked run also each layer's means and standard deviations."""

    activations: dict[str, list[list[float]]]


# --- why NaN ------------------------------------------------------------------------------------------------------

class Unbiased(nn.Module):
    """The lesson's layer norm (`dims` 1, 2, 3) or instance norm (2, 3) before training, when its affine map is 1 and 0.

        y = (x - mean) / sqrt(var + eps)        var = sum (x - mean)^2 / (n - 1) over `dims`, 0/0 of one value
    """

    def __init__(self, dims: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.dims, self.eps = dims, eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dims, keepdim=True)
        n = math.prod(x.shape[d] for d in self.dims)
        var = (centred * centred).sum(self.dims, keepdim=True) / (n - 1)
        return centred / torch.sqrt(var + self.eps)


LESSONS_OWN = {"LayerNorm": Unbiased((1, 2, 3), 1e-5), "InstanceNorm": Unbiased((2, 3), 1.0)}


def lost_at_first(name: str, images: ImageData, seed: int) -> float:
    """The share of training images whose first prediction is NaN with the lesson's own form of the norm called `name`.

    That is before any step of training, from the same weights as the run's.
    """
    model = nn.Sequential(*get_cnn_layers(images, CHANNELS, conv_layer, norm=lambda nf: LESSONS_OWN[name]))
    init_alike(model, seed)
    with torch.no_grad(): pred = model(images.train.x[:RUNS[name].batch_size].view(-1, 1, 28, 28))
    share: float = pred.isnan().any(1).float().mean().item()
    return share


def explanation(name: str, row: Row) -> str:
    """Why the lesson's run became NaN and what happens here, in a sentence of what `row` has measured."""
    lost, step = row["lost_at_first"], row["first_not_finite"]
    theirs = (f"with the lesson's own form {lost:.0%} of the first predictions are NaN before any step of training"
              + (": its unbiased variance is 0/0 of the one value per channel on the 1x1 map" if lost else
                 ", for on the 1x1 map 64 values share one variance: NaN came from the training, not from the norm"))
    if step is None: ours = "here every loss is finite"
    else: ours = f"here the loss is finite for {step} steps and then no more: lr {row['lr']} is too much"
    if name == "InstanceNorm" and step is None and row["valid_accuracy"] < 0.2:
        ours += ", and nothing is learned: of one value the norm's output is its bias"
    return f"{name}, published NaN: {theirs}; {ours}."


# --- the experiment -----------------------------------------------------------------------------------------------

def train_arm(config: Config, name: str, seed: int, checkpoint: Path) -> Trained[LessonCurves]:
    """Train the run called `name` from one seed."""
    images = images_of(config)
    model = RUNS[name].build(seed, images.c)
    with Hooks(model[:len(CHANNELS)], append_stats) if name == HOOKED else nullcontext() as hooks:
        # What hooks have collected is in no checkpoint; these few seconds begin anew from the seed.
        rows, row, losses = train_run(config, RUNS[name], name, model, images, seed, None if hooks else checkpoint)
    row["first_not_finite"] = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    curve: LessonCurves = {"losses": windows(losses, 50)}
    if hooks: curve["activations"] = {f"layer {i + 1}": [torch.stack(s).tolist() for s in hook.stats]
                                      for i, hook in enumerate(hooks)}
    if name in LESSONS_OWN: row["lost_at_first"] = lost_at_first(name, images, seed)
    return rows, row, curve


def run(config: Config) -> Result:
    """Train every run of every seed, print as it goes, write the run folder: a `Result`."""
    images = load_images(config)
    n = sum(p.numel() for p in build("none", 0).parameters())
    network = f"conv layers {CHANNELS}, pool, linear; {n:,} parameters without a norm"
    return run_arms("lesson", config, images, grid(arm=config.arms, seed=config.seeds), train_arm,
                    header=runs.header(images, config, network), judge=judge, table=table, published=PUBLISHED,
                    said=lambda row: explanation(row["arm"], row) if row["arm"] in LESSONS_OWN else "",
                    draw=lambda rows, curves, path: draw(rows, curves, images, path))


judge, table = runs.judge(RUNS, "lesson's runs"), runs.table(RUNS)


def draw(rows: Sequence[Row], curves: Mapping[str, LessonCurves], images: ImageData, path: Path) -> None:
    """The pictures: accuracies and losses, and beside it the means and deviations of the hooked run's layers."""
    from runner import plots
    runs.picture(RUNS, rows, curves, images, path)
    if HOOKED not in curves: return
    series = {f"{i} conv layer": (range(len(means)), means, stds) for i, (means, stds) in
              enumerate(curves[HOOKED]["activations"].values())}         # by their paths in the network
    plots.save(plots.plot_means_stds(series)[0].figure, path.with_name("lesson_activations.png"))


# --- the command line ---------------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments lesson`."""
    add_choice(parser, "arms", RUNS)
    add_image_arguments(parser, "lesson")


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status."""
    return run(Config(**from_args(args))).status
