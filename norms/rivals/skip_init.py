"""SkipInit (S. De, S. L. Smith, "Batch normalization biases residual blocks towards the identity function in deep
networks", NeurIPS 2020, https://arxiv.org/abs/2002.10444)."""

import torch
from torch import Tensor, nn
from torch.types import Device


class SkipInit(nn.Module):
    """One learned multiplier at the end of a residual branch, in a network without norms.

        y = scale x

    With `scale` at 0, as made, a block of x + scale f(x) is the identity, which is what batch norm does to deep
    networks: there the sum grows with each block and the branch, normalised, does not. So residual networks of any
    depth train without norms; the authors add biases to the convolutions, dropout, and lower rates than batch norm
    allows. 1 / sqrt(blocks) is a start that they found to do as well.

    While `scale` is 0 the layers of the branch get no gradient; `scale` does.

    Args:
        init: what `scale` is as made.
        device, dtype: of `scale`.

    Shapes: any in, the same out; `scale` `(1,)`.

    Raises:
        TypeError: an `init` that is not a number.
    """

    init: float

    def __init__(self, init: float = 0.0, *, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if isinstance(init, bool) or not isinstance(init, (int, float)):
            raise TypeError(f"SkipInit got init={init!r}; it needs the number that scale is to begin with, such as "
                            "0.0")
        self.init = init
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set `scale` to `init`, as after construction."""
        nn.init.constant_(self.scale, self.init)

    # A copy of scale: the graph keeps it, and an optimizer's step may come before the backward.
    def forward(self, x: Tensor) -> Tensor: return x * self.scale.to(x.dtype).clone()

    def extra_repr(self) -> str: return f"init={self.init}"
