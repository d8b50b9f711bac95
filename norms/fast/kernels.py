"""The kernels of `kernels.c`, which the installation compiles; without them the norms run by their definitions.

A training step of running batch norm is some twenty calls of torch's kernels, 1 to 6 us each: at batch size 2 they are
its time. Here it is two calls, one each way. They know one thread, on which they are about as fast as torch's on two
or faster (batches of 32 to 512, the maps of the five-layer network). So they are for that many threads, and with more
for inputs that torch, too, would give to one of them as a whole.

`AVAILABLE` says whether there are any: not without a C compiler at the time of the installation, nor where the
environment variable `NORMS_KERNELS` is 0 at the time of the import.
"""

import ctypes
import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Kernels: TypeAlias = SimpleNamespace     # the functions of `kernels.c` for one dtype, by their names

GRAIN = 32768   # values; torch's own kernels give a thread no fewer (at::internal::GRAIN_SIZE)
THREADS = 2     # of torch's, to which one of ours comes up
VERSION = 2     # of the functions below, as `kernels.c` has it

_ORDINARY = (nn.Parameter, torch.Tensor)
_POINTERS_INTS_FLOATS = {"evaluate": (6, 3, 1), "batch_norm": (8, 3, 2), "running_batch_norm": (10, 3, 5),
                         "channel_backward": (8, 3, 1), "group_norm": (5, 6, 1), "group_backward": (7, 6, 0),
                         "pair_evaluate": (7, 5, 1), "batch_pair": (8, 5, 2), "running_pair": (10, 5, 5),
                         "pair_backward": (9, 5, 1), "standardize": (3, 2, 1), "standardize_backward": (4, 2, 0)}


def load(folder: Path = Path(__file__).parent) -> dict[torch.dtype, Kernels]:
    """The kernels in `folder` by their tensors' dtype, `{dtype: namespace of functions}`; {} if there are none."""
    files = [file for suffix in EXTENSION_SUFFIXES if (file := folder / f"_kernels{suffix}").exists()]
    if not files or os.environ.get("NORMS_KERNELS") == "0": return {}
    try:
        library = ctypes.CDLL(str(files[0]))
        if library.norms_kernels_version() != VERSION: return {}        # left over from another version of the project
    except (OSError, AttributeError): return {}                         # of another system, half-written, or older
    found = {}
    for dtype, name in ((torch.float32, "float"), (torch.float64, "double")):
        found[dtype] = SimpleNamespace()
        for f, (pointers, ints, floats) in _POINTERS_INTS_FLOATS.items():
            function = getattr(library, f"{f}_{name}", None)
            if function is None: continue           # new since this one was built: what needs it goes by the definition
            function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * ints + [ctypes.c_double] * floats
            function.restype = None
            setattr(found[dtype], f, function)
    return found


KERNELS = load()
AVAILABLE = bool(KERNELS)


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels for a step on `x`, an ordinary tensor on a CPU; None where the definition is to run.

    `x` must be contiguous or channels last.
    """
    kernels = KERNELS.get(x.dtype)
    if kernels is None or (x.numel() > GRAIN and torch.get_num_threads() > THREADS): return None
    return kernels if x.is_contiguous() or channels_last(x) else None


def channels_last(x: Tensor) -> bool:
    """Whether `x` `(N, C, H, W)` is laid out `(N, H, W, C)`."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def ordinary(tensors: Sequence[Any], dtype: torch.dtype, size: int) -> bool:
    """Whether all `tensors` are plain, contiguous, on a CPU, of this dtype and so many values: memory to be used."""
    # Of anything, for it looks at the type first.
    for t in tensors:                                                   # a loop: `all(...)` takes twice as long
        if not (type(t) in _ORDINARY and t.dtype is dtype and t.numel() == size and t.is_cpu and t.is_contiguous()):
            return False
    return True


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """The addresses of the tensors' values; None, C's null pointer, for None."""
    return [None if t is None else t.data_ptr() for t in tensors]


def laid_out_as(t: Tensor, x: Tensor) -> Tensor:
    """`t`, of the shape of `x`, in the memory layout of `x`, which is contiguous or channels last."""
    return t.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
