"""The main job: batch norm fails at batch size 2 and running batch norm does not.

Source: fastai, "Deep Learning from the Foundations" (2019), part 2 v3, notebook 07. Five conv layers with the
channels 8, 16, 32, 64, 64, each conv, ReLU, norm; batch size 2, plain SGD at lr 0.4, one epoch of MNIST's first
50,000 images, validation on the other 10,000. All arms start from the same weights and see the same batches.

Why batch norm fails here: the last map is 1x1, so in training each channel is normalised over two values, which
makes them about +1 and -1 whatever they were; the running statistics used in evaluation belong to another function.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from experiments.arms import run_arms
from experiments.data import TRAIN_IMAGES
from experiments.errors import InputError, pick
from experiments.figures import MEASURED, by_arm, heading, measured, plural, seeds_and_device
from experiments.image_data import ImageData
from experiments.images import images_of, load_images
from experiments.models import CHANNELS, NormFactory, conv_layer, get_cnn_model, init_alike
from experiments.pictures import draw_accuracies, draw_losses, seeds_of
from experiments.published.criterion import MIDDLES, PUBLISHED, comparable, judge
from experiments.results import Row, Summary, Table, Trained
from experiments.settings import (
    ImageStudySettings,
    add_choice,
    add_image_arguments,
    choose,
    from_args,
    positive,
    positive_number,
)
from experiments.study import Grid, grid
from experiments.together import train_together
from experiments.training import SMALL_BATCH, Losses, Windows, check_batch_size, onednn_is_faster, train, windows
from experiments.verdict import Result
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm

NORMS: dict[str, NormFactory | None] = {
    "none": None,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm": BatchNorm,
    "LayerNorm": lambda nf: LayerNorm(),
    "InstanceNorm": InstanceNorm,
    "GroupNorm": lambda nf: GroupNorm(4, nf),
    "RunningBatchNorm": RunningBatchNorm,
}
RECIPES = ("published", "best")

LEARNING = ("GroupNorm", "RunningBatchNorm")    # of the arms; the others fail for certain
SEEDS = 8                   # of these in the published setting, where none are named; one of the others
TOGETHER = 24               # seeds that are trained as one network, at most
DIGITS_EPOCHS = 5           # 1,197 images are 598 steps an epoch, too few for one


@dataclass
class Config(ImageStudySettings):
    """Settings of the run; the defaults are the published ones.

    `norms` are names in `NORMS`; `seeds` None means 8 for the arms that learn and the first of them for those that fail
    for certain, and in another setting one for all; `epochs` None means 1 on MNIST and 5 on the digits; `compile`
    compiles the steps. Up to `together` seeds of an arm are trained as one network, which is faster where batches are
    small and the same to rounding; 1 trains each alone.

    Raises:
        InputError: a value that makes no sense.
    """

    seeds: Any = None               # a tuple from __post_init__ on
    norms: Sequence[str] = tuple(NORMS)
    batch_size: int = 2
    lr: float = 0.4
    epochs: int | None = None
    together: int = TOGETHER
    compile: bool = False
    once: Sequence[str] = ()        # norms that are trained from the first seed only

    def __post_init__(self) -> None:
        self.norms = choose(self.norms, NORMS, "norm")
        positive("batch size", self.batch_size)
        positive("together", self.together)
        if self.epochs is not None: positive("epochs", self.epochs)
        positive_number("lr", self.lr, 0.4)
        if self.seeds is None:
            usual = (self.batch_size, self.lr) == (2, 0.4)
            self.seeds = tuple(range(SEEDS)) if usual else (0,)
            self.once = tuple(norm for norm in self.norms if norm not in LEARNING) if usual else ()
        super().__post_init__()
        if self.compile:
            from runner.compiled import CompileError, require_compiler
            try: require_compiler()
            except CompileError as e: raise InputError(str(e)) from e

    def points(self) -> Grid:
        """The arms and their seeds: those of one norm together, where small batches make that the faster way."""
        stacked = self.together > 1 and self.device == "cpu" and not self.compile and not onednn_is_faster(
            self.batch_size)
        parts = []
        for norm in self.norms:
            seeds = [*self.seeds[:1 if norm in self.once else None]]
            size = self.together if stacked else len(seeds)
            for chunk in (seeds[i:i + size] for i in range(0, len(seeds), size)):
                parts.append(grid(norm=[norm], seed=chunk, together="seed" if stacked and len(chunk) > 1 else ()))
        return sum(parts[1:], parts[0])


# --- one arm ------------------------------------------------------------------------------------------------------

def build(norm: str, seed: int, c: int = 10) -> nn.Sequential:
    """The five-layer network with the norm called `norm`; the same weights for every norm."""
    model = get_cnn_model(argparse.Namespace(c=c), CHANNELS, conv_layer, norm=NORMS[norm])
    init_alike(model, seed)
    return model


def train_norm(config: Config, images: ImageData, norm: str, seed: int,
               checkpoint: Path | None = None) -> Trained[Losses]:
    """Train one norm from one seed on `images`: `(rows per epoch, final row, training losses)`."""
    return train(build(norm, seed, images.c), images, row_of(config, norm, seed), config.device,
                 f"{norm}, seed {seed}", drop_last=True, convolutions=config.convolutions, compile=config.compile,
                 checkpoint=checkpoint)


def train_arm(config: Config, norm: str, seed: int, checkpoint: Path) -> Trained[Windows]:
    """Train one norm from one seed: `(rows per epoch, final row, windows of the training losses)`."""
    epochs, row, losses = train_norm(config, images_of(config), norm, seed, checkpoint)
    return epochs, row, windows(losses)


def train_arms(config: Config, norms: Sequence[str], seeds: Sequence[int], checkpoint: Path) -> list[Trained[Windows]]:
    """Train one norm from several seeds as one network: for each what `train_arm` gives."""
    images = images_of(config)
    models = [build(norm, seed, images.c) for norm, seed in zip(norms, seeds, strict=True)]
    found = train_together(models, images, [row_of(config, n, s) for n, s in zip(norms, seeds, strict=True)],
                           config.device, f"{norms[0]}, {len(seeds)} seeds", drop_last=True,
                           convolutions=config.convolutions, checkpoint=checkpoint)
    return [(epochs, {**row, "together": len(seeds)}, windows(losses)) for epochs, row, losses in found]


def row_of(config: Config, norm: str, seed: int) -> Row:
    """What an arm is, the beginning of its rows."""
    return {"norm": norm, "batch_size": config.batch_size, "lr": config.lr, "seed": seed, "epochs": config.epochs}


# --- the experiment -----------------------------------------------------------------------------------------------

def run(config: Config) -> Result:
    """Train every arm, print as it goes, write the run folder: a `Result`."""
    images = load_images(config)
    config.epochs = config.epochs or (1 if images.name == "MNIST" else DIGITS_EPOCHS)
    check_batch_size(config.batch_size, images, "--batch-size")
    return run_arms("small-batch", config, images, config.points(), train_arm, train_arms=train_arms,
                    header=header(config, images), judge=judge, table=table, published=PUBLISHED,
                    draw=lambda rows, curves, path: draw(rows, curves, images, config, path))


def header(config: Config, images: ImageData) -> str:
    """What is run, on what, from what: the lines above the first arm."""
    n = sum(p.numel() for p in build("none", 0).parameters())
    assert config.epochs is not None        # `run` has decided
    once = f" (the first alone of {', '.join(config.once)})" if config.once and len(config.seeds) > 1 else ""
    return heading(
        images, f"conv layers {CHANNELS}, pool, linear; {n:,} parameters without a norm",
        f"run:     batch size {config.batch_size}, lr {config.lr}, {plural(config.epochs, 'epoch')}, "
        f"{seeds_and_device(config)}{', compiled' * config.compile}{once}",
        f"arms:    {', '.join(config.norms)}")


def table(summary: Summary) -> Table:
    """Header and lines of the table of a `summary.json`: one line per norm, published beside measured.

    Published figures are left out beside other settings; beside other images the heading says that they are MNIST's.
    """
    rows = summary["rows"]
    published = PUBLISHED if all((r["batch_size"], r["lr"]) == (2, 0.4) for r in rows) else {}
    lines = [[norm, " / ".join(f"{p:.4f}" for p in published.get(norm, [])) or "-", *measured(arm)]
             for norm, arm in by_arm(rows, "norm").items()]
    return ["norm", "published" if summary["train_images"] == TRAIN_IMAGES else "published on MNIST", *MEASURED], lines


def draw(rows: Sequence[Row], curves: Mapping[str, Windows], images: ImageData,
         config: Config, path: Path) -> None:
    """The picture: validation accuracy per arm and seed beside the training losses.

    `curves` maps each norm to `(steps, losses)`, as in `curves.json`; without any, the accuracies are the picture.
    """
    from runner import plots
    losses = seeds_of(curves)
    fig, axes = plots.figure(2 + bool(losses), width=5.2, height=4.4)
    arms = {norm: [r for r in rows if r["norm"] == norm] for norm in curves or by_arm(rows, "norm")}
    as_published = comparable(rows) and len(images.train) == TRAIN_IMAGES
    draw_accuracies(arms, lambda r: r["valid_accuracy"], axes[0], axes[1], middle=MIDDLES,
                    reference=PUBLISHED if as_published else None,
                    title=f"batch size {config.batch_size}, lr {config.lr}, {images.name}",
                    what=f"validation accuracy after {plural(rows[0]['epochs'], 'epoch')}, dots: seeds")
    if losses: draw_losses(losses, axes[2], "training loss, mean of 1 % of the steps")
    plots.save(fig, path)


# --- the command line ---------------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments small-batch`."""
    parser.add_argument("--recipe", default="published", metavar="NAME", help="published (default), or best: the most "
                        "that this network learns so, as python -m experiments best")
    add_choice(parser, "norms", NORMS)
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="training batch size (default: 2)")
    parser.add_argument("--lr", type=float, default=0.4, metavar="X", help="learning rate (default: 0.4)")
    parser.add_argument("--epochs", type=int, metavar="N",
                        help=f"epochs (default: 1 on MNIST, {DIGITS_EPOCHS} on the digits)")
    add_image_arguments(parser, "small-batch", seeds=f"{SEEDS} for {' and '.join(LEARNING)} and 1 for the others; in "
                        "another setting 1")
    parser.add_argument("--together", type=int, default=TOGETHER, metavar="N", help="seeds of an arm that are trained "
                        f"as one network, at most, up to batch size {SMALL_BATCH} (default: {TOGETHER})")
    parser.add_argument("--compile", action="store_true", help="compile the steps: up to half a minute per arm first, "
                        "then faster steps; needs a C++ compiler")


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status."""
    options = vars(args)
    if pick(options.pop("recipe"), RECIPES, "recipe") == "published": return run(Config(**from_args(args))).status
    own = {f.name: f.default for f in fields(Config)
           if f.name not in {"once", *(g.name for g in fields(ImageStudySettings))}}
    changed = [name.replace("_", " ") for name, default in own.items()
               if options[name] != (list(default) if isinstance(default, tuple) else default)]
    if changed:
        raise InputError(f"--recipe best comes with its own {' and '.join(changed)}; leave out "
                         f"{' and '.join('--' + name.replace(' ', '-') for name in changed)}, or take "
                         "--recipe published")
    from experiments.beyond import best
    for name in own: del options[name]
    if options["seeds"] is None: options["seeds"] = str(len(best.Config.seeds))
    return best.run(best.Config(**from_args(args))).status
