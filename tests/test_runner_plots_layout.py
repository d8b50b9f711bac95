"""Pictures as they are laid out: measured by the renderer, no text is cut off and no two lie over each other, whatever
the layers are called and however many they are; what a logarithmic axis can't show is marked and named."""

import itertools
import math
import random

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.text import Text
from torch import nn

from runner import (
    ActivationStats,
    DataBunch,
    Dataset,
    GradientStats,
    Learner,
    NormStats,
    ParameterStats,
    Runner,
    get_dls,
    plots,
)
from runner.insight import ends

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def texts(fig):
    """Every text that is drawn, with the box of its letters in pixels."""
    fig.canvas.draw()                   # the layout is settled
    found, draw = [], Text.draw

    def noted(self, renderer):
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), Text.get_window_extent(self, renderer)))
        return draw(self, renderer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        fig.canvas.draw()
    return found


def overlap(a, b):
    """How far two boxes lie over each other, the smaller of both directions, in pixels."""
    return min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0))


def check(fig):
    found = texts(fig)
    width, height = fig.bbox.width, fig.bbox.height
    for text, box in found:
        assert min(box.x0, box.y0) > -1.5, text
        assert box.x1 < width + 1.5, text
        assert box.y1 < height + 1.5, text
    # Boxes hold the room of ascenders and descenders too; ticks at the ends of neighbouring axes may touch by that.
    for (one, a), (other, b) in itertools.combinations(found, 2): assert overlap(a, b) < 3.5, (one, other)


def names(draw, n):
    letters = "abcdefghijklmnop_."
    return [f"{i}." + "".join(draw.choices(letters, k=draw.randint(0, 57))) for i in range(n)]


def values(draw, n):
    size = 10 ** draw.uniform(-9, 6)
    special = [0.0, -size, NAN, INF, -INF]
    return [draw.choice(special) if draw.random() < 0.1 else size * math.exp(draw.gauss(0, 1)) for _ in range(n)]


def steps(draw): return list(range(draw.choice([1, 2, 7, 40])))


@pytest.mark.parametrize("seed", range(6))
def test_names_of_layers_are_whole_and_apart(seed):
    draw = random.Random(seed)
    n, xs = draw.choice([1, 2, 5, 12, 13, 62]), steps(draw)
    series = {name: (xs, values(draw, len(xs))) for name in names(draw, n)}
    check(plots.plot_layers(series, yscale=draw.choice(["log", "linear", "symlog"]), title="a", ylabel="b",
                            guide=(1e-3, "rule of thumb")).figure)


@pytest.mark.parametrize("seed", range(3))
def test_panels_and_pages_are_laid_out(seed):
    draw = random.Random(100 + seed)
    n, xs = draw.choice([1, 3, 6]), list(range(9))
    called = names(draw, n)
    channels = {name: (xs, [values(draw, 5) for _ in xs], [values(draw, 5) for _ in xs]) for name in called}
    axes = plots.plot_channels(channels, yscale=draw.choice(["log", "linear"]), ylabel="var")
    check(axes[0].figure)
    histograms = {name: (xs, [-1.0] * 9, [draw.uniform(1, 9) for _ in xs], [[1, 5, 2]] * 9) for name in called}
    check(plots.plot_histograms(histograms)[0].figure)
    moments = {name: (xs, values(draw, 9), values(draw, 9)) for name in called}
    check(plots.plot_means_stds(moments, yscale="log")[0].figure)


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_are_laid_out(seed):
    draw = random.Random(200 + seed)
    groups = {name: [draw.choice([NAN, draw.random()]) for _ in range(draw.randint(1, 9))]
              for name in names(draw, draw.choice([1, 4, 11]))}
    fig, (left, right) = plots.figure(2, width=5.2, height=4.4)
    plots.plot_groups(groups, left, close=right, failed_as=0.0, xlabel="accuracy", title="title",
                      reference={next(iter(groups)): [0.5]}, notes=dict.fromkeys(groups, "2 diverged"),
                      intervals={name: (0.2, 0.4) for name in groups})
    check(fig)


