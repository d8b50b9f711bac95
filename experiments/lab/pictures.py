"""The picture of the lab: test accuracy against batch size with the runs' intervals, a panel for each of many norms, or
norm by norm at one batch size.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figures import by_arm, finite, plural
from experiments.results import Row
from experiments.study.statistics import interval

if TYPE_CHECKING:
    from runner.insight.figures import Figure
    from runner.insight.plots import Axes

GAP = 0.035             # of the axis, between two labels at the least
FEW = 8                 # norms whose lines can be told apart in one panel
COLUMNS = 4             # of panels
TICKS = 0.1, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999       # accuracies, where errors are logarithmic
BEST = "#AAAAAA"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the final `rows` of a lab, a panel for each schedule, and save the picture."""
    from runner import plots
    schedules = list(dict.fromkeys(r["schedule"] for r in rows))
    several = len({r["batch_size"] for r in rows}) > 1
    norms = len({r["norm"] for r in rows})
    if sum(len({r["batch_size"] for r in arm}) > 1 for arm in by_arm(rows, "norm").values()) > FEW:
        return plots.save(norm_by_norm(rows), path)
    fig, axes = plots.figure(len(schedules), width=7.5, height=4.8 if several else 1.4 + 0.42 * norms)
    for ax, schedule in zip(axes, schedules, strict=True):
        of = [r for r in rows if r["schedule"] == schedule]
        if several: against_batch_size(of, ax)
        else:
            arms = by_arm(of, "norm")
            order = sorted(arms, key=lambda n: -statistics.mean(finite(r["test_accuracy"]) for r in arms[n]))
            plots.plot_groups({n: [finite(r["test_accuracy"]) for r in arms[n]] for n in order}, ax,
                              xlabel=f"test accuracy at batch size {of[0]['batch_size']}, dots: "
                              f"{plural(len(arms[order[0]]), 'seed')}, bar: mean")
        ax.set_title(f"{schedule}, tuned rates", loc="left", fontsize="medium")
    plots.save(fig, path)


def norm_by_norm(rows: Sequence[Row]) -> "Figure":
    """The mean test accuracy of each norm against the batch size, in a panel of its own.

    A line for each schedule, with a band that is its 95 % interval; grey, the best mean of all norms. Errors, 1 less
    the accuracy, are logarithmic. The norms are in the order of their mean over the batch sizes, each at its better
    schedule.
    """
    from runner import plots
    schedules = list(dict.fromkeys(r["schedule"] for r in rows))
    means: dict[str, dict[str, dict[int, list[float]]]] = {}        # accuracies by norm, schedule and batch size
    for r in rows:
        cell = means.setdefault(r["norm"], {}).setdefault(r["schedule"], {}).setdefault(r["batch_size"], [])
        cell.append(finite(r["test_accuracy"]))
    sizes = sorted({r["batch_size"] for r in rows})

    def at(norm: str, schedule: str, b: int) -> float:
        accs = means[norm].get(schedule, {}).get(b)
        return statistics.mean(accs) if accs else 0.0

    def better(norm: str, b: int) -> float: return max(at(norm, s, b) for s in schedules)
    order = sorted(means, key=lambda n: -sum(better(n, b) for b in sizes))
    best = [1 - max(better(n, b) for n in order) for b in sizes]
    ncols = min(COLUMNS, len(order))
    fig, axes = plots.figure(ncols, -(-len(order) // ncols), width=2.7, height=2.1)
    floor = 0.7 * max(1e-4, min(best))
    for ax, norm in zip(axes, order, strict=False):
        ax.plot(sizes, [max(e, floor) for e in best], color=BEST, linewidth=1.2, zorder=1)
        for i, schedule in enumerate(schedules):
            its, style = sorted(means[norm].get(schedule, {}).items()), plots.series_style(i, len(schedules))
            if not its: continue
            at_sizes, accs = zip(*its, strict=True)
            ax.plot(at_sizes, [max(1 - statistics.mean(a), floor) for a in accs], marker="o", markersize=3,
                    linewidth=1.4, label=schedule, **style)
            low, high = zip(*([min(max(1 - bound, floor), 1) for bound in interval(a)[:2]] for a in accs), strict=True)
            ax.fill_between(at_sizes, low, high, color=style["color"], alpha=0.15, linewidth=0)
        ax.set_title(norm, loc="left", fontsize="medium")
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(b) for b in sizes])
        ax.set_yscale("log")
        ax.set_ylim(1, floor)           # downwards: the best is at the top
        ticks = [t for t in TICKS if floor <= 1 - t]
        ax.set_yticks([1 - t for t in ticks], [f"{t:g}" for t in ticks])
        ax.set_yticks([], minor=True)
        ax.tick_params(labelsize="small")
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    for ax in axes[len(order):]: ax.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    best_line, = axes[0].get_lines()[:1]
    fig.legend([*handles, best_line], [*labels, "best of all norms, at its better schedule"], loc="outside upper left",
               ncols=len(labels) + 1, frameon=False, fontsize="medium")
    fig.supxlabel("batch size", fontsize="medium")
    fig.supylabel("test accuracy, mean and 95 % interval", fontsize="medium")
    return fig


