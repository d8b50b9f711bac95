"""The norm lab: its arms and how they are chosen, its networks, and runs of it on few images."""

import copy
import itertools
import json
import math
import random

import pytest
import torch
from torch import nn

from experiments.errors import InputError
from experiments.lab import lab
from experiments.lab.arms import Arm, chosen, points, rates, tried
from experiments.lab.networks import NETS, NORMS, build
from experiments.lab.tables import overview
from experiments.study.stacked import stack

# --- arms ---------------------------------------------------------------------------------------------------------

def test_an_arm_is_found_again_by_its_name():
    rng = random.Random(0)
    for _ in range(200):
        arm = Arm(rng.choice(list(NORMS)), rng.choice((1, 2, 48, 1024)), rng.choice(("constant", "warm-up")),
                  float(f"{rng.choice((1e-7, 0.003, 1, 250)) * rng.random():.3g}"), rng.random() < 0.5)
        assert Arm.named(str(arm)) == arm


def test_an_arm_at_warm_up_goes_from_0_to_its_rate_and_back():
    row = Arm("GroupNorm", 2, "warm-up", 0.4).row(3, 1)
    assert (row["lr"], row["rate"], row["warm_up"]) == ([0.0, 0.4, 0.0], 0.4, 0.04)
    assert Arm("GroupNorm", 2, "constant", 0.4).row(3, 1)["lr"] == 0.4


def test_as_many_rates_for_each_norm_and_batch_size_and_they_grow_with_it():
    arms = tried("resnet", [("GroupNorm", 2, "warm-up"), ("BatchNorm", 32, "warm-up")], (0.01, 0.02))
    assert [[a.lr for a in group] for group in arms] == [[0.01, 0.02], [0.16, 0.32]]
    assert all(a.tuning for group in arms for a in group)
    assert rates("five-layer", 8, (0.1,)) == [0.2]


def rows(accuracies):
    """Rows of the tuning: a list of accuracies for each arm."""
    return [{"arm": str(arm), "seed": s, "valid_accuracy": a} for arm, accs in accuracies.items()
            for s, a in enumerate(accs)]


def test_the_rate_with_the_best_mean_is_chosen_and_failures_count_as_0():
    def arm(norm, lr): return Arm(norm, 2, "warm-up", lr, tuning=True)
    found = chosen(rows({arm("a", 0.1): [0.8, 0.8], arm("a", 0.2): [0.9, 0.9], arm("a", 0.4): [0.99, math.nan],
                         arm("b", 0.1): [0.5, None], arm("b", 0.2): [0.2, 0.3],
                         arm("c", 0.1): [None, None], arm("c", 0.2): [math.nan, None]}))
    assert found == [Arm("a", 2, "warm-up", 0.2), Arm("b", 2, "warm-up", 0.1), Arm("c", 2, "warm-up", 0.1)]


def test_each_arm_and_seed_is_run_once_and_not_more_together_than_allowed():
    rng = random.Random(1)
    for _ in range(50):
        cells = [(norm, b, "warm-up") for norm in rng.sample(["p", "q", "r"], rng.randint(1, 3)) for b in (2, 32)]
        arms = tried("resnet", cells, tuple(0.01 * (i + 1) for i in range(rng.randint(1, 5))))
        seeds, at_most = list(range(rng.randint(1, 6))), rng.randint(1, 7)
        grid = points(arms, seeds, lambda b: at_most if b == 2 else 1)      # noqa: B023
        wanted = [(str(a), s) for group in arms for a in group for s in seeds]
        assert sorted((p["arm"], p["seed"]) for p in grid) == sorted(wanted)
        for handed in grid.handed():
            alike = {(a.norm, a.batch_size) for a in (Arm.named(p["arm"]) for p in handed.points)}
            assert len(alike) == 1
            assert len(handed.points) <= (at_most if alike.pop()[1] == 2 else 1)


