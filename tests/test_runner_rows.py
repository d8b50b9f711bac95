"""Rows by row and by column, the recorder's rows, and the running mean."""

import copy
import csv
import math
import pickle

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runner_loop import make_learn
from torch import nn

from runner import Callback, CancelBatchException, CancelEpochException, Recorder, Rows, Runner
from runner.smoothing import smoothed

NAN, INF = math.nan, math.inf


@pytest.fixture
def rows():
    return Rows([{"phase": "train", "step": 0, "module": "0", "loss": 2.5},
                 {"phase": "train", "step": 0, "module": "1", "loss": 2.0},
                 {"phase": "valid", "step": 1, "valid_loss": 1.5},
                 {"phase": "train", "step": 1, "module": "0", "loss": 1.0}])


def test_rows_are_a_list_of_dicts(rows):
    assert rows[0] == {"phase": "train", "step": 0, "module": "0", "loss": 2.5}
    assert rows[-1] is list(rows)[-1]
    assert type(rows[-2:]) is type(rows[::2]) is Rows
    assert rows[-2:] == [list(rows)[2], list(rows)[3]]
    assert copy.deepcopy(rows) == rows
    rows.append({"step": 2})
    assert rows[-1, "step"] == 2


def test_columns(rows):
    assert rows["step"] == [0, 0, 1, 1]
    assert rows["loss"] == [2.5, 2.0, 1.0]              # the rows that have one
    assert rows[1:, "loss"] == [2.0, 1.0]
    assert rows[:1, "valid_loss"] == []                 # a column, though of other rows
    assert rows["step", "loss"] == [(0, 2.5), (0, 2.0), (1, 1.0)]
    assert rows[:, ("loss", "valid_loss")] == []        # no row has both
    assert rows[-2:, ("phase", "step")] == [("valid", 1), ("train", 1)]
    assert rows[2, "valid_loss"] == 1.5
    assert rows[0, ("module", "loss")] == ("0", 2.5)
    assert rows.columns == ["phase", "step", "module", "loss", "valid_loss"]


def test_where(rows):
    chosen = rows.where(phase="train", module="0")
    assert type(chosen) is Rows
    assert chosen["step", "loss"] == [(0, 2.5), (1, 1.0)]
    assert rows.where(step=1, module="0") == rows[-1:]      # a row without the column has no such value
    assert rows.where(phase="test") == []
    assert rows.where() == rows


def test_no_rows_have_every_column():
    assert Rows()["loss"] == Rows()["step", "loss"] == Rows().where(step=1) == Rows().columns == []


def test_column_that_is_not_there(rows):
    text = r"no row has a column 'los': did you mean 'loss'\? There are: phase, step, module, loss, valid_loss"
    for look in (lambda: rows["los"], lambda: rows[:1, ("step", "los")], lambda: rows.where(los=1)):
        with pytest.raises(KeyError, match=text): look()
    with pytest.raises(KeyError, match=r"no row has a column 'loss': did you mean .valid_loss.\? There are: phase"):
        _ = rows[2, "loss"]
    with pytest.raises(IndexError): _ = rows[4]


def test_csv_reads_back_as_it_was(tmp_path):
    values = [0.1 + 0.2, NAN, INF, -INF, 1e-300, 3]
    rows = Rows([{"step": i, "loss": v} for i, v in enumerate(values)] + [{"step": 6, "note": 'a "b", c\nd'}])
    path = rows.to_csv(str(tmp_path / "rows.csv"))
    with path.open(newline="", encoding="utf-8") as f: read = list(csv.DictReader(f))
    assert list(read[0]) == ["step", "loss", "note"]
    assert [repr(float(r["loss"])) for r in read[:6]] == [repr(float(v)) for v in values]
    assert [int(r["step"]) for r in read] == list(range(7))
    assert (read[6]["loss"], read[6]["note"], read[0]["note"]) == ("", 'a "b", c\nd', "")
    assert Rows().to_csv(tmp_path / "none.csv").read_text() == "\n"


def test_rows_in_a_console_and_in_a_notebook(rows):
    assert repr(rows) == ("<Rows: 4 of phase, step, module, loss, valid_loss; the last is "
                          "{'phase': 'train', 'step': 1, 'module': '0', 'loss': 1.0}>")
    assert repr(Rows()) == "<Rows: none>"
    html = rows._repr_html_()
    assert html.count("<tr>") == 1 + 4
    assert "4 rows" in html
    assert "&lt;b&gt;" in Rows([{"<b>": "<b>"}])._repr_html_()
    assert "<b>" not in Rows([{"<b>": "<b>"}])._repr_html_()
    long = Rows({"step": i, "loss": 1 / 3} for i in range(1000))._repr_html_()
    assert long.count("<tr>") == 1 + 10 + 1 + 10
    for said in (">9<", ">990<", ">...<", ">0.333333<", "1000 rows"): assert said in long
    assert ">10<" not in long
    assert "0 rows" in Rows()._repr_html_()
    twin = pickle.loads(pickle.dumps(rows))
    assert (type(twin), twin) == (Rows, rows)


