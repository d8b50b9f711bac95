"""The settings that experiments share, their checks and their options on the command line."""

import argparse
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch

from experiments.data import NAMES, pick_data
from experiments.errors import InputError, pick
from experiments.study.executors import BACKENDS
from experiments.study.torchrun import processes
from experiments.training import CONVOLUTIONS, convolutions_in_words

T = TypeVar("T")


@dataclass
class Settings:
    """Settings of every experiment.

    `seeds` is a list; `out` is the run folder, None for `runs/<experiment>/<date>-<time>`; `device` is "auto" (the GPU
    if there is one), "cpu", "cuda" or "cuda:1". `resume` goes on with the run in `out` where it stopped, and begins it
    where there is none.

    Raises:
        InputError: a value that makes no sense.
    """

    seeds: Sequence[int] = (0,)
    out: str | None = None
    device: str = "auto"
    resume: bool = False

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise InputError("--resume goes on with the run in a folder and none was named; add --out DIR, the folder "
                             "of the run that was interrupted")
        self.seeds = some_once("seeds", self.seeds)
        for seed in self.seeds:
            if not (is_int(seed) and 0 <= seed < 2**32):
                raise InputError(f"seed {seed!r} makes no sense; seeds are integers from 0 to 2^32 - 1")
        if self.device == "auto": self.device = "cuda" if torch.cuda.is_available() else "cpu"
        device: torch.device | None = None
        try: device = torch.device(self.device)
        except RuntimeError: pass
        if device is None or device.type not in ("cpu", "cuda"):
            raise InputError(f"unknown device {self.device!r}; use auto, cpu or cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device {self.device!r} was asked for and torch sees {torch.cuda.device_count()} GPUs; "
                             "use cpu, or auto")


@dataclass
class StudySettings(Settings):
    """Settings of an experiment that is a study of arms and seeds, of which several run at once.

    `jobs` is how many, None for $NORMS_JOBS or, where that isn't set, as many as cores (one on a GPU); one alone runs
    in this process on a GPU, or if that was started with OMP_NUM_THREADS=1, as worker processes are. `backend` is
    where, and `scheduler` the address of a cluster: see `Study.run`.

    Raises:
        InputError: a value that makes no sense.
    """

    jobs: int | None = None
    backend: str = "loky"
    scheduler: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jobs is not None: positive("jobs", self.jobs)
        self.backend = pick(self.backend, BACKENDS, "backend")
        if self.backend == "loky" and processes() > 1: self.backend = "torchrun"
        if self.scheduler is not None and self.backend not in ("dask", "ray"):
            raise InputError(f"a scheduler was named and the backend {self.backend} has none; add --backend dask or "
                             "ray, or leave out --scheduler")

    @property
    def at_once(self) -> int | None:
        """How many arms run at once; None on a cluster is as many as it has workers."""
        if self.jobs is not None: return self.jobs
        if self.backend == "sequential": return 1
        if self.backend == "torchrun": return processes()
        if self.backend != "loky": return None
        if named := os.environ.get("NORMS_JOBS"):
            if named.isdecimal() and int(named) > 0: return int(named)
            raise InputError(f"the environment variable NORMS_JOBS is {named!r}; set it to a number of processes, or "
                             "give --jobs")
        return 1 if self.device.startswith("cuda") else cores()


@dataclass
class ImageSettings(Settings):
    """Settings of an experiment that trains on images.

    `data` and `data_dir` are for `experiments.data.load_data`; `limit` cuts the training and validation images. An
    experiment whose networks take images of any shape and number of classes says so by `folders`.

    Raises:
        InputError: a value that makes no sense; a folder of images for an experiment that can't take it.
    """

    folders: ClassVar[bool] = False

    data: str = "auto"
    data_dir: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        self.data = pick_data(self.data, self.folders)
        if self.limit is not None: positive("limit", self.limit)
        super().__post_init__()


@dataclass
class ImageStudySettings(ImageSettings, StudySettings):
    """Settings of a study that trains on images; `convolutions` is what those run on a CPU, a name in `CONVOLUTIONS`.

    Raises:
        InputError: a value that makes no sense.
    """

    convolutions: str = "rule"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.convolutions = pick(self.convolutions, CONVOLUTIONS, "kind of convolutions")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_int(v: object) -> TypeGuard[int]: return isinstance(v, int) and not isinstance(v, bool)


def positive(name: str, v: object) -> None:
    """Raise unless `v`, the setting called `name`, is a positive integer."""
    if not (is_int(v) and v >= 1): raise InputError(f"{name} is {v!r}; it must be a positive integer")


