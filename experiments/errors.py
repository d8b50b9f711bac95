"""The error of a user's input: what was got, what is needed, and the mend, in one message."""

import difflib
from collections.abc import Collection


class InputError(ValueError):
    """Something asked for makes no sense or isn't there; the command line prints its text and exits with 2."""


def pick(name: object, known: Collection[str], what: str) -> str:
    """The entry of `known` that `name` means, whatever its case; raises an error that names the nearest one."""
    by_lower = {k.lower(): k for k in known}
    if str(name).lower() in by_lower: return by_lower[str(name).lower()]
    near = difflib.get_close_matches(str(name).lower(), by_lower, 1, 0.4)
    hint = f"did you mean {by_lower[near[0]]!r}? " if near else ""
    raise InputError(f"unknown {what} {name!r}: {hint}Choose from: {', '.join(known)}")
