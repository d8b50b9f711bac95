"""`check_norm`, the table of its checks, and its report."""

import textwrap
from dataclasses import dataclass
from html import escape
from typing import Literal, NamedTuple

from norms.testing import batches, buffers, graphs, precision, refusals, repeats, states, transforms, values
from norms.testing.case import RANKS, Case, Factory, NotForThisNorm

MODULES = values, precision, batches, states, buffers, graphs, transforms, repeats, refusals
CHECKS = {name: f for module in MODULES for name, f in module.check.items()}


class Result(NamedTuple):
    """What one check found: its `name`, the `status` "ok", "FAIL" or "-", and a `message`, empty if all is said."""

    name: str
    status: Literal["ok", "FAIL", "-"]
    message: str

    def __str__(self) -> str:
        text = f"{self.name}: {self.message}" if self.message else self.name
        return f"{self.status:<6}{textwrap.shorten(text, 240)}"


@dataclass
class Report:
    """What `check_norm` found on `norm`; true, as is `ok`, if nothing failed. `str(report)` is what was printed."""

    norm: str
    results: list[Result]

    @property
    def failed(self) -> dict[str, str]:
        """The message of every check that failed, by its name."""
        return {r.name: r.message for r in self.results if r.status == "FAIL"}

    @property
    def ok(self) -> bool: return not self.failed

    def __bool__(self) -> bool: return self.ok

    def __str__(self) -> str: return "\n".join(map(str, (self.norm, *self.results, self.summary())))

    def __repr__(self) -> str:
        failed = "; FAIL: " + ", ".join(self.failed) if self.failed else ""
        return f"<Report on {self.norm}: {self.summary()}{failed}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the summary, and a table with what failed first."""
        ordered = sorted(self.results, key=lambda r: ("FAIL", "ok", "-").index(r.status))
        body = "".join("<tr>" + "".join(f'<td style="text-align: left">{escape(textwrap.shorten(cell, 240))}</td>'
                                        for cell in (r.status, r.name, r.message)) + "</tr>" for r in ordered)
        return f"<p>{escape(self.norm)}: {escape(self.summary())}</p><table><tbody>{body}</tbody></table>"

    def summary(self) -> str:
        """One line: how many checks hold, fail and don't apply."""
        count = [sum(r.status == s for r in self.results) for s in ("ok", "FAIL", "-")]
        return "{} of {} hold, {} failed, {} not for this norm".format(count[0], sum(count), *count[1:])


def check_norm(factory: Factory, *, nf: int = 4, dims: tuple[int, ...] | list[int] = RANKS,
               reference: Factory | None = None, strict: bool = False) -> Report:
    """Try a norm on everything that training asks of one, and print a line per check.

    Everything runs on torch's default device: `with torch.device("cuda"): check_norm(...)` tries the norm there.
    torch's compiler is reset, for the count of compilations to be the norm's own.

    Args:
        factory: makes the norm for a number of channels, such as `norms.RunningBatchNorm`. It is called many times.
        nf: the number of channels to try it with, at least 2.
        dims: how many axes, out of 2 to 5, the norm's input may have. Other inputs must be refused by a ValueError.
        reference: a factory like the first whose module gives the right answer. Its parameters are taken to be the
            norm's in the same order and to have as many elements; None leaves the values unchecked.
        strict: whether to raise an AssertionError with the report if a check fails.

    Returns:
        A `Report`: the list `results` of `Result(name, status, message)`, `failed`, `ok`; it is true if nothing failed.

    Raises:
        TypeError: a module or something else in place of a factory; a factory that makes no module.
        ValueError: `dims` or `nf` out of range.
        AssertionError: a check failed and `strict` is set.
    """
    case = Case(factory, nf, dims, reference)
    report = Report(" ".join(repr(case.make()).split()), [])
    print(report.norm)
    for name, f in CHECKS.items():
        status: Literal["ok", "FAIL", "-"] = "ok"
        try: message = f(case) or ""
        except NotForThisNorm as e: status, message = "-", f"not for this norm: {e}"
        except AssertionError as e: status, message = "FAIL", str(e)
        except Exception as e: status, message = "FAIL", f"{type(e).__name__}: {e}"
        report.results.append(Result(name, status, " ".join(message.split())))
        print(report.results[-1], flush=True)
    print(report.summary())
    if strict and report.failed: raise AssertionError(f"check_norm: not everything holds\n{report}")
    return report
