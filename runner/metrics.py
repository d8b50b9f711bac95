"""Metrics and what records them: `accuracy`, `AvgStats`, `AvgStatsCallback`, `Recorder`.

Nothing here brings a number to the host inside a batch: sums stay on the device until they are asked for.
"""

import numbers
import time
from bisect import bisect_right
from itertools import count

import torch

from runner.batches import NoPair, size_of
from runner.events import Callback, listify
from runner.rows import Rows


def accuracy(out, yb):
    """Share of rows of `out` `(N, C)` whose largest entry is at the label `yb` `(N,)`, a 0-dim tensor in 0 to 1."""
    return (out.argmax(dim=1) == yb).float().mean()


class AvgStats:
    """Averages of the loss and of metrics over the images of a pass, each batch weighted by its size.

        avg = sum_batches(value * batch size) / sum_batches(batch size)

    Args:
        metrics: functions `f(pred, yb)` that return one number, the mean over the batch.
        in_train: whether this is the training pass; it only names the result.

    `names` are "loss" and the metrics' names, a second metric of one name with "_2" after it.
    The sums are float64 (float32 on MPS, which lacks the other): 25,000 float32 additions would lose four digits.
    """

    def __init__(self, metrics, in_train):
        self.metrics, self.in_train = listify(metrics), in_train
        self.names = ["loss"]
        for m in self.metrics:
            name = getattr(getattr(m, "func", m), "__name__", type(m).__name__)     # `func`: of a partial
            self.names.append(next(n for k in count(1) if (n := name if k == 1 else f"{name}_{k}") not in self.names))
        self.reset()

    def reset(self):
        self.sums, self.count = None, 0

    @property
    def all_stats(self):
        """The sums as plain floats, the loss first; this waits for the device."""
        return [0.0] * (1 + len(self.metrics)) if self.sums is None else torch.stack(self.sums).tolist()

    @property
    def avg_stats(self):
        """The averages as plain floats, the loss first; NaN before any batch."""
        return [s / self.count if self.count else float("nan") for s in self.all_stats]

    def accumulate(self, run):
        """Take the runner's current batch in.

        Raises:
            ValueError: the loss or a metric is not one number.
        """
        n = size_of(run.xb if torch.is_tensor(run.xb) else (run.xb, run.yb, run.pred))
        yb = run.xb if isinstance(run.yb, NoPair) else run.yb       # of a batch that is no pair the whole
        values = [run.loss.detach(), *(m(run.pred, yb) for m in self.metrics)]
        if self.sums is None:
            dtype = torch.float32 if run.loss.device.type == "mps" else torch.float64
            self.sums = [torch.zeros((), dtype=dtype, device=run.loss.device) for _ in values]
        for i, v in enumerate(values):
            if torch.is_tensor(v): fault = f"a tensor of shape {tuple(v.shape)}" if v.ndim else None
            else: fault = None if isinstance(v, numbers.Number) else f"{v!r} ({type(v).__name__})"
            if fault:
                what = "the loss function" if i == 0 else f"the metric {self.names[i]!r}"
                raise ValueError(f"{what} returned {fault}; it must return one number per batch: end it with .mean()")
            self.sums[i].add_(v if torch.is_tensor(v) else float(v), alpha=n)
        self.count += n

    def __repr__(self):
        return f"{'train' if self.in_train else 'valid'}: {self.avg_stats}" if self.count else ""


