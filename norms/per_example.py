"""Batch norm written for one example: the batch's statistics come from a collective under `torch.func.vmap`.

`pmean`, called in a function of one example, averages over the axis that `vmap` maps, as `lax.pmean` does in JAX
(after JAX's `vmap_for_batch_norm`). It is an autograd Function whose vmap rule sees that axis and returns a result
without it. Three likelier forms look right and are not; the tests keep them (torch 2.15):

- without `allow_in_graph`, `torch.compile` follows `forward`, a copy, and leaves the mean out without a word (pytorch
  #186330); with it the call stands in the graph and its own rules resolve it;
- without `like`, `jacfwd` and `jacrev` inside the map average over their basis vectors without a word;
- a `torch.library.custom_op` with a vmap rule and `register_autograd` compiles, but `jvp` inside the map takes the
  statistics for constants without a word, and `grad` inside the map fails (pytorch #179652).

`allow_in_graph` loads the compiler, which takes a second, so `norms` doesn't import this module: write
`from norms.per_example import batch_norm, pmean`.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from norms.moments import wide


@torch.compiler.allow_in_graph
class _Mean(torch.autograd.Function):
    """The mean of `x` over the axis of the innermost map that maps `like`, unmapped; a copy where none does.

    It is linear and its own transpose. The derivatives hand `like` on, so that they average over the map that the
    value was averaged over, and not over one of their own.
    """

    @staticmethod
    def forward(x: Tensor, like: Tensor) -> Tensor: return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]: return _Mean.apply(g, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, _: Tensor | None) -> Tensor:
        mean: Tensor = _Mean.apply(t, *ctx.saved_tensors)
        return mean

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, like: Tensor) -> tuple[Tensor, int | None]:
        dim, like_dim = in_dims
        if like_dim is None: return _Mean.apply(x, like), dim       # a map of the basis vectors
        if info.batch_size == 0:
            raise ValueError("pmean got a map over no examples; a mean needs at least one: skip empty batches before "
                             "the map")
        return x if dim is None else x.mean(dim), None


@torch.compiler.allow_in_graph
class _MappedMean(_Mean):
    """`_Mean` that refuses what no map maps: only then does torch call `forward`."""

    @staticmethod
    def forward(x: Tensor, like: Tensor) -> NoReturn:
        raise ValueError(f"batch_norm got an x of {len(x)} channels that no torch.func.vmap maps; its statistics are "
                         "means over the mapped axis: call it inside torch.func.vmap(f)(xs), or use norms.BatchNorm "
                         "on a whole batch")


def pmean(x: Tensor) -> Tensor:
    """The mean of `x` over the mapped axis: the same for all examples, and itself not mapped.

        pmean(x) = 1/n sum_i x_i        x_i = x of example i, in a function that torch.func.vmap maps over n examples

    So it can leave the map once and not once per example: `vmap(f, out_dims=None)`. Derivatives of any order are
    those of the mean, however `grad`, `jvp`, `vmap` and `torch.compile` are nested. `grad` outside the map gives the
    batch's gradient. Inside it n examples differentiate at once and the cotangents are averaged too: what example i
    gets is the gradient of the **sum** of all losses along the paths through i, so over the batch these add up to the
    batch's gradient. `jvp` inside the map moves all examples at once.

    Limits:
        - In nested maps the innermost one that maps `x` is meant.
        - A value that no map maps, inside a map or outside all, is its own mean.
        - With `vmap(f, chunk_size=k)` every chunk is a batch of its own, and nothing here can see it. Let the mean
          leave the map by `out_dims=None`: then torch refuses to join the chunks.
        - torch refuses `out_dims=None` where an outer map maps the result, `torch.export`, and in most cases
          `torch.compile(fullgraph=True)` of `jacfwd` or `hessian` inside the map (`jacrev` it compiles).

    Args:
        x: floating-point.

    Shapes: any in, the same out.

    Raises:
        TypeError: an integer input.
        ValueError: a map over no examples.
    """
    check_float("pmean", x)
    mean: Tensor = _Mean.apply(x, x.new_empty(0))   # new_empty: no values, but mapped as x is
    return mean


def batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm (S. Ioffe, C. Szegedy, 2015) of one example, in a function that `torch.func.vmap` maps.

        y = (x - mean) / sqrt(var + eps) * gamma + beta
        mean = pmean(x)        var = pmean((x - mean)^2)        per channel: of the batch and all positions

    Mapped over a batch it equals the batched form, `norms.BatchNorm` in training, in values and all derivatives. JAX's
    original takes var = E[x^2] - E[x]^2: the same function at the same two collectives, but in float32 without
    a digit left where |mean| / std is large (see `norms.moments.moments`).

    The statistics come back beside y, unmapped, for the running averages that evaluation needs:

        f = torch.func.vmap(batch_norm, in_dims=(0, None, None), out_dims=(0, None, None))
        y, mean, var = f(xs, gamma, beta)

    Args:
        x: one example.
        gamma, beta: scale and shift per channel.
        eps: added to the variance; 1e-6 as in the original.

    Shapes: `x` and `y` `(C,)` or `(C, *spatial)`; `gamma`, `beta`, `mean`, `var` `(C,)`.

    Raises:
        ValueError: an `x` that is not mapped, is empty or doesn't fit `gamma` and `beta`; a map over no examples.
        TypeError: an integer input.
    """
    check_float("batch_norm", x)
    if x.ndim == 0 or x.numel() == 0 or not gamma.shape == beta.shape == x.shape[:1]:
        raise ValueError(f"batch_norm got one example of shape {tuple(x.shape)}, gamma {tuple(gamma.shape)} and beta "
                         f"{tuple(beta.shape)}; it needs (C,) or (C, *spatial), (C,) and (C,): map the batch axis by "
                         "torch.func.vmap, and give gamma and beta as many entries as axis 0 has channels")
    xs = wide(x).unsqueeze(-1).flatten(1)                           # (C, positions), float32 or wider
    mean = _MappedMean.apply(xs.mean(1), xs.new_empty(0))           # (C,), unmapped
    centred = xs - mean[:, None]
    var = pmean((centred * centred).mean(1))                        # (C,), unmapped
    # Out of place, unlike `scale_shift`: `jacfwd` may map beta and nothing else.
    y = centred * (gamma * torch.rsqrt(var + eps))[:, None] + beta[:, None]
    return y.reshape(x.shape).to(x.dtype), mean, var


def check_float(name: str, x: Tensor) -> None:
    """Raise unless `x`, which the function called `name` was given, is floating-point."""
    if not x.is_floating_point():
        raise TypeError(f"{name} got an input of {x.dtype}; it needs a floating-point one: convert it by x.float()")
