"""The folder of a study: what it is of, a file for each finished trial, what each has printed, and a lock."""

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from experiments.errors import InputError
from experiments.study.points import Point, key, shown
from runner.files import replacing, writer_is_gone

Record = dict[str, Any]         # what a trial's file holds


class Identity(NamedTuple):
    """What makes a study that study: its name, the trial function's, and the version that the user gives."""

    name: str
    function: str
    version: str


class Store:
    """The folder of one study.

    `study.json` says what it is of. `trials/KEY.json` is a finished trial, written whole or not at all; `logs/KEY.txt`
    is what it has printed, if anything; `running/KEY.json` is there while it runs, and says which attempt it is and
    which process. Workers on other machines need the folder under the same path.

    Raises:
        InputError: the folder is of another study, or of none.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Identity) -> None:
        self.path, self.identity = Path(path).absolute(), identity
        self.trials, self.logs, self.running = (self.path / name for name in ("trials", "logs", "running"))
        self.check()

    def check(self) -> None:
        """Raises InputError if the folder holds anything but this study."""
        file = self.path / "study.json"
        if not file.exists():
            # A process that was killed in the first moments has left its lock, and what it was writing.
            others = [p.name for p in self.path.iterdir() if p.name != "lock" and p.suffix != ".part"] if (
                self.path.is_dir()) else []
            if others or (self.path.exists() and not self.path.is_dir()):
                raise InputError(f"{str(self.path)!r} is no folder of a study (it holds {', '.join(others[:3])}); name "
                                 "a new or an empty one by out=")
            return
        try: there = Identity(*(json.loads(file.read_text(encoding="utf-8"))[name] for name in Identity._fields))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"can't read {str(file)!r} ({type(e).__name__}: {e}); name another folder by out=") from e
        different = [f"its {field} is {was!r} and not {now!r}"
                     for field, was, now in zip(Identity._fields, there, self.identity, strict=True) if was != now]
        if different:
            raise InputError(f"the folder {str(self.path)!r} is of another study: {'; '.join(different)}. Name another "
                             "folder by out=, or use what it was begun with")

    @contextmanager
    def locked(self, facts: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder, keep others from running in it, and write `study.json` with `facts` beside the identity.

        Raises:
            InputError: another run is going on in it, or it can't be written.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+", encoding="utf-8")
        with lock:
            if not _lock(lock):
                lock.seek(0)
                raise InputError(f"the folder {str(self.path)!r} is in use: process {lock.read().strip() or 'unknown'} "
                                 "runs the study. Wait until it has ended, or name another folder by out=")
            self.check()        # again: it may have been begun since
            with self._writing():
                lock.truncate(0)
                lock.write(f"{os.getpid()} on {os.uname().nodename}" if hasattr(os, "uname") else f"{os.getpid()}")
                lock.flush()
                self._write(self.path / "study.json", {**self.identity._asdict(), **facts})     # before all else
                for folder in (self.trials, self.logs, self.running): folder.mkdir(exist_ok=True)
                self.clear_running()
            try: yield
            finally:
                with suppress(OSError):
                    self.clear_running()
                    lock.truncate(0)

    # --- trials ---------------------------------------------------------------------------------------------------

    def key(self, point: Point) -> str:
        """The key of a trial that is handed `point`."""
        return key(point, self.identity.function, self.identity.version)

    def finished(self) -> set[str]:
        """The keys of the trials that have a file."""
        return {file.stem for file in self.trials.glob("*.json")}

    def has(self, key: str) -> bool:
        """Whether the trial has a file."""
        return (self.trials / f"{key}.json").exists()

    def keep(self, key: str, record: Record) -> None:
        """Write the file of a finished trial, and take it off the running ones."""
        with self._writing():
            self._write(self.trials / f"{key}.json", record)
            (self.running / f"{key}.json").unlink(missing_ok=True)

    def read(self, key: str, point: Point) -> Record:
        """The file of the finished trial `key`.

        Raises:
            InputError: it is damaged, or of another trial than the one that is handed `point`.
        """
        file = self.trials / f"{key}.json"
        try:
            record: Record = json.loads(file.read_text(encoding="utf-8"))
            if (record["point"], record["function"]) != (point, self.identity.function):
                raise ValueError("it is of another trial")
            for part in ("status", "rows", "seconds", "attempts", "error", "traceback"): record[part]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"can't read {str(file)!r}, the trial of {shown(point)} ({type(e).__name__}: {e}); delete "
                             "the file, and the trial is run again") from e
        return record

    def peek(self, key: str) -> Record | None:
        """The file of the finished trial `key`; None where it can't be read, or is of another function or version."""
        try: record: Record = json.loads((self.trials / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError): return None
        ours = isinstance(record, dict) and record.get("function") == self.identity.function and (
            record.get("version") == self.identity.version)
        return record if ours else None

    def forget(self, keys: Collection[str]) -> None:
        """Remove the files of finished trials."""
        for k in keys:
            with self._writing(): (self.trials / f"{k}.json").unlink(missing_ok=True)

    def begin(self, key: str) -> int:
        """Note that this process runs the trial; which attempt it is, counted since `run()` began."""
        attempt = self.attempts(key) + 1
        with self._writing():
            self._write(self.running / f"{key}.json", {"attempt": attempt, "pid": os.getpid(), "since": time.time()})
        return attempt

    def attempts(self, key: str) -> int:
        """How often the trial was begun, without an end, since `run()` began."""
        try: return int(json.loads((self.running / f"{key}.json").read_text(encoding="utf-8"))["attempt"])
        except FileNotFoundError: return 0
        except (ValueError, KeyError): return 1         # the file system has lost it

    def begun(self) -> set[str]:
        """The keys of the trials that were begun and have no file yet."""
        return {file.stem for file in self.running.glob("*.json")}

    def clear_running(self) -> None:
        """Forget which trials were begun: the processes that ran them are gone, and what they were writing too."""
        for part in (*self.path.glob("*.part"), *self.path.glob("*/*.part")):
            if writer_is_gone(part): part.unlink(missing_ok=True)
        for file in self.running.glob("*.json"): file.unlink(missing_ok=True)

    def log(self, key: str) -> Path:
        """The file with what the trial has printed."""
        return self.logs / f"{key}.txt"

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        # NaN and infinities stay, for a diverged run has them: Python writes and reads them.
        with replacing(path, durable=path.parent != self.running) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try: yield
        except OSError as e:
            raise InputError(f"the folder {str(self.path)!r} can't be written: {e.strerror or e}; make room for it or "
                             "make it writable, and run() goes on") from e


def _lock(file: IO[str]) -> bool:
    """Lock `file` until it is closed; whether no other process, nor another part of this one, has."""
    try:
        import fcntl
    except ImportError: return True         # Windows: nothing keeps a second run away
    try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: return False
    return True
