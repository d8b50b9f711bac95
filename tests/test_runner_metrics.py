"""Averages, the recorder, progress lines and pictures."""

import builtins
import math
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_runner_loop import make_learn
from torch import nn

from runner import (
    AvgStatsCallback,
    Callback,
    CancelBatchException,
    DataBunch,
    Dataset,
    Learner,
    LR_Find,
    ProgressCallback,
    Recorder,
    Runner,
    accuracy,
    get_dls,
    plots,
)
from runner.progress import bar_line


def test_accuracy_by_hand():
    out = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    assert accuracy(out, torch.tensor([0, 1, 1])).item() == pytest.approx(2 / 3)


class Fixed(nn.Module):
    """Predicts its input; its one parameter plays no part."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, x): return x + 0 * self.p


def fixed_learn(train, valid, bs):
    """A learner whose loss of an item is the item itself."""
    x, v = torch.tensor(train).view(-1, 1), torch.tensor(valid).view(-1, 1)
    dls = get_dls(Dataset(x, x), Dataset(v, v), bs)
    model = Fixed()
    return Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda p, y: p.mean(), DataBunch(*dls))


def double(pred, yb): return 2 * pred.mean()


def as_float(pred, yb): return pred.mean().item()


def test_averages_are_weighted_by_batch_size(capsys):
    # Five items in batches of 2, 2, 1: the mean over items is 6.2, whatever the order; a mean of batch means is not.
    avg = AvgStatsCallback([double, as_float])
    Runner(avg).fit(2, fixed_learn([1.0, 2.0, 3.0, 4.0, 21.0], [10.0, 20.0, 90.0, 0.0, 5.0], 2))
    for i, row in enumerate(avg.history):
        assert row["epoch"] == i
        assert row["train_loss"] == pytest.approx(6.2)
        assert row["train_double"] == pytest.approx(12.4)
        assert row["train_as_float"] == pytest.approx(6.2)
        assert row["valid_loss"] == pytest.approx(25.0)
        assert all(type(v) in (int, float) for v in row.values())
    out = capsys.readouterr().out
    assert out.startswith("train: [6.2")
    assert out.count("valid: [25.0, 50.0, 25.0]") == 2


def test_averages_are_summed_in_float64():
    # 20,000 losses of 1000.1 in float32: a float32 sum is off in the fifth digit.
    avg = AvgStatsCallback()
    Runner([avg, NoValidation()]).fit(1, fixed_learn([1000.1] * 20_000, [0.0], 10))
    assert avg.history[0]["train_loss"] == pytest.approx(torch.tensor(1000.1).double().item(), rel=1e-7)


class NoValidation(Callback):
    def begin_validate(self): return True


def test_skipped_pass_leaves_nan(capsys):
    avg = AvgStatsCallback(double)
    Runner([avg, NoValidation()]).fit(1, fixed_learn([1.0, 3.0], [1.0], 2))
    assert avg.history[0]["train_loss"] == 2.0
    assert math.isnan(avg.history[0]["valid_loss"])
    assert capsys.readouterr().out == "train: [2.0, 4.0]\n"


def test_metric_that_returns_a_vector():
    def hits(pred, yb): return pred.argmax(1) == yb
    text = r"the metric 'hits' returned a tensor of shape \(2,\); it must return one number per batch: end it with"
    with pytest.raises(ValueError, match=text):
        Runner(AvgStatsCallback([accuracy, hits])).fit(1, make_learn())


@pytest.mark.parametrize("value", [[1.0, 2.0], None, np.zeros(2), "0.5"])
def test_metric_that_returns_no_number(value):
    def odd(pred, yb): return value
    with pytest.raises(ValueError, match=r"(?s)the metric 'odd' returned .* it must return one number per batch"):
        Runner(AvgStatsCallback(odd)).fit(1, make_learn())


def test_numbers_of_any_kind_and_metrics_of_one_name(capsys):
    kinds = (1, 2.5, True, np.float32(0.5), torch.tensor(3), torch.tensor(True))
    avg = AvgStatsCallback((lambda p, y, v=v: v) for v in kinds)        # a generator, and six names that are one
    Runner(avg).fit(1, make_learn())
    names = ["<lambda>", *(f"<lambda>_{i}" for i in range(2, 7))]
    for phase in ("train", "valid"):
        assert [avg.history[0][f"{phase}_{n}"] for n in names] == [1, 2.5, 1, 0.5, 3, 1]


def test_loss_that_returns_a_vector():
    learn = make_learn()
    learn.loss_func = lambda p, y: F.cross_entropy(p, y, reduction="none")
    with pytest.raises(ValueError, match=r"the loss function returned a tensor of shape \(2,\)"):
        Runner(AvgStatsCallback()).fit(1, learn)


def test_recorder_keeps_losses_and_rates_of_training_batches():
    seen = []

    class Look(Callback):
        def after_loss(self):
            if self.in_train: seen.append(self.loss.item())

        def after_step(self):
            for group in self.opt.param_groups: group["lr"] *= 0.5
    run = Runner([Recorder(), Look()])
    run.fit(2, make_learn(lr=0.8))
    assert run.recorder.losses == seen
    assert run.recorder.lrs == [[0.8, 0.4, 0.2, 0.1]]
    assert all(type(v) is float for v in run.recorder.losses)
    run.fit(1, make_learn(), reset_history=True)
    assert len(run.recorder.losses) == 2


def test_recorder_skips_a_batch_that_had_no_loss():
    class SkipFirst(Callback):
        def begin_batch(self):
            if self.in_train and self.n_iter == 0: raise CancelBatchException
    run = Runner([Recorder(), SkipFirst()])
    run.fit(1, make_learn())
    assert len(run.recorder.losses) == len(run.recorder.lrs[0]) == 1


def test_nothing_comes_to_the_host_inside_a_batch(monkeypatch):
    inside, taken = [False], []

    class Mark(Callback):
        _order = -100

        def begin_batch(self): inside[0] = True

    class Unmark(Callback):
        _order = 100

        def after_batch(self): inside[0] = False

    def spy(name):
        real = getattr(torch.Tensor, name)

        def spied(self, *args, **kwargs):
            if inside[0]: taken.append(name)
            return real(self, *args, **kwargs)
        return spied
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, spy(name))
    cbs = [Mark(), Recorder(), AvgStatsCallback(accuracy), ProgressCallback(live=False), Unmark()]
    Runner(cbs).fit(1, make_learn())
    assert taken == []


# --- progress -----------------------------------------------------------------------------------------------------

def test_progress_prints_one_plain_line_per_epoch(capsys, monkeypatch):
    monkeypatch.setattr(builtins, "__import__", refuse("fastprogress"))
    Runner([AvgStatsCallback(accuracy), ProgressCallback("my run")]).fit(2, make_learn())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("my run: epoch 2/2  train_loss ")
    assert "  valid_accuracy " in lines[1]
    assert "\r" not in "".join(lines)


def refuse(package, real=builtins.__import__):
    """An `__import__` that fails for `package`."""
    def importer(name, *args, **kwargs):
        if name.split(".")[0] == package: raise AssertionError(f"{package} was imported")
        return real(name, *args, **kwargs)
    return importer


def test_progress_without_statistics_still_tells_the_epochs(capsys):
    Runner(ProgressCallback()).fit(2, make_learn())
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2", "epoch 2/2"]


def test_live_progress_draws_a_bar_and_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    Runner([AvgStatsCallback(accuracy), ProgressCallback("my run")]).fit(2, make_learn())
    out = capsys.readouterr().out
    assert "\rmy run epoch 2/2 |" in out
    assert "50.00% [1/2" in out
    assert "\rmy run validation 1/2 |" in out
    assert [line.split("\r")[-1] for line in out.split("\n")].count("my run") == 1      # above the table
    rows = [cells for line in out.split("\n") if len(cells := line.split("\r")[-1].split()) == 6]
    assert rows[0] == ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "time"]
    assert [r[0] for r in rows[1:]] == ["1", "2"]


@pytest.mark.parametrize("live", [True, False])
def test_progress_ends_cleanly_when_a_fit_breaks_off(live, capsys):
    class Boom(Callback):
        def after_step(self): raise KeyError("boom")
    run = Runner([AvgStatsCallback(), ProgressCallback(live=live)])
    with pytest.raises(KeyError): run.fit(1, make_learn(), cbs=Boom())
    assert run.logger is None
    run.fit(1, make_learn())
    assert run.avg_stats.history["epoch"] == [1]        # the epoch that broke off had a number


class Tee:
    """Takes text and is no terminal; `flush` and `isatty` are missing."""

    def __init__(self): self.text = ""

    def write(self, text): self.text += text


class Closed(Tee):
    def isatty(self): raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("out", [Tee(), Closed(), None])
@pytest.mark.parametrize("cbs", [[AvgStatsCallback], [AvgStatsCallback, ProgressCallback], [ProgressCallback]])
def test_a_standard_output_that_is_no_terminal_gets_plain_lines(out, cbs, monkeypatch):
    if out is not None: out.text = ""
    monkeypatch.setattr(sys, "stdout", out)
    Runner(cb_funcs=cbs).fit(2, make_learn())
    if out is None: return
    assert out.text.count("\n") == (2 if ProgressCallback in cbs else 4)
    assert "\r" not in out.text
    assert ("epoch 2/2  " in out.text) == (ProgressCallback in cbs)


@pytest.mark.parametrize("label", ["", "my run", "a label that is longer than such a line can ever be"])
@pytest.mark.parametrize("width", [20, 40, 72, 200])
@pytest.mark.parametrize("live", [True, False])
def test_progress_fits_in_a_narrow_line(live, width, label, capsys, monkeypatch):
    def a_metric_with_a_name_that_is_longer_than_many_lines(pred, yb): return 0.125
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: live, raising=False)
    metrics = [accuracy, a_metric_with_a_name_that_is_longer_than_many_lines]
    Runner([AvgStatsCallback(metrics), ProgressCallback(label)]).fit(2, make_learn(n_train=8))
    out = capsys.readouterr().out
    assert ("\r" in out) == live
    drawn = [line for line in out.replace("\r", "\n").split("\n") if line.strip()]
    if width < 100: assert max(map(len, drawn)) <= width
    if width == 40:
        for phase in ("train", "valid"): assert re.search(rf"\n  {phase}_a_met\S*lines 0.125\n", out)
    assert "0.125" in out
    for number in (0, 50, 100): assert f"{number}.00%" in out or not live
    if width >= 40 and live: assert "50.00% [2/4" in out


def test_what_a_bar_leaves_out():
    def line(width): return bar_line("mine epoch 12/40", "50.00% [12500/25000 01:23<01:24]", 0.5, width, "#")
    assert line(60) == "mine epoch 12/40 |####----| 50.00% [12500/25000 01:23<01:24]"[:60]
    assert line(52) == "mine epoch 12/40 || 50.00% [12500/25000 01:23<01:24]"
    assert line(49) == "mine epoch 12/40 50.00% [12500/25000 01:23<01:24]"
    assert line(40) == "mine epoch 12/40 50.00% [12500/25000]"
    assert line(35) == "epoch 12/40 50.00% [12500/25000]"
    assert line(25) == "50.00% [12500/25000]"
    assert line(10) == "50.00%"
    assert line(3) == ""
    assert bar_line("epoch 1/2", "[3/? 00:01<?]", 0.0, 14) == "[3/?]"      # a loader without a length
    for width in range(120): assert len(line(width)) <= width


def test_a_second_fit_s_progress_counts_its_own_epochs(capsys):
    run = Runner([AvgStatsCallback(), ProgressCallback()])
    for _ in range(2): run.fit(1, make_learn())
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/1"] * 2
    assert run.avg_stats.history["epoch"] == [0, 1]


# --- pictures -----------------------------------------------------------------------------------------------------

@pytest.fixture
def fitted():
    run, finder = Runner(Recorder()), LR_Find(max_iter=20)
    run.fit(1, make_learn(n_train=40), cbs=finder)
    run.fit(1, make_learn(n_train=40))
    yield run, finder
    plt.close("all")


def test_recorder_and_finder_draw_into_the_axes_they_are_given(fitted):
    run, finder = fitted
    for draw in (run.recorder.plot_lr, run.recorder.plot_loss, run.recorder.plot, finder.plot):
        _, ax = plt.subplots()
        assert draw(ax=ax) is ax
        assert len(ax.lines) >= 1
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert draw() is not ax
    assert list(run.recorder.plot_loss(skip_last=5).lines[0].get_ydata()) == run.recorder.losses[:-5]
    assert run.recorder.plot().get_xscale() == "log"


def test_pictures_never_call_show(fitted, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("show was called"))
    run, finder = fitted
    run.recorder.plot(), run.recorder.plot_lr(), run.recorder.plot_loss(), finder.plot()


def test_lines_and_groups_survive_values_that_are_not_finite(tmp_path):
    fig, (left, right) = plots.figure(2)
    assert plots.plot_groups({"a": [0.1, 0.3], "b": [None, math.nan]}, left, reference={"a": [0.2], "c": [9.0]}) is left
    assert plots.plot_lines({"a": ([0, 1], [1.0, math.nan]), "b": ([0, 1], [2.0, math.inf])}, right) is right
    assert [t.get_text() for t in left.texts] == ["0.200", "no finite value"]
    plots.save(fig, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_28_series_have_28_looks():
    assert len({tuple(plots.series_style(i).items()) for i in range(28)}) == 28
