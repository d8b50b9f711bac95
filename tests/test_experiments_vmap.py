"""Batch norm mapped over the batch: the network against torch's own norm, the run, the verdict on made-up rows."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from experiments.__main__ import main
from experiments.data import load_data
from experiments.published import vmap_batchnorm
from experiments.published.vmap_batchnorm import ARMS, Config, Perceptron, judge, pixels, table
from experiments.results import read_summary


def reference(model, x, stats=None):
    """The network with torch's batch norm, by `stats` (means, variances) or the batch's own."""
    for i, (w, b) in enumerate(zip(model.weights, model.biases, strict=False)):
        given = (None, None) if stats is None else (stats[0][i].clone(), stats[1][i].clone())
        h = F.batch_norm(x @ w + b, *given, model.gammas[i], model.betas[i], training=stats is None, eps=1e-6)
        x = h.sigmoid()
    return x @ model.weights[3]


@pytest.mark.parametrize("arm", ["vanilla", "per-example"])
def test_network_equals_one_with_torchs_norm(arm):
    model, y = Perceptron(arm, 0), torch.arange(20) % 10
    batches = [torch.rand(20, 784, dtype=torch.float64) for _ in range(3)]
    for x in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    expected = F.cross_entropy(reference(model, batches[-1]), y)
    for p, g in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
    # Evaluation goes by the plain averages over all batches so far; of the first layer they are plain to compute.
    first = [x @ model.weights[0] + model.biases[0] for x in batches]
    torch.testing.assert_close(model.means[0], sum(h.mean(0) for h in first) / 3)
    torch.testing.assert_close(model.variances[0], sum(h.var(0, correction=0) for h in first) / 3)
    model.eval()
    torch.testing.assert_close(model(x), reference(model, x, (model.means, model.variances)))
    assert model.batches == 3


def test_parameters_are_standard_normal_and_the_same_for_every_arm():
    baseline, vanilla, mapped = (dict(Perceptron(a, 1).named_parameters()) for a in ARMS)
    assert sum(p.numel() for p in baseline.values()) == 784 * 100 + 2 * 100 * 100 + 100 * 10 + 300
    affine = {f"{n}.{i}" for n in ("gammas", "betas") for i in (0, 1, 2)}
    assert vanilla.keys() == mapped.keys() == baseline.keys() | affine
    for name, p in vanilla.items():
        assert torch.equal(p, mapped[name])
        if name in baseline: assert torch.equal(p, baseline[name])
    assert vanilla["weights.0"].std().item() == pytest.approx(1, abs=0.01)      # 78,400 draws
    assert not torch.equal(vanilla["gammas.0"], vanilla["gammas.1"])


@pytest.mark.parametrize("arm", ["baseline", "per-example"])
def test_the_forward_pass_takes_one_image(arm):
    with pytest.raises(AssertionError): Perceptron(arm, 0)(torch.rand(4, 5, 784, dtype=torch.float64))


def test_pixels_lie_in_0_to_1():
    images = load_data("digits", limit=30)
    x = pixels(images, images.train.x)
    assert x.dtype == torch.float64
    assert x.min().item() == pytest.approx(0, abs=1e-6)
    assert x.max().item() == pytest.approx(1, abs=1e-6)


def test_a_short_run_on_the_digits(tmp_path):
    result = vmap_batchnorm.run(Config(data="digits", limit=300, steps=29, out=str(tmp_path / "run")))
    assert [r["arm"] for r in result.rows] == list(ARMS)
    assert [(r["steps"], r["epochs"], r["status"]) for r in result.rows] == [(29, 10, "ok")] * 3
    assert 0 < result.rows[2]["loss_difference"] < 1e-12
    assert result.rows[1]["valid_loss"] == pytest.approx(result.rows[2]["valid_loss"], rel=1e-12)
    assert result.rows[0]["valid_loss"] != pytest.approx(result.rows[1]["valid_loss"], rel=1e-2)
    assert result.reproduced is True
    assert ("were not tested (2,000 steps on MNIST in full). Vanilla and per-example are the same: the losses of "
            "vanilla and per-example differ by ") in result.verdict
    assert result.verdict.endswith(" (largest of 1 seed; at most 1e-7 needed).")
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert [len(curves[a]["accuracy"]) for a in ARMS] == [2, 2, 2]      # after steps 10 and 20
    assert curves["vanilla"]["accuracy"] == curves["per-example"]["accuracy"]
    assert len(curves["per-example"]["difference"]) == 29
    assert (tmp_path / "run" / "vmap.png").read_bytes().startswith(b"\x89PNG")
    assert "losses" not in curves["per-example"]
    assert read_summary(tmp_path / "run")["published"] == {"baseline": 0.54, "vanilla": 0.66, "per-example": 0.66}


def made(baseline=0.54, norm=0.66, apart=1e-12, seeds=5, steps=2000):
    base = {"valid_loss": 1.0, "seconds": 1.0, "status": "ok", "steps": steps}
    return [{**base, "arm": a, "seed": s, "valid_accuracy": baseline if a == "baseline" else norm,
             **({"loss_difference": apart} if a == "per-example" else {})} for s in range(seeds) for a in ARMS]


@pytest.mark.parametrize(("rows", "images", "expected"), [
    (made(), 50_000, True), (made(apart=1e-6), 50_000, False), (made(apart=None), 50_000, False),
    (made(apart=math.nan), 50_000, False),
    # 3 * 0.016 * sqrt(1 + 1/n) + 0.005: 0.0576 for 5 seeds, 0.0729 for one
    (made(norm=0.71), 50_000, True), (made(norm=0.72), 50_000, False), (made(norm=0.72, seeds=1), 50_000, True),
    (made(baseline=0.48), 50_000, False), (made(norm=None), 50_000, False),
    (made(norm=0.2), 1000, True), (made(norm=0.2, steps=10), 50_000, True), (made(apart=1.0), 1000, False)])
def test_verdict(rows, images, expected):
    found = judge(rows, "MNIST", images)
    assert found.reproduced is expected
    assert ("NOT" in found.sentence) is not expected


def test_table_by_hand():
    header, lines = table({"rows": made(seeds=2)})
    assert header[:3] == ["arm", "published", "valid accuracy"]
    assert lines[0] == ["baseline", "0.54", "0.5400", "0.540 to 0.540", "0.5400", "0.5400 to 0.5400", "0 of 2", "1",
                        "2", "1", "ok", "-"]
    assert [line[-1] for line in lines] == ["-", "-", "1.0e-12"]
    assert table({"rows": made(apart=None)})[1][2][-1] == "nan"


def test_another_function_is_exit_status_1(tmp_path, monkeypatch, capsys):
    real = vmap_batchnorm.batch_norm
    monkeypatch.setattr(vmap_batchnorm, "batch_norm", lambda x, gamma, beta, eps: real(x, gamma, beta, 1e-3))
    argv = ["vmap", "--data", "digits", "--limit", "100", "--steps", "3", "--out", str(tmp_path / "run")]
    assert main(argv) == 1
    said = "Vanilla and per-example are NOT the same: the losses of vanilla and per-example differ by"
    assert said in capsys.readouterr().out
    assert main([*argv[:-1], str(tmp_path / "b"), "--limit", "50"]) == 2
    assert "batch size is 100 and there are 50 training images" in capsys.readouterr().err
    assert main([*argv, "--steps", "0"]) == 2
    assert "steps is 0; it must be a positive integer" in capsys.readouterr().err
