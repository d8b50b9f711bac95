"""The picture of a study: every run a dot, the mean of each cell with its interval, n beside each name."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.study.cells import Row
from experiments.study.points import cell

if TYPE_CHECKING:
    from runner.insight.plots import Axes

Line = Mapping[str, Any]        # of `statistics.summary`


def draw(lines: Sequence[Line], rows: Sequence[Row], figures: Sequence[float], x: str, y: str, hue: str | None,
         ax: "Axes | None") -> "Axes":
    """Draw the means of `lines` and the runs `rows`, whose figures are `figures`; see `Study.plot`."""
    from runner.insight import plots
    if ax is None: ax = plots.figure()[1][0]
    ax.spines[["top", "right"]].set_visible(False)
    places = {text: i for i, text in enumerate(dict.fromkeys(cell(line[x]) for line in lines))}
    names = list(dict.fromkeys(cell(line[hue]) if hue else "" for line in lines))
    step = 0.3 / len(names)
    for i, name in enumerate(names):
        of = [line for line in lines if not hue or cell(line[hue]) == name]
        shift = (i - (len(names) - 1) / 2) * step
        style = plots.series_style(i, len(names))
        runs = [(places[cell(row[x])] + shift, v) for row, v in zip(rows, figures, strict=True)
                if not hue or cell(row[hue]) == name]
        ax.plot(*zip(*runs, strict=True), linestyle="none", marker="o", markersize=3, alpha=0.35, color=style["color"])
        ordered = all(isinstance(line[x], (int, float)) and not isinstance(line[x], bool) for line in lines)
        style["linestyle"] = style["linestyle"] if ordered and len(of) > 1 else "none"
        at, means = [places[cell(line[x])] + shift for line in of], [line["mean"] for line in of]
        # Of one run there is no interval, and none is drawn.
        below = [max(line["mean"] - line["low"], 0.0) if line["n"] > 1 else 0.0 for line in of]
        above = [max(line["high"] - line["mean"], 0.0) if line["n"] > 1 else 0.0 for line in of]
        ax.errorbar(at, means, (below, above), marker="D", markersize=5, capsize=3, label=_label(of, hue), **style)
    ax.set_xticks(range(len(places)), [text.strip('"') for text in places])
    kinds = dict.fromkeys(line["interval"] for line in lines if line["n"] > 1)
    ax.set(xlabel=x, ylabel=y, title=f"mean, {' or '.join(kinds)} interval" if kinds else "one run each")
    ax.legend(frameon=False, title=hue)
    return ax


def _label(lines: Sequence[Line], hue: str | None) -> str:
    """The name of a series, its n, and how many of the runs failed or collapsed."""
    ns = sorted({line["n"] for line in lines})
    n = f"n = {ns[0]}" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]}"
    if len(lines) > 1: n += " each"
    counts = {what: sum(line.get(what, 0) for line in lines) for what in ("failed", "collapsed")}
    text = ", ".join([n, *(f"{count} {what}" for what, count in counts.items() if count)])
    return f"{lines[0][hue]} ({text})" if hue else text
