"""Data and figures of K networks that are trained as one: batches of K orders, losses and accuracies of each."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler

from experiments.results import Row
from experiments.study.stacked import unstack
from experiments.training import FIGURES, LOOK, measured_on
from runner import Dataset, view_tfm
from runner.callbacks import View
from runner.data import BatchLoader
from runner.stateful import Stateful

# --- the batches --------------------------------------------------------------------------------------------------

class _Indices(BatchLoader):
    """A loader that gives the numbers of a batch's items, in place of the items."""

    def fetch(self, indices: Any) -> Any: return indices


class SideBySide:
    """Batches of K orders of one data set side by side: `x` `(N, K, ...)`, `y` `(N, K)`.

    Args:
        ds: a `Dataset` of tensors.
        batch_size: N.
        seeds: of the K orders, each that of `get_dls` with a generator of this seed.
        drop_last: whether to leave out the last batch if it is smaller than the others.
    """

    def __init__(self, ds: Dataset, batch_size: int, seeds: Sequence[int], drop_last: bool = False) -> None:
        self.ds = ds
        self.loaders: list[_Indices] = []
        items: Any = ds         # has a length and items, and no base class that says so
        for seed in seeds:
            order = torch.Generator().manual_seed(seed)
            sampler: Any = BatchSampler(RandomSampler(items, generator=order), batch_size, drop_last)
            self.loaders.append(_Indices(items, None, sampler=sampler, generator=order))

    def __len__(self) -> int: return len(self.loaders[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batches in zip(*self.loaders, strict=True):
            at = torch.tensor(batches).t()                                                                      # (N, K)
            # Selecting takes a tenth of the time that an index of two axes does.
            x, y = (t.index_select(0, at.flatten()).unflatten(0, at.shape) for t in (self.ds.x, self.ds.y))
            yield x, y

    def state_dict(self) -> dict[str, Any]:
        """Where each order stands."""
        return {"loaders": [dl.state_dict() for dl in self.loaders]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on from there."""
        for dl, one in zip(self.loaders, state["loaders"], strict=True): dl.load_state_dict(one)


class EachTransform:
    """`(N, K, *)` to `(N, K C, *)`: a transform of images, on K networks' at once; None views 28x28 pixels."""

    def __init__(self, k: int, tfm: Callable[[Tensor], Tensor] | None = None) -> None:
        self.k, self.tfm = k, view_tfm(1, 28, 28) if tfm is None else tfm

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.tfm, View) and len(self.tfm.size) == 3:      # known to be a view: no more is needed
            c, *size = self.tfm.size
            return x.view(len(x), self.k * c, *size)
        y: Tensor = self.tfm(x.flatten(0, 1)).unflatten(0, (len(x), self.k))
        return y.flatten(1, 2)


# --- the figures --------------------------------------------------------------------------------------------------

def each_loss(pred: Tensor, yb: Tensor, smoothing: Tensor | None = None) -> Tensor:
    """The mean cross entropies `(K,)` of K networks side by side: of `(N, K c)` and `(N, K)`.

    With `smoothing` `(K,)` so much of each network's targets is spread over all classes alike.
    """
    scores = pred.view(yb.numel(), -1)                                                                  # (N K, c)
    if smoothing is None: return F.cross_entropy(scores, yb.flatten(), reduction="none").view(yb.shape).mean(0)
    logs = scores.log_softmax(1).view(*yb.shape, -1)                                                    # (N, K, c)
    right = logs.gather(2, yb.unsqueeze(2)).squeeze(2)                                                  # (N, K)
    return -((1 - smoothing) * right + smoothing * logs.mean(2)).mean(0)


class EachFigures(Stateful):
    """Loss and accuracy of each of K networks side by side: of every step, and of both data sets after each epoch.

    Validation is done here, network by network: in its large batches that is the faster way (of 20 networks, 250 images
    at once, 37 us of processor time per image and network; side by side 48 to 66).

    Args:
        models: the networks, which get the stack's values for it.
        valid: the validation set.
        batch_size: of the validation.
        tfm: transform of its batches.
        device: where all is.
    """

    fit_only = True

    def __init__(self, models: Sequence[nn.Module], valid: Dataset, batch_size: int,
                 tfm: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.models, self.valid, self.batch_size, self.tfm, self.device = models, valid, batch_size, tfm, device

    def summed_loss(self, pred: Tensor, yb: Tensor) -> Tensor:
        """The sum of the networks' losses."""
        each = each_loss(pred, yb)
        self.each = each.detach()
        return each.sum()

    def begin_fit(self) -> None:
        self.losses: list[Tensor] = []      # of each step, (K,)
        self.past: list[list[Row]] = []   # of each epoch a row for each network
        # Of a network that is lost, as `LeaveLost` has it: in which epoch, after how many steps, loss and accuracy.
        self.lost: dict[int, tuple[int, int, float, float]] = {}
        self._fresh()

    def begin_epoch(self) -> None: self._fresh()

    def _fresh(self) -> None:
        self.start, self.count, self.seen = time.perf_counter(), 0, 0
        self.sums: Tensor | None = None     # over the images, of the loss and the accuracy, (2, K)

    def after_loss(self) -> None:
        run = self.run
        if not run.in_train: return
        self.losses.append(self.each)
        with torch.no_grad():
            right = (run.pred.view(*run.yb.shape, -1).argmax(2) == run.yb).float().mean(0)          # as `accuracy`
            if self.sums is None: self.sums = torch.zeros(2, len(right), dtype=torch.float64, device=right.device)
            self.sums[0].add_(self.each, alpha=len(run.yb))
            self.sums[1].add_(right, alpha=len(run.yb))
        self.count += len(run.yb)

    def after_batch(self) -> None:
        if not self.run.in_train or self.sums is None: return
        self.seen += 1
        if self.seen % LOOK: return
        pred = self.run.pred
        gone = pred.view(len(pred), len(self.models), -1).isnan().all(2).all(0).tolist()                    # (K,)
        if not any(gone): return
        loss, right = (self.sums / self.count).tolist()
        for i in (i for i, is_gone in enumerate(gone) if is_gone and i not in self.lost):
            self.lost[i] = self.run.epoch, len(self.losses), loss[i], right[i]

    def after_epoch(self) -> None:
        k = len(self.models)
        train = [[math.nan] * k for _ in range(2)] if self.sums is None else (self.sums / self.count).tolist()
        for i, (epoch, _, *its) in self.lost.items():
            for figures, figure in zip(train, its, strict=True):
                figures[i] = figure if epoch == self.run.epoch else math.nan
        unstack(self.model, self.models)
        valid = zip(*(measured_on(m, self.valid, self.tfm, self.batch_size) for m in self.models), strict=True)
        seconds = time.perf_counter() - self.start
        figures = [dict(zip(FIGURES, its, strict=True)) for its in zip(*train, *valid, strict=True)]
        self.past.append([{"epoch": self.run.epoch, **its, "seconds": seconds / k} for its in figures])
        if self.run.logger is not None:
            means = {name: sum(its[name] for its in figures) / k for name in FIGURES}
            self.run.logger({"epoch": self.run.epoch, **means, "seconds": seconds})

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, the epochs' rows, the sums of this epoch and its seconds."""
        losses = torch.stack(self.losses).cpu() if self.losses else torch.empty(0)
        return {"losses": losses, "epochs": self.past, "sums": self.sums, "count": self.count, "seen": self.seen,
                "lost": self.lost,
                "seconds": time.perf_counter() - self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.losses, self.past, self.count = list(state["losses"].to(self.device)), state["epochs"], state["count"]
        self.seen, self.lost = state["seen"], {i: tuple(its) for i, its in state["lost"].items()}
        self.sums = None if state["sums"] is None else state["sums"].to(self.device)
        self.start = time.perf_counter() - state["seconds"]
