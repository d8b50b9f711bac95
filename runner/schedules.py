"""Schedules of hyper-parameters and the rate finder.

A schedule is a function of the position in training, from 0.0 (start) to 1.0 (end).
"""

import math
from bisect import bisect_right
from functools import partial, wraps
from itertools import accumulate

from runner.accumulation import GradientAccumulation
from runner.batches import length_of
from runner.events import Callback, CancelTrainException, listify
from runner.smoothing import smoothed
from runner.states import snapshot


def annealer(f):
    """Turn `f(start, end, pos)` into `f(start, end)`, which returns a schedule."""
    @wraps(f)
    def _inner(start, end): return partial(f, start, end)
    return _inner


@annealer
def sched_lin(start, end, pos):
    """`start + pos (end - start)`."""
    return (1 - pos) * start + pos * end  # exact at both ends, as `start + pos * (end - start)` is not


@annealer
def sched_cos(start, end, pos):
    """`start + (1 - cos(pi pos)) (end - start) / 2`."""
    w = (1 - math.cos(math.pi * pos)) / 2
    return (1 - w) * start + w * end


@annealer
def sched_no(start, end, pos):
    """`start`, whatever `end` is."""
    return start


def sched_exp(start, end):
    """`start (end / start)^pos`; both ends must be non-zero and of one sign."""
    if not start * end > 0:
        raise ValueError(f"sched_exp got start {start!r} and end {end!r}; an exponential needs both non-zero and of "
                         "one sign: use sched_lin or sched_cos to reach 0")
    return partial(_exp, start, end)


def _exp(start, end, pos):
    return math.copysign(abs(start) ** (1 - pos) * abs(end) ** pos, start)


def combine_scheds(pcts, scheds):
    """One schedule after another: `scheds[i]` runs from 0 to 1 during the fraction `pcts[i]` of training.

        combine_scheds([0.3, 0.7], [sched_lin(0.6, 2.0), sched_lin(2.0, 0.1)])     # warm up, then anneal

    Raises:
        ValueError: fractions that are negative or don't sum to 1 (up to rounding), or not one per schedule; when
            called, a position outside 0 to 1.
    """
    pcts, scheds = [float(p) for p in listify(pcts)], listify(scheds)
    if not pcts or len(pcts) != len(scheds):
        raise ValueError(f"combine_scheds got {len(pcts)} fractions and {len(scheds)} schedules; it needs one fraction "
                         "per schedule, and at least one")
    if any(not p >= 0 for p in pcts) or not math.isclose(sum(pcts), 1, abs_tol=1e-6):
        raise ValueError(f"combine_scheds got the fractions {pcts}, which sum to {sum(pcts):.6g}; they must be at "
                         "least 0 and sum to 1, as [0.3, 0.7] do")
    starts = [0.0, *accumulate(pcts)][:-1]

    def _inner(pos):
        if not -1e-6 <= pos <= 1 + 1e-6:
            raise ValueError(f"the schedule was asked for position {pos!r}; positions lie in 0 (start) to 1 (end)")
        pos = max(pos, 0.0)
        # Among phases that start at the same place all but the last are empty; bisect finds the last. At the very
        # end an empty last phase still has nothing to say, so stay in the last one that has a length.
        i = bisect_right(starts, pos) - 1
        while pcts[i] == 0: i -= 1
        return scheds[i](min((pos - starts[i]) / pcts[i], 1.0))
    return _inner


class ParamScheduler(Callback):
    """Sets the hyper-parameter `pname` of every parameter group before each training batch.

    Args:
        pname: its name in the optimizer, such as "lr" or "momentum".
        sched_funcs: a schedule for all parameter groups or a list with one for each.

    The position is `n_epochs / epochs`: 0 at the first batch and a batch short of 1 at the last. With
    `GradientAccumulation` it is that of the step, in all batches of the group. The callback is named after the
    parameter (`run.param_scheduler_lr`), so that one runner can schedule several.

    Raises:
        ValueError: at the start of a fit, a parameter that the optimizer lacks or a wrong number of schedules; at the
            start of an epoch, a loader without a length.
    """

    _order = 1
    fit_only = True

    def __init__(self, pname, sched_funcs):
        self.pname, self.sched_funcs = pname, sched_funcs

    @property
    def name(self): return f"param_scheduler_{self.pname}"

    def begin_fit(self):
        groups = self.opt.param_groups
        scheds = self.sched_funcs
        self.scheds = list(scheds) if isinstance(scheds, (list, tuple)) else [scheds] * len(groups)
        if len(self.scheds) != len(groups):
            raise ValueError(f"ParamScheduler has {len(self.scheds)} schedules for {self.pname!r} and the optimizer "
                             f"has {len(groups)} parameter groups: give one schedule, or one per group")
        if any(self.pname not in group for group in groups):
            known = ", ".join(k for k in groups[0] if k != "params")
            raise ValueError(f"the optimizer {type(self.opt).__name__} has no parameter {self.pname!r}; choose one of: "
                             f"{known}")

    def begin_epoch(self):
        if self.run.iters is None:
            raise ValueError(f"the training loader, a {type(self.data.train_dl).__name__}, has no length, and a "
                             "schedule goes by the position in it: give the loader a length (__len__), or set "
                             f"{self.pname!r} by the step (n_iter) in a callback of your own")

    def begin_batch(self):
        run = self.run
        if not run.in_train: return
        pos = run.n_epochs / run.epochs
        for group, sched in zip(run.opt.param_groups, self.scheds, strict=True): group[self.pname] = sched(pos)


