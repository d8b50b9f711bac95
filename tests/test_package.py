"""What is handed out: the sdist is the whole project, the wheel what can be run; installed, both do their work.

Both are built as pip builds them and installed into an environment of their own, which finds torch and the like where
the tests do: nothing is downloaded.
"""

import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from functools import partial
from importlib.util import spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

import nbdev_style.__main__ as lessons
import norms.rivals
import norms.testing
import runner
from experiments import launch
from norms.fast import kernels

ROOT = Path(__file__).parent.parent
PACKAGES = ("experiments", "nbdev_style", "norms", "runner")

# `pdoc -d google -o reference` and these: what people import from.
REFERENCE = ("norms", "norms.rivals", "norms.testing", "runner", "runner.insight", "experiments.data",
             "experiments.models", "experiments.study")


def project_files():
    """The paths of the project's files, as git has them, and in an unpacked sdist as that lists them."""
    if (ROOT / ".git").exists():
        found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        names = found.stdout.split("\0")
    else: names = [name.removeprefix("./") for name in (
        ROOT / "runnernorms.egg-info" / "SOURCES.txt").read_text().splitlines()]
    return {name for name in names if (ROOT / name).is_file() and ".egg-info" not in name and name != "setup.cfg"}


def run(*args, cwd, **env):
    """A process of its own, in which nothing leads to this checkout."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | env
    return subprocess.run([*map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)


def build(what, root, into, **env):
    """Build "sdist", "wheel" or "editable" of the project in `root`; its file."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"import sys, setuptools.build_meta as backend; backend.build_{what}(sys.argv[1])"
    done = run(sys.executable, "-W", "ignore", "-c", code, into, cwd=root, **env)
    assert done.returncode == 0, done.stderr
    file, = into.iterdir()
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of this checkout; the folder that it unpacks to, and its files; the wheel that is built there."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in project_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "norms" / "fast" / "_kernels.so").write_text("of another machine")
    sdist = build("sdist", tree, out / "sdist")
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}        # Python 3.14's, which others warn of
    with tarfile.open(sdist) as tar: tar.extractall(out, **safe)
    root = out / sdist.name.removesuffix(".tar.gz")
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    # Without -O3, which takes ten times as long.
    quick = out / "cc"
    quick.write_text('#!/bin/sh\nfor a; do shift; [ "$a" = -O3 ] || set -- "$@" "$a"; done\nexec cc "$@"\n')
    quick.chmod(0o755)
    wheel = build("wheel", root, out / "wheel", CC=str(quick))
    return SimpleNamespace(sdist=sdist, root=root, files=files, wheel=wheel)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A new environment with the wheel installed: its `python`, `scripts` and `site`-packages, and `run` for these."""
    pytest.importorskip("pip")
    home = tmp_path_factory.mktemp("environment")
    done = run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    assert done.returncode == 0, done.stderr
    site, = home.glob("lib/python*/site-packages")
    # Paths alone: what else lies in these folders, such as the way to an editable installation, isn't read.
    (site / "present.pth").write_text("\n".join(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))))
    python = home / "bin" / "python"
    done = run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", "--no-compile",
               "--disable-pip-version-check", built.wheel, cwd=home)
    assert done.returncode == 0, done.stderr
    # Which fonts there are takes matplotlib a while to find: once for all processes.
    ours = partial(run, MPLCONFIGDIR=str(tmp_path_factory.mktemp("fonts")))
    return SimpleNamespace(python=python, scripts=home / "bin", site=site, run=ours)


def write(folder, *names, text="raise RuntimeError('this is mine')\n"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# --- what they hold -----------------------------------------------------------------------------------------------

def test_the_sdist_is_the_whole_project(built):
    files = {name for name in built.files if ".egg-info/" not in name}
    assert files == project_files() | {"PKG-INFO", "setup.cfg"}
    assert {"tests/conftest.py", "tests/reference.py", "CHANGELOG.md", "CITATION.cff", ".ci/run",
            "experiments/results/small_batch.png", "nbdev_style/05_runner.ipynb"} <= files


def test_the_wheel_holds_what_can_be_run(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = {name.split("/", 1)[1]: wheel.read(name) for name in wheel.namelist() if ".dist-info/" in name}
        wheel.extractall(built.root.parent / "wheel's")
    own = {name for name in project_files() if name.startswith(tuple(f"{p}/" for p in PACKAGES))}
    library = {name for name in files if re.search(r"\.(so|pyd|dll|dylib)\b", name)}
    assert files - library == {name for name in own if name.endswith((".py", "py.typed", ".ipynb", ".json", ".c"))}
    meta = message_from_bytes(about["METADATA"])
    assert [meta[key] for key in ("Name", "Version", "License-Expression")] == [
        "runnernorms", norms.__version__, "Apache-2.0"]
    assert "Typing :: Typed" in meta.get_all("Classifier")
    assert "runnernorms = experiments.__main__:main" in about["entry_points.txt"].decode()
    if not shutil.which("cc"): return
    # The kernels alone, which need C's own library and no other.
    name, = library
    assert name.startswith("norms/fast/_kernels.")
    if os.environ.get("NORMS_KERNELS") != "0":
        assert len(kernels.load((built.root.parent / "wheel's" / name).parent)) == 2
    linked = re.findall(rb"lib\w+\.so[.\d]*", (built.root.parent / "wheel's" / name).read_bytes())
    assert set(linked) <= {b"libc.so.6", b"libm.so.6"}


def test_an_editable_installation_is_one_path(built, tmp_path):
    """With a finder of its own in that place, any folder that is called `experiments` would be in the way."""
    with zipfile.ZipFile(build("editable", built.root, tmp_path / "out", CC="false")) as wheel:
        texts = {name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" not in name}
    assert [text.strip() for text in texts.values()] == [str(built.root)]
    assert [*texts] == [f"__editable__.runnernorms-{norms.__version__}.pth"]


def test_the_version_is_the_same_everywhere():
    assert re.fullmatch(r"\d+\.\d+\.\d+", norms.__version__)
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == norms.__version__


# --- what they do -------------------------------------------------------------------------------------------------

def test_tests_are_collected_and_run_from_the_sdist(built, installed):
    """Some of those that need the tests' own modules; all files are there, as the first test says."""
    needs = re.compile(r"^(?:from|import) (conftest|reference|ranks|forking|old_running)\b", re.MULTILINE)
    files, found = [], set()
    for file in sorted((built.root / "tests").glob("test_*.py"), key=lambda file: file.stat().st_size):
        if new := set(needs.findall(file.read_text())) - found: found, files = found | new, [*files, file]
    assert len(found) == 5
    done = installed.run(installed.python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files,
                         cwd=built.root)
    assert done.returncode == 0, done.stdout
    assert {line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")} == {
        f"tests/{file.name}" for file in files}
    done = installed.run(installed.python, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                         "tests/test_norms_momentum.py", "tests/test_norms_weights.py", cwd=built.root)
    assert done.returncode == 0, done.stdout


