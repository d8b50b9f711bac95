"""Running means that values which are not finite don't spoil."""

import math
from collections.abc import Sequence
from itertools import accumulate


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Means of the finite ones among `width` neighbours (of the next odd number), fewer at the ends: a list.

    NaN where a value itself is not finite. No sum is the difference of two others, which beside a loss of 1e30 would
    leave nothing of the others.
    """
    half, n = width // 2, len(values)
    width = 2 * half + 1
    finite = [math.isfinite(v) for v in values]
    kept = [v if ok else 0.0 for v, ok in zip(values, finite, strict=True)]
    counts = [0, *accumulate(finite)]
    blocks = [kept[i:i + width] for i in range(0, n, width)]
    heads = [s for block in blocks for s in accumulate(block)]                  # from the block's start to here
    tails = [s for block in blocks for s in [*accumulate(block[::-1])][::-1]]   # from here to the block's end
    means = []
    for i, ok in enumerate(finite):
        a, b = max(0, i - half), min(n, i + half + 1)
        # Never longer than a block: a tail and a head, or within one block a head or a tail.
        if a // width < (b - 1) // width: total = tails[a] + heads[b - 1]
        else: total = tails[a] if a % width else heads[b - 1]
        means.append(total / (counts[b] - counts[a]) if ok else math.nan)
    return means
