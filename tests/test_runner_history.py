"""Histories over several fits: what goes on, what starts anew, what an undone fit leaves; groups added in mid-fit."""

import copy
import math
import pickle

import matplotlib.pyplot as plt
import pytest
import torch
from test_runner_loop import make_learn

from runner import (
    AvgStatsCallback,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    DataBunch,
    GradientAccumulation,
    LR_Find,
    ProgressCallback,
    Recorder,
    Rows,
    Runner,
    accuracy,
)


def runner(*cbs): return Runner([Recorder(), AvgStatsCallback(accuracy, quiet=True), *cbs])


def columns(run): return run.avg_stats.history["epoch"], run.recorder.rows["epoch", "batch", "step"]


def test_a_second_fit_goes_on_in_the_same_history():
    run, learn = runner(), make_learn()
    run.fit(2, learn)
    history, losses = run.avg_stats.history, [*run.recorder.losses]
    run.fit(1, learn)
    run.fit(0, learn)
    assert columns(run) == ([0, 1, 2], [(i // 2, i % 2, i) for i in range(6)])
    assert run.avg_stats.history is history
    assert run.recorder.losses[:4] == losses
    assert run.recorder.rows["loss"] == run.recorder.losses
    assert (run.epoch, run.n_iter) == (0, 0)            # schedules go by these
    run.fit(1, learn, reset_history=True)
    assert columns(run) == ([0], [(0, 0, 0), (0, 1, 1)])
    assert history["epoch"] == [0, 1, 2]                # who kept it has it
    run.fit(1, learn)
    assert columns(run) == ([0, 1], [(i // 2, i % 2, i) for i in range(4)])


def test_two_fits_leave_the_history_of_one():
    one, two, learns = runner(), runner(), [make_learn(momentum=0.9) for _ in range(2)]
    one.fit(3, learns[0])
    for epochs in (1, 2): two.fit(epochs, learns[1])
    assert one.recorder.rows == two.recorder.rows
    for a, b in zip(one.avg_stats.history, two.avg_stats.history, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


class At(Callback):
    """Raises `error` at an event of an epoch of the fit."""

    def __init__(self, event, epoch, error, order=5): self.at, self.error, self._order = (event, epoch), error, order

    def __call__(self, event):
        if (event, self.run.epoch) == self.at: raise self.error


@pytest.mark.parametrize(("event", "epoch", "error", "epochs", "next_epoch"), [
    ("after_epoch", 1, CancelTrainException, [0, 1], 2),
    ("after_backward", 1, CancelTrainException, [0], 2),        # an epoch that was begun has its number
    ("after_step", 0, KeyError, [], 1),
    ("begin_validate", 1, CancelTrainException, [0], 2),
    ("begin_fit", 0, KeyError, [], 0),
    ("after_epoch", 2, CancelEpochException, [0, 1, 2], 3)])
def test_numbers_after_a_fit_that_broke_off(event, epoch, error, epochs, next_epoch):
    run, learn = runner(), make_learn()
    try: run.fit(3, learn, cbs=At(event, epoch, error))
    except (KeyError, CancelEpochException): pass
    assert run.avg_stats.history["epoch"] == epochs
    steps = len(run.recorder.losses)
    run.fit(1, learn)
    assert run.avg_stats.history["epoch"] == [*epochs, next_epoch]
    assert run.recorder.rows[steps:, ("epoch", "batch")] == [(next_epoch, 0), (next_epoch, 1)]
    assert run.recorder.rows["step"] == sorted(set(run.recorder.rows["step"]))


def test_a_begin_fit_that_fails_before_a_history_hears_of_it_counts_nothing():
    run, learn = runner(), make_learn()
    run.fit(2, learn)
    for _ in range(2):
        with pytest.raises(KeyError): run.fit(2, learn, cbs=At("begin_fit", 0, KeyError, order=-30))
    run.fit(1, learn)
    assert columns(run) == ([0, 1, 2], [(i // 2, i % 2, i) for i in range(6)])


def test_an_epoch_whose_training_was_cancelled_first_has_no_stale_averages():
    run = runner(At("begin_epoch", 1, CancelEpochException, order=-5))
    run.fit(3, make_learn())
    assert [math.isnan(v) for v in run.avg_stats.history["train_loss"]] == [False, True, False]
    assert len(set(run.avg_stats.history["valid_loss"])) == 3


@pytest.mark.parametrize("before", [0, 2])
def test_a_search_leaves_no_row(before):
    run, learn, finder = runner(), make_learn(n_train=40), LR_Find(max_iter=10)
    twin, other = runner(), make_learn(n_train=40)
    for r, lr in ((run, learn), (twin, other)): r.fit(before, lr)
    kept = copy.deepcopy(run.recorder.losses)
    rows, history = run.recorder.rows, copy.deepcopy(run.avg_stats.history)
    for _ in range(2):
        run.fit(1, learn, cbs=finder)
        assert (run.recorder.losses, run.recorder.rows, run.avg_stats.history) == (kept, rows, history)
    for r, lr in ((run, learn), (twin, other)): r.fit(1, lr)
    assert run.recorder.rows == twin.recorder.rows
    assert columns(run) == columns(twin)


def test_a_search_of_a_runner_that_has_the_finder_is_looked_at_and_then_forgotten():
    finder, recorder, learn = LR_Find(max_iter=10), Recorder(), make_learn(n_train=40)
    Runner(recorder).fit(1, learn)
    kept = copy.deepcopy(recorder.losses)
    run = Runner([finder, recorder])
    for _ in range(2):
        run.fit(1, learn)
        assert recorder.losses == kept + finder.losses          # for run.recorder.plot()
        assert recorder.lrs[0][len(kept):] == finder.lrs
    Runner(recorder).fit(1, learn)
    assert recorder.losses[:20] == kept
    assert recorder.rows["epoch"] == [0] * 20 + [1] * 20


def test_accumulated_batches_are_counted_beside_the_steps():
    run = runner(GradientAccumulation(2))
    for _ in range(2): run.fit(1, make_learn(n_train=8))
    assert run.recorder.rows["epoch", "batch", "step"] == [(0, 0, 0), (0, 1, 0), (0, 2, 1), (0, 3, 1),
                                                           (1, 0, 2), (1, 1, 2), (1, 2, 3), (1, 3, 3)]


def test_a_recorder_moved_to_another_runner_goes_on_too():
    recorder, learn = Recorder(), make_learn()
    for _ in range(2): Runner(recorder).fit(1, learn)
    assert recorder.rows["step"] == [0, 1, 2, 3]


class Unfreeze(Callback):
    """Adds the last layer at step `at` of a fit, before the recorder sees the batch."""

    def __init__(self, at): self.at = at

    def begin_batch(self):
        if self.in_train and self.n_iter == self.at:
            self.opt.add_param_group({"params": [*self.model[2].parameters()], "lr": 0.01})


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_parameter_group_added_in_mid_fit(at):
    learn = make_learn(lr=0.5)
    learn.opt = torch.optim.SGD(learn.model[0].parameters(), lr=0.5)
    before = [p.detach().clone() for p in learn.model[2].parameters()]
    run = runner()
    run.fit(2, learn, cbs=Unfreeze(at))
    rec = run.recorder
    assert rec.lrs == [[0.5] * 4, [0.01] * (4 - at)]
    assert rec.rows[:, "lr"] == [0.5] * at + [0.01] * (4 - at)
    assert rec.rows["step", "lr_0", "lr_1"] == [(i, 0.5, 0.01) for i in range(at, 4)]
    assert not torch.equal(before[0], learn.model[2].weight)
    assert list(rec.plot_lr().lines[0].get_xdata()) == list(range(at, 4))
    assert [list(v) for v in rec.plot(skip_last=1, pgid=1).lines[0].get_data()] == [[0.01] * (3 - at),
                                                                                    rec.losses[at:3]]
    # another learner with one group, and back: each list has the batches that had the group
    run.fit(1, make_learn(lr=0.25))
    run.fit(1, learn)
    assert rec.lrs == [[0.5] * 4 + [0.25] * 2 + [0.5] * 2, [0.01] * (6 - at)]
    assert rec.rows["step", "lr_1"] == [(i, 0.01) for i in (*range(at, 4), 6, 7)]
    plt.close("all")


def test_history_is_rows(tmp_path):
    run = runner()
    run.fit(3, make_learn())
    history = run.avg_stats.history
    assert type(history) is Rows
    assert list(history[0]) == ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds"]
    assert history.where(epoch=1) == history[1:2]
    assert history.to_csv(tmp_path / "history.csv").read_text().startswith("epoch,train_loss,train_accuracy,valid_loss")
    assert list(history.plot("epoch", "valid_loss").lines[0].get_ydata()) == history["valid_loss"]
    plt.close("all")


def test_quiet_statistics_print_nothing_and_tell_the_progress(capsys):
    run = runner()
    run.fit(1, make_learn())
    assert capsys.readouterr().out == ""
    runner(ProgressCallback()).fit(1, make_learn())
    assert "valid_accuracy" in capsys.readouterr().out


def test_no_columns_of_a_validation_that_does_not_exist(capsys):
    class NoValidation(Callback):
        def begin_validate(self): return True
    learn = make_learn()
    learn.data = DataBunch(learn.data.train_dl, None)
    run = Runner([AvgStatsCallback(accuracy), NoValidation()])
    run.fit(1, learn)
    assert list(run.avg_stats.history[0]) == ["epoch", "train_loss", "train_accuracy", "seconds"]
    assert capsys.readouterr().out.count("\n") == 1


def test_a_cancelled_batch_counts_within_its_epoch():
    class SkipFirst(Callback):
        def begin_batch(self):
            if self.in_train and self.n_iter == 0: raise CancelBatchException
    run = runner(SkipFirst())
    for _ in range(2): run.fit(1, make_learn())
    assert run.recorder.rows["epoch", "batch", "step"] == [(0, 1, 1), (1, 1, 3)]


def test_histories_go_on_after_a_pickle():
    run, learn = runner(), make_learn()
    run.fit(1, learn)
    recorder, stats = pickle.loads(pickle.dumps([run.recorder, run.avg_stats]))
    Runner([recorder, stats]).fit(1, learn)
    assert recorder.rows["step"] == [0, 1, 2, 3]
    assert stats.history["epoch"] == [0, 1]
