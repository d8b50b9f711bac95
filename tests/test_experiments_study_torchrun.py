"""The command under `torchrun`: its processes share the arms, and the table stays the same."""

import json
import os

import pytest
import ranks
import torch

from experiments import data
from experiments.errors import InputError
from experiments.study import Study, grid, torchrun

ARMS = ("small-batch", "--data", "digits", "--limit", "40", "--norms", "BatchNorm", "GroupNorm", "RunningBatchNorm",
        "--seeds", "2")


def rows(folder):
    found = json.loads((folder / "summary.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in found]


def test_the_table_is_that_of_one_process(tmp_path, forks):
    done = ranks.torchrun(2, "-m", "experiments", *ARMS, "--out", "two", cwd=tmp_path)
    alone = forks.run("-m", "experiments", *ARMS, "--jobs", "1", "--out", "one", cwd=tmp_path,
                      env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "2 at once (torchrun)" in done.stdout, done.stderr[-3000:]
    assert json.dumps(rows(tmp_path / "two")) == json.dumps(rows(tmp_path / "one")), alone.stderr[-3000:]
    table = [[line[:60] for line in text.splitlines() if line.startswith(("norm ", "Group", "Running", "Batch"))]
             for text in (done.stdout, alone.stdout)]
    assert table[0] == table[1]


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
