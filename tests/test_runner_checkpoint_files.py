"""Checkpoints on the disk: whole or absent, told when damaged or another run's; and a process killed at any moment."""

import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from test_runner_checkpoint import EPOCHS, PROGRAMS, build, everything, interrupted, resumed, same
from torch import nn

import runner.checkpoint_files as files
from norms import RunningBatchNorm
from runner import (
    SGD,
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    Checkpoint,
    CheckpointError,
    DataBunch,
    Dataset,
    Learner,
    Recorder,
    Runner,
    accuracy,
    get_dls,
)


def there(folder): return [path.name for path in files.checkpoints_in(folder)]


# --- what is written, and when --------------------------------------------------------------------------------------

class Writes(Callback):
    """What there is in the folder after each batch and epoch."""

    _order = 20_000

    def __init__(self, folder): self.folder, self.seen = folder, []

    def note(self):
        path = files.checkpoints_in(self.folder)[-1:]
        held = files.load(path[0]) if path else {}
        if (at := (held.get("epoch"), held.get("batch"))) not in self.seen: self.seen.append(at)

    def begin_batch(self): self.note()

    def begin_epoch(self): self.note()

    def after_fit(self): self.note()


@pytest.mark.parametrize(("settings", "want"), [
    ({}, [(1, None), (2, None), (3, None)]),
    ({"every_epochs": 2}, [(2, None), (3, None)]),
    ({"every_epochs": 9}, [(3, None)]),
    ({"every_batches": 4, "every_epochs": None}, [(0, 4), (1, 2), (1, 6), (2, 4), (3, None)]),
    ({"every_batches": 7}, [(1, None), (1, 1), (2, None), (2, 2), (3, None)]),
    ({"every_seconds": 0, "every_epochs": None}, [(e, b) for e in range(3) for b in (1, 2, 3, 4, 5, 6, None)][:6]),
    ({"every_seconds": 1e9, "every_epochs": None}, [(3, None)]),
])
def test_when_it_writes(settings, want, tmp_path):
    learn, run = build("SGD", tmp_path, **{"every_batches": None, **settings})
    run.fit(EPOCHS, learn, cbs=(writes := Writes(tmp_path)))
    seen = [at for at in writes.seen if at != (None, None)]
    assert seen == want if "every_seconds" not in settings or len(want) == 1 else seen[:6] == want
    assert there(tmp_path)[-1] == run.checkpoint.path.name


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_files_stay_and_nothing_else_is_left(keep, tmp_path):
    learn, run = build("SGD", tmp_path, keep=keep)
    run.fit(EPOCHS, learn)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == there(tmp_path)
    assert [files.number_of(Path(name)) for name in names] == [*range(22 - keep, 22)]
    assert all(torch.load(tmp_path / name, weights_only=True)["version"] == 1 for name in names)


def test_it_makes_its_folder_and_takes_away_what_a_killed_process_left(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    dead = multiprocessing.get_context("spawn").Process(target=int)
    dead.start()
    dead.join()
    ours = folder / f"checkpoint-0123abcd-000007.pt.{os.getpid()}.part"
    left = folder / f"checkpoint-0123abcd-000007.pt.{dead.pid}.part"
    other = folder / "notes.txt"
    for path in (ours, left, other): path.write_text("half")
    learn, run = build("SGD", folder)
    run.fit(1, learn)
    assert (ours.exists(), left.exists(), other.read_text()) == (True, False, "half")


def test_runs_in_one_folder_leave_each_other_alone_and_the_latest_goes_on(tmp_path):
    learn, run = build("SGD", tmp_path)
    run.fit(EPOCHS, learn)
    first = there(tmp_path)
    interrupted(0, "momentum", tmp_path)            # killed before its first batch was over
    assert there(tmp_path)[:3] == first
    learn, run = build("momentum")
    run.fit(EPOCHS, learn)
    same(everything(*resumed("momentum", tmp_path)), everything(learn, run))
    assert there(tmp_path)[:3] == first
    assert len(there(tmp_path)) == 6


# --- bad settings and folders ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "told"), [
    ({"every_epochs": 0}, "every_epochs is 0; it must be an integer of at least 1, or None"),
    ({"every_epochs": True}, "every_epochs is True"),
    ({"every_batches": 2.5}, "every_batches is 2.5"),
    ({"every_batches": -1}, "every_batches is -1"),
    ({"every_seconds": -1}, "every_seconds is -1; it must be a number of at least 0, or None"),
    ({"every_seconds": float("nan")}, "every_seconds is nan"),
    ({"every_seconds": "30"}, "every_seconds is '30'"),
    ({"keep": 0}, "keep is 0; it must be an integer of at least 1"),
    ({"keep": None}, "keep is None"),
    ({"every_epochs": None}, "are all None, so that nothing would be written before the end"),
])
def test_settings_that_mean_nothing_are_told(settings, told):
    with pytest.raises(ValueError, match=told): Checkpoint("x", **settings)


