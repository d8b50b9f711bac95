"""The picture of the lab: test accuracy against batch size with the runs' intervals, or norm by norm at one."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figures import by_arm, finite, plural
from experiments.results import Row
from experiments.study.statistics import interval

if TYPE_CHECKING:
    from runner.insight.plots import Axes

GAP = 0.035             # of the axis, between two labels at the least


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the final `rows` of a lab, a panel for each schedule, and save the picture."""
    from runner import plots
    schedules = list(dict.fromkeys(r["schedule"] for r in rows))
    several = len({r["batch_size"] for r in rows}) > 1
    norms = len({r["norm"] for r in rows})
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
