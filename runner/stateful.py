"""What callbacks put in a checkpoint: `Stateful`, by the names of attributes, and `column`, many numbers at once."""

from array import array
from collections.abc import Iterable
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
