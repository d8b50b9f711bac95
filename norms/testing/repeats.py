"""The checks of a norm whose forward pass a backward pass does again: activation checkpointing."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from norms.testing.case import Checks, agree, state, step

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
