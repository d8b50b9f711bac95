"""Studies on a real cluster of dask: its rows are those of this process, and killed workers' trials are run again."""

import os
import signal
from pathlib import Path

import pytest
import torch

from experiments.errors import InputError
from experiments.study import Study, executors, grid

distributed = pytest.importorskip("dask.distributed")


def trial(seed, folder):
    print("trial", seed)
    if seed == 1 and not (mark := Path(folder, "killed")).exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 2: raise ValueError("no such luck")
    return {"acc": float(torch.rand(8).sum()), "threads": torch.get_num_threads()}


def test_a_cluster_gives_the_rows_of_this_process_and_a_killed_trial_is_run_again(tmp_path):
    points = grid(seed=range(5), folder=[str(tmp_path)])
    study = Study("s", trial, points, out=tmp_path / "cluster")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50,
                                  local_directory=str(tmp_path / "dask")) as cluster:
        study.run(backend="dask", scheduler=cluster.scheduler_address, progress=False)
    here = Study("s", trial, points, out=tmp_path / "here").run(backend="sequential", progress=False)
    both = [s.frame().drop(columns=["seconds", "attempts", "traceback"]) for s in (study, here)]
    assert both[0].equals(both[1])
    row = study.rows()[1]
    assert (row["status"], row["attempts"], row["threads"]) == ("ok", 2, 1)
    assert study.store.log(row["key"]).read_text().endswith("--- attempt 2\ntrial 1\n")


def test_a_scheduler_that_isn_t_there(tmp_path, monkeypatch):
    study = Study("s", trial, grid(seed=[0], folder=["."]), out=tmp_path / "s")
    with pytest.raises(InputError, match="backend='dask' needs scheduler=, the address of a cluster"):
        study.run(backend="dask", progress=False)
    assert executors.ANSWER <= 10
    monkeypatch.setattr(executors, "ANSWER", 1)
    with pytest.raises(InputError, match=r"no dask scheduler answers at 'tcp://127\.0\.0\.1:1' .*; start one by"):
        study.run(backend="dask", scheduler="tcp://127.0.0.1:1", progress=False)
