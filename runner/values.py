"""Values that a checkpoint can hold, tensors and plain Python ones, and others written as such."""

import copy
import sys
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

TAG = "(kind)"      # the key that marks a dict as something else
MANY = 32           # so many numbers are written as a tensor: one by one they take ten times as long
NUMBERS = {type(None), bool, int, float, str}
AS_THEY_ARE = (torch.dtype, torch.device, torch.Size)


Known = dict[int, tuple[Any, Any]]      # under the id of an object: it, and what was made of it


class Kept(dict[str, Any]):
    """A dict that has gone through `encoded` by itself, and is to be decoded by whoever gets it."""


def encoded(o: Any, where: str, known: Known | None = None) -> Any:
    """`o` out of what `torch.load(weights_only=True)` can read; `where` names it in an error.

    None, numbers, strings, bytes, tensors (detached, a view without the rest of its storage), dtypes and devices,
    lists, tuples, sets, deques and dicts of those, numpy's arrays and numbers, `array.array`. Of a subclass the base is
    left.

    With `known` what is the same object in two places stays that, over several calls, and a tensor says whether it gets
    a gradient and whether it lies elsewhere than on the CPU. The result goes to `decoded` with `known` then.

    Raises:
        TypeError: anything else; it says where it is.
    """
    if known is None or type(o) in NUMBERS or isinstance(o, tuple): return _encoded(o, where, known)
    if id(o) not in known: known[id(o)] = o, _encoded(o, where, known)
    return known[id(o)][1]


def _encoded(o: Any, where: str, known: Known | None) -> Any:
    kind = type(o)
    if o is None or kind in (bool, int, float, str, bytes, complex): return o
    if isinstance(o, Tensor):
        if is_lazy(o): raise refusal(o, where)
        return bare(o) if known is None else _told(o)
    if isinstance(o, Kept): return {TAG: "kept", "values": {**o}}
    if isinstance(o, AS_THEY_ARE): return o
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(o, (numpy.ndarray, numpy.generic)):
        name = "array" if isinstance(o, numpy.ndarray) else "number"
        try: return {TAG: f"numpy {name}", "values": torch.from_numpy(numpy.array(o))}
        except TypeError as e: raise refusal(o, where) from e
    if isinstance(o, array): return {TAG: "array", "type": o.typecode, "bytes": o.tobytes()}
    if isinstance(o, (set, frozenset)):
        return {TAG: kind.__name__ if kind is frozenset else "set", "values": [encoded(v, where, known) for v in o]}
    if isinstance(o, deque):
        values = [encoded(v, f"{where}[{i}]", known) for i, v in enumerate(o)]
        return {TAG: "deque", "values": values, "maxlen": o.maxlen}
    if isinstance(o, Counter): return {TAG: "Counter", "values": [(encoded(k, where, known), n) for k, n in o.items()]}
    if isinstance(o, dict):
        made: dict[Any, Any] = OrderedDict() if isinstance(o, OrderedDict) else {}
        for k, v in o.items(): made[encoded(k, f"a key of {where}", known)] = encoded(v, f"{where}[{k!r}]", known)
        return made
    if isinstance(o, (list, tuple)) and (types := set(map(type, o))) <= NUMBERS:
        if len(o) > MANY and (types == {int} or types == {float}):
            with suppress(OverflowError):
                numbers = torch.frombuffer(array("q" if types == {int} else "d", o),
                                           dtype=torch.int64 if types == {int} else torch.float64)
                return {TAG: "tuple" if isinstance(o, tuple) else "list", "values": numbers}
        return tuple(o) if isinstance(o, tuple) else [*o]
    if isinstance(o, list): return [encoded(v, f"{where}[{i}]", known) for i, v in enumerate(o)]
    if isinstance(o, tuple): return tuple(encoded(v, f"{where}[{i}]", known) for i, v in enumerate(o))
    for plain in (int, float, str, bytes):
        # An enum's value isn't the enum: a number by another name is taken for that number, a choice isn't.
        if isinstance(o, plain) and not hasattr(kind, "__members__"): return plain.__new__(plain, o)    # type: ignore
    raise refusal(o, where)


