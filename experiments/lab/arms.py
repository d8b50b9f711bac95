"""The arms of the lab: a norm at a batch size, under a schedule, at a rate; how their rates are tuned and chosen."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.figures import by_arm, mean
from experiments.results import Row
from experiments.study import Grid, grid

SCHEDULES = ("constant", "warm-up")     # the second: from 0 linearly to the rate, and from there linearly to 0
WARM_UP = 0.04                          # the part of the training in which the rate grows

# The rates tried at batch size 2, and how they grow with the batch size b: rate (b / 2)^growth. Residual networks are
# usually trained at rates in proportion to b; the five-layer network's best rates grow more slowly.
RATES = {"five-layer": (0.05, 0.1, 0.2, 0.4, 0.8), "resnet": (0.005, 0.01, 0.02, 0.04, 0.08)}
GROWTH = {"five-layer": 0.5, "resnet": 1.0}

_NAME = re.compile(r"(?P<norm>.+), batch (?P<batch_size>\d+), (?P<schedule>[\w-]+), lr (?P<lr>[\d.e+-]+)"
                   r"(?P<tuning>, tuning)?")


@dataclass(frozen=True)
class Arm:
    """One line of the lab: `norm` at `batch_size` under `schedule`, at the rate `lr` that is its start or its top.

    `tuning` are the runs that choose the rate: measured on images split off from the training set, not on the test
    images.
    """

    norm: str
    batch_size: int
    schedule: str
    lr: float
    tuning: bool = False

    def __str__(self) -> str:
        return f"{self.norm}, batch {self.batch_size}, {self.schedule}, lr {self.lr:g}" + ", tuning" * self.tuning

    @classmethod
    def named(cls, name: str) -> "Arm":
        """The arm of this `str`."""
        found = _NAME.fullmatch(name)
        assert found is not None, name
        return cls(found["norm"], int(found["batch_size"]), found["schedule"], float(found["lr"]),
                   found["tuning"] is not None)

    @property
    def cell(self) -> tuple[str, int, str]: return self.norm, self.batch_size, self.schedule

    def row(self, seed: int, epochs: int) -> Row:
        """What the arm is, the beginning of its rows; `lr` is its rate, or that rate's stops."""
        row: Row = {"arm": str(self), "norm": self.norm, "batch_size": self.batch_size, "schedule": self.schedule,
                    "rate": self.lr, "lr": self.lr, "seed": seed, "epochs": epochs}
        if self.schedule == "warm-up": row |= {"lr": [0.0, self.lr, 0.0], "warm_up": WARM_UP}
        return row


def rates(net: str, batch_size: int, at_two: Sequence[float] | None = None) -> list[float]:
    """The rates that are tried at `batch_size`; `at_two` are those at batch size 2, None the usual ones of `net`."""
    factor = (batch_size / 2) ** GROWTH[net]
    return [float(f"{rate * factor:.3g}") for rate in at_two or RATES[net]]


def tried(net: str, cells: Iterable[tuple[str, int, str]], at_two: Sequence[float] | None = None) -> list[list[Arm]]:
    """For each `(norm, batch size, schedule)` the arms that choose its rate: as many for each."""
    return [[Arm(*cell, lr, tuning=True) for lr in rates(net, cell[1], at_two)] for cell in cells]


def chosen(rows: Sequence[Row]) -> list[Arm]:
    """Of each norm, batch size and schedule the arm at the best rate: by the mean accuracy over the tuning's seeds.

    A run without a finite figure counts as 0; of equal rates it is the lower one.
    """
    best: dict[tuple[str, int, str], tuple[float, Arm]] = {}
    for name, arm in by_arm(rows).items():
        found, accuracy = Arm.named(name), mean([r["valid_accuracy"] for r in arm])
        rank = accuracy, -found.lr
        if found.cell not in best or rank > (best[found.cell][0], -best[found.cell][1].lr):
            best[found.cell] = accuracy, found
    return [replace(arm, tuning=False) for _, arm in best.values()]


def points(arms: Iterable[Sequence[Arm]], seeds: Sequence[int], together: Any) -> Grid:
    """A grid of the `arms`, and of the `seeds`: those of one inner sequence are trained as one, up to
    `together(batch size)` networks.
    """
    parts = [part for group in arms for part in _parts(group, seeds, together(group[0].batch_size))]
    return sum(parts[1:], parts[0])


def _parts(group: Sequence[Arm], seeds: Sequence[int], together: int) -> Iterator[Grid]:
    names = [str(arm) for arm in group]
    if together < 2: yield grid(arm=names, seed=seeds)
    else:
        arms_at_once = min(len(names), together)
        for i in range(0, len(names), arms_at_once):
            some = names[i:i + arms_at_once]
            size = max(1, together // len(some))
            for j in range(0, len(seeds), size):
                chunk = seeds[j:j + size]
                yield grid(arm=some, seed=chunk, together=("arm", "seed") if len(some) * len(chunk) > 1 else ())
