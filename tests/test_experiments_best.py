"""The best recipe: networks trained at once, what is tried, the verdict, the command line."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from experiments.__main__ import main
from experiments.beyond import best
from experiments.beyond.best import Config, judge, paired
from experiments.beyond.recipes import BEST, GROUP, RUNNING, TRIED, Recipe, train_together
from experiments.data import load_data
from experiments.errors import InputError
from experiments.training import train


@pytest.fixture(scope="module")
def doubles():
    """60 of the digits in float64, with noise: where the inputs don't vary, rounding alone decides about a basis."""
    images, noise = copy.deepcopy(load_data("digits", limit=60)), torch.Generator().manual_seed(0)
    for ds in (images.train, images.valid, images.test):
        ds.x = ds.x.double() + 0.1 * torch.randn(ds.x.shape, generator=noise, dtype=torch.float64)
    return images


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def difference(a, b):
    """The largest difference of two networks' parameters and buffers."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


# --- training -----------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("recipe", [Recipe(RUNNING, "EigenAdam", 0.0015, smoothing=0.1), Recipe(GROUP, "Adam", 0.001),
                                    Recipe(RUNNING, "SGD", 0.05, average_backward=False, batch_size=3)], ids=str)
def test_replicas_equal_the_same_seeds_trained_alone(doubles, recipe):
    seeds = (5, 6, 7)
    together = train_together([recipe] * 3, seeds, doubles)
    alone = [train_together([recipe], [seed], doubles)[0] for seed in seeds]
    # 30 steps in float64; the basis of EigenAdam is found four times and moved by what its inputs' rounding leaves.
    for a, t in zip(alone, together, strict=True): assert difference(a, t) < 1e-8
    assert difference(alone[0], alone[1]) > 0.01


@pytest.mark.usefixtures("_float64")
def test_recipes_that_differ_in_rate_and_smoothing_are_trained_at_once(doubles):
    recipes = [Recipe(RUNNING, "EigenAdam", 0.001), Recipe(RUNNING, "EigenAdam", 0.002, smoothing=0.2)]
    together = train_together(recipes, (0, 0), doubles)
    for recipe, t in zip(recipes, together, strict=True):
        assert difference(train_together([recipe], [0], doubles)[0], t) < 1e-8
    with pytest.raises(ValueError, match="trained at once they may differ in lr and smoothing alone"):
        train_together([recipes[0], replace(recipes[0], memory=100)], (0, 0), doubles)
    with pytest.raises(ValueError, match="trained at once they may differ in smoothing alone"):
        train_together([Recipe(GROUP, "SGD", 0.1), Recipe(GROUP, "SGD", 0.2)], (0, 0), doubles)


@pytest.mark.usefixtures("_float64")
def test_a_replica_is_what_the_runner_trains_by_the_same_recipe(doubles):
    recipe = Recipe(RUNNING, "SGD", 0.05)
    replica = train_together([recipe] * 2, (3, 4), doubles)[1]
    model = recipe.build(4)
    row = {"arm": "alone", "batch_size": 2, "lr": (0.05, 0.0), "seed": 4, "epochs": 1}
    train(model, doubles, row, "cpu", "", drop_last=True)
    assert difference(model, replica) < 1e-10


def test_memory_is_what_the_norm_says_it_remembers():
    for memory in (38, 200, 800):
        norm = Recipe(RUNNING, "SGD", 0.05, memory=memory).build(0)[0][2]
        assert norm.running_moments(2)[2] == pytest.approx(memory)
        assert norm.running_moments(1)[2] == pytest.approx(memory, rel=0.06)


def test_as_many_recipes_are_tried_for_each_norm_and_the_best_is_among_them():
    tried = {norm: [r for r in TRIED if r.norm == norm] for norm in (RUNNING, GROUP)}
    assert len(tried[RUNNING]) == len(tried[GROUP]) == len(TRIED) / 2
    assert len({str(r) for r in TRIED}) == len(set(TRIED)) == len(TRIED)
    assert all(BEST[norm] in tried[norm] for norm in tried)


# --- the verdict --------------------------------------------------------------------------------------------------

def rows(recipe, accuracies, kind="test_accuracy"):
    return [{"arm": str(recipe), "norm": recipe.norm, "batch_size": recipe.batch_size, "seed": s, "seconds": 1,
             "status": "ok", "valid_accuracy": 0.9, kind: a} for s, a in enumerate(accuracies)]


def final(two, one, group):
    return [*rows(BEST[RUNNING], two), *rows(BEST[GROUP], group),
            *rows(replace(BEST[RUNNING], batch_size=1), one)]


@pytest.mark.parametrize(("two", "one", "ok"), [
    ([0.988, 0.9886] * 10, [0.985] * 20, True),
    ([0.987, 0.9886] * 10, [0.985] * 20, False),                        # the mean
    ([0.984] + [0.99] * 19, [0.985] * 20, False),                       # the least
    ([0.988] * 20, [0.984] * 20, False),                                # at batch size 1
    ([math.nan] + [0.99] * 19, [0.985] * 20, False)])                   # one diverged
def test_the_target_holds_or_not(two, one, ok):
    found = judge(final(two, one, [0.98] * 20), "MNIST", 50_000)
    assert found.reproduced is ok
    assert found.sentence.startswith(
        f"The target was {'' if ok else 'NOT '}reached in test accuracy: RunningBatchNorm 0.9")


def test_few_seeds_or_other_images_test_nothing():
    few = final([0.99] * 3, [0.99] * 3, [0.98] * 3)
    found = judge(few, "MNIST", 50_000)
    assert found.reproduced is None
    assert found.sentence.startswith("The target was not tested, which takes MNIST in full and 20 seeds; test "
                                     "accuracy: RunningBatchNorm 0.9900 (mean of 3 seeds); its worst seed 0.9900 (of 3")
    assert judge(final([0.99] * 20, [0.99] * 20, [0.98] * 20), "digits", 1197).reproduced is None
    alone = judge(rows(BEST[GROUP], [0.9]), "MNIST", 50_000)
    assert (alone.reproduced, alone.sentence) == (None, "The target was not tested: that takes both norms.")


def test_tuning_names_the_best_of_each_norm_on_the_validation_images():
    made = [*rows(TRIED[0], [0.5, 0.7], "valid_accuracy"), *rows(TRIED[1], [0.8, math.nan], "valid_accuracy"),
            *rows(TRIED[-1], [0.3], "valid_accuracy")]
    found = judge(made, "MNIST", 50_000)
    assert (found.reproduced, found.sentence) == (
        None, f"Best on the validation images: {TRIED[0]} 0.6000 (mean of 2 seeds); {TRIED[-1]} 0.3000 (mean of 1 "
        "seed).")


def test_paired_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, and t(0.975) with 2 degrees of freedom is 4.302653.
    mean, low, high = paired([2, 4, 6], [1, 2, 3])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    mean, low, high = paired([1], [0])
    assert mean == 1
    assert [math.isnan(v) for v in (low, high)] == [True, True]      # one pair has no interval


# --- the command --------------------------------------------------------------------------------------------------

def test_run_folder_and_table(tmp_path, capsys):
    assert main(["best", "--data", "digits", "--limit", "40", "--seeds", "2", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [(r["norm"], r["batch_size"], r["seed"]) for r in summary["rows"]] == [
        (RUNNING, 2, 0), (RUNNING, 2, 1), (GROUP, 2, 0), (GROUP, 2, 1), (RUNNING, 1, 0), (RUNNING, 1, 1)]
    assert all(0 <= r["test_accuracy"] <= 1 and r["status"] == "ok" for r in summary["rows"])
    assert (tmp_path / "run" / "best.png").is_file()
    out = capsys.readouterr().out
    assert f"{BEST[GROUP]}, seed 1: valid loss " in out
    assert "The target was not tested" in out


def test_tuning_reads_no_test_image(tmp_path, monkeypatch):
    class Unread:
        def __len__(self): return 10
    images = replace(load_data("digits", limit=20), test=Unread())
    monkeypatch.setattr("experiments.images.load_data", lambda *args: images)
    monkeypatch.setattr(best, "TRIED", [TRIED[0], TRIED[3], TRIED[-1]])
    result = best.run(Config(tune=True, seeds=(1,), out=str(tmp_path / "run")))
    assert len(result.rows) == 3
    assert not any("test_accuracy" in row for row in result.rows)


def test_a_diverged_network_is_a_row(doubles):
    images = load_data("digits", limit=60)
    made = best.rows_of([Recipe(RUNNING, "SGD", 1e6)], [0], images, "cpu", "", test=True)
    assert made[0]["status"] == "diverged"


def test_small_batch_has_it_by_name(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(best, "run", lambda config: seen.append(config) or best_result())
    assert main(["small-batch", "--recipe", "best", "--data", "digits", "--seeds", "3"]) == 0
    assert (seen[0].seeds, seen[0].tune, seen[0].data) == ((0, 1, 2), False, "digits")
    assert main(["small-batch", "--recipe", "best", "--lr", "0.1", "--batch-size", "4"]) == 2
    assert ("error: --recipe best comes with its own batch size and lr; leave out --batch-size and --lr, or take "
            "--recipe published") in capsys.readouterr().err
    assert main(["small-batch", "--recipe", "bset"]) == 2
    assert "best" in capsys.readouterr().err


def best_result():
    from experiments.verdict import Result
    return Result([{"status": "ok"}])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="replicas is 0; it must be a positive integer"): Config(replicas=0)
    with pytest.raises(InputError, match="norm"): Config(norms=("BatchNorm",))
