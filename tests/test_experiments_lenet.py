"""LeNet: the network, a short run, the verdict on made-up rows."""

import json
import math

import pytest
import torch
from torch import nn

from experiments.__main__ import main
from experiments.published import lenet
from experiments.published.lenet import ARMS, Config, epochs_needed, judge, table
from norms import BatchNorm


def test_maps_and_norms_are_as_published():
    shapes, x = [], torch.rand(2, 1, 28, 28)
    for layer in lenet.lenet("torch", 0):
        x = layer(x)
        if isinstance(layer, (nn.Conv2d, nn.AvgPool2d, nn.Linear)): shapes.append(tuple(x.shape[1:]))
    assert shapes == [(6, 28, 28), (6, 14, 14), (16, 14, 14), (16, 7, 7), (120,), (84,), (10,)]
    kinds = {a: [type(m) for m in lenet.lenet(a, 0) if isinstance(m, (BatchNorm, nn.modules.batchnorm._BatchNorm))]
             for a in ARMS}
    assert kinds == {"none": [], "own": [BatchNorm] * 4, "torch": [nn.BatchNorm2d] * 2 + [nn.BatchNorm1d] * 2}
    assert sum(p.numel() for p in lenet.lenet("none", 0).parameters()) == 156 + 2416 + 94200 + 10164 + 850


def test_every_arm_starts_from_the_same_weights():
    def weights(arm, seed):
        return [p for m in lenet.lenet(arm, seed) if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters()]
    for arm in ARMS:
        for p, q in zip(weights("none", 1), weights(arm, 1), strict=True): assert torch.equal(p, q)
    assert not torch.equal(weights("own", 0)[0], weights("own", 1)[0])


def test_a_short_run_on_the_digits(tmp_path, capsys):
    result = lenet.run(Config(data="digits", limit=300, epochs=2, out=str(tmp_path / "run")))
    none, own, torchs = result.rows
    assert [r["arm"] for r in result.rows] == list(ARMS)
    assert [len(r["valid_accuracies"]) for r in result.rows] == [2, 2, 2]
    assert "gamma" not in none
    # Four steps: own and torch's are the same function still, and gamma has begun to move.
    assert own["train_loss"] == pytest.approx(torchs["train_loss"], rel=1e-5)
    assert own["gamma"] == pytest.approx(torchs["gamma"], abs=1e-5)
    assert 0 < max(abs(g - 1) for g in own["gamma"]) < 0.1
    assert own["train_loss"] < none["train_loss"]
    assert result.reproduced is None
    assert "were not tested (10 epochs on 50,000 images)" in result.verdict
    out = capsys.readouterr().out
    assert "107,786 parameters without a norm" in out
    assert out.count("gamma of the first norm: ") == 2
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(m["arm"], m["epoch"]) for m in metrics] == [(a, e) for a in ARMS for e in (0, 1)]
    assert (tmp_path / "run" / "lenet.png").read_bytes().startswith(b"\x89PNG")


def test_epochs_needed_by_hand():
    assert epochs_needed([0.1, 0.6, 0.5], 0.55) == 2
    assert epochs_needed([0.1, 0.6], 0.6) == 2
    assert epochs_needed([0.1, 0.6], 0.7) is None


def made(at=5, own=0.9, torchs=0.9, gamma=2.0, seeds=2, epochs=10):
    """Rows in which the arm without a norm ends at 0.8, and the others pass it in epoch `at` and end as told."""
    course = [0.5] * (at - 1) + [0.85] * (epochs - at)
    base = {"train_loss": 0.1, "valid_loss": 0.1, "seconds": 1.0, "status": "ok"}
    affine = {"gamma": [gamma, 1.5], "beta": [-0.1, 0.2]}
    return [{**base, "arm": a, "seed": s, "valid_accuracy": end, "valid_accuracies": [*accs, end][:epochs],
             **({} if a == "none" else affine)}
            for s in range(seeds) for a, accs, end in (("none", [0.1] * (epochs - 1), 0.8), ("own", course, own),
                                                       ("torch", course, torchs))]


@pytest.mark.parametrize(("rows", "images", "expected"), [
    (made(), 50_000, True), (made(at=6), 50_000, False), (made(at=10, own=0.7, torchs=0.7), 50_000, False),
    (made(torchs=0.905), 50_000, True), (made(torchs=0.92), 50_000, False),
    (made(gamma=1.1), 50_000, False), (made(gamma=None), 50_000, False), (made(gamma=math.nan), 50_000, False),
    (made(), 1000, None), (made(at=2, epochs=3), 50_000, None)])
def test_verdict(rows, images, expected):
    found = judge(rows, "Fashion-MNIST", images)
    assert found.reproduced is expected
    assert ("NOT" in found.sentence) is (expected is False)
    assert ("not tested" in found.sentence) is (expected is None)


def test_verdict_says_what_was_measured_and_on_what():
    sentence = judge(made(at=3), "MNIST", 50_000).sentence
    assert "reproduced on MNIST, in the place of Fashion-MNIST" in sentence
    for whose in ("own", "torch's"):
        assert f"{whose} passes 0.800, the best without a norm, after epoch 3 (mean of 2 seeds; at most 5 needed)" in (
            sentence)
    assert "gamma's distance from 1 is 0.75 (mean of 2 seeds; at least 0.33 needed)" in sentence       # 2.0 and 1.5
    never = judge(made(own=0.7, at=10), "MNIST", 50_000).sentence
    assert "own passes 0.800, the best without a norm, after epoch none (mean of 2 seeds; at most 5 needed; missed" in (
        never)


def test_table_by_hand():
    header, lines = table({"rows": made(at=3)})
    assert header[0] == "arm"
    assert header[-3:] == ["epochs to 0.8000", "gamma (published 1.33 to 2.82)", "beta (published -0.41 to 0.71)"]
    assert lines[0] == ["none", "0.8000", "0.800 to 0.800", "0.8000", "0.8000 to 0.8000", "0 of 2", "0.1", "2", "1",
                        "ok", "10", "-", "-"]
    assert lines[1][-3:] == ["3", "1.50 to 2.00", "-0.10 to 0.20"]


def test_settings_that_make_no_sense(capsys, tmp_path):
    assert main(["lenet", "--epochs", "0"]) == 2
    assert "epochs is 0; it must be a positive integer" in capsys.readouterr().err
    assert main(["lenet", "--data", "digits", "--limit", "100", "--out", str(tmp_path / "run")]) == 2
    assert "batch size is 128 and there are 100 training images" in capsys.readouterr().err
