"""What a batch is made of: the tensors in it, how many items it has, where it lies, and whether it is a pair.

A batch is a tensor, or a nest of tuples, lists, dicts, dataclasses and whatever else torch's pytree knows. All else is
a leaf, and one that is no tensor stays as it is.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

T = TypeVar("T")
SHOWN = 8   # entries of a batch that an error lists


# --- nests --------------------------------------------------------------------------------------------------------

def opened(tree: object) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """What `tree` directly holds and a function that puts other such things in a copy of it; None if it is a leaf."""
    if isinstance(tree, torch.Tensor): return None
    children, spec = tree_flatten(tree, is_leaf=lambda part: part is not tree)
    if not spec.is_leaf(): return children, lambda new: tree_unflatten(new, spec)
    if is_dataclass(tree) and not isinstance(tree, type):
        names = [f.name for f in fields(tree) if hasattr(tree, f.name)]
        return [getattr(tree, name) for name in names], partial(_replaced, tree, names)
    if isinstance(tree, MutableMapping): return list(tree.values()), partial(_refilled, tree)  # a class of the user's
    if isinstance(tree, list): return list(tree), partial(_relisted, tree)
    return (list(tree), type(tree)) if isinstance(tree, tuple) else None


def _replaced(old: object, names: list[str], new: list[object]) -> object:
    """A copy of a dataclass; it may be frozen, and neither its `__init__` nor its `__post_init__` is called."""
    made = copy.copy(old)
    for name, value in zip(names, new, strict=True): object.__setattr__(made, name, value)
    return made


def _refilled(old: MutableMapping[Any, Any], new: list[object]) -> MutableMapping[Any, Any]:
    made = copy.copy(old)
    for key, value in zip(old, new, strict=True): made[key] = value
    return made


def _relisted(old: list[Any], new: list[Any]) -> list[Any]:
    made = copy.copy(old)
    made[:] = new
    return made


def _each(f: Callable[[Any], Any], tree: T) -> T:
    """`tree` with `f` of all that it directly holds; a leaf is itself."""
    parts = opened(tree)
    if parts is None: return tree
    children, closed = parts
    made: T = closed([f(child) for child in children])
    return made


def map_tensors(f: Callable[[torch.Tensor], object], tree: T) -> T:
    """`tree` with `f(tensor)` in the place of every tensor."""
    if isinstance(tree, torch.Tensor):
        made: T = f(tree)  # type: ignore[assignment]
        return made
    return _each(partial(map_tensors, f), tree)


def leaves(tree: object) -> Iterator[object]:
    """The leaves of `tree`, in order."""
    parts = opened(tree)
    if parts is None: yield tree
    else:
        for child in parts[0]: yield from leaves(child)


def first_tensor(tree: object) -> torch.Tensor | None:
    """`tree` if it is a tensor, or else the first floating-point tensor in it; None if there is none."""
    if isinstance(tree, torch.Tensor): return tree
    return next((t for t in leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point()), None)


def to_device(tree: T, device: torch.device) -> T:
    """`tree` with its tensors on `device`; a thing whose class has a method `to` is moved by `thing.to(device)`.

    Tensors are copied to a GPU without waiting, which needs pinned memory to be of use.
    """
    if isinstance(tree, torch.Tensor):      # on its way to the host a tensor could be read before it is there
        return tree.to(device, non_blocking=device.type != "cpu")  # type: ignore[return-value]
    if callable(getattr(type(tree), "to", None)):
        moved: T | None = tree.to(device)  # type: ignore[attr-defined]
        return tree if moved is None else moved
    return _each(partial(to_device, device=device), tree)


def part_of(tree: T, start: int, stop: int) -> T:
    """The items from `start` to `stop` of a batch: of every tensor in it that has a row for each item."""
    n = size_of(tree)
    return map_tensors(lambda t: t[start:stop] if t.ndim and t.size(0) == n else t, tree)


def size_of(tree: object) -> int:
    """How many items a batch has: the length of the first axis of the first tensor in it that has axes.

    A `PackedSequence` has as many as it has sequences. Where there is no tensor an array counts, or else the first list
    of things that hold nothing, such as strings.

    Raises:
        TypeError: a batch with none of these.
    """
    if isinstance(tree, torch.Tensor) and tree.ndim: return tree.size(0)
    for measure in (_first_axis, _first_list):
        if (size := measure(tree)) is not None: return size
    raise TypeError(f"the batch is {described(tree)}, in which no tensor tells how many items it has; put one first "
                    "that has the items along its first axis")


def _first_axis(tree: object) -> int | None:
    if isinstance(tree, PackedSequence): return int(tree.batch_sizes[0])
    if isinstance(tree, torch.Tensor): return tree.size(0) if tree.ndim else None
    parts = opened(tree)
    if parts is not None: return next((n for child in parts[0] if (n := _first_axis(child)) is not None), None)
    shape = getattr(tree, "shape", None)
    return shape[0] if isinstance(shape, tuple) and shape and isinstance(shape[0], int) else None


def _first_list(tree: object) -> int | None:
    parts = opened(tree)
    if parts is None: return None
    if isinstance(tree, (list, tuple)) and all(opened(child) is None for child in tree): return len(tree)
    return next((n for child in parts[0] if (n := _first_list(child)) is not None), None)


def length_of(loader: object) -> int | None:
    """How many batches `loader` has: 0 without a loader, None where nobody knows before its end."""
    if loader is None: return 0
    try: return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError): return None


# --- pairs --------------------------------------------------------------------------------------------------------

class NoPair:
    """The runner's `yb` of a `batch` that is no pair, until a callback says what `yb` is."""

    def __init__(self, batch: object) -> None: self.batch = batch


