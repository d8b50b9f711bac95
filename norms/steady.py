"""Batch norm for batches of one image or two, in deep networks: `SteadyBatchNorm`."""

import torch
from torch.types import Device

from norms import fast
from norms.rivals.pairs import RunningChannelNorm, launch_running


class SteadyBatchNorm(RunningChannelNorm):
    """Batch norm whose every estimate is steadied: forward, backward, from image to image, and in evaluation.

    Batch norm divides by the batch's statistics and sends a gradient through them; a large batch makes both good
    estimates of the data's. At batch size 2 they are noise, each in its way, and each is steadied by what costs least:

    1. *Forward*: running averages over the recent batches take the place of the batch's mean and variance, as in
       `RunningBatchNorm` with the rule per image,

           mean, var <- merge_moments(mean, var, batch mean, batch var, a)         z = (x - mean) / sqrt(var + eps)

    2. *Backward*: averages with the same share a take the place of the two means in batch norm's gradient (see
       `norms.averaged`). Without them all but the share a of that gradient is missing: weights get no word of how
       they move the statistics, and a deep network runs after its own statistics.

           G <- (1 - a) G + a mean(g)      D <- (1 - a) D + a mean(g z)    dL/dx = [g - G - z D] / sqrt(var + eps)

    3. *Image to image*: each image's groups of channels are normalised behind it, as in Batch-Channel Normalization,
       with one affine map for both. An error of the running statistics that the channels of a group share, a scale or
       a shift, cancels; before the affine map no value is larger than the square root of how many a group has:

           y = (z - m) / sqrt(v + eps) weight + bias               m, v of z, per image and group

    4. *Evaluation*: training wants a short memory (38 images), for the statistics must follow the weights; evaluation
       wants a long one. So `running_mean` and `running_var` are averages of the training's over `evaluation_memory`
       images more.

    Put it behind convolutions with weight standardization (`norms.rivals.WSConv2d`). A residual network at batch size 2
    then was above batch norm at batch size 32; GroupNorm, which is simpler, comes close to it up to batch size 4 and
    falls behind from 8 on: see `experiments/lab`. In a shallow network take it from batch size 2 on: at 1, GroupNorm
    and RunningBatchNorm were above it.

    Args:
        nf: channels, the size of axis 1.
        num_groups: groups of channels of step 3; must divide `nf`.
        mom: weight of the **new** batch at batch size 2 in the training's averages, above 0 and at most 1; a batch of b
            images has 1 - (1 - mom)^(b / 2).
        eps: added to each variance.
        affine: whether there are a `weight` and a `bias` per channel.
        evaluation_memory: over how many images evaluation averages what training normalises by; None evaluates by the
            training's.
        device, dtype: of the parameters; the statistics are float32 or wider.

    Shapes: `(N, C)` or `(N, C, *spatial)` in and out; parameters and buffers are those of `RunningBatchNorm` with
        `average_backward` and `evaluation_memory`.

    The backward pass keeps state, so second derivatives and `torch.func` are refused; in mixed precision see
    `norms.averaged` and `rescale_`.

    Raises:
        ValueError: groups that don't divide the channels; else as `RunningBatchNorm`.
        TypeError: an integer input.
        RuntimeError: a training forward inside a backward pass that is no repetition of one before.
    """

    def __init__(self, nf: int, num_groups: int = 4, mom: float = 0.1, eps: float = 1e-5, affine: bool = True, *,
                 evaluation_memory: float | None = 1000, device: Device = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__(nf, num_groups, mom, eps, affine, rule="per_image", average_backward=True,
                         evaluation_memory=evaluation_memory, device=device, dtype=dtype)


fast.register(SteadyBatchNorm, launch_running)
