"""What the loop calls, and what answers: events, the exceptions that leave a level of it, and `Callback`."""

import difflib
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

EVENTS = (
    "begin_fit",
    "begin_epoch", "begin_batch", "after_pred", "after_loss", "after_backward", "after_step",
    "after_cancel_batch", "after_batch", "after_cancel_epoch",
    "begin_validate", "after_epoch",
    "after_cancel_train", "after_fit",
)

# The parts of a training batch between its events, methods of the runner that a callback can take over. A validation
# batch has the first two.
STEPS = ("predict", "get_loss", "backward", "step", "zero_grad")

# Events of fastai v2 that go by another name here: a method so called would never run.
FASTAI_V2 = {
    "before_fit": "begin_fit", "before_epoch": "begin_epoch", "before_train": "begin_epoch",
    "before_batch": "begin_batch", "before_backward": "after_loss", "before_step": "after_backward",
    "before_validate": "begin_validate", "after_validate": "after_epoch", "after_train": "begin_validate",
    "after_cancel_fit": "after_cancel_train",
}


class CancelException(Exception):
    """Base of the three exceptions by which a callback leaves a level of the loop; `level` grows with what is left."""

    level = 0


class CancelBatchException(CancelException):
    """Leave the batch, from `begin_batch` to `after_step`: `after_cancel_batch`, `after_batch`, then the next batch."""

    level = 1


class CancelEpochException(CancelException):
    """Leave this pass over a loader: `after_cancel_epoch`; after a training pass validation follows.

    It may come from `begin_epoch` or `begin_validate`, or from any event of a batch.
    """

    level = 2


class CancelTrainException(CancelException):
    """Leave the fit, from any event but `after_fit`: `after_cancel_train`, then `after_fit`."""

    level = 3


CANCELS: dict[int, type[CancelException]] = {
    cls.level: cls for cls in (CancelBatchException, CancelEpochException, CancelTrainException)}


def listify(o: Any) -> list[Any]:
    """`o` as a list: None gives [], a single thing (a string too) [o], a list, tuple or generator its items."""
    if o is None: return []
    if isinstance(o, (str, dict)) or not hasattr(o, "__iter__"): return [o]
    return list(o)