# --- networks -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("net", NETS)
def test_every_norm_trains_in_every_network_from_the_same_convolutions(net, norm):
    model, other = (build(net, n, 3, c=4, channels=3, steps=100) for n in (norm, "BatchNorm"))
    convs, others = ([m.weight for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (model, other))
    assert len(convs) == len(others) == (5 if net == "five-layer" else 9 + 3)
    assert all(torch.equal(a, b) for a, b in zip(convs, others, strict=True))
    x = torch.randn(3, 3, 32, 32)
    y = model(x)
    y.logsumexp(1).sum().backward()
    assert y.shape == (3, 4)
    frozen = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not frozen
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("net", NETS)
def test_networks_of_every_norm_are_trained_side_by_side_as_they_are_alone(net, norm):
    rng = torch.Generator().manual_seed(0)
    models = [build(net, norm, seed, c=4, channels=2, steps=3).double() for seed in (3, 4)]
    together = stack([copy.deepcopy(m) for m in models])
    for _ in range(3):
        x = torch.randn(2, 2, 2, 32, 32, generator=rng, dtype=torch.float64)
        alone = torch.stack([m(x[:, i]) for i, m in enumerate(models)], 1)                              # (N, K, c)
        beside = together(x.flatten(1, 2)).view(2, 2, 4)
        torch.testing.assert_close(beside, alone, rtol=1e-9, atol=1e-9)
        for net_, y in ((together, beside), *((m, alone[:, i]) for i, m in enumerate(models))):
            params = [p for p in net_.parameters()]
            grads = torch.autograd.grad(y.square().sum(), params, retain_graph=True)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True): p -= 0.001 * g


def test_the_residual_network_is_the_one_that_was_measured():
    model = build("resnet", "BatchNorm2d", 0, 10, 3)
    assert sum(m.kernel_size == (3, 3) for m in model.modules() if isinstance(m, nn.Conv2d)) == 9
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.31e6, rel=0.01)
    maps = []
    for m in model.children(): m.register_forward_hook(lambda _m, _i, out: maps.append(tuple(out.shape[1:])))
    model(torch.randn(2, 3, 64, 64))
    assert maps[:5] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4)]


# --- runs ---------------------------------------------------------------------------------------------------------

def config(tmp_path, **changes):
    given = {"data": "digits", "limit": 48, "norms": ["GroupNorm", "RunningBatchNorm"], "batch_sizes": [2, 16],
             "rates": [0.05, 0.1], "seeds": [0, 1], "out": str(tmp_path / "run")}
    return lab.Config(**{**given, **changes})


def test_a_run_tunes_on_split_off_images_and_reads_the_test_images_once(tmp_path, capsys):
    result = lab.run(config(tmp_path))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.status == 0
    assert summary["complete"]
    assert (tmp_path / "run" / "lab.png").stat().st_size
    before, after = summary["before"], summary["rows"]
    assert len(before) == 2 * 2 * 2
    assert len(after) == 2 * 2 * 2
    assert not any("test_accuracy" in r for r in before)
    assert all(0 <= r["test_accuracy"] <= 1 for r in after)
    assert {r["seed"] for r in before}.isdisjoint(r["seed"] for r in after)
    best = {}
    for r in before:
        cell = r["norm"], r["batch_size"]
        if r["valid_accuracy"] > best.get(cell, (-1,))[0]: best[cell] = r["valid_accuracy"], r["rate"]
    assert {(r["norm"], r["batch_size"]): r["rate"] for r in after} == {cell: rate for cell, (_, rate) in best.items()}
    out = capsys.readouterr().out
    assert "rates:   GroupNorm, batch 2, warm-up:" in out
    assert "test accuracy" in out
    header, lines = lab.table(summary)
    assert [line[:2] for line in lines if line[1] == "2"]
    assert len(lines) == 4
    assert len(header) == len(lines[0])


def test_a_run_goes_on_where_it_stopped_and_ends_the_same(tmp_path):
    whole = lab.run(config(tmp_path, out=str(tmp_path / "whole")))
    lab.run(config(tmp_path))
    for part in ("study", "before"):
        files = sorted((tmp_path / "run" / part).glob("**/*.json"))
        trial = next(f for f in files if f.name not in ("study.json",))
        trial.unlink()
    again = lab.run(config(tmp_path, resume=True))

    def figures(found): return [(r["arm"], r["seed"], r["test_accuracy"], r["test_loss"]) for r in found.rows]
    assert figures(again) == figures(whole)


