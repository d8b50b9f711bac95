"""Five exercises on batch norm, with scikit-learn's breast cancer data.

Source: deep.TEACHING, exercises on batch norm, with torch's automatic differentiation in the place of the course's own.
A multilayer perceptron 30-20-10-1 (linear, norm, tanh, linear, norm, tanh, linear, sigmoid) learns to tell malignant
from benign tumours: binary cross entropy summed over minibatches of 50, each drawn without replacement, plain SGD at
lr 0.01, 100 steps; 20 % of the 569 samples test. Everything is in float64.

(a) a bias before a batch norm changes nothing: neither outputs nor gradients, and its own gradient is 0;
(b) the norm's output has mean beta and standard deviation |gamma|;
(c) moving averages that start at 0 and are fed 100 batches of 1,000 samples from N(42, 10^2) reach 42 and 100;
(d) by the moving averages a single sample is predicted as it is among others;
(e) the test accuracy.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from experiments import settings
from experiments.arms import run_arms
from experiments.figures import by_arm, heading, mean, plural, seeds_and_device
from experiments.results import Row, Summary, Table, Trained
from experiments.study import grid
from experiments.verdict import Claim, Result, Verdict
from norms import BatchNorm
from runner import AvgStatsCallback, CudaCallback, DataBunch, Dataset, Learner, ProgressCallback, Recorder, Runner

WIDTHS = [30, 20, 10, 1]
BATCH, LR, STEPS = 50, 0.01, 100
TEST_SAMPLES = 114                      # a fifth of 569
FEATURES, SAMPLES, BATCHES = 10, 1000, 100      # of (c)
MEAN, STD = 42.0, 10.0

# exercise: {figure: (as published, the most that any seed may have)}. What is 0 on paper is rounding here: 2e-16 of
# numbers near 1, a few hundred times over. The accuracy is judged below.
FIGURES: dict[str, dict[str, tuple[str, float | None]]] = {
    "(a)": {"outputs, largest change": ("0", 1e-12), "gradients, largest change": ("0", 1e-12),
            "the bias's own gradient": ("0", 1e-12)},
    "(b)": {"output's mean from beta": ("1e-5", 1e-5), "its std from |gamma|": ("1e-5", 1e-5)},
    "(c)": {"moving mean from 42": ("1", 1.0), "moving variance from 100": ("5", 5.0)},
    "(d)": {"alone and among others": ("-", 1e-12)},
    "(e)": {"test accuracy": ("0.95", None)},
}
PUBLISHED = {name: {figure: shown for figure, (shown, _) in figures.items()} for name, figures in FIGURES.items()}
# "0.95 or better is usual." At that rate a share of n * 114 test samples has the standard error
# sqrt(0.95 * 0.05 / (n * 114)); the mean over n seeds may lie three of them lower.
USUAL = 0.95


@dataclass
class Config(settings.StudySettings):
    """Settings of the run: the seeds decide split, weights, minibatches and all random numbers.

    One job, unless others are asked for: processes take longer to start than all exercises.
    """

    seeds: Sequence[int] = tuple(range(10))
    jobs: int | None = 1


@dataclass
class Samples:
    """Training and test samples as `Dataset`s of features `(N, 30)` and classes `(N, 1)`, 1.0 for benign, in float64.

    Every feature is standardised by the training samples' mean and standard deviation.
    """

    train: Dataset
    valid: Dataset
    name: str = "breast cancer"
    notice: str = ""

    def __str__(self) -> str:
        return f"{self.name} (scikit-learn): {len(self.train)} training and {len(self.valid)} test samples, 30 features"


def load_samples(seed: int) -> Samples:
    """The breast cancer data, split at random by `seed`."""
    from sklearn.datasets import load_breast_cancer
    x, y = (torch.tensor(a, dtype=torch.float64) for a in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return Samples(Dataset(x[train], y[train, None]), Dataset(x[test], y[test, None]))


def perceptron(bias: bool = False) -> nn.Sequential:
    """The network, `(N, 30)` to the probability `(N, 1)` of benign; `bias` gives the linears before norms one too."""
    layers: list[nn.Module] = []
    for ni, no in pairwise(WIDTHS[:-1]):
        layers += [nn.Linear(ni, no, bias=bias), BatchNorm(no), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTHS[-2], WIDTHS[-1]), nn.Sigmoid()).double()


cross_entropy = partial(F.binary_cross_entropy, reduction="sum")


def binary_accuracy(out: Tensor, yb: Tensor) -> Tensor:
    """Share of the probabilities `out` on the side of 0.5 on which `yb` is."""
    return ((out > 0.5) == (yb > 0.5)).double().mean()


# --- the exercises, each from a seed: `(figures, curve)` ----------------------------------------------------------

Curve = list[tuple[float, float]] | list[float] | None      # of (c), of (e)
Found = tuple[dict[str, float], Curve]


def bias_before_a_norm(seed: int, device: str) -> Found:
    """(a) The same network, weights and minibatch with and without a bias before the norms."""
    x, y = (t[:BATCH].to(device) for t in load_samples(seed).train[:])
    torch.manual_seed(seed)
    without, with_bias = perceptron().to(device), perceptron(bias=True).to(device)
    biases = {n for n, _ in with_bias.named_parameters()} - {n for n, _ in without.named_parameters()}
    with_bias.load_state_dict({**without.state_dict(), **{
        n: torch.randn_like(p) for n, p in with_bias.named_parameters() if n in biases}})
    outputs = []
    for model in (without, with_bias):
        outputs.append(model(x))
        cross_entropy(outputs[-1], y).backward()
    grads = dict(with_bias.named_parameters())
    return dict(zip(FIGURES["(a)"], (
        largest(outputs[0] - outputs[1]),
        max(largest(gradient(p) - gradient(grads[n])) for n, p in without.named_parameters()),
        max(largest(gradient(grads[n])) for n in biases)), strict=True)), None


def mean_and_std_of_the_output(seed: int, device: str) -> Found:
    """(b) One norm with random gamma and beta, in training, on 1,000 samples from N(42, 10^2)."""
    x, norm = normal(seed, device), BatchNorm(FEATURES).double().to(device)
    for p in norm.parameters(): nn.init.normal_(p)
    y = norm(next(x)).detach()
    assert norm.weight is not None
    assert norm.bias is not None
    return dict(zip(FIGURES["(b)"], (largest(y.mean(0) - norm.bias),
                                     largest(y.std(0, correction=0) - norm.weight.abs())), strict=True)), None


def moving_averages(seed: int, device: str) -> Found:
    """(c) One norm whose moving averages start at 0; the curve is their mean over the features, after each batch."""
    x, norm = normal(seed, device), BatchNorm(FEATURES).double().to(device)
    norm.running_var.zero_()            # it starts at 1, as torch's does, and the exercise's at 0
    curve = [(0.0, 0.0)]
    for _ in range(BATCHES):
        norm(next(x))
        curve.append((norm.running_mean.mean().item(), norm.running_var.mean().item()))
    return dict(zip(FIGURES["(c)"], (largest(norm.running_mean - MEAN), largest(norm.running_var - STD**2)),
                    strict=True)), curve


def one_sample(seed: int, device: str) -> Found:
    """(d) The trained network's predictions for the test samples, each alone and all at once."""
    _, model, samples = train(seed, device)
    model.eval()
    x = samples.valid.x.to(device)
    with torch.no_grad(): difference = largest(torch.cat([model(row[None]) for row in x]) - model(x))
    return {next(iter(FIGURES["(d)"])): difference}, None


