"""`Checkpoint`: all that a fit needs to go on, written to files at any point between two batches."""

import os
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runner.checkpoint_files import VERSION, check, checkpoints_in, number_of, path_for, prepare, save
from runner.events import Callback
from runner.fingerprint import fingerprint, has_state, loader
from runner.learner_state import Begun, learner_state
from runner.loading import MEND, draws_in_workers, feeding_state, position_of, same_states, why_not
from runner.midfit import Marks, loaders_of
from runner.ranks import ranks_of
from runner.sources import set_states, sources_of, states_of
from runner.values import encoded

ACTIVE: set[Path] = set()       # the folders of fits that are going on


class Checkpoint(Callback):
    """Writes checkpoints from which `run.fit(..., resume=folder)` goes on, to the last bit as if nothing had been.

        for epoch in range(epochs):
            for batch, (xb, yb) in enumerate(train_dl):
                train(xb, yb)
                if due(): save(folder, model, opt, callbacks, random_states, epoch, batch)
            validate()
            save(folder, model, opt, callbacks, random_states, epoch + 1)

    One script begins and goes on:

        run = Runner([AvgStatsCallback(accuracy), Recorder(), Checkpoint("runs/1", every_seconds=60)])
        run.fit(10, learn, resume="runs/1")             # killed, by whatever? Run the script again.

    It is written between two training batches, after everything that belongs to the one and before the next is
    fetched, and at the ends of epochs, after all other callbacks. Further ones are written when all epochs are done,
    and when `EarlyStopping` or `TerminateOnNonFinite` has ended the fit: then it is complete. None is written while a
    batch is being trained, in a validation, or when an exception ends the fit. A fit that another callback has left, by
    `CancelTrainException`, goes on from the file before, to where it is left again or not.

    A file holds the learner (`runner.learner_state`: parameters, buffers, optimizer, waiting gradients), the states of
    all callbacks that have `state_dict` and `load_state_dict`, how far the fit has come, the random states of torch,
    every GPU, Python, numpy and of all generators that the model, the loss, the loaders, their data sets and the
    callbacks hold (`runner.sources`), now and at the beginning of the epoch, where the loader is, and a fingerprint of
    the run. A callback of yours that keeps something from batch to batch needs the two methods.

    Files are called "checkpoint-RUN-NUMBER.pt". They appear under that name when they are whole and on the disk; there
    are no half-written ones, whenever the process or the machine dies. `torch.load(path, weights_only=True)` reads
    them. A disk that is full, or a folder that can't be written any more, costs a warning and no training: the last
    good file stays.

    With `Distributed` rank 0 writes one file for all processes, with what each has of its own: random states, averages
    of a pass that goes on. Any number of processes goes on from it; the same number to the last bit.

    Args:
        folder: for the files, made if it doesn't exist. Of several runs in one folder the latest goes on, and none
            touches another's files.
        every_epochs: write at the end of every so many epochs; None for none but the last.
        every_batches: write after every so many training batches of the fit.
        every_seconds: write after the batch, or the epoch, with which so many seconds have passed since the last file.
        keep: how many files of the run stay, the newest.

    `path` is the last file written. `request()` asks for one as soon as may be, where a cluster gives notice, say:

        signal.signal(signal.SIGTERM, lambda *_: run.checkpoint.request())

    Raises:
        ValueError: an argument out of its range, no interval at all; at the start of a fit, a folder that can't be
            written, and a loader that can't go on in the middle of an epoch (`runner.loading`) with `every_batches` or
            `every_seconds`.
        TypeError: at the start of a fit, a callback's state that can't be written.
    """

    _order = 10_000     # after all that may change anything
    fit_only = True
    writes_checkpoints = True

    def __init__(self, folder: str | os.PathLike[str], *, every_epochs: int | None = 1,
                 every_batches: int | None = None, every_seconds: float | None = None, keep: int = 3) -> None:
        for name, n in (("every_epochs", every_epochs), ("every_batches", every_batches), ("keep", keep)):
            if n is None and name != "keep": continue
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"Checkpoint: {name} is {n!r}; it must be an integer of at least 1"
                                 f"{', or None' * (name != 'keep')}")
        number = isinstance(every_seconds, (int, float)) and not isinstance(every_seconds, bool)
        if every_seconds is not None and not (number and every_seconds >= 0):
            raise ValueError(f"Checkpoint: every_seconds is {every_seconds!r}; it must be a number of at least 0, or "
                             "None")
        if every_epochs is None and every_batches is None and every_seconds is None:
            raise ValueError("Checkpoint: every_epochs, every_batches and every_seconds are all None, so that nothing "
                             "would be written before the end; give one of them")
        self.folder, self.keep = Path(folder), keep
        self.every_epochs, self.every_batches, self.every_seconds = every_epochs, every_batches, every_seconds
        self.path: Path | None = None
        self.run_id = ""                # of the run whose files these are
        self._number, self._failing, self._requested = 0, False, False
        self._clear()

    def _clear(self) -> None:
        self._idle = self._anywhere = True
        self._began: dict[str, Any] = {}        # the beginning of the running pass
        self._batch: int | None = None          # batches done in it; None between passes
        self._batches, self._written = 0, 0.0   # of the fit; when the last file was written
        self._before: dict[str, Any] = {}       # random states before the epoch
        self.begun: Begun | None = None
        self.marks: Marks | None = None

    # --- the fit ----------------------------------------------------------------------------------------------

    def begin_fit(self) -> None:
        run = self.run
        self._clear()
        if any(getattr(cb, "undoes_fit", False) for cb in run.cbs): return
        dl, in_epoch = run.data.train_dl, self.every_batches is not None or self.every_seconds is not None
        reason = why_not(dl)
        if in_epoch and reason: raise ValueError(f"Checkpoint: {reason}; {MEND}")
        resumed = getattr(run, "resume", None)
        found = None if resumed is None else resumed.state
        if (folder := self.folder.absolute()) in ACTIVE:
            raise ValueError(f"Checkpoint: another fit that is going on writes to {os.fspath(self.folder)!r}; give "
                             "each a folder of its own")
        ranks = ranks_of(run)
        others = self._take_folder(found) if ranks.leads else False
        others, self.run_id, self._number = ranks.first((others, self.run_id, self._number))
        self._anywhere = not self._draws_in_workers(dl, in_epoch) and not reason
        self.fingerprint = fingerprint(run) if resumed is None else resumed.fingerprint
        if resumed is None: self.begun, self.marks = begun_of(run, anew=True), Marks(run)
        else: self.begun, self.marks = resumed.begun, resumed.marks
        self._before = states_of(sources_of_run(run)) if found is None else found["before"]
        self._idle, self._written = False, time.monotonic()
        ACTIVE.add(folder)
        if found is None: check(self._contents())       # or it would be told too late
        if found is None and others: self._write(0, None)

    def _take_folder(self, found: dict[str, Any] | None) -> bool:
        """Go on in the folder, or begin there; whether it has files of other runs.

        Then this run needs one at once, which is newer than they are, or a kill in the next second would let one of
        theirs go on.
        """
        prepare(self.folder)
        there = checkpoints_in(self.folder)
        self.run_id = uuid.uuid4().hex[:8] if found is None else found["run"]
        self._number = max((number_of(path) for path in there), default=0)
        return bool(there)

    def _draws_in_workers(self, dl: Any, in_epoch: bool) -> bool:
        """Whether the data set draws random numbers in worker processes; an error where that can't be gone on from."""
        sources = sources_of_run(self.run)
        before = states_of(sources)
        try: drawn = draws_in_workers(dl, lambda: states_of(sources))
        finally: set_states(before, sources)
        if drawn and dl.persistent_workers:
            raise ValueError("Checkpoint: the data set draws random numbers in persistent workers, whose random states "
                             "nobody can read; give persistent_workers=False and write at the ends of epochs, or "
                             "num_workers=0")
        if drawn and in_epoch:
            raise ValueError("Checkpoint: the data set draws random numbers in worker processes, so its items depend "
                             "on those fetched before; give num_workers=0, or write at the ends of epochs only: "
                             "every_batches=None, every_seconds=None")
        return drawn

    def around_pass(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The training batches, with a look at the clock after each."""
        return batches if self._idle or not self.run.in_train else self._watched(batches)

    def _watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        run = self.run
        self._batch = run.first_batch
        if run.first_batch: self._began = run.resume.began
        else:
            self._began = {"random": states_of(sources_of_run(run)), "feeding": feeding_state(run._loader),
                           "seeded": getattr(run._loader, "_iterator", None) is None}
        for batch in batches:
            yield batch         # the loop asks for the next one when this one is over, and only if all went well
            self._batch += 1
            self._batches += 1
            due = bool(self.every_batches and not self._batches % self.every_batches) or self._is_due()
            if ranks_of(run).any(due) and self._anywhere:
                self._write(run.epoch, None)
        self._batch = None

    def _is_due(self) -> bool:
        time_is_up = self.every_seconds is not None and time.monotonic() - self._written >= self.every_seconds
        return time_is_up or self._requested

    def begin_validate(self) -> None: self._batch = None

    def after_epoch(self) -> None:
        if self._idle: return
        self._batch, done = None, self.run.epoch + 1
        self._before = states_of(sources_of_run(self.run))
        due = done == self.run.epochs or bool(self.every_epochs and not done % self.every_epochs) or self._is_due()
        if ranks_of(self.run).any(due): self._write(done, None)

    def after_cancel_train(self) -> None:
        """Write once more if the fit has found its end, which none that was merely left has."""
        run = self.run
        found = run.status == "diverged" or any(getattr(cb, "stopped_epoch", None) is not None for cb in run.cbs)
        if found and not self._idle: self._write(run.epoch, run.status)

    def after_fit(self) -> None:
        if not self._idle: ACTIVE.discard(self.folder.absolute())
        self._clear()

    # --- a file -----------------------------------------------------------------------------------------------

    def request(self) -> None:
        """Have one written as soon as the running batch is over, or the epoch.

        At this very moment the fit may be in the middle of something. Where the loader can't go on in the middle of an
        epoch it is written at the end.
        """
        self._requested = True

    def _write(self, epoch: int, ended: str | None) -> None:
        ranks = ranks_of(self.run)
        if ranks.size > 1: ranks.together(self._hear_out)
        # Another run may have written here meanwhile: what is written last has the highest number.
        if ranks.leads: self._number = max([self._number, *map(number_of, checkpoints_in(self.folder))])
        self._number = ranks.first(self._number)
        contents, self._requested = self._contents(epoch, ended), False
        if ranks.size > 1: contents["ranks"] = self._of_ranks(contents)
        if ranks.first(ranks.leads and self._save(contents)): self._number += 1

    def _save(self, contents: dict[str, Any]) -> bool:
        """Write the file; whether that went well."""
        path = path_for(self.folder, self.run_id, self._number + 1)
        try: save(contents, path, self.keep)
        except OSError as e:
            if not self._failing:
                warnings.warn(f"the checkpoint {path} can't be written ({type(e).__name__}: {e.strerror or e}); "
                              "training goes on, and what was written before stays", RuntimeWarning, stacklevel=2)
            self._failing, self._written = True, time.monotonic()
            return False
        self._failing, self.path, self._written = False, path, time.monotonic()
        return True

    def _hear_out(self) -> None:
        """Let callbacks that may end the fit by what they have yet to look at do so now, on all processes."""
        for cb in self.run.cbs:
            if getattr(cb, "may_cancel", ()) and has_state(cb): cb.state_dict()

    def _of_ranks(self, contents: dict[str, Any]) -> list[dict[str, Any]]:
        """What the other processes have of their own: random states, and of callbacks what isn't rank 0's."""
        ranks, common = ranks_of(self.run), contents["callbacks"]
        own = {k: contents[k] for k in ("random", "before")}
        told = ranks.gather({**own, "callbacks": {} if ranks.leads else common})
        for other in told[1:] if ranks.leads else ():
            other["callbacks"] = {k: v for k, v in other["callbacks"].items() if not same_states(v, common.get(k))}
        return told[1:]

    def _contents(self, epoch: int = 0, ended: str | None = None) -> dict[str, Any]:
        """What is written: tensors and plain values."""
        run, in_epoch = self.run, self._batch is not None and ended is None
        dl, marks, sources = run._loader if in_epoch else run.data.train_dl, self.marks, sources_of_run(run)
        assert marks is not None
        return dict(encoded({
            "version": VERSION, "processes": ranks_of(run).size, "run": self.run_id, "number": self._number + 1,
            "fit": run.fits,
            "fingerprint": self.fingerprint, "epoch": epoch, "batch": self._batch if in_epoch else None,
            "epochs": run.epochs, "ended": ended, "status": run.status, "n_iter": run.n_iter, "n_epochs": run.n_epochs,
            "batches": self._batches, "random": states_of(sources), "before": self._before,
            "feeding": feeding_state(dl), "feeding of validation": feeding_state(run.data.valid_dl),
            "seeded": {name: getattr(one, "_iterator", None) is None
                       for name, one in (("train", dl), ("valid", run.data.valid_dl))},
            "began": self._began if in_epoch else None, "loader": position_of(dl, in_epoch),
            "loaders": {name: loader(one) for name, one in loaders_of(run)}, "replaced": marks.replaced(run),
            "old loader": in_epoch and dl is not run.data.train_dl,
            "changed data": marks.changed_data(run), "forgotten": marks.forgotten(run),
            "settings": marks.settings}, "checkpoint"),
            callbacks={cb.name: encoded(cb.state_dict(), f"{type(cb).__name__}.state_dict()")
                       for cb in run.cbs if cb is not self and has_state(cb)},
            learner={**learner_state(run.model, run.loss_func, run.opt, self.begun)} if ranks_of(run).leads else {})

    def __getstate__(self) -> dict[str, Any]:
        """A copy writes a run of its own."""
        return {**super().__getstate__(), "path": None, "_idle": True, "_began": {}, "begun": None, "marks": None}


def begun_of(run: Any, anew: bool = False) -> Begun:
    """What the learner was made of when its fit began, which may have been broken off before and go on now."""
    found: Begun | None = vars(run.learn).get("_begun")
    if anew or found is None or not found.is_of(run.model, run.loss_func, run.opt):
        found = vars(run.learn)["_begun"] = Begun(run.model, run.loss_func, run.opt)
    else: found.restore()
    return found


def sources_of_run(run: Any) -> dict[str, Any]:
    """The random sources that the parts of a fit hold."""
    return sources_of(model=run.model, loss_func=run.loss_func, train_dl=run.data.train_dl, valid_dl=run.data.valid_dl,
                      **{cb.name: cb for cb in run.cbs if cb.name not in ("checkpoint", "resume")})
