"""`TorchScheduler`: any schedule of torch.optim.lr_scheduler in a fit."""

from collections.abc import Callable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from runner.attributes import kept, like
from runner.monitors import Monitor

# The rates of optimizers, at the start of the last fit that had a schedule and as it left them.
_rates: WeakKeyDictionary[Optimizer, tuple[list[float], list[float]]] = WeakKeyDictionary()


class TorchScheduler(Monitor):
    """Sets the learning rates by a scheduler of torch: one step of it per step of the optimizer, or per epoch.

        for epoch in range(epochs):
            for xb, yb in train_dl: train(xb, yb), scheduler.step()     # by="batch"
            loss = validate()
            scheduler.step()                                            # or by="epoch"; or scheduler.step(loss)

    It is used so:

        one_cycle = TorchScheduler(partial(OneCycleLR, max_lr=0.1, total_steps=5 * len(train_dl)), by="batch")
        Runner([one_cycle]).fit(5, learn)

        plateau = TorchScheduler(partial(ReduceLROnPlateau, patience=2), monitor="valid_loss")
        Runner([AvgStatsCallback(), plateau]).fit(5, learn)

    The rates are those of the loop written by hand. Only steps that the optimizer made count: with
    `GradientAccumulation` one per update, with `MixedPrecision` none for a skipped one; and an epoch without any (its
    training was skipped) counts for no epoch.

    `ReduceLROnPlateau` gets a figure of the history after each epoch; an epoch in which its pass was skipped is passed
    over.

    Args:
        make: `make(opt)` gives the scheduler, as its class or a `partial` of it does. It is called at the start of each
            fit. A further fit has the schedule anew, from the rates that the optimizer had before, unless somebody
            has set others since. Or a scheduler of this optimizer, which goes on from fit to fit.
        by: "batch" for a step of the scheduler after each step of the optimizer, "epoch" after each epoch (after its
            validation).
        monitor: the figure for `ReduceLROnPlateau`.

    `scheduler` is torch's of the last fit. The name is `run.torch_scheduler`.

    Raises:
        TypeError: a `make` that isn't callable or gives no scheduler.
        ValueError: `by`, a `monitor` for a scheduler that takes none or none for one that needs it, a scheduler of
            another optimizer; else as `Monitor`.
    """

    _order = 30         # after AvgStatsCallback
    _saved = ("_stepped",)

    def __init__(self, make: Callable[[Any], LRScheduler] | LRScheduler, by: Literal["batch", "epoch"] = "epoch",
                 monitor: str | None = None) -> None:
        super().__init__(monitor or "")
        if by not in ("batch", "epoch"): raise ValueError(f"TorchScheduler: by is {by!r}; choose 'batch' or 'epoch'")
        if monitor and by == "batch":
            raise ValueError(f"TorchScheduler: monitor is {monitor!r}, of which there is one figure per epoch, and by "
                             "is 'batch'; give by='epoch'")
        if not isinstance(make, LRScheduler) and not callable(make):
            raise TypeError(f"TorchScheduler got {make!r}; it takes what makes a scheduler of an optimizer, such as "
                            "partial(StepLR, step_size=10), or a scheduler")
        self.make, self.by = make, by
        self.scheduler: LRScheduler | None = make if isinstance(make, LRScheduler) else None
        self._stepped = self._made = False

    def begin_fit(self) -> None:
        opt, self._stepped = self.run.opt, False
        if isinstance(self.make, LRScheduler): scheduler = self.make
        else:
            if opt in _rates: anew(opt, *_rates[opt])
            begun, scheduler = rates(opt), self.make(opt)
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(f"TorchScheduler: {self.make!r} gave {scheduler!r}; it must give a scheduler of "
                                "torch.optim.lr_scheduler")
            _rates[opt], self._made = (begun, rates(opt)), True
        self.scheduler = scheduler
        if scheduler.optimizer is not opt:
            raise ValueError("TorchScheduler: the scheduler is of another optimizer than the learner's; make it of "
                             "learn.opt, or give what makes it, such as partial(StepLR, step_size=10)")
        name, plateau = type(scheduler).__name__, isinstance(scheduler, ReduceLROnPlateau)
        if plateau and not self.monitor:
            raise ValueError(f"TorchScheduler: {name} goes by a figure of the history; give monitor='valid_loss', or "
                             "another, and by='epoch'")
        if self.monitor and not plateau:
            raise ValueError(f"TorchScheduler: monitor is {self.monitor!r} and {name} goes by no figure; leave it out")
        if self.monitor: super().begin_fit()

    def begin_epoch(self) -> None:
        super().begin_epoch()
        self._stepped = False

    def after_step(self) -> None:
        assert self.scheduler is not None
        self._stepped = True
        if self.by == "batch": self.scheduler.step()

    def after_epoch(self) -> None:
        if self.by == "batch" or not self._stepped: return
        assert self.scheduler is not None
        if not isinstance(self.scheduler, ReduceLROnPlateau): self.scheduler.step()
        elif (value := self.figure()) is not None: self.scheduler.step(value)

    def after_fit(self) -> None:
        if self._made: _rates[self.run.opt] = _rates[self.run.opt][0], rates(self.run.opt)
        self._made = False

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, and the rates before it.

        Raises:
            TypeError: the scheduler, of a class of one's own, keeps something that no checkpoint can hold.
        """
        state = None if self.scheduler is None else self.scheduler.state_dict()
        return {**super().state_dict(), "scheduler": state and _plain(state, type(self.scheduler)),
                "rates": None if self.scheduler is None else _rates.get(self.scheduler.optimizer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state` with a scheduler made anew."""
        super().load_state_dict(state)
        if state["rates"] is not None: _rates[self.run.opt] = state["rates"]
        if self.scheduler is not None and state["scheduler"]:
            self.scheduler.load_state_dict(_fitting(self.scheduler, state["scheduler"]))

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own scheduler, unless it was given one."""
        scheduler = self.make if isinstance(self.make, LRScheduler) else None
        return {**super().__getstate__(), "scheduler": scheduler, "_made": False}


def _plain(state: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """The part of a scheduler's state that a checkpoint can hold; the rest, its functions, a new one has too."""
    nested = {k: [one and _plain(one, cls) for one in state[k]] for k in ("_schedulers", "lr_lambdas") if k in state}
    return kept({k: v for k, v in state.items() if k not in nested}, "TorchScheduler: the scheduler", cls) | nested


