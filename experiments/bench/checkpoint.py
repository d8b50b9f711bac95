"""What it costs that a run can be killed: writing a checkpoint, and training with one every 30 seconds.

The main job's training without validation: the five-layer network with RunningBatchNorm at batch size 2, epochs of
25,000 steps, `runner.SGD`, `Recorder`, `AvgStatsCallback(accuracy)`, one thread, without oneDNN. A write is timed with
1,000 and with 25,000 steps of history behind it, each time as the first since these steps; its share is that of 30 s.

The ratio is of whole times, writes included. Two fits take turns, 10 steps each, in one process: drift of the machine
is shared, and what comes once in 30 s of a fit's own time, 60 s on the clock, is in the sum. Each repetition is 30 s of
both with one write in their middle; a fifth as many as of other parts. The files lie beside the run folder's, on its
disk.
"""

import copy
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from experiments.bench import Config
from experiments.bench.norms import network
from experiments.bench.runner import LR, loader, trainer
from experiments.bench.timing import row, settings
from experiments.results import Row
from norms import RunningBatchNorm
from runner import SGD, Callback, CancelTrainException, Checkpoint, DataBunch, Learner

BATCHES, STRETCH = 25_000, 10
HISTORY = (1000, BATCHES)       # steps behind a write
SECONDS = 30.0                  # between two writes
PLAIN, KEPT = "Runner", "Runner, Checkpoint(every_seconds=30)"


def learner(config: Config) -> Learner:
    """The network and what trains it."""
    model = network(RunningBatchNorm)
    return Learner(model, SGD(model.parameters(), lr=LR), F.cross_entropy,
                   DataBunch(loader(BATCHES, 2, config.rng()), None, 10))


# --- a write ------------------------------------------------------------------------------------------------------

class TimeWrites(Callback):
    """Times so many writes of `run.checkpoint` when `HISTORY` is behind it: `times` and `sizes`, in ms and bytes."""

    def __init__(self, repetitions: int) -> None:
        self.repetitions = repetitions
        self.times: dict[int, list[float]] = {}
        self.sizes: dict[int, int] = {}

    def around_pass(self, batches: Iterable[object]) -> Iterator[object]:
        for i, batch in enumerate(batches):
            yield batch
            if i + 1 in HISTORY: self.write(i + 1)

    def write(self, steps: int) -> None:
        """Time writes after `steps`; each finds the callbacks as they are now, with losses still to be fetched."""
        checkpoint = self.run.checkpoint
        now = [(vars(cb), copied(vars(cb))) for cb in self.run.cbs if cb not in (checkpoint, self)]
        self.times[steps] = []
        for _ in range(self.repetitions):
            for held, kept in now: held.update(copied(kept))
            start = time.perf_counter()
            checkpoint._write(self.run.epoch, None)     # here it may; `request` would write once, and not be timed
            self.times[steps].append((time.perf_counter() - start) * 1e3)
        self.sizes[steps] = checkpoint.path.stat().st_size


def copied(held: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a callback, lists and dicts copied."""
    return {k: copy.copy(v) if isinstance(v, (list, dict)) else v for k, v in held.items()}


def writes(config: Config, folder: Path) -> list[Row]:
    """The rows of a write."""
    timed = TimeWrites(config.repetitions)
    with settings(onednn=False):
        trainer(Checkpoint(folder, every_epochs=None, every_seconds=1e9), timed).fit(1, learner(config))
    found = []
    for steps, times in timed.times.items():
        r = row("checkpoint", f"{steps:,} steps of history", "a write", None, {"a write": times})
        share = statistics.median(times) / (SECONDS * 1e3)
        found.append(r | {"share": share, "bytes": timed.sizes[steps],
                          "note": f"{share:.3%} of {SECONDS:g} s; {timed.sizes[steps] / 1e6:.1f} MB"})
    return found


# --- training -----------------------------------------------------------------------------------------------------

class Turns:
    """Whose turn it is of two fits, and how long the turns of each took: `blocks`, one pair of sums after another.

    The first fit's time says when a block is over: `first` seconds for one that isn't counted, then `seconds` each.
    """

    def __init__(self, blocks: int, first: float, seconds: float) -> None:
        self.ends = [first + seconds * i for i in range(blocks + 1)]
        self.blocks: list[tuple[float, float, int]] = []        # seconds of both, and turns
        self.sums, self.spent, self.turns, self.over = [0.0, 0.0], 0.0, 0, False
        self.mine = [threading.Semaphore(1), threading.Semaphore(0)]

    def add(self, which: int, seconds: float) -> None:
        """A turn of fit `which` is over."""
        self.sums[which] += seconds
        if which == 0: self.spent += seconds
        else:
            self.turns += 1
            if self.spent >= self.ends[len(self.blocks)]:
                self.blocks.append((self.sums[0], self.sums[1], self.turns))
                self.sums, self.turns = [0.0, 0.0], 0
                self.over = len(self.blocks) == len(self.ends)


class TakeTurns(Callback):
    """Lets a fit train `STRETCH` batches at its turn, and ends it when both had their time."""

    _order = 20_000     # outside of Checkpoint, whose writes belong to the turn

    def __init__(self, turns: Turns, which: int) -> None: self.turns, self.which, self.start = turns, which, 0.0

    def around_pass(self, batches: Iterable[object]) -> Iterator[object]:
        for i, batch in enumerate(batches):
            if i % STRETCH == 0: self.hand_over()
            yield batch

    def hand_over(self) -> None:
        """Wait for the next turn."""
        turns = self.turns
        if self.start:
            turns.add(self.which, time.perf_counter() - self.start)
            turns.mine[1 - self.which].release()
        turns.mine[self.which].acquire()
        if turns.over: raise CancelTrainException
        self.start = time.perf_counter()

    def after_fit(self) -> None:
        self.turns.over = True                  # after an error in this fit the other one would wait for ever
        self.turns.mine[1 - self.which].release()


def training(config: Config, folder: Path, seconds: float = SECONDS) -> list[Row]:
    """The rows of training with a checkpoint every so many `seconds` and without."""
    turns = Turns(max(2, config.repetitions // 5), seconds / 2, seconds)
    # Twice the seconds: half of the time on the clock is the other's.
    cbs: list[list[Callback]] = [[Checkpoint(folder, every_epochs=None, every_seconds=2 * seconds)], []]
    fits = [partial(trainer(*own, TakeTurns(turns, i)).fit, 10**6, learner(config)) for i, own in enumerate(cbs)]
    with settings(onednn=False), ThreadPoolExecutor(2) as pool:
        try:
            for done in [pool.submit(fit) for fit in fits]: done.result()
        finally: turns.over = True      # after Ctrl-C, which the threads don't hear
    times = {name: [block[i] / (block[2] * STRETCH) * 1e3 for block in turns.blocks[1:]]
             for i, name in enumerate((KEPT, PLAIN))}
    return [row("checkpoint", "batch 2", PLAIN, None, times), row("checkpoint", "batch 2", KEPT, PLAIN, times, 1.01)]


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    beside = Path(config.out or "runs")
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".checkpoints-") as folder:
        return [*writes(config, Path(folder, "writes")), *training(config, Path(folder, "training"))]
