"""Swap the norms of a finished model for others, weights and statistics carried over."""

from collections import Counter
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from norms.batch import BatchNorm
from norms.group import GroupNorm
from norms.instance import InstanceNorm
from norms.layer import LayerNorm
from norms.moments import RunningNorm
from norms.running import CARRIED_COUNT, CLAMP_IMAGES, RunningBatchNorm

# The norms with an affine map per channel of axis 1. Within a family the formula is the same, at equal eps.
BATCH = (_BatchNorm, BatchNorm, RunningBatchNorm)
FAMILIES = (BATCH, (_InstanceNorm, InstanceNorm), (nn.GroupNorm, GroupNorm))
CHANNEL_NORMS = tuple(cls for family in FAMILIES for cls in family)
LAYER = (nn.LayerNorm, LayerNorm)       # over trailing axes, with an affine map per value of these
FORWARDS = {cls.forward for cls in (*CHANNEL_NORMS, nn.SyncBatchNorm, *LAYER)}
IDENTITY = {"weight": 1.0, "bias": 0.0}
LAYER_MEND = "write lambda nf: GroupNorm(1, nf), layer norm with a weight and a bias for each channel"
ON_IMAGES = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.SyncBatchNorm, BatchNorm, RunningBatchNorm)  # or may be


class Swapped(Counter):
    """How many layers of each class were swapped; `left_alone` counts the norms that were not."""

    def __init__(self, swapped=(), left_alone=()):
        super().__init__(swapped)
        self.left_alone = Counter(left_alone)

    def __repr__(self):
        return repr(Counter(self)) + (f", left alone: {dict(self.left_alone)}" if self.left_alone else "")

    def __reduce__(self): return Swapped, (dict(self), self.left_alone)

    def copy(self): return Swapped(self, self.left_alone)


@torch.no_grad()
def convert_norms(model, factory):
    """Swap every norm of `model` that works per channel, in place, for the one that `factory` makes.

    Swapped are torch's BatchNorm1d/2d/3d, SyncBatchNorm, InstanceNorm1d/2d/3d and GroupNorm, torchvision's
    FrozenBatchNorm2d, and this package's BatchNorm, RunningBatchNorm, InstanceNorm and GroupNorm. All other layers are
    left as they are, and the result names those that are norms. So it is with every LayerNorm and RMSNorm: the axes
    that they normalise are not one channel's (in a transformer it is the last axis, and a channel norm there would mix
    up positions and features), and neither is the shape of their weights.

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
    - `eps` along with running statistics and among norms of one formula (GroupNorm for `nn.GroupNorm`); otherwise
      the factory's holds.
    - `mom` from one batch norm to another, except torch's None. RunningBatchNorm's means something else (a batch's
      weight at batch size 2), so there the factory's holds.
    - Training or evaluation mode, device and dtype.

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


def frozen_class(module):
    """torchvision's FrozenBatchNorm2d if `module` is one, else None; known by its name, to need no torchvision."""
    return next((cls for cls in type(module).__mro__
                 if (cls.__module__, cls.__name__) == ("torchvision.ops.misc", "FrozenBatchNorm2d")), None)


def swappable(module, layers):
    """Whether `module` is a layer norm of known shape, with `layers`, and else whether it is a norm per channel."""
    if layers: return isinstance(module, LAYER) and module.normalized_shape is not None
    return isinstance(module, CHANNEL_NORMS) or frozen_class(module) is not None


def is_norm(module):
    """Whether `module` is a norm by its class's name or base; not a block around norms, nor torch's weight norm."""
    if isinstance(module, (*CHANNEL_NORMS, *LAYER)): return True
    if isinstance(module, nn.Sequential) or type(module).__module__.startswith("torch.nn.utils."): return False
    return "Norm" in type(module).__name__ and not any(is_norm(m) for m in module.children())


def made_class(factory):
    """The class that `factory` is, or is a partial of; `object` if that can't be told without calling it."""
    while isinstance(factory, partial): factory = factory.func
    return factory if isinstance(factory, type) else object


