"""The checks of what a forward pass leaves to its backward pass."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from norms.testing.case import Case, Checks, NotForThisNorm, agree, buffers, draw, mode, state, step

check = Checks()


@check("two forwards, then one backward")
def two_forwards(case: Case) -> None:
    norm, twin = case.make(2), case.make(2)
    xs = [case.x(seed).requires_grad_() for seed in (1, 2)]
    ys = [norm(x) for x in xs]
    loss = sum((y * draw(y.shape, 99).to(y)).sum() for y in ys)     # as `step` weighs it
    *got, = torch.autograd.grad(loss, [*xs, *norm.parameters()], allow_unused=True, materialize_grads=True)
    (_, first, *ps), (_, second, *qs) = (step(twin, x).values() for x in xs)
    want = [first, second, *(p + q for p, q in zip(ps, qs, strict=True))]
    names = ["the first input's gradient", "the second input's gradient", *(k for k, _ in norm.named_parameters())]
    agree(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)), "from two separate steps", 1e-4)


def other(t: Tensor) -> Tensor: return t * 2 + 3


def overwrite(tensors: Iterable[Tensor]) -> None:
    """As a broadcast from another process or an optimizer's step does."""
    with torch.no_grad():
        for t in tensors: t.copy_(other(t))


def overwrite_data(tensors: Iterable[Tensor]) -> None:
    """The same where autograd can't see it."""
    for t in tensors: t.data.copy_(other(t.data))


def swap(norm: nn.Module) -> None:
    """Put new tensors in the buffers' places, and use the old ones' memory for something else."""
    old = list(norm.buffers())
    norm.load_state_dict({k: other(b) for k, b in buffers(norm).items()}, strict=False, assign=True)
    overwrite_data(old)


BUFFER_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "written under no_grad": lambda norm: overwrite(norm.buffers()),
    "written through .data": lambda norm: overwrite_data(norm.buffers()),
    "loaded": lambda norm: norm.load_state_dict({k: other(b) for k, b in buffers(norm).items()}, strict=False),
    "swapped": swap}
WEIGHT_CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "written under no_grad": lambda norm: overwrite(norm.parameters()),
    "loaded": lambda norm: norm.load_state_dict({k: other(p.detach()) for k, p in norm.named_parameters()},
                                                strict=False),
    "written through .data": lambda norm: overwrite_data(norm.parameters())}


@check("buffers may change before the backward")
def owns_statistics(case: Case) -> None:
    if not buffers(case.make()): raise NotForThisNorm("it has no buffers")
    for training in (True, False):
        want = step(case.make(2).train(training), case.x(1))
        for what, change in BUFFER_CHANGES.items():
            norm, when = case.make(2).train(training), f"{mode(training)} where buffers are {what} before the backward"
            try: got = step(norm, case.x(1), between=partial(change, norm))
            except RuntimeError as e: raise AssertionError(f"the backward raises {when}: {e}") from e
            agree(got, want, when, 1e-6)


@check("weights may change before the backward")
def owns_weights(case: Case) -> str | None:
    if not any(True for _ in case.make().parameters()): raise NotForThisNorm("it has no parameters")
    loud, unseen = set(), set()
    for training in (True, False):
        want = step(case.make(2).train(training), case.x(1))
        for what, change in WEIGHT_CHANGES.items():
            norm, when = case.make(2).train(training), f"{mode(training)} where weights are {what} before the backward"
            try: agree(step(norm, case.x(1), between=partial(change, norm)), want, when, 1e-6)
            except RuntimeError as e:
                if "modified by an inplace operation" not in str(e): raise
                loud.add(training)
            except AssertionError:
                # The graph holds the parameter itself, as torch's do: autograd notices all but what goes round it.
                if what != "written through .data" or training not in loud: raise
                unseen.add(training)
    if not loud: return None
    return "refused by torch's error" + (", but unnoticed through .data" if unseen else "")


