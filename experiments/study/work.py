"""One trial in the process that runs it: what it may print, its random numbers and threads, and the file it ends in."""

import contextlib
import os
import pickle
import random
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.errors import InputError
from experiments.study.points import OWN, Point, Trial, cell, plain
from experiments.study.store import Record, Store

ATTEMPTS = 3        # how often a trial is begun whose process is killed


@dataclass(frozen=True)
class Task:
    """A trial to run: its key, its points, and what it is handed, which with axes together is a list of values."""

    key: str
    points: tuple[Point, ...]
    point: Point
    together: bool


@dataclass(frozen=True)
class Call:
    """What a worker process gets: run the trial of a task."""

    pickled: bytes
    store: Store

    def __call__(self, task: Task) -> tuple[str, str]:
        """Run it and return its key and its status."""
        try: trial = pickle.loads(self.pickled)
        except Exception as e:
            raise InputError(f"a worker process can't load the trial ({type(e).__name__}: {e}); its module and what it "
                             "uses must be importable there, so install them or set PYTHONPATH") from e
        torch.set_num_threads(1)        # workers are as many as cores
        if self.store.has(task.key):        # a cluster asks again where the worker was lost with its answer
            return task.key, str(self.store.read(task.key, task.point)["status"])
        return task.key, run_trial(trial, self.store, task, apart=True)


def run_trial(trial: Trial, store: Store, task: Task, *, apart: bool) -> str:
    """Run the trial of `task`, write its file, and return its status; `apart`: this process does nothing else."""
    attempt = store.begin(task.key)
    if attempt > ATTEMPTS: return keep_killed(store, task)
    start, status, error, trace = time.perf_counter(), "ok", None, None
    rows: list[dict[str, Any]] = [{} for _ in task.points]
    with _printing(store.log(task.key), apart, attempt), _own_state(task.key, restore=not apart):
        try: rows = _rows(trial(**task.point), task)
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt) and not apart: raise
            status, error = "failed", f"{type(e).__name__}: {e}"
            e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next       # begin in the trial
            trace = "".join(traceback.format_exception(e))
    store.keep(task.key, record(store, task, status, rows, time.perf_counter() - start, attempt, error, trace))
    return status


def keep_killed(store: Store, task: Task, how: str = "") -> str:
    """Write the file of a trial whose process was killed in each of its attempts."""
    error = f"its process was killed in each of {ATTEMPTS} attempts{how}"
    store.keep(task.key, record(store, task, "killed", [{} for _ in task.points], None, ATTEMPTS, error, None))
    return "killed"


def record(store: Store, task: Task, status: str, rows: list[dict[str, Any]], seconds: float | None, attempts: int,
           error: str | None, trace: str | None) -> Record:
    """What a trial's file holds."""
    return {"point": task.point, "function": store.identity.function, "version": store.identity.version,
            "status": status, "rows": rows, "seconds": seconds and round(seconds, 3), "attempts": attempts,
            "error": error, "traceback": trace}


def _rows(returned: Any, task: Task) -> list[dict[str, Any]]:
    """What the trial returned, a row for each of its points, as JSON holds it."""
    if not task.together: returned = [returned]
    n = len(task.points)
    if not isinstance(returned, (list, tuple)) or len(returned) != n:
        got = f"{len(returned)} rows" if isinstance(returned, (list, tuple)) else type(returned).__qualname__
        raise InputError(f"the trial returned {got}; with axes together it must return a list of {n} rows, one for "
                         "each combination of their values, in the order it gets them")
    return [_row(row, point) for row, point in zip(returned, task.points, strict=True)]


def _row(row: Any, point: Point) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise InputError(f"the trial returned {type(row).__qualname__} for a row; it must return a dict of figures, as "
                         "in {'valid_accuracy': 0.97}")
    for name in row:
        if not isinstance(name, str): raise InputError(f"the trial returned a figure named {name!r}; name it by a str")
        if name in OWN: raise InputError(f"the trial returned a figure named {name!r}, a column of every study; rename "
                                         "it")
    found = {name: plain(value, f"the figure {name!r}") for name, value in row.items()}
    for name in found.keys() & point.keys():
        if cell(found[name]) != cell(point[name]):
            raise InputError(f"the trial returned {name!r}={found[name]!r}, which is an axis and was {point[name]!r}; "
                             "rename the figure, or return rows in the order of the lists that the trial gets")
    return {name: value for name, value in found.items() if name not in point}


@contextlib.contextmanager
def _printing(file: Path, apart: bool, attempt: int) -> Iterator[None]:
    """What is printed goes to `file`, by C code too where the process is the trial's; an empty file is removed."""
    with file.open("w" if attempt == 1 else "a", encoding="utf-8", errors="backslashreplace", buffering=1) as out:
        if attempt > 1: print(f"--- attempt {attempt}", file=out)
        kept: list[tuple[int, int]] = []
        try:
            if apart:
                for stream in (sys.stdout, sys.stderr): stream and stream.flush()
                for fd in (1, 2):
                    kept.append((fd, os.dup(fd)))
                    os.dup2(out.fileno(), fd)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out): yield
        finally:
            for fd, old in kept:
                os.dup2(old, fd)
                os.close(old)
    if not file.stat().st_size: file.unlink()


@contextlib.contextmanager
def _own_state(key: str, restore: bool) -> Iterator[None]:
    """One thread, and random numbers that begin at the trial's key, whatever ran in this process before it."""
    import numpy as np
    seed = int(key[:8], 16)
    before = torch.get_num_threads(), torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try: yield
    finally:
        if restore:
            torch.set_num_threads(before[0])
            torch.set_rng_state(before[1])
            random.setstate(before[2])
            np.random.set_state(before[3])
