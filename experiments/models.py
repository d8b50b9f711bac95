"""The lesson's networks, built from pluggable conv layers (fastai part 2 v3, notebooks 06 and 07)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from runner import SGD, Callback, DataBunch, Learner, Runner, listify

CHANNELS = [8, 16, 32, 64, 64]      # of the five conv layers of the lesson's network

NormFactory = Callable[[int], nn.Module]        # makes a norm for so many channels
Cb = Callback | Callable[[], Callback]          # a callback, or what makes one
M = TypeVar("M", bound=nn.Module)


class HasClasses(Protocol):
    """Data with `c` classes, such as a `DataBunch`."""

    @property
    def c(self) -> int | None: ...


class GeneralRelu(nn.Module):
    """`min(leaky_relu(x, leak) - sub, maxv)`; each part is left out where its argument is None."""

    def __init__(self, leak: float | None = None, sub: float | None = None, maxv: float | None = None) -> None:
        super().__init__()
        self.leak, self.sub, self.maxv = leak, sub, maxv

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x) if self.leak is None else F.leaky_relu(x, self.leak)
        if self.sub is not None: x = x - self.sub
        if self.maxv is not None: x = x.clamp_max(self.maxv)
        return x

    def extra_repr(self) -> str:
        return f"leak={self.leak}, sub={self.sub}, maxv={self.maxv}"


class Lambda(nn.Module):
    """A module that calls `func`."""

    def __init__(self, func: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.func = func

    def forward(self, x: Tensor) -> Tensor: return self.func(x)

    def extra_repr(self) -> str: return str(getattr(self.func, "__name__", repr(self.func)))


def flatten(x: Tensor) -> Tensor:
    """`(N, ...)` to `(N, product of the rest)`."""
    return x.view(x.shape[0], -1)


class AvgPool(nn.AdaptiveAvgPool2d):
    """The mean over all positions, `(N, C, H, W)` to `(N, C, 1, 1)`.

    A map of one position is handed on as it is. torch would sum and divide it, in 3 % of a step at batch size 2.
    """

    def __init__(self) -> None: super().__init__(1)

    def forward(self, x: Tensor) -> Tensor: return x if x.shape[-2:] == (1, 1) else super().forward(x)


def make_norm(norm: NormFactory, nf: int, who: str) -> nn.Module:
    """`norm(nf)`, for the function called `who`.

    Raises:
        TypeError: a `norm` that is no callable that makes a module.
    """
    layer = norm(nf) if callable(norm) and not isinstance(norm, nn.Module) else None
    if isinstance(layer, nn.Module): return layer
    raise TypeError(f"{who} got norm={norm!r}; it needs a callable that makes a module from a channel count, such as "
                    "norms.BatchNorm or lambda nf: GroupNorm(4, nf)")


def conv_layer(ni: int, nf: int, ks: int = 3, stride: int = 2, norm: NormFactory | None = None,
               conv: Callable[..., nn.Module] = nn.Conv2d, **kwargs: float | None) -> nn.Sequential:
    """Convolution, `GeneralRelu`, then the norm: `(N, ni, H, W)` to `(N, nf, ceil(H / stride), ceil(W / stride))`.

    No `GeneralRelu` where the norm is one that holds its own activation (it has `activates`).

    Args:
        ni, nf: channels in and out.
        ks, stride: kernel size and stride; the padding is `ks // 2`.
        norm: any callable from a channel count to a module, such as `norms.BatchNorm`, `nn.BatchNorm2d` or
            `lambda nf: GroupNorm(4, nf)`; None for no norm. The convolution has a bias only without one.
        conv: the class of the convolution.
        **kwargs: for `GeneralRelu`.

    Raises:
        TypeError: a `norm` that is not such a callable.
    """
    layers: list[nn.Module] = [conv(ni, nf, ks, padding=ks // 2, stride=stride, bias=norm is None)]
    layer = None if norm is None else make_norm(norm, nf, "conv_layer")
    if not getattr(layer, "activates", False): layers.append(GeneralRelu(**kwargs))
    if layer is not None: layers.append(layer)
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """`body(x) + shortcut(x)`, two modules whose results broadcast; without a shortcut `body(x) + x`."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        shortcut: Tensor = self.shortcut(x)
        return y + shortcut


class ResidualBlock(nn.Module):
    """`x + f(x)`, f two 3x3 convolutions of stride 2 without bias, each with a norm and leaky ReLU.

    f's map has a quarter of x's height and width, rounded up, and must have one position, for the sum to broadcast:
    `(N, nf, H, W)` in and out, H and W up to 4.
    """

    def __init__(self, nf: int, norm: NormFactory) -> None:
        super().__init__()
        self.f = nn.Sequential(*(layer for _ in range(2) for layer in (
            nn.Conv2d(nf, nf, 3, stride=2, padding=1, bias=False), norm(nf), nn.LeakyReLU())))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.f(x)
        return x + change


