"""The layer that takes a norm's place in `convert_norms`, and what it takes over from it."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from norms.batch import BatchNorm
from norms.factory import Factory, make
from norms.kinds import ACTIVATION, CHANNEL_NORMS, FAMILIES, LAYER, ON_IMAGES, frozen_class
from norms.running import CARRIED_COUNT, CLAMP_IMAGES, RunningBatchNorm
from norms.running_norm import RunningNorm
from norms.sync import ProcessRanks

FORWARDS = {cls.forward for cls in (*CHANNEL_NORMS, nn.SyncBatchNorm, *LAYER)}
IDENTITY = {"weight": 1.0, "bias": 0.0}


def successor(model: nn.Module, path: str, old: nn.Module, factory: Factory) -> nn.Module:
    """The layer to put in the place of `old`, which stands at `path` in `model`; `old` stays as it is."""
    layer = f"convert_norms: layer {path!r} ({type(old).__name__})"
    check_plain(layer, old)
    size: int | tuple[int, ...]
    if isinstance(old, LAYER): size = shape = tuple(old.normalized_shape or ())
    else:
        size = next((getattr(old, name) for name in ("nf", "num_features", "num_channels") if hasattr(old, name)), 0)
        if not size: size = len(old.get_buffer("weight"))               # FrozenBatchNorm2d
        shape = (size,)
    new = make(layer, old, factory, size)
    both_keep = all(getattr(norm, "running_mean", None) is not None for norm in (old, new))
    if frozen_class(new): check_freezable(layer, old, both_keep)
    thaws = frozen_class(old) and both_keep and not frozen_class(new)    # in training it would use the batch's own
    new.train(old.training and not thaws)
    whole = (*model.parameters(), *model.buffers())
    own = (*old.parameters(), *old.buffers())
    # The dtype not by our statistics, which are wide in a half precision model too.
    telling = (*old.parameters(), *whole) if isinstance(old, RunningNorm) else (*own, *whole)
    like, typed = (next((t for t in tensors if t.is_floating_point()), None) for tensors in ((*own, *whole), telling))
    if like is not None and typed is not None: new.to(like.device, typed.dtype)

    carry_affine(layer, old, new, shape)
    for name in ACTIVATION:
        if getattr(old, name, None) is not None and getattr(new, name, None) is not None:
            setattr(new, name, getattr(old, name))
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
    if isinstance(new, RunningNorm):
        if isinstance(old, nn.SyncBatchNorm): new.synced = ProcessRanks(old.process_group)
        if isinstance(old, RunningNorm): new.synced = old.synced
    return new


def check_plain(layer: str, old: nn.Module) -> None:
    """Raise unless `old`, called `layer`, is its class's formula and nothing more."""
    if isinstance(old, LazyModuleMixin):
        raise ValueError(f"{layer} doesn't know its channels yet; run one batch through the model first")
    cls = frozen_class(old)
    if getattr(old.forward, "__func__", None) not in (FORWARDS if cls is None else {cls.forward}):
        raise ValueError(f"{layer} has a forward of its own, and what it adds to the norm would be lost; put a plain "
                         "norm and the rest in its place first")
    if old._modules or set(old._parameters) - {*IDENTITY, *ACTIVATION}:
        raise ValueError(f"{layer} is parametrized; fold that into its weight first, such as by "
                         "torch.nn.utils.parametrize.remove_parametrizations")
    if any(hooks for name, hooks in vars(old).items() if name.endswith("_hooks")):
        raise ValueError(f"{layer} has hooks, which may be meant for that layer alone; remove them, convert, and "
                         "register them on the new layer")


def check_freezable(layer: str, old: nn.Module, both_keep: bool) -> None:
    """Raise unless a FrozenBatchNorm2d can stand in the place of `old`: statistics, and (N, C, H, W)."""
    if not both_keep:
        raise ValueError(f"{layer} keeps no running statistics, and a FrozenBatchNorm2d has nothing else to normalise "
                         "by; convert to BatchNorm, recalibrate, and convert that")
    if not isinstance(old, ON_IMAGES) and not frozen_class(old):
        raise ValueError(f"{layer} is not for images (N, C, H, W), the only input of a FrozenBatchNorm2d; use "
                         "BatchNorm, in evaluation mode and with requires_grad_(False)")


def carry_affine(layer: str, old: nn.Module, new: nn.Module, shape: tuple[int, ...]) -> None:
    """Give `new` the `weight` and `bias` of `old`, both of `shape`, or what does the same where `old` has none."""
    if isinstance(old, LAYER) and old.weight is None and type(new) in LAYER:   # as it was: both can do without
        for name in IDENTITY: setattr(new, name, None)
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


def translate_counts(old: nn.Module, new: nn.Module) -> None:
    """Between norms of two kinds: make `new` evaluate as `old` does, as far as it can, and average on from there."""
    if isinstance(old, RunningBatchNorm):
        if not isinstance(new, RunningBatchNorm) and hasattr(new, "num_batches_tracked"):
            new.get_buffer("num_batches_tracked").copy_(old.seen)
    elif isinstance(new, RunningBatchNorm):
        # Not by num_batches_tracked: older checkpoints lack it and load as 0. Statistics as made count as none.
        new.unclamped_var.copy_(new.running_var)
        trained = (old.get_buffer("running_mean") != 0).any() | (old.get_buffer("running_var") != 1).any()
        images = getattr(old, "num_batches_tracked", torch.tensor(0)).clamp_min(CLAMP_IMAGES)   # at least 1 in a batch
        new.seen.copy_(images * trained)
        new.count.copy_(CARRIED_COUNT * trained)
    if isinstance(new, RunningNorm) and (missing := [name for name in new.fresh if not hasattr(old, name)]):
        new.follow(missing)
