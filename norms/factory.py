"""The factory that `convert_norms` is given: what it makes, checked, and the errors that say how to write it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from norms.group import GroupNorm
from norms.kinds import LAYER

Factory = Callable[[Any], nn.Module]    # from a channel count; a layer norm's from a `normalized_shape`
LAYER_MEND = "write lambda nf: GroupNorm(1, nf), layer norm with a weight and a bias for each channel"


def made_class(factory: Factory) -> type:
    """The class that `factory` is, or is a partial of; `object` if that can't be told without calling it."""
    while isinstance(factory, partial): factory = factory.func
    return factory if isinstance(factory, type) else object


def make(layer: str, old: nn.Module, factory: Factory, size: int | tuple[int, ...]) -> nn.Module:
    """`factory(size)`, checked: a module that may stand where `old` does."""
    try: new = factory(size)
    except TypeError as e:
        what = "normalized_shape" if isinstance(old, LAYER) else "channel count"
        # No frame below this one: the call itself didn't fit. Otherwise it is an error in the factory's own code.
        within = e.__traceback__ is not None and e.__traceback__.tb_next is not None
        mend = (f"it needs a function of the {what} alone, such as {example(factory)}" if not within
                else "that comes from within the factory, at the place that the first traceback shows")
        raise TypeError(f"{layer}: the factory, called with the {what} {size!r}, raised a TypeError: {e}; {mend}"
                        ) from e
    if not isinstance(new, nn.Module): raise TypeError(factory_text(factory, new))
    if isinstance(new, LazyModuleMixin):
        plain = getattr(new.cls_to_become, "__name__", "the class that it becomes")
        raise TypeError(f"{layer}: the factory gives a {type(new).__name__}, which has no weights to take anything "
                        f"over yet, and takes no channel count; use {plain}, the class without Lazy")
    if isinstance(old, LAYER):
        found = getattr(new, "normalized_shape", None)
        if not isinstance(new, LAYER) or found is None or tuple(found) != size:
            raise ValueError(f"{layer} has normalized_shape={size} and the factory gives {new!r}, which is no layer "
                             "norm of that shape; use norms.LayerNorm or nn.LayerNorm as the factory")
    elif isinstance(new, (*LAYER, nn.RMSNorm)) and new.normalized_shape is not None and len(new.normalized_shape) == 1:
        raise TypeError(f"{layer} works per channel of axis 1, and the factory's {type(new).__name__} of shape "
                        f"{tuple(new.normalized_shape)} would normalise the last axis; {LAYER_MEND}")
    return new


def factory_text(factory: object, made: object = None) -> str:
    """What is wrong with a `factory` that is no callable, or that made `made`."""
    what = f"factory={factory!r}" if made is None else f"a factory that makes {made!r}"
    return (f"convert_norms got {what}; it needs a callable that makes a module from a channel count, such as "
            "norms.BatchNorm or lambda nf: GroupNorm(4, nf)")


def example(factory: Factory) -> str:
    """The factory to write instead of `factory`, which asks for more than a channel count."""
    cls = made_class(factory)
    name = getattr(factory if cls is object else cls, "__name__", "<lambda>")
    if issubclass(cls, (nn.GroupNorm, GroupNorm)) or name == "<lambda>":
        return f"lambda nf: {'nn.' if cls is nn.GroupNorm else ''}GroupNorm(4, nf)"
    if issubclass(cls, LAYER): return "norms.LayerNorm or nn.LayerNorm, or a partial with more of its arguments"
    return f"lambda nf: {name}(...) with nf among its arguments"
