"""Swap the norms of a finished model for others, weights and statistics carried over."""

from collections import Counter

import torch
from torch import nn

from norms.counts import Counts
from norms.factory import LAYER_MEND, Factory, factory_text, made_class
from norms.kinds import LAYER, is_norm, swappable
from norms.running import CARRIED_COUNT
from norms.successor import successor

__all__ = ["CARRIED_COUNT", "Swapped", "convert_norms"]


class Swapped(Counts):
    """How many layers of each class were swapped; `left_alone` counts the norms that were not."""


@torch.no_grad()
def convert_norms(model: nn.Module, factory: Factory) -> Swapped:
    """Swap every norm of `model` that works per channel, in place, for the one that `factory` makes.

    Swapped are torch's BatchNorm1d/2d/3d, SyncBatchNorm, InstanceNorm1d/2d/3d and GroupNorm, torchvision's
    FrozenBatchNorm2d, and this package's BatchNorm, RunningBatchNorm, InstanceNorm, GroupNorm and `norms.rivals`. All
    other layers are left as they are, and the result names those that are norms. So it is with every
    LayerNorm and RMSNorm: the axes that they normalise are not one channel's (in a transformer it is the last axis, and
    a channel norm there would mix up positions and features), and neither is the shape of their weights.

    A layer norm becomes a layer norm and nothing else: where `factory` is `norms.LayerNorm` or `nn.LayerNorm`, a
    subclass or a `functools.partial` of one, it is called with the `normalized_shape` of each layer norm, and the norms
    per channel are the ones left alone. The lesson's `LayerNorm()`, whose shape only its input tells, is left too.

    What the new layer takes from the old one:

    - `weight` and `bias`: the same `Parameter` objects. Optimizers, their state and tied parameters stay valid, and
      `requires_grad` stays. Where the old layer has none (`affine=False`; a layer norm with `bias=False`) the new one's
      are ones and zeros and don't require a gradient: the function is the same and nothing new starts to train. A new
      layer without affine map is refused, except in the place of such ones and zeros. A layer norm without affine map
      becomes one without.
    - Running statistics, where both keep them, so that evaluation gives the same output. A RunningBatchNorm takes
      those of a trained batch norm as already seen: it doesn't clamp them (`seen` is at least 20), and they have a
      share in the averages of the training to come, a small one on large maps (`count` is `CARRIED_COUNT`, where
      the reason stands). On the way back the variance is the clamped one if the clamp was in force, and
      `num_batches_tracked` is `seen`. Where the old layer kept none, the new one's are untrained: train or
      `recalibrate` before evaluation. The averages of `average_backward=True` go only to another such norm.
      BatchRenorm and MomentumBatchNorm take them as a BatchNorm does, their schedules at step `num_batches_tracked`,
      and the latter trains on from them. MABN, which takes no mean away, makes the second moment of them: there
      evaluation is another function. The way back gives a mean of 0, and the same output.
    - `eps` along with running statistics and among norms of one formula (GroupNorm for `nn.GroupNorm`); otherwise
      the factory's holds.
    - `mom` from one batch norm to another, except torch's None. RunningBatchNorm's means something else (a batch's
      weight at batch size 2), so there the factory's holds.
    - Training or evaluation mode, device and dtype.
    - The mark of `sync_norms`, from one norm of this package's to another; and an nn.SyncBatchNorm's group.

    Activations are left where they stand. FilterResponseNorm and EvoNormS0 have one of their own: they bring it along
    and take it away again. So take a ReLU behind them out of the model (`preflight` names it): it would cut off what
    they leave below 0. Where the model has none behind its norm, as before a residual sum, it gets one: there use
    `lambda nf: FilterResponseNorm(nf, activation=False)`. Their `tau` and `v` go only to another layer of the class; in
    the place of any other norm they are new parameters, for the optimizer to be told of.

    torchvision's FrozenBatchNorm2d holds weight, bias and statistics as buffers and evaluates always. The norm in its
    place gets the first two as parameters that don't require a gradient, and is in evaluation mode if it takes the
    statistics: keep it there (`model.train()` undoes it) to keep the function. The other way the parameters become
    buffers, copies: nothing trains them, and an optimizer made before goes on holding the old ones.

    A layer used in several places is swapped once and stays shared. After an error the model is as it was.

    Args:
        model: any module that holds norms, at any depth.
        factory: a callable from a channel count to a new module with `weight` and `bias` `(C,)`, such as
            `norms.RunningBatchNorm`, `nn.BatchNorm2d` or `lambda nf: GroupNorm(4, nf)`; or, as above, a LayerNorm
            class, from a `normalized_shape`.

    Returns:
        `Counter` of the swapped layers' class names, such as `Counter({"BatchNorm2d": 20})`. Its `left_alone` is a
        `Counter` of the class names of the other norms, which are those with "Norm" in their class name.

    Raises:
        ValueError: no norm in `model`; `model` itself is one; a norm that can't be swapped without loss: with hooks or
            parametrizations, of a class with a forward of its own, lazy and not initialised; a new layer whose
            parameters or statistics have another shape; a FrozenBatchNorm2d for a layer without statistics or not of
            images.
        TypeError: a `factory` that is not such a callable: no callable, in need of more than a channel count, one that
            gives lazy modules or norms over the last axis in a channel norm's place, or that raises a TypeError.
    """
    if isinstance(factory, nn.Module) or not callable(factory): raise TypeError(factory_text(factory))
    layers = issubclass(made_class(factory), LAYER)
    if swappable(model, layers):
        raise ValueError(f"convert_norms got a {type(model).__name__} itself; a layer is swapped inside the module "
                         "that holds it: pass that module, or nn.Sequential(layer)")
    places, new = [], {}
    for path, parent in model.named_modules():
        for name, old in parent._modules.items():   # `named_children` would leave out a layer's second name
            if not swappable(old, layers): continue
            places.append((parent, name, old))
            if old not in new: new[old] = successor(model, f"{path}.{name}".lstrip("."), old, factory)
    left = Counter(type(m).__name__ for m in model.modules() if m not in new and is_norm(m))
    if not new: raise nothing_to_swap(model, factory, layers, left)
    if len(set(new.values())) < len(new):
        raise ValueError("convert_norms got a factory that gives the same module twice; every layer needs its own: "
                         "make it inside, as lambda nf: GroupNorm(4, nf) does")
    for parent, name, old in places: setattr(parent, name, new[old])
    return Swapped(Counter(type(old).__name__ for old in new), left)


def nothing_to_swap(model: nn.Module, factory: Factory, layers: bool, left: Counter[str]) -> TypeError | ValueError:
    """The error for a `model` in which `factory` has nothing to replace, with the norms that it leaves."""
    kinds = ", ".join(sorted(left))
    if layers and any(swappable(m, False) for m in model.modules()):
        name = made_class(factory).__name__
        return TypeError(f"convert_norms got factory={name}, which is for layer norms of known shape, and the norms in "
                         f"{type(model).__name__} are {kinds}; {name}(nf) in a channel norm's place would normalise "
                         f"the last axis: {LAYER_MEND}")
    needs = "layer norms with a normalized_shape" if layers else "batch, instance or group norms"
    more = "" if layers or not any(swappable(m, True) for m in model.modules()) else \
        " (layer norms are replaced by norms.LayerNorm or nn.LayerNorm as the factory, or a partial of it)"
    return ValueError(f"convert_norms found no norm to swap in {type(model).__name__}"
                      f"{f' (it leaves {kinds} alone)' if kinds else ''}; it needs {needs}{more}: check that this is "
                      "the model you mean")
