"""Instance normalization (D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, https://arxiv.org/abs/1607.08022)."""

from norms.images import normalise_groups
from norms.moments import Norm, check_channels


class InstanceNorm(Norm):
    """Normalise every channel of every image by its own mean and variance over the positions.

        y = (x - mean) / sqrt(var + eps) * weight + bias        mean, var (biased) over axes 2 and up

    No running state: training and evaluation compute the same. `eps` is 1 by default, as in the lesson (fastai
    part 2 v3, notebook 07); with torch's `eps=1e-5` output, gradients and state dict equal those of
    `torch.nn.InstanceNorm1d/2d/3d(nf, affine=True)`.

    On a 1x1 map there is one value per statistic: the variance is 0 and the output is `bias`, whatever the
    input. That is finite, and useless: nothing passes such a layer. (The lesson's unbiased variance is 0/0
    there, which is where its NaNs come from; torch refuses to train.)

    Args:
        nf: channels, the size of axis 1.
        eps: added to the variance.

    Shapes: `(N, C, *spatial)` in and out, at least one spatial axis; `weight` and `bias` `(C,)`.

    Raises:
        ValueError: another channel count, no spatial axis, an empty input.
        TypeError: an integer input.
    """

    def __init__(self, nf, eps=1e-0):
        check_channels("InstanceNorm", nf)
        super().__init__((nf,), eps)
        self.nf = nf

    def forward(self, x):
        self.check_input(x, self.nf, min_dims=3)
        return normalise_groups(x, self.nf, self.eps, self.weight, self.bias)

    def statistic_groups(self, x): return x.flatten(0, 1).flatten(1)        # (N C, positions)

    def extra_repr(self):
        return f"{self.nf}, eps={self.eps}"
