"""`--data folder:DIR`: the images of any torchvision `ImageFolder` tree, as `ImageData`.

    DIR/train/CLASS/*.jpg       to train on; a part of them is held out and validates
    DIR/val/CLASS/*.jpg         to test, at the end; valid/ will do

Labels are torchvision's: the classes' places in the order of their names.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.errors import InputError
from experiments.folder_cache import MAX_BYTES, Pictures, read_pictures, write_pictures
from experiments.image_data import ImageData, Pixels, cache_dir, check_limit, moments_of_counts
from runner import Dataset
from runner.console import say

PREFIX = "folder:"
TRAIN, VAL = ("train",), ("val", "valid")
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")       # torchvision's
HELD_OUT = 0.1          # of train/, to validate
NEEDED = "a folder of images needs train/ and val/ (or valid/), and in both a folder for each class"
MANY = 5                # names that an error lists


@dataclass(frozen=True)
class Tree:
    """The image files of a folder, by part and class."""

    root: Path                              # its real path
    name: str
    classes: tuple[str, ...]
    parts: Sequence[Mapping[str, Sequence[tuple[str, int, int]]]]       # of each class what `images_in` gives
    listing: str                            # a digest of all names, sizes and times of change

    @property
    def train(self) -> list[tuple[str, int]]:
        """Path below the root and label of each training image, in the order of `spread`."""
        return spread(self.parts[0])

    @property
    def test(self) -> list[tuple[str, int]]:
        """As `train`, of the other part."""
        return spread(self.parts[1])


def load_folder(path: str | Path, limit: int | None = None, *, held_out: float = HELD_OUT,
                max_bytes: int = MAX_BYTES) -> ImageData:
    """The images of the folder `path`, from the cache or, once, decoded into it: uint8 `(N, 3, H, W)`, memory-mapped.

    They must all have one size. Grey, palette, CMYK and transparent ones are converted to RGB, alpha dropped, of which
    a line is printed; a rotation by a camera's note (EXIF) is not applied, as torchvision doesn't. Names that begin
    with a dot are passed over. The order is fixed by the files' names, and such that each class has its share, to about
    one image, of any part: of what is held out, and of the first `limit`.

    Args:
        path: the folder that holds `train/` and `val/`.
        limit: only the first `limit` training images, and at most as many for validation.
        held_out: the share of `train/` that is not trained on and validates; 0 takes `val/` for validation too, for
            runs that choose nothing.
        max_bytes: what the decoded images may take.

    The moments are those of all of `train/`, for any `held_out` and `limit`. Files that were added, removed or changed
    (by their size or time) are noticed, and all is decoded anew.

    Raises:
        InputError: a folder that isn't such a tree, is too large, or has files that can't be read or sizes that differ;
            a cache that can't be written; a share or limit that makes no sense.
    """
    check_limit(limit)
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 <= held_out <= 0.5:
        raise InputError(f"held_out is {held_out!r}; it must be a share of the training images from 0 to 0.5, such as "
                         f"{HELD_OUT}")
    tree = read_tree(path)
    found = _pictures(tree, max_bytes)
    (x, y), test = found.train, Dataset(*found.test)
    n, c = len(y), len(tree.classes)
    kept = n - max(1, round(n * held_out)) if held_out else n
    if len(y[:kept].unique()) < c:
        raise InputError(f"{tree.name}/train has {n} images of {c} classes, too few to hold out {n - kept} and keep "
                         "one of each class to train on; give more images")
    valid = Dataset(x[kept:][:limit], y[kept:][:limit]) if held_out else Dataset(test.x[:limit], test.y[:limit])
    height, width = x.shape[2:]
    each = [moments_of_counts(torch.arange(256.0), counts, 255) for counts in found.counts]
    mean, std = (torch.tensor(m).view(-1, 1, 1) for m in zip(*each, strict=True))                       # (3, 1, 1)
    return ImageData(tree.name, Dataset(x[:kept][:limit], y[:kept][:limit]), valid, test, mean, std, "", c,
                     (3, height, width), Pixels(mean, std), tree.classes, str(tree.root), found.digest[:8])


def _pictures(tree: Tree, max_bytes: int) -> Pictures:
    """The tree's images from the cache, after they were decoded into it if they were not."""
    key = hashlib.sha256(os.fsencode(tree.root)).hexdigest()[:12]
    file = cache_dir() / "folders" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', tree.root.name)[:40]}-{key}.images"
    found, why = read_pictures(file, tree.listing)
    if found is not None: return found
    if why: say(f"{tree.name}: {why}; they are decoded anew")
    write_pictures(file, tree, max_bytes)
    if read_tree(tree.root).listing != tree.listing:
        raise InputError(f"the files in {str(tree.root)!r} changed while they were decoded; start again when no one "
                         "writes there")
    found, why = read_pictures(file, tree.listing)
    if found is None: raise InputError(f"{str(file)!r} was written just now, and {why}; is the disk sound? Another "
                                       "place is named by the environment variable XDG_CACHE_HOME")
    return found


# --- what is there ------------------------------------------------------------------------------------------------

