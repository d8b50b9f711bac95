"""Freed memory stays with the processes that train, so no step clears the pages of the one before."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.memory import keep_memory
from experiments.study import Study, grid

HERE = Path(__file__)
CODE = f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
from {HERE.stem} import faults
from experiments.memory import keep_memory
print(*faults(), keep_memory(), *faults())
"""


def faults():
    """The page faults of three passes: in each, eight blocks of 4 MiB are allocated and freed, twenty times."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            blocks = [torch.ones(1 << 20, dtype=torch.float32) for _ in range(8)]
            del blocks
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found


def last_faults(seed): return {"faults": faults()[-1]}


@pytest.fixture(scope="module")
def kept():
    """The page faults of a process that keeps its memory; skips where malloc can't be told."""
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True).stdout
    *_, could, _, _, after = out.split()
    if could == "False": pytest.skip("this malloc can't be told")
    return int(after)


def test_what_is_freed_is_kept(kept): assert kept < 100      # before, most often 160,000


def test_worker_processes_keep_what_is_freed(kept, tmp_path):
    study = Study("s", last_faults, grid(seed=[0, 1]), out=tmp_path / "s").run(jobs=2, progress=False)
    assert [row["faults"] < 100 for row in study.rows()] == [True, True]


def test_a_system_that_cannot_be_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_memory() is False


def test_a_library_without_it(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_memory() is False
