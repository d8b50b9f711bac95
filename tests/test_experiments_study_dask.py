"""Studies on a real cluster of dask: its rows are those of this process, and killed workers' trials are run again."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch

from experiments.errors import InputError
from experiments.study import Study, cluster, dask, grid

distributed = pytest.importorskip("dask.distributed")


def local_cluster(tmp_path, n):
    return distributed.LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=":0", silence_logs=50,
                                    local_directory=str(tmp_path / "dask"))


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
    with local_cluster(tmp_path, 2) as cluster: study.run(backend="dask", scheduler=cluster, progress=False)
    here = Study("s", trial, points, out=tmp_path / "here").run(backend="sequential", progress=False)
    both = [s.frame().drop(columns=["seconds", "attempts", "traceback"]) for s in (study, here)]
    assert both[0].equals(both[1])
    row = study.rows()[1]
    assert (row["status"], row["attempts"], row["threads"]) == ("ok", 2, 1)
    assert study.store.log(row["key"]).read_text().endswith("--- attempt 2\ntrial 1\n")
    assert not list(study.store.running.iterdir())


def test_a_cluster_without_workers_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(dask, "GONE", 1)
    study = Study("s", trial, grid(seed=[0], folder=["."]), out=tmp_path / "s")
    with local_cluster(tmp_path, 0) as cluster, pytest.raises(InputError, match=r"no workers for 1 s; start some by"):
        study.run(backend="dask", scheduler=cluster.scheduler_address, progress=False)


@pytest.mark.parametrize("listens", [False, True])
def test_a_scheduler_that_isn_t_there(listens, tmp_path, monkeypatch):
    study = Study("s", trial, grid(seed=[0], folder=["."]), out=tmp_path / "s")
    with pytest.raises(InputError, match="backend='dask' needs scheduler=, the address of a cluster"):
        study.run(backend="dask", progress=False)
    assert cluster.ANSWER <= 10
    monkeypatch.setattr(dask, "ANSWER", 1)
    with socket.socket() as mute:       # something that isn't dask, which takes the call and says nothing
        mute.bind(("127.0.0.1", 0))
        if listens: mute.listen()
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"no dask scheduler answers at '{address}' .*; start one by"):
            study.run(backend="dask", scheduler=address, progress=False)
