"""Metrics and their averages: `accuracy`, `AvgStats`, `AvgStatsCallback`.

Nothing here brings a number to the host inside a batch: sums stay on the device until they are asked for.
"""

import copy
import math
import numbers
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from runner.attributes import load as load_state
from runner.attributes import state_of
from runner.batches import NoPair, joined, map_tensors, size_of
from runner.console import say
from runner.events import camel2snake, listify
from runner.history import History
from runner.ranks import Ranks, ranks_of
from runner.rows import Rows
from runner.stateful import columns, rows_of


def accuracy(out: Tensor, yb: Tensor) -> Tensor:
    """Share of rows of `out` `(N, C)` whose largest entry is at the label `yb` `(N,)`, a 0-dim tensor in 0 to 1.

    Outputs `(N, C, L)` have labels `(N, L)`, and so on, as for `F.cross_entropy`.

    Raises:
        ValueError: labels of another shape, or no integers; fewer than two classes.
        TypeError: something that is no tensor.
    """
    for name, t in (("predictions", out), ("labels", yb)):
        if not isinstance(t, Tensor): raise TypeError(f"accuracy got {name} of type {type(t).__name__}; it needs "
                                                      "tensors: write a metric f(pred, yb) that takes yours apart")
    if out.ndim < 2 or out.shape[1] < 2:
        raise ValueError(f"accuracy got predictions of shape {tuple(out.shape)}; it needs one score for each of at "
                         "least two classes along axis 1, (N, C): with a single score per item write a metric of your "
                         "own, such as ((pred > 0).flatten() == (yb > 0.5).flatten()).float().mean()")
    shape = out.shape[:1] + out.shape[2:]
    whole = not (yb.is_floating_point() or yb.is_complex())
    if yb.shape == shape and whole: return (out.argmax(dim=1) == yb).float().mean()
    if yb.shape == out.shape: mend = "yb.argmax(1), if these are probabilities or one-hot"
    else:
        steps = [".squeeze(1)"] if yb.shape == (*shape[:1], 1, *shape[1:]) else [".flatten()"] * (
            yb.shape != shape and len(shape) == 1 and yb.numel() == shape[0])
        mend = f"yb{''.join(steps)}{'' if whole else '.long()'}" if steps or yb.shape == shape else ""
    raise ValueError(f"accuracy got labels of shape {tuple(yb.shape)} and {yb.dtype} for predictions of shape "
                     f"{tuple(out.shape)}; it needs the number of a class for each, of shape {tuple(shape)} and an "
                     f"integer type" + (f": use {mend}" if mend else ": give the loader, or a metric of your own, "
                                                                     "labels of that shape"))


def has_state(metric: object) -> bool:
    """Whether `metric` is an object with `update`, `compute` and `reset`, as those of torchmetrics.

    Raises:
        TypeError: the class of such an object.
    """
    if not all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset")): return False
    if isinstance(metric, type):
        raise TypeError(f"the metric {metric.__name__} is a class; give an object of it: {metric.__name__}()")
    return True


def name_of(metric: Any) -> str:
    """Its `name`; or else a function's own (that of a partial's function), or its class's in snake case."""
    if isinstance(name := getattr(metric, "name", None), str): return name
    if has_state(metric): return str(camel2snake(type(metric).__name__))
    name = getattr(getattr(metric, "func", metric), "__name__", type(metric).__name__)  # `func`: of a partial
    return str(name)


def distinct(names: Iterable[str]) -> list[str]:
    """`names`, where one comes again with "_2" after it, then "_3"."""
    found: list[str] = []
    for name in names:
        k, new = 1, name
        while new in found: new = f"{name}_{(k := k + 1)}"
        found.append(new)
    return found


