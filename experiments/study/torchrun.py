"""Trials on the processes that `torchrun` has started: each takes the next one that nobody has begun.

    torchrun --nproc-per-node 2 -m experiments small-batch

Rank 0 runs the command; the others wait for its studies, and take part in each. The table is that of any other backend:
a trial's row doesn't depend on who runs it. The processes meet in torchrun's key-value store and need no group.
"""

import itertools
import os
import pickle
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from experiments.errors import InputError
from experiments.study.cluster import Queue
from experiments.study.points import Trial
from experiments.study.stop import Stop
from experiments.study.store import Store
from experiments.study.work import Done, Task, Work, run_trial, to_do

LOOK = 0.1      # seconds between two looks at what others have done


def processes() -> int:
    """How many processes `torchrun` has started, 1 without it."""
    told = os.environ.get("WORLD_SIZE", "") if "TORCHELASTIC_RUN_ID" in os.environ else ""
    return int(told) if told.isdecimal() else 1


def is_helper() -> bool:
    """Whether this process is one of several, and not the one that runs the command."""
    return processes() > 1 and os.environ.get("RANK") != "0"


class Meeting:
    """Where the processes of a command meet: the studies of rank 0, one after the other, and who has taken what."""

    _studies = 0        # that rank 0 has begun

    def __init__(self) -> None:
        from runner.processes import shared_store
        self.store: Any = shared_store(f"experiments/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}")

    def begin(self, work: Work, keys: Sequence[str]) -> int:
        """Let the others know of a study; its number."""
        n, Meeting._studies = Meeting._studies, Meeting._studies + 1
        self.store.set(f"study/{n}", pickle.dumps((work, list(keys))))
        return n

    def take(self, n: int) -> int:
        """The number of the next trial of study `n`, which is the caller's; there may be no more such trial."""
        return int(self.store.add(f"taken/{n}", 1)) - 1

    def wait(self, n: int) -> tuple[Work, list[str]] | None:
        """Study `n`, once it has begun; None if the command has ended."""
        while True:
            if self.store.check([f"study/{n}"]): return pickle.loads(self.store.get(f"study/{n}"))  # type: ignore[no-any-return]
            if self.store.check(["end"]): return None
            time.sleep(LOOK)

    def end(self) -> None:
        """The command has ended."""
        self.store.set("end", "")


def run_torchrun(tasks: Sequence[Task], trial: Trial, store: Store, done: Done) -> None:
    """On all processes, this one included.

    Raises:
        InputError: `torchrun` has not started this process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise InputError("backend='torchrun' needs processes that torchrun has started; run `torchrun --nproc-per-node "
                         "2 -m experiments ...`, or give backend='loky'")
    if not tasks: return
    meeting, queue = Meeting(), Queue(tasks, store, done)
    with to_do(trial, store, tasks) as work, Stop() as stop:
        n, pending = meeting.begin(work, [task.key for task in tasks]), list(tasks)
        while queue.left:
            stop.check()
            if (k := meeting.take(n)) < len(tasks): run_trial(trial, store, tasks[k], apart=False)
            else: time.sleep(LOOK)
            pending = [task for task in pending if not queue.ended(task)]


def help_out() -> int:
    """What the other processes do, until rank 0's command has ended; the exit status."""
    meeting = Meeting()
    for n in itertools.count():
        try: study = meeting.wait(n)
        except RuntimeError: return 0           # rank 0 has kept the store, and is gone
        if study is None: return 0
        work, keys = study
        while (k := meeting.take(n)) < len(keys): work(keys[k])
    return 0


def ended() -> None:
    """Let the others go, if there are any."""
    if processes() > 1 and not is_helper():
        with suppress(Exception): Meeting().end()
