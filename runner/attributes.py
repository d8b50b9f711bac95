"""Objects of somebody else's in a checkpoint: what their attributes hold, as plain values.

An object that has been made anew has its functions, classes and settings already. What it has to be given is what it
has gathered since: numbers, strings, tensors, arrays, and containers of them. Anything else that can change is an
error: it would be missing afterwards.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import partial
from inspect import Signature
from pathlib import PurePath
from random import Random
from re import Pattern
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from runner.batches import leaves, map_tensors
from runner.states import TORCHS
from runner.undo import attributes_of
from runner.values import can_be_encoded

SETTINGS = (type, FunctionType, BuiltinFunctionType, MethodType, partial, ModuleType, torch.layout, torch.memory_format,
            Enum, Signature, Pattern, PurePath, range, slice, torch.Generator, Random)      # generators: `sources`
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
CHANGEABLE = (Tensor, list, dict, set, deque)


class Odd(TypeError):
    """An object keeps something that no checkpoint can hold; the text says what, and the mend."""


def is_setting(value: object) -> bool:
    """Whether `value` is one of the things that a new object has too, or a container of them, under names."""
    if isinstance(value, SETTINGS) or type(value).__module__.startswith("numpy.random"): return True
    if not isinstance(value, CONTAINERS): return False
    items = list(value.values()) if isinstance(value, dict) else list(value)
    return all(v is None or isinstance(v, (bool, str)) or is_setting(v) for v in items)


def kept(values: Mapping[str, Any], what: str, cls: type) -> dict[str, Any]:
    """Those of `values` that are to be in a checkpoint.

    Raises:
        Odd: one is no setting, and no checkpoint can hold it; `what`, of the class `cls`, keeps it.
    """
    found = {}
    for name, value in values.items():
        if can_be_encoded(value): found[name] = value
        elif not is_setting(value):
            raise Odd(f"{what} keeps {value!r:.60} ({type(value).__name__}) as {name!r}, which no checkpoint can hold; "
                      f"give its class {cls.__name__} the methods state_dict() and load_state_dict(state), for a state "
                      "of numbers, strings, tensors, and lists, tuples and dicts of them")
    return found


def like(now: Any, saved: Any) -> Any:
    """`saved` as a container of the class that `now` is of, if that is one of its own kind, such as a Counter."""
    if type(now) is type(saved) or not isinstance(saved, CONTAINERS) or not isinstance(now, type(saved)): return saved
    if isinstance(now, tuple): return type(now)(*saved)         # a named one
    new: Any = now.copy()
    new.clear()
    (new.update if isinstance(new, (dict, set)) else new.extend)(saved)
    return new


# --- an object, and what it is made of ----------------------------------------------------------------------------

def parts(o: Any, path: str = "", seen: dict[int, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """`o` under the path "" and its parts: modules, and what has `update`, `compute` and `reset`, each once.

    Nothing is told of the parts of an object that says itself what its state is.
    """
    seen = {} if seen is None else seen
    if id(o) in seen: return
    seen[id(o)] = o
    yield path, o
    if own_state(o) is not None: return
    for name, value in {**attributes_of(o), **getattr(o, "_modules", {})}.items():
        if is_part(value): yield from parts(value, f"{path}{name}.", seen)


def is_part(value: object) -> bool:
    return isinstance(value, nn.Module) or (not isinstance(value, SETTINGS) and all(
        callable(getattr(value, name, None)) for name in ("update", "compute", "reset")))


def values_of(o: Any) -> dict[str, Any]:
    """What `o` itself keeps, by name; of a module its parameters and buffers too."""
    own = {k: v for k, v in attributes_of(o).items() if not is_part(v)}
    if not isinstance(o, nn.Module): return own
    return {**{k: v for k, v in own.items() if k not in TORCHS}, **o._parameters, **o._buffers}


def own_state(o: Any) -> dict[str, Any] | None:
    """What `o` says itself is its state; None if it says nothing.

    The state dict of a module doesn't have all that it keeps, unless its class says what: one of neither torch nor
    torchmetrics, whose metrics leave out what they have gathered.
    """
    if not callable(getattr(o, "state_dict", None)) or not callable(getattr(o, "load_state_dict", None)): return None
    says = next((cls for cls in type(o).__mro__ if "state_dict" in vars(cls)), type(o))
    if isinstance(o, nn.Module) and says.__module__.split(".")[0] in ("torch", "torchmetrics"): return None
    return o.state_dict() or None


def state_of(o: Any, what: str) -> dict[str, Any]:
    """The state of `o`, for `load`; `what` it is called in an error.

    Raises:
        Odd: it keeps something that no checkpoint can hold.
    """
    own: dict[str, Any] = {}
    values: dict[str, Any] = {}
    same: dict[str, str] = {}               # of what is there under two keys, the first
    elsewhere: list[str] = []               # where there are tensors that don't lie on the CPU
    known: dict[int, str] = {}
    for path, one in parts(o):
        if (state := own_state(one)) is not None:
            own[path] = state
            continue
        for name, value in kept(values_of(one), what, type(one)).items():
            key = path + name
            if isinstance(value, CHANGEABLE) and (first := known.setdefault(id(value), key)) != key:
                same[key] = first
                continue
            values[key] = value
            if any(isinstance(t, Tensor) and t.device.type != "cpu" for t in leaves(value)): elsewhere.append(key)
    return {"own": own, "values": values, "same": same, "elsewhere": elsewhere}


def load(o: Any, state: Mapping[str, Any], device: torch.device) -> None:
    """Give `o` what `state_of` has found, on `device` what didn't lie on the CPU: it then keeps that and nothing else.

    Raises:
        ValueError: it lacks a part.
    """
    found, values = dict(parts(o)), dict(state["values"])
    for key in state["elsewhere"]: values[key] = map_tensors(lambda t: t.to(device), values[key])
    for key, first in state["same"].items(): values[key] = values[first]
    wanted: dict[str, dict[str, Any]] = {path: {} for path in found}
    for key, value in values.items():
        path, dot, name = key.rpartition(".")
        wanted.setdefault(path + dot, {})[name] = value
    if lost := [path for path in (*wanted, *state["own"]) if path not in found]:
        raise ValueError(f"the state has {lost[0].rstrip('.')!r} of a {type(o).__name__}, and this one has no such "
                         "part; make it as it was made then")
    for path, one in found.items():
        if path in state["own"]: one.load_state_dict(state["own"][path])
        elif not any(path.startswith(other) for other in state["own"]): _fill(one, wanted[path])


def _fill(o: Any, values: dict[str, Any]) -> None:
    """Let `o` keep these values and, settings apart, no others."""
    now = values_of(o)
    module: Any = o if isinstance(o, nn.Module) else nn.Module()
    for name, value in values.items():
        if name in module._buffers: module._buffers[name] = value
        elif module._parameters.get(name) is not None: module._parameters[name].data = value
        else: object.__setattr__(o, name, like(now.get(name), value))
    for name, value in now.items():
        if name in values or name in module._buffers or name in module._parameters: continue
        if can_be_encoded(value): object.__delattr__(o, name)
