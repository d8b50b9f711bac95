"""`ProgressCallback`: a live bar where somebody looks, plain lines where nobody does."""

import sys
import time

from runner.events import Callback


def format_time(seconds):
    """`m:ss`, or `h:mm:ss` from an hour on."""
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def _in_notebook():
    """Whether a Jupyter kernel (not a terminal IPython) runs this."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


def _format(name, value):
    if name == "seconds": return format_time(value)
    return str(value + 1) if name == "epoch" else f"{value:.4g}" if isinstance(value, float) else str(value)


class ProgressCallback(Callback):
    """Shows how far a fit has come.

    In a terminal or a notebook: a live bar with elapsed and remaining time, and after each epoch a row of the table
    of `AvgStatsCallback`'s statistics (fastprogress draws both). Where the output is not a terminal: one plain line
    per epoch, without carriage returns.

    Args:
        label: text put before every line and bar, such as the name of the run.
        live: True or False to force one of the two; None looks at the output.
    """

    _order = 10  # after the callbacks whose rows it shows

    def __init__(self, label="", live=None):
        self.label, self.live = label, live
        self.bars = self.bar = None

    def begin_fit(self):
        self.row, self.table, self.start = None, False, time.perf_counter()
        self.run.logger = self.take
        live = self.live if self.live is not None else (_in_notebook() or sys.stdout.isatty())
        if live and self.epochs:
            import fastprogress.fastprogress as fp
            names = ("NBMasterBar", "NBProgressBar") if _in_notebook() else ("ConsoleMasterBar", "ConsoleProgressBar")
            master, self.bar_class = (getattr(fp, n) for n in names)
            self.bars = master(range(self.epochs))
            self.bars.update(0)

    def take(self, row):
        """Called with each epoch's row of statistics."""
        self.row = row

    def _begin_pass(self, what):
        if self.bars is None: return
        total = self.iters or "noinfer"     # fastprogress's word for: nobody knows
        self.batch, self.bar = 0, self.bar_class(range(0), total=total, parent=self.bars, leave=False)
        if hasattr(self.bar, "prefix"):  # the console's; a notebook's has a comment
            self.bar.prefix = f"{self.label} {what} {self.epoch + 1}/{self.epochs}".strip()
        else: self.bar.comment = f"{self.label} {what}".strip()
        self.bar.update(0)

    def begin_epoch(self):
        self.row, self.epoch_start = None, time.perf_counter()
        self._begin_pass("epoch")

    def begin_validate(self): self._begin_pass("validation")

    def after_batch(self):
        if self.bar is None: return
        self.batch += 1
        if self.bar.total is None or self.batch <= self.bar.total: self.bar.update(self.batch)

    def _clear(self):
        """End the bar of the pass that is over, or was broken off, and wipe its line."""
        if self.bar is None: return
        if hasattr(self.bar, "prefix"): self.bar.prefix = ""  # else the wiping spares it
        self.bar.on_iter_end()
        self.bar = None

    def after_epoch(self):
        self._clear()
        row = self.row or {"epoch": self.epoch, "seconds": time.perf_counter() - self.epoch_start}
        cells = {("time" if k == "seconds" else k): _format(k, v) for k, v in row.items()}
        if self.bars is None:
            epoch = cells.pop("epoch")
            print(f"{self.label + ': ' if self.label else ''}epoch {epoch}/{self.epochs}  "
                  + "  ".join(f"{k} {v}" for k, v in cells.items()), flush=True)
            return
        if not self.table:
            if self.label: self.bars.write(self.label)
            self.bars.write(list(cells), table=True)
        self.table = True
        self.bars.write(list(cells.values()), table=True)
        self.bars.update(self.epoch + 1)

    def after_fit(self):
        self.run.logger = None
        self._clear()
        if self.bars is not None: self.bars.on_iter_end()
        self.bars = None
