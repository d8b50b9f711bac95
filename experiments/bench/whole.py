"""A whole epoch of the main job's RunningBatchNorm with validation and all callbacks, against the lesson's way.

25,000 steps on one thread, each in a process of its own, as one starts it; the clock runs from the model to the last
validation batch, the search for the faster convolutions and the compiler's work included. Compiled is measured twice:
with the compiler's cache empty, as in the first run on a machine, and with what that run has left in it, as in all
others. A few repetitions, for they take minutes; milliseconds per step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from experiments.bench import Config
from experiments.bench.epoch import lessons_way
from experiments.bench.lesson_form import LessonRunningBatchNorm
from experiments.bench.timing import row
from experiments.data import load_data
from experiments.published import small_batch
from experiments.results import Row

LESSON, OURS = "lesson's way, RunningBatchNorm", "ours, RunningBatchNorm"
# What a process of its own runs, on this one's search path: its current folder may hold another `experiments`.
ALONE = "import sys; sys.path[:] = {path!r}; from experiments.bench.whole import main; main(*sys.argv[1:])"
COMPILED, FIRST = f"{OURS}, compile=True", f"{OURS}, compile=True, first run"


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    times: dict[str, list[float]] = {name: [] for name in (LESSON, OURS, COMPILED, FIRST)}
    for _ in range(max(1, config.repetitions // 5)):
        with tempfile.TemporaryDirectory() as cache:
            for name in (FIRST, COMPILED, OURS, LESSON):
                done = subprocess.run(
                    [sys.executable, "-c", ALONE.format(path=sys.path), name, config.data, config.data_dir or ""],
                    env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True)
                data, steps, seconds = json.loads(done.stdout.splitlines()[-1])
                times[name].append(seconds / steps * 1e3)
    found = [row("whole", data, name, None if name == LESSON else LESSON, times, 1 / 3 if name != LESSON else None)
             for name in times]
    for r in found: r["note"] = f"{steps:,} steps: {r['ms'] * steps / 1e3:.0f} s"
    return found


def epoch(name: str, data: str, data_dir: str) -> tuple[str, int, float]:
    """Train one epoch: the data's name, training steps, seconds."""
    torch.set_num_threads(1)
    images = load_data(data, data_dir or None)
    n = len(images.train) // 2 * 2
    images.train = type(images.train)(*images.train[:n])    # the lesson's form can't take a batch of one
    start = time.perf_counter()
    if name == LESSON:
        lessons_way(LessonRunningBatchNorm, *((ds.x, ds.y) for ds in (images.train, images.valid)))
    else:
        config = small_batch.Config(norms=("RunningBatchNorm",), epochs=1, device="cpu", compile=name != OURS)
        small_batch.train_norm(config, images, "RunningBatchNorm", 0)
    return images.name, n // 2, time.perf_counter() - start


def main(*args: str) -> None:
    """Print what `epoch` returns, for the process that has started this one."""
    print(json.dumps(epoch(*args)))
