"""CSVLogger, TensorBoardLogger and Profile: what is in their files, at what time, and after what ended the fit."""

import copy
import csv
import gzip
import json
import math
import os
import pickle
import sys

import pytest
import torch
from test_runner_averaged import learner, quiet
from test_runner_loop import make_learn

from runner import (
    ActivationStats,
    AveragedWeights,
    AvgStatsCallback,
    Callback,
    CancelTrainException,
    CSVLogger,
    EarlyStopping,
    GradientStats,
    Profile,
    Recorder,
    Runner,
    TensorBoardLogger,
    TerminateOnNonFinite,
    accuracy,
    plots,
)
from runner.compiled import CompiledStep
from runner.loggers import add_row


def read(path):
    with path.open(newline="") as f: return list(csv.DictReader(f))


class Boom(Callback):
    """Raises at an event of an epoch."""

    def __init__(self, event, epoch, what=ZeroDivisionError): self.at, self.in_epoch, self.what = event, epoch, what

    def __call__(self, event):
        if event == self.at and self.epoch == self.in_epoch: raise self.what
        return False


# --- CSVLogger ----------------------------------------------------------------------------------------------------

def test_csv_has_the_history_to_the_last_bit(tmp_path):
    path = tmp_path / "history.csv"
    run = quiet(CSVLogger(path))
    run.fit(3, learner())
    rows = read(path)
    assert list(rows[0]) == ["epoch", "train_loss", "valid_loss", "seconds"]
    assert [{k: float(v) for k, v in row.items()} for row in rows] == run.avg_stats.history
    assert os.listdir(tmp_path) == ["history.csv"]


def test_csv_has_each_row_at_the_end_of_its_epoch(tmp_path):
    path, seen = tmp_path / "history.csv", []

    class Look(Callback):
        def begin_epoch(self): seen.append(len(read(path)) if path.exists() else None)
    with pytest.raises(ZeroDivisionError): quiet(CSVLogger(path), Look(), Boom("after_loss", 2)).fit(3, learner())
    assert seen == [None, 1, 2]
    assert [row["epoch"] for row in read(path)] == ["0", "1"]


def test_csv_appends_or_begins_anew(tmp_path):
    path = tmp_path / "history.csv"
    run = quiet(CSVLogger(path))
    run.fit(2, learner())
    run.fit(1, learner())
    quiet(CSVLogger(path)).fit(1, learner())
    assert [row["epoch"] for row in read(path)] == ["0", "1", "2", "0"]
    assert path.read_text().count("epoch") == 1
    quiet(CSVLogger(path, append=False)).fit(1, learner())
    assert [row["epoch"] for row in read(path)] == ["0"]


def test_csv_gets_a_new_column_at_the_right_and_keeps_its_header(tmp_path):
    path = tmp_path / "history.csv"
    for row in ({"a": 1, "b": 2.5}, {"b": 3, "c": math.nan}, {"c": 1e-300, "a": "x,\ny"}, {"b": 0.1}):
        add_row(path, row)
    assert path.read_text() == 'a,b,c\n1,2.5,\n,3,nan\n"x,\ny",,1e-300\n,0.1,\n'
    assert os.listdir(tmp_path) == ["history.csv"]


@pytest.mark.parametrize("left", ["a,b\n1,2\n3,", "a,b\n1,2\n3,4", "a,b\n1,2\n3"])
def test_csv_a_line_that_a_crash_broke_off_spoils_no_other(tmp_path, left):
    for column in ("b", "c"):
        path = tmp_path / f"{column}.csv"
        path.write_text(left)
        add_row(path, {"a": 5, column: 6})
        rows = read(path)
        assert (len(rows), rows[0]["b"], rows[1]["a"]) == (3, "2", "3")
        assert (rows[2]["a"], rows[2][column]) == ("5", "6")


def test_csv_a_figure_that_another_callback_adds(tmp_path):
    class Add(Callback):
        _order = 5

        def after_epoch(self):
            if self.epoch: self.run.avg_stats.history[-1]["extra"] = 7
    path = tmp_path / "history.csv"
    quiet(Add(), CSVLogger(path)).fit(2, learner())
    assert [row["extra"] for row in read(path)] == ["", "7"]


