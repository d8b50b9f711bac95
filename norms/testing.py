"""`check_norm`: one call tries any norm, the user's own included, and says what holds and what does not.

    from norms.testing import check_norm
    check_norm(MyNorm)                                              # MyNorm(nf) makes one for nf channels
    check_norm(nn.BatchNorm2d, dims=(4,), reference=BatchNorm)      # takes 4-D input only; compared with another

Each line of the output is one function below, entered in the table `CHECKS` under the words that are printed. A
check raises where the norm breaks its word, raises `NotForThisNorm` where there is nothing to check, and may return
a remark. It works on norms of its own, made by the factory and brought to the same state by the same steps, so
that it depends neither on the other checks nor on copying or saving, which have checks to themselves.
"""

import copy
import io
import re
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from norms.moments import HALF

RANKS = (2, 3, 4, 5)
OUT, GRAD = "the output", "the input's gradient"
CHECKS = {}


class NotForThisNorm(Exception):
    """Raised by a check that has nothing to check on this norm; the text says why."""


class Result(NamedTuple):
    """What one check found: its `name`, the `status` "ok", "FAIL" or "-", and a `message`, empty if all is said."""

    name: str
    status: str
    message: str

    def __str__(self):
        text = f"{self.name}: {self.message}" if self.message else self.name
        return f"{self.status:<6}{textwrap.shorten(text, 240)}"


@dataclass
class Report:
    """What `check_norm` found on `norm`; true, as is `ok`, if nothing failed. `str(report)` is what was printed."""

    norm: str
    results: list

    @property
    def failed(self):
        """The message of every check that failed, by its name."""
        return {r.name: r.message for r in self.results if r.status == "FAIL"}

    @property
    def ok(self): return not self.failed

    def __bool__(self): return self.ok

    def __str__(self): return "\n".join(map(str, (self.norm, *self.results, self.summary())))

    def summary(self):
        """One line: how many checks hold, fail and don't apply."""
        count = [sum(r.status == s for r in self.results) for s in ("ok", "FAIL", "-")]
        return "{} of {} hold, {} failed, {} not for this norm".format(count[0], sum(count), *count[1:])


def check_norm(factory, *, nf=4, dims=RANKS, reference=None, strict=False):
    """Try a norm on everything that training asks of one, and print a line per check.

    Everything runs on torch's default device: `with torch.device("cuda"): check_norm(...)` tries the norm there.
    torch's compiler is reset, for the count of compilations to be the norm's own.

    Args:
        factory: makes the norm for a number of channels, such as `norms.RunningBatchNorm`. It is called many times.
        nf: the number of channels to try it with, at least 2.
        dims: how many axes, out of 2 to 5, the norm's input may have. Other inputs must be refused by a ValueError.
        reference: a factory like the first whose module gives the right answer. Its parameters are taken to be the
            norm's in the same order and to have as many elements; None leaves the values unchecked.
        strict: whether to raise an AssertionError with the report if a check fails.

    Returns:
        A `Report`: the list `results` of `Result(name, status, message)`, `failed`, `ok`; it is true if nothing failed.

    Raises:
        TypeError: a module or something else in place of a factory; a factory that makes no module.
        ValueError: `dims` or `nf` out of range.
        AssertionError: a check failed and `strict` is set.
    """
    case = Case(factory, nf, dims, reference)
    report = Report(" ".join(repr(case.make()).split()), [])
    print(report.norm)
    for name, f in CHECKS.items():
        status = "ok"
        try: message = f(case) or ""
        except NotForThisNorm as e: status, message = "-", f"not for this norm: {e}"
        except AssertionError as e: status, message = "FAIL", str(e)
        except Exception as e: status, message = "FAIL", f"{type(e).__name__}: {e}"
        report.results.append(Result(name, status, " ".join(message.split())))
        print(report.results[-1], flush=True)
    print(report.summary())
    if strict and report.failed: raise AssertionError(f"check_norm: not everything holds\n{report}")
    return report


@dataclass
class Case:
    """The norm under test: makes norms that are equal in weights and past, and inputs that depend on a seed alone."""

    factory: object
    nf: int
    dims: tuple
    reference: object

    def __post_init__(self):
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

    def make(self, steps=0, dtype=torch.float32, shift=0.0, factory=None):
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

    def shape(self, n=4, rank=None): return n, self.nf, *(5, 3, 2)[:(rank or self.rank) - 2]

    def x(self, seed, n=4, rank=None, mean=0.5, spread=1.5, dtype=torch.float32):
        """A normally distributed input, rounded to float32 before it takes `dtype`."""
        return (draw(self.shape(n, rank), seed) * spread + mean).to(dtype)


def check(name):
    """Enter a function of a `Case` in the table `CHECKS` under `name`."""
    def enter(f):
        CHECKS[name] = f
        return f
    return enter


def draw(shape, seed):
    """Normally distributed numbers on torch's default device; no random state is touched."""
    rng = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=rng, device="cpu").to(torch.get_default_device())


