"""Every picture of the project. Each function draws into `ax` (a new one if None), returns it and shows nothing.

Colours are Okabe and Ito's, told apart by colour-blind readers; in series they come with line styles and markers,
so that they are told apart in print too.
"""

import math

import matplotlib.pyplot as plt

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _axes(ax):
    if ax is None: _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def series_style(i):
    """Colour and line style of the `i`-th series: neighbours differ in both, and 28 pass before a pair comes again."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}


def plot_line(ys, xs=None, ax=None, *, xscale="linear", yscale="linear", xlabel="", ylabel=""):
    """One line: `ys` against `xs`, or against their index."""
    ax = _axes(ax)
    ax.plot(range(len(ys)) if xs is None else xs, ys, color=COLOURS[0])
    ax.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    return ax


def mark(ax, x, label):
    """A labelled vertical line at `x`."""
    ax.axvline(x, color=COLOURS[1], linestyle="--", linewidth=1, label=label)
    ax.legend(frameon=False)
    return ax


def plot_lines(series, ax=None, *, yscale="linear", xlabel="", ylabel="", title=""):
    """Several lines, the legend beside them; `series` maps each name to `(xs, ys)`. Non-finite values leave gaps."""
    ax = _axes(ax)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        ax.plot(xs, [y if math.isfinite(y) else math.nan for y in ys], label=name, linewidth=1.4, **series_style(i))
    ax.set(yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, loc="left", fontsize="medium")
    if series: ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_groups(groups, ax=None, *, reference=None, reference_label="published", xlabel="", title=""):
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


def plot_ratios(rows, ax=None, *, title=""):
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
    ax.set(xlabel="time, as a ratio: median and middle half")
    ax.set_title(title, loc="left", fontsize="medium")
    return ax


def figure(ncols=1, *, width=6.0, height=4.0):
    """A new figure with `ncols` panels side by side: `(fig, axes)`, `axes` a list."""
    fig, axes = plt.subplots(1, ncols, figsize=(width * ncols, height), squeeze=False, layout="constrained")
    return fig, list(axes[0])


def save(fig, path):
    """Write `fig` to `path` as its suffix says and close it."""
    fig.savefig(path, dpi=120)
    plt.close(fig)