def camel2snake(name: str) -> str:
    """'AvgStats' -> 'avg_stats', 'LRFinder' -> 'lr_finder'."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()


class Progress:
    """What a runner has at hand in a fit, and its callbacks read as their own; `Runner` says what each is."""

    xb: Any
    yb: Any
    pred: Any
    loss: torch.Tensor
    in_train: bool
    stepped: bool
    n_epochs: float
    n_iter: int
    iters: int | None
    epoch: int
    epochs: int
    first_epoch: int
    first_batch: int
    fits: int


class Callback(Progress):
    """Answers events: define a method named after an event (see `EVENTS`) and it is called when that happens.

    A method named after a step (see `STEPS`) takes that step over, and what it returns is ignored:

        class Splat(Callback):
            def predict(self): self.run.pred = self.model(*self.xb)             # in the place of Runner.predict

        class Twice(Callback):
            def backward(self, inner):                                          # around whatever does it otherwise
                inner(), inner()

    One callback at most can take a step's place. Any number can wrap it, by a method with one argument, which does the
    step when called; the one with the smallest `_order` is the outermost. A `step` that changes no parameter (gradients
    wait for more, an update is skipped) sets `self.run.stepped = False`: then there is no `after_step`, and nothing is
    counted.

    Inside it `self.xb`, `self.loss`, `self.opt`, ... read the runner's attributes. To change one, set it on the
    runner: `self.run.xb = ...`. Set `_order` to come before (smaller) or after (larger) other callbacks. Returning
    True from `begin_epoch` or `begin_validate` skips that pass. `name` (the class name in snake case without
    "Callback") is the attribute under which the runner exposes it.

    Of several processes (`Distributed`) each has callbacks of its own. What one of yours answers by True or by a cancel
    exception, on whichever of them, counts on all.

    Two marks of a class: `fit_only = True` keeps it out of `Runner.evaluate` and `Runner.predict`, as what keeps a
    history needs it; `undoes_fit = True` says that it puts back at the end what the fit has changed, as `LR_Find` does,
    and so no history goes on from that fit.

    A method `around_fit(self, run, learn)` that is a context manager (`contextlib.contextmanager`) is entered before
    the fit and left when all is over, all callbacks' `after_fit` included. So is a method `around_loop(self)`, entered
    when it is settled who answers what, just before `begin_fit`, and left just before `after_fit`. A method
    `around_pass(self, batches)` gets the batches of a pass, an iterable, once the pass has begun, and returns what is
    to take its place.

    What a callback keeps from batch to batch or from epoch to epoch is in a checkpoint if it has `state_dict()`,
    which returns a dict of tensors, numbers, strings, and lists, tuples, sets and dicts of those, and
    `load_state_dict(state)`. A fit that goes on calls the latter after `begin_fit` and, in the middle of an epoch,
    after `begin_epoch` once more.

    Raises:
        TypeError: at the definition of a subclass with a method whose name is almost an event's or a step's.
    """

    _order = 0
    # Of a class of this library: the events that it may answer in another way on each of several processes.
    may_cancel: tuple[str, ...] = ()
    fit_only = undoes_fit = False

    run: Any        # the runner, of whatever class; and what of it a callback reads as its own
    model: Any
    opt: Any
    loss_func: Any
    data: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method in [k for k in dir(cls) if not k.startswith("_") and callable(getattr(cls, k))]:
            if method in EVENTS or method in STEPS: continue
            event, *_ = [*difflib.get_close_matches(method, EVENTS, 1, 0.85), None]
            step, *_ = [*difflib.get_close_matches(method, STEPS, 1, 0.9), None]
            if meant := FASTAI_V2.get(method) or event or step:
                kind, known = ("step", STEPS) if meant in STEPS else ("event", EVENTS)
                raise TypeError(f"{cls.__name__}.{method} is no {kind} and would never be called; rename it to "
                                f"{meant!r} if that is meant, or to something less like an event. "
                                f"{kind.capitalize()}s: {', '.join(known)}")

    @property
    def name(self) -> str:
        return camel2snake(re.sub(r"Callback$", "", type(self).__name__) or "callback")

    def set_runner(self, run: Any) -> None:
        """Called by the runner at the start of each fit."""
        self.run = run

    def _of_runner(self, name: str) -> Any:
        # Only reached when ordinary look-up fails. `run` itself and special names must end here, or a copy
        # or an unpickled callback, which has no `run` yet, would look for it for ever.
        run = self.__dict__.get("run")
        if hasattr(type(self), name): return object.__getattribute__(self, name)  # a property failed: let it say why
        if run is not None and not name.startswith("__"):
            try: return getattr(run, name)
            except AttributeError: pass
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}" + (
            "; it has no runner yet: attributes of the runner can be read once a fit has begun" if run is None
            else ", and neither has its runner"))

    if not TYPE_CHECKING: __getattr__ = _of_runner      # so that a type checker finds a misspelt name

    def __setattr__(self, name: str, value: Any) -> None:
        if name in RUNNER_ATTRS:
            warnings.warn(f"{type(self).__name__} sets {name!r} on itself and hides the runner's: write "
                          f"`self.run.{name} = ...` to change it there, or choose another name", stacklevel=2)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes along what the callback keeps, and not the runner, nor model and data with it."""
        return {k: None if k == "run" else v for k, v in vars(self).items()}

    def handler(self, event: str) -> Callable[[], Any] | None:
        """The method that answers `event`, or None."""
        if event not in self.__dict__ and not hasattr(type(self), event): return None
        found: Callable[[], Any] = getattr(self, event)
        return found

    def __call__(self, event: str) -> bool:
        """Answer `event`; True if the answer was True. Override it to see every event."""
        answer = self.handler(event)
        return answer is not None and answer() is True


RUNNER_ATTRS = frozenset({"xb", "yb", "pred", "loss", "opt", "model", "loss_func", "data", "in_train", "stepped",
                          "n_epochs", "n_iter", "iters", "epoch", "epochs"})