def step(norm, x, call=None):
    """Forward and backward, of `call` if given: the output and the gradients of a fixed weighted sum of it, by name."""
    x = x.detach().requires_grad_()
    y = (norm if call is None else call)(x)     # a compiled module has a length, and that can be 0
    wanted = {GRAD: x, **{f"the gradient of {k}": p for k, p in norm.named_parameters()}}
    grads = torch.autograd.grad(y, list(wanted.values()), draw(y.shape, 99).to(y), allow_unused=True,
                                materialize_grads=True)
    return {OUT: y.detach(), **dict(zip(wanted, grads, strict=True))}


def state(norm):
    """The norm's state dict by value."""
    return {k: v.detach().clone() for k, v in norm.state_dict().items() if isinstance(v, torch.Tensor)}


def buffers(norm):
    """The norm's buffers by value."""
    return {k: b.detach().clone() for k, b in norm.named_buffers()}


def mode(training): return "in training" if training else "in evaluation"


def agree(got, want, when, tol=0.0):
    """Raise unless the tensors in two dicts agree within `tol` of the largest wanted value, or of 1 if that is less."""
    for name, w in want.items():
        g = got[name]
        if g.shape != w.shape:
            raise AssertionError(f"{name} has shape {tuple(g.shape)} and should have {tuple(w.shape)} {when}")
        if torch.equal(g, w): continue
        off, limit = (g.double() - w.double()).abs().max().item(), tol * max(1, w.abs().max().item())
        if not off <= limit: raise AssertionError(f"{name} is off by {off:.2g} {when}, where {limit:.2g} is allowed")


def finite(tensors, when):
    """Raise unless every tensor in a dict is finite."""
    for name, t in tensors.items():
        if not t.isfinite().all(): raise AssertionError(f"{name} is not finite {when}")


def refused(case, x, names, kinds=Exception, modes=(True, False)):
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


def takes_rank(case, rank):
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


for _rank in RANKS: check(f"{_rank}-D input")(partial(takes_rank, rank=_rank))


@check("values and gradients equal the reference's")
def equals_reference(case):
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
def numeric_derivative(case):
    for rank in case.dims:
        for training in (True, False):
            params = dict(case.make(dtype=torch.float64).named_parameters())

            def f(x, *values, training=training, params=params):
                norm = case.make(2, torch.float64).train(training)  # each evaluation starts from the same state
                return functional_call(norm, dict(zip(params, values, strict=True)), (x.clone(),))
            x = case.x(1, rank=rank, dtype=torch.float64).requires_grad_()
            try: gradcheck(f, (x, *params.values()), fast_mode=True)
            except GradcheckError as e: raise AssertionError(f"{rank}-D, {mode(training)}: {e}") from e


@check("channels_last input")
def channels_last(case):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    ranks = [r for r in formats if r in case.dims]
    if not ranks: raise NotForThisNorm("it takes no 4-D or 5-D input")
    for rank in ranks:
        got = step(case.make(), case.x(1, rank=rank).to(memory_format=formats[rank]))
        agree(got, step(case.make(), case.x(1, rank=rank)), f"on {rank}-D input in channels_last", 1e-4)


@check("non-contiguous input")
def non_contiguous(case):
    for rank in case.dims:
        for what, f in {"transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
                        "every second of twice as many images": lambda x: x.repeat_interleave(2, 0)[::2]}.items():
            got = step(case.make(), f(case.x(1, rank=rank)))
            agree(got, step(case.make(), case.x(1, rank=rank)), f"on {rank}-D input, {what}", 1e-4)


@check("the input is left as it was")
def keeps_input(case):
    norm = case.make(2)
    for training in (True, False):
        x = case.x(1)
        step(norm.train(training), x)
        agree({"the input": x}, {"the input": case.x(1)}, f"after a forward {mode(training)}")


@check("large mean and small spread in float32")
def large_mean(case):
    for mean, spread in ((1e4, 1.0), (1e2, 1e-2)):
        single, double = case.make(), case.make(dtype=torch.float64)
        for seed, training in enumerate((True, True, True, True, False)):
            got, want = (step(m.train(training), case.x(seed, mean=mean, spread=spread, dtype=dtype))
                         for m, dtype in ((single, torch.float32), (double, torch.float64)))
            # A float32 mean is off by about mean * 6e-8: what no norm can avoid, with room for a few such steps.
            agree(got, {k: want[k] for k in (OUT, GRAD)}, f"from float64 at mean {mean:g} and std {spread:g}",
                  20 * 6e-8 * mean / spread)


@check("half-precision input")
def half_input(case):
    for dtype in HALF:
        for mean, spread in ((200, 300), (10, 1)):      # squares overflow float16; 8 bits don't hold mean and spread
            same_as_wide(case, dtype, mean, spread, lambda norm: norm)


@check("a norm cast to half precision")
def half_norm(case):
    for dtype in HALF:
        norm = case.make(2).to(dtype)
        for training in (True, True, False):
            result = step(norm.train(training), case.x(1, dtype=dtype))
            if result[OUT].dtype != dtype: raise AssertionError(f"turned {dtype} into {result[OUT].dtype}")
            finite(result, f"in {dtype} {mode(training)}")


