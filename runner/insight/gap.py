"""`train_eval_gap`: where a network in training mode and in evaluation mode part, and why."""

import math
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.batches import first_tensor, part_of, size_of
from runner.insight.choice import choose
from runner.insight.layers import (
    eps_of,
    hooked,
    norm_layers,
    ready,
    running_moments,
    running_statistics,
    statistic_groups,
    taken,
    undone,
    wide,
)
from runner.notebook import html_table
from runner.rows import Rows, text_table


@dataclass(frozen=True)
class TrainEvalGap:
    """The report of `train_eval_gap`; `str` is a table of `rows` and below it `cause`, a sentence.

    `rows` has one row per layer in the order of the training pass, the model's output last; `channels` maps a norm
    layer's path to its figures per channel, lists: `share`, `mean_off`, `var_ratio`, `reach`.
    """

    rows: Rows
    cause: str
    channels: dict[str, dict[str, list[float]]]

    def table(self) -> tuple[tuple[str, ...], list[list[str]]]:
        """Header and lines of the table, in words."""
        head = ("layer", "values", "gap", "image", "own", "channel", "share", "mean off", "var ratio", "reach",
                "train", "eval")
        names = ("values", "gap", "image", "own", "channel", "share", "mean_off", "var_ratio", "reach", "train_max",
                 "eval_max")
        return head, [[f"{row['path']} {row['module']}", *(_cell(row.get(name)) for name in names)]
                      for row in self.rows]

    def __str__(self) -> str: return f"{text_table(*self.table())}\n{self.cause}"

    def __repr__(self) -> str:
        return f"<TrainEvalGap, {len(self.rows)} layers: {textwrap.shorten(self.cause, 100, placeholder=' ...')}>"

    def _repr_html_(self) -> str: return html_table(*self.table(), self.cause)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def train_eval_gap(model: nn.Module, xb: Tensor, *, batch_size: int | None = None, modules: Any = None,
                   tfm: Callable[[Tensor], Tensor] | None = None) -> TrainEvalGap:
    """Send the same images through the model in training and in evaluation mode and say where the two part.

    In training mode they go in batches of `batch_size`, each from the present state: what is seen is the next training
    step, whichever batch it gets. Afterwards the model is as it was, as after `preflight`. With t and e a layer's
    outputs in training and in evaluation mode, over all images:

        gap         ||t - e|| / ||t||
        image       the median over images of the same, of one image
        own         ||t - f|| / ||t||, f the norm layer's output in evaluation mode on what it got in training mode:
                    its own doing, without what the layers before it have done
        channel     where most of ||t - e||^2 lies, and `share`, how much of it
        mean_off    of this channel: |running mean - mean| / sqrt(var + eps), with mean and var those of all values
                    that reach the norm in evaluation mode
        var_ratio   (running var + eps) / (var + eps)
        reach       the largest |value - running mean| / sqrt(running var + eps)
        limit       sqrt(n - 1), the most that it can be in training, of n values per statistic (None where training
                    too is by running statistics)
        train_max, eval_max         the largest |t| and |e|

    Why this is large for batch norm at small batches: in training no value lies further than sqrt(n - 1) standard
    deviations from the mean of its n. In evaluation it is measured by the running variance, of which a channel that
    is silent for k batches keeps (1 - momentum)^k, down to eps: when it wakes up nothing bounds its output, and every
    layer multiplies what the one before it let through.

    Args:
        model: the model, in any mode.
        xb: a batch of images, best from the validation set, and many: what the model gets, a tensor or a nest of them.
        batch_size: of the training mode; the size of `xb` if None. The last batch is smaller if it must be.
        modules: what to compare beside the norm layers and the output: types, patterns of paths such as "layer1.*",
            functions `f(path, module)` that say yes, or modules; one or a list.
        tfm: transform of the batch, such as `view_tfm(1, 28, 28)`.

    Returns:
        A `TrainEvalGap`; print it. `rows` have the figures above, None or absent where a layer has none.

    Raises:
        TypeError: an `xb` without a tensor.
        ValueError: an empty `xb`, layers that are not initialised, a choice of modules that finds nothing.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"train_eval_gap: batch_size is {batch_size!r}; it must be a positive integer, such as 2, or "
                         "None for that of xb")
    model = getattr(model, "_orig_mod", model)
    paths = {m: path for path, m in model.named_modules()}
    norms, _ = norm_layers(model)
    more = {} if modules is None else choose(dict(model.named_modules()), modules, "module", "train_eval_gap")
    layers = dict.fromkeys((*norms, *more.values(), model))
    tallies: dict[tuple[nn.Module, int], list[dict[str, Any]]] = {}
    with undone(model) as restore:
        x = ready(model, xb, tfm, "train_eval_gap")
        if not (n := size_of(x)): raise ValueError("train_eval_gap got an empty batch; give it images, best many")
        for start in range(0, n, batch_size or n):
            chunk = part_of(x, start, start + (batch_size or n))
            with taken(x, tfm, "train_eval_gap"): trained = _outputs(model, norms, layers, chunk, True)
            restore()
            evaluated = _outputs(model, norms, layers, chunk, False)
            restore()
            for m, runs in trained.items():                         # a layer that runs twice has two rows
                for i, (run, other) in enumerate(zip(runs, evaluated.get(m, ()), strict=False)):
                    if run[0].shape == other[0].shape: tallies.setdefault((m, i), []).append(_compare(*run, *other))
    rows = Rows()
    channels: dict[str, dict[str, list[float]]] = {}
    for (m, _), parts in tallies.items():
        row, figures = _summed(parts)
        rows.append({"path": paths[m] or "output", "module": type(m).__name__, **row})
        if figures: channels[paths[m]] = figures
    return TrainEvalGap(rows, _cause(rows, channels), channels)


def _outputs(model: nn.Module, norms: Collection[nn.Module], layers: Collection[nn.Module], x: Tensor,
             training: bool) -> dict[nn.Module, list[tuple[Tensor, Any]]]:
    """One pass in one mode: `{layer: [(output, more), ...]}`, a pair per run, the model itself last.

    `more` is, of a norm layer in training, its output on the same input in evaluation mode, or None; in evaluation what
    `_input_figures` says, or nothing.
    """
    runs: dict[nn.Module, list[tuple[Tensor, Any]]] = {}
    still: dict[nn.Module, Tensor] = {}

    def enter(m: nn.Module, x: Tensor) -> None:
        if not (training and m.training): return
        m.eval()
        still[m] = m.forward(x)                                     # not m(x): no hook is to see it
        m.train()

    def leave(m: nn.Module, x: Any, y: Any) -> None:
        y = first_tensor(y)
        if y is None: return
        # A copy, and the input is looked at now: what follows may write into both.
        more = still.pop(m, None) if training else _input_figures(m, x) if m in norms else {}
        runs.setdefault(m, []).append((y.clone(), more))
    model.train(training)
    with hooked(norms, enter), hooked(layers, after=leave): model(x)
    return runs


def _input_figures(m: nn.Module, x: Tensor) -> dict[str, Any]:
    """What comes into the norm layer `m` in evaluation, beside what it evaluates by: numbers and `(C,)` tensors."""
    n, moments = statistic_groups(m, x).shape[1], running_moments(m, len(x))
    running = running_statistics(m) or (None if moments is None else moments[:2])
    if running is None or running[0].shape != x.shape[1:2]: return {"values": n}
    x, dims, (mean, var), eps = wide(x), (0, *range(2, x.ndim)), map(wide, running), eps_of(m, x)
    reach = (x.transpose(1, -1) - mean).flatten(0, -2).abs().amax(0) / (var + eps).sqrt()
    return {"values": n, "limit": math.sqrt(n - 1) if moments is None else None, "weight": x.numel(),
            "mean": x.mean(dims), "var": x.var(dims, unbiased=False) + eps, "running": torch.stack((mean, var + eps)),
            "reach": reach}


def _compare(t: Tensor, f: Tensor | None, e: Tensor, figures: dict[str, Any]) -> dict[str, Any]:
    """Sums over one run of a layer on one batch, from its outputs (see `train_eval_gap`): tensors where they lie."""
    t, e = (wide(u) if u.ndim > 1 else wide(u).view(-1, 1) for u in (t, e))
    part = {**figures, "t2": t.square().sum(), "d2": (t - e).square().sum((0, *range(2, t.ndim))),      # d2 (C,)
            "images": torch.stack([u.flatten(1).square().sum(1) for u in (t - e, t)], 1),               # (N, 2)
            "train_max": t.abs().max(), "eval_max": e.abs().max()}
    if f is not None: part["own2"] = (t - wide(f)).square().sum()
    return part


def _relative(d2: Tensor, t2: Tensor) -> Tensor:
    """sqrt(d2 / t2), 0 where both are 0."""
    return torch.where(d2 == 0, d2, d2 / t2).sqrt()


def _summed(parts: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[float]] | None]:
    """A layer's row from the figures of its batches, and its figures per channel if it has running statistics."""
    first, stacked = parts[0], {k: torch.stack([p[k] for p in parts]) for k, v in parts[0].items()
                               if isinstance(v, torch.Tensor) and k != "images"}
    d2, t2 = stacked["d2"].sum(0), stacked["t2"].sum()
    images = torch.cat([p["images"] for p in parts]).unbind(1)
    channel = int(d2.argmax()) if d2.any() else None
    figures = {"share": _relative(d2, d2.sum()).square()}
    if "running" in first:
        means, (running_mean, running_var) = stacked["mean"], first["running"]
        weight = torch.tensor([p["weight"] for p in parts]).to(means)[:, None]
        weight = weight / weight.sum()
        mean = (weight * means).sum(0)
        var = (weight * (stacked["var"] + (means - mean).square())).sum(0)      # of all batches; eps is in it
        figures.update(mean_off=(running_mean - mean).abs() / var.sqrt(), var_ratio=running_var / var,
                       reach=stacked["reach"].amax(0))
    row = {"values": first.get("values"), "gap": _relative(d2.sum(), t2).item(),
           "image": _relative(*images).median().item(),
           "own": _relative(stacked["own2"].sum(), t2).item() if "own2" in first else None,
           "channel": channel, "limit": first.get("limit") if "own2" in first else None,
           **{k: None if channel is None else v[channel].item() for k, v in figures.items()},
           **{k: stacked[k].max().item() for k in ("train_max", "eval_max")}}
    return row, {k: v.tolist() for k, v in figures.items()} if "running" in first else None


