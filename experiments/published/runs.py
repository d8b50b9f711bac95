"""Training runs with a published accuracy: what a run is, when it counts as reproduced, and the table of several."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypedDict

from torch import nn

from experiments.data import TRAIN_IMAGES
from experiments.errors import InputError
from experiments.figures import by_arm, course, finite, heading, plural, seeds_and_device, statuses
from experiments.image_data import ImageData
from experiments.pictures import draw_accuracies, draw_losses, seeds_of
from experiments.published.criterion import FAILED, least_median
from experiments.results import Row, Summary, Table, Trained
from experiments.settings import ImageStudySettings, choose
from experiments.training import Losses, Windows, train
from experiments.verdict import Claim, Verdict

# The standard deviation of one run above batch size 2. The lesson ran one function twice, or nearly: its own BatchNorm
# and torch's, 3 epochs at lr 1.0. They differ by 0.0110 after the first epoch and by 0.0106 after the third, and a
# difference of two draws has sqrt(2) of the deviation of one. Nothing else that is published speaks of it.
STD = 0.008


class Curves(TypedDict):
    """What a run's record keeps of its course: the training loss, `windows` of it."""

    losses: Windows


@dataclass(frozen=True)
class Run:
    """A training run: `build(seed, c)` makes its network; `lr` is for `experiments.training.schedule`.

    `published` are validation accuracies, one per epoch from the first on. `claim` says what must hold of the mean over
    n seeds ("holds": of their median) in the epoch of the last one, p:

    - "near": p is a draw as each of the seeds is: within 3 STD sqrt(1 + 1/n) of it;
    - "at least": the same from below, no limit above;
    - "fails", "holds": at batch size 2, what `small-batch` asks of batch norm, and of running batch norm;
    - "": nothing.

    `note` stands behind the published figures in the table.
    """

    build: Callable[[int, int], nn.Sequential]
    batch_size: int
    lr: float | tuple[float, ...]
    epochs: int = 1
    published: tuple[float, ...] = ()
    claim: str = ""
    note: str = ""

    def bounds(self, n: int) -> tuple[float | None, float | None, float | None]:
        """`least`, `most` and `below` of a `Claim` about `n` seeds; None where nothing is claimed."""
        tolerance = 3 * STD * math.sqrt(1 + 1 / n)
        if self.claim in ("near", "at least") and not self.published: return None, None, None
        if self.claim == "near": return self.published[-1] - tolerance, min(1.0, self.published[-1] + tolerance), None
        if self.claim == "at least": return self.published[-1] - tolerance, None, None
        if self.claim == "fails": return None, None, FAILED
        return (least_median(n) if self.claim == "holds" else None), None, None

    @property
    def average(self) -> str:
        """The average over the seeds that it is judged by, and that its table shows: "median" or "mean"."""
        return "median" if self.claim == "holds" else "mean"

    def measured(self, name: str, rows: Sequence[Row]) -> Claim:
        """What its `rows`, one per seed, say of the run called `name`."""
        accuracies = [judged(self, r["valid_accuracies"]) for r in rows]
        return Claim(name, getattr(statistics, self.average)(accuracies), *self.bounds(len(rows)),
                     of=f"{self.average} of {plural(len(rows), 'seed')}")

    def course(self, rows: Sequence[Row]) -> str:
        """The average after each epoch, as the table has it; "-" where there was none."""
        found = ", ".join(f"{a:.4f}" for a in course(rows, getattr(statistics, self.average)))
        return f"{found or '-'}{' (median)' * bool(found and self.average == 'median' and len(rows) > 1)}"


@dataclass
class RunSettings(ImageStudySettings):
    """Settings of an experiment of several runs; `arms` are names in `runs`, which the subclass gives, `{name: Run}`.

    Raises:
        InputError: a value that makes no sense.
    """

    arms: Sequence[str] = ()
    runs: ClassVar[Mapping[str, Run]] = {}

    def __post_init__(self) -> None:
        self.arms = choose(self.arms, self.runs, "arm")
        super().__post_init__()


