"""`Runner.evaluate` and `Runner.predict` over a loader: one pass without gradients, after which all is as it was."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runner.base import check_learner
from runner.batches import NoPair, joined, map_tensors
from runner.events import Callback, CancelBatchException, listify
from runner.metrics import AvgStats, AvgStatsCallback
from runner.states import loader_states, random_states

if TYPE_CHECKING: Run = Any      # a Runner, whose file imports this one

class _Evaluation(Callback):
    """Takes the loss and the metrics of each batch in, as `AvgStatsCallback` does."""

    def __init__(self, stats: AvgStats) -> None: self.stats = stats

    def after_loss(self) -> None: self.stats.accumulate(self.run)


class _Prediction(Callback):
    """Keeps predictions and targets on the host, as they are after all other callbacks, and ends the batch there."""

    _order = 1_000_000

    def __init__(self) -> None: self.preds, self.targets = [], []       # type: ignore[var-annotated]

    def after_pred(self) -> None:
        run = self.run
        self.preds.append(map_tensors(_on_host, run.pred))
        self.targets.append(map_tensors(_on_host, run.yb))
        raise CancelBatchException      # the targets may be none that the loss could take


class _Bare(Callback):
    """Takes a batch of inputs alone, a tensor or a tuple or list of one, as `xb` without targets."""

    _order = 1      # a callback that says what a batch is comes before, one that transforms `xb` after

    def begin_batch(self) -> None:
        run = self.run
        if not isinstance(run.yb, NoPair): return
        if isinstance(run.xb, (tuple, list)) and len(run.xb) == 1: run.xb, run.yb = run.xb[0], None
        elif isinstance(run.xb, Tensor): run.yb = None


def _on_host(t: Tensor) -> Tensor: return t.detach().cpu()


def evaluate(run: "Run", learn: Any, dl: Any = None, cbs: Any = None, metrics: Any = None) -> dict[str, float]:
    """The mean loss and the metrics of `learn` over `dl`: see `Runner.evaluate`."""
    averaged = next((cb for cb in [*run.cbs, *listify(cbs)] if isinstance(cb, AvgStatsCallback)), None)
    if metrics is None and averaged is not None: metrics = averaged.metrics
    stats = AvgStats(metrics, False)
    with _aside(run, learn, dl, [*listify(cbs), _Evaluation(stats)]): pass
    values = stats.avg_stats
    return dict(zip(stats.names, values, strict=True))


def predict(run: "Run", learn: Any, dl: Any = None, cbs: Any = None) -> tuple[Any, Any]:
    """Predictions of `learn` and targets over `dl`: see `Runner.predict`."""
    found = _Prediction()
    with _aside(run, learn, dl, [*listify(cbs), _Bare(), found]): pass
    if not found.preds: raise ValueError("no batch came to a prediction: a callback has cancelled them all")
    without = all(yb is None or isinstance(yb, NoPair) for yb in found.targets)
    return joined(found.preds), None if without else joined(found.targets)


@contextmanager
def _aside(run: "Run", learn: Any, dl: Any, cbs: Sequence[Any]) -> Iterator[None]:
    """Validate on `dl`, then put back what a pass changes: the runner's attributes, training modes, random states."""
    check_learner(learn, "valid_dl" if dl is None else None)
    if dl is None and (dl := learn.data.valid_dl) is None:
        raise ValueError("there is no loader: the learner's data have no valid_dl; give one, run.evaluate(learn, dl)")
    modules = [m for top in (learn.model, learn.loss_func) if isinstance(top, nn.Module) for m in top.modules()]
    modes = [(m, m.training) for m in modules]
    before = dict(vars(run))
    kept = [cb for cb in run.cbs if not getattr(cb, "fit_only", False)]
    parts = _attributes(kept), loader_states(dl), random_states()
    try:
        with run.validating(learn, cbs), torch.no_grad(): run.all_batches("begin_validate", dl, skip=False)
        yield
    finally:
        run.__dict__.clear()
        run.__dict__.update(before)
        for m, training in modes: m.training = training
        for restore in parts: restore()


def _attributes(objects: Sequence[object]) -> Callable[[], None]:
    """Copy the attributes of `objects`, lists, dicts, sets and deques by content; returns a function to put them back.
    """
    own = [(o.__dict__, dict(o.__dict__)) for o in objects if hasattr(o, "__dict__")]
    contents: list[tuple[Any, Any]] = [(c, copy.copy(c)) for _, had in own for c in had.values()
                                       if type(c) in (list, dict, set, deque)]

    def restore() -> None:
        for now, had in own:
            now.clear()
            now.update(had)
        for c, was in contents:
            c.clear()
            (c.update if isinstance(c, (dict, set)) else c.extend)(was)
    return restore
