"""Statistics from inside: of activations, of gradients, and of the parameters' updates.

`runner.insight.probe` is what they share, `runner.insight.describe` what is measured of a tensor.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from runner.batches import first_tensor
from runner.insight.describe import Limits, describe
from runner.insight.layers import norm_layers
from runner.insight.probe import Probe
from runner.ranks import Ranks

if TYPE_CHECKING:
    from runner.insight.plots import Axes

KINDS = "weights", "biases", "norms"        # of parameters, each a panel of its own


class Described(Probe):
    """A `Probe` whose rows hold what `describe` says of some tensor; base of the three below.

    Args:
        near: what counts as near zero: |x| of at most this.
        bins: bins of the histogram.
        limits: where it begins and ends: "symmetric" (about 0) or "range", both within 6 std of each batch's mean, or
            a pair of numbers, or one number r for -r to r. Its first and last bin count what lies beyond as well.
        sample: where a tensor has more values than this the histogram is of evenly spaced ones, at most so many:
            counting takes longer than all else. None counts all.
        which, **kwargs: as for `Probe`.

    A row has `mean`, `std` (unbiased), `min`, `max`, `near_zero` and `non_finite` (shares, 0 to 1), `low` and `high`
    (the histogram's ends) and `hist` (its counts; all 0 if the mean is not finite).
    """

    near: float = 1e-3
    yscale = "linear"           # of `plot`
    titles: Mapping[str, str] = MappingProxyType({})        # what pictures call a path, where that is not the path

    def __init__(self, which: Any = None, *, near: float | None = None, bins: int = 40,
                 limits: Limits | float = "symmetric", sample: int | None = 2**14, **kwargs: Any) -> None:
        super().__init__(which, **kwargs)
        name = type(self).__name__
        self.near = self.near if near is None else near
        if not self.near >= 0: raise ValueError(f"{name}: near is {near!r}; it must be a number of at least 0")
        if not isinstance(bins, int) or isinstance(bins, bool) or bins < 2:
            raise ValueError(f"{name}: bins is {bins!r}; it must be an integer of at least 2, such as 40")
        if sample is not None and not (isinstance(sample, int) and sample >= 1):
            raise ValueError(f"{name}: sample is {sample!r}; it must be a positive integer, or None for all values")
        self.bins, self.sample = bins, sample
        self.limits: Limits = (-limits, limits) if isinstance(limits, (int, float)) else limits
        if isinstance(self.limits, str): fits = limits in ("symmetric", "range")
        else: fits = len(self.limits) == 2 and self.limits[0] < self.limits[1]
        if not fits:
            raise ValueError(f"{name}: limits is {limits!r}; it must be 'symmetric', 'range', a positive number, or "
                             "two that ascend, such as (0, 10)")

    def layout(self, path: str, thing: Any) -> dict[str, int | None]:
        names = ("mean", "std", "min", "max", "near_zero", "non_finite", "low", "high")
        return dict.fromkeys(names) | {"hist": self.bins}

    def derived(self, name: str, value: Any, n: int) -> Any:
        if name == "near_zero": return 1 - value / n                # stored are counts, here of those beyond
        return value / n if name == "non_finite" else value

    def describe(self, x: Tensor) -> list[float] | Tensor:
        return describe(x, self.near, self.bins, self.limits, self.sample)

    def _title(self, path: str) -> str: return self.titles.get(path, path)

    def plot(self, axes: "Axes | Iterable[Axes] | None" = None, first: int = 10, phase: str = "train") -> "list[Axes]":
        """Means and standard deviations over the first `first` steps and over all; returns the four axes.

        Those of gradients are on logarithmic axes, see `plots.plot_means_stds`.
        """
        from runner.insight import plots
        return plots.plot_means_stds({self._title(path): self.series(path, "mean", "std", phase=phase)
                                      for path in self.paths}, axes, first=first, yscale=self.yscale)

    def plot_histograms(self, axes: "Axes | Iterable[Axes] | None" = None, phase: str = "train") -> "list[Axes]":
        """The histogram over time, a heat map for each path; returns the axes, of many on several figures.

        `plots.save_pages(axes, path)` writes them all.
        """
        from runner.insight import plots
        return plots.plot_histograms({self._title(path): self.series(path, "low", "high", "hist", phase=phase)
                                      for path in self.paths}, axes)

    def plot_near_zero(self, ax: "Axes | None" = None, phase: str = "train") -> "Axes":
        """The share near zero over time, a line for each path; returns the axes."""
        from runner.insight import plots
        return plots.plot_shares({self._title(path): self.series(path, "near_zero", phase=phase)
                                  for path in self.paths}, ax, ylabel=f"share with |x| of at most {self.near:.2g}")


class ActivationStats(Described):
    """What modules put out: mean, spread, histogram, share near zero, share not finite; see `Described`.

        stats = ActivationStats(nn.Conv2d, every=10)        # or ["0", "1.*"], or a function f(path, module)
        run.fit(1, learn, cbs=stats)
        stats.series("0.0", "std")                          # steps, values
        stats.plot(), stats.plot_histograms(), stats.plot_near_zero()

    Left to itself it looks at the model's children that have parameters: of the lesson's network the conv layers and
    the linear one. Of an output that is no tensor it takes the first tensor inside.
    """

    def usual(self, model: nn.Module) -> dict[str, nn.Module]:
        children = {path: m for path, m in model.named_children() if next(m.parameters(), None) is not None}
        return children or {"": model}

    def attach(self) -> None:
        self._handles: list[RemovableHandle]
        self._handles = [m.register_forward_hook(partial(self.tap, path)) for path, m in self.chosen.items()]

    def detach(self) -> None:
        for handle in self._handles: handle.remove()

    def tap(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """The forward hook."""
        x = first_tensor(output)
        if x is not None and x.numel(): self.take(path, self.describe(x), x.numel())


class GradientStats(ActivationStats):
    """The same of the loss's gradients with respect to what the modules put out.

    It looks at training alone. Near zero is by default what float16 can't tell from 0, 2^-24. The loss is the one that
    the backward pass starts from, as `MixedPrecision` scales it and `GradientAccumulation` divides it.
    """

    near, possible, yscale = 2 ** -24, ("train",), "log"

    def tap(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = first_tensor(output)
        if x is not None and x.requires_grad:
            x.register_hook(lambda g: self.take(path, self.describe(g), g.numel()) if g.numel() else None)


class ParameterStats(Described):
    """The same of the parameters' gradients, as the optimizer gets them, and how far it moves the parameters.

        ratio = |w_after - w_before| / |w_before|           Euclidean norms

    A rule of thumb wants about 1e-3 (A. Karpathy, notes of the course CS231n, 2015). A row has `weight` and
    `update`, the two norms, and `ratio` besides; at a weight of 0 that is infinite. `which` chooses parameters by
    their names. Training alone; a parameter without a gradient has no row, nor has a batch without a step. A parameter
    that is unfrozen in mid-fit is looked at from the start of the next epoch.
    """

    near, possible, kind, yscale = GradientStats.near, ("train",), "parameter", "log"
    kinds: Mapping[str, str] = MappingProxyType({})         # {name: "weights", "biases" or "norms"}

    def _seen(self, ranks: Ranks) -> str: return "all images"       # gradients are the mean over all processes

    def candidates(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {path: p for path, p in model.named_parameters() if p.requires_grad}

    def begin_fit(self) -> None:
        super().begin_fit()
        self._before: dict[str, tuple[Tensor, list[float] | Tensor]] = {}
        self.kinds = kinds_of(self.model)

    def begin_epoch(self) -> None:
        super().begin_epoch()
        self.follow()

    def layout(self, path: str, thing: Any) -> dict[str, int | None]:
        return super().layout(path, thing) | dict.fromkeys(("weight", "update", "ratio"))

    def attach(self) -> None: self._before = {}

    def detach(self) -> None: self._before = {}

    def after_backward(self) -> None:
        if not hasattr(self.run, "step"): self._look()      # a loop of somebody's own, which has events alone

    def step(self, inner: Callable[[], object]) -> None:
        """Look at the gradients as they are now: summed up, unscaled and clipped by those who do it further out."""
        self._look()
        inner()

    def _look(self) -> None:
        if not self.measuring: return
        self._before = {path: (p.detach().clone(), self.describe(p.grad))
                        for path, p in self.chosen.items() if p.grad is not None and p.numel()}

    def after_step(self) -> None:
        for path, (before, described) in self._before.items():
            weight, update = (torch.linalg.vector_norm(t) for t in (before, self.chosen[path].detach() - before))
            moved = torch.stack((weight, update, update / weight))
            if isinstance(described, list): self.take(path, described + moved.tolist(), before.numel())
            else: self.take(path, torch.cat((described, moved)), before.numel())

    def plot_ratios(self, ax: "Axes | None" = None) -> "Axes":
        """The ratio of update to weight over time, a line for each parameter; returns the axes."""
        from runner.insight import plots
        return plots.plot_update_ratios({path: self.series(path, "ratio") for path in self.paths}, ax)

    def plot_kinds(self, name: str = "ratio", axes: "Axes | Iterable[Axes] | None" = None) -> "list[Axes]":
        """One number over time, logarithmic: a panel for the weights, one for the biases and one for the norms.

        `name` is "ratio" (update to weight), "update", "weight", "std" (of the gradients) or another of a row. Only the
        kinds that were looked at have a panel. Returns the axes.
        """
        from runner.insight import plots
        words = {"ratio": "update / weight", "update": "size of the update", "weight": "size of the parameter",
                 "std": "std of the gradient"}
        kinds: dict[str, dict[str, tuple[list[int], list[Any]]]] = {}
        for kind in KINDS:
            found = {path: self.series(path, name) for path in self.paths if self.kinds.get(path, KINDS[0]) == kind}
            if found: kinds[kind] = found
        return plots.plot_kinds(kinds, axes, ylabel=words.get(name, name),
                                guide=(1e-3, "rule of thumb, 1e-3") if name == "ratio" else None)


def kinds_of(model: nn.Module) -> dict[str, str]:
    """Of each parameter of `model` by its name: "norms" if a norm layer has it, else "biases" or "weights"."""
    model = getattr(model, "_orig_mod", model)
    within = {id(p) for m in norm_layers(model)[0] for p in m.parameters()}
    return {name: KINDS[2] if id(p) in within else KINDS[1] if name.rsplit(".", 1)[-1].startswith("bias") else KINDS[0]
            for name, p in model.named_parameters()}
