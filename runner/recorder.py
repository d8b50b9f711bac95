"""`Recorder`: the loss and the rates of every training batch."""

from array import array
from typing import Any

import torch

from runner.history import History
from runner.ranks import ranks_of
from runner.rows import Rows
from runner.stateful import column


class Recorder(History):
    """Keeps the loss and the learning rates of every training batch, over all fits of its runner.

        if in_train:                        # after_loss
            losses.append(loss)
            for group, column in zip(opt.param_groups, lrs): column.append(group["lr"])

    `losses` is a list of floats, `lrs` one list of floats per parameter group, `rows` both as `Rows`. A batch that was
    cancelled before it had a loss is in none of them; one cancelled later is, though the optimizer did not step.

    The list of a group that was added later (`opt.add_param_group`) starts with the batch at which it was there, so it
    is shorter than `losses`; `rows` has "lr_0", "lr_1", ... of the groups that there were at that batch.
    """

    _saved = ("_batch",)

    def clear(self) -> None:
        self.lrs: list[list[float]] = []
        self._losses: list[float] = []
        self._waiting: list[torch.Tensor] = []                  # losses on the device, after those of `_losses`
        self._weights: list[float] = []                         # of theirs this process's share of the images
        self._at = array("q")                   # of each loss four: epoch, batch, step, number of groups
        self._batch = 0

    def mark(self) -> tuple[int, list[int]]: return len(self._at) // 4, [*map(len, self.lrs)]

    def cut(self, mark: tuple[int, list[int]]) -> None:
        n, lengths = mark
        self._losses, self._at = self.losses[:n], self._at[:4 * n]
        self.lrs = [lrs[:k] for lrs, k in zip(self.lrs, lengths, strict=False)]

    def begin_fit(self) -> None:
        super().begin_fit()
        self._follow(len(self.run.opt.param_groups))

    def _follow(self, n: int) -> None:
        while len(self.lrs) < n: self.lrs.append([])

    def begin_epoch(self) -> None:
        super().begin_epoch()
        self._batch = 0

    def after_loss(self) -> None:
        run = self.run
        if not run.in_train: return
        groups = run.opt.param_groups
        if len(groups) > len(self.lrs): self._follow(len(groups))
        for group, lrs in zip(groups, self.lrs, strict=False): lrs.append(float(group["lr"]))
        self._at.extend((self.past_epochs + run.epoch, self._batch, self.past_steps + run.n_iter, len(groups)))
        self._waiting.append(run.loss.detach())
        self._weights.append(ranks_of(run).weight)

    def after_batch(self) -> None:
        if self.run.in_train: self._batch += 1

    def after_epoch(self) -> None:
        super().after_epoch()
        self._fetch()

    def after_fit(self) -> None:
        super().after_fit()
        self._fetch()

    def _fetch(self) -> None:
        """Bring the losses that still lie on the device to the host, in one transfer; of several processes the means.
        """
        if not self._waiting: return
        losses, ranks = torch.stack(self._waiting), ranks_of(self.run)
        if ranks.size > 1:
            weights = torch.tensor(self._weights, dtype=torch.float64, device=losses.device)
            losses = ranks.sum(losses * weights)
        self._losses += losses.tolist()
        self._waiting, self._weights = [], []

    def state_dict(self) -> dict[str, Any]:
        """Losses, rates and where they belong, in columns."""
        self._fetch()
        return {**super().state_dict(), "losses": column(self.losses), "lrs": [*map(column, self.lrs)],
                "at": column(self._at, "q")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches of `state`."""
        super().load_state_dict(state)
        self._losses, self._waiting, self._weights = state["losses"].tolist(), [], []
        self.lrs, self._at = [lrs.tolist() for lrs in state["lrs"]], array("q", state["at"].tolist())

    @property
    def losses(self) -> list[float]:
        # In mid-epoch one process may ask alone: those that wait are its own part's as yet.
        if self._waiting and ranks_of(self.run).size > 1: return self._losses + torch.stack(self._waiting).tolist()
        self._fetch()
        return self._losses

    @property
    def rows(self) -> Rows:
        """One row per training batch, made anew at each call, as `Rows`:

            {"phase": "train", "epoch": 0, "batch": 0, "step": 0, "loss": 2.3, "lr": 0.4}

        `batch` counts within the epoch, from 0 and with the batches that left no row; `step` is the number of steps
        done before, in all fits. Several parameter groups have "lr_0", "lr_1", ... too, and "lr" is the last one's, as
        in `plot_lr`.
        """
        rows, columns = Rows(), [*map(iter, self.lrs)]
        for epoch, batch, step, groups, loss in zip(*(self._at[i::4] for i in range(4)), self.losses, strict=True):
            lrs = [next(column) for column in columns[:groups]]
            rows.append({"phase": "train", "epoch": epoch, "batch": batch, "step": step, "loss": loss, "lr": lrs[-1]})
            if groups > 1: rows[-1].update((f"lr_{i}", lr) for i, lr in enumerate(lrs))
        return rows

    def _batches_of(self, pgid: int) -> list[int]:
        """Which of the batches had parameter group `pgid`."""
        pgid = range(len(self.lrs))[pgid] if self.lrs else 0
        return [i for i, groups in enumerate(self._at[3::4]) if groups > pgid]

    def plot_lr(self, pgid: int = -1, ax: Any = None) -> Any:
        """Learning rate of parameter group `pgid` against the step; returns the axes."""
        from runner.insight import plots
        return plots.plot_line(self.lrs[pgid], self._batches_of(pgid), ax=ax, xlabel="step", ylabel="learning rate")

    def plot_loss(self, skip_last: int = 0, ax: Any = None) -> Any:
        """Training loss against the step, without the last `skip_last`; returns the axes."""
        from runner.insight import plots
        return plots.plot_line(self.losses[:len(self.losses) - skip_last], ax=ax, xlabel="step", ylabel="training loss")

    def plot(self, skip_last: int = 0, pgid: int = -1, ax: Any = None) -> Any:
        """Training loss against the learning rate (log axis), as after a rate finder; returns the axes."""
        from runner.insight import plots
        n = len(self.losses) - skip_last
        points = [(lr, self.losses[i]) for i, lr in zip(self._batches_of(pgid), self.lrs[pgid], strict=True) if i < n]
        return plots.plot_line([loss for _, loss in points], [lr for lr, _ in points], ax=ax, xscale="log",
                               xlabel="learning rate", ylabel="training loss")
