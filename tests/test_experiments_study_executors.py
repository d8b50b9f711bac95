"""Studies in worker processes: killed and interrupted trials, what trials change and leave behind, faults."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from experiments.errors import InputError
from experiments.study import Study, dask, grid, work
from experiments.study.cluster import Queue
from experiments.study.state import left_behind, own_state
from experiments.study.stop import Stop
from experiments.study.store import Identity, Store
from experiments.study.work import Work, settled

ROOT = Path(__file__).parent.parent
OURS = ["seconds", "attempts", "traceback"]     # what may differ between two runs of a trial


def only(study): return study.frame().drop(columns=OURS)


def await_end(group):
    """Return when no process of `group` is left: neither a worker nor what its trials have started."""
    for _ in range(200):        # killed ones are there until the system has collected them
        try: os.killpg(group, 0)
        except ProcessLookupError: return
        time.sleep(0.1)
    raise AssertionError(f"processes of the group {group} run on")


# --- worker processes -----------------------------------------------------------------------------------------

def trial(kind, folder):
    print("trial", kind)
    if kind == "killed once" and not (mark := Path(folder, "killed")).exists():
        mark.touch()
        os.system("echo about to die")
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "killed" and Path(folder, "workers").exists(): os._exit(3)
    if kind == "raises": raise RuntimeError("no such luck")
    if kind == "leaves" and Path(folder, "workers").exists(): subprocess.Popen(["sleep", "1000"])
    loaded = sum(int(xb) for xb in DataLoader(torch.arange(4), num_workers=int(kind == "loads")))
    x = torch.randn(64, 64)
    return {"acc": float((x @ x).sum()), "luck": random.random(), "threads": torch.get_num_threads(), "loaded": loaded,
            "pid": os.getpid() if Path(folder, "workers").exists() else 0}


def test_workers_give_the_rows_of_this_process_and_a_killed_trial_is_run_again(tmp_path, monkeypatch, capsys):
    kinds = ["loads", "killed once", "raises", "killed", "plain", "leaves"]
    points = grid(kind=kinds, folder=[str(tmp_path)])
    monkeypatch.setattr(work, "ATTEMPTS", 2)        # here, not in the workers: one that is killed costs a start
    study = Study("s", trial, points, out=tmp_path / "workers").run(jobs=2)
    frame = study.frame().set_index("kind")
    assert list(frame.status) == ["ok", "ok", "failed", "killed", "ok", "ok"]
    assert list(frame.attempts) == [1, 2, 1, 2, 1, 1]
    log = study.store.log(frame.key["killed once"]).read_text()
    assert log == "trial killed once\nabout to die\n--- attempt 2\ntrial killed once\n"
    assert "its process was killed in each of 2 attempts" in frame.error["killed"]
    assert "EXIT(3)" in frame.error["killed"]
    assert list(study.store.running.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "s: 0 of 6 finished, 0 running, 0 failed"
    assert any(line.startswith("s: 6 of 6 finished, 0 running, 2 failed, took 0:") for line in lines)
    for pid in frame.pid.dropna(): await_end(int(pid))
    (tmp_path / "workers").rename(tmp_path / "done")
    here = Study("s", trial, points, out=tmp_path / "here").run(backend="sequential", progress=False)
    there = Study("s", trial, points, out=tmp_path / "done")
    same = [s[s.kind != "killed"].drop(columns="pid").reset_index(drop=True) for s in (only(there), only(here))]
    assert same[0].equals(same[1])


def test_the_file_says_what_became_of_a_trial_whose_worker_is_gone(tmp_path):
    study = Study("s", trial, grid(kind=["plain"], folder=["."]), out=tmp_path / "s")
    task, = study.tasks
    with study.store.locked({}):
        assert settled(study.store, task) is None
        for _ in range(work.ATTEMPTS - 1): study.store.begin(task.key)
        assert settled(study.store, task) is None
        study.store.begin(task.key)
        assert settled(study.store, task, " (SIGKILL)") == "killed"
        assert settled(study.store, task) == "killed"
    assert study.rows()[0]["error"] == "its process was killed in each of 3 attempts (SIGKILL)"


def test_a_trial_that_a_worker_can_t_load_ends_the_study(tmp_path):
    import pickle
    file = tmp_path / "work"
    with pytest.raises(InputError, match=r"can't read .*work' \(No such file.*need the study's folder under the same"):
        Work(file)("k")
    file.write_bytes(pickle.dumps((Store(tmp_path / "s", Identity("s", "f", "1")), {}, b"cnowhere\ntrial\n.")))
    with pytest.raises(InputError, match=r"a worker process can't load the trial \(ModuleNotFoundError: .*'nowhere'\)"):
        Work(file)("k")


def test_a_script_s_trial_may_use_torch_s_flags():
    import pickle
    names = {"torch": torch, "__name__": "__main__"}
    exec("def flags(seed): return {'on': torch.backends.cudnn.enabled, 'dnn': torch.backends.mkldnn.enabled}", names)
    flags = names["flags"]
    flags.__module__ = "__main__"
    assert pickle.loads(work.pickled(flags))(0) == flags(0)


# --- what clusters share --------------------------------------------------------------------------------------

class Future:
    """What dask says of a trial that a worker has, or had."""

    def __init__(self, status, error=None): self.status, self.error, self.key = status, error, "k"

    def exception(self, timeout): return self.error

    def release(self): self.status = "released"


@pytest.fixture
def queue(tmp_path):
    study = Study("s", trial, grid(kind=["a", "b"], folder=["."]), out=tmp_path / "s")
    with study.store.locked({}): yield Queue(study.tasks, study.store, [].append)


def test_a_trial_that_is_lost_is_run_again_or_killed_or_was_never_begun(queue):
    (first, begun), (second, _) = queue.take(), queue.take()
    for attempt in range(work.ATTEMPTS):
        assert (begun, len(queue.waiting)) == (attempt, 0)
        queue.store.begin(first.key)
        queue.lost(first, begun, "gone")
        if queue.waiting: _, begun = queue.take()
    assert queue.store.read(first.key, first.point)["status"] == "killed"
    assert (queue.left, len(queue.waiting), queue.ended(second)) == (1, 0, False)
    for _ in range(2): queue.lost(second, 0, "gone")
    with pytest.raises(InputError, match=r"3 workers were lost before they began one trial \(gone\); look at what"):
        queue.lost(second, 0, "gone")


@pytest.mark.parametrize(("status", "error", "there", "lost"), [
    ("pending", None, True, None), ("pending", None, False, "the worker w is gone"),
    ("cancelled", None, True, "the scheduler has lost the trial on w"), ("finished", None, True, None),
    ("error", type("KilledWorker", (Exception,), {})(), True, "the worker w was killed")])
def test_dask_s_word_on_a_trial(status, error, there, lost, queue):
    task, before = queue.take()
    cluster = dask._Cluster(None, None, None, queue)
    if there: cluster.workers["w"] = 0
    cluster.runs["w"] = run = dask._Run(task, Future(status, error), before, time.monotonic())
    assert cluster._lost("w", run) == lost
    cluster.collect()
    assert (len(queue.waiting), run.future.status == "released") == ((1, False) if lost is None else (2, True))


@pytest.mark.parametrize(("error", "message"), [
    (ModuleNotFoundError("No module named 'mine'"), r"the worker w can't load what it is to run \(ModuleNotFoundError: "
     r"No module named 'mine'\); install this project and what the trial uses"), (InputError("as is"), "^as is$")])
def test_dask_s_worker_that_can_t_load_a_trial(error, message, queue):
    cluster = dask._Cluster(None, None, None, queue)
    cluster.workers["w"] = 0
    cluster.runs["w"] = dask._Run(*queue.take()[:1], Future("error", error), 0, time.monotonic())
    with pytest.raises(InputError, match=message): cluster.collect()


def test_dask_s_worker_whose_folder_is_another(queue, monkeypatch):
    monkeypatch.setattr(dask, "SHARED", -1)
    cluster = dask._Cluster(None, None, None, queue)
    cluster.workers["w"] = 0
    cluster.runs["w"] = dask._Run(*queue.take()[:1], Future("finished"), 0, time.monotonic())
    with pytest.raises(InputError, match=r"w has finished a trial, but its file isn't in .* machines share by out="):
        cluster.collect()


# --- Ctrl-C ---------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from experiments.study import Study, grid

def trial(seed):
    if seed: time.sleep(60)
    return {"acc": seed}

if __name__ == "__main__": Study("slow", trial, grid(seed=range(4)), out=sys.argv[1]).run(jobs=2)
"""


