"""Swap the convolutions of a finished model for another class of them, weights carried over."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from norms.counts import Counts
from norms.rivals.mabn import CentredConv2d
from norms.rivals.weight_standardization import WSConv2d

CONVS = (nn.Conv2d, CentredConv2d, WSConv2d)        # whose forward is known


class SwappedConvs(Counts):
    """How many convolutions of each class were swapped; `left_alone` counts those that were not."""


@torch.no_grad()
def convert_convs(model: nn.Module, factory: Callable[..., nn.Module]) -> SwappedConvs:
    """Swap every `nn.Conv2d` of `model`, in place, for one that `factory` makes: `WSConv2d` or `CentredConv2d`.

        convert_convs(model, WSConv2d)
        convert_norms(model, lambda nf: GroupNorm(4, nf))

    Swapped are `nn.Conv2d` and the classes of it in this package, back to `nn.Conv2d` too. Other convolutions
    (`nn.Conv1d`, transposed ones) are left as they are, and the result names them. The new layer takes the same
    `Parameter` objects, so that optimizers, their state and tied parameters stay valid, the mode, device and dtype,
    and, from one of its class, `eps`. A layer used in several places is swapped once and stays shared. After an error
    the model is as it was.

    It swaps every one. Where there is no norm behind, as often in a last layer of 1x1 convolutions, call it on the
    parts of the model that have norms.

    Args:
        model: any module that holds convolutions, at any depth.
        factory: a class that takes the arguments of `nn.Conv2d`, a subclass of it, or a `functools.partial` of one,
            such as `partial(WSConv2d, eps=1e-3)`; any function that takes them and gives a module of such a class.

    Returns:
        `Counter` of the swapped layers' class names, such as `Counter({"Conv2d": 20})`. Its `left_alone` is a `Counter`
        of the class names of the other convolutions.

    Raises:
        ValueError: no such convolution in `model`; `model` itself is one; one that can't be swapped without loss: with
            hooks or parametrizations, of a class with a forward of its own, lazy and not initialised; one that
            `factory` refuses, or makes with another weight.
        TypeError: a `factory` that is not as above.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(f"convert_convs got factory={factory!r}; {NEEDS}")
    if isinstance(model, nn.Conv2d):
        raise ValueError(f"convert_convs got a {type(model).__name__} itself; a layer is swapped inside the module "
                         "that holds it: pass that module, or nn.Sequential(layer)")
    places: list[tuple[nn.Module, str, nn.Conv2d]] = []
    new: dict[nn.Module, nn.Conv2d] = {}
    for path, parent in model.named_modules():
        for name, old in parent._modules.items():   # `named_children` would leave out a layer's second name
            if not isinstance(old, nn.Conv2d): continue
            places.append((parent, name, old))
            if old not in new: new[old] = _successor(f"{path}.{name}".lstrip("."), old, factory)
    left = Counter(type(m).__name__ for m in model.modules() if isinstance(m, _ConvNd) and m not in new)
    if not new:
        kinds = f" (it leaves {', '.join(sorted(left))} alone)" if left else ""
        raise ValueError(f"convert_convs found no convolution to swap in {type(model).__name__}{kinds}; it needs "
                         "nn.Conv2d: check that this is the model you mean")
    if len(set(new.values())) < len(new):
        raise ValueError("convert_convs got a factory that gives the same module twice; every layer needs its own: "
                         "make it inside")
    for parent, name, old in places: setattr(parent, name, new[old])
    return SwappedConvs(Counter(type(old).__name__ for old in new), left)


NEEDS = "it needs a class that takes what nn.Conv2d takes, such as norms.rivals.WSConv2d or nn.Conv2d"


def _successor(path: str, old: nn.Conv2d, factory: Callable[..., nn.Module]) -> nn.Conv2d:
    """The layer to put in the place of `old`, which stands at `path`; `old` stays as it is."""
    layer = f"convert_convs: layer {path!r} ({type(old).__name__})"
    _check_plain(layer, old)
    args = (old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
            old.bias is not None, old.padding_mode)
    make: Any = partial(factory, *args, device=old.weight.device, dtype=old.weight.dtype)
    try:
        with torch.random.fork_rng(devices=[old.weight.device] if old.weight.is_cuda else []): new = make()
    except TypeError as e:
        raise TypeError(f"{layer}: the factory raised a TypeError: {e}; {NEEDS}") from e
    except ValueError as e: raise ValueError(f"{layer}: the factory refuses it: {e}") from e
    if not isinstance(new, nn.Conv2d) or isinstance(new, LazyModuleMixin):
        raise TypeError(f"convert_convs got a factory that makes {new!r}; {NEEDS}")
    if new.weight.shape != old.weight.shape or (new.bias is None) != (old.bias is None):
        raise ValueError(f"{layer} has a weight of shape {tuple(old.weight.shape)} and "
                         f"{'no' if old.bias is None else 'a'} bias, which the factory's {new!r} can't take over; hand "
                         "all arguments that the factory gets on to the layer")
    if "bias" in old._parameters: new.bias = old.bias
    new.weight = old.weight
    if type(new) is type(old) and hasattr(old, "eps"): new.eps = old.eps
    return new.train(old.training)


def _check_plain(layer: str, old: nn.Conv2d) -> None:
    """Raise unless `old`, called `layer`, is a convolution of a known class and nothing more."""
    if isinstance(old, LazyModuleMixin):
        raise ValueError(f"{layer} doesn't know its channels yet; run one batch through the model first")
    if getattr(old.forward, "__func__", None) not in {cls.forward for cls in CONVS}:
        raise ValueError(f"{layer} has a forward of its own, and what it adds to the convolution would be lost; put a "
                         "plain nn.Conv2d and the rest in its place first")
    if old._modules or set(old._parameters) - {"weight", "bias"}:
        raise ValueError(f"{layer} is parametrized; fold that into its weight first, such as by "
                         "torch.nn.utils.parametrize.remove_parametrizations")
    if any(hooks for name, hooks in vars(old).items() if name.endswith("_hooks")):
        raise ValueError(f"{layer} has hooks, which may be meant for that layer alone; remove them, convert, and "
                         "register them on the new layer")
