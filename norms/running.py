"""Running batch normalization (fastai, "Deep Learning from the Foundations", 2019, part 2 v3, notebook 07)."""

import math

import torch

from norms.channel import channel_moments, normalise_channels
from norms.moments import HALF, Norm, check_channels, merge_moments, per_channel, scale_shift, wide

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

    While fewer than 20 images have been seen the variance is taken as at least 0.01. Before any training the
    running statistics are mean 0 and variance 1, so evaluation is the affine map alone.

    Args:
        nf: channels, the size of axis 1.
        mom: weight of the **new** batch at batch size 2, above 0 and at most 1.
        eps: added to the variance.
        rule: how `mom` turns into a batch's weight, "lesson" or "per_image".

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias`, `running_mean`, `running_var` `(C,)`;
        `count` (W, values per channel) and `seen` (images) are scalars. All are tensors, so that a state dict
        saved in mid-training continues bit for bit and a compiled step is not compiled again.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input, an unknown rule, `mom` out of range.
        TypeError: an integer input.
    """

    def __init__(self, nf, mom=0.1, eps=1e-5, *, rule="lesson"):
        check_channels("RunningBatchNorm", nf)
        super().__init__((nf,), eps)
        if not 0 < mom <= 1:
            raise ValueError(f"RunningBatchNorm: mom is {mom!r}; it weighs the new batch and must be above 0 and at "
                             "most 1, such as 0.1")
        if rule not in ("lesson", "per_image"):
            raise ValueError(f"RunningBatchNorm: rule is {rule!r}; choose 'lesson' or 'per_image'")
        self.nf, self.mom, self.rule = nf, mom, rule
        self.register_buffer("running_mean", torch.zeros(nf))
        self.register_buffer("running_var", torch.ones(nf))
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(0))

    def batch_weight(self, b):
        """alpha: the weight of a new batch of `b` images in the exponential averages."""
        if self.rule == "per_image" or b == 1: return 1 - (1 - self.mom) ** (b / 2)
        return 1 - (1 - self.mom) / math.sqrt(b - 1)

    def forward(self, x):
        self.check_input(x, self.nf)
        mean, var = self.running_mean, self.running_var             # (C,) each
        if self.training:
            a = self.share(x)
            batch_mean, batch_var = (m.to(mean.dtype) for m in channel_moments(x))
            mean, var = merge_moments(mean, var, batch_mean, batch_var, a)
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            return normalise_channels(x, self.weight, self.bias, mean, var, self.eps, a, self.floor())
        mean, var, weight, bias = (per_channel(t, x.ndim) for t in (mean, var.clamp_min(self.floor()), self.weight,
                                                                    self.bias))
        return scale_shift(wide(x) - mean, var, self.eps, weight, bias).to(x.dtype)

    def floor(self):
        """The least variance now, a scalar tensor: 0.01 until 20 images have been seen, then 0.

        A tensor and not an `if`, which would wait for the device and break a compiled graph.
        """
        return CLAMP_VAR * (self.seen < CLAMP_IMAGES).to(self.running_var.dtype)

    def share(self, x):
        """Count the batch in and return a, its share of the running averages (a scalar tensor in 0 to 1)."""
        alpha, n = self.batch_weight(x.shape[0]), x.numel() // self.nf
        self.seen.add_(x.shape[0])
        self.count.mul_(1 - alpha).add_(alpha * n)
        return alpha * n / self.count

    def _apply(self, fn, recurse=True):
        """Move or cast the module; `half()` and `bfloat16()` leave the running statistics at their width."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype in HALF: self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def extra_repr(self):
        return f"{self.nf}, mom={self.mom}, eps={self.eps}, rule={self.rule!r}"
