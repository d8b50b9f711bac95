"""Studies: their trials in this process, the store, and what is shown of them."""

import os
import random
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from experiments.errors import InputError
from experiments.study import Study, grid
from experiments.study.work import ATTEMPTS, run_trial

POINTS = grid(norm=["a", "b"], seed=range(3))
OURS = ["seconds", "attempts"]          # what may differ between two runs of a trial


def trial(norm, seed):
    print("trial", norm, seed)
    if (norm, seed) == ("b", 2): raise RuntimeError("no such luck")
    x = torch.randn(64, 64)
    return {"acc": float((x @ x).sum()), "luck": random.random(), "threads": torch.get_num_threads(),
            "nan": float("nan")}


def only(study): return study.frame().drop(columns=OURS)


def sequential(out, function=trial, points=POINTS, **given):
    return Study("s", function, points, out=out, **given).run(backend="sequential", progress=False)


# --- rows -----------------------------------------------------------------------------------------------------


def test_a_study_is_a_row_for_each_point(tmp_path):
    study = sequential(tmp_path / "s")
    frame = study.frame()
    assert list(frame.columns) == ["norm", "seed", "acc", "luck", "threads", "nan", "status", *OURS, "error",
                                   "traceback", "key"]
    assert list(frame.status) == ["ok"] * 5 + ["failed"]
    assert frame.acc.notna().sum() == 5
    assert frame.error.iloc[-1] == "RuntimeError: no such luck"
    assert 'raise RuntimeError("no such luck")' in frame.traceback.iloc[-1]
    assert "run_trial" not in frame.traceback.iloc[-1]
    assert frame.key.nunique() == 6
    assert (study.missing(), len(study.rows())) == (0, 6)
    assert repr(study) == f"<Study 's': 6 of 6 rows in {str(tmp_path / 's')!r}>"
    assert (tmp_path / "s" / "logs" / f"{frame.key[0]}.txt").read_text() == "trial a 0\n"


def test_a_trial_s_random_numbers_and_threads_are_its_own_and_the_caller_s_stay(tmp_path):
    torch.set_num_threads(threads := 2)
    torch.manual_seed(5)
    random.seed(5)
    try:
        state = torch.get_rng_state()
        first = sequential(tmp_path / "one")
        assert torch.equal(torch.get_rng_state(), state)
        assert random.random() == random.Random(5).random()
        assert torch.get_num_threads() == threads
        assert set(first.frame().threads.dropna()) == {1}
        torch.rand(3)
        backwards = sequential(tmp_path / "two", points=grid(norm=["b", "a"], seed=[2, 1, 0]))
        both = [only(s).sort_values(["norm", "seed"], ignore_index=True) for s in (first, backwards)]
        assert both[0].equals(both[1])
    finally: torch.set_num_threads(1)


def deadly(seed): os.kill(os.getpid(), signal.SIGKILL)


def test_a_cluster_s_fourth_attempt_is_the_row_of_a_killed_trial(tmp_path):
    study = Study("s", deadly, grid(seed=[0]), out=tmp_path / "s")
    with study.store.locked({}):
        for _ in range(ATTEMPTS): study.store.begin(study.tasks[0].key)
        assert run_trial(deadly, study.store, study.tasks[0], apart=False) == "killed"
    assert study.rows()[0]["status"] == "killed"


# --- going on -------------------------------------------------------------------------------------------------

def counting(seed, folder, fail=None):
    with Path(folder, "count").open("a") as f: f.write(f"{seed}\n")
    if seed == fail and not Path(folder, "mended").exists(): raise ValueError("not yet")
    return {"acc": seed}


def count(tmp_path): return sorted(map(int, (tmp_path / "count").read_text().split()))


