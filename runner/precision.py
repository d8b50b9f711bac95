"""`MixedPrecision`: forward passes in bfloat16 or float16, parameters and their updates in float32."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch

from runner.accumulation import averages_of, backward_of, require_steps
from runner.compiled import CompileError
from runner.events import Callback

NAMES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16,
         "float16": torch.float16, "fp16": torch.float16, "16-mixed": torch.float16}
LEAST_SCALE = 2.0 ** -24        # after 40 skipped steps from 2^16; no gradient overflows because of such a scale


class MixedPrecision(Callback):
    """Prediction and loss under `torch.autocast`; with float16 a `torch.amp.GradScaler` scales the gradients.

        with torch.autocast(device, dtype): loss = loss_func(model(xb), yb)     # validation too
        scaler.scale(loss).backward()                                           # outside of autocast
        scaler.unscale_(opt)                                                    # then GradientClip, if there is one
        scaler.step(opt), scaler.update()                                       # bfloat16: opt.step() alone

    Which operations run in the lower precision is torch's choice: convolutions and products of matrices, and none that
    sums up a loss. bfloat16 has float32's range and needs no scaler. float16 has three bits more and a range in which
    small gradients vanish, so the loss is multiplied by a scale, and where that makes a gradient overflow, the step is
    skipped and the scale halved. A skipped step has no `after_step` and isn't counted in `n_iter`. `skipped_steps`
    lists the `n_iter` at which one was due, `skipped` counts them, `scale` is the scale now, and a line at the end of
    the fit says how many there were.

    `run.loss` is never scaled. In `after_backward` gradients are; a callback that must see them as they are wraps
    `step`, with an `_order` above -4. `TerminateOnNonFinite` watches the loss and leaves gradients to the scaler. Norms
    that average gradients over steps (`RunningBatchNorm(average_backward=True)`) are told the scale.

    The scaler is kept from fit to fit; a scaler's own state can be loaded too. With `compile=True` bfloat16 works;
    float16 is refused.

    Args:
        dtype: `torch.bfloat16`, `torch.float16`, or a name: "bf16", "fp16", "bf16-mixed", "16-mixed".
        init_scale, growth_factor, backoff_factor, growth_interval: with float16, as for `torch.amp.GradScaler`.
        verbose: print the line about skipped steps.

    Raises:
        ValueError: another dtype, a setting out of its range; at the start of a fit, parameters that are float16
            already.
        CompileError: at the start of a fit, float16 in a runner with `compile=True`.
        FloatingPointError: every step was skipped until the scale was below 2^-24: it is not the scale's fault.
    """

    _order = -4         # after CudaCallback, whose device it takes; between GradientAccumulation and GradientClip

    def __init__(self, dtype: torch.dtype | str = torch.bfloat16, *, init_scale: float = 2.0 ** 16,
                 growth_factor: float = 2.0, backoff_factor: float = 0.5, growth_interval: int = 2000,
                 verbose: bool = True) -> None:
        known = NAMES.get(dtype) if isinstance(dtype, str) else dtype
        if known not in (torch.bfloat16, torch.float16):
            raise ValueError(f"MixedPrecision: dtype is {dtype!r}; it must be torch.bfloat16 or torch.float16, or one "
                             f"of {', '.join(map(repr, NAMES))}")
        for name, value, fits, needed in (
                ("init_scale", init_scale, init_scale > 0, "positive, such as 65536.0"),
                ("growth_factor", growth_factor, growth_factor > 1, "more than 1, such as 2.0"),
                ("backoff_factor", backoff_factor, 0 < backoff_factor < 1, "between 0 and 1, such as 0.5"),
                ("growth_interval", growth_interval, growth_interval >= 1, "at least 1, such as 2000")):
            if not fits: raise ValueError(f"MixedPrecision: {name} is {value!r}; it must be {needed}")
        self.dtype, self.verbose, self.device_type = known, verbose, "cpu"
        self.skipped_steps: list[int] = []
        self._settings = init_scale, growth_factor, backoff_factor, growth_interval
        self.scaler = self._scaler_for("cpu") if known == torch.float16 else None

    def _scaler_for(self, device_type: str) -> torch.amp.GradScaler:
        scale, growth, backoff, interval = self._settings
        return torch.amp.GradScaler(device_type, float(scale), growth, backoff, interval)

    def begin_fit(self) -> None:
        require_steps(self)
        run = self.run
        self.skipped_steps = []
        params = [p for group in run.opt.param_groups for p in group["params"]]
        device_type = params[0].device.type
        self._averages = averages_of(run.model, run.loss_func)
        if self.scaler is not None:
            if getattr(run, "compiled_step", None) is not None:
                raise CompileError("MixedPrecision(torch.float16) scales the loss before the backward pass, and a "
                                   "compiled step has computed the gradients by then; use torch.bfloat16, or fit "
                                   "without compile=True")
            half = [p for p in params if p.dtype == torch.float16]
            if half:
                raise ValueError(f"MixedPrecision: {len(half)} of {len(params)} parameters are float16; it needs them "
                                 "in float32 and casts what it computes with: call model.float() before the optimizer "
                                 "is made")
            if device_type != self.device_type:
                state, self.scaler = self.scaler.state_dict(), self._scaler_for(device_type)
                self.scaler.load_state_dict(state)
        self.device_type = device_type

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass: `with run.mixed_precision.autocast(): ...`."""
        return torch.autocast(self.device_type, self.dtype)

    def predict(self, inner: Callable[[], None]) -> None:
        """The prediction, under autocast."""
        with self.autocast(): inner()

    def get_loss(self, inner: Callable[[], None]) -> None:
        """The loss, under autocast."""
        with self.autocast(): inner()

    def backward(self, inner: Callable[[], None]) -> None:
        """The gradients, of the scaled loss with float16."""
        if self.scaler is None: return inner()
        run = self.run
        factor = self.scale if self._averages else 1.0      # who asks for it waits for the device
        backward_of(run, self.scaler.scale(run.loss), factor, inner, self._averages)

    def step(self, inner: Callable[[], None]) -> None:
        """The step, with unscaled gradients, unless one of them isn't finite."""
        run, scaler = self.run, self.scaler
        if scaler is None or all(p.grad is None for g in run.opt.param_groups for p in g["params"]): return inner()
        part = _Optimizer(run.opt.param_groups, inner)
        target = cast(torch.optim.Optimizer, part)
        scaler.unscale_(target)
        try: scaler.step(target)
        except BaseException:
            run.opt.zero_grad()     # they are unscaled, and what comes next would add scaled ones
            raise
        finally: scaler.update()
        if part.stepped: return
        run.stepped = False
        self.skipped_steps.append(run.n_iter)
        if self.scale < LEAST_SCALE:
            raise FloatingPointError(
                f"MixedPrecision skipped {self.skipped} steps and scales by {self.scale:.1e} now, and there is still a "
                "gradient that isn't finite: it is not the scale's fault; TerminateOnNonFinite() finds where it begins")

    def after_fit(self) -> None:
        if self.skipped_steps and self.verbose:
            print(f"{type(self).__name__}: {self.skipped} steps were skipped because of gradients that are not finite, "
                  f"{self.run.n_iter} done; the scale is {self.scale:g}", flush=True)

    @property
    def skipped(self) -> int:
        """How many steps of the last fit were skipped."""
        return len(self.skipped_steps)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by now; this waits for the device. 1.0 without a scaler."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state, None with bfloat16, and the steps that were skipped."""
        return {"scaler": None if self.scaler is None else self.scaler.state_dict(),
                "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, or with the scale of a scaler's state.

        Raises:
            ValueError: a state from another dtype.
        """
        scale = state.get("scaler") if "scaler" in state else state
        if bool(scale) != (self.scaler is not None):
            raise ValueError(f"MixedPrecision: a state {'with' if scale else 'without'} a scale, and the dtype here is "
                             f"{self.dtype}; make it with the dtype that the state was saved with")
        if self.scaler is not None and scale: self.scaler.load_state_dict(scale)
        self.skipped_steps = list(state.get("skipped_steps", self.skipped_steps))


class _Optimizer:
    """What a GradScaler sees of an optimizer; its step is the rest of the loop's, such as clipping."""

    def __init__(self, param_groups: list[dict[str, Any]], inner: Callable[[], None]) -> None:
        self.param_groups, self.inner, self.stepped = param_groups, inner, False

    def step(self) -> None:
        self.stepped = True
        self.inner()


def precision_of(run: Any) -> MixedPrecision | None:
    """The `MixedPrecision` that takes part in the runner's fit, if there is one."""
    return next((cb for cb in getattr(run, "cbs", ()) if isinstance(cb, MixedPrecision)), None)
