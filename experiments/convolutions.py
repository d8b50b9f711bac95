"""Measure the rule for convolutions on a CPU anew: which kind is faster at which batch size, and what the rule says.

A step (forward, backward) of the five-layer network of small-batch with RunningBatchNorm on one thread: torch's own
convolutions with channels last against oneDNN's with the usual layout, in turn. Nothing is changed by what is found:
the rule is `SMALL_BATCH` in experiments/training.py.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from experiments.errors import InputError
from experiments.models import channels_last_
from experiments.published.small_batch import build
from experiments.results import text_table
from experiments.settings import positive, positive_number
from experiments.training import SMALL_BATCH, onednn_is_faster

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 250, 512)
LARGEST = 10_000    # images at once
SECONDS = 1.0       # of each kind at each size


def measure(sizes: tuple[int, ...] = SIZES, seconds: float = SECONDS) -> list[tuple[int, float, float]]:
    """`(images, ms of a step with torch's own, ms with oneDNN's)`, medians, for each size; settings are put back."""
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    rng, found = torch.Generator().manual_seed(0), []
    torch.set_num_threads(1)
    try:
        for n in sizes:
            x, y = torch.randn(n, 1, 28, 28, generator=rng), torch.randint(0, 10, (n,), generator=rng)
            own, onednn = _step(x, y, channels_last=True), _step(x, y, channels_last=False)
            times: tuple[list[float], list[float]] = ([], [])
            until = time.perf_counter() + 2 * seconds
            while time.perf_counter() < until or len(times[0]) < 3:
                for enabled, step, taken in zip((False, True), (own, onednn), times, strict=True):
                    torch.backends.mkldnn.set_flags(enabled)
                    start = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - start)
            # The first step of each makes what the others use.
            ms = [1e3 * statistics.median(taken[1:]) for taken in times]
            found.append((n, ms[0], ms[1]))
    finally:
        torch.set_num_threads(before[0])
        torch.backends.mkldnn.set_flags(before[1])
    return found


def _step(x: torch.Tensor, y: torch.Tensor, channels_last: bool) -> Callable[[], None]:
    model = build("RunningBatchNorm", 0)
    if channels_last: channels_last_(model)
    return lambda: F.cross_entropy(model(x), y).backward()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments convolutions`."""
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="batch sizes (default: "
                        f"{' '.join(map(str, SIZES))})")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="for each kind at each "
                        "size (default: 1)")


def main(args: argparse.Namespace) -> int:
    """Print the table; the exit status is 1 where the rule takes the slower kind by more than a tenth."""
    if not torch.backends.mkldnn.is_available():
        raise InputError("this torch has no oneDNN, so there is nothing to choose from")
    for n in args.sizes: positive("a batch size", n, 16, LARGEST)
    positive_number("seconds", args.seconds, SECONDS)
    found = measure(tuple(args.sizes), args.seconds)
    lines, wrong = [], []
    for n, own, onednn in found:
        taken, other = (onednn, own) if onednn_is_faster(n) else (own, onednn)
        if taken > 1.1 * other: wrong.append(n)
        lines.append([str(n), f"{own:.2f}", f"{onednn:.2f}", "oneDNN" if onednn_is_faster(n) else "own",
                      f"{taken / other:.2f}"])
    print(text_table(["batch size", "own ms", "oneDNN ms", "the rule", "it takes, of the other"], lines))
    print(f"\nThe rule, torch's own up to {SMALL_BATCH} images, " + (
        f"takes the slower kind at {', '.join(map(str, wrong))}." if wrong else "holds here."))
    return int(bool(wrong))
