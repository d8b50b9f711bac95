"""Studies on a ray cluster of this machine: its rows are those of this process, and a killed trial is run again."""

import os
import signal
from pathlib import Path

import pytest
import torch

from experiments.errors import InputError
from experiments.study import Study, grid

ray = pytest.importorskip("ray")


def trial(seed, folder):
    print("trial", seed)
    if seed == 1 and not (mark := Path(folder, "killed")).exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 2: raise ValueError("no such luck")
    return {"acc": float(torch.rand(8).sum()), "threads": torch.get_num_threads()}


@pytest.mark.filterwarnings("ignore::ResourceWarning:ray", "ignore::FutureWarning:ray",
                            "ignore::DeprecationWarning:ray")
def test_a_cluster_gives_the_rows_of_this_process_and_a_killed_trial_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")     # it writes a file to the home folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]))
    points = grid(seed=range(5), folder=[str(tmp_path)])
    study = Study("s", trial, points, out=tmp_path / "cluster").run(jobs=2, backend="ray", progress=False)
    assert not ray.is_initialized()
    here = Study("s", trial, points, out=tmp_path / "here").run(backend="sequential", progress=False)
    both = [s.frame().drop(columns=["seconds", "attempts", "traceback"]) for s in (study, here)]
    assert both[0].equals(both[1])
    row = study.rows()[1]
    assert (row["status"], row["attempts"], row["threads"]) == ("ok", 2, 1)
    assert study.store.log(row["key"]).read_text().endswith("--- attempt 2\ntrial 1\n")


@pytest.mark.parametrize(("address", "why"), [("127.0.0.1:1", "ConnectionRefusedError"),
                                              ("nowhere", "ValueError: an address is HOST:PORT")])
def test_a_cluster_that_isn_t_there(address, why, tmp_path):
    study = Study("s", trial, grid(seed=[0], folder=["."]), out=tmp_path / "s")
    with pytest.raises(InputError, match=rf"no ray cluster answers at '{address}' \({why}.*; start one by `ray"):
        study.run(backend="ray", scheduler=address, progress=False)
