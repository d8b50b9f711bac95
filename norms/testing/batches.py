"""The checks of batches that are small, ragged, empty, or hold a NaN."""

import torch
from torch import Tensor

from norms.testing.case import (
    GRAD,
    OUT,
    Case,
    Checks,
    NotForThisNorm,
    agree,
    buffers,
    draw,
    finite,
    mode,
    refused,
    state,
    step,
)

check = Checks()


@check("one image")
def one_image(case: Case) -> None:
    if case.rank == 2: raise NotForThisNorm("an image of 2-D input is one element per channel, the next check")
    norm = case.make()
    for seed in range(3): finite(step(norm, case.x(seed, n=1)), f"in training, step {seed + 1}")
    finite(step(norm.eval(), case.x(3, n=1)), "in evaluation")


@check("one element per channel")
def one_element(case: Case) -> None:
    for rank in case.dims:
        norm = case.make()
        for seed in range(3): finite(step(norm, draw((1, case.nf, *[1] * (rank - 2)), seed)), f"on {rank}-D input")
        finite(step(norm.eval(), case.x(3)), f"in evaluation after {rank}-D input")


@check("ragged batches")
def ragged(case: Case) -> None:
    norm = case.make()
    for seed, n in enumerate((4, 2, 5, 8, 3)):
        x = case.x(seed, n)
        result = step(norm, x)
        if result[OUT].shape != x.shape: raise AssertionError(f"{n} images gave {tuple(result[OUT].shape)}")
        finite(result, f"on {n} images")
    finite(step(norm.eval(), case.x(9, 7)), "in evaluation")


@check("an empty batch is refused in training")
def empty_batch(case: Case) -> None:
    # Where each image is normalised by itself, none is no matter: a process may have no share of a ragged batch.
    norm, x = case.make(2), case.x(1)
    others = torch.cat((x[:1], x[1:] + 1))
    if torch.equal(norm(x)[0], case.make(2)(others)[0]):
        norm, before = case.make(2), state(norm)
        try: y = step(norm, case.x(1, n=0))[OUT]
        except ValueError: pass
        else:
            if y.shape != case.shape(0): raise AssertionError(f"no images gave an output of shape {tuple(y.shape)}")
            agree(state(norm), before, "after a batch of no images")
            raise NotForThisNorm("it normalises each image by itself, so no images come out as none")
    refused(case, case.x(1, n=0), r"empty|\b0\b|no values", modes=(True,))


@check("NaN input comes out as NaN")
def nan_input(case: Case) -> str:
    # A norm that makes a number of it hides a diverged run; one that raises stops a run that skips such steps.
    norm, x, first = case.make(2), case.x(1), (0,) * case.rank
    x[first] = torch.nan
    y = step(norm, x)[OUT]
    if not y[first].isnan(): raise AssertionError(f"a NaN went in and {y[first].item():.3g} came out of its place")
    norm.eval()(case.x(2))
    kept = [k for k, v in state(norm).items() if v.is_floating_point() and v.isnan().any()]
    return f"{y.isnan().sum()} of {y.numel()} outputs" + (f"; it stays in {', '.join(kept)}" if kept else "")


def apart(case: Case, training: bool, axis: int) -> bool:
    """Whether the norm keeps what stands along `axis` apart: found by a change of its first entry.

    It is no affine one, which a statistic of just these values would take away before another sees it.
    """
    x = case.x(1)
    first = x.select(axis, 0)
    first.mul_(first).mul_(3).add_(1)
    ys: list[Tensor] = [case.make(2).train(training)(t).detach() for t in (case.x(1), x)]
    before, after = (y.narrow(axis, 1, y.shape[axis] - 1) for y in ys)
    return torch.allclose(before, after, rtol=1e-5, atol=1e-5)


@check("what is not finite stays in its image or channel")
def stays_apart(case: Case) -> str:
    remark = ""
    for training in (True, False):
        axes = [axis for axis in (0, 1) if apart(case, training, axis)]
        if training:
            if not axes: raise NotForThisNorm("in training neither images nor channels are independent of each other")
            remark = "per " + " and ".join(("image", "channel")[axis] for axis in axes)
        for value in (torch.nan, torch.inf, -torch.inf):
            norm, x = case.make(2).train(training), case.x(1)
            x[(0,) * case.rank] = value
            result, when = step(norm, x), f"{mode(training)}, where only the first has a {value}"
            for axis in axes:
                where = "in other " + ("images", "channels")[axis]
                finite({f"{k} {where}": result[k].narrow(axis, 1, x.shape[axis] - 1) for k in (OUT, GRAD)}, when)
            if 1 not in axes: continue
            kept = {**buffers(norm), **{k: t for k, t in result.items() if k not in (OUT, GRAD)}}
            finite({f"{k} in other channels": t.flatten()[1:] if t.numel() == case.nf else t.new_zeros(())
                    for k, t in kept.items()}, when)
    return remark
