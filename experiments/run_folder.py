"""The run folder: what a run writes, in one step each, and what an interrupted one has kept to go on from."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.errors import REPORTED, InputError, WriteError
from experiments.results import Row, versions
from runner.files import replacing, writer_is_gone

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


# Folders of a run: its arms, what was run to choose them, and those that have not ended yet.
STUDY, BEFORE, CHECKPOINTS = "study", "before", "checkpoints"

# Settings that change no figure (the record has the data itself), so a run may go on with others; and the versions that
# its last bits depend on.
FREE = ("out", "data", "data_dir", "resume", "jobs", "backend", "scheduler")
DECISIVE = ("runnernorms", "torch", "machine")


class RunFolder:
    """A folder with `config.json`, `metrics.jsonl`, `summary.json` and pictures, and `study/`: a file per finished arm.

    In `checkpoints/` an arm that is being trained has a folder, which is gone once it has ended.

    Args:
        out: the folder; None makes `runs/<experiment>/<date>-<time>`.
        experiment: its name.
        config: the settings, a dataclass.
        facts: more to record, such as the data's sizes.
        resume: go on with the run that the folder holds, which must have the same settings; begin it where there is
            none.

    Raises:
        InputError: the folder can't be written, or holds a run already; to resume, one of other settings, or one that
            can't be gone on with.
    """

    def __init__(self, out: str | Path | None, experiment: str, config: "DataclassInstance",
                 facts: Mapping[str, object], *, resume: bool = False) -> None:
        now = datetime.now()
        self.path = Path(out) if out is not None else _unused(Path("runs") / experiment / f"{now:%Y%m%d-%H%M%S}")
        content = {"experiment": experiment,
                   "config": {k: _shareable(v) for k, v in dataclasses.asdict(config).items() if k != "resume"},
                   "threads": torch.get_num_threads(), **facts, "versions": versions(),
                   "started": f"{now:%Y-%m-%d %H:%M:%S}", "argv": [_shareable(a) for a in sys.argv[1:]]}
        if out == "": raise InputError("the run folder has no name; give --out one")
        self.can_resume = hasattr(config, "resume")
        with self._writing("name another by --out"):
            self.resumed = resume and (self.path / "config.json").exists()
            if self.resumed:
                before = self._same_run(content)
                content = {**before, "resumed": [*before.get("resumed", []), content["started"]]}
                for part in self.path.glob("*.part"):       # of a killed process
                    if not writer_is_gone(part): continue
                    if part.is_dir(): shutil.rmtree(part, ignore_errors=True)
                    else: part.unlink()
            elif any((self.path / f).exists() for f in ("config.json", "metrics.jsonl", "summary.json")):
                raise InputError(f"the run folder {str(self.path)!r} holds a run already and results are not "
                                 "overwritten; name another by --out, or delete it")
            with self._whole_or_absent() if not self.resumed else nullcontext():
                self.path.mkdir(parents=True, exist_ok=True)
                write_whole(self.path / "config.json", _json(content))
                if not self.resumed: write_whole(self.path / "metrics.jsonl", "")

    @contextmanager
    def _whole_or_absent(self) -> Iterator[None]:
        """Take a folder that was just begun away again if that fails: what is left of it would look like a run."""
        above = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try: yield
        except BaseException:
            for name in ("config.json", "metrics.jsonl"):
                with suppress(OSError): (self.path / name).unlink()
            for folder in above:
                with suppress(OSError): folder.rmdir()
            raise

    @contextmanager
    def _writing(self, mend: str = "") -> Iterator[None]:
        try: yield
        except BrokenPipeError: raise       # of the output
        except OSError as e:
            if mend and e.errno == errno.ENOSPC: mend = f"make room for it, or {mend}"
            mend = mend or f"make room for it, or make it writable. {self.go_on}"
            raise WriteError(f"the run folder {str(self.path)!r} can't be written: {e.strerror or e}; {mend}") from e

    @contextmanager
    def new_files(self) -> Iterator[Path]:
        """A folder beside the run's files; when the block ends without an error, what was written there is among them.

        So a file that could not be written whole is not there.

        Raises:
            WriteError: the disk is full.
        """
        part = self.path / f"new.{os.getpid()}.part"
        with self._writing():
            try:
                part.mkdir(exist_ok=True)
                yield part
                for file in sorted(part.iterdir()): os.replace(file, self.path / file.name)
            finally: shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Ctrl-C that nobody has spoken of yet: say that the folder stays, and how to go on."""
        try: yield
        except KeyboardInterrupt as e:
            if REPORTED in e.args: raise
            print(f"\nInterrupted; what had finished is kept in {self.path}. {self.go_on}", flush=True)
            raise KeyboardInterrupt(REPORTED) from None

    def _same_run(self, now: Mapping[str, Any]) -> dict[str, Any]:
        """`config.json` of the run that the folder holds, after a check that it is the run that `now` describes."""
        file = self.path / "config.json"
        try:
            before: dict[str, Any] = json.loads(file.read_text())
            then, new = before["config"], json.loads(json.dumps(now["config"]))
            pairs = {"experiment": (before["experiment"], now["experiment"]),
                     **{k: (then.get(k), new.get(k)) for k in dict.fromkeys([*then, *new]) if k not in FREE},
                     **{k: (before.get(k), now.get(k)) for k in ("data", "threads")},
                     **{k: (before["versions"].get(k), now["versions"].get(k)) for k in DECISIVE}}
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{str(file)!r} is no record of a run's settings ({type(e).__name__}: {e}), so the run "
                             "can't be gone on with; begin it anew in another folder, named by --out") from e
        if (self.path / "summary.json").exists() and before["experiment"] != "inside" and not (
                self.path / STUDY).is_dir():
            raise InputError(f"the run folder {str(self.path)!r} has rows but no folder {STUDY}/ to go on from (a "
                             "version that kept none has made it); begin the run anew in another, named by --out")
        different = [f"{k.replace('_', ' ')} was {a!r} and is {b!r}" for k, (a, b) in pairs.items() if a != b]
        if different:
            raise InputError(f"the run folder {str(self.path)!r} holds another run: {'; '.join(different)}. Go on with "
                             "what it was begun with, or name another folder by --out")
        return before

    def write_metrics(self, rows: Iterable[Row]) -> None:
        """Write `metrics.jsonl`, all its rows: what an earlier part of the run has left there is not there twice."""
        self._write("metrics.jsonl", "".join(json.dumps(_finite(row)) + "\n" for row in rows))

    def write_json(self, name: str, content: object) -> None:
        """Write `content` as the file `name`."""
        self._write(name, _json(content))

    def _write(self, name: str, text: str) -> None:
        with self._writing(): write_whole(self.path / name, text)

    @property
    def go_on(self) -> str:
        """How to go on after an interruption, a sentence."""
        if not self.can_resume: return "To have the rest, begin anew with another --out."
        return f"The same command with --out {self.path} --resume goes on."

    # --- checkpoints ------------------------------------------------------------------------------------------

    def checkpoint(self, name: str, *seeds: int) -> Path:
        """The folder for checkpoints of an arm from one or more seeds, not made yet, in one that is."""
        folder = checkpoint_folder(self.path / CHECKPOINTS, name, seeds)
        with self._writing(): folder.parent.mkdir(exist_ok=True)
        return folder

    def remove_checkpoint(self, name: str, *seeds: int) -> None:
        """Remove the checkpoints of an arm, and the folder around them if it is empty."""
        folder = checkpoint_folder(self.path / CHECKPOINTS, name, seeds)
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError): folder.parent.rmdir()


