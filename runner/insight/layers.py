"""What a norm layer is and normalises by, seen from outside, and how to look at a model without leaving a trace.

A norm layer is known by its class, if that is one of torch's, or by a protocol of some methods and buffers. The norms
of `norms` have them and a norm of your own can, without an import from anywhere:

    statistic_groups(x)     `x` as `(statistics, values)`: a row for each mean and variance that a batch has of its own,
                            with the values behind it; where images have their own, image after image
    running_moments(b)      only where training too normalises by running statistics: their mean and variance as used
                            now, `(C,)` each, and how many images they remember at batches of `b`, or None
    ranks                   only where a batch's statistics may be taken over several processes: how many these are
    pooled_moments(x)       with `ranks`: of all these, the mean and the variance, `(C,)` each, and how many images and
                            values per channel they are of, `x` being this process's batch
    statistics              only where it is not the mean and the variance that a norm takes of these values: "variance"
                            or "mean square", by whose root it divides; the mean then stays
    moved_from              only where training normalises by the batch and moves the result towards running statistics:
                            from which training step on
    activates               only where an activation is part of the norm: true
    image_groups(x)         only where a norm by each image's own statistics follows behind these in the same layer: `x`
                            as `(statistics, values)` of that one
    unclamped_var           only where the norm keeps that variance above a least one: a buffer `(C,)`, the variance
                            without it; where there is none, the buffer `running_var`

Running statistics used in evaluation are looked for as `running_mean` and `running_var`, `(C,)` each. A layer of
another kind with "Norm" in its class's name is reported as unknown.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

from runner.batches import described, leaves, to_device
from runner.states import holds_compiled, loader_states, module_states, random_states

TORCH_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
PROTOCOL = "a method statistic_groups(x) that returns x as (statistics, values)"


def known(m: nn.Module) -> bool:
    """Whether `m` is a norm layer that can be looked at."""
    return isinstance(m, TORCH_NORMS) or hasattr(m, "statistic_groups")


def norm_layers(model: nn.Module) -> tuple[dict[nn.Module, str], dict[nn.Module, str]]:
    """The norm layers of `model`, `{module: path}`, and in the same form those that are unknown.

    What lies within a norm layer is its own affair. Not unknown are modules that hold a norm layer, and torch's own.
    """
    norms: dict[nn.Module, str] = {}
    strange: dict[nn.Module, str] = {}
    within: set[nn.Module] = set()
    for path, m in model.named_modules():
        if m in within: continue
        if known(m):
            norms[m] = path
            within.update(m.modules())
        elif ("Norm" in type(m).__name__ and not type(m).__module__.startswith("torch.")
              and not any(known(inner) for inner in m.modules())): strange[m] = path
    return norms, strange


def statistic_groups(m: nn.Module, x: Tensor) -> Tensor:
    """`x`, the input of the norm layer `m`, as `(statistics, values)`: the protocol for torch's norms too.

    Of `nn.SyncBatchNorm` they are the values of this process. Shapes: `x` `(N, C, *spatial)`, for `nn.LayerNorm` and
    `nn.RMSNorm` `(*, *normalized_shape)`.
    """
    own: Callable[[Tensor], Tensor] | None = getattr(m, "statistic_groups", None)
    if own is not None: return own(x)
    if isinstance(m, _BatchNorm): return x.transpose(0, 1).flatten(1)
    if isinstance(m, nn.GroupNorm): return x.reshape(len(x) * m.num_groups, -1)
    if isinstance(m, _InstanceNorm):
        return x.flatten(1) if x.ndim == m._get_no_batch_dim() else x.flatten(0, 1).flatten(1)
    assert isinstance(m, (nn.LayerNorm, nn.RMSNorm))
    return x.reshape(-1, math.prod(m.normalized_shape))


def shared(m: nn.Module, x: Tensor) -> bool:
    """Whether the images of a batch share the statistics of the norm layer `m`: they do if two have as many as one."""
    if not hasattr(m, "statistic_groups"): return isinstance(m, _BatchNorm)
    one = x[:1]
    return len(statistic_groups(m, torch.cat((one, one)))) == len(statistic_groups(m, one))


def takes(m: nn.Module) -> str:
    """What the norm layer `m` takes of the values of a statistic: "mean and variance", "variance" or "mean square"."""
    return "mean square" if isinstance(m, nn.RMSNorm) else getattr(m, "statistics", "mean and variance")


def running_moments(m: nn.Module, b: int) -> tuple[Tensor, Tensor, float | None] | None:
    """What `m` has under this name in the protocol, at batches of `b`; None if its training is by the batch alone."""
    own: Callable[[int], tuple[Tensor, Tensor, float | None]] | None = getattr(m, "running_moments", None)
    return None if own is None else own(b)


def running_statistics(m: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Copies of the running mean and variance that the layer `m` evaluates by, `(C,)` each, or None if it has none."""
    mean, var = (getattr(m, name, None) for name in ("running_mean", "running_var"))
    return None if mean is None or var is None else (mean.clone(), var.clone())


