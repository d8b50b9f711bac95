"""Print the results table of one or several runs as Markdown, or put it into a file between two marks."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import EXPERIMENTS, TOOLS
from experiments.errors import InputError, pick
from experiments.results import markdown_table, read_summary

END = "<!-- end of results -->"


def begin(name: str) -> str:
    """The mark before the results called `name`."""
    return f"<!-- results: {name} -->"


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """The table of all rows of `summaries`, runs of one experiment on the same data, and the verdict; or a bench's."""
    name = experiment(summaries)
    module = importlib.import_module((EXPERIMENTS | TOOLS)[name][0])
    if name == "bench":
        if len(summaries) > 1: raise InputError("a bench's ratios hold within one run; name that run alone")
        text: str = module.markdown(summaries[0])
        return text
    data = {(s["data"], s["train_images"]) for s in summaries}
    if len(data) > 1: raise InputError(f"these runs are of different data, {sorted(data)}; name runs of one")
    rows = [row for s in summaries for row in s["rows"]]
    if not rows: raise InputError("these runs have no rows, for no arm had finished; name others")
    check_alike(rows)
    verdict = module.judge(rows, *data.pop())
    return f"{markdown_table(*module.table({**summaries[0], 'rows': rows}))}\n\n{verdict.sentence}"


# What a row says of how its arm was trained, where it says so.
SETTINGS = ("batch_size", "lr", "epochs", "steps", "compile", "optimizer", "memory", "average_backward", "recalibrated",
            "groups", "smoothing", "parameters")


def check_alike(rows: Sequence[dict[str, Any]]) -> None:
    """Raise unless every line of a table is of one setting, each seed once: of one run, of several, of one given twice.

    Raises:
        InputError: two rows of an arm differ in their settings, or have the same seed.
    """
    key = next(k for k in ("arm", "norm", "exercise") if k in rows[0])
    settings: dict[str, tuple[int, dict[str, Any]]] = {}
    seen: set[tuple[str, int]] = set()
    for row in rows:
        name, seed, of = row[key], row["seed"], {k: row[k] for k in SETTINGS if k in row}
        first, wanted = settings.setdefault(name, (seed, of))
        different = [f"{k.replace('_', ' ')} {wanted.get(k)!r} and {of.get(k)!r}" for k in dict.fromkeys((*wanted, *of))
                     if wanted.get(k) != of.get(k)]
        if different:
            raise InputError(f"these runs of {name} are of different settings, so their mean says nothing: "
                             f"{', '.join(different)} (seeds {first} and {seed}); make a table of each")
        if (name, seed) in seen:
            raise InputError(f"these runs have {name} with seed {seed} twice, and a seed counts once; name each run "
                             "once, and only one of those with that seed")
        seen.add((name, seed))


def experiment(summaries: Sequence[dict[str, Any]]) -> str:
    """The name of the experiment that all `summaries` are of; a bench's record names none."""
    names = sorted({s.get("experiment", "bench") for s in summaries})
    if len(names) > 1: raise InputError(f"these runs are of different experiments, {names}; name runs of one")
    return pick(names[0], [*EXPERIMENTS, "bench"], "experiment")


def picture(summaries: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the rows of `summaries` as one picture, into `file`.

    Raises:
        InputError: an experiment whose picture is of one run; a file that can't be written.
    """
    name = experiment(summaries)
    draw = getattr(importlib.import_module((EXPERIMENTS | TOOLS)[name][0]), "draw", None)
    if draw is None: raise InputError(f"a picture of {name} is drawn of one run, by that run; --picture is for lab")
    try: draw([row for s in summaries for row in s["rows"]], file)
    except (OSError, ValueError) as e: raise InputError(f"can't draw into {str(file)!r}: {e}") from e


def insert(text: str, table: str, name: str) -> str:
    """`text` with `table` between the mark of the results called `name` and the next end mark.

    Raises:
        InputError: `text` has no such marks.
    """
    before, found, rest = text.partition(begin(name))
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise InputError(f"there is no place for the table; the file must have the lines {begin(name)} and {END}")
    return f"{before}{found}\n{table}\n{ended}{after}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments table`."""
    parser.add_argument("run", nargs="+", help="run folders, or summary.json files; their rows come into one table")
    parser.add_argument("--into", metavar="FILE", help=f"write it into FILE, between <!-- results: NAME --> and {END}")
    parser.add_argument("--name", metavar="NAME", help="the mark's NAME (default: the experiment's)")
    parser.add_argument("--picture", metavar="FILE", help="of lab: draw the rows of all runs as one picture, into FILE")


def main(args: argparse.Namespace) -> int:
    """Print or insert the table; the exit status."""
    summaries = [read_summary(run) for run in args.run]
    table = markdown(summaries)
    if args.picture is not None: picture(summaries, Path(args.picture))
    if args.into is None:
        print(table)
        return 0
    file = Path(args.into)
    try: file.write_text(insert(file.read_text(), table, args.name or experiment(summaries)))
    except OSError as e: raise InputError(f"can't write {args.into!r}: {e.strerror}; name a text file") from e
    return 0
