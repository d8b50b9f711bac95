"""Files that callbacks write: in a folder that exists, and at no time half-written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def require_folder(path: str | os.PathLike[str], who: str) -> None:
    """Raises ValueError for the callback named `who` unless the folder of `path` exists."""
    if Path(path).absolute().parent.is_dir(): return
    raise ValueError(f"{who}: path is {os.fspath(path)!r} and its folder doesn't exist; make the folder first, or give "
                     "another path")


@contextmanager
def replacing(path: str | os.PathLike[str], durable: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to; what was written takes its place when the block ends without an error.

    `durable`: only once it is on the disk, so that not even a power failure leaves a part of it under that name.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        if durable: flush(part)
        os.replace(part, path)
        if durable: flush(path.parent)
    finally:
        with suppress(OSError): part.unlink(missing_ok=True)    # the folder may be gone, which was said already


def flush(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    if path.is_dir() and os.name == "nt": return        # Windows has no such thing
    fd = os.open(path, os.O_RDONLY)
    try: os.fsync(fd)
    except OSError as e:
        # Some file systems can't do that for a folder, and needn't.
        if not path.is_dir() or e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF): raise
    finally: os.close(fd)


def writer_is_gone(part: Path) -> bool:
    """Whether the process that wrote the temporary file `part` of `replacing` has ended and left it behind."""
    pid = part.name.split(".")[-2]
    if not pid.isdigit() or int(pid) == os.getpid(): return False
    try: os.kill(int(pid), 0)
    except ProcessLookupError: return True
    except OSError: return False
    return False
