"""Where trials run: in this process, in worker processes of this machine, or on a cluster."""

from collections.abc import Sequence

from experiments.study.dask import run_dask
from experiments.study.loky import run_loky
from experiments.study.points import Trial
from experiments.study.ray import run_ray
from experiments.study.store import Store
from experiments.study.torchrun import run_torchrun
from experiments.study.work import Done, Task, pickled, run_trial

__all__ = ["BACKENDS", "pickled", "run_dask", "run_here", "run_loky", "run_ray", "run_torchrun"]

BACKENDS = ("loky", "sequential", "dask", "ray", "torchrun")


def run_here(tasks: Sequence[Task], trial: Trial, store: Store, done: Done) -> None:
    """One after the other in this process; a trial that kills it ends the study too, and isn't counted."""
    for task in tasks: done(run_trial(trial, store, task, apart=False))
