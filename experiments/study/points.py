"""The points of a study: a grid of axes, what each trial is handed, and the key of each."""

import functools
import hashlib
import inspect
import itertools
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.errors import InputError, pick

Point = dict[str, Any]          # a value for each axis, as JSON holds it
Trial = Callable[..., Any]

# What the study itself says of a trial, a column each.
OWN = ("status", "seconds", "attempts", "error", "traceback", "key")


class Handed(NamedTuple):
    """A trial: the points that it gives rows for, what it is called with, and of which axes that is lists of values."""

    points: tuple[Point, ...]
    arguments: Point
    together: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Every combination of the values of `axes`; those of the axes `together` go to one trial.

    `a + b` has the trials of both, one after the other: grids of the same axes that have no point in common.
    """

    axes: Mapping[str, tuple[Any, ...]]
    together: tuple[str, ...] = ()
    added: "tuple[Grid, ...]" = ()      # `axes` are those of all, then, and the points are theirs

    def trials(self) -> Iterator[list[Point]]:
        """The points of each trial: one, or with `together` one for each combination of those axes' values."""
        if self.added: return itertools.chain.from_iterable(part.trials() for part in self.added)
        apart = {name: values for name, values in self.axes.items() if name not in self.together}
        joint = {name: self.axes[name] for name in self.together}
        return ([{name: {**outer, **inner}[name] for name in self.axes} for inner in _product(joint)]
                for outer in _product(apart))

    def handed(self) -> Iterator[Handed]:
        """Each trial with what it is called with: of an axis in `together` the list of its values, point by point."""
        for part in self.added or (self,):
            for points in part.trials():
                yield Handed(tuple(points), part.arguments(points), part.together)

    def arguments(self, points: Sequence[Point]) -> Point:
        """What a trial of `points` is called with."""
        return {name: [p[name] for p in points] if name in self.together else points[0][name] for name in self.axes}

    def __iter__(self) -> Iterator[Point]: return itertools.chain.from_iterable(self.trials())

    def __len__(self) -> int:
        return sum(map(len, self.added)) if self.added else math.prod(map(len, self.axes.values()))

    def __add__(self, other: "Grid") -> "Grid":
        if not isinstance(other, Grid): return NotImplemented
        if set(self.axes) != set(other.axes):
            raise InputError(f"grids of the axes {', '.join(self.axes)} and {', '.join(other.axes)} can't be added; "
                             "give both the same axes, one with a single value if need be")
        parts = tuple(Grid({name: part.axes[name] for name in self.axes}, part.together)
                      for grid in (self, other) for part in grid.added or (grid,))
        values = {name: {cell(v): v for part in parts for v in part.axes[name]} for name in self.axes}
        seen: set[str] = set()
        for point in itertools.chain.from_iterable(parts):
            if (text := cell(point)) in seen:
                raise InputError(f"grids that are added have {shown(point)} twice; name each point once")
            seen.add(text)
        together = dict.fromkeys(name for part in parts for name in part.together)
        return Grid({name: tuple(found.values()) for name, found in values.items()}, tuple(together), parts)


def grid(*, together: str | Collection[str] = (), **axes: Iterable[Any]) -> Grid:
    """Every combination of the values of some axes.

        grid(norm=["BatchNorm", "RunningBatchNorm"], lr=[0.1, 0.4], seed=range(20))                     # 80 trials
        grid(norm=["BatchNorm", "RunningBatchNorm"], lr=[0.1, 0.4], seed=range(20), together="seed")    # 4 trials

    Grids of the same axes can be added, for settings that get other seeds: `grid(norm=["BatchNorm"], seed=[0]) +
    grid(norm=["GroupNorm"], seed=range(20))`.

    Args:
        together: the axis, or axes, whose values one trial takes all at once: `seed=[0, 1, ..., 19]`. It returns a list
            of rows, one for each. Of several axes it gets lists of the same length, a value of each for every row:
            `together=("seed", "lr")` gives `seed=[0, 0, 1, 1, ...], lr=[0.1, 0.4, 0.1, 0.4, ...]`.
        axes: the values of each, which JSON must hold: None, bool, int, float, str, and lists and dicts of those.
            Scalars of numpy and torch become Python's, and tuples become lists.

    Raises:
        InputError: no axis, an empty one, one that is no list of values, a value twice, or one that JSON can't hold.
    """
    if not axes: raise InputError("grid() has no axes; give at least one, as in grid(seed=range(20))")
    found = {name: _axis(name, values) for name, values in axes.items()}
    joint = (together,) if isinstance(together, str) else tuple(together)
    for name in joint:
        if name not in found: pick(name, found, "axis in together")
    return Grid(found, tuple(name for name in found if name in joint))


