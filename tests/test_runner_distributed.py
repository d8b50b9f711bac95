"""`Distributed`: the number of processes changes nothing but the speed."""

import distributed_programs as programs
import pytest
import ranks
import torch

from runner.loading import same_states

SAME = ("plain", "ragged", "in_company", "other_gradients", "metrics", "rates", "loaders")


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
        assert a.shape == b.shape and torch.allclose(a, b, rtol=at, atol=at, equal_nan=True), \
            f"{where}: {(a - b).abs().max()}"
    elif isinstance(a, float):
        at = 1e-2 if "float16" in where else 1e-6
        assert a == pytest.approx(b, rel=at, abs=at, nan_ok=True), where
    else: assert a == b, f"{where}: {a!r} {b!r}"


def without_seconds(found):
    if isinstance(found, dict): return {k: without_seconds(v) for k, v in found.items() if k != "seconds"}
    return found


@pytest.fixture(scope="module")
def alone():
    """What one process gives."""
    found = {}
    for name in SAME:
        torch.manual_seed(0)
        found[name] = getattr(programs, name)()
    return found


@pytest.fixture(scope="module")
def two(forks, tmp_path_factory): return ranks.start(forks, 2, tmp_path_factory.mktemp("two"), *SAME, "decisions")[0]


@pytest.fixture(scope="module")
def three(forks, tmp_path_factory): return ranks.start(forks, 3, tmp_path_factory.mktemp("three"), *SAME[:5])[0]


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_as_one_does(alone, two, name):
    for other in two: close(without_seconds(alone[name]), without_seconds(other[name]), name)
    assert same_states(two[0][name], two[1][name])              # to the last bit, seconds too


@pytest.mark.parametrize("name", SAME[:5])
def test_three_processes_train_as_one_does(alone, three, name):
    for other in three: close(without_seconds(alone[name]), without_seconds(other[name]), name)
    assert all(same_states(three[0][name], other[name]) for other in three[1:])


def test_a_decision_of_one_process_holds_on_all_in_the_same_step(two):
    a, b = (found["decisions"] for found in two)
    assert len(a) == 33
    for k in a: assert same_states(a[k], b[k]), k
