"""What a console and a notebook show of the reports: `repr` in one line, `_repr_html_` a table, all escaped."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from norms.testing import Report, Result
from runner import preflight, train_eval_gap
from runner.insight.gap import TrainEvalGap
from runner.insight.preflight import Finding, Preflight
from runner.rows import Rows


class Page(HTMLParser):
    """The table of an HTML text, `table` its rows of cells, and what else it says, `texts`; every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.table, self.texts, self.tags = [], [], [], set()
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "tr": self.table.append([])
        if tag in ("td", "th"): self.table[-1].append("")

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"): self.table[-1][-1] += data
        else: self.texts.append(data)


NASTY = "<script>alert('&')</script>"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5),
                         nn.BatchNorm1d(5))


def test_preflight_in_one_line_and_as_a_table(net):
    found = preflight(net, torch.randn(2, 1, 8, 8))
    assert repr(found) == "<Preflight: 0 ok, 1 warn, 1 fail: 4 BatchNorm1d>"
    page = Page(found._repr_html_())
    assert page.table == [
        ["", "layer", "batch", "map", "statistics", "values", ""],
        ["warn", "1 BatchNorm2d", "2", "3x3", "4", "18", found.findings[0].text],
        ["fail", "4 BatchNorm1d", "2", "-", "5", "2", found.findings[1].text]]
    assert page.texts == ["0 ok, 1 warn, 1 fail"]
    assert str(found).splitlines()[-1] == page.texts[0]


def test_preflight_of_nothing_that_fails_names_nothing(net):
    found = preflight(net, torch.randn(64, 1, 8, 8))
    assert repr(found) == "<Preflight: 2 ok, 0 warn, 0 fail>"


def test_preflight_without_a_norm_layer():
    found = preflight(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
    assert repr(found) == "<Preflight: no norm layer>"
    assert Page(found._repr_html_()).texts == ["no norm layer"]


def test_preflight_names_a_layer_that_fails_twice_once_and_marks_the_last_batch():
    fails = [Finding("4", "BatchNorm1d", "fail", "few", n, (), 5, n, last) for n, last in ((2, False), (1, True))]
    assert repr(Preflight(fails)) == "<Preflight: 0 ok, 0 warn, 2 fail: 4 BatchNorm1d>"
    assert [row[2] for row in Page(Preflight(fails)._repr_html_()).table] == ["batch", "2", "1 (last)"]


def test_preflight_of_a_layer_that_did_not_run_has_dashes():
    found = Preflight([Finding("3", "BatchNorm2d", "warn", "didn't run in this forward pass")])
    assert Page(found._repr_html_()).table[1] == [
        "warn", "3 BatchNorm2d", "-", "-", "-", "-", "didn't run in this forward pass"]


def test_gap_in_one_line_and_as_a_table(net):
    gap = train_eval_gap(net, torch.randn(6, 1, 8, 8), batch_size=2)
    line = repr(gap)
    assert line.startswith(f"<TrainEvalGap, {len(gap.rows)} layers: {gap.cause[:60]}")
    assert "\n" not in line
    assert len(line) < 150
    page, (header, rows) = Page(gap._repr_html_()), gap.table()
    assert page.table == [list(header), *rows]
    assert page.texts == [gap.cause]


def test_gap_says_all_of_a_short_cause():
    gap = TrainEvalGap(Rows(), "No layer gave tensors of one shape in both modes.", {})
    assert repr(gap) == "<TrainEvalGap, 0 layers: No layer gave tensors of one shape in both modes.>"


RESULTS = [Result("takes 2-D input", "ok", ""), Result("no second order", "-", "not for this norm: 1 < 2"),
           Result("gradients", "FAIL", "differ by 3 & more")]


def test_norm_report_in_one_line_and_as_a_table():
    report = Report("Mine(4)", RESULTS)
    assert repr(report) == "<Report on Mine(4): 1 of 3 hold, 1 failed, 1 not for this norm; FAIL: gradients>"
    page = Page(report._repr_html_())
    assert page.table == [["FAIL", "gradients", "differ by 3 & more"], ["ok", "takes 2-D input", ""],
                          ["-", "no second order", "not for this norm: 1 < 2"]]
    assert page.texts == ["Mine(4): 1 of 3 hold, 1 failed, 1 not for this norm"]


def test_norm_report_without_a_failure_names_none():
    assert repr(Report("Mine(4)", RESULTS[:2])) == "<Report on Mine(4): 1 of 2 hold, 0 failed, 1 not for this norm>"


@pytest.mark.parametrize("shown", [
    Preflight([Finding(NASTY, NASTY, "fail", NASTY)]),
    TrainEvalGap(Rows([{"path": NASTY, "module": NASTY}]), NASTY, {}),
    Report(NASTY, [Result(NASTY, "FAIL", NASTY)])], ids=lambda shown: type(shown).__name__)
def test_whatever_stands_in_a_report_is_escaped(shown):
    html = shown._repr_html_()
    assert "<script" not in html
    page = Page(html)
    assert page.tags <= {"table", "thead", "tbody", "tr", "th", "td", "p"}
    assert any(NASTY in cell for cell in page.table[-1])
