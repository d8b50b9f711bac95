"""`Profile`: torch's profiler around chosen training batches."""

import os
from typing import Any

import torch

from runner.files import require_folder
from runner.stateful import Stateful


class Profile(Stateful):
    """Records what some training batches do, with torch's profiler, and writes it as a trace.

        for xb, yb in islice(train_dl, 10): train(xb, yb)
        with torch.profiler.profile() as profiler:
            for xb, yb in islice(train_dl, 10, 20): train(xb, yb)
        profiler.export_chrome_trace("trace.json")

    It is used so:

        profile = Profile(steps=(10, 20), path="trace.json")
        run = Runner([profile])
        run.fit(1, learn)
        print(profile.table)                    # and trace.json in chrome://tracing or https://ui.perfetto.dev

    Training batches are counted through the fit, from 0, also those without a step of the optimizer. Each is a range
    of the trace, "batch 12", from its `begin_batch` to the next one's: the batch, the callbacks and the wait for the
    next. The trace ends with the last chosen batch or with the fit, whatever ends it; where the chosen batches span the
    end of an epoch, validation is in it. Let some batches pass first: the first ones allocate, and compile. In a fit
    that is resumed amid the chosen batches the trace has the rest of them.

    Args:
        steps: the first batch and the one after the last, `(10, 20)` or `range(10, 20)`.
        path: the trace's file, compressed where it ends in ".gz"; None for none. A further fit overwrites it.
        **options: for `torch.profiler.profile`, such as `record_shapes=True`, `profile_memory=True`, `with_stack=True`
            or `activities`, by default all that the machine has.

    `table` is the time per operation, the longest first; empty if nothing was recorded, which a line says then.

    Raises:
        ValueError: steps that are not a beginning and a later end; at the start of a fit, a path in a folder that
            doesn't exist.
    """

    _order = -15        # its batch begins before all others hear of it
    _saved = "table", "_batch"
    fit_only = True

    def __init__(self, steps: tuple[int, int] | range = (10, 20),
                 path: str | os.PathLike[str] | None = "trace.json", **options: Any) -> None:
        fits = steps.step == 1 if isinstance(steps, range) else (
            isinstance(steps, (tuple, list)) and len(steps) == 2 and all(type(n) is int for n in steps))
        first, stop = (steps.start, steps.stop) if isinstance(steps, range) else steps if fits else (0, 0)
        if not fits or not 0 <= first < stop:
            raise ValueError(f"Profile: steps is {steps!r}; it must be the first batch and the one after the last, "
                             "such as (10, 20)")
        self.first, self.stop, self.path, self.options = first, stop, path, options
        self.table, self._batch = "", 0
        self._profiler: torch.profiler.profile | None = None
        self._range: torch.profiler.record_function | None = None

    def begin_fit(self) -> None:
        if self.path is not None: require_folder(self.path, "Profile")
        self.table, self._batch = "", 0

    def begin_batch(self) -> None:
        if not self.run.in_train: return
        if self._batch == self.stop: self._end()
        if self._profiler is None and self.first <= self._batch < self.stop:
            self._profiler = profiler = torch.profiler.profile(**self.options)
            profiler.start()
        if self._profiler is not None:
            self._leave()
            self._range = batch = torch.profiler.record_function(f"batch {self._batch}")
            batch.__enter__()
        self._batch += 1

    def begin_validate(self) -> None:
        if self._batch >= self.stop: self._end()

    def after_epoch(self) -> None: self.begin_validate()        # which there may be none of

    def after_fit(self) -> None:
        self._end()
        if not self.table:
            print(f"Profile: the fit had {self._batch} training batches and ended before batch {self.first}; nothing "
                  "was recorded", flush=True)

    def _end(self) -> None:
        if self._profiler is None: return
        self._leave()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self.table = profiler.key_averages().table(sort_by=by, row_limit=20)
        if self.path is not None: profiler.export_chrome_trace(os.fspath(self.path))

    def _leave(self) -> None:
        if self._range is not None: self._range.__exit__(None, None, None)
        self._range = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes the table along, and not the model."""
        return {**super().__getstate__(), "_profiler": None, "_range": None}
