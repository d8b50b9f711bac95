"""SGD whose plain step is the one call that it comes to; which optimizers take more than a call."""

from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import nn, optim
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_ORDINARY = {torch.Tensor, nn.Parameter}
_is_sparse = attrgetter("is_sparse")


class SGD(optim.SGD):
    """`torch.optim.SGD`, the same to the last bit, and faster where it is plain: no momentum, no weight decay.

        p <- p - lr dL/dp

    torch has one call for this. Around it are a record for the profiler, hooks, and lists by device and dtype, which
    together are a tenth of a training step at batch size 2. Here the call is made directly; with a closure, with hooks
    on the step, and for whatever isn't plain (`momentum`, `weight_decay`, `maximize`, `differentiable`, `fused=True`,
    `foreach=False`, a rate that is a tensor, gradients that are sparse, tensors of a kind of their own), torch's step
    is taken. torch's profiler sees the call and no "Optimizer.step" around it.

    Arguments, parameter groups, schedulers and state dict are `torch.optim.SGD`'s.
    """

    def step(self, closure: Any = None) -> Any:
        """A step along the gradients at hand. Returns what `closure` returns, None without one."""
        hooks = (self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
                 or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)
        updates = [] if hooks or closure is not None else [_plain(group) for group in self.param_groups]
        if not updates or None in updates:
            # torch puts hooks around a class's step when it makes the class's first instance.
            if not getattr(optim.SGD.step, "hooked", False): optim.SGD([torch.zeros(())], lr=0.0)
            return super().step(closure)
        with torch.no_grad():
            for params, grads, lr in filter(None, updates):
                if params: torch._foreach_add_(params, grads, alpha=-lr)

    step.hooked = True      # type: ignore[attr-defined]    # it looks after hooks itself: torch needn't

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to 0 where `set_to_none` is False."""
        if not set_to_none: return super().zero_grad(False)
        for group in self.param_groups:
            for p in group["params"]: p.grad = None


def _plain(group: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor], float] | None:
    """`(parameters, gradients, lr)` of the parameters in `group` that have a gradient; None if its step isn't plain."""
    lr = group["lr"]
    if (group["momentum"] or group["weight_decay"] or group["maximize"] or group["differentiable"] or group["fused"]
            or group["foreach"] is False or not isinstance(lr, (int, float))):
        return None
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    if set(map(type, params)) | set(map(type, grads)) <= _ORDINARY and not any(map(_is_sparse, grads)):
        return params, grads, lr
    return None


def needs_closure(opt: Any) -> bool:
    """Whether `opt.step` can't be called without the argument `closure`."""
    try: closure = signature(opt.step).parameters.get("closure")    # a schedule's wrapper shows `self` too
    except (TypeError, ValueError): return False
    return closure is not None and closure.default is closure.empty
