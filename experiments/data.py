"""Image data for the experiments: MNIST or Fashion-MNIST where it can be had, else scikit-learn's digits, and loudly.

Search: the folder that was named, then the user's cache, then torchvision's download into that cache.
"""

import hashlib
import os
import shutil
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.errors import InputError, pick
from experiments.folder import PREFIX, load_folder
from experiments.image_data import ImageData, cache_dir, check_limit, pixel_moments
from runner import Dataset

# Data set, as torchvision calls its class and its folder: {file: (bytes, MD5)} of the four files, uncompressed, in
# <folder>/<data set>/raw as torchvision expects them.
FILES = {
    "MNIST": {
        "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
        "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
        "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
        "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": (47_040_016, "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
        "train-labels-idx1-ubyte": (60_008, "9018921c3c673c538a1fc5bad174d6f9"),
        "t10k-images-idx3-ubyte": (7_840_016, "8181f5470baa50b63fa0f6fddb340f0a"),
        "t10k-labels-idx1-ubyte": (10_008, "15d484375f8d13e6eb1aabb0c3f46965"),
    },
}
TITLES = {"MNIST": "MNIST", "FashionMNIST": "Fashion-MNIST"}
TRAIN_IMAGES = 50_000       # of 60,000, the lesson's split; the other 10,000 validate
NAMES = ("auto", "mnist", "fashion-mnist", "digits")
PROBE_SECONDS = 5           # how long to wait for a sign of a network
STALL_SECONDS = 15          # how long a download may stand still


def load_data(name: str = "auto", data_dir: str | Path | None = None, limit: int | None = None,
              auto: Sequence[str] = ("MNIST",)) -> ImageData:
    """Load MNIST, Fashion-MNIST, the digits or a folder of images.

    Args:
        name: "mnist", "fashion-mnist", "digits" or "auto": the first of `auto` that can be had, else the digits;
            a notice says why it is not the first. "folder:DIR" is `load_folder(DIR, limit)`.
        data_dir: folder that holds `MNIST/raw/` or `FashionMNIST/raw/`. It must be whole. None takes the environment
            variable NORMS_DATA_DIR, which may name a folder without them (the search then goes on) but not a damaged
            one.
        limit: only the first `limit` training images, and at most as many for validation.
        auto: data sets, keys of `FILES`.

    Raises:
        InputError: an unknown name, a folder without the files, a damaged file, a data set that is unavailable.
    """
    check_limit(limit)
    name = pick_data(name)
    if name.startswith(PREFIX):
        if data_dir is not None:
            raise InputError(f"the data are {name!r}, which names their folder, and data_dir is {str(data_dir)!r}, the "
                             "folder of MNIST/raw/; leave out one of the two")
        return load_folder(name.removeprefix(PREFIX), limit)
    if name == "digits": return _digits(limit)
    notice = ""
    wanted = auto if name == "auto" else [k for k, title in TITLES.items() if title.lower() == name]
    for kind in wanted:
        root, reasons = find_images(kind, data_dir, last=kind == wanted[-1])
        if root is not None: return _mnist(kind, root, limit, notice and f"{notice}In its place: {TITLES[kind]}.")
        why = "\n".join(f"  - {reason}" for reason in reasons)
        if name != "auto":
            raise InputError(f"{TITLES[kind]} is unavailable:\n{why}\nPut its four files into FOLDER/{kind}/raw and "
                             "name FOLDER by --data-dir, or use --data digits")
        notice += f"THIS IS NOT {TITLES[kind]}. {TITLES[kind]} is unavailable:\n{why}\n"
    return _digits(limit, notice=f"{notice}In its place: scikit-learn's built-in digits (1,797 images of 8x8 pixels, "
                   f"resized to 28x28).\nFor {TITLES[auto[0]]} put its four files into FOLDER/{auto[0]}/raw and name "
                   "FOLDER by --data-dir.")


def pick_data(name: str, folders: bool = True) -> str:
    """The name of a data set as `NAMES` spells it, or "folder:DIR" with its DIR; raises an error for others.

    Not `folders` is for networks that take nothing but images like MNIST's.
    """
    kind, colon, folder = str(name).partition(":")
    if colon and f"{kind}:".lower() == PREFIX:
        if folders: return PREFIX + folder
        raise InputError(f"the data are {name!r}, and the networks here are for grey images of 28x28 in ten classes; "
                         f"use --data {' or '.join(n for n in NAMES if n != 'auto')}")
    if os.sep in str(name) or os.path.isdir(str(name)):
        raise InputError(f"unknown data set {name!r}: if that is a folder of images, write folder:{name}. Choose from: "
                         f"{', '.join(NAMES)}, folder:DIR")
    return pick(name, NAMES, "data set")


def find_images(kind: str, data_dir: str | Path | None = None, last: bool = True) -> tuple[Path | None, list[str]]:
    """The folder that holds `<kind>/raw` with four sound files, and why the places before it did not serve.

    `last` is whether no other data set would do: then a named folder without the files is an error. Returns
    `(folder or None, reasons)`. Raises InputError for that, and for a damaged file.
    """
    reasons: list[str] = []
    files = FILES[kind]
    from_env = os.environ.get("NORMS_DATA_DIR") if data_dir is None else None
    named = from_env or data_dir
    if named is not None:
        root = Path(named)
        missing = _missing(root, kind)
        if not missing: return _checked(root, kind), reasons
        problem = (f"the folder {str(root)!r} does not exist" if not root.is_dir() else
                   f"{str(root / kind / 'raw')!r} lacks {', '.join(missing)}")
        if (last and not from_env) or len(missing) < len(files):
            raise InputError(f"{problem}. A data folder must hold {kind}/raw/ with the files {', '.join(files)} "
                             f"(uncompressed): name the folder above {kind}/, or leave out --data-dir to search the "
                             "cache and then download, or use --data digits")
        reasons.append(f"{'NORMS_DATA_DIR' if from_env else '--data-dir'}: {problem}")
    cache = cache_dir()
    if not _missing(cache, kind): return _checked(cache, kind), reasons
    reasons.append("the cache of an earlier download is empty")
    try: download(cache, kind)
    except OSError as e:
        reasons.append(f"the download failed: {e}")
        return None, reasons
    return _checked(cache, kind), reasons


def _missing(root: Path, kind: str) -> list[str]:
    return [f for f in FILES[kind] if not (root / kind / "raw" / f).is_file()]


def _checked(root: Path, kind: str) -> Path:
    """`root`, after its four files were read and found whole."""
    for name, (size, md5) in FILES[kind].items():
        path = root / kind / "raw" / name
        try: content = path.read_bytes()
        except OSError as e: raise InputError(f"can't read {str(path)!r}: {e.strerror}; make it readable") from e
        md5_found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if len(content) != size: fault = f"is {len(content):,} bytes long and must be {size:,} (half-written?)"
        elif md5_found != md5: fault = f"is damaged: its MD5 is {md5_found} and {TITLES[kind]}'s is {md5}"
        else: continue
        raise InputError(f"the file {str(path)!r} {fault}. Delete it and put a sound copy in its place; one in the "
                         "cache is downloaded again once it is deleted")
    return root


def download(root: Path, kind: str) -> None:
    """Download the data set `kind` by torchvision into `root`, whole or not at all.

    Raises:
        OSError: no network within a few seconds, or a download that stands still, or a folder that can't be written.
    """
    images = _class(kind)
    _probe([mirror + images.resources[1][0] for mirror in images.mirrors])
    root.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)  # torchvision sets none of its own
    try:
        with tempfile.TemporaryDirectory(dir=root) as half:
            try: images(half, train=True, download=True)
            except RuntimeError as e: raise OSError(str(e)) from e
            # Into place only when complete: an interrupted download leaves nothing behind.
            shutil.rmtree(root / kind, ignore_errors=True)
            os.replace(Path(half) / kind, root / kind)
    finally: socket.setdefaulttimeout(timeout)