def pair(batch: Any) -> tuple[Any, Any]:
    """`(xb, yb)` of a batch: its two parts if it is a tuple or list of two, or else the whole of it and a `NoPair`.

    A dict of two or a tensor of two rows is no pair, though Python would unpack it.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2: return batch[0], batch[1]
    return batch, NoPair(batch)


def no_pair(batch: object, in_train: bool) -> TypeError:
    """The error for a batch that is no pair and that no callback has taken apart."""
    inputs, targets = _parts(batch)
    return TypeError(
        f"the {'training' if in_train else 'validation'} loader gave a batch that is not a pair (xb, yb) but "
        f"{described(batch)}. Say by a callback what is what, such as\n\n"
        "    class Pair(Callback):\n"
        f"        def begin_batch(self): self.run.xb, self.run.yb = {inputs}, {targets}\n\n"
        "or give the loader a collate_fn that returns (xb, yb)")


TARGETS = "labels", "label", "targets", "target", "yb", "y"


def _parts(batch: object) -> tuple[str, str]:
    """Expressions for inputs and targets in a batch that stands in `self.xb`: a guess by names and order."""
    x = "self.xb"
    if isinstance(batch, Mapping) and batch:
        keys = list(batch)
        last = next((k for k in TARGETS if k in keys), keys[-1])
        others = [k for k in keys if k != last] or keys
        if len(others) == 1: return f"{x}[{_key(others[0])}]", f"{x}[{_key(last)}]"
        return f"{{k: v for k, v in {x}.items() if k != {_key(last)}}}", f"{x}[{_key(last)}]"
    if is_dataclass(batch) and (names := [f.name for f in fields(batch)]):
        last = next((k for k in TARGETS if k in names), names[-1])
        return f"{x}.{next((k for k in names if k != last), last)}", f"{x}.{last}"
    if isinstance(batch, (tuple, list)) and len(batch) > 2: return f"{x}[:-1]", f"{x}[-1]"
    if isinstance(batch, (tuple, list)) and len(batch) == 1: return f"{x}[0]", f"{x}[0]"
    return x, f"{x}.y" if hasattr(batch, "y") else x


def described(batch: object) -> str:
    """A batch in words: its type, its keys or length, and of its entries the types and shapes."""
    text = _short(batch)
    text = f"{'an' if text[0] in 'aeioAEIO' else 'a'} {text}"
    if isinstance(batch, Mapping) and batch:
        return f"{text.partition(' of length')[0]} with the keys " + _listed([f"{_key(k)} ({_short(v)})"
                                                                     for k, v in batch.items()])
    if is_dataclass(batch) and not isinstance(batch, type):
        return f"{text} with the fields " + _listed([f"{f.name} ({_short(getattr(batch, f.name, None))})"
                                                     for f in fields(batch)])
    return f"{text} ({_listed([_short(v) for v in batch])})" if isinstance(batch, (tuple, list)) and batch else text


def _short(o: object) -> str:
    if isinstance(o, torch.Tensor):
        return f"{str(o.dtype).removeprefix('torch.')} tensor" + ("" if o.is_nested else f" of shape {tuple(o.shape)}")
    if isinstance(shape := getattr(o, "shape", None), tuple): return f"{type(o).__name__} of shape {tuple(shape)}"
    return type(o).__name__ + (f" of length {len(o)}" if isinstance(o, (tuple, list, Mapping)) else "")


def _key(key: object) -> str: return json.dumps(key) if isinstance(key, str) else repr(key)


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:SHOWN]) + (f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else "")


def joined(parts: Sequence[Any]) -> Any:
    """The batches of a pass as one: tensors end to end, nests of them leaf by leaf, lists of other things end to end.

    Other leaves are themselves where all batches agree, else a list of them.

    Raises:
        ValueError: tensors that differ in more than their first axis.
    """
    first = parts[0]
    if isinstance(first, torch.Tensor):
        if not first.ndim: return torch.stack(list(parts))
        try: return torch.cat(list(parts))
        except RuntimeError as e:
            shapes = list(dict.fromkeys(tuple(p.shape) for p in parts))
            raise ValueError(f"the batches' tensors have shapes such as {shapes[0]} and {shapes[-1]}, which can't be "
                             "put end to end; pad them by a callback (after_pred), or keep run.pred batch by batch by "
                             "one of your own") from e
    nests = [opened(p) for p in parts]
    if nests[0] is None: return first if all(p is first or p == first for p in parts) else list(parts)
    children = [nest[0] if nest is not None else [] for nest in nests]
    flat = [c for cs in children for c in cs]
    if isinstance(first, (list, tuple)) and not any(opened(c) or isinstance(c, torch.Tensor) for c in flat): return flat
    if len({len(cs) for cs in children}) > 1:
        raise ValueError(f"the batches are built differently: {described(parts[0])}, and {described(parts[-1])}")
    return nests[0][1]([joined(column) for column in zip(*children, strict=True)])
