"""Several networks of one architecture trained as one: at batch size 2 that costs little more than one of them.

There nearly all time is per-operation overhead. K networks side by side, with their channels on one axis and their
convolutions and norms in K groups, take as many operations as one of them.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from experiments.models import AvgPool, GeneralRelu, Lambda, Residual, ResidualBlock, flatten
from experiments.study.stacked_layers import GroupedConv2d, GroupedLayerNorm, GroupedLinear, KeepApart, PerImage
from experiments.study.stacked_rivals import GroupedCentredConv2d, GroupedSkipInit, GroupedWSConv2d
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm, SteadyBatchNorm
from norms.rivals import (
    MABN,
    BatchChannelNorm,
    BatchRenorm,
    CentredConv2d,
    EvoNormS0,
    FilterResponseNorm,
    MomentumBatchNorm,
    RunningChannelNorm,
    SkipInit,
    WSConv2d,
)

M = TypeVar("M", bound=nn.Module)

# Without parameters, and every channel goes through them alike and alone.
ALIKE: tuple[type[nn.Module], ...] = (
    GeneralRelu, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold,
    nn.Identity, AvgPool, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
    nn.ZeroPad2d)
# Without parameters, and every image goes through them alone.
PER_IMAGE: tuple[type[nn.Module], ...] = (nn.Softmax, nn.LogSoftmax, nn.LocalResponseNorm, nn.Unflatten)
# They compute by the layers in them, and by what treats channels alike and alone.
OF_LAYERS: tuple[type[nn.Module], ...] = (nn.Sequential, nn.ModuleList, nn.ModuleDict, Residual, ResidualBlock)
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)

_MAKERS: dict[type[nn.Module], Callable[[Any, int], nn.Module] | None] = {}     # None: one that computes by its layers


def stack(models: Iterable[nn.Module]) -> nn.Module:
    """One network that computes what each of the K `models` does, each on images of its own.

    It has the tree of one of them. Every parameter is those of the K models, in their order, along axis 0, and so is
    every buffer per channel; buffers that are scalars must agree. So elementwise optimizers train it as they would
    train each alone, if the loss is the sum of the models' losses. (`StackedSGD` has a rate for each.) To rounding,
    each becomes what it would alone: weights, buffers, what it computes in evaluation. Hooks stay with the models.

    Args:
        models: networks of `nn.Sequential`, residual blocks, convolutions, `nn.Linear`, the norms, pooling and
            activations of torch and of this project, `nn.Flatten`, and what `register` was told of.

    Shapes: the network takes `(N, K C, H, W)`, for each image position the K models' images, and gives `(N, K c)`.

    Raises:
        TypeError: a layer that can't be stacked.
        ValueError: no models, models that differ in more than values, or scalar buffers that differ.
    """
    models = list(models)
    if not models: raise ValueError("stack got no models; it needs at least one")
    for model in models[1:]: _check_alike(models[0], model)
    with torch.random.fork_rng(devices=[]): stacked = side_by_side(models[0], len(models))
    whole, parts = dict(_tensors(stacked)), [dict(_tensors(m)) for m in models]
    if list(whole) != list(parts[0]) or _distinct(stacked) != _distinct(models[0]):
        raise TypeError(f"stack made a network with the parameters and buffers {list(whole)} of one with "
                        f"{list(parts[0])}; the function given to register must make a layer with the same ones, and "
                        "layers must not share a parameter")
    with torch.no_grad():
        for name, t in whole.items():
            joint = _joined(name, [part[name] for part in parts])
            if joint.shape != t.shape:
                raise TypeError(f"stack made {name!r} of shape {tuple(t.shape)} and has values of shape "
                                f"{tuple(joint.shape)}; the function given to register must make a layer with the "
                                "networks' along axis 0")
            t.copy_(joint)
            t.requires_grad_(parts[0][name].requires_grad)
    return stacked


@torch.no_grad()
def unstack(stacked: nn.Module, models: Sequence[nn.Module]) -> None:
    """Put the parameters and buffers of the network `stacked` back into the `models` that it was made of, in order."""
    whole = dict(_tensors(stacked))
    for k, model in enumerate(models):
        for name, t in _tensors(model):
            new = whole[name]
            if isinstance(t, nn.Parameter) or t.ndim: new = new.chunk(len(models))[k].view(t.shape)
            t.copy_(new)


def register(layer: type[M], make: Callable[[M, int], nn.Module] | None = None) -> None:
    """Tell `stack` of a class of layers of one's own.

        register(Block)                                         # computes by its layers, as x + self.body(x)
        register(Shuffle, PerImage)                             # keeps nothing, each image by itself
        register(Scale, lambda m, k: Scale(k * m.channels))     # anything else

    Args:
        layer: the class; a subclass of it is another.
        make: `make(m, K)` gives the layer for K networks, whose channels lie along axis 1, network after network: with
            parameters and buffers of the same names, the K networks' along axis 0. Their values are put in afterwards.
            None for a module whose forward calls the modules in it and treats channels alike and alone otherwise, and
            which has no parameters of its own.
    """
    _MAKERS[layer] = make


def side_by_side(m: nn.Module, k: int, at: str = "", made: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """The layer `m` for `k` networks; its values are still to come.

    `at` is where it is in the network, for errors; `made` are those that there are already, for one used twice.

    Raises:
        TypeError: a layer that can't be stacked.
    """
    made = {} if made is None else made
    if m in made: return made[m]
    if type(m) not in _MAKERS: raise TypeError(_refusal(m, at))
    make = _MAKERS[type(m)]
    if make is None: new = _of_layers(m, k, at, made)
    else:
        try: new = make(m, k)
        except _Refused as e:
            raise TypeError(f"stack can't put {type(m).__name__}{_place(at)} side by side: {e}") from None
        like = next((t for _, t in _tensors(m) if t.is_floating_point()), None)
        if like is not None: new = new.to(like.device, like.dtype)
        new.train(m.training)
    made[m] = new
    return new


def _of_layers(m: nn.Module, k: int, at: str, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """`m` with layers for `k` networks in the place of its own."""
    own = [name for name, _ in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))]
    if own:
        raise TypeError(f"stack can't put {type(m).__name__}{_place(at)} side by side: it has {own} of its own; tell "
                        "register by what function to make it for K networks")
    new = copy.copy(m)
    for name, v in vars(m).items():     # what modules keep in dicts would be the model's own
        if isinstance(v, dict): vars(new)[name] = type(v)() if "_hooks" in name else v.copy()
    for name, child in m._modules.items():          # `named_children` leaves out one that comes again
        if child is not None: new._modules[name] = side_by_side(child, k, f"{at}.{name}" if at else name, made)
    return new


class _Refused(Exception):
    """Why a layer of a known class can't be stacked as it is."""


