"""The checks of half precision."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from norms.moments import HALF
from norms.testing.case import GRAD, OUT, Case, Checks, NotForThisNorm, agree, buffers, finite, mode, step

check = Checks()


@check("half-precision input")
def half_input(case: Case) -> None:
    for dtype in HALF:
        for mean, spread in ((200, 300), (10, 1)):      # squares overflow float16; 8 bits don't hold mean and spread
            same_as_wide(case, dtype, mean, spread, lambda norm: norm)


@check("a norm cast to half precision")
def half_norm(case: Case) -> None:
    for dtype in HALF:
        norm = case.make(2).to(dtype)
        for training in (True, True, False):
            result = step(norm.train(training), case.x(1, dtype=dtype))
            if result[OUT].dtype != dtype: raise AssertionError(f"turned {dtype} into {result[OUT].dtype}")
            finite(result, f"in {dtype} {mode(training)}")


@check("autocast")
def autocast(case: Case) -> None:
    def cast(norm: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                y: Tensor = norm(x)
                return y
        return call
    for dtype in (torch.bfloat16, torch.float32): same_as_wide(case, dtype, 10, 1, cast)


def same_as_wide(case: Case, dtype: torch.dtype, mean: float, spread: float,
                 wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    """Raise unless the norm, called through `wrap`, keeps an input's `dtype` and gives what it gives in float32."""
    norm, wide = case.make(2), case.make(2)
    for training in (True, False):
        x, same = (case.x(1, mean=mean, spread=spread, dtype=dtype) for _ in range(2))
        got, want = step(norm.train(training), x, wrap(norm)), step(wide.train(training), same.float())
        if got[OUT].dtype != dtype: raise AssertionError(f"turned {dtype} into {got[OUT].dtype} {mode(training)}")
        agree(got, {k: want[k] for k in (OUT, GRAD)}, f"from float32 {mode(training)} on {dtype}",
              2e-2 if dtype in HALF else 1e-4)


@check("half precision leaves the statistics wide")
def statistics_stay_wide(case: Case) -> None:
    before = {k: b for k, b in buffers(case.make(2)).items() if b.is_floating_point()}
    if not before: raise NotForThisNorm("it has no floating-point buffers")
    for dtype in HALF:
        norm = case.make(2).to(dtype)
        stay_wide(norm, before, f"in a norm cast to {dtype}")
        agree(buffers(norm), before, f"in a norm cast to {dtype}")      # nor were they rounded on the way
        for assign in (False, True):
            norm = case.make()
            norm.load_state_dict({k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                                  for k, v in case.make(2).state_dict().items()}, assign=assign)
            when = f"after load_state_dict of {dtype} with {assign=}"
            stay_wide(norm, before, when)
            finite(step(norm, case.x(1, dtype=dtype)), when)
            stay_wide(norm, before, f"{when} and a step")


def stay_wide(norm: nn.Module, names: Iterable[str], when: str) -> None:
    found = dict(norm.named_buffers())
    for k in names:
        if found[k].dtype in HALF: raise AssertionError(f"the buffer {k} is {found[k].dtype} {when}")
