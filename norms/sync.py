"""Statistics over several processes: `sync_norms`, and the collectives by which a step takes them.

With W processes (ranks), rank r's mean m_r and biased variance v_r over n_r values per channel, n = sum n_r:

    mean = sum w_r m_r        var = sum w_r (v_r + (m_r - mean)^2)        w_r = n_r / n

(Chan, Golub and LeVeque, 1979, for any number of parts at once: as `merge_moments` without cancellation.) The forward
gathers `(m_r, v_r, images, n_r)` of all ranks in one collective; all compute the same from the same numbers in the same
order, so that their buffers agree to the last bit. The backward sums the gradients of mean and var over the ranks, in
one collective:

    dL/dm_r = w_r (sum dL_s/dmean + 2 (m_r - mean) sum dL_s/dvar)        dL/dv_r = w_r sum dL_s/dvar

over ranks s, L = sum L_s. The sum's gradient is again a sum: so derivatives of any order are there, and forward-mode.

What is compiled has these as operators, which the compiler doesn't look into. They find the group when they run: what
was compiled before there was a group is right in it.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from norms.counts import Counts
from norms.kinds import is_norm
from norms.running_norm import RunningNorm

_groups: dict[str, Any] = {}        # the groups that were given, by the name that torch gave them


class ProcessRanks:
    """The processes of `group`, a `torch.distributed.ProcessGroup`; None: of the default group, once there is one."""

    def __init__(self, group: Any = None) -> None:
        self.group, self.key = group, ""
        if group is None: return
        from torch import distributed as dist
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            mend = "this process is not in it, and has no norms to synchronise with it" \
                if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER else \
                "it needs a torch.distributed.ProcessGroup, as new_group gives it, or None for all processes"
            raise TypeError(f"sync_norms got group={group!r}: {mend}")
        self.key = str(group.group_name)
        _groups[self.key] = group

    def size(self) -> int:
        """How many processes there are now; 1 where no group was joined."""
        return _size(self.key)

    def merge(self, mean: Tensor, var: Tensor, images: int, n: int,
              then: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """The mean and biased variance over all ranks, of this one's over `n` values per channel of `images` images.

        `then`: the result, where a forward pass is done again; nobody is asked a second time.

        Returns:
            Both, of the shape of `mean`, and `(images, values per channel, ranks)`, a tensor of the totals.
        """
        args = mean, var, images, n, self.key
        merged: tuple[Tensor, ...]
        merged = _merge_operator(*args) if torch.compiler.is_compiling() else _Merge.apply(*args, then)
        return merged

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t` over all ranks."""
        return _sum(t, self.key)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ProcessRanks": return self

    def __reduce__(self) -> tuple[type["ProcessRanks"], tuple[()]]:
        if self.group is not None:
            raise TypeError("a norm that is synchronised over a given group can't be pickled, for the group is this "
                            "process's own: save the state dict, which holds nothing of it; or call "
                            "norms.unsync_norms(model) first and sync_norms(model, group) after loading")
        return ProcessRanks, ()


class Synced(Counts):
    """How many norms of each class are synchronised; `left_alone` counts the norms that are not."""


