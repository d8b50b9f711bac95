"""Print the results table of one or several runs as Markdown, or put it into a file between two marks."""

from pathlib import Path

from experiments import bench, small_batch
from experiments.errors import InputError
from experiments.results import markdown_table, read_summary

END = "<!-- end of results -->"


def begin(name):
    """The mark before the results called `name`."""
    return f"<!-- results: {name} -->"


def markdown(summaries):
    """The table of all rows of `summaries`, runs of small-batch on the same data, and the verdict; or a bench's."""
    if any("machine" in s for s in summaries):
        if len(summaries) > 1: raise InputError("a bench's ratios hold within one run; name that run alone")
        return bench.markdown(summaries[0])
    data = {(s["data"], s["train_images"]) for s in summaries}
    if len(data) > 1: raise InputError(f"these runs are of different data, {sorted(data)}; name runs of one")
    rows = [row for s in summaries for row in s["rows"]]
    if not rows: raise InputError("these runs have no rows, for no arm had finished; name others")
    _, verdict = small_batch.judge(rows, *data.pop())
    return f"{markdown_table(*small_batch.table({**summaries[0], 'rows': rows}))}\n\n{verdict}"


def insert(text, table, name):
    """`text` with `table` between the mark of the results called `name` and the next end mark.

    Raises:
        InputError: `text` has no such marks.
    """
    before, found, rest = text.partition(begin(name))
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise InputError(f"there is no place for the table; the file must have the lines {begin(name)} and {END}")
    return f"{before}{found}\n{table}\n{ended}{after}"


def add_arguments(parser):
    """Declare the options of `python -m experiments table`."""
    parser.add_argument("run", nargs="+", help="run folders, or summary.json files; their rows come into one table")
    parser.add_argument("--into", metavar="FILE", help=f"write it into FILE, between <!-- results: NAME --> and {END}")
    parser.add_argument("--name", default="small-batch", metavar="NAME", help="the mark's NAME (default: small-batch)")


def main(args):
    """Print or insert the table; the exit status."""
    table = markdown([read_summary(run) for run in args.run])
    if args.into is None:
        print(table)
        return 0
    file = Path(args.into)
    try: file.write_text(insert(file.read_text(), table, args.name))
    except OSError as e: raise InputError(f"can't write {args.into!r}: {e.strerror}; name a text file") from e
    return 0
