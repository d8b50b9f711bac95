"""How cost grows with the batch: milliseconds per image at batch sizes 1 to 512, for each norm and the runner.

A training step of the five-layer network on one thread: by hand with each norm, and by the runner with nn.BatchNorm2d.
Convolutions by torch's own kernels up to batch size 8 and by oneDNN above, alike for all. Batch size 1 leaves out
nn.BatchNorm2d, which refuses the last layer's single value per channel.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments.bench import Config
from experiments.bench.norms import arms, step
from experiments.bench.runner import epoch, loader, with_runner
from experiments.bench.timing import interleave, row, settings
from experiments.results import Row

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NORMS = ("no norm", "nn.BatchNorm2d", "BatchNorm", "LayerNorm, scalar affine", "InstanceNorm", "GroupNorm",
         "RunningBatchNorm")


def rows(config: Config) -> list[Row]:
    """The part's rows: `images_ms` is milliseconds per image."""
    found: list[Row] = []
    for size in SIZES:
        xb, yb = torch.randn(size, 1, 28, 28, generator=config.rng()), torch.arange(size) % 10
        compared: dict[str, Callable[[], object]] = {
            name: step(arms()[name][0], xb, yb) for name in NORMS if size > 1 or name != "nn.BatchNorm2d"}
        batches = max(2, 64 // size)
        if size > 1: compared["Runner, nn.BatchNorm2d"] = epoch(with_runner, loader(batches, size, config.rng()))
        with settings(onednn=size > 8):
            times = interleave(compared, max(3, config.repetitions // 3), 0.05, warm_up=0.1)
        if size > 1: times["Runner, nn.BatchNorm2d"] = [ms / batches for ms in times["Runner, nn.BatchNorm2d"]]
        for name in compared:
            r = row("growth", f"batch {size}", name, None if name == "no norm" else "no norm", times)
            found.append(r | {"batch": size, "images_ms": statistics.median(times[name]) / size})
            found[-1]["note"] = f"{found[-1]['images_ms']:.3f} ms an image"
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """The figure: time per image against the batch size, one line per arm, both axes logarithmic."""
    from runner import plots
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for r in rows:
        xs, ys = lines.setdefault(r["arm"], ([], []))
        xs.append(r["batch"])
        ys.append(r["images_ms"])
    fig, (ax,) = plots.figure(1, width=7.5, height=4.2)
    plots.plot_lines(lines, ax, yscale="log", xlabel="batch size", ylabel="ms per image and training step",
                     title="one thread")
    ax.set_xscale("log", base=2)
    ax.set_xticks(SIZES, [str(size) for size in SIZES])
    low, high = ax.get_ylim()
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5) if low < t < high]
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    plots.save(fig, path)
