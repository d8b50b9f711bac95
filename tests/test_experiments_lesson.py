"""The lesson's runs: a few steps of each, and what is said of those that became NaN."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments import data
from experiments.__main__ import main
from experiments.data import load_data
from experiments.published import lesson, runs

REAL_DIGITS = data._digits      # which call themselves MNIST in a test


def test_the_lesson_s_runs_are_those_of_the_table():
    assert [(r.batch_size, r.lr, r.epochs) for r in lesson.RUNS.values()] == [
        (512, 0.4, 2), (512, 0.9, 1), (512, 1.0, 3), (512, 1.0, 3), (512, (0.6, 2.0, 0.1), 8), (512, 0.8, 3),
        (512, 0.1, 3), (2, 0.4, 1), (2, 0.4, 1), (32, (1.0, 0.2), 1), (16, (1.0, 0.2), 1)]
    for run in lesson.RUNS.values(): assert isinstance(run.build(0, 10)[-1], nn.Linear)
    assert all(name in lesson.RUNS for name in lesson.LESSONS_OWN)


def test_every_run_of_the_lesson_for_a_few_steps(tmp_path, capsys):
    result = lesson.run(lesson.Config(data="digits", limit=40, out=str(tmp_path / "run")))
    assert [r["arm"] for r in result.rows] == list(lesson.RUNS)
    assert [len(r["valid_accuracies"]) for r in result.rows] == [r.epochs for r in lesson.RUNS.values()]
    assert result.reproduced is None
    assert "were not compared" in result.verdict
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    layers = curves[lesson.HOOKED]["activations"]
    assert list(layers) == [f"layer {i}" for i in range(1, 6)]
    for means, stds in layers.values():
        assert len(means) == len(stds) == 1             # one step
        assert means[0] == pytest.approx(0, abs=1e-5)   # the norm comes last in a layer, before training
    assert len(curves["BatchNorm-warm-up"]["losses"][0]) == 8
    for name in ("lesson.png", "lesson_activations.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "InstanceNorm, published NaN: with the lesson's own form 100% of the first predictions are NaN" in out
    assert "LayerNorm, published NaN: with the lesson's own form 0% of the first predictions are NaN" in out
    assert "62,090 parameters without a norm" in out


@pytest.mark.parametrize(("arm", "limit"), [("BatchNorm2d-batch-2", 5), ("BatchNorm2d", 513), ("BatchNorm2d", 2)])
def test_a_single_image_that_is_left_over_is_left_out_and_no_more_are(arm, limit, monkeypatch, tmp_path):
    # The digits are 1,197: of one value per channel torch's batch norm has no variance, and refuses it.
    seen = []
    real = runs.train
    monkeypatch.setattr(runs, "train", lambda *args, drop_last, **kwargs: [
        seen.append(drop_last), real(*args, drop_last=drop_last, **kwargs)][1])
    monkeypatch.setitem(lesson.RUNS, arm, replace(lesson.RUNS[arm], epochs=1, published=()))
    row, = lesson.run(lesson.Config(data="digits", limit=limit, arms=(arm,), out=str(tmp_path / "run"))).rows
    assert row["status"] == "ok"
    assert seen == [limit % 2 == 1]
    assert [n % run.batch_size == 1 for run in lesson.RUNS.values() for n in (50_000, 60_000)] == [False] * 22


def test_one_image_is_too_few(tmp_path, capsys):
    assert main(["lesson", "--data", "digits", "--limit", "1", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "error: there is 1 training image, and these runs need 2; take a larger --limit\n")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_refused_is_a_row(tmp_path, capsys, monkeypatch):
    def refuse(*shape): raise ValueError("Expected more than 1 value per channel")
    monkeypatch.setattr("torch.nn.functional._verify_batch_size", refuse)
    assert main(["lesson", "--data", "digits", "--limit", "4", "--arms", "BatchNorm2d-batch-2,RunningBatchNorm-batch-2",
                 "--out", str(tmp_path / "run")]) == 0
    failed, ok = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert (failed["status"], failed["valid_accuracies"], ok["status"]) == ("failed", [], "ok")
    assert "BatchNorm2d-batch-2 failed: Expected more than 1 value per channel" in capsys.readouterr().out


def test_a_run_outside_its_tolerance_is_exit_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "TRAIN_IMAGES", 40)

    def digits(limit):
        images = REAL_DIGITS(limit)
        images.name = "MNIST"
        return images
    monkeypatch.setattr(data, "_digits", digits)
    argv = ["lesson", "--data", "digits", "--limit", "40", "--arms", "none", "--out", str(tmp_path / "run")]
    assert main(argv) == 1
    said = "NOT reproduced with 1 seed: none "
    assert said in capsys.readouterr().out


# --- why NaN ------------------------------------------------------------------------------------------------------

def test_the_lesson_s_own_form_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    assert lesson.Unbiased((1, 2, 3), 0.0)(x).flatten().tolist() == pytest.approx([-1, 0, 1])      # variance 2 / 2
    assert lesson.Unbiased((2, 3), 1.0)(x).isnan().all()
    images = load_data("digits", limit=8)
    assert lesson.lost_at_first("InstanceNorm", images, 0) == 1
    assert lesson.lost_at_first("LayerNorm", images, 0) == 0


@pytest.mark.parametrize(("name", "row", "said"), [
    ("LayerNorm", {"lost_at_first": 0.0, "first_not_finite": 7, "lr": 0.8},
     "NaN came from the training, not from the norm; here the loss is finite for 7 steps and then no more: lr 0.8 is"),
    ("LayerNorm", {"lost_at_first": 0.0, "first_not_finite": None}, "not from the norm; here every loss is finite."),
    ("InstanceNorm", {"lost_at_first": 1.0, "first_not_finite": None, "valid_accuracy": 0.1},
     "0/0 of the one value per channel on the 1x1 map; here every loss is finite, and nothing is learned"),
    ("InstanceNorm", {"lost_at_first": 1.0, "first_not_finite": None, "valid_accuracy": 0.9}, "every loss is finite.")])
def test_explanation_follows_what_was_measured(name, row, said):
    assert said in lesson.explanation(name, row)
