"""Several optimizers in one learner, losses in turns (a GAN's two), optimizers that evaluate the loss themselves."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from runner.accumulation import GradientAccumulation
from runner.events import Callback
from runner.optim import needs_closure
from runner.precision import MixedPrecision
from runner.ranks import ranks_of
from runner.stateful import Stateful


class Optimizers(torch.optim.Optimizer):
    """Several optimizers as one, for `Learner`: for parts of a model that are trained by different rules.

        learn.opt = Optimizers(matrices=Muon(...), rest=AdamW(...))
        learn.opt.step()                        # each of them steps
        learn.opt.zero_grad()                   # gradients of all
        learn.opt["rest"], learn.opt.param_groups[-1]["lr"]

    `param_groups` are those of all, in order, and `state` is that of all, so that whatever reads or sets rates, moves,
    saves or restores an optimizer takes it: `Recorder`, `ParamScheduler` (a list of schedules has one for each group),
    `CudaCallback`, `TorchScheduler`, `LR_Find`. `state_dict` is torch's, of one optimizer with all these groups. For
    losses of their own see `Turns`. A group is added to the part that it belongs to.

    Args:
        *unnamed, **named: the optimizers; the unnamed ones are called "0", "1", ...

    Raises:
        ValueError: no optimizer, one that needs a closure, or a parameter that two of them have.
    """

    def __init__(self, *unnamed: torch.optim.Optimizer, **named: torch.optim.Optimizer) -> None:
        self.parts: dict[str, Any] = {**{str(i): opt for i, opt in enumerate(unnamed)}, **named}
        if not self.parts: raise ValueError("Optimizers got none; it needs at least one: Optimizers(gen=..., disc=...)")
        owner: dict[int, str] = {}
        for name, opt in self.parts.items():
            if needs_closure(opt):
                raise ValueError(f"Optimizers: {name!r} is a {type(opt).__name__}, whose step needs a closure; train "
                                 "with it alone, by ClosureStep()")
            for p in [p for group in opt.param_groups for p in group["params"]]:
                if owner.setdefault(id(p), name) != name:
                    raise ValueError(f"Optimizers: {owner[id(p)]!r} and {name!r} have a parameter in common, of shape "
                                     f"{tuple(p.shape)}; each parameter needs one optimizer")
        self._active = list(self.parts)
        self._begin()

    def _begin(self) -> None:
        self.defaults: dict[str, Any] = {}
        for kind in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre",
                     "load_state_dict_post"): setattr(self, f"_optimizer_{kind}_hooks", OrderedDict())

    def __getitem__(self, name: str) -> Any:
        """The optimizer called `name`."""
        if name in self.parts: return self.parts[name]
        raise KeyError(f"there is no optimizer {name!r}; there are: {', '.join(self.parts)}")

    @property
    def param_groups(self) -> list[dict[str, Any]]:     # type: ignore[override]
        """The parameter groups of all, a list made anew; while some are chosen by `only`, of these."""
        return [group for name in self._active for group in self.parts[name].param_groups]

    @property
    def state(self) -> dict[Any, Any]:                  # type: ignore[override]
        """The state of all, a dict made anew; what it has for a parameter is the part's own."""
        return {p: state for opt in self.parts.values() for p, state in opt.state.items()}

    @contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """For as long as it is entered, these are the ones that step, and whose groups are `param_groups`."""
        for name in names: self[name]               # or it says which there are
        before, self._active = self._active, list(names)
        try: yield
        finally: self._active = before

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each along the gradients at hand. Returns what `closure` returns, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad(): loss = closure()
        for name in self._active: self.parts[name].step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all, also of those that don't step now."""
        for opt in self.parts.values(): opt.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group belongs to a part.

        Raises:
            ValueError: always.
        """
        raise ValueError("Optimizers has several optimizers; add the group to one of them: "
                         f"opt[{next(iter(self.parts))!r}].add_param_group(...)")

    def __getstate__(self) -> dict[str, Any]: return {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy; and of `load_state_dict`, which has the groups and the state of all."""
        if "parts" in state:
            self.parts, self._active = state["parts"], list(state["parts"])
            self._begin()
            return
        groups, owned = iter(state["param_groups"]), state["state"]
        for opt in self.parts.values():
            own = [next(groups) for _ in opt.param_groups]
            params = {p for group in own for p in group["params"]}
            of_params = {p: s for p, s in owned.items() if p in params}
            opt.__setstate__({"param_groups": own, "state": defaultdict(dict, of_params)})

    def __repr__(self) -> str:
        return f"Optimizers({', '.join(f'{name}={type(opt).__name__}' for name, opt in self.parts.items())})"