def sync_norms(model: nn.Module, group: Any = None) -> Synced:
    """Let the norms of `model` take their training statistics over all processes; in place.

    With batch 1 on each of two processes a batch norm normalises by one image, twice; synchronised it does by both, as
    one process with batch 2 would: outputs, gradients and buffers are equal up to rounding, and all processes' buffers
    equal to the last bit. Synchronised are BatchNorm, RunningBatchNorm, what derives from them, and the
    rivals with running statistics (`norms.rivals`). All other norms are
    left alone, and the result names them: GroupNorm, LayerNorm and InstanceNorm need nothing, for their statistics are
    an image's own; torch's BatchNorm1d/2d/3d are not ours, so take `convert_norms(model, norms.BatchNorm)` first, or
    nn.SyncBatchNorm, which runs on GPUs alone.

    - Every process must run the same norms in the same order, in training forward and backward: each norm is one
      collective each way (2 C + 2 and 2 C numbers). In evaluation there is none.
    - Shares may differ in size, also be empty: a process without images gives the norms its `(0, C, H, W)`, gets as
      much back, and goes through the backward pass, by a loss such as `pred.sum()`.
    - A gradient is that of the sum of all processes' losses; `weight` and `bias` get this process's part of theirs.
      `DistributedDataParallel`, FSDP and what builds on them average them over W processes: let rank r's mean loss over
      b_r of all B images count W b_r / B, which is 1 where shares are equal.
    - Images and values are counted over all processes: in the momentum rule of RunningBatchNorm, in the unbiased
      variance of BatchNorm, by `recalibrate`.
    - The group is looked up at every step. Without one, or of one process, the norm is what it was, fast routes and
      all. So a script may call this before there is a group, and needn't know whether there will be one.
    - State dicts stay the same. Copies and pickles of the model are marked too (a pickle not of a given `group`), and
      so are the norms that `convert_norms` puts in a marked one's place.
    - What activation checkpointing does again asks nobody a second time. A compiled step (with torch.compile, also
      `fullgraph=True`) asks as it runs, and so is right in whatever group it comes to. Its order of collectives is the
      compiler's, which may be another one for another size of input where norms stand in parallel branches: compile
      such a model with shares of one size (drop the ragged last batch).

    With FSDP2, one call more than in a single process:

        sync_norms(model)
        for layer in model: fully_shard(layer)          # from torch.distributed.fsdp
        fully_shard(model)
        opt = torch.optim.SGD(model.parameters(), lr)   # after sharding, as ever

    A norm of your own takes part if it derives from `norms.running_norm.RunningNorm` and takes its training moments by
    `norms.shares.batch_moments`.

    Args:
        model: a norm, or any module that holds norms; wrapped or not.
        group: the processes, a `torch.distributed.ProcessGroup` that this one is in; None for all there are.

    Returns:
        `Counter` of the class names, such as `Counter({"RunningBatchNorm": 5})`; its `left_alone` counts the others.

    Raises:
        ValueError: no norm to synchronise in `model`. While training: no image on any of the processes.
        TypeError: a `group` that is none, or that this process is not in.
    """
    norms = [m for m in model.modules() if isinstance(m, RunningNorm)]
    left = Counter(type(m).__name__ for m in model.modules() if not isinstance(m, RunningNorm) and is_norm(m))
    if not norms:
        found = f" (it leaves {', '.join(sorted(left))} alone)" if left else ""
        raise ValueError(f"sync_norms found no norm to synchronise in {type(model).__name__}{found}; it needs "
                         "BatchNorm or RunningBatchNorm of this package: norms of an image's own statistics need "
                         "nothing, and torch's batch norms become ours by convert_norms(model, norms.BatchNorm)")
    ranks = ProcessRanks(group)
    for norm in norms: norm.synced = ranks
    return Synced(Counter(type(m).__name__ for m in norms), left)


def unsync_norms(model: nn.Module) -> Synced:
    """Undo `sync_norms`: let every norm of `model` normalise by its own process's share again; in place.

    Returns:
        `Counter` of the class names of the norms that were synchronised and are no longer; there may be none.
    """
    norms = [m for m in model.modules() if isinstance(m, RunningNorm) and m.synced is not None]
    for norm in norms: norm.synced = None
    return Synced(Counter(type(m).__name__ for m in norms))


def _group(key: str) -> Any: return _groups[key] if key else None      # None: torch's word for the default group


def _size(key: str) -> int:
    from torch import distributed as dist
    return dist.get_world_size(_group(key)) if dist.is_available() and dist.is_initialized() else 1


