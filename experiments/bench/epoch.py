"""The main job's training at batch size 2, with validation and all callbacks, against the lesson's way of doing it.

Ours is what `small-batch` runs, its rule for the convolutions included. The lesson's way is in
`lesson_form.py`, with torch's default convolutions, as the lesson ran. A shortened epoch of 2,000 steps and a fifth as
many validation images as training images, as in the whole one; one thread. Milliseconds per training step, of which
MNIST has 25,000 an epoch.
"""

import contextlib
import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench import Config
from experiments.bench.lesson_form import LessonRunningBatchNorm, fit
from experiments.bench.norms import network
from experiments.bench.timing import interleave, row, settings
from experiments.data import load_data
from experiments.models import NormFactory
from experiments.published import small_batch
from experiments.results import Row

STEPS = 2000


def lessons_way(norm: NormFactory, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]) -> None:
    """One epoch of the main job in the lesson's way; `train` and `valid` are pairs of images and labels."""
    model = network(norm)
    model[-3] = nn.AdaptiveAvgPool2d(1)     # the lesson's, which averages single positions too
    fit(model, torch.optim.SGD(model.parameters(), lr=0.4), F.cross_entropy, train, valid, 2)


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    images = load_data(config.data, config.data_dir)
    n = min(2 * STEPS, len(images.train))
    m = min(n // 5, len(images.valid))
    train, valid = ((ds.x[:k], ds.y[:k]) for ds, k in ((images.train, n), (images.valid, m)))
    images.train, images.valid = type(images.train)(*train), type(images.valid)(*valid)

    def ours(norm: str, convolutions: str) -> Callable[[], None]:
        settings_of = small_batch.Config(norms=(norm,), epochs=1, device="cpu", convolutions=convolutions)

        def run() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                small_batch.train_norm(settings_of, images, norm, 0)
        return run

    def lesson(norm: NormFactory) -> Callable[[], None]: return lambda: lessons_way(norm, train, valid)
    arms = {"lesson's way, RunningBatchNorm": lesson(LessonRunningBatchNorm),
            "lesson's way, nn.BatchNorm2d": lesson(nn.BatchNorm2d),
            "ours, RunningBatchNorm": ours("RunningBatchNorm", "rule"),
            "ours, nn.BatchNorm2d": ours("BatchNorm2d", "rule"),
            "ours, RunningBatchNorm, torch's default convolutions": ours("RunningBatchNorm", "onednn")}
    with settings():
        times = interleave(arms, max(3, config.repetitions // 3), 0.1, warm_up=0.0)
    times = {name: [ms / (n // 2) for ms in values] for name, values in times.items()}
    first = next(iter(arms))
    found = [row("epoch", images.name, name, None if name == first else first, times,
                 1 / 3 if name == "ours, RunningBatchNorm" else None) for name in arms]
    for r in found: r["note"] = f"25,000 steps: {r['ms'] * 25:.0f} s"
    found.append(row("epoch", images.name, "ours, RunningBatchNorm",
                     "ours, RunningBatchNorm, torch's default convolutions", times, 1 / 1.6))
    return found
