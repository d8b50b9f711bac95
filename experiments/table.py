"""Print the results table of one or several runs as Markdown, or put it into a file between two marks."""

import argparse
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments import EXPERIMENTS, TOOLS
from experiments.errors import InputError, pick
from experiments.lab.tables import overview as short
from experiments.results import markdown_table, read_summary
from experiments.run_folder import DECISIVE, FREE, write_whole

Facts = dict[str, Any]      # what a run says of how it was made

END = "<!-- end of results -->"


def begin(name: str) -> str:
    """The mark before the results called `name`."""
    return f"<!-- results: {name} -->"


def markdown(summaries: Sequence[dict[str, Any]], facts: Sequence[Facts] = (), overview: bool = False) -> str:
    """The table of all rows of `summaries`, runs of one experiment on the same data, and the verdict; or a bench's.

    `facts` are what each run's `config.json` says of it, empty where there is none: see `facts_of`. `overview` asks for
    the lab's short table, without the verdict: `experiments.lab.tables.overview`.

    Raises:
        InputError: runs that can't be compared, or a summary that is none; an overview of another experiment.
    """
    name = experiment(summaries)
    if overview and name != "lab": raise InputError(f"{name} has one table only; --overview is for lab")
    module = importlib.import_module((EXPERIMENTS | TOOLS)[name][0])
    try:
        if name != "bench": return _of_runs(module, summaries, facts, overview)
        if len(summaries) > 1: raise InputError("a bench's ratios hold within one run; name that run alone")
        text: str = module.markdown(summaries[0])
        return text
    except InputError: raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, ArithmeticError) as e:
        raise InputError(f"the rows are not those of {name} in this version ({type(e).__name__}: {e}); name a run "
                         "folder, or a summary.json, that this version has made") from e


def _of_runs(module: Any, summaries: Sequence[dict[str, Any]], facts: Sequence[Facts], overview: bool) -> str:
    """`markdown` of an experiment's runs."""
    data = {(s["data"], s["train_images"]) for s in summaries}
    if len(data) > 1:
        raise InputError(f"these runs are of different data, {sorted(data, key=str)}; name runs of one")
    valid = {s["valid_images"] for s in summaries if "valid_images" in s}
    if len(valid) > 1:
        raise InputError(f"these runs have different validation images, {sorted(valid)} of them; name runs of one kind")
    check_facts(facts)
    rows = [row for s in summaries for row in s["rows"]]
    if not rows: raise InputError("these runs have no rows, for no arm had finished; name others")
    check_alike(rows, across=summaries[0]["experiment"] in ONE_SETTING)
    before = [row for s in summaries for row in s.get("before", [])]
    found = short(rows) if overview else module.table({**summaries[0], "rows": rows, "before": before})
    table, missing = markdown_table(*found), [s for s in summaries if s.get("complete") is False]
    if missing: return f"{table}\n\n{' '.join(dict.fromkeys(s['verdict'] for s in missing))}"
    return table if overview else f"{table}\n\n{module.judge(rows, *data.pop()).sentence}"


# What a row says of how its arm was trained, where it says so.
SETTINGS = ("batch_size", "lr", "epochs", "steps", "compile", "optimizer", "memory", "average_backward", "recalibrated",
            "groups", "smoothing", "parameters")
# Experiments whose arms differ in the norm alone: all lines of a table are of one setting.
ONE_SETTING = ("small-batch", "lenet", "vmap")
# Settings that say which arms there are, or how many are trained at once: no figure of an arm depends on them.
WHICH = (*FREE, "seeds", "arms", "norms", "once", "together", "replicas", "batch_sizes", "schedules")


def facts_of(run: str | Path) -> Facts:
    """What `config.json` beside a summary says of how the run was made, by name; empty where there is none.

    Settings (but those that choose arms), the data with their sizes, device, threads, convolutions, and versions.
    """
    path = Path(run)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not path.is_dir() and path.name != "summary.json": return {}
    try: said = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError: return {}
    except (OSError, ValueError) as e:
        raise InputError(f"can't read {str(file)!r} ({type(e).__name__}: {e}), which says how the run was made; name "
                         "another run") from e
    try:
        return {**{k: v for k, v in said["config"].items() if k not in WHICH},
                **{k: said[k] for k in ("data", "threads", "convolutions") if k in said},
                **{f"{k} version" if k != "machine" else k: said["versions"].get(k) for k in DECISIVE}}
    except (KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{str(file)!r} is no record of a run's settings ({type(e).__name__}: {e}); name another "
                         "run") from e


