"""Momentum batch normalization (H. Yong, J. Huang, D. Meng, X. Hua, L. Zhang, "Momentum batch normalization for deep
learning with small batch size", ECCV 2020)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.types import Device

from norms import fast
from norms.moments import per_channel, scale_shift, wide
from norms.running_norm import RunningNorm
from norms.shares import batch_moments


class MomentumBatchNorm(RunningNorm):
    """Normalise every channel by averages over batches whose memory grows during training.

    In training, with a batch of B images, t = 1, 2, ... the step and T = `steps`:

        mean <- lambda mean + (1 - lambda) batch mean       var <- lambda var + (1 - lambda) batch var (biased)
        y = (x - mean) / sqrt(var + eps) * weight + bias
        lambda = s^(max(T - t, 0) / (T - 1)) - s            s = min(B / m0, 1)

    lambda is 0 in the first step, which is plain batch norm, and from step T on 1 - s: .9375 at B = 2, and 0 at B = 32
    and above. (The paper writes rho^(T / (T - 1) max(T - t, 0)) - rho^T with rho^T = s.) The past is a constant to the
    gradient, which flows through the batch's own share, 1 - lambda, of both averages. The average of variances leaves
    out how far batch means lie apart: unlike `RunningBatchNorm`, it is no variance of a mixture.

    Evaluation has averages of its own, `running_mean` and `running_var`, which take in each batch with the weight
    1 - (1 - mom)^(B / m0): .0066 at B = 2.

    Where the paper leaves something open: its T is a number of steps here, because lambda is wanted per step. With
    `steps=None` lambda is 1 - s from the second step on; the first has no past to average with. A schedule longer than
    the training is one that was cut off: lambda doesn't reach its end. The variance for evaluation is biased, too, as
    the paper's algorithm has it.

    It loads a batch norm's state dict: `train_mean` and `train_var`, where they are missing, are the running ones, and
    `num_batches_tracked` says how far the schedule is.

    Args:
        nf: channels, the size of axis 1.
        mom: weight of a **new** batch of `m0` images in the averages for evaluation, in 0 to 1.
        eps: added to the variance.
        affine: whether there are a `weight` and a `bias` per channel.
        m0: the batch size at which plain batch norm is good enough.
        steps: T, the training steps until lambda is 1 - s: usually all of the training. None for no schedule.
        device, dtype: of the parameters; the statistics are float32 or wider.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias`, `running_mean`, `running_var`, `train_mean` and
        `train_var` (by which training normalises) `(C,)`; `num_batches_tracked` is a scalar.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input (but in evaluation, or in a training step
            over several processes of which others have images, a batch of no images gives none back); `mom`, `m0` or
            `steps` out of range.
        TypeError: an integer input.
        RuntimeError: a training forward inside a backward pass that is no repetition of one before.
    """

    num_batches_tracked: Tensor
    train_mean: Tensor
    train_var: Tensor

    def __init__(self, nf: int, mom: float = 0.1, eps: float = 1e-5, affine: bool = True, *, m0: float = 32,
                 steps: int | None = None, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(nf, eps, {"train_mean": ((nf,), 0.0), "train_var": ((nf,), 1.0),
                                   "num_batches_tracked": ((), 0)}, affine, device, dtype)
        if not 0 <= mom <= 1:
            raise ValueError(f"MomentumBatchNorm: mom is {mom!r}; it weighs the new batch in the averages for "
                             "evaluation and must lie in 0 to 1, such as 0.1")
        if not m0 > 0:
            raise ValueError(f"MomentumBatchNorm: m0 is {m0!r}; it is a batch size, from which on this is batch norm, "
                             "and must be above 0, such as 32")
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"MomentumBatchNorm: steps is {steps!r}; it needs the number of training steps, an "
                             "integer of at least 1 such as epochs * len(loader), or None for the last lambda at once")
        self.mom, self.m0, self.steps = mom, m0, steps

    def past(self, images: int | Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
        """lambda: the weight of the past in the training step number `step`, counted from 1, on `images` images."""
        s: Any = (images / self.m0).clamp_max(1).to(dtype) if isinstance(images, Tensor) else \
            torch.sym_min(images / self.m0, 1.0) * torch.ones_like(step, dtype=dtype)
        if self.steps is None or self.steps == 1: left = (step <= 1).to(dtype)          # of the schedule, 1 to 0
        else: left = (self.steps - step).clamp_min(0).to(dtype) / (self.steps - 1)
        lam: Tensor = s ** left - s
        return lam

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=not self.training or self.over_ranks())
        xs = wide(x)
        if self.training:
            batch_mean, batch_var, _, images, _, _ = batch_moments(self, xs)                            # (1, C, 1, 1)
            mean, var = self.track(batch_mean, batch_var, images)
        else:
            state = fast.state(self)        # the buffers; those of then in a forward that checkpointing does again
            mean, var = (per_channel(state[name], x.ndim) for name in ("running_mean", "running_var"))  # (1, C, 1, 1)
        weight, bias = (per_channel(t, x.ndim) for t in (self.weight, self.bias))                       # (1, C, 1, 1)
        return scale_shift(xs - mean, var, self.eps, weight, bias).to(x.dtype)

    def track(self, batch_mean: Tensor, batch_var: Tensor, images: int | Tensor) -> tuple[Tensor, Tensor]:
        """Take the moments of a batch of `images` images, `(1, C, 1, ...)` each, into all averages.

        Returns:
            What training normalises by, of the same shape: functions of the batch's moments.
        """
        state = fast.state(self)            # the buffers; those of then in a forward that checkpointing does again
        # Copies: the graph keeps none of a buffer.
        mean, var = (per_channel(fast.owned(state[name]), batch_mean.ndim) for name in ("train_mean", "train_var"))
        batch_mean, batch_var = batch_mean.to(mean.dtype), batch_var.to(var.dtype)
        step = fast.owned(state["num_batches_tracked"]) + 1
        new = 1 - self.past(images, step, mean.dtype)
        mean, var = torch.lerp(mean, batch_mean, new), torch.lerp(var, batch_var, new)
        with torch.no_grad():
            state["train_mean"].copy_(mean.detach().flatten())
            state["train_var"].copy_(var.detach().flatten())
            weight = (1 - (1 - self.mom) ** (images / self.m0)) * torch.ones_like(new)
            for name, value in (("running_mean", batch_mean), ("running_var", batch_var)):
                state[name].lerp_(value.detach().flatten(), weight)
            fast.write(state["num_batches_tracked"], step, refuse=True)
        return mean, var

    def running_moments(self, b: int) -> tuple[Tensor, Tensor, float]:
        """The mean and the variance that training normalises by now, `(C,)` each, and how many images they remember.

        That is at batches of `b` images and the lambda of the next step: as good as the plain average of
        (1 + lambda) / (1 - lambda) batches.
        """
        lam = self.past(b, self.num_batches_tracked + 1, torch.float64).item()
        return self.train_mean, self.train_var, b * (1 + lam) / (1 - lam)

    def follow(self, missing: Collection[str]) -> None:
        """Train on from what `running_mean` and `running_var` now hold."""
        self.train_mean.copy_(self.running_mean)
        self.train_var.copy_(self.running_var)

    @property
    def unclamped_var(self) -> Tensor:
        """`train_var`: there is no clamp, and to whoever looks for one `running_var` is another average."""
        return self.train_var

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              *args: Any) -> None:
        for name in ("mean", "var"):        # a batch norm's
            found = state_dict.get(f"{prefix}running_{name}")
            if found is not None: state_dict.setdefault(f"{prefix}train_{name}", found.clone())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        more = "" if self.weight is not None else ", affine=False"
        return (f"{self.nf}, mom={self.mom}, eps={self.eps}, m0={self.m0}, steps={self.steps}{more}"
                f"{self.synced_repr()}")
