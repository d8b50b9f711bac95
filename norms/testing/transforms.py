"""The checks of a norm under the compiler and the transforms of `torch.func`."""

import re

import torch
from torch import Tensor, nn
from torch.func import functional_call

from norms.testing.case import (
    GRAD,
    Case,
    Checks,
    NotForThisNorm,
    Tensors,
    agree,
    buffers,
    draw,
    in_place,
    mode,
    places,
    state,
    step,
)

check = Checks()


@check("torch.compile(fullgraph=True) compiles once")
def compiles_once(case: Case) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # here and not above: it takes two seconds
    norm, eager = case.make(), case.make()
    there = places(norm)
    counter = CompileCounterWithBackend("aot_eager")     # traces the backward too, and needs no C++ compiler
    torch.compiler.reset()
    try:
        compiled = torch.compile(norm, backend=counter, fullgraph=True)
        for training in (True, False):
            counter.frame_count = 0
            for m in (norm, eager): m.train(training)
            for seed in range(7):
                got = step(norm, case.x(seed), compiled)
                agree(got, step(eager, case.x(seed)), f"compiled, {mode(training)}", 1e-4)
            agree(state(norm), state(eager), f"after compiled steps {mode(training)}", 1e-5)
            in_place(norm, there, f"after compiled steps {mode(training)}")
            if counter.frame_count > 1:     # 0 in evaluation: a norm that ignores its mode needs no second graph
                raise AssertionError(f"compiled {counter.frame_count} times in 7 steps of one shape {mode(training)}; "
                                     "keep state that changes in tensors, not in Python numbers")
    finally: torch.compiler.reset()


def func_grad(norm: nn.Module, x: Tensor, *inputs: Tensors) -> Tensors:
    """The gradients of `step` by `torch.func.grad`, the buffers captured or handed in as inputs."""
    def loss(params: Tensors, x: Tensor, *inputs: Tensors) -> Tensor:
        y: Tensor = functional_call(norm, (params, *inputs), (x,))
        return (y * draw(y.shape, 99).to(y)).sum()
    grads, gx = torch.func.grad(loss, (0, 1))({k: p.detach() for k, p in norm.named_parameters()}, x, *inputs)
    return {GRAD: gx, **{f"the gradient of {k}": g for k, g in grads.items()}}


@check("torch.func.grad equals autograd")
def func_grad_of_parameters(case: Case) -> str | None:
    for training in (False, True):
        norm = case.make(2).train(training)
        before = state(norm)
        try: got = func_grad(norm, case.x(1))
        except RuntimeError as e:
            # Only this error is right: in training, a buffer would have to change, and the transform can't let it.
            if not training or not buffers(norm) or not re.search("in-?place|mutat|buffer|running", str(e)): raise
            agree(state(norm), before, "after torch.func.grad was refused")
            return "in training refused: a running buffer would change in place"
        want = step(case.make(2).train(training), case.x(1))
        agree(got, {k: want[k] for k in got}, mode(training), 1e-4)
    return None


@check("torch.func.grad with the buffers as inputs equals autograd")
def func_grad_of_buffers(case: Case) -> None:
    norm = case.make(2)
    if not buffers(norm): raise NotForThisNorm("it has no buffers")
    for training in (False, True):
        got = func_grad(norm.train(training), case.x(1), buffers(norm))
        want = step(case.make(2).train(training), case.x(1))
        agree(got, {k: want[k] for k in got}, mode(training), 1e-4)