def test_ctrl_c_ends_the_workers_keeps_what_is_finished_and_says_how_to_go_on(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "s"
    process = subprocess.Popen([sys.executable, "script.py", str(out)], cwd=tmp_path, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while not ((out / "trials").exists() and list((out / "trials").glob("*.json"))
                   and len(running := list((out / "running").glob("*.json"))) == 2):
            time.sleep(0.1)
            assert process.poll() is None, process.stderr.read()
        workers = [json.loads(file.read_text())["pid"] for file in running]
        for _ in range(2): os.killpg(process.pid, signal.SIGINT)      # as a terminal does, to the workers too
        said, errors = process.communicate(timeout=60)      # until the last one with these pipes has ended
    finally: process.kill()
    assert process.returncode != 0
    assert f"slow: stopped with 1 of 4 trials finished and kept in {out}; the same study's run() goes on\n" in said
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    for pid in workers: await_end(pid)
    assert not list((out / "running").iterdir())
    assert [json.loads(f.read_text())["rows"] for f in (out / "trials").iterdir()] == [[{"acc": 0}]]


@pytest.mark.parametrize(("number", "args"), [(signal.SIGINT, ()), (signal.SIGTERM, ("SIGTERM",))])
def test_a_signal_is_noted_and_acted_upon_where_it_is_asked_for(number, args):
    before = signal.getsignal(number)
    with Stop() as stop:
        for _ in range(3): os.kill(os.getpid(), number)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt) as caught: stop.check()
            assert caught.value.args == args
    assert signal.getsignal(number) is before
    with Stop() as stop: stop.check()
    with pytest.raises(KeyboardInterrupt), Stop(): os.kill(os.getpid(), number)     # too late for a check


def test_handlers_of_others_stay_and_another_thread_has_none():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            stop.check()
        assert seen == [signal.SIGINT]
    finally: signal.signal(signal.SIGINT, before)

    def elsewhere():
        with Stop() as stop: stop.check()
        seen.append("done")
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen[1:] == ["done"]


# --- what a trial changes -------------------------------------------------------------------------------------

def settings():
    flags = torch.backends.mkldnn, torch.backends.cudnn
    return (os.getcwd(), dict(os.environ), list(sys.path), list(sys.argv), list(warnings.filters),
            logging.getLogger().level, list(logging.getLogger().handlers), sys.getrecursionlimit(),
            [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGALRM)], np.geterr(), np.get_printoptions(),
            torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(),
            torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), flags[0].enabled, flags[1].enabled,
            flags[1].benchmark, (torch.tensor([1e-310], dtype=torch.float64) * 1).item())


