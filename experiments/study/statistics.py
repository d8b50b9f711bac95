"""What many runs say: means with intervals, paired comparisons, and how many runs a difference needs."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.errors import InputError
from experiments.study.cells import Names, Row, cells, figures, finite, level, names_of
from experiments.study.points import cell

RESAMPLES = 9999
FEW = 20        # runs: of fewer the bootstrap's intervals are too short

Axes = Mapping[str, Sequence[Any]]
Interval = tuple[float, float, str]     # low, high, what it is


def interval(values: Sequence[float], kind: str | None = None) -> Interval:
    """A 95 % interval of the mean of `values`, and what it is.

    `kind` is "t" (Student's, which takes the mean for normal) or "bootstrap" (bias-corrected and accelerated, of 9999
    resamples, the same every time); None takes "t" for fewer than 20 values, where a bootstrap's is too short. Of one
    value it is NaN, and of equal values of no width: like any interval, it knows of no failure that hasn't been seen.
    """
    if kind not in (None, "t", "bootstrap"):
        raise InputError(f"interval={kind!r}; give 't', 'bootstrap', or None, which chooses by the number of runs")
    n = len(values)
    kind = kind or ("t" if n < FEW else "bootstrap")
    name = f"95 % {'Student t' if kind == 't' else 'bootstrap'}"
    if n < 2: return math.nan, math.nan, "none: n < 2"
    if min(values) == max(values): return values[0], values[0], name
    import numpy as np
    from scipy import stats
    if kind == "t":
        low, high = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
        return float(low), float(high), name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # degenerate: answered below
        found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(0))
        low, high = found.confidence_interval
        if not math.isfinite(low + high):
            found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile",
                                    rng=np.random.default_rng(0))
            low, high = found.confidence_interval
    return float(low), float(high), name


def summary(rows: Sequence[Row], axes: Axes, by: Names, value: str, *, over: Names | None = None,
            failed_as: float | None = None, collapsed: float | None = None,
            kind: str | None = None) -> list[dict[str, Any]]:
    """A line for each cell of the axes `by`; see `Study.summary`."""
    by = names_of(by, axes, "axis in by")
    over = replicates(over, axes, by)
    figures(rows, value, failed_as, axes)
    lines = []
    for group in cells(rows, axes, by, over, "add {name!r} to by, pool them on purpose by over=[" +
                       "".join(f"{n!r}, " for n in over) + "{name!r}]").values():
        values = figures(group, value, failed_as, axes)
        there = [x for row in group if (x := finite(row, value)) is not None]
        low, high, what = interval(values, kind)
        line = {**{name: group[0][name] for name in by}, "n": len(values), "failed": len(values) - len(there)}
        if collapsed is not None: line["collapsed"] = sum(x <= collapsed for x in there)
        ordered, n = sorted(values), len(values)
        lines.append({**line, "mean": sum(values) / n, "low": low, "high": high, "interval": what, "std": std(values),
                      "min": ordered[0], "median": (ordered[(n - 1) // 2] + ordered[n // 2]) / 2, "max": ordered[-1]})
    return lines


def replicates(over: Names | None, axes: Axes, by: Sequence[str]) -> tuple[str, ...]:
    """The axes whose runs are repetitions: `over`, or else "seed" if there is such an axis."""
    if over is None: return ("seed",) if "seed" in axes and "seed" not in by else ()
    found = names_of(over, axes, "axis in over")
    for name in found:
        if name in by: raise InputError(f"the axis {name!r} is in by and in over; a cell has one value of it, or many")
    return found


def compare(rows: Sequence[Row], axes: Axes, value: str, axis: str, levels: Sequence[Any], pair: Names, *,
            by: Names = (), failed_as: float | None = None, kind: str | None = None) -> list[dict[str, Any]]:
    """A line for each two of `levels`, in each cell of `by`; see `Study.compare`."""
    pair, by = names_of(pair, axes, "axis in pair"), names_of(by, axes, "axis in by")
    for name in (*pair, *by):
        if name == axis or (name in pair and name in by):
            raise InputError(f"the axis {name!r} is named twice; name it as the axis compared, in pair, or in by")
    texts = [level(v, axis, axes) for v in levels]
    if len(set(texts)) < 2 or len(set(texts)) < len(texts):
        raise InputError(f"{axis}={tuple(levels)!r}; give two or more different values of it to compare")
    rows = [row for row in rows if cell(row[axis]) in texts]
    figures(rows, value, failed_as, axes)
    mend = "add {name!r} to by, or to pair"
    outer = tuple(by) + tuple(n for n in axes if n not in (axis, *pair, *by) and len({cell(r[n]) for r in rows}) == 1)
    found = cells(rows, axes, (*outer, axis), pair, mend)
    lines, names = [], dict(zip(texts, levels, strict=True))
    for at in dict.fromkeys(key[:-1] for key in found):
        cell_rows = next(group for key, group in found.items() if key[:-1] == at)
        for a, b in itertools.combinations(texts, 2):
            line = _pairs(found.get((*at, a), []), found.get((*at, b), []), value, pair, failed_as, axes, kind)
            lines.append({**{name: cell_rows[0][name] for name in by}, "a": names[a], "b": names[b], **line})
    for line, p in zip(lines, holm([line["p"] for line in lines]), strict=True): line["p_holm"] = p
    return lines


def _pairs(one: Sequence[Row], other: Sequence[Row], value: str, pair: Sequence[str], failed_as: float | None,
           axes: Axes, kind: str | None) -> dict[str, Any]:
    def at(row: Row) -> tuple[str, ...]: return tuple(cell(row[name]) for name in pair)
    by_pair = {at(row): row for row in other}
    both = [(row, by_pair[at(row)]) for row in one if at(row) in by_pair]
    firsts, seconds = (figures([rows[i] for rows in both], value, failed_as, axes) for i in (0, 1))
    differences = [x - y for x, y in zip(firsts, seconds, strict=True)]
    n = len(both)
    low, high, what = interval(differences, kind)
    p, test = p_value(differences, "t" if "Student" in what else "signs")
    means = [sum(values) / n if n else math.nan for values in (firsts, seconds, differences)]
    failed = [sum(finite(rows[i], value) is None for rows in both) for i in (0, 1)]
    return {"n": n, "unpaired": len(one) + len(other) - 2 * n, "failed_a": failed[0], "failed_b": failed[1],
            "mean_a": means[0], "mean_b": means[1], "difference": means[2], "low": low, "high": high, "interval": what,
            "spread": std(differences), "effect": effect(differences), "a_above": sum(d > 0 for d in differences),
            "p": p, "test": test}


def std(values: Sequence[float]) -> float:
    """The standard deviation, of n - 1; NaN of fewer than two values."""
    n = len(values)
    if n < 2: return math.nan
    mean = sum(values) / n
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))


def effect(differences: Sequence[float]) -> float:
    """Cohen's d for pairs: the mean of the differences over their standard deviation; infinite where that is 0."""
    if len(differences) < 2: return math.nan
    mean = sum(differences) / len(differences)
    if min(differences) == max(differences): return math.copysign(math.inf, mean) if mean else 0.0
    return mean / std(differences)