def check_facts(facts: Sequence[Facts]) -> None:
    """Raise unless the runs were made alike, as far as they say: of a run without `config.json` nothing is known.

    Raises:
        InputError: two differ, or of one it is known and of another not.
    """
    if len(facts) < 2: return
    if any(facts) and not all(facts):
        raise InputError("these runs can't be compared: one has no config.json, which says on what device, by which "
                         "versions and settings it was made; name run folders alone, or records alone")
    for other in facts[1:]:
        different = [f"{k.replace('_', ' ')} {facts[0].get(k)!r} and {other.get(k)!r}"
                     for k in dict.fromkeys((*facts[0], *other)) if facts[0].get(k) != other.get(k)]
        if different: raise InputError(f"these runs were made in different ways, so that one table says nothing: "
                                       f"{'; '.join(different)}; make a table of each")


def check_alike(rows: Sequence[dict[str, Any]], across: bool = False) -> None:
    """Raise unless every line of a table is of one setting, each seed once: of one run, of several, of one given twice.

    `across` is whether all lines together must be.

    Raises:
        InputError: two rows of an arm differ in their settings, or have the same seed.
    """
    key = next(k for k in ("arm", "norm", "exercise") if k in rows[0])
    settings: dict[str, tuple[str, int, dict[str, Any]]] = {}
    seen: set[tuple[str, int]] = set()
    for row in rows:
        name, seed, of = row[key], row["seed"], {k: row[k] for k in SETTINGS if k in row}
        own = {k: v for k, v in of.items() if k != "parameters"}
        for at, mine in (("", own if across else {}), (f"arm {name}", of)):
            before, first, wanted = settings.setdefault(at, (name, seed, mine))
            different = [f"{k.replace('_', ' ')} {wanted.get(k)!r} and {mine.get(k)!r}"
                         for k in dict.fromkeys((*wanted, *mine)) if wanted.get(k) != mine.get(k)]
            if not different: continue
            what = name if before == name else f"{before} and {name}"
            raise InputError(f"these runs of {what} are of different settings, so their mean says nothing: "
                             f"{', '.join(different)} (seeds {first} and {seed}); make a table of each")
        if (name, seed) in seen:
            raise InputError(f"these runs have {name} with seed {seed} twice, and a seed counts once; name each run "
                             "once, and only one of those with that seed")
        seen.add((name, seed))


def experiment(summaries: Sequence[dict[str, Any]]) -> str:
    """The name of the experiment that all `summaries` are of; a bench's record names none."""
    names = sorted({str(s.get("experiment", "bench")) for s in summaries})
    if len(names) > 1: raise InputError(f"these runs are of different experiments, {names}; name runs of one")
    return pick(names[0], [*EXPERIMENTS, "bench"], "experiment")


def picture(summaries: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the rows of `summaries` as one picture, into `file`.

    Raises:
        InputError: an experiment whose picture is of one run; a file that can't be written.
    """
    name = experiment(summaries)
    if name != "lab": raise InputError(f"a picture of {name} is drawn of one run, by that run; --picture is for lab")
    draw = importlib.import_module(EXPERIMENTS[name][0]).draw
    try:
        with TemporaryDirectory(dir=file.parent) as new:        # a full disk leaves no half picture
            drawn = Path(new) / file.name
            draw([row for s in summaries for row in s["rows"]], drawn)
            os.replace(drawn, file)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"can't draw into {str(file)!r}: {getattr(e, 'strerror', None) or e}; name a file such as "
                         "lab.png, where there is room") from e


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
    parser.add_argument("--overview", action="store_true", help="of lab: the short table, a column for each batch size")
    parser.add_argument("--picture", metavar="FILE", help="of lab: draw the rows of all runs as one picture, into FILE")


def main(args: argparse.Namespace) -> int:
    """Print or insert the table; the exit status."""
    summaries = [read_summary(run) for run in args.run]
    table = markdown(summaries, [facts_of(run) for run in args.run], args.overview)
    if args.picture is not None: picture(summaries, Path(args.picture))
    if args.into is None:
        print(table)
        return 0
    file = Path(args.into)
    try:
        text = insert(file.read_text(encoding="utf-8"), table, args.name or experiment(summaries))
        write_whole(file.resolve(), text)       # a full disk leaves the file as it was
    except OSError as e:
        raise InputError(f"can't write {args.into!r}: {e.strerror or e}; name a text file, where there is room") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{args.into!r} is no text in UTF-8 ({e}); name a text file") from e
    return 0
