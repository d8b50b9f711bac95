"""One trial in the process that runs it, what it prints and the file it ends in; and who says that it has ended."""

import contextlib
import copyreg
import functools
import importlib
import json
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from experiments.errors import InputError
from experiments.memory import keep_memory
from experiments.study.points import OWN, Point, Trial, cell, function_name, plain
from experiments.study.state import left_behind, own_state
from experiments.study.store import Record, Store

Done = Callable[[str], None]        # told the status of each trial that has ended

ATTEMPTS = 3        # how often a trial is begun whose process is killed


@dataclass(frozen=True)
class Task:
    """A trial to run: its key, its points, and what it is handed, which with axes together is a list of values."""

    key: str
    points: tuple[Point, ...]
    point: Point
    together: bool


@dataclass(frozen=True)
class Work:
    """What worker processes do, in a file of the study's folder, for that need not be small.

    (A pool whose worker is killed while it is sent something large waits for ever; a cluster warns.)
    """

    file: Path

    def __call__(self, key: str) -> bool:
        """In a worker: run the trial `key`, and say whether the next may run in the same process.

        Raises:
            InputError: the worker doesn't see the folder, or can't load the trial.
        """
        threads = threading.enumerate()
        try: store, tasks, trial = _read(self.file, self.file.stat().st_mtime_ns)
        except OSError as e:
            raise InputError(f"a worker process can't read {str(self.file)!r} ({e.strerror or e}); workers on other "
                             "machines need the study's folder under the same path, so name one that they share by "
                             "out=") from e
        try: function = pickle.loads(trial)
        except Exception as e:
            raise InputError(f"a worker process can't load the trial ({type(e).__name__}: {e}); its module and what it "
                             "uses must be importable there, so install them or set PYTHONPATH") from e
        torch.set_num_threads(1)        # workers are as many as cores
        keep_memory()
        if not store.has(key): run_trial(function, store, tasks[key], apart=True)     # a cluster may ask again
        return not left_behind(threads)


@functools.lru_cache(maxsize=1)
def _read(file: Path, mtime: int) -> tuple[Store, Mapping[str, Task], bytes]:
    content: tuple[Store, Mapping[str, Task], bytes] = pickle.loads(file.read_bytes())
    return content


@contextlib.contextmanager
def to_do(trial: Trial, store: Store, tasks: Sequence[Task]) -> Iterator[Work]:
    """What worker processes do with `tasks`, while the block runs.

    Raises:
        InputError: the trial can't be pickled, or the folder can't be written.
    """
    work = Work(store.running / f"work.{os.getpid()}.part")     # a later run removes it, should this one be killed
    content = pickle.dumps((store, {task.key: task for task in tasks}, pickled(trial)))
    try: work.file.write_bytes(content)
    except OSError as e:
        raise InputError(f"{str(work.file)!r} can't be written: {e.strerror or e}; make room for it or make its folder "
                         "writable, and run() goes on") from e
    try: yield work
    finally: work.file.unlink(missing_ok=True)


def pickled(trial: Trial) -> bytes:
    """`trial` for other processes; a function of a script or a notebook goes with its code."""
    from joblib.externals.loky.cloudpickle_wrapper import dumps  # the cloudpickle of this joblib, within it or not
    # Torch has modules of classes of its own, as torch.backends.cudnn, which nothing else knows how to pickle.
    for kind in {type(m) for name, m in list(sys.modules.items()) if name.startswith("torch.")} - {ModuleType}:
        if issubclass(kind, ModuleType): copyreg.pickle(kind, _by_name)
    try: return bytes(dumps(trial))
    except Exception as e:
        raise InputError(f"the trial {function_name(trial)} can't be pickled for the worker processes "
                         f"({type(e).__name__}: {e}); let it make what can't be pickled itself, or give "
                         "backend='sequential'") from e


def _by_name(module: ModuleType) -> tuple[Callable[[str], ModuleType], tuple[str]]:
    return importlib.import_module, (module.__name__,)


