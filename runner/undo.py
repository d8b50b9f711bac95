"""What objects hold, copied and put back: whatever kind they are, and whatever they hold in turn."""

import array
import copy
import io
import itertools
import logging
import sys
import threading
import types
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from runner.states import generators_of

Undo = Callable[[], None]

PLAIN = (type(None), bool, int, float, complex, str, bytes, type, range, slice, Enum, PurePath, types.ModuleType,
         types.FunctionType, types.BuiltinFunctionType, torch.dtype, torch.device, weakref.ref, logging.Filterer)
# What lives outside of this process's memory, or beside this thread: what has one (and is no root) is left alone.
OUTSIDE = (io.IOBase, threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Condition,
           threading.Event)
ITERATORS: tuple[type, ...] = (itertools.count, itertools.cycle, type(iter([])), type(iter(())), type(iter(range(0))))
COMPILERS = ("torch._dynamo", "torch._inductor", "torch.fx")
HOOKS = {name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name}


def holding(roots: Iterable[object], aside: Iterable[object] = ()) -> Undo:
    """Copy what `roots` hold, and what that holds, and so on; returns a function that puts it back in place.

    Tensors and arrays go by their values, lists, dicts, sets and deques by what they contain, generators of random
    numbers by their states, all other objects by their attributes; each stays the same object. Nothing is written that
    hasn't changed. Data sets and what holds a file, a lock or a thread stay as they are, and so does all in `aside`.
    """
    parts: list[Undo] = []
    seen: dict[int, object] = {id(o): o for o in aside}     # the objects themselves, or their ids could be others' soon
    todo = [*(tops := list(roots))]
    while todo:
        o = todo.pop()
        if isinstance(o, PLAIN) or id(o) in seen: continue
        seen[id(o)] = o
        if (found := _opened(o, seen, any(o is top for top in tops))) is None: continue
        undo, children = found
        parts.append(undo)
        todo += children

    def restore() -> None:
        for undo in parts: undo()
    return restore


def class_attributes(o: object, base: type) -> tuple[Undo, list[object]]:
    """The attributes that the classes of `o` below `base` have themselves: what puts them back, and their values."""
    undos: list[Undo] = []
    values: list[object] = []
    for cls in type(o).__mro__[:type(o).__mro__.index(base)]:
        had = {k: v for k, v in vars(cls).items() if not _machinery(k, v)}
        undos.append(_of_class(cls, had))
        values += had.values()

    def restore() -> None:
        for undo in undos: undo()
    return restore, values


def _machinery(name: str, v: object) -> bool:
    return name.startswith(("__", "_abc")) or isinstance(v, types.FunctionType) or hasattr(type(v), "__get__")


def _of_class(cls: type, had: dict[str, object]) -> Undo:
    def restore() -> None:
        for k in [k for k, v in vars(cls).items() if k not in had and not _machinery(k, v)]: delattr(cls, k)
        for k, v in had.items():
            if vars(cls).get(k) is not v: setattr(cls, k, v)
    return restore


def _opened(o: Any, seen: dict[int, object], root: bool) -> tuple[Undo, list[object]] | None:
    """What puts the object `o` itself back, and what it holds; None if it is to be left alone."""
    if isinstance(o, Tensor): return _tensor(o, seen)
    if isinstance(o, torch.Generator): return _by(o.get_state().clone(), o.set_state), []
    if isinstance(o, DataLoader): return _loader(o), []
    if isinstance(o, (Dataset, *OUTSIDE, *ITERATORS)) or type(o).__module__.startswith(COMPILERS): return None
    if hasattr(type(o), "getstate") and hasattr(type(o), "setstate"):                           # random.Random
        return _by(o.getstate(), o.setstate), []
    if isinstance(o, (tuple, frozenset)): return _nothing, list(o)
    if isinstance(o, types.MethodType): return _nothing, [o.__self__]
    if isinstance(o, partial): return _nothing, [o.func, *o.args, *o.keywords.values()]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(o, numpy.ndarray): return _array(o), list(o.flat) if o.dtype.hasobject else []
    if numpy is not None and isinstance(o, numpy.random.Generator): return _numpys(o.bit_generator), []
    if numpy is not None and isinstance(o, numpy.random.BitGenerator): return _numpys(o), []
    if numpy is not None and isinstance(o, numpy.random.RandomState): return _by(o.get_state(), o.set_state), []
    held = attributes_of(o)
    if not root and any(isinstance(v, OUTSIDE) for v in held.values()): return None
    undos, children = [_slots(o, held)] if held or hasattr(o, "__dict__") else [], list(held.values())
    if isinstance(o, nn.Module): children = [v for k, v in held.items() if k not in HOOKS]
    if isinstance(o, (dict, list, set, deque, bytearray, array.array)):
        undos.append(_contents(o))
        children += [*o, *o.values()] if isinstance(o, dict) else [] if isinstance(o, (bytearray, array.array)) else o
    if not undos:
        if not (hasattr(type(o), "state_dict") and hasattr(type(o), "load_state_dict")): return None
        undos.append(_by(copy.deepcopy(o.state_dict()), o.load_state_dict))

    def restore() -> None:
        for undo in undos: undo()
    return restore, children