def test_the_installed_command_runs_the_main_job_beside_files_of_the_packages_names(installed, tmp_path):
    write(tmp_path, "runner.py", "norms/__init__.py", "experiments/__init__.py", "experiments/data.py")
    done = installed.run(installed.scripts / "runnernorms", "small-batch", "--data", "digits", "--limit", "16",
                         "--epochs", "1", "--seeds", "1", "--norms", "RunningBatchNorm", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["norm"] for row in summary["rows"]] == ["RunningBatchNorm"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["versions"]["runnernorms"] == norms.__version__
    assert (tmp_path / "out" / "small_batch.png").is_file()


def test_the_command_says_its_own_name(installed, tmp_path):
    starts = [installed.scripts / "runnernorms"], [installed.python, "-m", "experiments"]
    texts = [installed.run(*start, cwd=tmp_path) for start in starts]
    assert [done.returncode for done in texts] == [0, 0]
    assert texts[0].stdout == texts[1].stdout.replace("python -m experiments", "runnernorms") != texts[1].stdout


@pytest.mark.parametrize(("names", "text"), [
    (["runner.py"], ""), (["runner.py"], "def broken(:"), (["norms.py"], "raise SystemExit(3)"),
    (["runner/__init__.py"], ""), (["norms/__init__.py", "norms/batch.py"], "import nowhere"),
    (["norms.py", "runner/__init__.py"], ""), (["runner/notes.txt", "norms/__init__.py"], "")])
@pytest.mark.parametrize("module", ["experiments", "nbdev_style"])
def test_a_file_in_the_way_is_named(module, names, text, installed, tmp_path):
    write(tmp_path, *names, text=text)
    done = installed.run(installed.python, "-m", module, "small-batch", cwd=tmp_path)
    file = tmp_path / next(name for name in sorted(names) if not name.endswith(".txt")).removesuffix("/__init__.py")
    name = file.stem
    mend = {"experiments": "Rename it, start from another folder, or use `runnernorms`, which doesn't look into the "
                           "current folder\n",
            "nbdev_style": "Rename it, or start from another folder\n"}[module]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"error: {file} is in the way: Python takes it for this project's package {name!r}, "
                                f"which is {installed.site / name}. {mend}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["experiments.py", "experiments/__init__.py"])
def test_the_lessons_name_experiments_in_the_way_too(name, installed, tmp_path):
    write(tmp_path, name)
    done = installed.run(installed.python, "-m", "nbdev_style", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path / name.removesuffix('/__init__.py')} is in the way" in done.stderr


def test_folders_of_these_names_without_python_in_them_are_not_in_the_way(installed, tmp_path):
    write(tmp_path, "runner/notes.txt", "norms/notes.txt", "experiments/notes.txt")
    done = installed.run(installed.python, "-m", "experiments", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# --- a file in the way: the rule ----------------------------------------------------------------------------------

KINDS = {"module": "{}.py", "package": "{}/__init__.py", "folder": "{}/notes.txt"}


class Editable:
    """A finder that is asked after Python's own, as an editable installation of the packages in `home` has one."""

    def __init__(self, home): self.home = home

    def find_spec(self, name, path=None, target=None):
        file = self.home / name / "__init__.py"
        return spec_from_file_location(name, file) if file.is_file() else None


def what_python_takes(name, path, home, editable):
    """The file or folder that `import name` takes, written out from Python's rules; None where there is nothing."""
    for folder in path:
        for kind in ("package", "module"):
            if (folder / KINDS[kind].format(name)).is_file():
                return folder / (name if kind == "package" else f"{name}.py")
    without_code = [folder / name for folder in path if (folder / name).is_dir()]
    return next(iter(without_code + [home / name] * (editable and (home / name).is_dir())), None)


@pytest.mark.parametrize("seed", range(40))
def test_what_python_takes_is_what_is_named(seed, tmp_path, monkeypatch):
    draw = random.Random(seed)
    home, *others = folders = [tmp_path / name for name in ("home", "here", "there")]
    for folder in folders: folder.mkdir()
    names = [f"package_{seed}_{i}" for i in range(2)]
    for name in names:
        if draw.random() < 0.9: write(home, f"{name}/__init__.py")
        for other in others: write(other, *(k.format(name) for k in KINDS.values() if draw.random() < 0.25))
    editable = draw.random() < 0.5
    path = draw.sample(others if editable else folders, 2 if editable else 3)
    monkeypatch.setattr(sys, "path", [*map(str, path), *sys.path])
    if editable: monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable(home)])
    monkeypatch.setattr(launch, "HOME", home)
    takes = {name: what_python_takes(name, path, home, editable) for name in names}
    wrong = next((name for name in names if takes[name] != home / name), None)
    text = launch.in_the_way(*names)
    if wrong is None: assert text is None
    elif takes[wrong] is None: assert text.startswith(f"there is no package {wrong!r} in {home}, ")
    else:
        mend = "start from another folder" if takes[wrong].parent == path[0] else "off Python's search path"
        assert text.startswith(f"{takes[wrong]} is in the way: Python takes it for this project's package {wrong!r}, ")
        assert mend in text
    assert not set(names) & set(sys.modules)        # nothing was imported