@pytest.mark.parametrize(("batch_size", "images"), [(2, 16), (16, 64)])
def test_together_or_alone_a_network_becomes_the_same(tmp_path, batch_size, images):
    # Four and eight steps: in more, float32's rounding grows beyond the 1e-6 that `approx` allows.
    alone, together = (lab.run(config(tmp_path, limit=images, batch_sizes=[batch_size], together=k,
                                      out=str(tmp_path / str(k)))) for k in (1, 24))
    for a, b in itertools.product(alone.rows, together.rows):
        if (a["arm"], a["seed"]) == (b["arm"], b["seed"]): assert a["train_loss"] == pytest.approx(b["train_loss"])
    assert {r["together"] for r in together.rows} == {2}
    assert {r["together"] for r in alone.rows} == {1}


def test_at_large_batch_sizes_networks_are_trained_alone(tmp_path):
    result = lab.run(config(tmp_path, limit=128, batch_sizes=[64, 128]))
    assert {r["batch_size"]: r["together"] for r in result.rows} == {64: 2, 128: 1}


def test_a_norm_that_is_refused_its_input_is_a_failed_run_and_not_left_out(tmp_path):
    result = lab.run(config(tmp_path, norms=["BatchNorm2d", "GroupNorm"], batch_sizes=[1], seeds=[0]))
    status = {r["norm"]: r["status"] for r in result.rows}
    assert status == {"BatchNorm2d": "failed", "GroupNorm": "ok"}
    lines = {line[0]: line for line in lab.table(json.loads((tmp_path / "run" / "summary.json").read_text()))[1]}
    assert lines["BatchNorm2d"][4] == "0.0000"
    assert lines["BatchNorm2d"][8] == "1 of 1"


def test_arms_that_are_lost_while_rates_are_tried_are_named_and_nothing_is_chosen(tmp_path, monkeypatch, capsys):
    real = lab.build

    def broken(net, norm, *args):
        if norm == "GroupNorm": raise RuntimeError("out of luck")
        return real(net, norm, *args)
    monkeypatch.setattr(lab, "build", lambda net, norm, *args: real(net, norm, *args) if norm == "BatchNorm" else
                        broken(net, norm, *args))
    result = lab.run(config(tmp_path, batch_sizes=[2]))
    out = capsys.readouterr().out
    assert result.status == 1
    assert result.rows == []
    assert result.lost == 2
    assert "the arms were not chosen; GroupNorm, batch 2" in out
    assert "out of luck" in out
    assert "--resume" in out
    monkeypatch.setattr(lab, "build", real)
    assert lab.run(config(tmp_path, batch_sizes=[2], resume=True)).status == 0


