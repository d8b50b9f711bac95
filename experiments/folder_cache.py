"""The decoded images of a folder in the user's cache: one file, written whole or not at all, checked when it is read.

The file: the labels (int64) and the images (uint8) of both parts, a JSON object that says what they are, and a last
line of fixed length with the length and the digest of that.
"""

import hashlib
import json
import mmap
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
    *form, length, digest = content[-TAIL:].decode("ascii", "replace").split()
    if " ".join(form) != FORMAT or not length.isdecimal(): return damaged
    end = len(content) - TAIL - int(length)
    if end < 0 or hashlib.sha256(content[end:-TAIL]).hexdigest() != digest: return damaged
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
    except OSError as e:
        raise InputError(f"the decoded images can't be kept in {str(file.parent)!r}: {e.strerror}; make room, or name "
                         "another place by the environment variable XDG_CACHE_HOME") from e


def _decode(tree: Files, out: BinaryIO, max_bytes: int) -> None:
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
    digest, counts = hashlib.sha256(), torch.zeros(3, 256, dtype=torch.int64)
    labels = torch.tensor([label for _, label in files]).numpy().tobytes()
    out.write(labels)
    digest.update(labels)
    faults, modes, sizes, done = {}, Counter[str](), dict[Size, list[str]](), 0
    for chunk, results in _decoded(tree, [path for path, _ in files], size, sizes):
        pixels = []
        for path, result in zip(chunk, results, strict=True):
            if isinstance(result, Exception): faults[path] = result
            elif isinstance(result[0], int): sizes.setdefault(result, []).append(path)
            else:
                sizes.setdefault(size, []).append(path)
                pixels.append(result[0])
                modes[result[1]] += 1
        if pixels and not faults and len(sizes) == 1:
            content = b"".join(pixels)
            out.write(content)
            digest.update(content)
            ours = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 3, width * height)
            ours = ours[:max(0, len(train) - done)].transpose(0, 1).flatten(1)                     # (3, N H W)
            counts += torch.stack([torch.bincount(channel, minlength=256) for channel in ours])
        done += len(chunk)
        _show(tree.name, done, len(files), start)
    troubles = [_unreadable(faults, len(files))] * bool(faults) + [_unequal(tree.name, sizes)] * (len(sizes) > 1)
    if troubles: raise InputError("\n".join(troubles))
    about = {"listing": tree.listing, "digest": digest.hexdigest(), "images": [len(train), len(files) - len(train)],
             "shape": [3, height, width], "counts": counts.tolist()}
    footer = json.dumps(about).encode()
    out.write(footer + f"{FORMAT} {len(footer):012} {hashlib.sha256(footer).hexdigest()}\n".encode())
    other = ", ".join(f"{n:,} of mode {mode}" for mode, n in modes.most_common() if mode != "RGB")
    say(f"{tree.name}: decoded in {time.monotonic() - start:.1f} s" + f"; converted to RGB: {other}" * bool(other))


# --- the image files ----------------------------------------------------------------------------------------------

Result = tuple[bytes, str] | Size | Exception       # RGB planes and the mode of an image; only its size; a fault


def _decoded(tree: Files, paths: Sequence[str], size: Size, sizes: dict[Size, list[str]],
             ) -> Iterator[tuple[Sequence[str], list[Result]]]:
    """Some files at a time, and what each gave; as soon as `sizes` has two, only the sizes of the others."""
    step = max(1, min(512, AT_ONCE // (3 * size[0] * size[1])))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, 8)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")         # PIL's, of odd notes in files that it reads all the same
        for i in range(0, len(paths), step):
            chunk, whole = paths[i:i + step], len(sizes) < 2
            yield chunk, [*pool.map(lambda path, whole=whole: _read(tree.root / path, size, whole), chunk)]


def _read(path: Path, size: Size, whole: bool = True) -> Result:
    """An image of this size and its mode, or, not `whole`, its size alone; the size of another; what is wrong."""
    import numpy as np
    from PIL import Image
    try:
        if not path.is_file(): raise OSError("no such file" if not path.exists() else "not a regular file")
        with Image.open(path) as image:
            if not whole or image.size != size: return image.size
            if image.mode.split(";")[0] in DEEP:
                raise OSError(f"mode {image.mode}, more than 8 bits a pixel; convert it to 8 bits")
            # A palette that has alpha goes by RGBA, for PIL warns of the short way; the colours are the same.
            rgb = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
            return np.asarray(rgb.convert("RGB")).transpose(2, 0, 1).tobytes(), image.mode
    except Exception as e: return e         # of which PIL raises many kinds, of a damaged file


def _first_size(root: Path, paths: Sequence[str]) -> tuple[Size | None, dict[str, Exception]]:
    """The size of the first image that can be opened, and the faults of those before."""
    faults: dict[str, Exception] = {}
    for path in paths:
        result = _read(root / path, (0, 0))
        if not isinstance(result, Exception): return result, faults     # type: ignore[return-value]    # no bytes
        faults[path] = result
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


def _show(name: str, done: int, n: int, start: float) -> None:
    """A bar where somebody looks; it is gone when all is done."""
    if not is_terminal(): return
    width = (columns() or 80) - 1
    line = bar_line(name, f"{done / n:.0%} [{done}/{n} {time.monotonic() - start:.0f} s]", done / n, width)
    print("\r" + (line if done < n else " " * width + "\r"), end="", flush=True)