def test_run_does_what_is_missing_and_a_larger_grid_goes_on(tmp_path):
    axes = {"folder": [str(tmp_path)], "fail": [1]}
    for _ in range(2): sequential(tmp_path / "s", counting, grid(seed=range(3), **axes))
    assert count(tmp_path) == [0, 1, 2]
    study = sequential(tmp_path / "s", counting, grid(seed=range(1, 5), **axes))
    assert count(tmp_path) == [0, 1, 2, 3, 4]
    assert list(study.frame().status) == ["failed", "ok", "ok", "ok"]
    (tmp_path / "mended").touch()
    study.run(backend="sequential", again=True, progress=False)
    assert count(tmp_path) == [0, 1, 1, 2, 3, 4]
    assert list(study.frame().status) == ["ok"] * 4
    (tmp_path / "s" / "trials" / f"{study.frame().key[0]}.json").unlink()
    assert (study.missing(), len(study.frame()), study.summary(by="fail", value="acc").attrs) == (1, 3, {"missing": 1})
    assert count(tmp_path) == [0, 1, 1, 2, 3, 4]


@pytest.mark.parametrize(("name", "function", "version", "message"), [
    ("t", trial, "1", "its name is 's' and not 't'"),
    ("s", deadly, "1", r"its function is 'test_experiments_study\.trial' and not 'test_experiments_study\.deadly'"),
    ("s", trial, 2, "its version is '1' and not '2'")])
def test_the_folder_of_another_study_is_refused(name, function, version, message, tmp_path):
    sequential(tmp_path / "s")
    points = POINTS if function is trial else grid(seed=[1])
    with pytest.raises(InputError, match=f"is of another study: {message}. Name another folder by out="):
        Study(name, function, points, out=tmp_path / "s", version=version)


def test_a_folder_of_other_things_and_damaged_files_are_named(tmp_path):
    (tmp_path / "letters.txt").touch()
    with pytest.raises(InputError, match=r"is no folder of a study \(it holds letters\.txt\); name a new or an "):
        Study("s", trial, POINTS, out=tmp_path)
    study = sequential(tmp_path / "s")
    file = tmp_path / "s" / "trials" / f"{study.frame().key[0]}.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(InputError, match=r"the trial of norm='a', seed=0 .*; delete the file, and the trial"):
        study.frame()
    (tmp_path / "s" / "study.json").write_text("{}")
    with pytest.raises(InputError, match=r"can't read .*study\.json"): Study("s", trial, POINTS, out=tmp_path / "s")


def test_a_second_run_in_the_folder_is_refused_while_one_goes_on(tmp_path):
    begun, end = threading.Event(), threading.Event()

    def waiting(seed):
        begun.set()
        end.wait(20)
        return {"acc": seed}
    study = Study("s", waiting, grid(seed=[0]), out=tmp_path / "s")
    thread = threading.Thread(target=study.run, kwargs={"backend": "sequential", "progress": False})
    thread.start()
    try:
        assert begun.wait(20)
        with pytest.raises(InputError, match=rf"is in use: process {os.getpid()} .*runs the study\. Wait until"):
            Study("s", waiting, grid(seed=[1]), out=tmp_path / "s").run(backend="sequential", progress=False)
    finally:
        end.set()
        thread.join()
    assert study.run(backend="sequential", progress=False).missing() == 0


# --- what a trial returns -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("returned", "error"), [
    (3, "the trial returned int for a row; it must return a dict of figures"),
    ({"status": 1}, "the trial returned a figure named 'status', a column of every study; rename it"),
    ({1: 1}, "the trial returned a figure named 1; name it by a str"),
    ({"x": object}, "the figure 'x' has the value <class 'object'> of type type, which JSON can't hold"),
    ({"seed": 7}, "the trial returned 'seed'=7, which is an axis and was 0; rename the figure")])
def test_a_row_that_is_none_is_a_failed_trial(returned, error, tmp_path):
    row, = sequential(tmp_path / "s", lambda seed: returned, grid(seed=[0])).rows()
    assert row["status"] == "failed"
    assert error in row["error"]