def _refusal(m: nn.Module, at: str) -> str:
    name = type(m).__name__
    known = [cls.__name__ for cls in _MAKERS if cls not in (*ALIKE, *DROPOUT)]
    return (f"stack can't put {name}{_place(at)} side by side; it takes nn.Sequential, {', '.join(known[1:])}, "
            "activations and pooling: for a layer of your own, call "
            f"experiments.study.stacked.register({name}, ...)")


def _place(at: str) -> str: return f" (at {at!r})" if at else ""


# --- the layers ---------------------------------------------------------------------------------------------------

def _as_it_is(m: nn.Module, k: int) -> nn.Module: return copy.deepcopy(m)


def _conv(m: Any, k: int) -> nn.Module:
    grouped = {nn.Conv2d: GroupedConv2d, CentredConv2d: GroupedCentredConv2d, WSConv2d: GroupedWSConv2d}
    cls: Any = grouped.get(type(m), type(m))
    more = {"eps": m.eps} if isinstance(m, WSConv2d) else {}
    new: nn.Module = cls(k * m.in_channels, k * m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation,
                         k * m.groups, m.bias is not None, m.padding_mode, **more)
    return new


def _norm_per_channel(m: Any, k: int) -> nn.Module:
    cls = type(m)
    new: nn.Module = cls(k * m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats)
    return new


def _running_batch_norm(m: RunningBatchNorm, k: int) -> nn.Module:
    new = RunningBatchNorm(k * m.nf, m.mom, m.eps, m.weight is not None, rule=m.rule,
                           average_backward=m.average_backward, evaluation_memory=m.evaluation_memory)
    return _as(m, new, k)


def _as(m: RunningBatchNorm, new: RunningBatchNorm, k: int) -> nn.Module:
    """`new`, for `k` networks, with what is not in the constructor's arguments of `m`."""
    new.clamp_images, new.clamp_var = m.clamp_images, m.clamp_var       # a network may have its own
    if m.average_backward: KeepApart(new, k)
    return new


def _running_channel_norm(m: RunningChannelNorm, k: int) -> nn.Module:
    new = RunningChannelNorm(k * m.nf, k * m.num_groups, m.mom, m.eps, m.weight is not None, rule=m.rule,
                             average_backward=m.average_backward, evaluation_memory=m.evaluation_memory,
                             constant_statistics=m.constant_statistics)
    return _as(m, new, k)


def _steady_batch_norm(m: SteadyBatchNorm, k: int) -> nn.Module:
    new = SteadyBatchNorm(k * m.nf, k * m.num_groups, m.mom, m.eps, m.weight is not None,
                          evaluation_memory=m.evaluation_memory)
    return _as(m, new, k)


def _flatten(m: nn.Flatten, k: int) -> nn.Module:
    if m.start_dim < 1: raise _Refused("it takes images together; use start_dim=1")
    return _as_it_is(m, k)


def _lambda(m: Lambda, k: int) -> nn.Module:
    if m.func is not flatten:
        raise _Refused("nobody knows what its function does with the channels, but for flatten; make it a module and "
                       "tell experiments.study.stacked.register of it")
    return nn.Flatten()         # what comes may be laid out channels last, which no view can flatten


def _dropout(m: Any, k: int) -> nn.Module:
    if getattr(m, "p", 1):
        raise _Refused("what it draws comes from one source of random numbers, so no network would be trained as it is "
                       "alone; take p=0, or train the networks one by one")
    return _as_it_is(m, k)


