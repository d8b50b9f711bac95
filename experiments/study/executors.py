"""Where trials run: in this process, in worker processes of this machine, or on a cluster by joblib's own backends."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from experiments.errors import InputError
from experiments.study.points import Trial, function_name
from experiments.study.store import Store
from experiments.study.work import ATTEMPTS, Call, Task, keep_killed, run_trial

Done = Callable[[str], None]        # told the status of each trial that has ended

BACKENDS = ("loky", "sequential", "dask", "ray")
ANSWER = 8      # seconds that a scheduler has
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")}


def pickled(trial: Trial) -> bytes:
    """`trial` for other processes; a function of a script or a notebook goes with its code."""
    from joblib.externals.loky.cloudpickle_wrapper import dumps  # the cloudpickle of this joblib, within it or not
    try: return bytes(dumps(trial))
    except Exception as e:
        raise InputError(f"the trial {function_name(trial)} can't be pickled for the worker processes "
                         f"({type(e).__name__}: {e}); let it make what can't be pickled itself, or give "
                         "backend='sequential'") from e


def run_here(tasks: Sequence[Task], trial: Trial, store: Store, done: Done) -> None:
    """One after the other in this process; a trial that kills it ends the study too, and isn't counted."""
    for task in tasks: done(run_trial(trial, store, task, apart=False))


def run_loky(tasks: Sequence[Task], trial: Trial, store: Store, done: Done, jobs: int) -> None:
    """In `jobs` worker processes of this machine, of one thread each.

    A killed worker takes the whole pool with it, and which trial it ran nobody says. So those that were running go on
    one at a time, where it is certain; who is killed there too, or by the third attempt, gets a row that says so.
    """
    from joblib.externals.loky import ProcessPoolExecutor
    call = Call(pickled(trial), store)
    waiting, alone, in_vain = list(tasks), list[Task](), 0
    while waiting or alone:
        batch, workers = (alone, 1) if alone else (waiting, min(jobs, len(waiting)))
        pool = ProcessPoolExecutor(workers, env=ONE_THREAD, initializer=_begin_worker,
                                   initargs=(os.getpid(), multiprocessing.get_start_method(allow_none=True)))
        told: set[str] = set()
        try:
            for future in as_completed([pool.submit(call, task) for task in batch]):
                key, status = future.result()
                told.add(key)
                done(status)
        except BrokenProcessPool as e:
            pool.shutdown(wait=True, kill_workers=True)         # nobody writes to the store from here on
            finished, suspects, how = store.finished(), store.begun(), _exits(e)
            in_vain = 0 if suspects or told else in_vain + 1
            if in_vain == ATTEMPTS:
                raise InputError(f"worker processes end before they begin a trial{how}; run one with "
                                 "backend='sequential' to see why") from e
            for task in batch:
                if task.key in told: continue
                if task.key in finished:
                    done(str(store.read(task.key, task.point)["status"]))
                    told.add(task.key)
                elif store.attempts(task.key) >= ATTEMPTS:
                    done(keep_killed(store, task, how))
                    told.add(task.key)
            left = [task for task in batch if task.key not in told]
            if batch is alone: alone = left
            else:
                alone = [task for task in left if task.key in suspects]
                waiting = [task for task in left if task.key not in suspects]
            continue
        except BaseException:
            pool.shutdown(wait=True, kill_workers=True)
            raise
        pool.shutdown()
        if batch is alone: alone = []
        else: waiting = []


def run_dask(tasks: Sequence[Task], trial: Trial, store: Store, done: Done, scheduler: Any) -> None:
    """On the workers of a dask cluster, which runs the trial of a killed one again by itself.

    By its own client and not by joblib: there a trial that kills its workers may leave the call waiting for ever.
    """
    try:
        from dask.distributed import Client, KilledWorker
    except ImportError as e: raise _missing("dask", "dask.distributed", "distributed") from e
    if scheduler is None: raise InputError("backend='dask' needs scheduler=, the address of a cluster such as "
                                           "'tcp://HOST:8786', or a LocalCluster")
    try: client = Client(scheduler, timeout=ANSWER, set_as_default=False)
    except (OSError, ValueError) as e:
        raise InputError(f"no dask scheduler answers at {scheduler!r} ({type(e).__name__}: {e}); start one by `dask "
                         "scheduler`, or give its address by scheduler=") from e
    with client:
        if busy := [worker for worker, threads in client.nthreads().items() if threads > 1]:
            raise InputError(f"the dask worker {busy[0]} runs several trials in one process, where they share random "
                             "numbers and output; start workers by `dask worker --nthreads 1 --nworkers N`")
        call = Call(pickled(trial), store)
        by_key = {task.key: task for task in tasks}
        left = {key: client.submit(call, task, pure=False) for key, task in by_key.items()}
        while left:
            finished = store.finished()     # the store says it: an answer can be lost with the worker that has it
            for key in list(left):
                if key in finished: done(str(store.read(key, by_key[key].point)["status"]))
                elif isinstance(left[key].status == "error" and left[key].exception(), KilledWorker):
                    if store.attempts(key) < ATTEMPTS:      # it only stood beside the one that was killed
                        left[key] = client.submit(call, by_key[key], pure=False)
                        continue
                    done(keep_killed(store, by_key[key]))
                elif left[key].status in ("error", "cancelled"): left[key].result()         # raises
                else: continue
                left.pop(key).release()
            time.sleep(0.1)


def run_ray(tasks: Sequence[Task], trial: Trial, store: Store, done: Done, jobs: int | None, scheduler: Any) -> None:
    """On a ray cluster, by joblib."""
    from joblib import Parallel, delayed, parallel_config
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as e: raise _missing("ray", "ray", "ray") from e
    try: ray.init(address=scheduler, ignore_reinit_error=True)
    except (ConnectionError, ValueError) as e:
        raise InputError(f"no ray cluster answers at {scheduler!r} ({type(e).__name__}: {e}); start one by `ray start "
                         "--head`, or give its address by scheduler=") from e
    register_ray()
    call = Call(pickled(trial), store)
    with parallel_config("ray", n_jobs=jobs or -1):
        for _, status in Parallel(return_as="generator_unordered", batch_size=1)(delayed(call)(t) for t in tasks):
            done(status)


def _missing(backend: str, package: str, install: str) -> InputError:
    return InputError(f"backend={backend!r} needs {package}, which isn't installed; run `pip install {install}`, or "
                      "give backend='loky'")


def _begin_worker(parent: int, how_to_start: str | None) -> None:
    """Ctrl-C is the study's, which ends its workers; a trial's own processes, as of a DataLoader, start as ever."""
    multiprocessing.set_start_method(how_to_start, force=True)      # loky's own way starts no others from here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when the study's is gone, killed: the next run does its trial anew, and only one may."""
    while os.getppid() == parent: time.sleep(0.5)
    os._exit(1)


def _exits(error: Exception) -> str:
    """The signals that ended the workers, from the message of loky."""
    lines = [line.strip() for line in str(error).splitlines() if "exit code" in line.lower()]
    return f" ({lines[-1].rstrip('.')})" if lines else ""
