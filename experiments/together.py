"""Training several networks of one architecture as one: what `experiments.training.train` gives for each, sooner."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.errors import InputError
from experiments.flips import Flips
from experiments.image_data import ImageData
from experiments.models import channels_last_
from experiments.results import Row, Trained
from experiments.side_by_side import EachFigures, EachTransform, SideBySide
from experiments.study.stacked import stack, unstack
from experiments.study.stacked_layers import FEW_IMAGES, GroupedConv2d
from experiments.study.stacked_sgd import StackedSGD
from experiments.training import (
    FIGURES,
    VALID_BATCH,
    WARM_UP,
    LeaveLost,
    Losses,
    Stopwatch,
    backend_of,
    fit_from,
    onednn_is_faster,
    schedule,
)
from runner import (
    SGD,
    BatchTransformXCallback,
    Callback,
    CPUBackendCallback,
    CudaCallback,
    DataBunch,
    Learner,
    ParamScheduler,
    ProgressCallback,
    Runner,
)

SAME = ("batch_size", "epochs", "warm_up")      # what the rows of networks that are trained as one have in common


def train_together(models: Sequence[nn.Module], images: ImageData, rows: Sequence[Row], device: str | torch.device,
                   label: str = "", cbs: Iterable[Callback] = (), *, tfm: Callable[[Tensor], Tensor] | None = None,
                   flips: bool = False, convolutions: str = "rule", drop_last: bool = False,
                   checkpoint: Path | None = None) -> list[Trained[Losses]]:
    """Train each of the K `models` as its row says, all as one: what `train` gives for each, in a list.

    `stack` says which models can be, and that each becomes what it would alone, to rounding. One that diverges leaves
    the others alone. `seconds` are a K-th of all. The arguments are those of `train`; further: `rows` may differ in
    their seeds and rates (all numbers, or as many stops each), and in what training doesn't look at. `tfm` must treat
    every image by itself. `cbs` see the network that `stack` makes, its input `(N, K C, *)` and labels `(N, K)`.

    Raises:
        ValueError, TypeError: models that can't be stacked.
        InputError: rows that differ in their batch size or epochs, or in how many stops their rates have, or that are
            not as many as the models.
    """
    if len(models) != len(rows):
        raise InputError(f"train_together got {len(models)} models and {len(rows)} rows; it needs one row for each")
    net, k, device, row = stack(models), len(models), torch.device(device), dict(rows[0]) if rows else {}
    for name in SAME:
        if any(r.get(name) != row.get(name) for r in rows):
            raise InputError(f"train_together got rows whose {name} differ, {[r.get(name) for r in rows]}; networks "
                             "that are trained as one have one: train them apart")
    tfm = tfm or images.tfm
    dl = SideBySide(images.train, row["batch_size"], [r["seed"] for r in rows], drop_last)
    rate, sched = schedules([r["lr"] for r in rows], next(net.parameters(), torch.zeros(())).dtype,
                            row.get("warm_up", WARM_UP))
    figures = EachFigures(models, images.valid, max(2 * row["batch_size"], VALID_BATCH), tfm, device)
    convolves = device.type == "cpu" and any(isinstance(m, nn.Conv2d) for m in net.modules())
    if convolves and not onednn_is_faster(row["batch_size"]): channels_last_(net)
    backend, reason = _backend(net, convolutions)
    watch = Stopwatch()
    opt = StackedSGD(net.parameters(), rate) if torch.is_tensor(rate) else SGD(net.parameters(), lr=rate)
    learn = Learner(net, opt, figures.summed_loss, DataBunch(dl, None, images.c))
    run = Runner([figures, CudaCallback(device), BatchTransformXCallback(EachTransform(k, tfm)),
                  *([Flips([r["seed"] for r in rows])] if flips else []), ProgressCallback(label),
                  *([backend] if convolves else []),
                  *([ParamScheduler("lr", sched)] if sched else []), watch, LeaveLost(), *cbs])
    for model in models: model.to(device)
    error: str | None = None
    try: fit_from(checkpoint, run, row["epochs"], learn)
    except ValueError as e:
        if isinstance(e, InputError): raise
        if not watch.running: raise InputError(str(e)) from e
        error = str(e)
    unstack(net, models)
    trained: list[Trained[Losses]] = []
    losses = torch.stack(figures.losses, 1).tolist() if figures.losses else [[]] * k
    for i, (model, row) in enumerate(zip(models, rows, strict=True)):
        row = {**row, "parameters": sum(p.numel() for p in model.parameters())}
        if convolves: row["backend"] = {**(backend.choice or {}), "reason": reason or backend.reason}
        arm = next(iter(row))
        epochs = [{arm: row[arm], "seed": row["seed"], **r} for r in (each[i] for each in figures.past)]
        row.update({n: epochs[-1][n] if epochs else math.nan for n in FIGURES})
        row["valid_accuracies"] = [r["valid_accuracy"] for r in epochs]
        row["seconds"] = watch.seconds / k
        finite = all(math.isfinite(row[n]) for n in FIGURES)
        row["status"] = "failed" if error else "ok" if finite else "diverged"
        if error: row["error"] = error
        trained.append((epochs, row, losses[i][:figures.lost[i][1] if i in figures.lost else None]))
    return trained


def schedules(rates: Sequence[Any], dtype: torch.dtype,
              warm_up: float = WARM_UP) -> tuple[Any, Callable[[float], Any] | None]:
    """The first rate and the schedule of K learning rates, as `schedule` has for one: `(rate, schedule or None)`.

    They are numbers where all are alike, and else tensors `(K,)`.

    Raises:
        InputError: rates of different numbers of stops.
    """
    stops = [(r,) if isinstance(r, (int, float)) else tuple(r) for r in rates]
    if any(len(s) != len(stops[0]) for s in stops):
        raise InputError(f"train_together got the rates {list(rates)}; networks that are trained as one have rates of "
                         "as many stops: write (r, r) for a rate r that stays, or train them apart")
    if len(set(stops)) == 1: return schedule(rates[0], warm_up)
    at = [torch.tensor(column, dtype=dtype) for column in zip(*stops, strict=True)]
    if len(at) > 1: return schedule(at, warm_up)     # type: ignore[arg-type]    # a schedule's formula takes tensors
    return at[0], None


def _backend(net: nn.Module, convolutions: str) -> tuple[CPUBackendCallback, str | None]:
    """The callback for convolutions on a CPU, and its reason in words if it isn't its own."""
    layers = [m for m in net.modules() if isinstance(m, GroupedConv2d)]
    for m in layers: m.by_rule = convolutions == "rule"
    if convolutions != "rule": return backend_of(convolutions), None
    return CPUBackendCallback(True, 1), ("by rule, for networks side by side: oneDNN's, up to batch size "
                                         f"{FEW_IMAGES} by patches where there are fewer positions than channels")
