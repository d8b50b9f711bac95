"""The progress of a study: one line for all workers, rewritten in a terminal; elsewhere a line now and then."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from runner.console import columns, fitted, is_terminal, shortened
from runner.progress import format_time

EVERY, MOST = 10.0, 60.0        # seconds between two plain lines, at first and later


class Display:
    """While the block runs: how many trials of `total` are finished, running and failed, and the time left.

    Args:
        before: how many were finished already.
        running: says how many are running now.
        show: print nothing if False.
    """

    def __init__(self, name: str, total: int, before: int, running: Callable[[], int], show: bool = True) -> None:
        self.name, self.total, self.before, self.running = name, total, before, running
        self.ended = self.failed = 0
        self.start = self.said_at = time.monotonic()
        self.out = sys.stdout if show else None         # a trial in this process may replace it
        self.live, self.width = is_terminal(), columns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def done(self, status: str) -> None:
        """Count a trial that has ended."""
        self.ended += 1
        self.failed += status != "ok"

    def say(self, text: str) -> None:
        """Print `text` above the line."""
        if self.out is None: return
        if self.live: self.out.write("\r" + " " * ((self.width or 80) - 1) + "\r")
        self.out.write(text + "\n")
        if self.live: self._say()
        elif hasattr(self.out, "flush"): self.out.flush()

    @property
    def line(self) -> str:
        """How far the study is."""
        return ", ".join(self.cells)

    @property
    def cells(self) -> list[str]:
        """The parts of `line`."""
        finished, left = self.before + self.ended, self.total - self.before - self.ended
        cells = [f"{self.name}: {finished} of {self.total} finished", f"{min(self.running(), left)} running",
                 f"{self.failed} failed"]
        seconds = time.monotonic() - self.start
        if left and self.ended: cells.append(f"{format_time(seconds * left / self.ended)} left")
        if not left: cells.append(f"took {format_time(seconds)}")
        return cells

    def _watch(self) -> None:
        pause = EVERY
        while not self._stop.wait(0.5 if self.live else pause):
            # Nobody reads it any more, or the disk is full: the study will see, when it has something to say.
            try: self._say()
            except (OSError, ValueError): return
            pause = min(1.5 * pause, MOST)

    def _say(self, end: bool = False) -> None:
        if self.out is None: return
        line = self.line
        if not self.live:
            *first, last = self.cells
            whole = self.width is None or len(line) <= self.width
            self.out.write((line if whole else fitted([*(f"{cell}," for cell in first), last], self.width)) + "\n")
        else:
            width = (self.width or 80) - 1
            self.out.write("\r" + (line if len(line) <= width else shortened(line, width)).ljust(width) + "\n" * end)
        if hasattr(self.out, "flush"): self.out.flush()

    def __enter__(self) -> "Display":
        self._say()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._say(end=True)
