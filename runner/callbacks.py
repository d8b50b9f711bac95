"""Small callbacks: the device and a transform of the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from runner.batches import to_device
from runner.events import Callback


class CudaCallback(Callback):
    """Moves the model and every batch to the GPU; does nothing where there is none.

        run.xb, run.yb = xb.to(device), yb.to(device)       # or whatever tensors are in them

    A batch may be a nest of tuples, lists, dicts and dataclasses; of other things in it those are moved that have a
    method `to`.

    Args:
        device: where to instead, anything `torch.device` takes. None means the current GPU if there is one.

    The optimizer keeps working: moving a module leaves its parameters the same objects. Optimizer state from
    an earlier fit on another device is moved along.
    """

    _order = -5

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        if device is None and torch.cuda.is_available(): device = "cuda"
        self.device = None if device is None else torch.device(device)

    def begin_fit(self) -> None:
        if self.device is None: return
        self.model.to(self.device)
        for state in self.opt.state.values():
            for k, v in state.items():
                if torch.is_tensor(v) and v.ndim: state[k] = v.to(self.device)  # 0-dim step counters stay

    def begin_batch(self) -> None:
        if self.device is None: return
        run = self.run
        run.xb, run.yb = to_device(run.xb, self.device), to_device(run.yb, self.device)


class BatchTransformXCallback(Callback):
    """Replaces `xb` by `tfm(xb)` at the beginning of every batch, on the device where the batch then is.

        run.xb = tfm(xb)

    `tfm` gets `xb` as it is: of a dict the whole dict, and it returns one. If it has `state_dict` and
    `load_state_dict`, as a module has, its state is in a checkpoint.
    """

    _order = 2

    def __init__(self, tfm: Callable[[Any], Any]) -> None: self.tfm = tfm

    def begin_batch(self) -> None:
        self.run.xb = self.tfm(self.run.xb)

    def state_dict(self) -> dict[str, Any]:
        """That of `tfm`, if it has one."""
        return {"tfm": self.tfm.state_dict()} if self._keeps else {}       # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give `tfm` its state."""
        if self._keeps: self.tfm.load_state_dict(state["tfm"])             # type: ignore[attr-defined]

    @property
    def _keeps(self) -> bool:
        return all(callable(getattr(self.tfm, name, None)) for name in ("state_dict", "load_state_dict"))


def view_tfm(*size: int) -> "View":
    """A transform that views a batch as `(batch, *size)`: `view_tfm(1, 28, 28)` for flat 784-pixel images."""
    return View(size)


@dataclass(frozen=True, repr=False)
class View:
    """What `view_tfm` gives."""

    size: tuple[int, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor: return x.view(-1, *self.size)

    def __repr__(self) -> str: return f"view_tfm({', '.join(map(str, self.size))})"
