"""What the optimizers written here share: how a step is called."""

from collections.abc import Callable
from typing import overload

import torch
from torch import optim


class Optimizer(optim.Optimizer):
    """`torch.optim.Optimizer` whose step is `update`, which a subclass writes; no gradients are recorded in it."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; a `closure` is called for the loss before it, as in torch's optimizers, and the loss returned."""
        with torch.enable_grad(): loss = closure() if closure is not None else None
        self.update()
        return loss

    def update(self) -> None:
        """Change the parameters by the gradients at hand."""
        raise NotImplementedError