def _nothing() -> None: pass


def _by(state: Any, put: Callable[[Any], object]) -> Undo:
    def restore() -> None: put(state)
    return restore


def _numpys(bits: Any) -> Undo:
    state = bits.state

    def restore() -> None: bits.state = state
    return restore


def _loader(dl: Any) -> Undo:
    """A loader of a callback's own: its generators, and the iterator of persistent workers."""
    states, iterator = [(g, g.get_state()) for g in generators_of(dl)], getattr(dl, "_iterator", None)

    def restore() -> None:
        for g, state in states: g.set_state(state)
        dl._iterator = iterator
    return restore


def _array(a: Any) -> Undo:
    was = a.copy()

    def restore() -> None:
        if a.flags.writeable: a[...] = was
    return restore


def _tensor(t: Tensor, seen: dict[int, object]) -> tuple[Undo, list[object]]:
    """The bytes of its memory, once for all tensors in it, and which part of it `t` is; its gradient."""
    grad, leaf, needs = t.grad if t.is_leaf else None, t.is_leaf, t.requires_grad
    try: memory = t.untyped_storage()
    except (NotImplementedError, RuntimeError): memory = None                   # sparse, or a kind of its own
    if memory is None:
        copied = t.detach().clone()

        def restore_values() -> None:
            with torch.no_grad(): t.copy_(copied)
        return restore_values, [grad, vars(t)]
    key = -1 - memory._cdata                                                    # no object's id
    was = None if key in seen or memory.device.type == "meta" else memory.clone()
    seen.setdefault(key, memory)
    place = memory, t.storage_offset(), t.size(), t.stride()

    def restore() -> None:
        if was is not None:
            if memory.nbytes() != was.nbytes(): memory.resize_(was.nbytes())
            memory.copy_(was)
        now = t.untyped_storage()
        if (now._cdata, t.storage_offset(), t.size(), t.stride()) != (memory._cdata, *place[1:]):
            with torch.no_grad(): t.set_(*place)
        if leaf and t.is_leaf:
            if t.grad is not grad: t.grad = grad
            if t.requires_grad != needs: t.requires_grad_(needs)
    return restore, [grad, vars(t)]


# --- attributes and contents --------------------------------------------------------------------------------------

def _slot_names(o: object) -> Iterator[str]:
    for cls in type(o).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"): continue
            yield f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name


def attributes_of(o: object) -> dict[str, Any]:
    """The attributes that `o` has itself, in its `__dict__` or in slots."""
    held = dict(vars(o)) if hasattr(o, "__dict__") else {}
    for name in _slot_names(o):
        try: held[name] = object.__getattribute__(o, name)
        except AttributeError: pass
    return held


def _slots(o: object, held: dict[str, Any]) -> Undo:
    own, slots = getattr(o, "__dict__", {}), [name for name in _slot_names(o) if name not in getattr(o, "__dict__", {})]
    had = {k: _copied(v) for k, v in held.items() if k in own and not (isinstance(o, nn.Module) and k in HOOKS)}
    in_slots = {name: _copied(held[name]) for name in slots if name in held}

    def restore() -> None:
        for k in [k for k in own if k not in had and not (isinstance(o, nn.Module) and k in HOOKS)]: del own[k]
        if any(own.get(k, own) is not v for k, v in had.items()): own.update(had)
        for name in slots:
            if name in in_slots: object.__setattr__(o, name, in_slots[name])
            elif hasattr(o, name): object.__delattr__(o, name)
    return restore


def _copied(v: Any) -> Any:
    """`v`, or what is to be put in its place: an iterator can't be set back, but a copy of it stays where it was."""
    if not isinstance(v, ITERATORS): return v
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # itertools gives copying up
            return copy.copy(v)
    except TypeError: return v


def _contents(o: Any) -> Undo:
    if isinstance(o, dict):
        kind = OrderedDict if isinstance(o, OrderedDict) else dict
        pairs = [(k, _copied(v)) for k, v in kind.items(o)]

        def restore_dict() -> None:
            now = list(kind.items(o))
            if len(now) == len(pairs) and all(a is c and b is d for (a, b), (c, d) in zip(now, pairs, strict=True)):
                return
            kind.clear(o)
            kind.update(o, pairs)
        return restore_dict
    if isinstance(o, (bytearray, array.array)):
        bits: Any = o[:]

        def restore_bits() -> None:
            if o != bits: o[:] = bits
        return restore_bits
    base: Any = next(kind for kind in (list, set, deque) if isinstance(o, kind))
    items = [_copied(v) for v in base.__iter__(o)]

    def restore() -> None:
        now = list(base.__iter__(o))
        if len(now) == len(items) and all(a is b for a, b in zip(now, items, strict=True)): return
        base.clear(o)
        (base.update if base is set else base.extend)(o, items)
    return restore
