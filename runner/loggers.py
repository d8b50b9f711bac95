"""Loggers: `CSVLogger` writes the history to a file while it grows, `TensorBoardLogger` for TensorBoard."""

import csv
import io
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.events import Callback
from runner.files import replacing, require_folder
from runner.insight.stats import Described
from runner.metrics import AvgStatsCallback
from runner.monitors import statistics_of
from runner.ranks import ranks_of
from runner.stateful import Stateful


class CSVLogger(Callback):
    """Writes the rows of `AvgStatsCallback` to a CSV file, each at the end of its epoch.

        for epoch in range(epochs):
            row = train_and_validate()
            with open(path, "a") as f: csv.DictWriter(f, header).writerow(row)

        run = Runner([AvgStatsCallback(accuracy), CSVLogger("history.csv")])
        run.fit(5, learn)
        # epoch,train_loss,train_accuracy,valid_loss,valid_accuracy,seconds
        # 0,0.61,0.82,0.35,0.9,4.2

    A row is in the file before the next epoch begins, and what a crash leaves can be read and added to. `float` reads
    every number back as it was. The file keeps its header. A column that comes later is added at the right: then the
    file is written anew, and at no time half-written. Cells are empty where a row lacks the column. A fit that is
    resumed begins with the file as it was at the checkpoint.

    Args:
        path: the file.
        append: whether a fit adds its rows to those that the file has, of an earlier fit or program; False begins the
            file anew at each fit.

    Raises:
        ValueError: at the start of a fit, a runner without `AvgStatsCallback`, a folder that doesn't exist.
    """

    _order = 100        # after whoever adds to the row
    fit_only = True

    def __init__(self, path: str | os.PathLike[str] = "history.csv", append: bool = True) -> None:
        self.path, self.append = Path(path), append

    def begin_fit(self) -> None:
        statistics_of(self.run, self)
        require_folder(self.path, "CSVLogger")
        if not self.append and ranks_of(self.run).leads: self.path.unlink(missing_ok=True)

    def after_epoch(self) -> None:
        if ranks_of(self.run).leads: add_row(self.path, statistics_of(self.run, self).history[-1])

    def state_dict(self) -> dict[str, Any]:
        """The file's contents."""
        return {"file": self.path.read_bytes() if self.path.exists() else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the file back: the rows that came after are going to be written again."""
        if not ranks_of(self.run).leads: return
        if state["file"] is None: self.path.unlink(missing_ok=True)
        elif not self.path.exists() or self.path.read_bytes() != state["file"]:
            with replacing(self.path) as part: part.write_bytes(state["file"])


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add `row` to the CSV file at `path`, which is made or gets further columns where it needs them."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    table = list(csv.reader(io.StringIO(text, newline="")))
    header = table[0] if table else []
    columns = [*header, *(name for name in row if name not in header)]
    cells = [row.get(name, "") for name in columns]
    if header == columns:
        with path.open("a", newline="", encoding="utf-8") as f:
            if not text.endswith("\n"): f.write("\n")               # a crash broke the last line off
            csv.writer(f, lineterminator="\n").writerow(cells)
        return
    filled = (line + [""] * (len(columns) - len(line)) for line in table[1:])
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([columns, *filled, cells])


class TensorBoardLogger(Stateful):
    """Writes what TensorBoard shows: losses and rates of the batches, the history, histograms, figures.

        for i, (xb, yb) in enumerate(train_dl): writer.add_scalar("batch/loss", train(xb, yb), i)
        for name, value in validate().items(): writer.add_scalar(f"epoch/{name}", value, epoch)
        writer.add_figure("means", figure(), epoch)

        stats = ActivationStats(nn.Conv2d, every=10)
        run = Runner([AvgStatsCallback(accuracy), stats, TensorBoardLogger("runs/1", figures={"means": lambda run:
                      run.activation_stats.plot()})])
        run.fit(5, learn)                       # tensorboard --logdir runs

    - `batch/loss` and `batch/lr` (`batch/lr_0`, ... of several parameter groups) of every `every`-th training batch,
      against the number of the training batch. The losses come to the host 256 at a time and at the end of a pass.
    - `epoch/valid_loss` and so on, all numbers of the history of `AvgStatsCallback` if there is one, against the epoch.
    - The histograms of `ActivationStats`, `GradientStats` and `ParameterStats` in the runner, as
      `activation_stats/0.1/train`, against the step; of a module at most `histograms` evenly spaced ones per epoch.
    - `figures`, at the end of each epoch.

    A further fit goes on counting, in another file in the same folder. A fit that is resumed goes on in another file
    too, and those from before end where the checkpoint was; a TensorBoard that is running shows what they had there
    until it is reloaded. It needs the package tensorboard: `pip install 'runnernorms[tensorboard]'`.

    Args:
        folder: for the event files; it is made if it doesn't exist.
        every: one in so many training batches.
        figures: functions `f(run)` under their names, that draw a figure: it or its axes are what they return, as the
            functions of `runner.plots` do. The figure is closed. Of several each is written, as `name/1`, `name/2`, ...
        histograms: see above; 0 for none.

    Raises:
        ImportError: at the start of a fit, without tensorboard.
        ValueError: an argument out of its range.
    """

    _order = 120        # after the callbacks of which it writes the numbers
    fit_only = True
    _saved = "batches", "rounds", "begun", "_fit"

    def __init__(self, folder: str | os.PathLike[str] = "runs", every: int = 1, *,
                 figures: Mapping[str, Callable[[Any], Any]] | None = None, histograms: int = 20) -> None:
        for name, n, least in (("every", every, 1), ("histograms", histograms, 0)):
            if not isinstance(n, int) or isinstance(n, bool) or n < least:
                raise ValueError(f"TensorBoardLogger: {name} is {n!r}; it must be an integer of at least {least}")
        self.folder, self.every, self.figures, self.histograms = Path(folder), every, dict(figures or {}), histograms
        self.writer: Any = None
        self.batches = self.rounds = 0      # training batches and epochs so far, of all fits
        self._fit = ""                      # in the names of its files
        self._waiting: list[tuple[int, float, Tensor, list[float]]] = []

    def begin_fit(self) -> None:
        self._fit = uuid.uuid4().hex[:8]        # of rank 0's files, who alone has any
        self._open()
        self.begun, self._seen = self.batches, dict[tuple[str, str, str], int]()

    def _open(self) -> None:
        """A file of its own to write to."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ImportError("TensorBoardLogger needs the package tensorboard: pip install "
                              f"'runnernorms[tensorboard]' ({e})") from e
        self._waiting = []
        self.writer = SummaryWriter(os.fspath(self.folder), filename_suffix=f".{self._fit}") \
            if ranks_of(self.run).leads else _Nowhere()

    def _files(self) -> list[Path]:
        """Those of this fit."""
        if not ranks_of(self.run).leads: return []
        return [path for path in self.folder.iterdir() if path.name.endswith(f".{self._fit}")]

    def state_dict(self) -> dict[str, Any]:
        """Where it is in counting, and in this fit's files, which have all that waited."""
        state = {**super().state_dict(), "seen": [[*key, n] for key, n in getattr(self, "_seen", {}).items()]}
        if self.writer is None: return {**state, "files": {}}
        self._fetch()
        self.writer.flush()
        return {**state, "files": {path.name: path.stat().st_size for path in self._files()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state`, without what was written after it: those events are going to come again."""
        self.writer.close()
        opened = self._files() if self._fit != state["_fit"] else []
        super().load_state_dict(state)
        self._seen = {(name, path, phase): n for name, path, phase, n in state["seen"]}
        for path in (*opened, *self._files()):
            size = state["files"].get(path.name)
            if size is None: path.unlink()
            elif size < path.stat().st_size: os.truncate(path, size)
        self._open()

    def after_loss(self) -> None:
        run = self.run
        if not run.in_train or self.batches % self.every: return
        rates = [float(group["lr"]) for group in run.opt.param_groups]
        self._waiting.append((self.batches, time.time(), run.loss.detach() * ranks_of(run).weight, rates))

    def after_batch(self) -> None:
        if not self.run.in_train: return
        self.batches += 1
        if len(self._waiting) >= 256: self._fetch()

    def begin_validate(self) -> None: self._fetch()

    def _fetch(self) -> None:
        """Bring the losses that wait on the device to the host, in one transfer, and write them."""
        waiting, self._waiting = self._waiting, []
        if not waiting: return
        losses = ranks_of(self.run).sum(torch.stack([loss for _, _, loss, _ in waiting])).tolist()
        for (step, at, _, rates), loss in zip(waiting, losses, strict=True):
            self.writer.add_scalar("batch/loss", loss, step, at)
            for i, lr in enumerate(rates):
                self.writer.add_scalar("batch/lr" if len(rates) == 1 else f"batch/lr_{i}", lr, step, at)

    def after_epoch(self) -> None:
        run, epoch = self.run, self.rounds
        self._fetch()
        self.rounds += 1
        for cb in run.cbs:
            if isinstance(cb, AvgStatsCallback):
                for name, value in cb.history[-1].items():
                    if name != "epoch" and isinstance(value, (int, float)):
                        self.writer.add_scalar(f"epoch/{name}", value, epoch)
            if isinstance(cb, Described) and self.histograms: self._write_histograms(cb)
        for name, draw in self.figures.items() if ranks_of(run).leads else ():
            found = figures_of(draw(run))
            for i, figure in enumerate(found, 1):
                self.writer.add_figure(name if len(found) == 1 else f"{name}/{i}", figure, epoch)
        self.writer.flush()

    def _write_histograms(self, cb: Described) -> None:
        """The histograms that `cb` has taken since the last time."""
        for path in cb.paths:
            for phase in cb.phases:
                steps, *columns = cb.series(path, "mean", "std", "low", "high", "hist", phase=phase)
                seen = self._seen.get((cb.name, path, phase), 0)
                self._seen[cb.name, path, phase] = len(steps)
                new = range(seen, len(steps), max(1, -(-(len(steps) - seen) // self.histograms)))
                for i in new:
                    mean, std, low, high, counts = (column[i] for column in columns)
                    n = sum(counts)
                    if not n: continue                          # its mean wasn't finite
                    width = (high - low) / len(counts)
                    self.writer.add_histogram_raw(
                        f"{cb.name}/{path or 'model'}/{phase}", low, high, n, mean * n, (std * std + mean * mean) * n,
                        [low + width * (k + 1) for k in range(len(counts))], counts, self.begun + steps[i])

    def after_fit(self) -> None:
        """Write what still waits and close the file, whatever ended the fit."""
        writer = self.writer
        if writer is None: return                               # it couldn't be made
        try: self._fetch()
        finally:
            self.writer, self._waiting = None, []
            writer.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no file open; it goes on counting where this one is."""
        return {**super().__getstate__(), "writer": None, "_waiting": []}


class _Nowhere:
    """The writer of a process that doesn't write."""

    def __getattr__(self, name: str) -> Any: return lambda *args, **kwargs: None


def figures_of(drawn: Any) -> list[Any]:
    """The figures that `drawn` is, or that its axes are on: one or several, in lists, arrays or dicts; each once."""
    if hasattr(drawn, "savefig"): return [drawn]
    if hasattr(drawn, "figure"): return figures_of(drawn.figure)
    parts = drawn.values() if isinstance(drawn, dict) else getattr(drawn, "flat", drawn)
    if (not isinstance(drawn, (dict, list, tuple)) and not hasattr(drawn, "flat")) or not len(drawn):
        raise TypeError(f"TensorBoardLogger: a function in figures gave {drawn!r}; it must give a figure or axes")
    return list(dict.fromkeys(figure for part in parts for figure in figures_of(part)))