def test_figures_are_python_s_whatever_they_were(tmp_path):
    row, = sequential(tmp_path / "s", lambda seed: {"x": torch.tensor(0.5), "y": float("-inf"), "z": [1, None],
                                                    "seed": seed}, grid(seed=[0])).rows()
    assert (row["x"], row["y"], row["z"], row["status"]) == (0.5, float("-inf"), [1, None], "ok")


def test_a_trial_that_exits_is_a_failed_one(tmp_path):
    row, = sequential(tmp_path / "s", lambda seed: sys.exit("enough"), grid(seed=[0])).rows()
    assert (row["status"], row["error"]) == ("failed", "SystemExit: enough")


def stacked(norm, seed, lr): return [{"acc": s + rate} for s, rate in zip(seed, lr, strict=True)]


def test_axes_together_give_a_row_for_each_combination(tmp_path):
    points = grid(norm=["a", "b"], seed=range(3), lr=[0.1, 0.4], together=("seed", "lr"))
    study = sequential(tmp_path / "s", stacked, points)
    frame = study.frame()
    assert (len(study.tasks), len(frame), frame.key.nunique()) == (2, 12, 2)
    assert list(frame.acc) == [s + lr for s, lr in zip(frame.seed, frame.lr, strict=True)]
    assert study.summary(by=["norm", "lr"], value="acc")["mean"].tolist() == pytest.approx([1.1, 1.4, 1.1, 1.4])


def test_trials_of_most_points_begin_first_and_rows_stay_in_the_order_of_the_grid(tmp_path):
    begun = []

    def noted(norm, seed):
        begun.append((norm, seed))
        return [{"x": 1}] * len(seed) if isinstance(seed, list) else {"x": 1}
    points = (grid(norm=["c"], seed=[4, 3]) + grid(norm=["a"], seed=range(2), together="seed")
              + grid(norm=["d"], seed=[7]) + grid(norm=["b"], seed=range(3), together="seed"))
    study = sequential(tmp_path / "s", noted, points)
    assert begun == [("b", [0, 1, 2]), ("a", [0, 1]), ("c", 4), ("c", 3), ("d", 7)]
    assert [(row["norm"], row["seed"]) for row in study.rows()] == [(p["norm"], p["seed"]) for p in points]


def test_of_points_together_only_those_without_a_row_are_run(tmp_path):
    handed = []

    def noted(norm, seed):
        handed.append((norm, seed))
        if norm == "b" and 7 in seed: raise ValueError
        return [{"acc": 10 * s + len(seed)} for s in seed]

    def study(norms, seeds): return Study("s", noted, grid(norm=norms, seed=seeds, together="seed"), out=tmp_path / "s")
    def run(*args): return study(*args).run(backend="sequential", progress=False)
    run(["a"], [0, 1])
    frame = run(["a", "b"], [3, 0, 2, 1]).frame()
    assert handed == [("a", [0, 1]), ("b", [3, 0, 2, 1]), ("a", [3, 2])]
    assert list(frame.seed) == [3, 0, 2, 1] * 2
    assert list(frame.acc) == [32, 2, 22, 12, 34, 4, 24, 14]
    again = study(["a", "b"], [3, 0, 2, 1])
    assert again.missing() == 0
    assert run(["a", "b"], [3, 0, 2, 1]).frame().equals(frame)
    assert run(["b", "a"], [1, 2]).missing() == 0
    assert len(handed) == 3
    # What has failed is run again, with those it was run with, and lends nothing.
    assert list(run(["b"], [7, 0]).frame().status) == ["failed", "ok"]
    assert handed[3:] == [("b", [7])]
    assert study(["b"], [7, 8]).missing() == 2
    other = Study("s", noted, grid(norm=["a"], seed=[0, 1], together="seed"), out=tmp_path / "t")
    assert other.missing() == 2


