"""Callbacks in any company and order: no bit of training changes, and each finds what it finds alone."""

import csv
import math
import random
from functools import partial
from itertools import cycle

import pytest
import torch
from test_runner_averaged import learner, quiet, same, state
from test_runner_loop import CANCELS
from torch.optim import lr_scheduler

from runner import (
    EVENTS,
    AveragedWeights,
    Callback,
    CSVLogger,
    EarlyStopping,
    GradientClip,
    KeepBest,
    ParameterStats,
    Profile,
    Recorder,
    TensorBoardLogger,
    TerminateOnNonFinite,
    TorchScheduler,
)


def csv_rows(folder):
    with (folder / "history.csv").open(newline="") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


# How each is made, in a folder of its own, and what it has found after the fit.
MAKERS = {
    "averaged": (lambda folder: AveragedWeights(0.5, norms="recalibrate"),
                 lambda cb, folder: state(cb.averaged_model.module)),
    "stop": (lambda folder: EarlyStopping("train_loss", patience=2), lambda cb, folder: (cb.best, cb.stopped_epoch)),
    "keep": (lambda folder: KeepBest("train_loss", path=folder / "best.pt", restore=False),
             lambda cb, folder: torch.load(folder / "best.pt")),
    "schedule": (lambda folder: TorchScheduler(partial(lr_scheduler.ExponentialLR, gamma=1.0), by="batch"),
                 lambda cb, folder: cb.scheduler.last_epoch),
    "csv": (lambda folder: CSVLogger(folder / "history.csv"), lambda cb, folder: len(csv_rows(folder))),
    "tensorboard": (lambda folder: TensorBoardLogger(folder / "runs"), lambda cb, folder: (cb.batches, cb.rounds)),
    "profile": (lambda folder: Profile((3, 5), folder / "trace.json"),
                lambda cb, folder: bool(cb.table) and (folder / "trace.json").exists()),
    "terminate": (lambda folder: TerminateOnNonFinite(), lambda cb, folder: cb.record),
    "clip": (lambda folder: GradientClip(math.inf), lambda cb, folder: cb.norms),
    "recorder": (lambda folder: Recorder(), lambda cb, folder: cb.losses),
    "parameters": (lambda folder: ParameterStats(verbose=False), lambda cb, folder: cb.rows["ratio"]),
}


def equal(a, b): return same(a, b) if isinstance(a, dict) else a == b


def fit(names, folder, epochs=3):
    """A fit with these callbacks, in this order: its learner, and what each found."""
    pytest.importorskip("tensorboard")
    folder.mkdir()
    cbs = {name: MAKERS[name][0](folder) for name in names}
    learn = learner("ours", lr=0.5)
    quiet(*cbs.values()).fit(epochs, learn)
    return learn, {name: MAKERS[name][1](cb, folder) for name, cb in cbs.items()}


@pytest.mark.parametrize("seed", range(6))
def test_each_finds_in_company_what_it_finds_alone(seed, tmp_path):
    draw = random.Random(seed)
    names = draw.sample(list(MAKERS), draw.randint(3, len(MAKERS)))
    stops = [name for name in names if name == "stop"]
    learn, found = fit(names, tmp_path / "company")
    plain, _ = fit(stops, tmp_path / "none")
    assert same(state(learn.model), state(plain.model))
    for name in names:
        _, alone = fit([name, *(s for s in stops if s != name)], tmp_path / name)
        assert equal(alone[name], found[name]), name


def test_without_a_validation(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "with").mkdir()
    cbs = {name: MAKERS[name][0](tmp_path / "with") for name in MAKERS}
    waiting = []

    class Look(Callback):
        _order = 3000

        def after_epoch(self): waiting.append((len(cbs["tensorboard"]._waiting), bool(cbs["profile"].table)))
    learn = learner("ours", lr=0.5)
    learn.data.valid_dl = None
    run = quiet(*cbs.values(), Look())
    run.fit(2, learn)
    assert waiting == [(0, True), (0, True)]
    plain, found = fit([name for name in MAKERS if name not in ("csv", "keep")], tmp_path / "without", 2)
    assert same(state(learn.model), state(plain.model))
    for name, value in found.items(): assert equal(MAKERS[name][1](cbs[name], tmp_path / "with"), value), name
    with pytest.raises(ValueError, match=r"^EarlyStopping: the history has no 'valid_loss': did you mean 'tr"):
        quiet(EarlyStopping()).fit(2, learn)


class Boom(Callback):
    """Raises at an event of the second epoch, or of the first if it has only that; before that, what reaches it."""

    def __init__(self, event, order): self.at, self._order, self.calls = event, order, 0

    def __call__(self, event):
        if event == self.at:
            self.calls += 1
            if self.epoch or event in ("begin_fit", *CANCELS): raise ZeroDivisionError
        elif event in CANCELS.get(self.at, {}): raise CANCELS[self.at][event]
        return False


@pytest.mark.parametrize(("event", "order"), [*zip(EVENTS, cycle([-9, 3000]), strict=False)])
def test_an_exception_anywhere_leaves_all_of_them_ready_for_another_fit(event, order, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "fresh").mkdir()
    cbs, fresh = ([make(folder) for make, _ in MAKERS.values()] for folder in (tmp_path, tmp_path / "fresh"))
    boom, learn, expected = Boom(event, order), learner("ours", lr=0.5), learner("ours", lr=0.5)
    run = quiet(*cbs)
    with pytest.raises(ZeroDivisionError): run.fit(3, learn, cbs=boom)
    assert boom.calls
    assert run.status == "failed"
    learn = learner("ours", lr=0.5)
    run.fit(2, learn, reset_history=True)
    again = quiet(*fresh)
    again.fit(2, expected)
    assert run.status == again.status == "ok"
    assert same(state(learn.model), state(expected.model))
    for name, one, other in zip(MAKERS, cbs, fresh, strict=True):
        if name in ("csv", "tensorboard"): continue             # these go on where they were
        assert equal(MAKERS[name][1](one, tmp_path), MAKERS[name][1](other, tmp_path / "fresh")), name
