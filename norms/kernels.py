"""The kernels of `norms/kernels.c`, which the installation compiles; without them the norms use torch's.

A training step of running batch norm is some twenty calls of torch's kernels, 1 to 6 us each: at batch size 2 they are
its time. Here it is two calls, one each way. They know one thread, on which they are about as fast as torch's on two
or faster (batches of 32 to 512, the maps of the five-layer network). So they are for that many threads, and with more
for inputs that torch, too, would give to one of them as a whole.

`AVAILABLE` says whether there are any: not without a C compiler at the time of the installation, nor where the
environment variable `NORMS_KERNELS` is 0 at the time of the import.
"""

import ctypes
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

GRAIN = 32768   # values; torch's own kernels give a thread no fewer (at::internal::GRAIN_SIZE)
THREADS = 2     # of torch's, to which one of ours comes up

_ORDINARY = (nn.Parameter, torch.Tensor)
_POINTERS_INTS_FLOATS = {"batch_norm": (8, 3, 2), "running_batch_norm": (9, 3, 5), "channel_backward": (7, 3, 1),
                         "group_norm": (5, 6, 1), "group_backward": (7, 6, 0)}


def load(folder=Path(__file__).parent):
    """The kernels in `folder` by their tensors' dtype, `{dtype: namespace of functions}`; {} if there are none."""
    files = [f for suffix in EXTENSION_SUFFIXES if (f := folder / f"_kernels{suffix}").exists()]
    if not files or os.environ.get("NORMS_KERNELS") == "0": return {}
    try: library = ctypes.CDLL(str(files[0]))
    except OSError: return {}                                           # of another system, or half-written
    found = {}
    for dtype, name in ((torch.float32, "float"), (torch.float64, "double")):
        found[dtype] = SimpleNamespace()
        for f, (pointers, ints, floats) in _POINTERS_INTS_FLOATS.items():
            function = getattr(library, f"{f}_{name}")
            function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * ints + [ctypes.c_double] * floats
            function.restype = None
            setattr(found[dtype], f, function)
    return found


KERNELS = load()
AVAILABLE = bool(KERNELS)


def kernels_for(x, size=0, *tensors):
    """The kernels for a training step on `x`, an ordinary tensor on a CPU; None if torch's are to be used.

    `x` must be contiguous or channels last. The kernels work on bare memory: so of the parameters and buffers that a
    step reads or writes besides, those of `size` values come here as `tensors`, and must be as `ordinary` demands.
    """
    kernels = KERNELS.get(x.dtype)
    large = x.numel() > GRAIN and torch.get_num_threads() > THREADS
    if kernels is None or large or not (x.is_contiguous() or channels_last(x)): return None
    dtype = x.dtype
    for t in tensors:                                                   # `ordinary`, without a call for each
        if not (type(t) in _ORDINARY and t.dtype is dtype and t.numel() == size and t.is_cpu and t.is_contiguous()):
            return None
    return kernels


def channels_last(x):
    """Whether `x` `(N, C, H, W)` is laid out `(N, H, W, C)`."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def ordinary(t, dtype, size):
    """Whether `t` is a plain, contiguous tensor on a CPU of this dtype and so many values."""
    return type(t) in _ORDINARY and t.dtype is dtype and t.numel() == size and t.is_cpu and t.is_contiguous()