def packed() -> saved_tensors_hooks:
    """Hooks that keep contiguous copies, as `save_on_cpu` does on a GPU with pinned memory."""
    return saved_tensors_hooks(lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t), lambda t: t)


@check("saved tensors through hooks, as by save_on_cpu")
def packs_saved(case: Case) -> None:
    formats = [torch.contiguous_format] + [torch.channels_last] * (case.rank == 4)
    for training in (True, False):
        for layout in formats:
            x = partial(case.x(1).clone, memory_format=layout)
            want = step(case.make(2).train(training), x())
            for hooks in (save_on_cpu, packed):
                norm = case.make(2).train(training)

                def call(x: Tensor, norm: nn.Module = norm, hooks: Callable[[], saved_tensors_hooks] = hooks) -> Tensor:
                    with hooks():
                        y: Tensor = norm(x)
                        return y
                agree(step(norm, x(), call), want, f"{mode(training)} under {hooks.__name__}, {layout}", 1e-5)


@check("a backward changes nothing and repeats itself")
def backward_is_pure(case: Case) -> None:
    for training in (True, False):
        norm, x = case.make(2).train(training), case.x(1).requires_grad_()
        y = norm(x)
        before, wanted, g = {**buffers(norm), **state(norm)}, [x, *norm.parameters()], draw(y.shape, 99).to(y)
        first, second = (torch.autograd.grad(y, wanted, g, retain_graph=True, allow_unused=True, materialize_grads=True)
                         for _ in range(2))
        agree({**buffers(norm), **state(norm)}, before, f"after two backwards {mode(training)}")
        names = ["the input's gradient", *(f"the gradient of {k}" for k, _ in norm.named_parameters())]
        got, want = (dict(zip(names, found, strict=True)) for found in (second, first))
        agree(got, want, f"in a second backward {mode(training)}")


@check("a second derivative is whole, or refused")
def second_derivative(case: Case) -> str | None:
    """Of a gradient penalty, as by `backward()`: that goes every way through the graph, `autograd.grad` only those to
    what it was asked for, and passes by an error that lies on another.
    """
    refused = set()
    for training, power in ((True, 1), (True, 3), (False, 1), (False, 3)):
        def penalty(training: bool = training, power: int = power) -> tuple[Tensor, dict[str, Tensor]]:
            norm, x = case.make(2, torch.float64).train(training), case.x(1, dtype=torch.float64).requires_grad_()
            y = norm(x)
            loss = (y ** power * draw(y.shape, 99).to(y)).sum()
            gx, = torch.autograd.grad(loss, x, create_graph=True)
            return loss + gx.square().sum(), {"the input": x, **dict(norm.named_parameters())}

        def backward(of: Tensor, by: dict[str, Tensor]) -> list[Tensor]:
            of.backward()
            return [torch.zeros_like(t) if t.grad is None else t.grad for t in by.values()]

        def at_once(of: Tensor, by: dict[str, Tensor]) -> list[Tensor]:
            return list(torch.autograd.grad(of, list(by.values()), allow_unused=True, materialize_grads=True))

        def one_by_one(of: Tensor, by: dict[str, Tensor]) -> list[Tensor]:
            return [torch.autograd.grad(of, t, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                    for t in by.values()]
        want: dict[str, Tensor] | None = None
        for way in (backward, at_once, one_by_one):
            when = f"{mode(training)}, of a loss of power {power}, by {way.__name__}"
            of, by = penalty()
            try: got = dict(zip((f"the penalty's gradient by {k}" for k in by), way(of, by), strict=True))
            except RuntimeError as e:
                if way is backward: refused.add(str(e))
                elif want is not None: raise AssertionError(f"refused {when}, and not by backward(): {e}") from e
                continue
            if way is backward: want = got
            elif want is None: raise AssertionError(f"not refused {when}, where backward() is")
            else: agree(got, want, when, 1e-8)
    return f"refused: {refused.pop()}" if refused else None
