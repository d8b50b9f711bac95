"""`AveragedWeights`: averages of the weights over training, and validation with them."""

import copy
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn

from runner.backend import without_hooks
from runner.batches import NoPair, described, leaves, map_tensors
from runner.learner_load import put_learner
from runner.learner_state import learner_state
from runner.ranks import images_of, ranks_of
from runner.stateful import Stateful
from runner.states import random_states

Batches = list[tuple[Any, Any]]                             # pairs of xb and yb, as the model got them
Recalibrate = Callable[[nn.Module, Batches], object]


class AveragedWeights(Stateful):
    """Averages the weights while they are trained, and validates with the averages.

        opt.step()
        averaged_model.update_parameters(model)                 # torch's AveragedModel
        averaged_model.module.counter.copy_(model.counter)      # integers aren't averaged
        ...                                                     # the rest of the epoch
        validate(averaged_model)

    It is used so:

        averaged = AveragedWeights(decay=0.99)
        run = Runner([AvgStatsCallback(accuracy), averaged])
        run.fit(5, learn)                       # valid_loss, valid_accuracy: of the averages
        averaged.apply()                        # now the model has them

    Exponential averages by default, w the weights after a step of the optimizer and v their averages:

        v <- decay v + (1 - decay) w            from v = w at the first

    With `decay=None` v is the plain mean of all w taken (stochastic weight averaging: P. Izmailov et al., "Averaging
    Weights Leads to Wider Optima and Better Generalization", 2018). torch's `AveragedModel` does the averaging: it is
    `averaged_model`, made anew at the start of each fit, and evaluates as a model does.

    Training is bit for bit the training without. The averages are copied into the model at the first batch of a
    validation, in `Runner.evaluate` and `predict` too. Weights and buffers are put back when the pass is over or broken
    off, by whatever, before other callbacks hear of it. A checkpoint that a callback writes in `after_epoch` so has the
    trained weights, and `averaged_model` the averages; only `KeepBest` keeps what was validated. A batch without a step
    of the optimizer (`GradientAccumulation`, `MixedPrecision` that skips one) isn't averaged twice.

    Of the buffers, integers (counters) are copied from the model. The others, which for batch norms are the running
    mean and variance, are treated as `norms` says:

    - "average": averaged like the weights. It costs nothing, and holds up to a lag of the averages.
    - "recalibrate": taken anew before each validation, over the first `n_images` images of the epoch as the model got
      them, with the averaged weights: the mean over batches, as by torch's `update_bn`, for every norm with
      `num_batches_tracked`. Others with `reset_running_stats()`, as RunningBatchNorm, see the batches anew by their
      own rule. All other modules evaluate.
    - "copy": the model's.
    - a function `f(model, batches)` that takes them anew, given pairs `(xb, yb)`: for this project's norms
      `partial(norms.recalibrate, n_images=1000)`. It is needed too where a callback's `predict` doesn't call
      `model(xb)`.

    Args:
        decay: of the exponential averages, from 0 (the last weights) to below 1; None for the plain mean.
        start: so many steps or epochs (see `by`) pass first.
        by: "batch" averages after steps of the optimizer, "epoch" after training passes.
        every: after one in so many of them.
        norms: see above.
        n_images: how many images are kept for "recalibrate" or a function.

    Raises:
        ValueError: an argument out of its range; at the start of a fit, "recalibrate" for a model without such a norm.
    """

    _order = -4         # after CudaCallback has moved the model; the weights are back before others look at them
    _saved = "validated", "_images", "_done", "_due", "_stale"

    def __init__(self, decay: float | None = 0.999, *, start: int = 0, by: Literal["batch", "epoch"] = "batch",
                 every: int = 1, norms: Literal["average", "recalibrate", "copy"] | Recalibrate = "average",
                 n_images: int = 1000) -> None:
        if decay is not None and not (isinstance(decay, (int, float)) and 0 <= decay < 1):
            raise ValueError(f"AveragedWeights: decay is {decay!r}; it must be at least 0 and below 1, such as 0.999, "
                             "or None for the plain mean")
        if by not in ("batch", "epoch"): raise ValueError(f"AveragedWeights: by is {by!r}; choose 'batch' or 'epoch'")
        for name, n, least in (("start", start, 0), ("every", every, 1), ("n_images", n_images, 1)):
            if not isinstance(n, int) or isinstance(n, bool) or n < least:
                raise ValueError(f"AveragedWeights: {name} is {n!r}; it must be an integer of at least {least}")
        if not callable(norms) and norms not in ("average", "recalibrate", "copy"):
            raise ValueError(f"AveragedWeights: norms is {norms!r}; choose 'average', 'recalibrate' or 'copy', or give "
                             "a function f(model, batches)")
        self.decay, self.start, self.by, self.every = decay, start, by, every
        self.norms, self.n_images = norms, n_images
        self.averaged_model: AveragedModel | None = None
        self._of: weakref.ref[nn.Module] | None = None      # the model
        self.validated = False                              # whether this epoch's validation had the averages
        self._clear()

    def _clear(self) -> None:
        self._trained: list[tuple[Tensor, Tensor]] | None = None    # the model's tensors and their trained values
        self._kept: Batches = []
        self._images, self._done, self._due, self._stale = 0, 0, False, False

    @property
    def _renew(self) -> Recalibrate | None:
        if self.norms == "recalibrate": return recalibrate
        return self.norms if callable(self.norms) else None

    # --- averaging --------------------------------------------------------------------------------------------

    def begin_fit(self) -> None:
        model = self.run.model
        if getattr(self.run, "evaluating", False):          # with the averages of the last fit, if it was this model's
            if self._of is None or self._of() is not model: self.averaged_model = None
            return
        self._clear()
        self.validated, self._of = False, weakref.ref(model)
        if self.norms == "recalibrate" and not running_norms(model):
            raise ValueError(f"AveragedWeights: norms is 'recalibrate' and {type(model).__name__} has no norm with "
                             "running statistics; leave it out")
        how: dict[str, Any] = {"avg_fn": mean} if self.decay is None else {
            "multi_avg_fn": partial(exponential, decay=self.decay)}
        made = AveragedModel(nn.Module(), use_buffers=self.norms == "average", **how)
        made.module = copied(model)
        self.averaged_model = made.eval()

    def begin_epoch(self) -> None:
        self.validated, self._kept, self._images, self._due = False, [], 0, False

    def begin_batch(self) -> None:
        if not self.run.in_train and self._trained is None: self._swap()

    def after_pred(self) -> None:
        run = self.run
        if not run.in_train or self._renew is None or self._images >= self.n_images: return
        self._kept.append((run.xb, run.yb))
        self._images += images_of(run)

    def after_step(self) -> None: self._due = True

    def after_batch(self) -> None:
        """Average once all others have done with the step, as one that keeps weights within bounds."""
        if self.by == "batch" and self._due: self._update()

    def begin_validate(self) -> None:
        if self._due: self._update()            # by the epoch; or `GradientAccumulation` made its last step just now
        self._refresh()

    def _update(self) -> None:
        assert self.averaged_model is not None
        self._due = False
        self._done += 1
        if self._done <= self.start or (self._done - self.start) % self.every: return
        self.averaged_model.update_parameters(self.run.model)
        self._stale = self._renew is not None

    def _refresh(self) -> None:
        """Take the running norms anew, if the averages have changed since."""
        if not self._stale or not self._kept: return
        assert self._renew is not None
        assert self.averaged_model is not None
        restore = random_states()
        try:
            with torch.no_grad(): self._renew(self.averaged_model, self._kept)
            ranks_of(self.run).share(self.averaged_model.buffers())         # of norms that saw a process's own part
        finally: restore()
        self._stale = False

    # --- in the model and back --------------------------------------------------------------------------------

    @torch.no_grad()
    def _swap(self) -> None:
        if self.averaged_model is None or not self.averaged_model.n_averaged: return
        self._trained = [(t, t.detach().clone()) for t in tensors_of(self.run.model)]
        self.validated = True
        self._copy(self.run.model)

    @torch.no_grad()
    def _put_back(self) -> None:
        trained, self._trained = self._trained, None
        for t, was in trained or (): t.copy_(was)

    def after_cancel_epoch(self) -> None: self._put_back()

    def after_epoch(self) -> None:
        self._put_back()
        self.begin_validate()       # where there is no validation, it was never called
        self._kept = []

    def after_cancel_train(self) -> None:
        self._put_back()
        if self.run.status != "diverged": self._refresh()

    def after_fit(self) -> None:
        self._put_back()
        self._kept = []

    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Give `model`, or that of the last fit, the averages for good: in place, weights and buffers.

        Raises:
            ValueError: there are no averages, or no model.
        """
        if self.averaged_model is None or not self.averaged_model.n_averaged:
            raise ValueError(f"AveragedWeights has no averages yet: they begin after {self.start} "
                             f"{'steps' if self.by == 'batch' else 'epochs'} of a fit (start={self.start})")
        if model is None and self.__dict__.get("run") is None:
            raise ValueError("AveragedWeights.apply: this is a copy, which has no runner; give it the model")
        self._copy(self.run.model if model is None else model)

    def _copy(self, model: nn.Module) -> None:
        assert self.averaged_model is not None
        for t, average in zip(tensors_of(model), tensors_of(self.averaged_model.module), strict=True): t.copy_(average)

    # --- a checkpoint -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The averages, how many they are of, and the batches kept for the norms.

        Raises:
            TypeError: a batch that is kept is made of other things than tensors, tuples, lists and dicts.
        """
        averages = None if self.averaged_model is None else learner_state(self.averaged_model, None, _Nothing())
        kept = [(xb, None if isinstance(yb, NoPair) else yb) for xb, yb in self._kept]
        for pair in kept: _require_plain(pair)
        return {**super().state_dict(), "averages": averages, "kept": kept,
                "pairs": [not isinstance(yb, NoPair) for _, yb in self._kept],
                "elsewhere": [[t.device.type != "cpu" for t in leaves(pair) if isinstance(t, Tensor)] for pair in kept]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        super().load_state_dict(state)
        device = next(self.run.model.parameters()).device
        self._kept = []
        for kept, paired, elsewhere in zip(state["kept"], state["pairs"], state["elsewhere"], strict=True):
            xb, yb = map_tensors(partial(_moved, device, iter(elsewhere)), kept)
            self._kept.append((xb, yb if paired else NoPair(xb)))
        if state["averages"] is None or self.averaged_model is None: return
        put_learner(self.averaged_model, None, _Nothing(), state["averages"])

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes the averages along, and not the model."""
        return {**super().__getstate__(), "_of": None, "_trained": None, "_kept": []}


class _Nothing:
    """The optimizer of averages."""

    param_groups: tuple[Any, ...] = ()

    def state_dict(self) -> dict[str, Any]: return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: pass


def _moved(device: torch.device, elsewhere: Iterator[bool], t: Tensor) -> Tensor:
    return t.to(device) if next(elsewhere) else t


def _require_plain(batch: Any) -> None:
    """Raises TypeError for a batch that a checkpoint can't hold."""
    if batch is None or isinstance(batch, (Tensor, bool, int, float, str)): return
    if type(batch) not in (tuple, list, dict):
        raise TypeError(f"AveragedWeights keeps {described(batch)} of the batches for the norms, which no checkpoint "
                        "can hold: let the loader or a callback make tensors, tuples, lists and dicts of it, or take "
                        "norms='average' or 'copy'")
    for part in batch.values() if isinstance(batch, dict) else batch: _require_plain(part)


def copied(model: nn.Module) -> nn.Module:
    """A copy of `model` without its hooks. What it has kept of a forward, a tensor with a graph, is copied detached."""
    kept = [t for m in model.modules() for t in leaves(vars(m)) if isinstance(t, Tensor) and not t.is_leaf]
    with without_hooks(model): return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept})


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of `model`, each once."""
    return [*model.parameters(), *model.buffers()]


def exponential(averages: Any, now: Any, n: Any, *, decay: float) -> None:
    """torch's update of exponential averages, except that integers are copied; all are of one dtype."""
    if averages[0].is_floating_point() or averages[0].is_complex():
        get_ema_multi_avg_fn(decay)(averages, now, n)
        return
    for average, t in zip(averages, now, strict=True): average.copy_(t)


