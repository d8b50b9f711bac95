"""Puts what `runner.learner_state` has taken out of a learner into one that was built alike."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from runner.attributes import like
from runner.holders import OPTIMIZER, drop, held, holders_of, put, slots_of
from runner.learner_state import BEGUN, CONTAINERS, changeable, joined, refill, set_groups
from runner.memory import extent, fits, memory_of, overlaps
from runner.sources import made
from runner.values import Known, decoded, placed

MISSING = object()


class StateError(ValueError):
    """A state is of another learner; the text says what differs."""


@torch.no_grad()
def put_learner(model: Any, loss_func: Any, opt: Any, state: dict[str, Any]) -> list[str]:
    """Put `learner_state`'s `state` into a learner that was built alike.

    What was the same object all along is written in place, and stays the same object. What had been replaced when the
    state was taken, a buffer that is made anew in each batch, say, is replaced here too, and so shares no memory with
    others that it didn't share it with. Groups of parameters are as they were.

    Returns:
        In words, what can't be put back: what has changed and is no plain value.

    Raises:
        StateError: a learner that can't hold it.
    """
    return _Load(model, loss_func, opt, state).all()


class _Load:
    """One load: what has become of each tensor and container of the state."""

    def __init__(self, model: Any, loss_func: Any, opt: Any, state: dict[str, Any]) -> None:
        self.state, self.opt = state, opt
        self.holders = holders_of(model, loss_func, opt)
        self.slots = slots_of(self.holders, opt)
        self.fresh = {name: d[k] for name, (_, d, k) in self.slots.items()}
        self.device = next((p.device for group in opt.param_groups for p in group["params"]), torch.device("cpu"))
        known: Known = {}
        self.tensors: dict[str, Any] = decoded(state["tensors"], known)
        self.attributes: dict[str, dict[str, Any]] = decoded(state["attributes"], known)
        self.new, self.params, self.trained = set(state["new"]), set(state["params"]), set(state["trained"])
        self.filled: set[int] = set()                   # ids of decoded containers whose contents are in their places
        self.done: dict[int, tuple[Any, Any]] = {}      # under the id of what was decoded: it, and what is in its place
        self.taken: dict[int, Any] = {}                 # what is in such a place, by id
        self.bases: dict[int, tuple[Tensor, Tensor]] = {}       # a decoded tensor, and what is in its place, by memory

    def all(self) -> list[str]:
        troubles = [*self.state["lost"], *self.classes()]
        for path, k in self.state["gone"]:
            if path in self.holders: drop(self.holders[path], k)
        for name in self.state["gone tensors"]:
            if name in self.slots: self.slots[name][1].pop(self.slots[name][2], None)
        for name, was in self.tensors.items(): self.in_place(name, self.fresh.get(name.removeprefix(BEGUN)), was)
        for path, o, k, was in self.parts(): self.in_place(joined(path, k), held(o).get(k), was)
        for name, was in self.tensors.items(): self.slot(name, was)
        for _, o, k, was in self.parts():
            now, value = held(o).get(k, MISSING), self.settled(was)
            if now is not value: put(o, k, like(now, value))
        for path, k, source in self.state["sources"]:
            if path in self.holders: put(self.holders[path], k, made(decoded(source)))
        for path, extra in self.state["extra"].items():
            if path in self.holders: self.holders[path].set_extra_state(decoded(extra))
        self.optimizer()
        return troubles

    def classes(self) -> list[str]:
        found = []
        for path, kind in self.state["classes"].items():
            now = type(self.holders.get(path, None)).__name__
            if path not in self.holders: found.append(f"{path} ({kind}), which has come in mid-fit")
            elif now.removeprefix("Lazy") != kind.removeprefix("Lazy"): found.append(f"{path} ({kind}, now {now})")
        return found

    def parts(self) -> list[tuple[str, Any, str, Any]]:
        return [(path, self.holders[path], k, was) for path, had in self.attributes.items() if path in self.holders
                for k, was in had.items()]

    # --- in place, or in the place of something ---------------------------------------------------------------

    def in_place(self, name: str, now: Any, was: Any) -> None:
        """Let `now` hold what `was` does, and be in its place, if it has been there all along and can."""
        if was is None or id(was) in self.done or id(now) in self.taken or name in self.new: return
        if isinstance(was, Tensor):
            if not isinstance(now, Tensor) or not self.written(name, now, was): return
            if (memory := memory_of(was)) is not None: self.bases.setdefault(memory._cdata, (was, now))
        elif not (changeable(was) and isinstance(now, type(was))): return
        elif not isinstance(was, CONTAINERS):
            if (now.shape, now.dtype) != (was.shape, was.dtype): return         # an array
            refill(now, was)
        self.done[id(was)], self.taken[id(now)] = (was, now), now

    def written(self, name: str, now: Tensor, was: Tensor) -> bool:
        """Write `was` into `now`; False if it doesn't fit in there."""
        trained = name in self.trained
        if is_lazy(now): now.materialize(tuple(was.shape), dtype=was.dtype)
        if trained and (now.shape, now.dtype) != (was.shape, was.dtype): raise mismatch(name, now, was)
        if not trained and now.is_leaf and now.requires_grad != was.requires_grad: return False
        if fits(now, was) and not overlaps(now): now.copy_(was)
        elif trained: now.data = was.to(now.device, copy=True)
        elif not (fits(now, was) and now.equal(was.to(now.device))): return False
        if was.grad is not None: now.grad = was.grad.to(now.device)
        return True

    def settled(self, was: Any) -> Any:
        """What is in the place of `was`, or `was` itself; with what it holds in its place."""
        if isinstance(was, tuple): return tuple(map(self.settled, was))
        if not changeable(was): return was
        if id(was) not in self.done: self.done[id(was)] = was, self.moved(was) if isinstance(was, Tensor) else was
        now = self.done[id(was)][1]
        if not isinstance(was, CONTAINERS) or id(was) in self.filled: return now
        self.filled.add(id(was))
        inside = {k: self.settled(v) for k, v in was.items()} if isinstance(was, dict) else [*map(self.settled, was)]
        refill(now, inside)
        return now

    def moved(self, was: Tensor, near: Any = None) -> Tensor:
        """`was` on the device of `near`, or its own; in the memory of another tensor if it shared that one's."""
        memory, elsewhere, now = memory_of(was), vars(was).pop("elsewhere", False), was
        if memory is not None and memory._cdata in self.bases:
            base, there = self.bases[memory._cdata]
            size, into = was.element_size(), there.untyped_storage()
            at = int(there.storage_offset()) * there.element_size() + int(was.storage_offset()) * size - (
                int(base.storage_offset()) * base.element_size())
            if at >= 0 and not at % size and at + extent(was) <= into.nbytes():
                return placed(into, was.dtype, at // size, was.shape, was.stride())
        device = near.device if isinstance(near, Tensor) else self.device if elsewhere else was.device
        if device != was.device:
            now = was.detach().to(device).requires_grad_(was.requires_grad)
            if was.grad is not None: now.grad = was.grad.to(device)
        if memory is not None: self.bases[memory._cdata] = was, now
        return now

    def slot(self, name: str, was: Any) -> None:
        """Put a parameter or buffer where it belongs, unless it is there."""
        if name[:1] == "(" and name.startswith((OPTIMIZER, BEGUN)):
            if was is not None and id(was) not in self.done: raise lacks(name)
            return
        path, _, k = name.rpartition(".")
        m = self.slots[name][0] if name in self.slots else self.holders.get(path)
        if not isinstance(m, nn.Module): raise lacks(name)
        d, other = (m._parameters, m._buffers) if name in self.params else (m._buffers, m._parameters)
        if was is None: d = m._parameters if k in m._parameters else m._buffers
        now: Any = None if was is None else self.done.get(id(was), (None, None))[1]
        if was is not None and now is None:
            now = self.moved(was, self.fresh.get(name))
            if name in self.params: now = nn.Parameter(now, requires_grad=name not in self.state["frozen"])
            self.done[id(was)] = was, now
        if d.get(k, MISSING) is now: return
        other.pop(k, None)
        vars(m).pop(k, None)
        d[k] = now
        if name in self.state["unsaved"]: m._non_persistent_buffers_set.add(k)

    # --- the optimizer ----------------------------------------------------------------------------------------

    def optimizer(self) -> None:
        params = {name: self.done[id(was)][1] for name, was in self.tensors.items()
                  if name in self.trained and was is not None}
        lazy = {name: t for name, t in self.fresh.items() if t is not None and is_lazy(t)}
        if not set_groups(self.opt, [[{**lazy, **params}[name] for name in names] for names in self.state["groups"]]):
            raise StateError("parameters were added to the optimizer, or taken from it, in mid-fit, which can't be "
                             f"done again in a {type(self.opt).__name__}; build it with them")
        state = decoded(self.state["opt"])
        self.opt.load_state_dict(decoded(self.state["opt"]))
        if isinstance(state, dict) and isinstance(state.get("state"), dict) and "param_groups" in state:
            for saved, group in zip(state["param_groups"], self.opt.param_groups, strict=True):
                for i, p in zip(saved["params"], group["params"], strict=True):
                    if i in state["state"] and p in self.opt.state: exactly(self.opt.state[p], state["state"][i])
        frozen = set(self.state["frozen"])
        for name, p in params.items():
            p.requires_grad_(name not in frozen)
            grad = self.state["grads"].get(name)
            p.grad = None if grad is None else grad.to(p.device, copy=True)


def exactly(now: Any, was: Any) -> None:
    """Let the state of a parameter have the dtypes and strides that it had; torch makes its dtypes the parameter's."""
    for k, v in was.items() if isinstance(was, dict) else enumerate(was):
        if isinstance(v, Tensor) and isinstance(now[k], Tensor):
            if memory_of(v) is not None and not fits(now[k], v): now[k] = v.to(now[k].device)
        elif isinstance(v, (dict, list)) and type(v) is type(now[k]): exactly(now[k], v)


def mismatch(name: str, now: Tensor, was: Tensor) -> StateError:
    return StateError(f"{name} has the shape {tuple(now.shape)} and {now.dtype} in the learner, and {tuple(was.shape)} "
                      f"and {was.dtype} in the checkpoint")


def lacks(name: str) -> StateError:
    return StateError(f"the checkpoint has {name!r}, which the learner lacks; build model, loss and optimizer as they "
                      "were")
