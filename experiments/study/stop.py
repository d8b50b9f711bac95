"""Ctrl-C and SIGTERM while a study waits for its workers: noted at once, and acted upon where nothing is half done."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Stop:
    """While the block runs, the first Ctrl-C or SIGTERM is noted, and more of them are the same one.

        with Stop() as stop:
            while working:
                wait(0.2)
                stop.check()

    Python would raise KeyboardInterrupt anywhere: while a worker starts, which nobody then knows, or where the
    exception is ignored, as in a finalizer, so that the study would go on. Other handlers than Python's own stay, and
    outside the main thread, where no signal arrives, nothing is done.
    """

    def __init__(self) -> None:
        self.got: signal.Signals | None = None
        self.acted = False
        self._before: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has arrived."""
        if self.got is None: return
        self.acted = True
        raise KeyboardInterrupt(*([self.got.name] if self.got != signal.SIGINT else []))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.got is None: self.got = signal.Signals(number)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread(): return self
        for number, ours in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is ours: self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        for number, before in self._before.items(): signal.signal(number, before)
        if kind is None and not self.acted: self.check()        # too late for the block, not for its caller


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A process started in this block gets no Ctrl-C, which a terminal sends to it too, until it calls `let_in`.

    For this process the signal isn't lost: another thread, or this one after the block, takes it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try: yield
    finally: signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_in() -> None:
    """Let Ctrl-C in that `held_back` kept away; one that has come until now is forgotten."""
    if not hasattr(signal, "pthread_sigmask"): return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