def successor(model, path, old, factory):
    """The layer to put in the place of `old`, which stands at `path` in `model`; `old` stays as it is."""
    layer = f"convert_norms: layer {path!r} ({type(old).__name__})"
    check_plain(layer, old)
    if isinstance(old, LAYER): size, shape = (tuple(old.normalized_shape),) * 2
    else:
        size = next((getattr(old, name) for name in ("nf", "num_features", "num_channels") if hasattr(old, name)), None)
        if size is None: size = len(old.weight)         # FrozenBatchNorm2d
        shape = (size,)
    new = make(layer, old, factory, size)
    both_keep = all(getattr(norm, "running_mean", None) is not None for norm in (old, new))
    if frozen_class(new): check_freezable(layer, old, both_keep)
    thaws = frozen_class(old) and both_keep and not frozen_class(new)    # in training it would use the batch's own
    new.train(old.training and not thaws)
    whole = (*model.parameters(), *model.buffers())
    own = (*old.parameters(), *old.buffers())
    # The dtype not by our statistics, which are wide in a half precision model too.
    typed = (*old.parameters(), *whole) if isinstance(old, RunningNorm) else (*own, *whole)
    like, typed = (next((t for t in tensors if t.is_floating_point()), None) for tensors in ((*own, *whole), typed))
    if like is not None: new.to(like.device, typed.dtype)

    carry_affine(layer, old, new, shape)
    for name, buffer in new.named_buffers():
        found = getattr(old, name, None)
        if found is None: continue
        if found.shape != buffer.shape:
            raise ValueError(f"{layer} has a {name} of shape {tuple(found.shape)} and the factory's "
                             f"{type(new).__name__} one of shape {tuple(buffer.shape)}, which can't take it over: make "
                             "a norm that keeps it in the same shape")
        buffer.copy_(found)
    if both_keep: translate_counts(old, new)
    if both_keep or any(isinstance(old, f) and isinstance(new, f) for f in (*FAMILIES, LAYER)): new.eps = old.eps
    if isinstance(old, (_BatchNorm, BatchNorm)) and isinstance(new, (_BatchNorm, BatchNorm)):
        mom = old.mom if isinstance(old, BatchNorm) else old.momentum
        if mom is not None: setattr(new, "mom" if isinstance(new, BatchNorm) else "momentum", mom)
    return new


def check_plain(layer, old):
    """Raise unless `old`, called `layer`, is its class's formula and nothing more."""
    if isinstance(old, LazyModuleMixin):
        raise ValueError(f"{layer} doesn't know its channels yet; run one batch through the model first")
    cls = frozen_class(old)
    if getattr(old.forward, "__func__", None) not in (FORWARDS if cls is None else {cls.forward}):
        raise ValueError(f"{layer} has a forward of its own, and what it adds to the norm would be lost; put a plain "
                         "norm and the rest in its place first")
    if old._modules or set(old._parameters) - set(IDENTITY):
        raise ValueError(f"{layer} is parametrized; fold that into its weight first, such as by "
                         "torch.nn.utils.parametrize.remove_parametrizations")
    if any(hooks for name, hooks in vars(old).items() if name.endswith("_hooks")):
        raise ValueError(f"{layer} has hooks, which may be meant for that layer alone; remove them, convert, and "
                         "register them on the new layer")


