"""The layers of a `stack`: convolutions, linear layers and layer norms of K networks side by side.

Everywhere the networks lie along axis 1: `(N, K C, *spatial)` are the maps of K networks with C channels each, network
after network, and `(N, K F)` their features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms import LayerNorm, fast
from norms.fast.dispatch import plain
from norms.fast.kernels import Kernels
from norms.moments import Norm, moments, scale_shift, wide

# Which convolutions take a batch of few images, measured on two cores of an Intel Xeon (AVX-512), one thread, float32.
# Microseconds per image and network, forward and backward, of the five conv layers of `small-batch`, whose networks
# have 1, 8, 16, 32 and 64 channels in:
#
#                                           K = 8, batch 2              K = 20, batch 2
#       oneDNN's, channels last         27   42   31   56  154      12   32   21  119  154
#       oneDNN's, contiguous            38   37   32   52   64      30   34   21   33   46
#       torch's own, channels last     128   45   31   42   42     125   48   34   48   42
#       torch's own, contiguous         54   50   53  129   60      50   61   63  127   57
#       as the rule has it              27   42   31   42   42      12   32   21   48   42
#
# So: channels last, and torch's own from `OWN_CHANNELS` channels in on, where oneDNN's gradient of the weights is slow.
# From batch 16 on torch's own take three times as long as oneDNN's, and the layout is no matter (K = 8: 28 25 17 29 46
# channels last, 19 24 14 21 28 contiguous).
OWN_CHANNELS = 32
FEW_IMAGES = 8


def own_convolutions(images: int, channels: int) -> bool:
    """Whether a convolution of networks side by side takes torch's own and not oneDNN's: by rule, see above.

    `images` are the batch's, `channels` those that each group of the convolution gets.
    """
    return images <= FEW_IMAGES and channels >= OWN_CHANNELS


class GroupedConv2d(nn.Conv2d):
    """`nn.Conv2d` that computes batches of few images on a CPU by the faster convolutions, and channels last.

    Where oneDNN is switched off, `torch.backends.mkldnn.enabled`, it takes torch's own throughout; where `by_rule` is
    False, what is switched on.
    """

    by_rule = True

    def forward(self, x: Tensor) -> Tensor:
        if not (self.by_rule and x.ndim == 4 and len(x) <= FEW_IMAGES and self.padding_mode == "zeros"
                and type(self.padding) is tuple and torch.backends.mkldnn.enabled and plain(x)
                and not torch.is_autocast_enabled("cpu")): return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if not own_convolutions(len(x), self.weight.shape[1]): return super().forward(x)
        y: Tensor = _OwnConvolution.apply(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                                          self.groups)
        return y


class _OwnConvolution(torch.autograd.Function):
    """A convolution with oneDNN switched off, one way and the other: torch asks the switch again for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.biases = settings, None if bias is None else list(bias.shape)
        with _own(): return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        with _own():        # it can be differentiated in turn
            found = torch.ops.aten.convolution_backward(g, x, weight, ctx.biases, stride, padding, dilation, False,
                                                        [0, 0], groups, ctx.needs_input_grad[:3])
        return *found, None, None, None, None


class _own:
    """With oneDNN switched off."""

    def __enter__(self) -> None:
        self.before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.set_flags(False)

    def __exit__(self, *exception: object) -> None: torch.backends.mkldnn.set_flags(self.before)