def _axis(name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    if name in OWN: raise InputError(f"an axis can't be named {name!r}, which is a column of every study; rename it")
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not isinstance(values, Iterable):
        what = "which has no order" if isinstance(values, (set, frozenset)) else "no list of values"
        mend = f"[{values!r}]" if not isinstance(values, (set, frozenset, Mapping)) else "a list"
        raise InputError(f"the axis {name!r} is {values!r}, {what}; give {name}={mend}")
    found = tuple(plain(value, f"the axis {name!r}", finite=True) for value in values)
    if not found: raise InputError(f"the axis {name!r} is empty; give it a value, or leave it out")
    texts = [cell(value) for value in found]
    for i, text in enumerate(texts):
        if text in texts[:i]: raise InputError(f"the axis {name!r} has {text} twice; name each value once")
    return found


def plain(value: Any, where: str, *, finite: bool = False) -> Any:
    """`value` as JSON gives it back, scalars of numpy and torch too.

    Raises:
        InputError: JSON can't hold it, or with `finite` it is infinite or NaN; `where` says what it belongs to.
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0: value = value.item()
    if isinstance(value, float) and finite and not math.isfinite(value):
        raise InputError(f"{where} has the value {value!r}, which JSON can't hold; name it by a string, such as "
                         f"{str(value)!r}, and let the trial make the number of it")
    if value is None or type(value) in (bool, int, float, str): return value
    if isinstance(value, str): return str.__str__(value)        # of subclasses, as of an enum, the value alone
    for kind in (int, float):
        if isinstance(value, kind): return kind(value)
    if isinstance(value, (list, tuple)): return [plain(v, where, finite=finite) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {str(k): plain(v, where, finite=finite) for k, v in value.items()}
    text = repr(value)
    raise InputError(f"{where} has the value {text if len(text) < 80 else text[:77] + '...'} of type "
                     f"{type(value).__qualname__}, which JSON can't hold; name it by a string or a number and let the "
                     "trial make the object of it")


def cell(value: Any) -> str:
    """A text that equal values share: 1 and 1.0 do, 1 and True don't."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53: value = int(value)
    return json.dumps(value, sort_keys=True)


def shown(point: Mapping[str, Any]) -> str:
    """`point` in a message: `norm='BatchNorm', seed=3`; a long list by its ends."""
    def text(v: Any) -> str:
        return f"[{v[0]!r}, ..., {v[-1]!r}]" if isinstance(v, list) and len(v) > 3 else repr(v)
    return ", ".join(f"{name}={text(value)}" for name, value in point.items())


def key(point: Mapping[str, Any], function: str, version: str) -> str:
    """The name of a trial's files: a hash of what it is handed, the function's name and the version."""
    text = json.dumps([function, version, point], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def function_name(trial: Trial) -> str:
    """Where `trial` is defined and its name; of the script that is run, the name of its file."""
    if isinstance(trial, functools.partial):
        given = [plain(list(trial.args), "the trial's partial"), plain(trial.keywords, "the trial's partial")]
        return f"{function_name(trial.func)} with {json.dumps(given, sort_keys=True)}"
    named = trial if hasattr(trial, "__qualname__") else type(trial)
    module = str(named.__module__)
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if module == "__main__" and file: module = Path(file).stem
    return f"{module}.{named.__qualname__}"


def check_takes(trial: Trial, names: Collection[str]) -> None:
    """Raises InputError unless `trial` can be called with arguments called `names`, and needs no others."""
    if not callable(trial): raise InputError(f"the trial is {trial!r}; give a function of the axes: trial(**point)")
    try: parameters = inspect.signature(trial).parameters.values()
    except (TypeError, ValueError): return      # a function of C that doesn't say
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes, who = [p.name for p in by_name], function_name(trial)
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for name in names:
            if name in takes: continue
            raise InputError(f"the trial {who} takes no argument {name!r}, which is an axis of the grid: give it one, "
                             f"or rename the axis. It takes: {', '.join(takes) or 'nothing'}")
    needs = [p.name for p in by_name if p.default is p.empty and p.name not in names]
    if needs:
        raise InputError(f"the trial {who} needs {', '.join(needs)}, of which the grid has no axis; add an axis, as in "
                         f"{needs[0]}=[...], of one value if it is the same in all trials")


def _product(axes: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    for values in itertools.product(*axes.values()): yield dict(zip(axes, values, strict=True))
