"""`--resume`: an experiment that was stopped anywhere ends as one that was not, seconds aside."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import run_folder, training
from experiments.__main__ import main
from experiments.errors import InputError
from experiments.published import breast_cancer, small_batch
from experiments.published.small_batch import Config
from experiments.run_folder import RunFolder
from runner import Runner

ROOT = Path(__file__).parent.parent
SMALL = ["small-batch", "--data", "digits", "--limit", "24", "--epochs", "2", "--seeds", "1"]


def without_seconds(o):
    """`o` without what depends on the clock."""
    if isinstance(o, dict): return {k: without_seconds(v) for k, v in o.items() if k != "seconds"}
    return [without_seconds(v) for v in o] if isinstance(o, list) else o


def results(folder):
    """All figures that a run has left in its folder, and the names of its files."""
    folder = Path(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = {name: json.loads(file.read_text()) for name in ("summary", "curves")
             if (file := folder / f"{name}.json").exists()}
    # What a trial has printed depends on who asked first, where two ask for one training.
    files = {name for p in folder.rglob("*") if p.is_file() and "logs" not in (name := str(p.relative_to(folder)))}
    tables = {p.name: p.read_text() for p in folder.glob("*.csv")}
    return without_seconds({**found, **tables, "metrics": [*map(json.loads, lines)]}), files


class Interrupter:
    """Raises KeyboardInterrupt in place of the training or validation batch number `at` from now on."""

    def __init__(self, monkeypatch):
        self.at = None
        real = Runner.one_batch

        def one_batch(run, *batch):
            if self.at is not None:
                self.at -= 1
                if self.at < 0: raise KeyboardInterrupt
            real(run, *batch)
        monkeypatch.setattr(Runner, "one_batch", one_batch)


@pytest.fixture
def interrupter(monkeypatch):
    monkeypatch.setattr(training, "EVERY_SECONDS", 0)       # a checkpoint after every batch
    # A picture takes longer than the training here.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda fig, path, **kwargs: Path(path).write_bytes(b""))
    return Interrupter(monkeypatch)


# --- every experiment ---------------------------------------------------------------------------------------------

# experiment: (options, the most batches that a part of the run has)
EVERY = {
    "small-batch": ([*SMALL[1:], "--norms", "none", "RunningBatchNorm"], 40),
    "lenet": (["--data", "digits", "--limit", "300", "--epochs", "2"], 8),
    "vmap": (["--data", "digits", "--limit", "500", "--steps", "13"], 20),
    "lesson": (["--data", "digits", "--limit", "600", "--arms", "none,BatchNorm-hooked,LayerNorm"], 8),
    "one-epoch": (["--data", "digits", "--limit", "60"], 20),
    "best": (["--data", "digits", "--limit", "12", "--seeds", "3", "--replicas", "2"], 40),
    "breast-cancer": (["--seeds", "3"], 160),       # 101 batches and no checkpoint
    "inside": (["--data", "digits", "--limit", "40", "--steps", "40", "--seeds", "2", "--norm", "BatchNorm"], 80),
}


@pytest.mark.parametrize("name", EVERY)
def test_interrupted_anywhere_and_resumed_it_ends_as_if_nothing_had_been(name, interrupter, tmp_path, capsys):
    argv, most = [name, *EVERY[name][0]], EVERY[name][1]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    status = main([*argv, "--out", whole])
    rng, times = random.Random(name), 0
    while True:
        breast_cancer.train.cache_clear()
        interrupter.at = rng.randrange(3, most)
        if (ended := main([*argv, "--out", parts, "--resume"])) != 130: break
        times += 1
        out = capsys.readouterr().out
        assert "nterrupted" in out
        assert f"The same command with --out {parts} --resume goes on." in out
        assert times < 50
    assert times >= 2
    assert ended == status
    assert results(parts) == results(whole)
    assert not (Path(parts) / "checkpoints").exists()


# --- killed -------------------------------------------------------------------------------------------------------

# Lives of `python -m experiments`, each in a process of its own, forked once all is imported: the first argument is
# how many kills there are to be, the second a seed, the others are the command. Exits as the life that was not killed.
DRIVER = """
import os, random, signal, sys, time
import torch
from experiments import training
from experiments.published import small_batch
from experiments.__main__ import main
from experiments.data import load_data
import runner.insight.plots
load_data("digits")
training.EVERY_SECONDS = 0.01
kills, rng = int(sys.argv[1]), random.Random(sys.argv[2])
while True:
    life = os.fork()
    if not life:
        sys.stdout = open(os.devnull, "w")
        os._exit(main([*sys.argv[3:], "--resume"]))
    if kills:
        time.sleep(rng.uniform(0.05, 0.6))
        os.kill(life, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(life, 0)[1])
    if status >= 0: sys.exit(status)
    kills -= 1
