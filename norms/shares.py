"""The moments of a training step: of this process's batch, or of what all processes have of it."""

from typing import NamedTuple

from torch import Tensor

from norms import fast
from norms.moments import all_but_channels, moments
from norms.running_norm import RunningNorm


class BatchMoments(NamedTuple):
    """What a training step rests on: `mean` and biased `var`, `(1, C, 1, ...)` each, over `n` values per channel of
    `images` images, and `centred = x - mean`, of the shape of x.

    Over several processes the two counts are scalar tensors, for to look at them would wait for a GPU, and `over` is
    what the backward pass has to know of these: their `Ranks.key`, and the totals of images, values and processes.
    """

    mean: Tensor
    var: Tensor
    centred: Tensor
    images: int | Tensor
    n: int | Tensor
    over: tuple[str, Tensor] | None


def batch_moments(norm: RunningNorm, x: Tensor) -> BatchMoments:
    """The moments per channel of `x`, `(N, C, *spatial)` in float32 or wider; with `norm.synced` over all processes.

    This is the way in for every norm that `sync_norms` is to reach: take the moments here, and the counts as they come.
    """
    dims, images, n = all_but_channels(x), x.shape[0], x.numel() // norm.nf
    ranks = norm.synced if norm.over_ranks() else None
    if ranks is None: return BatchMoments(*moments(x, dims), images, n, None)
    # A share of no images counts for nothing; its zeros depend on x, so that its backward pass takes part as well.
    mean, var = moments(x, dims)[:2] if x.numel() else [x.sum(dims, keepdim=True)] * 2
    mean, var, totals = fast.first_result(norm, "moments", lambda then: ranks.merge(mean, var, images, n, then))
    return BatchMoments(mean, var, x - mean, totals[0], totals[1], (ranks.key, totals))
