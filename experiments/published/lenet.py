"""Batch norm for convolutional and fully connected layers at once: LeNet trains in fewer epochs with it.

Source: Dive into Deep Learning (d2l), "Batch normalization". LeNet with sigmoids: conv 6 channels 5x5, norm, sigmoid,
average pool 2; conv 16 channels 5x5, norm, sigmoid, average pool 2 (maps 28, 14, 7); dense 120, norm, sigmoid; dense
84, norm, sigmoid; dense 10. Fashion-MNIST, batch size 128, plain SGD at lr 0.1, 10 epochs. Three arms from the same
weights, over the same batches: no norm, `norms.BatchNorm` (own), torch's batch norm (torch). Both take the statistics
over axis 0 of a 2-D input and over the axes 0, 2, 3 of a 4-D one; moving averages 0.9 old + 0.1 batch, eps 1e-5.

Claims: the norm arms reach the same accuracy in fewer epochs; own and torch's coincide; the first norm's gamma and beta
end far from (1, 0).
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from experiments.arms import run_arms
from experiments.data import TRAIN_IMAGES
from experiments.figures import MEASURED, by_arm, course, finite, heading, mean, measured, plural, seeds_and_device
from experiments.images import images_of, load_images
from experiments.models import NormFactory
from experiments.results import Row, Summary, Table, Trained
from experiments.settings import ImageStudySettings, add_image_arguments, from_args, positive
from experiments.study import grid
from experiments.training import check_batch_size, train
from experiments.verdict import Claim, Result, Verdict
from norms import BatchNorm

# arm: the norm for 4-D and for 2-D input
ARMS: dict[str, tuple[NormFactory, NormFactory] | None] = {
    "none": None, "own": (BatchNorm, BatchNorm), "torch": (nn.BatchNorm2d, nn.BatchNorm1d)}
BATCH, LR, EPOCHS = 128, 0.1, 10

# The first norm's parameters, smallest and largest of its 6 channels.
PUBLISHED = {"gamma": [1.33, 2.82], "beta": [-0.41, 0.71]}

# "Noticeably faster": in at most half of the epochs a norm arm is as accurate as the arm without at its best. Own and
# torch's are one function, but rounding parts two runs: by 0.01 at most, 100 of 10,000 images, in the mean over seeds.
# "Far from (1, 0)": the published gamma nearest to 1 is 0.33 away; here the channels are in the mean.
FASTER, SAME, FAR = 0.5, 0.01, 0.33


@dataclass
class Config(ImageStudySettings):
    """Settings of the run; `data` "auto" is Fashion-MNIST if it is there, else MNIST, else the digits."""

    epochs: int = EPOCHS

    def __post_init__(self) -> None:
        positive("epochs", self.epochs)
        super().__post_init__()


def lenet(arm: str, seed: int) -> nn.Sequential:
    """The network of one arm, `(N, 1, 28, 28)` to `(N, 10)`; the same weights for every arm of a seed."""
    made = ARMS[arm]

    def norm(kind: int, n: int) -> list[nn.Module]: return [] if made is None else [made[kind](n)]
    torch.manual_seed(seed)         # a norm draws nothing
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), *norm(0, 6), nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2), *norm(0, 16), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16 * 7 * 7, 120), *norm(1, 120), nn.Sigmoid(),
        nn.Linear(120, 84), *norm(1, 84), nn.Sigmoid(), nn.Linear(84, 10))


# --- the experiment -----------------------------------------------------------------------------------------------

def train_arm(config: Config, name: str, seed: int, checkpoint: Path) -> Trained[None]:
    """Train one arm from one seed."""
    model = lenet(name, seed)
    row: Row = {"arm": name, "batch_size": BATCH, "lr": LR, "seed": seed, "epochs": config.epochs}
    rows, row, _ = train(model, images_of(config), row, config.device, f"{name}, seed {seed}", drop_last=True,
                         convolutions=config.convolutions, checkpoint=checkpoint)
    if name != "none": row["gamma"], row["beta"] = (model[1].get_parameter(p).tolist() for p in ("weight", "bias"))
    return rows, row, None


def said(row: Row) -> str:
    """What is said of an arm that has ended: the first norm's parameters."""
    return "\n".join(f"{p:5} of the first norm: {' '.join(f'{v:6.3f}' for v in row[p])}" for p in PUBLISHED if p in row)


