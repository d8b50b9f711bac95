"""What the pictures of experiments share, and the page that explains itself: read from the artists and the HTML."""

import math
import random

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from experiments.lab import pictures as lab_pictures
from experiments.pictures import draw_accuracies, draw_losses, interval_of, seeds_of
from experiments.published import criterion
from experiments.report import STYLE, Report
from experiments.report_columns import GAP_COLUMNS, PREFLIGHT_COLUMNS, described
from experiments.results import SeedCurves
from runner import plots, train_eval_gap

NAN = math.nan


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def rows(*accuracies, status="ok"): return [{"valid_accuracy": a, "status": status} for a in accuracies]


def test_accuracies_are_drawn_with_the_statistic_of_the_verdict_and_those_that_diverged():
    arms = {"BatchNorm2d": rows(0.2, 0.3), "RunningBatchNorm": rows(0.95, 0.96, 0.1), "none": rows(NAN, None, 0.1)}
    arms["none"][0]["status"] = arms["none"][1]["status"] = "diverged"
    _, (ax, near) = plots.figure(2)
    draw_accuracies(arms, lambda r: r["valid_accuracy"], ax, near, middle=criterion.MIDDLES, what="accuracy")
    assert [t.get_text() for t in near.texts] == ["0.250", "0.950, median", "0.033, 2 diverged, 1 ok"]
    assert ax.get_xlim() == (-0.03, 1.03)
    assert ax.get_xlabel() == "accuracy\nbar: mean, or median where noted"
    crosses = [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [[0.0, 0.0]]
    low, high = near.get_xlim()
    assert 0.9 < low < 0.95 < 0.96 < high < 1


def test_interval_of_a_median_by_hand():
    assert all(map(math.isnan, interval_of([0.1, 0.2, 0.3, 0.4, 0.5], "median")))
    # Of 6 values the least and the greatest hold the median in all but 2 of 64 cases; of 9 the second and the eighth.
    assert interval_of([3.0, 1.0, 2.0, 6.0, 5.0, 4.0], "median") == (1.0, 6.0)
    assert interval_of([float(v) for v in range(1, 10)], "median") == (2.0, 8.0)


def test_interval_of_a_median_holds_it_often_enough():
    draw = random.Random(0)
    for n in (6, 11, 24):
        held = [low <= 0 <= high for low, high in (
            interval_of([draw.gauss(0, 1) for _ in range(n)], "median") for _ in range(400))]
        assert sum(held) / len(held) > 0.92


def test_every_seed_is_faint_behind_the_mean_and_what_explodes_stands_at_the_edge():
    first = {"a": ([0, 1], [2.0, 1.0]), "none": ([], [])}
    assert seeds_of(first) == {"a": [([0, 1], [2.0, 1.0])], "none": [([], [])]}
    curves = SeedCurves(first)
    curves.every = {"a": [first["a"], ([0, 1], [4.0, 1e9])], "none": [([], [])]}
    assert seeds_of(curves)["a"] == curves.every["a"]
    assert seeds_of({"a": {"losses": [1]}, "b": {}}, "losses", []) == {"a": [[1]], "b": [[]]}
    _, (ax,) = plots.figure()
    draw_losses(seeds_of(curves), ax, "loss")
    faint, other, mean = (line for line in plots.draw.data_lines(ax) if len(line.get_xdata()) == 2
                          and line.get_marker() == "None")
    assert faint.get_alpha() == other.get_alpha() < 0.5
    assert list(mean.get_ydata()) == [3.0, (1e9 + 1) / 2]
    assert ax.get_ylim()[1] == 10
    names = [t.get_text() for t in ax.get_legend().get_texts()]
    assert names == ["a", "none (diverged)", "beyond the axis"]        # nothing is silently absent


def lab_rows(norms, sizes, schedules=("warm-up",), accuracy=lambda i, b, s: 0.9):
    return [{"norm": n, "batch_size": b, "schedule": s, "seed": seed, "test_accuracy": accuracy(i, b, s) + seed / 1000}
            for i, n in enumerate(norms) for b in sizes for s in schedules for seed in (0, 1)]


def test_the_lab_draws_few_norms_in_one_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda fig, path: drawn.append(fig))
    lab_pictures.draw(lab_rows("AB", (2, 4, 8), accuracy=lambda i, b, s: 0.9 + i / 20), tmp_path / "p.png")
    ax, = drawn[0].axes
    a, b = (line for line in ax.lines if line.get_label() in "AB")
    assert list(a.get_xdata()) == [2, 4, 8]
    assert list(a.get_ydata()) == pytest.approx([0.9005] * 3)
    assert list(b.get_ydata()) == pytest.approx([0.9505] * 3)
    at_two = lab_rows([f"norm {i}" for i in range(20)], (2,))       # of which there is no line
    lab_pictures.draw([*lab_rows("AB", (2, 4, 8)), *at_two], tmp_path / "p.png")
    ax, = drawn[1].axes
    assert len([line for line in ax.lines if line.get_label() in "AB"]) == len(ax.lines) == 2


