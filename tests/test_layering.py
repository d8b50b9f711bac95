"""Imports run one way: nbdev_style -> experiments -> {runner, norms}; heavy packages are loaded where they are used."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("norms", "runner", "experiments", "nbdev_style")
MAY_IMPORT = {"norms": {"norms"}, "runner": {"runner"}, "experiments": {"norms", "runner", "experiments"},
              "nbdev_style": set(PACKAGES)}
ONLY_IN = {"matplotlib": "runner/insight/plots.py", "fastprogress": "runner/progress.py"}


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
            assert others <= {heavy for heavy, home in ONLY_IN.items() if home == name}, name
        if package == "nbdev_style": continue       # on top of all: the lessons draw
        for heavy, home in ONLY_IN.items(): assert heavy not in found or name == home, f"{name} imports {heavy}"


def modules(package):
    """Every file of `package` and the modules of the package that it imports, wherever in it, by their dotted names."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
             for f in (ROOT / package).rglob("*.py")}
    found = {}
    for name, file in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import): found[name] |= {a.name for a in node.names} & set(files)
            if not isinstance(node, ast.ImportFrom): continue
            module = node.module if node.level == 0 else ".".join(filter(None, (package, node.module)))
            if module.split(".")[0] != package: continue
            inner = {f"{module}.{a.name}" for a in node.names} & set(files)
            found[name] |= inner or {module}
    return found


def in_circles(needs):
    """What is left of `needs` (each name with those that it imports) when all that needs nothing is taken away."""
    left = dict(needs)
    while free := [name for name, wants in left.items() if not wants & set(left)]:
        for name in free: del left[name]
    return {name: sorted(wants & set(left)) for name, wants in left.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_files_import_each_other_in_a_circle(package):
    assert not in_circles(modules(package))


def test_a_circle_is_found():
    assert in_circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == {"a": ["b"], "b": ["c"], "c": ["a"]}


PRIVATE = re.compile(r"torch(?:\.\w+)*\._[a-zA-Z]\w*|forward_ad\._\w+|checkpoint, \"_")


def test_private_names_of_torch_stand_in_norms_fast_alone():
    found = {}
    for file in (ROOT / "norms").rglob("*.py"):
        hits = set(PRIVATE.findall(file.read_text()))
        # check_norm counts compilations by a class of torch's tests, and `per_example` is about torch's own rules.
        if hits and file.parent.name != "fast": found[file.relative_to(ROOT).as_posix()] = hits
    assert set(found) <= {"norms/testing/transforms.py"}, found


def test_runner_takes_no_matplotlib_and_no_fastprogress_with_it():
    code = ("import sys; from runner import *; from norms import *; import runner.progress\n"
            "heavy = 'matplotlib', 'fastprogress', 'tensorboard', 'sklearn', 'torchvision'\n"
            "print([m for m in heavy if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", ["norms", "runner"])
def test_all_is_sorted_and_complete(package):
    module = __import__(package)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)
