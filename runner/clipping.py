"""`GradientClip`: no step with gradients above a limit, and a record of how large they were."""

import math
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from runner.accumulation import require_steps
from runner.events import Callback
from runner.rows import Rows
from runner.stateful import column


class GradientClip(Callback):
    """Clips the gradients before each step of the optimizer: their norm, all together, or their values one by one.

        norm = clip_grad_norm_(params, max_norm)        # g <- g min(1, max_norm / norm), by torch.nn.utils
        opt.step()                                      # gradients are whole by then: accumulated and unscaled
        norms.append(norm)                              # before clipping; stays on the device until you ask
        opt.zero_grad()

    So it stands inside of `GradientAccumulation` and `MixedPrecision`, in whatever order they are given. `params` are
    those of all the optimizer's groups that have a gradient.

        clip = GradientClip(1.0)
        run.fit(1, learn, cbs=clip)
        clip.share, clip.norms[-1]                      # how often it clipped; a limit is often read off these
        clip.rows[-100:, ("step", "norm", "clipped")]

    `math.inf` as the limit only records. A step that is not finite has a norm that isn't, and counts as clipped; use
    `TerminateOnNonFinite` to stop there. Events see the gradients as they were. The record is of the last fit.

    Args:
        max_norm: the largest norm of all gradients as one vector, such as 1.0.
        max_value: instead, the largest absolute value of a single entry; what is recorded as the norm is then the
            largest absolute value, so it clipped where that is above the limit.
        norm_type: which norm; 2 is the Euclidean one, `math.inf` the largest absolute value.

    Raises:
        ValueError: not exactly one of `max_norm` and `max_value`, or one that isn't positive.
    """

    _order = -3         # inside of MixedPrecision

    def __init__(self, max_norm: float | None = None, max_value: float | None = None, norm_type: float = 2.0) -> None:
        if (max_norm is None) == (max_value is None):
            raise ValueError(f"GradientClip got max_norm={max_norm!r} and max_value={max_value!r}; it needs one of the "
                             "two, such as GradientClip(max_norm=1.0) or GradientClip(max_value=0.5)")
        for name, value in (("max_norm", max_norm), ("max_value", max_value), ("norm_type", norm_type)):
            if value is None: continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"GradientClip: {name} is {value!r}; it must be a positive number, such as 1.0")
        self.max_norm, self.max_value, self.norm_type = max_norm, max_value, norm_type
        self._clear()

    def _clear(self) -> None:
        self._norms: list[float] = []
        self._waiting: list[Tensor] = []        # norms that still lie on the device
        self._at = array("q")                   # epoch and step of each

    def begin_fit(self) -> None:
        require_steps(self)
        self._clear()

    def step(self, inner: Callable[[], None]) -> None:
        """Clip, then step."""
        run = self.run
        params = [p for group in run.opt.param_groups for p in group["params"] if p.grad is not None]
        if params:
            self._at.extend((run.epoch, run.n_iter))
            if self.max_norm is not None: norm = clip_grad_norm_(params, self.max_norm, self.norm_type)
            else:
                norm = get_total_norm([p.grad for p in params], math.inf)
                clip_grad_value_(params, self.max_value or math.inf)
            self._waiting.append(norm.detach())
        inner()

    def after_epoch(self) -> None: self._fetch()

    def after_fit(self) -> None: self._fetch()

    def _fetch(self) -> None:
        """Bring the norms that still lie on the device to the host, in one transfer."""
        if self._waiting: self._norms += torch.stack(self._waiting).tolist()
        self._waiting = []

    @property
    def norms(self) -> list[float]:
        """The norm of the gradients before clipping, one for each step; this waits for the device."""
        self._fetch()
        return self._norms

    @property
    def rows(self) -> Rows:
        """One row for each step, made anew at each call: `{"epoch": 0, "step": 0, "norm": 2.5, "clipped": True}`."""
        limit = self.max_norm if self.max_value is None else self.max_value
        return Rows({"epoch": epoch, "step": step, "norm": norm, "clipped": not norm <= (limit or math.inf)}
                    for epoch, step, norm in zip(self._at[::2], self._at[1::2], self.norms, strict=True))

    @property
    def share(self) -> float:
        """The share of the steps that were clipped, 0 to 1; NaN before any."""
        clipped: list[bool] = self.rows["clipped"]
        return sum(clipped) / len(clipped) if clipped else math.nan

    def state_dict(self) -> dict[str, Any]:
        """The record, in columns."""
        return {"norms": column(self.norms), "at": column(self._at, "q")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the steps of `state`."""
        self._norms, self._waiting, self._at = state["norms"].tolist(), [], array("q", state["at"].tolist())

    def __getstate__(self) -> dict[str, Any]:
        self._fetch()
        return super().__getstate__()
