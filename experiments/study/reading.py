"""What a study has to show: its rows, as they are and as tables, comparisons and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import InputError
from experiments.study import cells, pictures, statistics
from experiments.study.cells import Names, Row
from experiments.study.places import Place
from experiments.study.points import Grid
from experiments.study.store import Store
from experiments.study.work import Task

if TYPE_CHECKING:
    import pandas as pd

    from runner.insight.plots import Axes


class Reading:
    """The rows of the study called `name` in the folder `out`, at the points of a grid."""

    name: str
    out: Path
    store: Store
    points: Grid
    places: list[Place]
    tasks: list[Task]

    def rows(self) -> list[dict[str, Any]]:
        """The finished rows, in the order of the grid: axes, figures, and what the study says of the trial.

        These are its `status` ("ok", "failed" or "killed"), its `seconds` (of all its rows, with axes together), its
        `attempts`, `error` and `traceback`, and the `key` that its files are named by.
        """
        finished = self.store.finished()
        rows = {task.key: self._rows_of(task) for task in self.tasks if task.key in finished}
        return [rows[task.key][i] for task, i in self.places if task.key in rows]

    def _rows_of(self, task: Task) -> list[dict[str, Any]]:
        """The rows of a finished trial."""
        record = self.store.read(task.key, task.point)
        return [{**point, **row, "status": record["status"], "seconds": record["seconds"],
                 "attempts": record["attempts"], "error": record["error"], "traceback": record["traceback"],
                 "key": task.key} for point, row in zip(task.points, record["rows"], strict=True)]

    def frame(self) -> "pd.DataFrame":
        """`rows()` as a DataFrame, a row for each finished point; failed and killed ones have no figures."""
        import pandas as pd
        rows = self.rows()
        last = ("status", "seconds", "attempts", "error", "traceback", "key")
        figures = dict.fromkeys(name for row in rows for name in row if name not in last)
        table: pd.DataFrame = pd.DataFrame(rows, columns=[*dict.fromkeys([*self.points.axes, *figures]), *last])
        return table

    def missing(self) -> int:
        """How many points of the grid have no row yet."""
        finished = self.store.finished()
        return sum(task.key not in finished for task, _ in self.places)

    def summary(self, by: Names, value: str, *, over: Names | None = None, where: Mapping[str, Any] | None = None,
                failed_as: float | None = None, collapsed: float | None = None,
                interval: str | None = None) -> "pd.DataFrame":
        """A line for each combination of the axes `by`: n, failures, mean with a 95 % interval, spread and median.

        Args:
            value: the figure.
            over: the axes that a cell's runs may differ in; "seed" if there is such an axis. More axes pool their
                settings on purpose.
            where: only runs of these values: `where={"lr": 0.4}`, or a list of values.
            failed_as: what a run counts as that has no finite value, for it failed, was killed or diverged: for an
                accuracy chance. They stand in the column `failed` too, and are never left out.
            collapsed: count the runs at or below this figure, in a column of that name.
            interval: "bootstrap" or "t"; None takes "t" for fewer than 20 runs. The table says which.
                A setting that dies in one run of 30 looks safe in 20: the interval is of the runs that were seen.

        Raises:
            InputError: a cell would mix settings, or has failed runs and there is no `failed_as`.
        """
        rows = self._chosen(where)
        return self._table(statistics.summary(rows, self.points.axes, by, value, over=over, failed_as=failed_as,
                                              collapsed=collapsed, kind=interval))

    def compare(self, value: str, *, pair: Names, by: Names = (), where: Mapping[str, Any] | None = None,
                failed_as: float | None = None, interval: str | None = None, **axis: Sequence[Any]) -> "pd.DataFrame":
        """Two settings, or each two of several, by the differences of the runs with the same `pair`.

            study.compare("valid_accuracy", norm=("RunningBatchNorm", "GroupNorm"), pair="seed", by="batch_size")

        A line has the number of pairs, both means, the `difference` a - b with a 95 % interval, its `spread` over the
        pairs (for `needed`), the `effect` (Cohen's d for pairs: difference / spread), in how many pairs a is above,
        and p by a paired t-test or, beside a bootstrap, by random signs; `p_holm` is corrected for the number of lines.

        Args:
            pair: the axes that two runs share, as a rule "seed". Runs without a partner are counted as `unpaired`.
            by: compare within each combination of these axes.
            axis: the axis compared, by its name, and two or more of its values.
            where, failed_as, interval: as in `summary`.

        Raises:
            InputError: no axis or several, fewer than two values, or settings that would be mixed.
        """
        if len(axis) != 1:
            raise InputError(f"compare() got {', '.join(axis) or 'no axis'}; name one axis and the values to compare, "
                             'as in norm=("RunningBatchNorm", "GroupNorm")')
        (name, levels), = axis.items()
        cells.names_of(name, self.points.axes, "axis")
        if isinstance(levels, str): raise InputError(f"{name}={levels!r}; give two or more values of it to compare")
        rows = self._chosen(where)
        return self._table(statistics.compare(rows, self.points.axes, value, name, levels, pair, by=by,
                                              failed_as=failed_as, kind=interval))

    def plot(self, x: str, y: str, hue: str | None = None, *, ax: "Axes | None" = None, over: Names | None = None,
             where: Mapping[str, Any] | None = None, failed_as: float | None = None, collapsed: float | None = None,
             interval: str | None = None) -> "Axes":
        """The figure `y` for each value of the axis `x`: a dot per run, the mean and its interval; returns the axes.

        `hue` is an axis with a colour for each value; the legend has n and how many failed. The others are as in
        `summary`, and so are the errors.
        """
        by, rows = [x] if hue is None else [x, hue], self._chosen(where)
        lines = statistics.summary(rows, self.points.axes, by, y, over=over, failed_as=failed_as, collapsed=collapsed,
                                   kind=interval)
        figures = cells.figures(rows, y, failed_as, self.points.axes)
        return pictures.draw(lines, rows, figures, x, y, hue, ax)

    def _chosen(self, where: Mapping[str, Any] | None) -> list[Row]:
        rows = cells.where(self.rows(), self.points.axes, where or {})
        if rows: return rows
        raise InputError(f"{self.name} has no finished runs{' of these settings' if where else ''} to show; call run() "
                         "first")

    def _table(self, lines: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
        """`lines` as a table; of an unfinished study it says in `attrs` how many points have no row yet."""
        import pandas as pd
        table: pd.DataFrame = pd.DataFrame(lines)
        table.attrs["missing"] = self.missing()
        return table
