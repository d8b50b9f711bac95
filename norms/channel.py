"""Normalising per channel by statistics in which the batch has a share: batch norm and running batch norm.

With m = mean, s^2 = max(var, floor) + eps and a the share that this batch has in m and var (1 in batch norm):

    y     = xhat weight + bias                                  xhat = (x - m) / s
    dL/dx = weight / s [g - a mean(g) - a xhat mean(g xhat)]    g = dL/dy, means over the batch and its positions

The last term is missing where `floor` holds the variance. With a = 1 this is batch norm's gradient; in general it is
(1 - a) times the gradient with frozen statistics plus a times batch norm's taken at m and s.

`plain` leaves the gradient to automatic differentiation. `_Fused` has it in closed form, by torch's kernels, and
`KernelStep` by the project's own (see `norms.kernels`), which take a small batch in one call each way. The tests hold
the three together.
"""

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from norms.moments import HALF, moments, per_channel, scale_shift, wide


def eager_cpu(x):
    """Whether `x` is an ordinary tensor on a CPU, with no compiler, transform or forward-mode derivative at work.

    There a look at a number waits for nothing, and the fused kernels, which know only the backward, may be used. (A
    dispatch mode, such as `make_fx`'s, and `torch.jit.trace` follow what torch's operators do, and not our kernels.)
    """
    return (x.is_cpu and type(x) is torch.Tensor and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
            and not torch._C._len_torch_dispatch_stack() and not torch._C._is_tracing())


def bare(g):
    """Whether the gradient `g` is a tensor with memory of its own, and no batch of gradients under `vmap`.

    `torch.autograd.grad(..., is_grads_batched=True)` has a kind of batch that no transform announces.
    """
    return eager_cpu(g) and not torch._C._functorch.is_legacy_batchedtensor(g)


def plain_step(x, nf):
    """Whether `x` is what `check_input` wants and a training forward on it may go the short way.

    That is an ordinary float32 or float64 tensor on a CPU and nothing unusual at work: `eager_cpu`, no `in_backward`.
    """
    return (x.dtype in _ZERO and x.ndim > 1 and x.shape[1] == nf and x.numel() and eager_cpu(x)
            and torch._C._current_graph_task_id() == -1)


def in_backward():
    """Whether a backward pass is running: a forward pass within it is activation checkpointing doing one again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpointing():
    """Whether this forward pass may be done again in the backward: autograd is off, or hooks pack what it saves.

    The first is how reentrant activation checkpointing runs a forward, the second how the other kind does.
    """
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def channel_moments(x, host=None):
    """Mean and biased variance of every channel of `x` `(N, C, *spatial)`, `(C,)` each, without a graph.

    `host` is `eager_cpu(x)` where the caller has asked already.
    """
    x = x.detach()
    if x.dtype in HALF: x = x.float()
    if eager_cpu(x) if host is None else host:
        return torch.batch_norm_update_stats(x, None, None, 0.0)        # two passes in one kernel, no state
    mean, var, _ = moments(x, all_but_channels(x))
    return mean.flatten(), var.flatten()


def channel_groups(x):
    """`x` `(N, C, *spatial)` as `(C, N * positions)`: for each channel the values behind its mean and variance."""
    return x.transpose(0, 1).flatten(1)


def all_but_channels(x):
    """The axes of images and positions of `x` `(N, C, *spatial)`."""
    return (0, *range(2, x.ndim))


def normalise_channels(x, weight, bias, stats, eps, averages=None, host=None):
    """`(x - mean) / sqrt(max(var, floor) + eps) * weight + bias` with the gradient through this batch's share `a`.

    Args:
        x: `(N, C, *spatial)`, a training batch that already counts in `mean` and `var`.
        weight, bias: `(C,)` each.
        stats: `(mean, var, a, floor)`: `mean` and `var` `(C,)` each, without a graph; `a`, this batch's share of
            them, a number or a scalar tensor, None for 1; `floor`, the least variance, likewise, None for none.
        eps: added to the variance.
        averages: two running averages `(C,)` that the backward pass is to update and use for mean(g) and
            mean(g xhat), instead of the batch's own means times `a`; None for the gradient itself.
        host: `eager_cpu(x)` where the caller has asked already.
    """
    if x.dtype in HALF:
        return normalise_channels(x.float(), weight.float(), bias.float(), stats, eps, averages, host).to(x.dtype)
    if averages is not None: return _AveragedBackward.apply(x, weight, bias, *stats, eps, *averages)
    if (eager_cpu(x) if host is None else host) and x.dtype is weight.dtype is stats[0].dtype and x.dtype in _ZERO:
        return _Fused.apply(x, weight, bias, stats, eps)
    return plain(x, weight, bias, *stats, eps)


def evaluate_channels(x, weight, bias, mean, var, eps, floor=None):
    """`normalise_channels` by statistics that don't depend on `x`: `(N, C, *spatial)` in and out."""
    if x.dtype in HALF:
        return evaluate_channels(x.float(), weight.float(), bias.float(), mean, var, eps, floor).to(x.dtype)
    if floor is not None: var = var.clamp_min(floor)
    if eager_cpu(x) and x.dtype is weight.dtype is mean.dtype and x.dtype in _ZERO:
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
    mean, var, weight, bias = (per_channel(t, x.ndim) for t in (mean, var, weight, bias))
    return scale_shift(x - mean, var, eps, weight, bias).to(x.dtype)


