"""The layers of a `stack`: convolutions, linear layers and layer norms of K networks side by side.

Everywhere the networks lie along axis 1: `(N, K C, *spatial)` are the maps of K networks with C channels each, network
after network, and `(N, K F)` their features.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norms import LayerNorm, RunningBatchNorm, fast
from norms.fast.dispatch import bare, plain
from norms.fast.kernels import Kernels, channels_last
from norms.moments import Norm, moments, scale_shift, wide

# How a convolution of K networks' batches of few images is computed: by its patches where there are fewer positions
# than channels, and by oneDNN's otherwise. Measured on one thread of an AMD EPYC (AVX2), float32, channels last, while
# other work ran, so it is the ratios that count: milliseconds of processor time for the forward and the backward pass
# of the K convolutions. "Positions" are those of the output, of all images of the batch.
#
#       channels    map     K   images  positions   by patches  oneDNN's    torch's own
#       16 to 32    7 to 4  24  2       32          .69         .58         .89
#       32 to 64    4 to 2  24  2       8           .77         1.09        1.03
#       32 to 64    4 to 2  24  8       32          3.3         3.0         3.2
#       64 to 64    2 to 1  24  2       2           .79         2.96        1.26
#       64 to 64    2 to 1  24  8       8           1.5         4.1         2.5
#       16 to 16    32      5   2       2048        4.1         1.7         3.8
#       64 to 64    8       5   2       128         2.4         2.1         2.1
#       64 to 64    8       5   1       64          1.2         1.1         1.7
#       128 to 128  4       5   2       32          2.2         3.7         3.4
#       128 to 128  4       5   8       128         7.6         7.8         10.8
#       64 to 128   8 to 4  5   2       32          1.55        1.83        1.40
#
# oneDNN's gradient of many weights is what is slow channels last; torch's own goes through the groups one by one. By
# patches the weights' gradient is one product of K matrices, but patches of many positions are much to copy. From 9
# images on it is torch's convolutions as they are: at 16 images oneDNN's take a third of torch's own.
FEW_IMAGES = 8


def by_patches(images: int, positions: int, channels: int) -> bool:
    """Whether a convolution of networks side by side goes by its patches and not by oneDNN: by rule, see above.

    `images` are the batch's, `positions` those of its output, of all images, `channels` those that each group of the
    convolution gets.
    """
    return images <= FEW_IMAGES and 0 < positions < channels


class GroupedConv2d(nn.Conv2d):
    """`nn.Conv2d` that computes batches of few images on a CPU in the faster way, and channels last.

    Where oneDNN is switched off, `torch.backends.mkldnn.enabled`, or `by_rule` is False, it is torch's throughout.
    """

    by_rule = True

    # What `nn.Conv2d.forward` calls with its own weight, and classes that convolve by another with that.
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) == 1 and x.ndim == 4:
            # The stride of one image's batch axis may be anything, and with some, torch's own convolutions in groups
            # give a wrong gradient of weights that are channels last (seen with torch 2.14).
            last = x.is_contiguous(memory_format=torch.channels_last)
            x = x.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
        if not (self.by_rule and x.ndim == 4 and len(x) <= FEW_IMAGES and self.padding_mode == "zeros"
                and type(self.padding) is tuple and torch.backends.mkldnn.enabled and plain(x)
                and not torch.is_autocast_enabled("cpu")):
            y: Tensor = super()._conv_forward(x, weight, bias)
            return y
        x = x.contiguous(memory_format=torch.channels_last)
        out = sizes_out(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation)
        if x.shape[1] != self.in_channels or not by_patches(len(x), len(x) * math.prod(out), weight.shape[1]):
            y = super()._conv_forward(x, weight, bias)
        else: y = _ByPatches.apply(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return y


def sizes_out(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
              dilation: Sequence[int]) -> list[int]:
    """The height and width of what a convolution gives; 0 where its kernel is too large, which torch refuses."""
    return [max(0, (size + 2 * p - d * (ks - 1) - 1) // s + 1)
            for size, ks, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)]


class _ByPatches(torch.autograd.Function):
    """A convolution in K groups as a product of K matrices: of what the kernel sees at each position, and the weights.

    The gradient of the weights is such a product too, and that of x where there is but one position.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
                padding: tuple[int, int], dilation: tuple[int, int], k: int) -> Tensor:
        n, (no, c, kh, kw) = len(x), weight.shape
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))   # (N, H, W, K C)
        down, along = padded.stride()[1:3]
        oh, ow = sizes_out(x.shape[2:], (kh, kw), stride, padding, dilation)
        kernel = {"kh": (kh, dilation[0] * down), "kw": (kw, dilation[1] * along), "c": (c, 1)}
        last = channels_last(weight)
        order = ("kh", "kw", "c") if last else ("c", "kh", "kw")
        sizes, strides = zip((k, c), (n, padded.stride(0)), (oh, stride[0] * down), (ow, stride[1] * along),
                             *(kernel[name] for name in order), strict=True)
        patches = padded.as_strided(sizes, strides).reshape(k, n * oh * ow, -1)                 # (K, N oh ow, kh kw C)
        rows = _rows(weight, k, last).transpose(1, 2)                                           # (K, kh kw C, no)
        y = torch.bmm(patches, rows) if bias is None else torch.baddbmm(bias.view(k, 1, -1), patches, rows)
        ctx.save_for_backward(x, weight, patches)
        ctx.settings, ctx.last, ctx.biases = (stride, padding, dilation, k), last, None if bias is None else [no]
        return y.transpose(0, 1).reshape(n, oh, ow, no).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, patches = ctx.saved_tensors
        stride, padding, dilation, k = ctx.settings
        wanted, none = list(ctx.needs_input_grad[:3]), (None,) * 4

        def by_torch(*wanted: bool) -> Any:
            return torch.ops.aten.convolution_backward(g, x, weight, ctx.biases, stride, padding, dilation, False,
                                                       [0, 0], k, wanted)
        # A gradient that will be differentiated in turn, many in one, or an x that came back as something else.
        if torch.is_grad_enabled() or not bare(g, x): return *by_torch(*wanted), *none
        (n, nc, h, w), (no, c, kh, kw), gx, gw, gb = x.shape, weight.shape, None, None, None
        flat = g.permute(0, 2, 3, 1).reshape(-1, k, no // k)                                    # (N oh ow, K, no)
        if wanted[0]:
            if g.shape[2:] == (1, 1) and dilation == (1, 1):
                seen = torch.bmm(flat.transpose(0, 1), _rows(weight, k, ctx.last))              # (K, N, kh kw C)
                seen = seen.view(k, n, kh, kw, c) if ctx.last else seen.view(k, n, c, kh, kw).permute(0, 1, 3, 4, 2)
                within = seen[:, :, padding[0]:padding[0] + h, padding[1]:padding[1] + w]
                gx = within.permute(1, 2, 3, 0, 4).reshape(n, *within.shape[2:4], nc)
                # what no kernel has seen, below and to the right
                if gx.shape[1:3] != (h, w): gx = F.pad(gx, (0, 0, 0, w - gx.shape[2], 0, h - gx.shape[1]))
                gx = gx.permute(0, 3, 1, 2)
            else: gx = by_torch(True, False, False)[0]
        if wanted[1]:
            gw = torch.bmm(flat.permute(1, 2, 0), patches)                                      # (K, no, kh kw C)
            gw = gw.view(no, kh, kw, c).permute(0, 3, 1, 2) if ctx.last else gw.view(weight.shape)
        if wanted[2]: gb = flat.sum(0).flatten()
        return gx, gw, gb, *none


def _rows(weight: Tensor, k: int, last: bool) -> Tensor:
    """`weight` `(K no, C, kh, kw)` as `(K, no, kh kw C)`, or if it isn't channels `last` `(K, no, C kh kw)`."""
    return (weight.permute(0, 2, 3, 1) if last else weight).view(k, len(weight) // k, -1)


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
        return scale_shift(centred, var, self.eps, weight, bias).reshape(x.shape).to(x.dtype)

    def statistic_groups(self, x: Tensor) -> Tensor:
        if self.normalized_shape is None: return x.reshape(len(x) * self.groups, -1)        # (N K, C * positions)
        return x.reshape(-1, math.prod(self.normalized_shape))                              # (vectors, values)

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


class KeepApart:
    """Leaves the averages of `norm`'s backward to the other networks where one of K side by side has diverged.

    A gradient with a value that is not finite is not averaged, and `norm` is one for all K. So it gets 0 for the maps
    and the gradients of a network with such values, and that network gets NaN from it, both ways, as it would alone.
    """

    def __init__(self, norm: RunningBatchNorm, groups: int) -> None:
        self.groups = groups
        self.spoilt: Tensor | None = None           # (K C, 1, ...), the channels of networks that have diverged
        norm.register_forward_pre_hook(self.before)
        norm.register_forward_hook(self.after)

    def look(self, x: Tensor) -> Tensor | None:
        """Which channels `x` are of a network with a value that is not finite; None if all are finite."""
        if math.isfinite(x.detach().sum().item()): return None      # what overflows here is looked at in full
        each = x.unflatten(1, (self.groups, -1)).isfinite().flatten(2).all(2).all(0)            # (K,)
        spoilt: Tensor = ~each.repeat_interleave(x.shape[1] // self.groups)                     # (K C,)
        return spoilt.view(-1, *[1] * (x.ndim - 2))

    def before(self, norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        (x,) = args
        self.spoilt = self.look(x) if norm.training else None
        if norm.training and x.requires_grad: x.register_hook(self.spoil)
        return None if self.spoilt is None else (x.masked_fill(self.spoilt, 0),)

    def after(self, norm: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor | None:
        if not (norm.training and y.requires_grad): return None
        y.register_hook(self.backward)
        return self.spoil(y)

    def spoil(self, t: Tensor) -> Tensor | None:
        return None if self.spoilt is None else t.masked_fill(self.spoilt, math.nan)

    def backward(self, g: Tensor) -> Tensor | None:
        spoilt = self.look(g)
        if spoilt is None: return None
        self.spoilt = spoilt if self.spoilt is None else spoilt | self.spoilt
        return g.masked_fill(self.spoilt, 0)