def make(layer, old, factory, size):
    """`factory(size)`, checked: a module that may stand where `old` does."""
    try: new = factory(size)
    except TypeError as e:
        what = "normalized_shape" if isinstance(old, LAYER) else "channel count"
        # No frame below this one: the call itself didn't fit. Otherwise it is an error in the factory's own code.
        mend = (f"it needs a callable that takes that alone, such as {example(factory)}" if not e.__traceback__.tb_next
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
    elif isinstance(new, (*LAYER, nn.RMSNorm)) and len(new.normalized_shape or ()) == 1:
        raise TypeError(f"{layer} works per channel of axis 1, and the factory's {type(new).__name__} of shape "
                        f"{tuple(new.normalized_shape)} would normalise the last axis; {LAYER_MEND}")
    return new


def check_freezable(layer, old, both_keep):
    """Raise unless a FrozenBatchNorm2d can stand in the place of `old`: statistics, and (N, C, H, W)."""
    if not both_keep:
        raise ValueError(f"{layer} keeps no running statistics, and a FrozenBatchNorm2d has nothing else to normalise "
                         "by; convert to BatchNorm, recalibrate, and convert that")
    if not isinstance(old, ON_IMAGES) and not frozen_class(old):
        raise ValueError(f"{layer} is not for images (N, C, H, W), the only input of a FrozenBatchNorm2d; use "
                         "BatchNorm, in evaluation mode and with requires_grad_(False)")


def carry_affine(layer, old, new, shape):
    """Give `new` the `weight` and `bias` of `old`, both of `shape`, or what does the same where `old` has none."""
    if isinstance(old, LAYER) and old.weight is None and type(new) in LAYER:   # as it was: both can do without
        new.weight = new.bias = None
        if isinstance(new, nn.LayerNorm): new.elementwise_affine = False
        return
    for name, value in IDENTITY.items():
        p, q = getattr(old, name, None), getattr(new, name, None)
        lost = q is None and p is not None and (p.requires_grad or (p != value).any())
        if lost or (q is not None and q.shape != shape):
            has = f"has a {name} of shape {tuple(q.shape)}" if q is not None else f"has no {name}"
            mend = ("make a norm with one for each channel, such as GroupNorm(1, nf) for layer norm"
                    if not isinstance(old, LAYER) else "use norms.LayerNorm or nn.LayerNorm as they are")
            raise ValueError(f"{layer} needs a {name} of shape {shape} in its place and the factory's "
                             f"{type(new).__name__} {has}; {mend}")
        if q is None or name in new._buffers: continue                  # buffers are taken over with the statistics
        if p is not None and name not in old._buffers: setattr(new, name, p)
        else: (q.fill_(value) if p is None else q.copy_(p)).requires_grad_(False)


def translate_counts(old, new):
    """Between a RunningBatchNorm and another norm: make `new` evaluate as `old` does, and average on from there."""
    if isinstance(old, RunningBatchNorm) == isinstance(new, RunningBatchNorm): return
    if isinstance(old, RunningBatchNorm):
        if hasattr(new, "num_batches_tracked"): new.num_batches_tracked.copy_(old.seen)
        return
    # Not by num_batches_tracked: older checkpoints lack it and load as 0. Statistics as made count as none.
    new.unclamped_var.copy_(new.running_var)
    trained = (old.running_mean != 0).any() | (old.running_var != 1).any()
    images = getattr(old, "num_batches_tracked", torch.tensor(0)).clamp_min(CLAMP_IMAGES)  # at least 1 in a batch
    new.seen.copy_(images * trained)
    new.count.copy_(CARRIED_COUNT * trained)


def factory_text(factory, made=None):
    """What is wrong with a `factory` that is no callable, or that made `made`."""
    what = f"factory={factory!r}" if made is None else f"a factory that makes {made!r}"
    return (f"convert_norms got {what}; it needs a callable that makes a module from a channel count, such as "
            "norms.BatchNorm or lambda nf: GroupNorm(4, nf)")


def example(factory):
    """The factory to write instead of `factory`, which asks for more than a channel count."""
    cls = made_class(factory)
    name = getattr(factory if cls is object else cls, "__name__", "<lambda>")
    if issubclass(cls, (nn.GroupNorm, GroupNorm)) or name == "<lambda>":
        return f"lambda nf: {'nn.' if cls is nn.GroupNorm else ''}GroupNorm(4, nf)"
    if issubclass(cls, LAYER): return "norms.LayerNorm or nn.LayerNorm, or a partial with more of its arguments"
    return f"lambda nf: {name}(...) with nf among its arguments"


def nothing_to_swap(model, factory, layers, left):
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
