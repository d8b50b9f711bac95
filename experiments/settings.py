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
from experiments.errors import InputError, brief, pick
from experiments.study.executors import BACKENDS
from experiments.study.torchrun import processes
from experiments.training import CONVOLUTIONS, convolutions_in_words

T = TypeVar("T")

MOST = 10**9                    # of whatever is counted: beyond it nothing ends, and torch's integers overflow
MOST_RATE = 3.4e38              # a rate becomes a float32: torch raises above the largest one
LEAST_RATE = 1.2e-38            # and below the least normal one a step is 0 or has no digits left


@dataclass
class Settings:
    """Settings of every experiment.

    `seeds` is a list; `out` is the run folder, None for `runs/<experiment>/<date>-<time>`; `device` is what
    `pick_device` takes, and what it gives from `__post_init__` on. `resume` goes on with the run in `out` where it
    stopped, and begins it where there is none.

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
        for seed in self.seeds: check_seed(seed)
        self.device = pick_device(self.device)


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
            if named.isdecimal() and len(named) < 10 and int(named) > 0: return int(named)
            raise InputError(f"the environment variable NORMS_JOBS is {brief(named)}; set it to a number of processes, "
                             "or give --jobs")
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


def positive(name: str, v: object, such_as: int | None = None, most: int = MOST) -> None:
    """Raise unless `v`, the setting called `name`, is an integer from 1 to `most`, such as `such_as`."""
    if is_int(v) and 1 <= v <= most: return
    example = "" if such_as is None else f" such as {such_as}"
    need = f"at most {most:,}" if is_int(v) and v > most else f"a positive integer{example}"
    raise InputError(f"{name} is {brief(v)}; it must be {need}")


def positive_number(name: str, v: object, such_as: float) -> None:
    """Raise unless `v`, the setting called `name`, is a number above 0 that float32 holds, such as `such_as`."""
    if isinstance(v, (int, float)) and not isinstance(v, bool) and LEAST_RATE <= v <= MOST_RATE: return
    too = isinstance(v, (int, float)) and 0 < v < math.inf
    range_ = f" from {LEAST_RATE:.2g} to {MOST_RATE:.2g}, which float32 holds," if too else ""
    raise InputError(f"{name} is {brief(v)}; it must be a positive number{range_} such as {such_as}")


def check_seed(seed: object, what: str = "seed") -> None:
    """Raise unless `seed` is one of torch's generators' that all parts of this library take."""
    if not (is_int(seed) and 0 <= seed < 2**32):
        raise InputError(f"{what} {brief(seed)} makes no sense; seeds are integers from 0 to 2^32 - 1")


def pick_device(name: object) -> str:
    """The device that `name` means: "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda" or "cuda:1".

    Of torch's other devices (mps, xpu, ...) none is taken: some figures are summed in float64, which not all of them
    have, and nothing here was ever tried on one.

    Raises:
        InputError: another device, a GPU that isn't there, or no device at all.
    """
    text = str(name).strip().lower()
    if text == "auto": return "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, number = text.partition(":")
    if kind not in ("cpu", "cuda"):
        try: known = torch.device(kind).type == kind
        except RuntimeError: known = False
        if not known: raise InputError(f"unknown device {brief(name)}; use auto, cpu or cuda")
        raise InputError(f"device {brief(name)} is one of torch's on which the experiments do not run (they were tried "
                         "on CPUs and on CUDA GPUs, and sum some figures in float64, which mps lacks); use auto, cpu "
                         "or cuda")
    if colon and not (number.isascii() and number.isdecimal() and len(number) < 5):
        raise InputError(f"unknown device {brief(name)}; after {kind}: stands the number of one, as in cuda:1")
    if kind == "cpu":
        if colon and int(number): raise InputError(f"device {brief(name)} makes no sense: the CPU is one device; use "
                                                   "cpu")
        return "cpu"
    there = torch.cuda.device_count()
    if int(number or 0) >= there:
        raise InputError(f"device {brief(name)} was asked for and torch sees {there} GPUs; use cpu, or auto")
    return f"cuda:{int(number)}" if colon else "cuda"


def some_once(name: str, values: Iterable[T]) -> tuple[T, ...]:
    """`values` of the setting called `name` as a tuple, after a check that there are some and none twice."""
    values = tuple(values)
    if not values: raise InputError(f"{name} is empty; name at least one")
    twice = [v for v, n in Counter(values).items() if n > 1]
    if twice: raise InputError(f"{name} lists {brief(twice[0])} twice; name each once")
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
        raise InputError(f"seeds is {brief(text)}; give a number of seeds (3 means 0, 1 and 2) or a list such as 0,4 "
                         "or 7,")
    return tuple(numbers) if "," in text else tuple(range(numbers[0]))


def add_arguments(parser: argparse.ArgumentParser, experiment: str, seeds: int | str = 1, study: bool = True) -> None:
    """Declare the options that every experiment has; `seeds` is the usual number of them, or words for it.

    Without `study` those of `StudySettings` are left out.
    """
    default = str(seeds) if isinstance(seeds, int) else None
    parser.add_argument("--seeds", default=default, metavar="N",
                        help="number of seeds, 3 meaning 0, 1 and 2, or a list: 0,4 or, of one seed, \"7,\" "
                        f"(default: {seeds})")
    parser.add_argument("--out", metavar="DIR", help=f"run folder to make (default: runs/{experiment}/<date>-<time>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out DIR where it stopped; "
                        "finished arms are not run again")
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto (default: a CUDA GPU if there is one), "
                        "cpu, cuda, cuda:1, ...; no other devices of torch")
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