@pytest.mark.parametrize(("changes", "text"), [
    ({"net": "resnet50"}, "unknown network 'resnet50'"),
    ({"norms": ["BatchNormm"]}, "did you mean 'BatchNorm'"),
    ({"batch_sizes": [2, 2]}, "lists 2 twice"),
    ({"batch_sizes": [0]}, "must be a positive integer"),
    ({"batch_sizes": [64]}, "take a smaller batch size"),
    ({"schedules": ["cosine"]}, "unknown schedule"),
    ({"rates": [0.1, -1]}, "rate is -1"),
    ({"rates": [0.1, math.inf]}, "rate is inf"),
    ({"seeds": [1000]}, "must be fresh"),
    ({"epochs": 0}, "epochs is 0"),
    ({"tune_epochs": 0}, "tune epochs is 0"),
])
def test_bad_settings_are_refused_in_words(tmp_path, changes, text):
    with pytest.raises(InputError, match=text): lab.run(config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_the_command_line(tmp_path, capsys):
    from experiments.__main__ import main
    argv = ["lab", "--data", "digits", "--limit", "40", "--norms", "GroupNorm,BatchNorm", "--batch-sizes", "8", "16",
            "--schedules", "constant", "warm-up", "--rates", "0.1", "--seeds", "2", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    assert "constant and warm-up" in capsys.readouterr().out
    assert main(["table", str(tmp_path / "run")]) == 0
    assert "| GroupNorm | 8 | constant | 0.2 |" in capsys.readouterr().out


def test_the_best_is_compared_with_the_next_over_the_seeds_that_both_have():
    def row(norm, seed, accuracy): return {"norm": norm, "seed": seed, "test_accuracy": accuracy, "batch_size": 2,
                                           "schedule": "warm-up"}
    best = [row("A", seed, 0.6 + 0.01 * seed) for seed in (3, 1, 2)]
    for others, said in (
            ([row("B", seed, 0.5 + 0.01 * seed) for seed in (1, 2, 3)], "+0.1000 to B, paired"),        # another order
            ([row("B", seed, 0.5 + 0.01 * seed) for seed in (2, 3, 7)], "+0.1000 to B, paired"),        # of two
            ([row("B", seed, 0.5) for seed in (7, 8, 9)], None)):                                       # of none
        text = lab.judge([*best, *others], "images", 100).sentence
        assert "batch 2, warm-up: A 0.6200 (3 seeds" in text
        assert said in text if said else "paired" not in text
        assert ("of 2)" in text) == (said is not None and others[2]["seed"] == 7)


def test_the_table_pairs_every_norm_with_the_best_of_its_batch_size():
    def rows(norm, batch_size, **accuracies):
        return [{"norm": norm, "seed": int(seed[1:]), "test_accuracy": accuracy, "batch_size": batch_size, "rate": 0.1,
                 "schedule": "warm-up", "step_ms": 1.0, "status": "ok"} for seed, accuracy in accuracies.items()]
    header, lines = lab.table({"rows": [
        *rows("A", 2, s0=0.5, s1=0.6), *rows("B", 2, s1=0.8, s0=0.6, s9=0.1), *rows("C", 2, s7=0.2),
        *rows("D", 2, s0=None, s1=0.4), *rows("A", 4, s0=0.1)]})
    at = header.index("to the best")
    # A is the best of batch size 2. B has +0.1 and +0.2 to it: 0.15 -+ 12.7062 * 0.05, Student's t with 1 degree of
    # freedom, and the mean counts its third seed. C has no seed in common; D's run without a figure counts as 0.
    assert [(line[0], line[1], line[at]) for line in lines] == [
        ("A", "2", "-"), ("B", "2", "+0.1500 (-0.4853 to +0.7853)"), ("C", "2", "-"),
        ("D", "2", "-0.3500 (-2.2559 to +1.5559)"), ("A", "4", "-")]


def test_the_table_marks_rates_at_the_edge_of_those_tried():
    def row(norm, schedule, rate): return {"norm": norm, "seed": 0, "test_accuracy": 0.5, "batch_size": 2, "rate": rate,
                                           "schedule": schedule, "step_ms": 1.0, "status": "ok"}
    of = {"A": 0.1, "B": 0.2, "C": 0.4}
    header, lines = lab.table({"rows": [*(row(norm, "warm-up", rate) for norm, rate in of.items()),
                                        row("A", "constant", 0.2), row("B", "constant", 0.2)],
                               "before": [*(row(norm, "warm-up", rate) for norm in of for rate in (0.2, 0.1, 0.4)),
                                          row("A", "constant", 0.2)]})
    at = header.index("rate")
    assert {(line[0], line[2]): line[at] for line in lines} == {
        ("A", "warm-up"): "0.1 (lowest)", ("B", "warm-up"): "0.2", ("C", "warm-up"): "0.4 (highest)",
        ("A", "constant"): "0.2", ("B", "constant"): "0.2"}       # of one rate, or of none that is known


def test_the_short_table_has_a_column_for_each_batch_size():
    def rows(norm, batch_size, *accuracies, schedule="warm-up"):
        return [{"norm": norm, "seed": seed, "test_accuracy": accuracy, "batch_size": batch_size, "schedule": schedule}
                for seed, accuracy in enumerate(accuracies)]
    # B has the larger sum, .55 + .5 to A's .6; a run without a figure counts as 0, and it and chance (.1, up to .15)
    # are collapsed.
    assert overview([*rows("A", 8, 0.5, 0.7), *rows("B", 2, 0.6, 0.5), *rows("B", 8, 0.15, 0.85),
                     *rows("A", 2, 0.9, None, schedule="constant")]) == (
        ["norm", "schedule", "at 2", "at 8"],
        [["B", "warm-up", "**0.550**", "0.500 (1)"], ["A", "warm-up", "-", "**0.600**"],
         ["A", "constant", "**0.450** (1)", "-"]])
