"""The checks of a norm's buffers: each is one tensor for good, which training writes in place."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from norms.testing.case import OUT, Case, Checks, NotForThisNorm, agree, buffers, in_place, places, state, step

check = Checks()


def guarded(norm: nn.Module, x: Tensor, guard: Callable[[], AbstractContextManager[object]]) -> None:
    with guard(): norm(x)


# steps that must leave a buffer where it is
STEPS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "a training step": step,
    "a step without gradients": partial(guarded, guard=torch.no_grad),
    "a step in inference_mode": partial(guarded, guard=torch.inference_mode),
    "a step on a non-contiguous input": lambda norm, x: step(norm, x.transpose(0, -1).contiguous().transpose(0, -1)),
    "a checkpointed step": lambda norm, x: step(norm, x, partial(checkpoint, norm, use_reentrant=False)),
    "a checkpointed step, reentrant":
        lambda norm, x: checkpoint(norm, x.requires_grad_(), use_reentrant=True).sum().backward(),
    "a step in shared memory": step,
    "a step on a half-precision input": lambda norm, x: step(norm, x.bfloat16())}


@check("buffers are written in place")
def written_in_place(case: Case) -> None:
    norm = case.make(2)
    before = buffers(norm)
    if not before: raise NotForThisNorm("it has no buffers")
    norm(case.x(1))
    moving = [k for k, b in buffers(norm).items() if not torch.equal(b, before[k])]
    for what, take in STEPS.items():
        norm = case.make(2)
        if "shared" in what: norm.share_memory()
        there = places(norm)
        try: take(norm, case.x(1))
        except Exception:
            if "half" not in what: raise
            continue                                    # another check says so
        in_place(norm, there, f"after {what}")
        still = [k for k, b in norm.named_buffers() if k in moving and torch.equal(b, before[k])]
        if still: raise AssertionError(f"{', '.join(still)} did not move in {what}")


@check("training in inference_mode leaves the norm as it should")
def after_inference_mode(case: Case) -> None:
    for what in ("training", "evaluation", "training after load_state_dict"):
        norm, twin = case.make(), case.make()           # new ones: they may set things up in their first forward
        for m, guard in ((norm, torch.inference_mode), (twin, torch.no_grad)):
            for seed in (1, 2): guarded(m, case.x(seed), guard)
            if "load" in what: m.load_state_dict(case.make(3).state_dict())
            m.train("training" in what)
        agree(step(norm, case.x(3)), step(twin, case.x(3)), f"in {what} after inference_mode", 1e-5)
        agree(state(norm), state(twin), f"after {what} after inference_mode", 1e-5)


@check("torch.export in training mode updates the buffers")
def exports_training(case: Case) -> None:
    norm, eager = case.make(2), case.make(2)
    before = buffers(norm)
    program = torch.export.export(nn.Sequential(norm), (case.x(1),)).module()
    agree(buffers(norm), before, "after torch.export")
    for seed in (1, 2, 3):
        got, want = ({OUT: f(case.x(seed)).detach()} for f in (program, eager))
        now, due = {k.removeprefix("0."): b for k, b in buffers(program).items()}, buffers(eager)
        still = [k for k, b in before.items() if torch.equal(now[k], b) and not torch.equal(due[k], b)]
        if still: raise AssertionError(f"{', '.join(still)} did not move in the exported program")
        agree(now, due, f"in the exported program after step {seed}", 1e-5)
        agree(got, want, f"of the exported program in step {seed}", 1e-4)
