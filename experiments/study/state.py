"""What a trial may change in its process: each begins with the same, and what the process had before comes back."""

import contextlib
import gc
import locale
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

# What reads a setting, and what sets it to what was read.
_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


@contextlib.contextmanager
def own_state(key: str, *, here: bool) -> Iterator[None]:
    """One thread, and random numbers that begin at the trial's key, whatever ran in this process before it.

    Put back afterwards: torch's default dtype and device, threads, gradients, determinism, precision, denormals and
    backends' flags; numpy's errors and printing; the working directory, environment, file mask, limits, import path,
    arguments, warning filters, logging, locale, recursion limit, garbage collection and signal handlers. With `here`,
    in the user's own process, the random numbers too. What else a trial changes, as an attribute of a module, stays
    until the process ends.
    """
    import numpy as np
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for read, put in (*_of_torch(), *_of_numpy(), *_of_python()):
            stack.callback(_put_back, read, put, read())
        if here:
            stack.callback(torch.set_rng_state, torch.get_rng_state())
            stack.callback(random.setstate, random.getstate())
            stack.callback(np.random.set_state, np.random.get_state())
        seed = int(key[:8], 16)
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


def left_behind(threads: Collection[threading.Thread]) -> bool:
    """Whether the trial that has ended left something running: other threads than `threads`, or processes.

    The next trial gets another process then, where that can be had.
    """
    if set(threading.enumerate()) - set(threads) or torch.is_inference_mode_enabled(): return True
    if not hasattr(os, "waitid"): return bool(multiprocessing.active_children())
    try: os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError: return False
    return True


def _put_back(read: Callable[[], Any], put: Callable[[Any], Any], before: Any) -> None:
    # What fails here (a folder that the trial has removed, a limit that it made final) fails the next trial, if at all.
    with contextlib.suppress(Exception):
        if read() != before: put(before)


def _of_python() -> Iterator[_Setting]:
    root = logging.getLogger()

    def put_environment(before: dict[str, str]) -> None:
        for name in os.environ.keys() - before.keys(): del os.environ[name]
        os.environ.update(before)

    def put_logging(before: tuple[list[logging.Handler], int, int]) -> None:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        logging.disable(before[2])

    def put_list(there: list[str]) -> Callable[[list[str]], None]:
        def put(before: list[str]) -> None: there[:] = before
        return put
    yield os.getcwd, os.chdir
    yield lambda: dict(os.environ), put_environment
    yield _mask, os.umask
    yield lambda: list(sys.path), put_list(sys.path)
    yield lambda: list(sys.argv), put_list(sys.argv)
    yield lambda: (list(root.handlers), root.level, root.manager.disable), put_logging
    yield lambda: locale.setlocale(locale.LC_ALL), lambda before: locale.setlocale(locale.LC_ALL, before)
    yield sys.getrecursionlimit, sys.setrecursionlimit
    yield gc.isenabled, lambda before: gc.enable() if before else gc.disable()
    yield (lambda: multiprocessing.get_start_method(allow_none=True),
           lambda before: multiprocessing.set_start_method(before, force=True))
    if threading.current_thread() is threading.main_thread():
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP} if os.name == "posix" else ():
            if signal.getsignal(number) is not None: yield _handler(number)
    try:
        import resource
    except ImportError: return          # Windows
    for name in ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_STACK"):
        if hasattr(resource, name): yield _limit(resource, getattr(resource, name))


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _handler(number: int) -> _Setting:
    return lambda: signal.getsignal(number), lambda before: signal.signal(number, before)


def _limit(resource: Any, which: int) -> _Setting:
    return lambda: resource.getrlimit(which), lambda before: resource.setrlimit(which, before)


def _of_numpy() -> Iterator[_Setting]:
    import numpy as np
    yield np.geterr, lambda before: np.seterr(**before)
    yield np.get_printoptions, lambda before: np.set_printoptions(**before)


def _of_torch() -> Iterator[_Setting]:
    def put_determinism(before: int) -> None:
        # The former imports inductor, which takes seconds, to set it too.
        if "torch._inductor.config" in sys.modules: torch.use_deterministic_algorithms(before > 0, warn_only=before < 2)
        else: torch.set_deterministic_debug_mode(before)

    def put_anomaly(before: tuple[bool, bool]) -> None: torch.autograd.set_detect_anomaly(*before)
    yield torch.get_default_dtype, torch.set_default_dtype
    yield torch.get_default_device, _put_device
    yield torch.get_num_threads, torch.set_num_threads
    yield torch.is_grad_enabled, torch.set_grad_enabled
    yield torch.get_deterministic_debug_mode, put_determinism
    yield lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()), put_anomaly
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield _flushes_denormals, torch.set_flush_denormal
    for device in ("cpu", "cuda"): yield _autocast(device)
    mkldnn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    # Not by the attributes, which can't be set after `torch.backends.disable_global_flags`.
    yield lambda: (mkldnn.enabled, mkldnn.deterministic), lambda before: mkldnn.set_flags(*before)
    yield (lambda: (cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic),
           lambda before: cudnn.set_flags(*before))


def _put_device(before: torch.device) -> None:
    # None and not "cpu" where that is it: a default device is a mode, which makes each call of torch slower.
    torch.set_default_device(None if before.type == "cpu" else before)


def _flushes_denormals() -> bool:
    # A float of Python's, multiplied by torch: that alone tells.
    return not (torch.tensor([1e-310], dtype=torch.float64, device="cpu") * 1).item()


def _autocast(device: str) -> _Setting:
    def put(before: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
    return lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), put
