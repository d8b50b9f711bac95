"""The checks of what a norm computes: shapes, values, gradients, layouts of the input."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.func import functional_call

from norms.testing.case import GRAD, OUT, RANKS, Case, Checks, NotForThisNorm, agree, finite, mode, refused, step

check = Checks()
Layouts = dict[str, Callable[[Tensor], Tensor]]


def takes_rank(case: Case, rank: int) -> str | None:
    if rank not in case.dims:
        image = ", ".join(map(str, case.shape(rank=rank)[1:]))
        refused(case, case.x(1, rank=rank), rf"{rank}-?D|\b{image}\b", ValueError)
        return "refused, as dims= says"
    norm = case.make()
    for training in (True, False):
        x = case.x(1, rank=rank)
        result = step(norm.train(training), x)
        if result[OUT].shape != x.shape:
            raise AssertionError(f"turned the shape {tuple(x.shape)} into {tuple(result[OUT].shape)} {mode(training)}")
        if result[OUT].dtype != x.dtype: raise AssertionError(f"turned {x.dtype} into {result[OUT].dtype}")
        finite(result, mode(training))
    return None


for _rank in RANKS: check(f"{_rank}-D input")(partial(takes_rank, rank=_rank))


@check("values and gradients equal the reference's")
def equals_reference(case: Case) -> None:
    if case.reference is None: raise NotForThisNorm("no reference= was given")
    norm, reference = (case.make(dtype=torch.float64, factory=f) for f in (case.factory, case.reference))
    # batches of n images, positive in training and negative in evaluation
    for seed, n in enumerate((2, 4, -4, 3, 8, 2, -5)):
        training, n = n > 0, abs(n)
        got, want = (step(m.train(training), case.x(seed, n, dtype=torch.float64)) for m in (norm, reference))
        if len(got) != len(want):
            raise AssertionError(f"the norm has {len(got) - 2} parameters, the reference {len(want) - 2}")
        want = {k: w.reshape(got[k].shape) for k, w in zip(got, want.values(), strict=True)}
        agree(got, want, f"{mode(training)} at step {seed + 1}, float64", 1e-10)


@check("gradients equal the numeric derivative")
def numeric_derivative(case: Case) -> None:
    for rank in case.dims:
        for training in (True, False):
            params = dict(case.make(dtype=torch.float64).named_parameters())

            def f(x: Tensor, *values: Tensor, training: bool = training,
                  params: dict[str, nn.Parameter] = params) -> Tensor:
                norm = case.make(2, torch.float64).train(training)  # each evaluation starts from the same state
                y: Tensor = functional_call(norm, dict(zip(params, values, strict=True)), (x.clone(),))
                return y
            x = case.x(1, rank=rank, dtype=torch.float64).requires_grad_()
            try: gradcheck(f, (x, *params.values()), fast_mode=True)
            except GradcheckError as e: raise AssertionError(f"{rank}-D, {mode(training)}: {e}") from e


@check("channels_last input")
def channels_last(case: Case) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    ranks = [r for r in formats if r in case.dims]
    if not ranks: raise NotForThisNorm("it takes no 4-D or 5-D input")
    for rank in ranks:
        got = step(case.make(), case.x(1, rank=rank).to(memory_format=formats[rank]))
        agree(got, step(case.make(), case.x(1, rank=rank)), f"on {rank}-D input in channels_last", 1e-4)


@check("non-contiguous input")
def non_contiguous(case: Case) -> None:
    layouts: Layouts = {"transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
                        "every second of twice as many images": lambda x: x.repeat_interleave(2, 0)[::2]}
    for rank in case.dims:
        for what, f in layouts.items():
            got = step(case.make(), f(case.x(1, rank=rank)))
            agree(got, step(case.make(), case.x(1, rank=rank)), f"on {rank}-D input, {what}", 1e-4)


@check("the input is left as it was")
def keeps_input(case: Case) -> None:
    norm = case.make(2)
    for training in (True, False):
        x = case.x(1)
        step(norm.train(training), x)
        agree({"the input": x}, {"the input": case.x(1)}, f"after a forward {mode(training)}")


@check("large mean and small spread in float32")
def large_mean(case: Case) -> None:
    for mean, spread in ((1e4, 1.0), (1e2, 1e-2)):
        single, double = case.make(), case.make(dtype=torch.float64)
        for seed, training in enumerate((True, True, True, True, False)):
            got, want = (step(m.train(training), case.x(seed, mean=mean, spread=spread, dtype=dtype))
                         for m, dtype in ((single, torch.float32), (double, torch.float64)))
            # A float32 mean is off by about mean * 6e-8: what no norm can avoid, with room for a few such steps.
            agree(got, {k: want[k] for k in (OUT, GRAD)}, f"from float64 at mean {mean:g} and std {spread:g}",
                  20 * 6e-8 * mean / spread)


def due_for_constant(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm that takes the mean away makes of a constant `x`: its bias, or 0 without parameters."""
    named = dict(norm.named_parameters())
    if not named: return torch.zeros_like(x)
    bias = [p.detach() for k, p in named.items() if k.rpartition(".")[2] == "bias"]
    if len(bias) != 1: raise NotForThisNorm(f"its parameters are {', '.join(named)}, and not one is called bias")
    shape = (1, -1, *[1] * (x.ndim - 2)) if bias[0].shape == x.shape[1:2] else bias[0].shape
    return bias[0].reshape(shape).expand_as(x)


@check("a constant input gives the bias")
def constant_input(case: Case) -> None:
    x, norm, same = case.x(1, dtype=torch.float64), case.make(dtype=torch.float64), case.make(dtype=torch.float64)
    try: agree({OUT: norm(x + 1)}, {OUT: same(x)}, "", 1e-3)
    except AssertionError: raise NotForThisNorm("its output changes when a constant is added to the input") from None
    layouts: Layouts = {
        "contiguous": lambda x: x, "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x}
    shapes = [case.shape(n, rank) for n in (5, 7) for rank in case.dims]
    square = (6, case.nf, *[7] * (case.rank - 2))
    try: case.make()(torch.zeros(square))
    except Exception: pass                              # made for another map
    else: shapes.append(square)
    for dtype in (torch.float32, torch.float64):
        for value in (1.1, 1000.1, 1e4 + 0.1):
            for shape in shapes:
                for what, layout in layouts.items():
                    norm = case.make(dtype=dtype)
                    for _ in range(2):
                        x = layout(torch.full(shape, value, dtype=dtype))
                        agree({OUT: norm(x).detach()}, {OUT: due_for_constant(norm, x)},
                              f"on the constant {value:g} in {dtype}, shape {shape}, {what}")
