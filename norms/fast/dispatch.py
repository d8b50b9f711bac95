"""Whether a step may go by the kernels: the one place that decides."""

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from norms.fast import kernels
from norms.fast.repeats import same_way
from norms.running_norm import RunningNorm

N = TypeVar("N", bound=nn.Module)

_LAUNCHERS: dict[type[nn.Module], Callable[[Any, Tensor, kernels.Kernels], Tensor | None]] = {}   # of a class each


def register(norm_class: type[N], launch: Callable[[N, Tensor, kernels.Kernels], Tensor | None]) -> None:
    """Let `launch(norm, x, kernels)` take the steps of norms of just this class; it may answer None in its turn."""
    _LAUNCHERS[norm_class] = launch


@overload
def step(norm: nn.Module, x: Tensor) -> Tensor | None: ...
@overload
def step(norm: nn.Module, x: torch.fx.Proxy) -> torch.fx.Proxy: ...
def step(norm: nn.Module, x: Tensor | torch.fx.Proxy) -> Tensor | torch.fx.Proxy | None:
    """`norm(x)` by another way than its definition, or None: then the definition is to run.

    For `torch.fx.symbolic_trace`, whose stand-in for a tensor knows no shape, the norm is one node of the graph, as
    torch's own layers are.
    """
    if isinstance(x, torch.fx.Proxy):
        path = x.tracer.path_of_module(norm)    # type: ignore[attr-defined]  # what runs a module's forward is a Tracer
        return x.tracer.create_proxy("call_module", path, (x,), {})
    launch = None if torch.compiler.is_compiling() else _LAUNCHERS.get(type(norm))
    if launch is None or not plain(x) or x.ndim < 2 or not x.numel(): return None
    # The kernels take a step's statistics in one go with all else, and know nothing of other processes.
    if isinstance(norm, RunningNorm) and norm.synced is not None and norm.over_ranks(): return None
    found = same_way(norm, kernels.kernels_for(x))
    return None if found is None else launch(norm, x, found)


def plain(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor on a CPU and torch does nothing but what it is told, here and now.

    The kernels read and write bare memory. So nothing may be at work that follows torch's operators (a compiler, a
    tracer, a mode), stands in for tensors (`torch.func`), or wants another derivative than the backward one.
    """
    return type(x) is torch.Tensor and x.is_cpu and not x.is_neg() and not _watched()


def bare(g: Tensor, x: Tensor) -> bool:
    """Whether the gradient `g` and the input `x` that autograd gave back are `plain`, and `g` no batch of gradients.

    `torch.autograd.grad(..., is_grads_batched=True)` has a kind of batch that no transform announces.
    """
    return plain(g) and not _is_batch(g) and type(x) is torch.Tensor and x.is_cpu and not x.is_neg()


def refuse_many(g: Tensor) -> None:
    """Raise if `g` is many gradients in one: what averages gradients over steps must get them one by one."""
    if _transforming is not None and (_transforming() or _is_batch(g)):
        raise RuntimeError("average_backward takes in one gradient at a time and got a batch of them (vmap over a "
                           "backward pass, or is_grads_batched=True); call the backward pass once for each")


# Private names of torch, which say what nothing public does. Without one of them no step is known to be plain.
_transforming: Callable[[], bool] | None
try:
    _transforming = torch._C._are_functorch_transforms_active       # torch.func.vmap, grad, functionalize, ...
    _dispatch_modes = torch._C._len_torch_dispatch_stack            # make_fx, FakeTensorMode, selective checkpointing
    _function_modes = torch._C._len_torch_function_stack            # with torch.device(...), a user's own
    _tracing = torch._C._is_tracing                                 # torch.jit.trace
    _is_batch = torch._C._functorch.is_legacy_batchedtensor         # is_grads_batched=True
    assert isinstance(forward_ad._current_level, int)               # at least 0 within forward_ad.dual_level()
except AttributeError: _transforming = None


def _watched() -> int:      # as a truth value
    return (torch.compiler.is_compiling() or _transforming is None or _transforming() or _dispatch_modes()
            or _function_modes() or _tracing() or forward_ad._current_level >= 0)