def test_a_folder_that_can_not_be_written_is_told_before_anything_is_trained(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        learn, run = build("SGD", folder)
        with pytest.raises(ValueError, match=r"file.*can't be written \((FileExists|NotADirectory)Error.*another one"):
            run.fit(1, learn)
        assert not run.recorder.losses


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o500)
    learn, run = build("SGD", tmp_path)
    try:
        with pytest.raises(ValueError, match=r"can't be written \(PermissionError"): run.fit(1, learn)
    finally: tmp_path.chmod(0o700)


def test_a_state_that_can_not_be_written_is_told_before_anything_is_trained(tmp_path):
    class Odd(Callback):
        def state_dict(self): return {"list": [1, {"path": tmp_path}]}

        def load_state_dict(self, state): pass

    learn, run = build("SGD", tmp_path, cbs=[Odd()])
    with pytest.raises(TypeError, match=r"Odd.state_dict\(\)\['list'\]\[1\]\['path'\] is .*Path.*holds tensors, num"):
        run.fit(1, learn)
    assert not run.recorder.losses


# --- a disk that fails ------------------------------------------------------------------------------------------------

def failing(monkeypatch, fails):
    """Lets `os.fsync` of a checkpoint fail while `fails()`."""
    fsync = os.fsync

    def full(fd):
        if fails(): raise OSError(28, "No space left on device")
        fsync(fd)
    monkeypatch.setattr(os, "fsync", full)


def test_a_full_disk_costs_a_warning_and_no_training(tmp_path, monkeypatch):
    learn, run = build("momentum")
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    learn, run = build("momentum", tmp_path)
    failing(monkeypatch, lambda: 7 <= run.recorder._batch + 6 * run.epoch <= 9 or run.epoch == 2)
    with pytest.warns(RuntimeWarning) as told: run.fit(EPOCHS, learn)
    same(everything(learn, run), want)
    assert len(told) == 2       # one for each time that it began
    assert "No space left on device" in str(told[0].message)
    assert there(tmp_path)[-1] == run.checkpoint.path.name in str(told[0].message) or "training goes on" in str(
        told[0].message)
    assert [*tmp_path.glob("*.part")] == []
    monkeypatch.undo()
    same(everything(*resumed("momentum", tmp_path)), want)


def test_a_file_that_grows_too_large_costs_a_warning_and_no_training(tmp_path):
    """A limit of the system on the size of files, which torch's writer runs into in the middle of a write."""
    learn, run = build("momentum", tmp_path, every_batches=None)

    class Limit(Callback):
        def begin_epoch(self):
            if self.run.epoch == 1: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.warns(RuntimeWarning, match=r"be written \(OSError: File too large\); training goes on") as told:
            run.fit(EPOCHS, learn, cbs=Limit())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert len(told) == 1
    assert len(run.recorder.losses) == 6 * EPOCHS
    assert len([*tmp_path.iterdir()]) == 1
    assert files.load(files.checkpoints_in(tmp_path)[0])["epoch"] == 1


def test_a_folder_that_vanishes_costs_a_warning_and_no_training(tmp_path):
    folder = tmp_path / "checkpoints"

    class Vanishes(Callback):
        def begin_epoch(self):
            if self.run.epoch == 1: folder.rename(tmp_path / "elsewhere")

    learn, run = build("SGD", folder)
    with pytest.warns(RuntimeWarning, match=r"checkpoint-.*pt can't be written \(FileNotFoundError") as told:
        run.fit(EPOCHS, learn, cbs=Vanishes())
    assert len(told) == 1
    assert len(run.recorder.losses) == 6 * EPOCHS
    assert not folder.exists()
    assert files.load(files.checkpoints_in(tmp_path / "elsewhere")[-1])["epoch"] == 1


# --- damage -----------------------------------------------------------------------------------------------------------

def truncate(path): path.write_bytes(path.read_bytes()[:random.randrange(1, path.stat().st_size)])


def empty(path): path.write_bytes(b"")


