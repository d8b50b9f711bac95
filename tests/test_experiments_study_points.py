"""Points of a study: grids, what a trial is handed, keys, and the errors of bad ones."""

import enum
import functools
import math

import numpy as np
import pytest
import torch

from experiments.errors import InputError
from experiments.study import Study, grid
from experiments.study.points import cell, function_name, key


def trial(norm, seed, lr=0.1): return {"acc": lr}


def test_grid_is_every_combination_in_the_order_of_its_axes():
    points = grid(norm=["a", "b"], seed=range(3))
    assert len(points) == 6
    assert list(points)[:4] == [{"norm": "a", "seed": 0}, {"norm": "a", "seed": 1}, {"norm": "a", "seed": 2},
                                {"norm": "b", "seed": 0}]
    assert [len(group) for group in points.trials()] == [1] * 6


def test_grids_are_added():
    both = grid(norm=["none"], seed=[0]) + grid(seed=range(3), norm=["a"], together="seed")
    assert (len(both), both.axes) == (4, {"norm": ("none", "a"), "seed": (0, 1, 2)})
    assert [*both] == [{"norm": "none", "seed": 0}, *({"norm": "a", "seed": s} for s in range(3))]
    assert [(h.arguments, h.together) for h in both.handed()] == [
        ({"norm": "none", "seed": 0}, ()), ({"norm": "a", "seed": [0, 1, 2]}, ("seed",))]
    three = both + grid(norm=["b"], seed=[7])
    assert [len(h.points) for h in three.handed()] == [1, 3, 1]
    assert three.axes["seed"] == (0, 1, 2, 7)
    with pytest.raises(InputError, match="grids that are added have norm='a', seed=2 twice; name each point once"):
        three + grid(norm=["a", "c"], seed=[2])
    with pytest.raises(InputError, match="grids of the axes norm, seed and norm can't be added"):
        both + grid(norm=["a"])


@pytest.mark.parametrize(("together", "trials", "handed"), [
    ("seed", 4, {"norm": "a", "lr": 0.1, "seed": [0, 1, 2]}),
    (("lr", "seed"), 2, {"norm": "a", "lr": [0.1, 0.1, 0.1, 0.4, 0.4, 0.4], "seed": [0, 1, 2, 0, 1, 2]})])
def test_axes_together_are_handed_as_lists_of_a_value_for_each_row(together, trials, handed):
    points = grid(norm=["a", "b"], lr=[0.1, 0.4], seed=range(3), together=together)
    groups = list(points.trials())
    assert (len(points), len(groups)) == (12, trials)
    assert points.arguments(groups[0]) == handed
    assert sorted(map(str, points)) == sorted(map(str, grid(norm=["a", "b"], lr=[0.1, 0.4], seed=range(3))))


class Kind(str, enum.Enum):
    ONE = "one"


def test_values_become_what_json_gives_back():
    points = grid(a=np.arange(2), b=[torch.tensor(0.5)], c=[(1, 2)], d=[None, True], e=[{"k": np.float64(1.5)}],
                  f=[Kind.ONE])
    first = next(iter(points))
    assert first == {"a": 0, "b": 0.5, "c": [1, 2], "d": None, "e": {"k": 1.5}, "f": "one"}
    assert [type(v) for v in first.values()] == [int, float, list, type(None), dict, str]


@pytest.mark.parametrize(("axes", "message"), [
    ({}, r"grid\(\) has no axes; give at least one"),
    ({"lr": []}, r"the axis 'lr' is empty; give it a value, or leave it out"),
    ({"lr": 0.1}, r"the axis 'lr' is 0\.1, no list of values; give lr=\[0\.1\]"),
    ({"norm": "BatchNorm"}, r"the axis 'norm' is 'BatchNorm', no list of values; give norm=\['BatchNorm'\]"),
    ({"norm": {"a", }}, r"the axis 'norm' is \{'a'\}, which has no order; give norm=a list"),
    ({"seed": [1, 2, 1.0]}, r"the axis 'seed' has 1 twice; name each value once"),
    ({"status": [1]}, r"can't be named 'status', which is a column of every study; rename it"),
    ({"lr": [math.inf]}, r"the axis 'lr' has the value inf, which JSON can't hold; name it by a string, such as 'inf'"),
    ({"norm": [torch.nn.ReLU]}, r"the axis 'norm' has the value <class .*ReLU'> of type type, which JSON can't hold; "
                                r"name it by a string or a number"),
    ({"norm": [[{1: 2}]]}, r"the axis 'norm' has the value \{1: 2\} of type dict, which JSON can't hold"),
    ({"seed": [1], "together": "sed"}, r"unknown axis in together 'sed': did you mean 'seed'"),
])
def test_a_bad_axis_is_an_error_with_the_mend(axes, message):
    with pytest.raises(InputError, match=message): grid(**axes)


@pytest.mark.parametrize(("axes", "message"), [
    ({"norm": ["a"], "seed": [1], "mom": [1]}, r"the trial test_experiments_study_points\.trial takes no argument "
     r"'mom', which is an axis of the grid: give it one, or rename the axis\. It takes: norm, seed, lr"),
    ({"norm": ["a"]}, r"the trial .* needs seed, of which the grid has no axis; add an axis, as in seed=\[\.\.\.\]")])
def test_axes_must_be_arguments_of_the_trial(axes, message, tmp_path):
    with pytest.raises(InputError, match=message): Study("s", trial, grid(**axes), out=tmp_path / "s")


def test_a_trial_of_any_arguments_takes_every_axis(tmp_path):
    Study("s", lambda **point: {}, grid(a=[1], b=[2]), out=tmp_path / "s")
    with pytest.raises(InputError, match="the trial is 3; give a function of the axes"):
        Study("s", 3, grid(a=[1]), out=tmp_path / "s")
    with pytest.raises(InputError, match="the points are list; give a grid"):
        Study("s", trial, [{"norm": "a"}], out=tmp_path / "s")


def test_a_key_is_of_the_values_the_function_and_the_version():
    point = {"norm": "a", "lr": 0.1}
    same = key({"lr": 0.1, "norm": "a"}, "f", "1")
    assert key(point, "f", "1") == same
    others = [key({**point, "lr": 0.2}, "f", "1"), key({**point, "seed": 1}, "f", "1"), key(point, "g", "1"),
              key(point, "f", "2"), key({**point, "norm": ["a"]}, "f", "1")]
    assert len({same, *others}) == 6


def test_the_name_of_a_function_tells_a_partial_s_arguments():
    names = [function_name(f) for f in (trial, functools.partial(trial, lr=1), functools.partial(trial, lr=2))]
    assert names[0] == "test_experiments_study_points.trial"
    assert names[1] == 'test_experiments_study_points.trial with [[], {"lr": 1}]'
    assert len(set(names)) == 3
    with pytest.raises(InputError, match="the trial's partial has the value <object"):
        function_name(functools.partial(trial, lr=object()))


def test_cells_tell_true_from_one_and_take_one_for_one_point_zero():
    assert cell(1) == cell(1.0) != cell(True)
    assert cell(0.1) != cell(0.2)
    assert cell([1, 2]) == cell([1, 2])