"""


def test_killed_at_random_moments_and_resumed_it_ends_as_if_nothing_had_been(tmp_path):
    argv = [*SMALL, "--limit", "60", "--norms", "BatchNorm2d", "RunningBatchNorm"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}

    def run(kills, folder):
        return subprocess.run([sys.executable, "-c", DRIVER, str(kills), "0", *argv, "--out", str(folder)], cwd=ROOT,
                              env=env, capture_output=True, text=True, timeout=300)
    whole, parts = run(0, tmp_path / "whole"), run(4, tmp_path / "parts")
    assert whole.stderr == parts.stderr == ""
    assert whole.returncode == parts.returncode == 1                # two epochs on 80 images show nothing
    begun = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert begun["resumed"]         # how often depends on when the kills came
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


# --- what is kept -------------------------------------------------------------------------------------------------

def counted(monkeypatch):
    """The arms that are trained from now on."""
    trained, real = [], small_batch.train_arm

    def train_arm(config, norm, seed, checkpoint):
        trained.append((norm, seed))
        return real(config, norm, seed, checkpoint)
    train_arm.__module__, train_arm.__qualname__ = real.__module__, real.__qualname__
    monkeypatch.setattr(small_batch, "train_arm", train_arm)
    return trained


def test_a_finished_run_prints_its_table_and_verdict_again_and_trains_nothing(tmp_path, monkeypatch, capsys):
    argv = [*SMALL, "--norms", "BatchNorm2d,RunningBatchNorm", "--out", str(tmp_path / "run")]
    trained = counted(monkeypatch)
    assert main(argv) == 1
    said, before = capsys.readouterr().out, results(tmp_path / "run")
    (tmp_path / "run" / "small_batch.png").unlink()
    assert main([*argv, "--resume"]) == 1
    again = capsys.readouterr().out
    assert trained == [("BatchNorm2d", 0), ("RunningBatchNorm", 0)]
    assert results(tmp_path / "run") == before
    assert "resumed: 2 of 2 arms had finished" in again
    said, again = (text[text.index("\nnorm "):].replace("0:0", "").splitlines() for text in (said, again))
    assert said[:-2] + said[-1:] == again[:-2] + again[-1:]       # table and verdict
    assert (tmp_path / "run" / "small_batch.png").exists()


def test_finished_arms_are_whole_files_and_are_not_run_again(tmp_path, monkeypatch, interrupter, capsys):
    trained, folder = counted(monkeypatch), tmp_path / "run"
    argv = [*SMALL, "--norms", "none,GroupNorm", "--seeds", "2", "--together", "1", "--out", str(folder), "--resume"]
    interrupter.at = 60                             # 26 batches an arm
    assert main(argv) == 130
    kept = [json.loads(file.read_text()) for file in (folder / "study" / "trials").iterdir()]
    assert sorted((k["point"]["norm"], k["point"]["seed"], k["status"]) for k in kept) == [
        ("none", 0, "ok"), ("none", 1, "ok")]
    assert [len(k["rows"][0]["per_epoch"]) for k in kept] == [2, 2]
    left, = (folder / "checkpoints").iterdir()
    assert left.name.startswith("GroupNorm-seed-0-")
    # Killed between the file and what comes after it.
    (folder / "checkpoints" / "none-seed-1").mkdir()
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text()[:-20])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for place in ("", "study/trials/"): (folder / f"{place}x.json.{gone.pid}.part").write_text("{")
    interrupter.at = None
    main(argv)
    assert "resumed: 2 of 4 arms had finished" in capsys.readouterr().out
    assert trained == [("none", 0), ("none", 1), ("GroupNorm", 0), ("GroupNorm", 0), ("GroupNorm", 1)]
    assert [r["epoch"] for r in results(folder)[0]["metrics"]] == [0, 1] * 4
    assert sorted(p.suffix for p in (folder / "study" / "trials").iterdir()) == [".json"] * 4
    assert not list(folder.rglob("*.part"))
    assert not (folder / "checkpoints").exists()


def test_seeds_that_are_trained_together_go_on_as_one(tmp_path, interrupter, capsys):
    argv = [*SMALL, "--norms", "RunningBatchNorm,none", "--seeds", "3"]
    status = main([*argv, "--out", str(tmp_path / "whole")])
    rng, times = random.Random(5), 0
    while True:
        interrupter.at = rng.randrange(3, 14)
        if (ended := main([*argv, "--out", str(tmp_path / "parts"), "--resume"])) != 130: break
        times += 1
    assert times >= 2
    assert ended == status
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    rows = results(tmp_path / "whole")[0]["summary"]["rows"]
    assert [(r["norm"], r["seed"], r["together"]) for r in rows] == [
        (norm, seed, 3) for norm in ("RunningBatchNorm", "none") for seed in range(3)]


def failing(monkeypatch, how):
    """Let the arm "none" do what `how` does."""
    real = small_batch.train_arm

    def train_arm(config, norm, seed, checkpoint):
        if norm == "none": how()
        return real(config, norm, seed, checkpoint)
    monkeypatch.setattr(small_batch, "train_arm", train_arm)


def test_an_arm_that_raises_is_named_and_the_others_are_kept_and_nothing_is_judged(tmp_path, monkeypatch, capsys):
    argv = [*SMALL, "--norms", "none", "BatchNorm2d", "RunningBatchNorm", "--out", str(tmp_path / "run"), "--resume"]
    with monkeypatch.context() as broken:
        failing(broken, lambda: 1 / 0)
        assert main(argv) == 1
    out = capsys.readouterr().out
    assert "  none, seed 0: raised: ZeroDivisionError: division by zero\n" in out
    assert ("Not complete: 2 of 3 arms have finished; none (seed 0) raised: ZeroDivisionError: division by zero.\n"
            f"Tracebacks are in {tmp_path}/run/study. The same command with --out {tmp_path}/run --resume goes on.\n"
            ) in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["complete"], summary["reproduced"], len(summary["rows"])) == (False, None, 2)
    assert main(argv) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["complete"] is True


def test_values_that_are_not_finite_are_kept(tmp_path):
    assert main([*SMALL, "--norms", "none", "--lr", "1e20", "--out", str(tmp_path / "a")]) == 0
    file, = (tmp_path / "a" / "study" / "trials").iterdir()
    row, = json.loads(file.read_text())["rows"]
    assert math.isnan(row["valid_loss"])
    assert row["outcome"] == "diverged"
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["rows"][0]["valid_loss"] is None


def test_seconds_are_summed_over_the_parts(tmp_path, monkeypatch, interrupter):
    clock = [0.0]
    real = Runner.one_batch

    def one_batch(run, *batch):
        clock[0] += 1
        real(run, *batch)
    monkeypatch.setattr(Runner, "one_batch", one_batch)
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    argv = [*SMALL, "--norms", "none", "--out", str(tmp_path / "run"), "--resume"]
    for at in (9, 7):               # 12 training batches and one of validation an epoch
        interrupter.at = at
        assert main(argv) == 130
        clock[0] += 1000
    interrupter.at = None
    main(argv)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows"][0]["seconds"] == 26


# --- input that makes no sense ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of one arm."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert main([*SMALL, "--norms", "none", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(("changed", "text"), [
    (["--lr", "0.1", "--seeds", "2"], "holds another run: seeds was [0] and is [0, 1]; lr was 0.4 and is 0.1. Go on"),
    (["--convolutions", "own"], "convolutions was 'rule' and is 'own'"), (["--together", "1"], "together was 24 and"),
    (["--norms", "none", "GroupNorm"], "norms was ['none'] and is ['none', 'GroupNorm']"),
    (["--batch-size", "4"], "batch size was 2 and is 4"),
    (["--limit", "30"], "limit was 24 and is 30; data was 'digits (scikit-learn, 8x8 resized): 24 training")])
def test_a_run_with_other_settings_is_refused(changed, text, begun, capsys):
    assert main([*SMALL, "--norms", "none", "--out", str(begun), "--resume", *changed]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.endswith("Go on with what it was begun with, or name another folder by --out\n")


def test_a_run_of_another_experiment_or_by_other_means_is_refused(begun, monkeypatch, capsys):
    assert main(["lenet", "--data", "digits", "--out", str(begun), "--resume"]) == 2
    assert "experiment was 'small-batch' and is 'lenet'" in capsys.readouterr().err
    now = run_folder.versions()
    monkeypatch.setattr(run_folder, "versions", lambda: {**now, "torch": "9.9", "matplotlib": "9"})
    assert main([*SMALL, "--norms", "none", "--out", str(begun), "--resume"]) == 2
    err = capsys.readouterr().err
    assert "holds another run: torch was " in err
    assert "and is '9.9'. Go on" in err


def test_what_changes_no_figure_may_differ(begun, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "elsewhere"
    begun.rename(moved)
    try: assert main([*SMALL, "--norms", "none", "--out", str(moved), "--resume", "--data-dir", str(tmp_path)]) == 0
    finally: moved.rename(begun)


@pytest.mark.parametrize("name", ["small-batch", "breast-cancer", "inside"])
def test_resume_needs_a_folder(name, capsys):
    assert main([name, "--resume"]) == 2
    assert capsys.readouterr().err == (
        "error: --resume goes on with the run in a folder and none was named; add --out DIR, the folder of the run "
        "that was interrupted\n")


def test_without_resume_a_folder_with_a_run_is_refused_as_ever(begun, capsys):
    assert main([*SMALL, "--norms", "none", "--out", str(begun)]) == 2
    assert "holds a run already and results are not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"experiment": "small-batch", "config": 3}'])
def test_a_damaged_record_of_settings_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json' is no record of a run's settings \(\w+: .*begin it anew in"):
        RunFolder(tmp_path, "small-batch", Config(), {}, resume=True)


def test_folders_without_what_it_takes_to_go_on_are_refused(tmp_path):
    folder = RunFolder(tmp_path / "old", "small-batch", Config(), {})
    folder.write_json("summary.json", {})
    with pytest.raises(InputError, match="has rows but no folder study/ to go on from"):
        RunFolder(tmp_path / "old", "small-batch", Config(), {}, resume=True)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds a run already"):
        RunFolder(tmp_path, "small-batch", Config(), {}, resume=True)


@pytest.mark.parametrize("content", ["", '{"arm": "none"', '{"arm": "none", "seed": 0}',
                                     '{"point": {"norm": "b"}, "function": "f"}'])
def test_a_damaged_arm_is_named_and_can_be_run_again(content, tmp_path, capsys):
    argv = [*SMALL, "--norms", "none", "--out", str(tmp_path / "run"), "--resume"]
    assert main(argv) == 0
    before = results(tmp_path / "run")
    file, = (tmp_path / "run" / "study" / "trials").iterdir()
    file.write_text(content)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert f"can't read {str(file)!r}, the trial of norm='none', seed=0" in err
    assert "; delete the file, and the trial is run again" in err
    file.unlink()
    assert main(argv) == 0
    assert results(tmp_path / "run") == before


def test_a_checkpoint_of_another_run_is_an_error_and_no_failed_row(tmp_path, interrupter, monkeypatch, capsys):
    argv = [*SMALL, "--norms", "none", "--out", str(tmp_path / "run"), "--resume"]
    interrupter.at = 5
    assert main(argv) == 130
    interrupter.at = None
    with monkeypatch.context() as other:
        other.setattr(small_batch, "CHANNELS", [8, 16, 32, 64, 32])
        assert main(argv) == 2
    err = capsys.readouterr().err
    checkpoint, = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"error: {checkpoint}" in err
    assert "is of another run: parameters" in err
    assert err.endswith(f". Or delete {checkpoint}, and this arm begins anew\n")
    assert main(argv) == 0


def test_a_folder_that_can_not_hold_checkpoints_is_an_error_and_no_failed_row(tmp_path, monkeypatch, capsys):
    argv = [*SMALL, "--norms", "none", "--out", str(tmp_path / "run"), "--resume"]

    def prepare(folder): raise ValueError(f"Checkpoint: the folder {str(folder)!r} can't be written")
    with monkeypatch.context() as full:
        full.setattr("runner.checkpoint.prepare", prepare)
        assert main(argv) == 2
    assert capsys.readouterr().err.startswith(
        f"error: Checkpoint: the folder '{tmp_path}/run/checkpoints/none-seed-0-")
    assert main(argv) == 0
