"""The verdict of an experiment: its claims, whether they hold, in words, in the record and as the exit status."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.results import Recorded, Row

LISTED = 5      # so many claims with bounds are listed; of more their number, and those that don't hold


@dataclass(frozen=True)
class Claim:
    """A figure that was measured and what it must be; without a bound it is only shown.

        RunningBatchNorm 0.957 (median of 24 seeds, 0 at chance; at least 0.927 needed)

    Args:
        what: what the figure is, words that it can follow.
        measured: the figure; None where there is none. None and NaN are within no bounds.
        least, most: the bounds, themselves allowed.
        below: a bound that is not.
        of: what the figure rests on, n among it.
        form: the format of the figure; `bound` that of `least` and `most`, the same if empty.
    """

    what: str
    measured: float | None
    least: float | None = None
    most: float | None = None
    below: float | None = None
    of: str = ""
    form: str = ".3f"
    bound: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the figure is within its bounds; None if it has none."""
        if self.least is self.most is self.below is None: return None
        x = math.nan if self.measured is None else self.measured
        return not math.isnan(x) and (self.least is None or x >= self.least) and (
            self.most is None or x <= self.most) and (self.below is None or x < self.below)

    @property
    def needed(self) -> str:
        """The bounds in words: 'at least 0.947', 'at most 5', '0.942 to 0.998', 'below 0.5' or ''."""
        bound = self.bound or self.form
        if self.below is not None: return f"below {self.below:g}"
        if self.least is not None and self.most is not None:
            return f"{_number(self.least, bound)} to {_number(self.most, bound)}"
        if self.least is not None: return f"at least {_number(self.least, bound)}"
        return "" if self.most is None else f"at most {_number(self.most, bound)}"

    def shown_only(self) -> "Claim":
        """The figure without its bounds."""
        return replace(self, least=None, most=None, below=None)

    def record(self) -> Row:
        """What `summary.json` holds of it."""
        bounds = {name: b for name in ("least", "most", "below") if (b := getattr(self, name)) is not None}
        return {"what": self.what, "measured": self.measured, "of": self.of, **bounds, "holds": self.holds}

    def __str__(self) -> str:
        notes = "; ".join(filter(None, [self.of, f"{self.needed} needed" if self.needed else "",
                                        "missed" if self.holds is False else ""]))
        figure = "none" if self.measured is None else _number(self.measured, self.form)
        return f"{self.what} {figure}" + (f" ({notes})" if notes else "")


def _number(x: float, form: str) -> str: return f"{x:{form}}".replace("e-0", "e-")


@dataclass(frozen=True)
class Verdict:
    """What an experiment says of its claims.

    Args:
        said: how the sentence begins, with {} where NOT stands if a claim doesn't hold: "The effect was {}reproduced".
        claims: what was measured, whether it has bounds or not.
        untested: how it begins if nothing has bounds; else what was not tested, a sentence of its own before it.
    """

    said: str = ""
    claims: Sequence[Claim] = ()
    untested: str = ""

    @property
    def reproduced(self) -> bool | None:
        """Whether all claims hold; None if none was tested."""
        held = [claim.holds for claim in self.claims if claim.holds is not None]
        return all(held) if held else None

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        tested, found = self.reproduced is not None, self._found()
        begin = self.said.format("" if self.reproduced else "NOT ") if tested else self.untested
        return (f"{self.untested}. " if tested and self.untested else "") + begin + f": {found}" * bool(found) + "."

    def _found(self) -> str:
        """The claims in words."""
        tested = [claim for claim in self.claims if claim.holds is not None]
        if len(self.claims) <= LISTED or not tested: return "; ".join(map(str, self.claims))
        missed = [claim for claim in tested if not claim.holds]
        return "; ".join([f"{len(tested) - len(missed)} of {len(tested)} claims hold", *map(str, missed)])

    def record(self) -> Recorded:
        """What `summary.json` holds of it."""
        return {"reproduced": self.reproduced, "verdict": self.sentence,
                "claims": [claim.record() for claim in self.claims]}


@dataclass
class Result:
    """What an experiment's `run(config)` returns.

    `rows` are its final figures, one per arm and seed; `reproduced` is True, False or None (not tested), `verdict`
    says so in a sentence; `folder` is the run folder; `lost` is how many arms raised or were killed, which have no row.
    `status` is the command's exit status: 1 if the published result was looked for and not found, an arm was lost, or
    a norm refused its input in all, else 0.
    """

    rows: list[Row] = field(default_factory=list)
    reproduced: bool | None = None
    verdict: str = ""
    folder: Path | None = None
    lost: int = 0

    @property
    def status(self) -> int:
        return int(self.reproduced is False or self.lost > 0 or all(r["status"] == "failed" for r in self.rows))