def read_tree(path: str | Path) -> Tree:
    """The files of the folder `path`, after a check that it is such a tree; none of them is opened.

    Raises:
        InputError: it isn't, or can't be listed.
    """
    if not str(path).strip(): raise InputError(f"no folder was named; give one, as in --data folder:DIR: {NEEDED}")
    named = Path(os.path.abspath(os.path.expanduser(path)))
    if not os.path.isdir(named):
        what = "is a file; unpack it, and name the folder" if os.path.exists(named) else "does not exist"
        raise InputError(f"the folder {str(path)!r} {what}: {NEEDED}")
    root = Path(os.path.realpath(named))
    try:
        parts = [_part(root, names) for names in (TRAIN, VAL)]
        files = [{name: sorted(images_in(root, f"{part}/{name}")) for name in folders_in(root / part)}
                 for part in parts]
        for part, its in zip(parts, files, strict=True): _check_classes(root, part, its)
    except OSError as e: raise InputError(f"can't list {e.filename!r}: {e.strerror}; make it readable") from e
    train, test = (its.keys() for its in files)
    if train != test:
        only = [f"only {part}/ has {some(a - b)}" for part, a, b in ((parts[0], train, test), (parts[1], test, train))
                if a - b]
        raise InputError(f"the classes of {str(root)!r} differ: {', and '.join(only)}; both parts need a folder for "
                         "each class")
    digest = hashlib.sha256()
    for line in (line for its in files for lines in its.values() for line in lines):
        digest.update(os.fsencode(f"{line[0]}\0{line[1]}\0{line[2]}\n"))
    name = named.name or "folder"
    if name.lower() in ("mnist", "fashionmnist", "fashion-mnist") or name.lower().startswith("digits"):
        name = f"folder {name}"         # or a record would seem to be of these
    return Tree(root, name, tuple(sorted(train)), files, digest.hexdigest())


def _part(root: Path, names: Sequence[str]) -> str:
    """The one of `names` that `root` has."""
    there = folders_in(root)
    found = [name for name in names if name in there]
    if len(found) == 1: return found[0]
    if found: raise InputError(f"{str(root)!r} has both {' and '.join(f'{f}/' for f in found)}; rename the one that is "
                               "not to be read")

    def whole(folder: Path) -> bool:
        its = folders_in(folder)
        return all(any(name in its for name in part) for part in (TRAIN, VAL))
    deeper = [name for name in there if whole(root / name)]
    if deeper: mend = f"they are in {str(root / deeper[0])!r}: name that"
    elif root.name in (*TRAIN, *VAL) and whole(root.parent): mend = f"name the folder above, {str(root.parent)!r}"
    else: mend = f"make or rename one. It has {some([f'{name}/' for name in there], 'no folders')}"
    raise InputError(f"{str(root)!r} has no {' or '.join(f'{name}/' for name in names)}; {NEEDED}: {mend}")


def folders_in(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted, without those that begin with a dot."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def images_in(root: Path, below: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, int, int]]:
    """Path below `root`, size and time of change of each image file in its folder `below`, and in folders in that."""
    real = os.path.realpath(root / below)
    if real in above: return            # a link to a folder that it is in
    with os.scandir(root / below) as entries:
        for e in entries:
            if e.name.startswith("."): continue
            if e.is_dir(): yield from images_in(root, f"{below}/{e.name}", (*above, real))
            elif e.name.lower().endswith(ENDINGS):
                try: stat = e.stat()
                except FileNotFoundError: stat = e.stat(follow_symlinks=False)      # decoding will tell
                yield f"{below}/{e.name}", stat.st_size, stat.st_mtime_ns


def _check_classes(root: Path, part: str, files: Mapping[str, Sequence[object]]) -> None:
    """Raise unless the part has two classes or more, with images."""
    where = str(root / part)
    if not files:
        raise InputError(f"{where!r} has no folders; its images must lie in a folder for each class, as in "
                         f"{part}/cat/1.jpg")
    if not any(files.values()):
        endings = sorted({f.suffix.lower() for name in files for f in (root / part / name).iterdir() if f.suffix})
        raise InputError(f"{where!r} has no images: in the folders of its {len(files)} classes no file ends in "
                         f"{', '.join(ENDINGS)}" + f" (but in {some(endings)})" * bool(endings)
                         + "; put images there, or convert them")
    if empty := [f"{part}/{name}" for name, its in files.items() if not its]:
        raise InputError(f"{len(empty)} of the {len(files)} classes in {where!r} have no images: {some(empty)}; give "
                         f"them some, or delete these folders. Images end in {', '.join(ENDINGS)}")
    if len(files) == 1:
        raise InputError(f"{where!r} has one class, {next(iter(files))!r}; a network needs at least two to tell apart")


def spread(files: Mapping[str, Sequence[tuple[str, int, int]]]) -> list[tuple[str, int]]:
    """All images and their labels in an order in which each class is spread evenly.

    Image j of a class's n stands at `(j + 1/2) / n` of the whole, so that of any part each class has its share to about
    one image. Within a class they are in the order of a digest of their names, which has nothing to do with what is on
    them and is the same on every machine.
    """
    placed = []
    for label, name in enumerate(sorted(files)):
        digests = sorted((hashlib.sha256(os.fsencode(path)).digest(), path) for path, *_ in files[name])
        placed += [((2 * j + 1) / (2 * len(digests)), *at, label) for j, at in enumerate(digests)]
    return [(path, label) for *_, path, label in sorted(placed)]


def some(names: Sequence[str] | set[str], none: str = "none") -> str:
    """The first few of `names`, and how many more there are."""
    names = sorted(names)
    return (", ".join(names[:MANY]) + f" and {len(names) - MANY} more" * (len(names) > MANY)) or none
