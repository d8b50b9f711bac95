"""Every picture of the project. Each function draws into `ax` or a list of `axes` (new ones if None), returns it and
shows nothing.

Colours are Okabe and Ito's, told apart by colour-blind readers; in series they come with line styles and markers,
so that they are told apart in print too. More layers than there are such colours go from dark (the first) to light
(the last) on a scale whose lightness says the order. Values that are not finite, or None, leave gaps, and a cross
stands where a line ends because no finite value follows. Outliers that would flatten all else on a linear axis are
left beyond it, and triangles at its edge mark them. What a logarithmic axis can't show (0, negative, infinite, NaN)
stands as a marker at its edge, each kind named in the legend. More than `PAGE` panels go on several figures.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes as Axes

from runner.insight import drawing as draw
from runner.insight import edges, ends, layer_plots
from runner.insight import groups as groups_
from runner.insight.drawing import COLOURS, MARKERS, STYLES, Values
from runner.insight.drawing import rebin as rebin
from runner.insight.figures import PAGE as PAGE
from runner.insight.figures import axis, panels
from runner.insight.figures import figure as figure
from runner.insight.figures import pages as pages
from runner.insight.figures import save as save
from runner.insight.figures import save_pages as save_pages
from runner.smoothing import smoothed

Run = tuple[Sequence[float], Values]        # steps, values
LINES = 12          # of layers, in one picture; the others are a band


def series_style(i: int, n: int = 0) -> dict[str, Any]:
    """Colour and line style of the `i`-th series: neighbours differ in both, and 28 pass before a pair comes again.

    Of `n` ordered ones, more than there are colours: a place on the scale.
    """
    if n <= len(COLOURS): return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
    return {"color": plt.get_cmap("viridis")(0.9 * i / (n - 1)), "linestyle": "-"}      # above 0.9 it is too light


def plot_line(ys: Values, xs: Sequence[float] | None = None, ax: Axes | None = None, *, xscale: str = "linear",
              yscale: str = "linear", xlabel: str = "", ylabel: str = "") -> Axes:
    """One line: `ys` against `xs`, or against their index."""
    ax = axis(ax)
    draw.line(ax, range(len(ys)) if xs is None else xs, ys, color=COLOURS[0])
    ax.set(xscale=xscale, xlabel=xlabel, ylabel=ylabel)
    edges.scale(ax, yscale, ys)
    edges.key(ax, edges.mark_unshown(ax))
    return ax


def limit_top(ax: Axes, top: float) -> Axes:
    """End the y axis at `top` if it goes further, with triangles where lines lie beyond."""
    low, high = ax.get_ylim()
    if high > top > low:
        ax.set_ylim(low, top)
        for line in draw.data_lines(ax):
            ys = line.get_ydata(orig=False)
            draw.mark_beyond(ax, line.get_xdata(), [top] * len(ys), ys, line.get_color())
        if ax.get_legend(): draw.legend(ax)
    return ax


def mark(ax: Axes, x: float, label: str) -> Axes:
    """A labelled vertical line at `x`."""
    ax.axvline(x, color=COLOURS[1], linestyle="--", linewidth=1, label=label)
    handles, names = ax.get_legend_handles_labels()
    marks = draw.marks(ax)
    ax.legend([*handles, *marks.values()], [*names, *marks], frameon=False)
    return ax


def plot_lines(series: Mapping[str, Run], ax: Axes | None = None, *, yscale: str = "linear",
               ylim: tuple[float, float] | None = None, xlabel: str = "", ylabel: str = "", title: str = "",
               ordered: bool = False, smooth: int = 1, named: int = 12) -> Axes:
    """Several lines, the legend beside them; `series` maps each name to `(xs, ys)`.

    `ordered` says that their order means something, as that of layers does: many of them are coloured by it. `smooth`
    above 1 draws the mean over so many neighbours over a pale line. The legend names all, or `named` of them, evenly
    spaced. No outliers are spared if `ylim` is given.
    """
    ax = axis(ax)
    n = len(series)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        style = series_style(i, n * ordered)
        if len(ys) <= 12 and n <= len(COLOURS): style |= {"marker": MARKERS[i], "markersize": 3.5}
        draw.smooth_line(ax, xs, ys, smooth, label=name, linewidth=1.4 if n <= 12 and len(ys) <= 200 else 1, **style)
    draw.words(ax, title, xlabel=xlabel, ylabel=ylabel)
    _settle(ax, yscale)
    if ylim is not None: ax.set_ylim(ylim)
    if series and named: draw.legend(ax, named)
    return ax


def _settle(ax: Axes, yscale: str) -> None:
    """Set the scale of what was drawn, with outliers spared and marks for what it can't show, named in the legend."""
    edges.scale(ax, yscale, (y for line in draw.data_lines(ax) for y in getattr(line, "given", ((), ()))[1]))
    for mark, label in edges.mark_unshown(ax): mark.set_label(f"{label}, at the edge")
    draw.spare_outliers(ax)


