"""Files that callbacks write: in a folder that exists, and at no time half-written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_folder(path: str | os.PathLike[str], who: str) -> None:
    """Raises ValueError for the callback named `who` unless the folder of `path` exists."""
    if Path(path).absolute().parent.is_dir(): return
    raise ValueError(f"{who}: path is {os.fspath(path)!r} and its folder doesn't exist; make the folder first, or give "
                     "another path")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; what was written takes its place when the block ends without an error."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally: part.unlink(missing_ok=True)
