"""A training step of the five-layer network with each norm, against the same step with torch's own norm.

Forward, cross entropy, backward, SGD, at batch size 2 without oneDNN and at 512 with it, one thread.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench import Config
from experiments.bench.timing import interleave, row, settings
from experiments.models import CHANNELS, NormFactory, conv_layer, get_cnn_model, init_alike
from experiments.results import Row
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm

SIZES = [14, 7, 4, 2, 1]         # of the maps after each of the CHANNELS


class _Instance(nn.InstanceNorm2d):
    """torch's, which refuses the last layer's 1x1 maps in training; its kernel doesn't mind them."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, self.momentum, self.eps, False)


def _layer(make: Callable[[torch.Size], nn.Module]) -> NormFactory:
    """A factory of layer norms with an affine parameter per value: each call is told the next map's size."""
    sizes = iter(SIZES)
    return lambda nf: make(torch.Size((nf, *[next(sizes)] * 2)))


# factory, the arm to compare it with, targets at batch sizes 2 and 512
Arm = tuple[NormFactory | None, str | None, tuple[float, float] | None]


def arms() -> dict[str, Arm]:
    """The norms compared, made anew for every network: `{name: (factory, against, targets)}`."""
    return {
        "no norm": (None, None, None),
        "nn.BatchNorm2d": (nn.BatchNorm2d, None, None),
        "BatchNorm": (BatchNorm, "nn.BatchNorm2d", (1.25, 1.1)),
        "RunningBatchNorm": (RunningBatchNorm, "nn.BatchNorm2d", (1.25, 1.05)),
        "averaged backward": (partial(RunningBatchNorm, average_backward=True), "RunningBatchNorm", (1.15, 1.05)),
        "nn.GroupNorm": (lambda nf: nn.GroupNorm(4, nf), None, None),
        "GroupNorm": (lambda nf: GroupNorm(4, nf), "nn.GroupNorm", (1.4, 1.15)),
        "nn.LayerNorm": (_layer(nn.LayerNorm), None, None),
        "LayerNorm": (_layer(LayerNorm), "nn.LayerNorm", (1.4, 1.15)),
        "LayerNorm, scalar affine": (lambda nf: LayerNorm(), "nn.LayerNorm", (1.4, 1.15)),
        "nn.InstanceNorm2d": (lambda nf: _Instance(nf, affine=True), None, None),
        "InstanceNorm": (InstanceNorm, "nn.InstanceNorm2d", (1.4, 1.15)),
    }


def network(norm: NormFactory | None, seed: int = 0) -> nn.Sequential:
    """The five-layer network with `norm`, the same weights for every norm."""
    model = get_cnn_model(argparse.Namespace(c=10), CHANNELS, conv_layer, norm=norm)
    init_alike(model, seed)
    return model


def step(norm: NormFactory | None, xb: Tensor, yb: Tensor, lr: float = 0.01) -> Callable[[], None]:
    """A function that does one training step on this batch."""
    model = network(norm)
    opt = torch.optim.SGD(model.parameters(), lr=lr)

    def run() -> None:
        F.cross_entropy(model(xb), yb).backward()
        opt.step()
        opt.zero_grad()
    return run


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    found = []
    for i, size in enumerate((2, 512)):
        xb, yb = torch.randn(size, 1, 28, 28, generator=config.rng()), torch.arange(size) % 10
        compared = arms()
        with settings(onednn=size > 8):
            times = interleave({name: step(norm, xb, yb) for name, (norm, _, _) in compared.items()},
                               config.repetitions, 0.05 if size == 2 else 0.2)
        found += [row("norms", f"batch {size}", name, against, times, targets[i] if targets else None)
                  for name, (_, against, targets) in compared.items()]
    return found