def plot_layers(series: Mapping[str, Run], ax: Axes | None = None, *, yscale: str = "log", lines: int = LINES,
                ylim: tuple[float, float] | None = None, xlabel: str = "step", ylabel: str = "", title: str = "",
                smooth: int = 1, guide: tuple[float, str] | None = None, named: bool = True) -> Axes:
    """One line per layer, in the model's order from dark to light, each with its name at its end.

    Of more than `lines` those are drawn that come first and last, those that lie lowest and highest, and some between;
    a band spans the others. `guide` is the height of a dashed line and what it says.
    """
    n = len(series)
    if ax is None:
        longest = min(60, max(map(len, series), default=0)) if named else 0
        ax = figure(width=5.2 + ends.SIZE * ends.WIDTH / 72 * longest)[1][0]
    ax = axis(ax)
    draw.words(ax, title, xlabel=xlabel, ylabel=ylabel)
    layer_plots.lines(ax, series, [series_style(i, n) for i in range(n)], most=lines, yscale=yscale, smooth=smooth,
                      guide=guide, ylim=ylim, named=named)
    return ax


def plot_groups(groups: Mapping[str, Values], ax: Axes | None = None, *,
                reference: Mapping[str, float | Sequence[float]] | None = None, reference_label: str = "published",
                xlabel: str = "", title: str = "", middle: groups_.Middle = "mean", failed_as: float | None = None,
                intervals: Mapping[str, tuple[float, float]] | None = None, notes: Mapping[str, str] | None = None,
                close: Axes | None = None, near: float = 0.1) -> Axes:
    """One row of dots per group, with a bar at their middle; `groups` maps each name to a list of values.

    `middle` is "mean" or "median", or maps names to these; `intervals` maps names to `(low, high)` of it, drawn below
    the dots. What is not finite counts as `failed_as` in the middle and is a cross there; None leaves it out. `close`
    are axes beside `ax` for the same rows close up: around those whose middles lie within `near` of the greatest, with
    triangles for what lies beyond. `reference` maps names to values (or lists of them) from elsewhere, drawn as hollow
    diamonds. The middle is written at the right edge, with `notes` by name. A group without a finite value is marked
    as such.
    """
    ax, names, handles = axis(ax), list(groups), dict[str, Any]()
    middles = groups_.rows(ax, groups, middle, failed_as, intervals or {}, handles)
    mark = groups_.references(ax, names, reference or {})
    if mark: handles[reference_label] = mark
    groups_.ticks(ax, names)
    digits = 3
    if close is not None:
        axis(close)
        low, high = groups_.range_of(groups, middles, failed_as, near) if middles else (0.0, 1.0)
        inside = {name: i for name, i in (intervals or {}).items() if low <= middles.get(name, low - 1) <= high}
        groups_.rows(close, groups, middle, failed_as, inside, {})
        groups_.references(close, names, reference or {})
        groups_.ticks(close, names)
        close.set_yticklabels([])
        close.set_xlim(low, high)
        groups_.mark_outside(close)
        close.locator_params(axis="x", nbins=4)
        draw.words(close, "close up", xlabel=xlabel)
    low, high = (close or ax).get_xlim()
    if high - low < 0.01: digits = 4
    groups_.texts(close or ax, names, middles, digits, notes or {})
    ax.set(xlabel=xlabel)
    ax.set_title(title, loc="left", fontsize="medium", pad=22 if handles and title else None)
    if handles: ax.legend(handles.values(), handles.keys(), frameon=False, fontsize="small", loc="lower left",
                          bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=len(handles), columnspacing=1,
                          handletextpad=0.4)
    return ax


