"""`preflight`: what norm layers rest on, said before training."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import BatchSampler

from runner.batches import part_of, size_of
from runner.distributed import processes_to_come, world_size
from runner.insight.layers import (
    PROTOCOL,
    eps_of,
    hooked,
    norm_layers,
    ready,
    running_moments,
    running_statistics,
    shared,
    statistic_groups,
    taken,
    takes,
    undone,
    wide,
)
from runner.notebook import html_table

LEVELS = ("ok", "warn", "fail")
Pooled = tuple[Tensor, Tensor, int, int]    # of several processes: mean, variance, images, values per channel

# A variance taken over n normal values has the relative standard error sqrt(2 / (n - 1)); above a quarter, which is
# below 33 values, the scale of a channel is mostly chance. (Values of one image are alike, so that the count flatters
# large maps: take it for the most that a statistic can rest on.)
NOISY = 0.25
# Statistics of an image's own are the same in training and evaluation and not noise; but of n values mean and scale are
# taken away for good. Above a quarter of them, which is below 8 values, there is a warning.
LOST = 0.25


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
    - a bias of a convolution or linear layer that the norm's mean takes off again;
    - norms that are unknown or didn't run;
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
    bias: tuple[nn.Module, Tensor] | None = None
    images = size_of(x)
    paths = {m: path for path, m in model.named_modules()}

    def enter(m: nn.Module, x: Any) -> None: inside.append((m, x, running_statistics(m)))

    def leave(m: nn.Module, x: Any, y: Any) -> None:
        *_, before = inside.pop()
        f = Finding(paths[m], type(m).__name__, "warn", f"unknown norm: give its class {PROTOCOL}", images,
                    tuple(getattr(x, "shape", ()))[2:])
        if m in norms:
            over: Pooled | None = None
            if m.training and getattr(m, "ranks", 1) > 1: over = cast("Any", m).pooled_moments(x)
            level, text = _judge(m, x, before, m in frozen, paths.get(bias[0]) if bias and bias[1] is x else None, over)
            f = replace(f, level=level, text=text, **_shape(m, x))
            if over is not None: f = replace(f, values=over[3])
        if f not in found: found.append(f)

    def keep(m: nn.Module, x: Tensor, y: Tensor) -> None:
        nonlocal bias
        if m.bias is not None and (isinstance(m, _ConvNd) or x.ndim == 2): bias = m, y
    linear = [m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    stopped = "didn't run in this forward pass"
    with hooked((*norms, *strange), enter, leave), hooked(linear, after=keep):
        try: model(x)
        except ValueError as e:
            if not inside: raise
            m, x, _ = inside[-1]
            if m not in norms or _shape(m, x)["values"] > 1: raise
            text = f"1 value per statistic: it refuses to train ({e})"
            found.append(Finding(paths[m], type(m).__name__, "fail", text, images, **_shape(m, x)))
            stopped = f"not reached, because {paths[m]} refuses"
    ran = {f.path for f in found}
    return found + [Finding(path, type(m).__name__, "warn", stopped) for m, path in {**norms, **strange}.items()
                    if path not in ran]


def _shape(m: nn.Module, x: Tensor) -> dict[str, Any]:
    """The entries of a `Finding` on the input of a norm layer."""
    # What torch's LayerNorm and RMSNorm get is not channels and a map.
    positions = () if isinstance(m, (nn.LayerNorm, nn.RMSNorm)) else tuple(x.shape[2:])
    return dict(zip(("map", "statistics", "values"), (positions, *statistic_groups(m, x).shape), strict=True))


def _error(n: float) -> str:
    """In words, by how much a variance over `n` values is off; empty if that is little."""
    error = math.sqrt(2 / (n - 1)) if n > 1 else math.inf
    return f"the variance has a standard error of {100 * error:.0f} %" if error > NOISY else ""


def _judge(m: nn.Module, x: Tensor, before: tuple[Tensor, Tensor] | None, was_frozen: bool,
           biased: str | None, over: Pooled | None) -> tuple[str, str]:
    """Level and text for the norm layer `m`, which has just run on `x` with running statistics `before` it.

    `was_frozen`: whether it was in evaluation mode in a model in training mode; `biased`: the path of the layer that
    added a bias to `x` last; `over`: the moments of the step, if they are of several processes, and their counts.
    """
    if not m.training and before: return "ok", "in evaluation mode in training too: its running statistics stay"
    groups, eps = wide(statistic_groups(m, x)), eps_of(m, x)
    n, common, rms, ranks = groups.shape[1], shared(m, x), takes(m) == "mean square", world_size()
    var = groups.square().mean(1) if rms else groups.var(1, unbiased=False)
    images, of = len(x), ""
    if over is not None: (_, var, images, n), of = over, f" of {getattr(m, 'ranks', 1)} processes"
    running, after = running_moments(m, images), running_statistics(m)
    if running: var = running[1]
    live = var[var > 0]                                             # a ReLU leaves channels without any value
    median = live.median().item() if len(live) else 0.0
    if running: remarks = [_past_batches(n, images, running[2], of)]
    else: remarks = [_one_batch(n, common, rms, eps < median, of)]

    def remark(level: str, text: str) -> None: remarks.append((level, text))
    if running and after and (held := int((var > getattr(m, "unclamped_var", after[1])).sum())):
        remark("ok", f"a clamp holds the variance of {held} of {len(var)} channels")
    if n > 1 and eps > median:
        remark("warn", f"eps {eps:g} is above the variance (median {median:.2g}): the input is hardly scaled")
    if before and after and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        remark("warn", "the running statistics don't move in training (momentum 0?), and evaluation uses them")
    elif after and not common:
        remark("warn", "evaluation normalises by running statistics and training by each image's own")
    if common and not (after or running):
        remark("warn", "no running statistics: in evaluation an output depends on the rest of its batch")
    if common and ranks > 1 and over is None and not isinstance(m, nn.SyncBatchNorm):
        first = "" if hasattr(m, "ranks") else "convert_norms(model, norms.BatchNorm) and "
        remark("warn", f"each of {ranks} processes normalises by its own share of {len(x)} image{'s' * (len(x) > 1)}: "
                       f"{first}sync_norms(model)")
    if common and (to_come := processes_to_come()) > 1 and getattr(m, "synced", None) is None:
        first = "" if hasattr(m, "ranks") else "convert_norms(model, norms.BatchNorm) and "
        remark("warn", f"{to_come} processes were started, and each is to normalise by its own part of the batch's "
                       f"{len(x)} image{'s' * (len(x) > 1)}: {first}sync_norms(model)")
    if was_frozen: remark("warn", "it was in evaluation mode, and model.train() at every epoch ends that")
    # A statistic of one channel: its mean takes in the whole of the channel's bias.
    centres = takes(m) == "mean and variance" and not running
    if biased is not None and centres and groups.shape[1] == x[0, 0].numel() * (len(x) if common else 1):
        remark("ok", f"the bias of {biased} before it is taken off again with the mean")
    levels, texts = zip(*remarks, strict=True)
    return max(levels, key=LEVELS.index), "; ".join(texts)


def _past_batches(n: int, b: int, images: float | None, of: str) -> tuple[str, str]:
    """Level and text for `n` values of a batch of `b` images, averaged over `images` (None: not known how many).

    `of` names the processes, if there are several.
    """
    text = f"{n} value{'s' * (n > 1)} of this batch{of}, averaged with "
    if images is None: return "ok", f"{text}earlier batches"
    noise = _error(n * images / b)
    return "warn" if noise else "ok", f"{text}about {images:.0f} images" + f": {noise}" * bool(noise)


def _one_batch(n: int, common: bool, rms: bool, scaled: bool, of: str) -> tuple[str, str]:
    """Level and text for `n` values per statistic of this batch.

    `common`: the statistics are the batch's and not an image's; `rms`: of the second moment alone; `scaled`: the
    variances are above eps; `of` names the processes, if there are several.
    """
    text = f"{n} value{'s' * (n > 1)}{of} per statistic"
    if n == 1 and rms: return "fail", f"{text}: the output is +-weight whatever the size of the input"
    if n == 1: return "fail", f"{text}: the output is constant (its bias), nothing passes"
    if n == 2 and scaled and not rms: return "fail", f"{text}: outputs are about +-1 whatever the input"
    if common: return ("warn", f"{text}: {_error(n)}") if _error(n) else ("ok", text)
    if (1 if rms else 2) / n <= LOST: return "ok", text
    return "warn", f"{text}, of which {'the scale takes 1' if rms else 'mean and scale take 2'}"
