"""`Runner(compile=True)` against the same runner without, at batch size 2, with `Recorder` and `AvgStatsCallback`.

One thread, without oneDNN. Milliseconds per training step of whole fits without validation; the first fit, in which the
compiler works, is not counted and stands in the record as `first_fit_seconds` (less on a machine that has compiled the
same before).
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from experiments.bench import Config
from experiments.bench.norms import arms, network
from experiments.bench.runner import LR, loader, trainer
from experiments.bench.timing import interleave, row, settings
from experiments.results import Row
from runner import DataBunch, Learner

NORMS = ("no norm", "nn.BatchNorm2d", "RunningBatchNorm", "GroupNorm")
SIZE, BATCHES = 2, 100


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    found, dl = [], loader(BATCHES, SIZE, config.rng())
    fits: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    with settings(onednn=False):
        for norm in NORMS:
            for name, compile in ((norm, False), (f"{norm}, compile=True", True)):
                model = network(arms()[norm][0])
                learn = Learner(model, torch.optim.SGD(model.parameters(), lr=LR), F.cross_entropy,
                                DataBunch(dl, None, 10))
                run = trainer(compile=compile)
                start = time.perf_counter()
                run.fit(1, learn)
                first[name] = time.perf_counter() - start
                fits[name] = partial(run.fit, 1, learn)
        times = interleave(fits, config.repetitions, 0.15)
    times = {name: [ms / BATCHES for ms in values] for name, values in times.items()}
    for norm in NORMS:
        name = f"{norm}, compile=True"
        found += [row("compiled", f"batch {SIZE}", norm, None, times),
                  row("compiled", f"batch {SIZE}", name, norm, times, 1.0) | {
                      "first_fit_seconds": first[name], "note": f"first fit {first[name]:.0f} s"}]
    return found
