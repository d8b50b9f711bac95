"""Trials on the workers of a ray cluster."""

import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from experiments.errors import InputError
from experiments.study.cluster import ANSWER, GONE, Queue, answer, missing, not_loaded
from experiments.study.points import Trial
from experiments.study.stop import Stop
from experiments.study.store import Store
from experiments.study.work import Done, Task, Work, to_do


def run_ray(tasks: Sequence[Task], trial: Trial, store: Store, done: Done, jobs: int | None, scheduler: Any) -> None:
    """On the workers of a ray cluster, a core for each trial; `scheduler` None is a cluster of this machine.

    Not by joblib: under its backend for ray a killed worker ends the whole call (ActorDiedError).
    """
    try:
        import ray
    except ImportError as e: raise missing("ray", "ray", "ray") from e
    if not tasks: return
    ours = not ray.is_initialized()
    if ours: _connect(ray, scheduler)
    with to_do(trial, store, tasks) as work, Stop() as stop:
        cluster = _Cluster(ray, work, Queue(tasks, store, done), jobs)
        try:
            while cluster.queue.left:
                stop.check()
                cluster.submit()
                cluster.collect()
        except BaseException:
            with suppress(Exception): answer(lambda: cluster.leave(ours), 1.5)
            raise
        cluster.leave(ours)


class _Cluster:
    """The trials that the cluster has."""

    def __init__(self, ray: Any, work: Work, queue: Queue, jobs: int | None) -> None:
        self.ray, self.work, self.queue, self.jobs = ray, work, queue, jobs
        self.runs: dict[Any, tuple[Task, int]] = {}
        self.had_cores = time.monotonic()
        self.run = ray.remote(num_cpus=1, max_retries=0)(_run)

    def submit(self) -> None:
        """Hand out as many trials as the cluster has cores, or as `jobs` says.

        Raises:
            InputError: it has had none for a minute.
        """
        cores, now = int(self.ray.cluster_resources().get("CPU", 0)), time.monotonic()
        if cores: self.had_cores = now
        elif now - self.had_cores > GONE:
            raise InputError(f"the ray cluster has had no cores for {GONE:.0f} s; start nodes by `ray start "
                             "--address HOST:PORT`, and run() goes on with what is missing")
        while self.queue.waiting and len(self.runs) < (self.jobs or cores):
            task, before = self.queue.take()
            self.runs[self.run.remote(self.work, task.key)] = task, before

    def collect(self) -> None:
        """Wait a moment for trials to end, and take those that have."""
        if not self.runs: return time.sleep(0.2)
        for ref in self.ray.wait(list(self.runs), num_returns=1, timeout=0.2)[0]:
            task, before = self.runs.pop(ref)
            how = "its worker has not written its file"
            try: self.ray.get(ref)
            except self.ray.exceptions.RayTaskError as e:
                if isinstance(e.cause, InputError): raise e.cause from None
                if isinstance(e.cause, (ImportError, AttributeError)): raise not_loaded(e.cause, "of ray") from e
                raise
            except self.ray.exceptions.RayError as e: how = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            if not self.queue.ended(task): self.queue.lost(task, before, how)

    def leave(self, ours: bool) -> None:
        """End the trials that run, and the connection if it is `ours`."""
        for ref in self.runs: self.ray.cancel(ref, force=True)
        if ours: self.ray.shutdown()


def _run(work: Work, key: str) -> bool: return work(key)


def _connect(ray: Any, address: Any) -> None:
    """Connect to the cluster at `address`, or start one here.

    Raises:
        InputError: nobody answers there within some seconds.
    """
    handler = signal.getsignal(signal.SIGTERM)

    def connect() -> Any:
        if place := _place(address): socket.create_connection(place, timeout=ANSWER).close()    # ray waits for minutes
        return ray.init(address=address, log_to_driver=False)
    try:
        if address is None: ray.init(log_to_driver=False, include_dashboard=False)
        else: answer(connect, ANSWER)
    except Exception as e:
        raise InputError(f"no ray cluster answers at {address!r} ({type(e).__name__}: {e}); start one by `ray start "
                         "--head`, or give its address by scheduler=") from e
    finally:        # ray's own exits, without a word of the study's
        if threading.current_thread() is threading.main_thread(): signal.signal(signal.SIGTERM, handler)


def _place(address: Any) -> tuple[str, int] | None:
    """Host and port of an address such as 'HOST:6379' or 'ray://HOST:10001'; None of one that is no place."""
    if address in ("auto", "local"): return None
    parts = urlsplit(address if "://" in str(address) else f"//{address}")
    if not parts.hostname or not parts.port: raise ValueError("an address is HOST:PORT or ray://HOST:PORT")
    return parts.hostname, parts.port