def run(config: Config) -> Result:
    """Train the three arms of every seed, print as it goes, write the run folder: a `Result`."""
    images = load_images(config, auto=("FashionMNIST", "MNIST"))
    check_batch_size(BATCH, images)
    n = sum(p.numel() for p in lenet("none", 0).parameters())
    header = heading(images, f"LeNet with sigmoids; {n:,} parameters without a norm",
                     f"run:     batch size {BATCH}, lr {LR}, {plural(config.epochs, 'epoch')}, "
                     f"{seeds_and_device(config)}")
    return run_arms("lenet", config, images, grid(arm=list(ARMS), seed=config.seeds), train_arm, header=header,
                    judge=judge, table=table, draw=draw, published=PUBLISHED, said=said)


def epochs_needed(accuracies: Sequence[float], target: float) -> int | None:
    """The number of epochs after which an accuracy first reaches `target`, or None."""
    return next((i + 1 for i, a in enumerate(accuracies) if a >= target), None)


def judge(rows: list[Row], data: str, train_images: int) -> Verdict:
    """Whether the three claims hold."""
    arms, of = by_arm(rows), f"mean of {plural(len({r['seed'] for r in rows}), 'seed')}"
    best, epochs = max(course(arms["none"])), len(rows[0]["valid_accuracies"])
    finals = ([finite(r["valid_accuracy"]) for r in arms[a]] for a in ("own", "torch"))
    claims = [
        *(Claim(f"{whose} passes {best:.3f}, the best without a norm, after epoch",
                epochs_needed(course(arms[a]), best), most=epochs * FASTER, of=of, form="g")
          for a, whose in (("own", "own"), ("torch", "torch's"))),
        Claim("their final accuracies differ by", mean([abs(a - b) for a, b in zip(*finals, strict=True)]), most=SAME,
              of=of, form=".4f", bound="g"),
        Claim("gamma's distance from 1 is", mean([math.nan if g is None else abs(g - 1) for r in arms["own"]
                                               for g in r["gamma"]]), least=FAR, of=of, form=".2f")]
    if epochs != EPOCHS or train_images != TRAIN_IMAGES:
        return Verdict(claims=[claim.shown_only() for claim in claims],
                       untested=f"The published claims were not tested ({EPOCHS} epochs on 50,000 images)")
    on = "" if data == "Fashion-MNIST" else f" on {data}, in the place of Fashion-MNIST"
    return Verdict(f"The published claims were {{}}reproduced{on}", claims)


def table(summary: Summary) -> Table:
    """Header and lines of the table of a `summary.json`: a line per arm, and the first norm's parameters."""
    arms, lines = by_arm(summary["rows"]), []
    best = max(course(arms.get("none", [])), default=math.inf)      # of a run that was interrupted
    for name, rows in arms.items():
        ranges = ["-", "-"] if name == "none" else [f"{min(vs):.2f} to {max(vs):.2f}" for p in PUBLISHED for vs in [
            [math.nan if v is None else v for r in rows for v in r[p]]]]
        lines.append([name, *measured(rows), str(epochs_needed(course(rows), best) or "-"), *ranges])
    low_high = [f"{p} (published {low} to {high})" for p, (low, high) in PUBLISHED.items()]
    to = f"{best:.4f}" if math.isfinite(best) else "none's best"
    return ["arm", *MEASURED, f"epochs to {to}", *low_high], lines


def draw(rows: list[Row], curves: dict[str, None], path: Path) -> None:
    """The picture: accuracy after each epoch, mean over the seeds, and gamma and beta of the first norm, all seeds."""
    from runner import plots
    fig, (left, right) = plots.figure(2, width=6.3, height=3.8)
    arms = by_arm(rows)
    plots.plot_runs({a: [(range(1, len(r["valid_accuracies"]) + 1), [*map(finite, r["valid_accuracies"])]) for r in rs]
                     for a, rs in arms.items()}, left, xlabel="epoch", ylabel="validation accuracy",
                    title=f"every seed, and the mean of {plural(len({r['seed'] for r in rows}), 'seed')}")
    groups = {f"{p}, {a}": [v for r in rs for v in r[p]] for p in PUBLISHED for a, rs in arms.items() if a != "none"}
    if groups: plots.plot_groups(groups, right, reference={g: PUBLISHED[g.split(",")[0]] for g in groups},
                                 reference_label="published range", xlabel="the first norm's, from gamma 1 and beta 0")
    plots.save(fig, path)


# --- the command line ---------------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments lenet`."""
    add_image_arguments(parser, "lenet", auto="Fashion-MNIST if it is there, else MNIST, else scikit-learn's digits")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"epochs (default: {EPOCHS})")


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status."""
    return run(Config(**from_args(args))).status
