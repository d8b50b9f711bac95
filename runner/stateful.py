"""What callbacks put in a checkpoint: `Stateful`, by the names of attributes, and many numbers at once, in columns."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from runner.events import Callback

DTYPES = {"d": torch.float64, "f": torch.float32, "q": torch.int64}     # by the codes of Python's arrays


class Stateful(Callback):
    """Keeps in a checkpoint the attributes that it names: what it has learnt in the batches and epochs so far.

        class Worst(Stateful):
            _saved = "loss", "at"               # and those that its bases name

    They are plain values, tensors, and lists, tuples, dicts, sets and deques of them. What is more than that is added
    by methods of one's own, which begin with `super()`'s. A state is loaded after the callback's `begin_fit` and again,
    where it is of the middle of an epoch, after its `begin_epoch`.
    """

    _saved: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """What lives across batches, for a checkpoint."""
        return {name: vars(self)[name] for name in self._names() if name in vars(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which is what `state_dict` gave."""
        for name in self._names():
            if name in state: setattr(self, name, state[name])

    def _names(self) -> list[str]:
        return [name for cls in type(self).__mro__ for name in vars(cls).get("_saved", ())]


def column(values: Iterable[Any], code: Literal["d", "f", "q"] = "d") -> Tensor:
    """`values` as a tensor of float64 ("d"), float32 ("f") or int64 ("q"), in a quarter of the time of torch's own."""
    numbers = array(code, values)
    return torch.frombuffer(numbers, dtype=DTYPES[code]) if numbers else torch.empty(0, dtype=DTYPES[code])


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`rows` in columns, of floats and of ints as tensors, if all have the same; or else as they are. For `rows_of`."""
    names = list(rows[0]) if rows else []
    if any(list(row) != names for row in rows): return {"rows": [dict(row) for row in rows]}
    return {"columns": {name: _packed([row[name] for row in rows]) for name in names}}


def _packed(values: list[Any]) -> Any:
    kinds = set(map(type, values))
    try: return column(values, "d") if kinds == {float} else column(values, "q") if kinds == {int} else values
    except OverflowError: return values


def rows_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of which `columns` has made `state`."""
    if "rows" in state: return list(state["rows"])
    found = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in state["columns"].items()}
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
