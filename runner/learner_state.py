"""All that training changes in a learner, as plain values, and put into a learner that was built alike."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from runner.batches import leaves
from runner.states import TORCHS, parts_of
from runner.values import can_be_encoded, decoded, encoded


class StateError(ValueError):
    """A state is of another learner; the text says what differs."""


def learner_state(model: Any, loss_func: Any, opt: Any) -> dict[str, Any]:
    """What training has changed or may have: tensors and plain values.

    tensors         parameters and buffers, the unsaved ones too, of model, optimizer and a loss that is a module
    grads           gradients that an accumulation, or a cancelled batch, has left
    frozen          parameters that get no gradient
    attributes      of modules: numbers, strings, tensors and containers of them, their training mode among them
    extra           of modules: what `get_extra_state` gives
    opt, groups     the optimizer's state dict, and the names of the parameters in each group
    """
    modules, slots = parts_of(model, loss_func, opt)
    held = {name: d[k] for name, (_, d, k) in slots.items()}
    params = {name: p for name, p in held.items() if isinstance(p, nn.Parameter) and not is_lazy(p)}
    name_of = {id(p): name for name, p in reversed(params.items())}
    state: dict[str, Any] = encoded({
        "tensors": {name: t for name, t in held.items() if t is None or not is_lazy(t)},
        "grads": {name: p.grad for name, p in params.items() if p.grad is not None},
        "frozen": [name for name, p in params.items() if not p.requires_grad],
        "attributes": {path: found for path, m in modules.items() if (found := _attributes(m))},
        "extra": {path: m.get_extra_state() for path, m in modules.items()
                  if type(m).get_extra_state is not nn.Module.get_extra_state},
        "opt": opt.state_dict(),
        "groups": [[name_of[id(p)] for p in group["params"] if id(p) in name_of] for group in opt.param_groups],
    }, "the learner's state")
    return state


def _attributes(m: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module; not those that hold its parameters once more, as an RNN's lists do."""
    return {k: v for k, v in vars(m).items() if (k == "training" or k not in TORCHS) and can_be_encoded(v)
            and not any(isinstance(t, nn.Parameter) or _holds(m, t) for t in leaves(v))}


def _holds(m: nn.Module, t: Any) -> bool: return isinstance(t, Tensor) and any(t is b for b in m._buffers.values())


@torch.no_grad()
def put_learner(model: Any, loss_func: Any, opt: Any, state: dict[str, Any]) -> None:
    """Put `learner_state`'s `state` into a learner that was built alike; tensors in place, each stays the same object.

    A parameter group that the optimizer lacks, since it was added in mid-fit, is added.

    Raises:
        StateError: a learner that can't hold it.
    """
    modules, slots = parts_of(model, loss_func, opt)
    device = next((p.device for group in opt.param_groups for p in group["params"]), torch.device("cpu"))
    for name, was in state["tensors"].items():
        if name not in slots: _register(modules, name, was, device)
        else: _put(*slots[name], name, was, device)
    _, slots = parts_of(model, loss_func, opt)
    params = {name: d[k] for name, (_, d, k) in slots.items() if isinstance(d[k], nn.Parameter)}
    frozen = set(state["frozen"])
    for name, p in params.items():
        if name in state["tensors"]: p.requires_grad_(name not in frozen)
    for path, had in state["attributes"].items():
        if path in modules: _put_attributes(modules[path], decoded(had), device)
    for path, extra in state["extra"].items():
        if path in modules: modules[path].set_extra_state(decoded(extra))
    for names in state["groups"][len(opt.param_groups):]:
        if gone := [name for name in names if name not in params]:
            raise StateError(f"a parameter group that was added in mid-fit has {gone[0]!r}, which the model lacks; add "
                             "the group before the fit, or as a part of the model")
        opt.add_param_group({"params": [params[name] for name in names]})
    opt.load_state_dict(decoded(state["opt"]))
    for name, p in params.items():
        grad = state["grads"].get(name)
        p.grad = None if grad is None else grad.to(p.device, copy=True)


def _put(m: nn.Module | None, d: Any, k: Any, name: str, was: Tensor | None, device: torch.device) -> None:
    now = d[k]
    if isinstance(now, nn.Parameter):
        if was is None: raise StateError(f"{name} is None in the checkpoint, and a parameter in the learner")
        if is_lazy(now): now.materialize(tuple(was.shape), dtype=was.dtype)
        if (now.shape, now.dtype) != (was.shape, was.dtype):
            raise StateError(f"{name} has the shape {tuple(now.shape)} and {now.dtype} in the learner, and "
                             f"{tuple(was.shape)} and {was.dtype} in the checkpoint")
        now.copy_(was)
    elif was is None or now is None: d[k] = None if was is None else was.to(device, copy=True)
    elif is_lazy(now):
        now.materialize(tuple(was.shape), dtype=was.dtype)
        now.copy_(was)
    elif (now.shape, now.dtype) == (was.shape, was.dtype): now.copy_(was)
    else: d[k] = was.to(now.device, copy=True)      # a buffer that grows


def _register(modules: dict[str, nn.Module], name: str, was: Tensor | None, device: torch.device) -> None:
    """A buffer that a module has registered while it was trained."""
    path, _, k = name.rpartition(".")
    if path not in modules or isinstance(was, nn.Parameter):
        raise StateError(f"the checkpoint has {name!r}, which the learner lacks; build model, loss and optimizer as "
                         "they were")
    modules[path].register_buffer(k, None if was is None else was.to(device, copy=True))


def _put_attributes(m: nn.Module, had: dict[str, Any], device: torch.device) -> None:
    held = vars(m)
    for k, was in had.items():
        now: Any = held.get(k)
        if isinstance(was, Tensor):
            if isinstance(now, Tensor) and now.is_leaf and (now.shape, now.dtype) == (was.shape, was.dtype):
                now.copy_(was)
            else: held[k] = was.to(now.device if isinstance(now, Tensor) else device)
        elif type(now) is type(was) and isinstance(was, (list, dict, set)):
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(was)
        else: held[k] = was
