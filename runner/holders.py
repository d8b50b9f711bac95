"""What in a learner may keep something from step to step: modules, and other objects that they or a loss hold."""

from collections import deque
from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from runner.attributes import SETTINGS
from runner.events import Progress
from runner.states import LOSS, TORCHS, Slots, params_of
from runner.undo import OUTSIDE, PLAIN, attributes_of
from runner.values import NUMBERS, can_be_encoded

OPTIMIZER = "(optimizer)"
MANY, MOST = 1000, 10_000       # entries of a list that may hold objects, and objects
OPENED = (FunctionType, MethodType, partial)
APART = tuple(kind for kind in (*SETTINGS, *PLAIN, *OUTSIDE, Tensor, Dataset, DataLoader, Progress)
              if kind not in OPENED)
# Classes of torch that are neither modules nor optimizers; of these some keep something that is ours.
THEIRS, OURS = "torch.", ("torch.amp", "torch.distributions", "torch.nn", "torch.optim")


def holders_of(model: Any, loss_func: Any, opt: Any) -> dict[str, Any]:
    """What may keep something, by path: modules (of a list that isn't registered, too), and objects of other classes.

    Such are an object in an attribute of a module or in a list or dict there, the loss and what it holds, the
    optimizer, a function that has variables of its own; and lists and dicts of objects. Loaders, data sets, runners and
    callbacks are none, nor is what stands for something outside of this process.
    """
    found: dict[str, Any] = {}
    seen: dict[int, Any] = {}
    todo: deque[tuple[str, Any]] = deque([("", model), (LOSS, loss_func), (OPTIMIZER, opt)])
    while todo and len(found) < MOST:
        path, o = todo.popleft()
        if type(o) in NUMBERS or id(o) in seen or (isinstance(o, APART) and not isinstance(o, OPENED)): continue
        seen[id(o)] = o
        if isinstance(o, nn.Module):
            for name, m in o.named_modules(memo={m for m in seen.values() if isinstance(m, nn.Module) and m is not o}):
                found[_join(path, name)] = seen[id(m)] = m
                todo += [(_join(path, name, k), v) for k, v in held(m).items()]
            continue
        if isinstance(o, MethodType): inner: Any = {"__self__": o.__self__}
        elif isinstance(o, partial): inner = {"func": o.func, "args": o.args, "keywords": o.keywords}
        elif isinstance(o, (tuple, set, frozenset, deque)): inner = dict(enumerate(o)) if len(o) <= MANY else {}
        elif isinstance(o, (list, dict)) and (len(o) > MANY or can_be_encoded(o)): continue
        elif type(o).__module__.startswith(THEIRS) and not type(o).__module__.startswith(OURS): continue
        else:
            inner = held(o)
            if inner or hasattr(o, "__dict__"): found[path] = o
        todo += [(_join(path, str(k)), v) for k, v in inner.items()]
    return found


def _join(*names: str) -> str: return ".".join(name for name in names if name)


def slots_of(holders: dict[str, Any], opt: Any) -> Slots:
    """Parameters and buffers of the modules among `holders`, and what else the optimizer has, of no module, by name."""
    slots: Slots = {_join(path, k): (m, d, k) for path, m in holders.items() if isinstance(m, nn.Module)
                    for d in (m._parameters, m._buffers) for k in d}
    known, params = {id(d[k]) for _, d, k in slots.values()}, params_of(opt)
    slots.update((f"{OPTIMIZER}.{i}", (None, params, i)) for i, p in enumerate(params) if id(p) not in known)
    return slots


# --- what a holder holds itself -----------------------------------------------------------------------------------

def held(o: Any) -> dict[str, Any]:
    """What `o` keeps, under names: attributes, of a function its variables too, of a list or dict its entries."""
    if isinstance(o, nn.Module):
        return {k: v for k, v in vars(o).items()
                if (k == "training" or k not in TORCHS) and not k.startswith("_torchdynamo")}
    if isinstance(o, FunctionType): return {**vars(o), **{name: cell.cell_contents for name, cell in _cells(o)}}
    if isinstance(o, list): return {str(i): v for i, v in enumerate(o)}
    if isinstance(o, dict): return {k: v for k, v in o.items() if isinstance(k, str)}
    own = attributes_of(o)
    if not isinstance(o, Optimizer): return own
    return {k: v for k, v in own.items() if k not in ("state", "param_groups", "defaults", "step", "_active")
            and not k.startswith(("_optimizer_", "_zero_grad", "_patch", "_warned"))}


def put(o: Any, k: str, value: Any) -> None:
    """Let `o` keep `value` under the name `k`."""
    if isinstance(o, FunctionType):
        cells = dict(_cells(o))
        if k in cells: cells[k].cell_contents = value
        else: vars(o)[k] = value
    elif isinstance(o, list): o[int(k):int(k) + 1] = [value]
    elif isinstance(o, dict): o[k] = value
    elif isinstance(o, nn.Module): vars(o)[k] = value
    else: object.__setattr__(o, k, value)


def drop(o: Any, k: str) -> None:
    """Let `o` keep nothing under the name `k`."""
    if isinstance(o, FunctionType): vars(o).pop(k, None)
    elif isinstance(o, dict): o.pop(k, None)
    elif isinstance(o, nn.Module): vars(o).pop(k, None)
    elif not isinstance(o, list): object.__delattr__(o, k)


def _cells(f: FunctionType) -> Iterator[tuple[str, CellType]]:
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try: cell.cell_contents     # noqa: B018
        except ValueError: continue         # not set yet
        yield name, cell
