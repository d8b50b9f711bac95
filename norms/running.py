"""Running batch normalization (fastai, "Deep Learning from the Foundations", 2019, part 2 v3, notebook 07)."""

import math
from collections.abc import Collection
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.types import Device

from norms import fast
from norms.averaged import averaged_scale_shift
from norms.fast.kernels import Kernels
from norms.moments import merge_moments, per_channel, scale_shift, wide
from norms.running_norm import RunningNorm
from norms.shares import batch_moments

CLAMP_IMAGES, CLAMP_VAR = 20, 0.01  # the lesson's: variance at least 0.01 until 20 images have been seen

# W, the values per channel and batch, that goes with statistics from elsewhere. The next batch's share is
# alpha n / ((1 - alpha) W + alpha n). Right would be W = n, which makes it alpha, but n is the next batch's and no norm
# knows it beforehand. Below n the statistics are forgotten sooner, at W = 0 in one step, which only gives the usual
# first step; above n they are held for log(W / n) / alpha steps, and a network that trains under frozen statistics runs
# away. (Measured on the R1 network, batch norm at batch 64 and then this at batch 2, lr 0.05: W = 0, 2 and the true n
# go on alike, W = 1e4 blows up within 40 steps.) So it is the least n: two images, a 1x1 map.
CARRIED_COUNT = 2.0