def _cause(rows: Rows, channels: Collection[str]) -> str:
    """In some sentences, where and why the modes part, from the figures alone."""
    if not rows: return "No layer gave tensors of one shape in both modes."
    end, most = rows[-1], max(rows, key=lambda row: row["gap"])
    i = next((i for i, row in enumerate(rows) if not row["gap"] <= 1), None)
    if i is None:
        return (f"The modes agree: the difference at {end['path']} is {end['gap']:.2g} of its size, at no layer more "
                f"than {most['gap']:.2g}.")
    row = rows[i]
    if not math.isfinite(row["gap"]):
        return f"What {row['path']} ({row['module']}) gives is not finite, or all 0 in training mode."
    before = f", after {rows[i - 1]['gap']:.2g} at {rows[i - 1]['path']}" if i else ""
    text = [f"The modes part at {row['path']} ({row['module']}): the difference is {row['gap']:.2g} times the size of "
            f"what training mode gives{before}; at {end['path']} it is {end['gap']:.2g} times, for half of the images "
            f"{end['image']:.2g} or less."]
    if row["path"] in channels:
        ratio = row["var_ratio"]
        fault = ("its running statistics fit" if 0.5 <= ratio <= 2 and row["mean_off"] <= 1 else
                 f"its running mean is {row['mean_off']:.2g} standard deviations off" if 0.5 <= ratio <= 2 else
                 f"its running variance is {max(ratio, 1 / ratio):.2g} times too {'small' if ratio < 1 else 'large'}")
        limit = f" (in training mode {row['limit']:.2g} at most, of {row['values']} values)" if row["limit"] else ""
        text.append(f"{100 * row['share']:.0f} % of it lies in channel {row['channel']}: {fault} for what comes in, "
                    f"and evaluation mode puts it up to {row['reach']:.2g} standard deviations from the mean{limit}.")
    if most["gap"] > 2 * max(row["gap"], end["gap"]): text.append(f"At {most['path']} it is {most['gap']:.2g} times.")
    return " ".join(text)