class GroupedLinear(nn.Module):
    """K linear layers side by side: `(N, K ni)` to `(N, K no)`, or `(N, K C, *, ni)` to `(N, K C, *, no)`.

    `weight` is `(K no, ni)`, `bias` `(K no,)`, or None without.
    """

    def __init__(self, groups: int, ni: int, no: int, bias: bool = True) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * no, ni))
        self.bias = nn.Parameter(torch.empty(groups * no)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        k, ni = self.groups, self.weight.shape[1]
        weight = self.weight.view(k, -1, ni)                                                # (K, no, ni)
        xs = x.unflatten(1, (k, -1))                                                        # (N, K, C, *, ni)
        flat = xs.transpose(0, 1).reshape(k, -1, ni)                                        # (K, N C *, ni)
        out = torch.bmm(flat, weight.transpose(1, 2))                                       # (K, N C *, no)
        if self.bias is not None: out = out + self.bias.view(k, 1, -1)
        shape = k, len(x), *xs.shape[2:-1], -1
        return out.view(shape).transpose(0, 1).flatten(1, 2)

    def extra_repr(self) -> str:
        no, ni = self.weight.shape
        return f"{self.groups} x {ni} to {no // self.groups}" + ("" if self.bias is not None else ", bias=False")


class GroupedLayerNorm(Norm):
    """K layer norms side by side: each image's values, or its trailing axes, are normalised for each network alone.

    Args:
        groups: K.
        norm: one of them, `norms.LayerNorm` or `nn.LayerNorm`.

    `weight` and `bias` are the K norms' along axis 0; of scalars `(K,)`.
    """

    def __init__(self, groups: int, norm: LayerNorm | nn.LayerNorm) -> None:
        shape = () if norm.weight is None else tuple(norm.weight.shape)
        super().__init__((groups * shape[0], *shape[1:]) if shape else (groups,), norm.eps, norm.weight is not None)
        if norm.bias is None: self.register_parameter("bias", None)                         # nn.LayerNorm(bias=False)
        self.groups, self.shape = groups, shape
        self.normalized_shape = None if norm.normalized_shape is None else tuple(norm.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        if (y := fast.step(self, x)) is not None: return y
        sizes = self.normalized_shape
        xs = wide(x).unflatten(1, (self.groups, -1))                                        # (N, K, C, *spatial)
        axes = x.ndim - 1 if sizes is None else len(sizes)
        if axes >= x.ndim or (sizes is not None and tuple(xs.shape[-axes:]) != sizes):
            raise ValueError(f"LayerNorm was made for trailing axes of sizes {sizes} and got an input of shape "
                             f"{(len(xs), *xs.shape[2:])} in each of {self.groups} networks")
        _, var, centred = moments(xs, tuple(range(xs.ndim - axes, xs.ndim)))                # (N, K, 1, 1, 1)
        ones = [1] * (x.ndim - 1 - len(self.shape))
        weight, bias = (None if t is None else t.view(self.groups, *ones, *self.shape)
                        for t in (self.weight, self.bias))
        if weight is not None and bias is None: bias = torch.zeros_like(weight)
        y: Tensor = scale_shift(centred, var, self.eps, weight, bias).flatten(1, 2)
        return y.to(x.dtype)

    def statistic_groups(self, x: Tensor) -> Tensor:
        xs = x.unflatten(1, (self.groups, -1))
        return xs.flatten(2).flatten(0, 1) if self.normalized_shape is None else xs.flatten(
            xs.ndim - len(self.normalized_shape)).flatten(0, -2)

    def extra_repr(self) -> str:
        return f"{self.groups} x {self.normalized_shape}, eps={self.eps}"


def _launch(norm: GroupedLayerNorm, x: Tensor, kernels: Kernels) -> Tensor | None:
    """The networks are groups of an image to the kernels; only where all of an image's values are normalised."""
    k, sizes = norm.groups, norm.normalized_shape
    values = x.numel() // (len(x) * k)                                                      # of an image of a network
    if (norm.weight is None) != (norm.bias is None) or x.shape[1] % k: return None
    if sizes is None: return None if norm.shape else fast.group_norm(norm, x, kernels, len(x), k, values)
    if (x.shape[1] // k, *x.shape[2:]) != sizes: return None
    return fast.group_norm(norm, x, kernels, len(x), k, 1)


fast.register(GroupedLayerNorm, _launch)


class PerImage(nn.Module):
    """A layer that treats every image by itself and keeps nothing, on K networks' images at once.

    The images of all networks go through it as one batch: `(N, K C, *)` as `(N K, C, *)`, and back.

    Args:
        layer: the layer.
        groups: K.
    """

    def __init__(self, layer: nn.Module, groups: int) -> None:
        super().__init__()
        self.layer, self.groups = layer, groups

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.unflatten(1, (self.groups, -1)).flatten(0, 1))
        return y.reshape(len(x), self.groups * y.shape[1] if y.ndim > 1 else self.groups, *y.shape[2:])
