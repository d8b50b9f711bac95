"""Networks side by side by `stack`, against one alone, and against torch's own way, `vmap` over stacked parameters.

A training step of 20 five-layer networks at batch size 2: forward, cross entropy, backward, plain SGD; one thread.
Milliseconds per network and step. Alone and by `vmap` it is with the faster of torch's own convolutions and oneDNN's
(torch's own, channels last; oneDNN's). `vmap` can't write running statistics, so it is compared by norms that have
none: `nn.GroupNorm`, and `nn.BatchNorm2d` of the batch alone.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from experiments.bench import Config
from experiments.bench.norms import network
from experiments.bench.timing import interleave, row, settings
from experiments.models import NormFactory, channels_last_
from experiments.results import Row
from experiments.side_by_side import each_loss
from experiments.study.stacked import stack
from norms import GroupNorm, RunningBatchNorm
from runner import SGD

K, BATCH, RATE = 20, 2, 0.01
NORMS: dict[str, NormFactory] = {
    "RunningBatchNorm": RunningBatchNorm, "GroupNorm": lambda nf: GroupNorm(4, nf),
    "nn.GroupNorm": lambda nf: nn.GroupNorm(4, nf),
    "nn.BatchNorm2d of the batch": partial(nn.BatchNorm2d, track_running_stats=False)}
BY_VMAP = ("nn.GroupNorm", "nn.BatchNorm2d of the batch")
TARGET, TARGET_VMAP = 0.3, 1.0      # at most of the time of one alone, and of vmap's


def alone(norm: NormFactory, generator: torch.Generator) -> Callable[[], None]:
    """A function that does one training step of one network."""
    model = channels_last_(network(norm))
    xb, yb = torch.randn(BATCH, 1, 28, 28, generator=generator), torch.arange(BATCH)
    opt = SGD(model.parameters(), lr=RATE)

    def step() -> None:
        torch.backends.mkldnn.set_flags(False)
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    return step


def stacked(norm: NormFactory, generator: torch.Generator) -> Callable[[], torch.Tensor]:
    """A function that does one training step of K networks by `stack` and returns their losses."""
    net = channels_last_(stack(network(norm, seed) for seed in range(K)))
    xb, yb = torch.randn(BATCH, K, 28, 28, generator=generator), torch.arange(BATCH)[:, None].repeat(1, K)
    opt = SGD(net.parameters(), lr=RATE)

    def step() -> torch.Tensor:
        torch.backends.mkldnn.set_flags(True)
        losses = each_loss(net(xb), yb)
        losses.sum().backward()
        opt.step()
        opt.zero_grad()
        return losses.detach()
    return step


def mapped(norm: NormFactory, generator: torch.Generator) -> Callable[[], torch.Tensor]:
    """A function that does one training step of K networks by `vmap`, as torch's documentation has it, as above."""
    models: list[nn.Module] = [network(norm, seed) for seed in range(K)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    xb = torch.randn(BATCH, K, 28, 28, generator=generator).transpose(0, 1).unsqueeze(2).contiguous()
    yb = torch.arange(BATCH)[None].repeat(K, 1)

    def loss(parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], xb: torch.Tensor,
             yb: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(base, (parameters, buffers), (xb,)), yb)
    values = [p.detach() for p in parameters.values()]
    now = dict(zip(parameters, values, strict=True))
    gradients = vmap(grad_and_value(loss))

    def step() -> torch.Tensor:
        torch.backends.mkldnn.set_flags(True)
        losses: torch.Tensor
        found, losses = gradients(now, buffers, xb, yb)
        torch._foreach_add_(values, list(found.values()), alpha=-RATE)
        return losses
    return step


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    first, one, many, by_vmap = "RunningBatchNorm", "one alone, {}", f"{K} by stack, {{}}", f"{K} by vmap, {{}}"
    arms: dict[str, Callable[[], object]] = {one.format(first): alone(NORMS[first], config.rng())}
    arms |= {many.format(name): stacked(norm, config.rng()) for name, norm in NORMS.items()}
    arms |= {by_vmap.format(name): mapped(NORMS[name], config.rng()) for name in BY_VMAP}
    with settings():
        times = interleave(arms, config.repetitions, 0.1)
    times = {name: [ms / (1 if name == one.format(first) else K) for ms in found] for name, found in times.items()}
    compared = {many.format(first): (one.format(first), TARGET)}
    compared |= {many.format(name): (by_vmap.format(name), TARGET_VMAP) for name in BY_VMAP}
    found = []
    for name in arms:
        against, target = compared.get(name, (None, None))
        found.append(row("stacked", f"batch {BATCH}", name, against, times, target))
    return found