class AvgStatsCallback(Callback):
    """Averages loss and metrics over each pass and reports them after each epoch.

    Without a `ProgressCallback` it prints one line per pass, as the lesson's does. `history` is a list of plain
    rows, one per epoch: `{"epoch": 0, "train_loss": ..., "train_accuracy": ..., "valid_loss": ..., "seconds": ...}`.
    A pass that was skipped leaves NaN. Without a validation loader there are no such columns.

    Args:
        metrics: one or a list of functions `f(pred, yb)` that return one number.
    """

    def __init__(self, metrics=None):
        metrics = listify(metrics)  # once: a generator can be read only once
        self.train_stats, self.valid_stats = AvgStats(metrics, True), AvgStats(metrics, False)
        self.history = []

    def begin_fit(self):
        self.history = []

    def begin_epoch(self):
        self.train_stats.reset()
        self.valid_stats.reset()
        self.start = time.perf_counter()

    def after_loss(self):
        with torch.no_grad(): (self.train_stats if self.run.in_train else self.valid_stats).accumulate(self.run)

    def after_epoch(self):
        row, data = {"epoch": self.epoch}, getattr(self.run, "data", None)
        for phase, stats in (("train", self.train_stats), ("valid", self.valid_stats)):
            if phase == "valid" and getattr(data, "valid_dl", data) is None and data is not None: continue
            row.update((f"{phase}_{name}", v) for name, v in zip(stats.names, stats.avg_stats, strict=True))
        row["seconds"] = time.perf_counter() - self.start
        self.history.append(row)
        logger = getattr(self.run, "logger", None)
        if logger is not None: logger(row)
        else: print("\n".join(filter(None, map(repr, (self.train_stats, self.valid_stats)))), flush=True)


class Recorder(Callback):
    """Keeps the loss and the learning rates of every training batch.

    `losses` is a list of floats, `lrs` one list of floats per parameter group, `rows` both as `Rows`. A batch that was
    cancelled before it had a loss is in none of them; one cancelled later is, though the optimizer did not step.
    """

    def __init__(self):
        self._clear()

    def _clear(self):
        self.lrs, self._losses, self._waiting = [], [], []
        self._steps, self._epochs = [], []      # n_iter of each loss; of each epoch (n_iter at its start, its number)

    def begin_fit(self):
        self._clear()
        self.lrs = [[] for _ in self.opt.param_groups]

    def begin_epoch(self): self._epochs.append((self.run.n_iter, self.epoch))

    def after_loss(self):
        run = self.run
        if not run.in_train: return
        for group, lrs in zip(run.opt.param_groups, self.lrs, strict=True): lrs.append(float(group["lr"]))
        self._steps.append(run.n_iter)
        self._waiting.append(run.loss.detach())

    def after_epoch(self): self._fetch()

    def after_fit(self): self._fetch()

    def _fetch(self):
        """Bring the losses that still lie on the device to the host, in one transfer."""
        if self._waiting: self._losses += torch.stack(self._waiting).tolist()
        self._waiting = []

    @property
    def losses(self):
        self._fetch()
        return self._losses

    @property
    def rows(self):
        """One row per training batch, made anew at each call, as `Rows`:

            {"phase": "train", "epoch": 0, "batch": 0, "step": 0, "loss": 2.3, "lr": 0.4}

        `batch` counts within the epoch and `step` within the fit, from 0 and with the batches that left no row. Several
        parameter groups have "lr_0", "lr_1", ... too, and "lr" is the last one's, as in `plot_lr`.
        """
        rows = Rows()
        for step, loss, *lrs in zip(self._steps, self.losses, *self.lrs, strict=True):
            start, epoch = self._epochs[bisect_right(self._epochs, step, key=lambda begun: begun[0]) - 1]
            rows.append({"phase": "train", "epoch": epoch, "batch": step - start, "step": step, "loss": loss,
                         "lr": lrs[-1]})
            if len(lrs) > 1: rows[-1].update((f"lr_{i}", lr) for i, lr in enumerate(lrs))
        return rows

    def plot_lr(self, pgid=-1, ax=None):
        """Learning rate of parameter group `pgid` against the step; returns the axes."""
        from runner.insight import plots
        return plots.plot_line(self.lrs[pgid], ax=ax, xlabel="step", ylabel="learning rate")

    def plot_loss(self, skip_last=0, ax=None):
        """Training loss against the step, without the last `skip_last`; returns the axes."""
        from runner.insight import plots
        return plots.plot_line(self.losses[:len(self.losses) - skip_last], ax=ax, xlabel="step", ylabel="training loss")

    def plot(self, skip_last=0, pgid=-1, ax=None):
        """Training loss against the learning rate (log axis), as after a rate finder; returns the axes."""
        from runner.insight import plots
        n = len(self.losses) - skip_last
        return plots.plot_line(self.losses[:n], self.lrs[pgid][:n], ax=ax, xscale="log", xlabel="learning rate",
                               ylabel="training loss")
