"""All that training changes in a learner, as plain values; `runner.learner_load` puts it into one that was built alike.
"""

import copy
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from runner.holders import OPTIMIZER, drop, held, holders_of, put, slots_of
from runner.memory import alike, encoded_together
from runner.sources import described
from runner.values import Kept, can_be_encoded, decoded, encoded

BEGUN = "(begun)"           # before the name of a parameter that the model had when the fit began, and has no longer
CONTAINERS = (list, dict, set, deque)
NOT_PLAIN = (TypeError, RecursionError)     # what `encoded` raises


class Begun:
    """What a learner was made of when a fit began: by that is told what has taken the place of something since."""

    def __init__(self, model: Any, loss_func: Any, opt: Any) -> None:
        self.of = model, loss_func, opt
        self.holders = holders_of(model, loss_func, opt)
        self.held = {path: held(o) for path, o in self.holders.items()}
        self.utilities = {path: utilities(m) for path, m in self.holders.items() if isinstance(m, nn.Module)}
        modules = [o for o in self.holders.values() if isinstance(o, nn.Module)]
        slots: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers)]
        self.slots = [(d, dict(d)) for d in slots]
        self.modules = [(o._modules, dict(o._modules)) for o in self.holders.values() if isinstance(o, nn.Module)]
        self.groups = [[*group["params"]] for group in opt.param_groups]
        self.tensors = {name: d[k] for name, (_, d, k) in slots_of(self.holders, opt).items()}
        self.trained = [(t, t.requires_grad) for t in self.tensors.values()
                        if isinstance(t, nn.Parameter) and not is_lazy(t)]
        self.objects = self.tensors |  {joined(path, k): v for path, had in self.held.items() for k, v in had.items()}
        self.values: dict[str, Any] = {}            # of what is no module: copies
        for path, had in self.held.items():
            if isinstance(self.holders[path], nn.Module): continue
            for k, v in had.items():
                inside = copy.copy(v) if isinstance(v, CONTAINERS) else v
                try: self.values[joined(path, k)] = decoded(encoded(v, k)), inside
                except NOT_PLAIN: pass

    def is_of(self, *parts: Any) -> bool:
        """Whether it is of these three, the very objects."""
        return all(a is b for a, b in zip(self.of, parts, strict=True))

    def has(self, place: str, now: object) -> bool:
        """Whether `now` was at `place` when the fit began."""
        return place in self.objects and self.objects[place] is now

    def changed(self, path: str, o: object, k: str, value: Any) -> bool:
        """Whether `o`, which is no module, keeps something else as `k` than when the fit began."""
        place = joined(path, k)
        return self.holders.get(path) is not o or place not in self.values or not alike(value, self.values[place][0])

    def gone(self, holders: dict[str, Any]) -> list[str]:
        """In words, which modules there are no longer, and which of torch's utilities have come to others or left them.
        """
        found = [f"{path} ({type(m).__name__}, taken away)" for path, m in self.holders.items()
                 if isinstance(m, nn.Module) and path not in holders]
        for path, m in holders.items():
            if isinstance(m, nn.Module) and (now := utilities(m)) != (had := self.utilities.get(path, now)):
                found.append(f"{path} ({', '.join({*now} ^ {*had})})")
        return found

    def restore(self, all: bool = True) -> None:
        """Put everything back that the learner was made of; unless `all`, modules and functions stay as they are now.
        """
        if all: set_groups(self.of[2], self.groups)
        for t, trained in self.trained: t.requires_grad_(trained)
        for d, was in [*self.slots, *(self.modules if all else ())]:
            d.clear()
            d.update(was)
        for path, had in self.held.items():
            o = self.holders[path]
            if isinstance(o, list): del o[len(had):]
            now = held(o)
            for k, v in now.items():
                if k not in had and can_be_encoded(v): drop(o, k)
            for k, v in had.items():
                if changeable(v) and joined(path, k) in self.values:
                    values, inside = self.values[joined(path, k)]
                    refill(v, copy.copy(inside) if isinstance(v, CONTAINERS) else values)
                if now.get(k, self) is not v and (all or can_be_encoded(v)): put(o, k, v)


def utilities(m: nn.Module) -> list[str]:
    """Which of torch's utilities that work by hooks `m` has, such as pruning."""
    return sorted(type(hook).__name__ for hook in m._forward_pre_hooks.values()
                  if type(hook).__module__.startswith("torch.nn.utils"))


def joined(path: str, k: str) -> str: return f"{path}.{k}" if path else k


def changeable(v: Any) -> bool:
    """Whether `v` can be written to and stay the same object: a tensor, an array, a container."""
    return isinstance(v, (Tensor, *CONTAINERS)) or (type(v).__module__, type(v).__name__) == ("numpy", "ndarray")


@torch.no_grad()
def refill(now: Any, was: Any) -> None:
    """Let `now`, one of the `changeable` things, hold what `was` does."""
    if not isinstance(now, CONTAINERS):
        now[...] = was
        return
    now.clear()
    (now.extend if isinstance(now, (list, deque)) else now.update)(was)


def set_groups(opt: Any, wanted: list[list[Tensor]]) -> bool:
    """Let the optimizer's groups be of these parameters; False if that isn't possible. A group stays the same object.
    """
    groups = opt.param_groups
    now = [[id(p) for p in group["params"]] for group in groups]
    if now == [[id(p) for p in params] for params in wanted]: return True
    if groups is not opt.param_groups: return False         # made anew at each look, as those of Optimizers
    left = {tuple(ids): group for ids, group in zip(now, groups, strict=True)}
    found = [left.pop(tuple(map(id, params)), None) for params in wanted]
    others = [group for group in groups if any(group is g for g in left.values())]
    chosen = [group if group is not None else others.pop(0) if others else None for group in found]
    groups[:] = [group for group in chosen if group is not None]
    for group, params in zip(chosen, wanted, strict=True):
        if group is not None and [*map(id, group["params"])] != [*map(id, params)]: group["params"][:] = params
    for group, params in zip(chosen, wanted, strict=True):
        if group is None: opt.add_param_group({"params": params})
    return True