def flip(path):
    """Changes a byte of what is held, anywhere."""
    data, learner = bytearray(path.read_bytes()), torch.load(path, weights_only=True)["learner"]
    places = [data.find(t.numpy().tobytes()) for t in learner["tensors"].values() if t.numel() > 3]
    at = random.choice(places) + random.randrange(8)
    data[at] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(data))


def overwrite(path): path.write_bytes(random.randbytes(path.stat().st_size))


def zeros(path): path.write_bytes(bytes(path.stat().st_size))


def of_another_run(path):
    """The file of a run that differs in nothing but its numbers."""
    folder = path.parent.parent / f"other {random.random()}"
    interrupted(9, "RunningBatchNorm", folder, seed=1)
    path.write_bytes(files.checkpoints_in(folder)[-1].read_bytes())


def the_one_before(path): path.write_bytes(files.checkpoints_in(path.parent)[0].read_bytes())


def other_things(path): torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [truncate, empty, flip, overwrite, zeros, of_another_run, the_one_before])
def test_a_damaged_file_is_skipped_with_a_warning_and_the_end_is_the_same(damage, tmp_path):
    random.seed(5)
    name, folder = "RunningBatchNorm", tmp_path / "run"
    learn, run = build(name)
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    interrupted(9, name, folder)
    newest = files.checkpoints_in(folder)[-1]
    for _ in range(4 if damage in (truncate, flip) else 1):
        whole = newest.read_bytes()
        damage(newest)
        with pytest.raises(files.Damaged): files.load(newest)
        newest.write_bytes(whole)
    damage(newest)
    with pytest.warns(RuntimeWarning, match=f"{newest.name} (is damaged|holds checkpoint).*the one before it is taken"):
        again = resumed(name, folder)
    same(everything(*again), want)
    assert files.load(files.checkpoints_in(folder)[-1])["epoch"] == EPOCHS


def test_a_file_that_was_asked_for_and_is_damaged_is_an_error(tmp_path):
    interrupted(9, "SGD", tmp_path)
    truncate(newest := files.checkpoints_in(tmp_path)[-1])
    learn, run = build("SGD", tmp_path)
    with pytest.raises(CheckpointError, match=f"{newest.name} is damaged"): run.fit(EPOCHS, learn, resume=newest)


def test_where_all_are_damaged_the_fit_begins_anew(tmp_path):
    learn, run = build("SGD")
    run.fit(EPOCHS, learn)
    interrupted(9, "SGD", tmp_path)
    for path in files.checkpoints_in(tmp_path): truncate(path)
    learn2, run2 = build("SGD", tmp_path)
    with pytest.warns(RuntimeWarning) as told: run2.fit(EPOCHS, learn2, resume=tmp_path)
    assert len(told) == 3
    same(everything(learn2, run2), everything(learn, run))


def test_another_runs_files_are_not_taken_in_place_of_damaged_ones(tmp_path):
    learn, run = build("SGD", tmp_path, seed=1)
    run.fit(EPOCHS, learn)
    interrupted(2, "SGD", tmp_path)
    learn, run = build("SGD")
    run.fit(EPOCHS, learn)
    runs = {files.run_of(path) for path in files.checkpoints_in(tmp_path)}
    assert len(runs) == 2
    latest = files.run_of(files.checkpoints_in(tmp_path)[-1])
    for path in files.checkpoints_in(tmp_path):
        if files.run_of(path) == latest: truncate(path)
    learn2, run2 = build("SGD", tmp_path)
    with pytest.warns(RuntimeWarning): run2.fit(EPOCHS, learn2, resume=tmp_path)
    same(everything(learn2, run2), everything(learn, run))


def test_a_file_takes_the_fit_back_to_where_it_was_written(tmp_path):
    learn, run = build("momentum", keep=99, folder=tmp_path)
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    for number in (1, 6, 7, 13):
        source = files.path_for(tmp_path, run.checkpoint.run_id, number)
        same(everything(*resumed("momentum", tmp_path, source=source, keep=99)), want)
    copy = tmp_path / "best so far.pt"
    copy.write_bytes(source.read_bytes())
    same(everything(*resumed("momentum", tmp_path, source=copy, keep=99)), want)


# --- another run, another version ------------------------------------------------------------------------------------

def wider():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 3))


def other_activation(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.GELU(), nn.Linear(6, 3))


def sgd(m, loss): return torch.optim.SGD(m.parameters(), 0.1)


