"""Schedules of hyper-parameters: functions of the position in training, from 0.0 (start) to 1.0 (end)."""

import copy
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import accumulate
from operator import attrgetter
from typing import Any

from torch import Tensor

from runner.events import Callback, listify

Formula = Callable[[Any, Any, float], Any]          # f(start, end, pos)


@dataclass(frozen=True, repr=False)
class Schedule:
    """`f(start, end, pos)` of a position: what `sched_lin(0.1, 1.0)` gives. It can be pickled, copied and compared."""

    f: Formula
    start: Any
    end: Any
    make: "Callable[[Any, Any], Schedule]" = field(compare=False)

    def __call__(self, pos: float) -> Any: return self.f(self.start, self.end, pos)

    def __repr__(self) -> str:
        return f"{getattr(self.make, '__name__', type(self.make).__name__)}({self.start!r}, {self.end!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if _importable(self.make) or not _importable(self.f): return self.make, (self.start, self.end)
        return _made_again, (self.f, self.start, self.end)      # `quick = annealer(square)`: `f` has kept its name


def _importable(o: object) -> bool:
    """Whether the module in which `o` was defined has it under its name."""
    try: return attrgetter(o.__qualname__)(sys.modules[o.__module__]) is o      # type: ignore[attr-defined]
    except (AttributeError, KeyError): return False


def _made_again(f: Formula, start: Any, end: Any) -> Schedule: return annealer(f)(start, end)


