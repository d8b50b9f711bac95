"""The standard output: whether somebody looks at it, how wide it is, and lines that fit."""

import os
import sys
from collections.abc import Iterable


def is_terminal() -> bool:
    """Whether standard output is a terminal; one that is None, closed or can't tell is none."""
    try: return bool(sys.stdout.isatty())
    except (AttributeError, ValueError): return False


def columns() -> int | None:
    """The width of a line: the environment's `COLUMNS`, or else the terminal's; None where there is neither.

    Lines that go elsewhere than to a terminal are wrapped only for less than 80 columns: a log has a line an epoch.
    """
    told, terminal = os.environ.get("COLUMNS", ""), is_terminal()
    if told.isdecimal() and len(told) < 6 and int(told): return int(told) if terminal or int(told) < 80 else None
    if not terminal: return None
    try: return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (AttributeError, ValueError, OSError): return None


def encodes(text: str) -> bool:
    """Whether standard output has the letters of `text`."""
    try: text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError): return False
    return True


def say(text: str) -> None:
    """Print a line at once, to any object that has `write`; to None nothing."""
    out = sys.stdout
    if out is None: return
    out.write(text + "\n")
    if hasattr(out, "flush"): out.flush()


def fitted(cells: Iterable[str], width: int | None) -> str:
    """`cells` two spaces apart, on as many lines of at most `width` as they need, those after the first indented.

    A cell too long for a line loses its middle: it begins with the phase and ends with the number.
    """
    lines = [""]
    for cell in cells:
        room = None if width is None else max(width - 2 * (len(lines) > 1), 8)
        joined = f"{lines[-1]}  {cell}" if lines[-1] else cell
        if room is None or len(joined) <= room:
            lines[-1] = joined
            continue
        if lines[-1]: lines.append("")
        most = max((width or 0) - 2 * (len(lines) > 1), 8)
        lines[-1] = cell if len(cell) <= most else shortened(cell, most)
    return "\n  ".join(lines)


def shortened(text: str, width: int) -> str:
    """`text` with "..." in the place of its middle, `width` long, of which the end has the larger half."""
    start = (width - 3) // 2
    return f"{text[:start]}...{text[len(text) - (width - 3 - start):]}"
