"""Many runs of one function, on all cores or a cluster, and an honest comparison of what came out.

    from experiments.study import Study, grid, needed
"""

from experiments.study.points import Grid, grid
from experiments.study.statistics import needed
from experiments.study.study import Study

__all__ = ["Grid", "Study", "grid", "needed"]
