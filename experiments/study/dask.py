"""Trials on the workers of a dask cluster."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from experiments.errors import InputError
from experiments.study.cluster import ANSWER, GONE, Queue, answer, missing, not_loaded
from experiments.study.points import Trial
from experiments.study.stop import Stop
from experiments.study.store import Store
from experiments.study.work import Done, Task, Work, to_do

SETTLED = 1.0       # seconds that a worker is left alone after it has appeared, and its nanny may not know yet
BEGIN = 120.0       # and that it may have a trial, and no other, without beginning it
SHARED = 30.0       # and until its file is seen here


def run_dask(tasks: Sequence[Task], trial: Trial, store: Store, done: Done, scheduler: Any) -> None:
    """On the workers of a dask cluster, each of which has one trial at a time.

    Not by joblib, nor by a queue of dask's: there the study waited for ever, once in six runs whose trials kill their
    workers. A LocalCluster gives a worker up for good that isn't back 15 s after it was lost, as on a busy machine, and
    when all were given up the trials stayed in the queue. Here a LocalCluster is told to have as many again, a trial
    whose worker is gone is run by another, and a cluster without workers for a minute is an error.
    """
    try:
        from dask.distributed import Client
    except ImportError as e: raise missing("dask", "dask.distributed", "distributed") from e
    if scheduler is None: raise InputError("backend='dask' needs scheduler=, the address of a cluster such as "
                                           "'tcp://HOST:8786', or a LocalCluster")
    if not tasks: return
    try: client = answer(lambda: Client(scheduler, timeout=ANSWER, set_as_default=False), ANSWER)
    except Exception as e:
        raise InputError(f"no dask scheduler answers at {scheduler!r} ({type(e).__name__}: {e}); start one by `dask "
                         "scheduler`, or give its address by scheduler=") from e
    with to_do(trial, store, tasks) as work, Stop() as stop:
        cluster = _Cluster(client, scheduler, work, Queue(tasks, store, done))
        try:
            while cluster.queue.left:
                stop.check()
                cluster.look()
                cluster.collect()
                cluster.submit()
                time.sleep(0.05)
        finally:
            with suppress(Exception): answer(cluster.leave, 1.5)


@dataclass
class _Run:
    """A trial on a worker: what dask knows of it, how often it was begun before, since when the worker has it."""

    task: Task
    future: Any
    before: int
    since: float
    ended: float = 0        # when dask first said so


class _Cluster:
    """The workers of a cluster, and which trial each has."""

    def __init__(self, client: Any, scheduler: Any, work: Work, queue: Queue) -> None:
        self.client, self.scheduler, self.work, self.queue = client, scheduler, work, queue
        self.workers: dict[str, float] = {}         # when each was seen first
        self.runs: dict[str, _Run] = {}             # by the worker
        self.answered = self.had_workers = time.monotonic()
        self.looked = self.mended = 0.0

    def look(self) -> None:
        """Ask which workers there are, now and then.

        Raises:
            InputError: there are none, or nobody answers, for a minute; or one runs several trials at once.
        """
        now = time.monotonic()
        if now - self.looked < 0.5: return
        self.looked = now
        try: threads = self.client.sync(self.client.scheduler.ncores, callback_timeout=1)
        except Exception as e:
            if now - self.answered < GONE: return
            raise InputError(f"the dask scheduler has not answered for {GONE:.0f} s ({type(e).__name__}: {e}); start "
                             "the cluster again, and run() goes on with what is missing") from e
        self.answered = now
        if busy := [worker for worker, n in threads.items() if n > 1]:
            raise InputError(f"the dask worker {busy[0]} runs several trials in one process, where they share random "
                             "numbers and output; start workers by `dask worker --nthreads 1 --nworkers N`")
        self.workers = {worker: self.workers.get(worker, now) for worker in threads}
        self._mend(now)
        if self.workers: self.had_workers = now
        elif now - self.had_workers > GONE:
            raise InputError(f"the dask cluster has had no workers for {GONE:.0f} s; start some by `dask worker "
                             "--nthreads 1 --nworkers N`, and run() goes on with what is missing")

    def _mend(self, now: float) -> None:
        """Have a LocalCluster start those workers again that it has given up."""
        wanted, there = getattr(self.scheduler, "worker_spec", ()), getattr(self.scheduler, "workers", ())
        if len(there) >= len(wanted) or now - self.mended < 5: return
        self.mended = now
        self.scheduler.scale(len(wanted))

    def submit(self) -> None:
        """Give each worker that has nothing to do a trial."""
        now = time.monotonic()
        for worker, since in self.workers.items():
            if not self.queue.waiting: return
            if worker in self.runs or now - since < SETTLED: continue
            task, before = self.queue.take()
            future = self.client.submit(self.work, task.key, key=f"trial-{task.key}-{uuid4().hex}", pure=False,
                                        workers=[worker], allow_other_workers=False)
            self.runs[worker] = _Run(task, future, before, now)

    def collect(self) -> None:
        """Take the trials that have ended, or whose worker is lost, off their workers."""
        for worker, run in list(self.runs.items()):
            if self.queue.ended(run.task): how = None
            elif (how := self._lost(worker, run)) is None: continue
            else: self.queue.lost(run.task, run.before, how)
            self.runs.pop(worker).future.release()
            if how is not None: self.workers.pop(worker, None)      # it counts as new if it is seen again

    def _lost(self, worker: str, run: _Run) -> str | None:
        """Why nobody runs the trial any more; None if somebody may."""
        if worker not in self.workers: return f"the worker {worker} is gone"
        now, status = time.monotonic(), run.future.status
        if status in ("cancelled", "lost"): return f"the scheduler has lost the trial on {worker}"
        if status == "error":
            error = run.future.exception(timeout=1)
            if type(error).__name__ == "KilledWorker": return f"the worker {worker} was killed"
            if isinstance(error, (ImportError, AttributeError)): raise not_loaded(error, worker) from error
            raise error
        if status == "finished":
            run.ended = run.ended or now
            if now - run.ended < SHARED: return None
            raise InputError(f"the worker {worker} has finished a trial, but its file isn't in "
                             f"{str(self.queue.store.path)!r}; workers need that folder under the same path, so name "
                             "one that all machines share by out=")
        if now - run.since < BEGIN or self.queue.store.attempts(run.task.key) > run.before: return None
        run.since = now
        try: has = self.client.sync(self.client.scheduler.processing, workers=[worker], callback_timeout=1)
        except Exception: return None
        others = set(has.get(worker, ())) - {run.future.key}
        return None if others else f"the worker {worker} has not begun a trial in {BEGIN:.0f} s"

    def leave(self) -> None:
        """Leave the cluster; workers that have trials are started anew, where they have a nanny, to end those."""
        try:
            if self.runs: self.client.restart_workers(list(self.runs), timeout=1, raise_for_error=False)
        finally: self.client.close(timeout=1)