def run_trial(trial: Trial, store: Store, task: Task, *, apart: bool) -> str:
    """Run the trial of `task`, write its file, and return its status; `apart`: this process does nothing else."""
    attempt = store.begin(task.key)
    if attempt > ATTEMPTS: return keep_killed(store, task)
    start, raised = time.perf_counter(), None
    rows: list[dict[str, Any]] = [{} for _ in task.points]
    with _printing(store.log(task.key), apart, attempt), own_state(task.key, here=not apart):
        try: rows = _rows(trial(**task.point), task)
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt) and not apart: raise
            raised = e
    seconds = time.perf_counter() - start
    error, trace = (None, None) if raised is None else _texts(raised)
    status = "ok" if raised is None else "failed"
    store.keep(task.key, record(store, task, status, rows, seconds, attempt, error, trace))
    return status


def settled(store: Store, task: Task, how: str = "") -> str | None:
    """The status of a trial whose process is gone: its file's, or killed after the last attempt; None: run it again.

    The folder is the truth: an answer may be lost with the process that had it.
    """
    if store.has(task.key): return str(store.read(task.key, task.point)["status"])
    return keep_killed(store, task, how) if store.attempts(task.key) >= ATTEMPTS else None


def keep_killed(store: Store, task: Task, how: str = "") -> str:
    """Write the file of a trial whose process was killed in each of its attempts."""
    error = f"its process was killed in each of {ATTEMPTS} attempts{how}"
    store.keep(task.key, record(store, task, "killed", [{} for _ in task.points], None, ATTEMPTS, error, None))
    return "killed"


def record(store: Store, task: Task, status: str, rows: list[dict[str, Any]], seconds: float | None, attempts: int,
           error: str | None, trace: str | None) -> Record:
    """What a trial's file holds."""
    return {"point": task.point, "function": store.identity.function, "version": store.identity.version,
            "points": list(task.points) if task.together else None,
            "status": status, "rows": rows, "seconds": seconds and round(seconds, 3), "attempts": attempts,
            "error": error, "traceback": trace}


def _texts(e: BaseException) -> tuple[str, str]:
    """The exception in a line, and its traceback from the trial on; also of one that can't be printed."""
    e.__traceback__ = e.__traceback__ and e.__traceback__.tb_next
    try: text = str(e)
    except BaseException as why: text = f"(its text is unavailable: {type(why).__name__})"
    try: trace = "".join(traceback.format_exception(e))
    except BaseException as why: trace = f"(its traceback is unavailable: {type(why).__name__})"
    return f"{type(e).__name__}: {text}", trace


def _rows(returned: Any, task: Task) -> list[dict[str, Any]]:
    """What the trial returned, a row for each of its points, as JSON holds it."""
    if not task.together: returned = [returned]
    n = len(task.points)
    if not isinstance(returned, (list, tuple)) or len(returned) != n:
        got = f"{len(returned)} rows" if isinstance(returned, (list, tuple)) else type(returned).__qualname__
        raise InputError(f"the trial returned {got}; with axes together it must return a list of {n} rows, one for "
                         "each combination of their values, in the order it gets them")
    rows = [_row(row, point) for row, point in zip(returned, task.points, strict=True)]
    json.dumps(rows)        # an integer may have too many digits: that is the trial's failure, not the study's
    return rows


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
    """What is printed goes to `file`, by C code too where the process is the trial's; an empty file is removed.

    The trial may close what it prints to, or delete the file.
    """
    out = file.open("w" if attempt == 1 else "a", encoding="utf-8", errors="backslashreplace", buffering=1)
    if attempt > 1: print(f"--- attempt {attempt}", file=out)
    kept: list[tuple[int, int]] = []
    try:
        if apart:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception): stream and stream.flush()
            for fd in (1, 2):
                with contextlib.suppress(OSError): kept.append((fd, os.dup(fd)))
                os.dup2(out.fileno(), fd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out): yield
    finally:
        for fd, old in kept:
            with contextlib.suppress(OSError):
                os.dup2(old, fd)
                os.close(old)
        with contextlib.suppress(OSError): out.close()
    with contextlib.suppress(FileNotFoundError):
        if not file.stat().st_size: file.unlink()
