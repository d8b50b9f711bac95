"""Swap the norms of a finished model for others, weights and statistics carried over."""

from collections import Counter

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from norms.batch import BatchNorm
from norms.group import GroupNorm
from norms.instance import InstanceNorm
from norms.running import CARRIED_COUNT, CLAMP_IMAGES, RunningBatchNorm

# The norms with an affine map per channel of axis 1. Within a family the formula is the same, at equal eps.
BATCH = (_BatchNorm, BatchNorm, RunningBatchNorm)
FAMILIES = (BATCH, (_InstanceNorm, InstanceNorm), (nn.GroupNorm, GroupNorm))
CHANNEL_NORMS = tuple(cls for family in FAMILIES for cls in family)
FORWARDS = {cls.forward for cls in (*CHANNEL_NORMS, nn.SyncBatchNorm)}
IDENTITY = {"weight": 1.0, "bias": 0.0}

@torch.no_grad()
def convert_norms(model, factory):
    """Swap every norm of `model` that works per channel, in place, for the one that `factory` makes.

    Swapped are torch's BatchNorm1d/2d/3d, SyncBatchNorm, InstanceNorm1d/2d/3d and GroupNorm and this package's
    BatchNorm, RunningBatchNorm, InstanceNorm and GroupNorm. All other layers are left as they are; so is every
    LayerNorm and RMSNorm: the axes that they normalise are not one channel's (in a transformer it is the last axis, and
    a channel norm there would mix up positions and features), and neither is the shape of their weights.

    What the new layer takes from the old one:

    - `weight` and `bias`: the same `Parameter` objects. Optimizers, their state and tied parameters stay valid, and
      `requires_grad` stays. Where the old layer has none (`affine=False`) the new one's are ones and zeros and don't
      require a gradient: the function is the same and nothing new starts to train. A new layer without affine map is
      refused, except in the place of such ones and zeros.
    - Running statistics, where both keep them, so that evaluation gives the same output. A RunningBatchNorm takes
      those of a trained batch norm as already seen: it doesn't clamp them (`seen` is at least 20), and they have a
      share in the averages of the training to come, a small one on large maps (`count` is `CARRIED_COUNT`, where
      the reason stands). On the way back the variance is the clamped one if the clamp was in force, and
      `num_batches_tracked` is `seen`. Where the old layer kept none, the new one's are untrained: train or
      `recalibrate` before evaluation.
    - `eps` along with running statistics and among norms of one formula (GroupNorm for `nn.GroupNorm`); otherwise
      the factory's holds.
    - `mom` from one batch norm to another, except torch's None. RunningBatchNorm's means something else (a batch's
      weight at batch size 2), so there the factory's holds.
    - Training or evaluation mode, device and dtype.

    A layer used in several places is swapped once and stays shared. After an error the model is as it was.

    Args:
        model: any module that holds norms, at any depth.
        factory: a callable from a channel count to a new module with `weight` and `bias` `(C,)`, such as
            `norms.RunningBatchNorm`, `nn.BatchNorm2d` or `lambda nf: GroupNorm(4, nf)`.

    Returns:
        `Counter` of the swapped layers' class names, such as `Counter({"BatchNorm2d": 20})`.

    Raises:
        ValueError: no norm in `model`; `model` itself is one; a norm that can't be swapped without loss: with hooks or
            parametrizations, of a class with a forward of its own, lazy and not initialised; a new layer whose
            parameters or statistics have another shape.
        TypeError: a `factory` that is not such a callable.
    """
    if isinstance(factory, nn.Module) or not callable(factory): raise TypeError(factory_text(factory))
    if isinstance(model, CHANNEL_NORMS):
        raise ValueError(f"convert_norms got a {type(model).__name__} itself; a layer is swapped inside the module "
                         "that holds it: pass that module, or nn.Sequential(layer)")
    places, new = [], {}
    for path, parent in model.named_modules():
        for name, old in parent._modules.items():   # `named_children` would leave out a layer's second name
            if not isinstance(old, CHANNEL_NORMS): continue
            places.append((parent, name, old))
            if old not in new: new[old] = successor(model, f"{path}.{name}".lstrip("."), old, factory)
    if not new:
        others = sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__})
        left = f" (it leaves {', '.join(others)} alone)" if others else ""
        raise ValueError(f"convert_norms found no norm to swap in {type(model).__name__}{left}; it needs batch, "
                         "instance or group norms: check that this is the model you mean")
    if len(set(new.values())) < len(new):
        raise ValueError("convert_norms got a factory that gives the same module twice; every layer needs its own: "
                         "make it inside, as lambda nf: GroupNorm(4, nf) does")
    for parent, name, old in places: setattr(parent, name, new[old])
    return Counter(type(old).__name__ for old in new)


