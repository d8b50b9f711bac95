"""The loops of other libraries beside ours: equal work is checked, what is missing is said. No time is judged."""

import importlib.util
import json
import logging
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import bench
from experiments.__main__ import main
from experiments.bench import peers
from experiments.bench.norms import network

ROOT = Path(__file__).parent.parent


@pytest.fixture
def short(monkeypatch):
    """Fits of a few steps, every arm measured for an instant, no peers."""
    monkeypatch.setattr(peers, "SHORT", 2)
    monkeypatch.setattr(peers, "LONG", 6)
    monkeypatch.setattr(peers, "PEERS", {})
    interleave = peers.interleave
    monkeypatch.setattr(peers, "interleave", lambda arms, n: interleave(arms, n, 0.001, 0))


@pytest.fixture
def config(): return bench.Config(parts=("peers",), repetitions=2)


def sgd(model, batches, steps=1, **kwargs):
    """A minimal arm: what the hand-written loop does, with `kwargs` for the optimizer, `steps` per batch."""
    opt, losses, right = torch.optim.SGD(model.parameters(), **{"lr": peers.LR, **kwargs}), [], []
    for xb, yb in batches:
        for _ in range(steps):
            pred = model(xb)
            loss = F.cross_entropy(pred, yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
        right.append((pred.argmax(1) == yb).double().mean().item())
    return losses, sum(losses) / len(losses), sum(right) / len(right)


def fake(arm): return {"fake": (("no-such-distribution", "torch"), arm)}


FAKE = f"fake {metadata.version('torch')}"


# --- equal work ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runner_ends_with_the_weights_and_the_books_of_the_hand_written_loop(config, dtype, tmp_path):
    batches = peers.make_batches(config, 5, dtype)
    models = [network(nn.BatchNorm2d).to(dtype) for _ in range(2)]
    books = [arm(m, batches, tmp_path) for arm, m in zip((peers.hand_written, peers.runner), models, strict=True)]
    assert books[0] == books[1]
    for k, v in models[0].state_dict().items(): assert torch.equal(v, models[1].state_dict()[k]), k
    assert not torch.equal(models[0][0][0].weight, network(nn.BatchNorm2d).to(dtype)[0][0].weight)


def test_rows_hold_ratio_version_and_difference(short, config, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", fake(lambda model, batches, folder: sgd(model, batches)))
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    found = peers.rows(config)
    assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before
    assert [(r["arm"], r["against"]) for r in found] == [
        (peers.BARE, None), ("Runner", peers.BARE), (FAKE, peers.BARE)]
    assert [r.get("target") for r in found] == [None, 1.05, None]
    assert [r["version"] for r in found] == [None, None, metadata.version("torch")]
    assert all(r["max_weight_difference"] == 0 and r["part"] == "peers" and r["repetitions"] == 2 for r in found)
    assert [r["note"] for r in found] == ["", "same weights", "same weights"]
    assert all(isinstance(r["start_up_ms"], float) for r in found)


@pytest.mark.parametrize("kwargs", [{"lr": 1.01 * peers.LR}, {"momentum": 0.1}, {"weight_decay": 0.1}, {"steps": 2}])
def test_an_arm_that_trains_differently_is_an_error_that_names_it(short, config, monkeypatch, kwargs):
    monkeypatch.setattr(peers, "PEERS", fake(lambda model, batches, folder: sgd(model, batches, **kwargs)))
    with pytest.raises(RuntimeError, match=rf"^{FAKE.replace('+', '.')} ended with weights that differ from the "
                                           r"hand-written loop's, in '.*' by \S+ of the largest weight.*mend its arm"):
        peers.rows(config)


def other_order(model, batches, folder): return sgd(model, [*batches][::-1])


def one_forward_more(model, batches, folder):
    found = sgd(model, batches)
    model(batches.batches[0][0])
    return found


@pytest.mark.parametrize("arm", [other_order, one_forward_more])
def test_another_order_or_a_forward_too_many_is_found(short, config, monkeypatch, arm):
    monkeypatch.setattr(peers, "PEERS", fake(arm))
    with pytest.raises(RuntimeError, match="differ from the hand-written loop's"): peers.rows(config)


@pytest.mark.parametrize(("spoil", "text"), [
    (lambda losses, loss, acc: (losses[1:], loss, acc), "recorded 5 losses"),
    (lambda losses, loss, acc: (losses, loss * 1.001, acc), r"has the mean loss \S+ for \S+"),
    (lambda losses, loss, acc: (losses, float("nan"), acc), "has the mean loss nan for"),
    (lambda losses, loss, acc: (losses, loss, acc + 0.1), "has the accuracy")])
def test_other_books_are_an_error(short, config, monkeypatch, spoil, text):
    monkeypatch.setattr(peers, "PEERS", fake(lambda model, batches, folder: spoil(*sgd(model, batches))))
    with pytest.raises(RuntimeError, match=f"^fake.*{text}"): peers.rows(config)


def test_rounding_is_no_error(short, config, monkeypatch):
    def rounded(model, batches, folder):
        with torch.no_grad():
            for p in model.parameters(): p.mul_(1 + 1e-14)
        return sgd(model, batches)
    monkeypatch.setattr(peers, "PEERS", fake(rounded))
    last = peers.rows(config)[-1]
    assert 0 < last["max_weight_difference"] < peers.TOLERANCE
    assert last["note"].startswith("weights within ")


# --- the command --------------------------------------------------------------------------------------------------

def test_without_peers_the_command_compares_ours_and_says_what_is_missing(short, monkeypatch, tmp_path, capsys):
    missing = {name: (("no-such-distribution",), None) for name in ("fastai", "Lightning", "ignite", "skorch")}
    monkeypatch.setattr(peers, "PEERS", missing)
    assert main(["bench", "peers", "--repetitions", "1", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for name in missing: assert f"{name}: not installed: pip install -e '.[bench]'\n" in out
    assert "same weights" in out
    record = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [r["arm"] for r in record["rows"]] == [peers.BARE, "Runner"]
    assert (tmp_path / "run" / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_cannot_be_imported_is_left_out_and_said(short, config, monkeypatch, capsys):
    def broken(model, batches, folder): raise ImportError("no name 'x' in fastprogress")
    monkeypatch.setattr(peers, "PEERS", fake(broken))
    assert [r["arm"] for r in peers.rows(config)] == [peers.BARE, "Runner"]
    assert f"{FAKE}: left out, it is installed and can't be imported: no name 'x'" in capsys.readouterr().out


def test_warnings_and_log_lines_of_an_arm_are_kept_off(capfd):
    with peers.quiet():
        warnings.warn("a peer's", stacklevel=1)
        logging.getLogger("a.peer").warning("a peer's")
    assert capfd.readouterr() == ("", "")
    with pytest.warns(UserWarning, match="ours"): warnings.warn("ours", stacklevel=1)
    assert logging.root.manager.disable == 0


def test_no_peer_comes_with_the_import(forks):
    code = ("import sys; import experiments.bench.peers, experiments.__main__\n"
            "print([m for m in ('fastai', 'lightning', 'pytorch_lightning', 'ignite', 'skorch') if m in sys.modules])")
    out = forks.run("-c", code, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stderr


def test_the_extra_installs_every_peer():
    text = (ROOT / "pyproject.toml").read_text()
    extra = next(line for line in text.splitlines() if line.startswith("bench = "))
    for distributions, _ in peers.PEERS.values(): assert f'"{distributions[0]}"' in extra


# --- the peers themselves, where they are installed ---------------------------------------------------------------

@pytest.mark.parametrize(("name", "modules"), [
    ("fastai", ["fastai"]), ("Lightning", ["lightning", "pytorch_lightning"]), ("ignite", ["ignite"]),
    ("skorch", ["skorch"])])
def test_a_peer_does_equal_work_and_writes_nothing(name, modules, config, monkeypatch, tmp_path, capfd):
    if not any(importlib.util.find_spec(m) for m in modules): pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(peers, "SHORT", 2)
    monkeypatch.setattr(peers, "LONG", 40)
    monkeypatch.chdir(tmp_path)
    _, arm = peers.PEERS[name]
    with peers.quiet():
        apart = peers.check({peers.BARE: peers.hand_written, name: arm}, config, str(tmp_path / "folder"))
        losses, *_ = arm(network(nn.BatchNorm2d), peers.make_batches(config, 5), str(tmp_path / "folder"))
    assert apart[name] < peers.TOLERANCE
    assert len(losses) == 5
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")
