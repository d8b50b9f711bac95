"""Values that a checkpoint can hold, tensors and plain Python ones, and others written as such."""

import sys
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

TAG = "(kind)"      # the key that marks a dict as something else
MANY = 32           # so many numbers are written as a tensor: one by one they take ten times as long
NUMBERS = {type(None), bool, int, float, str}
AS_THEY_ARE = (torch.dtype, torch.device, torch.Size)


def encoded(o: Any, where: str) -> Any:
    """`o` out of what `torch.load(weights_only=True)` can read; `where` names it in an error.

    None, numbers, strings, bytes, tensors (detached, a view without the rest of its storage), dtypes and devices,
    lists, tuples, sets, deques and dicts of those, numpy's arrays and numbers, `array.array`. Of a subclass the base is
    left.

    Raises:
        TypeError: anything else; it says where it is.
    """
    kind = type(o)
    if o is None or kind in (bool, int, float, str, bytes, complex): return o
    if isinstance(o, Tensor):
        t = o.detach()
        if type(t) is not Tensor: t = t.as_subclass(Tensor)
        dense = t.layout is torch.strided and not t.is_quantized
        return t.clone() if dense and t.untyped_storage().nbytes() > t.numel() * t.element_size() else t
    if isinstance(o, AS_THEY_ARE): return o
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(o, (numpy.ndarray, numpy.generic)):
        name = "array" if isinstance(o, numpy.ndarray) else "number"
        try: return {TAG: f"numpy {name}", "values": torch.from_numpy(numpy.array(o))}
        except TypeError as e: raise refusal(o, where) from e
    if isinstance(o, array): return {TAG: "array", "type": o.typecode, "bytes": o.tobytes()}
    if isinstance(o, (set, frozenset)):
        return {TAG: kind.__name__ if kind is frozenset else "set", "values": [encoded(v, where) for v in o]}
    if isinstance(o, deque):
        return {TAG: "deque", "values": [encoded(v, f"{where}[{i}]") for i, v in enumerate(o)], "maxlen": o.maxlen}
    if isinstance(o, Counter): return {TAG: "Counter", "values": [(encoded(k, where), n) for k, n in o.items()]}
    if isinstance(o, dict):
        made: dict[Any, Any] = OrderedDict() if isinstance(o, OrderedDict) else {}
        for k, v in o.items(): made[encoded(k, f"a key of {where}")] = encoded(v, f"{where}[{k!r}]")
        return made
    if isinstance(o, (list, tuple)) and (types := set(map(type, o))) <= NUMBERS:
        if len(o) > MANY and (types == {int} or types == {float}):
            with suppress(OverflowError):
                numbers = torch.frombuffer(array("q" if types == {int} else "d", o),
                                           dtype=torch.int64 if types == {int} else torch.float64)
                return {TAG: "tuple" if isinstance(o, tuple) else "list", "values": numbers}
        return tuple(o) if isinstance(o, tuple) else [*o]
    if isinstance(o, list): return [encoded(v, f"{where}[{i}]") for i, v in enumerate(o)]
    if isinstance(o, tuple): return tuple(encoded(v, f"{where}[{i}]") for i, v in enumerate(o))
    for plain in (int, float, str, bytes):
        # An enum's value isn't the enum: a number by another name is taken for that number, a choice isn't.
        if isinstance(o, plain) and not hasattr(kind, "__members__"): return plain.__new__(plain, o)    # type: ignore
    raise refusal(o, where)


def refusal(o: object, where: str) -> TypeError:
    return TypeError(f"{where} is {repr(o)[:60]} ({type(o).__name__}), and a checkpoint holds tensors, numbers, "
                     "strings, and lists, tuples, sets and dicts of those: give one of them")


def decoded(o: Any) -> Any:
    """What `encoded` was given, in new containers and new memory."""
    if isinstance(o, Tensor): return o.clone()
    if isinstance(o, OrderedDict): return OrderedDict((k, decoded(v)) for k, v in o.items())
    if isinstance(o, list): return [decoded(v) for v in o]
    if type(o) is tuple: return tuple(decoded(v) for v in o)
    if not isinstance(o, dict): return o
    if TAG in o: return MADE[o[TAG]](o)
    return {decoded(k): decoded(v) for k, v in o.items()}


MADE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tuple": lambda o: tuple(o["values"].tolist()),
    "list": lambda o: o["values"].tolist(),
    "numpy array": lambda o: o["values"].clone().numpy(),
    "numpy number": lambda o: o["values"].numpy()[()],
    "array": lambda o: array(o["type"], o["bytes"]),
    "set": lambda o: set(decoded(o["values"])),
    "frozenset": lambda o: frozenset(decoded(o["values"])),
    "deque": lambda o: deque(decoded(o["values"]), o["maxlen"]),
    "Counter": lambda o: Counter(dict(decoded(o["values"]))),
}


def can_be_encoded(o: object) -> bool:
    """Whether `encoded` takes `o`."""
    try: encoded(o, "")
    except TypeError: return False
    return True