class RunningBatchNorm(RunningNorm):
    """Normalise every channel by running statistics, in training as well as in evaluation.

    Batch norm at batch size 2 divides by the spread of a handful of values. This norm divides by exponential
    averages over the recent batches, the same ones in both modes, and lets the gradient flow through the
    current batch's share of them. The definition averages, all with the weight alpha of a new batch of b images,
    the sums of x, the sums of x^2 and the count c of values per channel:

        mean = avg(sum x) / avg(c)        var = avg(sum x^2) / avg(c) - mean^2
        y = (x - mean) / sqrt(var + eps) * weight + bias
        alpha = 1 - (1 - mom) / sqrt(b - 1)          rule="lesson" (for b = 1 the rule below)
        alpha = 1 - (1 - mom)^(b / 2)                rule="per_image": equal at b = 2, same memory in images at any b

    Computed here is the same function in a form without the cancellation. With n = c values per channel in the
    batch and W = avg(c), the new batch's share of the averages is a, and two sets of moments are merged:

        W <- (1 - alpha) W + alpha n        a = alpha n / W
        mean, var <- merge_moments(mean, var, batch mean, batch var, a)

    The averages start at 0 and the lesson divides each by a debiasing weight for the first 100 steps; it cancels
    in both ratios. Here W starts at 0, so that a = 1 in the first step, which is plain batch norm.

    The past is a constant to the gradient: it flows through the batch's own mean and variance, by their share a,

        dL/dx = weight / s [g - a mean(g) - a xhat mean(g xhat)]        g = dL/dy, s = sqrt(var + eps)

    means over the batch and its positions. With `average_backward=True` they are averaged over steps as the forward's
    are: see `norms.averaged`, also for training in mixed precision (`rescale_`).

    The averages remember few images (38 at batch size 2 and mom 0.1), as training wants them: a longer memory holds
    what weights of long ago have made. In evaluation the chance that is left in so few costs accuracy. With
    `evaluation_memory=M` evaluation normalises by averages of these averages over about M images more, in which they
    have after a batch of b images the weight

        beta = max(2 b / (M + b), b / seen)         running <- merge_moments(running, recent, beta)

    (the plain mean at first, and then an exponential one that remembers M images as `running_moments` counts them).
    Training goes by `recent_mean` and `recent_var` and is the same with it and without.

    While fewer than 20 images have been seen the variance is taken as at least 0.01. Before any training the
    running statistics are mean 0 and variance 1, so evaluation is the affine map alone.

    `running_mean` and `running_var` are what evaluation normalises by, the clamp included, as in a batch norm: to fuse
    the norm with a convolution, or to load them into `nn.BatchNorm2d`, takes nothing else. It loads a batch norm's
    state dict too: where `seen` and `count` are missing, statistics that differ from 0 and 1 count as trained ones, of
    max(num_batches_tracked, 20) images, which no clamp holds, and of `CARRIED_COUNT` values per channel, so that the
    next batch has about its usual share. `torch.optim.swa_utils.update_bn` looks for torch's class and passes this one
    by; `recalibrate` does its work.

    Args:
        nf: channels, the size of axis 1.
        mom: weight of the **new** batch at batch size 2, above 0 and at most 1.
        eps: added to the variance.
        affine: whether there are a `weight` and a `bias` per channel.
        rule: how `mom` turns into a batch's weight, "lesson" or "per_image".
        average_backward: average the means in the gradient over steps. It keeps state in the backward pass, so second
            derivatives and `torch.func` are refused.
        evaluation_memory: over how many images evaluation averages what training normalises by, such as 1000; None
            evaluates by the same statistics.
        device, dtype: of the parameters; the statistics are float32 or wider.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias`, `running_mean`, `running_var` and
        `unclamped_var` (the average that the clamp may hide) `(C,)`; `count` (W, values per channel) and `seen`
        (images) are scalars. All are tensors, so that a state dict saved in mid-training continues bit for bit and a
        compiled step is not compiled again. With `average_backward` also `grad_mean` and `grad_dot` (G and D) `(C,)`;
        with `evaluation_memory` also `recent_mean` and `recent_var` `(C,)`, which training normalises by, to which
        `unclamped_var` belongs then.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input (but in evaluation, or in a training step
            over several processes of which others have images, a batch of no images gives none back), an unknown rule,
            `mom` out of range.
        TypeError: an integer input.
        RuntimeError: a training forward inside a backward pass that is no repetition of one before.
    """

    rule: Literal["lesson", "per_image"]
    average_backward: bool
    unclamped_var: Tensor
    count: Tensor
    seen: Tensor
    grad_mean: Tensor       # this and the next only with `average_backward`
    grad_dot: Tensor
    recent_mean: Tensor     # this and the next only with `evaluation_memory`
    recent_var: Tensor
    evaluation_memory: float | None = None      # of the class too: a module that was pickled earlier has none

    def __init__(self, nf: int, mom: float = 0.1, eps: float = 1e-5, affine: bool = True, *,
                 rule: Literal["lesson", "per_image"] = "lesson", average_backward: bool = False,
                 evaluation_memory: float | None = None, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        further: dict[str, tuple[tuple[int, ...], float]]
        further = {"unclamped_var": ((nf,), 1.0), "count": ((), 0.0), "seen": ((), 0)}
        if average_backward: further |= {"grad_mean": ((nf,), 0.0), "grad_dot": ((nf,), 0.0)}
        if evaluation_memory is not None: further |= {"recent_mean": ((nf,), 0.0), "recent_var": ((nf,), 1.0)}
        super().__init__(nf, eps, further, affine, device, dtype)
        if not 0 < mom <= 1:
            raise ValueError(f"RunningBatchNorm: mom is {mom!r}; it weighs the new batch and must be above 0 and at "
                             "most 1, such as 0.1")
        if rule not in ("lesson", "per_image"):
            raise ValueError(f"RunningBatchNorm: rule is {rule!r}; choose 'lesson' or 'per_image'")
        if evaluation_memory is not None and not 0 < evaluation_memory < math.inf:
            raise ValueError(f"RunningBatchNorm: evaluation_memory is {evaluation_memory!r}; it is a number of images, "
                             "such as 1000, or None to evaluate by what training normalises by")
        self.mom, self.rule, self.average_backward = mom, rule, average_backward
        self.evaluation_memory = evaluation_memory

    clamp_images, clamp_var = CLAMP_IMAGES, CLAMP_VAR

    @overload
    def batch_weight(self, b: int) -> float: ...
    @overload
    def batch_weight(self, b: int | Tensor) -> float | Tensor: ...
    def batch_weight(self, b: int | Tensor) -> float | Tensor:
        """alpha: the weight of a new batch of `b` images in the exponential averages."""
        kept: Any
        if isinstance(b, Tensor):                                   # of several processes
            kept = (1 - self.mom) ** (b / 2)
            if self.rule == "lesson": kept = torch.where(b == 1, kept, (1 - self.mom) * (b - 1).clamp_min(1).rsqrt())
        elif self.rule == "per_image" or b == 1: kept = (1 - self.mom) ** (b / 2)
        else: kept = (1 - self.mom) / (math.sqrt(b - 1) if isinstance(b, int) else (b - 1) ** 0.5)   # or symbolic
        alpha: float | Tensor = 1 - kept
        return alpha

    def floor(self, seen: Tensor) -> Tensor:
        """The least variance after `seen` images, a scalar tensor: 0.01 until there were 20, then 0."""
        return self.clamp_var * (seen < self.clamp_images).to(self.running_var.dtype)

    @property
    def trains_by(self) -> tuple[str, str]:
        """The names of the buffers that training normalises by, a mean and a variance."""
        recent = self.evaluation_memory is not None
        return ("recent_mean", "recent_var") if recent else ("running_mean", "running_var")

    def forward(self, x: Tensor) -> Tensor:
        if self.evaluation_memory is None or not self.training: return self.normalise(x)
        before = self.seen.clone()
        y = self.normalise(x)
        if isinstance(y, Tensor): self.settle(self.seen - before)       # and not a tracer's stand-in
        return y

    def normalise(self, x: Tensor) -> Tensor:
        """What `forward` gives, and the batch into the averages that training normalises by."""
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=not self.training or self.over_ranks())
        xs = wide(x)
        weight, bias = (per_channel(t, x.ndim) for t in (self.weight, self.bias))                   # (1, C, 1, 1)
        if self.training:
            # Averaged, the gradient is not that of the moments.
            of = xs.detach() if self.average_backward else xs
            batch_mean, batch_var, _, images, n, over = batch_moments(self, of)                     # (1, C, 1, 1)
            mean, var, a, floor = self.track(batch_mean, batch_var, images, n)
            if self.average_backward:
                averages = self.grad_mean, self.grad_dot                                            # (C,) each
                return averaged_scale_shift(x, mean, var, a, floor, self.eps, weight, bias, averages, over)
            var = var.clamp_min(floor)
        else:
            state = fast.state(self)
            mean, var = (per_channel(state[name], x.ndim) for name in ("running_mean", "running_var"))  # (1, C, 1, 1)
        return scale_shift(xs - mean, var, self.eps, weight, bias).to(x.dtype)

    def track(self, batch_mean: Tensor, batch_var: Tensor, images: int | Tensor,
              n: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take a batch into the running statistics: of `images` images, its moments over `n` values per channel.

        Returns:
            The running mean and variance with it, functions of the batch's, and of their shape, `(1, C, 1, ...)`; the
            batch's share a of them and the least variance, scalar tensors. To look at a number would wait for a GPU,
            and a compiler would make it a constant.
        """
        state = fast.state(self)            # the buffers; those of then in a forward that checkpointing does again
        old = {name: fast.owned(t) for name, t in state.items()}            # copies: the graph keeps none of a buffer
        names = self.trains_by
        mean, var, hidden = (per_channel(wide(old[name]), batch_mean.ndim) for name in (*names, "unclamped_var"))
        before = self.floor(old["seen"])
        var = torch.where((var == before) & (before > 0), hidden, var)
        alpha, seen = self.batch_weight(images), (old["seen"] + images).to(torch.int64)
        if isinstance(alpha, Tensor): alpha = alpha.to(old["count"].dtype)      # of several processes
        new = alpha * n * torch.ones_like(old["count"])         # a number over a tensor takes an inexact reciprocal
        count, floor = (1 - alpha) * old["count"] + new, self.floor(seen)
        a = (new / count).to(mean.dtype)
        mean, var = merge_moments(mean, var, batch_mean.to(mean.dtype), batch_var.to(var.dtype), a)
        with torch.no_grad():
            state[names[0]].copy_(mean.detach().flatten())
            state[names[1]].copy_(var.detach().flatten().clamp_min(floor))
            state["unclamped_var"].copy_(var.detach().flatten())
            fast.write(state["count"], count, refuse=True)
            fast.write(state["seen"], seen, refuse=True)
        return mean, var, a, floor

    @torch.no_grad()
    def settle(self, images: Tensor) -> None:
        """Take what the norm has just trained by, in a step of `images` images, into what evaluation goes by."""
        if fast.repeating(): return         # counted already; and no training forward reads what is written here
        assert self.evaluation_memory is not None
        mean, var = self.running_mean, self.running_var
        b, seen = (t.to(mean.dtype) for t in (images, self.seen))
        beta = torch.maximum(2 * b / (self.evaluation_memory + b), b / seen.clamp_min(1)).clamp_max(1)
        new = merge_moments(mean, var, self.recent_mean, self.recent_var, beta)
        for old, t in zip((mean, var), new, strict=True): old.copy_(t)

    @torch.no_grad()
    def follow(self, missing: Collection[str]) -> None:
        """Let training go on from `running_mean` and `running_var`, which came from outside, where the others didn't.
        """
        for name, t in zip(self.trains_by, (self.running_mean, self.running_var), strict=True):
            if name in missing and self._buffers[name] is not t: self._buffers[name].copy_(t)

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Multiply the averages of the backward pass by `factor`: the loss will be `factor` times as large from now on.

        Only with `average_backward=True`; else there is nothing to do. See `norms.averaged`.
        """
        if self.average_backward:
            self.grad_mean.mul_(factor)
            self.grad_dot.mul_(factor)

    def running_moments(self, b: int) -> tuple[Tensor, Tensor, float]:
        """The mean and the variance that it normalises by now, `(C,)` each, and how many images they remember.

        At batches of `b` images the newest has the weight alpha and its k-th predecessor alpha (1 - alpha)^k: as good
        as the plain average of (2 - alpha) / alpha batches.
        """
        alpha = self.batch_weight(b)
        mean, var = (self._buffers[name] for name in self.trains_by)
        return mean, var, b * (2 - alpha) / alpha

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              *args: Any) -> None:
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        if mean is not None and var is not None:
            state_dict.setdefault(prefix + "unclamped_var", var.clone())
            batches = state_dict.pop(prefix + "num_batches_tracked", torch.tensor(0))
            if prefix + "seen" not in state_dict:                                   # a batch norm's
                trained = ((mean != 0) | (var != 1)).any()
                state_dict[prefix + "seen"] = batches.clamp_min(CLAMP_IMAGES) * trained
                state_dict[prefix + "count"] = CARRIED_COUNT * trained
            floor = self.floor(state_dict[prefix + "seen"]).to(var.device)
            state_dict[prefix + "running_var"] = var.clamp_min(floor.to(var.dtype))
            if self.average_backward:
                for name in ("grad_mean", "grad_dot"): state_dict.setdefault(prefix + name, torch.zeros_like(mean))
            if self.evaluation_memory is not None:
                for name in ("mean", "var"):
                    state_dict.setdefault(f"{prefix}recent_{name}", state_dict[f"{prefix}running_{name}"].clone())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        more = ", average_backward=True" if self.average_backward else ""
        if self.evaluation_memory is not None: more += f", evaluation_memory={self.evaluation_memory}"
        more += ("" if self.weight is not None else ", affine=False") + self.synced_repr()
        return f"{self.nf}, mom={self.mom}, eps={self.eps}, rule={self.rule!r}{more}"


def _launch(norm: RunningBatchNorm, x: Tensor, kernels: Kernels) -> Tensor | None:
    b = x.shape[0]
    rule = b, norm.batch_weight(b), norm.clamp_images, norm.clamp_var, norm.eps
    return fast.running_batch_norm(norm, x, kernels, rule, norm.average_backward, norm.trains_by)


fast.register(RunningBatchNorm, _launch)
