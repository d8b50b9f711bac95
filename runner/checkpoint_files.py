"""Files of checkpoints: their names, and how they are written whole, read, and told to be damaged."""

import io
import os
import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from runner.files import replacing, writer_is_gone
from runner.values import decoded

VERSION = 1     # of what a file holds
NAME = re.compile(r"checkpoint-([0-9a-f]{8})-(\d{6,})\.pt")
PART = re.compile(r"checkpoint-([0-9a-f]{8}-\d{6,}\.pt|try)\.\d+\.part")


class CheckpointError(ValueError):
    """A fit can't go on from a checkpoint; the text says what was got, what is needed and the mend."""


class Damaged(CheckpointError):
    """A file is not what was written under its name."""


def path_for(folder: Path, run: str, number: int) -> Path: return folder / f"checkpoint-{run}-{number:06}.pt"


def run_of(path: Path) -> str: return path.stem.split("-")[1]


def number_of(path: Path) -> int: return int(path.stem.split("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """The files in the folder, the newest last."""
    if not folder.is_dir(): return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=number_of)


def prepare(folder: Path) -> None:
    """Make the folder, see that it can be written, and take away what a killed process has left half-written.

    Raises:
        ValueError: it can't be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "checkpoint-try", durable=True) as part: part.write_bytes(b"")
        (folder / "checkpoint-try").unlink()
        for path in folder.iterdir():
            if PART.fullmatch(path.name) and writer_is_gone(path): path.unlink(missing_ok=True)
    except OSError as e:
        raise ValueError(f"Checkpoint: the folder {os.fspath(folder)!r} can't be written ({type(e).__name__}: "
                         f"{e.strerror or e}); give another one, or make this one writable") from e


def check(contents: dict[str, Any]) -> None:
    """See that what will be written can be read: `torch.load(weights_only=True)` takes some types only."""
    memory = io.BytesIO()
    torch.save(_without_tensors(contents), memory)
    memory.seek(0)
    read(memory)


def _without_tensors(o: Any) -> Any:
    """`o` with empty tensors in the place of its own, which may be large."""
    if isinstance(o, torch.Tensor): return o if o.is_quantized else torch.empty(0, dtype=o.dtype)
    if isinstance(o, dict): return type(o)((k, _without_tensors(v)) for k, v in o.items())
    return type(o)(map(_without_tensors, o)) if type(o) in (list, tuple) else o


def read(source: Any) -> Any:
    """What `torch.save` has written to the file `source`, by torch's reader that takes no code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Validating sparse tensor invariants", UserWarning)   # it may take a moment
        warnings.filterwarnings("ignore", "Sparse invariant checks are", UserWarning)           # torch 2.11's
        return torch.load(source, map_location="cpu", weights_only=True)


def save(contents: dict[str, Any], path: Path, keep: int) -> None:
    """Write `contents` to `path`, whole and to the disk or not at all; then the `keep` newest files of its run stay.

    Raises:
        OSError: it can't be written.
    """
    with replacing(path, durable=True) as part, part.open("wb") as f:
        disk = _Disk(f)
        try: torch.save(contents, cast(IO[bytes], disk))
        except Exception as e:
            if disk.error is not None: raise disk.error from e      # torch's own error doesn't say why
            raise
    for old in [p for p in checkpoints_in(path.parent) if run_of(p) == run_of(path)][:-keep]:
        with suppress(OSError): old.unlink()


class _Disk:
    """A file for `torch.save` that remembers why it couldn't be written."""

    def __init__(self, f: IO[bytes]) -> None:
        self.f = f
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try: return self.f.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        try: self.f.flush()
        except OSError as e:
            self.error = e
            raise

    def tell(self) -> int: return self.f.tell()

    def seek(self, offset: int, whence: int = 0) -> int: return self.f.seek(offset, whence)


def load(path: Path) -> dict[str, Any]:
    """What the file holds.

    Raises:
        Damaged: it isn't whole, or holds something else than what its name says.
        CheckpointError: it is no checkpoint, or one of a later version of this library.
    """
    try:
        with zipfile.ZipFile(path) as archive: bad = archive.testzip()      # torch doesn't look at the check sums
        if bad is not None: raise Damaged(f"{path} is damaged: the check sum of {bad} is wrong")
        contents: Any = read(path)
    except Damaged: raise
    except FileNotFoundError as e:
        raise CheckpointError(f"there is no checkpoint {path}; give a file, or a folder that has some") from e
    except Exception as e: raise Damaged(f"{path} is damaged: it can't be read ({_first_line(e)})") from e
    if not isinstance(contents, dict) or "version" not in contents or "fingerprint" not in contents:
        raise CheckpointError(f"{path} is no checkpoint of a fit; give a file that Checkpoint wrote, or its folder")
    if contents["version"] > VERSION:
        raise CheckpointError(f"{path} is a checkpoint of version {contents['version']}, and this library reads "
                              f"version {VERSION}; install the library that wrote it, or a later one")
    name = NAME.fullmatch(path.name)
    if name and (name[1], int(name[2])) != (contents["run"], contents["number"]):
        raise Damaged(f"{path} holds checkpoint {contents['number']} of the run {contents['run']}: it was written "
                      "under another name")
    return {**contents, "fingerprint": decoded(contents["fingerprint"])}


def _first_line(e: Exception) -> str: return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else e!r}"


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of the newest run in the folder, and what it holds; None if there is none.

    A damaged one costs a warning.
    """
    paths = checkpoints_in(folder)
    for path in reversed(paths):
        if run_of(path) != run_of(paths[-1]): continue
        try: return path, load(path)
        except Damaged as e: warnings.warn(f"{e}; the one before it is taken", RuntimeWarning, stacklevel=4)
    return None