def test_another_project_s_package_is_to_be_uninstalled(tmp_path, monkeypatch):
    write(tmp_path, "site/other_one/__init__.py", "home/other_one/__init__.py")
    monkeypatch.setattr(launch, "HOME", tmp_path / "home")
    monkeypatch.setattr(launch.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "Uninstall what has brought it, or install this project into" in launch.in_the_way("other_one")


def test_a_command_that_is_not_installed_is_not_advised(tmp_path, monkeypatch):
    write(tmp_path, "here/some_one.py", "home/some_one/__init__.py")
    monkeypatch.setattr(launch, "HOME", tmp_path / "home")
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.setattr(launch.shutil, "which", lambda *args, **kwargs: None)
    assert launch.in_the_way("some_one").endswith("Rename it, or start from another folder")
    monkeypatch.setattr(launch.shutil, "which", lambda *args, **kwargs: "/somewhere/runnernorms")
    assert "use `runnernorms`" in launch.in_the_way("some_one")


def test_packages_that_are_symbolic_links_are_this_project_s(tmp_path, monkeypatch):
    write(tmp_path, "home/linked_one/__init__.py")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "linked_one").symlink_to(tmp_path / "home" / "linked_one")
    monkeypatch.setattr(launch, "HOME", tmp_path / "home")
    monkeypatch.syspath_prepend(tmp_path / "here")
    assert launch.in_the_way("linked_one") is None


