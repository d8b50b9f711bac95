"""Why runs of the small-batch network die: one change at a time over many seeds, and a dying run seen from inside.

The network, the images and the rate are those of `small-batch` (RunningBatchNorm, batch size 2, plain SGD at a constant
0.4), where about one run in a hundred ends its epoch at the loss of guessing. It is trained for the first 2,500 steps
of the epoch, not for all 25,000: the deaths that were seen began in the first 250. The fewer steps, the more runs are
counted that would have come back: the committed record is of `--steps 500`. (An arm that warms up for 1,000 steps needs
more than these.) What dies later isn't seen here. Seed by seed all arms have the same images in the same order and, but
for the arms that change them, the same first weights.

The criterion for dead was fixed before the first run: over the last 200 steps a mean training loss that is not below
98 % of log(classes), the loss of guessing, or not finite; and validation accuracy at chance (up to .15). So a network
that learns its batches and fails in evaluation, as BatchNorm at batch size 2, is not dead.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.arms import run_arms
from experiments.figures import CHANCE, by_arm, finite, heading, mean, plural, statuses
from experiments.image_data import ImageData
from experiments.images import images_of, load_images
from experiments.lab.dying_arms import ARMS, BATCH_SIZE, beside
from experiments.lab.dying_trace import StopAfter, inside
from experiments.models import CHANNELS
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
from experiments.study.statistics import interval, mcnemar, share_interval
from experiments.together import train_together
from experiments.training import Losses, Windows, check_batch_size, train, windows
from experiments.verdict import Claim, Result, Verdict
from runner import Dataset

SEEDS = 100
STEPS = 2500
TOGETHER = 25
LAST = 200              # steps whose mean loss says who is dead
LEARNT = 0.98           # of the loss of guessing: below it something was learnt
WINDOW = 50             # steps of the windows by which `last_learning` is found
VALID_IMAGES = 1000     # of those for validation the first so many: they tell chance from more


@dataclass
class Config(ImageStudySettings):
    """Settings of the run.

    `arms` are names in `ARMS`, trained for the first `steps` of an epoch at batch size 2, at `lr` or, if the arm says
    so, a multiple of it; up to `together` seeds of an arm are trained as one network.

    Raises:
        InputError: a value that makes no sense.
    """

    seeds: Any = None               # a tuple from __post_init__ on
    arms: Sequence[str] = tuple(ARMS)
    steps: int = STEPS
    lr: float = 0.4
    together: int = TOGETHER

    def __post_init__(self) -> None:
        self.arms = choose(self.arms, ARMS, "arm")
        for name in ("steps", "together"): positive(name, getattr(self, name))
        positive_number("lr", self.lr, 0.4)
        for name in self.arms: positive_number(f"lr of the arm {name}", self.lr * ARMS[name].rate, 0.4)
        if self.seeds is None: self.seeds = tuple(range(SEEDS))
        super().__post_init__()

    def points(self) -> Grid:
        """The arms and their seeds, an arm after the other."""
        parts = []
        for name in self.arms:
            for i in range(0, len(self.seeds), self.together):
                chunk = self.seeds[i:i + self.together]
                parts.append(grid(arm=[name], seed=chunk, together="seed" if len(chunk) > 1 else ()))
        return sum(parts[1:], parts[0])


# --- an arm -------------------------------------------------------------------------------------------------------

def shortened(images: ImageData) -> ImageData:
    """`images` with the first `VALID_IMAGES` of those for validation."""
    return replace(images, valid=Dataset(*images.valid[:VALID_IMAGES]))


def train_arms(config: Config, names: Sequence[str], seeds: Sequence[int], checkpoint: Path) -> list[Trained[Windows]]:
    """Train an arm from several seeds, as one network if they are several: a list, one for each."""
    images, arm = shortened(images_of(config)), ARMS[names[0]]
    models = [arm.build(seed, images.c, images.shape[0]) for seed in seeds]
    total = len(images.train) // BATCH_SIZE
    rows = [arm.row(names[0], seed, config.lr, total) for seed in seeds]
    label = f"{names[0]}, seed {seeds[0]}" + f" and {len(seeds) - 1} more" * (len(seeds) > 1)
    kwargs: dict[str, Any] = {"convolutions": config.convolutions, "drop_last": True, "checkpoint": checkpoint}
    stop = StopAfter(config.steps)
    if len(models) == 1: found = [train(models[0], images, rows[0], config.device, label, [stop], **kwargs)]
    else: found = train_together(models, images, rows, config.device, label, [stop], **kwargs)
    return [(epochs, {**finished(row, losses, images.c), "steps": config.steps}, windows(losses, 50))
            for epochs, row, losses in found]


def train_arm(config: Config, name: str, seed: int, checkpoint: Path) -> Trained[Windows]:
    """Train one arm from one seed: `(rows per epoch, final row, windows of the training losses)`."""
    trained, = train_arms(config, [name], [seed], checkpoint)
    return trained


def finished(row: Row, losses: Losses, c: int) -> Row:
    """What is kept of a run's `row`, which is little, as there are many; with what its `losses` say.

    `late_loss` is the mean of the last 200 (of fewer than 400 of the second half); `last_learning` the step at which
    the last window of 50 ends whose mean is below 98 % of the loss of guessing, 0 if there is none.
    """
    late = losses[-min(LAST, max(1, len(losses) // 2)):]
    bar = LEARNT * math.log(c)
    learning = [i + WINDOW for i in range(0, len(losses) - WINDOW + 1, WINDOW)
                if sum(losses[i:i + WINDOW]) / WINDOW < bar]
    own = {"late_loss": sum(late) / len(late) if late else math.nan, "valid_accuracy": row["valid_accuracy"]}
    own = {name: float(f"{x:.5g}") for name, x in own.items()}
    dead = not own["late_loss"] < bar and finite(own["valid_accuracy"]) <= CHANCE
    return {"arm": row["arm"], "seed": row["seed"], **own, "last_learning": learning[-1] if learning else 0,
            "dead": dead, "seconds": round(row["seconds"], 2), "status": row["status"],
            **({"error": row["error"]} if "error" in row else {})}


# --- the experiment -----------------------------------------------------------------------------------------------

def run(config: Config) -> Result:
    """Train every arm, print as it goes, write the run folder: a `Result`."""
    images = shortened(load_images(config))
    check_batch_size(BATCH_SIZE, images)
    return run_arms("dying", config, images, config.points(), train_arm, train_arms=train_arms,
                    header=header(config, images), judge=judge, table=table, draw=draw, published=None,
                    complete=lambda found: look_inside(config, images, found))


def look_inside(config: Config, images: ImageData, found: Sequence[Trained[Any]]) -> None:
    """Put into the row of the first dead seed of the published arm what is seen of how it died (see `inside`).

    It needs a seed that was trained as one with others, on a CPU, and has died of more than its first steps.
    """
    rows = {row["seed"]: row for _, row, _ in found if row["arm"] == "published"}
    dead = [seed for seed, row in rows.items() if row["dead"] and row["last_learning"]]
    if not dead or config.device != "cpu": return
    at = list(config.seeds).index(dead[0]) // config.together * config.together
    chunk = config.seeds[at:at + config.together]
    if len(chunk) > 1:
        rows[dead[0]]["inside"] = inside(images, "published", chunk, dead[0], config.lr, config.convolutions)


def header(config: Config, images: ImageData) -> str:
    """What is run, on what, from what: the lines above the first arm."""
    return heading(images, f"conv layers {CHANNELS}, pool, linear",
                   f"run:     batch size {BATCH_SIZE}, lr {config.lr:g}, the first {config.steps:,} steps, "
                   f"{plural(len(config.seeds), 'seed')}, device {config.device}", f"arms:    {', '.join(config.arms)}")


def judge(rows: list[Row], data: str, train_images: int) -> Verdict:
    """How many died as published, and of which change fewest and most."""
    arms = by_arm(rows)
    dead = {name: sum(r["dead"] for r in arm) for name, arm in arms.items()}
    alike = [name for name in arms if ARMS[name].beside == "published"]
    some = [*alike[:1], *(pick(alike, key=dead.__getitem__) for pick in (min, max) if alike)]
    claims = [Claim(name, dead[name], of=f"of {plural(len(arms[name]), 'seed')}, 95 % interval "
                    f"{shares(dead[name], len(arms[name]))}", form="d") for name in dict.fromkeys(some)]
    return Verdict(untested=f"Dead after {rows[0]['steps']:,} steps, {data}", claims=claims)


def shares(found: int, of: int) -> str:
    """The interval of a share in words: '0.0 to 3.6 %'."""
    low, high = share_interval(found, of)
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def table(summary: Summary) -> Table:
    """Header and lines of the table of a `summary.json`: one line per arm."""
    arms = by_arm(summary["rows"])
    compared, lines = beside(list(arms)), []
    for name, arm in arms.items():
        accs, dead = [finite(r["valid_accuracy"]) for r in arm], {r["seed"] for r in arm if r["dead"]}
        low, high, _ = interval(accs, "t")      # which is quick, and so many runs will do for it
        pairs = ["-", "-", "-"]
        if name in compared:
            other = arms[compared[name]]
            both = {r["seed"] for r in arm} & {r["seed"] for r in other}
            there = {r["seed"] for r in other if r["dead"]} & both
            saved, lost = len(there - dead), len(dead & both - there)
            pairs = [str(saved), str(lost), f"{mcnemar(saved, lost):.2g}"]
        lines.append([name, f"{len(dead)} of {len(arm)}", shares(len(dead), len(arm)), *pairs, f"{mean(accs):.3f}",
                      f"{low:.3f} to {high:.3f}" if len(arm) > 1 else "-", f"{statistics.median(accs):.3f}",
                      str(sum(a <= CHANCE for a in accs)), statuses(arm)])
    return ["arm", "dead", "95 % interval", "saved", "lost", "McNemar p", "valid accuracy", "95 % interval", "median",
            "at chance", "status"], lines


def draw(rows: Sequence[Row], curves: Mapping[str, Any], path: Path) -> None:
    """The picture: how many of each arm died, with intervals."""
    from runner import plots
    arms = by_arm(rows)
    fig, (ax,) = plots.figure(1, width=8, height=1.2 + 0.3 * len(arms))
    for y, arm in enumerate(arms.values()):
        n, k = len(arm), sum(r["dead"] for r in arm)
        low, high = share_interval(k, n)
        ax.plot([100 * low, 100 * high], [y, y], color="#888888")
        ax.plot([100 * k / n], [y], "o", color="#333333")
    ax.set_yticks(range(len(arms)), list(arms))
    ax.invert_yaxis()
    ax.set(xlabel="dead, % of the runs, with 95 % interval")
    plots.save(fig, path)


# --- the command line ---------------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments dying`."""
    add_choice(parser, "arms", ARMS)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="training steps, the first of an epoch "
                        f"(default: {STEPS:,})")
    parser.add_argument("--lr", type=float, default=0.4, metavar="X", help="learning rate (default: 0.4)")
    parser.add_argument("--together", type=int, default=TOGETHER, metavar="N", help="seeds of an arm that are trained "
                        f"as one network, at most (default: {TOGETHER})")
    add_image_arguments(parser, "dying", seeds=f"{SEEDS}")


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status."""
    return run(Config(**from_args(args))).status