class Counts(Callback):
    def state_dict(self): return {}

    def load_state_dict(self, state): pass


OTHERS = {
    "shapes": ((wider, sgd), {}, "parameters: 1.weight .6, 16. torch.float32, now .7, 16. torch.float32", False),
    "a layer more": ((lambda: nn.Sequential(*PROGRAMS["SGD"][0](), nn.Linear(3, 3)), sgd), {}, "parameters", False),
    "dtype": ((lambda: PROGRAMS["SGD"][0]().double(), sgd), {}, "float32, now .6, 16. torch.float64", False),
    "optimizer": ((PROGRAMS["SGD"][0], PROGRAMS["Adam"][1]), {}, "optimizer SGD, now Adam", False),
    "groups": ((PROGRAMS["SGD"][0], lambda m, loss: torch.optim.SGD([*map(lambda p: {"params": [p]}, m.parameters())],
                                                                    0.1)), {}, "groups", False),
    "activation": ((other_activation, sgd), {}, "modules: 2 ReLU, now GELU", True),
    "loss": ((PROGRAMS["SGD"][0], sgd, lambda: nn.CrossEntropyLoss()), {}, "loss function cross_entropy, now", True),
    "batch size": ((PROGRAMS["SGD"][0], sgd), {"bs": 2}, "training loader: length 6, now 11", None),
    "items": ((PROGRAMS["SGD"][0], sgd), {"items": 24}, "training loader: items 22, now 24", None),
    "a callback more": ((PROGRAMS["SGD"][0], sgd), {"cbs": [Counts()]}, "callbacks: counts none, now Counts", True),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("in_epoch", [True, False])
def test_a_checkpoint_of_another_run_is_an_error_that_names_what_differs(name, in_epoch, tmp_path, monkeypatch):
    program, kwargs, told, may = OTHERS[name]
    interrupted(9 if in_epoch else 7, "SGD", tmp_path, every_batches=1 if in_epoch else None)
    monkeypatch.setitem(PROGRAMS, "other", program)
    learn, run = build("other", tmp_path, **kwargs)
    was = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=told): run.fit(EPOCHS, learn, resume=tmp_path)
    same(learn.model.state_dict(), was)
    learn, run = build("other", tmp_path, **kwargs)
    if may or (may is None and not in_epoch):
        with pytest.warns(RuntimeWarning, match=told): run.fit(EPOCHS, learn, resume=tmp_path, strict=False)
        assert run.avg_stats.history["epoch"] == [0, 1, 2]
    else:
        with pytest.raises(CheckpointError, match=told): run.fit(EPOCHS, learn, resume=tmp_path, strict=False)


