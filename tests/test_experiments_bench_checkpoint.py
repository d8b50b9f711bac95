"""The bench's part on checkpoints: what is timed is what it says. No time is judged."""

import threading

import pytest
import torch

from experiments.bench import Config, checkpoint
from runner import Checkpoint


@pytest.fixture
def short(monkeypatch):
    """Epochs of 30 batches, with a write after 10 and after 30, and turns of 5."""
    for name, value in (("BATCHES", 30), ("HISTORY", (10, 30)), ("STRETCH", 5)):
        monkeypatch.setattr(checkpoint, name, value)


@pytest.mark.usefixtures("short")
def test_every_write_is_the_first_after_so_many_steps(tmp_path, monkeypatch):
    seen, real = [], Checkpoint._write

    def write(self, *args):
        seen.append((self.run.n_iter, len(self.run.recorder._waiting)))
        real(self, *args)
        state = torch.load(self.path, weights_only=True)
        assert (state["n_iter"], state["batch"] or 30) == (self.run.n_iter, self.run.n_iter)
    monkeypatch.setattr(Checkpoint, "_write", write)
    ten, thirty = checkpoint.writes(Config(repetitions=4), tmp_path)
    assert seen == [(10, 10)] * 4 + [(30, 20)] * 4 + [(30, 0)]      # the last at the epoch's end
    assert (ten["setting"], thirty["setting"], ten["repetitions"]) == ("10 steps of history", "30 steps of history", 4)
    for r in (ten, thirty):
        assert r["share"] == pytest.approx(r["ms"] / 30_000)
        assert f"{r['share']:.3%} of 30 s" in r["note"]
    assert thirty["bytes"] > ten["bytes"] > 4 * 62_000          # the network has 62,000 parameters


@pytest.mark.usefixtures("short")
def test_two_fits_take_turns_and_a_block_has_one_write(tmp_path, monkeypatch):
    written, real = [], Checkpoint._write
    monkeypatch.setattr(Checkpoint, "_write", lambda self, *args: written.append(self.run.n_iter) or real(self, *args))
    before = torch.get_num_threads()
    plain, kept = checkpoint.training(Config(repetitions=10), tmp_path, 0.4)
    assert (plain["arm"], kept["against"], kept["target"]) == (checkpoint.PLAIN, checkpoint.PLAIN, 1.01)
    assert kept["repetitions"] == plain["repetitions"] == 2
    assert len(written) >= 1
    assert torch.get_num_threads() == before


def test_turns_are_summed_by_block():
    turns = checkpoint.Turns(2, 1.0, 2.0)
    for _ in range(10):
        assert turns.over is False
        turns.add(0, 0.5)
        turns.add(1, 0.25)
    assert turns.over is True
    assert turns.blocks == [(1.0, 0.5, 2), (2.0, 1.0, 4), (2.0, 1.0, 4)]    # 1 s that isn't counted, then twice 2 s


@pytest.mark.usefixtures("short")
def test_an_error_in_one_fit_ends_both(tmp_path, monkeypatch):
    def write(self, *args): raise ZeroDivisionError
    monkeypatch.setattr(Checkpoint, "_write", write)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError): checkpoint.training(Config(), tmp_path, 0.1)
    assert threading.active_count() == threads


def test_files_lie_beside_the_run_folder_and_are_gone_at_the_end(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(checkpoint, "writes", lambda config, folder: seen.append(folder) or [1])
    monkeypatch.setattr(checkpoint, "training", lambda config, folder: seen.append(folder) or [2])
    assert checkpoint.rows(Config(out=str(tmp_path / "run"))) == [1, 2]
    assert [p.parent.parent for p in seen] == [tmp_path / "run"] * 2
    assert not list((tmp_path / "run").iterdir())
