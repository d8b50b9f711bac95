"""`check_norm`: one call tries any norm, the user's own included, and says what holds and what does not.

    from norms.testing import check_norm
    check_norm(MyNorm)                                              # MyNorm(nf) makes one for nf channels
    check_norm(nn.BatchNorm2d, dims=(4,), reference=BatchNorm)      # takes 4-D input only; compared with another

Each line of the output is one function in the modules here, a subject each, entered in a table under the words that
are printed. A check raises where the norm breaks its word, raises `NotForThisNorm` where there is nothing to check, and
may return a remark. It works on norms of its own, made by the factory and brought to the same state by the same steps,
so that it depends neither on the other checks nor on copying or saving, which have checks to themselves.
"""

from norms.testing.case import NotForThisNorm
from norms.testing.report import CHECKS, Report, Result, check_norm

__all__ = ["CHECKS", "NotForThisNorm", "Report", "Result", "check_norm"]
