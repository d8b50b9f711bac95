"""Pictures: what is drawn is what was given, into the axes that were given, whatever the numbers are."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from runner import plots

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def close(monkeypatch):
    """Nothing is shown, and every test starts and ends without figures."""
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("show was called"))
    yield
    plt.close("all")


def drawn(line):
    return [np.asarray(v, float).tolist() for v in line.get_data()]


def curves(ax):
    """The labelled lines: neither pale ones nor marks."""
    return [line for line in ax.lines if not line.get_label().startswith("_")]


def legend(ax): return [t.get_text() for t in ax.get_legend().get_texts()]


def ends(ax): return [t.get_text() for t in ax.texts]


def layers(n, steps=20):
    return {f"layer{i}": (list(range(steps)), [i + 0.1 * s for s in range(steps)]) for i in range(n)}


HISTOGRAM = ([0, 1], [0.0, 0.0], [1.0, 2.0], [[1, 2, 3, 4], [4, 3, 2, 1]])
ONE_AXES = {
    "lines": lambda data, ax=None: plots.plot_lines(data, ax, xlabel="x", ylabel="y"),
    "shares": plots.plot_shares,
    "updates": plots.plot_update_ratios,
    "runs": lambda data, ax=None: plots.plot_runs(data, ax, ylabel="loss"),
    "band": lambda data, ax=None: plots.plot_runs(data, ax, band=True, ylabel="loss"),
    "losses": lambda data, ax=None: plots.plot_losses([y for _, ys in data.values() for y in ys], ax=ax, valid=[0.1]),
    "rates": lambda data, ax=None: plots.plot_rates([ys for _, ys in data.values()], ax=ax),
    "finder": lambda data, ax=None: plots.plot_lr_find(*next(iter(data.values()), ([], [])), 0.1, ax),
}
PANELS = {
    "means_stds": (4, lambda s, axes=None: plots.plot_means_stds({k: (x, y, y) for k, (x, y) in s.items()}, axes)),
    "channels": (None, lambda s, axes=None: plots.plot_channels(
        {k: (x, [[v, 2.0] for v in y], [[v] for v in y]) for k, (x, y) in s.items()}, axes)),
    "histograms": (None, lambda s, axes=None: plots.plot_histograms(
        {k: (x, y, [v + 1 for v in y], [[1, 2]] * len(x)) for k, (x, y) in s.items()}, axes)),
}
HARD = {
    "nothing": {},
    "no steps": {"a": ([], [])},
    "one step": {"a": ([3], [0.5])},
    "nothing finite": {"a": ([1, 2], [NAN, INF])},
    "gaps": {"a": ([1, 2, 3, 4], [0.5, NAN, -INF, 0.25]), "b": ([1], [NAN]), "c": ([1, 2], [0.0, 0.0])},
}


@pytest.mark.parametrize("draw", ONE_AXES.values(), ids=ONE_AXES)
def test_one_axes_given_or_made(draw):
    fig, (left, right) = plots.figure(2)
    assert draw(layers(2), left) is left
    assert plt.get_fignums() == [fig.number]        # no other figure was made
    assert not right.lines
    assert left.get_xlabel()
    assert left.get_ylabel()
    assert draw(layers(2)).figure is not fig
    fig.canvas.draw()


@pytest.mark.parametrize(("n", "draw"), PANELS.values(), ids=PANELS)
def test_panels_given_or_made(n, draw):
    fig, grid = plt.subplots(2, 2)
    axes = draw(layers(4), grid)        # an array, as plt.subplots returns it
    assert axes == list(grid.flat)
    assert plt.get_fignums() == [fig.number]
    assert all(ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc="left") for ax in axes)
    made = draw(layers(5))
    assert isinstance(made, list)
    assert len(made) == len([ax for ax in made[0].figure.axes if ax.get_label() != "<colorbar>"]) == (n or 5)
    text = f"got 3 axes; plot_.* needs {n or 5}: pass as many, or None for new ones"
    with pytest.raises(ValueError, match=text): draw(layers(5), list(grid.flat)[:3])
    assert draw(layers(1), plt.figure().add_subplot())[0].get_title(loc="left") == "layer0" if n is None else True


@pytest.mark.parametrize("data", HARD.values(), ids=HARD)
@pytest.mark.parametrize("draw", [*ONE_AXES.values(), *(f for _, f in PANELS.values())], ids=[*ONE_AXES, *PANELS])
def test_hard_data(draw, data):
    if draw(data): plt.gcf().canvas.draw()      # some faults show only then; warnings are errors


def test_given_data_is_drawn_with_gaps_and_a_cross_at_its_end():
    ax = plots.plot_lines({"a": ([1, 2, 3, 4, 5], [1.0, None, torch.tensor(2.0), INF, NAN]), "b": ([1, 2], [3.0, 4.0])})
    a, b = curves(ax)
    assert str(drawn(a)) == str([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, NAN, 2.0, NAN, NAN]])
    assert drawn(b) == [[1, 2], [3.0, 4.0]]
    cross, = (line for line in ax.lines if line.get_marker() == "x")
    assert drawn(cross) == [[3], [2.0]]
    assert cross.get_color() == a.get_color()
    assert legend(ax) == ["a", "b", "no value follows"]


def test_a_single_point_has_a_marker():
    ax = plots.plot_lines(layers(9, steps=1), ordered=True)
    assert all(line.get_marker() == "o" for line in curves(ax))


def test_many_ordered_layers_run_from_dark_to_light_and_the_legend_names_some():
    ax = plots.plot_lines(layers(60), ordered=True)
    light = [sum(c * w for c, w in zip(line.get_color()[:3], (0.2126, 0.7152, 0.0722), strict=True))
             for line in curves(ax)]
    assert len(light) == 60
    assert light == sorted(light)
    names = legend(ax)
    assert (names[0], names[-1], len(names)) == ("layer0", "layer59", 12)
    assert ax.get_legend().get_title().get_text() == "12 of 60"
    few = plots.plot_lines(layers(7), ordered=True)
    assert [to_hex(line.get_color()).upper() for line in curves(few)] == list(plots.COLOURS)
    assert legend(few) == [f"layer{i}" for i in range(7)]


def test_outliers_are_spared_and_marked():
    ys = [1.0 + 0.1 * (s % 3) for s in range(40)]
    ys[7], ys[9] = 1e6, -1e6
    ax = plots.plot_lines({"a": (list(range(40)), ys), "short": ([0, 39], [1.3, 50.0])})
    low, high = ax.get_ylim()
    assert 0 < low < 1 < 1.3 < high < 2
    marks = {(line.get_marker(), to_hex(line.get_color()).upper()): drawn(line)[0] for line in ax.lines
             if not line.get_label()[0] != "_"}
    assert marks == {("v", plots.COLOURS[0]): [9], ("^", plots.COLOURS[0]): [7], ("^", plots.COLOURS[1]): [39]}
    assert drawn(curves(ax)[0])[1] == ys        # the data are whole
    assert plots.plot_lines({"a": (list(range(40)), ys)}, yscale="asinh").get_ylim()[1] > 1e6
    assert plots.plot_lines({"a": (list(range(40)), ys)}, ylim=(0, 9)).get_ylim() == (0, 9)


def test_a_long_fall_is_no_outlier_and_neither_is_a_layer_far_from_the_others():
    fall = [2.5 * math.exp(-s / 10) for s in range(100)]
    assert plots.plot_losses(fall, smooth=1).get_ylim()[1] > 2.5
    far = layers(5) | {"far": (list(range(20)), [1e4 + s for s in range(20)])}
    assert plots.plot_lines(far).get_ylim()[1] > 1e4


# --- a training run -----------------------------------------------------------------------------------------------

def test_losses_with_their_mean_and_validation():
    ax = plots.plot_losses([4.0, 1.0, 1.0, 1.0], valid=[3.0, 2.0], smooth=3, yscale="log")
    raw, mean, valid = ax.lines
    assert drawn(raw) == [[0, 1, 2, 3], [4.0, 1.0, 1.0, 1.0]]
    assert drawn(mean) == [[0, 1, 2, 3], [2.5, 2.0, 1.0, 1.0]]
    assert drawn(valid) == [[2.0, 4.0], [3.0, 2.0]]
    assert legend(ax) == ["training", "validation"]
    assert ax.get_yscale() == "log"
    steps = [0, 1, 4, 5]
    line, valid = plots.plot_losses([4.0, 1.0, 1.0, 1.0], steps, valid=[3.0, 2.0], ends=[2, 6]).lines    # 4 % of 4: raw
    assert drawn(line) == [steps, [4.0, 1.0, 1.0, 1.0]]
    assert drawn(valid)[0] == [2, 6]
    assert drawn(plots.plot_losses([1.0, 1.0], [4, 5], valid=[3.0, 2.0]).lines[-1])[0] == [3.0, 6.0]


def test_rates_of_groups():
    ax = plots.plot_rates([[0.1, 0.2], [0.01, 0.02]], [5, 6])
    assert [drawn(line) for line in curves(ax)] == [[[5, 6], [0.1, 0.2]], [[5, 6], [0.01, 0.02]]]
    assert legend(ax) == ["group 0", "group 1"]
    one = plots.plot_rates([[0.1, 0.2]])
    assert drawn(one.lines[0]) == [[0, 1], [0.1, 0.2]]
    assert one.get_legend() is None


def test_finder_ends_its_axis_at_the_height_from_which_the_loss_fell():
    lrs = [10 ** (k / 4 - 4) for k in range(16)]
    losses = [2.0, 2.1] * 4 + [1.5, 1.0, 0.5, 0.5, 0.6, 4.0, 90.0, NAN]
    ax = plots.plot_lr_find(lrs, losses, 0.0123, width=1)
    assert ax.get_xscale() == "log"
    assert drawn(ax.lines[0])[1][:15] == losses[:15]
    assert ax.get_ylim() == pytest.approx((0.5 - 0.08, 2.1 + 0.08))
    assert drawn(next(line for line in ax.lines if line.get_marker() == "^")) == [lrs[13:15], [ax.get_ylim()[1]] * 2]
    assert legend(ax) == ["suggestion 0.012", "no value follows", "beyond the axis"]
    assert list(ax.lines[-1].get_xdata()) == [0.0123, 0.0123]
    assert legend(plots.plot_lr_find(lrs, losses)) == ["no value follows", "beyond the axis"]
    again = plots.plot_lr_find(lrs, losses, ax=plots.mark(plots.plot_line([]), 1e-3, "mine"))
    assert [line.get_marker() for line in again.lines].count("v") == 0      # the vertical line is no loss of 0


def test_runs_of_one_and_of_several_seeds():
    runs = {"one": ([0, 1], [1.0, 3.0]), "three": [([0, 1], [1.0, 2.0]), ([0, 1], [5.0, NAN]), ([0, 2], [4.0, 6.0])]}
    ax = plots.plot_runs(runs, ylabel="loss", title="runs")
    one, *seeds, mean = (line for line in ax.lines if line.get_marker() not in ("x", "."))
    assert drawn(one) == [[0, 1], [1.0, 3.0]]
    assert len(seeds) == 3
    assert drawn(seeds[2]) == [[0, 2], [4.0, 6.0]]
    assert drawn(mean) == [[0, 1, 2], [10 / 3, 2.0, 6.0]]       # of the seeds that have a finite value there
    assert all(seed.get_alpha() < 0.5 and seed.get_linewidth() < mean.get_linewidth() for seed in seeds)
    assert {line.get_color() for line in (*seeds, mean)} == {plots.COLOURS[1]}
    assert legend(ax) == ["one", "three (1 of 3 diverged)", "no value follows"]
    assert ax.get_title(loc="left") == "runs"
    assert drawn(curves(plots.plot_runs(runs, middle="median"))[1]) == [[0, 1, 2], [4.0, 2.0, 6.0]]
    with pytest.raises(ValueError, match="give 'mean' or 'median'"): plots.plot_runs({}, middle="mode")
    band = plots.plot_runs(runs, band=True)
    assert [drawn(line) for line in curves(band)] == [[[0, 1], [1.0, 3.0]], [[0, 1, 2], [4.0, 2.0, 6.0]]]
    low_to_high = band.collections[1].get_paths()[0].get_extents()
    assert (low_to_high.y0, low_to_high.y1) == (1.0, 6.0)
    assert drawn(plots.plot_runs({"a": ([0, 1, 2], [0.0, 3.0, 6.0])}, smooth=3).lines[0])[1] == [1.5, 3.0, 4.5]
    as_json = {"one": [[0, 1], [1.0, 3.0]]}     # its pairs are lists
    assert drawn(plots.plot_runs(as_json).lines[0]) == [[0, 1], [1.0, 3.0]]


# --- inside a network ---------------------------------------------------------------------------------------------

def test_means_and_stds_of_the_first_steps_and_of_all():
    steps = list(range(0, 60, 2))
    series = {"0": (steps, [0.1 * s for s in steps], [1.0 + s for s in steps]), "1": (steps, steps, steps)}
    first_means, first_stds, means, stds = plots.plot_means_stds(series, first=3)
    assert drawn(curves(first_means)[0]) == [[0, 2, 4], pytest.approx([0.0, 0.2, 0.4])]
    assert drawn(curves(first_stds)[0]) == [[0, 2, 4], [1.0, 3.0, 5.0]]
    assert drawn(curves(means)[0]) == [steps, series["0"][1]]
    assert drawn(curves(stds)[1]) == [steps, steps]
    assert [ax.get_ylabel() for ax in (first_means, stds)] == ["mean", "std"]
    assert [ax.get_title(loc="left") for ax in (first_means, means)] == ["first 3 steps", "all steps"]
    assert [ends(ax) for ax in (first_means, first_stds, means, stds)] == [["0", "1"]] * 4
    smooth = plots.plot_means_stds(series, smooth=5)
    assert [len(ax.lines) for ax in smooth] == [2, 2, 4, 4]
    logs = plots.plot_means_stds(series, yscale="log")
    assert [ax.get_yscale() for ax in logs] == ["symlog", "log"] * 2


def test_shares_have_an_axis_from_0_to_1():
    ax = plots.plot_shares({"0": ([0, 1], [0.0, 0.02])}, ylabel="dead", title="near zero")
    assert ax.get_ylim() == (-0.03, 1.03)
    assert drawn(ax.lines[0]) == [[0, 1], [0.0, 0.02]]
    assert (ax.get_ylabel(), ax.get_title(loc="left")) == ("dead", "near zero")


def test_update_ratios_are_logarithmic_beside_the_guide():
    ax = plots.plot_update_ratios({"0.weight": ([0, 1, 2, 3], [1e-3, 0.0, INF, 1e-2])})
    assert ax.get_yscale() == "log"
    line, = curves(ax)
    assert drawn(line)[1][::3] == [1e-3, 1e-2]
    guide = next(line for line in ax.lines if list(line.get_ydata()) == [1e-3, 1e-3])
    assert guide.get_linestyle() == "--"
    assert legend(ax) == ["rule of thumb, 1e-3", "infinite", "0"]


def test_channels_by_hand():
    # Of 0, 1, ..., 10 the quantiles at 10, 50 and 90 % are 1, 5 and 9.
    batch, running = [list(range(11)), [NAN, *range(11)], [NAN]], [[2.0, 4.0], [3.0], [1.0]]
    ax, other = plots.plot_channels({"1.bn": ([0, 1, 2], batch, running), "2.bn": ([0], [[1]], [[1]])}, ylabel="mean")
    median, running_median, low, high = ax.lines[0], ax.lines[2], ax.lines[3], ax.lines[4]
    assert str(drawn(median)[1]) == str([5.0, 5.0, NAN])
    assert drawn(running_median) == [[0, 1, 2], [3.0, 3.0, 1.0]]
    assert drawn(low)[1] == pytest.approx([2.2, 3.0, 1.0])
    assert drawn(high)[1] == pytest.approx([3.8, 3.0, 1.0])
    band = ax.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (1.0, 9.0)
    assert legend(other) == [f"{name}: {what}" for name in ("batch", "running") for what in ("median", "10 to 90 %")]
    assert ax.get_legend() is None      # the other stands at the right
    assert (ax.get_title(loc="left"), ax.get_ylabel()) == ("1.bn", "mean")


@pytest.mark.parametrize(("low", "high", "counts", "edges", "expected"), [
    (0, 4, [4, 8, 0, 2], [0, 1, 2, 3, 4], [4, 8, 0, 2]),                # the same bins
    (0, 4, [4, 8, 0, 2], [0, 2, 4], [12, 2]),
    (0, 4, [4, 8, 0, 2], [-1, 0.5, 1.25, 5], [2, 2 + 2, 6 + 0 + 2]),    # spread evenly within a bin
    (0, 4, [4, 8, 0, 2], [1, 2], [8]),                                  # the rest lies outside
    (0, 4, [4, 8, 0, 2], [5, 6, 7], [0, 0]),
    (1, 1, [7, 0], [0, 1, 2], [0, 7]),                                  # one value, in the bin that begins with it
    (2, 2, [7, 0], [0, 1, 2], [0, 7]),                                  # or ends, if it is the last
    (3, 3, [7, 0], [0, 1, 2], [0, 0])])
def test_rebin_by_hand(low, high, counts, edges, expected):
    assert plots.rebin(low, high, counts, edges) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("low", "high", "counts"), [(NAN, 1, [1]), (0, INF, [1]), (0, 1, [NAN]), (0, 1, [])])
def test_rebin_of_what_is_not_finite(low, high, counts):
    assert str(plots.rebin(low, high, counts, [0, 1, 2])) == "[nan, nan]"


def test_rebin_conserves_counts():
    for _ in range(50):
        counts = torch.randint(0, 100, (17,)).tolist()
        low, width = torch.randn(()).item(), torch.rand(()).item() + 1e-3
        edges = torch.cat([torch.tensor([low - 1, low + width + 1]), low + width * torch.rand(9)]).sort().values
        assert sum(plots.rebin(low, low + width, counts, edges.tolist())) == pytest.approx(sum(counts), rel=1e-12)


def test_histograms_by_hand():
    ax, = plots.plot_histograms({"0.conv": HISTOGRAM}, bins=2)
    image, = ax.images
    # On [0, 1), [1, 2]: 10 and 0 at step 0, 7 and 3 at step 1. Rows go upwards, columns are steps.
    expected = [[math.log1p(10), math.log1p(7)], [0.0, math.log1p(3)]]
    assert [list(row) for row in image.get_array()] == [pytest.approx(row) for row in expected]
    assert image.get_clim() == pytest.approx((0, math.log1p(10)), abs=1e-8)
    assert image.to_rgba([0.0]).tolist() == [[1, 1, 1, 1]]      # no count is white
    assert ax.get_xlim() == (-0.5, 1.5)
    assert ax.get_ylim() == (0.0, 2.0)
    assert ax.get_title(loc="left") == "0.conv"
    bar = image.colorbar.ax
    assert [t.get_text() for t in bar.get_yticklabels()] == ["1", "10"]
    assert list(bar.get_yticks()) == pytest.approx([math.log1p(1), math.log1p(10)])
    assert bar.get_ylabel() == "count"


def test_histograms_spare_an_outlier_and_show_a_drift():
    steps, counts = list(range(40)), [[1, 2, 1]] * 40
    lows, highs = [-1.0] * 40, [1.0] * 40
    lows[5], highs[5] = -1e6, 1e6
    drift = [0.1 * s for s in steps]
    spiked, drifts = plots.plot_histograms({
        "spiked": (steps, lows, highs, counts), "drifts": (steps, drift, [v + 0.05 for v in drift], counts)})
    assert spiked.get_ylim() == (-3.0, 3.0)     # quartiles -1 and 1, widened by 2
    assert {line.get_marker(): drawn(line)[0] for line in spiked.lines} == {"v": [5], "^": [5]}
    assert drifts.get_ylim() == pytest.approx((0.0, 3.95))
    assert not drifts.lines


def test_histograms_of_irregular_steps_with_a_gap():
    ax, = plots.plot_histograms({"0": ([0, 10, 100], [0.0, NAN, 0.0], [1.0, NAN, 1.0], [[4], [0], [8]])}, bins=1)
    row, = ax.images[0].get_array().tolist()
    assert row == [math.log1p(4), None, math.log1p(8)]      # None: masked
    assert ax.get_xlim() == (-5.0, 145.0)       # cells end half way between steps


def test_series_styles_are_told_apart_in_order():
    assert plots.series_style(3, 7) == plots.series_style(3)
    assert plots.series_style(0, 8) != plots.series_style(0)
    assert len({plots.series_style(i, 60)["color"] for i in range(60)}) == 60


@pytest.mark.parametrize("suggestion", [None, 0.01])
def test_losses_beyond_the_axis_of_a_rate_finder_are_named_with_a_suggestion_or_without(suggestion):
    lrs = [10**(-4 + i / 8) for i in range(30)]
    losses = [2.0 - 0.03 * i for i in range(24)] + [3.0, 9.0, 30.0, 200.0, 900.0, 4000.0]
    ax = plots.plot_lr_find(lrs, losses, suggestion)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert any("beyond" in name or "above" in name for name in names), names
    assert any("suggestion" in name for name in names) == (suggestion is not None)
    assert plots.plot_lr_find(lrs, [2.0] * 30).get_legend() is None
