"""The one-epoch challenge: the variant of the network, short runs."""

import json

import torch
from torch import nn

from experiments.__main__ import main
from experiments.models import ResidualBlock
from experiments.published import one_epoch
from norms import RunningBatchNorm


def test_residual_block_by_hand():
    block = ResidualBlock(2, lambda nf: nn.Identity())
    for m in block.modules():
        if isinstance(m, nn.Conv2d): nn.init.constant_(m.weight, 1.0)
    x = torch.arange(8.0).view(1, 2, 2, 2)
    # 2x2 to 1x1: every weight meets one of the 8 values or the border; their sum is 28, then 28 twice over.
    assert torch.equal(block(x), x + 56)
    assert [type(m) for m in ResidualBlock(4, nn.BatchNorm2d).f] == [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 2


def test_variant_is_as_published():
    model = one_epoch.as_published(0)
    shapes, x = [], torch.rand(2, 1, 28, 28)
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(8, 14, 14), (16, 7, 7), (32, 4, 4), (64, 2, 2), (64, 2, 2), (64, 1, 1), (64,), (64,), (10,)]
    kinds = [type(m) for m in model.modules() if isinstance(m, (RunningBatchNorm, nn.BatchNorm2d))]
    assert kinds == [RunningBatchNorm] * 4 + [nn.BatchNorm2d] * 2
    assert sum(isinstance(m, RunningBatchNorm) for m in one_epoch.running(0).modules()) == 6
    assert [m.p for m in model if isinstance(m, nn.Dropout)] == [0.4]
    for p, q in zip(model.parameters(), one_epoch.running(0).parameters(), strict=True): assert torch.equal(p, q)


def test_the_runs_of_one_epoch_for_a_few_steps(tmp_path, capsys):
    argv = ["one-epoch", "--data", "digits", "--limit", "48", "--out"]
    assert main([*argv, str(tmp_path / "a")]) == 0
    rows = json.loads((tmp_path / "a" / "summary.json").read_text())["rows"]
    assert [(r["arm"], r["batch_size"], r["lr"]) for r in rows] == [
        ("lesson-batch-32", 32, [1.0, 0.2]), ("variant-batch-16", 16, [1.0, 0.2]),
        ("variant-batch-16-running", 16, [1.0, 0.2]), ("variant-batch-2", 2, 0.4), ("variant-batch-2-running", 2, 0.4)]
    assert all(r["status"] == "ok" for r in rows)
    assert (tmp_path / "a" / "one_epoch.png").read_bytes().startswith(b"\x89PNG")
    assert "0.9750 and slightly more" in capsys.readouterr().out
    assert main([*argv, str(tmp_path / "b"), "--arms", "lesson-batch-3"]) == 2
    assert "unknown arm 'lesson-batch-3': did you mean 'lesson-batch-32'" in capsys.readouterr().err
