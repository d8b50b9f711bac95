"""The checks of what a norm keeps from step to step."""

import copy
import io

import torch

from norms.testing.case import Case, Checks, NotForThisNorm, agree, finite, mode, state, step

check = Checks()


@check("deepcopy after a training step")
def deepcopies(case: Case) -> None:
    norm = case.make(2)
    alive = norm(case.x(1).requires_grad_())    # with its graph: a copy may be taken before the backward
    twin = copy.deepcopy(norm)
    alive.sum().backward()
    before = state(norm)
    got = step(twin, case.x(2))
    agree(state(norm), before, "after a step of its copy")
    agree(got, step(norm, case.x(2)), "in the copy")
    agree(step(twin.eval(), case.x(3)), step(norm.eval(), case.x(3)), "in the copy, in evaluation")


@check("state dict round trip in mid-training continues bit for bit")
def state_dict_round_trip(case: Case) -> None:
    norm, other = case.make(5), case.make(shift=1.0)
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=False))
    for seed, training in enumerate((True, True, False, True, True, False)):
        got, want = (step(m.train(training), case.x(seed)) for m in (other, norm))
        agree(got, want, f"after load_state_dict, step {seed + 1}, {mode(training)}")
    agree(state(other), state(norm), "after load_state_dict and 4 more steps")


@check("evaluation before training is finite")
def untrained_evaluation(case: Case) -> None:
    finite(step(case.make().eval(), case.x(1)), "in evaluation before any training")


@check("evaluation leaves the state alone and repeats itself")
def evaluation_is_pure(case: Case) -> None:
    norm = case.make(2).eval()
    before = state(norm)
    first = step(norm, case.x(1))
    agree(state(norm), before, "after an evaluation")
    agree(step(norm, case.x(1)), first, "in a second evaluation of the same input")


@check("evaluation uses the current affine weights")
def current_weights(case: Case) -> None:
    # The statistics don't depend on the affine weights: a norm that had the new ones all along gives what is due.
    norm, want = case.make(2).eval(), case.make(2, shift=1.0).eval()
    if not any(True for _ in norm.parameters()): raise NotForThisNorm("it has no parameters")
    for m in (norm, want): m(case.x(1))
    with torch.no_grad():
        for p, q in zip(norm.parameters(), want.parameters(), strict=True): p.copy_(q)
    agree(step(norm, case.x(2)), step(want, case.x(2)), "after the weights changed", 1e-6)
