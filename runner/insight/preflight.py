"""`preflight`: what norm layers rest on, said before training."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import BatchSampler

from runner.batches import part_of, size_of
from runner.insight.judgement import LEVELS, Pooled, judge, lacks_gradient
from runner.insight.layers import (
    PROTOCOL,
    hooked,
    norm_layers,
    ready,
    running_statistics,
    statistic_groups,
    taken,
    undone,
)
from runner.notebook import html_table

# Behind a norm that is an activation too, a second one; others are known by their name.
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
               nn.Hardswish, nn.Softplus)


@dataclass(frozen=True)
class Finding:
    """What `preflight` found on one run of one norm layer.

    `path` and `module` (the class's name) say where, `level` ("ok", "warn" or "fail") and `text` what follows. `batch`
    (images) and `map` (sizes of the spatial axes) are what came in, `statistics` is how many the batch has and `values`
    on how many each rests: None where the layer is unknown or didn't run. `last` is true of the smaller last batch.
    """

    path: str
    module: str
    level: str
    text: str
    batch: int | None = None
    map: tuple[int, ...] = ()
    statistics: int | None = None
    values: int | None = None
    last: bool = False

    def __str__(self) -> str:
        where = f"{self.path} {self.module}".lstrip()
        if self.batch is not None: where += f", {'last batch of' if self.last else 'batch'} {self.batch}"
        if len(self.map) == 1: where += f", length {self.map[0]}"
        elif self.map: where += f", {'x'.join(map(str, self.map))} map"
        return f"{self.level:<6}{where}: {self.text}"


@dataclass(frozen=True)
class Preflight:
    """The report of `preflight`: a list of `Finding`s in the order of the forward; `str` has a line for each.

    In a notebook it is a table.
    """

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool: return all(f.level != "fail" for f in self.findings)

    def __str__(self) -> str: return "\n".join(map(str, (*self.findings, self.summary())))

    def summary(self) -> str:
        """One line: how many findings there are of each level."""
        if not self.findings: return "no norm layer"
        return ", ".join(f"{sum(f.level == level for f in self.findings)} {level}" for level in LEVELS)

    def __repr__(self) -> str:
        failing = [f"{f.path} {f.module}".lstrip() for f in self.findings if f.level == "fail"]
        return f"<Preflight: {self.summary()}{': ' * bool(failing)}{', '.join(dict.fromkeys(failing))}>"

    def _repr_html_(self) -> str:
        return html_table(("", "layer", "batch", "map", "statistics", "values", ""), [
            (f.level, f"{f.path} {f.module}".lstrip(), "-" if f.batch is None else f"{f.batch}{' (last)' * f.last}",
             "x".join(map(str, f.map)) or "-", *("-" if n is None else n for n in (f.statistics, f.values)), f.text)
            for f in self.findings], self.summary())


def preflight(model: nn.Module, xb: Tensor | Iterable[Any], *,
              tfm: Callable[[Tensor], Tensor] | None = None) -> Preflight:
    """Say of every norm layer, before training, how many values its statistics rest on and what follows.

    One batch goes through the model in training mode, without gradients; everything that this changes is put back
    (parameters, buffers, attributes, modes, random states; also after an exception). Hooks of yours see the batch.

    If `xb` is a loader whose sampler and data set tell the size of a smaller last batch, as many images go through
    as well, and a layer is reported again where they fare worse.

    What is looked for:

    - statistics over one value (the output is constant, or torch refuses) or two (outputs are +-1), or so few that a
      variance is mostly chance: its relative standard error over n normal values is sqrt(2 / (n - 1)), 141 % for 2,
      25 % for 33. Where statistics are averaged over batches, n counts the images that they remember;
    - an `eps` above the variance; a clamp that holds it;
    - running statistics that are missing, do not move, or are not what training normalises by;
    - many norms that train by running statistics and lack most of the gradient through them;
    - a bias of a convolution or linear layer that the norm's mean takes off again;
    - a norm that takes no mean away, behind a convolution whose outputs have one;
    - norms that are unknown or didn't run; a module of an activation behind a norm that has its own;
    - of several processes (`torchrun`), statistics of a process's own share. In a process group those of
      `norms.sync_norms` are counted over all processes, for which every process must call this, each with a share as it
      will get it (`shard_loader`); before there is one, the batch is taken for that of all.

    Args:
        model: the model, as it is about to be trained.
        xb: a batch, or a loader of such or of pairs `(xb, yb)`, of which the first is taken. (Where it is a
            generator, that one is gone.) A batch may be a nest of tensors; a tuple or list is taken for a loader.
        tfm: transform of the batch, such as `view_tfm(1, 28, 28)`, or of a dict `lambda b: b["image"]`.

    Returns:
        A `Preflight`: `findings`, `ok` (no failure); print it.

    Raises:
        TypeError: batches without a tensor.
        ValueError: an empty loader, layers that are not initialised.
    """
    model = getattr(model, "_orig_mod", model)                      # torch.compile's wrapper has it under this name
    norms, strange = norm_layers(model)
    frozen = {m for m in norms if model.training and not m.training}
    with undone(model, xb) as restore:
        first, rest = _first_batch(xb)
        x = ready(model, first, tfm, "preflight")
        model.train()
        with taken(x, tfm, "preflight"): findings = _survey(model, norms, strange, frozen, x)
        if 0 < rest < size_of(x):
            restore()
            model.train()
            full = {f.path: f for f in reversed(findings)}
            findings += [replace(f, last=True) for f in _survey(model, norms, strange, frozen, part_of(x, 0, rest))
                         if f.batch is not None and _worse(f, full[f.path])]
    return Preflight(findings)


class Made:
    """What a module gave, as long as nobody has changed it in place, as an activation with `inplace=True` does.

    Tensors of inference mode don't count their changes, so that of them nothing is known.
    """

    def __init__(self, by: nn.Module, y: Tensor) -> None:
        self.by, self.y, self.version = by, y, None if y.is_inference() else y._version

    def still(self, x: object) -> bool:
        return x is self.y and self.version is not None and self.y._version == self.version


def _worse(f: Finding, than: Finding) -> bool:
    """Whether the finding `f` is worse than the other one; one failure is worse than another if it has fewer values."""
    return (LEVELS.index(f.level), -(f.values or 0)) > (LEVELS.index(than.level), -(than.values or 0)) and (
        f.level == "fail" or f.level != than.level)


def _first_batch(data: Tensor | Iterable[Any]) -> tuple[Any, int]:
    """The first batch of `data`, and the size of a smaller last one as far as that can be known (else 0)."""
    if isinstance(data, (torch.Tensor, Mapping)) or (is_dataclass(data) and not hasattr(data, "__iter__")):
        return data, 0
    try: xb = next(iter(data))
    except StopIteration: raise ValueError("preflight got a loader without a batch; give it at least one") from None
    if isinstance(xb, (tuple, list)): xb = xb[0]
    # The loaders of `get_dls` have the batch sampler as their sampler.
    samplers = getattr(data, "batch_sampler", None), getattr(data, "sampler", None)
    sampler = next((s for s in samplers if isinstance(s, BatchSampler)), None)
    if sampler is None or sampler.drop_last or not isinstance(sampler.sampler, Sized): return xb, 0
    return xb, len(sampler.sampler) % sampler.batch_size


def _survey(model: nn.Module, norms: dict[nn.Module, str], strange: dict[nn.Module, str], frozen: Collection[nn.Module],
            x: Tensor) -> list[Finding]:
    """Run `x` through `model` and judge every norm layer on the way: a list of `Finding`s."""
    found: list[Finding] = []
    inside: list[tuple[nn.Module, Any, tuple[Tensor, Tensor] | None]] = []
    bias: Made | None = None
    uncentred: Made | None = None
    active: tuple[nn.Module, Any] | None = None
    images = size_of(x)
    paths = {m: path for path, m in model.named_modules()}
    lacking = sum(map(lacks_gradient, norms))

    def enter(m: nn.Module, x: Any) -> None: inside.append((m, x, running_statistics(m)))

    def leave(m: nn.Module, x: Any, y: Any) -> None:
        nonlocal active
        active = (m, y) if getattr(m, "activates", False) else None
        *_, before = inside.pop()
        f = Finding(paths[m], type(m).__name__, "warn", f"unknown norm: give its class {PROTOCOL}", images,
                    tuple(getattr(x, "shape", ()))[2:])
        if m in norms:
            over: Pooled | None = None
            if m.training and getattr(m, "ranks", 1) > 1: over = cast("Any", m).pooled_moments(x)
            added = paths.get(bias.by) if bias and bias.still(x) else None
            mean = paths.get(uncentred.by) if uncentred and uncentred.still(x) else None
            level, text = judge(m, x, before, m in frozen, added, over, lacking, mean)
            f = replace(f, level=level, text=text, **_shape(m, x))
            if over is not None: f = replace(f, values=over[3])
        if f not in found: found.append(f)

    def keep(m: nn.Module, x: Tensor, y: Tensor) -> None:
        nonlocal bias, uncentred
        if isinstance(m, nn.Conv2d) and not getattr(m, "centred", False): uncentred = Made(m, y)
        if m.bias is not None and (isinstance(m, _ConvNd) or x.ndim == 2): bias = Made(m, y)

    def again(m: nn.Module, x: Any) -> None:
        if active is None or active[1] is not x: return
        i = max(i for i, f in enumerate(found) if f.path == paths[active[0]])
        text = f"; it is an activation too, and {paths[m]} {type(m).__name__} a second one: take that out"
        if text in found[i].text: return
        found[i] = replace(found[i], level=max(found[i].level, "warn", key=LEVELS.index), text=found[i].text + text)
    linear = [m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    activations = [m for m in model.modules() if m not in norms and not list(m.children())
                   and (isinstance(m, ACTIVATIONS) or "relu" in type(m).__name__.lower())]
    stopped = "didn't run in this forward pass"
    with hooked((*norms, *strange), enter, leave), hooked(linear, after=keep), hooked(activations, again):
        try: model(x)
        except ValueError as e:
            if not inside: raise
            m, x, _ = inside[-1]
            if m not in norms or _shape(m, x)["values"] > 1: raise
            text = f"1 value per statistic: it refuses to train ({e})"
            found.append(Finding(paths[m], type(m).__name__, "fail", text, images, **_shape(m, x)))
            stopped = f"not reached, because {paths[m]} refuses"
    ran = {f.path for f in found}
    return [*dict.fromkeys(found), *(Finding(path, type(m).__name__, "warn", stopped)
                                     for m, path in {**norms, **strange}.items() if path not in ran)]


def _shape(m: nn.Module, x: Tensor) -> dict[str, Any]:
    """The entries of a `Finding` on the input of a norm layer."""
    # What torch's LayerNorm and RMSNorm get is not channels and a map.
    positions = () if isinstance(m, (nn.LayerNorm, nn.RMSNorm)) else tuple(x.shape[2:])
    return dict(zip(("map", "statistics", "values"), (positions, *statistic_groups(m, x).shape), strict=True))