def p_value(differences: Sequence[float], test: str) -> tuple[float, str]:
    """How likely a mean of differences so far from 0 is by chance, two-sided, and by which test.

    "t" is the paired t-test. "signs" asks how often the mean is as far from 0 when each difference has its sign by
    chance: of all choices of signs up to 13 differences, else of 9999, the same every time.
    """
    import numpy as np
    d, n = np.asarray(differences, dtype=np.float64), len(differences)
    if n < 2: return math.nan, "none: n < 2"
    if test == "t":
        name = "paired t"
        if min(differences) == max(differences): return (0.0 if differences[0] else 1.0), name
        from scipy import stats
        return float(stats.ttest_1samp(d, 0.0).pvalue), name
    if n <= 13: signs = np.array(list(itertools.product((1, -1), repeat=n)))
    else: signs = np.random.default_rng(0).choice((1, -1), (RESAMPLES, n))
    far = np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-12)
    return float(far.mean() if n <= 13 else (far.sum() + 1) / (RESAMPLES + 1)), "random signs"


def share_interval(found: int, of: int) -> tuple[float, float]:
    """The 95 % interval of Clopper and Pearson (1934) of a share: `found` of `of` runs; (0, 1) of none.

    It is exact: whatever the share is, 95 % at least of such intervals contain it. Of no failures in n runs it reaches
    up to about 3.7 / n.
    """
    if not 0 <= found <= of: raise InputError(f"share_interval got {found} of {of}; give 0 <= found <= of")
    from scipy.stats import beta
    low = float(beta.ppf(0.025, found, of - found + 1)) if found else 0.0
    return low, float(beta.ppf(0.975, found + 1, of - found)) if found < of else 1.0


