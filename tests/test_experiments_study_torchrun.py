"""Studies under `torchrun`; that the table stays the same is among the tests of `Distributed`."""

import pytest
import torch

from experiments import data
from experiments.errors import InputError
from experiments.study import Study, grid, torchrun


def test_without_torchrun_the_backend_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert torchrun.processes() == 1
    study = Study("s", one, grid(seed=[0]), out=tmp_path / "s")
    with pytest.raises(InputError, match="torchrun --nproc-per-node 2 -m experiments"): study.run(backend="torchrun")


def one(seed): return {"value": seed}


def test_pixel_moments_are_those_of_float64():
    images = torch.randint(256, (50, 9, 9), dtype=torch.uint8)
    for pixels, top in ((images, 255), (images.float() / 3, 16)):
        wide = pixels.double() / top
        mean, std = data.pixel_moments(pixels, top)
        assert (mean, std) == (pytest.approx(float(wide.mean()), 1e-6), pytest.approx(float(wide.std()), 1e-6))