def get_cnn_layers(data: HasClasses, nfs: Sequence[int], layer: Callable[..., nn.Module],
                   **kwargs: Any) -> list[nn.Module]:
    """Conv layers with the channels `nfs` from one input channel, kernel 5 first and 3 after, then pool and linear.

    `layer(ni, nf, ks, **kwargs)` makes each; `data.c` is the number of classes.

    Raises:
        ValueError: data whose `c` is None.
    """
    if data.c is None:
        raise ValueError("get_cnn_layers got data whose number of classes, c, is None; give it, as in "
                         "DataBunch(train_dl, valid_dl, 10)")
    nfs = [1, *nfs]
    return [layer(nfs[i], nfs[i + 1], 5 if i == 0 else 3, **kwargs) for i in range(len(nfs) - 1)] + [
        AvgPool(), Lambda(flatten), nn.Linear(nfs[-1], data.c)]


def get_cnn_model(data: HasClasses, nfs: Sequence[int], layer: Callable[..., nn.Module],
                  **kwargs: Any) -> nn.Sequential:
    """`get_cnn_layers` as one `nn.Sequential`: `(N, 1, H, W)` to `(N, data.c)`."""
    return nn.Sequential(*get_cnn_layers(data, nfs, layer, **kwargs))


def init_cnn_(m: nn.Module, f: Callable[..., Tensor]) -> None:
    """Initialise the weight of every convolution in the tree under `m` by `f(weight, a=0.1)`; biases 0."""
    for conv in m.modules():
        if isinstance(conv, nn.Conv2d):
            f(conv.weight, a=0.1)
            if conv.bias is not None: nn.init.zeros_(conv.bias)


def init_cnn(m: nn.Module, uniform: bool = False) -> None:
    """`init_cnn_` with Kaiming initialisation, normal or uniform."""
    init_cnn_(m, nn.init.kaiming_uniform_ if uniform else nn.init.kaiming_normal_)


def init_alike(model: nn.Module, seed: int) -> None:
    """Initialise all convolutions and linear layers from `seed` alone, whatever stands between them.

    Two networks that differ in their norms get the same weights. Made by their constructors they would not: a
    convolution with a bias draws more random numbers than one without.
    """
    torch.manual_seed(seed)
    init_cnn(model)
    for m in model.modules():
        if isinstance(m, nn.Linear): m.reset_parameters()


def channels_last_(model: M) -> M:
    """Lay out the weights of the convolutions in `model` as `(out, H, W, in)`; returns the model.

    The maps between take the layout over. On a CPU torch's own convolutions take about half the time so in batches of
    up to 8, where they are faster than oneDNN's. With one input channel they would be slower, and are left alone.
    """
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.shape[1] > 1:
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)
    return model


def get_runner(model: nn.Module, data: DataBunch, lr: float = 0.6, cbs: Cb | Iterable[Cb] | None = None,
               opt_func: Callable[..., optim.Optimizer] | None = None,
               loss_func: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, *,
               compile: bool = False) -> tuple[Learner, Runner]:
    """A learner and a runner: `(learn, run)`.

    Args:
        model, data: what to train and a `DataBunch`.
        lr: learning rate.
        cbs: callbacks, or functions that make them (the lesson's way), mixed at will.
        opt_func: `opt_func(parameters, lr=lr)` makes the optimizer; `runner.SGD` if None.
        loss_func: `f(pred, yb)`.
        compile: whether the runner compiles its steps.
    """
    made = [cb if isinstance(cb, Callback) else cb() for cb in listify(cbs)]
    opt = (opt_func or SGD)(model.parameters(), lr=lr)
    return Learner(model, opt, loss_func, data), Runner(cbs=made, compile=compile)


def get_learn_run(nfs: Sequence[int], data: DataBunch, lr: float, layer: Callable[..., nn.Module],
                  cbs: Cb | Iterable[Cb] | None = None, opt_func: Callable[..., optim.Optimizer] | None = None,
                  uniform: bool = False, *, compile: bool = False, **kwargs: Any) -> tuple[Learner, Runner]:
    """`get_cnn_model`, `init_cnn` and `get_runner` in one: `(learn, run)`. `**kwargs` go to `layer`."""
    model = get_cnn_model(data, nfs, layer, **kwargs)
    init_cnn(model, uniform=uniform)
    return get_runner(model, data, lr=lr, cbs=cbs, opt_func=opt_func, compile=compile)
