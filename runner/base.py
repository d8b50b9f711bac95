"""What a runner is apart from its loop: its learner, its callbacks, and who answers what for the length of a fit."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from runner.dispatch import Always, answer
from runner.events import EVENTS, RUNNER_ATTRS, STEPS, Callback, Progress, listify
from runner.optim import needs_closure
from runner.ranks import ALONE, Ranks

C = TypeVar("C")
R = TypeVar("R", bound="RunnerBase")


@dataclass
class Learner:
    """Holds what is trained: a model, its optimizer, a loss function `f(pred, yb)` and a `DataBunch`."""

    model: Any
    opt: Any
    loss_func: Any
    data: Any

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes its four parts along, and not what a fit has noted of them."""
        return {k: v for k, v in vars(self).items() if k != "_begun"}


def check_learner(learn: Any, loader: str | None) -> None:
    """Raise if a learner's parts are in one another's places, or if its data has no such `loader` and one is needed.

    Raises:
        TypeError: they are.
    """
    opt, loss_func, data = (getattr(learn, name, None) for name in ("opt", "loss_func", "data"))
    if not hasattr(opt, "step") and hasattr(loss_func, "step"):
        raise TypeError(f"the learner has a {type(loss_func).__name__} as loss_func and a {type(opt).__name__} as opt; "
                        "the order is Learner(model, opt, loss_func, data)")
    if loader is not None and not hasattr(data, loader):
        raise TypeError(f"the learner's data is a {type(data).__name__}; it must be a DataBunch: "
                        "DataBunch(train_dl, valid_dl)")


def warn_of_strangers(learn: Any) -> None:
    """Warn if the optimizer has no parameter of the model, nor of the loss function: then a fit changes neither."""
    groups = getattr(learn.opt, "param_groups", None)
    if not isinstance(groups, list) or not isinstance(learn.model, torch.nn.Module): return
    mine = {id(p) for m in (learn.model, learn.loss_func) if isinstance(m, torch.nn.Module) for p in m.parameters()}
    its = [id(p) for group in groups for p in group.get("params", ())]
    if its and mine and mine.isdisjoint(its):
        warnings.warn("the optimizer has no parameter of the model, so this fit won't change the model: make the "
                      "optimizer from model.parameters(), after the last change of the model", stacklevel=2)


class RunnerBase(Progress):
    """Holds the callbacks of a `Runner`, and settles who answers which event and takes over which step."""

    status: str
    cbs: list[Any]
    learn: "Learner | None"
    evaluating: bool
    ranks: Ranks = ALONE            # the processes that train together, for the length of a fit

    _lasting: list[Any]             # the callbacks that stay after a fit, while one is going on
    _fitting: bool
    _loader: Any                    # of the pass that goes on
    _answers: dict[str, list[Callable[[], Any]]]                        # of each event
    _replaced: set[str]                                                 # steps that a callback does alone
    _around_passes: list[Callable[[Iterable[Any]], Iterable[Any]]]

    def __call__(self, event: str) -> bool:
        """Call every callback that answers `event`, in order; True if one of them returned True."""
        skip = False
        for respond in self._answers[event]:
            if respond() is True: skip = True
        return skip

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

    def _missing(self, name: str) -> Any:
        """Nothing is found here: the error says which callbacks there are, by their names."""
        if hasattr(type(self), name): return object.__getattribute__(self, name)    # a property failed: let it say why
        text = f"'{type(self).__name__}' has no attribute {name!r}"
        if not name.startswith("_"):
            there = ", ".join(str(getattr(cb, "name", type(cb).__name__)) for cb in vars(self).get("cbs", ()))
            text += f"; a callback is an attribute by its name, and these are there: {there or 'none'}"
        raise AttributeError(text, name=name, obj=self)

    if not TYPE_CHECKING: __getattr__ = _missing        # so that a type checker finds a misspelt name

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
        gone = {"xb", "yb", "pred", "loss", "ranks", "_loader", *STEPS, *(cb.name for cb in self.cbs[len(lasting):])}
        kept = {k: v for k, v in vars(self).items()
                if k not in gone and not (isinstance(v, torch.Tensor) and not v.is_leaf)}
        idle: dict[str, Any] = {"learn": None, "cbs": list(lasting), "_lasting": [], "_fitting": False,
                                "in_train": False, "_replaced": set(), "_around_passes": [], "_loader": None,
                                "_answers": {event: [] for event in EVENTS}}
        return {**kept, **idle, **({"logger": None} if fitting else {})}

    def __deepcopy__(self: R, memo: dict[int, Any]) -> R:
        """As `__getstate__` says, and after a fit with a copy of the learner: `twin.fit(1, twin.learn)`."""
        new = memo[id(self)] = type(self).__new__(type(self))
        learn = None if self._fitting else self.learn
        vars(new).update(copy.deepcopy({**self.__getstate__(), "learn": learn}, memo))
        return new

    # --- callbacks --------------------------------------------------------------------------------------------

    def _expose(self, cb: Any) -> None:
        """Make `cb` an attribute of the runner under its name."""
        if isinstance(cb, type) or not hasattr(cb, "set_runner"):
            raise TypeError(f"{cb!r} is not a callback; `cbs` takes instances, such as Recorder(), and `cb_funcs` what "
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
            short = epochs is None or isinstance(epochs, (int, float, str))
            got = repr(epochs) if short else f"a {type(epochs).__name__}"
            raise ValueError(f"epochs is {got}; it must be an integer of at least 0: fit(epochs, learn)")
        check_learner(learn, "train_dl" if fit else None)
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
            if fit and epochs: warn_of_strangers(learn)
            yield
        except BaseException:
            self.status = "failed"
            raise
        finally:
            for cb in self.cbs[len(lasting):]: delattr(self, cb.name)
            self.cbs, self._fitting, self.in_train, self._loader = lasting, False, False, None
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
