"""The training loop: `Runner` and the callback that every runner has; `runner.events` says what it calls."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, overload

import torch

from runner.base import Learner, RunnerBase
from runner.batches import NoPair, length_of, no_pair, pair
from runner.dispatch import Always
from runner.events import (
    EVENTS,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    listify,
)

if TYPE_CHECKING:
    from runner.lr_find import LRFindResult


class TrainEvalCallback(Callback):
    """Switches the model between training and evaluation and counts; every runner has one, before the others.

    `n_iter` is the number of steps done in this fit, one for each training batch but those that only add to the
    gradients (`GradientAccumulation`) or whose step is skipped (`MixedPrecision`); `n_epochs` is a float, what has been
    seen of the data: `epoch + batch / iters`. Where a loader has no length it is `epoch` until the pass is over.
    """

    _order = -10

    def begin_fit(self) -> None:
        self.run.n_epochs, self.run.n_iter, self.run.stepped = 0.0, 0, True

    def begin_epoch(self) -> None:
        self.run.n_epochs, self.done = float(self.epoch), 0
        self.model.train()
        self.run.in_train = True

    def after_batch(self) -> None:
        run = self.run
        if not run.in_train: return
        self.done += 1
        if run.stepped: run.n_iter += 1
        # Not summed up: 1/iters would drift. A loader may give more than its length.
        if run.iters: run.n_epochs = run.epoch + min(self.done / run.iters, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """How many training batches of the epoch are done."""
        return {"done": getattr(self, "done", 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.done = state["done"]

    def begin_validate(self) -> None:
        self.model.eval()
        self.run.in_train = False


class Runner(RunnerBase):
    """Owns the training loop and calls the callbacks at each of its events.

    Args:
        cbs: callbacks, one or a list.
        cb_funcs: functions without arguments that make callbacks, such as their classes or `partial`s of them.
        compile: compute prediction, loss and gradients of a training batch in one compiled graph, by the callback
            `runner.compiled.CompiledStep`, which says with what limits. It needs torch 2.11 and a C++ compiler.

    Each callback is exposed under its name: `run.recorder`. During a fit the runner has `xb, yb, pred, loss` (of
    the batch), `opt, model, loss_func, data` (of the learner), `in_train`, `stepped` (whether the training batch
    made a step), `n_epochs` (float), `n_iter`, `iters` (batches in this pass; None for a loader without a length),
    `epoch` and `epochs`. `first_epoch`, and `first_batch` in it, are where a fit goes on from a checkpoint, or 0.
    `fits` counts the fits that the runner has ended well.

    A batch is a pair `(xb, yb)`, a tuple or list of two, each a tensor or a nest of tensors (`runner.batches`). The
    model gets `xb` as it is; for `model(*xb)` or `model(**xb)` add

        class Splat(Callback):
            def predict(self): self.run.pred = self.model(**self.xb)

    Of any other batch the whole is `xb`, and a callback has to say in `begin_batch` what `xb` and `yb` are, or to do
    without `yb` by a `get_loss` of its own.

    `status` says how the last fit went: "ok" until something else is known, "diverged" if a callback that looks for it
    found a loss or a gradient that is not finite (`TerminateOnNonFinite`), "cancelled" if another callback left the
    fit by `CancelTrainException`, "failed" if an exception ended it.

    Raises:
        ValueError: two callbacks of one name, or a name that is an attribute of the runner.
        TypeError: something that is no callback, `compile` not True or False.
    """

    def __init__(self, cbs: "Callback | Iterable[Any] | None" = None,
                 cb_funcs: "Callable[[], Any] | Iterable[Callable[[], Any]] | None" = None, *, compile: bool = False,
                 ) -> None:
        if not isinstance(compile, bool): raise TypeError(f"compile is {compile!r}; it must be True or False")
        self.in_train, self.learn, self._fitting, self._loader, self.status = False, None, False, None, "ok"
        self.reset_history = self.evaluating = False
        self.fits = self.first_epoch = self.first_batch = 0
        # Where a row of statistics goes after each epoch; ProgressCallback sets it.
        self.logger: Callable[[dict[str, Any]], None] | None = None
        self._answers, self._replaced, self._around_passes = {event: [] for event in EVENTS}, set(), []
        always: list[Callback]
        self.cbs, self._lasting, always = [], list[Any](), [TrainEvalCallback()]
        if compile:
            from runner.compiled import CompiledStep
            always.append(CompiledStep())
        for cb in [*always, *listify(cbs), *(make() for make in listify(cb_funcs))]:
            self._expose(cb)
            self.cbs.append(cb)

    # --- the loop ---------------------------------------------------------------------------------------------

    def fit(self, epochs: int, learn: "Learner", cbs: "Callback | Iterable[Any] | None" = None, *,
            reset_history: bool = False, resume: "str | os.PathLike[str] | None" = None, strict: bool = True) -> None:
        """Train `learn` for `epochs` epochs, each followed by a validation; `cbs` take part in this fit only.

        Without a validation loader (None) there is none, nor its events. A loader is anything that can be iterated once
        per pass, with a length or without.

        Histories (`run.recorder`, `run.avg_stats.history`) go on from the fit before, with epochs and steps counted
        on, unless `reset_history`; `epoch` and `n_iter` start at 0 in each fit.

        Whatever ends the fit, `after_fit` reaches every callback, the runner can be used again, and an exception
        is the one that was raised first. Gradients left from before are cleared at the start.

        Args:
            resume: a checkpoint (see `Checkpoint`) to go on from, or a folder: then from the newest whole one there. In
                a folder without one, or that isn't there yet, the fit begins anew, so one script serves both. Build
                everything as for a new fit; `epochs` are all, counted from the beginning. A fit that was complete
                trains nothing, and ends as it did, history and all. More epochs than it had are added to it.
            strict: whether a checkpoint of a run that differs from this one is refused: other classes, loaders,
                versions, threads. False goes on with a warning. Other shapes are refused in any case, as is another
                order of images in the middle of an epoch.

        Raises:
            CheckpointError: the checkpoint is of another run, or of a later version of this library, or damaged (of a
                folder, a damaged one is skipped with a warning); a loader that can't go on in the middle of an epoch.
        """
        self.reset_history = reset_history
        cbs = listify(cbs)
        if resume is not None:
            from runner.resume import Resume
            cbs = [*cbs, Resume(resume, strict)]
        with ExitStack() as around:
            for cb in [*self.cbs, *cbs]:
                if hasattr(type(cb), "around_fit"): around.enter_context(cb.around_fit(self, learn))
            self._fit(epochs, learn, cbs)
        self.fits += not any(getattr(cb, "undoes_fit", False) for cb in [*self.cbs, *cbs])

    def _fit(self, epochs: int, learn: "Learner", cbs: list[Any]) -> None:
        with self._callbacks(epochs, learn, cbs), Always(self, "after_fit"), ExitStack() as around:
            for cb in self.cbs:
                if hasattr(type(cb), "around_loop"): around.enter_context(cb.around_loop())
            try:
                self("begin_fit")
                first = self.first_epoch
                for self.epoch in range(first, epochs):
                    self.all_batches("begin_epoch", self.data.train_dl)
                    self.first_batch = 0
                    if self.data.valid_dl is not None:
                        with torch.no_grad(): self.all_batches("begin_validate", self.data.valid_dl)
                    self("after_epoch")
            except CancelTrainException:
                if self.status == "ok": self.status = "cancelled"
                self("after_cancel_train")

    def evaluate(self, learn: "Learner", dl: Any = None, cbs: Any = None, *, metrics: Any = None) -> dict[str, float]:
        """The mean loss of `learn` over a loader, and the metrics: floats by name, `{"loss": 0.1, "accuracy": 0.9}`.

        It goes through the runner's callbacks, of which those with `fit_only` (histories, schedules, progress) stay
        out: `begin_fit`, `begin_validate`, the batches with `in_train` False, `after_fit`. A skipped validation is not
        skipped here. Afterwards all is as it was: the attributes of the runner and its callbacks, rates,
        training modes, random states.

        Args:
            dl: the loader; None for the learner's `valid_dl`.
            cbs: callbacks for this pass only.
            metrics: as in `AvgStatsCallback`; None for those of the runner's `AvgStatsCallback`, if it has one.
        """
        from runner.evaluation import evaluate
        return evaluate(self, learn, dl, cbs, metrics)

    def all_batches(self, begin: str, dl: Iterable[Any] | None, skip: bool = True) -> None:
        """One pass over `dl`, unless a callback returns True from the event `begin` (and `skip` lets it)."""
        try:
            self._loader, self.iters, some = dl, length_of(dl), self.first_batch > 0
            if self(begin) and skip: return
            batches: Iterable[Any] = () if dl is None else dl
            for around in self._around_passes: batches = around(batches)
            for batch in batches:
                some = True
                self.one_batch(*pair(batch))
            # Of several processes one may have no part of the last batches.
            if not self.ranks.any(some): raise ValueError(_no_batches(begin, dl))
            if self.in_train: self.n_epochs = self.epoch + 1.0
        except CancelEpochException: self("after_cancel_epoch")

    def one_batch(self, xb: Any, yb: Any) -> None:
        """One batch: forward and loss; in training also backward and the optimizer's step.

        A batch cancelled in `after_backward` keeps its gradients, so the next one adds to them; after a step they are
        cleared whatever happens.
        """
        self.xb, self.yb, self.stepped = xb, yb, True
        with Always(self, "after_batch"):
            try:
                self("begin_batch")
                self.predict()
                self("after_pred")
                self.get_loss()
                self("after_loss")
                if not self.in_train: return
                self.backward()
                self("after_backward")
                self.step()
                try:
                    if self.stepped: self("after_step")
                finally: self.zero_grad()
            except CancelBatchException: self("after_cancel_batch")

    @overload
    def predict(self) -> None: ...

    @overload
    def predict(self, learn: "Learner", dl: Any = None, cbs: Any = None) -> tuple[Any, Any]: ...

    def predict(self, learn: "Learner | None" = None, dl: Any = None, cbs: Any = None) -> tuple[Any, Any] | None:
        """Without a learner the step of a batch: `pred = model(xb)`. With one, all of a loader: `(preds, targets)`.

            preds, targets = run.predict(learn, test_dl)

        These lie on the CPU, the batches end to end in the loader's order, nests of tensors leaf by leaf; targets are
        None where the loader has none. The pass goes as in `evaluate`, each batch up to `after_pred`: no loss is
        computed. `dl` and `cbs` are as there.

        As a step it refuses a batch that is no pair, unless a callback's `get_loss` can do without.
        """
        if learn is not None:
            from runner.evaluation import predict
            return predict(self, learn, dl, cbs)
        if dl is not None or cbs is not None: raise TypeError("predict needs the learner too: run.predict(learn, dl)")
        if isinstance(self.yb, NoPair) and "get_loss" not in self._replaced: raise no_pair(self.yb.batch, self.in_train)
        self.pred = self.model(self.xb)
        return None

    def get_loss(self) -> None:
        """`loss = loss_func(pred, yb)`."""
        if isinstance(self.yb, NoPair): raise no_pair(self.yb.batch, self.in_train)
        self.loss = self.loss_func(self.pred, self.yb)

    def backward(self) -> None:
        """`loss.backward()`."""
        self.loss.backward()

    def step(self) -> None:
        """`opt.step()`."""
        self.opt.step()

    def zero_grad(self) -> None:
        """`opt.zero_grad()`."""
        self.opt.zero_grad()

    def find_lr(self, learn: "Learner", **kwargs: Any) -> "LRFindResult":
        """Search for a learning rate by `LR_Find(**kwargs)`, after which all is as it was; returns what it found.

            lr = run.find_lr(learn)
            lr.suggestion, lr.curve, lr.plot()
        """
        from runner.lr_find import search
        return search(self, learn, **kwargs)

    def explain(self, cbs: "Callback | Iterable[Any] | None" = None) -> None:
        """Print the loop, each event with the callbacks that answer it, in order; `cbs` as in `fit`."""
        from runner.insight.explain import explanation
        print(explanation([*self.cbs, *listify(cbs)]))


def _no_batches(begin: str, dl: Iterable[Any] | None) -> str:
    which = "training" if begin == "begin_epoch" else "validation"
    if isinstance(dl, Iterator):
        return (f"the {which} loader has no batches; it is an iterator ({type(dl).__name__}), which can be read once, "
                "and each epoch needs one: give a loader, or an object whose __iter__ starts anew")
    return (f"the {which} loader has no batches; it needs at least one: give it more data than one batch if it drops "
            f"the last incomplete one, or return True from {begin} to skip this pass")
