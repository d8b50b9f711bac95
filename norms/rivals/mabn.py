"""Moving average batch normalization (J. Yan, R. Wan, X. Zhang, W. Zhang, Y. Wei, J. Sun, "Towards stabilizing batch
statistics in backward propagation of batch normalization", ICLR 2020, https://arxiv.org/abs/2001.06838)."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from norms import fast
from norms.moments import all_but_channels, per_channel, scale_shift, wide
from norms.running_norm import RunningNorm
from norms.shares import batch_moments


class CentredConv2d(nn.Conv2d):
    """`nn.Conv2d` by weights of which each output channel's mean is taken off: W - mean(W) over axes 1, 2 and 3.

    MABN takes no mean away; behind this, inputs that are alike in all channels and positions give none. Kept, and
    trained, is W as it is. Arguments, shapes and state dict are those of `nn.Conv2d`.
    """

    centred = True

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)
        return y


class MABN(RunningNorm):
    """Divide every channel by the root of its second moment over the last batches, and average the gradient alike.

    In training step t = 1, 2, ..., with m = `window`, over the last m steps' batches (mean() is over one of them):

        v = average of the m mean(x^2)              z = x / sqrt(v + eps)               y = r z weight + bias
        r = clip(sqrt((v + eps) / (v_run + eps)), 1 / limit, limit)                     a constant to the gradient
        v_run <- (1 - mom) v_run + mom v            afterwards; v_run is `running_var`
        dL/dx = (g - z D) / sqrt(v + eps)           g = r weight dL/dy                  D = average of the m mean(g z)

    Until m and `warmup` steps are there, up to t = max(m, warmup - 1), v and D are this batch's own; r is 1 up to
    t = max(r_from, warmup). Evaluation divides by sqrt(v_run + eps). No mean is taken away: put `CentredConv2d` in the
    place of the convolution before it. (All of this is as in the paper and in what its authors published: eps within
    the roots, the first step numbers, the slot of step t, which a step without a backward pass leaves as it was.)

    m is the batch size to come up to, divided by the real one: 32 / 2.

    The backward pass writes D's window, `grad_window`, as that of `RunningBatchNorm(average_backward=True)` writes its
    averages. Each writes into the slot of its forward, so that a second one over the same graph, or a forward that
    checkpointing does again, changes nothing more. Where the gradient of a channel isn't finite, as in a step that a
    GradScaler skips, its slot stays. The window is of the loss's scale: see `rescale_`.

    `running_mean` is zeros. A batch norm's statistics (its state dict, or by `convert_norms`) give the second moment
    running_var + running_mean^2, to evaluate by and to begin the window with; evaluation is another function then.

    Args:
        nf: channels, the size of axis 1.
        mom: weight of the **new** v in `running_var`, in 0 to 1.
        eps: added to the second moment.
        affine: whether there are a `weight` and a `bias` per channel.
        window: m, how many batches the averages are over.
        warmup, r_from: training steps, as above.
        limit: of r, at least 1.
        device, dtype: of the parameters; the statistics are float32 or wider.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; `weight`, `bias`, `running_mean`, `running_var` `(C,)`;
        `square_window` and `grad_window` `(C, m)`, step t's in column t % m; `num_batches_tracked` is a scalar.

    Raises:
        ValueError: another channel count, fewer than two axes, an empty input (but in evaluation, or in a training step
            over several processes of which others have images, a batch of no images gives none back); a setting out of
            range.
        TypeError: an integer input.
        RuntimeError: a training forward inside a backward pass that is no repetition of one before; second derivatives
            and `torch.func`, for the gradient is that of no function.
    """

    statistics = "mean square"
    wants_centred = True

    num_batches_tracked: Tensor
    square_window: Tensor
    grad_window: Tensor

    def __init__(self, nf: int, mom: float = 0.02, eps: float = 1e-5, affine: bool = True, *, window: int = 16,
                 warmup: int = 100, r_from: int = 1000, limit: float = 5.0, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"MABN: window is {window!r}; it needs a number of batches, an integer of at least 1, "
                             "such as 32 divided by the batch size")
        super().__init__(nf, eps, {"square_window": ((nf, window), 0.0), "grad_window": ((nf, window), 0.0),
                                   "num_batches_tracked": ((), 0)}, affine, device, dtype)
        if not 0 <= mom <= 1:
            raise ValueError(f"MABN: mom is {mom!r}; it weighs the new batch and must lie in 0 to 1, such as 0.02")
        if not (warmup >= 0 and r_from >= 0 and limit >= 1):
            raise ValueError(f"MABN: warmup is {warmup!r}, r_from {r_from!r} and limit {limit!r}; the first two are "
                             "steps, at least 0, and r stays within 1 / limit to limit, so that must be at least 1")
        self.mom, self.window, self.warmup, self.r_from, self.limit = mom, window, warmup, r_from, limit

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, no_images=not self.training or self.over_ranks())
        weight, bias = (per_channel(t, x.ndim) for t in (self.weight, self.bias))                       # (1, C, 1, 1)
        if not self.training:
            state = fast.state(self)        # the buffers; those of then in a forward that checkpointing does again
            mean, var = (per_channel(state[name], x.ndim) for name in ("running_mean", "running_var"))  # (1, C, 1, 1)
            return scale_shift(wide(x) - mean, var, self.eps, weight, bias).to(x.dtype)
        xs = wide(x.detach())
        if self.over_ranks():
            mean, var, _, _, _, over = batch_moments(self, xs)
            square = var + mean.square()                                                                # (1, C, 1, 1)
        else: square, over = xs.square().mean(all_but_channels(x), keepdim=True), None
        args = x, weight, bias, *self.track(square), self.grad_window, *(over or (None, None))
        # What is compiled or exported needs an operator, whose gradient goes with it; to call one takes longer.
        out: Tensor = _operator(*args) if torch.compiler.is_compiling() else _Step.apply(*args)
        return out

    @torch.no_grad()
    def track(self, square: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take a batch's second moment, `(1, C, 1, ...)`, into the window and the running average.

        Returns:
            1 / sqrt(v + eps) and r of its shape; the window's column of this step, `(1,)`; whether this step goes by
            its own batch alone, a scalar tensor.
        """
        state = fast.state(self)            # the buffers; those of then in a forward that checkpointing does again
        # Copies, from which a compiler may compute all of this anew.
        window, run, step = (fast.owned(state[name])
                             for name in ("square_window", "running_var", "num_batches_tracked"))
        step, own = step + 1, square.flatten().to(window.dtype)                                         # (C,)
        column, alone = (step % self.window).view(1), step <= max(self.window, self.warmup - 1)
        window = window.index_copy(1, column, own.unsqueeze(1))                                         # (C, m)
        v = torch.where(alone, own, window.mean(1))
        tiny = torch.finfo(v.dtype).tiny                            # eps may be 0, and a channel silent
        r = ((v + self.eps) / (run + self.eps).clamp_min(tiny)).sqrt().clamp(1 / self.limit, self.limit)
        r = torch.where(step > max(self.r_from, self.warmup), r, 1.0)
        state["square_window"].copy_(window)
        state["running_var"].lerp_(v, self.mom)
        fast.write(state["num_batches_tracked"], step, refuse=True)
        return (v + self.eps).rsqrt().view_as(square), r.view_as(square), column, alone

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Multiply `grad_window` by `factor`: the loss will be `factor` times as large from now on (`norms.averaged`).
        """
        self.grad_window.mul_(factor)

    def follow(self, missing: Collection[str]) -> None:
        """Make second moments of the mean and variance that `running_mean` and `running_var` now hold."""
        self.running_var.add_(self.running_mean.square())
        self.running_mean.zero_()
        self.square_window.copy_(self.running_var.unsqueeze(1))

    def running_moments(self, b: int) -> tuple[Tensor, Tensor, int]:
        """Zeros, the second moment that training divides by now, `(C,)` each, and the images in the window."""
        step = int(self.num_batches_tracked)
        if step > max(self.r_from, self.warmup): v = self.running_var
        elif step > max(self.window, self.warmup - 1): v = self.square_window.mean(1)
        else: v = self.square_window[:, step % self.window]
        return self.running_mean, v, b * self.window

    @property
    def unclamped_var(self) -> Tensor:
        """What training divides by: there is no clamp, and to whoever looks for one `running_var` is another average.
        """
        return self.running_moments(1)[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              *args: Any) -> None:
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        if mean is not None and var is not None and prefix + "square_window" not in state_dict:     # a batch norm's
            square = var + mean.square()
            state_dict |= {prefix + "running_mean": torch.zeros_like(mean), prefix + "running_var": square,
                           prefix + "square_window": square.unsqueeze(1).repeat(1, self.window),
                           prefix + "grad_window": torch.zeros_like(square).unsqueeze(1).repeat(1, self.window)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        more = "" if self.weight is not None else ", affine=False"
        return (f"{self.nf}, mom={self.mom}, eps={self.eps}, window={self.window}, warmup={self.warmup}, "
                f"r_from={self.r_from}, limit={self.limit}{more}{self.synced_repr()}")


def _value(x: Tensor, weight: Tensor | None, bias: Tensor | None, rstd: Tensor, r: Tensor, *_: Any) -> Tensor:
    if weight is None or bias is None: return (wide(x) * (rstd * r)).to(x.dtype)
    return torch.addcmul(wide(bias), wide(x), rstd * r * wide(weight)).to(x.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | None) -> None:
    """What the backward pass needs: x, and copies of all that may be written until then, but for the window itself."""
    x, weight, bias, rstd, r, column, alone, window, key, totals = inputs
    ctx.save_for_backward(x)
    over = None if key is None else (key, totals)
    ctx.kept = rstd, r, r if weight is None else r * wide(weight), column, alone, window, over
    ctx.of, ctx.like = (weight, bias), [None if t is None else (t.shape, t.dtype) for t in (weight, bias)]


@fast.once
def _gradients(ctx: Any, x: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    """Over several processes the loss is the mean of theirs, and the window of that loss's scale (`norms.averaged`)."""
    rstd, r, scale, column, alone, window, over = ctx.kept
    dims, n, losses = all_but_channels(x), x.numel() // x.shape[1], None
    g, z = wide(g), wide(x) * rstd
    total, dot = g.sum(dims), (g * z).sum(dims)                                                         # (C,) each
    summed = dot
    if over is not None:
        key, (_, values, losses) = over
        summed, n = torch.ops.runnernorms.sum_over_ranks(dot, key), values * losses
    own = (scale.flatten() * summed / n).to(window.dtype)
    taken = torch.where(own.isfinite(), own, window.index_select(1, column).squeeze(1))
    window.index_copy_(1, column, taken.unsqueeze(1))
    # A gradient that isn't finite stays out of the window, but must show in its own step.
    mean = torch.where(alone, own, window.mean(1) + (own - taken))
    mean = per_channel(mean if losses is None else mean * losses, x.ndim)                               # (1, C, 1, 1)
    gx = (rstd * (scale * g - z * mean)).to(x.dtype)
    gw, gb = (None if like is None else t.view(like[0]).to(like[1])
              for t, like in zip((dot * r.flatten(), total), ctx.like, strict=True))
    return gx, gw, gb, *[None] * 7


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep(ctx, inputs, None)
        return _value(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]: return _gradients(ctx, g)


@torch.library.custom_op("runnernorms::moving_average_step", mutates_args=())
def _operator(x: Tensor, weight: Tensor | None, bias: Tensor | None, rstd: Tensor, r: Tensor, column: Tensor,
              alone: Tensor, window: Tensor, key: str | None, totals: Tensor | None) -> Tensor:
    return _value(x, weight, bias, rstd, r)


_operator.register_fake(lambda x, *_: torch.empty_like(x))
_operator.register_autograd(_gradients, setup_context=_keep)