def against_batch_size(rows: Sequence[Row], ax: "Axes") -> None:
    """The mean test accuracy of each norm against the batch size, with a band that is its 95 % interval.

    The axis is that of the means above chance; what lies below is drawn at its lower end as an open marker. A norm that
    was trained at one batch size only is no line, and is left to the table, unless all were.
    """
    from runner import plots
    arms = by_arm(rows, "norm")
    several = {norm: arm for norm, arm in arms.items() if len({r["batch_size"] for r in arm}) > 1}
    arms = several or arms
    lines = {}
    for norm, arm in arms.items():
        sizes = sorted({r["batch_size"] for r in arm})
        accs = [[finite(r["test_accuracy"]) for r in arm if r["batch_size"] == b] for b in sizes]
        lines[norm] = sizes, [statistics.mean(a) for a in accs], [interval(a)[:2] for a in accs]
    means = [m for _, ms, _ in lines.values() for m in ms if m > 0.5 * max(max(ms) for _, ms, _ in lines.values())]
    low, high = min(means), max(means)
    bottom, top = low - 0.1 * (high - low) - 0.002, high + 0.08 * (high - low) + 0.002
    ends = []
    for i, (norm, (sizes, ms, bands)) in enumerate(lines.items()):
        style = plots.series_style(i, len(lines))
        ax.plot(sizes, [max(m, bottom) for m in ms], marker="o", markersize=3.5, label=norm, linewidth=1.4, **style)
        ax.fill_between(sizes, [max(lo, bottom) for lo, _ in bands], [max(hi, bottom) for _, hi in bands],
                        color=style["color"], alpha=0.15, linewidth=0)
        gone = [b for b, m in zip(sizes, ms, strict=True) if m < bottom]
        if gone:
            ax.plot(gone, [bottom] * len(gone), "o", markerfacecolor="white", color=style["color"], markersize=6,
                    clip_on=False)
        ends.append([max(ms[-1], bottom), norm, style["color"]])
    ax.set_xscale("log", base=2)
    sizes = sorted({r["batch_size"] for arm in arms.values() for r in arm})
    ax.set_xticks(sizes, [str(b) for b in sizes])
    ax.set_ylim(bottom, top)
    ax.set(xlabel="batch size", ylabel="test accuracy, mean and 95 % interval")
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    ends.sort()
    for i in range(1, len(ends)):       # apart, so that they can be read
        ends[i][0] = max(ends[i][0], ends[i - 1][0] + GAP * (top - bottom))
    beyond = max(0.0, ends[-1][0] - top)
    for y, norm, colour in ends:
        ax.text(1.02, (y - beyond - bottom) / (top - bottom), norm, transform=ax.transAxes, va="center",
                fontsize="small", color=colour)
