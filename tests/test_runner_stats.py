"""`Probe` and the callbacks on it: what they measure, when, and what they leave behind."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from runner import (
    ActivationStats,
    Callback,
    CancelEpochException,
    DataBunch,
    Dataset,
    GradientStats,
    Learner,
    ParameterStats,
    Runner,
    get_dls,
)
from runner.compiled import CompileError
from runner.insight.describe import describe

NAMES = ("mean", "std", "min", "max", "near_zero", "non_finite", "low", "high", "hist")


def small_model():
    return nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Tanh(), nn.Linear(5, 3))


def learner(model=None, n=22, bs=4, lr=0.1):
    """22 rows of 6 numbers in batches of 4: five batches and one of 2; validation in batches of 8."""
    torch.manual_seed(1)
    model = model or small_model()
    ds = Dataset(torch.randn(n, 6), torch.randint(0, 3, (n,)))
    data = DataBunch(*get_dls(ds, ds, bs, generator=torch.Generator().manual_seed(0)), 3)
    return Learner(model, torch.optim.SGD(model.parameters(), lr=lr), F.cross_entropy, data)


class Keep(Callback):
    """Every training batch as the runner sees it."""

    def __init__(self): self.xbs = []

    def begin_batch(self):
        if self.in_train: self.xbs.append(self.xb.clone())


def fitted(stats, epochs=1, **kwargs):
    learn = learner(**kwargs)
    Runner(stats).fit(epochs, learn)
    return learn


def hooks(model): return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


# --- what is measured ---------------------------------------------------------------------------------------------

def plain_description(x, near, bins, start, end):
    """The definition of `describe`, value by value."""
    values = x.double().flatten().tolist()
    n, mean = len(values), sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1))
    counts = [0] * bins
    for v in values: counts[min(max(math.floor((v - start) / (end - start) * bins), 0), bins - 1)] += 1
    return [mean, std, min(values), max(values), sum(abs(v) > near for v in values), 0, start, end], counts


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("limits", ["symmetric", "range", (-1.0, 1.5)])
@pytest.mark.parametrize("shape", [(50, 7), (3, 2, 4, 4), (1, 1)])
def test_describe_equals_the_definition(shape, limits, host):
    x = torch.randn(shape, dtype=torch.float64) * 2 + 0.3
    if x.numel() > 1: x.view(-1)[0] = 60.0                          # beyond 6 std
    found = describe(x, 0.5, 8, limits, host=host)
    found = found if host else found.tolist()
    mean, std = found[:2]
    low, high = x.min().item(), x.max().item()
    if limits == "range": start, end = max(low, mean - 6 * std), min(high, mean + 6 * std)
    elif limits == "symmetric":
        end = max(-max(low, mean - 6 * std), min(high, mean + 6 * std))
        start = -end
    else: start, end = limits
    if start == end:                                                # one value: no width to divide by
        assert found[:8] == [mean, 0, low, high, abs(low) > 0.5, 0, start, end]
        assert sum(found[8:]) == 1
        return
    numbers, counts = plain_description(x, 0.5, 8, start, end)
    assert found[:8] == pytest.approx(numbers, rel=1e-12, abs=1e-12)
    assert found[8:] == counts


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("value", [0.0, 2.5, -1e6])
def test_describe_of_equal_values_has_no_spread_and_all_counts(value, host):
    found = describe(torch.full((4, 3), value), 1e-3, 5, "range", host=host)
    found = found if host else found.tolist()
    assert found[:4] == [value, 0, value, value]
    assert found[4] == (0 if value == 0 else 12)
    assert sum(found[8:]) == 12


@pytest.mark.parametrize("host", [True, False])
def test_describe_counts_what_is_not_finite_and_leaves_the_histogram_empty(host):
    x = torch.tensor([0.0, 1.0, math.nan, math.inf, -math.inf, -2.0])
    found = describe(x, 0.5, 4, "symmetric", host=host)
    found = found if host else found.tolist()
    assert found[4:6] == [5, 3]                                     # nan is not near zero
    assert math.isnan(found[0])
    assert found[8:] == [0] * 4


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("x", [[3e38, 3e38, -1.0], [3e38, -3e38, 0.0], [1e30, 1.0, -1e30]])
def test_describe_survives_values_at_the_end_of_float32(x, host):
    found = describe(torch.tensor(x), 0.5, 4, "range", host=host)
    found = found if host else found.tolist()
    assert found[2:6] == pytest.approx([min(x), max(x), sum(abs(v) > 0.5 for v in x), 0])
    # Elsewhere than on the host the width itself overflows in the second case.
    if host or x[1] > -1e38: assert sum(found[8:]) == (3 if math.isfinite(found[0]) else 0)


@pytest.mark.parametrize("host", [True, False])
def test_describe_of_far_away_values_keeps_their_spread(host):
    x = torch.randn(1000) + 1e4
    expected = x.double().std().item()
    assert float(describe(x, 1e-3, 4, "range", host=host)[1]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("host", [True, False])
def test_the_histogram_of_a_sample_counts_every_channel_and_column_alike(host):
    x = torch.zeros(16, 6, 7, 7)
    for c in range(6): x[:, c] += 6 * c
    x += (torch.arange(7) + 0.5) * 6 / 7                            # the column: 42 values, a bin each
    for sample, step in ((4704, 1), (1500, 5), (700, 11)):          # with no divisor in common with 4704
        found = describe(x, 0.5, 42, (0, 36), sample, host)
        counts = torch.tensor((found if host else found.tolist())[8:]).view(6, 7)
        assert counts.sum() == len(range(0, 4704, step)) <= sample
        alone = describe(x, 0.5, 42, (0, 36), host=host)
        assert list(found[:8]) == list(alone[:8])                   # all else is of all values
        for along in (0, 1):                                        # columns, channels
            found = counts.sum(along).float()
            assert found.max() - found.min() <= 0.1 * found.mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_describe_takes_other_types_in_float32(dtype):
    x = (torch.randn(64, 64) * 300).to(dtype)
    found = describe(x, 1e-3, 4, "symmetric")
    assert found[:2] == pytest.approx([x.double().mean().item(), x.double().std().item()], rel=1e-5, abs=1e-4)


def test_activation_stats_equal_those_of_a_forward_done_again():
    stats, keep = ActivationStats(["0", "2"], near=0.2, bins=6, verbose=False), Keep()
    learn = learner()
    twin = copy.deepcopy(learn.model)
    opt = torch.optim.SGD(twin.parameters(), lr=0.1)
    batches = []

    class Twin(Callback):
        """Trains the copy in step and keeps its outputs."""
        def begin_batch(self):
            if not self.in_train: return
            h = twin[0](self.xb)
            out = twin[2](twin[1](h))
            batches.append((h.detach(), out.detach()))
            F.cross_entropy(out, self.yb).backward()
            opt.step()
            opt.zero_grad()
    Runner([stats, keep, Twin()]).fit(2, learn)
    assert len(batches) == 12
    for path, k in (("0", 0), ("2", 1)):
        steps, means, stds, shares = stats.series(path, "mean", "std", "near_zero")
        assert steps == list(range(12))
        assert means == pytest.approx([b[k].mean().item() for b in batches], rel=1e-5, abs=1e-7)
        assert stds == pytest.approx([b[k].std().item() for b in batches], rel=1e-5)
        assert shares == pytest.approx([(b[k].abs() <= 0.2).float().mean().item() for b in batches])
    assert [len(r["hist"]) for r in stats.rows] == [6] * 24
    assert all(sum(r["hist"]) == r["n"] for r in stats.rows)


def test_gradient_stats_are_those_of_the_outputs_gradients():
    stats, found = GradientStats("2", verbose=False), []

    class Again(Callback):
        def after_pred(self):
            if self.in_train: self.run.pred.register_hook(lambda g: found.append((g.mean().item(), g.std().item())))
    Runner([stats, Again()]).fit(1, learner())
    _, means, stds = stats.series("2", "mean", "std")
    assert len(found) == 6
    assert means == pytest.approx([m for m, _ in found], abs=1e-9)
    assert stds == pytest.approx([s for _, s in found], rel=1e-5)


def test_parameter_stats_are_those_of_gradients_and_moves():
    stats, found = ParameterStats("2.*", verbose=False), []

    class Again(Callback):
        def after_backward(self):
            p = self.model[2].weight
            found.append((p.grad.std().item(), p.detach().norm().item(), 0.1 * p.grad.norm().item()))
    Runner([stats, Again()]).fit(1, learner())
    assert stats.paths == ["2.weight", "2.bias"]
    _, stds, weights, updates, ratios = stats.series("2.weight", "std", "weight", "update", "ratio")
    assert stds == pytest.approx([f[0] for f in found], rel=1e-5)
    assert weights == pytest.approx([f[1] for f in found], rel=1e-6)
    assert updates == pytest.approx([f[2] for f in found], rel=1e-3)    # what is left of w after w - lr g - w
    assert ratios == pytest.approx([f[2] / f[1] for f in found], rel=1e-3)


def test_parameter_stats_leave_out_what_has_no_gradient():
    learn = learner()
    learn.model[2].bias.requires_grad_(False)
    stats = ParameterStats(verbose=False)
    Runner(stats).fit(1, learn)
    assert stats.paths == ["0.0.weight", "0.0.bias", "2.weight"]


def test_an_output_in_a_tuple_is_measured_and_one_without_a_tensor_is_not():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)
            self.words = Words()

        def forward(self, x):
            self.words(x)
            return self.inner(x)

    class Words(nn.Module):
        def forward(self, x): return "no tensor"

    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.head = Lstm(), nn.Linear(3, 3)

        def forward(self, x): return self.head(self.pair(x)[0])

    class Lstm(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def forward(self, x): return self.inner(x), {"state": None}
    stats = ActivationStats(["words"], verbose=False)
    fitted(stats, model=Pair())
    assert stats.rows == []
    assert stats.series("words", "mean") == ([], [])
    stats = ActivationStats("pair", verbose=False)
    fitted(stats, model=Tuple())
    assert len(stats.rows) == 6


# --- what is chosen -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("which", "paths"), [
    (None, ["0", "2"]),
    (nn.Linear, ["0.0", "2"]),
    ((nn.Tanh, nn.ReLU), ["0.1", "1"]),
    ("0.*", ["0.0", "0.1"]),
    (["2", nn.Tanh], ["1", "2"]),
    (lambda path, m: "." in path and isinstance(m, nn.ReLU), ["0.1"]),
])
def test_modules_are_chosen_by_type_pattern_or_function(which, paths):
    stats = ActivationStats(which, verbose=False)
    fitted(stats)
    assert stats.paths == paths
    assert {r["module"] for r in stats.rows} == set(paths)


def test_modules_are_chosen_by_themselves():
    model = small_model()
    stats = ActivationStats(model[:2], verbose=False)
    fitted(stats, model=model)
    assert stats.paths == ["0", "1"]


def test_a_model_without_children_is_looked_at_itself():
    stats = ActivationStats(verbose=False)
    fitted(stats, model=nn.Linear(6, 3))
    assert stats.paths == [""]
    assert len(stats.rows) == 6


def test_a_choice_that_finds_nothing_is_refused_with_what_there_is():
    for which, text in (("layer*", "'layer\\*' finds no module"), (["0", nn.Conv2d], "Conv2d'> finds no module"),
                        (nn.Linear(2, 2), "finds no module"), ([], "an empty list chooses no module")):
        if isinstance(which, nn.Module): which = [which]
        with pytest.raises(ValueError, match=text): fitted(ActivationStats(which, verbose=False))
    with pytest.raises(ValueError, match=r"which has '0' \(Sequential\), '0.0' \(Linear\), '0.1' \(ReLU\), '1' \(Tanh"):
        fitted(ActivationStats("x", verbose=False))
    with pytest.raises(ValueError, match=r"'2.wait' finds no parameter.*'2.weight' \(Parameter\)"):
        fitted(ParameterStats("2.wait", verbose=False))


# --- when ---------------------------------------------------------------------------------------------------------

def test_every_and_first_choose_the_batches_of_training():
    stats = ActivationStats("2", every=5, first=3, verbose=False)
    fitted(stats, epochs=2)                                         # 12 steps
    assert stats.series("2", "mean")[0] == [0, 1, 2, 5, 10]
    assert [(r["epoch"], r["batch"]) for r in stats.rows] == [(0, 0), (0, 1), (0, 2), (0, 5), (1, 4)]


def test_phases_are_kept_apart():
    stats = ActivationStats("2", phases=("train", "valid"), every=2, first=0, verbose=False)
    fitted(stats, epochs=2)                                         # 6 batches of training, 3 of validation
    assert [(r["phase"], r["epoch"], r["batch"], r["step"], r["n"]) for r in stats.rows] == [
        ("train", 0, 0, 0, 12), ("train", 0, 2, 2, 12), ("train", 0, 4, 4, 12),
        ("valid", 0, 0, 6, 24), ("valid", 0, 2, 6, 18),
        ("train", 1, 0, 6, 12), ("train", 1, 2, 8, 12), ("train", 1, 4, 10, 12),
        ("valid", 1, 0, 12, 24), ("valid", 1, 2, 12, 18)]
    assert stats.series("2", "n", phase="valid") == ([6, 6, 12, 12], [24, 18, 24, 18])


def test_validation_alone_leaves_training_untouched():
    stats = ActivationStats("2", phases="valid", verbose=False)
    fitted(stats)
    assert {r["phase"] for r in stats.rows} == {"valid"}
    with pytest.raises(ValueError, match="GradientStats: phases is 'valid'; there is 'train'"):
        GradientStats(phases="valid")


def test_a_new_fit_begins_anew():
    stats, learn = ActivationStats("2", verbose=False), learner()
    run = Runner(stats)
    run.fit(2, learn)
    run.fit(1, learn)
    assert len(stats.rows) == 6


def test_looking_changes_nothing():
    plain, looked_at = learner(), learner()
    Runner().fit(2, plain)
    every = [cls(verbose=False) for cls in (ActivationStats, GradientStats, ParameterStats)]
    Runner(every).fit(2, looked_at)
    for p, q in zip(plain.model.parameters(), looked_at.model.parameters(), strict=True): assert torch.equal(p, q)


# --- what is left behind ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("event", ["after_pred", "after_loss", "after_backward", "after_step", "after_batch"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, CancelEpochException])
def test_hooks_are_gone_after_an_exception(event, error):
    class Breaks(Callback):
        def __call__(self, name):
            if name == event and self.n_iter >= 2 and self.in_train: raise error("broken")
    learn, stats = learner(), ActivationStats(nn.Linear, verbose=False)
    run = Runner([stats, GradientStats(verbose=False), ParameterStats(verbose=False), Breaks()])
    if error is CancelEpochException: run.fit(1, learn)
    else:
        with pytest.raises(error, match="broken"): run.fit(1, learn)
    assert not hooks(learn.model)
    assert not any(p._backward_hooks for p in learn.model.parameters())
    Runner(stats).fit(1, learn)                                     # and it can be used again
    assert len(stats.rows) == 12


def test_hooks_are_there_in_measured_batches_alone():
    seen = []

    class Look(Callback):
        def after_pred(self): seen.append(bool(hooks(self.model)))
    Runner([ActivationStats(every=3, first=0, verbose=False), Look()]).fit(1, learner())
    assert seen == [True, False, False, True, False, False, False, False, False]


def test_a_failing_model_shows_its_own_error_and_keeps_no_hooks():
    class Fails(nn.Module):
        def forward(self, x): raise ZeroDivisionError("mine")
    model = nn.Sequential(nn.Linear(6, 3), Fails())
    with pytest.raises(ZeroDivisionError, match="mine"): fitted(ActivationStats("0", verbose=False), model=model)
    assert not hooks(model)


# --- memory -------------------------------------------------------------------------------------------------------

def test_the_memory_is_printed_before_the_first_batch(capsys):
    lines = []

    class Look(Callback):
        def begin_batch(self): lines.append(capsys.readouterr().out)
    # 12 batches of training, and the numbers of a row: 8 and 40 bins, for two modules
    Runner([ActivationStats(), Look()]).fit(2, learner())
    assert lines[0] == f"ActivationStats: 2 modules, train, every batch: 12 batches, {12 * 432 / 1e6:.2g} MB\n"
    assert not any(lines[1:])
    Runner(ActivationStats("2", every=5, first=2, phases=["train", "valid"])).fit(2, learner())
    # of 12: 0, 1, 5, 10; of 3 in each validation: 0
    assert capsys.readouterr().out == ("ActivationStats: 1 module, train and valid, one batch in 5 and the first 2: "
                                       f"6 batches, {6 * 232 / 1e6:.2g} MB\n")


@pytest.mark.parametrize(("every", "first", "phases", "epochs"), [(1, 0, "train", 3), (4, 10, "train", 2),
                         (2, 3, ["train", "valid"], 3), (7, 0, "valid", 2), (100, 2, "train", 1), (5, 50, "train", 1)])
def test_as_many_batches_are_measured_as_were_announced(every, first, phases, epochs, capsys):
    stats = ActivationStats("2", every=every, first=first, phases=phases)
    fitted(stats, epochs=epochs)
    assert f": {len(stats.rows)} batches" in capsys.readouterr().out


def test_memory_is_bounded_by_measuring_fewer_batches(capsys):
    stats = ActivationStats("2", first=2, max_mb=5 * 232 / 1e6)
    fitted(stats, epochs=4)                                         # 24 steps, room for 5 rows
    line = capsys.readouterr().out
    assert "one batch in 6 and the first 2 (not one in 1: max_mb is 0.00116)" in line
    assert stats.series("2", "mean")[0] == [0, 1, 6, 12, 18]
    stats = ActivationStats("2", first=100, max_mb=5 * 232 / 1e6)
    fitted(stats, epochs=4)
    assert stats.series("2", "mean")[0] == [0, 1, 2, 3, 4]


def test_numbers_on_a_device_come_to_the_host_by_blocks(monkeypatch):
    monkeypatch.setattr("runner.insight.probe.BLOCK", 4)
    here, there = (ActivationStats("2", verbose=False) for _ in range(2))
    there.describe = lambda x: describe(x, there.near, there.bins, there.limits, host=False)       # as on a GPU
    fitted(here, epochs=2)
    fitted(there, epochs=2)
    assert there._stores["2"].block.shape == (4, 48)
    assert len(there.rows) == len(here.rows) == 12
    for a, b in zip(here.rows, there.rows, strict=True):
        assert {k: v for k, v in a.items() if k not in NAMES} == {k: v for k, v in b.items() if k not in NAMES}
        for name in NAMES: assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-7)


def test_nothing_is_brought_to_the_host_inside_a_batch_on_a_device(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("a host copy")
    x = torch.randn(3, 4)
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for limits in ("symmetric", "range", (0, 1)): assert describe(x, 1e-3, 4, limits, host=False).shape == (12,)


def test_a_copy_and_a_pickle_have_the_numbers_and_not_the_model():
    stats = ActivationStats("2", verbose=False)
    fitted(stats)
    for twin in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert twin.rows == stats.rows
        assert twin.chosen == {}


# --- compiled -----------------------------------------------------------------------------------------------------

def test_a_compiled_runner_is_refused(monkeypatch):
    monkeypatch.setattr("runner.compiled.require_compiler", lambda: None)       # the refusal comes before its use
    for cls in (ActivationStats, GradientStats, ParameterStats):
        with pytest.raises(CompileError, match=f"{cls.__name__} taps.*fit without compile=True"):
            Runner(cls(verbose=False), compile=True).fit(1, learner())


@pytest.mark.parametrize("way", ["wrapped", "in place", "a part"])
def test_a_compiled_model_is_measured_as_it_was_written(way):
    plain, twin = small_model(), small_model()
    twin.load_state_dict(plain.state_dict())
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)
        return run
    torch._dynamo.reset()
    if way == "wrapped": twin = torch.compile(twin, backend=backend)
    elif way == "in place": twin.compile(backend=backend)
    else: twin[0] = torch.compile(twin[0], backend=backend)
    expected, found = (ActivationStats(nn.Tanh, every=2, first=0, verbose=False) for _ in range(2))
    Runner(expected).fit(1, learner(plain))
    Runner(found).fit(1, learner(twin))
    assert len(expected.rows) == 3
    for a, b in zip(expected.rows, found.rows, strict=True): assert b["mean"] == pytest.approx(a["mean"], abs=1e-6)
    assert calls                                                    # the other batches were compiled


def test_a_scripted_model_is_refused():
    scripted = torch.jit.script(small_model())
    with pytest.raises(ValueError, match="the module '' is scripted and passes taps by"):
        fitted(ActivationStats(verbose=False), model=scripted)


# --- errors -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kwargs", "text"), [
    ({"every": 0}, "every is 0; it must be an integer of at least 1"),
    ({"every": 2.0}, "every is 2.0"),
    ({"first": -1}, "first is -1; it must be an integer of at least 0"),
    ({"max_mb": 0}, "max_mb is 0; it must be a positive number of MB"),
    ({"phases": "test"}, "phases is 'test'; there is 'train' and 'valid', one or a list"),
    ({"phases": []}, r"phases is \[\]"),
    ({"near": -1}, "near is -1; it must be a number of at least 0"),
    ({"sample": 0}, "sample is 0; it must be a positive integer, or None"),
    ({"bins": 1}, "bins is 1; it must be an integer of at least 2"),
    ({"limits": "auto"}, "limits is 'auto'; it must be 'symmetric', 'range', a positive number"),
    ({"limits": 0}, "limits is 0"),
    ({"limits": (3, 1)}, r"limits is \(3, 1\)"),
])
def test_arguments_out_of_range_are_refused(kwargs, text):
    with pytest.raises(ValueError, match=f"ActivationStats: {text}"): ActivationStats(**kwargs)


def test_an_unknown_path_or_number_is_an_error_that_names_what_there_is():
    stats = ActivationStats("2", verbose=False)
    fitted(stats)
    with pytest.raises(KeyError, match="did not look at '1'; it looked at: 2"): stats.series("1", "mean")
    with pytest.raises(KeyError, match="has no 'median'; choose of: n, mean, std, min"): stats.series("2", "median")
