"""Batch normalization (S. Ioffe, C. Szegedy, 2015, https://arxiv.org/abs/1502.03167)."""

import torch

from norms.channel import (
    KernelStep,
    channel_groups,
    channel_moments,
    checkpointing,
    evaluate_channels,
    in_backward,
    normalise_channels,
    plain,
    plain_step,
)
from norms.kernels import kernels_for, ordinary
from norms.moments import Norm, check_channels


class BatchNorm(Norm):
    """Normalise every channel by its mean and variance over the batch and all positions.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training `mean` and `var` (biased) are the batch's own and the gradient flows through them; in
    evaluation they are the running averages

        running_mean <- (1 - mom) running_mean + mom mean
        running_var  <- (1 - mom) running_var  + mom var n / (n - 1)        n = values per channel

    Output, gradients, buffers and state dict equal those of `torch.nn.BatchNorm1d/2d/3d`, and state dicts move
    both ways. Two differences: on one value per channel torch refuses to train; here the output is `bias`, the
    running mean takes the value in, and the running variance stays, for one value says nothing of the spread. And a
    forward pass that activation checkpointing does again counts once.

    The lesson's first version (fastai part 2 v3, notebook 07) detaches the batch statistics from the graph and
    normalises by the unbiased variance; this one, as torch's, does neither.

    Args:
        nf: channels, the size of axis 1.
        mom: weight of the **new** value in the running averages, in 0 to 1, as torch's `momentum`.
        eps: added to the variance.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias`, `running_mean`, `running_var` `(C,)`.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input.
        TypeError: an integer input.
    """

    def __init__(self, nf, mom=0.1, eps=1e-5):
        check_channels("BatchNorm", nf)
        super().__init__((nf,), eps)
        if not 0 <= mom <= 1:
            raise ValueError(f"BatchNorm: mom is {mom!r}; it weighs the new batch and must lie in 0 to 1, such as 0.1")
        self.nf, self.mom = nf, mom
        self.register_buffer("running_mean", torch.zeros(nf))
        self.register_buffer("running_var", torch.ones(nf))
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # as torch's; nothing here reads it

    def forward(self, x):
        if self.training and plain_step(x, self.nf) and type(self).track is BatchNorm.track:
            # What follows below in one call: at batch size 2 the calls are the time.
            weight, bias = self._parameters.get("weight"), self._parameters.get("bias")     # none if parametrized
            state = self._buffers
            mean, var, batches = state["running_mean"], state["running_var"], state["num_batches_tracked"]
            if ((kernels := kernels_for(x, self.nf, weight, bias, mean, var)) and ordinary(batches, torch.int64, 1)
                    and not checkpointing()):
                return KernelStep.apply(x, weight, bias, kernels, "batch_norm", (mean, var, batches),
                                        (self.mom, self.eps))
        self.check_input(x, self.nf)
        if self.training:
            mean, var = channel_moments(x)                              # (C,) each
            n = x.numel() // self.nf
            if not in_backward(): self.track(mean, var, n)
            stats = mean, var, None, None
            # Of one value the output is exactly `bias`, which the fused kernel's rounding would spoil.
            if n == 1: return plain(x, self.weight, self.bias, *stats, self.eps)
            return normalise_channels(x, self.weight, self.bias, stats, self.eps)
        return evaluate_channels(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)

    def track(self, mean, var, n):
        """Take the batch's `mean` and biased `var`, each `(C,)` over `n` values, into the running averages."""
        state = self._buffers                                       # an attribute is 10 times as slow
        state["num_batches_tracked"].add_(1)
        running_mean, running_var = state["running_mean"], state["running_var"]
        if mean.dtype != running_mean.dtype: mean, var = mean.to(running_mean.dtype), var.to(running_var.dtype)
        running_mean.lerp_(mean, self.mom)
        # + mom (var n / (n - 1) - running_var), in two steps that need no multiple of var
        if n > 1: running_var.lerp_(var, self.mom).add_(var, alpha=self.mom / (n - 1))

    def statistic_groups(self, x): return channel_groups(x)         # (C, N * positions)

    def extra_repr(self):
        return f"{self.nf}, mom={self.mom}, eps={self.eps}"
