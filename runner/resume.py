"""`Resume`: the part of `Runner.fit(..., resume=...)`: it puts a fit back to where a checkpoint was written."""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.checkpoint import begun_of, sources_of_run
from runner.checkpoint_files import CheckpointError, load, newest
from runner.console import say
from runner.events import Callback
from runner.fingerprint import differences, fingerprint, has_state, loader, words
from runner.learner_load import StateError, put_learner
from runner.loading import LoaderError, has_position, put_feeding, rest_of
from runner.midfit import Marks, loaders_of, same
from runner.ranks import ranks_of
from runner.sources import set_states
from runner.values import decoded

AGAIN = "let the callback that does so do it again in its load_state_dict"


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
        self.processes, self.borrowed = 1, False    # who wrote it; whether this one has random numbers of rank 0's
        self._own: dict[str, Any] = {}              # of this process in the checkpoint
        self._others: list[dict[str, Any]] = []     # of all but rank 0, where their number is another now
        if self.source.is_dir():
            if found := newest(self.source): self.path, self.state = found
        elif self.source.exists() or self.source.suffix == ".pt": self.path, self.state = self.source, load(self.source)
        # These three are decoded anew each time that they are put somewhere.
        if self.state: self.state = {k: v if k in ("learner", "callbacks", "loader", "ranks") else decoded(v)
                                     for k, v in self.state.items()}

    @contextmanager
    def around_fit(self, run: Any, learn: Any) -> Iterator[None]:
        """Before all others begin: the learner may be one that has been trained since the checkpoint was written."""
        begun = vars(learn).get("_begun") if self.state is not None else None
        if begun is not None and begun.is_of(learn.model, learn.loss_func, learn.opt): begun.restore()
        yield

    def begin_fit(self) -> None:
        run, ranks = self.run, ranks_of(self.run)
        if len(set(ranks.gather(self.path and self.path.name))) > 1:        # not all see the same files
            self.path, self.state = ranks.first((self.path, self.state))
        state = self.state
        if any(getattr(cb, "undoes_fit", False) for cb in run.cbs):
            raise CheckpointError("a fit that is undone at its end, as by LR_Find, can't be resumed; leave resume out")
        self.begun = begun_of(run, anew=state is None)
        self.fingerprint, self.marks = fingerprint(run), Marks(run)
        if state is None:
            if not any(getattr(cb, "writes_checkpoints", False) for cb in run.cbs):
                folder = repr(str(self.source))
                warnings.warn(f"there is no checkpoint in {folder} and no callback that writes one, so this fit starts "
                              f"from the beginning and can't be resumed: add Checkpoint({folder})", stacklevel=2)
            return
        self._of_rank(state)
        self._check(state)
        self.fingerprint = state["fingerprint"] | ({k: self.fingerprint[k] for k in ("versions", "settings")}
                                                   if not self.strict else {})
        run.first_epoch, run.first_batch = state["epoch"], state["batch"] or 0
        self.began, self._waiting = state["began"] or {}, state["batch"] is not None
        for name, dl in (("train", run.data.train_dl), ("valid", run.data.valid_dl)):
            # Persistent workers draw a seed when they are made. Here they have been, in the run that goes on.
            if getattr(dl, "persistent_workers", False) and not state["seeded"][name] and dl._iterator is None: iter(dl)
        self._put(state)
        if state["forgotten"]:
            say(f"not in {self.path}, and so as begin_fit left it: {', '.join(state['forgotten'])}; a callback that "
                "keeps something needs state_dict and load_state_dict")
        other = [f"{name}.{k} {v}, now {self.marks.settings[name][k]}" for name, had in state["settings"].items()
                 for k, v in had.items() if not same(v, self.marks.settings.get(name, {}).get(k, v))]
        if other: say(f"other settings than in {self.path}: {'; '.join(other)}")
        if self._waiting: set_states(state["before"], sources_of_run(run))      # as they were before begin_epoch
        else: self._place(run.data.train_dl, state)
        where = f"epoch {state['epoch'] + 1} of {run.epochs}" + f", batch {run.first_batch}" * self._waiting
        if self._is_over(state): where = "the fit was complete"
        if self.processes != ranks.size: where += f"; {self.processes} process{'es' * (self.processes > 1)} wrote it"
        say(f"resumed from {self.path}: {where}")

    def _of_rank(self, state: dict[str, Any]) -> None:
        """Take what is this process's own; of another number of processes each gets a part, or rank 0's."""
        ranks = ranks_of(self.run)
        self.processes, others = state.get("processes", 1), state.get("ranks", [])
        if self.processes != ranks.size: self.borrowed, self._others = ranks.rank > 0, others
        elif ranks.rank: self._own = others[ranks.rank - 1]
        if self._own: state.update({k: decoded(self._own[k]) for k in ("random", "before")})

    def _state_of(self, cb: Any, state: dict[str, Any]) -> Any:
        """What this process's `cb` is to go on from."""
        common = state["callbacks"][cb.name]
        if cb.name in self._own.get("callbacks", ()): return decoded(self._own["callbacks"][cb.name])
        if not self._others or not hasattr(cb, "divided"): return decoded(common)
        states = [common, *(other["callbacks"].get(cb.name, common) for other in self._others)]
        return cb.divided([decoded(its) for its in states], ranks_of(self.run).rank)

    def _is_over(self, state: dict[str, Any]) -> bool:
        return state["ended"] is not None or state["epoch"] >= self.run.epochs

    def _check(self, state: dict[str, Any]) -> None:
        run = self.run
        if state["fit"] != run.fits:
            raise CheckpointError(f"{self.path} is of fit {state['fit'] + 1} of its runner, and this is fit "
                                  f"{run.fits + 1}; give each fit a folder of its own, or, to go on with that one, "
                                  "make the runner anew")
        if state["epoch"] > run.epochs or (state["epoch"] == run.epochs and state["batch"] is not None):
            raise CheckpointError(f"{self.path} was written in epoch {state['epoch'] + 1}, and the fit is to have "
                                  f"{run.epochs}; epochs are counted from the beginning: give at least "
                                  f"{state['epoch'] + (state['batch'] is not None)}")
        saved = state["fingerprint"]
        if self.processes != ranks_of(run).size:        # which share the cores
            saved = {**saved, "settings": {**saved["settings"], "threads": self.fingerprint["settings"]["threads"]}}
        never, perhaps = differences(saved, self.fingerprint, state["batch"] is not None)
        if never:
            raise CheckpointError(f"{self.path} is of another run: {'; '.join(never)}; build learner and loaders as "
                                  "they were, or take another folder to begin anew")
        if perhaps and self.strict:
            raise CheckpointError(f"{self.path} is from a different run: {'; '.join(perhaps)}; use the same "
                                  "versions and settings, or continue anyway, without the same bits, by fit(..., "
                                  "strict=False)")
        if perhaps:
            warnings.warn(f"{self.path} is from a different run: {'; '.join(perhaps)}", RuntimeWarning,
                          stacklevel=2)

    def _put(self, state: dict[str, Any]) -> None:
        run = self.run
        if not self._other_parts(state): self._put_learner(state)
        run.n_iter, run.n_epochs, run.status = state["n_iter"], state["n_epochs"], state["status"]
        if self._is_over(state): run.first_epoch, run.epoch = run.epochs, max(0, state["epoch"] - (not state["ended"]))
        for cb in run.cbs:
            if cb.name in state["callbacks"] and has_state(cb): cb.load_state_dict(self._state_of(cb, state))
        if (checkpoint := getattr(run, "checkpoint", None)) is not None: checkpoint._batches = state["batches"]
        if self._other_parts(state): self._put_learner(state)       # by now a callback has put them there
        put_feeding(run.data.train_dl, state["feeding"])
        put_feeding(run.data.valid_dl, state["feeding of validation"])
        set_states(state["random"], sources_of_run(run))

    def _other_parts(self, state: dict[str, Any]) -> bool:
        """Whether the checkpoint is of another model, loss or optimizer than the fit began with."""
        return not {"model", "optimizer", "loss function"}.isdisjoint(state["replaced"])

    def _put_learner(self, state: dict[str, Any]) -> None:
        run = self.run
        if missing := [name for name in state["replaced"] if name not in self.marks.replaced(run)]:
            raise CheckpointError(f"{self.path}: the {missing[0]} had been replaced in mid-fit, and now it isn't; "
                                  f"{AGAIN}")
        if self.begun.is_of(run.model, run.loss_func, run.opt): self.begun.restore(all=False)
        try: troubles = put_learner(run.model, run.loss_func, run.opt, state["learner"])
        except StateError as e: raise CheckpointError(f"{self.path}: {e}") from e
        if troubles:
            self._tell(f"{self.path} can't hold all that was changed in mid-fit: {'; '.join(troubles)}; do that before "
                       "the fit, or keep it as numbers and tensors (get_extra_state)")

    def _tell(self, text: str) -> None:
        """An error, or where the user wants to go on all the same a warning."""
        if self.strict: raise CheckpointError(f"{text}, or continue anyway, without the same bits, by fit(..., "
                                              "strict=False)")
        warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _place(self, dl: Any, state: dict[str, Any]) -> None:
        """Let the training loader be where it was."""
        self._check_loaders(state)
        put_feeding(dl, state["feeding"])
        self._placed = state["loader"] is not None and has_position(dl)
        try:
            if self._placed: dl.load_state_dict(decoded(state["loader"]))
        except LoaderError as e: raise CheckpointError(f"{self.path}: {e}") from e

    def _check_loaders(self, state: dict[str, Any]) -> None:
        """See that the loaders are what they were then, if they weren't what the fit began with."""
        replaced = self.marks.replaced(self.run)
        for name, dl in loaders_of(self.run):
            then, now = name in state["replaced"], name in replaced
            if then != now:
                self._tell(f"{self.path}: the {name} {'had' if then else 'has'} been replaced in mid-fit, and "
                           f"{'now it is' if then else 'it had'}n't; {AGAIN}")
            was, there = state["loaders"][name], loader(dl)
            if was not in (there, state["fingerprint"][name]):
                self._tell(f"{self.path}: the {name} had changed in mid-fit: {words(name, was, there)}; {AGAIN}")

    def begin_epoch(self) -> None:
        state, run = self.state, self.run
        if state is None: return
        if self._waiting:
            self._put(state)
            if state["old loader"] != (run._loader is not run.data.train_dl):
                raise CheckpointError(f"{self.path}: the training loader was replaced while a pass over it went on; go "
                                      "on from the end of an epoch: every_batches=None, every_seconds=None")
            self._place(run._loader, state)
        changed = self.marks.changed_data(run)
        if missing := [what for what in state["changed data"] if what not in changed]:
            warnings.warn(f"{self.path}: data was changed in mid-fit, and no checkpoint holds it: "
                          f"{', '.join(missing)}; {AGAIN}", RuntimeWarning, stacklevel=2)
        state["changed data"] = []

    def around_pass(self, batches: Iterable[Any]) -> Iterable[Any]:
        """What is left of the epoch."""
        if not self._waiting: return batches
        self._waiting = False
        return self._rest(self.run._loader)

    def _rest(self, dl: Any) -> Iterator[Any]:
        state = self.state
        assert state is not None

        def rewound() -> None:
            put_feeding(dl, self.began["feeding"])
            set_states(self.began["random"], sources_of_run(self.run))
        try:
            if self._placed: batches = iter(dl)
            else: batches = rest_of(dl, self.run.first_batch, rewound, self.began["seeded"])
        except LoaderError as e: raise CheckpointError(f"{self.path}: {e}") from e
        put_feeding(dl, state["feeding"])
        set_states(state["random"], sources_of_run(self.run))
        yield from batches

    def after_fit(self) -> None: self.state = None
