"""SGD for networks side by side, each with a rate of its own."""

from collections.abc import Iterable

import torch
from torch import Tensor

from experiments.optimizer import Optimizer


class StackedSGD(Optimizer):
    """`torch.optim.SGD` for a `stack` of K networks, each with its own rate; alone it would train each the same.

        d <- dL/dp + weight_decay p
        b <- momentum b + d                     d at the first step
        p <- p - lr_k b                         without momentum d, with nesterov d + momentum b

    Where all have one rate, `runner.SGD` does it in fewer operations.

    Args:
        params: those of the stack: the K networks' along axis 0.
        lr: the rates, a tensor `(K,)`; a `ParamScheduler` may put another in its place.
        momentum, weight_decay, nesterov: as in `torch.optim.SGD`, one for all.

    Raises:
        ValueError: rates that are no `(K,)` or below 0; momentum or weight decay below 0; a parameter whose axis 0 K
            does not divide.
    """

    def __init__(self, params: Iterable[Tensor], lr: Tensor, momentum: float = 0.0, weight_decay: float = 0.0,
                 nesterov: bool = False) -> None:
        if not torch.is_tensor(lr) or lr.ndim != 1 or not bool((lr >= 0).all()):
            raise ValueError(f"StackedSGD got lr={lr!r}; it needs a tensor of rates, one for each network and none "
                             "below 0, such as torch.tensor([0.1, 0.4]); for one rate take runner.SGD")
        if momentum < 0 or weight_decay < 0 or (nesterov and not momentum):
            raise ValueError(f"StackedSGD got momentum={momentum}, weight_decay={weight_decay}, nesterov={nesterov}; "
                             "the first two must be at least 0, and Nesterov's way needs a momentum")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "nesterov": nesterov})
        odd = [tuple(p.shape) for group in self.param_groups for p in group["params"]
               if p.ndim == 0 or p.shape[0] % len(lr)]
        if odd:
            raise ValueError(f"StackedSGD got {len(lr)} rates and parameters of the shapes {odd}; it needs those of a "
                             f"stack of {len(lr)} networks, whose axis 0 has the networks' parts")

    def update(self) -> None:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            momentum, decay, rates = group["momentum"], group["weight_decay"], group["lr"]
            k, found = len(rates), {}       # the rates, carried once to where the parameters are
            for p in group["params"]:
                if p.grad is None: continue
                d = p.grad.add(p, alpha=decay) if decay else p.grad
                if momentum:
                    b = self.state[p].get("momentum_buffer")
                    if b is None: b = self.state[p]["momentum_buffer"] = d.clone()
                    else: b.mul_(momentum).add_(d)
                    d = d.add(b, alpha=momentum) if group["nesterov"] else b
                kind = p.device, p.dtype
                if kind not in found: found[kind] = rates.to(*kind)
                lr = found[kind].view(k, *[1] * p.ndim)
                p.unflatten(0, (k, -1)).addcmul_(d.unflatten(0, (k, -1)), lr, value=-1)