def test_a_deep_network_has_pages_and_twelve_lines_and_the_rest_as_a_band(tmp_path):
    xs = list(range(5))
    series = {f"layer{i}.weight": (xs, [10.0 ** -(i % 7)] * 5) for i in range(62)}
    series["layer30.weight"] = xs, [1e-12] * 5
    ax = plots.plot_update_ratios(series)
    shown = [line.get_label() for line in ax.lines if not line.get_label().startswith("_")]
    assert len(shown) == len(ax.texts) == 12
    assert {"layer0.weight", "layer61.weight", "layer30.weight"} <= set(shown)        # the first, the last, the lowest
    assert [t.get_text() for t in ax.texts] == shown
    legend = [t.get_text() for t in ax.get_legend().get_texts()]
    assert legend == ["the other 50, least to greatest", "rule of thumb, 1e-3"]
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (1e-6, 1.0)
    histograms = {f"layer{i}.conv": (xs, [0.0] * 5, [1.0] * 5, [[1, 2]] * 5) for i in range(14)}
    axes = plots.plot_histograms(histograms)
    assert [ax.get_title(loc="left") for ax in axes] == list(histograms)
    assert [len([ax for ax in axes if ax.figure is fig]) for fig in plots.pages(axes)] == [12, 2]
    paths = plots.save_pages(axes, tmp_path / "h.png")
    assert [p.name for p in paths] == ["h-1.png", "h-2.png"]
    assert all(p.exists() for p in paths)
    assert plots.save_pages(plots.plot_line([1]), tmp_path / "one.png") == [tmp_path / "one.png"]


@pytest.mark.parametrize("draw", [plots.plot_layers, lambda s, **k: plots.plot_lines(s, yscale="log"),
                                  lambda s, **k: plots.plot_runs(s, yscale="log")])
def test_what_a_logarithmic_axis_cannot_show_is_marked(draw):
    ax = draw({"a": (list(range(8)), [1.0, 0.0, -2.0, 3.0, INF, NAN, None, 0.5])})
    marks = {line.get_label(): line for line in ax.lines if line.get_transform() is not ax.transData}
    at = {label.strip("_"): (list(m.get_xdata()), m.get_ydata()[0], m.get_marker()) for label, m in marks.items()
          if label.strip("_") in ("0", "negative", "infinite", "NaN") or "edge" in label}
    assert {k.split(",")[0]: v for k, v in at.items()} == {
        "0": ([1], 0, "v"), "negative": ([2], 0, "v"), "infinite": ([4], 1, "^"), "NaN": ([5], 1, "x")}
    said = " ".join(t.get_text() for t in ax.get_legend().get_texts())
    for kind in ("0", "negative", "infinite", "NaN"): assert kind in said
    dots = [line for line in ax.lines if line.get_marker() == "."]
    assert 7 in {x for line in dots for x in line.get_xdata()}          # a value between two that can't be drawn
    ax.figure.canvas.draw()


def test_nothing_positive_on_a_logarithmic_axis_is_no_error():
    for ys in ([0.0, 0.0], [-1.0, NAN], [INF], []):
        plots.plot_layers({"a": (list(range(len(ys))), ys)}).figure.canvas.draw()
        plots.plot_line(ys, yscale="log").figure.canvas.draw()


def test_least_channel_and_logarithm_by_hand():
    batch, running = [[4.0, 1.0, 2.0], [0.0, 8.0, NAN]], [[1.0, 2.0, 3.0], [1e-6, 2.0, 3.0]]
    ax, = plots.plot_channels({"0.norm": ([0, 1], batch, running)}, ylabel="var", yscale="log")
    assert ax.get_yscale() == "log"
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert lines["batch: least channel"] == [1.0, 0.0]
    assert lines["running: least channel"] == [1.0, 1e-6]
    assert ax.get_title(loc="left") == "0.norm"