def test_csv_refuses_what_it_can_t_do(tmp_path):
    with pytest.raises(ValueError, match=r"^CSVLogger reads the history of AvgStatsCallback, and the runner has none"):
        Runner(CSVLogger(tmp_path / "a.csv")).fit(1, learner())
    with pytest.raises(ValueError, match=r"^CSVLogger: path is '.*a.csv' and its folder doesn't exist; make the "):
        quiet(CSVLogger(tmp_path / "none" / "a.csv")).fit(1, learner())


# --- TensorBoardLogger --------------------------------------------------------------------------------------------

def events(folder):
    """All that the files in `folder` hold: tag to its list of (step, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for file in sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime_ns):
        log = accumulator.EventAccumulator(str(file), {"scalars": 0, "histograms": 0, "images": 0})
        log.Reload()
        for tag in log.Tags()["scalars"]: found.setdefault(tag, []).extend((e.step, e.value) for e in log.Scalars(tag))
        for tag in log.Tags()["histograms"]:
            found.setdefault(tag, []).extend((e.step, e.histogram_value) for e in log.Histograms(tag))
        for tag in log.Tags()["images"]:
            found.setdefault(tag, []).extend((e.step, (e.width, e.height)) for e in log.Images(tag))
    return found


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("tensorboard")
    return tmp_path / "runs"


def test_tensorboard_has_losses_rates_and_history(folder):
    run = quiet(Recorder(), TensorBoardLogger(folder))
    run.fit(2, learner())
    found = events(folder)
    assert found["batch/loss"] == [(i, pytest.approx(v)) for i, v in enumerate(run.recorder.losses)]
    assert found["batch/lr"] == [(i, pytest.approx(0.3)) for i in range(10)]
    for name in ("train_loss", "valid_loss", "seconds"):
        assert found[f"epoch/{name}"] == [(i, pytest.approx(row[name])) for i, row in enumerate(run.avg_stats.history)]
    assert set(found) == {"batch/loss", "batch/lr", "epoch/train_loss", "epoch/valid_loss", "epoch/seconds"}


def test_tensorboard_without_statistics_and_with_two_groups(folder):
    learn = learner()
    learn.opt = torch.optim.SGD([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(learn.model.parameters())])
    Runner(TensorBoardLogger(folder, every=4)).fit(2, learn)
    found = events(folder)
    assert [step for step, _ in found["batch/loss"]] == [0, 4, 8]
    assert found["batch/lr_1"] == [(i, pytest.approx(0.2)) for i in (0, 4, 8)]
    assert set(found) == {"batch/loss", *(f"batch/lr_{i}" for i in range(6))}


def test_tensorboard_goes_on_counting_in_a_further_fit(folder):
    run = quiet(TensorBoardLogger(folder))
    run.fit(2, learner())
    run.fit(1, learner())
    pickle.loads(pickle.dumps(run.tensor_board_logger))
    quiet(copy.deepcopy(run.tensor_board_logger)).fit(1, learner())
    found = events(folder)
    assert [step for step, _ in found["batch/loss"]] == list(range(20))
    assert [step for step, _ in found["epoch/valid_loss"]] == [0, 1, 2, 3]


def test_tensorboard_histograms_are_those_of_the_statistics(folder):
    activations, gradients = ActivationStats(["0", "3"], phases=["train", "valid"], verbose=False), GradientStats(
        ["0"], verbose=False)
    run = quiet(activations, gradients, TensorBoardLogger(folder))
    run.fit(2, learner())
    found = events(folder)
    for cb, path, phase in ((activations, "0", "train"), (activations, "3", "valid"), (gradients, "0", "train")):
        steps, means, lows, highs, hists = cb.series(path, "mean", "low", "high", "hist", phase=phase)
        written = found[f"{cb.name}/{path}/{phase}"]
        assert [step for step, _ in written] == steps
        for (_, h), mean, low, high, counts in zip(written, means, lows, highs, hists, strict=True):
            assert (h.min, h.max, h.num) == (pytest.approx(low), pytest.approx(high), sum(counts))
            assert h.sum == pytest.approx(mean * sum(counts), abs=1e-6)
            filled = {round(limit, 5): n for limit, n in zip(h.bucket_limit, h.bucket, strict=True) if n}
            width = (high - low) / len(counts)
            assert filled == {round(low + width * (k + 1), 5): n for k, n in enumerate(counts) if n}


def test_tensorboard_histograms_are_thinned(folder):
    run = quiet(ActivationStats(["0"], verbose=False), TensorBoardLogger(folder, histograms=2))
    run.fit(2, learner())
    assert [step for step, _ in events(folder)["activation_stats/0/train"]] == [0, 3, 5, 8]
    assert "activation_stats/0/train" not in written(folder / "none", histograms=0)


def written(folder, **kwargs):
    quiet(ActivationStats(["0"], verbose=False), TensorBoardLogger(folder, **kwargs)).fit(1, learner())
    return events(folder)


def test_tensorboard_figures_are_drawn_and_closed(folder):
    import matplotlib.pyplot as plt
    open_before = plt.get_fignums()
    figures = {"losses": lambda run: run.recorder.plot_loss(),              # axes
               "stats": lambda run: run.activation_stats.plot(),            # several
               "figure": lambda run: plots.plot_line([1, 2]).figure,
               "pages": lambda run: {"a": [plots.plot_line([1, 2])], "b": plots.plot_line([2, 1])}}     # two of them
    run = quiet(Recorder(), ActivationStats(["0"], verbose=False), TensorBoardLogger(folder, figures=figures))
    run.fit(2, learner())
    found = events(folder)
    for name in ("losses", "stats", "figure", "pages/1", "pages/2"):
        assert [step for step, _ in found[name]] == [0, 1]
    assert plt.get_fignums() == open_before
    with pytest.raises(TypeError, match=r"^TensorBoardLogger: a function in figures gave 3; it must give a figure or"):
        quiet(TensorBoardLogger(folder, figures={"no": lambda run: 3})).fit(1, learner())


@pytest.mark.parametrize("what", [ZeroDivisionError, KeyboardInterrupt, CancelTrainException])
def test_tensorboard_has_what_was_before_the_end_and_the_file_is_closed(folder, what):
    logger = TensorBoardLogger(folder)
    run = quiet(Recorder(), Boom("after_backward", 1, what), logger)
    try: run.fit(2, learner())
    except (ZeroDivisionError, KeyboardInterrupt): pass
    assert logger.writer is None
    assert [v for _, v in events(folder)["batch/loss"]] == pytest.approx(run.recorder.losses)
    run.fit(1, learner())
    assert [step for step, _ in events(folder)["batch/loss"]] == [*range(6), *range(6, 11)]


def test_tensorboard_is_not_there(monkeypatch, tmp_path):
    for name in list(sys.modules):
        if name.startswith("torch.utils.tensorboard"): monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    learn, run = learner(), quiet(TensorBoardLogger(tmp_path / "runs"))
    with pytest.raises(ImportError, match=r"^TensorBoardLogger needs the package tensorboard: pip install "
                                          r"'runnernorms\[tensorboard\]'"): run.fit(1, learn)
    assert not list(tmp_path.iterdir())
    assert run.status == "failed"


def test_tensorboard_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"^TensorBoardLogger: every is 0; it must be an integer of at least 1$"):
        TensorBoardLogger(every=0)
    with pytest.raises(ValueError, match=r"^TensorBoardLogger: histograms is -1; it must be an integer of at least 0$"):
        TensorBoardLogger(histograms=-1)


# --- Profile ------------------------------------------------------------------------------------------------------

def steps_of(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as f: found = json.load(f)["traceEvents"]
    names = [e.get("name", "") for e in found]
    return sorted({n for n in names if n.startswith("batch ")}), names


@pytest.mark.parametrize(("steps", "epochs", "batches", "validations"), [
    ((2, 4), 1, [2, 3], 0), (range(0, 1), 1, [0], 0), ((3, 5), 2, [3, 4], 0), ((3, 7), 2, [3, 4, 5, 6], 1),
    ((4, 99), 1, [4], 1), ((9, 10), 2, [9], 0)])
def test_profile_records_the_chosen_batches(tmp_path, steps, epochs, batches, validations):
    profile = Profile(steps, tmp_path / "trace.json")
    Runner(profile).fit(epochs, learner())
    ranges, names = steps_of(tmp_path / "trace.json")
    assert ranges == [f"batch {i}" for i in batches]
    assert sum("SGD.step" in name for name in names) == len(batches)
    assert sum(name == "aten::addmm" for name in names) == 2 * (len(batches) + validations)     # two linear layers
    assert "Self CPU" in profile.table


def test_profile_compressed_and_without_a_file(tmp_path):
    Runner(Profile((0, 2), tmp_path / "trace.json.gz")).fit(1, learner())
    assert steps_of(tmp_path / "trace.json.gz")[0] == ["batch 0", "batch 1"]
    profile = Profile((0, 2), None, record_shapes=True)
    Runner(profile).fit(1, learner())
    assert profile.table
    assert os.listdir(tmp_path) == ["trace.json.gz"]


@pytest.mark.parametrize("what", [ZeroDivisionError, KeyboardInterrupt, CancelTrainException])
def test_profile_ends_whatever_ends_the_fit(tmp_path, what):
    profile = Profile((3, 90), tmp_path / "trace.json")
    run = Runner([Boom("after_backward", 1, what), profile])
    try: run.fit(2, learner())
    except (ZeroDivisionError, KeyboardInterrupt): pass
    assert sum("SGD.step" in name for name in steps_of(tmp_path / "trace.json")[1]) == 2
    run.fit(1, learner())                                       # nothing is still being recorded
    for twin in (copy.deepcopy(profile), pickle.loads(pickle.dumps(profile))): assert twin.table == profile.table


def test_profile_says_that_there_was_nothing(tmp_path, capsys):
    profile = Profile((7, 9), tmp_path / "trace.json")
    Runner(profile).fit(1, learner())
    assert capsys.readouterr().out == ("Profile: the fit had 5 training batches and ended before batch 7; nothing was "
                                       "recorded\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [(2, 2), (3, 1), (-1, 2), (1,), 5, range(0, 9, 2), range(4, 2), "12", (0.0, 2)])
def test_profile_steps_that_are_none_are_refused(steps):
    with pytest.raises(ValueError, match=r"^Profile: steps is .*; it must be the first batch and the one after "):
        Profile(steps)


def test_profile_a_path_in_no_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^Profile: path is '.*t.json' and its folder doesn't exist; make the folder"):
        Runner(Profile(path=tmp_path / "none" / "t.json")).fit(1, learner())


# --- together -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("compiled", [False, True])
def test_all_together_change_no_bit(folder, tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(CompiledStep, "backend", "aot_eager")
    learns = [learner("ours", lr=0.1) for _ in range(2)]
    for learn, cbs in zip(learns, ([], [CSVLogger(tmp_path / "h.csv"), TensorBoardLogger(folder), Profile(
            (2, 4), tmp_path / "trace.json"), AveragedWeights(0.9), EarlyStopping(patience=9),
            TerminateOnNonFinite()]), strict=True):
        run = quiet(*cbs, compile=compiled)
        run.fit(3, learn)
    for p, q in zip(learns[0].model.parameters(), learns[1].model.parameters(), strict=True): assert torch.equal(p, q)
    assert len(read(tmp_path / "h.csv")) == 3
    assert len(events(folder)["batch/loss"]) == 15


def test_an_epoch_ends_for_the_loggers_before_early_stopping_ends_the_fit(folder, tmp_path):
    class Worse(Callback):
        _order = 3

        def after_epoch(self): self.run.avg_stats.history[-1]["valid_loss"] = self.epoch
    run = Runner([AvgStatsCallback(accuracy), Worse(), EarlyStopping(patience=1), CSVLogger(tmp_path / "h.csv"),
                  TensorBoardLogger(folder)])
    run.logger = lambda row: None
    run.fit(5, make_learn())
    assert [row["valid_loss"] for row in read(tmp_path / "h.csv")] == ["0", "1"]
    assert events(folder)["epoch/valid_loss"] == [(0, 0), (1, 1)]
    assert "epoch/valid_accuracy" in events(folder)
