"""`Distributed`: the number of processes changes nothing but the speed."""

import json
import shutil

import distributed_programs as programs
import pytest
import ranks
import torch
from forking import Forks

from runner.loading import same_states

SAME = ("plain", "ragged", "in_company", "synchronised", "random_fits", "other_gradients", "metrics",
        "rates", "loaders")

OF_THREE = ("ragged", "random_fits")
OTHERS = ("compiled", "decisions", "diverged", "failures", "refused", "parts", "randomness", "written",
          "own_statistics", "looked_at", "interrupted", "resumed", "experiment")


def close(a, b, where="", tol=1e-9):
    """Raise unless two results are equal up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a: close(a[k], b[k], f"{where}/{k}", tol)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{where}: {a} {b}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)): close(x, y, f"{where}[{i}]", tol)
    elif isinstance(a, torch.Tensor):
        at = tol if a.dtype == torch.float64 else 1e-4 if "float16" not in where else 1e-2
        assert a.shape == b.shape, where
        assert torch.allclose(a, b, rtol=at, atol=at, equal_nan=True), f"{where}: {(a - b).abs().max()}"
    elif isinstance(a, float):
        at = 1e-2 if "float16" in where else 1e-6
        assert a == pytest.approx(b, rel=at, abs=at, nan_ok=True), where
    else: assert a == b, f"{where}: {a!r} {b!r}"


def without_seconds(found):
    if isinstance(found, dict): return {k: without_seconds(v) for k, v in found.items() if k != "seconds"}
    return found


@pytest.fixture(scope="module")
def forks():
    """Processes that have what torch imports with its `DistributedDataParallel`, which takes as long again."""
    forks = Forks("torch._dynamo", "runner", "norms")
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def alone():
    """What one process gives."""
    found = {}
    for name in SAME:
        torch.manual_seed(0)
        found[name] = getattr(programs, name)()
    return found


@pytest.fixture(scope="module")
def two(forks, tmp_path_factory):
    """What each of two processes gives, and what they print."""
    return ranks.start(forks, 2, tmp_path_factory.mktemp("two"), *SAME, *OTHERS, timeout=120)


@pytest.fixture(scope="module")
def three(forks, tmp_path_factory):
    """What each of three processes gives."""
    return ranks.start(forks, 3, tmp_path_factory.mktemp("three"), *OF_THREE, "interrupted", "resumed")[0]


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_as_one_does(alone, two, name):
    for other in two[0]: close(without_seconds(alone[name]), without_seconds(other[name]), name)
    assert same_states(two[0][0][name], two[0][1][name])              # to the last bit, seconds too


@pytest.mark.parametrize("name", OF_THREE)
def test_three_processes_train_as_one_does(alone, three, name):
    for other in three: close(without_seconds(alone[name]), without_seconds(other[name]), name)
    assert all(same_states(three[0][name], other[name]) for other in three[1:])


def test_a_compiled_step_is_shared_too(two):
    close(without_seconds(programs.compiled()), without_seconds(two[0][1]["compiled"]))


def test_a_decision_of_one_process_holds_on_all_in_the_same_step(two):
    a, b = (found["decisions"] for found in two[0])
    assert len(a) == 40
    others = [(step, "in training") for step in programs.STEPS] + [(v, "in validation") for v in ("parts", "batches")]
    assert all(a[k]["status"] == "cancelled" for k in others)
    for k in a: close(a[k], b[k], str(k), 0.0)


def test_a_nan_on_one_process_ends_all_in_its_step(two):
    a, b = (found["diverged"] for found in two[0])
    assert same_states(a, b)
    assert (a["status"], a["n_iter"]) == ("diverged", 4)
    assert a["report"].startswith("diverged at step 3 (epoch 0): first non-finite value in the batch")
    assert f"rank 1: {a['report']}" in two[1].stdout


def test_an_exception_on_one_process_ends_all_with_its_name(two):
    a, b = (found["failures"]["failures"] for found in two[0])
    assert len(a) == len(b) == 11
    for where in a:
        assert b[where]["errors"] == ["KeyError: 'bad label'"], where
        assert a[where]["errors"][0] == ("DistributedError: rank 1 failed, and so this process ends: KeyError: "
                                         "'bad label'"), where
        for found in (a[where], b[where]):
            assert (found["status"], found["ended"], found["alone"]) == ("failed", True, True), where
            assert found["seconds"] < 10, where
    close(*(found["failures"]["anew"] for found in two[0]))


def test_what_cannot_be_shared_is_an_error_on_all(two):
    for rank, found in enumerate(two[0]):
        errors = found["refused"]
        assert all(errors.values()), errors
        texts = {name: error[0] for name, error in errors.items()}
        assert "sampler, a Reversed" in texts["sampler"]
        assert "shard_loader(loader)" in texts["sampler"]
        assert "DistributedSampler" in texts["sampler"]
        assert "the loader, a Anew, can't be shared among 2 processes" in texts["iterable"]
        assert ("empty input" if rank else "rank 1 failed") in texts["no image"], texts
        assert "was begun with 5 processes and is to go on with 2" in texts["size"]
        assert "a batch of 1 has no image for some of 2 processes" in texts["replaced"]
        assert "for rank 2 of 7 processes" in texts["another's sampler"]
        assert ("callbacks on rank 0: TrainEvalCallback, Distributed; on rank 1: TrainEvalCallback, Distributed, Loud; "
                "give all the same") in texts["callbacks"]
        assert "epochs on rank 0: 1; on rank 1: 2" in texts["epochs"]
        assert "batches on rank 0: 1; on rank 1: 2; give all the same data" in texts["own data"]
        assert "the learner the model itself, model.module" in texts["shared already"]
        assert "rank 1 of 2 has no batch in this pass" in texts["fewer batches"]
    assert any("sync_norms" in note for note in two[0][1]["refused"]["no image"][1])


def test_batches_that_are_each_process_s_own_count_by_their_images(two):
    a, b = (found["parts"] for found in two[0])
    close(without_seconds(programs.whole_of_parts()["parts"]), without_seconds(a["parts"]))
    assert same_states(a, b)
    assert len(a["sampled"]["losses"]) == 12


def test_each_process_draws_its_own_numbers_and_all_have_one_order(two):
    a, b = (found["randomness"] for found in two[0])
    assert set(a["drawn"]).isdisjoint(b["drawn"])
    close(a["state"], b["state"])
    once = programs.images(23)[0][:, 0, 0, 0].tolist() + programs.images(7, 1)[0][:, 0, 0, 0].tolist()
    assert sorted(a["images"] + b["images"]) == sorted(2 * once)


def test_one_process_prints_and_writes(two, alone):
    out, folder = two[1].stdout, two[2]
    assert "rank 0 speaks" in out
    assert "rank 1 speaks" not in out
    assert len((folder / "history.csv").read_text().splitlines()) == 3
    state = torch.load(folder / "best.pt", weights_only=True)
    close(state, two[0][1]["written"]["state"])


def test_a_fit_goes_on_from_any_batch_to_the_last_bit(two, three):
    for found in (*two[0], *three):
        whole = without_seconds(found["interrupted"]["whole"])
        for at, other in found["resumed"].items(): assert same_states(whole, without_seconds(other)), at


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_processes_goes_on(two, forks, tmp_path, size):
    for folder in two[2].glob("plain *"): shutil.copytree(folder, tmp_path / folder.name)
    found = ranks.start(forks, size, tmp_path, "resumed_plain")[0]
    for its in found:
        for at, other in its["resumed_plain"].items():
            close(without_seconds(two[0][0]["interrupted"]["plain"]), without_seconds(other), f"at {at}")


def test_a_run_with_killed_processes_is_started_again_and_ends_as_if_nothing_had_been(two, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ranks.HERE)!r}); import distributed_programs as p; p.killed()"
    (tmp_path / "script.py").write_text(code)
    done = ranks.torchrun(2, "--max-restarts", 3, "script.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([*tmp_path.glob("killed *")]) == 1
    assert "resumed from runs" in done.stdout
    whole = without_seconds(two[0][0]["interrupted"]["whole"])
    assert same_states(whole, without_seconds(torch.load(tmp_path / "found.pt", weights_only=False)))


def test_probes_say_whose_images_they_see(two):
    part = "the part of rank 1 of 2"
    assert two[0][1]["looked_at"] == {"ActivationStats": part, "ParameterStats": "all images", "NormStats": part}
    assert f"ActivationStats: 2 modules, train and valid, every batch: 6 batches, 0.013 MB, {part}" not in two[1].stdout
    assert "the part of rank 0 of 2" in two[1].stdout


def test_statistics_that_are_not_synchronised_are_rank_0_s_in_the_end(two):
    a, b = (found["own_statistics"] for found in two[0])
    assert same_states(a, b)


def test_an_experiment_has_the_table_of_one_process(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert programs.experiment() == two[0][0]["experiment"]
    assert two[0][1]["experiment"] == 0                             # the helper's
    assert "2 at once (torchrun)" in two[1].stdout
    rows = [json.loads((folder / "summary.json").read_text())["rows"]
            for folder in (two[2] / "experiment of 2", tmp_path / "experiment of 1")]
    for found in rows:
        for row in found: del row["seconds"]
    assert json.dumps(rows[0]) == json.dumps(rows[1])
    table = [[line[:60] for line in text.splitlines() if line.startswith(("norm ", "Group", "Running", "Batch"))]
             for text in (two[1].stdout, capsys.readouterr().out)]
    assert table[0] == table[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_process_on_a_gpu_with_nccl(forks, tmp_path):
    found, = ranks.start(forks, 1, tmp_path, "on_gpu")[0]
    close(without_seconds(programs.on_gpu()), without_seconds(found["on_gpu"]), tol=1e-4)
