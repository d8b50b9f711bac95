"""Every picture of the project. Each function draws into `ax` or a list of `axes` (new ones if None), returns it and
shows nothing.

Colours are Okabe and Ito's, told apart by colour-blind readers; in series they come with line styles and markers,
so that they are told apart in print too. More layers than there are such colours go from dark (the first) to light
(the last) on a scale whose lightness says the order. Values that are not finite, or None, leave gaps, and a cross
stands where a line ends because no finite value follows. Outliers that would flatten all else on a linear axis are
left beyond it, and triangles at its edge mark them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes as Axes
from matplotlib.figure import Figure, SubFigure

from runner.events import listify
from runner.insight import drawing as draw
from runner.insight.drawing import COLOURS, MARKERS, STYLES, Values, rebin
from runner.smoothing import smoothed

Run = tuple[Sequence[float], Values]        # steps, values


def _axes(ax: Axes | None) -> Axes:
    if ax is None: _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _panels(axes: Axes | Iterable[Axes] | None, n: int, what: str) -> list[Axes]:
    """`axes` as a list of `n`, or as many new ones: 2 in a row, 3 of more than 4, 6 of more than 12."""
    if axes is None:
        ncols = min(n, 2 if n <= 4 else 3 if n <= 12 else 6)
        new = figure(ncols, -(-n // ncols), width=4.6, height=2.9)[1] if n else []
        for ax in new[n:]: ax.remove()
        axes = new[:n]
    found = listify(getattr(axes, "flat", axes))    # flat: of the array that plt.subplots returns
    if len(found) != n: raise ValueError(f"got {len(found)} axes; {what} needs {n}: pass as many, or None for new ones")
    return [_axes(ax) for ax in found]


def series_style(i: int, n: int = 0) -> dict[str, Any]:
    """Colour and line style of the `i`-th series: neighbours differ in both, and 28 pass before a pair comes again.

    Of `n` ordered ones, more than there are colours: a place on the scale.
    """
    if n <= len(COLOURS): return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
    return {"color": plt.get_cmap("viridis")(0.9 * i / (n - 1)), "linestyle": "-"}      # above 0.9 it is too light


def plot_line(ys: Values, xs: Sequence[float] | None = None, ax: Axes | None = None, *, xscale: str = "linear",
              yscale: str = "linear", xlabel: str = "", ylabel: str = "") -> Axes:
    """One line: `ys` against `xs`, or against their index."""
    ax = _axes(ax)
    draw.line(ax, range(len(ys)) if xs is None else xs, ys, color=COLOURS[0])
    ax.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    return ax


def mark(ax: Axes, x: float, label: str) -> Axes:
    """A labelled vertical line at `x`."""
    ax.axvline(x, color=COLOURS[1], linestyle="--", linewidth=1, label=label)
    ax.legend(frameon=False)
    return ax


def plot_lines(series: Mapping[str, Run], ax: Axes | None = None, *, yscale: str = "linear",
               ylim: tuple[float, float] | None = None, xlabel: str = "", ylabel: str = "", title: str = "",
               ordered: bool = False, smooth: int = 1, named: int = 12) -> Axes:
    """Several lines, the legend beside them; `series` maps each name to `(xs, ys)`.

    `ordered` says that their order means something, as that of layers does: many of them are coloured by it. `smooth`
    above 1 draws the mean over so many neighbours over a pale line. The legend names all, or `named` of them, evenly
    spaced. No outliers are spared if `ylim` is given.
    """
    ax = _axes(ax)
    n = len(series)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        style = series_style(i, n * ordered)
        if len(ys) <= 12 and n <= len(COLOURS): style |= {"marker": MARKERS[i], "markersize": 3.5}
        draw.smooth_line(ax, xs, ys, smooth, label=name, linewidth=1.4 if n <= 12 and len(ys) <= 200 else 1, **style)
    draw.words(ax, title, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    if ylim is None: draw.spare_outliers(ax)
    else: ax.set_ylim(ylim)
    if series and named: draw.legend(ax, named)
    return ax


def plot_groups(groups: Mapping[str, Values], ax: Axes | None = None, *,
                reference: Mapping[str, float | Sequence[float]] | None = None, reference_label: str = "published",
                xlabel: str = "", title: str = "") -> Axes:
    """One row of dots per group, with a bar at their mean; `groups` maps each name to a list of values.

    `reference` maps names to values (or lists of them) from elsewhere, drawn as hollow diamonds. The mean is
    written at the right edge. A group without a finite value is marked as such.
    """
    ax = _axes(ax)
    names = list(groups)
    for row, name in enumerate(names):
        values = [v for v in groups[name] if v is not None and math.isfinite(v)]
        colour = COLOURS[row % len(COLOURS)]
        if values:
            mean = sum(values) / len(values)
            ax.plot([mean, mean], [row - 0.3, row + 0.3], color=colour, linewidth=2)
            text = f"{mean:.3f}"
        else: text = "no finite value"
        ax.plot(values, [row] * len(values), MARKERS[row % len(MARKERS)], color=colour, alpha=0.7, markersize=6)
        ax.annotate(text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    pairs = [(v, names.index(n)) for n, vs in (reference or {}).items() if n in names
             for v in (vs if isinstance(vs, (list, tuple)) else [vs])]
    if pairs:
        xs, rows = zip(*pairs, strict=True)
        ax.plot(xs, rows, "D", markerfacecolor="none", markeredgecolor="#000000", markersize=10, linestyle="none",
                label=reference_label)
        ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set(xlabel=xlabel)
    ax.set_title(title, loc="right" if pairs else "left", fontsize="medium")
    return ax


def plot_ratios(rows: Sequence[tuple[str, float, Sequence[float], float | None]], ax: Axes | None = None, *,
                title: str = "") -> Axes:
    """One row per ratio; `rows` are `(name, ratio, (low, high), target or None)`.

    A dot with a bar from `low` to `high`, the target as a tick that should lie right of the dot, and a line at 1.
    """
    ax = _axes(ax)
    for i, (_, ratio, (low, high), target) in enumerate(rows):
        ax.plot([low, high], [i, i], color=COLOURS[0], linewidth=2)
        ax.plot(ratio, i, MARKERS[0], color=COLOURS[0])
        if target is not None:
            ax.plot([target] * 2, [i - 0.35, i + 0.35], color=COLOURS[1], linewidth=2, label="target")
        ax.annotate(f"{ratio:.2f}", (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    ax.axvline(1, color="#888888", linewidth=0.8, linestyle="--")
    handles, labels = ax.get_legend_handles_labels()
    if labels: ax.legend(handles[:1], labels[:1], frameon=False, fontsize="small", loc="lower right",
                         bbox_to_anchor=(1, 1), borderaxespad=0.2)
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    draw.words(ax, title, xlabel="time, as a ratio: median and middle half")
    return ax


# --- a training run -----------------------------------------------------------------------------------------------

def plot_losses(losses: Values, steps: Sequence[float] | None = None, ax: Axes | None = None, *,
                valid: Values | None = None, ends: Sequence[float] | None = None, smooth: int | None = None,
                yscale: str = "linear") -> Axes:
    """Training loss against the step, raw and its mean over `smooth` neighbours (None: 4 % of them; 1: raw only).

    `valid` are validation losses, one per epoch, drawn at the steps `ends` (None: epochs of one length).
    """
    ax = _axes(ax)
    steps, losses = range(len(losses)) if steps is None else steps, draw.gaps(losses)
    if smooth is None: smooth = max(1, sum(map(math.isfinite, losses)) // 25)
    draw.smooth_line(ax, steps, losses, smooth, color=COLOURS[0], linewidth=1.6, label="training")
    if valid and losses:
        if ends is None: ends = [(steps[-1] + 1) * (i + 1) / len(valid) for i in range(len(valid))]
        draw.line(ax, ends, valid, color=COLOURS[1], linestyle="--", marker=MARKERS[0], label="validation")
        draw.legend(ax)
    ax.set(yscale=yscale, xlabel="step", ylabel="loss")
    draw.spare_outliers(ax)
    return ax


def plot_rates(rates: Sequence[Values], steps: Sequence[float] | None = None, ax: Axes | None = None, *,
               yscale: str = "linear") -> Axes:
    """Learning rate against the step; `rates` is one list per parameter group, as `Recorder.lrs`."""
    if len(rates) == 1: return plot_line(rates[0], steps, ax, yscale=yscale, xlabel="step", ylabel="learning rate")
    return plot_lines({f"group {i}": (range(len(lrs)) if steps is None else steps, lrs) for i, lrs in enumerate(rates)},
                      ax, yscale=yscale, xlabel="step", ylabel="learning rate")


def plot_lr_find(lrs: Sequence[float], losses: Values, suggestion: float | None = None, ax: Axes | None = None, *,
                 width: int | None = None) -> Axes:
    """Loss against rate (log axis), raw and its mean over `width` neighbours (None: an eighth), the suggestion marked.

    A search ends where the loss explodes: the axis ends at the highest loss before the lowest mean.
    """
    ax, losses = _axes(ax), draw.gaps(losses)
    width = max(3, len(losses) // 8) if width is None else width
    means = draw.smooth_line(ax, lrs, losses, width, color=COLOURS[0], linewidth=1.6)
    ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    lowest = min((i for i, m in enumerate(means) if math.isfinite(m)), key=means.__getitem__, default=0)
    low, most = draw.quantiles(losses, 0, 1)
    high, = draw.quantiles(losses[:max(lowest + 1, len(losses) // 4)], 1)
    if low < high < most: draw.cut(ax, low, high)
    return ax if suggestion is None else mark(ax, suggestion, f"suggestion {suggestion:.2g}")


def plot_runs(runs: Mapping[str, Run | Sequence[Run]], ax: Axes | None = None, *, smooth: int = 1, band: bool = False,
              yscale: str = "linear", xlabel: str = "step", ylabel: str = "", title: str = "") -> Axes:
    """Several runs in one picture; `runs` maps each name to `(steps, values)`, or to a list of such, one per seed.

    Thin lines, one per seed; with `band` their median, and what lies between the smallest and the largest shaded, at
    every step over the seeds that have a finite value there. `smooth` neighbours are averaged first.
    """
    ax = _axes(ax)
    run: Any        # one or several, which the first number tells
    for i, (name, run) in enumerate(runs.items()):
        seeds = [run] if not run or not run[0] or isinstance(run[0][0], Real) else run
        seeds = [(xs, smoothed(draw.gaps(ys), smooth)) for xs, ys in seeds]
        style = series_style(i)
        if band:
            at: dict[float, list[float]] = {}
            for xs, ys in seeds:
                for x, y in zip(xs, ys, strict=True): at.setdefault(x, []).append(y)
            xs = sorted(at)
            lows, mids, highs = draw.columns([draw.quantiles(at[x], 0, 0.5, 1) for x in xs], 3)
            ax.fill_between(xs, lows, highs, color=style["color"], alpha=0.2, linewidth=0)
            seeds = [(xs, mids)]
        for k, (xs, ys) in enumerate(seeds):
            draw.line(ax, xs, ys, linewidth=1.6 if len(seeds) == 1 else 0.9, label=None if k else name, **style)
    draw.words(ax, title, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    draw.spare_outliers(ax)
    if runs: draw.legend(ax)
    return ax


# --- inside a network: one line or one panel per layer ------------------------------------------------------------

def plot_means_stds(series: Mapping[str, tuple[Sequence[float], Values, Values]],
                    axes: Axes | Iterable[Axes] | None = None, *, first: int = 10, yscale: str = "linear",
                    smooth: int = 1) -> list[Axes]:
    """The lesson's figure: mean and std of every layer's activations; `series` maps a path to `(steps, means, stds)`.

    Four panels: means and stds over the `first` steps that were measured, then over all, these with the mean over
    `smooth` neighbours if above 1. The `yscale` "asinh" suits a run that diverges.
    """
    axes = _panels(axes, 4, "plot_means_stds")
    for row, end in ((axes[:2], first), (axes[2:], None)):
        for ax, what, k in zip(row, ("mean", "std"), (1, 2), strict=True):
            plot_lines({path: (data[0][:end], data[k][:end]) for path, data in series.items()}, ax, yscale=yscale,
                       xlabel="step", ylabel=what, title=f"first {end} steps" if end else "all steps", ordered=True,
                       smooth=1 if end else smooth, named=10 * (ax is axes[1]))     # one legend serves all four
    return axes


def plot_shares(series: Mapping[str, Run], ax: Axes | None = None, *, ylabel: str = "share", title: str = "",
                smooth: int = 1) -> Axes:
    """Shares, 0 to 1, against the step, one line per layer; `series` maps a path to `(steps, shares)`."""
    return plot_lines(series, ax, ylim=(-0.03, 1.03), xlabel="step", ylabel=ylabel, title=title, ordered=True,
                      smooth=smooth)


def plot_update_ratios(series: Mapping[str, Run], ax: Axes | None = None, *, title: str = "", smooth: int = 1) -> Axes:
    """log10 of update to weight against the step; `series` maps a parameter's name to `(steps, ratios)`.

    A ratio is the size of a step's change over the size of the parameter, both as a norm or both as a std. The guide
    line at 1e-3 is A. Karpathy's rule of thumb ("Building makemore, part 3", 2022): far above it a rate is too
    high, far below too low. A ratio of 0 leaves a gap.
    """
    logs = {name: (steps, [math.log10(r) if r is not None and 0 < r < math.inf else math.nan for r in ratios])
            for name, (steps, ratios) in series.items()}
    ax = plot_lines(logs, ax, xlabel="step", ylabel="log10(update / weight)", title=title, ordered=True, smooth=smooth)
    ax.axhline(-3, color=COLOURS[-1], linewidth=1, linestyle="--", zorder=3)
    return ax


def plot_channels(series: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]], Sequence[Sequence[float]]]],
                  axes: Axes | Iterable[Axes] | None = None, *, ylabel: str = "value per channel") -> list[Axes]:
    """A norm's running statistics against the batch's, one panel per layer.

    `series` maps a path to `(steps, batch, running)`, the latter two one list per step of one value per channel. Drawn
    are the median over channels and the band from the 10 % to the 90 % quantile.
    """
    axes = _panels(axes, len(series), "plot_channels")
    for ax, (path, (steps, *both)) in zip(axes, series.items(), strict=True):
        for i, (name, values) in enumerate(zip(("batch", "running"), both, strict=True)):
            lows, mids, highs = draw.columns([draw.quantiles(v, 0.1, 0.5, 0.9) for v in values], 3)
            draw.line(ax, steps, mids, label=f"{name}: median", linewidth=1.4, **series_style(i))
            band = f"{name}: 10 to 90 %"
            if i == 0: ax.fill_between(steps, lows, highs, color=COLOURS[i], alpha=0.2, linewidth=0, label=band)
            else:       # a second filling would hide what it shares with the first
                ax.plot(steps, lows, ":", color=COLOURS[i], linewidth=1, label=band)
                ax.plot(steps, highs, ":", color=COLOURS[i], linewidth=1)
        draw.words(ax, path, xlabel="step", ylabel=ylabel)
        draw.spare_outliers(ax)
    right = [ax for ax in axes if (spec := ax.get_subplotspec()) is not None and spec.is_last_col()]
    if axes: draw.legend((right or axes)[0])
    return axes


def plot_histograms(
        histograms: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[Sequence[float]]]],
        axes: Axes | Iterable[Axes] | None = None, *, bins: int = 60) -> list[Axes]:
    """One heat map per layer: values upwards, steps to the right, the shade log(1 + count).

    `histograms` maps a path to `(steps, lows, highs, counts)`: of each measured step the range of its histogram, which
    may differ from step to step, and the list of its counts. They are put on `bins` common bins by `rebin`, whose range
    spares the outliers: the quartiles over steps of the lows and of the highs, widened by their distance, or less where
    nothing lies. Triangles mark the steps that reach beyond it.
    """
    axes = _panels(axes, len(histograms), "plot_histograms")
    for ax, (path, (steps, lows, highs, counts)) in zip(axes, histograms.items(), strict=True):
        low, high = draw.inner_range(lows, highs, 1)
        if math.isnan(low): low = high = 0.0
        if low == high: low, high = (low + sign * max(0.5, abs(low) / 100) for sign in (-1, 1))
        edges = [low + (high - low) * i / bins for i in range(bins)] + [high]
        columns = [rebin(*histogram, edges) for histogram in zip(lows, highs, counts, strict=True)]
        draw.words(ax, path, xlabel="step", ylabel="value")
        if not steps: continue
        shades = torch.tensor(columns, dtype=torch.float64).log1p().T       # (bins, steps)
        image = ax.pcolorfast(draw.between(steps), edges, shades.tolist(), cmap=plt.get_cmap("cividis_r").with_extremes(
            under="white", bad="#BBBBBB"))
        top = max([1.0, *shades[shades.isfinite()].tolist()])
        image.set_clim(1e-9, top)       # white is nothing at all
        ticks = [10 ** k for k in range(int(math.log10(math.expm1(top))) + 1)]
        bar = ax.figure.colorbar(image, ax=ax, ticks=[math.log1p(t) for t in ticks], label="count")
        bar.ax.set_yticklabels([f"{t:,}" for t in ticks])
        draw.mark_beyond(ax, steps, lows, highs, COLOURS[1])
    return axes


# --- figures ------------------------------------------------------------------------------------------------------

def figure(ncols: int = 1, nrows: int = 1, *, width: float = 6.0,
           height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A new figure with panels of `width` by `height` inches: `(fig, axes)`, `axes` a list, row by row."""
    fig, axes = plt.subplots(nrows, ncols, figsize=(width * ncols, height * nrows), squeeze=False, layout="constrained")
    return fig, list(axes.flat)


def save(fig: Figure | SubFigure, path: str | Path) -> None:
    """Write `fig`, or the whole of which it is a part, to `path` as its suffix says and close it."""
    whole = fig.figure if isinstance(fig, SubFigure) else fig
    whole.savefig(path, dpi=120)
    plt.close(whole)