def successor(model, path, old, factory):
    """The layer to put in the place of `old`, which stands at `path` in `model`; `old` stays as it is."""
    layer = f"convert_norms: layer {path!r} ({type(old).__name__})"
    if isinstance(old, LazyModuleMixin):
        raise ValueError(f"{layer} doesn't know its channels yet; run one batch through the model first")
    if getattr(old.forward, "__func__", None) not in FORWARDS:
        raise ValueError(f"{layer} has a forward of its own, and what it adds to the norm would be lost; put a plain "
                         "norm and the rest in its place first")
    if old._modules or set(old._parameters) - set(IDENTITY):
        raise ValueError(f"{layer} is parametrized; fold that into its weight first, such as by "
                         "torch.nn.utils.parametrize.remove_parametrizations")
    if any(hooks for name, hooks in vars(old).items() if name.endswith("_hooks")):
        raise ValueError(f"{layer} has hooks, which may be meant for that layer alone; remove them, convert, and "
                         "register them on the new layer")

    nf = next(getattr(old, name) for name in ("nf", "num_features", "num_channels") if hasattr(old, name))
    new = factory(nf)
    if not isinstance(new, nn.Module): raise TypeError(factory_text(factory, new))
    new.train(old.training)
    tensors = (*old.parameters(), *old.buffers(), *model.parameters(), *model.buffers())
    like = next((t for t in tensors if t.is_floating_point()), None)
    if like is not None: new.to(like.device, like.dtype)

    for name, value in IDENTITY.items():
        p, q = getattr(old, name, None), getattr(new, name, None)
        lost = q is None and p is not None and (p.requires_grad or (p != value).any())
        if lost or (q is not None and q.shape != (nf,)):
            has = f"has a {name} of shape {tuple(q.shape)}" if q is not None else f"has no {name}"
            raise ValueError(f"{layer} needs a {name} of shape ({nf},) in its place and the factory's "
                             f"{type(new).__name__} {has}; make a norm with one for each channel, such as "
                             "GroupNorm(1, nf) for layer norm")
        if p is not None and q is not None: setattr(new, name, p)
        elif q is not None: q.fill_(value).requires_grad_(False)
    for name, buffer in new.named_buffers():
        found = getattr(old, name, None)
        if found is None: continue
        if found.shape != buffer.shape:
            raise ValueError(f"{layer} has a {name} of shape {tuple(found.shape)} and the factory's "
                             f"{type(new).__name__} one of shape {tuple(buffer.shape)}, which can't take it over: make "
                             "a norm that keeps it in the same shape")
        buffer.copy_(found)
    both_keep = getattr(old, "running_mean", None) is not None and getattr(new, "running_mean", None) is not None
    if both_keep: translate_counts(old, new)
    if both_keep or any(isinstance(old, f) and isinstance(new, f) for f in FAMILIES): new.eps = old.eps
    if isinstance(old, (_BatchNorm, BatchNorm)) and isinstance(new, (_BatchNorm, BatchNorm)):
        mom = old.mom if isinstance(old, BatchNorm) else old.momentum
        if mom is not None: setattr(new, "mom" if isinstance(new, BatchNorm) else "momentum", mom)
    return new


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
