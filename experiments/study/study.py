"""A study: a trial function, the points it is run at, a folder of what came out, and what that says."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import InputError, pick
from experiments.results import versions
from experiments.study import cells, executors, pictures, statistics
from experiments.study.cells import Names, Row
from experiments.study.display import Display
from experiments.study.points import Grid, Handed, Trial, cell, check_takes, function_name, shown
from experiments.study.store import Identity, Record, Store
from experiments.study.work import Task
from runner.console import say

if TYPE_CHECKING:
    import pandas as pd

    from runner.insight.plots import Axes


class Study:
    """Many runs of one function, kept in a folder and compared.

        def trial(norm, lr, seed):
            ...
            return {"valid_accuracy": accuracy, "valid_loss": loss}

        study = Study("mine", trial, grid(norm=["BatchNorm", "RunningBatchNorm"], lr=[0.1, 0.4], seed=range(20)),
                      out="runs/mine")
        study.run(jobs=2)       # again: goes on with what is missing
        study.summary(by=["norm", "lr"], value="valid_accuracy", failed_as=0.1)
        study.compare("valid_accuracy", norm=("RunningBatchNorm", "BatchNorm"), pair="seed", by="lr", failed_as=0.1)
        study.plot(x="lr", y="valid_accuracy", hue="norm", failed_as=0.1)

    A trial begins with one torch thread and with random numbers of its own, so that its row is the same whatever ran
    before it or beside it. A finished trial is a file, found again by the values it was handed, the function's name and
    `version`; a changed function needs another version (and folder), for its code isn't looked at. With axes together
    and more values later, a trial is handed those that have no row yet.

    Args:
        name: of the study.
        trial: a function of the axes that returns a dict of figures, which JSON must hold; a list of them where the
            grid has axes `together`.
        points: a `grid`. A later study of the same folder may have a larger one, or another: only its points are seen.
        out: the folder, made by `run`.
        version: of the trial function.

    Raises:
        InputError: the trial doesn't take an axis, or needs more; the folder is of another study.
    """

    def __init__(self, name: str, trial: Trial, points: Grid, *, out: str | os.PathLike[str],
                 version: str | int = "1") -> None:
        if not isinstance(points, Grid):
            raise InputError(f"the points are {type(points).__qualname__}; give a grid, as in grid(seed=range(20))")
        check_takes(trial, points.axes)
        self.name, self.trial, self.points, self.out = name, trial, points, Path(out)
        self._together: list[tuple[str, Record]] | None = None
        self.store = Store(out, Identity(name, function_name(trial), str(version)))
        # Of each point in turn its trial, and which of the trial's rows.
        self.places: list[tuple[Task, int]] = []
        for given in points.handed(): self.places += self._placed(given)
        self.tasks = list({task.key: task for task, _ in self.places}.values())
        self.go_on = "the same study's run() goes on"

    @classmethod
    def open(cls, out: str | os.PathLike[str]) -> "Study":
        """The study in the folder `out`, with the rows that are there, to look at: without its function it can't run.

        That of an experiment is the folder `study` in its run folder.

        Raises:
            InputError: there is none, or a file of it can't be read.
        """
        self, file = cls.__new__(cls), Path(out) / "study.json"
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            identity = Identity(*(facts[name] for name in Identity._fields))
            axes = {name: tuple(values) for name, values in facts["axes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"can't read {str(file)!r} ({type(e).__name__}: {e}); name the folder of a study") from e
        self.name, self.trial, self.out, self._together = identity.name, _no_trial, Path(out), None
        self.store, self.go_on, self.points = Store(out, identity), "", Grid(axes)
        self.tasks, found = [], list[tuple[Task, int]]()
        for key in sorted(self.store.finished()):
            if (record := self.store.peek(key)) is None: continue
            points = record.get("points") or [record["point"]]
            if any(set(point) != set(axes) for point in points): continue
            self.tasks.append(Task(key, tuple(points), record["point"], bool(record.get("points"))))
            found += [(self.tasks[-1], i) for i in range(len(points))]
        # In the order of the axes' values; those of an earlier, larger grid after the others.
        places = {name: {cell(v): i for i, v in enumerate(values)} for name, values in axes.items()}
        self.places = sorted(found, key=lambda at: [
            (places[name].get(text := cell(at[0].points[at[1]][name]), len(places[name])), text) for name in axes])
        self.points = Grid({name: tuple({cell(v): v for v in (*values, *(task.points[i][name] for task, i in found))}
                                        .values()) for name, values in axes.items()})
        return self

    def run(self, jobs: int | None = None, *, backend: str = "loky", scheduler: Any = None, again: bool = False,
            progress: bool = True, each: Callable[[list[dict[str, Any]]], str | None] | None = None) -> "Study":
        """Run the trials that have no file yet, those of most points first, and return the study.

        A trial that raises becomes a row with its traceback. One whose process is killed is run again, at most twice,
        and then becomes a row "killed"; with "sequential" it takes this process along. Ctrl-C ends the workers, keeps
        what is finished and says how to go on.

        Args:
            jobs: how many at once; None is the number of cores, on a cluster its workers.
            backend: "loky" for worker processes of this machine, "sequential" for this process, or "dask" or "ray".
            scheduler: for "dask" the address of a scheduler, or a LocalCluster; for "ray" an address, or None for a
                cluster on this machine.
            again: run those again that have failed or were killed.
            progress: show how many are finished, running and failed, and the time left.
            each: called in this process after each trial with its rows, as `rows` has them; what it returns is printed.

        Raises:
            InputError: another run is going on in the folder, or it can't be written; the trial can't be pickled; a
                backend that isn't there, or whose scheduler doesn't answer.
        """
        backend = pick(backend, executors.BACKENDS, "backend")
        if self.trial is _no_trial:
            raise InputError(f"{self.name} was opened to be looked at; make the study with its function to run more")
        if jobs is not None and jobs < 1: raise InputError(f"jobs is {jobs}; give 1 or more, or None for all cores")
        if backend != "sequential": executors.pickled(self.trial)
        with self.store.locked(self._facts()):
            if again: self.store.forget([task.key for task, record in self._records() if record["status"] != "ok"])
            finished = self.store.finished()
            # What gives more rows takes longer and begins first, so that no core waits for it at the end.
            tasks = sorted((task for task in self.tasks if task.key not in finished), key=lambda t: -len(t.points))
            before = len(self.tasks) - len(tasks)
            try:
                with Display(self.name, len(self.tasks), before, lambda: len(self.store.begun()), progress) as display:
                    told = {task.key: task for task in tasks}

                    def done(status: str) -> None:
                        display.done(status)
                        if each is None: return
                        for key in [key for key in told if self.store.has(key)]:
                            text = each(self._rows_of(told.pop(key)))
                            if text: display.say(text)
                    if backend == "sequential": executors.run_here(tasks, self.trial, self.store, done)
                    elif backend == "loky":
                        executors.run_loky(tasks, self.trial, self.store, done, jobs or os.cpu_count() or 1)
                    elif backend == "dask":
                        executors.run_dask(tasks, self.trial, self.store, done, scheduler)
                    else: executors.run_ray(tasks, self.trial, self.store, done, jobs, scheduler)
            except KeyboardInterrupt:
                kept = len({task.key for task in self.tasks} & self.store.finished())
                say(f"{self.name}: stopped with {kept} of {len(self.tasks)} trials finished and kept in "
                    f"{self.out}; {self.go_on}")
                raise
        lost = [(task, record) for task, record in self._records() if record["status"] != "ok"]
        if lost and progress and each is None:
            (task, record), n = lost[0], len(lost)
            say(f"{self.name}: {n} trial{'s' * (n > 1)} failed, the first ({shown(task.point)}) by "
                f"{record['error']}; frame() has the tracebacks, and run(again=True) runs {'them' if n > 1 else 'it'} "
                "again")
        return self

    def _facts(self) -> dict[str, Any]:
        return {"axes": {name: list(values) for name, values in self.points.axes.items()},
                "together": list(self.points.together), "threads": 1, "versions": versions(),
                "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "argv": [Path(a).name for a in sys.argv[:1]]}

    def _placed(self, given: Handed) -> list[tuple[Task, int]]:
        """Where the rows of the points `given` are or will be.

        Of points together some may be finished, in trials of other lists of values: then only the others are run.
        """
        task = self._task(given)
        own = [(task, i) for i in range(len(task.points))]
        if not task.together or self.store.has(task.key): return own
        there = {cell(point): (Task(key, tuple(record["points"]), record["point"], True), i)
                 for key, record in self._finished_together() for i, point in enumerate(record["points"])}
        left = tuple(point for point in task.points if cell(point) not in there)
        if len(left) == len(task.points): return own
        if left:
            rest = self._task(Handed(left, {name: [p[name] for p in left] if name in given.together else value
                                            for name, value in given.arguments.items()}, given.together))
            there |= {cell(point): (rest, i) for i, point in enumerate(left)}
        return [there[cell(point)] for point in task.points]

    def _task(self, given: Handed) -> Task:
        return Task(self.store.key(given.arguments), given.points, given.arguments, bool(given.together))

    def _finished_together(self) -> list[tuple[str, Record]]:
        """The trials of several points that have ended well; read once."""
        if self._together is None:
            records = [(key, self.store.peek(key)) for key in sorted(self.store.finished())]
            self._together = [(key, record) for key, record in records
                              if record is not None and record.get("points") and record["status"] == "ok"]
        return self._together

    def _records(self) -> list[tuple[Task, Record]]:
        finished = self.store.finished()
        return [(task, self.store.read(task.key, task.point)) for task in self.tasks if task.key in finished]

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

    def __repr__(self) -> str:
        n = len(self.places)
        return f"<Study {self.name!r}: {n - self.missing()} of {n} rows in {str(self.out)!r}>"


def _no_trial(**point: Any) -> Any: raise NotImplementedError
