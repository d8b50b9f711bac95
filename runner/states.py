"""What training, or a look at a model, changes and must be able to put back: modules, loaders, random states.

Each function that copies returns one that puts back.
"""

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

LOSS = "(loss)"     # path of the loss function; no attribute can be called so

Slots = dict[str, tuple[nn.Module | None, Any, Any]]    # name: (module, dict or list, key)


def snapshot(model: Any, loss_func: Any, opt: Any, data: Any) -> Callable[[], None]:
    """Copy all that training changes; returns a function that puts it back and clears the gradients.

    That is parameters and buffers of the model, of a loss that is a module and of the optimizer, the unsaved ones and
    those that a module replaces instead of changing; training modes; the optimizer's state; and the random states of
    torch (every device), Python, numpy (if it is in use) and the loaders' generators.
    """
    others = [(p, p.detach().clone()) for group in opt.param_groups for p in group["params"]]
    optim = copy.deepcopy(opt.state_dict())
    parts = module_states(model, loss_func), loader_states(data.train_dl, data.valid_dl), random_states()

    def restore() -> None:
        with torch.no_grad():
            for p, was in others: p.copy_(was)
        opt.load_state_dict(optim)
        opt.zero_grad()
        for restore_part in parts: restore_part()
    return restore


def module_states(*tops: object) -> Callable[[], None]:
    """Copy what the modules under `tops` hold (other objects are passed over); a function that puts it back.

    That is parameters, buffers and training modes, and the attributes that a class adds of its own: tensors among them
    by value, lists, dicts, sets and deques by what they contain, all others by which object it is.
    """
    modules = [m for top in tops if isinstance(top, torch.nn.Module) for m in top.modules()]
    modes = [(m, m.training) for m in modules]
    slots: list[tuple[Any, dict[str, Any]]] = [(s, dict(s)) for m in modules for s in (m._parameters, m._buffers)]
    own = [(vars(m), {k: v for k, v in vars(m).items() if k not in TORCHS}) for m in modules]
    held = [v for _, had in (*slots, *own) for v in had.values()]
    tensors = [(t, t.detach().clone()) for t in held if torch.is_tensor(t)]
    contents = [(c, copy.copy(c)) for c in held if type(c) in (list, dict, set, deque)]

    def restore() -> None:
        for m, training in modes: m.training = training
        for s, had in slots:
            s.clear()
            s.update(had)
        for s, had in own:
            for k in s.keys() - had.keys() - TORCHS: del s[k]
            s.update(had)
        with torch.no_grad():
            for t, was in tensors: t.copy_(was)
        for c, was in contents:
            c.clear()
            (c.update if isinstance(c, (dict, set)) else c.extend)(was)
    return restore


TORCHS = vars(torch.nn.Module()).keys()    # what every module has; its hooks may rightly come and go meanwhile


def parts_of(model: Any, loss_func: Any, opt: Any) -> tuple[dict[str, nn.Module], Slots]:
    """Modules by path, `{path: module}`, and what training changes by name, `{name: (module, dict or list, key)}`.

    The latter are the parameters and buffers of the model and of a loss that is a module, and what else the optimizer
    has, of no module.
    """
    modules: dict[str, nn.Module] = {}
    if isinstance(model, nn.Module): modules.update(model.named_modules())
    if isinstance(loss_func, nn.Module):
        modules.update((f"{LOSS}.{n}" if n else LOSS, m) for n, m in loss_func.named_modules())
    slots: Slots = {f"{path}.{k}" if path else k: (m, d, k) for path, m in modules.items()
             for d in (m._parameters, m._buffers) for k in d}
    known, params = {id(d[k]) for _, d, k in slots.values()}, params_of(opt)
    slots.update((f"(optimizer).{i}", (None, params, i)) for i, p in enumerate(params) if id(p) not in known)
    return modules, slots


def params_of(opt: Any) -> list[nn.Parameter]: return [p for group in opt.param_groups for p in group["params"]]


def holds_compiled(model: nn.Module) -> bool:
    """Whether `model` or a part of it went through `torch.compile`, of which what is compiled passes hooks by."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def loader_states(*loaders: Any) -> Callable[[], None]:
    """Copy the states of the loaders' generators and which iterator of persistent workers they hold; a function that
    puts them back.
    """
    generators = [(g, g.get_state()) for g in generators_of(*loaders)]
    iterators = [(dl, dl._iterator) for dl in loaders if hasattr(dl, "_iterator")]

    def restore() -> None:
        for g, state in generators: g.set_state(state)
        for dl, iterator in iterators: dl._iterator = iterator  # persistent workers would not draw their seed again
    return restore


def random_states() -> Callable[[], None]:
    """Copy the random states of torch (every device), Python and numpy (if in use); a function that puts them back."""
    return partial(set_random_state, random_state())


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The random states of torch (every device), Python, numpy (if in use) and `generators`, for `set_random_state`.

    Tensors, tuples and numbers, which `torch.load(weights_only=True)` can read.
    """
    state = {"torch": torch.get_rng_state(), "python": random.getstate(),
             "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
             "generators": [g.get_state() for g in generators]}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def set_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put back what `random_state` returned, or a part of it; `generators` are the same in the same order."""
    if "torch" in state: torch.set_rng_state(state["torch"])
    if "python" in state: random.setstate(state["python"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")): numpy.random.set_state(state["numpy"])
    if state.get("cuda") and torch.cuda.is_available(): torch.cuda.set_rng_state_all(state["cuda"])
    for g, was in zip(generators, state.get("generators", ()), strict=True): g.set_state(was)


def generators_of(*loaders: object) -> list[torch.Generator]:
    """The `torch.Generator`s that the loaders and their samplers, however nested, draw from, each once."""
    found: dict[int, torch.Generator] = {}
    todo = [*loaders]
    while todo:
        owner = todo.pop()
        g = getattr(owner, "generator", None)
        if isinstance(g, torch.Generator): found[id(g)] = g
        todo += [s for name in ("sampler", "batch_sampler") if (s := getattr(owner, name, None)) is not None]
    return list(found.values())
