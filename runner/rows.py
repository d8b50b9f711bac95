"""`Rows`, a history that is sliced by row and by column, and plain tables."""

import csv
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsIndex, overload

from runner.notebook import html_table

SHOWN = 10      # rows at either end of a table in a notebook


class Rows(list[dict[str, Any]]):
    """A list of plain dicts, one per row, that is also read by column.

        rows[5]                                     # a dict
        rows[-100:]                                 # Rows
        rows["loss"]                                # the column, a list
        rows[-100:, "loss"]                         # of the last 100 rows
        rows["step", "loss"]                        # two columns, a list of tuples
        rows[-100:, ("step", "loss")]               # of the last 100 rows
        rows[5, "loss"]                             # one value
        rows.where(phase="train", module="0")       # Rows

    Rows may have different keys. A column lists the rows that have it, and several columns at once the rows that have
    them all: ask for `rows["step", "loss"]` and not for one after the other, where that matters. Of no rows, every
    column is empty.

    Raises:
        KeyError: a column that no row has; it names those that there are and the nearest one.
    """

    @overload
    def __getitem__(self, key: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, key: slice) -> "Rows": ...

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...

    @overload
    def __getitem__(self, key: tuple[slice, str]) -> list[Any]: ...

    @overload
    def __getitem__(self, key: tuple[int, Any]) -> Any: ...

    @overload
    def __getitem__(self, key: tuple[slice, tuple[str, ...]] | tuple[str, ...]) -> list[tuple[Any, ...]]: ...

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice): return Rows(super().__getitem__(key))
        if isinstance(key, str) or (isinstance(key, tuple) and all(isinstance(k, str) for k in key)):
            key = slice(None), key
        if not isinstance(key, tuple): return super().__getitem__(key)
        at, names = key
        if not isinstance(at, slice):
            of_one: Any = Rows([super().__getitem__(at)])
            return of_one[names][0]
        self._check(names)
        rows = super().__getitem__(at)
        if isinstance(names, str): return [row[names] for row in rows if names in row]
        return [tuple(row[n] for n in names) for row in rows if all(n in row for n in names)]

    def where(self, **values: Any) -> "Rows":
        """The rows whose columns have these values: `rows.where(phase="train", epoch=0)`."""
        self._check(tuple(values))
        return Rows(row for row in self if all(n in row and row[n] == v for n, v in values.items()))

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self for name in row))

    def _check(self, names: str | Iterable[str]) -> None:
        """Refuse a name, or one of several, that no row has."""
        for name in (names,) if isinstance(names, str) else names:
            if not self or any(name in row for row in self): continue
            near = difflib.get_close_matches(str(name), known := self.columns, 1, 0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise KeyError(f"no row has a column {name!r}: {hint}There are: {', '.join(known)}")

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write a CSV file with a header, `columns`, and return its `Path`.

        A cell is empty where its row lacks the column. `float` reads every number back as it was, nan and inf too.
        """
        path = Path(path)
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self)
        return path

    def __repr__(self) -> str:
        """How many rows of what, and the last: all of them are `list(rows)`."""
        if not self: return "<Rows: none>"
        return f"<Rows: {len(self)} of {', '.join(map(str, self.columns))}; the last is {self[-1]}>"

    def _repr_html_(self) -> str:
        """A table, of many rows the first and the last."""
        names, n = self.columns, len(self)
        at = range(n) if n <= 2 * SHOWN + 1 else [*range(SHOWN), None, *range(n - SHOWN, n)]
        lines = [["..."] * (1 + len(names)) if i is None else [i, *(_cell(self[i].get(name, "")) for name in names)]
                 for i in at]
        return html_table(["", *names], lines, f"{n} row{'s' * (n != 1)}")

    def plot(self, x: str, y: str, ax: Any = None, *, by: str | None = None, yscale: str = "linear") -> Any:
        """Column `y` against column `x`, one line per value of the column `by` if given; returns the axes."""
        from runner.insight import plots
        if by is None:
            xs, ys = ([point[i] for point in self[x, y]] for i in (0, 1))
            return plots.plot_line(ys, xs, ax, xlabel=x, ylabel=y, yscale=yscale)
        series: dict[Any, tuple[list[Any], list[Any]]] = {}
        for name, *point in self[by, x, y]:
            for column, value in zip(series.setdefault(name, ([], [])), point, strict=True): column.append(value)
        return plots.plot_lines(series, ax, xlabel=x, ylabel=y, yscale=yscale, ordered=True)


def _cell(value: object) -> str: return f"{value:.6g}" if isinstance(value, float) else str(value)


def text_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A plain table: columns two spaces apart, the first to the left and the others to the right."""
    lines = [[str(c) for c in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Iterable[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]).rstrip()
    return "\n".join(map(line, lines))
