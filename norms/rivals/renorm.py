"""Batch renormalization (S. Ioffe, "Batch renormalization: towards reducing minibatch dependence in batch-normalized
models", NeurIPS 2017, https://arxiv.org/abs/1702.03275)."""

import torch
from torch import Tensor
from torch.types import Device

from norms import fast
from norms.moments import per_channel, scale_shift, wide
from norms.running_norm import RunningNorm
from norms.shares import batch_moments


class BatchRenorm(RunningNorm):
    """Batch norm whose training output is moved to what running averages would make of it, within limits.

        y = ((x - m) / s r + d) * weight + bias             m, s^2 - eps: the batch's mean and biased variance
        r = clip(s / sigma, 1 / rmax, rmax)                 d = clip((m - mu) / sigma, -dmax, dmax)
        mu <- (1 - mom) mu + mom m                          sigma <- (1 - mom) sigma + mom s            afterwards

    r and d are constants to the gradient, which is batch norm's own, times r. Without limits y is (x - mu) / sigma with
    the averages of before this batch, as in evaluation: y = (x - mu) / sigma * weight + bias.

    The limits come slowly: rmax is 1 and dmax 0, plain batch norm, for `begin` steps; from there they grow evenly, to
    `rmax` in step `rmax_at` and to `dmax` in step `dmax_at`. The paper's step numbers are for 130,000 steps at batches
    of 32 and more; a shorter training takes the same parts of its own length, as in `begin=steps // 26,
    rmax_at=steps * 4 // 13, dmax_at=steps * 5 // 26`. All three 0: the last limits at once.

    As in the paper it is sigma that is averaged, and eps is within s and sigma. Kept is `running_var` =
    max(sigma^2 - eps, 0), a batch norm's buffer, and sigma is sqrt(running_var + eps): so its state dict is that of
    torch's batch norms, and moves both ways.

    Args:
        nf: channels, the size of axis 1.
        mom: weight of the **new** batch in the running averages, in 0 to 1.
        eps: added to the variance.
        affine: whether there are a `weight` and a `bias` per channel.
        rmax, dmax: the limits in the end, at least 1 and at least 0.
        begin, rmax_at, dmax_at: training steps, counted from 1, as above.
        device, dtype: of the parameters; the statistics are float32 or wider.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias`, `running_mean`, `running_var` `(C,)`;
        `num_batches_tracked` is a scalar.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input (but in evaluation, or in a training step
            over several processes of which others have images, a batch of no images gives none back); `mom`, a limit or
            a step out of range.
        TypeError: an integer input.
        RuntimeError: a training forward inside a backward pass that is no repetition of one before.
    """

    _version = 2    # of the state dict, as torch's: from 2 on it has num_batches_tracked

    num_batches_tracked: Tensor

    def __init__(self, nf: int, mom: float = 0.01, eps: float = 1e-5, affine: bool = True, *, rmax: float = 3.0,
                 dmax: float = 5.0, begin: int = 5000, rmax_at: int = 40000, dmax_at: int = 25000,
                 device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(nf, eps, {"num_batches_tracked": ((), 0)}, affine, device, dtype)
        if not 0 <= mom <= 1:
            raise ValueError(f"BatchRenorm: mom is {mom!r}; it weighs the new batch and must lie in 0 to 1, such as "
                             "0.01")
        if not (rmax >= 1 and dmax >= 0):
            raise ValueError(f"BatchRenorm: rmax is {rmax!r} and dmax {dmax!r}; the factor stays within 1 / rmax to "
                             "rmax and the shift within -dmax to dmax, so rmax must be at least 1 and dmax at least 0, "
                             "such as 3 and 5")
        if not 0 <= begin <= min(rmax_at, dmax_at):
            raise ValueError(f"BatchRenorm: begin is {begin!r}, rmax_at {rmax_at!r} and dmax_at {dmax_at!r}; the "
                             "limits grow from step begin on until those, so neither may be below begin, and begin not "
                             "below 0")
        self.mom, self.rmax, self.dmax = mom, rmax, dmax
        self.begin, self.rmax_at, self.dmax_at = begin, rmax_at, dmax_at

    @property
    def moved_from(self) -> int:
        """The training step from which on the output is another than batch norm's."""
        return self.begin + 1

    def limits(self, step: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """rmax and dmax in the training step number `step`, counted from 1: scalar tensors."""
        past = (step - self.begin).to(dtype)
        r, d = ((past / max(end - self.begin, 1)).clamp(0, 1) for end in (self.rmax_at, self.dmax_at))
        return 1 + (self.rmax - 1) * r, self.dmax * d

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=not self.training or self.over_ranks())
        xs = wide(x)
        weight, bias = (per_channel(t, x.ndim) for t in (self.weight, self.bias))                       # (1, C, 1, 1)
        if self.training:
            mean, var, centred, _, _, _ = batch_moments(self, xs)           # (1, C, 1, 1), the same, (N, C, H, W)
            r, d = self.track(mean.detach(), var.detach())                                              # (1, C, 1, 1)
            if weight is None or bias is None: weight, bias = r, d
            else: weight, bias = r * weight, torch.addcmul(bias, d, weight)
        else:
            state = fast.state(self)        # the buffers; those of then in a forward that checkpointing does again
            mean, var = (per_channel(state[name], x.ndim) for name in ("running_mean", "running_var"))  # (1, C, 1, 1)
            centred = xs - mean
        return scale_shift(centred, var, self.eps, weight, bias).to(x.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """r and d for a batch with this mean and biased variance, of their shape, and the batch into the averages."""
        state = fast.state(self)            # the buffers; those of then in a forward that checkpointing does again
        # Copies, of which a compiler may compute r and d anew.
        old_mean, old_var = (per_channel(fast.owned(state[name]), mean.ndim)
                             for name in ("running_mean", "running_var"))
        step = fast.owned(state["num_batches_tracked"]) + 1
        mean, var = mean.to(old_mean.dtype), var.to(old_var.dtype)
        std, sigma = (var + self.eps).sqrt(), (old_var + self.eps).sqrt()
        rmax, dmax = self.limits(step, std.dtype)
        # With eps 0 a constant channel has 0 / 0, and nothing to correct.
        r, d = ((t / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)) for t in (std, mean - old_mean))
        state["running_mean"].copy_(torch.lerp(old_mean, mean, self.mom).flatten())
        state["running_var"].copy_((torch.lerp(sigma, std, self.mom).square() - self.eps).clamp_min(0).flatten())
        fast.write(state["num_batches_tracked"], step, refuse=True)
        return r.clamp(1 / rmax, rmax), d.clamp(-dmax, dmax)

    def extra_repr(self) -> str:
        more = "" if self.weight is not None else ", affine=False"
        return (f"{self.nf}, mom={self.mom}, eps={self.eps}, rmax={self.rmax}, dmax={self.dmax}, begin={self.begin}, "
                f"rmax_at={self.rmax_at}, dmax_at={self.dmax_at}{more}{self.synced_repr()}")
