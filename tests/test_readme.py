"""The pages: their code runs as it stands, their commands are understood, their links lead somewhere."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from experiments import EXPERIMENTS, TOOLS
from experiments.figures import CHANCE
from experiments.results import read_summary

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"{folder}/README.md" for folder in (
    "norms", "runner", "experiments", "experiments/lab", "experiments/bench", "nbdev_style", "tests"))]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [code for of, code in CODE.findall((ROOT / page).read_text()) if of == language]


def text(page):
    """The page without its blocks of code."""
    return CODE.sub("", (ROOT / page).read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs_from_its_first_line_on(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(page, "python"): exec(compile(code, page, "exec"), names)
    capsys.readouterr()
    plt.close("all")
    look = LOOK.get(page)
    if look is not None: look(names, tmp_path)


def first_page(names, folder):
    assert (folder / "activations.png").stat().st_size > 10_000
    assert names["run"].avg_stats.history[-1]["valid_accuracy"] > 0.7


def norms_page(names, folder):
    assert "\n".join(names["first"].failed) + "\n" == blocks("norms/README.md", "text")[0]


def runner_page(names, folder):
    assert len(names["means"]) == 300                   # 600 images in batches of 2
    assert len(names["steps"]) == 39                    # the first ten and one in ten


def experiments_page(names, folder):
    assert names["study"].missing() == 0
    assert set(names["study"].frame().status) == {"ok"}


LOOK = {"README.md": first_page, "norms/README.md": norms_page, "runner/README.md": runner_page,
        "experiments/README.md": experiments_page}


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_understood(page):
    # In a line of its own, or in the text as `python -m experiments NAME ...`; capitals stand for what the reader puts.
    written = [line for block in blocks(page, "") for line in block.splitlines()]
    written += re.findall(r"`(python -m experiments [^`]*)`", " ".join(text(page).split()))
    for line in written:
        found = re.search(r"-m experiments (\S.*?)(?: +#.*)?$", line)
        if found is None or " NAME" in line: continue
        name, *words = shlex.split(found[1])
        if not words and line.startswith("python"): continue            # a command's name, in the text
        module = importlib.import_module((EXPERIMENTS | TOOLS)[name][0])
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        parser.parse_args(["2" if re.fullmatch("[A-Z]", w) else w for w in words])


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    file = ROOT / page
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        if target.startswith("http"): continue
        path, _, anchor = target.partition("#")
        other = (file.parent / path).resolve() if path else file
        assert other.exists(), f"{page}: {target}"
        if anchor: assert anchor in anchors(other.read_text()), f"{page}: {target}"


def anchors(markdown):
    """The names that GitHub gives a page's headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", CODE.sub("", markdown), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_only_files_that_exist(page):
    folder = (ROOT / page).parent
    for block in blocks(page, ""):
        under = folder
        for line in block.splitlines():
            if not re.match(r"[\w ./*-]+\.(py|md|c|ipynb)\b|\w+/ ", line): continue
            if found := re.match(r"(\w+)/ ", line):
                under = folder / found[1]
                assert under.is_dir(), f"{page}: {line}"
            where = under if line.startswith("  ") else folder
            for name in re.findall(r"(?<![\w/])[\w*]+\.(?:py|md|c|ipynb)\b", line):
                there = [where, under, folder]
                assert any(list(p.glob(name)) for p in there), f"{page}: {name}"


def test_the_first_page_is_short_and_the_others_begin_with_their_contents():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220
    for page in PAGES[1:]:
        markdown = (ROOT / page).read_text()
        titles = re.findall(r"^## (.*)$", CODE.sub("", markdown), re.MULTILINE)
        listed = re.findall(r"^- \[(.*)\]\(#", markdown, re.MULTILINE)
        assert len(titles) < 4 or listed == titles, page


def test_what_the_first_page_says_of_its_figure_is_in_the_record():
    rows = read_summary(ROOT / "experiments" / "results" / "small_batch.json")["rows"]
    accs = {norm: sorted(r["valid_accuracy"] for r in rows if r["norm"] == norm) for norm in (
        "BatchNorm2d", "BatchNorm", "RunningBatchNorm", "GroupNorm")}
    mean = {norm: f"{sum(a) / len(a):.2f}" for norm, a in accs.items()}
    words = " ".join((ROOT / "README.md").read_text().split())
    running, group = accs["RunningBatchNorm"], accs["GroupNorm"]
    assert len(running) == 24
    assert max(accs["BatchNorm2d"] + accs["BatchNorm"]) < 0.5
    for said in (f"on MNIST is {mean['BatchNorm2d']} for torch's and {mean['BatchNorm']} for ours.",
                 f"learns in all 24, with a median of {(running[11] + running[12]) / 2:.3f}.",
                 f"GroupNorm has a median of {(group[11] + group[12]) / 2:.3f}, but ends at chance in "
                 f"{sum(a <= CHANCE for a in group)} of 24."):
        assert said in words
    assert running[0] > CHANCE
