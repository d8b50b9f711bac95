"""Print the results table of a run as Markdown, or put it into the README between its two marks."""

import re
from pathlib import Path

from experiments import small_batch
from experiments.errors import InputError
from experiments.results import markdown_table, read_summary

MARKS = "<!-- results: small-batch -->", "<!-- end of results -->"


def markdown(summary):
    """The table of a small-batch `summary.json` with its verdict under it."""
    return f"{markdown_table(*small_batch.table(summary))}\n\n{summary['verdict']}"


def insert(text, table):
    """`text` with `table` between the two marks.

    Raises:
        InputError: `text` has no such marks.
    """
    begin, end = MARKS
    if not re.search(f"{begin}.*{end}", text, re.DOTALL):
        raise InputError(f"there is no place for the table; the file must have the lines {begin} and {end}")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}"


def add_arguments(parser):
    """Declare the options of `python -m experiments table`."""
    parser.add_argument("run", help="run folder, or a summary.json")
    parser.add_argument("--into", metavar="FILE", help=f"write it into FILE, between {MARKS[0]} and {MARKS[1]}")


def main(args):
    """Print or insert the table; the exit status."""
    table = markdown(read_summary(args.run))
    if args.into is None:
        print(table)
        return 0
    file = Path(args.into)
    try: file.write_text(insert(file.read_text(), table))
    except OSError as e: raise InputError(f"can't write {args.into!r}: {e.strerror}; name a text file") from e
    return 0
