"""The checks of a norm whose forward pass a backward pass does again: activation checkpointing."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from norms.testing.case import GRAD, OUT, Checks, agree, buffers, draw, state, step

check = Checks()


def checkpointed(case):
    """Two norms after the same step, the first with its forward recomputed in the backward, and what the steps gave."""
    recomputed, plain = case.make(2), case.make(2)
    got = step(recomputed, case.x(1), partial(checkpoint, recomputed, use_reentrant=False))
    return recomputed, plain, got, step(plain, case.x(1))


@check("activation checkpointing counts a batch once")
def checkpointing_counts_once(case):
    recomputed, plain, *_ = checkpointed(case)
    # Not bit for bit: a norm may take other kernels where a forward pass will be done again.
    agree(state(recomputed), state(plain), "after a recomputed forward", 1e-5)
    agree(step(recomputed.eval(), case.x(2)), step(plain.eval(), case.x(2)), "in evaluation after a recomputed forward",
          1e-5)


@check("activation checkpointing keeps the gradient")
def checkpointing_keeps_gradient(case):
    *_, got, want = checkpointed(case)
    agree(got, want, "under checkpointing", 1e-5)


# use_reentrant of the checkpoint around the norm, and of one around that
KINDS, NESTED = ([False], [True]), ([False, False], [True, True], [False, True], [True, False])


def wrapped(norm, kind):
    for reentrant in kind: norm = partial(checkpoint, norm, use_reentrant=reentrant)
    return norm


def run(norm, call, xs, order):
    """Forwards of `xs` by `call`, then their backwards in `order`: all outputs, gradients and the state, by name."""
    xs = [x.detach().requires_grad_() for x in xs]
    ys = [call(x) for x in xs]
    for i in order: (ys[i] * draw(ys[i].shape, 99).to(ys[i])).sum().backward()
    found = {**{f"{OUT} of batch {i + 1}": y.detach() for i, y in enumerate(ys)},
             **{f"{GRAD} of batch {i + 1}": x.grad for i, x in enumerate(xs)},
             **{f"the gradient of {k}": p.grad for k, p in norm.named_parameters()}, **buffers(norm), **state(norm)}
    # what is not finite must be so in the same places
    return {k: t.nan_to_num(-7, 8, -8) if t.is_floating_point() else t for k, t in found.items() if t is not None}


def repeats(case, xs, orders, when, kinds=KINDS):
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
def checkpointing_nan(case):
    x = case.x(1)
    x[(0,) * case.rank] = torch.nan
    repeats(case, [case.x(2), x, case.x(3)], [(0, 1, 2), (2, 1, 0)], "with a NaN in the second of three batches")


@check("activation checkpointing of the same batch twice")
def checkpointing_twins(case):
    # bit for bit the same, met in different states
    repeats(case, [case.x(1), case.x(2, mean=3), case.x(1)], [(0, 1, 2), (2, 1, 0)], "where a batch comes twice")


@check("activation checkpointing of 20 batches before their backwards")
def checkpointing_many(case):
    order = torch.randperm(20, generator=torch.Generator("cpu").manual_seed(1), device="cpu").tolist()
    repeats(case, [case.x(seed) for seed in range(20)], [order], "with 20 batches and their backwards shuffled")


@check("activation checkpointing within activation checkpointing")
def checkpointing_nested(case): repeats(case, [case.x(1), case.x(2)], [(0, 1), (1, 0)], "nested", NESTED)