def _class(kind: str) -> Any:
    from torchvision import datasets
    return getattr(datasets, kind)


def _probe(urls: Sequence[str]) -> None:
    """Return once one of `urls` answers; raise OSError when none has within PROBE_SECONDS.

    In a thread of its own, because a name look-up can hang where no timeout reaches it.
    """
    answers: list[Exception | None] = []

    def ask(url: str) -> None:
        request = urllib.request.Request(url, method="HEAD")
        try: urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except Exception as e:
            if isinstance(e, urllib.error.HTTPError): e.close()
            answers.append(e)
        else: answers.append(None)
        if answers[-1] is None or len(answers) == len(urls): done.set()

    done = threading.Event()
    for url in urls: threading.Thread(target=ask, args=(url,), daemon=True).start()
    done.wait(PROBE_SECONDS)
    if None in answers: return
    raise OSError(f"no network ({answers[0]})" if answers else f"no answer from the network within {PROBE_SECONDS} s")


def _mnist(kind: str, root: Path, limit: int | None, notice: str = "") -> ImageData:
    # Not by torchvision, whose import takes longer than the files do, in each process that trains.
    images, labels, *test = (_idx(root / kind / "raw" / name) for name in FILES[kind])
    n = TRAIN_IMAGES
    return _image_data(TITLES[kind], (images[:n], labels[:n]), (images[n:], labels[n:]), (test[0], test[1]), 255, limit,
                       notice)


def _idx(path: Path) -> Tensor:
    """The bytes of a sound IDX file in their shape: uint8 images `(N, 28, 28)`, or labels `(N,)` as int64.

    Before the bytes stand 0, 0, the kind (8), the number of axes, and the length of each axis in 4 bytes.
    """
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)       # mapped, not read
    axes = int(content[3])
    shape = [int.from_bytes(bytes(content[i:i + 4].tolist()), "big") for i in range(4, 4 + 4 * axes, 4)]
    values = content[4 + 4 * axes:].view(shape)
    return values if axes > 1 else values.long()


def _digits(limit: int | None, notice: str = "") -> ImageData:
    """scikit-learn's digits, bilinearly resized to 28x28, split 1,197 / 300 / 300 in a fixed random order."""
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).squeeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(labels)[order]
    train, valid, test = zip(images.split([1197, 300, 300]), labels.split([1197, 300, 300]), strict=True)
    return _image_data("digits (scikit-learn, 8x8 resized)", train, valid, test, 16, limit, notice)


def _image_data(name: str, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor],
                top: int, limit: int | None, notice: str = "") -> ImageData:
    """Scale by the largest pixel value `top`, normalise by the whole training set's moments, cut to `limit`."""
    # In place, for fresh memory is what takes time here.
    def scaled(images: Tensor) -> Tensor: return images.to(torch.float32, copy=True).div_(top)
    mean, std = pixel_moments(train[0], top)
    whole = scaled(train[0])

    def dataset(images: Tensor, labels: Tensor) -> Dataset:
        return Dataset(images.sub_(mean).div_(std).flatten(1), labels)
    first = whole if limit is None else whole[:limit].clone()       # a copy, so that what is cut off is not kept
    return ImageData(name, dataset(first, train[1][:limit]), dataset(scaled(valid[0][:limit]), valid[1][:limit]),
                     dataset(scaled(test[0]), test[1]), mean, std, notice)
