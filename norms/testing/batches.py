"""The checks of batches that are small, ragged, empty, or hold a NaN."""

import torch

from norms.testing.case import OUT, Checks, NotForThisNorm, draw, finite, refused, state, step

check = Checks()


@check("one image")
def one_image(case):
    if case.rank == 2: raise NotForThisNorm("an image of 2-D input is one element per channel, the next check")
    norm = case.make()
    for seed in range(3): finite(step(norm, case.x(seed, n=1)), f"in training, step {seed + 1}")
    finite(step(norm.eval(), case.x(3, n=1)), "in evaluation")


@check("one element per channel")
def one_element(case):
    for rank in case.dims:
        norm = case.make()
        for seed in range(3): finite(step(norm, draw((1, case.nf, *[1] * (rank - 2)), seed)), f"on {rank}-D input")
        finite(step(norm.eval(), case.x(3)), f"in evaluation after {rank}-D input")


@check("ragged batches")
def ragged(case):
    norm = case.make()
    for seed, n in enumerate((4, 2, 5, 8, 3)):
        x = case.x(seed, n)
        result = step(norm, x)
        if result[OUT].shape != x.shape: raise AssertionError(f"{n} images gave {tuple(result[OUT].shape)}")
        finite(result, f"on {n} images")
    finite(step(norm.eval(), case.x(9, 7)), "in evaluation")


@check("an empty batch is refused in training")
def empty_batch(case): refused(case, case.x(1, n=0), r"empty|\b0\b|no values", modes=(True,))


@check("NaN input comes out as NaN")
def nan_input(case):
    # A norm that makes a number of it hides a diverged run; one that raises stops a run that skips such steps.
    norm, x, first = case.make(2), case.x(1), (0,) * case.rank
    x[first] = torch.nan
    y = step(norm, x)[OUT]
    if not y[first].isnan(): raise AssertionError(f"a NaN went in and {y[first].item():.3g} came out of its place")
    norm.eval()(case.x(2))
    kept = [k for k, v in state(norm).items() if v.is_floating_point() and v.isnan().any()]
    return f"{y.isnan().sum()} of {y.numel()} outputs" + (f"; it stays in {', '.join(kept)}" if kept else "")
