"""The bench: that its arms do equal work, its record adds up, and settings are left alone. No time is judged."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.__main__ import main
from experiments.bench import PARTS, Config, lesson_form, timing, whole
from experiments.bench.norms import arms, network, step
from experiments.bench.runner import by_hand, loader, own_sgd, torchs_loader, with_runner
from experiments.data import load_data
from experiments.errors import InputError
from experiments.results import read_summary
from norms import RunningBatchNorm
from tests.reference import LiteralRunningBatchNorm

ROOT = Path(__file__).parent.parent


def test_interleave_calls_every_arm_in_every_repetition(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def arm(name, cost):
        def f():
            calls.append(name)
            clock[0] += cost
        return f
    times = timing.interleave({"slow": arm("slow", 0.02), "fast": arm("fast", 0.005)}, 4, seconds=0.1, warm_up=0.1)
    assert times == {"slow": pytest.approx([20.0] * 4), "fast": pytest.approx([5.0] * 4)}
    once = ["slow"] * 5 + ["fast"] * 20                             # as many calls as fit into 0.1 s
    back = once[5:] + once[:5]
    assert calls[-100:] == once + back + once + back
    r = timing.row("p", "s", "slow", "fast", times, 1.25)
    assert (r["ratio"], r["ms"], r["target"], r["repetitions"]) == (pytest.approx(4), pytest.approx(20), 1.25, 4)


def test_settings_are_put_back():
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    seen = []

    def fail():
        with timing.settings(threads=1, onednn=False):
            seen.append((torch.get_num_threads(), torch.backends.mkldnn.enabled))
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): fail()
    assert seen == [(1, False)]
    assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before


def test_the_runner_and_the_loop_by_hand_do_the_same_work():
    """Equal losses, means and weights, bit for bit."""
    results = []
    for f in (by_hand, with_runner, own_sgd, torchs_loader):
        model = network(nn.BatchNorm2d)
        losses, means = f(model, torch.optim.SGD(model.parameters(), lr=0.01), loader(12, 2, Config().rng()))
        results.append((losses, means, [v.tolist() for v in model.state_dict().values()]))
    assert all(r == results[0] for r in results)


def test_the_norms_compared_compute_the_same():
    """After a step from the same weights each norm's network has its counterpart's weights, to rounding."""
    xb, yb = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    for name in ("BatchNorm", "GroupNorm", "LayerNorm"):
        against = arms()[name][1]
        models = [network(arms()[n][0]) for n in (name, against)]
        for m in models:
            opt = torch.optim.SGD(m.parameters(), lr=0.01)
            F.cross_entropy(m(xb), yb).backward()
            opt.step()
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    step(RunningBatchNorm, xb, yb)()


def test_the_lessons_form_is_the_published_norm():
    """Outputs and gradients over ragged batches, against the literal definition, debiasing and clamp included."""
    form, literal = lesson_form.LessonRunningBatchNorm(3).double(), LiteralRunningBatchNorm(3).double()
    rng = torch.Generator().manual_seed(0)
    for b in (2, 4, 3, 2, 8) * 25:
        x = torch.randn(b, 3, 4, 4, generator=rng, dtype=torch.float64)
        results = []
        for m in (form, literal):
            xs = x.clone().requires_grad_()
            y = m(xs)
            results.append((y, torch.autograd.grad(y.pow(3).sum(), xs)[0]))
        for p, q in zip(*results, strict=True): torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_the_lessons_loop_trains_as_ours_does():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 784, generator=rng), torch.randint(0, 10, (24,), generator=rng)
    model = network(lesson_form.LessonRunningBatchNorm)
    before = [p.clone() for p in model.parameters()]
    lesson_form.fit(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy, (x, y), (x, y), 2)
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_the_command_writes_record_and_pictures(tmp_path, monkeypatch, capsys):
    from experiments.bench import runner as part
    monkeypatch.setattr(part, "rows", lambda config: [
        timing.row("runner", "batch 2", "by hand", None, {"by hand": [1.0, 1.1]}),
        timing.row("runner", "batch 2", "Runner", "by hand", {"by hand": [1.0, 1.1], "Runner": [1.02, 1.12]}, 1.05)])
    assert main(["bench", "runner", "--repetitions", "2", "--out", str(tmp_path / "b")]) == 0
    record = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert [r["arm"] for r in record["rows"]] == ["by hand", "Runner"]
    assert "torch" in record["versions"]
    assert "cores" in record["machine"]
    assert (tmp_path / "b" / "runner.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert re.search(r"Runner, batch 2 +1\.019 ", out)
    assert main(["table", str(tmp_path / "b")]) == 0
    assert "| runner | Runner, batch 2 | by hand | **1.02** | " in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "b" / "config.json").read_text()


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="unknown part 'norm': did you mean 'norms'"): Config(parts=("norm",))
    with pytest.raises(InputError, match="repetitions is 0; it must be a positive integer such as 15"):
        Config(repetitions=0)
    assert Config(parts=()).parts == tuple(PARTS)


def test_the_committed_records_have_every_part():
    records = [read_summary(ROOT / f"experiments/results/{name}.json")["rows"] for name in
               ("bench", "bench_earlier", "bench_whole", "bench_checkpoint", "bench_stacked",
                "bench_distributed", "bench_lab")]
    assert {r["part"] for record in records for r in record} == set(PARTS)


def test_whole_epochs_share_a_compiler_s_cache_that_the_first_finds_empty(monkeypatch):
    seconds = {whole.FIRST: 5.0, whole.COMPILED: 1.0, whole.OURS: 2.0, whole.LESSON: 4.0}
    seen = []

    def child(args, env, **kwargs):
        assert args[1] == "-c"
        start, name, *rest = args[2:]
        assert rest == ["digits", ""]
        compile(start, "start", "exec")
        assert repr(sys.path) in start                  # so the current folder's own `experiments` isn't in the way
        seen.append((name, env["TORCHINDUCTOR_CACHE_DIR"], os.listdir(env["TORCHINDUCTOR_CACHE_DIR"])))
        (Path(env["TORCHINDUCTOR_CACHE_DIR"]) / name.replace("'", "")).write_text("")
        return subprocess.CompletedProcess(args, 0, "epoch 1/1\n" + json.dumps(["digits", 1000, seconds[name]]))
    monkeypatch.setattr(whole.subprocess, "run", child)
    rows = {r["arm"]: r for r in whole.rows(Config(repetitions=10, data="digits"))}
    assert [name for name, _, _ in seen] == [whole.FIRST, whole.COMPILED, whole.OURS, whole.LESSON] * 2
    assert len({cache for _, cache, _ in seen}) == 2                    # a new one in each repetition
    assert [bool(files) for _, _, files in seen] == [False, True, True, True] * 2
    assert {name: r.get("ratio") for name, r in rows.items()} == {
        whole.LESSON: None, whole.OURS: 0.5, whole.COMPILED: 0.25, whole.FIRST: 1.25}
    assert rows[whole.COMPILED]["ms"] == 1.0
    assert rows[whole.COMPILED]["note"] == "1,000 steps: 1 s"


@pytest.mark.parametrize("name", [whole.LESSON, whole.OURS])
def test_a_whole_epoch_is_trained(name, monkeypatch, capsys):
    images = load_data("digits", limit=9)
    monkeypatch.setattr(whole, "load_data", lambda *args: images)
    with timing.settings(): data, steps, seconds = whole.epoch(name, "digits", "")
    assert (data, steps) == (images.name, 4)
    assert seconds > 0
