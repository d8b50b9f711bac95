"""The exercises with the breast cancer data: their figures, the verdict on made-up ones, the command."""

import json
import math

import pytest
import torch
from torch import nn

from experiments.__main__ import main
from experiments.published import breast_cancer
from experiments.published.breast_cancer import (
    EXERCISES,
    FIGURES,
    Config,
    judge,
    load_samples,
    perceptron,
    table,
    train,
)
from experiments.results import read_summary
from norms import BatchNorm


def test_the_exercises_hold(tmp_path, capsys):
    result = breast_cancer.run(Config(seeds=(3, 4), out=str(tmp_path / "run")))
    assert result.reproduced is True, result.verdict
    assert result.status == 0
    summary = read_summary(tmp_path / "run")
    assert (summary["experiment"], summary["data"], summary["train_images"]) == ("breast-cancer", "breast cancer", 455)
    assert [(r["exercise"], r["seed"]) for r in summary["rows"]] == [(e, s) for e in EXERCISES for s in (3, 4)]
    figures = {f: v for r in result.rows for f, v in r["figures"].items() if r["seed"] == 3}
    assert 0 < figures["gradients, largest change"] < 1e-12     # rounding, but not compared with itself
    assert 0 < figures["moving mean from 42"] < 1
    assert 0.9 < figures["test accuracy"] < 1
    out = capsys.readouterr().out
    assert "perceptron [30, 20, 10, 1]; 871 parameters" in out
    assert "455 training and 114 test samples" in out
    assert (tmp_path / "run" / "breast_cancer.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert len(curves["(e)"]) == 100
    # From 0, a tenth of the first batch's moments: 10,000 values of N(42, 10^2).
    assert curves["(c)"][0] == [0, 0]
    assert curves["(c)"][1] == pytest.approx([4.2, 10], abs=0.5)


def test_samples_are_split_and_standardised_by_the_training_part():
    samples = load_samples(0)
    assert samples.train.x.shape == (455, 30)
    assert samples.valid.y.shape == (114, 1)
    assert samples.train.x.mean(0).abs().max() < 1e-12
    assert (samples.train.x.std(0) - 1).abs().max() < 1e-12
    assert samples.valid.x.mean(0).abs().max() > 0.01
    assert not torch.equal(samples.train.x, load_samples(1).train.x)
    both = torch.cat([samples.train.y, samples.valid.y])
    assert both.sum() == 357        # benign


def test_the_perceptron_has_biases_before_norms_only_when_told():
    kinds = [type(m) for m in perceptron()]
    assert kinds == [nn.Linear, BatchNorm, nn.Tanh, nn.Linear, BatchNorm, nn.Tanh, nn.Linear, nn.Sigmoid]
    assert [m.bias is not None for m in perceptron() if isinstance(m, nn.Linear)] == [False, False, True]
    assert [m.bias is not None for m in perceptron(bias=True) if isinstance(m, nn.Linear)] == [True] * 3


def test_a_minibatch_is_drawn_without_replacement():
    run, _, samples = train(0, "cpu")
    assert len(run.data.train_dl) == 100
    rows = {tuple(x.tolist()) for x in samples.train.x}
    for xb, yb in run.data.train_dl[:5]:
        assert xb.shape == (50, 30)
        assert yb.shape == (50, 1)
        drawn = {tuple(x.tolist()) for x in xb}
        assert len(drawn) == 50
        assert drawn <= rows


def made(accuracy=0.96, seeds=3, **changes):
    """Rows within every limit, but for `changes`."""
    values = {f: (limit or accuracy) / 2 if limit else accuracy for fs in FIGURES.values() for f, (_, limit) in
              fs.items()}
    values.update({f: v for f in values for k, v in changes.items() if k in f})
    return [{"exercise": e, "seed": s, "seconds": 0.0, "status": "ok", "figures": {f: values[f] for f in fs}}
            for s in range(seeds) for e, fs in FIGURES.items()]


@pytest.mark.parametrize(("rows", "missed"), [
    (made(), None), (made(bias=2e-12), "(a) the bias's own gradient"), (made(variance=5.1), "(c) moving variance"),
    (made(gamma=math.nan), "(b) its std from |gamma|"), (made(alone=None), "(d) alone and among others"),
    # 0.95 - 3 sqrt(0.95 0.05 / (n 114)): 0.915 for 3 seeds, 0.931 for 10
    (made(accuracy=0.92), None), (made(accuracy=0.92, seeds=10), "(e) test accuracy"),
    (made(accuracy=0.91), "(e) test accuracy")])
def test_verdict(rows, missed):
    found = judge(rows, "breast cancer", 455)
    assert found.reproduced is (missed is None)
    assert ("NOT" in found.sentence) is (missed is not None)
    assert f"{8 + (missed is None)} of 9 claims hold{'; ' * bool(missed)}{missed or '.'}" in found.sentence
    assert ("missed" in found.sentence) is (missed is not None)


def test_table_by_hand():
    header, lines = table({"rows": made(seeds=2, outputs=3e-12)})
    assert header == ["figure", "published", "needed", "measured", "seeds", "status"]
    assert lines[0] == ["(a) outputs, largest change", "0", "at most 1e-12", "3e-12", "2", "missed"]
    assert lines[-1] == ["(e) test accuracy", "0.95", "mean of at least 0.907", "0.9600 (0.9600 to 0.9600)", "2", "ok"]


def test_a_missed_exercise_is_exit_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(breast_cancer.EXERCISES, "(d)", lambda seed, device: ({"alone and among others": 0.1}, None))
    assert main(["breast-cancer", "--seeds", "1", "--out", str(tmp_path / "run")]) == 1
    said = "NOT reproduced with 1 seed: 8 of 9 claims hold; (d) alone and among others 0.1 (largest of 1 seed; at most"
    assert said in capsys.readouterr().out
