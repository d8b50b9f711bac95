"""The error of a user's input: what was got, what is needed, and the mend, in one message."""

import difflib
from collections.abc import Collection

REPORTED = "reported"       # an argument of a KeyboardInterrupt whose message was printed


class InputError(ValueError):
    """Something asked for makes no sense or isn't there; the command line prints its text and exits with 2."""


class WriteError(InputError):
    """A file of a run can't be written: the disk is full, or the folder gone or read-only."""


def brief(value: object, most: int = 60) -> str:
    """The `repr` of `value`, one line, without its middle where it is longer than `most` characters."""
    try: text = repr(value)
    except ValueError: return "a number of thousands of digits"     # Python writes out no more of them
    return text if len(text) <= most else f"{text[:most // 2]}...{text[-(most // 2 - 3):]}"


def pick(name: object, known: Collection[str], what: str) -> str:
    """The entry of `known` that `name` means, whatever its case; raises an error that names the nearest one."""
    by_lower = {k.lower(): k for k in known}
    if str(name).lower() in by_lower: return by_lower[str(name).lower()]
    near = difflib.get_close_matches(str(name)[:100].lower(), by_lower, 1, 0.4)
    hint = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    raise InputError(f"unknown {what} {brief(name)}: {hint}Choose from: {', '.join(known)}")
