"""What acts on a figure of the history after each epoch: `EarlyStopping`, `KeepBest`."""

import difflib
import math
import os
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from runner.averaged import AveragedWeights, tensors_of
from runner.events import Callback, CancelTrainException
from runner.files import replacing, require_folder
from runner.metrics import AvgStatsCallback
from runner.ranks import ranks_of
from runner.stateful import Stateful

LOWER = ("error", "err", "mae", "mse", "rmse", "perplexity")
HIGHER = ("acc", "f1", "auc", "precision", "recall", "score")
Mode = Literal["min", "max"]


class Monitor(Stateful):
    """Reads a figure of the history after each epoch; the base of what acts on one.

    Args:
        monitor: the figure's name in the rows of `AvgStatsCallback`, such as "valid_loss".

    Raises:
        ValueError: at the start of a fit, a runner without `AvgStatsCallback`; after its first epoch, a figure that the
            history lacks.
    """

    fit_only = True
    _saved: tuple[str, ...] = ("_ran",)

    def __init__(self, monitor: str) -> None:
        self.monitor, self._ran = monitor, set[str]()

    def begin_fit(self) -> None: statistics_of(self.run, self)

    def begin_epoch(self) -> None: self._ran = set()

    def after_loss(self) -> None: self._ran.add("train" if self.run.in_train else "valid")

    def figure(self) -> float | None:
        """This epoch's figure; None where its pass was skipped, of which it would be."""
        row = statistics_of(self.run, self).history[-1]
        if self.monitor not in row:
            near = difflib.get_close_matches(self.monitor, row, 1, 0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{type(self).__name__}: the history has no {self.monitor!r}: {hint}There are: "
                             f"{', '.join(row)}")
        phase, ranks = self.monitor.split("_")[0], ranks_of(self.run)
        if phase in ("train", "valid") and not ranks.any(phase in self._ran): return None
        return float(row[self.monitor])

    @property
    def epoch_now(self) -> int:
        """This epoch's number in the history, which counts on from fit to fit."""
        return int(statistics_of(self.run, self).history[-1]["epoch"])


def statistics_of(run: Any, cb: Callback) -> AvgStatsCallback:
    """The runner's callback whose `history` is read by `cb`."""
    for other in run.cbs:
        if isinstance(other, AvgStatsCallback): return other
    raise ValueError(f"{type(cb).__name__} reads the history of AvgStatsCallback, and the runner has none: add one, "
                     "Runner([AvgStatsCallback(accuracy), ...])")


def mode_of(cb: Callback, monitor: str, mode: Mode | None) -> Mode:
    """`mode`, or what the name `monitor` says."""
    if mode == "min" or mode == "max": return mode
    if mode is not None: raise ValueError(f"{type(cb).__name__}: mode is {mode!r}; choose 'min' or 'max'")
    words = monitor.lower().split("_")
    if "loss" in monitor.lower() or any(word in LOWER for word in words): return "min"
    if "accuracy" in monitor.lower() or any(word in HIGHER for word in words): return "max"
    raise ValueError(f"{type(cb).__name__}: is a lower {monitor!r} better, or a higher one? Its name doesn't say: give "
                     "mode='min' or mode='max'")