def learner_state(model: Any, loss_func: Any, opt: Any, begun: Begun | None = None) -> Kept:
    """What training has changed or may have: tensors and plain values.

    tensors         parameters and buffers, the unsaved ones too, of model, optimizer and a loss that is a module
    params, unsaved which of them are parameters; which are in no state dict
    trained         those, and what else the optimizer has
    grads           gradients that an accumulation, or a cancelled batch, has left
    frozen          which of the trained get no gradient
    attributes      of modules: numbers, strings, tensors and containers of them, their training mode among them; of
                    other objects (see `runner.holders`) those that have changed since the fit began
    extra           of modules: what `get_extra_state` gives
    opt, groups     the optimizer's state dict, and the names of the parameters in each group
    new, gone       what has another tensor or container than when the fit began; attributes, and `gone tensors`, that
                    have been taken away since
    classes         of modules and other objects that have come since, or are of another class
    sources         of random numbers that have come since
    lost            in words, what has changed and can't be held

    Two names of one tensor or container stay that, and views of one memory too.
    """
    holders = holders_of(model, loss_func, opt)
    slots = slots_of(holders, opt)
    tensors = {_name(name, d[k], begun): d[k] for name, (_, d, k) in slots.items()}
    name_of = {id(t): name for name, t in reversed(tensors.items())}
    tensors = {name: t for name, t in tensors.items() if t is None or not is_lazy(t)}
    optimized = {id(p) for group in opt.param_groups for p in group["params"]}
    trained = {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter) or id(t) in optimized}
    parts = {path: held(o) for path, o in holders.items()}
    known = encoded_together([*tensors.values(), *parts.values()], trained.values())
    places, attributes, of_holders = dict(tensors), dict[str, dict[str, Any]](), {id(o) for o in holders.values()}
    sources = list[list[Any]]()
    lost = begun.gone(holders) if begun else []
    for path, o in holders.items():
        found = {}
        for k, v in parts[path].items():
            if not isinstance(o, nn.Module) and (begun is None or not begun.changed(path, o, k, v)): continue
            place = joined(path, k)
            source = described(v)
            if source is not None:          # its state is told elsewhere (`runner.sources`), if it was there
                if begun and not begun.has(place, v): sources.append([path, k, encoded(source, place)])
                continue
            try: found[k], places[place] = encoded(v, place, known), v
            except NOT_PLAIN:
                if begun and place in begun.objects and not begun.has(place, v) and id(v) not in of_holders:
                    lost.append(f"{place} ({getattr(v, '__name__', type(v).__name__)})")
        if found: attributes[path] = found
    here = slots.keys() | {joined(path, k) for path, part in parts.items() for k in part}
    return Kept({
        "tensors": {name: encoded(t, name, known) for name, t in tensors.items()},
        "params": [name for name, t in tensors.items() if isinstance(t, nn.Parameter)], "trained": [*trained],
        "unsaved": [joined(path, k) for path, m in holders.items() if isinstance(m, nn.Module)
                    for k in m._non_persistent_buffers_set],
        "grads": {name: encoded(p.grad, name) for name, p in trained.items() if p.grad is not None},
        "frozen": [name for name, p in trained.items() if not p.requires_grad],
        "attributes": attributes,
        "extra": {path: encoded(m.get_extra_state(), f"{path}'s extra state") for path, m in holders.items()
                  if isinstance(m, nn.Module) and type(m).get_extra_state is not nn.Module.get_extra_state},
        "opt": encoded(_state_dict(opt), "the optimizer's state"),
        "groups": [[name_of[id(p)] for p in group["params"]] for group in opt.param_groups],
        "new": [place for place, v in places.items()
                if begun and changeable(v) and not begun.has(place.removeprefix(BEGUN), v)],
        "gone": [[path, k] for path, had in (begun.held.items() if begun else ()) for k, v in had.items()
                 if path in holders and joined(path, k) not in here and can_be_encoded(v)],
        "gone tensors": [name for name in (begun.tensors if begun else ()) if name not in here],
        "classes": {path: type(o).__name__ for path, o in holders.items() if begun and (
            type(begun.holders.get(path)) is not type(o) if isinstance(o, nn.Module) else path in attributes)},
        "sources": sources, "lost": lost})


def _name(name: str, t: Any, begun: Begun | None) -> str:
    """`name`, or of a parameter that only the optimizer has, the one that it had in the model."""
    if not begun or not name.startswith(OPTIMIZER): return name
    return next((f"{BEGUN}{place}" for place, was in begun.tensors.items()
                 if was is t and not place.startswith(OPTIMIZER)), name)


def _state_dict(opt: Any) -> dict[str, Any]:
    """The optimizer's state dict, without the state of parameters that are in none of its groups any more.

    torch's can't be made with it.
    """
    params = {id(p) for group in opt.param_groups for p in group["params"]}
    alone = [p for p in opt.state if isinstance(p, Tensor) and id(p) not in params] if hasattr(opt, "state") else []
    had = {p: opt.state.pop(p) for p in alone}
    try: state: dict[str, Any] = opt.state_dict()
    finally: opt.state.update(had) if had else None
    return state
