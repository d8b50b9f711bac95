"""Why runs die: the arms, what counts as dead, the trace, the statistics of deaths, and runs on few images."""

import json
import math
import random

import pytest
import torch
from scipy import stats
from torch import nn

from experiments.data import load_data
from experiments.errors import InputError
from experiments.figures import by_arm
from experiments.lab import dying, dying_trace
from experiments.lab.dying_arms import ARMS, TWICE, beside
from experiments.lab.dying_trace import LAYERS, SEEN, StopAfter, go_on, inside, packed, unpacked, watch
from experiments.lab.networks import build
from experiments.study.stacked import stack, unstack
from experiments.study.statistics import mcnemar, share_interval
from norms import RunningBatchNorm

# --- the statistics -----------------------------------------------------------------------------------------------

def test_the_interval_of_a_share_is_scipy_s_exact_one():
    for n in (1, 2, 7, 100, 1000):
        for k in {0, 1, n // 3, n - 1, n}:
            exact = stats.binomtest(k, n).proportion_ci(0.95, "exact")
            assert share_interval(k, n) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert share_interval(0, 0) == (0.0, 1.0)
    assert share_interval(0, 100)[1] == pytest.approx(0.0362, abs=1e-4)


def test_the_test_of_pairs_is_the_exact_binomial_one():
    for a in range(8):
        for b in range(8):
            p = stats.binomtest(a, a + b).pvalue if a + b else 1.0
            assert mcnemar(a, b) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize("call", [lambda: share_interval(3, 2), lambda: share_interval(-1, 2), lambda: mcnemar(-1, 0)])
def test_counts_that_make_no_sense_are_refused(call):
    with pytest.raises(InputError, match=r"got -?\d+ (of|and) \d+; give"): call()


# --- the arms -----------------------------------------------------------------------------------------------------

def weights(model): return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_begins_as_the_published_one_but_for_what_it_changes(name):
    arm, model = ARMS[name], ARMS[name].build(5)
    for w, p in zip(weights(model), weights(build("five-layer", "RunningBatchNorm", 5)), strict=True):
        if arm.change is None: assert torch.equal(w, p)
        elif w.ndim == 4: assert not torch.equal(w, p)
        ratio = {"filters-doubled": 2, "filters-halved": 0.5}.get(name, 1) if w.ndim == 4 else 1
        torch.testing.assert_close(w.flatten(1).norm(dim=1), ratio * p.flatten(1).norm(dim=1))
    if name == "filters-centred": assert all(w.mean((1, 2, 3)).abs().max() < 1e-7 for w in weights(model)[:-1])
    x = torch.randn(4, 1, 28, 28)
    model(x).logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(x).shape == (4, 10)


def test_published_is_the_small_batch_network():
    model, x = ARMS["published"].build(3), torch.randn(2, 1, 28, 28)
    assert torch.equal(model(x), build("five-layer", "RunningBatchNorm", 3)(x))
    kinds = [type(m).__name__ for m in ARMS["norm-before-relu"].build(3)[0]]
    assert kinds == ["Conv2d", "RunningBatchNorm", "GeneralRelu"]


def test_the_rate_grows_in_so_many_steps_whatever_the_epoch():
    row = ARMS["warm-up-250"].row("warm-up-250", 3, 0.4, 25_000)
    assert (row["lr"], row["warm_up"]) == ([0.0, 0.4, 0.4], 0.01)
    row = ARMS["warm-up-1000"].row("warm-up-1000", 3, 0.4, 500)
    assert row["lr"] == [0.0, 0.2]
    assert ARMS["half-rate"].row("half-rate", 3, 0.4, 500)["lr"] == 0.2
    assert ARMS["published-at-twice"].row("", 3, 0.4, 500)["lr"] == 0.8


def test_arms_are_compared_with_what_they_differ_from_in_one_thing():
    assert beside(["published", "eps-0.1", "eps-1e-2-at-twice"]) == {"eps-0.1": "published"}
    found = beside(list(ARMS))
    assert set(ARMS) - set(found) == {"published", "published-at-twice"}
    assert {found[f"{name}-at-twice"] for name in TWICE if name != "published"} == {"published-at-twice"}


@pytest.mark.parametrize("name", ["clamp-200", "no-clamp", "clamp-2000-at-0.1"])
def test_a_clamp_of_its_own_holds_alone_and_side_by_side(name):
    models = [ARMS[name].build(s) for s in range(2)]
    together = stack(models)
    x = 1e-3 * torch.randn(2, 2, 28, 28)
    for _ in range(12):
        together(x)
        for k, model in enumerate(models): model(x[:, k:k + 1])
    alone = [[m.running_var.clone() for m in model.modules() if isinstance(m, RunningBatchNorm)] for model in models]
    images, var = {"clamp-200": (200, 0.01), "no-clamp": (0, 0.01), "clamp-2000-at-0.1": (2000, 0.1)}[name]
    assert (alone[0][0].min() >= var) == (images > 24)
    unstack(together, models)
    for model, of in zip(models, alone, strict=True):
        for m, v in zip((m for m in model.modules() if isinstance(m, RunningBatchNorm)), of, strict=True):
            torch.testing.assert_close(m.running_var, v)


# --- who is dead --------------------------------------------------------------------------------------------------

def ended(losses, accuracy, status="ok"):
    row = {"arm": "published", "seed": 0, "valid_accuracy": accuracy, "seconds": 1.0, "status": status}
    return dying.finished(row, losses, 10)


CHANCE_LOSS = math.log(10)


@pytest.mark.parametrize(("losses", "accuracy", "dead"), [
    ([CHANCE_LOSS] * 1000, 0.1, True),
    ([2.6] * 1000, 0.1, True),                              # worse than guessing
    ([0.981 * CHANCE_LOSS] * 1000, 0.1, True),
    ([0.979 * CHANCE_LOSS] * 1000, 0.1, False),             # learns its batches
    ([CHANCE_LOSS] * 1000, 0.2, False),                     # and this one the images
    ([CHANCE_LOSS] * 800 + [1.0] * 200, 0.1, False),        # by its last 200 steps
    ([1.0] * 800 + [CHANCE_LOSS] * 200, 0.1, True),
    ([1.0] * 30 + [math.nan], 0.1, True),
    ([1.0] * 30 + [math.nan], math.nan, True),
    ([], math.nan, True)])
def test_dead_is_who_guesses_in_the_end(losses, accuracy, dead): assert ended(losses, accuracy)["dead"] is dead


def test_the_last_learning_is_where_a_window_was_below_guessing():
    assert ended([1.0] * 75 + [3.0] * 925, 0.1)["last_learning"] == 100
    assert ended([1.0] * 60 + [3.0] * 940, 0.1)["last_learning"] == 50
    assert ended([3.0] * 1000, 0.1)["last_learning"] == 0


# --- runs ---------------------------------------------------------------------------------------------------------

def config(tmp_path, **changes):
    given = {"data": "digits", "limit": 60, "arms": ["published", "warm-up-250", "GroupNorm"], "seeds": [0, 1, 4],
             "steps": 20, "together": 2, "out": str(tmp_path / "run"), "jobs": 1, "backend": "sequential"}
    return dying.Config(**{**given, **changes})


def figures(result): return [{k: v for k, v in r.items() if k != "seconds"} for r in result.rows]


def test_a_run_has_a_row_for_each_and_its_table_counts_them(tmp_path, capsys):
    result = dying.run(config(tmp_path))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result.status == 0
    assert summary["complete"]
    assert (tmp_path / "run" / "dying.png").stat().st_size
    assert [(r["arm"], r["seed"]) for r in result.rows] == [
        (arm, seed) for arm in ("published", "warm-up-250", "GroupNorm") for seed in (0, 1, 4)]
    header, lines = dying.table(summary)
    assert {len(line) for line in lines} == {len(header)}
    for line, arm in zip(lines, by_arm(summary["rows"]).values(), strict=True):
        assert line[1] == f"{sum(r['dead'] for r in arm)} of 3"
    saved, lost = (int(lines[1][i]) for i in (3, 4))
    dead = [{r["seed"] for r in arm if r["dead"]} for arm in by_arm(result.rows).values()]
    assert (saved, lost) == (len(dead[0] - dead[1]), len(dead[1] - dead[0]))
    assert "the first 20 steps" in capsys.readouterr().out
    said = dying.judge(result.rows, "digits", 60).record()
    assert said["verdict"].startswith("Dead after 20 steps, digits: published ")
    assert said["reproduced"] is None
    assert said["claims"][0]["measured"] == len(dead[0])


def test_a_run_goes_on_where_it_stopped_and_ends_the_same(tmp_path):
    whole = dying.run(config(tmp_path, out=str(tmp_path / "whole")))
    dying.run(config(tmp_path))
    trials = sorted(f for f in (tmp_path / "run" / "study").glob("**/*.json") if f.name != "study.json")
    random.Random(0).choice(trials).unlink()
    assert figures(dying.run(config(tmp_path, resume=True))) == figures(whole)


def test_an_arm_that_is_killed_midway_goes_on_in_the_middle(tmp_path, monkeypatch):
    class Killed(BaseException): pass

    def kill(self):
        self.done += self.in_train
        if self.done == 13: raise Killed

    given, seeds = config(tmp_path, steps=25), [0, 4]
    whole = dying.train_arms(given, ["published"] * 2, seeds, tmp_path / "never")
    with monkeypatch.context() as patch:
        patch.setattr("experiments.training.EVERY_SECONDS", 1e-9)
        patch.setattr(StopAfter, "after_batch", kill)
        with pytest.raises(Killed): dying.train_arms(given, ["published"] * 2, seeds, tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir())
    again = dying.train_arms(given, ["published"] * 2, seeds, tmp_path / "kept")
    for (_, a, x), (_, b, y) in zip(whole, again, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
        assert x == y


@pytest.mark.parametrize(("changes", "match"), [
    ({"arms": ["eps-1e-22"]}, "unknown arm 'eps-1e-22': did you mean 'eps-1e-2'"),
    ({"arms": []}, "arms is empty"), ({"arms": ["GroupNorm", "GroupNorm"]}, "lists 'GroupNorm' twice"),
    ({"steps": 0}, "steps is 0"), ({"together": 1.5}, r"together is 1\.5"), ({"lr": math.nan}, "lr is nan"),
    ({"seeds": [-1]}, "seed -1 makes no sense")])
def test_settings_that_make_no_sense_are_refused(tmp_path, changes, match):
    with pytest.raises(InputError, match=match): config(tmp_path, **changes)


def test_alone_and_together_begin_alike(tmp_path):
    one, two = (dying.train_arms(config(tmp_path, steps=5), ["published"] * len(seeds), seeds, tmp_path / str(seeds))
                for seeds in ([4], [1, 4]))
    assert two[1][1]["late_loss"] == pytest.approx(one[0][1]["late_loss"], rel=1e-3)


# --- inside -------------------------------------------------------------------------------------------------------

def test_a_watched_run_is_the_run_and_what_is_seen_is_what_happened():
    images = load_data("digits", limit=60)
    (one, two), kept = watch(images, "published", [4, 1], 0.4, 12, [0, 5])
    loose = dying.Config(data="digits", limit=60, steps=12, seeds=[4, 1], jobs=1, arms=["published"])
    row = dying.train_arms(loose, ["published"] * 2, [4, 1], None)[0][1]
    assert row["late_loss"] == pytest.approx(sum(one["loss"][-6:]) / 6, rel=1e-4)
    assert {len(layer) for name in SEEN for layer in two[name]} == {12}
    assert {len(two[name]) for name in SEEN} == {LAYERS}
    model = ARMS["published"].build(1)
    for a, b in zip(kept[0][1].parameters(), model.parameters(), strict=True): assert torch.equal(a, b)
    for i in range(LAYERS):
        w, moved = kept[5][1][i][0].weight, two["ratio"][i][5] / 0.4
        assert two["gradient"][i][5] / w.norm().item() == pytest.approx(moved, rel=1e-4)
        assert kept[5][1][i][2].running_var.min().item() == pytest.approx(two["least_var"][i][4], rel=1e-4)


def test_a_copy_goes_on_as_its_run_did_unless_it_is_changed():
    images = load_data("digits", limit=60)
    (_, two), kept = watch(images, "published", [4, 1], 0.1, 12, [5])
    same = go_on(images, kept[5][1], [1, 1], 5, 7, 0.1)
    assert same[:, 0].tolist() == pytest.approx(two["loss"][5:], rel=1e-3)
    assert torch.equal(same[:, 0], same[:, 1])
    still = go_on(images, kept[5][1], [1], 5, 7, 0.1, lambda step, net: float(step != 7))[:, 0]
    assert still[:3].tolist() == pytest.approx(two["loss"][5:8], rel=1e-3)
    assert still[3].item() != pytest.approx(two["loss"][8], rel=1e-3)
    other = go_on(images, kept[5][1], [1], 5, 7, 0.1, dying_trace.with_eps(0.1))[:, 0]
    assert other[0].item() == pytest.approx(two["loss"][5], rel=1e-3)          # from the next forward on
    assert other[1].item() != pytest.approx(two["loss"][6], rel=1e-4)


def test_inside_says_which_step_it_was_and_what_became_of_the_copies(monkeypatch):
    monkeypatch.setattr(dying_trace, "TRACED", 28)
    monkeypatch.setattr(dying_trace, "EVERY", 4)
    monkeypatch.setattr(dying_trace, "OTHERS", 2)
    found = inside(load_data("digits", limit=60), "published", [4, 1, 0], 1, 0.4)
    text = json.dumps(found)
    dead, alive = map(unpacked, json.loads(text)["traces"])
    assert (dead["seed"], alive["seed"] in (4, 0)) == (1, True)
    assert found["moved"][1] == {"seed": 1, "step": found["burst"], "ratio": max(
        layer[found["burst"]] for layer in dead["ratio"])}
    assert [len(w["late"]) for w in found["went_on"]] == [1] * 4 + [2] * 4
    assert packed(dead) == found["traces"][0]


def test_the_first_dead_seed_of_the_published_arm_is_looked_into(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(dying, "inside", lambda images, arm, chunk, seed, *_: asked.append((chunk, seed)) or {})
    given = config(tmp_path, seeds=[3, 5, 7, 9], arms=["published"], steps=2)
    rows = [{"arm": "published", "seed": s, "dead": s > 5, "last_learning": s != 7} for s in (3, 5, 7, 9)]
    dying.look_inside(given, load_data("digits", limit=60), [([], row, None) for row in rows])
    assert asked == [((7, 9), 9)]
    assert "inside" in rows[3]