def _merged(mean: Tensor, var: Tensor, images: int, n: int, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """The values of `ProcessRanks.merge`."""
    from torch import distributed as dist
    size, c, counts = _size(key), mean.numel(), (images, n)
    own = torch.cat((mean.reshape(-1), var.reshape(-1), *(mean.new_full((1,), count) for count in counts)))
    rows = own.new_empty(size, len(own))
    if size > 1: dist.all_gather(list(rows.unbind()), own, group=_group(key))
    else: rows.copy_(own)
    means, variances, shown, values = rows.split((c, c, 1, 1), 1)           # (W, C) twice, (W, 1) twice
    total = values.sum()
    if n == 0 and not total:        # all find it, for a rank that has images doesn't look
        raise ValueError(f"a synchronised norm got no image on any of {size} processes; a mean needs at least one "
                         "value: skip empty batches before the model")
    share = torch.where(values > 0, values / total, 0)                      # (W, 1)
    # About one of the means, as `moments` does: where all are equal the result is exact.
    about = means.index_select(0, (values > 0).byte().argmax(0))            # (1, C)
    merged = about + (share * (means - about)).sum(0, keepdim=True)         # (1, C)
    spread = (share * (variances + (means - merged).square())).sum(0)
    totals = torch.cat((shown.sum().view(1), total.view(1), total.new_full((1,), size)))
    return merged.view(mean.shape), spread.view(mean.shape), totals


def _summed(t: Tensor, key: str) -> Tensor:
    from torch import distributed as dist
    size, total = _size(key), t.clone(memory_format=torch.contiguous_format)
    if size == 1: return total
    if t.is_cpu:                        # of so few numbers gloo's all_reduce takes twice as long
        rows = total.new_empty(size, *total.shape)
        dist.all_gather(list(rows.unbind()), total, group=_group(key))
        return rows.sum(0)
    dist.all_reduce(total, group=_group(key))
    return total


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mean, _, _, n, key, *_ = inputs
    merged, _, totals = output
    ctx.save_for_backward(mean, merged)
    ctx.share, ctx.key = n / totals[1], key


def _gradients(sum_: Callable[[Tensor, str], Tensor], ctx: Any, g_mean: Tensor, g_var: Tensor,
               _: Tensor) -> tuple[Tensor | None, ...]:
    mean, merged = ctx.saved_tensors
    g_mean, g_var = sum_(torch.stack((g_mean, g_var)), ctx.key).unbind()
    return ctx.share * (g_mean + 2 * (mean - merged) * g_var), ctx.share * g_var, None, None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(mean: Tensor, var: Tensor, images: int, n: int, key: str,
                then: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        return _merged(mean, var, images, n, key) if then is None else tuple(t.clone() for t in then)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], output[0])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]: return *_gradients(_sum, ctx, *grads), None

    @staticmethod
    def jvp(ctx: Any, t_mean: Tensor, t_var: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        mean, merged = ctx.saved_tensors
        return *_sum(ctx.share * torch.stack((t_mean, t_var + 2 * (mean - merged) * t_mean)), ctx.key).unbind(), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], mean: Tensor, var: Tensor, *args: Any) -> tuple[Any, Any]:
        mean, var = (t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                     for t, dim in zip((mean, var), in_dims, strict=False))
        return _Merge.apply(mean, var, *args), (0, 0, None)     # elementwise in the channels, so of any shape


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor, key: str) -> Tensor: return _summed(t, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None: _, ctx.key = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]: return _sum(g, ctx.key), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: None) -> Tensor: return _sum(t, ctx.key)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], t: Tensor, key: str) -> tuple[Tensor, int | None]:
        return _sum(t, key), in_dims[0]


@torch.library.custom_op("runnernorms::merge_over_ranks", mutates_args=())
def _merge_operator(mean: Tensor, var: Tensor, images: int, n: int, key: str) -> tuple[Tensor, Tensor, Tensor]:
    return _merged(mean, var, images, n, key)


@torch.library.custom_op("runnernorms::sum_over_ranks", mutates_args=())
def _sum_operator(t: Tensor, key: str) -> Tensor: return _summed(t, key)


def _sum(t: Tensor, key: str) -> Tensor:
    total: Tensor = _Sum.apply(t, key)
    return total


# An operator's gradient is made of operators. (To ask whether this is compiled would not do: torch 2.11 says no then.)
_merge_operator.register_fake(lambda mean, var, *_: (torch.empty_like(mean), torch.empty_like(var), mean.new_empty(3)))
_merge_operator.register_autograd(partial(_gradients, _sum_operator), setup_context=_keep)
_sum_operator.register_fake(lambda t, _: torch.empty_like(t, memory_format=torch.contiguous_format))
_sum_operator.register_autograd(lambda ctx, g: (_sum_operator(g, ctx.key), None),
                                setup_context=lambda ctx, inputs, output: setattr(ctx, "key", inputs[1]))
