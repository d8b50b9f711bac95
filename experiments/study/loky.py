"""Trials in worker processes of this machine, by joblib's loky."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from experiments.errors import InputError
from experiments.study.points import Trial
from experiments.study.stop import Stop, held_back, let_in
from experiments.study.store import Store
from experiments.study.work import ATTEMPTS, Done, Task, Work, settled, to_do

ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")}
PATIENCE = 5.0      # seconds that a worker has to end by itself when there is no more to do


def run_loky(tasks: Sequence[Task], trial: Trial, store: Store, done: Done, jobs: int) -> None:
    """In `jobs` worker processes of this machine, of one thread each.

    Each is the one worker of a pool of its own. In a pool of several a killed worker takes the others along, and which
    trial it ran nobody says. The last attempt at a trial is made when no other runs: the memory may suffice then.
    """
    if not tasks: return
    jobs = min(jobs, len(tasks))
    _room_for(jobs)
    _start_trackers()
    waiting, alone = deque(tasks), deque[Task]()
    with to_do(trial, store, tasks) as work, Stop() as stop:
        workers = [_Worker(work, store) for _ in range(jobs)]
        try:
            while True:
                for worker in workers:
                    stop.check()
                    if worker.task: continue
                    if waiting: worker.begin(waiting.popleft())
                    elif alone and not any(w.task for w in workers): worker.begin(alone.popleft())
                running = [worker.future for worker in workers if worker.task]
                if not running: break
                wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for worker in workers:
                    stop.check()
                    if not worker.task or not worker.future.done(): continue
                    task, how = worker.ended()
                    if status := settled(store, task, how): done(status)
                    elif store.attempts(task.key) == ATTEMPTS - 1: alone.append(task)
                    else: waiting.appendleft(task)
            _end(workers, PATIENCE)
        finally:
            _end(workers, 0)


class _Worker:
    """One worker process at a time, and the trial that it runs."""

    def __init__(self, work: Work, store: Store) -> None:
        self.work, self.store = work, store
        self.pool: Any = None
        self.task: Task | None = None
        self.future: Any = None
        self.pids: set[int] = set()
        self.attempts = self.in_vain = 0

    def begin(self, task: Task) -> None:
        """Run `task`, in another process if the last one is gone."""
        self.attempts = self.store.attempts(task.key)
        try: self._submit(task)
        except BrokenProcessPool:       # it was killed with nothing to do
            _end([self], 0)
            self._submit(task)

    def _submit(self, task: Task) -> None:
        from joblib.externals.loky import ProcessPoolExecutor
        self.pool = self.pool or ProcessPoolExecutor(1, env=ONE_THREAD, initializer=_begin_worker, initargs=(
            os.getpid(), multiprocessing.get_start_method(allow_none=True)))
        with held_back(): self.future = self.pool.submit(self.work, task.key)
        self.task = task
        self.pids.update(self.pool._processes)

    def ended(self) -> tuple[Task, str]:
        """The trial that has ended, and how its process did if it did."""
        task, self.task = self.task, None
        assert task is not None
        try:
            if not self.future.result(): _end([self], 0)
        except BrokenProcessPool as e:
            _end([self], 0)
            how = _exits(e)
            begun = self.store.has(task.key) or self.store.attempts(task.key) > self.attempts
            self.in_vain = 0 if begun else self.in_vain + 1
            if self.in_vain == ATTEMPTS:
                raise InputError(f"worker processes end before they begin a trial{how}; run one with "
                                 "backend='sequential' to see why") from e
            return task, how
        self.in_vain = 0
        return task, ""


def _end(workers: Sequence[_Worker], patience: float) -> None:
    """End their processes, and what those have started: killed, unless they end within `patience` seconds."""
    if not patience: _kill(workers)
    shutdowns = [threading.Thread(target=worker.pool.shutdown, kwargs={"kill_workers": not patience}, daemon=True)
                 for worker in workers if worker.pool]
    for thread in shutdowns: thread.start()
    for seconds in (patience, 1.0):     # after that they are killed, and there is no more
        until = time.monotonic() + seconds
        for thread in shutdowns: thread.join(max(0, until - time.monotonic()))
        _kill(workers)
    for worker in workers:
        worker.pool, worker.pids = None, set()


def _kill(workers: Sequence[_Worker]) -> None:
    if not hasattr(os, "killpg"): return        # Windows: loky does what can be done
    for worker in workers:
        there = set(getattr(worker.pool, "_processes", None) or ())
        for pid in worker.pids | there:     # with what its trial has started, which is of its group
            with suppress(OSError): os.killpg(pid, signal.SIGKILL)
        for pid in there:                   # one that only starts has no group yet
            with suppress(OSError): os.kill(pid, signal.SIGKILL)


def _begin_worker(parent: int, how_to_start: str | None) -> None:
    """Make this worker the head of a group of processes, which Ctrl-C in the terminal doesn't reach."""
    from joblib.externals.loky import process_executor
    process_executor._USE_PSUTIL = False        # else a worker that has grown may be replaced, with a warning
    multiprocessing.set_start_method(how_to_start, force=True)      # loky's own way starts no others from here
    if hasattr(os, "setsid"): os.setsid()
    let_in()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process and its own when the study's is gone, killed: the next run does its trial anew."""
    while os.getppid() == parent: time.sleep(0.5)
    if hasattr(os, "killpg"): os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _start_trackers() -> None:
    """Start what watches over shared memory now: with the first worker it would let Ctrl-C in to that."""
    from joblib.externals.loky.backend import resource_tracker as of_loky
    of_loky.ensure_running()
    if os.name == "posix":
        from multiprocessing import resource_tracker
        resource_tracker.ensure_running()


def _room_for(workers: int) -> None:
    """Let this process have more open files, of which each worker needs some ten."""
    try:
        import resource
    except ImportError: return          # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 256 + 16 * workers
    if hard != resource.RLIM_INFINITY: wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted: resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _exits(error: Exception) -> str:
    """The signals that ended the workers, from the message of loky."""
    lines = [line.strip() for line in str(error).splitlines() if "exit code" in line.lower()]
    return f" ({lines[-1].rstrip('.')})" if lines else ""
