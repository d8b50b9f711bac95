"""Instance normalization (D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, https://arxiv.org/abs/1607.08022)."""

import torch
from torch import Tensor
from torch.types import Device

from norms import fast
from norms.moments import Norm, check_channels, moments, per_channel, scale_shift, wide


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
        affine: whether there are a `weight` and a `bias` per channel.
        device, dtype: of the parameters.

    Shapes: `(N, C, *spatial)` in and out, at least one spatial axis; `weight` and `bias` `(C,)`.

    Raises:
        ValueError: another channel count, no spatial axis, an empty input (but a batch of no images gives none back).
        TypeError: an integer input.
    """

    nf: int

    def __init__(self, nf: int, eps: float = 1e-0, affine: bool = True, *, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        check_channels("InstanceNorm", nf)
        super().__init__((nf,), eps, affine, device, dtype)
        self.nf = nf

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        self.check_input(x, self.nf, min_dims=3, no_images=True)
        _, var, centred = moments(wide(x), tuple(range(2, x.ndim)))                 # (N, C, 1, 1), (N, C, H, W)
        weight, bias = (per_channel(t, x.ndim) for t in (self.weight, self.bias))   # (1, C, 1, 1)
        return scale_shift(centred, var, self.eps, weight, bias).to(x.dtype)

    def statistic_groups(self, x: Tensor) -> Tensor: return x.flatten(0, 1).flatten(1)      # (N C, positions)

    def extra_repr(self) -> str:
        return f"{self.nf}, eps={self.eps}" + ("" if self.weight is not None else ", affine=False")


fast.register(InstanceNorm, lambda norm, x, kernels: None if x.shape[1] != norm.nf or x.ndim < 3 else
              fast.group_norm(norm, x, kernels, len(x), norm.nf, x.numel() // (len(x) * norm.nf)))
