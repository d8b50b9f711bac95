"""The norm lab: norm x batch size x schedule x seed on a network and a data set, every rate tuned alike.

First the rate: for each norm, batch size and schedule the same number of rates is tried, on images split off from the
training set. Then fresh seeds at the best rate, and the test images are read once. Plain SGD, cross entropy; all norms
start from the same weights and see the same images in the same order.
"""

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from experiments.arms import run_arms
from experiments.errors import InputError
from experiments.figures import heading, plural, seeds_and_device
from experiments.folder import PREFIX
from experiments.image_data import ImageData
from experiments.images import images_of, load_images
from experiments.lab.arms import RATES, SCHEDULES, WARM_UP, Arm, chosen, points, rates, tried
from experiments.lab.networks import NETS, NORMS, build
from experiments.lab.pictures import draw
from experiments.lab.tables import judge, table
from experiments.results import Row, Trained
from experiments.settings import (
    ImageStudySettings,
    add_choice,
    add_image_arguments,
    check_seed,
    choose,
    from_args,
    positive,
    positive_number,
    some_once,
)
from experiments.study import Grid
from experiments.together import train_together
from experiments.training import Windows, check_batch_size, measured_on, train, windows
from experiments.verdict import Result

BATCH_SIZES = (2,)
SEEDS = {"five-layer": 24, "resnet": 5}
EPOCHS = {"five-layer": 1, "resnet": 5}
TUNE_EPOCHS = {"five-layer": 1, "resnet": 1}
TUNE_SEED = 1000        # no seed of the final runs
TOGETHER = 24
# Up to which batch size networks are trained side by side on a CPU. Milliseconds of processor time per step and
# network, one thread of a busy AMD EPYC, BatchNorm2d, 24 five-layer networks side by side and one alone: .55 and 2.4 at
# batch size 8, 1.2 and 2.6 at 16, 2.3 and 4.1 at 32, 4.6 and 6.6 at 64. Of 5 residual networks 12 and 19 at 8; from 16
# on there is little in it (28 and 33, at 32 52 and 55), and networks alone keep more cores busy.
SIDE_BY_SIDE = {"five-layer": 64, "resnet": 8}


@dataclass
class Config(ImageStudySettings):
    """Settings of the lab.

    `net` is a name in `NETS`, `norms` are names in `NORMS`, `schedules` in `SCHEDULES`; `rates` are those tried at
    batch size 2, None for the usual ones of the network (`arms.rates` says how they grow with the batch size); `seeds`,
    `epochs` and `tune_epochs`, of the runs that choose the rate, None for the usual ones of the network. `tune_seeds`
    are these runs' own. `flips` says whether training images are flipped left to right at random, None where they are a
    folder's. Up to `together` networks are trained as one where that is the faster way: on a CPU up to the batch sizes
    of `SIDE_BY_SIDE`, on a GPU at all.

    Raises:
        InputError: a value that makes no sense.
    """

    folders = True                  # `--data folder:DIR` is one of the images that it takes
    seeds: Any = None               # a tuple from __post_init__ on
    net: str = "five-layer"
    norms: Sequence[str] = tuple(NORMS)
    batch_sizes: Sequence[int] = BATCH_SIZES
    schedules: Sequence[str] = ("warm-up",)
    rates: Sequence[float] | None = None
    epochs: int | None = None
    tune_epochs: int | None = None
    tune_seeds: Sequence[int] = (TUNE_SEED,)
    together: int = TOGETHER
    flips: bool | None = None

    def __post_init__(self) -> None:
        self.net, = choose([self.net], NETS, "network")
        self.norms = choose(self.norms, NORMS, "norm")
        self.schedules = choose(self.schedules, SCHEDULES, "schedule")
        self.batch_sizes = some_once("batch sizes", self.batch_sizes)
        for b in self.batch_sizes: positive("batch size", b)
        if self.rates is not None:
            self.rates = some_once("rates", self.rates)
            for rate in self.rates: positive_number("rate", rate, 0.1)
        for b in self.batch_sizes:
            for rate in rates(self.net, b, self.rates): positive_number(f"the rate at batch size {b}", rate, 0.1)
            some_once(f"rates at batch size {b}, rounded to 3 digits,", rates(self.net, b, self.rates))
        if self.seeds is None: self.seeds = tuple(range(SEEDS[self.net]))
        self.epochs = EPOCHS[self.net] if self.epochs is None else self.epochs
        self.tune_epochs = min(self.epochs, TUNE_EPOCHS[self.net]) if self.tune_epochs is None else self.tune_epochs
        if self.flips is None: self.flips = self.data.startswith(PREFIX)
        for name in ("epochs", "tune_epochs", "together"): positive(name.replace("_", " "), getattr(self, name))
        self.tune_seeds = some_once("tuning seeds", self.tune_seeds)
        for seed in self.tune_seeds: check_seed(seed, "tuning seed")
        super().__post_init__()
        if both := [seed for seed in self.tune_seeds if seed in self.seeds]:
            raise InputError(f"seed {both[0]} is one of the tuning and one of the final runs, which must be fresh; "
                             "name others for one of them")

    @property
    def cells(self) -> list[tuple[str, int, str]]:
        """Each norm, batch size and schedule, a batch size after the other."""
        return [(norm, b, s) for b, norm, s in itertools.product(self.batch_sizes, self.norms, self.schedules)]


