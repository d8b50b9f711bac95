"""`NormStats`: what norm layers normalise by, batch for batch."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

from runner.insight.layers import (
    PROTOCOL,
    eps_of,
    norm_layers,
    running_moments,
    running_statistics,
    statistic_groups,
    takes,
)
from runner.insight.probe import Probe
from runner.ranks import Ranks, synced

if TYPE_CHECKING:
    from runner.insight.plots import Axes


class NormStats(Probe):
    """What norm layers normalise by, batch for batch, beside what they keep for evaluation; see `Probe`.

        stats = NormStats(every=10)                         # all norm layers, or types, or paths such as "4.*"
        run.fit(1, learn, cbs=stats)
        stats.series("4.2", "var", "running_var")           # steps, and for each name a list of lists
        stats.plot("var")

    A row has, with K statistics per batch (batch norms: the channels) or per image (GroupNorm: the groups,
    InstanceNorm: the channels, LayerNorm: 1):

        n               values behind each statistic of the batch
        mean, var       of the batch, K each; where images have their own, means over the images
        running_mean, running_var       K each, after the batch: what evaluation uses (if the layer keeps any)
        scale           weight / std, with std = sqrt(variance + eps) of what this batch was normalised by: what the
                        layer multiplies by. As many as weights, or K if that is more; means over the images
        clamped         channels whose variance a clamp raised (if it normalises by running statistics in training)

    `var` is biased (of what divides by a root mean square: that mean); torch's and our BatchNorm average the unbiased
    one, n / (n - 1) times as large: at n = 2 `running_var` hovers about twice `var`.

    Args:
        which, **kwargs: as for `Probe`; there is nothing to choose but norm layers.

    Raises:
        ValueError: at the start of a fit, no norm layer, or one whose number of channels can't be told.
    """

    def _seen(self, ranks: Ranks) -> str:
        seen, norms = super()._seen(ranks), self.chosen.values()
        return seen + "; what synchronised norms keep is of all images" * any(map(synced, norms))

    def candidates(self, model: nn.Module) -> dict[str, nn.Module]:
        return {path: m for m, path in norm_layers(model)[0].items()}

    def usual(self, model: nn.Module) -> dict[str, nn.Module]:
        found = self.candidates(model)
        if found: return found
        raise ValueError(f"NormStats found no norm layer in {type(model).__name__}; it needs one of torch's, or one "
                         f"with {PROTOCOL}")

    def layout(self, path: str, m: nn.Module) -> dict[str, int | None]:
        k, weight = _statistics_of(path, m), getattr(m, "weight", None)
        names = ("mean", "var", "running_mean", "running_var") if running_statistics(m) else ("mean", "var")
        return {**dict.fromkeys(names, k), "scale": k if weight is None else max(k, weight.numel()),
                **({"clamped": None} if _clamps(m) else {})}

    def derived(self, name: str, value: Any, n: int) -> Any: return int(value) if name == "clamped" else value

    def attach(self) -> None:
        self._handles: list[RemovableHandle]
        self._handles = [m.register_forward_hook(partial(self.tap, path), with_kwargs=True)
                         for path, m in self.chosen.items()]

    def detach(self) -> None:
        for handle in self._handles: handle.remove()

    @torch.no_grad()
    def tap(self, path: str, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook."""
        x = next(iter((*args, *kwargs.values())))
        if not x.numel(): return
        k, affine = (self.layouts[path][name] or 1 for name in ("mean", "scale"))
        groups = statistic_groups(m, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)
        var, mean = torch.var_mean(groups, 1, correction=0)                     # (K,) or (N K,)
        if takes(m) == "mean square": var = groups.square().mean(1)
        running, moments = running_statistics(m), running_moments(m, len(x))
        if moments is not None: used = moments[1]
        else: used = running[1] if running and not m.training else var
        scale = (used + eps_of(m, x)).rsqrt().view(-1, k).mean(0).repeat_interleave(affine // k)
        weight: torch.Tensor | None = getattr(m, "weight", None)
        if weight is not None: scale = scale * weight.flatten()
        clamped = [(used > getattr(m, "unclamped_var", running[1])).sum()] if moments and running else []
        numbers = mean.view(-1, k).mean(0), var.view(-1, k).mean(0), *(running or ()), scale, *clamped
        self.take(path, torch.cat([t.reshape(-1).float() for t in numbers]), groups.shape[1])

    def plot(self, name: str = "mean", axes: "Axes | Iterable[Axes] | None" = None,
             phase: str = "train") -> "list[Axes]":
        """The batch's `name`, "mean" or "var", and the running one over time, a panel per layer with both; the axes.

        Variances are on a logarithmic axis, with the least channel: it is what the norm divides by that goes wrong.
        Of many layers the panels are on several figures, which `plots.save_pages(axes, path)` writes.

        Raises:
            ValueError: another name; no layer that was looked at keeps running statistics.
        """
        from runner.insight import plots
        if name not in ("mean", "var"): raise ValueError(f"NormStats.plot: name is {name!r}; choose 'mean' or 'var'")
        kept = [path for path, layout in self.layouts.items() if "running_var" in layout]
        if not kept:
            raise ValueError("NormStats.plot compares with running statistics, and no norm that was looked at keeps "
                             "any; plot a number of your own choice from stats.series(path, name)")
        return plots.plot_channels({path: self.series(path, name, f"running_{name}", phase=phase) for path in kept},
                                   axes, ylabel=name, yscale="log" if name == "var" else "linear")


def _clamps(m: nn.Module) -> bool:
    """Whether the variance that the norm layer `m` uses can be told from the one that it keeps."""
    return hasattr(m, "running_moments") and running_statistics(m) is not None


def _statistics_of(path: str, m: nn.Module) -> int:
    """How many statistics the norm layer `m` at `path` has of a batch, or else of each image."""
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)): return 1
    if isinstance(m, nn.GroupNorm): return m.num_groups
    weight = getattr(m, "weight", None)
    names = [name for name in ("num_features", "num_channels", "nf") if hasattr(m, name)]
    channels: int | None = getattr(m, names[0]) if names else None if weight is None else weight.numel()
    if channels is None:
        raise ValueError(f"NormStats can't tell how many channels the layer {path!r} ({type(m).__name__}) has; give it "
                         "an attribute num_features")
    if isinstance(m, (_BatchNorm, _InstanceNorm)): return channels
    return len(statistic_groups(m, torch.empty(1, channels, 1)))    # of one image