def mean(average: Tensor, now: Tensor, n: Tensor | int) -> Tensor:
    """torch's update of a plain mean of `n` values by another, except that integers are copied."""
    if not (average.is_floating_point() or average.is_complex()): return now
    averaged: Tensor = get_swa_avg_fn()(average, now, n)
    return averaged


# --- running norms ------------------------------------------------------------------------------------------------

def running_norms(model: nn.Module) -> list[nn.Module]:
    """The norms of `model` that keep running statistics."""
    return [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)
            and callable(getattr(m, "reset_running_stats", None))]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Batches) -> None:
    """Take the running statistics of the norms in `model` anew over `batches`; all other modules evaluate.

    A norm that counts its batches gets their plain mean: the k-th has the weight 1 / k.
    """
    norms, handles = running_norms(model), []
    modes = [(m, m.training) for m in model.modules()]
    weights = [(m, name, getattr(m, name)) for m in norms for name in ("momentum", "mom")
               if hasattr(m, name) and isinstance(getattr(m, "num_batches_tracked", None), Tensor)]
    try:
        model.eval()
        for m in norms:
            m.reset_running_stats()     # type: ignore[operator]
            m.train()
        for m, name, _ in weights: handles.append(m.register_forward_pre_hook(Cumulative(name)))
        for xb, _ in batches: model(xb)
    finally:
        for handle in handles: handle.remove()
        for m, name, weight in weights: setattr(m, name, weight)
        for m, training in modes: m.training = training


class Cumulative:
    """A forward pre-hook that gives the k-th batch of a norm the weight 1 / k, under the name that it has there."""

    def __init__(self, name: str) -> None: self.name, self.k = name, 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.k += 1
        setattr(module, self.name, 1 / self.k)
