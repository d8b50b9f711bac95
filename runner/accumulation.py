"""`GradientAccumulation`: the step of a large batch out of several small ones; and a backward pass of another loss."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from runner.events import Callback, CancelBatchException, CancelEpochException
from runner.ranks import images_of
from runner.stateful import Stateful


class GradientAccumulation(Stateful):
    """One step of the optimizer for each group of `batches` batches, that of one batch with all their images.

        (loss / batches).backward()                             # in each batch; its gradients add up
        if batch % batches == batches - 1 or is_last(batch):    # else the step, and after_step, are left out
            opt.step()
            opt.zero_grad()

    The gradient is that of the mean loss over all images of the group, to rounding, also where the batches have
    unequal sizes and in the last group of an epoch, which may have fewer of them: each batch is weighed by its number
    of images. That is the length of the first axis of `xb`, so a loss whose mean is over something else than images,
    as with `ignore_index` or class weights, comes out a little different, as it does in any mean of such means. What
    a batch is for the model remains the small one: batch norms' statistics, dropout's masks and contrastive losses are
    not those of the large batch.

    What others see: `run.loss`, and so `Recorder` and the averages, is each small batch's own. `run.stepped`,
    `after_step` and `run.n_iter` are about steps of the optimizer. In the batches of a group, `run.n_epochs` stays
    where the group began, at `epoch + group / groups`, so that `ParamScheduler` gives it the rate of the large
    batch. A callback in `after_backward` sees what has been added up so far.

    The last group of an epoch steps in the last batch. Where nobody knows which that is, since the loader has no
    length, the pass was cancelled or its last batch was, it steps before validation. A batch that was cancelled before
    its backward takes no part. When a fit ends early, gradients that wait are dropped.

    Args:
        batches: how many make a group.
        reduction: what the loss function does over a batch, "mean" or "sum". With "sum" nothing is weighed.

    Raises:
        ValueError: `batches` that is no positive integer, another `reduction`.
    """

    _order = -15        # the outermost step, and its last one of an epoch comes before TrainEvalCallback's validation
    _saved = "waiting", "_batch", "_group", "_size", "_began"       # the gradients are the parameters'

    def __init__(self, batches: int, reduction: str = "mean") -> None:
        if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
            raise ValueError(f"GradientAccumulation: batches is {batches!r}; it must be an integer of at least 1")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"GradientAccumulation: reduction is {reduction!r}; it must be 'mean' or 'sum', as "
                             "the loss function does over a batch")
        self.batches, self.reduction = batches, reduction
        self._clear()

    def _clear(self) -> None:
        self.waiting: list[int] = []    # numbers of images of the batches whose gradients wait for the step
        self._now = False

    def begin_fit(self) -> None:
        require_steps(self)
        self._clear()

    def begin_epoch(self) -> None:
        self._averages = averages_of(self.model, self.loss_func)
        self._batch = self._group = 0

    def begin_batch(self) -> None:
        run = self.run
        if not run.in_train: return
        if not self.waiting:
            left = run.iters - self._batch if run.iters else 0
            # A loader may be longer than it says.
            self._size = min(self.batches, left) if left > 0 else self.batches
            groups = -(-run.iters // self.batches) if run.iters else 0
            self._began = run.epoch + self._group / groups if self._group < groups else run.n_epochs
        run.n_epochs, run.stepped = self._began, False      # until it has: a batch that is cancelled hasn't

    @property
    def completes(self) -> bool:
        """Whether the running batch is its group's last, as far as that is known before its backward pass."""
        return len(self.waiting) + 1 >= self._size or self._batch + 1 == self.run.iters

    def backward(self, inner: Callable[[], None]) -> None:
        """The gradients of the batch's part of the group's mean loss."""
        run, n = self.run, images_of(self.run) if self.reduction == "mean" else 1
        first = self.waiting[0] if self.waiting else n
        # As if all were as large as the first; what is wrong about that is made good in the step. Equal batches are
        # divided by their number, as one does by hand, and to the same bit.
        by = 1.0 if self.reduction == "sum" else self._size if n == first else self._size * first / max(n, 1)
        compiled = getattr(run, "compiled_step", None)
        if compiled is None: backward_of(run, run.loss / by if by != 1 else run.loss, 1 / by, inner, self._averages)
        else:
            compiled.divisor = by
            try: inner()
            finally: compiled.divisor = 1.0
        self.waiting.append(n)

    def step(self, inner: Callable[[], None]) -> None:
        """The step, if the group is complete."""
        run = self.run
        if not (self._now or len(self.waiting) >= self._size or self._batch + 1 == run.iters): return
        run.stepped = True
        try:
            taken, meant = sum(self.waiting), self._size * self.waiting[0]
            if self.reduction == "mean" and taken != meant and taken:
                for p in [p for g in run.opt.param_groups for p in g["params"] if p.grad is not None]:
                    p.grad.mul_(meant / taken)
            inner()
        except BaseException:
            run.stepped = False
            run.opt.zero_grad()         # part of a step was done; the group can't go on
            raise
        finally:
            self._clear()
            self._group += 1

    def zero_grad(self, inner: Callable[[], None]) -> None:
        """Clear the gradients, unless they wait."""
        if not self.waiting: inner()

    def after_batch(self) -> None:
        if self.run.in_train: self._batch += 1

    def begin_validate(self) -> None: self._flush()

    def after_epoch(self) -> None: self._flush()

    def _flush(self) -> None:
        """The step for batches that wait at the end of a pass, as in a batch."""
        if not self.waiting: return
        run, self._now = self.run, True
        with suppress(CancelBatchException, CancelEpochException):      # there is nothing left to leave
            try:
                run.step()
                try:
                    if run.stepped: run("after_step")
                finally: run.zero_grad()
            finally: run.n_iter += run.stepped

    def after_fit(self) -> None:
        if self.waiting: self.run.opt.zero_grad()
        self._clear()


def require_steps(cb: Callback) -> None:
    """Raises TypeError in a loop of somebody's own that has events and no steps, where `cb` would do nothing."""
    run = cb.run
    if not hasattr(run, "step"):
        raise TypeError(f"{type(cb).__name__} wraps steps of runner.Runner, and {type(run).__name__} has none; fit "
                        "with a Runner, or do in the loop what the docstring shows")


# --- a backward pass of another loss ------------------------------------------------------------------------------

def averages_of(*parts: object) -> list[Any]:
    """Modules in `parts` that average gradients over steps, each once: those with a method `rescale_(factor)`.

    It multiplies the averages, because the loss will be `factor` times as large from now on.
    """
    modules = dict.fromkeys(m for part in parts if isinstance(part, nn.Module) for m in part.modules())
    return [m for m in modules if callable(getattr(m, "rescale_", None))]


def backward_of(run: Any, loss: Tensor, factor: float, inner: Callable[[], None], averages: Sequence[Any]) -> None:
    """Do `inner`, a backward pass, with `loss`, `factor` times the runner's, in its place.

    `averages` (see `averages_of`) follow for that long, so that outside of a backward pass they are those of the loss
    itself, whatever it is multiplied by.
    """
    own, run.loss = run.loss, loss
    try:
        for m in averages: m.rescale_(factor)
        inner()
    finally:
        run.loss = own
        for m in averages: m.rescale_(1 / factor)