class AvgStats:
    """Averages of the loss and of metrics over the items of a pass, each batch weighted by its size.

        avg = sum_batches(value * batch size) / sum_batches(batch size)

    A metric with state is not averaged. It sees every batch and is asked once, at the end:

        metric.reset()                                          # at the start of the pass
        for each batch: metric.update(pred, yb)                 # without a graph
        value = metric.compute()                                # a number, or a dict of numbers

    In a checkpoint is what a metric with state has gathered: its `state_dict()`, or else its attributes.

    Args:
        metrics: functions `f(pred, yb)` that return one number, the mean over the batch, and objects with `update`,
            `compute` and `reset`. Of these it takes copies, which move to the loss's device if they have a method `to`.
        in_train: whether this is the training pass; it only names the result.

    `names` are "loss" and the metrics' names, a second metric of one name with "_2" after it; in the place of a metric
    that computes a dict stand its keys.
    The sums are float64 (float32 on MPS, which lacks the other): 25,000 float32 additions would lose four digits.
    """

    def __init__(self, metrics: Any, in_train: bool) -> None:
        metrics = [metrics] if has_state(metrics) else listify(metrics)     # a collection of them can be iterated
        self.metrics: list[Any] = [copy.deepcopy(m) if has_state(m) else m for m in metrics]
        self.in_train = in_train
        self._functions = [(m, name_of(m)) for m in self.metrics if not has_state(m)]
        self._objects = [m for m in self.metrics if has_state(m)]
        self._columns = [[name_of(m)] for m in self.metrics]                # of each metric
        self.names = distinct(["loss", *(name for columns in self._columns for name in columns)])
        self.reset()

    def reset(self) -> None:
        self.sums: list[Tensor] | None = None
        self.count, self._placed = 0, False             # whether sums and metrics lie where the loss does
        self._held: list[Any] = []                      # predictions and targets, of one of several processes
        self._avg: list[float] | None = None            # once asked for
        for m in self._objects: m.reset()

    @property
    def all_stats(self) -> list[float]:
        """The sums as plain floats, the loss first, then the functions; this waits for the device."""
        sums: list[float] = [0.0] * (1 + len(self._functions)) if self.sums is None else torch.stack(self.sums).tolist()
        return sums

    @property
    def avg_stats(self) -> list[float]:
        """The averages, and what the metrics with state compute, as plain floats, the loss first; NaN before any batch.

        Raises:
            ValueError: a metric computes something else than numbers.
        """
        if not self.count: return [math.nan] * len(self.names)
        if self._avg is None:
            loss, *averages = (s / self.count for s in self.all_stats)
            left, values = iter(averages), [loss]
            for i, m in enumerate(self.metrics):
                found = self._computed(m) if has_state(m) else {self._columns[i][0]: next(left)}
                self._columns[i] = list(found)
                values += found.values()
            self.names = distinct(["loss", *(name for columns in self._columns for name in columns)])
            self._avg = values
        return list(self._avg)

    def combine(self, ranks: Ranks) -> None:
        """Let this be the averages over all processes, equal on each, when the pass is over.

        Sums are added up. A metric with state, which nobody knows how to add up, gets the predictions and targets of
        all processes, batch for batch as one process would have had them.
        """
        if ranks.size == 1 and not self._held: return       # which a checkpoint of several may have left
        totals = ranks.sum(torch.tensor([*self.all_stats, self.count], dtype=torch.float64))
        *sums, count = totals.unbind()
        self.sums, self.count, self._placed, self._avg = sums if count else None, int(count), False, None
        for m in self._objects:
            # Those of torchmetrics would add up what each process has, which is all.
            for part in m.modules() if isinstance(m, torch.nn.Module) else ():
                if hasattr(part, "distributed_available_fn"): part.distributed_available_fn = _alone  # type: ignore[assignment]
        for pred, yb in merged(ranks.gather(self._held)) if self._objects else ():
            for m in self._objects: m.update(pred, yb)
        self._held = []

    def _computed(self, metric: Any) -> dict[str, float]:
        """What `metric` computes: its name, or those of a dict, with their numbers."""
        with torch.no_grad(): value = metric.compute()
        found = value if isinstance(value, Mapping) else {name_of(metric): value}
        return {str(name): _number(v, name_of(metric)) for name, v in found.items()}

    def accumulate(self, run: Any) -> None:
        """Take the runner's current batch in.

        Raises:
            ValueError: the loss or a metric is not one number.
        """
        n = size_of(run.xb if torch.is_tensor(run.xb) else (run.xb, run.yb, run.pred))
        if not n and ranks_of(run).size > 1: return                 # this process had no image in the batch
        yb = run.xb if isinstance(run.yb, NoPair) else run.yb       # of a batch that is no pair the whole
        loss = run.loss.detach()
        values = [loss, *(m(run.pred, yb) for m, _ in self._functions)]
        if not self._placed:
            dtype = torch.float32 if loss.device.type == "mps" else torch.float64
            begun = [torch.zeros(()) for _ in values] if self.sums is None else self.sums
            self.sums, self._placed = [s.to(loss.device, dtype) for s in begun], True
            for m in self._objects:
                if callable(getattr(m, "to", None)): m.to(loss.device)
        assert self.sums is not None
        for i, v in enumerate(values):
            if torch.is_tensor(v): fault = f"a tensor of shape {tuple(v.shape)}" if v.ndim else None
            else: fault = None if isinstance(v, numbers.Number) else f"{v!r} ({type(v).__name__})"
            if fault:
                what = f"the metric {self._functions[i - 1][1]!r}" if i else "the loss function"
                raise ValueError(f"{what} returned {fault}; it must return one number per batch: end it with .mean()")
            self.sums[i].add_(v if torch.is_tensor(v) else float(v), alpha=n)
        if self._objects:
            pred = map_tensors(Tensor.detach, run.pred)     # one that is kept must not keep the batch's graph
            if ranks_of(run).size > 1: self._held.append(map_tensors(_on_host, (pred, yb)))
            else:
                for m in self._objects: m.update(pred, yb)
        self.count += n
        self._avg = None

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, and what the metrics with state have gathered.

        Raises:
            TypeError: a metric keeps something that no checkpoint can hold, and has no `state_dict`.
        """
        return {"sums": self.sums, "count": self.count, "names": self.names, "columns": self._columns, "avg": self._avg,
                "held": self._held,
                "metrics": [state_of(m, f"the metric {name_of(m)!r}") for m in self._objects]}

    @staticmethod
    def divided(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """The state for process `rank` of another number than that of `states`: rank 0 gets all that there is."""
        first, sums = dict(states[0]), [s["sums"] for s in states if s["sums"] is not None]
        if rank: return {**first, "sums": None, "count": 0, "avg": None, "held": []}
        return {**first, "sums": [sum(column[1:], column[0]) for column in zip(*sums, strict=True)] if sums else None,
                "count": sum(s["count"] for s in states), "avg": None, "held": merged([s["held"] for s in states])}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from `state`, with a model on `device`."""
        self.sums, self.count, self.names, self._columns, self._avg = (
            state[k] for k in ("sums", "count", "names", "columns", "avg"))
        self._held = list(state.get("held", ()))
        for m, its in zip(self._objects, state["metrics"], strict=True): load_state(m, its, torch.device(device))
        self._placed = False

    def __repr__(self) -> str:
        return f"{'train' if self.in_train else 'valid'}: {self.avg_stats}" if self.count else ""