def checkpoint_folder(parent: Path, name: str, seeds: Sequence[int]) -> Path:
    """The folder in `parent` for checkpoints of an arm."""
    words = re.sub(r"[^\w.]+", "-", name).strip("-")[:60]
    of = "-".join(map(str, seeds)) if len(seeds) < 4 else f"{seeds[0]}-to-{seeds[-1]}"
    digest = hashlib.sha256(json.dumps([name, list(seeds)]).encode()).hexdigest()[:6]       # for names alike in words
    return parent / f"{words}-seed-{of}-{digest}"


def write_whole(path: Path, text: str) -> None:
    """Write `text` to the file `path` in one step: after a kill or a power cut the file is old or new, whole."""
    with replacing(path, durable=True) as part: part.write_text(text, encoding="utf-8")


def _json(content: object) -> str: return json.dumps(_finite(content), indent=1) + "\n"


def _unused(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that does not exist yet."""
    n, free = 1, path
    while free.exists(): n, free = n + 1, path.with_name(f"{path.name}-{n + 1}")
    return free


def _shareable(value: object) -> object:
    """`value` without the folders of this machine: a path keeps its last part."""
    if isinstance(value, Path) or (isinstance(value, str) and os.sep in value):
        option, eq, path = str(value).rpartition("=")
        return f"{option}{eq}.../{Path(path).name}"
    return value


def _finite(o: object) -> object:
    """`o` with every number that JSON lacks (NaN, infinities) as None."""
    if isinstance(o, float) and not math.isfinite(o): return None
    if isinstance(o, dict): return {k: _finite(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)): return [_finite(v) for v in o]
    return o