def as_functions(x, mean, var, a):
    """`x - mean` and `var` as functions of `x`, `(N, C, *spatial)` and `(1, C, 1, 1)`, for automatic differentiation.

    `mean` and `var` are numbers that the batch went into. Written as mean + a (m1 - m1_now) and
    var + a (m2 - m2_now) - shift^2, with m1 and m2 the batch's first two moments about `mean`, they keep their values,
    for the brackets are 0, and get their derivatives, of every order and in either direction.
    """
    dims = all_but_channels(x)
    mean, var = mean.detach(), var.detach()
    u = wide(x) - per_channel(mean, x.ndim)
    m1, m2 = u.mean(dims, keepdim=True), (u * u).mean(dims, keepdim=True)
    shift, grow = m1 - m1.detach(), m2 - m2.detach()
    if a is not None: shift, grow = a * shift, a * grow
    return u - shift, per_channel(var, x.ndim) + grow - shift * shift


def plain(x, weight, bias, mean, var, a, floor, eps):
    """The formula of `normalise_channels`, differentiable any number of times and in any mode."""
    centred, var = as_functions(x, mean, var, a)
    if floor is not None: var = var.clamp_min(floor)
    return scale_shift(centred, var, eps, per_channel(weight, x.ndim), per_channel(bias, x.ndim)).to(x.dtype)


def gradients(g, xhat, scale, a, free=None):
    """The gradients of x, weight and bias in closed form.

    `g` and `xhat` are `(N, C, *spatial)`, `scale` = weight / s and `free` (where no floor holds) `(1, C, 1, 1)`.
    """
    dims = all_but_channels(g)
    dot, total = (g * xhat).sum(dims, keepdim=True), g.sum(dims, keepdim=True)
    share = (1 if a is None else a) / (g.numel() // g.shape[1])
    through_var = share * dot * xhat if free is None else share * dot * free * xhat
    return scale * (g - share * total - through_var), dot.reshape(-1), total.reshape(-1)


_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_ALL = [True, True, True]
_ZERO, _ONE = ({t: torch.tensor(v, dtype=t, device="cpu") for t in (torch.float32, torch.float64)} for v in (0.0, 1.0))


class _Fused(torch.autograd.Function):
    """`plain` without a graph, in two of torch's kernels; statistics and running state are not their affair.

    Forward: the kernel of batch norm in evaluation, at the mean and variance given. It folds the mean into the
    shift, x (weight / s) + (bias - mean weight / s): an error as if x had been rounded once more, 6e-8 |x| / s.
    Backward: the kernel of batch norm's backward in training, at the same mean and 1 / s. That is the gradient at
    the top of this file for a = 1; in general a times it plus (1 - a) g weight / s.

    At batch size 2 the time is that of the calls, 3 to 4 us each whatever they do. Hence the statistics as one
    argument, which autograd needn't look at.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stats, eps):
        mean, var, a, floor = stats                                     # (C,), (C,), numbers
        held = var if floor is None else var.clamp_min(floor)
        ctx.save_for_backward(x, weight)
        # eps times 1: var + eps would wrap the number in a tensor first, at twice the cost
        ctx.stats = mean, var, torch.add(held, _ONE[x.dtype], alpha=eps).rsqrt_(), eps, a, floor
        return torch.batch_norm(x, weight, bias, mean, held, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        mean, var, rstd, eps, a, floor = ctx.stats
        if torch.is_grad_enabled(): return *differentiable(x, weight, mean, var, eps, a, floor, g), None, None
        # x's gradient is linear in the weight and the other two don't depend on it: so a comes in with it, as a
        # lerp from 0 for the reason above.
        share = weight if a is None else torch.lerp(_ZERO[x.dtype], weight, a)
        gx, gw, gb = _batch_norm_backward(g, x, share, None, None, mean, rstd, True, eps, _ALL)
        if a is not None:
            scale = (weight * rstd).view(1, -1, 1, 1) if x.ndim == 4 else per_channel(weight * rstd, x.ndim)
            gx.addcmul_(g, scale, value=1 - a)
            if floor is not None:  # gw = sum(g xhat): give back the variance's term where the floor holds it
                back = a * weight * rstd * rstd * gw / (x.numel() // len(weight)) * (var < floor)
                gx.addcmul_(x - per_channel(mean, x.ndim), per_channel(back, x.ndim))
        return gx, gw, gb, None, None


class KernelStep(torch.autograd.Function):
    """A training step of a norm in one call each way, the running state's update included, by `norms/kernels.c`."""

    @staticmethod
    def forward(ctx, x, weight, bias, kernels, norm, state, numbers):
        """`norm` is the kernel's name, `state` the tensors that it updates, `numbers` its settings, eps the last."""
        sizes = kernel_sizes(x)
        y, kept = torch.empty_like(x), x.new_empty(2 * sizes[1] + 2)
        getattr(kernels, norm)(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), kept.data_ptr(),
                               *[t.data_ptr() for t in state], *sizes, *numbers)
        increment_version(state)
        ctx.save_for_backward(x, weight)
        ctx.kept = kernels, kept, sizes, numbers[-1]
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        kernels, kept, sizes, eps = ctx.kept
        if torch.is_grad_enabled() or not bare(g):          # this gradient will be differentiated, or is many in one
            mean, var, a, floor = kept.split((sizes[1], sizes[1], 1, 1))
            return *differentiable(x, weight, mean, var, eps, a, floor, g), None, None, None, None
        if not x.is_contiguous(): g = g.contiguous(memory_format=torch.channels_last)
        elif not g.is_contiguous(): g = g.contiguous()
        gx, gw, gb = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        kernels.channel_backward(g.data_ptr(), x.data_ptr(), weight.data_ptr(), kept.data_ptr(), gx.data_ptr(),
                                 gw.data_ptr(), gb.data_ptr(), *sizes, eps)
        return gx, gw, gb, None, None, None, None


