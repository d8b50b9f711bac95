"""How layers are drawn: lines with their names at the ends, channels, histograms; each into axes that are given."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from runner.insight import drawing as draw
from runner.insight import edges, ends
from runner.insight.drawing import COLOURS, Values

FILLED = {"color": COLOURS[0], "alpha": 0.2, "linewidth": 0}
Series = Mapping[str, tuple[Sequence[float], Values]]


def shown_of(series: Series, most: int) -> list[int]:
    """Which `most` of `series` are drawn as lines: the first, the last, those that lie lowest and highest by their
    median, then evenly spaced ones."""
    n = len(series)
    if n <= most: return list(range(n))
    middles = [draw.quantiles(draw.gaps(ys), 0.5)[0] for _, ys in series.values()]
    ranked = sorted((m, i) for i, m in enumerate(middles) if math.isfinite(m))
    found = dict.fromkeys([0, n - 1, *(i for _, i in ranked[:1] + ranked[-1:])][:most])
    width = n.bit_length()      # halves, quarters, eighths: evenly spaced wherever it stops
    for i in sorted(range(n), key=lambda i: int(f"{i:0{width}b}"[::-1], 2)):
        if len(found) >= most: break
        found[i] = None
    return sorted(found)


def lines(ax: Any, series: Series, styles: Sequence[dict[str, Any]], *, most: int, yscale: str, smooth: int = 1,
          guide: tuple[float, str] | None = None, ylim: tuple[float, float] | None = None, named: bool = True) -> None:
    """At most `most` of `series` as lines with their names at the ends, and the range of the others as a band.

    `guide` is a height and what it is. What a logarithmic axis can't show stands at its edge, see `edges`.
    """
    room = max(1, int(0.8 * ax.get_window_extent().height / ax.figure.dpi * 72 / (ends.SIZE * ends.LEADING)))
    shown, keys = shown_of(series, min(most, room)), list(series)
    edges.scale(ax, yscale, (y for _, ys in series.values() for y in ys))
    handles = []
    others = [series[name] for i, name in enumerate(keys) if i not in set(shown)]
    if others: handles.append((band(ax, others), f"the other {len(others)}, least to greatest"))
    drawn = []
    for i in shown:
        xs, ys = series[keys[i]]
        before = len(ax.lines)
        draw.smooth_line(ax, xs, ys, smooth, label=keys[i], linewidth=1.3, **styles[i])
        drawn.append(next(line for line in list(ax.lines)[before:] if line.get_label() == keys[i]))
    if guide: handles.append((ax.axhline(guide[0], color=COLOURS[-1], linewidth=1, linestyle="--", zorder=3), guide[1]))
    handles += edges.mark_unshown(ax)
    if ylim is not None: ax.set_ylim(ylim)
    elif yscale == "linear": draw.spare_outliers(ax)
    handles += [(mark, text) for text, mark in draw.marks(ax).items()]
    if handles: edges.key(ax, handles)
    if named and drawn:
        width = ends.fitting(max(0.8, 0.4 * ax.get_window_extent().width / ax.figure.dpi))
        ends.label_ends(ax, drawn, ends.distinct([keys[i] for i in shown], max(width, 14)))


def band(ax: Any, series: Sequence[tuple[Sequence[float], Values]]) -> Any:
    """What lies between the least and the greatest of `series` at each step; on a logarithmic axis of those above 0."""
    log = ax.get_yscale() == "log"
    at: dict[float, list[float]] = {}
    for xs, ys in series:
        for x, y in zip(xs, draw.gaps(ys), strict=True):
            if not math.isnan(y) and not (log and y <= 0): at.setdefault(x, []).append(y)
    xs = sorted(at)
    return ax.fill_between(xs, [min(at[x]) for x in xs], [max(at[x]) for x in xs], color="#BBBBBB", alpha=0.5,
                           linewidth=0, label="_others")


def channels(ax: Any, steps: Sequence[float], both: Sequence[Sequence[Sequence[float]]],
             styles: Sequence[dict[str, Any]], yscale: str) -> None:
    """A panel of `plots.plot_channels`."""
    edges.scale(ax, yscale, (v for values in both for row in values for v in row))
    log, bands = yscale == "log", []
    for i, (name, values) in enumerate(zip(("batch", "running"), both, strict=True)):
        lows, mids, highs = draw.columns([draw.quantiles(v, 0.1, 0.5, 0.9) for v in values], 3)
        draw.line(ax, steps, mids, label=f"{name}: median", linewidth=1.4, **styles[i])
        label = f"{name}: 10 to 90 %"
        if i == 0: bands = [lows, highs]
        else:       # a second filling would hide what it shares with the first
            ax.plot(steps, lows, ":", color=COLOURS[i], linewidth=1, label=label)
            ax.plot(steps, highs, ":", color=COLOURS[i], linewidth=1)
        if i == 0 and not log: ax.fill_between(steps, lows, highs, label=label, **FILLED)
        if log:
            draw.line(ax, steps, [_least(v) for v in values], label=f"{name}: least channel", linewidth=0.8,
                      color=COLOURS[i], linestyle=(0, (1, 1)) if i else "-", alpha=0.8)
    if log and any(v > 0 for v in bands[1]):     # down to the axis where the lower end is 0
        ax.plot(steps, bands[1], linewidth=0)    # the axis must hold it
        bottom, top = ax.get_ylim()
        ax.fill_between(steps, *([max(v, bottom) for v in band] for band in bands), label="batch: 10 to 90 %", **FILLED)
        ax.set_ylim(bottom, top)
    draw.spare_outliers(ax)
    handles = edges.mark_unshown(ax)
    for mark, label in handles: mark.set_label(f"{label}, at the edge")


def _least(values: Sequence[float]) -> float:
    """The least of `values`; NaN or infinite only if nothing else is there."""
    finite = [v for v in values if math.isfinite(v)]
    return min(finite) if finite else values[0] if values else math.nan


def histogram(ax: Any, steps: Sequence[float], lows: Sequence[float], highs: Sequence[float],
              counts: Sequence[Sequence[float]], bins: int) -> None:
    """A panel of `plots.plot_histograms`."""
    low, high = draw.inner_range(lows, highs, 1)
    if math.isnan(low): low = high = 0.0
    if low == high: low, high = (low + sign * max(0.5, abs(low) / 100) for sign in (-1, 1))
    borders = [low + (high - low) * i / bins for i in range(bins)] + [high]
    columns = [draw.rebin(*histogram, borders) for histogram in zip(lows, highs, counts, strict=True)]
    if not steps: return
    shades = torch.tensor(columns, dtype=torch.float64).log1p().T       # (bins, steps)
    image = ax.pcolorfast(draw.between(steps), borders, shades.tolist(), cmap="cividis_r")
    image.set_cmap(image.cmap.with_extremes(under="white", bad="#BBBBBB"))
    top = max([1.0, *shades[shades.isfinite()].tolist()])
    image.set_clim(1e-9, top)       # white is nothing at all
    ticks = [10 ** k for k in range(int(math.log10(math.expm1(top))) + 1)]
    bar = ax.figure.colorbar(image, ax=ax, ticks=[math.log1p(t) for t in ticks], label="count")
    bar.ax.set_yticklabels([f"{t:,}" for t in ticks])
    draw.mark_beyond(ax, steps, lows, highs, COLOURS[1])
    edges.key(ax, [(mark, text) for text, mark in draw.marks(ax).items()])
