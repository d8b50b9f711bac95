"""Statistics of studies, beside scipy's and values by hand; settings that would be mixed are errors that name them."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.errors import InputError
from experiments.study import needed
from experiments.study import statistics as s

AXES = {"norm": ["a", "b", "c"], "lr": [0.1, 0.4], "seed": list(range(12))}


def rows_of(figure, axes=AXES):
    return [{"norm": n, "lr": lr, "seed": i, "status": "ok", "acc": figure(n, lr, i)}
            for n in axes["norm"] for lr in axes["lr"] for i in axes["seed"]]


NOISE = np.random.default_rng(1).normal(size=(3, 2, 12))


def figure(norm, lr, seed): return float({"a": 0.9, "b": 0.8, "c": 0.8}[norm] + 0.05 * NOISE["abc".index(norm),
                                                                                         int(lr == 0.4), seed])


ROWS = rows_of(figure)


def test_summary_has_n_mean_median_and_student_s_interval_of_each_cell():
    lines = s.summary(ROWS, AXES, ["norm", "lr"], "acc", kind="t")
    assert [(line["norm"], line["lr"], line["n"], line["failed"]) for line in lines] == [
        (n, lr, 12, 0) for n in "abc" for lr in (0.1, 0.4)]
    values = [figure("b", 0.4, i) for i in range(12)]
    line = lines[3]
    low, high = stats.t.interval(0.95, 11, np.mean(values), stats.sem(values))
    expected = {"mean": np.mean(values), "median": np.median(values), "std": np.std(values, ddof=1), "low": low,
                "high": high, "min": min(values), "max": max(values)}
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert line["interval"] == "95 % Student t"


def test_twenty_runs_and_more_get_a_bootstrap_and_it_is_the_same_every_time():
    line, again = (s.summary(ROWS, AXES, ["norm", "lr"], "acc", kind="bootstrap")[0] for _ in range(2))
    assert line == again
    assert line["interval"] == "95 % bootstrap"
    values = np.array([figure("a", 0.1, i) for i in range(12)])
    means = np.random.default_rng(7).choice(values, (20_000, 12)).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    assert (line["low"], line["high"]) == pytest.approx((low, high), abs=0.2 * (high - low))
    assert s.interval([0.1] * 19 + [0.2])[2] == "95 % bootstrap"
    assert s.interval([0.1] * 18 + [0.2])[2] == "95 % Student t"


def test_intervals_of_one_run_and_of_equal_runs():
    low, high, what = s.interval([0.5])
    assert math.isnan(low)
    assert math.isnan(high)
    assert what == "none: n < 2"
    assert s.interval([0.5] * 20) == (0.5, 0.5, "95 % bootstrap")
    with pytest.raises(InputError, match="interval='normal'; give 't', 'bootstrap', or None"):
        s.interval([1, 2], "normal")


def test_failed_runs_count_as_what_is_said_and_stand_in_a_column():
    def failing(norm, lr, seed): return [math.nan, None, 0.1, *[0.9] * 9][seed]
    rows = [row if row["acc"] is not None else {k: v for k, v in row.items() if k != "acc"} | {"status": "failed"}
            for row in rows_of(failing)]
    with pytest.raises(InputError, match=r"12 of 72 runs have no finite 'acc' \(the first: norm='a', lr=0.1, seed=0, "
                                         r"status 'ok'\); say what a failed run counts as, such as chance, by failed"):
        s.summary(rows, AXES, ["norm", "lr"], "acc")
    line = s.summary(rows, AXES, ["norm", "lr"], "acc", failed_as=0.1, collapsed=0.11)[0]
    assert (line["n"], line["failed"], line["collapsed"]) == (12, 2, 1)
    assert line["mean"] == pytest.approx((3 * 0.1 + 9 * 0.9) / 12)
    assert line["median"] == 0.9
    assert "collapsed" not in s.summary(rows, AXES, ["norm", "lr"], "acc", failed_as=0)[0]


def test_settings_are_mixed_only_on_purpose():
    with pytest.raises(InputError, match=r"a cell of norm='a' would mix lr = 0.1, 0.4; add 'lr' to by, pool them on "
                                         r"purpose by over=\['seed', 'lr'\], or select one by where=\{'lr': 0.1\}"):
        s.summary(ROWS, AXES, "norm", "acc")
    pooled = s.summary(ROWS, AXES, "norm", "acc", over=["seed", "lr"])
    assert [line["n"] for line in pooled] == [24] * 3
    with pytest.raises(InputError, match=r"of norm='a', lr=0.1 would mix seed = 0, 1"):
        s.summary(ROWS, AXES, ["norm", "lr"], "acc", over=[])


def test_a_run_that_is_there_twice_is_named():
    with pytest.raises(InputError, match=r"a cell of norm='b', lr=0.4 has seed=3 twice; a run counts once"):
        s.summary([*ROWS, dict(ROWS[12 * 3 + 3])], AXES, ["norm", "lr"], "acc")


@pytest.mark.parametrize(("change", "message"), [
    ({"by": "nrm"}, "unknown axis in by 'nrm': did you mean 'norm'"),
    ({"value": "accc"}, "unknown figure 'accc': did you mean 'acc'"),
    ({"over": "sed"}, "unknown axis in over 'sed': did you mean 'seed'"),
    ({"over": "norm"}, "the axis 'norm' is in by and in over")])
def test_names_that_there_are_not(change, message):
    with pytest.raises(InputError, match=message):
        s.summary(ROWS, AXES, **({"by": ["norm", "lr"], "value": "acc"} | change))


def test_compare_is_scipy_s_paired_test_with_cohen_s_d_and_holm_s_correction():
    lines = s.compare(ROWS, AXES, "acc", "norm", ("a", "b", "c"), "seed", by="lr", kind="t")
    assert [(line["lr"], line["a"], line["b"]) for line in lines] == [
        (lr, *two) for lr in (0.1, 0.4) for two in (("a", "b"), ("a", "c"), ("b", "c"))]
    for line in lines:
        one, other = ([figure(line[x], line["lr"], i) for i in range(12)] for x in "ab")
        test = stats.ttest_rel(one, other)
        d = np.subtract(one, other)
        low, high = test.confidence_interval()
        expected = {"n": 12, "unpaired": 0, "difference": d.mean(), "low": low, "high": high, "p": test.pvalue,
                    "effect": d.mean() / d.std(ddof=1), "spread": d.std(ddof=1), "a_above": (d > 0).sum(),
                    "mean_a": np.mean(one), "mean_b": np.mean(other)}
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        assert line["test"] == "paired t"
    assert [line["p_holm"] for line in lines] == s.holm([line["p"] for line in lines])
    assert all(line["p_holm"] >= line["p"] for line in lines)


def test_holm_by_hand():
    assert s.holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert s.holm([0.5, 0.9]) == [1.0, 1.0]
    assert s.holm([]) == []


def test_random_signs_of_few_are_all_of_them_and_of_many_agree_with_scipy():
    assert s.p_value([1.0, 2.0, 3.0], "signs") == (2 / 8, "random signs")
    d = NOISE[0].ravel()[:20] + 0.5
    exact = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=9999,
                                   rng=np.random.default_rng(3)).pvalue
    assert s.p_value(d, "signs")[0] == pytest.approx(exact, abs=0.02)
    line = s.compare(ROWS, AXES, "acc", "norm", ("a", "b"), "seed", by="lr", kind="bootstrap")[0]
    assert (line["test"], line["interval"]) == ("random signs", "95 % bootstrap")


def test_compare_of_equal_differences_of_one_pair_and_of_none():
    same = rows_of(lambda norm, lr, seed: 1.0 if norm == "a" else 0.5)
    line = s.compare(same, AXES, "acc", "norm", ("a", "b"), "seed", by="lr", kind="t")[0]
    assert (line["difference"], line["low"], line["high"], line["effect"], line["p"]) == (0.5, 0.5, 0.5, math.inf, 0.0)
    line = s.compare(same, AXES, "acc", "norm", ("b", "c"), "seed", by="lr", kind="t")[0]
    assert (line["difference"], line["effect"], line["p"]) == (0.0, 0.0, 1.0)
    one = [row for row in same if row["seed"] == 0 or row["norm"] == "b"]
    line = s.compare(one, AXES, "acc", "norm", ("a", "b"), "seed", by="lr")[0]
    assert (line["n"], line["unpaired"], line["interval"], line["test"]) == (1, 11, "none: n < 2", "none: n < 2")
    assert math.isnan(line["p_holm"])
    line = s.compare(one, AXES, "acc", "norm", ("b", "c"), "seed", by="lr")[0]
    none = [row for row in same if row["norm"] != "c"]
    line = s.compare(none, AXES, "acc", "norm", ("a", "c"), "seed", by="lr")[0]
    assert (line["n"], line["unpaired"]) == (0, 12)
    assert math.isnan(line["difference"])


def test_failed_runs_stay_in_their_pairs():
    rows = [{**row, "acc": math.nan} if row["norm"] == "b" and row["seed"] < 5 else row for row in ROWS]
    with pytest.raises(InputError, match="10 of 48 runs have no finite 'acc'"):
        s.compare(rows, AXES, "acc", "norm", ("a", "b"), "seed", by="lr")
    line = s.compare(rows, AXES, "acc", "norm", ("a", "b"), "seed", by="lr", failed_as=0.1)[0]
    assert (line["n"], line["failed_a"], line["failed_b"]) == (12, 0, 5)
    assert line["mean_b"] == pytest.approx((5 * 0.1 + sum(figure("b", 0.1, i) for i in range(5, 12))) / 12)


@pytest.mark.parametrize(("change", "message"), [
    ({}, r"a cell of norm='a' would mix lr = 0.1, 0.4; add 'lr' to by, or to pair, or select one by where"),
    ({"levels": ("a", "d")}, r"the axis 'norm' has no value 'd'; it has: 'a', 'b', 'c'"),
    ({"levels": ("a", "a")}, r"norm=\('a', 'a'\); give two or more different values"),
    ({"pair": "norm", "by": "lr"}, r"the axis 'norm' is named twice"),
    ({"pair": "sed"}, r"unknown axis in pair 'sed': did you mean 'seed'")])
def test_comparisons_that_make_no_sense(change, message):
    given = {"axis": "norm", "levels": ("a", "b"), "pair": "seed"} | change
    with pytest.raises(InputError, match=message): s.compare(ROWS, AXES, "acc", **given)


def test_pairs_over_two_axes():
    line, = s.compare(ROWS, AXES, "acc", "norm", ("a", "b"), ("seed", "lr"))
    assert line["n"] == 24


# Of tables of power: d = 0.5 takes 34 pairs or 64 in each group, d = 0.8 takes 15 or 26, d = 0.2 takes 199 or 394.
@pytest.mark.parametrize(("d", "pairs", "each"), [(0.5, 34, 64), (0.8, 15, 26), (0.2, 199, 394)])
def test_needed_is_what_tables_of_power_say(d, pairs, each):
    assert needed(d, 1) == needed(-d * 3, 3) == pairs
    assert needed(d, 1, paired=False) == each


def test_needed_at_the_ends():
    assert needed(0.1, 0) == needed(1e6, 1) == 2
    n = needed(1e-4, 1)
    assert n == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2 * 1e8, rel=1e-3)
    assert needed(5, 1) == 3 <= needed(5, 1, power=0.99)
    for d in (20.0, 21.2, 21.3, 25.0): assert needed(d, 1) == 2     # on both sides of where the formula changes
    assert needed(0.3, 1, level=0.01) > needed(0.3, 1)


@pytest.mark.parametrize(("given", "message"), [
    ((0, 1), "d is 0; give the difference that matters"), ((math.nan, 1), "d is nan"),
    ((1, -1), "spread is -1; give a standard deviation, which needs two runs or more"),
    ((1, math.nan), "spread is nan")])
def test_needed_of_what_makes_no_sense(given, message):
    with pytest.raises(InputError, match=message): needed(*given)
    with pytest.raises(InputError, match=r"level is 0\.05 and power 1"): needed(1, 1, power=1)