def eps_of(m: nn.Module, x: Tensor) -> float:
    """What the norm layer `m` adds to the variance of `x`."""
    eps = getattr(m, "eps", 0.0)
    return torch.finfo(x.dtype).eps if eps is None else eps         # None: nn.RMSNorm's own way


@contextmanager
def undone(model: nn.Module, *loaders: object) -> Iterator[Callable[[], None]]:
    """What happens to `model`, the loaders and the random states is undone at the end, and whenever the function that
    this yields is called (see `module_states`). Nothing is recorded for gradients, and what is compiled runs eagerly:
    it would pass hooks by.
    """
    if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise ValueError(f"{type(model).__name__} has layers that don't know their channels yet; run one batch through "
                         "the model first")
    compiled = holds_compiled(model)
    parts = module_states(model), loader_states(*loaders), random_states()

    def restore() -> None:
        for part in parts: part()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext(): yield restore
    finally: restore()


@contextmanager
def hooked(modules: Iterable[nn.Module], before: Callable[[nn.Module, Any], None] | None = None,
           after: Callable[[nn.Module, Any, Any], None] | None = None) -> Iterator[None]:
    """`before(module, input)` and `after(module, input, output)` at every run of `modules`, until the block is left."""
    handles: list[RemovableHandle] = []

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: return next(iter((*args, *kwargs.values())), None)
    try:
        for m in modules:
            if before: handles.append(m.register_forward_pre_hook(
                lambda m, args, kwargs: before(m, given(args, kwargs)), with_kwargs=True))
            if after: handles.append(m.register_forward_hook(
                lambda m, args, kwargs, y: after(m, given(args, kwargs), y), with_kwargs=True))
        yield
    finally:
        for handle in handles: handle.remove()


def ready(model: nn.Module, xb: Any, tfm: Callable[[Any], Any] | None, caller: str) -> Any:
    """The batch, a tensor or a nest of them, as the model gets it: on the model's device, then transformed."""
    if not any(isinstance(t, torch.Tensor) for t in leaves(xb)):
        raise TypeError(f"{caller} got a batch of {type(xb).__name__}; it needs a tensor xb of images: wrap what gives "
                        "it, as in (b['image'] for b in loader)")
    own = next(iter((*model.parameters(), *model.buffers())), None)
    if own is not None: xb = to_device(xb, own.device)
    return xb if tfm is None else tfm(xb)


@contextmanager
def taken(x: object, tfm: object, caller: str) -> Iterator[None]:
    """A model in this block that is at a loss with a batch `x` that is no tensor: the error names the batch too."""
    try: yield
    except (TypeError, AttributeError) as e:
        if tfm is not None or isinstance(x, torch.Tensor): raise
        raise TypeError(f"{caller}: the model doesn't take {described(x)} ({e}); say what it gets by tfm, such as "
                        'tfm=lambda b: b["image"]') from e


def wide(t: Tensor) -> Tensor:
    """`t` without a graph in float64, in which no square overflows (float32 on MPS, which lacks it)."""
    return t.detach().to(torch.float32 if t.device.type == "mps" else torch.float64)