def kernel_sizes(x):
    """`x` as the kernels see it, (N, C, positions); one that is channels last as (N positions, C, 1)."""
    n, c = x.shape[0], x.shape[1]
    return (n, c, x.numel() // (n * c)) if x.is_contiguous() else (x.numel() // c, c, 1)


def differentiable(x, weight, mean, var, eps, a, floor, g):
    """The gradients of x, weight and bias, as functions of x, weight and g that can be differentiated in turn."""
    centred, var = as_functions(x, mean, var, a)
    rstd = torch.rsqrt((var if floor is None else var.clamp_min(floor)) + eps)
    free = None if floor is None else var >= floor
    return gradients(g, centred * rstd, per_channel(weight, x.ndim) * rstd, a, free)


class _AveragedBackward(torch.autograd.Function):
    """`plain` with the means in the gradient averaged over steps: see `RunningBatchNorm`."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, a, floor, eps, grad_mean, grad_dot):
        if torch.compiler.is_compiling():
            raise RuntimeError("average_backward keeps state in the backward pass, which torch.compile can't follow; "
                               "train without compiling, or make the norm with average_backward=False")
        ctx.averages, ctx.eps, ctx.a, ctx.floor = (grad_mean, grad_dot), eps, a, floor
        ctx.save_for_backward(x, weight, mean, var)
        return plain(x, weight, bias, mean, var, a, floor, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, mean, var = ctx.saved_tensors
        free = 1 if ctx.floor is None else (var >= ctx.floor).to(var.dtype)
        rstd = torch.rsqrt((var if ctx.floor is None else var.clamp_min(ctx.floor)) + ctx.eps)
        xhat = (wide(x) - per_channel(mean, x.ndim)) * per_channel(rstd, x.ndim)
        dims, n = all_but_channels(x), x.numel() // len(weight)
        g = g.to(xhat.dtype)
        dot, total = (g * xhat).sum(dims), g.sum(dims)                  # (C,) each
        for average, new in zip(ctx.averages, (total / n, dot / n), strict=True):
            average.copy_(torch.lerp(average, new.to(average.dtype), ctx.a))
        grad_mean, grad_dot = ctx.averages
        gx = g - per_channel(grad_mean, x.ndim) - xhat * per_channel(grad_dot * free, x.ndim)
        return (per_channel(weight * rstd, x.ndim) * gx).to(x.dtype), dot, total, *[None] * 7
