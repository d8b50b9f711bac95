"""Imports run one way: nbdev_style -> experiments -> {runner, norms}; heavy packages are loaded where they are used."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("norms", "runner", "experiments", "nbdev_style")
MAY_IMPORT = {"norms": {"norms"}, "runner": {"runner"}, "experiments": {"norms", "runner", "experiments"},
              "nbdev_style": set(PACKAGES)}
ONLY_IN = {"matplotlib": ("runner/insight/plots.py", "runner/insight/figures.py"),
           "fastprogress": ("runner/progress.py",)}


def imports(file):
    """Top-level names of every package that `file` imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import): yield from (a.name.split(".")[0] for a in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 or file.match("nbdev_style/nb_*.py"), f"{file} has a relative import"   # but nbdev's
            yield node.module.split(".")[0] if node.level == 0 else "nbdev_style"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        name = file.relative_to(ROOT).as_posix()
        found = set(imports(file))
        assert found & set(PACKAGES) <= MAY_IMPORT[package], name
        if package in ("norms", "runner"):
            others = found - set(sys.stdlib_module_names) - {"torch", package}
            assert others <= {heavy for heavy, homes in ONLY_IN.items() if name in homes}, name
        if not name.startswith("experiments/study/"): assert not found & {"joblib", "pandas", "dask", "ray"}, name
        if package == "nbdev_style": continue       # on top of all: the lessons draw
        for heavy, homes in ONLY_IN.items(): assert heavy not in found or name in homes, f"{name} imports {heavy}"


def uses(file, name, tree=None):
    """Whether `file` imports or names the module `name`, wherever in it; with `tree`, only in this part of it."""
    for node in ast.walk(ast.parse(file.read_text()) if tree is None else tree):
        if isinstance(node, ast.Import) and any(f"{a.name}.".startswith(f"{name}.") for a in node.names): return True
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if any(f"{node.module}.{a.name}.".startswith(f"{name}.") for a in node.names): return True
        if isinstance(node, ast.Attribute) and ast.unparse(node) == name: return True
    return False


def test_every_package_is_installed():
    listed, = re.findall(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[:1]
    folders = {".".join(f.parent.relative_to(ROOT).parts) for p in PACKAGES for f in (ROOT / p).rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed)) == folders


@pytest.mark.parametrize(("package", "home"), [("norms", "norms/sync.py"), ("runner", "runner/processes.py")])
def test_other_processes_are_asked_for_in_one_file(package, home):
    for file in (ROOT / package).rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        assert name == home or not uses(file, "torch.distributed"), f"{name} uses torch.distributed"


def test_norms_are_imported_without_torch_distributed():
    for file in (ROOT / "norms").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            inside = isinstance(node, ast.FunctionDef | ast.ClassDef)
            assert inside or not uses(file, "torch.distributed", node), f"{file} imports torch.distributed at once"


@pytest.mark.parametrize("line", ["import torch.distributed", "import torch.distributed as dist",
                                  "from torch import distributed", "from torch.distributed import barrier",
                                  "from torch.distributed.fsdp import fully_shard", "torch.distributed.barrier()"])
def test_every_way_to_other_processes_is_found(line, tmp_path):
    file = tmp_path / "file.py"
    file.write_text(f"import torch\ndef f():\n    {line}")
    assert uses(file, "torch.distributed")
    file.write_text("import torch\nfrom torch import nn\nnn.parallel.DistributedDataParallel")
    assert not uses(file, "torch.distributed")


def modules(package):
    """Every file of `package` and those of the package that it imports, wherever in it."""
    paths = [f.relative_to(ROOT) for f in (ROOT / package).rglob("*.py")]
    files = {".".join(p.with_suffix("").parts).removesuffix(".__init__"): p.as_posix() for p in paths}
    found = {}
    for file in files.values():
        names = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import): names |= {a.name for a in node.names}
            if not isinstance(node, ast.ImportFrom): continue
            module = node.module if node.level == 0 else ".".join(filter(None, (package, node.module)))
            names |= {inner if (inner := f"{module}.{a.name}") in files else module for a in node.names}
        found[file] = {files[name] for name in names & set(files)}
    return found


def circles(needs):
    """A line for each of `needs` (each name with those that it imports) from which imports lead back to it."""
    reached = {name: set(wants) for name, wants in needs.items()}
    for middle in needs:
        for names in reached.values():
            if middle in names: names |= reached[middle]
    return [f"{name} imports {want}" for name in needs for want in sorted(needs[name]) if name in reached[want]]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_files_import_each_other_in_a_circle(package):
    found = circles(modules(package))
    assert not found, "a circle:\n" + "\n".join(found)


def test_a_circle_is_found_and_named_without_what_hangs_on_it():
    needs = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "on top": {"a", "d"}, "self": {"self"}}
    assert circles(needs) == ["a imports b", "b imports c", "c imports a", "self imports self"]


@pytest.mark.parametrize("line", [
    "import runner.core", "from runner.core import Learner", "from runner import Learner",
    "from runner import core, Learner", "def f():\n    from runner import core",
    "if TYPE_CHECKING:\n    from runner.core import Learner"])
def test_imports_count_wherever_they_stand(line, tmp_path, monkeypatch):
    (tmp_path / "runner").mkdir()
    files = {"__init__": "from runner.core import Learner", "core": "import runner.low", "low": line}
    for name, text in files.items(): (tmp_path / "runner" / f"{name}.py").write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    found = circles(modules("runner"))
    assert "runner/core.py imports runner/low.py" in found
    assert ("runner/low.py imports runner/__init__.py" in found) == ("Learner" in line and "runner.core" not in line)


PRIVATE = re.compile(r"torch(?:\.\w+)*\._[a-zA-Z]\w*|forward_ad\._\w+|checkpoint, \"_")


def test_private_names_of_torch_stand_in_norms_fast_alone():
    found = {}
    for file in (ROOT / "norms").rglob("*.py"):
        hits = set(PRIVATE.findall(file.read_text()))
        # check_norm counts compilations by a class of torch's tests, and `per_example` is about torch's own rules.
        if hits and file.parent.name != "fast": found[file.relative_to(ROOT).as_posix()] = hits
    assert set(found) <= {"norms/testing/transforms.py"}, found


def test_imports_take_no_heavy_package_with_them(forks):
    code = ("import sys; from runner import *; from norms import *; import runner.progress, experiments.study\n"
            "heavy = 'matplotlib', 'fastprogress', 'tensorboard', 'sklearn', 'torchvision', "
            "'joblib', 'pandas', 'scipy'\n"
            "print([m for m in heavy if m in sys.modules])")
    out = forks.run("-c", code, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", ["norms", "runner"])
def test_all_is_sorted_and_complete(package):
    module = __import__(package)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)