def _fitting(scheduler: Any, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with containers of the classes that `scheduler` has them of."""
    inner = getattr(scheduler, "_schedulers", ())
    nested = {"_schedulers": [*map(_fitting, inner, state["_schedulers"])]} if "_schedulers" in state else {}
    return {k: like(getattr(scheduler, k, None), v) for k, v in state.items()} | nested


def anew(opt: Optimizer, begun: list[float], left: list[float]) -> None:
    """Undo a schedule that has begun with the rates `begun` and `left` others, unless there are others by now."""
    unchanged = rates(opt) == left
    for i, group in enumerate(opt.param_groups):
        lr = group["lr"]
        if unchanged and isinstance(lr, Tensor): lr.fill_(begun[i])
        elif unchanged: group["lr"] = begun[i]
        # From here the next schedule starts, as torch has it.
        if "initial_lr" in group: group["initial_lr"] = lr.clone() if isinstance(lr, Tensor) else group["lr"]


def rates(opt: Optimizer) -> list[float]:
    """The learning rate of each parameter group: a number, or a tensor's."""
    return [float(group["lr"]) for group in opt.param_groups]


def remembered(opt: Optimizer) -> Callable[[], None]:
    """Copy what is remembered of the rates of `opt` from fit to fit; a function that puts it back."""
    had = _rates.get(opt)

    def restore() -> None:
        if had is not None: _rates[opt] = had
        else: _rates.pop(opt, None)
    return restore
