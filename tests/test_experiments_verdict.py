"""The verdict: when a claim holds, its words, the record and the exit status."""

import json
import math
from itertools import product

import pytest

from experiments.verdict import LISTED, Claim, Result, Verdict

NAN = math.nan


@pytest.mark.parametrize(("bounds", "measured", "holds"), [
    ({}, 1.0, None), ({}, None, None), ({"least": 1}, 1, True), ({"least": 1}, 0.999, False), ({"most": 1}, 1, True),
    ({"most": 1}, 1.001, False), ({"below": 1}, 0.999, True), ({"below": 1}, 1, False),
    ({"least": 1, "most": 2}, 1.5, True), ({"least": 1, "most": 2}, 2.5, False), ({"least": 1, "most": 2}, 0.5, False),
    ({"least": 0}, 0, True), ({"most": 0}, 0, True), ({"least": -1, "most": 0}, 0.5, False),
    ({"least": 1}, math.inf, True), ({"most": 1}, math.inf, False), ({"most": 1}, -math.inf, True),
    *(({name: 1}, missing, False) for name, missing in product(("least", "most", "below"), (None, NAN)))])
def test_a_claim_holds_within_its_bounds_and_a_figure_that_is_missing_never_does(bounds, measured, holds):
    assert Claim("x", measured, **bounds).holds is holds
    shown = Claim("x", measured, **bounds, of="3 seeds").shown_only()
    assert shown.holds is None
    assert shown.measured is measured
    assert str(shown).endswith(" (3 seeds)")


@pytest.mark.parametrize(("claim", "words"), [
    (Claim("x", 0.5), "x 0.500"),
    (Claim("x", 0.95, 0.9, of="mean of 3 seeds"), "x 0.950 (mean of 3 seeds; at least 0.900 needed)"),
    (Claim("x", 0.5, below=0.5), "x 0.500 (below 0.5 needed; missed)"),
    (Claim("x", 0.5, 0.25, 0.75, form=".2f"), "x 0.50 (0.25 to 0.75 needed)"),
    (Claim("x", 2e-9, most=1e-12, form=".1e", bound=".0e"), "x 2.0e-9 (at most 1e-12 needed; missed)"),
    (Claim("x", None, most=5, form="g"), "x none (at most 5 needed; missed)"),
    (Claim("x", NAN, most=5), "x nan (at most 5.000 needed; missed)")])
def test_a_claim_in_words(claim, words): assert str(claim) == words


def claims(*held): return [Claim("x", 1.0, **{} if h is None else {"least": 0.5 if h else 2}) for h in held]


@pytest.mark.parametrize("held", [*product((True, False, None), repeat=3), (), (True,), (False, None) * 4, (None,) * 8])
def test_a_verdict_is_no_better_than_its_worst_claim_and_untested_without_any(held):
    verdict = Verdict("The effect was {}reproduced", claims(*held), "That was not tested")
    tested = [h for h in held if h is not None]
    expected = all(tested) if tested else None
    assert verdict.reproduced is expected
    begins = ("That was not tested. The effect was NOT reproduced" if expected is False else
              "That was not tested. The effect was reproduced" if expected else "That was not tested")
    assert verdict.sentence.startswith(begins)
    assert verdict.sentence.endswith(".")
    assert verdict.sentence.count("missed") == tested.count(False)
    if len(held) > LISTED and not tested: assert verdict.sentence.count("x 1.000") == len(held)      # each is said
    elif len(held) > LISTED: assert f"{tested.count(True)} of {len(tested)} claims hold" in verdict.sentence
    else: assert verdict.sentence.count("x 1.000") == len(held)
    rows = [{"status": "ok"}]
    assert Result(rows, verdict.reproduced, verdict.sentence).status == (expected is False)
    record = verdict.record()
    assert json.loads(json.dumps(record)) == record
    assert [claim["holds"] for claim in record["claims"]] == list(held)


def test_the_record_of_a_claim_has_the_figure_and_its_bounds():
    assert Claim("x", 0.5, most=1, of="mean of 3 seeds").record() == {
        "what": "x", "measured": 0.5, "of": "mean of 3 seeds", "most": 1, "holds": True}


@pytest.mark.parametrize(("statuses", "reproduced", "lost", "status"), [
    (["ok", "failed"], None, 0, 0), (["failed", "failed"], None, 0, 1), (["ok"], None, 1, 1), (["ok"], True, 1, 1),
    (["diverged"], True, 0, 0), ([], None, 0, 1)])
def test_an_arm_that_is_lost_or_refused_in_all_is_exit_status_1(statuses, reproduced, lost, status):
    assert Result([{"status": s} for s in statuses], reproduced, lost=lost).status == status
