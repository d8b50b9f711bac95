"""What it costs to look: the runner with `append_stats` on all five conv layers, against the runner without.

nn.BatchNorm2d, one thread; at batch size 2 without oneDNN, at 64 with it. Milliseconds per training step.
"""

from experiments.bench.runner import epoch, loader, with_runner
from experiments.bench.timing import interleave, row, settings
from runner import Hooks, append_stats


def hooked(model, opt, dl):
    """`with_runner` with means and standard deviations of every conv layer's output at every step."""
    with Hooks(model[:5], append_stats): return with_runner(model, opt, dl)


def rows(config):
    """The part's rows."""
    found = []
    for size, batches in ((2, 100), (64, 20)):
        dl = loader(batches, size, config.rng())
        with settings(onednn=size > 8):
            times = interleave({"Runner": epoch(with_runner, dl), "Runner, append_stats": epoch(hooked, dl)},
                               config.repetitions, 0.15)
        times = {name: [ms / batches for ms in values] for name, values in times.items()}
        found += [row("hooks", f"batch {size}", "Runner", None, times),
                  row("hooks", f"batch {size}", "Runner, append_stats", "Runner", times)]
    return found
