"""Which modules or parameters a caller means."""

import fnmatch
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from runner.events import listify

Thing = TypeVar("Thing")


def choose(things: Mapping[str, Thing], which: Any, kind: str, name: str) -> dict[str, Thing]:
    """Those of `things` (path to thing) that `which` means, in their order; `Probe` says what it may be.

    Raises:
        ValueError: a part of `which` that finds nothing, by the callback called `name`.
    """
    wanted = [which] if isinstance(which, (str, type)) else listify(which)
    found = [[path for path, thing in things.items() if _means(w, path, thing)] for w in wanted]
    for w, paths in zip(wanted, found, strict=True):
        if paths: continue
        known = [f"{path!r} ({type(thing).__name__})" for path, thing in things.items() if path]
        more = f" and {len(known) - 20} more" * (len(known) > 20)
        raise ValueError(f"{name}: {w!r} finds no {kind}; it must be a type, a pattern of paths, a function "
                         f"f(path, {kind}) or a {kind} of this model, which has {', '.join(known[:20])}{more}")
    if not found: raise ValueError(f"{name}: an empty list chooses no {kind}; leave it out for the usual ones")
    return {path: things[path] for path in things if any(path in paths for paths in found)}


def _means(w: Any, path: str, thing: object) -> bool:
    if isinstance(w, str): return fnmatch.fnmatchcase(path, w)
    if isinstance(w, type): return isinstance(thing, w)
    if callable(w) and not isinstance(w, nn.Module): return bool(w(path, thing))
    return w is thing