def test_axes_together_with_too_few_rows_and_with_a_failure(tmp_path):
    points = grid(norm=["a", "b"], seed=range(3), together="seed")

    def one_short(norm, seed):
        if norm == "b": raise ValueError("all of them")
        return [{"acc": 1}] * 2
    frame = sequential(tmp_path / "s", one_short, points).frame()
    assert list(frame.status) == ["failed"] * 6
    assert "returned 2 rows; with axes together it must return a list of 3 rows" in frame.error[0]
    assert list(frame.error[3:]) == ["ValueError: all of them"] * 3
    assert list(frame.seed) == [0, 1, 2] * 2


def test_what_failed_is_said_and_how_to_run_it_again(tmp_path, capsys):
    study = Study("s", trial, POINTS, out=tmp_path / "s")
    study.run(backend="sequential")
    assert capsys.readouterr().out.endswith(
        "s: 1 trial failed, the first (norm='b', seed=2) by RuntimeError: no such luck; frame() has the tracebacks, "
        "and run(again=True) runs it again\n")


def test_a_folder_is_opened_and_looked_at_without_the_function(tmp_path):
    made = sequential(tmp_path / "s")
    opened = Study.open(tmp_path / "s")
    assert opened.frame().equals(made.frame())
    given = {"by": "norm", "value": "acc", "failed_as": 0.0}
    assert opened.summary(**given).equals(made.summary(**given))
    assert repr(opened) == repr(made)
    with pytest.raises(InputError, match="s was opened to be looked at; make the study with its function to run more"):
        opened.run()
    sequential(tmp_path / "s", points=grid(norm=["c"], seed=[7]))       # a later run, with fewer points
    later = Study.open(tmp_path / "s")
    assert [(row["norm"], row["seed"]) for row in later.rows()][:2] == [("c", 7), ("a", 0)]
    assert len(later.rows()) == 7
    with pytest.raises(InputError, match=r"can't read '.*/t/study.json' \(FileNotFound.*name the folder of a study"):
        Study.open(tmp_path / "t")


def test_points_together_are_opened_too(tmp_path):
    points = grid(norm=["b", "a"], seed=[5, 0], lr=[0.4], together=("seed", "lr"))
    made = sequential(tmp_path / "s", stacked, points)
    assert Study.open(tmp_path / "s").frame().equals(made.frame())


def test_a_folder_left_by_a_kill_in_the_first_moments_is_taken(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "lock").write_text("77")
    (tmp_path / "s" / "study.json.77.part").write_text('{"na')
    assert sequential(tmp_path / "s").missing() == 0


# --- bad input of run -----------------------------------------------------------------------------------------

def test_a_trial_that_can_t_be_pickled_is_named_before_anything_runs(tmp_path):
    lock = threading.Lock()

    def locking(seed): return {"acc": lock}
    study = Study("s", locking, grid(seed=[0]), out=tmp_path / "s")
    with pytest.raises(InputError, match=r"locking can't be pickled for the worker processes \(TypeError: .*lock.*\); "
                                         r"let it make what can't be pickled itself, or give backend='sequential'"):
        study.run()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("given", "message"), [
    ({"backend": "lokey"}, "unknown backend 'lokey': did you mean 'loky'"),
    ({"jobs": 0}, "jobs is 0; give 1 or more, or None for all cores")])
def test_bad_arguments_of_run(given, message, tmp_path):
    with pytest.raises(InputError, match=message): Study("s", trial, POINTS, out=tmp_path / "s").run(**given)


