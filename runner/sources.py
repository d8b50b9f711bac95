"""Sources of random numbers: which ones objects hold, and their states."""

import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from runner.states import random_state, set_random_state
from runner.values import decoded, encoded

DEPTH = 100         # attributes of attributes: two for each level of modules in modules
MANY = 1000         # a list that is longer holds data
MOST = 100_000      # objects that are looked at
LEAVES = (type(None), bool, int, float, complex, str, bytes, type, range, slice, types.ModuleType, Tensor,
          types.BuiltinFunctionType, torch.dtype, torch.device)
QUICK = {type(None), bool, int, float, str, Tensor, torch.nn.Parameter}


def sources_of(**roots: object) -> dict[str, Any]:
    """The random sources that the objects hold, or what these hold, and so on: `{"train_dl.sampler.generator": g}`.

    Sources are `torch.Generator`, `random.Random` and numpy's `Generator`, `BitGenerator` and `RandomState`. Each is
    there once, under the shortest path from the first of the roots that it can be reached from. Long lists, arrays and
    tensors are passed over, and so are worker processes.
    """
    found: dict[str, Any] = {}
    seen: dict[int, object] = {}
    for root in roots.items():      # one after the other: a path must not depend on who else has got hold of a thing
        level = [root]
        for _ in range(DEPTH):
            below: list[tuple[str, object]] = []
            for path, o in level:
                if isinstance(o, LEAVES) or id(o) in seen or len(seen) > MOST: continue
                seen[id(o)] = o
                if _kind(o): found[path] = o
                else: below += ((f"{path}{step}", part) for step, part in _parts(o))
            level = below
    return found


def _kind(o: object) -> str | None:
    if isinstance(o, torch.Generator): return "torch"
    if isinstance(o, random.Random): return "python"
    numpy = sys.modules.get("numpy")
    if numpy is None: return None
    if isinstance(o, numpy.random.RandomState): return "numpy.RandomState"
    if isinstance(o, (numpy.random.Generator, numpy.random.BitGenerator)): return "numpy.Generator"
    return None


def _parts(o: Any) -> Iterator[tuple[str, object]]:
    if isinstance(o, Mapping):
        if len(o) <= MANY: yield from ((f"[{k!r}]", v) for k, v in list(o.items()))
    elif isinstance(o, (list, tuple, set, frozenset)):
        if len(o) <= MANY: yield from ((f"[{i}]", v) for i, v in enumerate(o))
    elif isinstance(o, partial): yield from ((".func", o.func), (".args", o.args), (".keywords", o.keywords))
    elif isinstance(o, types.MethodType): yield ".__self__", o.__self__
    elif isinstance(o, types.FunctionType):
        for name, cell in zip(o.__code__.co_freevars, o.__closure__ or (), strict=True):
            try: yield f".<{name}>", cell.cell_contents
            except ValueError: pass         # not set yet
    else:
        held = getattr(o, "__dict__", None)
        for k, v in list(held.items()) if held else ():
            kind = type(v)      # of a module's attributes most are empty dicts of hooks
            if kind in QUICK or (kind in (dict, OrderedDict, list) and not v) or k in ("run", "_iterator"): continue
            yield f".{k}", v
        for cls in type(o).__mro__:
            for k in getattr(cls, "__slots__", ()) if not isinstance(o, Dataset) else ():
                if isinstance(k, str) and hasattr(o, k): yield f".{k}", getattr(o, k)


def described(o: Any) -> dict[str, Any] | None:
    """A source as plain values, for `made`; None of what is none."""
    if (kind := _kind(o)) is None: return None
    return {"kind": kind, "device": str(o.device) if kind == "torch" else None, "state": _state(o),
            "class": type(getattr(o, "bit_generator", o)).__name__, "generator": hasattr(o, "bit_generator")}


def made(description: Mapping[str, Any]) -> Any:
    """A source like the one that `described` was given."""
    kind, name = description["kind"], description["class"]
    if kind == "torch": o: Any = torch.Generator(description["device"])
    elif kind == "python": o = random.Random()
    else:
        numpys: Any = import_module("numpy.random")
        o = numpys.RandomState() if kind == "numpy.RandomState" else getattr(numpys, name)()
        if kind == "numpy.Generator" and description["generator"]: o = numpys.Generator(o)
    _set(o, description["state"])
    return o


def states_of(sources: Mapping[str, Any]) -> dict[str, Any]:
    """The states of torch's, Python's and numpy's own source, and of `sources`, for `set_states`: plain values."""
    return {"global": random_state(), "of": {path: encoded(_state(o), path) for path, o in sources.items()}}


def set_states(states: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    """Put back what `states_of` returned; a source that is in one of the two only is left as it is."""
    set_random_state(states["global"])
    for path, state in states["of"].items():
        if path in sources: _set(sources[path], decoded(state))


def _state(o: Any) -> Any:
    kind = _kind(o)
    if kind == "torch": return o.get_state()
    if kind == "python": return o.getstate()
    if kind == "numpy.RandomState": return o.get_state(legacy=False)
    return getattr(o, "bit_generator", o).state


def _set(o: Any, state: Any) -> None:
    kind = _kind(o)
    if kind == "torch": o.set_state(state)
    elif kind == "python": o.setstate(state)
    elif kind == "numpy.RandomState": o.set_state(state)
    else: getattr(o, "bit_generator", o).state = state
