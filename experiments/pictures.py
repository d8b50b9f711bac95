"""What pictures of experiments share: accuracies with the statistic that the verdict uses, and every seed's losses."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.figures import finite, statuses
from experiments.results import Row
from experiments.study.statistics import interval

if TYPE_CHECKING:
    from runner.insight.plots import Axes


def draw_accuracies(arms: Mapping[str, Sequence[Row]], value: Callable[[Row], float | None], ax: "Axes",
                    close: "Axes | None", *, middle: str | Mapping[str, str] = "mean",
                    reference: Mapping[str, Sequence[float]] | None = None, title: str = "", what: str = "") -> None:
    """Draw the `value` of each row of `arms`, `{name: rows}`: from 0 to 1 in `ax`, and close up in `close`.

    `middle` is the statistic that the arms are judged by, "mean" or "median", of all or by name. A run without a finite
    accuracy counts as 0, as in the verdict, and is a cross. How many runs diverged or failed stands beside an arm;
    `what` the accuracies are stands below, with the statistic.
    """
    from runner import plots
    groups = {name: [value(r) for r in rows] for name, rows in arms.items()}
    by = {name: middle if isinstance(middle, str) else middle.get(name, "mean") for name in groups}
    medians = [name for name in groups if by[name] == "median"]
    said = "mean" if not medians else "median" if len(medians) == len(groups) else "mean, or median where noted"
    notes = {name: ", ".join(["median"] * (0 < len(medians) < len(groups) and by[name] == "median") + [
        statuses(rows)] * any(r.get("status", "ok") != "ok" for r in rows)) for name, rows in arms.items()}
    plots.plot_groups(groups, ax, reference=reference, xlabel=f"{what}\nbar: {said}", title=title, middle=by,
                      failed_as=0.0, close=close, notes=notes,
                      intervals={name: interval_of([*map(finite, accs)], by[name]) for name, accs in groups.items()})
    if close is not None: ax.set_xlim(-0.03, 1.03)


def interval_of(values: Sequence[float], middle: str) -> tuple[float, float]:
    """A 95 % interval of the mean or the median of `values`; NaN where they are too few for one.

    That of a median goes from one value to another, as far from both ends as the binomial distribution of how many lie
    below the median allows: at least 6 values.
    """
    if middle == "mean": return interval(values)[:2]
    n, ordered = len(values), sorted(values)
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2 ** n <= 0.025:
        below += math.comb(n, k) / 2 ** n
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (math.nan, math.nan)


def seeds_of(curves: Mapping[str, Any], key: str = "", empty: Any = ([], [])) -> dict[str, list[Any]]:
    """The curves of every seed by arm, of each what it has under `key` if that is given; `empty` where there is none.

    `curves` are `SeedCurves`, or such as `curves.json` has, of one seed each.
    """
    every: Mapping[str, list[Any]] = getattr(curves, "every", {}) or {name: [curve] for name, curve in curves.items()}
    return {name: [(curve or {}).get(key, empty) if key else curve or empty for curve in every.get(name, [])]
            for name in curves}


def draw_losses(losses: Mapping[str, Any], ax: "Axes", ylabel: str) -> None:
    """The training losses of every seed, faint, behind the mean of each arm; those above 10 stand at the upper edge.

    Chance is a loss of 2.3: a run on its way to infinity would press all the others flat.
    """
    from runner import plots
    n = max((len(seeds) for seeds in losses.values()), default=0)
    plots.plot_runs(losses, ax, yscale="log", xlabel="training step", ylabel=ylabel,
                    title="every seed, and the arm's mean" if n > 1 else "one seed")
    plots.limit_top(ax, 10)