@check("autocast")
def autocast(case):
    def cast(norm):
        def call(x):
            with torch.autocast(x.device.type, dtype=torch.bfloat16): return norm(x)
        return call
    for dtype in (torch.bfloat16, torch.float32): same_as_wide(case, dtype, 10, 1, cast)


def same_as_wide(case, dtype, mean, spread, wrap):
    """Raise unless the norm, called through `wrap`, keeps an input's `dtype` and gives what it gives in float32."""
    norm, wide = case.make(2), case.make(2)
    for training in (True, False):
        x, same = (case.x(1, mean=mean, spread=spread, dtype=dtype) for _ in range(2))
        got, want = step(norm.train(training), x, wrap(norm)), step(wide.train(training), same.float())
        if got[OUT].dtype != dtype: raise AssertionError(f"turned {dtype} into {got[OUT].dtype} {mode(training)}")
        agree(got, {k: want[k] for k in (OUT, GRAD)}, f"from float32 {mode(training)} on {dtype}",
              2e-2 if dtype in HALF else 1e-4)


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


@check("deepcopy after a training step")
def deepcopies(case):
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
def state_dict_round_trip(case):
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
def untrained_evaluation(case): finite(step(case.make().eval(), case.x(1)), "in evaluation before any training")


@check("evaluation leaves the state alone and repeats itself")
def evaluation_is_pure(case):
    norm = case.make(2).eval()
    before = state(norm)
    first = step(norm, case.x(1))
    agree(state(norm), before, "after an evaluation")
    agree(step(norm, case.x(1)), first, "in a second evaluation of the same input")


@check("evaluation uses the current affine weights")
def current_weights(case):
    # The statistics don't depend on the affine weights: a norm that had the new ones all along gives what is due.
    norm, want = case.make(2).eval(), case.make(2, shift=1.0).eval()
    if not any(True for _ in norm.parameters()): raise NotForThisNorm("it has no parameters")
    for m in (norm, want): m(case.x(1))
    with torch.no_grad():
        for p, q in zip(norm.parameters(), want.parameters(), strict=True): p.copy_(q)
    agree(step(norm, case.x(2)), step(want, case.x(2)), "after the weights changed", 1e-6)


@check("two forwards, then one backward")
def two_forwards(case):
    norm, twin = case.make(2), case.make(2)
    xs = [case.x(seed).requires_grad_() for seed in (1, 2)]
    ys = [norm(x) for x in xs]
    loss = sum((y * draw(y.shape, 99).to(y)).sum() for y in ys)     # as `step` weighs it
    *got, = torch.autograd.grad(loss, [*xs, *norm.parameters()], allow_unused=True, materialize_grads=True)
    (_, first, *ps), (_, second, *qs) = (step(twin, x).values() for x in xs)
    want = [first, second, *(p + q for p, q in zip(ps, qs, strict=True))]
    names = ["the first input's gradient", "the second input's gradient", *(k for k, _ in norm.named_parameters())]
    agree(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)), "from two separate steps", 1e-4)


@check("torch.compile(fullgraph=True) compiles once")
def compiles_once(case):
    from torch._dynamo.testing import CompileCounterWithBackend  # here and not above: it takes two seconds
    norm, eager = case.make(), case.make()
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
            if counter.frame_count > 1:     # 0 in evaluation: a norm that ignores its mode needs no second graph
                raise AssertionError(f"compiled {counter.frame_count} times in 7 steps of one shape {mode(training)}; "
                                     "keep state that changes in tensors, not in Python numbers")
    finally: torch.compiler.reset()


def func_grad(norm, x, *inputs):
    """The gradients of `step` by `torch.func.grad`, the buffers captured or handed in as inputs."""
    def loss(params, x, *inputs):
        y = functional_call(norm, (params, *inputs), (x,))
        return (y * draw(y.shape, 99).to(y)).sum()
    grads, gx = torch.func.grad(loss, (0, 1))({k: p.detach() for k, p in norm.named_parameters()}, x, *inputs)
    return {GRAD: gx, **{f"the gradient of {k}": g for k, g in grads.items()}}


@check("torch.func.grad equals autograd")
def func_grad_of_parameters(case):
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


@check("torch.func.grad with the buffers as inputs equals autograd")
def func_grad_of_buffers(case):
    norm = case.make(2)
    if not buffers(norm): raise NotForThisNorm("it has no buffers")
    for training in (False, True):
        got = func_grad(norm.train(training), case.x(1), buffers(norm))
        want = step(case.make(2).train(training), case.x(1))
        agree(got, {k: want[k] for k in got}, mode(training), 1e-4)


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


@check("a wrong channel count is refused")
def wrong_channels(case):
    few, many = ((repr(norm), {k: v.shape for k, v in state(norm).items()})
                 for norm in map(case.factory, (case.nf, 2 * case.nf)))
    if few == many: raise NotForThisNorm("it is the same for every channel count")
    for n in (2 * case.nf, 1):      # one channel would broadcast
        refused(case, draw((4, n, *case.shape()[2:]), 1), rf"\b{n}\b")


@check("integer input is refused")
def integer_input(case): refused(case, case.x(1).long(), "int64|long|integer")