class EarlyStopping(Monitor):
    """Ends the fit when a figure of the history has not improved for `patience` epochs.

        for epoch in range(epochs):
            value = train_and_validate()
            if value < best - min_delta: best, wait = value, 0
            elif (wait := wait + 1) == patience: break

    It is used so:

        stop = EarlyStopping("valid_accuracy", patience=3, min_delta=0.001)
        run = Runner([AvgStatsCallback(accuracy), stop])
        run.fit(100, learn)
        stop.stopped_epoch, stop.best, stop.best_epoch

    An improvement is one by more than `min_delta` over the best so far. A figure that is not finite is none. An epoch
    whose validation was skipped doesn't count, if it's a figure of validation. It ends the fit after all other
    callbacks have had the epoch; `run.status` is "cancelled" then, and a line says why. The weights are the last ones:
    `KeepBest` keeps the best.

    Args:
        monitor: the figure's name in the history.
        patience: how many epochs without an improvement end the fit.
        min_delta: the least improvement that counts is above this.
        mode: "min" if lower is better, "max" if higher; None goes by the name, such as "loss" or "accuracy".

    `best` and `best_epoch` are None until there was a finite figure, `stopped_epoch` unless it ended the fit, `reason`
    is the line.

    Raises:
        ValueError: an argument out of its range, a name that doesn't say the mode; else as `Monitor`.
    """

    _order = 2000       # an exception here keeps the epoch's end from nobody
    _saved = "best", "best_epoch", "stopped_epoch", "wait", "reason"

    def __init__(self, monitor: str = "valid_loss", patience: int = 3, min_delta: float = 0.0,
                 mode: Mode | None = None) -> None:
        super().__init__(monitor)
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"EarlyStopping: patience is {patience!r}; it must be an integer of at least 1")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"EarlyStopping: min_delta is {min_delta!r}; it must be a number of at least 0")
        self.patience, self.min_delta = patience, min_delta
        self.mode: Mode = mode_of(self, monitor, mode)
        self._clear()

    def _clear(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.stopped_epoch: int | None = None
        self.wait, self.reason = 0, ""

    def begin_fit(self) -> None:
        super().begin_fit()
        self._clear()

    def after_epoch(self) -> None:
        value = self.figure()
        if value is None: return
        if math.isfinite(value) and (self.best is None or gain(value, self.best, self.mode) > self.min_delta):
            self.best, self.best_epoch, self.wait = value, self.epoch_now, 0
            return
        self.wait += 1
        if self.wait < self.patience: return
        self.stopped_epoch = self.epoch_now
        than = "been finite" if self.best is None else f"improved on {self.best:.6g} of epoch {self.best_epoch}" + (
            f" by more than {self.min_delta:g}" if self.min_delta else "")
        self.reason = (f"EarlyStopping: {self.monitor} has not {than} for {self.wait} epochs; the fit ends after epoch "
                       f"{self.stopped_epoch}, at {value:.6g}")
        print(self.reason, flush=True)
        raise CancelTrainException


def gain(value: float, best: float, mode: Mode) -> float:
    """How much better `value` is than `best`."""
    return best - value if mode == "min" else value - best


class KeepBest(Monitor):
    """Keeps the weights of the epoch with the best figure, and gives them back to the model at the end.

        for epoch in range(epochs):
            value = train_and_validate()
            if value < best: best, kept = value, copy.deepcopy(model.state_dict())
        model.load_state_dict(kept)

    It is used so:

        keep = KeepBest("valid_accuracy", path="best.pt")
        run = Runner([AvgStatsCallback(accuracy), keep])
        run.fit(10, learn)
        keep.best, keep.best_epoch              # the model has the weights of that epoch, and so has best.pt

    Kept are copies of parameters and buffers, on their device, as they were validated: with `AveragedWeights` the
    averages, if `monitor` is not a figure of training. The optimizer's state is not kept. Of equal figures the first
    counts, and one that is not finite never does; if there was no other nothing is kept, the model stays as it is, and
    a line says so.

    The model gets them when all epochs are done or a callback ended the fit (`EarlyStopping`, `TerminateOnNonFinite`).
    After an exception, Ctrl-C too, it stays as it is, and `apply()` gives them to it.

    Args:
        monitor, mode: as of `EarlyStopping`.
        path: a file for the best state dict, to be read by `model.load_state_dict(torch.load(path))`; written whenever
            there is a better one, and at no time half-written.
        restore: whether the model gets the best weights at the end.

    Raises:
        ValueError: a name that doesn't say the mode; at the start of a fit, a path in a folder that doesn't exist; else
            as `Monitor`.
    """

    _order = 1900       # after whoever changes weights at the end of an epoch, before EarlyStopping ends it
    _saved = "best", "best_epoch", "kept", "_epochs", "_looked", "_ended"

    def __init__(self, monitor: str = "valid_loss", mode: Mode | None = None, *,
                 path: str | os.PathLike[str] | None = None, restore: bool = True) -> None:
        super().__init__(monitor)
        self.mode: Mode = mode_of(self, monitor, mode)
        self.path, self.restore = path, restore
        self._clear()

    def _clear(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.kept: list[Tensor] | None = None
        self._epochs, self._looked, self._ended = 0, 0, False

    def begin_fit(self) -> None:
        super().begin_fit()
        self._clear()
        if self.path is not None: require_folder(self.path, "KeepBest")

    def after_epoch(self) -> None:
        value = self.figure()
        self._epochs, self._ended = self._epochs + 1, self.run.epoch + 1 == self.run.epochs
        if value is None: return
        self._looked += 1
        if not math.isfinite(value) or (self.best is not None and not gain(value, self.best, self.mode) > 0): return
        model = self._validated()
        self.kept = [t.detach().clone() for t in tensors_of(model)]
        self._write(model.state_dict())
        self.best, self.best_epoch = value, self.epoch_now

    def _write(self, state: dict[str, Any]) -> None:
        if self.path is None or not ranks_of(self.run).leads: return
        with replacing(self.path) as part: torch.save(state, part)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; the file has its weights then, and not those of an epoch that is done anew."""
        super().load_state_dict(state)
        if self.kept is None: return
        model, own = self.run.model, tensors_of(self.run.model)
        if len(own) != len(self.kept):          # the model has got another buffer since; nor can `apply` do anything
            self.kept = [t.to(own[0].device) for t in self.kept]
            return
        self.kept = [t.to(now.device) for t, now in zip(self.kept, own, strict=True)]
        best = {id(now): t for t, now in zip(self.kept, own, strict=True)}
        self._write({name: best.get(id(t), t) for name, t in model.state_dict(keep_vars=True).items()})

    def _validated(self) -> nn.Module:
        """The model, or the averages that were in its place in this epoch's validation."""
        for cb in self.run.cbs:
            if isinstance(cb, AveragedWeights) and cb.validated and not self.monitor.startswith("train"):
                assert cb.averaged_model is not None
                return cb.averaged_model.module
        return cast(nn.Module, self.run.model)

    def after_cancel_train(self) -> None: self._ended = True

    def after_fit(self) -> None:
        if not self._ended: return
        if self.kept is not None and self.restore: self.apply()
        if self.kept is None and (self._looked or (self._epochs and self.run.status == "ok")):
            why = f"was not finite in any of {self._looked} epochs" if self._looked else "is of a pass that was skipped"
            print(f"KeepBest: {self.monitor} {why}; nothing was kept", flush=True)

    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Give `model`, or that of the last fit, what was kept: in place, weights and buffers.

        Raises:
            ValueError: nothing was kept, or there is no model.
        """
        if self.kept is None:
            raise ValueError(f"KeepBest has kept nothing: there was no epoch with a finite {self.monitor!r} yet")
        if model is None and self.__dict__.get("run") is None:
            raise ValueError("KeepBest.apply: this is a copy, which has no runner; give it the model")
        into = tensors_of(self.run.model if model is None else model)
        for t, best in zip(into, self.kept, strict=True): t.copy_(best)
