"""Batch normalization (S. Ioffe, C. Szegedy, 2015, https://arxiv.org/abs/1502.03167)."""

from typing import Any

import torch
from torch import Tensor
from torch.types import Device

from norms import fast
from norms.moments import per_channel, scale_shift, wide
from norms.running_norm import RunningNorm
from norms.shares import batch_moments


class BatchNorm(RunningNorm):
    """Normalise every channel by its mean and variance over the batch and all positions.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    In training `mean` and `var` (biased) are the batch's own and the gradient flows through them; in
    evaluation they are the running averages

        running_mean <- (1 - mom) running_mean + mom mean
        running_var  <- (1 - mom) running_var  + mom var n / (n - 1)        n = values per channel

    Output, gradients, buffers and state dict equal those of `torch.nn.BatchNorm1d/2d/3d`, and state dicts move
    both ways, old ones without `num_batches_tracked` too. Differences: on one value per channel torch refuses to
    train; here the output is `bias`, the running mean takes the value in, and the running variance stays, for one value
    says nothing of the spread. A forward pass that activation checkpointing does again counts once. And the running
    statistics stay float32 or wider when the module is cast to half precision.

    `torch.optim.swa_utils.update_bn` looks for torch's class and passes this one by; `recalibrate` does its work.

    The lesson's first version (fastai part 2 v3, notebook 07) detaches the batch statistics from the graph and
    normalises by the unbiased variance; this one, as torch's, does neither.

    Args:
        nf: channels, the size of axis 1.
        mom: weight of the **new** value in the running averages, in 0 to 1, as torch's `momentum`.
        eps: added to the variance.
        affine: whether there are a `weight` and a `bias` per channel.
        device, dtype: of the parameters; the statistics are float32 or wider.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias`, `running_mean`, `running_var` `(C,)`;
        `num_batches_tracked` is a scalar.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input (but in evaluation, or in a training step
            over several processes of which others have images, a batch of no images gives none back).
        TypeError: an integer input.
    """

    _version = 2    # of the state dict, as torch's: from 2 on it has num_batches_tracked

    num_batches_tracked: Tensor

    def __init__(self, nf: int, mom: float = 0.1, eps: float = 1e-5, affine: bool = True, *, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__(nf, eps, {"num_batches_tracked": ((), 0)}, affine, device, dtype)
        if not 0 <= mom <= 1:
            raise ValueError(f"BatchNorm: mom is {mom!r}; it weighs the new batch and must lie in 0 to 1, such as 0.1")
        self.mom = mom

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=not self.training or self.over_ranks())
        xs = wide(x)
        if self.training:
            mean, var, centred, _, n, _ = batch_moments(self, xs)           # (1, C, 1, 1), the same, (N, C, H, W)
            if not fast.repeating(): self.track(mean.detach().flatten(), var.detach().flatten(), n)
        else:
            state = fast.state(self)        # the buffers; those of then in a forward that checkpointing does again
            mean, var = (per_channel(state[name], x.ndim) for name in ("running_mean", "running_var"))  # (1, C, 1, 1)
            centred = xs - mean
        weight, bias = (per_channel(t, x.ndim) for t in (self.weight, self.bias))                   # (1, C, 1, 1)
        return scale_shift(centred, var, self.eps, weight, bias).to(x.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
        """Take the batch's `mean` and biased `var`, each `(C,)` over `n` values, into the running averages."""
        fast.write(self.num_batches_tracked, self.num_batches_tracked + 1)
        fast.write(self.running_mean, torch.lerp(self.running_mean, mean.to(self.running_mean.dtype), self.mom))
        old = self.running_var
        if isinstance(n, Tensor):               # of several processes: to look at it would wait for a GPU
            new = torch.lerp(old, (var * (n / (n - 1).clamp_min(1))).to(old.dtype), self.mom)
            fast.write(old, torch.where(n > 1, new, old))
        elif n > 1: fast.write(old, torch.lerp(old, (var * (n / (n - 1))).to(old.dtype), self.mom))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              *args: Any) -> None:
        if (local_metadata.get("version") or 1) < 2:
            state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked.clone())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        more = "" if self.weight is not None else ", affine=False"
        return f"{self.nf}, mom={self.mom}, eps={self.eps}{more}{self.synced_repr()}"


fast.register(BatchNorm, fast.batch_norm)