# --- lessons of an installed package --------------------------------------------------------------------------------

@pytest.mark.parametrize("missing", ["notebooks", "nbdev", "the folder"])
def test_lessons_that_cannot_be_executed_say_why(missing, tmp_path, monkeypatch, capsys):
    pytest.importorskip("nbdev")
    if missing == "notebooks": monkeypatch.setattr(lessons, "HERE", tmp_path)
    if missing == "nbdev": monkeypatch.setitem(sys.modules, "nbdev.export", None)
    write(tmp_path, "file")
    with pytest.raises(SystemExit) as ended: lessons.main(["--into", str(tmp_path / "file" / "folder")])
    assert ended.value.code == 2
    assert {"notebooks": f"there are no notebooks in {tmp_path}: install the project again, or clone it",
            "nbdev": "pip install 'nbdev>=3.3,<4'",
            "the folder": f"the folder {tmp_path / 'file' / 'folder'} can't be made (Not a directory): name another by "
                          "--into FOLDER"}[missing] in capsys.readouterr().err


def test_nbdev_is_asked_for_as_pyproject_has_it():
    assert f'"{lessons.NBDEV}"' in (ROOT / "pyproject.toml").read_text()


def test_installed_lessons_are_written_into_the_current_folder(installed, tmp_path, monkeypatch):
    pytest.importorskip("nbdev")
    cells = [{"cell_type": "code", "id": f"cell-{i}", "metadata": {}, "source": source, "outputs": [],
              "execution_count": None} for i, source in enumerate(["#| default_exp nb_99", "#| export\nanswer = 6 * 7",
                                                                   "print(answer)"])]
    lesson = installed.site / "nbdev_style" / "99_small.ipynb"
    lesson.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    ipython = str(tmp_path / "ipython")
    try: done = installed.run(installed.python, "-m", "nbdev_style", "99_small", cwd=tmp_path, IPYTHONDIR=ipython)
    finally: lesson.unlink()
    assert (done.returncode, done.stdout) == (0, "99_small: executed\n"), done.stderr
    assert '"42\\n"' in (tmp_path / "99_small.ipynb").read_text()
    assert "answer = 6 * 7" in (tmp_path / "nb_99.py").read_text()
    assert not [*installed.site.rglob("nb_99.py")]


# --- the reference ------------------------------------------------------------------------------------------------

def test_the_reference_is_made_without_a_warning(tmp_path, monkeypatch):
    """As `pdoc -d google -o reference` and REFERENCE, less the sources and the search in them, which take longest."""
    pdoc = pytest.importorskip("pdoc")
    importlib.import_module("runner.insight.plots")         # matplotlib asks for fonts, and pdoc starts no processes
    monkeypatch.chdir(ROOT)
    pdoc.render.configure(docformat="google", show_source=False, search=False)
    pdoc.pdoc(*REFERENCE, output_directory=tmp_path)        # a warning is an error here
    for package in (norms, norms.rivals, norms.testing, runner):
        page = (tmp_path / f"{package.__name__.replace('.', '/')}.html").read_text()
        for name in package.__all__: assert f'id="{name}"' in page, name
    page = (tmp_path / "norms.html").read_text()
    assert "<table>" in page                                # of the package's docstring
    assert "<strong>mom:</strong>  weight of the <strong>new</strong> value" in page     # its arguments are a list
