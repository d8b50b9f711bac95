"""The decoded images of a folder in the user's cache: one file, written whole or not at all, checked when it is read.

The file: the labels (int64) and the images (uint8) of both parts, a JSON object that says what they are, and a last
line of fixed length with the length and the digest of that.
"""

import hashlib
import json
import mmap
import os
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from torch import Tensor

from experiments.errors import InputError
from runner.console import columns, is_terminal, say
from runner.progress import bar_line

MAX_BYTES = 8 << 30         # of decoded images: they are mapped, not read, but a cache is no place for more
FORMAT = "runnernorms images 1"
TAIL = len(FORMAT) + 1 + 12 + 1 + 64 + 1
AT_ONCE = 64 << 20          # bytes of images decoded at a time
OLD = 86_400                # seconds after which what a killed process has left half-written is deleted
MANY = 5                    # files that an error names
EVERY_SECONDS = 10          # between two lines that say how far it has come
DEEP = ("I", "F")           # PIL's modes of more than 8 bits, which its conversion to RGB would clip

Size = tuple[int, int]      # width and height


class Files(Protocol):
    """The files to decode, as `folder.Tree` has them."""

    @property
    def root(self) -> Path: ...

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> Sequence[tuple[str, int]]: ...

    @property
    def test(self) -> Sequence[tuple[str, int]]: ...

    @property
    def listing(self) -> str: ...


class Pictures(NamedTuple):
    """Images `(N, 3, H, W)` and labels `(N,)` of both parts, mapped from the file."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    counts: Tensor          # how often there is each value in the training images, (3, 256)
    digest: str             # of all labels and pixels


def read_pictures(file: Path, listing: str) -> tuple[Pictures | None, str]:
    """What `write_pictures` has written for files of this `listing`, or None and why not, "" where there is no file."""
    try:
        with open(file, "rb") as f: content = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError: return None, ""
    except (OSError, ValueError) as e: return None, f"the decoded images in the cache can't be read ({e})"
    damaged = None, "the decoded images in the cache are damaged"
    tail = re.fullmatch(rf"{FORMAT} (\d{{12}}) ([0-9a-f]{{64}})\n".encode(), content[-TAIL:])
    end = len(content) - TAIL - int(tail[1]) if tail else -1
    if not tail or end < 0 or hashlib.sha256(content[end:-TAIL]).hexdigest().encode() != tail[2]: return damaged
    about: dict[str, Any] = json.loads(content[end:-TAIL])
    if about["listing"] != listing: return None, "the files have changed since they were decoded"
    with memoryview(content) as view, view[:end] as payload:
        if hashlib.sha256(payload).hexdigest() != about["digest"]: return damaged
    whole, sizes = torch.frombuffer(content, dtype=torch.uint8), about["images"]
    at = 8 * sum(sizes)
    labels = whole[:at].view(torch.int64).split(sizes)
    images = whole[at:end].view(-1, *about["shape"]).split(sizes)
    train, test = zip(images, labels, strict=True)
    return Pictures(train, test, torch.tensor(about["counts"]), about["digest"]), ""


def write_pictures(file: Path, tree: Files, max_bytes: int = MAX_BYTES) -> None:
    """Decode the files of `tree` into `file`, whole or not at all; two processes may do so at once.

    Raises:
        InputError: images that can't be read, of unequal sizes, too many; a cache that can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob("*.part"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > OLD: left.unlink()
        fd, part = tempfile.mkstemp(".part", f"{file.stem}.", file.parent)
        try:
            with open(fd, "wb") as out: _decode(tree, out, max_bytes)
            os.replace(part, file)
        finally:
            with suppress(OSError): os.unlink(part)
    except BrokenPipeError: raise           # of the output
    except OSError as e:
        raise InputError(f"the decoded images can't be kept in {str(file.parent)!r}: {e.strerror or e}; make room, or "
                         "name another place by the environment variable XDG_CACHE_HOME") from e
    say(f"{tree.name}: they are kept in {file}")


