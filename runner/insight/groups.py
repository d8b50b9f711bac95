"""Rows of dots, one row a group: every value, the middle with its interval, and a close-up beside the whole axis."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from runner.insight import drawing as draw
from runner.insight.drawing import COLOURS, MARKERS
from runner.insight.ends import INK, fitting, wrapped

Middle = str | Mapping[str, str]            # "mean" or "median", of all or of each


def middle_of(middle: Middle, name: str) -> str:
    """The statistic of the group `name`: "mean" or "median"."""
    kind = middle if isinstance(middle, str) else middle.get(name, "mean")
    if kind in ("mean", "median"): return kind
    raise ValueError(f"middle is {kind!r}; give 'mean' or 'median', or a dict of these by group")


def settled(values: Sequence[float | None], failed_as: float | None) -> tuple[list[float], list[float]]:
    """The finite `values`, and what those that are not count as: `failed_as` each, or nothing."""
    finite = [float(v) for v in values if v is not None and math.isfinite(v)]
    return finite, [] if failed_as is None else [failed_as] * (len(values) - len(finite))


def rows(ax: Any, groups: Mapping[str, Sequence[float | None]], middle: Middle, failed_as: float | None,
         intervals: Mapping[str, tuple[float, float]], handles: dict[str, Any]) -> dict[str, float]:
    """Draw every group's row into `ax`; returns each group's middle, and puts what the legend names into `handles`."""
    found = {}
    for row, name in enumerate(groups):
        values, lost = settled(groups[name], failed_as)
        colour = COLOURS[row % len(COLOURS)]
        if values or lost:
            found[name] = mid = getattr(statistics, middle_of(middle, name))(values + lost)
            ax.plot([mid, mid], [row - 0.3, row + 0.3], color=colour, linewidth=2)
        ax.plot(values, [row] * len(values), MARKERS[row % len(MARKERS)], color=colour, alpha=0.6, markersize=6)
        low, high = intervals.get(name, (math.nan, math.nan))
        if low <= high:
            handles["95 % interval"], = ax.plot([low, high], [row + 0.22] * 2, color=INK, linewidth=2, marker="|",
                                                markersize=6)
        if lost:
            handles["no finite value"], = ax.plot(lost, [row] * len(lost), "x", color=colour, markersize=8,
                                                  markeredgewidth=1.6)
    return found


def range_of(groups: Mapping[str, Sequence[float | None]], middles: Mapping[str, float], failed_as: float | None,
             near: float) -> tuple[float, float]:
    """From where to where the close-up goes: the groups whose middles lie within `near` of the greatest, less outliers.
    """
    best = max(middles.values())
    ranges = []
    for name, mid in middles.items():
        values, _ = settled(groups[name], failed_as)
        if mid >= best - near and values:
            around = [v for v in values if abs(v - mid) <= near] or [mid]
            low, high = draw.inner_range(around, around, 1.5)
            ranges.append((min(low, mid), max(high, mid)))
    if not ranges: return best - near, best + near
    low, high = min(a for a, _ in ranges), max(b for _, b in ranges)
    pad = max(0.06 * (high - low), 1e-3 * near)
    return low - pad, high + pad


def mark_outside(ax: Any) -> None:
    """Triangles at the left and the right edge of the close-up `ax`, for the rows' values beyond them."""
    low, high = ax.get_xlim()
    for line in draw.data_lines(ax):
        xs, ys = line.get_data(orig=False)
        for edge, marker, out in ((0, "<", [x < low for x in xs]), (1, ">", [x > high for x in xs])):
            at = sorted({float(y) for y, o in zip(ys, out, strict=True) if o and float(y).is_integer()})
            if at: ax.plot([edge] * len(at), at, marker, transform=ax.get_yaxis_transform(), color=line.get_color(),
                           markersize=5, clip_on=False, label="_beyond")


def references(ax: Any, names: Sequence[str], reference: Mapping[str, float | Sequence[float]]) -> Any:
    """Hollow diamonds at the values of `reference`; their handle, or None if there is none."""
    pairs = [(v, names.index(n)) for n, vs in reference.items() if n in names
             for v in (vs if isinstance(vs, (list, tuple)) else [vs])]
    if not pairs: return None
    xs, ys = zip(*pairs, strict=True)
    return ax.plot(xs, ys, "D", markerfacecolor="none", markeredgecolor="#000000", markersize=10, linestyle="none")[0]


def texts(ax: Any, names: Sequence[str], middles: Mapping[str, float], digits: int, notes: Mapping[str, str]) -> None:
    """Each row's middle, and what there is to note, at the right edge of `ax`."""
    for row, name in enumerate(names):
        text = f"{middles[name]:.{digits}f}" if name in middles else "no finite value"
        ax.annotate(", ".join(filter(None, [text, notes.get(name)])), (1.01, row), va="center", fontsize="small",
                    xycoords=("axes fraction", "data"))


def ticks(ax: Any, names: Sequence[str]) -> None:
    """The names beside the rows, in two lines where one would take too much, smaller where the rows are low."""
    box, n = ax.get_window_extent(), max(len(names), 1)
    height = 0.8 * box.height / ax.figure.dpi * 72 / n         # of a row, in points
    lines = min(3, max(1, int(height / 12)))
    size = min(10.0, max(4.0, height / (1.2 * lines)))
    width = fitting(0.62 * box.width / ax.figure.dpi, size)
    ax.set_yticks(range(len(names)), [wrapped(name, width, lines) for name in names], fontsize=size)
    ax.set_ylim(n - 0.5, -0.5)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
