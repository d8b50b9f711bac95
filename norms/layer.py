"""Layer normalization (J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, https://arxiv.org/abs/1607.06450)."""

from norms.images import normalise_groups
from norms.moments import Norm


class LayerNorm(Norm):
    """Normalise every image by its own mean and variance over all channels and positions.

        y = (x - mean) / sqrt(var + eps) * weight + bias        mean, var (biased) over axes 1 and up

    No running state: training and evaluation compute the same, and the batch size plays no part. By default
    `weight` and `bias` are scalars, as in the lesson (fastai part 2 v3, notebook 07); with `shape=x.shape[1:]`
    output, gradients and state dict equal those of `torch.nn.LayerNorm(x.shape[1:])`. The lesson's own took
    the unbiased variance, 0/0 where an image is a single value; the biased one is 0 there and y = bias.

    Args:
        eps: added to the variance. It is the first argument, as in the lesson: there is no channel count.
        shape: shape of `weight` and `bias`, broadcast against `(C, *spatial)`: `()` for scalars, `(C, 1, 1)` for
            one per channel, `(C, H, W)` for torch's.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out.

    Raises:
        ValueError: a `shape` that doesn't fit the input, fewer than two axes, an empty input.
        TypeError: an integer input; an integer `eps`, which is a channel count gone astray.
    """

    def __init__(self, eps=1e-5, shape=()):
        if isinstance(eps, int):
            raise TypeError(f"LayerNorm's first argument is eps and got the integer {eps!r}; it takes no channel "
                            "count: as a conv layer's norm write `norm=lambda nf: LayerNorm()`")
        super().__init__(tuple(shape), eps)

    def forward(self, x):
        self.check_input(x)
        weight, bias = self.weight, self.bias
        if weight.ndim:
            self.check_affine(x)
            if weight.shape != x.shape[1:]: weight, bias = weight.expand(x.shape[1:]), bias.expand(x.shape[1:])
        return normalise_groups(x, 1, self.eps, weight, bias)

    def statistic_groups(self, x): return x.flatten(1)              # (N, C * positions)

    def check_affine(self, x):
        """Raise unless `weight` broadcasts against one image of `x` without enlarging it."""
        affine, image = tuple(self.weight.shape), tuple(x.shape[1:])
        ends = zip(reversed(affine), reversed(image), strict=False)
        if len(affine) > len(image) or any(a not in (1, n) for a, n in ends):
            raise ValueError(f"LayerNorm has weight and bias of shape {affine} and got images of shape {image}; the "
                             f"first must broadcast to the second: make it with shape={image}, or with shape=() for "
                             "scalars")

    def extra_repr(self):
        return f"eps={self.eps}, shape={tuple(self.weight.shape)}"