def annealer(f: Formula) -> Callable[[Any, Any], Schedule]:
    """Turn `f(start, end, pos)` into `f(start, end)`, which returns a schedule.

        @annealer
        def sched_square(start, end, pos): return start + pos ** 2 * (end - start)

    A schedule can be pickled if the function stands at the top of a module, decorated or under another name.
    """
    @wraps(f, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def make(start: Any, end: Any) -> Schedule: return Schedule(f, start, end, make)
    del make.__wrapped__        # or its signature would be that of `f`, with `pos`
    return make


@annealer
def sched_lin(start: Any, end: Any, pos: float) -> Any:
    """`start + pos (end - start)`."""
    return (1 - pos) * start + pos * end  # exact at both ends, as `start + pos * (end - start)` is not


@annealer
def sched_cos(start: Any, end: Any, pos: float) -> Any:
    """`start + (1 - cos(pi pos)) (end - start) / 2`."""
    w = (1 - math.cos(math.pi * pos)) / 2
    return (1 - w) * start + w * end


@annealer
def sched_no(start: Any, end: Any, pos: float) -> Any:
    """`start`, whatever `end` is."""
    return start


def sched_exp(start: float, end: float) -> Schedule:
    """`start (end / start)^pos`; both ends must be non-zero and of one sign."""
    if not start * end > 0:
        raise ValueError(f"sched_exp got start {start!r} and end {end!r}; an exponential needs both non-zero and of "
                         "one sign: use sched_lin or sched_cos to reach 0")
    return Schedule(_exp, start, end, sched_exp)


def _exp(start: float, end: float, pos: float) -> float:
    return math.copysign(abs(start) ** (1 - pos) * abs(end) ** pos, start)


def combine_scheds(pcts: Any, scheds: Any) -> "Combined":
    """One schedule after another: `scheds[i]` runs from 0 to 1 during the fraction `pcts[i]` of training.

        combine_scheds([0.3, 0.7], [sched_lin(0.6, 2.0), sched_lin(2.0, 0.1)])     # warm up, then anneal

    Raises:
        ValueError: fractions that are negative or don't sum to 1 (up to rounding), or not one per schedule; when
            called, a position outside 0 to 1.
    """
    pcts, scheds = tuple(float(p) for p in listify(pcts)), tuple(listify(scheds))
    if not pcts or len(pcts) != len(scheds):
        raise ValueError(f"combine_scheds got {len(pcts)} fractions and {len(scheds)} schedules; it needs one fraction "
                         "per schedule, and at least one")
    if any(not p >= 0 for p in pcts) or not math.isclose(sum(pcts), 1, abs_tol=1e-6):
        raise ValueError(f"combine_scheds got the fractions {[*pcts]}, which sum to {sum(pcts):.6g}; they must be at "
                         "least 0 and sum to 1, as [0.3, 0.7] do")
    return Combined(pcts, scheds, tuple(accumulate((0.0, *pcts)))[:-1])


@dataclass(frozen=True, repr=False)
class Combined:
    """What `combine_scheds` gives."""

    pcts: tuple[float, ...]
    scheds: tuple[Callable[[float], Any], ...]
    starts: tuple[float, ...]

    def __call__(self, pos: float) -> Any:
        if not -1e-6 <= pos <= 1 + 1e-6:
            raise ValueError(f"the schedule was asked for position {pos!r}; positions lie in 0 (start) to 1 (end)")
        pos = max(pos, 0.0)
        # Among phases that start at the same place all but the last are empty; bisect finds the last. At the very
        # end an empty last phase still has nothing to say, so stay in the last one that has a length.
        i = bisect_right(self.starts, pos) - 1
        while self.pcts[i] == 0: i -= 1
        return self.scheds[i](min((pos - self.starts[i]) / self.pcts[i], 1.0))

    def __repr__(self) -> str: return f"combine_scheds({[*self.pcts]}, {[*self.scheds]})"


class ParamScheduler(Callback):
    """Sets the hyper-parameter `pname` of every parameter group before each training batch.

        pos = n_epochs / epochs                         # 0 at the first batch, a batch short of 1 at the last
        for group in groups: group["lr"] = sched(pos)   # relative: own_rate * sched(pos)
        ...                                             # and when the fit is over
        for group in groups: group["lr"] = own_rate     # what it was before

    With `GradientAccumulation` the position is that of the step, in all batches of the group. The callback is named
    after the parameter (`run.param_scheduler_lr`), so that one runner can schedule several.

    However the fit ends, each group then has its own value again, so that the next fit, with this schedule or without
    one, begins as this one did. A group that is added in mid-fit (`opt.add_param_group`) is followed from then on; its
    own value is the one that it was added with.

    Args:
        pname: its name in the optimizer, such as "lr" or "momentum".
        sched_funcs: a schedule for all parameter groups or a list with one for each.
        relative: whether the schedule gives multiples of each group's own value at the start of the fit, which keeps
            the ratio of rates that differ: `ParamScheduler("lr", sched_cos(1, 0), relative=True)`.

    Raises:
        ValueError: at the start of a fit, a parameter that the optimizer lacks or a wrong number of schedules; in
            mid-fit, a further group without a schedule; at the start of an epoch, a loader without a length.
    """

    _order = 1
    fit_only = by_position = True       # where it is follows from how many epochs there are to be

    def __init__(self, pname: str, sched_funcs: Callable[[float], Any] | Sequence[Callable[[float], Any]], *,
                 relative: bool = False) -> None:
        if not isinstance(relative, bool): raise TypeError(f"relative is {relative!r}; it must be True or False")
        self.pname, self.sched_funcs, self.relative = pname, sched_funcs, relative
        self.scheds: list[Callable[[float], Any]] = []
        self._followed: dict[int, _Followed] = {}       # under the id of the group's list of parameters

    @property
    def name(self) -> str: return f"param_scheduler_{self.pname}"

    def begin_fit(self) -> None:
        groups, scheds = self.run.opt.param_groups, self.sched_funcs
        self._followed = {}
        self._single = not isinstance(scheds, (list, tuple))
        self.scheds = [scheds] * len(groups) if callable(scheds) else list(scheds)
        if len(self.scheds) != len(groups):
            raise ValueError(f"ParamScheduler has {len(self.scheds)} schedules for {self.pname!r} and the optimizer "
                             f"has {len(groups)} parameter groups: give one schedule, or one per group")
        if any(self.pname not in group for group in groups):
            known = ", ".join(k for k in groups[0] if k != "params")
            raise ValueError(f"the optimizer {type(self.run.opt).__name__} has no parameter {self.pname!r}; choose one "
                             f"of: {known}")
        for group in groups: self._follow(group)

    def _follow(self, group: dict[str, Any]) -> "_Followed":
        """Take in a parameter group: one of the fit's start, or one that was added since."""
        n = len(self._followed)
        if self._single and n == len(self.scheds): self.scheds.append(self.scheds[0])
        if n >= len(self.scheds):
            raise ValueError(f"ParamScheduler has {len(self.scheds)} schedules for {self.pname!r}, and a parameter "
                             f"group was added in mid-fit: give one schedule for all groups, or append the group's to "
                             f"run.{self.name}.scheds before you add it (a fit to be resumed: in a begin_fit)")
        value = group[self.pname]
        found = _Followed(group["params"], self.scheds[n], value, copy.deepcopy(value))
        self._followed[id(group["params"])] = found
        return found

    def begin_epoch(self) -> None:
        if self.run.iters is None:
            raise ValueError(f"the training loader, a {type(self.run.data.train_dl).__name__}, has no length, and a "
                             "schedule goes by the position in it: give the loader a length (__len__), or set "
                             f"{self.pname!r} by the step (n_iter) in a callback of your own")

    def begin_batch(self) -> None:
        run = self.run
        if not run.in_train: return
        pos = run.n_epochs / run.epochs
        for group in run.opt.param_groups:
            one = self._followed.get(id(group["params"])) or self._follow(group)
            group[self.pname] = one.own * one.sched(pos) if self.relative else one.sched(pos)

    def after_fit(self) -> None:
        """Give every group its own value back."""
        followed, self._followed = self._followed, {}
        for group in self.run.opt.param_groups if followed else ():
            if (one := followed.get(id(group["params"]))) is None: continue
            if isinstance(one.value, Tensor): one.value.copy_(one.own)
            group[self.pname] = one.value

    def state_dict(self) -> dict[str, Any]:
        """The groups that are followed, by their numbers in the optimizer, and the own value of each."""
        at = {id(group["params"]): i for i, group in enumerate(self.run.opt.param_groups)} if self._followed else {}
        found = [(at[k], one.own) for k, one in self._followed.items() if k in at]
        return {"groups": [i for i, _ in found], "own": [own for _, own in found]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Follow the groups of `state`, which have the values of a schedule by now, with their own ones.

        Raises:
            ValueError: a group that was added in mid-fit and has no schedule, or that the optimizer lacks.
        """
        groups = self.run.opt.param_groups
        if lost := [i for i in state["groups"] if i >= len(groups)]:
            raise ValueError(f"ParamScheduler has a state for parameter group {lost[0]}, and the optimizer has "
                             f"{len(groups)} groups; build it as it was")
        for i, own in zip(state["groups"], state["own"], strict=True):
            one = self._followed.get(id(groups[i]["params"])) or self._follow(groups[i])
            if isinstance(own, Tensor) and isinstance(one.value, Tensor): one.own = own.to(one.value.device)
            else: one.own, one.value = own, copy.deepcopy(own)

    def __getstate__(self) -> dict[str, Any]: return {**super().__getstate__(), "_followed": {}}


@dataclass
class _Followed:
    """A parameter group, known by its list of parameters (a loaded state dict makes a new group of it)."""

    params: list[Any]
    sched: Callable[[float], Any]
    value: Any                  # what the group had, and
    own: Any                    # a copy of it
