"""What the rows of the lab say: the best norm at each batch size, the long table of all cells and the short one."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from experiments.figures import by_arm, finite, plural, statuses
from experiments.results import Row, Summary, Table
from experiments.study.statistics import interval
from experiments.verdict import Claim, Verdict


def judge(rows: list[Row], data: str, train_images: int) -> Verdict:
    """Which norm is best at each batch size and schedule, and by how much it is ahead of the next, pair by pair."""
    claims = []
    for (b, schedule), cell in cells(rows).items():
        (first, best), *others = ranked(cell)
        of, d = plural(len(best), "seed"), differences(best, others[0][1]) if others else []
        if len(d) > 1:
            low, high, what = interval(d)
            of += (f"; {statistics.mean(d):+.4f} to {others[0][0]}, paired {what} interval {low:+.4f} to {high:+.4f}"
                   + f" of {len(d)}" * (len(d) < len(best)))
        claims.append(Claim(f"batch {b}, {schedule}: {first}", statistics.mean(best.values()), of=of, form=".4f"))
    return Verdict(untested=f"Best in test accuracy, {data}", claims=claims)


def ranked(cell: Sequence[Row]) -> list[tuple[str, dict[int, float]]]:
    """The norms of `cell`, the one with the best mean first, and of each the test accuracies by seed."""
    arms = {name: {r["seed"]: finite(r["test_accuracy"]) for r in arm} for name, arm in by_arm(cell, "norm").items()}
    return sorted(arms.items(), key=lambda arm: -statistics.mean(arm[1].values()))


def differences(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """`one` less `other`, at each seed that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def cells(rows: Iterable[Row]) -> dict[tuple[int, str], list[Row]]:
    """`rows` by batch size and schedule."""
    found: dict[tuple[int, str], list[Row]] = {}
    for row in rows: found.setdefault((row["batch_size"], row["schedule"]), []).append(row)
    return dict(sorted(found.items()))


def table(summary: Summary) -> Table:
    """Header and lines of the table of a `summary.json`: a line for each norm, by batch size and schedule.

    "To the best" is the mean difference to the best norm of the same batch size and schedule, paired by seed, with its
    95 % interval. A run that diverged or was refused counts as 0 correct. A rate that was the lowest or the highest of
    those tried is marked so: beyond it there may be a better one.
    """
    lines = []
    tried: dict[tuple[str, int, str], set[float]] = {}
    for row in summary.get("before", []):
        tried.setdefault((row["norm"], row["batch_size"], row["schedule"]), set()).add(row["rate"])
    for (b, schedule), cell in cells(summary["rows"]).items():
        arms, order = by_arm(cell, "norm"), ranked(cell)
        for norm, found in order:
            arm, accs, behind = arms[norm], list(found.values()), "-"
            if norm != order[0][0] and (d := differences(found, order[0][1])):
                behind = f"{statistics.mean(d):+.4f}"
                if len(d) > 1: behind += " ({:+.4f} to {:+.4f})".format(*interval(d)[:2])
            several = len(accs) > 1
            rate, of = arm[0]["rate"], tried.get((norm, b, schedule), set())
            edge = "" if len(of) < 2 else " (highest)" * (rate == max(of)) + " (lowest)" * (rate == min(of))
            lines.append([norm, str(b), schedule, f"{rate:g}{edge}", f"{statistics.mean(accs):.4f}",
                          "{:.3f} to {:.3f}".format(*interval(accs)[:2]) if several else "-", behind,
                          f"{min(accs):.3f} to {max(accs):.3f}" if several else "-",
                          f"{sum(map(collapsed, arm))} of {len(arm)}", str(len(arm)),
                          f"{statistics.mean(r['step_ms'] for r in arm):.3g}", statuses(arm)])
    return ["norm", "batch", "schedule", "rate", "test accuracy", "95 % interval", "to the best", "range", "collapsed",
            "seeds", "ms per step", "status"], lines


def collapsed(row: Row) -> bool:
    """Whether a run is at chance, up to 1.5 times one in as many as there are classes, or has no figure."""
    return finite(row["test_accuracy"]) <= 1.5 * float(row.get("chance", 0.1))


def overview(rows: Sequence[Row]) -> Table:
    """Header and lines of the short table of the final `rows`: a line for each schedule and norm, a column for each
    batch size.

    A cell is the mean test accuracy, the best of its schedule and batch size in bold, with the number of collapsed runs
    in brackets where there are any; "-" where nothing was measured. Norms are in the order of their sum over the
    columns.
    """
    found = cells(rows)
    sizes = sorted({b for b, _ in found})
    lines = []
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        columns = [by_arm(found.get((b, schedule), ()), "norm") for b in sizes]
        means = [{norm: statistics.mean(finite(r["test_accuracy"]) for r in arm) for norm, arm in column.items()}
                 for column in columns]
        norms = dict.fromkeys(norm for column in columns for norm in column)
        for norm in sorted(norms, key=lambda n: -sum(of.get(n, 0.0) for of in means)):
            texts = []
            for column, of in zip(columns, means, strict=True):
                if norm not in of:
                    texts.append("-")
                    continue
                text, gone = f"{of[norm]:.3f}", sum(map(collapsed, column[norm]))
                texts.append((f"**{text}**" if of[norm] == max(of.values()) else text) + f" ({gone})" * (gone > 0))
            lines.append([norm, schedule, *texts])
    return ["norm", "schedule", *(f"at {b}" for b in sizes)], lines
