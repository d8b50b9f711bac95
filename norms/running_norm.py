"""The base of the norms with running statistics, which a training step may take over several processes."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.types import Device

from norms.moments import HALF, Norm, all_but_channels, channel_groups, check_channels, moments, wide


class Ranks(Protocol):
    """The processes that a norm takes its statistics over; `norms.sync` makes it, and nothing else asks torch for any.

    A norm of its own takes a step's statistics by `norms.shares.batch_moments`, which sees to all of this.
    """

    @property
    def key(self) -> str: ...           # by which `norms.sync` finds the group of processes again

    def size(self) -> int: ...          # how many there are now: 1 without a process group

    def merge(self, mean: Tensor, var: Tensor, images: int, n: int,
              then: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]: ...

    def sum(self, t: Tensor) -> Tensor: ...


class RunningNorm(Norm):
    """Base of the norms with running statistics: buffers `running_mean` (zeros), `running_var` (ones), and counters.

    Evaluation normalises by these two and nothing else, in every norm: what reads them from outside (a fusion with the
    convolution before, an export, another layer's state dict) gets what evaluation computes. They are float32 or wider
    whatever the module is cast to, and are written in place only, so that whatever holds them sees the update.

    `norms.sync_norms` marks the norm by `synced`: then a training step is taken over all processes.

    Args:
        nf, eps, affine, device, dtype: as in `Norm`; `weight` and `bias` are `(nf,)`.
        further: the norm's other buffers, `{name: (size, value before training)}`; those with an int are int64.
    """

    nf: int
    mom: float
    running_mean: Tensor
    running_var: Tensor
    fresh: dict[str, float]
    synced: Ranks | None = None     # of the class too: a module that was pickled by an earlier version has none
    _buffers: dict[str, Tensor]     # type: ignore[assignment]  # torch's may hold None; here all are tensors

    def __init__(self, nf: int, eps: float, further: Mapping[str, tuple[tuple[int, ...], float]], affine: bool = True,
                 device: Device = None, dtype: torch.dtype | None = None) -> None:
        check_channels(type(self).__name__, nf)
        super().__init__((nf,), eps, affine, device, dtype)
        self.nf, self.fresh, self.synced = nf, {}, None
        width = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        for name, (size, value) in {"running_mean": ((nf,), 0.0), "running_var": ((nf,), 1.0), **further}.items():
            kind = torch.int64 if isinstance(value, int) else width
            self.register_buffer(name, torch.empty(size, device=device, dtype=kind))
            self.fresh[name] = value
        self.reset_running_stats()

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Set the running statistics and their counts to what they are before training, in place."""
        for name, value in self.fresh.items(): self._buffers[name].fill_(value)

    def follow(self, missing: Collection[str]) -> None:
        """Bring the buffers called `missing` in line with `running_mean` and `running_var`, which came from outside."""

    def reset_parameters(self) -> None:
        """Set parameters and running statistics to what they are after construction, as torch's batch norms do."""
        self.reset_running_stats()
        super().reset_parameters()

    def statistic_groups(self, x: Tensor) -> Tensor: return channel_groups(x)     # (C, N * positions)

    @property
    def num_features(self) -> int:
        """`nf`, by the name that torch's functions on batch norms read, such as `fuse_linear_bn_eval`."""
        return self.nf

    @property
    def ranks(self) -> int:
        """The number of processes whose values a training step's statistics rest on: 1 unless `sync_norms` was here."""
        return 1 if self.synced is None else self.synced.size()

    def over_ranks(self) -> bool:
        """Whether this step's statistics are those of several processes; compiled, whether they may be when it runs."""
        if self.synced is None or not self.training: return False
        return torch.compiler.is_compiling() or self.synced.size() > 1

    def pooled_moments(self, x: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """What a training step on `x` rests on: its mean and biased variance, `(C,)` each, and how many images and
        values per channel these are of. Over several processes it is a collective.
        """
        images, n = x.shape[0], x.numel() // self.nf
        mean, var = (t.flatten() for t in moments(wide(x.detach()), all_but_channels(x))[:2]) if n else \
            [self.running_mean.new_zeros(self.nf)] * 2
        if self.synced is None: return mean, var, images, n
        mean, var, totals = self.synced.merge(mean, var, images, n)
        return mean, var, int(totals[0]), int(totals[1])

    def synced_repr(self) -> str: return "" if self.synced is None else ", synced"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningNorm":
        """Move or cast the module; `half()` and `bfloat16()` leave the running statistics at their width."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)     # type: ignore[no-untyped-call]  # torch's has no annotations
        for name, old in before.items():
            if self._buffers[name].dtype in HALF: self._buffers[name] = old.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any],
                              *args: Any) -> None:
        # With `assign=True` the checkpoint's tensors become the buffers: those of half precision are widened first.
        for name in self.fresh:
            found = state_dict.get(prefix + name)
            if isinstance(found, torch.Tensor) and found.dtype in HALF: state_dict[prefix + name] = found.float()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
