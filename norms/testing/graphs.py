"""The checks of what a forward pass leaves to its backward pass."""

import torch

from norms.testing.case import Checks, agree, draw, step

check = Checks()


@check("two forwards, then one backward")
def two_forwards(case):
    norm, twin = case.make(2), case.make(2)
    xs = [case.x(seed).requires_grad_() for seed in (1, 2)]
    ys = [norm(x) for x in xs]
    loss = sum((y * draw(y.shape, 99).to(y)).sum() for y in ys)     # as `step` weighs it
    *got, = torch.autograd.grad(loss, [*xs, *norm.parameters()], allow_unused=True, materialize_grads=True)
    (_, first, *ps), (_, second, *qs) = (step(twin, x).values() for x in xs)
    want = [first, second, *(p + q for p, q in zip(ps, qs, strict=True))]
    names = ["the first input's gradient", "the second input's gradient", *(k for k, _ in norm.named_parameters())]
    agree(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)), "from two separate steps", 1e-4)