def _per_image(m: Any, k: int) -> nn.Module:
    if getattr(m, "dim", 1) in (0, None):
        raise _Refused(f"it has dim={m.dim}, which takes images together or depends on their shape; use dim=1")
    return PerImage(_as_it_is(m, k), k)


for _layer in OF_LAYERS: register(_layer)
for _layer in ALIKE: register(_layer, _as_it_is)
for _layer in PER_IMAGE: register(_layer, _per_image)
for _layer in DROPOUT: register(_layer, _dropout)
for _conv_layer in (nn.Conv2d, nn.Conv1d, nn.Conv3d, CentredConv2d, WSConv2d): register(_conv_layer, _conv)
register(nn.Linear, lambda m, k: GroupedLinear(k, m.in_features, m.out_features, m.bias is not None))
for _norm in (nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm1d, nn.InstanceNorm3d):
    register(_norm, _norm_per_channel)
register(nn.GroupNorm, lambda m, k: nn.GroupNorm(k * m.num_groups, k * m.num_channels, m.eps, m.affine))
register(nn.LayerNorm, lambda m, k: GroupedLayerNorm(k, m))
register(LayerNorm, lambda m, k: GroupedLayerNorm(k, m))
register(BatchNorm, lambda m, k: BatchNorm(k * m.nf, m.mom, m.eps, m.weight is not None))
register(InstanceNorm, lambda m, k: InstanceNorm(k * m.nf, m.eps, m.weight is not None))
register(GroupNorm, lambda m, k: GroupNorm(k * m.num_groups, k * m.num_channels, m.eps, m.weight is not None))
register(RunningBatchNorm, _running_batch_norm)
register(BatchChannelNorm, lambda m, k: BatchChannelNorm(k * m.nf, k * m.num_groups, m.mom, m.eps,
                                                         m.weight is not None))
register(RunningChannelNorm, _running_channel_norm)
register(SteadyBatchNorm, _steady_batch_norm)
register(BatchRenorm, lambda m, k: BatchRenorm(k * m.nf, m.mom, m.eps, m.weight is not None, rmax=m.rmax, dmax=m.dmax,
                                               begin=m.begin, rmax_at=m.rmax_at, dmax_at=m.dmax_at))
register(MomentumBatchNorm, lambda m, k: MomentumBatchNorm(k * m.nf, m.mom, m.eps, m.weight is not None, m0=m.m0,
                                                           steps=m.steps))
register(MABN, lambda m, k: MABN(k * m.nf, m.mom, m.eps, m.weight is not None, window=m.window, warmup=m.warmup,
                                 r_from=m.r_from, limit=m.limit))
register(EvoNormS0, lambda m, k: EvoNormS0(k * m.nf, k * m.groups, m.eps, m.weight is not None))
register(FilterResponseNorm, lambda m, k: FilterResponseNorm(k * m.nf, m.eps, m.weight is not None,
                                                             activation=m.activates))
register(SkipInit, lambda m, k: GroupedSkipInit(k))
register(nn.Flatten, _flatten)
register(Lambda, _lambda)


# --- the values ---------------------------------------------------------------------------------------------------

def _tensors(m: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters and buffers."""
    yield from m.named_parameters(remove_duplicate=False)
    yield from m.named_buffers(remove_duplicate=False)


def _distinct(m: nn.Module) -> int: return len({id(t) for _, t in _tensors(m)})


def _joined(name: str, tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    if first.ndim: return torch.cat(tensors)
    if isinstance(first, nn.Parameter): return torch.stack(tensors)
    if any(not torch.equal(t, first) for t in tensors):
        raise ValueError(f"stack got models whose {name!r} differ, {[t.item() for t in tensors]}; a stack has one for "
                         "all: stack models that have seen the same number of batches of the same size")
    return first


def _check_alike(a: nn.Module, b: nn.Module) -> None:
    """Raise unless `a` and `b` differ in nothing but values."""
    for (at, one), (name, other) in zip_longest(a.named_modules(), b.named_modules(), fillvalue=("", nn.Module())):
        if at != name or _settings(one) != _settings(other):
            raise ValueError("stack got models that differ in more than their values; build them with the same "
                             f"settings, and in the same mode: {at!r} is {one} in one and {other} in another")
    if [_form(*item) for item in _tensors(a)] != [_form(*item) for item in _tensors(b)]:
        raise ValueError("stack got models that differ in more than their values; build them with the same settings: "
                         "with as many parameters and buffers, of the same shapes, dtypes and devices, with gradients "
                         "or without")


def _settings(m: nn.Module) -> tuple[type[nn.Module], dict[str, object]]:
    """The class of `m` and what it keeps of plain values, such as sizes and modes."""
    plain = (bool, int, float, str, tuple, type(None))
    return type(m), {name: v for name, v in vars(m).items() if isinstance(v, plain) and name[0] != "_"}


def _form(name: str, t: Tensor) -> tuple[object, ...]: return name, t.shape, t.dtype, t.device, t.requires_grad
