"""`LR_Find`: the range test for learning rates, and what it found."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from runner.accumulation import GradientAccumulation
from runner.batches import length_of
from runner.compiled import CompiledStep
from runner.events import Callback, CancelTrainException
from runner.ranks import ranks_of
from runner.rows import Rows
from runner.smoothing import smoothed
from runner.states import loader_states, random_states
from runner.torch_scheduler import remembered
from runner.undo import Undo, class_attributes, holding

if TYPE_CHECKING:
    from runner.insight.plots import Axes


@dataclass(frozen=True, repr=False)
class LRFindResult:
    """What a search has found.

        lr = run.find_lr(learn)
        lr.suggestion, lr.curve["lr", "loss"]
        lr.plot()

    `lrs` and `losses` are lists of floats, one for each batch; `ratios` has for each parameter group what its rate is
    a multiple of: 1.0 for that of the largest rate, to which `lrs` and `suggestion` belong.
    """

    lrs: Sequence[float]
    losses: Sequence[float]
    ratios: Sequence[float] = (1.0,)

    @property
    def suggestion(self) -> float:
        """The rate at which the loss has fallen half of its way, the last time before its minimum: a float.

        For a smooth fall that is its steepest point, and noise moves it less. The losses are smoothed over an eighth
        of the steps; the fall counts from the first quarter's mean.

        Raises:
            RuntimeError: before a search, or when the fall doesn't stand out of the noise (3 standard errors).
        """
        finite = [(math.log10(lr), loss) for lr, loss in zip(self.lrs, self.losses, strict=True) if math.isfinite(loss)]
        if len(finite) < 8:
            raise RuntimeError(f"LR_Find has {len(finite)} finite losses and needs at least 8 for a suggestion: call "
                               "run.fit(1, learn, cbs=finder) first, with a smaller min_lr if the loss diverged")
        logs, losses = zip(*finite, strict=True)
        width = max(3, len(losses) // 8)
        smooth = smoothed(losses, width)
        first = losses[:len(losses) // 4]
        top = sum(first) / len(first)
        low = min(range(len(smooth)), key=smooth.__getitem__)
        noise = math.sqrt(sum((v - top) ** 2 for v in first) / len(first) * (1 / width + 1 / len(first)))
        if top - smooth[low] < 3 * noise:
            raise RuntimeError(f"LR_Find saw the loss fall by {top - smooth[low]:.3g}, which does not stand out of its "
                               f"noise ({3 * noise:.3g}): take more steps than {len(losses)} (max_iter and epochs) or "
                               "larger batches")
        half = (top + smooth[low]) / 2
        return float(10 ** logs[max(i for i in range(low + 1) if smooth[i] >= half or i == 0)])

    @property
    def suggestion_per_group(self) -> list[float]:
        """The suggestion for each parameter group, in the ratio that their rates have."""
        best = self.suggestion
        return [best * ratio for ratio in self.ratios]

    @property
    def curve(self) -> Rows:
        """One row per batch: `{"lr": 1e-6, "loss": 2.3, "smoothed": 2.31}`, smoothed as for `suggestion`."""
        means = smoothed(self.losses, max(3, len(self.losses) // 8))
        return Rows({"lr": lr, "loss": loss, "smoothed": mean}
                    for lr, loss, mean in zip(self.lrs, self.losses, means, strict=True))

    def plot(self, skip_last: int = 0, ax: "Axes | None" = None) -> "Axes":
        """Loss against rate (log axis) with the suggestion, if there is one, marked; returns the axes."""
        from runner.insight import plots
        n = len(self.losses) - skip_last
        return plots.plot_lr_find(self.lrs[:n], self.losses[:n], self._suggested(), ax)

    def _suggested(self) -> float | None:
        try: return self.suggestion
        except RuntimeError: return None

    def __repr__(self) -> str:
        best = self._suggested()
        if not self.lrs: return "LRFindResult(no search yet)"
        return (f"LRFindResult({'no suggestion' if best is None else f'suggestion {best:.2g}'}, {len(self.lrs)} losses "
                f"at rates from {self.lrs[0]:.2g} to {self.lrs[-1]:.2g})")


class LR_Find(Callback):
    """Trains with a rate that grows from `min_lr` to `max_lr`, then puts everything back as it was.

        lr_i = min_lr (max_lr / min_lr)^(i / (steps - 1))

    It ends the fit after `max_iter` steps (or the fit's own, if fewer), or once the loss is not finite, or its
    running average above 4 times the lowest that it had from the 10th step on (at batch size 2 single losses, and
    averages of a few, say nothing). It sets the rate after every other callback. Of several parameter groups the one
    with the largest rate has lr_i, and all keep the ratio that their rates have.

        finder = LR_Find()
        run.fit(1, learn, cbs=finder)               # or lr = run.find_lr(learn), which returns finder.result
        lr = finder.result                          # its suggestion, plot, lrs and losses are the finder's too
        lr.suggestion, lr.suggestion_per_group, lr.curve, lr.plot()

    Then all is as it was, so that training afterwards is bit for bit the training without a search: weights, buffers
    and all that the modules hold, training mode, optimizer, random states (torch's, Python's, numpy's, the loaders'
    generators), the attributes of the runner and those of its callbacks, with all that these hold in turn, such as an
    average of the weights, a history, a scheduler, a model of their own. Gradients are cleared. No epoch ends in a
    search: nobody hears `after_epoch`, and there is no validation. `run.status` is "ok".

    What callbacks print or write to files meanwhile stays. Callbacks that are given together with the finder, to the
    runner or for this fit, belong to the search and keep what they saw: `Runner([LR_Find(), Recorder()])` is a runner
    for searches.

    `lrs` and `losses` are lists of floats. At small batches a single loss is mostly noise: take `max_iter` up, to 1,000
    at batch size 2. (The range test is L. N. Smith's, "Cyclical learning rates for training neural networks", 2015.)

    Steps are the optimizer's: with `GradientAccumulation` each has as many losses, of one rate, as it has batches.

    One loss is brought to the host at the end of each batch: the decision to stop needs it.
    """

    _order = 50
    fit_only = undoes_fit = True
    name = "lr_find"

    def __init__(self, max_iter: int = 100, min_lr: float = 1e-6, max_lr: float = 10) -> None:
        if not (isinstance(max_iter, int) and max_iter >= 2):
            raise ValueError(f"LR_Find: max_iter is {max_iter!r}; it must be an integer of at least 2, such as 100")
        if not 0 < min_lr < max_lr:
            raise ValueError(f"LR_Find: min_lr is {min_lr!r} and max_lr {max_lr!r}; they must satisfy "
                             "0 < min_lr < max_lr, such as 1e-6 and 10")
        self.max_iter, self.min_lr, self.max_lr = max_iter, min_lr, max_lr
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.ratios: list[float] = []
        self._own: dict[int, tuple[list[Any], Any]] = {}        # a group's parameters and its own rate, by their id
        self._ended = self._searching = self._alone = False
        self._restore: Undo | None = None

    @contextmanager
    def around_fit(self, run: Any, learn: Any) -> Iterator[None]:
        """What a search changes is put back when all is over."""
        self._alone = all(cb is not self for cb in run.cbs)
        attributes = {**vars(run), "cbs": [*run.cbs]}
        others = [cb for cb in run.cbs if self._alone and not isinstance(cb, CompiledStep)]     # which keeps a cache
        restore = self._begin(learn, others, (run, attributes, learn))
        try: yield
        finally:
            restore()
            self._searching = False
        status = run.status
        vars(run).clear()
        vars(run).update(attributes)
        run.status = "ok" if self._ended or status == "diverged" else status     # a search means to diverge

    def _begin(self, learn: Any, others: list[Any], aside: tuple[Any, ...]) -> Undo:
        """Begin a search; returns a function that puts back what `learn` and the callbacks `others` hold now."""
        self.lrs, self.losses, self._smooth, self._best, self._ended = [], [], 0.0, math.inf, False
        opt, data = learn.opt, learn.data
        self._own = {id(g["params"]): (g["params"], _copied(g["lr"])) for g in opt.param_groups}
        self._largest = max((_largest(lr) for _, lr in self._own.values()), default=0.0)
        self.ratios = [_largest(lr) / self._largest if self._largest else 1.0 for _, lr in self._own.values()]
        loaders = getattr(data, "train_dl", None), getattr(data, "valid_dl", None)
        classes = [class_attributes(cb, Callback) for cb in others if isinstance(cb, Callback)]
        roots = [learn.model, learn.loss_func, opt, *others, *(v for _, values in classes for v in values)]
        parts = [*(undo for undo, _ in classes), remembered(opt), loader_states(*loaders), random_states(),
                 holding(roots, aside=(*aside, data, *loaders, self))]

        def restore() -> None:
            for undo in parts: undo()
            opt.zero_grad()
            self._own = {}
        self._searching = True
        return restore

    def begin_fit(self) -> None:
        run = self.run
        if not self._searching: self._restore = self._begin(run, [], (run,))    # a runner that has no around_fit
        elif self._alone: run._answers["after_epoch"] = []
        self._searching = False
        group = next((cb.batches for cb in run.cbs if isinstance(cb, GradientAccumulation)), 1)
        batches = length_of(run.data.train_dl)
        self.steps = self.max_iter if batches is None else max(2, min(self.max_iter, run.epochs * -(-batches // group)))
        self.reached = False

    def begin_batch(self) -> None:
        run = self.run
        if not run.in_train: return
        self.lr = self.min_lr * (self.max_lr / self.min_lr) ** (run.n_iter / (self.steps - 1))
        for group in run.opt.param_groups:
            params, own = self._own.get(id(group["params"])) or (group["params"], _copied(group["lr"]))
            self._own[id(params)] = params, own             # one that is added in mid-fit has its own from then on
            group["lr"] = self.lr * (own / self._largest) if self._largest else self.lr

    def after_loss(self) -> None: self.reached = True

    def after_batch(self) -> None:
        run = self.run
        if not (run.in_train and self.reached): return
        self.reached = False
        loss = ranks_of(run).mean(run.loss).item()
        self.lrs.append(self.lr)
        self.losses.append(loss)
        self._smooth = 0.9 * self._smooth + 0.1 * loss
        smooth = self._smooth / (1 - 0.9 ** len(self.losses))
        if len(self.losses) >= 10: self._best = min(self._best, smooth)
        if not math.isfinite(loss) or smooth > 4 * self._best or run.n_iter >= self.steps:
            self._ended = True
            raise CancelTrainException

    def begin_validate(self) -> bool:
        return True  # only training steps count here

    def after_fit(self) -> None:
        restore, self._restore = self._restore, None
        if restore is not None: restore()

    # --- what it found ----------------------------------------------------------------------------------------

    @property
    def result(self) -> LRFindResult:
        """What the last search has found, an object of its own."""
        return LRFindResult([*self.lrs], [*self.losses], [*self.ratios] or [1.0])

    @property
    def suggestion(self) -> float:
        """See `LRFindResult.suggestion`."""
        return self.result.suggestion

    @property
    def suggestion_per_group(self) -> list[float]:
        """See `LRFindResult.suggestion_per_group`."""
        return self.result.suggestion_per_group

    @property
    def curve(self) -> Rows:
        """See `LRFindResult.curve`."""
        return self.result.curve

    def plot(self, skip_last: int = 0, ax: "Axes | None" = None) -> "Axes":
        """See `LRFindResult.plot`."""
        return self.result.plot(skip_last, ax)

    def __getstate__(self) -> dict[str, Any]: return {**super().__getstate__(), "_own": {}, "_restore": None}


def search(run: Any, learn: Any, **kwargs: Any) -> LRFindResult:
    """The search of `Runner.find_lr`, over as many epochs as it needs."""
    finder = LR_Find(**kwargs)
    group = next((cb.batches for cb in run.cbs if isinstance(cb, GradientAccumulation)), 1)
    steps = -(-(length_of(learn.data.train_dl) or 1) // group)          # of an epoch
    run.fit(-(-finder.max_iter // steps), learn, cbs=finder)
    return finder.result


def _copied(lr: Any) -> Any: return lr.detach().clone() if isinstance(lr, Tensor) else lr


def _largest(lr: Any) -> float: return float(lr.max()) if isinstance(lr, Tensor) else float(lr)