def test_rows_draw_a_column_against_another(rows):
    _, ax = plt.subplots()
    assert rows.where(module="0").plot("step", "loss", ax, yscale="log") is ax
    assert [list(v) for v in ax.lines[0].get_data()] == [[0, 1], [2.5, 1.0]]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("step", "loss", "log")
    lines = rows.plot("step", "loss", by="module").lines
    assert [line.get_label() for line in lines] == ["0", "1"]
    assert [list(v) for v in lines[0].get_data()] == [[0, 1], [2.5, 1.0]]
    assert len(Rows().plot("step", "loss").lines[0].get_xdata()) == 0
    plt.close("all")


# --- the recorder's -----------------------------------------------------------------------------------------------

def test_recorder_rows():
    run = Runner(Recorder())
    assert run.recorder.rows == []
    run.fit(2, make_learn(lr=0.5))
    rec = run.recorder
    assert rec.rows == [{"phase": "train", "epoch": i // 2, "batch": i % 2, "step": i, "loss": rec.losses[i], "lr": 0.5}
                        for i in range(4)]
    assert type(rec.rows) is Rows
    rec.rows.clear()
    assert rec.rows["loss"] == rec.losses       # made anew
    run.fit(1, make_learn(), reset_history=True)
    assert rec.rows["step"] == [0, 1]


def test_recorder_rows_of_several_parameter_groups():
    learn = make_learn()
    first, last = (list(learn.model[i].parameters()) for i in (0, 2))
    learn.opt = torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": last, "lr": 0.3}])
    run = Runner(Recorder())
    run.fit(1, learn)
    assert run.recorder.rows["lr", "lr_0", "lr_1"] == [(0.3, 0.1, 0.3)] * 2


class CancelAt(Callback):
    """Raises at each `(event, step)` of `at` what it maps to; after the recorder."""

    _order = 5

    def __init__(self, at): self.at = at

    def __call__(self, event):
        if self.run.in_train and (event, self.run.n_iter) in self.at: raise self.at[event, self.run.n_iter]


def test_recorder_rows_of_cancelled_batches():
    at = {("begin_batch", 1): CancelBatchException(),           # before a loss: no row
          ("after_loss", 3): CancelBatchException(),            # after it: a row
          ("begin_batch", 5): CancelEpochException(),           # counts as a batch that was begun
          ("after_backward", 7): CancelEpochException()}
    run = Runner([Recorder(), CancelAt(at)])
    run.fit(3, make_learn(n_train=8))                           # four batches an epoch
    assert run.recorder.rows["epoch", "batch", "step"] == [
        (0, 0, 0), (0, 2, 2), (0, 3, 3), (1, 0, 4), (2, 0, 6), (2, 1, 7)]
    assert run.recorder.rows["loss"] == run.recorder.losses


def test_recorder_rows_after_an_epoch_that_was_skipped():
    class Skip(Callback):
        _order = -5     # before the recorder

        def begin_epoch(self):
            if self.epoch == 0: return True
            if self.epoch == 1: raise CancelEpochException
    run = Runner([Recorder(), Skip()])
    run.fit(3, make_learn())
    assert run.recorder.rows["epoch", "batch", "step"] == [(2, 0, 0), (2, 1, 1)]


def test_recorder_rows_stand_while_a_fit_goes_on():
    seen = []

    class Look(Callback):
        _order = 5

        def after_loss(self):
            if self.in_train: seen.append(len(self.recorder.rows))
    model = nn.Sequential(nn.Linear(6, 3))
    Runner([Recorder(), Look()]).fit(1, make_learn(n_train=6, model=model))
    assert seen == [1, 2, 3]


# --- running mean -------------------------------------------------------------------------------------------------

def test_smoothed_by_hand():
    assert smoothed([0.0, 3.0, 6.0, 0.0, 12.0], 3) == [1.5, 3.0, 3.0, 6.0, 6.0]
    assert smoothed([0.0, 3.0, 6.0], 2) == [1.5, 3.0, 4.5]     # of the next odd number
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    assert smoothed([], 5) == []


def test_smoothed_leaves_what_is_not_finite_and_keeps_small_beside_large():
    means = smoothed([1.0, NAN, 3.0, INF, 5.0, 1e30, 1.0, 2.0, 3.0], 3)
    assert [m for m in means if not math.isnan(m)] == [1.0, 3.0, 5e29, 1e30 / 3, 1e30 / 3, 2.0, 2.5]
    assert [i for i, m in enumerate(means) if math.isnan(m)] == [1, 3]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.floats(-10, 10), st.just(NAN)), max_size=40), st.integers(1, 50))
def test_smoothed_equals_the_mean_of_each_window(values, width):
    half = width // 2
    for i, (value, mean) in enumerate(zip(values, smoothed(values, width), strict=True)):
        window = [v for v in values[max(0, i - half):i + half + 1] if not math.isnan(v)]
        if math.isnan(value): assert math.isnan(mean)
        else: assert mean == pytest.approx(math.fsum(window) / len(window), abs=1e-12)
