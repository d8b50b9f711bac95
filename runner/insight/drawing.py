"""What the pictures are drawn of: lines with gaps, outliers cut and marked, legends, bins. It imports no matplotlib."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from runner.insight.ends import distinct, fitting
from runner.smoothing import smoothed

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Values = Sequence[float | None]     # what is not finite, or None, is a gap


class Axes(Protocol):
    """What is used here of matplotlib's `Axes`."""

    @property
    def lines(self) -> Iterable[Any]: ...
    transData: Any
    @property
    def figure(self) -> Any: ...
    def get_window_extent(self) -> Any: ...
    def plot(self, *args: Any, **kwargs: Any) -> Any: ...
    def set(self, **kwargs: Any) -> Any: ...
    def set_title(self, *args: Any, **kwargs: Any) -> Any: ...
    def set_ylim(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_ylim(self) -> tuple[float, float]: ...
    def get_yscale(self) -> str: ...
    def legend(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_legend_handles_labels(self) -> tuple[list[Any], list[Any]]: ...


def gaps(values: Iterable[float | None]) -> list[float]:
    """`values` as floats, NaN for what is not finite: matplotlib leaves a gap there."""
    return [float(v) if v is not None and math.isfinite(v) else math.nan for v in values]


def words(ax: Axes, title: str = "", **settings: str) -> None:
    """Scales, labels and title of `ax`."""
    ax.set(**settings)
    ax.set_title(title, loc="left", fontsize="medium")


def columns(rows: Sequence[Sequence[float]], n: int) -> list[list[float]]:
    """`rows` of `n` values as `n` lists."""
    return [[row[i] for row in rows] for i in range(n)]


def smooth_line(ax: Axes, xs: Sequence[float], ys: Values, width: int, **style: Any) -> list[float]:
    """A pale line and its running mean over it; the line alone at a width of 1. Returns what was drawn last."""
    if width <= 1:
        line(ax, xs, ys, **style)
        return gaps(ys)
    line(ax, xs, ys, color=style["color"], linewidth=0.7, alpha=0.35)
    means = smoothed(gaps(ys), width)
    del line(ax, xs, means, **style).given          # the pale one has what was given
    return means


def line(ax: Axes, xs: Sequence[float], ys: Values, **style: Any) -> Any:
    """One line with its gaps; a cross where it ends before `ys` do, markers at points between gaps. Returns the line.
    """
    given, ys = ys, gaps(ys)
    finite = [i for i, y in enumerate(ys) if not math.isnan(y)]
    line, = ax.plot(xs, ys, **({"marker": MARKERS[0]} if len(finite) == 1 else {}) | style)
    line.given = xs, given          # for `edges.mark_unshown`
    lonely(ax, line, xs, ys, [not math.isnan(y) for y in ys])
    if finite and finite[-1] < len(ys) - 1:
        ax.plot(xs[finite[-1]], ys[finite[-1]], "x", color=line.get_color(), markersize=7, gid="no value follows")
    return line


def lonely(ax: Axes, line: Any, xs: Sequence[float], ys: Sequence[float], shown: Sequence[bool]) -> None:
    """Dots at the points of `line` that are `shown` between two that aren't: a line alone would leave them out."""
    at = [i for i, ok in enumerate(shown) if ok and len(shown) > 1
          and not any(shown[k] for k in (i - 1, i + 1) if 0 <= k < len(shown))]
    if at: ax.plot([xs[i] for i in at], [ys[i] for i in at], ".", color=line.get_color(), markersize=4)


def quantiles(values: Iterable[float], *qs: float) -> list[float]:
    """Quantiles of the finite `values`, linear between neighbours; NaN if there is none."""
    values = sorted(v for v in values if math.isfinite(v))
    if not values: return [math.nan] * len(qs)
    found = []
    for q in qs:
        i = min(int(q * (len(values) - 1)), max(0, len(values) - 2))
        a, b = values[i], values[min(i + 1, len(values) - 1)]
        found.append(a + (q * (len(values) - 1) - i) * (b - a))
    return found


def legend(ax: Axes, named: int = 12) -> None:
    """The legend right of `ax`; of more than `named` lines it has as many, the first and the last among them."""
    handles, names = ax.get_legend_handles_labels()
    n = len(names)
    shown = [*range(n)] if n <= named else [round(k * (n - 1) / (named - 1)) for k in range(named)]
    names = distinct(names, fitting(0.35 * ax.figure.bbox.width / ax.figure.dpi, 8.3))
    noted = marks(ax)
    ax.legend([*(handles[i] for i in shown), *noted.values()], [*(names[i] for i in shown), *noted],
              title=f"{named} of {n}" if n > named else None, frameon=False, fontsize="small", title_fontsize="small",
              alignment="left", loc="upper left", bbox_to_anchor=(1, 1))


def marks(ax: Axes) -> dict[str, Any]:
    """What the markers in `ax` say, each with one of them: of values beyond it, and of lines that end early."""
    return {line.get_gid(): line for line in ax.lines if line.get_gid()}


def spare_outliers(ax: Axes) -> None:
    """Cut a linear axis if without it the lines, each less its outliers, would get less than a twentieth of it."""
    if ax.get_yscale() != "linear": return
    lines = [[y for y in line.get_ydata(orig=False).tolist() if math.isfinite(y)] for line in data_lines(ax)]
    ranges = [inner_range(ys, ys, 3) for ys in lines if len(ys) >= 8]      # of fewer one can't tell
    if not ranges: return
    low, high = min(a for a, _ in ranges), max(b for _, b in ranges)
    least, most = min(min(ys) for ys in lines if ys), max(max(ys) for ys in lines if ys)
    if 0 < 20 * (high - low) < most - least: cut(ax, low, high)


def cut(ax: Axes, low: float, high: float) -> None:
    """Limit the y axis to `low` to `high` and mark what lies beyond."""
    pad = 0.05 * (high - low)
    ax.set_ylim(low - pad, high + pad)
    for line in data_lines(ax):
        ys = line.get_ydata(orig=False)
        mark_beyond(ax, line.get_xdata(), ys, ys, line.get_color())


def data_lines(ax: Axes) -> list[Any]:
    """The lines of `ax` without those that span it, such as a `mark`."""
    return [line for line in ax.lines if line.get_transform() is ax.transData]


def mark_beyond(ax: Axes, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], colour: str) -> None:
    """Triangles at the edges of `ax`, at the `xs` whose `lows` or `highs` lie beyond them."""
    low, high = ax.get_ylim()
    for edge, marker, beyond in ((low, "v", [v < low for v in lows]), (high, "^", [v > high for v in highs])):
        at = [x for x, out in zip(xs, beyond, strict=True) if out]
        if at: ax.plot(at, [edge] * len(at), marker, color=colour, markersize=4, clip_on=False, gid="beyond the axis")


def inner_range(lows: Iterable[float], highs: Iterable[float], widen: float) -> tuple[float, float]:
    """Range of `lows` to `highs` without outliers: from a quartile to a quartile and `widen` times as far again."""
    (least, low), (high, most) = quantiles(lows, 0, 0.25), quantiles(highs, 0.75, 1)
    return max(low - widen * (high - low), least), min(high + widen * (high - low), most)


def rebin(low: float, high: float, counts: Sequence[float], edges: Sequence[float]) -> list[float]:
    """The counts of equal bins from `low` to `high`, put into the bins between `edges`: a list, one per new bin.

    An old bin's count is taken as spread evenly over it (linear interpolation of the cumulative counts): the sum stays,
    less what lies outside `edges`. A range of no width is one value. NaN if range or counts are not finite, or none.
    """
    old, borders = (torch.as_tensor(v, dtype=torch.float64) for v in (counts, edges))
    n = len(old)
    if not (n and math.isfinite(low) and math.isfinite(high) and old.isfinite().all()):
        return [math.nan] * (len(borders) - 1)
    if high > low: at = ((borders - low) / (high - low)).clamp(0, 1) * n    # place of each border, in old bins
    else: at = torch.cat([borders[:-1] > low, borders[-1:] >= low]) * float(n)
    below = torch.cat([old.new_zeros(1), old.cumsum(0)])
    i = at.long().clamp(max=n - 1)
    new: list[float] = (below[i] + (at - i) * old[i]).diff().tolist()
    return new


def between(xs: Sequence[float]) -> list[float]:
    """The borders of cells around `xs`: half way between neighbours."""
    if len(xs) == 1: return [xs[0] - 0.5, xs[0] + 0.5]
    middles = [(a + b) / 2 for a, b in pairwise(xs)]
    return [2 * xs[0] - middles[0], *middles, 2 * xs[-1] - middles[-1]]
