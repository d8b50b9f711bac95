"""Gradients over several processes: torch's `DistributedDataParallel` where it sees the forward pass, else by hand.

Every parameter that is trained ends a backward pass with the mean gradient over the processes, each weighed by its
images: those of the model by `DistributedDataParallel`, which begins to exchange them while the rest is computed. It
knows of one backward pass for each forward pass through the model. What goes other ways is summed up here: parameters
of a loss, or of the optimizer alone; a second backward pass; a step that is compiled, or takes parts of the model.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from runner.ranks import Ranks
from runner.states import params_of

# Its name in torch from 2.14 on, which warns of the other.
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters \
    else "broadcast_buffers"


class Reducer:
    """The gradients of one learner's fit.

    Args:
        model: what `DistributedDataParallel` is to wrap.
        ranks: the processes.
        settings: for `DistributedDataParallel`.
    """

    def __init__(self, model: Any, ranks: Ranks, settings: dict[str, Any]) -> None:
        self.model, self.ranks, self.settings = model, ranks, settings
        self.params = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
        self.ddp: DistributedDataParallel | None = None
        self.lazy = any(map(is_lazy, self.params))      # their shapes the first batch tells; until then it is by hand
        self.prepared = False               # for a backward pass, by a forward pass through `ddp`
        self.waiting = False                # gradients of this process alone have been added up
        refuse(model)
        if not self.params or self.lazy: return
        device = self.params[0].device
        buffers: dict[str, Any] = {BUFFERS: False}      # they are `Distributed`'s business, after the step
        self.ddp = DistributedDataParallel(model, [device] if device.type == "cuda" else None, **buffers, **settings)
        self.ddp.register_forward_hook(self._seen)
        # A sum of two has one result. Of more it depends on the order, which torch changes after the first step.
        if ranks.size > 2 and device.type == "cpu": \
            self.ddp.register_comm_hook(ranks, lambda ranks, bucket: mean_in_order(ranks, bucket))

    def _seen(self, ddp: nn.Module, args: Any, out: Any) -> None:
        if torch.is_grad_enabled() and self.ddp is not None and self.ddp.require_backward_grad_sync:
            self.prepared = True

    def fits(self, model: Any) -> bool:
        """Whether it is still of this model, and of the parameters that are trained."""
        if model is not self.model or self.lazy: return False
        now = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
        return len(now) == len(self.params) and all(a is b for a, b in zip(now, self.params, strict=True))

    def alone(self, so: bool) -> Any:
        """A context in which, if `so`, no gradients are exchanged: those of more batches are to be added."""
        return self.ddp.no_sync() if so and self.ddp is not None else nullcontext()

    def backward(self, run: Any, inner: Callable[[], None], wait: bool) -> None:
        """Do `inner`, a backward pass; afterwards all gradients are the mean over the processes, unless they `wait`."""
        if wait:
            self.waiting = True
            with self.alone(True): inner()
            self.prepared = False
            return
        by_ddp = {id(p) for p in self.params} if self.prepared else set()
        try: inner()
        finally: self.prepared = False
        # What was there before is the same on all, and so in the mean, or else waited for this.
        self._sum([p for p in self._trained(run) if id(p) not in by_ddp])
        self.waiting = False

    def settle(self, run: Any) -> None:
        """Exchange what waits, where the step comes sooner than was to be foreseen."""
        if not self.waiting: return
        self.waiting = False
        self._sum(self._trained(run))

    @torch.no_grad()
    def _sum(self, params: Iterable[Tensor]) -> None:
        """The mean gradients over the processes, of one kind of numbers in one exchange; of none where all have none.
        """
        params = list(params)
        if not params: return
        has = self.ranks.sum(torch.tensor([p.grad is not None for p in params], dtype=torch.int64)).tolist()
        params = [p for p, n in zip(params, has, strict=True) if n]
        kinds = dict.fromkeys((p.dtype, p.device) for p in params)
        for kind in kinds:
            some = [p for p in params if (p.dtype, p.device) == kind]
            flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in some])
            flat = self.ranks.sum(flat) / self.ranks.size
            for p, g in zip(some, flat.split([p.numel() for p in some]), strict=True):
                if p.grad is None: p.grad = torch.empty_like(p)
                p.grad.copy_(g.view_as(p))

    def _trained(self, run: Any) -> list[Tensor]:
        """What has a gradient in the end: parameters of the model, of the loss and of the optimizer, each once."""
        loss = run.loss_func.parameters() if isinstance(run.loss_func, nn.Module) else ()
        found = {id(p): p for p in (*self.params, *loss, *params_of(run.opt)) if p.requires_grad or p.grad is not None}
        return list(found.values())


def mean_in_order(ranks: Ranks, bucket: Any) -> torch.futures.Future[Tensor]:
    """A hook of `DistributedDataParallel`: the mean gradients, the same bits whichever others are in the bucket."""
    mean: torch.futures.Future[Tensor] = ranks.sum_later(bucket.buffer()).then(lambda f: f.value() / ranks.size)
    return mean


def refuse(model: Any) -> None:
    """Raises TypeError for a model that is shared among processes already, in a way of its own."""
    if isinstance(model, DistributedDataParallel):
        raise TypeError("the model is a DistributedDataParallel, which Distributed makes for the length of a fit; give "
                        "the learner the model itself, model.module")
    sharded = [p for p in model.parameters() if type(p).__name__ == "DTensor"] if isinstance(model, nn.Module) else []
    if sharded:
        raise TypeError("the model is sharded (fully_shard): each process has a part of its parameters, and "
                        "Distributed is for those that have all; leave it out, and see runner/processes.md")
