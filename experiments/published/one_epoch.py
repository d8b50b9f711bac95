"""The one-epoch challenge: how accurate a network becomes in one epoch, and what a batch norm left in it costs.

Source: fastai, "Deep Learning from the Foundations" (2019), part 2 v3, notebook 07, for the first run: the lesson's
network (see `small-batch`) with RunningBatchNorm at batch size 32, lr from 1.0 down to 0.2. The others are a variant of
it: conv layers with 8, 16, 32, 64 channels and RunningBatchNorm, then a residual block (two 3x3 convolutions of stride
2 with 64 channels, without bias, each followed by a norm and leaky ReLU), pool, dropout 0.4, linear; batch size 16 at
lr 1.0 to 0.2, published as "slightly beat 0.975", and batch size 2 at lr 0.4, of which no figure is published.

As published the norm in the block is torch's BatchNorm2d. Its maps are 1x1, so at batch size 2 it normalises over two
values per channel. The runs called running have RunningBatchNorm there too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from experiments.arms import run_arms
from experiments.images import images_of, load_images
from experiments.models import Lambda, NormFactory, ResidualBlock, conv_layer, flatten, init_alike
from experiments.published import runs
from experiments.published.runs import Curves, Run, train_run
from experiments.published.small_batch import build
from experiments.results import Trained
from experiments.settings import add_choice, add_image_arguments, from_args
from experiments.study import grid
from experiments.training import windows
from experiments.verdict import Result
from norms import RunningBatchNorm

CHANNELS = [8, 16, 32, 64]
DROPOUT = 0.4
FALLING = (1.0, 0.2)        # the rate, linear over the epoch


def variant(block_norm: NormFactory, seed: int, c: int = 10) -> nn.Sequential:
    """The variant of the lesson's network with `block_norm` in its residual block, `(N, 1, 28, 28)` to `(N, c)`."""
    nfs = [1, *CHANNELS]
    layers = [conv_layer(ni, nf, 5 if i == 0 else 3, norm=RunningBatchNorm)
              for i, (ni, nf) in enumerate(zip(nfs, CHANNELS, strict=False))]        # maps 14, 7, 4, 2
    model = nn.Sequential(*layers, ResidualBlock(CHANNELS[-1], block_norm), nn.AdaptiveAvgPool2d(1), Lambda(flatten),
                          nn.Dropout(DROPOUT), nn.Linear(CHANNELS[-1], c))
    init_alike(model, seed)
    return model


as_published, running = partial(variant, nn.BatchNorm2d), partial(variant, RunningBatchNorm)
RUNS = {
    "lesson-batch-32": Run(partial(build, "RunningBatchNorm"), 32, FALLING, published=(0.9818,), claim="near"),
    "variant-batch-16": Run(as_published, 16, FALLING, published=(0.975,), claim="at least", note=" and slightly more"),
    "variant-batch-16-running": Run(running, 16, FALLING),
    "variant-batch-2": Run(as_published, 2, 0.4),
    "variant-batch-2-running": Run(running, 2, 0.4),
}
PUBLISHED = {name: list(run.published) for name, run in RUNS.items() if run.published}


@dataclass
class Config(runs.RunSettings):
    """Settings of the experiment; `arms` are names in `RUNS`."""

    runs = RUNS
    arms: Sequence[str] = tuple(RUNS)


def train_arm(config: Config, name: str, seed: int, checkpoint: Path) -> Trained[Curves]:
    """Train the run called `name` from one seed."""
    images = images_of(config)
    rows, row, losses = train_run(config, RUNS[name], name, RUNS[name].build(seed, images.c), images, seed, checkpoint)
    return rows, row, {"losses": windows(losses, 50)}


def run(config: Config) -> Result:
    """Train every run of every seed, print as it goes, write the run folder: a `Result`."""
    images = load_images(config)
    n = sum(p.numel() for p in as_published(0).parameters())
    return run_arms("one-epoch", config, images, grid(arm=config.arms, seed=config.seeds), train_arm,
                    header=runs.header(images, config, f"the lesson's, and a variant of {n:,} parameters"),
                    judge=judge, table=table, published=PUBLISHED,
                    draw=lambda rows, curves, path: runs.picture(RUNS, rows, curves, images, path))


judge, table = runs.judge(RUNS, "runs of one epoch"), runs.table(RUNS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments one-epoch`."""
    add_choice(parser, "arms", RUNS)
    add_image_arguments(parser, "one-epoch")


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status."""
    return run(Config(**from_args(args))).status
