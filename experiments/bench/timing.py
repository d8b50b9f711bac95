"""Timing that can be compared: arms in turn, repetition by repetition, and ratios within a repetition.

A machine's speed drifts by tens of percent within minutes. Arms measured one after the other differ by that drift;
arms measured in turn, a few hundredths of a second each, share it, and the median of their ratios is free of it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from experiments.results import Row

Arm = TypeVar("Arm", bound=Hashable)


@contextmanager
def settings(threads: int = 1, onednn: bool = True) -> Iterator[None]:
    """One thread and a given convolution backend while timing; the user's settings afterwards."""
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    try:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.set_flags(onednn)
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.mkldnn.set_flags(before[1])


def interleave(arms: Mapping[Arm, Callable[[], object]], repetitions: int, seconds: float = 0.05,
               warm_up: float = 0.3) -> dict[Arm, list[float]]:
    """Milliseconds per call of every arm, one figure per repetition: `{name: [ms, ...]}`.

    Each repetition goes through all arms, forwards and backwards in turn, and calls each as often as fits into about
    `seconds`, at least once. Garbage collection rests meanwhile: it would hit one arm and not another.

    Args:
        arms: `{name: function without arguments}`.
        repetitions: how often every arm is measured.
        seconds: how long one measurement of one arm takes.
        warm_up: how long every arm runs before, uncounted.
    """
    calls = {}
    for name, f in arms.items():
        n, start = 0, time.perf_counter()
        while n < 2 or time.perf_counter() - start < warm_up:
            f()
            n += 1
        calls[name] = max(1, round(seconds * n / (time.perf_counter() - start)))
    times: dict[Arm, list[float]] = {name: [] for name in arms}
    collecting = gc.isenabled()
    try:
        for i in range(repetitions):
            gc.collect()
            gc.disable()
            for name in list(arms)[::-1 if i % 2 else 1]:
                f, n = arms[name], calls[name]
                start = time.perf_counter()
                for _ in range(n): f()
                times[name].append((time.perf_counter() - start) / n * 1e3)
    finally:
        if collecting: gc.enable()
    return times


def row(part: str, setting: str, name: str, against: str | None, times: Mapping[str, Sequence[float]],
        target: float | None = None) -> Row:
    """A row of the record: the ratio of `name` to `against`, repetition by repetition, and the times themselves.

    `ratio` and `ms` are medians with their ranges; `target` is the ratio aimed at, None where there is none.
    """
    mine = times[name]
    found: Row = {"part": part, "setting": setting, "arm": name, "against": against, "repetitions": len(mine),
                  "ms": statistics.median(mine), "ms_range": [min(mine), max(mine)]}
    if against is not None:
        ratios = [a / b for a, b in zip(mine, times[against], strict=True)]
        middle = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found |= {"ratio": statistics.median(ratios), "ratio_quartiles": [middle[0], middle[2]],
                  "ratio_range": [min(ratios), max(ratios)], "target": target}
    return found
