"""Tensors that share memory: told when they are written, and lying in each other again when they are read."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from runner.values import NUMBERS, TAG, Known, bare, placed

ALIGNED = 16    # bytes, of the largest numbers


def memory_of(t: Any) -> torch.UntypedStorage | None:
    """Where the numbers of `t` lie; None of what has no such place, as sparse tensors."""
    if not isinstance(t, Tensor) or is_lazy(t) or t.layout is not torch.strided or t.is_quantized: return None
    if t.device.type == "meta": return None
    try: return t.untyped_storage()
    except (NotImplementedError, RuntimeError): return None


def encoded_together(values: Iterable[Any], plain: Iterable[Tensor] = ()) -> Known:
    """For `encoded`: what becomes of those tensors in `values`, however nested, that share memory with another one.

    They become views of one tensor, and of its memory what they cover is all that is written. `plain` are tensors of
    which only the values are wanted.
    """
    found: dict[int, Tensor] = {}
    _collect([*values], found, set())
    groups: dict[int, list[Tensor]] = {}
    for t in found.values():
        if (memory := memory_of(t)) is not None and memory.nbytes(): groups.setdefault(memory._cdata, []).append(t)
    known: Known = {id(t): (t, bare(t)) for t in plain}
    for tensors in groups.values():
        if len(tensors) == 1: continue
        ends = [*map(_ends, tensors)]
        low, high = min(low for low, _ in ends) // ALIGNED * ALIGNED, max(high for _, high in ends)
        memory = tensors[0].untyped_storage()
        whole = placed(memory, torch.uint8, low, (high - low,), (1,)).clone()
        for t in tensors:
            offset = (t.storage_offset() * t.element_size() - low) // t.element_size()
            known[id(t)] = t, {TAG: "view", "memory": whole, "dtype": t.dtype, "offset": offset, "size": [*t.shape],
                               "stride": [*t.stride()], "elsewhere": t.device.type != "cpu"}
    return known


def _collect(o: Any, found: dict[int, Tensor], seen: set[int]) -> None:
    """The tensors in `o`, each once."""
    if isinstance(o, Tensor): found[id(o)] = o
    elif isinstance(o, (list, tuple, dict, set, frozenset, deque)) and id(o) not in seen:
        seen.add(id(o))
        values = o.values() if isinstance(o, dict) else o
        if set(map(type, values)) <= NUMBERS: return
        for v in values: _collect(v, found, seen)


def _ends(t: Tensor) -> tuple[int, int]:
    """The first byte of `t` in its memory, and the one after its last."""
    first = int(t.storage_offset()) * t.element_size()
    return first, first + extent(t)


def extent(t: Tensor) -> int:
    """How many bytes lie between the first of `t` and its last, with both."""
    if not t.numel(): return 0
    return (1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def overlaps(t: Tensor) -> bool:
    """Whether entries of `t` lie in each other, as in an expanded tensor, so that it can't be written to."""
    return memory_of(t) is not None and any(step == 0 and n > 1 for n, step in zip(t.shape, t.stride(), strict=True))


def fits(now: Tensor, was: Tensor) -> bool:
    """Whether `now` can hold `was` as it lies, so that the same is computed of it to the last bit."""
    return (now.shape == was.shape and now.dtype == was.dtype and now.layout == was.layout is torch.strided
            and now.is_quantized == was.is_quantized and (was.is_quantized or now.stride() == was.stride()))


def alike(a: Any, b: Any) -> bool:
    """Whether two nests of plain values are the same, tensors to the bit."""
    if type(a) is not type(b): return False
    if isinstance(a, Tensor): return fits(a, b) and a.detach().cpu().equal(b.cpu())
    if isinstance(a, dict): return [*a] == [*b] and all(alike(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)) or type(a).__name__ == "deque":
        return len(a) == len(b) and all(map(alike, a, b))
    try: return bool(a == b)
    except (TypeError, ValueError, RuntimeError): return False