CHANGES = [
    lambda: os.chdir("/"), lambda: os.environ.update(A_TRIAL_S="1", PATH="/"), lambda: os.environ.clear(),
    lambda: sys.path.clear(), lambda: sys.argv.append("x"), lambda: warnings.simplefilter("ignore"),
    lambda: logging.basicConfig(level=1, force=True), lambda: sys.setrecursionlimit(5000),
    lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), lambda: np.seterr(all="raise"),
    lambda: np.set_printoptions(precision=2), lambda: torch.set_default_dtype(torch.float64),
    lambda: torch.set_default_device("meta"), lambda: torch.set_num_threads(3), lambda: torch.set_grad_enabled(False),
    lambda: torch.set_deterministic_debug_mode("warn"), lambda: torch.autograd.set_detect_anomaly(True),
    lambda: torch.set_float32_matmul_precision("medium"), lambda: torch.set_autocast_enabled("cpu", True),
    lambda: torch.backends.mkldnn.set_flags(False), lambda: torch.backends.cudnn.set_flags(False, True),
    lambda: torch.set_flush_denormal(True), lambda: (torch.manual_seed(1), random.seed(1), np.random.seed(1)),
]


@pytest.mark.parametrize("i", range(5))
def test_what_trials_change_is_put_back_whatever_they_change(i):
    random.seed(i)
    before = settings()
    for _ in range(8):
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        changes = random.Random(random.random()).sample(CHANGES, 6)
        state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        with own_state("12345678", here=True):
            for change in changes: change()
        assert settings() == before
        assert torch.equal(torch.get_rng_state(), state[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


def test_threads_processes_and_inference_mode_are_left_behind():
    threads, end = threading.enumerate(), threading.Event()
    if not left_behind(threads):        # of other tests there may be some
        child = subprocess.Popen(["sleep", "100"])
        assert left_behind(threads)
        child.kill()
        child.wait()
        assert not left_behind(threads)
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert left_behind(threads)
    end.set()
    thread.join()


# --- faults ---------------------------------------------------------------------------------------------------

class Unprintable(Exception):
    def __init__(self, lock): self.lock = lock      # can't be pickled either

    def __str__(self): raise ValueError("no text")


class Own(BaseException): pass


def endless(): return endless()


def raising(error): raise error


def faulty(n, folder):
    actions = [
        lambda: raising(Own("of my own")), lambda: sys.exit(3), lambda: raising(GeneratorExit()), endless,
        lambda: raising(Unprintable(threading.Lock())), lambda: os.write(1, b"\xff\xfe bytes\n"),
        lambda: raising(MemoryError()), lambda: sys.stdout.close(), lambda: {"x": float("nan"), "y": np.float32(2)},
        lambda: {"x": torch.tensor(3)}, lambda: {"x": torch.ones(3)}, lambda: {"x": np.ones(2)}, lambda: None,
        lambda: {"x": 10**5000}, lambda: {"x": "\ud800"}, lambda: {"x": list(range(100_000))},
        lambda: [p.unlink() for p in Path(folder).glob("*/logs/*")] and None, lambda: os.close(sys.stdout.fileno()),
        lambda: {"x": [raising(KeyError("\n" * 50))]}, lambda: warnings.warn("careful", stacklevel=1),
        lambda: print("\ud800", "text", "\x00"), lambda: {"x": -0.0, "deep": [[[{"a": [None]}]]]},
        lambda: recursive(), lambda: [change() for change in CHANGES[:12]] and None,
    ]
    returned = actions[n % len(actions)]()
    return {"x": float(torch.rand(()).double()), **(returned if isinstance(returned, dict) else {})}


def recursive():
    row = {}
    row["x"] = row
    return row


def test_any_fault_of_a_trial_is_its_own(tmp_path):
    points = grid(n=random.Random(0).sample(range(48), 48), folder=[str(tmp_path)])
    here = Study("s", faulty, points, out=tmp_path / "here").run(backend="sequential", progress=False)
    frame = here.frame().sort_values("n", ignore_index=True)
    first, second = (part.drop(columns=["n", "seconds", "key", "traceback"]) for part in (frame[:24], frame[24:]))
    assert len(frame) == 48
    same = [c for c in first if c != "x"]       # of the same fault, but for its random numbers
    assert first[same].equals(second[same].reset_index(drop=True))
    assert {"Own: of my own", "SystemExit: 3", "GeneratorExit: ", "MemoryError: ", "KeyError: '" + "\\n" * 50 + "'",
            "Unprintable: (its text is unavailable: ValueError)"} <= set(first.error.dropna())
    assert (first.status == "failed").sum() == 12
    assert {type(e) for e in first.error.dropna()} == {str}
