"""The best that the small-batch network learns in one epoch at batch size 2, with only the training recipe free.

The network is that of `small-batch`: conv layers 8, 16, 32, 64, 64, each conv, ReLU, norm; 50,000 training images, each
seen once, two at a time, and a step of the weights after every two. Free are the optimizer and its rate, the norm's
memory and averaged backward, recalibration, initialisation, label smoothing and the order of the images.

`--tune` tries the recipes of `TRIED`, as many for GroupNorm as for RunningBatchNorm, and looks at validation images
alone; its records are `experiments/results/best_tuning_*.json`. Without it the best recipe of each norm is trained from
many seeds and the test images are read, once, after training. Seeds of the tuning are not among them.

What came before, a first look at RunningBatchNorm (2 to 4 seeds each, validation images; code that is not kept):

- On 20,000 images, against .978 by plain SGD (lr 0.05 to 0, memory 200, averaged backward, recalibrated). No help:
  momentum 0.9, averaged weights with a rate held for half of the time, orthogonal or halved initial weights, a last
  layer that starts at 0, the norms' weights at 0.5, classes that take turns, weight decay 0.002, smoothing 0.03, memory
  800 (.976 to .978 all). Harm: gradients clipped or shortened (.904 to .970: what is rare is what is learnt from),
  squared error (diverged). Adam .979; gradients times the inverse of the inputs' second moments (K-FAC's factor) .980;
  Adam in the eigenbasis of these moments .981; with the output's side turned too, the same.
- On all images: SGD .985, averaged weights .985, that K-FAC .984, and Adam in the eigenbasis .987 to .988.

So at batch size 2 one rate for all directions is what holds SGD back, and smoothing helps only once that is mended. How
often the two were combined for each norm, and with what: `TRIED`.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.arms import run_arms
from experiments.beyond.recipes import BEST, FINAL, GROUP, RECIPES, RUNNING, TRIED, rows_of
from experiments.data import TRAIN_IMAGES
from experiments.figures import by_arm, finite, heading, plural, seeds_and_device, statuses
from experiments.image_data import ImageData
from experiments.images import images_of, load_images
from experiments.models import CHANNELS
from experiments.pictures import draw_accuracies
from experiments.results import Row, Summary, Table, Trained
from experiments.settings import ImageStudySettings, add_choice, add_image_arguments, choose, from_args, positive
from experiments.study import Grid, grid
from experiments.study.statistics import interval
from experiments.training import check_batch_size
from experiments.verdict import Claim, Result, Verdict

# What the best recipe of RunningBatchNorm is held to, in test accuracy: over the seeds at batch size 2 the mean and the
# least, and the mean at batch size 1. The published figure is 0.9723, of one seed, on the validation images.
TARGET, LEAST, TARGET_ONE = 0.988, 0.985, 0.985
SEEDS = 20          # for a verdict


# --- the experiment -----------------------------------------------------------------------------------------------

@dataclass
class Config(ImageStudySettings):
    """Settings of the run.

    `norms` are RunningBatchNorm and GroupNorm, or one of them; `tune` tries `TRIED` instead of training the best; up to
    `replicas` networks are trained at once.

    Raises:
        InputError: a value that makes no sense.
    """

    norms: Sequence[str] = (RUNNING, GROUP)
    tune: bool = False
    replicas: int = 20

    def __post_init__(self) -> None:
        self.norms = choose(self.norms, (RUNNING, GROUP), "norm")
        positive("replicas", self.replicas)
        super().__post_init__()


def train_arms(config: Config, names: Sequence[str], seeds: Sequence[int], checkpoint: Path) -> list[Trained[None]]:
    """Train recipes as one, each from its seed: for each its row as its only epoch, its row, and no curve."""
    recipes = [RECIPES[name] for name in names]
    label = f"{names[0]}, seed {seeds[0]}" + f" and {len(seeds) - 1} more" * (len(seeds) > 1)
    rows = rows_of(recipes, seeds, images_of(config), config.device, label, test=not config.tune, checkpoint=checkpoint)
    return [([row], row, None) for row in rows]


def train_arm(config: Config, name: str, seed: int, checkpoint: Path) -> Trained[None]:
    """Train one recipe from one seed."""
    trained, = train_arms(config, [name], [seed], checkpoint)
    return trained


def points(config: Config) -> Grid:
    """The recipes and seeds, those of recipes that are trained at once together, up to `replicas`."""
    names = [str(r) for r in (TRIED if config.tune else FINAL) if r.norm in config.norms]
    alike: dict[str, list[str]] = {}
    for name in names: alike.setdefault(str(RECIPES[name].alike), []).append(name)
    parts = []
    for group in alike.values():
        size = max(1, config.replicas // len(group))
        parts += [grid(arm=some, seed=config.seeds[i:i + size], together=("arm", "seed"))
                  for some in (group[j:j + config.replicas] for j in range(0, len(group), config.replicas))
                  for i in range(0, len(config.seeds), size)]
    return sum(parts[1:], parts[0])


def run(config: Config) -> Result:
    """Train, print as it goes, write the run folder: a `Result`."""
    images = load_images(config)
    check_batch_size(2, images)
    arms = points(config)
    return run_arms("best", config, images, arms, train_arm, train_arms=train_arms,
                    header=header(config, images, arms.axes["arm"]), judge=judge, table=table, draw=draw,
                    published={RUNNING: [0.9723]})


def header(config: Config, images: ImageData, recipes: Sequence[str]) -> str:
    """What is run, on what, from what: the lines above the first arm."""
    n = sum(p.numel() for p in BEST[RUNNING].build(0).parameters())
    what = "tuning, on the validation images alone" if config.tune else "the best recipes, on the test images"
    return heading(images, f"conv layers {CHANNELS}, pool, linear; {n:,} parameters",
                   f"run:     {what}: one epoch, {plural(len(recipes), 'recipe')}, {seeds_and_device(config)}")


def judge(rows: list[Row], data: str, train_images: int) -> Verdict:
    """Whether the target was reached."""
    arms = by_arm(rows)
    if "test_accuracy" not in rows[0]:
        means = {name: statistics.mean(finite(r["valid_accuracy"]) for r in arm) for name, arm in arms.items()}
        best = [max((n for n in means if n.startswith(norm)), key=means.__getitem__, default=None)
                for norm in (RUNNING, GROUP)]
        return Verdict(untested="Best on the validation images", claims=[
            Claim(n, means[n], of=f"mean of {plural(len(arms[n]), 'seed')}", form=".4f") for n in best if n])
    test = {(r["norm"], r["batch_size"]): [finite(q["test_accuracy"]) for q in arm]
            for arm in arms.values() for r in arm[:1]}
    if len(test) < 3: return Verdict(untested="The target was not tested: that takes both norms")
    two, one, group = (test[key] for key in ((RUNNING, 2), (RUNNING, 1), (GROUP, 2)))
    seeds = plural(len(two), "seed")
    mean, low, high = paired(two, group)
    claims = [Claim("RunningBatchNorm", statistics.mean(two), TARGET, of=f"mean of {seeds}", form=".4f", bound="g"),
              Claim("its worst seed", min(two), LEAST, of=f"of {seeds}", form=".4f", bound="g"),
              Claim("at batch size 1 it has", statistics.mean(one), TARGET_ONE, form=".4f", bound="g",
                    of=f"mean of {plural(len(one), 'seed')}"),
              Claim("RunningBatchNorm minus GroupNorm, seed by seed,", mean, form="+.4f",
                    of=f"mean of {seeds}, 95 % interval {low:+.4f} to {high:+.4f}")]
    if train_images != TRAIN_IMAGES or len(two) < SEEDS:
        return Verdict(claims=[claim.shown_only() for claim in claims], untested="The target was not tested, which "
                       f"takes MNIST in full and {SEEDS} seeds; test accuracy")
    return Verdict("The target was {}reached in test accuracy", claims)


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the differences `a - b` and its 95 % confidence interval by Student's t: `(mean, low, high)`."""
    d = [x - y for x, y in zip(a, b, strict=True)]
    low, high, _ = interval(d, "t")
    return statistics.mean(d), low, high


