"""A study: a trial function, the points it is run at, a folder of what came out, and what that says."""

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.errors import InputError, pick
from experiments.results import versions
from experiments.study import executors
from experiments.study.display import Display
from experiments.study.places import found, places, tasks_of
from experiments.study.points import Grid, Trial, check_takes, function_name, shown
from experiments.study.reading import Reading
from experiments.study.store import Identity, Record, Store
from experiments.study.work import Task
from runner.console import say


class Study(Reading):
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
        self.store = Store(out, Identity(name, function_name(trial), str(version)))
        self.places = places(self.store, points)
        self.tasks = tasks_of(self.places)
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
        self.name, self.trial, self.out, self.go_on = identity.name, _no_trial, Path(out), ""
        self.store = Store(out, identity)
        self.points, self.places = found(self.store, axes)
        self.tasks = tasks_of(self.places)
        return self

    def run(self, jobs: int | None = None, *, backend: str = "loky", scheduler: Any = None, again: bool = False,
            progress: bool = True, each: Callable[[list[dict[str, Any]]], str | None] | None = None) -> "Study":
        """Run the trials that have no file yet, those of most points first, and return the study.

        A trial that raises becomes a row with its traceback. One whose process is killed is run again, at most twice,
        and then becomes a row "killed"; with "sequential" it takes this process along. Ctrl-C ends the workers, keeps
        what is finished and says how to go on.

        Args:
            jobs: how many at once; None is the number of cores, on a cluster its workers.
            backend: "loky" for worker processes of this machine, "sequential" for this process, "dask" or "ray", or
                "torchrun" for the processes that it has started (`experiments.study.torchrun`).
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
                    elif backend == "torchrun": executors.run_torchrun(tasks, self.trial, self.store, done)
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

    def _records(self) -> list[tuple[Task, Record]]:
        finished = self.store.finished()
        return [(task, self.store.read(task.key, task.point)) for task in self.tasks if task.key in finished]

    def __repr__(self) -> str:
        n = len(self.places)
        return f"<Study {self.name!r}: {n - self.missing()} of {n} rows in {str(self.out)!r}>"


def _no_trial(**point: Any) -> Any: raise NotImplementedError
