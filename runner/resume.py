"""`Resume`: the part of `Runner.fit(..., resume=...)`: it puts a fit back to where a checkpoint was written."""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.checkpoint import sources_of_run
from runner.checkpoint_files import CheckpointError, load, newest
from runner.console import say
from runner.events import Callback
from runner.fingerprint import differences, fingerprint, has_state
from runner.learner_state import StateError, put_learner
from runner.loading import LoaderError, has_position, put_feeding, rest_of
from runner.sources import set_states
from runner.values import decoded


class Resume(Callback):
    """Takes part in a fit that goes on: puts everything back after `begin_fit`, and in mid-epoch after `begin_epoch`.

    Args:
        source: a checkpoint, or a folder of them.
        strict: whether a fingerprint that differs is an error.

    Raises:
        CheckpointError: see `Runner.fit`.
    """

    _order = 9_000      # after all others have begun, and before Checkpoint
    fit_only = True

    def __init__(self, source: str | os.PathLike[str], strict: bool = True) -> None:
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"resume is {source!r}; it must be the path of a checkpoint, or of a folder of them")
        self.source, self.strict = Path(source), strict
        self.path: Path | None = None
        self.state: dict[str, Any] | None = None    # None: there is none, and the fit begins anew
        self.began: dict[str, Any] = {}             # the beginning of the pass that goes on
        self._waiting = self._placed = False
        if self.source.is_dir():
            if found := newest(self.source): self.path, self.state = found
        elif self.source.exists() or self.source.suffix == ".pt": self.path, self.state = self.source, load(self.source)

    def begin_fit(self) -> None:
        run, state = self.run, self.state
        self.fingerprint = fingerprint(run)
        if any(getattr(cb, "undoes_fit", False) for cb in run.cbs):
            raise CheckpointError("a fit that is undone at its end, as by LR_Find, can't be resumed; leave resume out")
        if state is None: return
        self._check(state)
        self.fingerprint = state["fingerprint"] | ({k: self.fingerprint[k] for k in ("versions", "settings")}
                                                   if not self.strict else {})
        run.first_epoch, run.first_batch = state["epoch"], state["batch"] or 0
        self.began, self._waiting = decoded(state["began"] or {}), state["batch"] is not None
        self._random, self._feeding = decoded(state["random"]), decoded(state["feeding"])
        self.sources = sources_of_run(run)
        for name, dl in (("train", run.data.train_dl), ("valid", run.data.valid_dl)):
            # Persistent workers draw a seed when they are made. Here they have been, in the run that goes on.
            if getattr(dl, "persistent_workers", False) and not state["seeded"][name] and dl._iterator is None: iter(dl)
        self._put(state)
        self._placed = state["loader"] is not None and has_position(run.data.train_dl)
        if self._placed: run.data.train_dl.load_state_dict(decoded(state["loader"]))
        where = f"epoch {state['epoch'] + 1} of {run.epochs}" + f", batch {run.first_batch}" * self._waiting
        if self._is_over(state): where = "the fit was complete"
        say(f"resumed from {self.path}: {where}")

    def _is_over(self, state: dict[str, Any]) -> bool:
        return state["ended"] is not None or state["epoch"] >= self.run.epochs

    def _check(self, state: dict[str, Any]) -> None:
        run = self.run
        if state["fit"] > run.fits:
            raise CheckpointError(f"{self.path} is of fit {state['fit'] + 1} of its runner, and this is fit "
                                  f"{run.fits + 1}; give each fit a folder of its own")
        if state["epoch"] > run.epochs or (state["epoch"] == run.epochs and state["batch"] is not None):
            raise CheckpointError(f"{self.path} was written in epoch {state['epoch'] + 1}, and the fit is to have "
                                  f"{run.epochs}; epochs are counted from the beginning: give at least "
                                  f"{state['epoch'] + (state['batch'] is not None)}")
        never, perhaps = differences(state["fingerprint"], self.fingerprint, state["batch"] is not None)
        if never:
            raise CheckpointError(f"{self.path} is of another run: {'; '.join(never)}; build learner and loaders as "
                                  "they were, or take another folder to begin anew")
        if perhaps and self.strict:
            raise CheckpointError(f"{self.path} is of a run that isn't quite this one: {'; '.join(perhaps)}; make them "
                                  "alike, or go on all the same, and not to the bit, by fit(..., strict=False)")
        if perhaps:
            warnings.warn(f"{self.path} is of a run that isn't quite this one: {'; '.join(perhaps)}", RuntimeWarning,
                          stacklevel=2)

    def _put(self, state: dict[str, Any]) -> None:
        run = self.run
        try: put_learner(run.model, run.loss_func, run.opt, state["learner"])
        except StateError as e: raise CheckpointError(f"{self.path}: {e}") from e
        run.n_iter, run.n_epochs, run.status = state["n_iter"], state["n_epochs"], state["status"]
        if self._is_over(state): run.first_epoch, run.epoch = run.epochs, max(0, state["epoch"] - (not state["ended"]))
        for cb in run.cbs:
            if cb.name in state["callbacks"] and has_state(cb): cb.load_state_dict(decoded(state["callbacks"][cb.name]))
        if (checkpoint := getattr(run, "checkpoint", None)) is not None: checkpoint._batches = state["batches"]
        put_feeding(run.data.train_dl, self._feeding)
        set_states(self._random, self.sources)

    def begin_epoch(self) -> None:
        if self._waiting and self.state is not None: self._put(self.state)

    def around_pass(self, batches: Iterable[Any]) -> Iterable[Any]:
        """What is left of the epoch."""
        if not self._waiting: return batches
        self._waiting = False
        return self._rest(self.run.data.train_dl)

    def _rest(self, dl: Any) -> Iterator[Any]:
        state = self.state
        assert state is not None

        def rewound() -> None:
            put_feeding(dl, self.began["feeding"])
            set_states(self.began["random"], self.sources)
        try:
            if self._placed: batches = iter(dl)
            else: batches = rest_of(dl, self.run.first_batch, rewound, self.began["seeded"])
        except LoaderError as e: raise CheckpointError(f"{self.path}: {e}") from e
        put_feeding(dl, self._feeding)
        set_states(self._random, self.sources)
        yield from batches

    def after_fit(self) -> None:
        with suppress(AttributeError): del self.sources
        self.state = None