def table(summary: Summary) -> Table:
    """Header and lines of the table of a `summary.json`: one line per recipe."""
    kinds = [k for k in ("valid", "test") if f"{k}_accuracy" in summary["rows"][0]]
    lines = []
    for name, arm in by_arm(summary["rows"]).items():
        line = [name]
        for kind in kinds:
            accs = [finite(r[f"{kind}_accuracy"]) for r in arm]
            line += [f"{statistics.mean(accs):.4f}", f"{min(accs):.4f} to {max(accs):.4f}"]
        lines.append([*line, str(len(arm)), f"{sum(r['seconds'] for r in arm) / len(arm):.0f}", statuses(arm)])
    return ["recipe", *(h for k in kinds for h in (f"{k} accuracy", "range")), "seeds", "seconds", "status"], lines


def draw(rows: list[Row], curves: Mapping[str, None], path: Path) -> None:
    """The picture: accuracy per recipe and seed; of the best recipes on the test images."""
    from runner import plots
    kind = "test" if "test_accuracy" in rows[0] else "valid"
    arms = by_arm(rows)
    fig, axes = plots.figure(2, width=6.5, height=1.6 + 0.6 * len(arms))
    draw_accuracies(arms, lambda r: r[f"{kind}_accuracy"], *axes,
                    what=f"{'test' if kind == 'test' else 'validation'} accuracy after one epoch, dots: seeds")
    plots.save(fig, path)


# --- the command line ---------------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments best`."""
    parser.add_argument("--tune", action="store_true", help="try all recipes, on the validation images alone")
    parser.add_argument("--replicas", type=int, default=20, metavar="K", help="networks trained at once, at most "
                        "(default: 20)")
    add_choice(parser, "norms", (RUNNING, GROUP))
    add_image_arguments(parser, "best")


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status."""
    return run(Config(**from_args(args))).status
