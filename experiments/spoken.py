"""What a run says at the command line: what became of an arm, advice in the words of options, and lines that fit."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.results import Row, text_table
from runner.console import columns, fitted

NARROW = 80     # columns: a table that is wider than a terminal of fewer is printed arm by arm


def line(key: str, row: Mapping[str, Any], plain: Row, said: Callable[[Row], str]) -> str:
    """What is printed when an arm has ended: `row` is the study's, `plain` the arm's own, `key` is what names it."""
    name = f"{row[key]}, seed {row['seed']}:"
    if row["status"] != "ok": return _indented([name, how(row)])
    figures = [f"{k.replace('_', ' ')} {row[k]:.4g}," for k in ("train_loss", "valid_loss", "valid_accuracy",
                                                               "test_accuracy") if isinstance(row.get(k), float)]
    text = _indented([name, *figures, f"{plain['status']},", f"{plain['seconds']:.1f} s"])
    notes = [f"{row[key]} failed: {plain['error']}"] if "error" in plain else []
    return "\n".join([text, *(_indented([note]) for note in [*notes, *said(plain).splitlines()])])


def _indented(cells: Sequence[str]) -> str:
    """`cells` on a line that is indented, or on as many as they need in a narrow place."""
    width, text = columns(), "  " + " ".join(cells)
    return text if width is None or len(text) <= width else fits(text)


def how(row: Mapping[str, Any]) -> str:
    """How an arm was lost."""
    return f"{'was killed' if row['status'] == 'killed' else 'raised'}: {row['error']}"


def fits(text: str) -> str:
    """`text` with its lines broken between words where they are wider than the output is; a path stays whole."""
    width = columns()
    if width is None: return text
    found: list[str] = []
    for each in text.split("\n"):
        indent = " " * (len(each) - len(each.lstrip()))
        found += textwrap.wrap(each, width, subsequent_indent=indent + "  ", break_long_words=False,
                               break_on_hyphens=False, drop_whitespace=True) or [""]
    return "\n".join(found)


def table_text(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The table as `text_table` has it; in a narrow place, where that would break, a block for each of its lines."""
    width, whole = columns(), text_table(list(header), [list(each) for each in lines])
    if width is None or width >= NARROW or max(map(len, whole.splitlines())) <= width: return whole
    return "\n".join("\n".join([fitted([each[0]], width), *("  " + fitted([f"{h} {cell}"], width - 2)
                                for h, cell in zip(header[1:], each[1:], strict=True))]) for each in lines)


def in_options(text: str, go_on: str) -> str:
    """`text`, which names arguments of `Study` and its `run`, with the command line's options in their place.

    `go_on` is a sentence that says how the command goes on.
    """
    text = re.sub(r"\bbackend='(\w+)'", r"--backend \1", text)
    text = re.sub(r"\b(out|scheduler|jobs)=(?=[\s,.;:)]|$)", r"--\1", text)
    return re.sub(r"\brun\(\) goes on( with what is missing)?", go_on[0].lower() + go_on[1:].rstrip("."), text)