def bare(t: Tensor) -> Tensor:
    """`t` as a plain tensor of torch's, without its graph and the rest of its storage."""
    t = t.detach()
    if type(t) is not Tensor: t = t.as_subclass(Tensor)
    dense = t.layout is torch.strided and not t.is_quantized and not t.is_nested
    return t.clone() if dense and t.untyped_storage().nbytes() > t.numel() * t.element_size() else t


def _told(t: Tensor) -> Any:
    """`t` with whether it gets a gradient and lies elsewhere, if it does."""
    trained = t.requires_grad and t.is_leaf
    if not trained and t.device.type == "cpu": return bare(t)
    return {TAG: "tensor", "values": bare(t), "trained": trained, "grad": t.grad if trained else None,
            "elsewhere": t.device.type != "cpu"}


def refusal(o: object, where: str) -> TypeError:
    return TypeError(f"{where} is {repr(o)[:60]} ({type(o).__name__}), and a checkpoint holds tensors, numbers, "
                     "strings, and lists, tuples, sets and dicts of those: give one of them")


def decoded(o: Any, known: Known | None = None) -> Any:
    """What `encoded` was given, in new containers and new memory; with `known` as there."""
    if known is None or not isinstance(o, (Tensor, list, dict)): return _decoded(o, known)
    if id(o) not in known: known[id(o)] = o, _decoded(o, known)
    return known[id(o)][1]


def _decoded(o: Any, known: Known | None) -> Any:
    if isinstance(o, Tensor):
        # A deep copy lies as the tensor does, also where entries share a place.
        return o.clone() if o.layout is not torch.strided or o.is_nested or o.is_quantized else copy.deepcopy(o)
    if isinstance(o, OrderedDict): return OrderedDict((k, decoded(v, known)) for k, v in o.items())
    if isinstance(o, list): return [decoded(v, known) for v in o]
    if type(o) is tuple: return tuple(decoded(v, known) for v in o)
    if not isinstance(o, dict): return o
    if TAG in o: return MADE[o[TAG]](o, known)
    return {decoded(k, known): decoded(v, known) for k, v in o.items()}


def _tensor(o: dict[str, Any], known: Known | None) -> Tensor:
    t: Tensor = decoded(o["values"])
    if o["elsewhere"]: t.elsewhere = True       # type: ignore[attr-defined]
    if o["trained"]: t.requires_grad_()
    if o["grad"] is not None: t.grad = decoded(o["grad"])
    return t


def _view(o: dict[str, Any], known: Known | None) -> Tensor:
    memory: Tensor = decoded(o["memory"], known)
    t = placed(memory.untyped_storage(), o["dtype"], o["offset"], o["size"], o["stride"])
    if o["elsewhere"]: t.elsewhere = True       # type: ignore[attr-defined]
    return t


def placed(memory: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: Sequence[int], stride: Sequence[int],
           ) -> Tensor:
    """The tensor that lies so in `memory`; `offset` in entries."""
    t = torch.empty(0, dtype=dtype, device=memory.device)
    return t.set_(memory, offset, tuple(size), tuple(stride))


MADE: dict[str, Callable[[dict[str, Any], Known | None], Any]] = {
    "tuple": lambda o, known: tuple(o["values"].tolist()),
    "list": lambda o, known: o["values"].tolist(),
    "numpy array": lambda o, known: o["values"].clone().numpy(),
    "numpy number": lambda o, known: o["values"].numpy()[()],
    "array": lambda o, known: array(o["type"], o["bytes"]),
    "set": lambda o, known: set(decoded(o["values"], known)),
    "frozenset": lambda o, known: frozenset(decoded(o["values"], known)),
    "deque": lambda o, known: deque(decoded(o["values"], known), o["maxlen"]),
    "Counter": lambda o, known: Counter(dict(decoded(o["values"], known))),
    "kept": lambda o, known: o["values"],
    "tensor": _tensor,
    "view": _view,
}


def can_be_encoded(o: object) -> bool:
    """Whether `encoded` takes `o`."""
    try: encoded(o, "")
    except (TypeError, RecursionError): return False
    return True
