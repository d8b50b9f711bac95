"""Recorded training steps done once more, with an eye on every value that is not finite; see `nonfinite`."""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from runner.batches import leaves, map_tensors
from runner.states import LOSS, params_of, parts_of, set_random_state


class Repeat:
    """Does recorded steps again and notes, in the order of computation, every value that is not finite."""

    def __init__(self, model: Any, loss_func: Any, opt: Any) -> None:
        self.model, self.loss_func, self.opt = model, loss_func, opt
        self.modules, self.slots = parts_of(model, loss_func, opt)
        self.params = params_of(opt)
        self.device = self.params[0].device
        self.paths: dict[Any, str] = {LOSS: LOSS, **{m: path for path, m in self.modules.items()}}
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.loss_name: str = getattr(loss_func, "__name__", type(loss_func).__name__)
        self.events: list[dict[str, Any]] = []

    def run(self, record: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
        """The finding, or None, and words on what isn't as recorded."""
        usual: set[tuple[str, bool]] = set()                        # not finite in a good step either, as a mask
        words: list[str] = []
        before: dict[str, Any] | None = None
        if autocast := record.get("autocast"):
            self.autocast = partial(torch.autocast, self.device.type, getattr(torch, autocast))
        if record["optimizer"] != type(self.opt).__name__:
            raise ValueError(f"replay: the learner's optimizer is {type(self.opt).__name__} and the record's "
                             f"{record['optimizer']}; build the optimizer as it was for the fit")
        with self.hooked():
            for snap in record["snapshots"]:
                self.put(snap)
                self.note_parameters("step" if before else "start")
                if before and (found := self.first(usual)): return {**found, **place(before)}, words
                words, last = [], snap is record["snapshots"][-1]
                for step in snap["steps"]:
                    before = row = step["row"]
                    good = self.do(step)
                    if not words and row["loss"] is not None and not same_float(self.loss, row["loss"]):
                        words = [f"not repeated bit for bit: the loss of {named(row)} was {row['loss']!r} and is "
                                 f"{self.loss!r}" + ", without compiling" * record["compiled"]
                                 + ", after steps that a callback may have changed; every=1 needs none of them"
                                 * (step is not snap["steps"][0])]
                    if words and not last: continue                 # the next snapshot knows better
                    if row["grad_norm"] is None: row["grad_norm"] = self.norm       # nobody had looked
                    found = self.first(usual)
                    failing = last and step is snap["steps"][-1]
                    if found and (failing or not good or found["phase"] == "step"):
                        return {**found, **place(row)}, words
                    usual |= {key(e) for e in self.events}
                    self.events = []
        return None, [*words, "when repeated no value is to blame: a callback changes loss, gradients or weights, or "
                      "the model counts its steps or draws from another generator than torch's"]

    def put(self, snap: dict[str, Any]) -> None:
        """Put model, loss and optimizer back to where `snap` was taken."""
        have: dict[str, Any] = {
            name: tuple(t.shape) for name, (_, d, k) in self.slots.items() if (t := d[k]) is not None}
        want = {name: tuple(t.shape) for name, t in snap["tensors"].items()}
        if set(snap["modes"]) != set(self.modules):
            names = ", ".join(sorted(set(snap["modes"]) ^ set(self.modules)))
            raise ValueError(f"replay: record and learner don't have the same modules ({names} only in one of them); "
                             "build model and loss as they were for the fit")
        if snap["grads"] is None: have = {name: have.get(name) for name in want}     # weights only
        if have != want:
            name = next(n for n in [*want, *have] if have.get(n) != want.get(n))
            raise ValueError(f"replay: {name} has the shape {have.get(name)} in the learner and {want.get(name)} in "
                             "the record (None: there is none); build model, loss and optimizer as for the fit")
        self.opt.load_state_dict(copy.deepcopy(snap["opt"]))        # it would write into what it was given
        with torch.no_grad():
            for name, was in snap["tensors"].items():
                _, d, k = self.slots[name]
                d[k].copy_(was)
        for path, training in snap["modes"].items(): self.modules[path].training = training
        for i, p in enumerate(self.params if snap["grads"] is not None else ()):
            p.grad = snap["grads"][i].to(p.device, copy=True) if i in snap["grads"] else None
        self.events = []

    def do(self, step: dict[str, Any]) -> bool:
        """Do one step as it was done; whether its loss and gradients are finite. `self.loss` is the loss, a float."""
        row, self.forward = step["row"], True
        self.stack: list[nn.Module] = []
        self.nodes: dict[Any, Any] = {}
        self.norm: float | None = None
        for group, was in zip(self.opt.param_groups, row["groups"], strict=True): group.update(was)
        xb, yb = map_tensors(lambda t: t.to(self.device, copy=True), (step["xb"], step["yb"]))
        set_random_state(step["random"])
        self.note("batch", None, "the batch", (xb, yb))
        with torch.set_grad_enabled(row["in_train"]), self.autocast():
            loss = self.loss_func(self.model(xb), yb)
        self.trace(loss, LOSS)
        self.forward, self.loss = False, loss.item()
        self.note("loss", LOSS, f"the loss, by {self.loss_name}", loss)
        if not math.isfinite(self.loss): return False
        if not row["backward"]: return True
        loss.backward()
        self.note_parameters("backward", lambda p: p.grad, "the gradient of ")
        good = not flaw([p.grad for p in self.params])
        self.norm = math.hypot(*[n.item() for n in norms_of(self.params)])
        if row["stepped"]: self.opt.step()
        if row.get("cleared", row["stepped"]): self.opt.zero_grad()
        if row["stepped"]: self.note_parameters("step")
        return good

    # --- what is seen -----------------------------------------------------------------------------------------

    def note(self, phase: str, m: nn.Module | str | None, what: str, tree: Any) -> None:
        """Write down that `tree`, of which the module `m` is the cause, holds a value that isn't finite, if it does."""
        if not (counts := flaw(tree)): return
        path, kind = self.paths.get(m), self.loss_name if m is LOSS else None if m is None else type(m).__name__
        if phase == "forward" and path is not None and path.startswith(LOSS): phase = "loss"
        self.events.append({"phase": phase, "module": path, "class": kind, "what": what, **counts})

    def note_parameters(self, phase: str, of: Callable[[Tensor], Tensor | None] = lambda p: p, what: str = "") -> None:
        for m, d, k in self.slots.values():
            if isinstance(p := d[k], nn.Parameter) or m is None:
                name = f"parameter {k} of the optimizer" if m is None else f"the {k} of {self.label(m)}"
                self.note(phase, m, what + name, of(p))

    def first(self, usual: Collection[tuple[str, bool]]) -> dict[str, Any] | None:
        """The first event that is none of the `usual` ones, or None."""
        return next((e for e in self.events if key(e) not in usual), None)

    def label(self, m: nn.Module | str) -> str:
        if m is LOSS: return self.loss_name
        return f"{self.paths[m]} {type(m).__name__}" if self.paths[m] else f"the model, a {type(m).__name__}"

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """All modules with a hook before and one after their forward."""
        handles: list[RemovableHandle] = []
        try:
            for m in dict.fromkeys(self.modules.values()):
                handles.append(m.register_forward_pre_hook(self.before, with_kwargs=True))
                handles.append(m.register_forward_hook(self.after))
            yield
        finally:
            for handle in handles: handle.remove()

    def before(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.forward: return                                 # checkpointing does it again in the backward pass
        caller = self.stack[-1] if self.stack else LOSS
        self.trace((args, kwargs), caller)
        self.note("forward", caller, f"what {self.label(caller)} hands to {self.label(m)}", (args, kwargs))
        self.stack.append(m)

    def after(self, m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not self.forward: return
        self.stack.pop()
        self.trace(out, m)
        own = [] if m.training else [k for slots in (m._parameters, m._buffers) for k, t in slots.items() if flaw(t)]
        self.note("forward", m, f"the output of {self.label(m)}"
                  + f" (which has such values in its {', '.join(own)})" * bool(own), out)

    def trace(self, tree: Any, m: nn.Module | str) -> None:
        """Watch the backward pass of the operations that led to `tree`; those without a module yet are of `m`."""
        todo = [t.grad_fn for t in leaves(tree) if torch.is_tensor(t)]
        while todo:
            node = todo.pop()
            if node is None or node in self.nodes: continue
            self.nodes[node] = m
            what = f"a gradient that passes {node.name()} of {self.label(m)}"
            node.register_hook(lambda grads, _, what=what: self.note("backward", m, what, grads))
            todo += [n for n, _ in node.next_functions]


# --- small parts --------------------------------------------------------------------------------------------------

def norms_of(params: Sequence[Tensor]) -> Sequence[Tensor]:
    """The L2 norms of the gradients, one by one."""
    grads = [g._values() if g.is_sparse else g for p in params if (g := p.grad) is not None]
    return torch._foreach_norm(grads) if grads else []


def flaw(tree: Any) -> dict[str, int] | None:
    """How many values are NaN and infinite, and of how many, in the first tensor of `tree` that has some, or None."""
    for t in leaves(tree):
        if not torch.is_tensor(t) or not (t.is_floating_point() or t.is_complex()): continue
        if t.is_sparse: t = t._values()
        if not torch.isfinite(t).all():
            return {"nan": int(t.isnan().sum()), "inf": int(t.isinf().sum()), "of": t.numel()}
    return None


def same_float(a: float, b: float) -> bool: return a == b or (math.isnan(a) and math.isnan(b))


def key(event: dict[str, Any]) -> tuple[str, bool]: return event["what"], event["nan"] > 0


def place(row: dict[str, Any]) -> dict[str, Any]: return {k: row[k] for k in ("in_train", "epoch", "step", "batch")}


def named(at: dict[str, Any]) -> str:
    if at["in_train"]: return f"step {at['step']} (epoch {at['epoch']})"
    return f"batch {at['batch']} of the validation of epoch {at['epoch']} (after {at['step']} steps)"
