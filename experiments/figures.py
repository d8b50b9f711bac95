"""The rows of an arm as figures, and the words around them: headings, tables, counts."""

import math
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from itertools import zip_longest
from statistics import median
from typing import Protocol

from experiments.results import Row
from experiments.settings import Settings
from experiments.study.statistics import interval
from runner.console import columns

MEASURED = ["valid accuracy", "95 % interval", "median", "range", "at chance", "valid loss", "seeds", "seconds",
            "status"]                           # the columns of `measured`
CHANCE = 0.15       # an accuracy up to this, of ten classes, is that of one answer to everything


class Data(Protocol):
    """What an experiment is run on: an `ImageData`, or what has these of it, and a `str`."""

    @property
    def name(self) -> str: ...

    @property
    def notice(self) -> str: ...

    @property
    def train(self) -> Sized: ...

    @property
    def valid(self) -> Sized: ...


def heading(data: Data, what: str, *lines: str) -> str:
    """The lines above the first arm: a notice if there is one, the data, the network `what`, and further lines."""
    stars = "*" * min(79, columns() or 79)
    notice = [f"{stars}\n{data.notice}\n{stars}"] if data.notice else []
    return "\n".join([*notice, f"data:    {data}", f"network: {what}", *lines])


def seeds_and_device(config: Settings) -> str:
    """These two settings, as the header has them."""
    return f"seeds {', '.join(map(str, config.seeds))}, device {config.device}"


def by_arm(rows: Sequence[Row], key: str = "arm") -> dict[str, list[Row]]:
    """`rows` grouped by their arm's name, in the order of its first: `{name: rows}`."""
    names = dict.fromkeys(r[key] for r in rows)
    return {name: [r for r in rows if r[key] == name] for name in names}


def finite(accuracy: float | None) -> float:
    """An accuracy, 0 where a run diverged to NaN."""
    return accuracy if accuracy is not None and math.isfinite(accuracy) else 0.0


def mean(accuracies: Sequence[float | None]) -> float:
    """Mean of accuracies; a run that diverged to NaN counts as 0 correct."""
    return sum(map(finite, accuracies)) / len(accuracies)


def course(rows: Sequence[Row], average: Callable[[Sequence[float | None]], float] = mean) -> list[float]:
    """The validation accuracy after each epoch, the `average` over one arm's `rows`, one per seed.

    An epoch that a run has not come to, because a norm refused its input, counts as 0 correct.
    """
    return [average(accs) for accs in zip_longest(*(map(finite, r["valid_accuracies"]) for r in rows), fillvalue=0.0)]


def measured(rows: Sequence[Row]) -> list[str]:
    """The cells of one arm's `rows`, one per seed, under the headings `MEASURED`.

    A run that diverged to NaN counts as 0 correct, in the mean and in all others; "at chance" are the runs up to
    `CHANCE`, those included. The interval is `statistics.interval`'s.
    """
    accs = [finite(r["valid_accuracy"]) for r in rows]
    losses = [math.nan if r["valid_loss"] is None else r["valid_loss"] for r in rows]
    low, high, _ = interval(accs)
    several = len(accs) > 1
    return [f"{mean(accs):.4f}", f"{low:.3f} to {high:.3f}" if several else "-",
            f"{median(accs):.4f}" if several else "-", f"{min(accs):.4f} to {max(accs):.4f}" if several else "-",
            f"{sum(a <= CHANCE for a in accs)} of {len(accs)}", f"{sum(losses) / len(losses):.4g}", str(len(rows)),
            f"{sum(r['seconds'] for r in rows) / len(rows):.0f}", statuses(rows)]


def statuses(rows: Sequence[Row]) -> str:
    """'ok', or '2 ok, 1 diverged' where they differ."""
    status = Counter(r["status"] for r in rows)
    return ", ".join(f"{n} {s}" if len(status) > 1 else s for s, n in status.items())


def plural(n: int, noun: str) -> str:
    """'1 epoch', '3 epochs'."""
    return f"{n} {noun}{'s' * (n != 1)}"