def mcnemar(only_a: int, only_b: int) -> float:
    """How likely so uneven a split is by chance, two-sided: McNemar's exact test of pairs that differ (1947).

    Of the pairs in which one alone has failed, `only_a` are those where it was a, `only_b` where it was b. If it were
    chance, either would be as likely. 1 if there are none.
    """
    if min(only_a, only_b) < 0: raise InputError(f"mcnemar got {only_a} and {only_b}; give two counts of at least 0")
    n, few = only_a + only_b, min(only_a, only_b)
    p: float = 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n
    return min(1.0, p)


def holm(ps: Sequence[float]) -> list[float]:
    """`ps` after Holm's correction for their number: all below 0.05 are so at once with a chance of 5 % at most."""
    real = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    corrected, largest = list(map(float, ps)), 0.0
    for rank, (p, i) in enumerate(real):
        largest = max(largest, min(1.0, p * (len(real) - rank)))
        corrected[i] = largest
    return corrected


def needed(d: float, spread: float, *, paired: bool = True, power: float = 0.8, level: float = 0.05) -> int:
    """How many seeds show a difference of `d`, by a two-sided t-test, with a chance of `power`.

    Args:
        d: the difference of the means that matters.
        spread: the standard deviation of the differences by seed (`spread` in `study.compare`); with
            `paired=False` of the runs of one setting (`std` in `study.summary`), of which each needs so many seeds.
        level: the test's: how often it finds a difference where there is none.

    Raises:
        InputError: d is 0, spread is negative, or one isn't finite; power or level isn't between 0 and 1.
    """
    if not math.isfinite(d) or d == 0: raise InputError(f"d is {d}; give the difference that matters, not 0")
    if not (math.isfinite(spread) and spread >= 0):
        raise InputError(f"spread is {spread}; give a standard deviation, which needs two runs or more")
    if not 0 < level < power < 1:
        raise InputError(f"level is {level} and power {power}; give 0 < level < power < 1, as 0.05 and 0.8")
    from scipy import stats
    ratio = abs(d) / spread / (1 if paired else math.sqrt(2)) if spread else math.inf

    def found(n: int) -> float:
        df = n - 1 if paired else 2 * n - 2
        edge, shift = stats.t.ppf(1 - level / 2, df), ratio * math.sqrt(n)
        if math.isinf(shift): return 1.0
        if shift > 30: return float(stats.chi2.cdf(df * (shift / edge) ** 2, df))       # nct loses its digits there
        if df > 10_000: return float(stats.norm.sf(edge - shift) + stats.norm.cdf(-edge - shift))
        return float(stats.nct.sf(edge, df, shift) + stats.nct.cdf(-edge, df, shift))

    high = 2
    while found(high) < power: high *= 2
    low = max(high // 2, 1)         # too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high
