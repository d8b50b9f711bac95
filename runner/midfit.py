"""What somebody changes in mid-fit and no checkpoint holds: parts of the learner, data, callbacks without a state."""

from typing import Any
from weakref import ref

from torch import Tensor

from runner.events import Callback
from runner.loading import data_sets

CONTAINERS = (list, dict, set)


class Marks:
    """How things were when a fit began, so that what is another thing since can be named."""

    def __init__(self, run: Any) -> None:
        self.parts = parts_of_run(run)
        self.data = {name: _marks(dl) for name, dl in loaders_of(run)}
        self.settings = {cb.name: settings_of(cb) for cb in run.cbs if cb.name not in ("checkpoint", "resume")}
        self.callbacks = {cb.name: {k: _deep(v) for k, v in vars(cb).items()} for cb in run.cbs if _forgets(cb)}

    def replaced(self, run: Any) -> list[str]:
        """Which parts of the learner are other objects now."""
        return [name for name, part in parts_of_run(run).items() if part is not self.parts[name]]

    def changed_data(self, run: Any) -> list[str]:
        """Which tensors of data sets, and lists of indices, have been changed or replaced."""
        found = []
        for name, dl in loaders_of(run):
            if dl is self.parts[name]:
                found += [f"{k} of the {name}'s data set" for k, now in _marks(dl).items()
                          if not same(now, self.data[name].get(k))]
        return found

    def forgotten(self, run: Any) -> list[str]:
        """Which attributes of callbacks that have no `state_dict` have changed."""
        return [f"{cb.name}.{k}" for cb in run.cbs if cb.name in self.callbacks for k, v in vars(cb).items()
                if k != "run" and not same(_deep(v), self.callbacks[cb.name].get(k))]


def settings_of(cb: Any) -> dict[str, Any]:
    """The plain settings of a callback."""
    return {k: v for k, v in vars(cb).items() if k[:1] != "_" and type(v) in (bool, int, float, str)}


def parts_of_run(run: Any) -> dict[str, Any]:
    """The learner's parts by what they are called in an error."""
    return {"model": run.model, "optimizer": run.opt, "loss function": run.loss_func, **dict(loaders_of(run))}


def loaders_of(run: Any) -> list[tuple[str, Any]]:
    return [("training loader", run.data.train_dl), ("validation loader", run.data.valid_dl)]


def _forgets(cb: Any) -> bool:
    if not isinstance(cb, Callback) or type(cb).__module__.split(".")[0] == "runner": return False
    return not (hasattr(cb, "state_dict") and hasattr(cb, "load_state_dict"))


def _marks(dl: Any) -> dict[str, Any]:
    """Marks of what the data sets of a loader hold: not of caches, and of what only grows the length tells."""
    found = {f"{type(ds).__name__}.{k}": v for ds in data_sets(dl) for k, v in vars(ds).items()
             if isinstance(v, (Tensor, list, tuple)) or type(v).__name__ == "ndarray"}
    return {k: [*map(mark, v)] if isinstance(v, tuple) else v if isinstance(v, list) else mark(v)
            for k, v in found.items()}


def mark(v: Any) -> Any:
    """What tells whether `v` has changed, as far as that costs nothing: the object, how long it is, how often written.
    """
    if isinstance(v, Tensor): return ref(v), v._version
    if type(v).__name__ == "ndarray": return ref(v)
    if isinstance(v, CONTAINERS): return v, len(v)
    return v


def _deep(v: Any) -> Any:
    """A mark of `v`; of an object, such as a scheduler, with its numbers."""
    if isinstance(v, (Tensor, *CONTAINERS)) or not hasattr(v, "__dict__"): return mark(v)
    return v, [(k, n) for k, n in vars(v).items() if isinstance(n, (int, float, str))]


def same(a: Any, b: Any) -> bool:
    """Whether two marks are of the same thing, unchanged."""
    if type(a) is not type(b): return False
    if isinstance(a, (int, float, str)): return a == b or a != a
    if isinstance(a, (tuple, list)): return a is b or (len(a) == len(b) and all(map(same, a, b)))
    return a is b
