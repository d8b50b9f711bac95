"""What every check works with: the norm under test, steps of it, and comparisons."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

RANKS = (2, 3, 4, 5)
Factory = Callable[[int], nn.Module]        # from the channel count
Tensors = dict[str, Tensor]                 # by the words for them in an error
F = TypeVar("F", bound="Callable[[Case], str | None]")
OUT, GRAD = "the output", "the input's gradient"


class NotForThisNorm(Exception):
    """Raised by a check that has nothing to check on this norm; the text says why."""


class Checks(dict[str, "Callable[[Case], str | None]"]):
    """The checks of one subject: functions of a `Case` by the words that are printed, in the order of the lines."""

    def __call__(self, name: str) -> Callable[[F], F]:
        """Enter a function under `name`."""
        def enter(f: F) -> F:
            self[name] = f
            return f
        return enter


@dataclass
class Case:
    """The norm under test: makes norms that are equal in weights and past, and inputs that depend on a seed alone."""

    factory: Factory
    nf: int
    dims: tuple[int, ...] | list[int]
    reference: Factory | None

    def __post_init__(self) -> None:
        for f in (self.factory, *([] if self.reference is None else [self.reference])):
            if isinstance(f, nn.Module) or not callable(f):
                raise TypeError(f"check_norm got {f!r}; it needs a function from the channel count to a module, for it "
                                "makes many: pass the class, or lambda nf: MyNorm(nf, ...)")
        if not isinstance(self.dims, (tuple, list)) or not self.dims or not set(self.dims) <= set(RANKS):
            raise ValueError(f"check_norm got dims={self.dims!r}; it needs some of {RANKS}, the numbers of axes that "
                             "the norm's input may have, such as dims=(4,)")
        if not isinstance(self.nf, int) or self.nf < 2:
            raise ValueError(f"check_norm got nf={self.nf!r}; it needs an integer of at least 2, such as 4: a norm of "
                             "one channel can't show that it keeps the channels apart")
        self.rank = 4 if 4 in self.dims else max(self.dims)

    def make(self, steps: int = 0, dtype: torch.dtype = torch.float32, shift: float = 0.0,
             factory: Factory | None = None) -> nn.Module:
        """A norm in training mode, with weights drawn from `shift` + 0.5 to 1.5, after `steps` training steps."""
        norm = (factory or self.factory)(self.nf)
        if not isinstance(norm, nn.Module):
            raise TypeError(f"check_norm: the factory gave {norm!r} for {self.nf} channels; it needs to give a module")
        rng = torch.Generator("cpu").manual_seed(1)
        with torch.no_grad():
            for p in norm.parameters(): p.copy_(torch.rand(p.shape, generator=rng, device="cpu") + 0.5 + shift)
        norm.to(dtype)
        for seed in range(steps): step(norm, self.x(100 + seed, dtype=dtype))
        return norm.train()

    def shape(self, n: int = 4, rank: int | None = None) -> tuple[int, ...]:
        return n, self.nf, *(5, 3, 2)[:(rank or self.rank) - 2]

    def x(self, seed: int, n: int = 4, rank: int | None = None, mean: float = 0.5, spread: float = 1.5,
          dtype: torch.dtype = torch.float32) -> Tensor:
        """A normally distributed input, rounded to float32 before it takes `dtype`."""
        return (draw(self.shape(n, rank), seed) * spread + mean).to(dtype)


def draw(shape: Sequence[int], seed: int) -> Tensor:
    """Normally distributed numbers on torch's default device; no random state is touched."""
    rng = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=rng, device="cpu").to(torch.get_default_device())


def step(norm: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None,
         between: Callable[[], object] | None = None) -> Tensors:
    """Forward and backward, of `call` if given: the output and the gradients of a fixed weighted sum of it, by name.

    `between`, if given, is called after the forward.
    """
    x = x.detach().requires_grad_()
    y = (norm if call is None else call)(x)     # a compiled module has a length, and that can be 0
    if between is not None: between()
    wanted = {GRAD: x, **{f"the gradient of {k}": p for k, p in norm.named_parameters()}}
    grads = torch.autograd.grad(y, list(wanted.values()), draw(y.shape, 99).to(y), allow_unused=True,
                                materialize_grads=True)
    return {OUT: y.detach(), **dict(zip(wanted, grads, strict=True))}


def state(norm: nn.Module) -> Tensors:
    """The norm's state dict by value."""
    return {k: v.detach().clone() for k, v in norm.state_dict().items() if isinstance(v, torch.Tensor)}


def buffers(norm: nn.Module) -> Tensors:
    """The norm's buffers by value."""
    return {k: b.detach().clone() for k, b in norm.named_buffers()}


def mode(training: bool) -> str: return "in training" if training else "in evaluation"


def agree(got: Tensors, want: Tensors, when: str, tol: float = 0.0) -> None:
    """Raise unless the tensors in two dicts agree within `tol` of the largest wanted value, or of 1 if that is less."""
    for name, w in want.items():
        g = got[name]
        if g.shape != w.shape:
            raise AssertionError(f"{name} has shape {tuple(g.shape)} and should have {tuple(w.shape)} {when}")
        if torch.equal(g, w): continue
        off, limit = (g.double() - w.double()).abs().max().item(), tol * max(1, w.abs().max().item())
        if not off <= limit: raise AssertionError(f"{name} is off by {off:.2g} {when}, where {limit:.2g} is allowed")


def finite(tensors: Tensors, when: str) -> None:
    """Raise unless every tensor in a dict is finite."""
    for name, t in tensors.items():
        if not t.isfinite().all(): raise AssertionError(f"{name} is not finite {when}")


def refused(case: Case, x: Tensor, names: str, kinds: type[Exception] = Exception,
            modes: Iterable[bool] = (True, False)) -> None:
    """Raise unless the norm refuses `x` by an error of `kinds` whose text fits the pattern `names`, its state kept."""
    for training in modes:
        norm = case.make(2).train(training)
        before = state(norm)
        try: norm(x)
        except Exception as e:
            text = f"{type(e).__name__}: {e}"
            if not isinstance(e, kinds):
                raise AssertionError(f"refused {mode(training)} by {text}; a {kinds.__name__} is due") from e
            if not re.search(names, str(e), re.IGNORECASE):
                raise AssertionError(f"the error {mode(training)} doesn't say what it got: {text}") from e
        else: raise AssertionError(f"took an input of shape {tuple(x.shape)} and {x.dtype} {mode(training)}")
        agree(state(norm), before, f"after a refusal {mode(training)}")


def places(norm: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The norm's buffers themselves and where their memory is, for `in_place`."""
    return {k: (b, b.data_ptr()) for k, b in norm.named_buffers()}


def in_place(norm: nn.Module, before: Mapping[str, tuple[Tensor, int]], when: str) -> None:
    """Raise unless the norm's buffers are the tensors and the memory of `before`, its `places` then."""
    now = dict(norm.named_buffers())
    for k, (b, pointer) in before.items():
        if now.get(k) is not b:
            raise AssertionError(f"the buffer {k} is another tensor {when}; write it in place: whoever holds the old "
                                 "one sees no update")
        if b.data_ptr() != pointer: raise AssertionError(f"the buffer {k} has other memory {when}")