def _decode(tree: Files, out: BinaryIO, max_bytes: int) -> None:
    """Write the contents of the file: one pass over the images, all faults of which are told together."""
    import numpy as np
    start, train = time.monotonic(), tree.train
    files = [*train, *tree.test]
    size, faults = _first_size(tree.root, [path for path, _ in files])
    if size is None: raise InputError(_unreadable(faults, len(files)))
    width, height = size
    total = len(files) * 3 * width * height
    if total > max_bytes:
        raise InputError(f"the {len(files):,} images of {tree.name} are {width}x{height}, decoded {_bytes(total)}, and "
                         f"the limit is {_bytes(max_bytes)}; resize them (a quarter of the bytes at half the width), "
                         "take fewer, or raise the limit: load_folder(..., max_bytes=...)")
    say(f"{tree.name}: decoding {len(files):,} images of {width}x{height}, once, into the cache ({_bytes(total)})")
    digest, counts = hashlib.sha256(), np.zeros((3, 256), dtype=np.int64)
    labels = torch.tensor([label for _, label in files]).numpy().tobytes()
    out.write(labels)
    digest.update(labels)
    faults, modes, sizes, progress = {}, Counter[str](), dict[Size, list[str]](), _Progress(tree.name, len(files))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    step = max(1, min(512, AT_ONCE // (3 * width * height)))
    with ThreadPoolExecutor(min(cores, 8)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")         # PIL's, of odd notes in files that it reads all the same
        for i in range(0, len(files), step):
            chunk = [path for path, _ in files[i:i + step]]
            look = partial(_read, tree.root, size, whole=len(sizes) < 2)    # of two sizes there is nothing to keep
            pixels = []
            for path, result in zip(chunk, pool.map(look, chunk), strict=True):
                if isinstance(result, Exception): faults[path] = result
                elif isinstance(result, Pixels):
                    sizes.setdefault(size, []).append(path)
                    modes[result.mode] += 1
                    pixels.append(result.planes)
                else: sizes.setdefault(result, []).append(path)
            if pixels and not faults and len(sizes) == 1:
                content = b"".join(pixels)
                out.write(content)
                digest.update(content)
                planes = np.frombuffer(content, dtype=np.uint8).reshape(-1, 3, width * height)          # (N, 3, H W)
                # By numpy, on one thread: torch's threads wait for one another where other work runs.
                for c in range(3): counts[c] += np.bincount(planes[:max(0, len(train) - i), c].ravel(), minlength=256)
            progress(i + len(chunk))
    troubles = [_unreadable(faults, len(files))] * bool(faults) + [_unequal(tree.name, sizes)] * (len(sizes) > 1)
    if troubles: raise InputError("\n".join(troubles))
    about = {"listing": tree.listing, "digest": digest.hexdigest(), "images": [len(train), len(files) - len(train)],
             "shape": [3, height, width], "counts": counts.tolist()}
    footer = json.dumps(about).encode()
    out.write(footer + f"{FORMAT} {len(footer):012} {hashlib.sha256(footer).hexdigest()}\n".encode())
    by_count = sorted((-n, mode) for mode, n in modes.items() if mode != "RGB")
    other = ", ".join(f"{-n:,} of mode {mode}" for n, mode in by_count)
    say(f"{tree.name}: decoded in {time.monotonic() - start:.1f} s" + f"; converted to RGB: {other}" * bool(other))


# --- the image files ----------------------------------------------------------------------------------------------

class Pixels(NamedTuple):
    """The RGB planes of an image, and the mode that it had."""

    planes: bytes
    mode: str


def _read(root: Path, size: Size, path: str, whole: bool = True) -> Pixels | Size | Exception:
    """The pixels of an image of this size, of another (or not `whole`) its size alone, or what is wrong."""
    import numpy as np
    from PIL import Image
    try:
        if not (root / path).is_file(): raise OSError("no such file, or not a regular one")
        with Image.open(root / path) as image:
            its: Size = image.size
            if not whole or its != size: return its
            if image.mode.split(";")[0] in DEEP:
                raise OSError(f"mode {image.mode}, more than 8 bits a pixel; convert it to 8 bits")
            # A palette that has alpha goes by RGBA, for PIL warns of the short way; the colours are the same.
            rgb = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
            return Pixels(np.asarray(rgb.convert("RGB")).transpose(2, 0, 1).tobytes(), image.mode)
    except Exception as e: return e         # of which PIL raises many kinds, of a damaged file


def _first_size(root: Path, paths: Sequence[str]) -> tuple[Size | None, dict[str, Exception]]:
    """The size of the first image that can be opened, and the faults of those before."""
    faults: dict[str, Exception] = {}
    for path in paths:
        result = _read(root, (0, 0), path)
        if isinstance(result, Exception): faults[path] = result
        elif not isinstance(result, Pixels): return result, faults
    return None, faults


# --- words --------------------------------------------------------------------------------------------------------

def _unreadable(faults: dict[str, Exception], n: int) -> str:
    names = [f"{path!r} ({str(e).partition(chr(10))[0] or type(e).__name__})" for path, e in sorted(faults.items())]
    return (f"{len(faults):,} of {n:,} image files can't be read: {', '.join(names[:MANY])}"
            + f" and {len(names) - MANY:,} more" * (len(names) > MANY) + "; delete them, or put sound copies in their "
            "place")


def _unequal(name: str, sizes: dict[Size, list[str]]) -> str:
    by_count = sorted(sizes.items(), key=lambda item: -len(item[1]))
    words = [f"{len(paths):,} of {w}x{h} (as {paths[0]!r})" for (w, h), paths in by_count[:MANY]]
    width, height = by_count[0][0]
    return (f"the images of {name} differ in size, width x height: {', '.join(words)}"
            + f" and {len(sizes) - MANY:,} more sizes" * (len(sizes) > MANY) + "; batches need one size: resize them "
            f"into another folder, each by PIL.ImageOps.fit(image, ({width}, {height})), say, and name that")


def _bytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


class _Progress:
    """A bar where somebody looks, which is gone when all is done; elsewhere a line from time to time."""

    def __init__(self, name: str, n: int) -> None:
        self.name, self.n, self.live, self.start = name, n, is_terminal(), time.monotonic()
        self.said = self.start

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.live:
            width = (columns() or 80) - 1
            line = bar_line(self.name, f"{done / self.n:.0%} [{done}/{self.n} {now - self.start:.0f} s]",
                            done / self.n, width)
            print("\r" + (line if done < self.n else " " * width + "\r"), end="", flush=True)
        elif now - self.said > EVERY_SECONDS and done < self.n:
            self.said = now
            say(f"{self.name}: {done:,} of {self.n:,} images, {now - self.start:.0f} s")
