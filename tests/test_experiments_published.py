"""Runs with a published accuracy: their rates and tolerances, the verdict and the table on made-up rows."""

import math

import pytest

from experiments.published import lesson
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
    ("near", 0.9223, 0.9777), ("at least", 0.9223, math.inf), ("fails", -math.inf, 0.5),
    ("holds", 0.950 - 3 * 1.25 * 0.030 / 3**0.5, math.inf)])
def test_bounds_by_hand(claim, low, high):
    run = Run(None, 2, 0.4, published=(0.2, 0.95), claim=claim)
    assert run.bounds(3) == pytest.approx((low, high), abs=1e-4)
    assert Run(None, 2, 0.4, published=(0.95,)).bounds(3) is None
    assert Run(None, 2, 0.4, published=(0.95,), claim="at least").bounds(1)[0] == pytest.approx(0.9161, abs=1e-4)
    assert Run(None, 2, 0.4, published=(0.99,), claim="near").bounds(1)[1] == 1


def made(seeds=3, **accuracies):
    """Rows of the lesson's runs whose names begin as given, with these accuracies after each epoch."""
    return [{"arm": name, "seed": s, "valid_accuracies": accs, "seconds": 2.0,
             "status": "ok"} for s in range(seeds) for start, accs in accuracies.items()
            for name in [next(n for n in lesson.RUNS if n.replace("-", "_") == start)]]


@pytest.mark.parametrize(("rows", "expected", "said"), [
    (made(none=[0.9, 0.96], LayerNorm=[0.1] * 3), True, "1 of 1 averages of 3 seeds are within"),
    (made(none=[0.96, 0.9]), False, "missed: none 0.900 (0.942 to 0.998 needed)"),
    (made(none=[0.9, math.nan]), False, "missed: none 0.000"),
    (made(none=[]), False, "missed: none 0.000"),
    # the fifth epoch of eight is the last that was published
    (made(BatchNorm_warm_up=[0.1] * 4 + [0.97] + [0.1] * 3), True, "1 of 1"),
    (made(BatchNorm_warm_up=[0.97] * 4 + [0.1] + [0.97] * 3), False, "missed: BatchNorm-warm-up 0.100"),
    (made(BatchNorm2d_batch_2=[0.49], RunningBatchNorm_batch_2=[0.90]), True, "2 of 2"),
    (made(BatchNorm2d_batch_2=[0.51], RunningBatchNorm_batch_2=[0.88]), False,
     "0 of 2 averages of 3 seeds are within their tolerance; missed: BatchNorm2d-batch-2 0.510 (below 0.5 needed), "
     "RunningBatchNorm-batch-2 0.880 (at least 0.885 needed)"),
    (made(RunningBatchNorm_batch_2=[0.95])[:2] + made(RunningBatchNorm_batch_2=[0.1])[2:], True, "1 of 1"),   # median
    (made(RunningBatchNorm_batch_2=[0.1])[:2] + made(RunningBatchNorm_batch_2=[0.95])[2:], False, "2 0.100 (at least"),
    (made(variant_batch_16=[0.999]), True, "1 of 1"), (made(variant_batch_16=[0.94], seeds=1), False, "at least 0.941"),
    (made(LayerNorm=[0.5] * 3), None, "None of these lesson's runs has a published figure")])
def test_verdict(rows, expected, said):
    reproduced, sentence = lesson.judge(rows, "MNIST", 50_000)
    assert reproduced is expected
    assert said in sentence
    assert ("NOT reproduced" in sentence) is (expected is False)
    assert lesson.judge(rows, "MNIST", 1000)[0] is lesson.judge(rows, "digits", 50_000)[0] is None


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
