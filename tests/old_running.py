"""RunningBatchNorm as it was before its graphs owned what they need, for the test that check_norm finds its faults.

By torch's kernels and without its own C ones, without `rule` and `average_backward`; else to the letter.
"""

import math
from collections import deque

import torch
from torch.autograd import forward_ad

from norms.moments import HALF, Norm, all_but_channels, per_channel, wide

CLAMP_IMAGES, CLAMP_VAR = 20, 0.01


class OldRunningBatchNorm(Norm):
    def __init__(self, nf, mom=0.1, eps=1e-5):
        super().__init__((nf,), eps)
        self.nf, self.mom = nf, mom
        self.register_buffer("running_mean", torch.zeros(nf))
        self.register_buffer("running_var", torch.ones(nf))
        self.register_buffer("count", torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(0))
        self.steps = deque(maxlen=16)                               # for `recall`; no part of the state

    def batch_weight(self, b): return 1 - (1 - self.mom) ** 0.5 if b == 1 else 1 - (1 - self.mom) / math.sqrt(b - 1)

    def forward(self, x):
        weight, bias = self.weight, self.bias
        if self.training and x.dtype is weight.dtype and plain_step(x, self.nf):
            step = self.track(x, *torch.batch_norm_update_stats(x.detach(), None, None, 0.0))
            if step[0].dtype is x.dtype: return _Fused.apply(x, weight, bias, step, self.eps)
            return normalise_channels(x, weight, bias, step, self.eps)
        self.check_input(x, self.nf)
        host = eager_cpu(x)
        if not self.training:
            floor = self.floor(self.seen.item() if host else self.seen)
            return evaluate_channels(x, weight, bias, self.running_mean, self.running_var, self.eps, floor)
        batch_mean, batch_var = channel_moments(x, host)            # (C,) each
        if in_backward(): step = self.recall(batch_mean)
        else: step = (self.track if host else self.track_tensors)(x, batch_mean, batch_var)
        return normalise_channels(x, weight, bias, step, self.eps)

    def track(self, x, batch_mean, batch_var):
        """The new mean and variance take the buffers' places, and are kept by the graph of this step."""
        state = self._buffers
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
        alpha = self.batch_weight(x.shape[0])
        seen = self.seen + x.shape[0]
        count = (1 - alpha) * self.count + alpha * (x.numel() // self.nf)
        a = alpha * (x.numel() // self.nf) / count
        batch_mean, batch_var = batch_mean.to(self.running_mean.dtype), batch_var.to(self.running_var.dtype)
        mean, var = merge_moments(self.running_mean, self.running_var, batch_mean, batch_var, a)
        step = mean, var, a, self.floor(seen)
        if torch.compiler.is_compiling():
            self.running_mean, self.running_var, self.seen, self.count = mean, var, seen, count
        else:
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
            self.seen.copy_(seen)
            self.count.copy_(count)
            if checkpointing() and not torch._C._are_functorch_transforms_active():
                self.steps.append((batch_mean, step))
        return step

    def recall(self, batch_mean):
        """What `track` returned for the batch with this mean, the latest first; what was recalled is forgotten."""
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
        if torch.is_tensor(seen): return CLAMP_VAR * (seen < CLAMP_IMAGES).to(self.running_var.dtype)
        return CLAMP_VAR if seen < CLAMP_IMAGES else None

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if self._buffers[name].dtype in HALF: self._buffers[name] = old.to(self._buffers[name].device)
        return self


def eager_cpu(x):
    return (x.is_cpu and type(x) is torch.Tensor and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
            and not torch._C._len_torch_dispatch_stack() and not torch._C._is_tracing())


def plain_step(x, nf):
    return (x.dtype in _ZERO and x.ndim > 1 and x.shape[1] == nf and x.numel() and eager_cpu(x)
            and torch._C._current_graph_task_id() == -1)


def in_backward(): return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpointing():
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def moments(x, dims):
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return mean, (centred * centred).mean(dims, keepdim=True)


def merge_moments(mean, var, batch_mean, batch_var, a):
    d, share = batch_mean - mean, a * (1 - a)
    var = torch.lerp(var, batch_var, a)
    var = var.addcmul_(d, d, value=share) if isinstance(a, float) else var + share * d * d
    return torch.lerp(mean, batch_mean, a), var


def scale_shift(centred, var, eps, weight, bias): return (centred * (weight * torch.rsqrt(var + eps))).add_(bias)


def channel_moments(x, host):
    x = wide(x.detach())
    if host: return torch.batch_norm_update_stats(x, None, None, 0.0)
    mean, var = moments(x, all_but_channels(x))
    return mean.flatten(), var.flatten()


def normalise_channels(x, weight, bias, stats, eps):
    if x.dtype in HALF: return normalise_channels(x.float(), weight.float(), bias.float(), stats, eps).to(x.dtype)
    if eager_cpu(x) and x.dtype is weight.dtype is stats[0].dtype: return _Fused.apply(x, weight, bias, stats, eps)
    return plain(x, weight, bias, *stats, eps)


def evaluate_channels(x, weight, bias, mean, var, eps, floor):
    if x.dtype in HALF:
        return evaluate_channels(x.float(), weight.float(), bias.float(), mean, var, eps, floor).to(x.dtype)
    if floor is not None: var = var.clamp_min(floor)
    if eager_cpu(x) and x.dtype is weight.dtype is mean.dtype:
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
    mean, var, weight, bias = (per_channel(t, x.ndim) for t in (mean, var, weight, bias))
    return scale_shift(x - mean, var, eps, weight, bias).to(x.dtype)


def as_functions(x, mean, var, a):
    """`x - mean` and `var` with their values, and their derivatives by brackets that are 0."""
    dims = all_but_channels(x)
    mean, var = mean.detach(), var.detach()
    u = wide(x) - per_channel(mean, x.ndim)
    m1, m2 = u.mean(dims, keepdim=True), (u * u).mean(dims, keepdim=True)
    shift, grow = a * (m1 - m1.detach()), a * (m2 - m2.detach())
    return u - shift, per_channel(var, x.ndim) + grow - shift * shift


def plain(x, weight, bias, mean, var, a, floor, eps):
    centred, var = as_functions(x, mean, var, a)
    if floor is not None: var = var.clamp_min(floor)
    return scale_shift(centred, var, eps, per_channel(weight, x.ndim), per_channel(bias, x.ndim)).to(x.dtype)


_ZERO, _ONE = ({t: torch.tensor(v, dtype=t, device="cpu") for t in (torch.float32, torch.float64)} for v in (0.0, 1.0))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stats, eps):
        mean, var, a, floor = stats                                 # (C,), (C,), numbers
        held = var if floor is None else var.clamp_min(floor)
        ctx.save_for_backward(x, weight)
        ctx.stats = mean, var, torch.add(held, _ONE[x.dtype], alpha=eps).rsqrt_(), eps, a, floor
        return torch.batch_norm(x, weight, bias, mean, held, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        mean, var, rstd, eps, a, floor = ctx.stats
        if torch.is_grad_enabled(): return *differentiable(x, weight, mean, var, eps, a, floor, g), None, None
        share = torch.lerp(_ZERO[x.dtype], weight, a)
        gx, gw, gb = torch.ops.aten.native_batch_norm_backward(g, x, share, None, None, mean, rstd, True, eps,
                                                               [True] * 3)
        gx.addcmul_(g, per_channel(weight * rstd, x.ndim), value=1 - a)
        if floor is not None:   # gw = sum(g xhat): give back the variance's term where the floor holds it
            back = a * weight * rstd * rstd * gw / (x.numel() // len(weight)) * (var < floor)
            gx.addcmul_(x - per_channel(mean, x.ndim), per_channel(back, x.ndim))
        return gx, gw, gb, None, None


def differentiable(x, weight, mean, var, eps, a, floor, g):
    centred, var = as_functions(x, mean, var, a)
    rstd, free = torch.rsqrt((var if floor is None else var.clamp_min(floor)) + eps), True
    if floor is not None: free = var >= floor
    xhat, scale, dims = centred * rstd, per_channel(weight, x.ndim) * rstd, all_but_channels(g)
    dot, total = (g * xhat).sum(dims, keepdim=True), g.sum(dims, keepdim=True)
    share = a / (g.numel() // g.shape[1])
    return scale * (g - share * total - share * dot * free * xhat), dot.reshape(-1), total.reshape(-1)