class LR_Find(Callback):
    """Trains with a rate that grows from `min_lr` to `max_lr`, then puts everything back as it was.

        lr_i = min_lr (max_lr / min_lr)^(i / (steps - 1))

    It ends the fit after `max_iter` steps (or the fit's own, if fewer), or once the loss is not finite, or its
    running average above 4 times the lowest that it had from the 10th step on (at batch size 2 single losses, and
    averages of a few, say nothing). Then weights, buffers, training mode, optimizer and random states (torch's,
    Python's, numpy's, the loaders' generators) are what they were and the gradients are cleared, so that training
    afterwards is bit for bit the training without it. It sets the rate after every other callback.

        finder = LR_Find()
        run.fit(1, learn, cbs=finder)
        finder.suggestion, finder.plot()

    `lrs` and `losses` are lists of floats. At small batches a single loss is mostly noise: take `max_iter` up, to 1,000
    at batch size 2. (The range test is L. N. Smith's, "Cyclical learning rates for training neural networks", 2015.)

    Steps are the optimizer's: with `GradientAccumulation` each has as many losses, of one rate, as it has batches.

    One loss is brought to the host at the end of each batch: the decision to stop needs it.
    """

    _order = 50
    fit_only = undoes_fit = True
    name = "lr_find"

    def __init__(self, max_iter=100, min_lr=1e-6, max_lr=10):
        if not (isinstance(max_iter, int) and max_iter >= 2):
            raise ValueError(f"LR_Find: max_iter is {max_iter!r}; it must be an integer of at least 2, such as 100")
        if not 0 < min_lr < max_lr:
            raise ValueError(f"LR_Find: min_lr is {min_lr!r} and max_lr {max_lr!r}; they must satisfy "
                             "0 < min_lr < max_lr, such as 1e-6 and 10")
        self.max_iter, self.min_lr, self.max_lr = max_iter, min_lr, max_lr
        self.lrs, self.losses, self._restore = [], [], None

    def begin_fit(self):
        self.lrs, self.losses, self._smooth, self._best = [], [], 0.0, math.inf
        cbs = getattr(self.run, "cbs", ())
        group = next((cb.batches for cb in cbs if isinstance(cb, GradientAccumulation)), 1)
        batches = length_of(self.data.train_dl)
        self.steps = self.max_iter if batches is None else max(2, min(self.max_iter,
                                                                      self.epochs * -(-batches // group)))
        self._restore = snapshot(self.model, self.loss_func, self.opt, self.data)
        self.reached = False

    def begin_batch(self):
        if not self.in_train: return
        self.lr = self.min_lr * (self.max_lr / self.min_lr) ** (self.n_iter / (self.steps - 1))
        for group in self.opt.param_groups: group["lr"] = self.lr

    def after_loss(self): self.reached = True

    def after_batch(self):
        if not (self.in_train and self.reached): return
        self.reached = False
        loss = self.loss.item()
        self.lrs.append(self.lr)
        self.losses.append(loss)
        self._smooth = 0.9 * self._smooth + 0.1 * loss
        smooth = self._smooth / (1 - 0.9 ** len(self.losses))
        if len(self.losses) >= 10: self._best = min(self._best, smooth)
        if not math.isfinite(loss) or smooth > 4 * self._best or self.n_iter >= self.steps:
            raise CancelTrainException

    def begin_validate(self):
        return True  # only training steps count here

    def after_fit(self):
        if self._restore is not None: self._restore()
        self._restore = None

    @property
    def suggestion(self):
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
        return 10 ** logs[max(i for i in range(low + 1) if smooth[i] >= half or i == 0)]

    def plot(self, skip_last=0, ax=None):
        """Loss against rate (log axis) with the suggestion, if there is one, marked; returns the axes."""
        from runner.insight import plots
        n = len(self.losses) - skip_last
        try: suggestion = self.suggestion
        except RuntimeError: suggestion = None
        return plots.plot_lr_find(self.lrs[:n], self.losses[:n], suggestion, ax)
