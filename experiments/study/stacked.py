"""Several networks of one architecture trained as one: at batch size 2 that costs little more than one of them.

There nearly all time is per-operation overhead. K networks side by side, with their channels on one axis and their
convolutions and norms in K groups, take as many operations as one of them.
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from experiments.models import GeneralRelu, Lambda, flatten
from norms import BatchNorm, GroupNorm, InstanceNorm, RunningBatchNorm

STATELESS = (GeneralRelu, nn.AdaptiveAvgPool2d, nn.ReLU, nn.LeakyReLU, nn.Identity)


def stack(models: Iterable[nn.Module]) -> nn.Module:
    """One network that computes what each of the K `models` does, each on images of its own.

    It has the tree of one of them. Every parameter and every buffer per channel is those of the K models, in their
    order, along axis 0; buffers that are scalars must agree. So elementwise optimizers train it as they would train
    each alone, if the loss is the sum of the models' losses.

    Args:
        models: networks of `nn.Sequential`, `nn.Conv2d`, `nn.Linear`, the norms per channel or group, and layers
            without state that treat channels alike (`STATELESS`, and `flatten`).

    Shapes: the network takes `(N, K C, H, W)`, for each image position the K models' images, and gives `(N, K c)`.

    Raises:
        TypeError: a layer that can't be stacked.
        ValueError: no models, models that differ in more than values, or scalar buffers that differ.
    """
    models = list(models)
    if not models: raise ValueError("stack got no models; it needs at least one")
    states = [m.state_dict() for m in models]
    shapes = [{name: t.shape for name, t in state.items()} for state in states]
    if any(s != shapes[0] or str(m) != str(models[0]) for s, m in zip(shapes, models, strict=True)):
        raise ValueError("stack got models that differ in more than their values; build them with the same settings")
    with torch.random.fork_rng(devices=[]): stacked = _stacked(models[0], len(models))
    joint = {name: _joined(name, [state[name] for state in states]) for name in states[0]}
    stacked.load_state_dict(joint)
    return stacked.train(models[0].training)


def unstack(stacked: nn.Module, models: Sequence[nn.Module]) -> None:
    """Put the parameters and buffers of the network `stacked` back into the `models` that it was made of, in order."""
    state = stacked.state_dict()
    for k, model in enumerate(models):
        model.load_state_dict({name: t if t.ndim == 0 else t.chunk(len(models))[k] for name, t in state.items()})


class GroupedLinear(nn.Module):
    """K linear layers side by side: `(N, K ni)` to `(N, K no)`; `weight` `(K no, ni)`, `bias` `(K no,)`."""

    def __init__(self, groups: int, ni: int, no: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.empty(groups * no, ni)), nn.Parameter(torch.empty(groups * no))

    def forward(self, x: Tensor) -> Tensor:
        k, ni = self.groups, self.weight.shape[1]
        xs = x.view(-1, k, ni).transpose(0, 1)                                              # (K, N, ni)
        out = torch.bmm(xs, self.weight.view(k, -1, ni).transpose(1, 2))                    # (K, N, no)
        return out.transpose(0, 1).reshape(len(x), -1) + self.bias


def _stacked(m: nn.Module, k: int) -> nn.Module:
    """The layer `m` for `k` networks side by side; its values are still to come."""
    if isinstance(m, nn.Sequential): return nn.Sequential(*(_stacked(layer, k) for layer in m))
    new: nn.Module
    if type(m) is nn.Conv2d:
        return nn.Conv2d(k * m.in_channels, k * m.out_channels,
                         m.kernel_size, m.stride, m.padding, m.dilation,    # type: ignore[arg-type]   # as it has them
                         k * m.groups, m.bias is not None, m.padding_mode, dtype=m.weight.dtype)
    if type(m) is nn.Linear and m.bias is not None: new = GroupedLinear(k, m.in_features, m.out_features)
    elif type(m) is RunningBatchNorm:
        new = RunningBatchNorm(k * m.nf, m.mom, m.eps, rule=m.rule, average_backward=m.average_backward)
    elif type(m) is BatchNorm: new = BatchNorm(k * m.nf, m.mom, m.eps)
    elif type(m) is InstanceNorm: new = InstanceNorm(k * m.nf, m.eps)
    elif type(m) is GroupNorm: new = GroupNorm(k * m.num_groups, k * m.num_channels, m.eps, m.weight is not None)
    elif isinstance(m, STATELESS) or (type(m) is Lambda and m.func is flatten): return copy.deepcopy(m)
    else:
        raise TypeError(f"stack can't put {type(m).__name__} side by side; it takes nn.Sequential, nn.Conv2d, "
                        "nn.Linear with a bias, BatchNorm, InstanceNorm, GroupNorm, RunningBatchNorm, "
                        f"Lambda(flatten) and {', '.join(s.__name__ for s in STATELESS)}")
    return new.to(next(m.parameters()).dtype)


def _joined(name: str, tensors: list[Tensor]) -> Tensor:
    if tensors[0].ndim: return torch.cat(tensors)
    if any(not torch.equal(t, tensors[0]) for t in tensors):
        raise ValueError(f"stack got models whose {name!r} differ, {[t.item() for t in tensors]}; a stack has one for "
                         "all: stack models that have seen the same number of batches of the same size")
    return tensors[0]