# --- an arm -------------------------------------------------------------------------------------------------------

def networks(config: Config, images: ImageData, arms: Sequence[Arm], seeds: Sequence[int]) -> tuple[
        list[nn.Sequential], list[Row]]:
    """The networks of some arms, each from its seed, and the beginnings of their rows."""
    models, rows = [], []
    for arm, seed in zip(arms, seeds, strict=True):
        epochs = config.tune_epochs if arm.tuning else config.epochs
        assert epochs is not None           # __post_init__ has seen to it
        steps = epochs * (len(images.train) // arm.batch_size)
        models.append(build(config.net, arm.norm, seed, images.c, images.shape[0], steps, arm.batch_size))
        rows.append({**arm.row(seed, epochs), "steps": steps})
    return models, rows


def train_arms(config: Config, names: Sequence[str], seeds: Sequence[int], checkpoint: Path) -> list[Trained[Windows]]:
    """Train arms that differ in their rates and seeds, as one network if they are several: a list, one for each."""
    images, arms = images_of(config), [Arm.named(name) for name in names]
    models, rows = networks(config, images, arms, seeds)
    label = f"{names[0]}, seed {seeds[0]}" + f" and {len(names) - 1} more" * (len(names) > 1)
    kwargs: dict[str, Any] = {"convolutions": config.convolutions, "drop_last": True, "checkpoint": checkpoint,
                              "flips": bool(config.flips)}
    if len(models) == 1: found = [train(models[0], images, rows[0], config.device, label, **kwargs)]
    else: found = train_together(models, images, rows, config.device, label, **kwargs)
    return [finished(images, arm, model, trained, len(models))
            for arm, model, trained in zip(arms, models, found, strict=True)]


def train_arm(config: Config, name: str, seed: int, checkpoint: Path) -> Trained[Windows]:
    """Train one arm from one seed: `(rows per epoch, final row, windows of the training losses)`."""
    trained, = train_arms(config, [name], [seed], checkpoint)
    return trained


def finished(images: ImageData, arm: Arm, model: nn.Module, trained: Trained[list[float]], k: int) -> Trained[Windows]:
    """What training an arm gave, with the cost of a step and, unless it was for the tuning, the test figures."""
    epochs, row, losses = trained
    row |= {"together": k, "chance": 1 / images.c, "step_ms": 1000 * row["seconds"] / max(1, row["steps"])}
    if not arm.tuning:
        if row["status"] == "failed": row |= {"test_loss": math.nan, "test_accuracy": math.nan}
        else: row["test_loss"], row["test_accuracy"] = measured_on(model, images.test, images.tfm)
    return epochs, row, windows(losses)


# --- the experiment -----------------------------------------------------------------------------------------------

def run(config: Config) -> Result:
    """Tune, train, print as it goes, write the run folder: a `Result`."""
    images = load_images(config)
    for b in config.batch_sizes: check_batch_size(b, images, "--batch-sizes")

    def together(batch_size: int) -> int:
        # A GPU waits for the kernels of one such network to be launched, at any of these batch sizes.
        return 1 if config.device == "cpu" and batch_size > SIDE_BY_SIDE[config.net] else config.together

    def choose_rates(run: Any) -> Grid:
        rows = run(points(tried(config.net, config.cells, config.rates), config.tune_seeds, together))
        arms = chosen(rows)
        print("rates:   " + "; ".join(f"{arm.norm}, batch {arm.batch_size}, {arm.schedule}: {arm.lr:g}"
                                      for arm in arms), flush=True)
        return points([[arm] for arm in arms], config.seeds, together)
    return run_arms("lab", config, images, choose_rates, train_arm, train_arms=train_arms,
                    header=header(config, images), judge=judge, table=table, published=None,
                    draw=lambda rows, curves, path: draw(rows, path))


def header(config: Config, images: ImageData) -> str:
    """What is run, on what, from what: the lines above the first arm."""
    n = sum(p.numel() for p in build(config.net, "BatchNorm", 0, images.c, images.shape[0]).parameters())
    tries = plural(len(config.rates or RATES[config.net]), "rate")
    return heading(images, f"{config.net}; {n:,} parameters with BatchNorm",
                   f"run:     batch sizes {', '.join(map(str, config.batch_sizes))}; {' and '.join(config.schedules)}; "
                   f"{tries} tried for {config.tune_epochs} of {plural(config.epochs or 0, 'epoch')}; "
                   f"{'flips; ' * bool(config.flips)}"
                   f"{seeds_and_device(config)}", f"norms:   {', '.join(config.norms)}")


# --- the command line ---------------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments lab`."""
    parser.add_argument("--net", default="five-layer", metavar="NAME", help=f"{' or '.join(NETS)} (default: "
                        "five-layer)")
    add_choice(parser, "norms", NORMS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES), metavar="N",
                        help="training batch sizes, separated by spaces (default: 2)")
    parser.add_argument("--schedules", nargs="+", default=["warm-up"], metavar="NAME",
                        help=f"constant, or warm-up: linearly from 0 in the first {WARM_UP:.0%}% and then to 0 "
                        "(default: warm-up)")
    parser.add_argument("--rates", nargs="+", type=float, metavar="X", help="rates to try at batch size 2; they grow "
                        f"with the batch size (default: {'; '.join(f'{net} {v}' for net, v in shown_rates().items())})")
    parser.add_argument("--epochs", type=int, metavar="N", help=f"epochs (default: {per_net(EPOCHS)})")
    parser.add_argument("--tune-epochs", type=int, metavar="N", help="epochs of the runs that choose the rate "
                        f"(default: {per_net(TUNE_EPOCHS)})")
    parser.add_argument("--tune-seeds", nargs="+", type=int, default=[TUNE_SEED], metavar="N",
                        help=f"their seeds (default: {TUNE_SEED})")
    parser.add_argument("--together", type=int, default=TOGETHER, metavar="N", help="networks that are trained as one "
                        f"at small batch sizes, or on a GPU, at most (default: {TOGETHER})")
    parser.add_argument("--flips", action=argparse.BooleanOptionalAction, help="whether training images are flipped "
                        "left to right at random (default: those of a folder are)")
    add_image_arguments(parser, "lab", seeds=per_net(SEEDS), folders=True)


def shown_rates() -> Mapping[str, str]: return {net: " ".join(f"{r:g}" for r in rates(net, 2)) for net in NETS}


def per_net(values: Mapping[str, int]) -> str: return ", ".join(f"{net} {v}" for net, v in values.items())


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status."""
    return run(Config(**from_args(args))).status