def merged(held: Sequence[Sequence[tuple[Any, Any]]]) -> list[tuple[Any, Any]]:
    """The predictions and targets of whole batches, out of the parts of each process."""
    batches = ([pair for pair in parts if pair is not None] for parts in zip_longest(*held))
    return [(joined([pred for pred, _ in pairs]), joined([yb for _, yb in pairs])) for pairs in batches]


def _alone() -> bool: return False


def _on_host(t: Tensor) -> Tensor: return t.detach().cpu()


def _number(value: Any, name: str) -> float:
    """What the metric `name` computed, one number of any kind, as a float."""
    if isinstance(value, numbers.Number) or getattr(value, "ndim", None) == 0: return float(value)
    got = f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else f"{value!r} ({type(value).__name__})"
    raise ValueError(f"the metric {name!r} computed {got}; compute() must return one number, or a dict of numbers")


class AvgStatsCallback(History):
    """Averages loss and metrics over each pass and reports them after each epoch.

        stats.reset()                                                   # begin_epoch, for either pass
        stats.accumulate(run)                                           # after_loss
        history.append({"epoch": epoch, "train_loss": ..., ...})        # after_epoch

    Without a `ProgressCallback` it prints one line per pass, as the lesson's does. `history` is `Rows`, one per epoch:
    `{"epoch": 0, "train_loss": ..., "train_accuracy": ..., "valid_loss": ..., "seconds": ...}`. A second fit goes on in
    it, unless by `fit(..., reset_history=True)`. A pass that was skipped leaves NaN; without a validation loader there
    are no columns of validation.

        history = run.avg_stats.history
        history["valid_loss"], history.to_csv("history.csv"), history.plot("epoch", "valid_loss")

    Args:
        metrics: one or a list of functions `f(pred, yb)` that return one number, or of objects with `update(pred, yb)`,
            `compute()` and `reset()`, as those of torchmetrics (see `AvgStats`).
        quiet: print nothing.
    """

    def __init__(self, metrics: Any = None, *, quiet: bool = False) -> None:
        metrics = [metrics] if has_state(metrics) else listify(metrics)  # once: a generator can be read only once
        self.train_stats, self.valid_stats = AvgStats(metrics, True), AvgStats(metrics, False)
        self.metrics, self.quiet = metrics, quiet
        super().__init__()

    def clear(self) -> None:
        self.history = Rows()
        self._start: float | None = None

    def mark(self) -> int: return len(self.history)

    def cut(self, mark: int) -> None: self.history = self.history[:mark]

    def begin_epoch(self) -> None:
        super().begin_epoch()
        self._fresh()

    def _fresh(self) -> None:
        self.train_stats.reset()
        self.valid_stats.reset()
        self._start = time.perf_counter()

    def after_loss(self) -> None:
        with torch.no_grad(): (self.train_stats if self.run.in_train else self.valid_stats).accumulate(self.run)

    def _no_validation(self) -> bool:
        """Whether there is no loader for it; a runner of one's own may have no `data` at all."""
        data = getattr(self.run, "data", None)
        return data is not None and getattr(data, "valid_dl", data) is None

    def after_epoch(self) -> None:
        super().after_epoch()
        if self._start is None: self._fresh()       # another callback ended the training pass before this one heard
        row: dict[str, Any] = {"epoch": self.past_epochs + self.run.epoch}
        passes = [("train", self.train_stats), ("valid", self.valid_stats)]
        ranks = ranks_of(self.run)
        for _, stats in passes: stats.combine(ranks)
        values = {phase: stats.avg_stats for phase, stats in passes}
        for phase, stats in passes[:1 if self._no_validation() else 2]:
            # A skipped pass doesn't know what a metric's dict would have held; the other one may.
            names = stats.names if stats.count else next((s.names for _, s in passes if s.count), stats.names)
            found = values[phase] if stats.count else [math.nan] * len(names)
            row.update((f"{phase}_{name}", v) for name, v in zip(names, found, strict=True))
        row["seconds"] = ranks.first(time.perf_counter() - (self._start or 0.0))
        self._start = None
        self.history.append(row)
        logger = getattr(self.run, "logger", None)
        if logger is not None: logger(row)
        elif not self.quiet and (lines := [*filter(None, map(repr, (self.train_stats, self.valid_stats)))]):
            say("\n".join(lines))

    def state_dict(self) -> dict[str, Any]:
        """The history, both passes' averages so far, and the seconds of this epoch."""
        seconds = None if self._start is None else time.perf_counter() - self._start
        return {**super().state_dict(), "history": columns(self.history), "seconds": seconds,
                "train": self.train_stats.state_dict(), "valid": self.valid_stats.state_dict()}

    @staticmethod
    def divided(states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """The state for process `rank` of another number of processes than that of `states`."""
        return {**states[0], **{phase: AvgStats.divided([s[phase] for s in states], rank)
                                for phase in ("train", "valid")}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, in the middle of an epoch or between two."""
        super().load_state_dict(state)
        self.history, seconds = Rows(rows_of(state["history"])), state["seconds"]
        self._start = None if seconds is None else time.perf_counter() - seconds
        device = next((p.device for group in self.run.opt.param_groups for p in group["params"]), "cpu")
        for stats, its in ((self.train_stats, state["train"]), (self.valid_stats, state["valid"])):
            stats.load_state_dict(its, device)