def train_run(config: RunSettings, run: Run, name: str, model: nn.Module, images: ImageData, seed: int,
              checkpoint: Path | None) -> Trained[Losses]:
    """Train `model`, the network of the `Run` called `name`: `(rows per epoch, final row, training losses)`.

    As published the last batch of an epoch is trained on even if it is smaller. A single image that is left over (of
    the digits' 1,197 at batch size 2) is left out: batch norm has no variance of one value, and torch's refuses it.
    """
    one_left = len(images.train) % run.batch_size == 1 and run.batch_size > 1
    row = {"arm": name, "batch_size": run.batch_size, "lr": run.lr, "seed": seed, "epochs": run.epochs}
    return train(model, images, row, config.device, f"{name}, seed {seed}", convolutions=config.convolutions,
                 drop_last=one_left, checkpoint=checkpoint)


def judged(run: Run, accuracies: Sequence[float | None]) -> float:
    """Of the `accuracies` after each epoch the one that `run` is judged by, or 0 if it has not come to that."""
    at = (len(run.published) or len(accuracies)) - 1
    return finite(accuracies[at]) if 0 <= at < len(accuracies) else 0.0


def judge(runs: Mapping[str, Run], what: str) -> Callable[[list[Row], str, int], Verdict]:
    """A function that judges the rows of `runs`, `{name: Run}`; `what` they are, such as "lesson's runs"."""
    def judge(rows: list[Row], data: str, train_images: int) -> Verdict:
        if data != "MNIST" or train_images != TRAIN_IMAGES:
            return Verdict(untested=f"The {what} were not compared with the published ones, which are on MNIST in full")
        found = [runs[name].measured(name, arm) for name, arm in by_arm(rows).items()]
        return Verdict(f"The {what} were {{}}reproduced with {plural(len({r['seed'] for r in rows}), 'seed')}",
                       [claim for claim in found if claim.needed],
                       "" if any(claim.needed for claim in found) else
                       f"None of these {what} has a published figure to compare with")
    return judge


def table(runs: Mapping[str, Run]) -> Callable[[Summary], Table]:
    """A function that makes header and lines of the table of a `summary.json`: a line per run of `runs`.

    The accuracies are the average that the run is judged by, medians marked. The range is that of the seeds in the
    epoch that is judged.
    """
    def table(summary: Summary) -> Table:
        lines = []
        for name, rows in by_arm(summary["rows"]).items():
            run = runs[name]
            accs = [judged(run, r["valid_accuracies"]) for r in rows]
            published = ", ".join(f"{p:.4f}" for p in run.published) + run.note
            lines.append([name, str(run.batch_size), _rate(run.lr), published or "-",
                          run.course(rows),
                          f"{min(accs):.4f} to {max(accs):.4f}" if len(accs) > 1 else "-",
                          run.measured(name, rows).needed or "-", str(len(rows)),
                          f"{sum(r['seconds'] for r in rows) / len(rows):.0f}", statuses(rows)])
        return ["run", "batch", "lr", "published", "valid accuracy per epoch", "range", "needed", "seeds",
                "seconds", "status"], lines
    return table


def _rate(lr: float | tuple[float, ...]) -> str:
    return " to ".join(f"{v:g}" for v in (lr if isinstance(lr, tuple) else [lr]))


def header(images: ImageData, config: RunSettings, network: str) -> str:
    """The lines above the first run, after a check that there are images for one."""
    if len(images.train) < 2:
        raise InputError("there is 1 training image, and these runs need 2; take a larger --limit")
    return heading(images, network, f"run:     {seeds_and_device(config)}", f"arms:    {', '.join(config.arms)}")


def picture(runs: Mapping[str, Run], rows: Sequence[Row], curves: Mapping[str, Curves], images: ImageData,
            path: Path) -> None:
    """Draw the accuracy of every run and seed that is judged, beside the training losses if there are any."""
    from runner import plots
    arms, losses = by_arm(rows), seeds_of(curves, "losses")
    fig, axes = plots.figure(2 + bool(losses), width=5.2, height=max(3.0, 1.6 + 0.34 * len(arms)))
    whole = images.name == "MNIST" and len(images.train) == TRAIN_IMAGES
    draw_accuracies(arms, lambda r: judged(runs[r["arm"]], r["valid_accuracies"]), axes[0], axes[1],
                    middle={name: runs[name].average for name in arms}, title=images.name,
                    reference={name: list(runs[name].published[-1:]) for name in arms} if whole else None,
                    what=f"validation accuracy, {plural(max(map(len, arms.values())), 'seed')}")
    if losses:
        draw_losses(losses, axes[2], "training loss, means of 2 %")
        axes[2].set_xscale("log")
    plots.save(fig, path)
