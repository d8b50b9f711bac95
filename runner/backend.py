"""Which convolutions a CPU should use: oneDNN's or torch's own, on how many threads. Measured, not guessed."""

import copy
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from runner.batches import first_tensor, map_tensors
from runner.ranks import images_of, on_its_own, ranks_of
from runner.stateful import Stateful
from runner.states import random_states

SHARE = 0.01    # of the fit's training batches may go into the measurement
MOST = 20       # steps of each setting
FEWEST = 3      # below this many there is nothing to measure, and the settings stay
GAIN = 0.9      # another setting must take at most this much of the time of the user's own
THREADS = 0.75  # and more threads at most this much of the time of fewer
LARGER = 8      # batches so many times as large as the measured ones say something else

Setting = tuple[bool, int]      # whether oneDNN's, on how many threads


class CPUBackendCallback(Stateful):
    """Chooses the convolution backend and the number of threads for the length of a fit on a CPU.

    torch hands convolutions to oneDNN, whose set-up per call outweighs the work of a small batch: a step of the
    lesson's network at batch size 2 takes about half the time with torch's own; from batch size 16 on oneDNN is the
    faster one. So before the first training batch forward and backward are timed with each setting, in turn, on a copy
    of the model and this batch; the settings stay unless another takes at most 0.9 of the time. A second thread must
    bring it to 0.75, for beside other work it can make a step several times as long. Weights, buffers, hooks and
    random state are as they were; the measurement takes about 1 % of the fit's training batches and is left out where
    that is too few to tell. Validation in batches 8 times as large as the measured one, or more, goes by the user's own
    settings. After the fit they are back.

    The choice comes with rounding of its own. To repeat a fit bit for bit, give the choice of the first, or a rule. A
    fit that is resumed takes it over, for training and for validation.

    Args:
        onednn, threads: the setting to use, unmeasured; None is measured (if both are) or left as it is. `onednn` may
            be a rule, a function of the images in a batch: it is asked about the first batch of the training, and of
            each validation, and answers for those that follow. One that can't be counted has 0 images.

    `choice` is `{"onednn": bool, "threads": int}` once a fit has begun, `times` maps `(onednn, threads)` to the median
    milliseconds measured, and `reason` says in words why.
    """

    _order = 100  # after whatever changes the batch
    _saved = "choice", "reason", "_measured", "_settled"
    fit_only = True

    def __init__(self, onednn: bool | Callable[[int], bool] | None = None, threads: int | None = None) -> None:
        if threads is not None and not (isinstance(threads, int) and threads >= 1):
            raise ValueError(f"threads is {threads!r}; it must be a positive integer, or None to have it measured")
        self.onednn, self.threads = onednn, threads
        self.choice: dict[str, Any] | None = None
        self.times: dict[Setting, float] = {}
        self.reason = "no fit has begun"
        self._before: Setting | None = None         # the user's own
        self._usual: Setting | None = None          # and as it was when the fit began, which may be resumed elsewhere
        self._measured: int | None = None           # images in the measured batch
        self._settled = self._validating = False

    def begin_fit(self) -> None:
        self._before = onednn, threads = bool(torch.backends.mkldnn.enabled), torch.get_num_threads()
        self._usual = self._before
        self.choice, self.times, self._settled, self._measured = None, {}, False, None
        if callable(self.onednn) or (self.onednn is None and self.threads is None): return
        self._use(onednn if self.onednn is None else bool(self.onednn), self.threads or threads, "as given")

    def begin_epoch(self) -> None:
        if (self._measured or callable(self.onednn)) and self.choice: use_backend(**self.choice)

    def begin_validate(self) -> None: self._validating = False

    def begin_batch(self) -> None:
        if self.run.in_train:
            if self._settled or not self._before: return
            if callable(self.onednn): self._use(*self._by_rule(self.onednn), "by rule")
            else: self._settle(self._before)
            ranks = ranks_of(self.run)
            if ranks.size > 1:
                chosen = self.choice or {}
                onednn, threads, self.times, self._measured, reason = ranks.first(
                    (chosen["onednn"], chosen["threads"], self.times, self._measured, self.reason))
                self._use(onednn, threads, reason)
        elif callable(self.onednn):
            if not self._validating and self._before: use_backend(*self._by_rule(self.onednn))
            self._validating = True
        elif self._measured and self._usual and images_of(self.run) >= LARGER * self._measured:
            use_backend(*self._usual)

    def _by_rule(self, rule: Callable[[int], bool]) -> Setting:
        """What the rule says of the batch at hand"""
        try: images = images_of(self.run)
        except TypeError: images = 0
        return bool(rule(images)), self.threads or torch.get_num_threads()

    def _settle(self, now: Setting) -> None:
        """Choose by the batch at hand, the first; `now` is the user's own setting."""
        onednn = (True, False) if torch.backends.mkldnn.is_available() else (now[0],)
        settings = list(dict.fromkeys([now, *((o, t) for o in onednn for t in (now[1], 1))]))
        xb = first_tensor(self.xb)
        if xb is None or xb.device.type != "cpu": return self._use(*now, "the batch is no tensor on a CPU")
        if self.iters is None: return self._use(*now, "nobody knows how many batches there are")
        steps = min(MOST, int(SHARE * self.iters * (self.epochs - self.epoch) / len(settings)))
        if len(settings) == 1: return self._use(*now, "there is nothing to choose from")
        if steps < FEWEST: return self._use(*now, "too few batches to be worth a measurement")
        try: times = self._measure(settings, steps)
        # What is wrong with the model the fit itself will say; one that can't be copied may be a good one.
        except Exception as e: return self._use(*now, f"a copy of the model failed ({type(e).__name__}: {e})")
        finally: use_backend(*now)
        self.times = {s: statistics.median(t) * 1e3 for s, t in times.items()}
        best = min(self.times, key=self.times.__getitem__)
        if self.times[best] > GAIN * self.times[now]: best = now
        else:
            fewer = [s for s in self.times if s[1] < best[1] and THREADS * self.times[s] <= self.times[best]]
            best = min(fewer, key=self.times.__getitem__, default=best)
        self._measured = images_of(self.run)
        self._use(*best, "measured: " + ", ".join(f"{_words(*s)} {ms:.2f} ms" for s, ms in self.times.items()))

    def after_fit(self) -> None:
        if self._before is not None: use_backend(*self._before)
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """The choice and what it comes from."""
        return {**super().state_dict(), "times": [(*s, ms) for s, ms in self.times.items()], "usual": self._usual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Use what was chosen then."""
        super().load_state_dict(state)
        self.times = {(onednn, threads): ms for onednn, threads, ms in state["times"]}
        self._usual = None if state["usual"] is None else (bool(state["usual"][0]), int(state["usual"][1]))
        if self.choice is not None: use_backend(**self.choice)

    def _use(self, onednn: bool, threads: int, reason: str) -> None:
        self.choice, self.reason, self._settled = {"onednn": onednn, "threads": threads}, reason, True
        use_backend(onednn, threads)

    def _measure(self, settings: Sequence[Setting], steps: int) -> dict[Setting, list[float]]:
        """Seconds of `steps` forward and backward passes with each of `settings`, in turn, after one uncounted each.

        A setting whose median is twice the best's is out of the next round.
        """
        restore = random_states()
        try:
            with without_hooks(self.model, self.loss_func):
                model, loss_func = copy.deepcopy((self.model, self.loss_func))
            on_its_own(model, loss_func)
            xb, yb = map_tensors(torch.clone, self.xb), self.yb

            def seconds(setting: Setting) -> float:
                use_backend(*setting)
                start = time.perf_counter()
                loss_func(model(xb), yb).backward()
                return time.perf_counter() - start
            for s in settings: seconds(s)
            times: dict[Setting, list[float]] = {s: [] for s in settings}
            alive = settings
            for _ in range(steps):
                for s in alive: times[s].append(seconds(s))
                best = min(statistics.median(times[s]) for s in alive)
                alive = [s for s in alive if statistics.median(times[s]) < 2 * best]
            return times
        finally: restore()


def use_backend(onednn: bool, threads: int) -> None:
    torch.backends.mkldnn.set_flags(onednn)  # setting the attribute fails after `disable_global_flags`
    if torch.get_num_threads() != threads: torch.set_num_threads(threads)


def _words(onednn: bool, threads: int) -> str:
    return f"{'oneDNN' if onednn else 'own convolutions'} on {threads} thread{'s' * (threads > 1)}"


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def without_hooks(*tops: object) -> Iterator[None]:
    """The modules' hooks set aside: copied along they would write into what they write into, or copy a whole run."""
    modules = [m for top in tops if isinstance(top, torch.nn.Module) for m in top.modules()]
    saved = [(m, name, m.__dict__[name]) for m in modules for name in _HOOKS if m.__dict__.get(name)]
    try:
        for m, name, _ in saved: m.__dict__[name] = OrderedDict()
        yield
    finally:
        for m, name, hooks in saved: m.__dict__[name] = hooks
