"""The training loop: `Learner`, `Runner` and the callback that every runner has; `runner.events` says what it calls."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch

from runner.batches import NoPair, length_of, no_pair, pair
from runner.dispatch import Always, answer
from runner.events import (
    EVENTS,
    RUNNER_ATTRS,
    STEPS,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    Progress,
    listify,
)

if TYPE_CHECKING:
    from runner.lr_find import LRFindResult
from runner.optim import needs_closure

C = TypeVar("C")


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


@dataclass
class Learner:
    """Holds what is trained: a model, its optimizer, a loss function `f(pred, yb)` and a `DataBunch`."""

    model: Any
    opt: Any
    loss_func: Any
    data: Any


class Runner(Progress):
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

    status: str
    cbs: list[Any]
    learn: "Learner | None"

    def __init__(self, cbs: "Callback | Iterable[Any] | None" = None,
                 cb_funcs: "Callable[[], Any] | Iterable[Callable[[], Any]] | None" = None, *, compile: bool = False,
                 ) -> None:
        if not isinstance(compile, bool): raise TypeError(f"compile is {compile!r}; it must be True or False")
        self.in_train, self.learn, self._fitting, self.status = False, None, False, "ok"
        self.reset_history = self.evaluating = False
        self.fits = self.first_epoch = self.first_batch = 0
        # Where a row of statistics goes after each epoch; ProgressCallback sets it.
        self.logger: Callable[[dict[str, Any]], None] | None = None
        self._answers: dict[str, list[Callable[[], Any]]] = {event: [] for event in EVENTS}
        self._replaced: set[str] = set()
        self._around_passes: list[Callable[[Iterable[Any]], Iterable[Any]]] = []
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
        with self._callbacks(epochs, learn, cbs), Always(self, "after_fit"):
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
            self.iters, some = length_of(dl), self.first_batch > 0
            if self(begin) and skip: return
            batches: Iterable[Any] = () if dl is None else dl
            for around in self._around_passes: batches = around(batches)
            for batch in batches:
                some = True
                self.one_batch(*pair(batch))
            if not some: raise ValueError(_no_batches(begin, dl))
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

    def __call__(self, event: str) -> bool:
        """Call every callback that answers `event`, in order; True if one of them returned True."""
        skip = False
        for respond in self._answers[event]:
            if respond() is True: skip = True
        return skip

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

    def __getitem__(self, kind: type[C]) -> C:
        """The callback of this class, or of a subclass: `run[Recorder]`, as `run.recorder` and typed.

        Raises:
            KeyError: there is none, or there are several.
        """
        found = [cb for cb in self.cbs if type(cb) is kind] or [cb for cb in self.cbs if isinstance(cb, kind)]
        if len(found) == 1: return found[0]
        there = ", ".join(type(cb).__name__ for cb in found or self.cbs)
        what = f"has {len(found)} callbacks of class" if found else "has no callback of class"
        raise KeyError(f"the runner {what} {getattr(kind, '__name__', kind)}: {there}; each is there by its name "
                       "too, such as run.recorder")

    def __repr__(self) -> str:
        return f"<Runner, {self.status}: {', '.join(type(cb).__name__ for cb in self.cbs)}>"

    def _repr_html_(self) -> str:
        from runner.insight.explain import table
        html: str = table(self.cbs, f"status: {self.status}")
        return html

    # --- the learner's parts ----------------------------------------------------------------------------------

    @property
    def model(self) -> Any: return self._of_learner("model")

    @property
    def opt(self) -> Any: return self._of_learner("opt")

    @property
    def loss_func(self) -> Any: return self._of_learner("loss_func")

    @property
    def data(self) -> Any: return self._of_learner("data")

    def _of_learner(self, name: str) -> Any:
        if self.learn is None: raise AttributeError(f"the runner has no {name!r} without a learner: call fit first")
        return getattr(self.learn, name)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is idle: it has the lasting callbacks, and neither the learner nor what a fit has at hand."""
        lasting, fitting = (self._lasting, True) if self._fitting else (self.cbs, False)
        gone = {"xb", "yb", "pred", "loss", *STEPS, *(cb.name for cb in self.cbs[len(lasting):])}
        kept = {k: v for k, v in vars(self).items()
                if k not in gone and not (isinstance(v, torch.Tensor) and not v.is_leaf)}
        idle: dict[str, Any] = {"learn": None, "cbs": list(lasting), "_lasting": [], "_fitting": False,
                                "in_train": False, "_replaced": set(), "_around_passes": [],
                                "_answers": {event: [] for event in EVENTS}}
        return {**kept, **idle, **({"logger": None} if fitting else {})}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runner":
        """As `__getstate__` says, and after a fit with a copy of the learner: `twin.fit(1, twin.learn)`."""
        new = memo[id(self)] = type(self).__new__(type(self))
        learn = None if self._fitting else self.learn
        vars(new).update(copy.deepcopy({**self.__getstate__(), "learn": learn}, memo))
        return new

    # --- callbacks --------------------------------------------------------------------------------------------

    def _expose(self, cb: Any) -> None:
        """Make `cb` an attribute of the runner under its name."""
        if isinstance(cb, type) or not hasattr(cb, "set_runner"):
            raise TypeError(f"{cb!r} is no callback; `cbs` takes instances, such as Recorder(), and `cb_funcs` what "
                            "makes them, such as Recorder or partial(AvgStatsCallback, accuracy)")
        if any(cb.name == other.name for other in self.cbs):
            raise ValueError(f"two callbacks are named {cb.name!r}; the runner exposes each as run.{cb.name}: leave "
                             "one out, or subclass it under another class name")
        if cb.name in RUNNER_ATTRS or hasattr(type(self), cb.name) or cb.name in self.__dict__:
            raise ValueError(f"a callback is named {cb.name!r}, which is an attribute of the runner: rename its class")
        setattr(self, cb.name, cb)

    @contextmanager
    def validating(self, learn: "Learner", cbs: "Callback | Iterable[Any] | None" = None) -> Iterator[None]:
        """For the length of a validation outside a fit, by those of the callbacks that are not `fit_only`."""
        self.evaluating = True
        with self._callbacks(1, learn, cbs, fit=False), Always(self, "after_fit"):
            self("begin_fit")
            yield

    @contextmanager
    def _callbacks(self, epochs: int, learn: "Learner", cbs: "Callback | Iterable[Any] | None", fit: bool = True,
                   ) -> Iterator[None]:
        """Settle who answers which event for the length of a fit, with the temporary `cbs` among them."""
        if self._fitting:
            raise RuntimeError("this runner is already fitting; a callback that trains or evaluates something needs a "
                               "Runner of its own")
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 0:
            raise ValueError(f"epochs is {epochs!r}; it must be an integer of at least 0")
        lasting = self._lasting = list(self.cbs)
        try:
            for cb in listify(cbs):
                self._expose(cb)
                self.cbs = [*self.cbs, cb]
            ordered = sorted((cb for cb in self.cbs if fit or not getattr(cb, "fit_only", False)),
                             key=lambda cb: cb._order)
            self.learn, self.epochs, self.epoch, self._fitting, self.status = learn, epochs, 0, True, "ok"
            self.first_epoch = self.first_batch = 0
            for cb in ordered: cb.set_runner(self)
            # Looked up once here and not at each of 25,000 batches. A callback with a `__call__` of its own gets
            # every event's name, as one of the lesson does.
            self._answers = {e: [a for cb in ordered if (a := answer(cb, e)) is not None] for e in EVENTS}
            self._around_passes = [cb.around_pass for cb in ordered if hasattr(type(cb), "around_pass")]
            for step in STEPS: self._take_over(step, ordered)
            if fit and "step" not in self._replaced and needs_closure(self.opt):
                raise ValueError(f"{type(self.opt).__name__} needs a closure in its step, since it evaluates the loss "
                                 "several times: add the callback ClosureStep(), or take another optimizer")
            if fit: self.opt.zero_grad()
            yield
        except BaseException:
            self.status = "failed"
            raise
        finally:
            for cb in self.cbs[len(lasting):]: delattr(self, cb.name)
            self.cbs, self._fitting, self.in_train = lasting, False, False
            self._answers, self._replaced, self._around_passes = {event: [] for event in EVENTS}, set(), []
            for step in STEPS: self.__dict__.pop(step, None)

    def _take_over(self, step: str, ordered: list[Any]) -> None:
        """Let the callbacks that have a method called `step` do it for the length of a fit, the first one outermost.

        Raises:
            ValueError: two callbacks that would both take its place.
        """
        methods = [(cb, getattr(cb, step)) for cb in ordered if hasattr(type(cb), step) or step in vars(cb)]
        around = [method for _, method in methods if signature(method).parameters]
        alone = [(type(cb).__name__, method) for cb, method in methods if not signature(method).parameters]
        if len(alone) > 1:
            names = " and ".join(name for name, _ in alone)
            raise ValueError(f"{names} take the place of the runner's {step}(), which one callback at most can do; "
                             f"leave one out, or let it wrap the step: define {step}(self, inner) and call inner() to "
                             "do what is done without it")
        if alone: self._replaced.add(step)
        do = alone[0][1] if alone else getattr(self, step)
        for method in reversed(around): do = partial(method, do)
        if methods: setattr(self, step, do)


def _no_batches(begin: str, dl: Iterable[Any] | None) -> str:
    which = "training" if begin == "begin_epoch" else "validation"
    if isinstance(dl, Iterator):
        return (f"the {which} loader has no batches; it is an iterator ({type(dl).__name__}), which can be read once, "
                "and each epoch needs one: give a loader, or an object whose __iter__ starts anew")
    return (f"the {which} loader has no batches; it needs at least one: give it more data than one batch if it drops "
            f"the last incomplete one, or return True from {begin} to skip this pass")