class Turns(Stateful):
    """Trains by turns, in every batch: each of several optimizers with a loss of its own, such as a GAN's two.

        for name, loss_func in losses.items():          # in a batch; afterwards run.loss is the first one's
            loss = loss_func(run)
            loss.backward()
            opt[name].step()
            opt.zero_grad()                             # of all, as the loss has a gradient for others too

    The learner's `opt` is an `Optimizers` with these names, and its model holds both nets. A GAN by hand, and so:

        def disc(run):
            run.fake = run.model.gen(torch.randn(len(run.xb), 8))
            return bce(run.model.disc(run.xb), 1) + bce(run.model.disc(run.fake.detach()), 0)

        def gen(run): return bce(run.model.disc(run.fake), 1)

        learn = Learner(model, Optimizers(disc=Adam(model.disc.parameters()), gen=Adam(model.gen.parameters())), None,
                        DataBunch(train_dl, None))
        run = Runner([Turns(disc=disc, gen=gen)])
        run.fit(5, learn)
        run.turns.losses                                # the last batch's: {"disc": tensor, "gen": tensor}

    `run.loss`, and so histories, is the first loss, in validation too; `run.pred` is None unless a loss sets it. The
    batch's events come once, around the first turn's loss and before its step. Callbacks that wrap a step, such as
    `GradientClip`, do so in each turn, for the optimizer whose turn it is.

    Args:
        **losses: functions `f(run)` that return a loss, under the names of the optimizers, in their order.

    Raises:
        ValueError: no loss; at the start of a fit, an optimizer that isn't `Optimizers` with these names, or beside
            `GradientAccumulation`, a `compile=True` or float16's `MixedPrecision`, which know one loss.
    """

    _order = -30        # the step of all others is done in each turn
    _saved = ("losses",)

    def __init__(self, **losses: Callable[[Any], Tensor]) -> None:
        if not losses: raise ValueError("Turns got no loss; give functions f(run): Turns(disc=..., gen=...)")
        self.functions, self.losses, self._turn = losses, dict[str, Tensor](), next(iter(losses))

    def begin_fit(self) -> None:
        run, self._turn = self.run, next(iter(self.functions))
        names = list(run.opt.parts) if isinstance(run.opt, Optimizers) else None
        if names is None or set(names) != set(self.functions):
            raise ValueError(f"Turns has losses for {', '.join(self.functions)}, and the learner's optimizer is a "
                             f"{type(run.opt).__name__}{' of ' + ', '.join(names) if names else ''}; it needs "
                             f"Optimizers({', '.join(f'{name}=...' for name in self.functions)})")
        for cb in run.cbs: refuse(cb, "Turns has several losses in a batch")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the losses of the last batch."""
        super().load_state_dict(state)
        device = self.run.opt.param_groups[0]["params"][0].device
        self.losses = {name: loss.to(device) for name, loss in self.losses.items()}

    def predict(self) -> None:
        """Nothing: a loss predicts what it needs."""
        self.run.pred = None

    def get_loss(self) -> None:
        """The loss whose turn it is."""
        self.run.loss = self.functions[self._turn](self.run)
        self.losses[self._turn] = self.run.loss.detach()

    def step(self, inner: Callable[[], None]) -> None:
        """The step of each optimizer, and between them the next one's loss and gradients."""
        run, first, stepped = self.run, next(iter(self.functions)), False
        loss = run.loss
        try:
            for name in self.functions:
                self._turn = name
                if name != first:
                    run.opt.zero_grad()
                    run.get_loss()
                    run.backward()
                run.stepped = True
                with run.opt.only(name): inner()
                stepped |= run.stepped
        finally: self._turn, run.loss, run.stepped = first, loss, stepped


class ClosureStep(Callback):
    """For optimizers that evaluate the loss several times in a step, such as torch's LBFGS.

        def closure():
            opt.zero_grad()
            loss = loss_func(model(xb), yb)
            loss.backward()
            return loss
        opt.step(closure)

        run = Runner([ClosureStep()])               # learn.opt = torch.optim.LBFGS(model.parameters())
        run.fit(5, learn)

    The first evaluation is the batch's own, with its events; further ones are made without events, by the steps
    `predict`, `get_loss` and `backward` as callbacks have wrapped them. `run.pred` and `run.loss` stay the first's.
    Take batches as large as fits: such optimizers suppose that the loss is the same function at every step. What is
    done to gradients once in a batch can't be done here, so `GradientClip` would clip those of the first evaluation
    alone.

    Raises:
        ValueError: at the start of a fit, beside `GradientAccumulation`, a `compile=True` or float16's
            `MixedPrecision`.
    """

    def begin_fit(self) -> None:
        for cb in self.run.cbs: refuse(cb, "ClosureStep evaluates a loss several times in a batch")

    def step(self) -> None:
        """`opt.step(closure)`."""
        run = self.run
        pred, loss, first = run.pred, run.loss, True

        def closure() -> Tensor:
            nonlocal first
            if not first:
                run.opt.zero_grad()
                run.predict()
                run.get_loss()
                run.backward()
            first = False
            return ranks_of(run).mean(run.loss)     # by which the optimizer decides, on all processes alike
        try: run.opt.step(closure)
        finally: run.pred, run.loss = pred, loss


def refuse(cb: Any, reason: str) -> None:
    """Raises ValueError for a callback that supposes one loss and one step in a batch."""
    which = None
    if isinstance(cb, GradientAccumulation) and cb.batches > 1: which = "GradientAccumulation"
    if isinstance(cb, MixedPrecision) and cb.scaler is not None: which = "MixedPrecision with float16"
    if getattr(cb, "name", "") == "compiled_step": which = "compile=True"
    if which is None: return
    mend = {"GradientAccumulation": "take larger batches", "compile=True": "fit without compile=True"}
    raise ValueError(f"{reason}, and {which} knows one: {mend.get(which, 'use bfloat16')}")
