"""Running batch normalization (fastai, "Deep Learning from the Foundations", 2019, part 2 v3, notebook 07)."""

import math
from collections import deque

import torch

from norms.channel import (
    KernelStep,
    _Fused,
    channel_groups,
    channel_moments,
    checkpointing,
    eager_cpu,
    evaluate_channels,
    in_backward,
    normalise_channels,
    plain_step,
)
from norms.kernels import kernels_for, ordinary
from norms.moments import HALF, Norm, check_channels, merge_moments

CLAMP_IMAGES, CLAMP_VAR = 20, 0.01  # the lesson's: variance at least 0.01 until 20 images have been seen


class RunningBatchNorm(Norm):
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

    The gradient is that of the current batch's share a (see `norms.channel`), with the means of g and g xhat over
    the batch. With `average_backward=True` they are averaged over steps as the forward's are, with the same share:

        G <- (1 - a) G + a mean(g)          D <- (1 - a) D + a mean(g xhat)
        dL/dx = weight / s [g - G - xhat D]

    which is no gradient of anything, but a steadier estimate of the one that many images would give. (J. Yan et al.,
    "Towards stabilizing batch statistics in backward propagation of batch normalization", ICLR 2020, average the
    backward's statistics too.)

    While fewer than 20 images have been seen the variance is taken as at least 0.01. Before any training the
    running statistics are mean 0 and variance 1, so evaluation is the affine map alone.

    Args:
        nf: channels, the size of axis 1.
        mom: weight of the **new** batch at batch size 2, above 0 and at most 1.
        eps: added to the variance.
        rule: how `mom` turns into a batch's weight, "lesson" or "per_image".
        average_backward: average the means in the gradient over steps. It keeps state in the backward pass, so second
            derivatives and `torch.compile` are refused.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias`, `running_mean`, `running_var` `(C,)`;
        `count` (W, values per channel) and `seen` (images) are scalars. All are tensors, so that a state dict
        saved in mid-training continues bit for bit and a compiled step is not compiled again. With
        `average_backward` also `grad_mean` and `grad_dot` (G and D) `(C,)`.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input, an unknown rule, `mom` out of range.
        TypeError: an integer input.
    """

    def __init__(self, nf, mom=0.1, eps=1e-5, *, rule="lesson", average_backward=False):
        check_channels("RunningBatchNorm", nf)
        super().__init__((nf,), eps)
        if not 0 < mom <= 1:
            raise ValueError(f"RunningBatchNorm: mom is {mom!r}; it weighs the new batch and must be above 0 and at "
                             "most 1, such as 0.1")
        if rule not in ("lesson", "per_image"):
            raise ValueError(f"RunningBatchNorm: rule is {rule!r}; choose 'lesson' or 'per_image'")
        self.nf, self.mom, self.rule, self.average_backward = nf, mom, rule, average_backward
        self.register_buffer("running_mean", torch.zeros(nf))
        self.register_buffer("running_var", torch.ones(nf))
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(0))
        if average_backward:
            self.register_buffer("grad_mean", torch.zeros(nf))
            self.register_buffer("grad_dot", torch.zeros(nf))
        self.steps = deque(maxlen=16)                               # for `recall`; no part of the state

    def batch_weight(self, b):
        """alpha: the weight of a new batch of `b` images in the exponential averages."""
        if self.rule == "per_image" or b == 1: return 1 - (1 - self.mom) ** (b / 2)
        return 1 - (1 - self.mom) / math.sqrt(b - 1)

    def forward(self, x):
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")     # attributes are slow
        if (self.training and weight is not None and bias is not None and x.dtype is weight.dtype
                and not self.average_backward and plain_step(x, self.nf)):
            # What follows below, in one call or with fewer: at batch size 2 they are the time.
            state = self._buffers
            mean, var, count, seen = state["running_mean"], state["running_var"], state["count"], state["seen"]
            if (type(self).track is RunningBatchNorm.track and type(self).floor is RunningBatchNorm.floor
                    and (kernels := kernels_for(x, self.nf, weight, bias, mean, var))
                    and ordinary(count, x.dtype, 1) and ordinary(seen, torch.int64, 1) and not checkpointing()):
                return KernelStep.apply(x, weight, bias, kernels, "running_batch_norm", (mean, var, count, seen),
                                        (x.shape[0], self.batch_weight(x.shape[0]), CLAMP_IMAGES, CLAMP_VAR, self.eps))
            step = self.track(x, *torch.batch_norm_update_stats(x.detach(), None, None, 0.0))
            if step[0].dtype is x.dtype: return _Fused.apply(x, weight, bias, step, self.eps)
            return normalise_channels(x, weight, bias, step, self.eps)
        self.check_input(x, self.nf)
        if not self.training:
            floor = self.floor(self.seen.item() if eager_cpu(x) else self.seen)
            return evaluate_channels(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, floor)
        host = eager_cpu(x)
        batch_mean, batch_var = channel_moments(x, host)                # (C,) each
        if in_backward(): step = self.recall(batch_mean)
        else: step = (self.track if host else self.track_tensors)(x, batch_mean, batch_var)
        averages = (self.grad_mean, self.grad_dot) if self.average_backward else None
        return normalise_channels(x, self.weight, self.bias, step, self.eps, averages, host)

    def track(self, x, batch_mean, batch_var):
        """Take the batch in: the new running mean and variance, its share of them, and the least variance.

        Here `seen`, `count` and what follows from them are numbers. The new mean and variance take the buffers'
        places: the old ones are left as they are, the new ones are kept by the graph of this step. (Modules that
        hold buffers by reference, as DistributedDataParallel does, look them up again.)
        """
        state = self._buffers                                           # attributes would take ten times as long
        old_mean, old_var, seen, count = state["running_mean"], state["running_var"], state["seen"], state["count"]
        b, n = x.shape[0], x.numel() // self.nf
        alpha = self.batch_weight(b)
        images, values = seen.item() + b, (1 - alpha) * count.item() + alpha * n
        seen.fill_(images)
        count.fill_(values)
        a = alpha * n / values
        if batch_mean.dtype is not old_mean.dtype:
            batch_mean, batch_var = batch_mean.to(old_mean.dtype), batch_var.to(old_var.dtype)
        mean, var = merge_moments(old_mean, old_var, batch_mean, batch_var, a)
        state["running_mean"], state["running_var"] = mean, var
        step = mean, var, a, self.floor(images)
        if checkpointing(): self.steps.append((batch_mean, step))
        return step

    def track_tensors(self, x, batch_mean, batch_var):
        """`track` with `seen`, `count` and what follows from them as scalar tensors.

        To look at a number would wait for a GPU, and a compiler would make it a constant and compile at every step.
        """
        alpha = self.batch_weight(x.shape[0])
        seen = self.seen + x.shape[0]
        count = (1 - alpha) * self.count + alpha * (x.numel() // self.nf)
        a = alpha * (x.numel() // self.nf) / count
        batch_mean, batch_var = batch_mean.to(self.running_mean.dtype), batch_var.to(self.running_var.dtype)
        mean, var = merge_moments(self.running_mean, self.running_var, batch_mean, batch_var, a)
        step = mean, var, a, self.floor(seen)
        if torch.compiler.is_compiling():
            # Not in place: a compiled backward may compute a or the mean once more, from what the forward read.
            self.running_mean, self.running_var, self.seen, self.count = mean, var, seen, count
        else:
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            self.seen.copy_(seen)
            self.count.copy_(count)
            # Under torch.func these are wrappers that die with the transform.
            if checkpointing() and not torch._C._are_functorch_transforms_active():
                self.steps.append((batch_mean, step))
        return step

    def recall(self, batch_mean):
        """What `track` returned for the batch with this mean, which activation checkpointing sends through again.

        The latest first: a backward pass goes from the last forward to the first. What was recalled is forgotten.
        """
        for i in reversed(range(len(self.steps))):
            mean, step = self.steps[i]
            if torch.allclose(mean, batch_mean, rtol=1e-5, atol=1e-7):
                del self.steps[i]
                return step
        kept = self.steps.maxlen
        raise RuntimeError(f"RunningBatchNorm met a forward pass inside a backward pass and none of its last {kept} "
                           "training batches is this one; only a checkpointed forward may run there, with its backward "
                           f"at most {kept} batches later")

    def floor(self, seen):
        """The least variance after `seen` images: 0.01 until there were 20, then none (0 where `seen` is a tensor)."""
        if torch.is_tensor(seen): return CLAMP_VAR * (seen < CLAMP_IMAGES).to(self.running_var.dtype)
        return CLAMP_VAR if seen < CLAMP_IMAGES else None

    def statistic_groups(self, x): return channel_groups(x)             # (C, N * positions)

    def running_moments(self, b):
        """The mean and the variance that it normalises by now, `(C,)` each, and how many images they remember.

        The variance is the clamped one. At batches of `b` images the newest has the weight alpha and its k-th
        predecessor alpha (1 - alpha)^k: as good as the plain average of (2 - alpha) / alpha batches.
        """
        alpha = self.batch_weight(b)
        return self.running_mean, self.running_var.clamp_min(self.floor(self.seen)), b * (2 - alpha) / alpha

    def _apply(self, fn, recurse=True):
        """Move or cast the module; `half()` and `bfloat16()` leave the running statistics at their width."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype in HALF: self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def extra_repr(self):
        more = ", average_backward=True" if self.average_backward else ""
        return f"{self.nf}, mom={self.mom}, eps={self.eps}, rule={self.rule!r}{more}"
