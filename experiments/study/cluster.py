"""What studies on a cluster share: trials whose worker is lost are run again, and an end that waits for nobody."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from experiments.errors import InputError
from experiments.study.store import Store
from experiments.study.work import ATTEMPTS, Done, Task, settled

ANSWER = 7.0        # seconds that a cluster has to answer at first
GONE = 60.0         # and that it may have no workers, or not answer, later


class Queue:
    """The trials that wait for a worker, told how those end that have had one."""

    def __init__(self, tasks: Sequence[Task], store: Store, done: Done) -> None:
        self.waiting, self.store, self.done = deque(tasks), store, done
        self.left = len(tasks)
        self._in_vain = Counter[str]()

    def take(self) -> tuple[Task, int]:
        """The next trial, and how often it was begun."""
        task = self.waiting.popleft()
        return task, self.store.attempts(task.key)

    def ended(self, task: Task) -> bool:
        """Whether the trial has its file, which is told."""
        if not self.store.has(task.key): return False
        self._told(settled(self.store, task))
        return True

    def lost(self, task: Task, before: int, how: str) -> None:
        """Nobody runs the trial any more, which had been begun `before` times: again, or killed.

        Raises:
            InputError: it was lost too often without having been begun.
        """
        status = settled(self.store, task)
        if status is not None: return self._told(status)
        self._in_vain[task.key] = self._in_vain[task.key] + 1 if self.store.attempts(task.key) == before else 0
        if self._in_vain[task.key] == ATTEMPTS:
            raise InputError(f"{ATTEMPTS} workers were lost before they began one trial ({how}); look at what the "
                             "workers say, or run one with backend='sequential'")
        self.waiting.append(task)

    def _told(self, status: str | None) -> None:
        assert status is not None
        self.left -= 1
        self.done(status)


def missing(backend: str, package: str, install: str) -> InputError:
    """The error of a package that isn't installed."""
    return InputError(f"backend={backend!r} needs {package}, which isn't installed; run `pip install {install}`, or "
                      "give backend='loky'")


def not_loaded(e: Exception, worker: str) -> InputError:
    """The error of a worker that can't load what it is sent."""
    return InputError(f"the worker {worker} can't load what it is to run ({type(e).__name__}: {e}); install this "
                      "project and what the trial uses there, in the same versions as here, or set PYTHONPATH")


def answer(ask: Callable[[], Any], seconds: float) -> Any:
    """What `ask` returns, or raises; TimeoutError after `seconds`, for a cluster may be asked in vain for ever."""
    found: list[Any] = []
    problem: list[Exception] = []

    def asking() -> None:
        try: found.append(ask())
        except Exception as e: problem.append(e)
    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(seconds)
    if problem: raise problem[0]
    if not found: raise TimeoutError(f"no answer in {seconds:.0f} s")
    return found[0]
