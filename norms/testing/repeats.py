"""The checks of a norm whose forward pass a backward pass does again: activation checkpointing."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from norms.testing.case import GRAD, OUT, Case, Checks, Tensors, agree, buffers, draw, state, step

check = Checks()


def checkpointed(case: Case) -> tuple[nn.Module, nn.Module, Tensors, Tensors]:
    """Two norms after the same step, the first with its forward recomputed in the backward, and what the steps gave."""
    recomputed, plain = case.make(2), case.make(2)
    got = step(recomputed, case.x(1), partial(checkpoint, recomputed, use_reentrant=False))
    return recomputed, plain, got, step(plain, case.x(1))


@check("activation checkpointing counts a batch once")
def checkpointing_counts_once(case: Case) -> None:
    recomputed, plain, *_ = checkpointed(case)
    # Not bit for bit: a norm may take other kernels where a forward pass will be done again.
    agree(state(recomputed), state(plain), "after a recomputed forward", 1e-5)
    agree(step(recomputed.eval(), case.x(2)), step(plain.eval(), case.x(2)), "in evaluation after a recomputed forward",
          1e-5)


@check("activation checkpointing keeps the gradient")
def checkpointing_keeps_gradient(case: Case) -> None:
    *_, got, want = checkpointed(case)
    agree(got, want, "under checkpointing", 1e-5)


# use_reentrant of the checkpoint around the norm, and of one around that
KINDS, NESTED = ([False], [True]), ([False, False], [True, True], [False, True], [True, False])


def wrapped(norm: nn.Module, kind: Sequence[bool]) -> Callable[[Tensor], Tensor]:
    call: Callable[[Tensor], Tensor] = norm
    for reentrant in kind: call = partial(checkpoint, call, use_reentrant=reentrant)
    return call


def run(norm: nn.Module, call: Callable[[Tensor], Tensor], xs: Sequence[Tensor], order: Sequence[int]) -> Tensors:
    """Forwards of `xs` by `call`, then their backwards in `order`: all outputs, gradients and the state, by name."""
    xs = [x.detach().requires_grad_() for x in xs]
    ys = [call(x) for x in xs]
    for i in order: (ys[i] * draw(ys[i].shape, 99).to(ys[i])).sum().backward()
    found = {**{f"{OUT} of batch {i + 1}": y.detach() for i, y in enumerate(ys)},
             **{f"{GRAD} of batch {i + 1}": x.grad for i, x in enumerate(xs)},
             **{f"the gradient of {k}": p.grad for k, p in norm.named_parameters()}, **buffers(norm), **state(norm)}
    # what is not finite must be so in the same places
    return {k: t.nan_to_num(-7, 8, -8) if t.is_floating_point() else t for k, t in found.items() if t is not None}


def repeats(case: Case, xs: Sequence[Tensor], orders: Sequence[Sequence[int]], when: str,
            kinds: Sequence[Sequence[bool]] = KINDS) -> None:
    """Raise unless checkpointed forwards of `xs`, with their backwards in any of the `orders`, are as plain ones."""
    for order in orders:
        plain = case.make(2)
        want = run(plain, plain, xs, order)
        for kind in kinds:
            norm, words = case.make(2), " in ".join("use_reentrant=" + str(k) for k in kind)
            try: got = run(norm, wrapped(norm, kind), xs, order)
            except Exception as e: raise AssertionError(f"{type(e).__name__} {when}, {words}: {e}") from e
            agree(got, want, f"{when}, {words}", 1e-5)


@check("activation checkpointing of a batch that is not finite")
def checkpointing_nan(case: Case) -> None:
    x = case.x(1)
    x[(0,) * case.rank] = torch.nan
    repeats(case, [case.x(2), x, case.x(3)], [(0, 1, 2), (2, 1, 0)], "with a NaN in the second of three batches")


@check("activation checkpointing of the same batch twice")
def checkpointing_twins(case: Case) -> None:
    # bit for bit the same, met in different states
    repeats(case, [case.x(1), case.x(2, mean=3), case.x(1)], [(0, 1, 2), (2, 1, 0)], "where a batch comes twice")


@check("activation checkpointing of 20 batches before their backwards")
def checkpointing_many(case: Case) -> None:
    order = torch.randperm(20, generator=torch.Generator("cpu").manual_seed(1), device="cpu").tolist()
    repeats(case, [case.x(seed) for seed in range(20)], [order], "with 20 batches and their backwards shuffled")


@check("activation checkpointing within activation checkpointing")
def checkpointing_nested(case: Case) -> None: repeats(case, [case.x(1), case.x(2)], [(0, 1), (1, 0)], "nested", NESTED)
