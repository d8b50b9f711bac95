"""Scales, and what a scale can't show: 0, negative and infinite values and NaN stand as markers at the axes' edges."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from runner.insight.drawing import data_lines, gaps, lonely, quantiles

# What it is called, its marker, at the upper edge or the lower, filled or not, and which values it is.
EDGES: tuple[tuple[str, str, bool, bool, Callable[[float], bool]], ...] = (
    ("infinite", "^", True, True, lambda v: v == math.inf),
    ("NaN", "x", True, True, math.isnan),
    ("0", "v", False, False, lambda v: v == 0),
    ("negative", "v", False, True, lambda v: v < 0),
)


KEY = 7.5           # points: of the legend above an axes


def scale(ax: Any, yscale: str, values: Iterable[float | None] = ()) -> None:
    """Set the scale of y; "symlog" is linear up to the lower tenth of the sizes of `values`, and logarithmic beyond."""
    if yscale == "log":
        drawn = (y for line in data_lines(ax) for y in line.get_ydata(orig=False))
        if not any(0 < y < math.inf for y in gaps([*values, *drawn])): ax.set_ylim(0.1, 10)   # or matplotlib would warn
        ax.set_yscale("log", nonpositive="mask")
    elif yscale == "symlog":
        sizes = [abs(v) for v in values if v is not None and math.isfinite(v) and v]
        small, most = quantiles(sizes, 0.1, 1)
        # At most 8 decades, or the labels of the ticks would touch.
        ax.set_yscale("symlog", linthresh=max(small, most * 1e-8) if sizes else 1.0)
        symlog_ticks(ax, max(small, most * 1e-8) if sizes else 1.0, most if sizes else 1.0)
    else: ax.set_yscale(yscale)


def symlog_ticks(ax: Any, small: float, most: float) -> None:
    """Ticks at 0 and at some powers of ten: three to either side, or the labels around 0 would touch."""
    low, high = math.ceil(math.log10(small)), math.floor(math.log10(most))
    powers = sorted({high, (low + high + 1) // 2, low} if high > low else {high})
    ticks = [10.0 ** p for p in powers if 10.0 ** p > small * 1.5 or p == high]
    ax.set_yticks([*(-t for t in reversed(ticks)), 0, *ticks])
    ax.minorticks_off()


def mark_unshown(ax: Any) -> list[Any]:
    """Markers at the edges of a logarithmic `ax` for the values of its lines that it can't show, one kind a label.

    Returns a handle of each kind for a legend. None is no value: nothing was measured there.
    """
    if ax.get_yscale() not in ("log", "symlog"): return []
    log, handles = ax.get_yscale() == "log", []
    lines = [(line, *line.given) for line in data_lines(ax) if hasattr(line, "given")]
    for line, xs, ys in lines if log else ():
        lonely(ax, line, xs, gaps(ys), [y > 0 for y in gaps(ys)])
    for label, marker, top, filled, is_one in EDGES:
        if not log and not top: continue
        first = None
        for line, xs, ys in lines:
            at = [x for x, y in zip(xs, ys, strict=True) if y is not None and is_one(float(y))]
            if not at: continue
            colour = line.get_color()
            mark, = ax.plot(at, [float(top)] * len(at), marker, transform=ax.get_xaxis_transform(), clip_on=False,
                            color=colour, markersize=4.5, markerfacecolor=colour if filled else "white", zorder=4,
                            label=f"_{label}")
            first = first or mark
        if first: handles.append((first, label))
    return handles


def key(ax: Any, handles: Sequence[tuple[Any, str]]) -> None:
    """A legend of `handles` above `ax`, and above it the title; nothing if there are none."""
    if not handles: return
    room = 0.9 * ax.get_window_extent().width / ax.figure.dpi * 72                 # points
    widest = max(len(label) for _, label in handles) * 0.62 * KEY + 4 * KEY
    above = 1.8 if ax.get_yscale() in ("linear", "asinh") else 0.1          # the ticks' common factor may stand there
    columns = max(1, min(len(handles), int(room / widest)))
    ax.legend([h for h, _ in handles], [label for _, label in handles], frameon=False, fontsize=KEY, ncols=columns,
              loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=above, borderpad=0.1, columnspacing=1,
              handletextpad=0.4, handlelength=1.6, labelspacing=0.2)
    rows = -(-len(handles) // columns)
    ax.set_title(ax.get_title(loc="left"), loc="left", fontsize="medium", pad=6 + (rows * 1.35 + above) * KEY)
