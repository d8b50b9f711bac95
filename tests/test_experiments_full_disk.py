"""A disk that is full at any write of a run: what had finished is shown, no half file stays, and the run can go on."""

import builtins
import errno
import io
import json
import os
import warnings
from pathlib import Path

import pytest

from experiments import EXPERIMENTS, table
from experiments.__main__ import main
from experiments.published import small_batch


class Full:
    """A file that takes nothing more."""

    def __init__(self, file): self.file = file

    def write(self, data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name): return getattr(self.file, name)

    def __enter__(self): return self

    def __exit__(self, *exc): self.file.close()


class Disk:
    """The folder `at` has room for `left` more files, renamings and folders; None is any number."""

    def __init__(self, monkeypatch, at):
        self.left, self.at = None, str(at)
        opened = io.open

        def open_(file, mode="r", *args, **kwargs):
            full = set(mode) & set("wax+") and self.full(file)
            made = opened(file, mode, *args, **kwargs)
            return Full(made) if full else made

        def failing(real, of=0):
            def call(*args, **kwargs):
                if self.full(args[of]): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[of]))
                return real(*args, **kwargs)
            return call
        for module in (io, builtins): monkeypatch.setattr(module, "open", open_)
        monkeypatch.setattr("pathlib.io.open", open_, raising=False)
        for name in ("replace", "mkdir"): monkeypatch.setattr(os, name, failing(getattr(os, name)))

    def full(self, path):
        if self.left is None or isinstance(path, int) or not os.path.abspath(os.fspath(path)).startswith(self.at):
            return False
        self.left -= 1
        return self.left < 0


def whole(folder):
    """That no file in the folder is a half one."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert not [p for p in folder.rglob("*.part")]
    for p in files:
        if p.suffix == ".json": json.loads(p.read_text())
        if p.name == "metrics.jsonl": [json.loads(line) for line in p.read_text().splitlines()]
        if p.suffix == ".png": assert p.stat().st_size
    return {str(p.relative_to(folder)) for p in files if "logs" not in p.parts}


def figures(folder): return json.loads((folder / "summary.json").read_text())


def at_every_write(argv, out, disk, capsys, first, last, step=1, header="arm  accuracy"):
    """Run a command with a disk that is full at each of its writes, and go on when there is room."""
    reference = out / "reference"
    assert main([*argv, "--out", str(reference)]) == 0
    files = whole(reference)
    capsys.readouterr()
    for n in range(first, last, step):
        run = out / f"{n}"
        disk.left = n
        status = main([*argv, "--out", str(run)])
        enough, disk.left = disk.left >= 0, None
        said, err = capsys.readouterr()
        if not enough:
            assert status == 2, n
            assert err.startswith("error: "), (n, err)
            assert "No space left on device" in err, (n, err)
            assert err.count("\n") == 1, (n, err)
            whole(run)
            ended = [json.loads(p.read_text()) for p in run.glob("study/trials/*.json")]
            done = sum(record["status"] == "ok" for record in ended)
            assert (header in said) == bool(done), (n, said)
            assert ("Stopped: " in said) >= bool(done), n
        assert main([*argv, "--out", str(run), "--resume"]) == 0, n
        assert whole(run) == files, n
        assert {k: v for k, v in figures(run).items() if k != "rows"} == {
            k: v for k, v in figures(reference).items() if k != "rows"}
        capsys.readouterr()
        if enough: return n
    return None


def test_a_disk_that_is_full_at_any_write_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "small", ("small_experiment", "", ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")          # in this process
    disk = Disk(monkeypatch, tmp_path)
    n = at_every_write(["small"], tmp_path, disk, capsys, 0, 300)
    assert n is not None
    assert n > 40           # writes


def test_a_disk_that_is_full_in_a_real_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(small_batch, "draw", lambda rows, curves, images, config, path: path.write_bytes(b"picture"))
    disk = Disk(monkeypatch, tmp_path)
    argv = ["small-batch", "--data", "digits", "--limit", "4", "--epochs", "1", "--seeds", "1", "--norms", "none",
            "GroupNorm"]
    with warnings.catch_warnings():     # a checkpoint that can't be written stops no training
        warnings.filterwarnings("ignore", "the checkpoint .* can't be written", RuntimeWarning)
        at_every_write(argv, tmp_path, disk, capsys, 9, 60, 5, header="published on MNIST")


def test_a_table_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch, capsys):
    record = Path(table.__file__).parent / "results" / "vmap.json"
    page = tmp_path / "page.md"
    page.write_text(text := "<!-- results: vmap -->\nold\n<!-- end of results -->\n")
    disk = Disk(monkeypatch, tmp_path)
    for n in range(2):
        disk.left = n
        assert main(["table", str(record), "--into", str(page)]) == 2
        disk.left = None
        assert "No space left on device; name a text file, where there is room" in capsys.readouterr().err
        assert page.read_text() == text
        assert [*tmp_path.iterdir()] == [page]
    assert main(["table", str(record), "--into", str(page)]) == 0
    assert "old" not in page.read_text()
    page.write_bytes(b"\xff\xfe")
    assert main(["table", str(record), "--into", str(page)]) == 2
    assert "is no text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/run", "/dev/null", "/proc/nothing", "x" * 300])
def test_a_place_that_can_not_be_written_is_said(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(EXPERIMENTS, "small", ("small_experiment", "", ""))
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    for argv in (["small"], ["inside", "--data", "digits", "--limit", "4"], ["bench", "norms"]):
        assert main([*argv, "--out", out]) == 2
        said, err = capsys.readouterr()
        assert err.startswith("error: the run folder ")
        assert err.count("\n") == 1
        assert "Traceback" not in said + err
    assert Path("file").read_text() == "mine"
    assert os.listdir() == ["file"]