def test_other_versions_and_settings_are_told_and_may_be_gone_on_with(tmp_path, monkeypatch):
    interrupted(9, "SGD", tmp_path)
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    learn, run = build("SGD", tmp_path)
    told = r"settings: threads \d+, now 77; versions: torch .*, now 1.0.0"
    with pytest.raises(CheckpointError, match=told + r".*use the same versions and settings, or .*strict=False"):
        run.fit(EPOCHS, learn, resume=tmp_path)
    learn, run = build("SGD", tmp_path)
    with pytest.warns(RuntimeWarning, match=told): run.fit(EPOCHS, learn, resume=tmp_path, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")          # from here on it is a run of these versions
        learn, run = build("SGD", tmp_path)
        run.fit(EPOCHS, learn, resume=tmp_path)


def test_a_checkpoint_of_a_later_library_and_files_that_are_none_are_told(tmp_path):
    interrupted(9, "SGD", tmp_path)
    path = files.checkpoints_in(tmp_path)[-1]
    held = torch.load(path, weights_only=True)
    torch.save({**held, "version": 2}, path)
    learn, run = build("SGD", tmp_path)
    for source in (tmp_path, path):
        with pytest.raises(CheckpointError, match="of version 2, and this library reads version 1; install"):
            run.fit(EPOCHS, learn, resume=source)
    other_things(path)
    with pytest.raises(CheckpointError, match="is no checkpoint of a fit"): run.fit(EPOCHS, learn, resume=path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run.fit(EPOCHS, learn, resume=tmp_path / "gone.pt")
    assert not run.recorder.losses


def test_a_folder_without_checkpoints_begins_anew(tmp_path):
    learn, run = build("SGD")
    run.fit(EPOCHS, learn)
    same(everything(*resumed("SGD", tmp_path)), everything(learn, run))
    learn2, run2 = build("SGD")         # nor does it need a Checkpoint to go on, but then nothing is written
    with pytest.warns(UserWarning, match="no callback that writes one"):
        run2.fit(EPOCHS, learn2, resume=tmp_path / "nothing here")
    same(everything(learn2, run2), everything(learn, run))


def test_a_fit_goes_on_without_writing_more(tmp_path):
    learn, run = build("momentum")
    run.fit(EPOCHS, learn)
    interrupted(9, "momentum", tmp_path)
    learn2, run2 = build("momentum")
    run2.fit(EPOCHS, learn2, resume=tmp_path)
    same(everything(learn2, run2), everything(learn, run))


# --- killed -----------------------------------------------------------------------------------------------------------

MOMENTS = 20


class Killed:
    """Kills its process, by SIGKILL, in the `n`-th write: while torch writes, before or after the disk is flushed,
    after the file has its name, or before the old ones are gone."""

    def __init__(self, n, where): self.n, self.where = n, where

    def __enter__(self):
        if self.where == "in torch.save": self.spy(files._Disk, "write", before=True)
        if self.where == "before the flush": self.spy(os, "fsync", before=True)
        if self.where == "after the flush": self.spy(os, "fsync", before=False)
        if self.where == "before the name": self.spy(os, "replace", before=True)
        if self.where == "after the name": self.spy(os, "replace", before=False)
        if self.where == "before the old ones go": self.spy(files, "checkpoints_in", before=True)

    def __exit__(self, *exc): pass

    def spy(self, owner, name, before):
        f = getattr(owner, name)

        def spied(*args, **kwargs):
            self.n -= 1
            if before and self.n <= 0: os.kill(os.getpid(), signal.SIGKILL)
            out = f(*args, **kwargs)
            if self.n <= 0: os.kill(os.getpid(), signal.SIGKILL)
            return out
        setattr(owner, name, spied)


def job(folder, result, started, kill):
    """What is run and killed: begins, or goes on, and writes its end to `result`."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    torch.manual_seed(4)
    random.seed(4)
    numpy.random.seed(4)
    x, y = torch.randn(60, 1, 6, 6), torch.arange(60) % 3
    model = nn.Sequential(nn.Conv2d(1, 4, 3), RunningBatchNorm(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
                          nn.Linear(64, 3))
    dls = get_dls(Dataset(x[:48], y[:48]), Dataset(x[48:], y[48:]), 2)
    learn = Learner(model, SGD(model.parameters(), lr=0.05, momentum=0.9), F.cross_entropy, DataBunch(*dls, 3))
    checkpoint = [Checkpoint(folder, every_batches=1)] if folder else []
    run = Runner([Recorder(), AvgStatsCallback(accuracy, quiet=True), BatchTransformXCallback(slowly), *checkpoint])
    started.set()
    if kill: Killed(*kill).__enter__()
    run.fit(2, learn, resume=folder)
    torch.save(everything(learn, run), result)


def slowly(x):
    time.sleep(0.002)
    return x + 0.1 * torch.randn_like(x)


def test_a_process_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path):
    """SIGKILL at random moments of one run, every other one inside a write; it is resumed until it is done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "numpy", "pytest", "norms", "runner"])
    draw = random.Random(17)

    def attempt(folder, result, kill=None, after=None):
        started = context.Event()
        process = context.Process(target=job, args=(folder, result, started, kill))
        process.start()
        assert started.wait(120)
        if after is not None:
            process.join(after)
            if process.is_alive(): os.kill(process.pid, signal.SIGKILL)
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode == 0
    assert attempt(None, tmp_path / "want.pt")
    want = torch.load(tmp_path / "want.pt", weights_only=False)
    folder, got, kills, inside = tmp_path / "run", tmp_path / "got.pt", 0, 0
    places = ["in torch.save", "before the flush", "after the flush", "before the name", "after the name",
              "before the old ones go"]
    for i in range(10 * MOMENTS):
        kill, after = None, None
        if kills < MOMENTS and i % 2: kill = draw.randrange(2, 9), places[(i // 2) % len(places)]
        elif kills < MOMENTS: after = draw.uniform(0.0, 0.12)
        if attempt(folder, got, kill, after): break
        kills, inside = kills + 1, inside + (kill is not None)
    assert kills >= MOMENTS - 3     # the last ones may find it done
    assert inside >= MOMENTS // 2 - 3
    same(torch.load(got, weights_only=False), want)
    assert [*folder.glob("*.part")] == []
    assert len(there(folder)) == 3