def test_the_lab_draws_many_norms_in_a_panel_each_the_best_first(tmp_path, monkeypatch):
    drawn, names = [], [f"norm {i}" for i in range(10)]
    monkeypatch.setattr(plots, "save", lambda fig, path: drawn.append(fig))
    # Norm 9 is the best by its constant rate, norm 0 is refused at batch size 1, norm 3 was trained at 2 only.
    rows = lab_rows(names, (1, 2), ("constant", "warm-up"), lambda i, b, s: 0.8 + i / 100 + (s == "constant") / 20)
    rows = [r for r in rows if (r["norm"], r["batch_size"]) != ("norm 3", 1)]
    for r in rows:
        if (r["norm"], r["batch_size"]) == ("norm 0", 1): r["test_accuracy"] = NAN
    lab_pictures.draw(rows, tmp_path / "p.png")
    axes = {ax.get_title(loc="left"): ax for ax in drawn[0].axes}
    assert list(axes) == [f"norm {i}" for i in (9, 8, 7, 6, 5, 4, 2, 1, 3, 0)]
    best, constant, warm_up = axes["norm 9"].lines
    assert list(constant.get_xdata()) == [1, 2]
    assert list(constant.get_ydata()) == pytest.approx([1 - 0.9405] * 2)
    assert list(warm_up.get_ydata()) == pytest.approx([1 - 0.8905] * 2)
    assert list(best.get_ydata()) == pytest.approx([1 - 0.9405] * 2)
    assert [line.get_ydata()[0] for line in axes["norm 0"].lines[1:]] == [1, 1]
    assert list(axes["norm 3"].lines[1].get_xdata()) == [2]
    assert "0.9" in [t.get_text() for t in axes["norm 9"].get_yticklabels()]


def test_the_report_has_contents_explains_columns_and_goes_dark_and_on_paper():
    page = Report("t").section("one").table(["gap", "x"], [[1, 2]], explained={"gap": "how far <", "x": "y"}).section(
        "two").html()
    assert '<ol><li><a href="#s1">one</a></li><li><a href="#s2">two</a></li></ol>' in page
    assert "<dt>gap</dt><dd>how far &lt;</dd>" in page
    assert "<nav" not in Report("t").html()
    dark = STYLE[STYLE.index("prefers-color-scheme: dark"):]
    names = ("ink", "soft", "line", "warn", "paper", "link", "code")
    for name in names: assert f"--{name}:" in dark[:dark.index("} }")]
    assert "figure img { max-width: 100%; height: auto; display: block; background: #ffffff }" in STYLE
    assert "@media print" in STYLE
    for variable in names: assert STYLE.count(f"--{variable}:") == 2


def test_dark_and_light_have_contrast():
    def value(text, name): return text.split(f"--{name}: #")[1][:6]

    def light(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(p * w for p, w in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))
    bright, dark = STYLE.split("prefers-color-scheme: dark")
    for text in (bright, dark):
        paper = light(value(text, "paper"))
        for name in ("ink", "soft", "warn", "link"):
            a, b = sorted((paper, light(value(text, name))))
            assert (b + 0.05) / (a + 0.05) > 4.5, name         # WCAG's AA


def test_every_column_is_explained():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    header, _ = train_eval_gap(model, torch.randn(4, 1, 5, 5)).table()
    assert list(GAP_COLUMNS) == list(header)
    assert [*PREFLIGHT_COLUMNS] == ["layer", "norm", "images", "map", "values per statistic", "what follows"]
    names = [described(m) for m in (model, model[0], nn.Sequential())]
    assert names == ["Conv2d to BatchNorm2d", "Conv2d", "Sequential"]
