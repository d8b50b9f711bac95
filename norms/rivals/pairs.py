"""A norm over the batch with group norm behind it, as one norm with one affine map.

"Batch-Channel Normalization" (S. Qiao, H. Wang, C. Liu, W. Shen, A. Yuille, "Micro-batch training with batch-channel
normalization and weight standardization", 2019, https://arxiv.org/abs/1903.10520). The batch's statistics keep the
channels apart, which an image's own can't; these take away what is left of the spread between images where the
batch's are noise, as they are at batch size 2.

    z = (x - mean) / sqrt(var + eps)            per channel, over the batch or over the recent batches
    y = (z - m) / sqrt(v + eps) weight + bias   m, v (biased) of z, per image and group of channels

The paper's first norm is by running statistics that carry no gradient: `RunningChannelNorm(constant_statistics=True)`.

Both derive from the norm that comes first and keep its buffers and state dict, so that state dicts move both ways, and
what handles that norm (`sync_norms`, `recalibrate`, `convert_norms`, the insight tools) handles the pair. There is one
difference: evaluation needs the images' statistics as well, so no pair can be fused with the convolution before it.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.types import Device

from norms import fast
from norms.averaged import averaged_scale_shift
from norms.batch import BatchNorm
from norms.fast.kernels import Kernels
from norms.group import check_groups
from norms.moments import moments, per_channel, scale_shift, wide
from norms.running import RunningBatchNorm
from norms.shares import batch_moments


class BatchChannelNorm(BatchNorm):
    """`BatchNorm` without an affine map, then `GroupNorm`: the formula at the top of this file.

    Output, gradients and buffers equal those of `nn.Sequential(BatchNorm(nf, mom, eps, affine=False),
    GroupNorm(num_groups, nf, eps))`.

    Args:
        nf: channels, the size of axis 1.
        num_groups: groups; must divide `nf`.
        mom: weight of the **new** value in the running averages, in 0 to 1, as torch's `momentum`.
        eps: added to the variance, in both norms.
        affine: whether there are a `weight` and a `bias` per channel.
        device, dtype: of the parameters; the statistics are float32 or wider.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; parameters and buffers are those of `BatchNorm`.

    Raises:
        ValueError: groups that don't divide the channels; else as `BatchNorm`.
        TypeError: an integer input.
    """

    num_groups: int

    def __init__(self, nf: int, num_groups: int = 4, mom: float = 0.1, eps: float = 1e-5, affine: bool = True, *,
                 device: Device = None, dtype: torch.dtype | None = None) -> None:
        check_groups("BatchChannelNorm", num_groups, nf)
        super().__init__(nf, mom, eps, affine, device=device, dtype=dtype)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=not self.training or self.over_ranks())
        xs = wide(x)
        if self.training:
            mean, var, centred, _, n, _ = batch_moments(self, xs)           # (1, C, 1, 1), the same, (N, C, H, W)
            if not fast.repeating(): self.track(mean.detach().flatten(), var.detach().flatten(), n)
        else:
            state = fast.state(self)
            mean, var = (per_channel(state[name], x.ndim) for name in ("running_mean", "running_var"))  # (1, C, 1, 1)
            centred = xs - mean
        return by_groups(self, scale_shift(centred, var, self.eps)).to(x.dtype)

    def image_groups(self, x: Tensor) -> Tensor: return x.reshape(len(x) * self.num_groups, -1)     # as in GroupNorm

    def extra_repr(self) -> str: return with_groups(super().extra_repr(), self.num_groups)


class RunningChannelNorm(RunningBatchNorm):
    """`RunningBatchNorm` without an affine map, then `GroupNorm`: the formula at the top of this file.

    Output, gradients and buffers equal those of `nn.Sequential(RunningBatchNorm(nf, mom, eps, affine=False, ...),
    GroupNorm(num_groups, nf, eps))`; with `average_backward` the means of dL/dz and of dL/dz z are averaged over steps,
    see `norms.averaged`.

    Args:
        nf: channels, the size of axis 1.
        num_groups: groups; must divide `nf`.
        mom: weight of the **new** batch at batch size 2, above 0 and at most 1.
        eps: added to the variance, in both norms.
        affine: whether there are a `weight` and a `bias` per channel.
        rule: how `mom` turns into a batch's weight, "lesson" or "per_image".
        average_backward: average the means in the first norm's gradient over steps. It keeps state in the backward
            pass, so second derivatives and `torch.func` are refused.
        evaluation_memory: over how many images evaluation averages what the first norm trains by; None evaluates by
            the same statistics.
        constant_statistics: whether the first norm's statistics are constants to the gradient, as in the paper; else it
            flows through the batch's share of them. The group's always carry it.
        device, dtype: of the parameters; the statistics are float32 or wider.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; parameters and buffers are those of `RunningBatchNorm`.

    Raises:
        ValueError: groups that don't divide the channels; `average_backward` with `constant_statistics`; else as
            `RunningBatchNorm`.
        TypeError: an integer input.
        RuntimeError: a training forward inside a backward pass that is no repetition of one before.
    """

    num_groups: int
    constant_statistics: bool

    def __init__(self, nf: int, num_groups: int = 4, mom: float = 0.1, eps: float = 1e-5, affine: bool = True, *,
                 rule: Literal["lesson", "per_image"] = "lesson", average_backward: bool = False,
                 evaluation_memory: float | None = None, constant_statistics: bool = False, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        check_groups(type(self).__name__, num_groups, nf)
        if average_backward and constant_statistics:
            raise ValueError("RunningChannelNorm got average_backward=True and constant_statistics=True; what is "
                             "averaged is the gradient through the statistics, which constants have none of: choose "
                             "one of the two")
        super().__init__(nf, mom, eps, affine, rule=rule, average_backward=average_backward,
                         evaluation_memory=evaluation_memory, device=device, dtype=dtype)
        self.num_groups, self.constant_statistics = num_groups, constant_statistics

    def normalise(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=not self.training or self.over_ranks())
        xs = wide(x)
        if self.training:
            of = xs.detach() if self.average_backward or self.constant_statistics else xs
            batch_mean, batch_var, _, images, n, over = batch_moments(self, of)                     # (1, C, 1, 1)
            mean, var, a, floor = self.track(batch_mean, batch_var, images, n)
            if self.average_backward:
                averages = self.grad_mean, self.grad_dot                                            # (C,) each
                z = averaged_scale_shift(xs, mean, var, a, floor, self.eps, None, None, averages, over)
                return by_groups(self, z).to(x.dtype)
            var = var.clamp_min(floor)
        else:
            state = fast.state(self)
            mean, var = (per_channel(state[name], x.ndim) for name in ("running_mean", "running_var"))  # (1, C, 1, 1)
        return by_groups(self, scale_shift(xs - mean, var, self.eps)).to(x.dtype)

    def image_groups(self, x: Tensor) -> Tensor: return x.reshape(len(x) * self.num_groups, -1)     # as in GroupNorm

    def extra_repr(self) -> str:
        more = ", constant_statistics=True" if self.constant_statistics else ""
        return with_groups(super().extra_repr() + more, self.num_groups)


ChannelNorm = BatchChannelNorm | RunningChannelNorm


def by_groups(norm: ChannelNorm, z: Tensor) -> Tensor:
    """Group norm of `z` `(N, C, *spatial)`, with the groups, `eps` and the affine map of `norm`."""
    groups = (1, norm.num_groups, -1, *[1] * (z.ndim - 2))                          # of the channels
    zs = z.unflatten(1, groups[1:3])                                                # (N, G, C / G, H, W)
    _, var, centred = moments(zs, tuple(range(2, zs.ndim)))                         # (N, G, 1, 1, 1), and as zs
    weight, bias = (t if t is None else t.view(groups) for t in (norm.weight, norm.bias))       # (1, G, C / G, 1, 1)
    return scale_shift(centred, var, norm.eps, weight, bias).flatten(1, 2)


def with_groups(settings: str, num_groups: int) -> str:
    nf, _, rest = settings.partition(", ")
    return f"{nf}, num_groups={num_groups}, {rest}"


def launch_running(norm: RunningChannelNorm, x: Tensor, kernels: Kernels) -> Tensor | None:
    """The step of a `RunningChannelNorm`, or of a subclass that adds nothing to its formula, by the kernels."""
    b = x.shape[0]
    rule = b, norm.batch_weight(b), norm.clamp_images, norm.clamp_var, norm.eps
    return fast.running_pair(norm, x, kernels, norm.num_groups, rule, norm.average_backward, norm.constant_statistics,
                             norm.trains_by)


fast.register(BatchChannelNorm, lambda norm, x, kernels: fast.batch_pair(norm, x, kernels, norm.num_groups))
fast.register(RunningChannelNorm, launch_running)
