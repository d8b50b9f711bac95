"""What it costs to look: the runner with statistics of its layers and norms, or a watch on its losses, against without.

All layers: the five conv layers and the linear one. Activations, gradients and updates each with mean, standard
deviation, extremes, shares near zero and not finite, and a histogram of 40 bins. nn.BatchNorm2d, one thread; at batch
size 2 without oneDNN, at 64 with it. Milliseconds per training step of whole fits without validation, in a steady
state: no first batches are measured besides.
"""

import torch.nn.functional as F

from experiments.bench.runner import per_step, trainer, with_runner
from experiments.bench.timing import row
from runner import (
    ActivationStats,
    DataBunch,
    GradientStats,
    Hooks,
    Learner,
    NormStats,
    ParameterStats,
    TerminateOnNonFinite,
    append_stats,
)

STEADY = {"first": 0, "verbose": False}

# arm: (what makes its callbacks, {batch size: the ratio aimed at})
LOOKS = {
    "ActivationStats": (lambda: [ActivationStats(**STEADY)], {64: 1.25}),
    "ActivationStats(every=10)": (lambda: [ActivationStats(every=10, **STEADY)], {2: 1.10, 64: 1.05}),
    "GradientStats(every=10)": (lambda: [GradientStats(every=10, **STEADY)], {}),
    "ParameterStats(every=10)": (lambda: [ParameterStats(every=10, **STEADY)], {}),
    "NormStats(every=10)": (lambda: [NormStats(every=10, **STEADY)], {}),
    "TerminateOnNonFinite": (lambda: [TerminateOnNonFinite()], {}),
    "TerminateOnNonFinite(grads=False)": (lambda: [TerminateOnNonFinite(grads=False)], {}),
}


def with_append_stats(model, opt, dl):
    """`with_runner` with means and standard deviations of every conv layer's output at every step."""
    with Hooks(model[:5], append_stats): return with_runner(model, opt, dl)


def looking(make):
    """A function that trains as `with_runner` does, with the callbacks that `make()` returns."""
    def f(model, opt, dl): trainer(*make()).fit(1, Learner(model, opt, F.cross_entropy, DataBunch(dl, None, 10)))
    return f


def rows(config):
    """The part's rows."""
    arms = {"Runner": with_runner, "append_stats": with_append_stats,
            **{name: looking(make) for name, (make, _) in LOOKS.items()}}
    found = []
    for size, batches in ((2, 100), (64, 20)):
        times = per_step(arms, size, batches, config)
        found += [row("hooks", f"batch {size}", "Runner", None, times)]
        found += [row("hooks", f"batch {size}", name, "Runner", times, LOOKS.get(name, (None, {}))[1].get(size))
                  for name in list(arms)[1:]]
    return found