def test_the_statistic_that_is_drawn_is_the_one_named_and_failures_are_seen():
    _, (ax, close) = plots.figure(2)
    plots.plot_groups({"a": [0.9, 0.92, 0.1], "b": [NAN, 0.8, 0.86], "c": [None]}, ax, close=close, failed_as=0.0,
                      middle={"a": "median"}, intervals={"a": (0.85, 0.95)}, notes={"b": "1 diverged"})
    bars = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1
            and len(set(line.get_ydata())) == 2]
    assert bars == [0.9, pytest.approx(1.66 / 3), 0.0]
    crosses = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines if line.get_marker() == "x"]
    assert crosses == [([0.0], [1]), ([0.0], [2])]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["95 % interval", "no finite value"]
    assert [t.get_text() for t in close.texts] == ["0.900", "0.553, 1 diverged", "0.000"]
    low, high = close.get_xlim()
    assert 0.8 < low < 0.9 < 0.92 < high < 1
    beyond = {(line.get_marker(), y) for line in close.lines if line.get_label() == "_beyond" for y in line.get_ydata()}
    assert ("<", 0) in beyond
    assert ("<", 1) in beyond
    with pytest.raises(ValueError, match="middle is 'mode'; give 'mean' or 'median'"):
        plots.plot_groups({"a": [1.0]}, middle="mode")


@pytest.mark.parametrize(("wanted", "places"), [
    ([5.0], [5.0]), ([1.0, 1.0], [0.5, 1.5]), ([0.0, 0.0, 0.0], [0.0, 1.0, 2.0]), ([9.9, 10.0], [9.0, 10.0]),
    ([2.0, 2.5, 8.0], [1.75, 2.75, 8.0])])
def test_places_apart_by_hand(wanted, places):
    assert ends.apart(wanted, 1.0, 0.0, 10.0) == pytest.approx(places)


def test_places_apart_keep_their_distance_and_within():
    draw = random.Random(0)
    for _ in range(200):
        n = draw.randint(1, 12)
        wanted = sorted(draw.uniform(-1, 13) for _ in range(n))
        at = ends.apart(wanted, 1.0, 0.0, 12.0)
        assert all(b - a > 1 - 1e-9 for a, b in itertools.pairwise(at))
        assert -1e-9 <= at[0] <= at[-1] <= 12 + 1e-9


def test_names_are_shortened_in_their_middle_and_stay_distinct():
    assert ends.shortened("layer1.0.conv1.weight", 10) == "lay\u2026weight"
    assert ends.shortened("short", 10) == "short"
    many = [f"encoder.blocks.{i}.attention.projection.weight" for i in range(12)]
    assert len(set(ends.distinct(many, 12))) == 12
    assert ends.wrapped("layer1.downsample.weight", 12) == "layer1.\ndownsample.weight" or len(
        max(ends.wrapped("layer1.downsample.weight", 12).split("\n"), key=len)) <= 12


def test_the_pictures_of_probes_name_layers_as_the_model_has_them():
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, ni, nf):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(ni, nf, 3), nn.BatchNorm2d(nf)

        def forward(self, x): return self.norm(self.conv(x).relu())
    model = nn.Sequential(Block(1, 4), Block(4, 4), nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    data = DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), 4), 3)
    acts, grads = ActivationStats(nn.Conv2d, verbose=False), GradientStats(nn.Conv2d, verbose=False)
    params, norms = ParameterStats(verbose=False), NormStats(verbose=False)
    learn = Learner(model, torch.optim.SGD(model.parameters(), 0.1), nn.functional.cross_entropy, data)
    Runner(cbs=[acts, grads, params, norms]).fit(2, learn)
    assert [ax.get_title(loc="left") for ax in acts.plot_histograms()] == ["0.conv", "1.conv"]
    assert [t.get_text() for t in grads.plot()[3].texts] == ["0.conv", "1.conv"]
    assert [ax.get_yscale() for ax in grads.plot()] == ["symlog", "log"] * 2
    variances = norms.plot("var")
    assert [(ax.get_title(loc="left"), ax.get_yscale()) for ax in variances] == [("0.norm", "log"), ("1.norm", "log")]
    kinds = params.plot_kinds()
    assert {ax.get_title(loc="left"): sorted(t.get_text() for t in ax.texts) for ax in kinds} == {
        "weights": ["0.conv.weight", "1.conv.weight", "3.weight"], "biases": ["0.conv.bias", "1.conv.bias", "3.bias"],
        "norms": ["0.norm.bias", "0.norm.weight", "1.norm.bias", "1.norm.weight"]}
    assert all(ax.get_yscale() == "log" for ax in kinds)
    for fig in map(plt.figure, plt.get_fignums()): check(fig)
