"""Freed memory stays with the process: a training step allocates what the step before has freed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # of malloc.h
LARGEST = 32 << 20                              # bytes; the largest threshold for mmap that glibc takes
NEVER = 2**31 - 1


def keep_memory() -> bool:
    """Let malloc keep what is freed, in this process and from now on; whether that could be had (by glibc).

    Otherwise it gives large blocks back to the system after each step and asks for them again in the next, and the
    system clears every page: a fifth of the time of a step of five of the lab's residual networks side by side.
    """
    if not sys.platform.startswith("linux"): return False
    try: mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError): return False          # musl has none
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER))
