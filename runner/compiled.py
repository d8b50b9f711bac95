"""`Runner(compile=True)`: prediction, loss and gradients of a training batch in one compiled graph, for the loop."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from runner.batches import NoPair, no_pair
from runner.events import Callback

# f(xb, yb) -> pred, loss, gradients
Step = Callable[[Any, Any], tuple[Any, Tensor, list[Tensor | None]]]


class CompileError(RuntimeError):
    """A step can't be compiled, or a compiled step can't do what was asked of it; the text says why and the mend."""


class CompiledStep(Callback):
    """What a training batch computes, gradients included, compiled: in the place of the runner's first three steps.

    At batch size 2 most of a step's time goes into calls, and most calls are the backward's. So all gradients are
    computed together with prediction and loss, in one call. The steps then take out of it what each of the loop's
    events needs: the prediction, the loss, and the gradients, which are added to the parameters' as autograd does. The
    optimizer runs as it is: compiled it gains nothing, for its guards cost as much as its calls. So does validation:
    its batches are large and few, and the compiler would take longer over them than they take.

    The same numbers as without, within rounding, and the same random draws. Limits, each met with an error and not
    with other numbers:

    - `pred` and `loss` have no graph. A callback may read them, not change them, nor `yb` once `pred` is there.
    - Hooks of modules and of parameters would not be called: forward hooks, as `Hooks` makes them, gradient hooks,
      `DistributedDataParallel`.
    - Model and loss must be what `torch.compile(fullgraph=True)` can follow.

    The first batch waits for the compiler: 10 to 30 s for five conv layers on one core, a few seconds if its cache has
    them. A batch of another size, such as a ragged last one, is compiled once
    more, then for any size but 1, which is a case of its own. Further fits of the same model use what there is.
    """

    _order = -20
    fit_only = True     # evaluation isn't compiled
    backend: str | Callable[..., Any] = "inductor"
    options: Mapping[str, Any] = {"fallback_random": True}      # or dropout would draw other numbers than without

    divisor: float = 1.0    # what the gradients are divided by, where they are a part of a mean (GradientAccumulation)

    def __init__(self) -> None:
        self.built: list[Any] = []
        self.at: int | None = None
        self.patch: AbstractContextManager[Any] | None = None
        self.grads: list[Tensor | None] | None = None

    def __reduce__(self) -> tuple[Any, ...]: return CompiledStep, ()    # a copy has another model and compiles anew

    def set_runner(self, run: Any) -> None:
        """Before a fit begins.

        Raises:
            CompileError: this torch can't compile a step, or there is no C++ compiler.
        """
        require_compiler()
        super().set_runner(run)

    def begin_fit(self) -> None:
        """Let the compiler follow `torch.autograd.grad` for the length of the fit."""
        self.patch = torch._dynamo.config.patch(trace_autograd_ops=True)
        self.patch.__enter__()

    def after_fit(self) -> None:
        self.at = None
        if self.patch is not None: self.patch.__exit__(None, None, None)
        self.patch = None

    # --- the three steps of the loop --------------------------------------------------------------------------

    def predict(self) -> None:
        """The prediction; loss and gradients come with it."""
        run = self.run
        if isinstance(run.yb, NoPair): raise no_pair(run.yb.batch, run.in_train)
        if not run.in_train:
            type(run).predict(run)
            return
        if run.epoch != self.at: self.begin_pass(run)
        if any(self.hooks): refuse_hooks(self.modules)
        xb, yb = run.xb, run.yb
        try: pred, loss, self.grads = self.train(xb, yb)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as e:
            raise self.reason(e, run) from e
        self.given = pred, version(pred), yb, version(yb), loss, loss._version
        run.pred = pred

    def get_loss(self) -> None:
        """The loss that belongs to the prediction."""
        run = self.run
        if not run.in_train:
            type(run).get_loss(run)
            return
        pred, pred_version, yb, yb_version, loss, _ = self.given
        if run.pred is not pred or version(pred) != pred_version: raise changed("pred")
        if run.yb is not yb or version(yb) != yb_version: raise changed("yb")
        run.loss = loss

    def backward(self) -> None:
        """Add the gradients of the loss to the parameters'."""
        run, (*_, loss, loss_version) = self.run, self.given
        if run.loss is not loss or loss._version != loss_version: raise changed("loss")
        grads, self.grads = self.grads or [], None
        for p, g in zip(self.params, grads, strict=True):
            if g is None: continue
            # As autograd does: torch's fused optimizers take it for granted that the two are laid out alike.
            if g.stride() != p.stride(): g = torch.empty_like(p).copy_(g)
            if self.divisor != 1: g = g / self.divisor
            if p.grad is None: p.grad = g
            else: p.grad += g

    # --- what is compiled -------------------------------------------------------------------------------------

    def begin_pass(self, run: Any) -> None:
        """Look up what is trained, and make its function if it isn't what it was."""
        model, loss_func = run.model, run.loss_func
        tops = [t for t in (model, loss_func) if isinstance(t, nn.Module)]
        self.modules = {name: m for t in tops for name, m in t.named_modules()} if len(tops) == 1 else {
            f"{type(t).__name__}.{name}": m for t in tops for name, m in t.named_modules()}
        self.hooks = [h for m in self.modules.values() for h in hooks_of(m)]
        held = [p for t in tops for p in t.parameters()] + [p for g in run.opt.param_groups for p in g["params"]]
        self.params = list({id(p): p for p in held}.values())
        refuse_gradient_hooks(self.modules, self.params)
        built = [model, loss_func, *self.params]
        if list(map(id, built)) != list(map(id, self.built)):
            self.train: Step = self.compiled(step_function(model, loss_func, self.params))
            self.built = built
        self.at = run.epoch

    def compiled(self, f: Any) -> Any:
        # The compiler files what it made under the code object, up to 8 times: one for each model, not for all.
        f = FunctionType(f.__code__.replace(), f.__globals__, f.__name__, f.__defaults__, f.__closure__)
        options = dict(self.options) if self.backend == "inductor" else None
        return torch.compile(f, fullgraph=True, backend=self.backend, options=options)

    def reason(self, e: Exception, run: Any) -> Exception:
        """The error for `e` of the compiler: the model's own, if it fails without a compiler too.

        That is tried on a copy, so that the running statistics stay as they are.
        """
        try: train = step_function(*(copied := copy.deepcopy((run.model, run.loss_func))),
                                   [p for t in copied if isinstance(t, nn.Module) for p in t.parameters()])
        except Exception: train = None
        if train:
            try: train(run.xb, run.yb)
            except Exception as own: return own
        if isinstance(e, torch._dynamo.exc.FailOnRecompileLimitHit):
            return CompileError(f"the training step was compiled {torch._dynamo.config.recompile_limit} times, because "
                                "something in the model, the loss or the batch is another number or shape at each "
                                "step; make it a tensor, or fit without compile=True")
        return CompileError(f"the training step can't be compiled: {str(e.__cause__ or e).split(chr(10) * 2)[0]}; it "
                            "needs a model and a loss that torch.compile(fullgraph=True) can follow: change them, or "
                            "fit without compile=True")


