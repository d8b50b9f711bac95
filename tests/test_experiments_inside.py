"""`python -m experiments inside`: the pictures, the figures, and the page that lays them out, in a browser too."""

import base64
import csv
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest
import torch

from experiments import inside
from experiments.__main__ import main
from experiments.errors import InputError
from experiments.report import Report

ROOT = Path(__file__).parent.parent
PICTURES = ("lr_find", "losses", "activations", "activation_histograms", "near_zero", "gradients",
            "gradient_histograms", "updates", "norm_scales")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Neither network nor sandbox (which a root user can't have), and a profile that goes with the test.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND")


class Page(HTMLParser):
    """The elements of a page; every one that is opened must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.words.append(data)

    def all(self, tag): return [attrs for t, attrs in self.seen if t == tag]


def pixels(png):
    """The picture in the file `png`, `(height, width, 3)`, 0 to 1."""
    return torch.from_numpy(matplotlib.image.imread(png))[..., :3]


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """The run folder of a look at BatchNorm2d at batch size 2, on the digits."""
    out = tmp_path_factory.mktemp("look") / "run"
    assert main(["inside", "--data", "digits", "--norm", "BatchNorm2d", "--batch-size", "2", "--steps", "60",
                 "--every", "10", "--seeds", "2", "--out", str(out)]) == 0
    return out


def test_the_run_folder_has_the_pictures_and_the_figures(looked):
    for name in (*PICTURES, "norm_means", "norm_variances", "seeds"):
        image = pixels(looked / f"{name}.png")
        assert min(image.shape[:2]) > 200
        assert image.std() > 0.02
    rows = list(csv.DictReader((looked / "activations.csv").read_text().splitlines()))
    assert {r["module"] for r in rows} == {"0", "1", "2", "3", "4", "7"}
    assert [int(r["step"]) for r in rows if r["module"] == "0"] == [*range(10), 10, 20, 30, 40, 50]
    assert len(list(csv.DictReader((looked / "losses.csv").read_text().splitlines()))) == 60
    assert {"gradients.csv", "parameters.csv", "norms.csv", "config.json"} <= {p.name for p in looked.iterdir()}
    assert [r["seed"] for r in json.loads((looked / "summary.json").read_text())["rows"]] == [0, 1]


def test_the_page_is_whole_and_needs_no_network(looked):
    text = (looked / "report.html").read_text()
    page = Page(text)
    pictures = page.all("img")
    assert len(pictures) == len(PICTURES) + 3 == text.count("<figcaption>")
    for img in pictures:
        kind, data = img["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data)[:4] == b"\x89PNG"
        assert len(img["alt"]) > 40
    assert not page.all("script")
    assert all(a["href"].startswith(("#", "data:")) for a in (*page.all("a"), *page.all("link")))
    assert not re.search(r"https?:|//cdn|url\(", text)
    assert str(looked) not in text
    assert {a["href"] for a in page.all("a")} == {f"#{h['id']}" for h in page.all("h2")}


def test_the_page_has_the_preflight_and_the_gap(looked):
    words = " ".join(Page((looked / "report.html").read_text()).words)
    assert "2 values per statistic" in words
    assert "outputs are about +-1" in words
    assert "begin_validate" in words                                # of the loop
    gap = words[words.index("Training mode against evaluation mode"):]
    for path in ("0.2", "1.2", "2.2", "3.2", "4.2", "output"): assert path in gap


@pytest.mark.parametrize(("norm", "absent"), [("none", {"norm_scales", "norm_means"}), ("GroupNorm", {"norm_means"}),
                                              ("RunningBatchNorm", set())])
def test_other_norms_have_their_own_pictures(norm, absent, tmp_path, capsys, monkeypatch):
    # What is in the pictures is seen in `looked`; to lay them out takes longer than all else here.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda fig, path, **kwargs: Path(path).write_bytes(b""))
    assert main(["inside", "--data", "digits", "--norm", norm, "--steps", "12", "--lr", "0.01", "--limit", "60",
                 "--out", str(tmp_path / "run")]) == 0
    written = {p.stem for p in (tmp_path / "run").glob("*.png")}
    assert written == {*PICTURES, "norm_means", "norm_variances"} - absent - (
        {"norm_variances"} if "norm_means" in absent else set())
    text = (tmp_path / "run" / "report.html").read_text()
    assert ("The clamp raised a variance in" in text) == (norm == "RunningBatchNorm")
    assert ("has no norm layer" in text) == (norm == "none")
    assert "report.html lays out" in capsys.readouterr().out


def test_a_training_that_diverges_is_shown_up_to_there(tmp_path, capsys):
    assert main(["inside", "--data", "digits", "--norm", "none", "--steps", "20", "--lr", "1e6", "--out",
                 str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert re.search(r"<p class=warn>diverged at step \d+", text)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows"][0]["status"] == "diverged"
    assert (tmp_path / "run" / "diverged.pt").exists()


@pytest.mark.parametrize(("options", "text"), [
    ({"norm": "BatchNrom"}, "BatchNrom"), ({"steps": 0}, "steps is 0; it must be a positive integer"),
    ({"lr": -1.0}, "lr is -1.0; it must be a positive number"), ({"every": 0}, "every is 0"),
])
def test_settings_that_make_no_sense_are_refused(options, text):
    with pytest.raises(InputError, match=text): inside.Config(**options)


def test_the_page_says_what_the_committed_record_says():
    record = json.loads((ROOT / "experiments" / "results" / "inside.json").read_text())
    readme = " ".join((ROOT / "experiments" / "README.md").read_text().replace("\n> ", "\n").split())
    assert record["gap"] in readme
    powers = {path: round(math.log10(ratio)) for path, ratio in record["updates"].items()}
    assert {powers.pop("4.2.weight"), powers.pop("7.weight")} == {-1}
    assert len(powers) == 9
    assert set(powers.values()) == {-7}
    assert ("move by some 1e-7 of their size a step (median), those of the last norm and the linear layer by 1e-1"
            in readme)


# --- the page in a browser ----------------------------------------------------------------------------------------

def browse(page, tmp_path, *flags):
    """What a headless browser prints, or draws, of `page`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None: pytest.skip("needs a browser: install chromium")
    return subprocess.run([browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()],
                          capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_all_pictures_and_nothing_wider_than_the_window(looked, tmp_path, width):
    script = """<script>addEventListener("load", () => { document.body.dataset.seen = JSON.stringify({
        pictures: [...document.images].filter(i => i.complete && i.naturalWidth > 200 && i.width > 100).length,
        overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
        loaded: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length}) })
        </script>"""
    page = tmp_path / "page.html"
    page.write_text((looked / "report.html").read_text().replace("</head>", script + "</head>"))
    dom = browse(page, tmp_path, f"--window-size={width},900", "--dump-dom")
    seen = json.loads(Page(dom).all("body")[0]["data-seen"])
    assert seen == {"pictures": len(PICTURES) + 3, "overflow": 0, "width": width, "loaded": 0}


def test_a_screenshot_shows_the_page(looked, tmp_path):
    shot = tmp_path / "shot.png"
    browse(looked / "report.html", tmp_path, "--window-size=1280,2400", f"--screenshot={shot}")
    image = pixels(shot)
    assert image.shape == (2400, 1280, 3)
    ink = (image.mean(2) < 0.98).float()
    assert ink[:800].mean() > 0.01                                  # heading, contents and table
    assert ink.mean() > 0.03
    colours = (image.amax(2) - image.amin(2) > 0.25).float().mean()
    assert colours > 0.001                                          # the lines of a picture


# --- the page's parts ---------------------------------------------------------------------------------------------

def test_a_report_escapes_what_it_is_given(tmp_path):
    report = Report("a < b & c", 'the "title"').section("<i>").text("x < y").code("<b>").table(
        ["<h>"], [["<td>"], ["plain"]], "<cap>", warn=(1,))
    page = Page(report.html())
    assert not {"i", "b", "h", "cap"} & {tag for tag, _ in page.seen}
    words = "".join(page.words)
    for text in ("a < b & c", 'the "title"', "<i>", "x < y", "<b>", "<h>", "<td>", "<cap>"): assert text in words
    assert [tr.get("class") for tr in page.all("tr")] == [None, None, "warn"]
    path = report.write(tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == report.html()
