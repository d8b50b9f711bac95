"""What it costs to look: the runner with statistics of its layers and norms, or a watch on its losses, against without.

All layers: the five conv layers and the linear one. Activations, gradients and updates each with mean, standard
deviation, extremes, shares near zero and not finite, and a histogram of 40 bins. nn.BatchNorm2d, one thread; at batch
size 2 without oneDNN, at 64 with it. Milliseconds per training step of whole fits without validation, in a steady
state: no first batches are measured besides.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn, optim

from experiments.bench import Config
from experiments.bench.runner import Fit, Loader, Means, per_step, trainer, with_runner
from experiments.bench.timing import row
from experiments.results import Row
from runner import (
    ActivationStats,
    Callback,
    DataBunch,
    GradientStats,
    Hooks,
    Learner,
    NormStats,
    ParameterStats,
    TerminateOnNonFinite,
    append_stats,
)

STEADY: dict[str, Any] = {"first": 0, "verbose": False}

# arm: (what makes its callbacks, {batch size: the ratio aimed at})
LOOKS: dict[str, tuple[Callable[[], list[Callback]], dict[int, float]]] = {
    "ActivationStats": (lambda: [ActivationStats(**STEADY)], {64: 1.25}),
    "ActivationStats(every=10)": (lambda: [ActivationStats(every=10, **STEADY)], {2: 1.10, 64: 1.05}),
    "GradientStats(every=10)": (lambda: [GradientStats(every=10, **STEADY)], {}),
    "ParameterStats(every=10)": (lambda: [ParameterStats(every=10, **STEADY)], {}),
    "NormStats(every=10)": (lambda: [NormStats(every=10, **STEADY)], {}),
    "TerminateOnNonFinite": (lambda: [TerminateOnNonFinite()], {}),
    "TerminateOnNonFinite(grads=False)": (lambda: [TerminateOnNonFinite(grads=False)], {}),
}


def with_append_stats(model: nn.Sequential, opt: optim.Optimizer, dl: Loader) -> Means:
    """`with_runner` with means and standard deviations of every conv layer's output at every step."""
    with Hooks(model[:5], append_stats): return with_runner(model, opt, dl)


def looking(make: Callable[[], list[Callback]]) -> Fit:
    """A function that trains as `with_runner` does, with the callbacks that `make()` returns."""
    def f(model: nn.Sequential, opt: optim.Optimizer, dl: Loader) -> None:
        trainer(*make()).fit(1, Learner(model, opt, F.cross_entropy, DataBunch(dl, None, 10)))
    return f


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    arms: dict[str, Fit] = {"Runner": with_runner, "append_stats": with_append_stats,
                            **{name: looking(make) for name, (make, _) in LOOKS.items()}}
    found = []
    for size, batches in ((2, 100), (64, 20)):
        times = per_step(arms, size, batches, config)
        found += [row("hooks", f"batch {size}", "Runner", None, times)]
        found += [row("hooks", f"batch {size}", name, "Runner", times,
                      LOOKS[name][1].get(size) if name in LOOKS else None)
                  for name in list(arms)[1:]]
    return found