def step_function(model: Callable[..., Any], loss_func: Callable[..., Tensor], params: Sequence[Tensor]) -> Step:
    """The training step `f(xb, yb) -> pred, loss, gradients`, one gradient per entry of `params`.

    It is None for what is frozen or not used.
    """
    def train(xb: Any, yb: Any) -> tuple[Any, Tensor, list[Tensor | None]]:
        pred = model(xb)
        loss = loss_func(pred, yb)
        live = [p for p in params if p.requires_grad]
        # An expanded gradient, as a sum has, couldn't be changed in place, as clipping does.
        grads = iter([g if g is None or 0 not in g.stride() else g.contiguous()
                      for g in torch.autograd.grad(loss, live, allow_unused=True)])
        return detached(pred), loss.detach(), [next(grads) if p.requires_grad else None for p in params]
    return train


def detached(pred: Any) -> Any:
    """`pred`, a tensor or a nest of them, without its graph."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, pred)


# --- what is refused ----------------------------------------------------------------------------------------------

def require_compiler() -> None:
    """Raises CompileError unless a step can be compiled here."""
    import torch._dynamo
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise CompileError(f"compile=True needs torch 2.11 or later and this is {torch.__version__}: update torch, or "
                           "fit without compile=True")
    from torch._inductor import config, cpp_builder
    try: cpp_builder.get_cpp_compiler()
    except Exception as e:
        looked = [c for c in listed(config.cpp.cxx) if c]
        raise CompileError(f"compile=True needs a C++ compiler and none was found ({e}; looked for {looked}): install "
                           "one, such as g++, clang++ or on Windows MSVC's cl, or name it by the environment variable "
                           "CXX before Python starts, or fit without compile=True") from e


def listed(o: Any) -> list[Any]: return list(o) if isinstance(o, (list, tuple)) else [o]


def version(o: object) -> int | None:
    """A number that grows when `o` is changed in place, if it is a tensor."""
    return o._version if isinstance(o, torch.Tensor) else None


def changed(name: str) -> CompileError:
    when = {"pred": "in after_pred", "yb": "in after_pred", "loss": "in after_loss"}[name]
    return CompileError(f"a callback changed run.{name} {when}, and a compiled step has computed loss and gradients "
                        "already; do it in the model, in the loss function or (to xb and yb) in begin_batch, or fit "
                        "without compile=True")


def hooks_of(m: nn.Module) -> tuple[dict[int, Any], ...]:
    """The four dicts of hooks that a module has."""
    return m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks


def refuse_hooks(modules: Mapping[str, nn.Module]) -> NoReturn:
    name, m = next((name, m) for name, m in modules.items() if any(hooks_of(m)))
    raise CompileError(f"the module {name or 'at the top'!r} ({type(m).__name__}) has a hook, and a compiled step "
                       "would not call it at each batch; take the hooks off (`hooks.remove()`), or fit without "
                       "compile=True")


def refuse_gradient_hooks(modules: Mapping[str, nn.Module], params: Sequence[Tensor]) -> None:
    """A gradient that comes out of the graph is no event for autograd."""
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in params):
        raise CompileError("a parameter has a gradient hook, and a compiled step would not call it; take it off and "
                           "use the event after_backward, or fit without compile=True")
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in modules.values()):
        raise CompileError("the model is a DistributedDataParallel, and a compiled step would not share its gradients; "
                           "fit without compile=True")