@pytest.mark.parametrize(("backend", "package"), [("dask", "dask.distributed"), ("ray", "ray")])
def test_a_backend_that_isn_t_installed_says_how(backend, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    study = Study("s", trial, POINTS, out=tmp_path / "s")
    with pytest.raises(InputError, match=rf"backend='{backend}' needs {package}, which isn't installed; run `pip"):
        study.run(backend=backend, progress=False)


# --- what is shown --------------------------------------------------------------------------------------------

def scores(norm, lr, seed):
    if norm == "GroupNorm" and seed == 3: raise ValueError("diverged")
    return {"acc": {"RunningBatchNorm": 0.9, "GroupNorm": 0.6}[norm] + lr / 10 + seed % 3 / 100}


@pytest.fixture
def study(tmp_path):
    points = grid(norm=["RunningBatchNorm", "GroupNorm"], lr=[0.1, 0.4], seed=range(5))
    return sequential(tmp_path / "s", scores, points)


def test_summary_and_compare_are_tables(study):
    table = study.summary(by=["norm", "lr"], value="acc", failed_as=0.1, collapsed=0.5)
    assert list(table.columns) == ["norm", "lr", "n", "failed", "collapsed", "mean", "low", "high", "interval", "std",
                                   "min", "median", "max"]
    assert list(table.n) == [5] * 4
    assert list(table.failed) == [0, 0, 1, 1]
    table = study.compare("acc", norm=("RunningBatchNorm", "GroupNorm"), pair="seed", by="lr", failed_as=0.1)
    assert list(table.a_above) == [5, 5]
    one = study.compare("acc", norm=("RunningBatchNorm", "GroupNorm"), pair="seed", where={"lr": 0.4}, failed_as=0.1)
    assert one.difference[0] == table.difference[1] == pytest.approx((0.3 * 4 + 0.94 - 0.1) / 5)
    assert one.p_holm[0] == one.p[0]


@pytest.mark.parametrize(("given", "message"), [
    ({}, r"compare\(\) got no axis; name one axis and the values to compare"),
    ({"norm": ("a", "b"), "lr": (1, 2)}, r"compare\(\) got norm, lr; name one axis"),
    ({"norm": "GroupNorm"}, r"norm='GroupNorm'; give two or more values"),
    ({"nrom": ("a", "b")}, "unknown axis 'nrom': did you mean 'norm'"),
    ({"norm": ("a", "b"), "where": {"lr": 0.2}}, r"the axis 'lr' has no value 0\.2; it has: 0\.1, 0\.4"),
    ({"norm": ("a", "b"), "where": {"rl": 0.2}}, "unknown axis in where 'rl'")])
def test_compare_says_what_it_needs(given, message, study):
    with pytest.raises(InputError, match=message): study.compare("acc", pair="seed", **given)


def test_a_study_without_rows_says_so(tmp_path):
    study = Study("s", trial, POINTS, out=tmp_path / "s")
    assert len(study.frame()) == 0
    with pytest.raises(InputError, match=r"s has no finished runs to show; call run\(\) first"):
        study.summary(by="norm", value="acc")


def test_plot_has_every_run_the_means_and_n(study):
    ax = study.plot(x="lr", y="acc", hue="norm", failed_as=0.1)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["RunningBatchNorm (n = 5 each)",
                                                                   "GroupNorm (n = 5 each, 2 failed)"]
    assert ax.get_title() == "mean, 95 % Student t interval"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "0.4"]
    dots = [line for line in ax.get_lines() if line.get_marker() == "o"]
    assert sorted(y for line in dots for y in line.get_ydata()) == pytest.approx(sorted(
        0.1 if row["status"] == "failed" else row["acc"] for row in study.rows()))
    means = [line.get_ydata() for line in ax.get_lines() if line.get_marker() == "D"]
    table = study.summary(by=["norm", "lr"], value="acc", failed_as=0.1)
    assert [y for ys in means for y in ys] == pytest.approx(list(table["mean"]))
    assert study.plot(x="norm", y="acc", where={"lr": 0.1}, failed_as=0.1).get_legend().get_texts()[0].get_text() == (
        "n = 5 each, 1 failed")
    with pytest.raises(InputError, match="would mix lr"): study.plot(x="norm", y="acc", failed_as=0.1)
