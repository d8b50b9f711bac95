"""The checks of inputs that a norm must refuse."""

from norms.testing.case import Case, Checks, NotForThisNorm, draw, refused, state

check = Checks()


@check("a wrong channel count is refused")
def wrong_channels(case: Case) -> None:
    few, many = ((repr(norm), {k: v.shape for k, v in state(norm).items()})
                 for norm in map(case.factory, (case.nf, 2 * case.nf)))
    if few == many: raise NotForThisNorm("it is the same for every channel count")
    for n in (2 * case.nf, 1):      # one channel would broadcast
        refused(case, draw((4, n, *case.shape()[2:]), 1), rf"\b{n}\b")


@check("integer input is refused")
def integer_input(case: Case) -> None: refused(case, case.x(1).long(), "int64|long|integer")
