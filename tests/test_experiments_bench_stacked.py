"""The bench of networks side by side: all its ways do the same steps."""

import pytest
import torch

from experiments.bench import Config, stacked
from experiments.bench.timing import settings


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)      # a batch norm over two values makes rounding as large as they are
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("norm", stacked.BY_VMAP)
def test_by_stack_and_by_vmap_the_steps_are_the_same(norm, monkeypatch):
    monkeypatch.setattr(stacked, "K", 3)
    config = Config()
    ways = [make(stacked.NORMS[norm], config.rng()) for make in (stacked.stacked, stacked.mapped)]
    with settings(): losses = [[way() for _ in range(4)] for way in ways]
    torch.testing.assert_close(*losses, rtol=1e-8, atol=1e-8)
    assert losses[0][0].shape == (3,)
    assert not torch.allclose(losses[0][0], losses[0][3], rtol=1e-3)


def test_rows_compare_with_one_alone_and_with_vmap(monkeypatch):
    def interleave(arms, repetitions, seconds):
        for f in arms.values(): f()
        return {name: [1.0 + i] * repetitions for i, name in enumerate(arms)}
    monkeypatch.setattr(stacked, "K", 2)
    monkeypatch.setattr(stacked, "interleave", interleave)
    before = torch.backends.mkldnn.enabled
    rows = {r["arm"]: r for r in stacked.rows(Config(repetitions=2))}
    assert torch.backends.mkldnn.enabled == before
    assert [(r["against"], r["target"]) for r in rows.values() if r["against"]] == [
        ("one alone, RunningBatchNorm", 0.3), ("2 by vmap, nn.GroupNorm", 1.0),
        ("2 by vmap, nn.BatchNorm2d of the batch", 1.0)]
    assert rows["2 by stack, RunningBatchNorm"]["ratio"] == 1.0         # 2 ms for two against 1 ms for one