def plot_ratios(rows: Sequence[tuple[str, float, Sequence[float], float | None]], ax: Axes | None = None, *,
                title: str = "") -> Axes:
    """One row per ratio; `rows` are `(name, ratio, (low, high), target or None)`.

    A dot with a bar from `low` to `high`, the target as a tick that should lie right of the dot, and a line at 1.
    """
    ax = axis(ax)
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
    ax = axis(ax)
    steps, losses = range(len(losses)) if steps is None else steps, draw.gaps(losses)
    if smooth is None: smooth = max(1, sum(map(math.isfinite, losses)) // 25)
    draw.smooth_line(ax, steps, losses, smooth, color=COLOURS[0], linewidth=1.6, label="training")
    if valid and losses:
        if ends is None: ends = [(steps[-1] + 1) * (i + 1) / len(valid) for i in range(len(valid))]
        draw.line(ax, ends, valid, color=COLOURS[1], linestyle="--", marker=MARKERS[0], label="validation")
    ax.set(xlabel="step", ylabel="loss")
    _settle(ax, yscale)
    if len(draw.data_lines(ax)) > 1: draw.legend(ax)
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
    ax, losses = axis(ax), draw.gaps(losses)
    width = max(3, len(losses) // 8) if width is None else width
    means = draw.smooth_line(ax, lrs, losses, width, color=COLOURS[0], linewidth=1.6)
    ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    lowest = min((i for i, m in enumerate(means) if math.isfinite(m)), key=means.__getitem__, default=0)
    low, most = draw.quantiles(losses, 0, 1)
    high, = draw.quantiles(losses[:max(lowest + 1, len(losses) // 4)], 1)
    if low < high < most: draw.cut(ax, low, high)
    if suggestion is not None: return mark(ax, suggestion, f"suggestion {suggestion:.2g}")
    if draw.marks(ax): draw.legend(ax)          # it names what lies beyond
    return ax


def plot_runs(runs: Mapping[str, Run | Sequence[Run]], ax: Axes | None = None, *, smooth: int = 1, band: bool = False,
              yscale: str = "linear", xlabel: str = "step", ylabel: str = "", title: str = "",
              middle: str = "mean") -> Axes:
    """Several runs in one picture; `runs` maps each name to `(steps, values)`, or to a list of such, one per seed.

    Of several seeds each is a faint line behind their `middle`, "mean" or "median". With `band` it is their median, and
    what lies between the smallest and the largest is shaded. At every step both are over the seeds that have a finite
    value there; the legend says how many seeds end without one. `smooth` neighbours are averaged first.
    """
    if middle not in ("mean", "median"): raise ValueError(f"middle is {middle!r}; give 'mean' or 'median'")
    ax = axis(ax)
    run: Any        # one or several, which the first number tells
    for i, (name, run) in enumerate(runs.items()):
        seeds = [run] if not run or not run[0] or isinstance(run[0][0], Real) else run
        whole = [(xs, smoothed(draw.gaps(ys), smooth) if smooth > 1 else ys) for xs, ys in seeds]
        seeds = [(xs, draw.gaps(ys)) for xs, ys in whole]
        style = series_style(i)
        gone = sum(not ys or math.isnan(ys[-1]) for _, ys in seeds)
        if gone: name += f" ({f'{gone} of {len(seeds)} ' * (len(seeds) > 1)}diverged)"
        if len(seeds) == 1 and not band:
            draw.line(ax, *whole[0], linewidth=1.6, label=name, **style)
            continue
        at: dict[float, list[float]] = {}
        for xs, ys in seeds:
            for x, y in zip(xs, ys, strict=True): at.setdefault(x, []).append(y)
        xs = sorted(at)
        lows, mids, highs = draw.columns([draw.quantiles(at[x], 0, 0.5, 1) for x in xs], 3)
        if band: ax.fill_between(xs, lows, highs, color=style["color"], alpha=0.2, linewidth=0)
        else:
            for seed in whole: draw.line(ax, *seed, color=style["color"], linewidth=0.7, alpha=0.35)
            if middle == "mean": mids = [_mean(at[x]) for x in xs]
        draw.line(ax, xs, mids, linewidth=1.6, label=name, **style)
    draw.words(ax, title, xlabel=xlabel, ylabel=ylabel)
    _settle(ax, yscale)
    if runs: draw.legend(ax)
    return ax


def _mean(values: Iterable[float]) -> float:
    """The mean of the finite `values`, NaN if there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


# --- inside a network: one line or one panel per layer ------------------------------------------------------------

def plot_means_stds(series: Mapping[str, tuple[Sequence[float], Values, Values]],
                    axes: Axes | Iterable[Axes] | None = None, *, first: int = 10, yscale: str = "linear",
                    smooth: int = 1) -> list[Axes]:
    """The lesson's figure: mean and std of every layer's activations; `series` maps a path to `(steps, means, stds)`.

    Four panels: means and stds over the `first` steps that were measured, then over all, these with the mean over
    `smooth` neighbours if above 1. The `yscale` "log" is for the stds; means then are on "symlog", which has both signs
    and is linear around 0. "asinh" suits a run that diverges. Layers beyond `LINES` are a band.
    """
    axes = panels(axes, 4, "plot_means_stds", labels=min(60, max(map(len, series), default=0)))
    for row, end in ((axes[:2], first), (axes[2:], None)):
        for ax, what, k in zip(row, ("mean", "std"), (1, 2), strict=True):
            plot_layers({path: (data[0][:end], data[k][:end]) for path, data in series.items()}, ax,
                        yscale="symlog" if (yscale, what) == ("log", "mean") else yscale, ylabel=what,
                        title=f"first {end} steps" if end else "all steps", smooth=1 if end else smooth)
    return axes


def plot_shares(series: Mapping[str, Run], ax: Axes | None = None, *, ylabel: str = "share", title: str = "",
                smooth: int = 1) -> Axes:
    """Shares, 0 to 1, against the step, one line per layer; `series` maps a path to `(steps, shares)`."""
    return plot_layers(series, ax, yscale="linear", ylim=(-0.03, 1.03), ylabel=ylabel, title=title, smooth=smooth)


def plot_update_ratios(series: Mapping[str, Run], ax: Axes | None = None, *, title: str = "", smooth: int = 1) -> Axes:
    """Update to weight against the step, logarithmic; `series` maps a parameter's name to `(steps, ratios)`.

    A ratio is the size of a step's change over the size of the parameter, both as a norm or both as a std. The guide
    line at 1e-3 is A. Karpathy's rule of thumb ("Building makemore, part 3", 2022): far above it a rate is too
    high, far below too low. A ratio of 0, or an infinite one (of a weight that was 0), stands at the edge.
    """
    return plot_layers(series, ax, ylabel="update / weight", title=title, smooth=smooth,
                       guide=(1e-3, "rule of thumb, 1e-3"))


def plot_kinds(kinds: Mapping[str, Mapping[str, Run]], axes: Axes | Iterable[Axes] | None = None, *,
               yscale: str = "log", ylabel: str = "", guide: tuple[float, str] | None = None) -> list[Axes]:
    """A panel for each kind of parameter, such as weights, biases and norms; each kind as in `plot_layers`."""
    axes = panels(axes, len(kinds), "plot_kinds", labels=min(60, max((len(n) for k in kinds.values() for n in k),
                                                                      default=0)))
    for ax, (kind, series) in zip(axes, kinds.items(), strict=True):
        plot_layers(series, ax, yscale=yscale, ylabel=ylabel, title=kind, guide=guide)
    return axes


def plot_channels(series: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]], Sequence[Sequence[float]]]],
                  axes: Axes | Iterable[Axes] | None = None, *, ylabel: str = "value per channel",
                  yscale: str = "linear") -> list[Axes]:
    """A norm's running statistics against the batch's, one panel per layer, `PAGE` on a figure.

    `series` maps a path to `(steps, batch, running)`, the latter two one list per step of one value per channel. Drawn
    are the median over channels and the band from the 10 % to the 90 % quantile; on a `yscale` of "log", which suits
    variances, the least channel too.
    """
    axes = panels(axes, len(series), "plot_channels", series)
    for ax, (steps, *both) in zip(axes, series.values(), strict=True):
        layer_plots.channels(ax, steps, both, [series_style(0), series_style(1)], yscale)
        ax.set(xlabel="step", ylabel=ylabel)
    for page in pages(axes):
        on = [ax for ax in axes if ax.figure is page]
        right = [ax for ax in on if (spec := ax.get_subplotspec()) is not None and spec.is_last_col()]
        draw.legend((right or on)[0])
    return axes


def plot_histograms(
        histograms: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[Sequence[float]]]],
        axes: Axes | Iterable[Axes] | None = None, *, bins: int = 60) -> list[Axes]:
    """One heat map per layer: values upwards, steps to the right, the shade log(1 + count); `PAGE` on a figure.

    `histograms` maps a path to `(steps, lows, highs, counts)`: of each measured step the range of its histogram, which
    may differ from step to step, and the list of its counts. They are put on `bins` common bins by `rebin`, whose range
    spares the outliers: the quartiles over steps of the lows and of the highs, widened by their distance, or less where
    nothing lies. Triangles mark the steps that reach beyond it.
    """
    axes = panels(axes, len(histograms), "plot_histograms", histograms)
    for ax, histogram in zip(axes, histograms.values(), strict=True):
        ax.set(xlabel="step", ylabel="value")
        layer_plots.histogram(ax, *histogram, bins)
    return axes
