"""Rows sorted into cells of the same settings: nothing is merged, counted twice or left out without being asked for."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from experiments.errors import InputError, pick
from experiments.study.points import cell, shown

Row = Mapping[str, Any]
Names = str | Sequence[str]


def names_of(names: Names, known: Collection[str], what: str) -> tuple[str, ...]:
    """`names` as a tuple; raises InputError for one that isn't in `known`."""
    found = (names,) if isinstance(names, str) else tuple(names)
    for name in found:
        if name not in known: pick(name, known, what)
    return found


def where(rows: Iterable[Row], axes: Mapping[str, Sequence[Any]], chosen: Mapping[str, Any]) -> list[Row]:
    """The rows whose axes have the values `chosen`, each a value or a list of them.

    Raises:
        InputError: no such axis, or a value that it doesn't have.
    """
    wanted: dict[str, set[str]] = {}
    for name, values in chosen.items():
        names_of(name, axes, "axis in where")
        values = values if isinstance(values, (list, tuple, set, range)) else [values]
        wanted[name] = {level(value, name, axes) for value in values}
    return [row for row in rows if all(cell(row[name]) in texts for name, texts in wanted.items())]


def level(value: Any, name: str, axes: Mapping[str, Sequence[Any]]) -> str:
    """The text of `value` in cells; raises InputError if it isn't one of the axis."""
    known = {cell(v) for v in axes[name]}
    if (text := _text(value)) not in known:
        raise InputError(f"the axis {name!r} has no value {value!r}; it has: {', '.join(map(repr, axes[name]))}")
    return text


def _text(value: Any) -> str:
    try: return cell(value)
    except TypeError: return repr(value)


def cells(rows: Iterable[Row], axes: Collection[str], by: Sequence[str], over: Sequence[str],
          mend: str) -> dict[tuple[str, ...], list[Row]]:
    """`rows` of the same values of the axes `by`, in the order of the first of each; they differ in the axes `over`.

    Raises:
        InputError: a cell would mix settings of another axis, or has the same values of `over` twice.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows: found.setdefault(tuple(cell(row[name]) for name in by), []).append(row)
    for group in found.values():
        of = f" of {shown({n: group[0][n] for n in by})}" if by else ""
        for name in axes:
            if name in by or name in over: continue
            different = dict.fromkeys(cell(row[name]) for row in group)
            if len(different) == 1: continue
            raise InputError(f"a cell{of} would mix {name} = {', '.join(different)}; {mend.format(name=name)}, or "
                             f"select one by where={{{name!r}: {next(iter(different))}}}")
        seen: dict[tuple[str, ...], Row] = {}
        for row in group:
            if (at := tuple(cell(row[name]) for name in over)) in seen:
                twice = shown({name: row[name] for name in over}) or "one setting"
                raise InputError(f"a cell{of} has {twice} twice; a run counts once, so leave one of them out")
            seen[at] = row
    return found


def finite(row: Row, value: str) -> float | None:
    """The row's figure; None if it has none, or one that is not finite."""
    x = row.get(value)
    if x is None or isinstance(x, str): return None
    return float(x) if math.isfinite(x) else None


def figures(rows: Sequence[Row], value: str, failed_as: float | None, axes: Collection[str]) -> list[float]:
    """The figure of each row; of a failed one `failed_as`.

    Raises:
        InputError: no row has the figure, one has a text, or there are failed ones and no `failed_as`.
    """
    known = dict.fromkeys(name for row in rows for name, v in row.items() if isinstance(v, (int, float)))
    if rows and value not in known and any(row.get("status", "ok") == "ok" for row in rows):
        pick(value, [n for n in known if n not in axes and n not in ("attempts", "seconds")], "figure")
    found = [finite(row, value) for row in rows]
    if failed_as is None and None in found:
        failed = [row for row, x in zip(rows, found, strict=True) if x is None]
        raise InputError(f"{len(failed)} of {len(rows)} runs have no finite {value!r} (the first: "
                         f"{shown({n: failed[0][n] for n in axes})}, status {failed[0].get('status')!r}); say what a "
                         "failed run counts as, such as chance, by failed_as=0.1")
    return [float(failed_as or 0) if x is None else x for x in found]