def positive_number(name: str, v: object, such_as: float) -> None:
    """Raise unless `v`, the setting called `name`, is a finite number above 0, such as `such_as`."""
    if not (isinstance(v, (int, float)) and 0 < v < math.inf):
        raise InputError(f"{name} is {v!r}; it must be a positive number such as {such_as}")


def some_once(name: str, values: Iterable[T]) -> tuple[T, ...]:
    """`values` of the setting called `name` as a tuple, after a check that there are some and none twice."""
    values = tuple(values)
    if not values: raise InputError(f"{name} is empty; name at least one")
    twice = [v for v, n in Counter(values).items() if n > 1]
    if twice: raise InputError(f"{name} lists {twice[0]!r} twice; name each once")
    return values


def choose(names: Iterable[str], known: Collection[str], what: str) -> tuple[str, ...]:
    """`names` as `known` spells them, each once; `what` is the kind of thing, such as "norm"."""
    return some_once(f"{what}s", (pick(n, known, what) for n in names))


# --- the command line ---------------------------------------------------------------------------------------------

def parse_seeds(text: str) -> tuple[int, ...]:
    """'3' is the seeds 0, 1, 2; '0,4' is these two; '7,' is the seed 7 alone."""
    try: numbers = [int(t) for t in text.split(",") if t.strip()]
    except ValueError: numbers = []
    if not numbers or ("," not in text and not 1 <= numbers[0] <= 1000):
        raise InputError(f"seeds is {text!r}; give a number of seeds (3 means 0, 1 and 2) or a list such as 0,4 or 7,")
    return tuple(numbers) if "," in text else tuple(range(numbers[0]))


def add_arguments(parser: argparse.ArgumentParser, experiment: str, seeds: int | str = 1, study: bool = True) -> None:
    """Declare the options that every experiment has; `seeds` is the usual number of them, or words for it.

    Without `study` those of `StudySettings` are left out.
    """
    default = str(seeds) if isinstance(seeds, int) else None
    parser.add_argument("--seeds", default=default, metavar="N",
                        help=f"number of seeds, 3 meaning 0, 1 and 2, or a list such as 0,4 or 7, (default: {seeds})")
    parser.add_argument("--out", metavar="DIR", help=f"run folder to make (default: runs/{experiment}/<date>-<time>)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out DIR where it stopped; "
                        "finished arms are not run again")
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto (default), cpu, cuda, cuda:1, ...")
    if not study: return
    parser.add_argument("--jobs", type=int, metavar="N", help="arms that run at once, each on one thread (default: "
                        "$NORMS_JOBS, or as many as cores; 1 on a GPU; on a cluster its workers)")
    parser.add_argument("--backend", default="loky", metavar="NAME", help="where arms run: loky (default), processes "
                        "of this machine; sequential, this process; dask or ray, a cluster; torchrun, the "
                        "processes that it has started (the default there)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of the cluster, such as tcp://HOST:8786")


def add_image_arguments(parser: argparse.ArgumentParser, experiment: str, seeds: int | str = 1,
                        auto: str = "MNIST if it is there, else scikit-learn's digits", study: bool = True,
                        folders: bool = False) -> None:
    """Declare the options of an experiment on images; `auto` says what `--data auto` takes, `folders` as in settings.
    """
    folder = "folder:DIR (DIR/train/CLASS/*.jpg and DIR/val/..., all of one size, decoded once), "
    parser.add_argument("--data", default="auto", metavar="NAME",
                        help=f"{', '.join(n for n in NAMES if n != 'auto')}, {folder * folders}or auto (default): "
                             f"{auto}")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that holds MNIST/raw/ or FashionMNIST/raw/ (default: "
                        "$NORMS_DATA_DIR, the user's cache, then a download into it)")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N training images only, and at most N "
                        "validation images (default: all)")
    add_arguments(parser, experiment, seeds, study)
    if study:
        parser.add_argument("--convolutions", default="rule", metavar="NAME", help="on a CPU: onednn, own (torch's "
                            "own), measured (the faster one on the first batch, so not the same every time), or rule "
                            f"(default): {convolutions_in_words('rule')}")


def add_choice(parser: argparse.ArgumentParser, option: str, known: Collection[str]) -> None:
    """Declare `--option`, a choice among the names `known`, separated by spaces or commas; all of them by default."""
    parser.add_argument(f"--{option}", nargs="+", default=list(known), metavar=option.upper().rstrip("S"),
                        help=f"arms, separated by spaces or commas (default: all of {', '.join(known)})")


def from_args(args: argparse.Namespace) -> dict[str, Any]:
    """Parsed options as arguments of a config."""
    choices = {k: [n for word in v for n in (word.split(",") if isinstance(word, str) else [word]) if n != ""]
               for k, v in vars(args).items() if isinstance(v, list)}
    return {**vars(args), **choices, "seeds": None if args.seeds is None else parse_seeds(args.seeds)}
