"""Runs with a published accuracy: their rates and tolerances, the verdict and the table on made-up rows."""

import math
import random
import re

import pytest

from experiments.published import lenet, lesson
from experiments.published.runs import Run
from experiments.training import schedule


def test_rates_by_hand():
    assert schedule(0.4) == (0.4, None)
    rate, sched = schedule((1.0, 0.2))
    assert rate == 1.0
    assert [sched(p) for p in (0, 0.5, 1)] == pytest.approx([1.0, 0.6, 0.2])
    _, sched = schedule((0.6, 2.0, 0.1))        # up over the first 30 %
    assert [sched(p) for p in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx([0.6, 1.3, 2.0, 1.05, 0.1])


@pytest.mark.parametrize(("claim", "low", "high"), [        # 0.008 * 3 sqrt(1 + 1/3) = 0.0277, sqrt(1 + 1/1): 0.0339
    ("near", 0.9223, 0.9777), ("at least", 0.9223, None), ("fails", None, None),
    ("holds", 0.950 - 3 * 1.25 * 0.030 / 3**0.5, None)])
def test_bounds_by_hand(claim, low, high):
    run = Run(None, 2, 0.4, published=(0.2, 0.95), claim=claim)
    assert run.bounds(3) == pytest.approx((low, high, 0.5 if claim == "fails" else None), abs=1e-4)
    assert Run(None, 2, 0.4, published=(0.95,)).bounds(3) == (None,) * 3
    assert Run(None, 2, 0.4, published=(0.95,), claim="at least").bounds(1)[0] == pytest.approx(0.9161, abs=1e-4)
    assert Run(None, 2, 0.4, published=(0.99,), claim="near").bounds(1)[1] == 1


def made(seeds=3, **accuracies):
    """Rows of the lesson's runs whose names begin as given, with these accuracies after each epoch."""
    return [{"arm": name, "seed": s, "valid_accuracies": accs, "seconds": 2.0,
             "status": "ok"} for s in range(seeds) for start, accs in accuracies.items()
            for name in [next(n for n in lesson.RUNS if n.replace("-", "_") == start)]]


@pytest.mark.parametrize(("rows", "expected", "said"), [
    (made(none=[0.9, 0.96], LayerNorm=[0.1] * 3), True,
     "reproduced with 3 seeds: none 0.960 (mean of 3 seeds; 0.942 to 0.998"),
    (made(none=[0.96, 0.9]), False, "none 0.900 (mean of 3 seeds; 0.942 to 0.998 needed; missed)."),
    (made(none=[0.9, math.nan]), False, ": none 0.000 (mean of"),
    (made(none=[]), False, ": none 0.000 (mean of"),
    # the fifth epoch of eight is the last that was published
    (made(BatchNorm_warm_up=[0.1] * 4 + [0.97] + [0.1] * 3), True, "up 0.970"),
    (made(BatchNorm_warm_up=[0.97] * 4 + [0.1] + [0.97] * 3), False, ": BatchNorm-warm-up 0.100"),
    (made(BatchNorm2d_batch_2=[0.49], RunningBatchNorm_batch_2=[0.90]), True,
     "2 0.490 (mean of 3 seeds; below 0.5 needed); "
     "RunningBatchNorm-batch-2 0.900 (median of 3 seeds; at least 0.885 needed)."),
    (made(BatchNorm2d_batch_2=[0.51], RunningBatchNorm_batch_2=[0.88]), False,
     "BatchNorm2d-batch-2 0.510 (mean of 3 seeds; below 0.5 needed; missed); "
     "RunningBatchNorm-batch-2 0.880 (median of 3 seeds; at least 0.885 needed; missed)"),
    (made(RunningBatchNorm_batch_2=[0.95])[:2] + made(RunningBatchNorm_batch_2=[0.1])[2:], True, "2 0.950 (median"),
    (made(RunningBatchNorm_batch_2=[0.1])[:2] + made(RunningBatchNorm_batch_2=[0.95])[2:], False, "2 0.100 (median"),
    (made(variant_batch_16=[0.999]), True, "0.999 (mean of 3 seeds; at least 0.947"),
    (made(variant_batch_16=[0.94], seeds=1), False, "at least 0.941"),
    (made(LayerNorm=[0.5] * 3), None, "None of these lesson's runs has a published figure")])
def test_verdict(rows, expected, said):
    found = lesson.judge(rows, "MNIST", 50_000)
    assert found.reproduced is expected
    assert said in found.sentence
    assert ("NOT reproduced" in found.sentence) is (expected is False)
    assert lesson.judge(rows, "MNIST", 1000).reproduced is lesson.judge(rows, "digits", 50_000).reproduced is None


def test_of_many_runs_those_that_missed_are_listed():
    rows = [row for name, run in lesson.RUNS.items() if run.claim for row in made(**{name.replace("-", "_"): [
        0.3 if run.claim == "fails" else run.published[-1]] * len(run.published)})]
    assert lesson.judge(rows, "MNIST", 50_000).sentence == (
        "The lesson's runs were reproduced with 3 seeds: 9 of 9 claims hold.")
    for row in rows[:3]: row["valid_accuracies"] = [0.1, 0.1]
    assert lesson.judge(rows, "MNIST", 50_000).sentence == (
        "The lesson's runs were NOT reproduced with 3 seeds: 8 of 9 claims hold; none 0.100 (mean of 3 seeds; 0.942 to "
        "0.998 needed; missed).")


def test_table_by_hand():
    rows = made(seeds=2, BatchNorm_warm_up=[0.5, 0.6, 0.7, 0.8, 0.97, 0.5, 0.5, 0.98], LayerNorm=[0.1, 0.1, 0.1])
    rows[0]["valid_accuracies"] = [*rows[0]["valid_accuracies"][:4], 0.95, 0.5, 0.5, 0.98]
    rows[1]["status"] = "diverged"
    header, lines = lesson.table({"rows": rows})
    assert header == ["run", "batch", "lr", "published", "valid accuracy per epoch", "range", "needed", "seeds",
                      "seconds", "status"]
    assert lines == [
        ["BatchNorm-warm-up", "512", "0.6 to 2 to 0.1", "0.8394, 0.8514, 0.9788, 0.9740, 0.9773, ...",
         "0.5000, 0.6000, 0.7000, 0.8000, 0.9600, 0.5000, 0.5000, 0.9800", "0.9500 to 0.9700", "0.948 to 1.000", "2",
         "2", "ok"],
        ["LayerNorm", "512", "0.8", "0.0991, 0.0991, 0.0991 (loss NaN)", "0.1000, 0.1000, 0.1000", "0.1000 to 0.1000",
         "-", "2", "2", "1 diverged, 1 ok"]]


def test_the_table_shows_the_average_that_the_sentence_uses():
    rng = random.Random(0)
    names = [name for name, run in lesson.RUNS.items() if run.claim]
    for _ in range(40):
        rows = [{"arm": name, "seed": s, "seconds": 1.0, "status": "ok", "valid_accuracies": [
            rng.random() for _ in range(rng.randint(0, len(lesson.RUNS[name].published) + 1))]}
            for name in rng.sample(names, 3) for s in range(rng.randint(1, 5))]
        claims = {claim.what: claim for claim in lesson.judge(rows, "MNIST", 50_000).claims}
        for line in lesson.table({"rows": rows})[1]:
            run, shown = lesson.RUNS[line[0]], re.findall(r"\d\.\d{4}", line[4])
            at = len(run.published) - 1
            assert float(shown[at] if at < len(shown) else "0") == pytest.approx(claims[line[0]].measured, abs=6e-5)
            several = line[7] != "1" and shown
            assert ("(median)" in line[4]) == bool(several and "median of" in claims[line[0]].of)


def test_a_table_of_some_arms_alone_is_one_and_so_is_its_picture(tmp_path):
    rows = [{"arm": arm, "seed": 0, "valid_accuracy": 0.5, "valid_accuracies": [0.5], "valid_loss": 1.0, "seconds": 1.0,
             "status": "ok", "gamma": [1.0], "beta": [0.0]} for arm in lenet.ARMS]
    for some in (rows[1:], rows[2:], rows[:1]):         # of a run that was interrupted
        assert len(lenet.table({"rows": some})[1]) == len(some)
        lenet.draw(some, {}, tmp_path / "some.png")