def accuracy_on_the_test_samples(seed: int, device: str) -> Found:
    """(e) The trained network's share of right answers on the test samples; the curve is the loss of each step."""
    run, _, _ = train(seed, device)
    accuracy = run[AvgStatsCallback].history[-1]["valid_binary_accuracy"]
    return {next(iter(FIGURES["(e)"])): accuracy}, run[Recorder].losses


EXERCISES: dict[str, Callable[[int, str], Found]] = dict(zip(FIGURES, (
    bias_before_a_norm, mean_and_std_of_the_output, moving_averages, one_sample, accuracy_on_the_test_samples),
    strict=True))


def gradient(p: Tensor) -> Tensor:
    """What a backward has left in `p.grad`."""
    assert p.grad is not None
    return p.grad


def largest(t: Tensor) -> float:
    """The largest absolute value in `t`, a float."""
    return t.detach().abs().max().item()


def normal(seed: int, device: str) -> Iterator[Tensor]:
    """Endless batches of samples from N(42, 10^2), `(1000, 10)` each."""
    g = torch.Generator().manual_seed(seed)
    while True: yield (MEAN + STD * torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=g)).to(device)


@cache
def train(seed: int, device: str) -> tuple[Runner, nn.Module, Samples]:
    """Train the network from `seed`, then test it: `(runner, network, samples)`; once for both that ask."""
    samples, order = load_samples(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = perceptron()
    batches = [samples.train[torch.randperm(len(samples.train), generator=order)[:BATCH]] for _ in range(STEPS)]
    run = Runner([Recorder(), AvgStatsCallback(binary_accuracy), CudaCallback(device),
                  ProgressCallback(f"seed {seed}")])
    run.fit(1, Learner(model, optim.SGD(model.parameters(), lr=LR), cross_entropy,
                       DataBunch(batches, [samples.valid[:]])))
    return run, model, samples


# --- the experiment -----------------------------------------------------------------------------------------------

def train_arm(config: Config, name: str, seed: int, checkpoint: Path) -> Trained[Curve]:
    """Do one exercise from one seed: a tenth of a second, so that one which was interrupted begins anew."""
    start = time.perf_counter()
    figures, curve = EXERCISES[name](seed, config.device)
    return [], {"exercise": name, "seed": seed, "figures": figures, "seconds": time.perf_counter() - start,
                "status": "ok" if all(map(math.isfinite, figures.values())) else "diverged"}, curve


def run(config: Config) -> Result:
    """Do every exercise, print as it goes, write the run folder: a `Result`."""
    samples = load_samples(config.seeds[0])
    header = heading(samples, f"perceptron {WIDTHS}; {sum(p.numel() for p in perceptron().parameters())} parameters",
                     f"run:     batch size {BATCH}, lr {LR}, {STEPS} steps, {seeds_and_device(config)}")
    return run_arms("breast-cancer", config, samples, grid(exercise=list(EXERCISES), seed=config.seeds), train_arm,
                    header=header, judge=judge, table=table, draw=draw, published=PUBLISHED)


def found(rows: Sequence[Row]) -> Iterator[tuple[str, list[float], Claim]]:
    """What `rows` say of each figure: its published value, those of the seeds, and the claim.

    A limit is the most that any seed may have; that of the accuracy is the least that the mean may be.
    """
    for name, arm in by_arm(rows, "exercise").items():
        for figure, (published, limit) in FIGURES[name].items():
            values = [math.nan if (v := r["figures"][figure]) is None else v for r in arm]
            what, n = f"{name} {figure}", plural(len(values), "seed")
            if limit is not None:
                yield published, values, Claim(what, worst(values), most=limit, of=f"largest of {n}", form=".2g")
                continue
            floor = USUAL - 3 * math.sqrt(USUAL * (1 - USUAL) / (len(values) * TEST_SAMPLES))
            yield published, values, Claim(what, mean(values), least=floor, of=f"mean of {n}", form=".4f", bound=".3g")


def worst(values: Sequence[float]) -> float:
    """The largest of `values`, NaN if one is."""
    return max(values, key=lambda v: math.inf if math.isnan(v) else v)


def judge(rows: list[Row], data: str, train_images: int) -> Verdict:
    """Whether every figure is within its limit."""
    names, n = " ".join(by_arm(rows, "exercise")), len({r["seed"] for r in rows})
    return Verdict(f"The exercises {names} were {{}}reproduced with {plural(n, 'seed')}",
                   [claim for *_, claim in found(rows)])


def table(summary: Summary) -> Table:
    """Header and lines of the table of a `summary.json`: a line per figure, the worst of its seeds, or the mean."""
    lines = []
    for published, values, claim in found(summary["rows"]):
        shown = f"{claim.measured:{claim.form}}"
        if claim.least is not None: shown += f" ({min(values):.4f} to {max(values):.4f})"
        needed = "mean of " * (claim.least is not None) + claim.needed
        lines.append([claim.what, published, needed, shown, str(len(values)), "ok" if claim.holds else "missed"])
    return ["figure", "published", "needed", "measured", "seeds", "status"], lines


def draw(rows: list[Row], curves: dict[str, Curve], path: Path) -> None:
    """The picture: the moving averages of (c) as they approach what they estimate, and the training loss of (e)."""
    from runner import plots
    fig, (left, right) = plots.figure(2, width=5.5, height=3.6)
    if "(c)" in curves:
        means, variances = zip(*cast("list[tuple[float, float]]", curves["(c)"]), strict=True)
        plots.plot_lines({"mean / 42": (range(len(means)), [m / MEAN for m in means]),
                          "variance / 100": (range(len(means)), [v / STD**2 for v in variances])}, left,
                         xlabel="batches of 1,000 samples", ylabel="moving average / what it estimates",
                         title="(c) moving averages from 0")
    if "(e)" in curves:
        plots.plot_line([loss / BATCH for loss in cast("list[float]", curves["(e)"])], ax=right, xlabel="training step",
                        ylabel="cross entropy per sample")
        right.set_title("(e) training", loc="left", fontsize="medium")
    plots.save(fig, path)


# --- the command line ---------------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments breast-cancer`."""
    settings.add_arguments(parser, "breast-cancer", seeds=len(Config.seeds))
    parser.set_defaults(jobs=Config.jobs)


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status."""
    return run(Config(**settings.from_args(args))).status
