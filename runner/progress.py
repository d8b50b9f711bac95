"""`ProgressCallback`: a live bar where somebody looks, plain lines where nobody does."""

import sys
import time
from functools import partial
from typing import Any

from runner.console import columns, encodes, fitted, is_terminal, say
from runner.events import Callback


def format_time(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def _in_notebook() -> bool:
    """Whether a Jupyter kernel (not a terminal IPython) runs this."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


def _format(name: str, value: Any) -> str:
    if name == "seconds": return format_time(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bar_line(prefix: str, text: str, share: float, width: int, fill: str = "█") -> str:
    """A bar between its `prefix` and its `text`, "50.00% [1/2 00:01<00:02]", that fits in `width`.

    Where there is no room for all, the bar goes first, then the times, the beginning of the prefix, all of it, and the
    counts: what stays is whole.
    """
    whole = f"{prefix} || {text}"
    if (room := width - len(whole)) >= 0:
        full = int(room * share)
        return f"{prefix} |{fill * full}{'-' * (room - full)}| {text}"
    shorter = text.partition(" ")[0] if "%" in text else ""         # 50.00%
    counts = text.rsplit(" ", 1)[0] + "]" if " " in text else text  # 50.00% [1/2]
    last = " ".join(prefix.split()[-2:])                            # epoch 1/2, without the label
    forms = f"{prefix} {text}", f"{prefix} {counts}", f"{last} {counts}", counts, shorter
    return next((form for form in forms if len(form) <= width), "")


class ProgressCallback(Callback):
    """Shows how far a fit has come.

    In a terminal or a notebook: a live bar with elapsed and remaining time, and after each epoch a row of the table
    of `AvgStatsCallback`'s statistics (fastprogress draws both). Where the output is not a terminal (a file, any object
    with `write`, None): one plain line per epoch, without carriage returns.

    In a narrow terminal the bar leaves out what has no room, and plain lines, broken between their entries, take the
    place of the table. Elsewhere lines are broken if the environment says how wide they may be (`COLUMNS`).

    Args:
        label: text put before every line and bar, such as the name of the run.
        live: True or False to force one of the two; None looks at the output.
    """

    _order = 10  # after the callbacks whose rows it shows
    fit_only = True

    def __init__(self, label: str = "", live: bool | None = None) -> None:
        self.label, self.live = label, live
        self.bars: Any = None
        self.bar: Any = None
        self.row: dict[str, Any] | None = None
        self.batch = self._past = 0             # batches of this pass, while there is a bar; epochs that are over

    def begin_fit(self) -> None:
        self.row, self.table, self._past = None, False, 0
        self.run.logger = self.take
        live = self.live if self.live is not None else (_in_notebook() or is_terminal())
        if live and self.epochs:
            import fastprogress.fastprogress as fp
            names = ("NBMasterBar", "NBProgressBar") if _in_notebook() else ("ConsoleMasterBar", "ConsoleProgressBar")
            master, self.bar_class = (getattr(fp, n) for n in names)
            self.bars = master(range(self.epochs))
            self.bars.update(0)

    def take(self, row: dict[str, Any]) -> None:
        """Called with each epoch's row of statistics."""
        self.row = row

    def _begin_pass(self, what: str) -> None:
        if self.bars is None: return
        total = self.run.iters or "noinfer"     # fastprogress's word for: nobody knows
        self.batch, self.bar = 0, self.bar_class(range(0), total=total, parent=self.bars, leave=False)
        if hasattr(self.bar, "prefix"):  # the console's; a notebook's has a comment
            self.bar.prefix = f"{self.label} {what} {self.epoch + 1}/{self.epochs}".strip()
            self.bar.on_update, self.bar.on_iter_end = partial(_draw, self.bar), partial(_wipe, self.bar)
        else: self.bar.comment = f"{self.label} {what}".strip()
        self.bar.update(0)

    def begin_epoch(self) -> None:
        self.row, self.epoch_start, self._past = None, time.perf_counter(), self.epoch
        self._begin_pass("epoch")

    def begin_validate(self) -> None: self._begin_pass("validation")

    def after_batch(self) -> None:
        if self.bar is None: return
        self.batch += 1
        if self.bar.total is None or self.batch <= self.bar.total: self.bar.update(self.batch)

    def _clear(self) -> None:
        """End the bar of the pass that is over, or was broken off, and wipe its line."""
        if self.bar is None: return
        self.bar.on_iter_end()
        self.bar = None

    def after_epoch(self) -> None:
        self._clear()
        self._past = self.epoch + 1
        row = self.row or {"seconds": time.perf_counter() - self.epoch_start}
        # The epoch of this fit: that of the row counts on from the fits before.
        cells = {"epoch": str(self.epoch + 1)} | {
            ("time" if k == "seconds" else k): _format(k, v) for k, v in row.items() if k != "epoch"}
        width = columns()
        wide = width is None or _table_width(cells) <= width
        if self.bars is None or not (wide or self.table or _in_notebook()):
            epoch = cells.pop("epoch")
            head = f"{self.label + ': ' if self.label else ''}epoch {epoch}/{self.epochs}"
            say(fitted([head, *(f"{k} {v}" for k, v in cells.items())], width))
            if self.bars is not None: self.bars.update(self.epoch + 1)
            return
        if not self.table:
            if self.label: self.bars.write(self.label)
            self.bars.write(list(cells), table=True)
        self.table = True
        self.bars.write(list(cells.values()), table=True)
        self.bars.update(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """How far the bars are, and the seconds: of this epoch, and of the bar of all."""
        seconds = time.perf_counter() - getattr(self, "epoch_start", time.perf_counter())
        main = self.bars and self.bars.main_bar
        return {"epochs": self._past, "batch": self.batch, "row": self.row, "seconds": seconds,
                "all_seconds": time.time() - main.start_t if main else seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; what was printed is not printed again."""
        self._past, self.batch, self.row = state["epochs"], state["batch"], state["row"]
        self.epoch_start = time.perf_counter() - state["seconds"]
        if self.bars is not None:
            self.bars.main_bar.start_t = time.time() - state["all_seconds"]
            if self._past: self.bars.update(self._past)
        if self.bar is None: return
        self.bar.start_t = time.time() - state["seconds"]
        if self.batch and (self.bar.total is None or self.batch <= self.bar.total): self.bar.update(self.batch)

    def after_fit(self) -> None:
        self.run.logger = None
        self._clear()
        if self.bars is not None: self.bars.on_iter_end()
        self.bars = None


def _table_width(cells: dict[str, str]) -> int:
    """How wide fastprogress makes a row of its table in a console."""
    return sum(max(len(name), len(value), 8) + 2 for name, value in cells.items()) - 2


def _draw(bar: Any, val: int, text: str) -> None:
    """In the place of fastprogress's own, which takes 60 columns for granted."""
    if not bar.display: return
    width = min(columns() or 100, 160) - 1      # in the last column some terminals begin a new line
    share = val / bar.total if bar.total else 0.0
    line = "\r" + bar_line(bar.prefix, text, min(share, 1.0), width, bar.fill if encodes(bar.fill) else "#")
    # A line shorter than the one before would leave its end standing.
    line, bar.max_len = line.ljust(min(bar.max_len, width + 1)), max(len(line), bar.max_len)
    print(line, end="", flush=True)


def _wipe(bar: Any) -> None:
    """In the place of fastprogress's own, which leaves the prefix, of any length."""
    print("\r" + " " * (bar.max_len - 1), end="\r", flush=True)
