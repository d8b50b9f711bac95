"""Take the evaluation statistics of a trained model's batch norms anew, layer by layer."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from norms.batch import BatchNorm
from norms.kinds import BATCH, BatchKind
from norms.moments import all_but_channels, merge_moments, moments, wide
from norms.running import CARRIED_COUNT, CLAMP_IMAGES, RunningBatchNorm
from norms.running_norm import Ranks, RunningNorm

Batch = tuple[Tensor, Tensor | None]                            # xb and yb
Metric = Callable[[Any, Tensor], Tensor | float]                # of what the model gives, which may be anything, and yb
WRAPPERS = {cls.forward for cls in (AveragedModel, nn.DataParallel, nn.parallel.DistributedDataParallel)}


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` did: the layers' names in order of execution, the number of images, the metric's values."""

    layers: tuple[str, ...]
    images: int
    before: float | None = None
    after: float | None = None


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]], n_images: int, *,
                metric: Metric | None = None) -> Recalibration:
    """Take the evaluation statistics of all batch norms and running batch norms of `model` anew from images.

    The running averages of training cover few images (mom=0.1 at batch size 2: about 38), seen by a network that
    changed in between. Here every layer's statistics are the mean and the variance of all values that reach it from
    `n_images` images, in evaluation mode, when all layers before it have theirs already. So they come layer by layer,
    in order of execution, at the cost of one pass over the images per layer, each only up to that layer: for L layers
    about L / 2 evaluations of the images, and with a `metric` two more.

    BatchNorm and torch's get the unbiased variance, as in training; their `num_batches_tracked` is the number of
    batches. RunningBatchNorm gets the biased one, as in training, and `seen` is the number of images (at least 20,
    so that nothing is clamped); its `count` stays, for it describes the batches of its training, and is at least
    `CARRIED_COUNT`. The rivals with running statistics (`norms.rivals`) get the biased one, too, MABN the second
    moment; what they train by follows, and their steps stay.

    A layer that runs several times in one evaluation gets a pass for each: statistics over its runs up to that one, of
    which the earlier ones use the statistics of the pass before. A layer that doesn't run is left as it is.

    `torch.optim.swa_utils.update_bn` looks for torch's class and passes BatchNorm and RunningBatchNorm by without a
    word; use this one. An `AveragedModel` is taken as it is: it's the averaged module's statistics that come anew, and
    `n_averaged` stays (with `use_buffers=False` the next `update_parameters` copies the model's over them). In a
    DataParallel or DistributedDataParallel the module inside evaluates, on one device.

    Norms of `sync_norms` take their statistics from the images of all processes, so that these agree to the last bit:
    every process must call this, with a loader of its own share (or of the same images, each of which then counts
    several times, which only n / (n - 1) in the unbiased variance shows). `images` and the metric are of all of them,
    too. Other norms have their own process's images alone: there let every process have the same.

    Modes and hooks are restored, torch's random state is kept, and after an error so are the statistics.

    Args:
        model: the trained model, or an `AveragedModel`, DataParallel or DistributedDataParallel of one.
        loader: any iterable of `xb` or `(xb, yb)`, best over the training images. It is read once: the images are
            kept in memory, the same for every layer, and moved to the model's device batch by batch. To transform
            them, give `((tfm(xb), yb) for xb, yb in loader)`.
        n_images: how many images to take. If `loader` has fewer, all are taken; the result says how many.
        metric: `f(pred, yb)`, a mean over the batch such as `runner.accuracy`; its sample-weighted mean over the
            same images is reported from before and after.

    Returns:
        `Recalibration(layers, images, before, after)`; the last two are None without a `metric`.

    Raises:
        ValueError: no such norm in `model`, or none that runs; no image; an `n_images` that isn't a positive integer;
            a `metric` without `yb`; a layer whose input is one value per channel or not finite.
        TypeError: batches that aren't tensors.
    """
    if not isinstance(n_images, int) or isinstance(n_images, bool) or n_images < 1:
        raise ValueError(f"recalibrate got n_images={n_images!r}; it needs a positive integer, such as 5000")
    names: dict[BatchKind, str]
    names = {m: name for name, m in model.named_modules() if isinstance(m, BATCH) and m.running_mean is not None}
    if not names:
        raise ValueError(f"recalibrate found no norm with running statistics in {type(model).__name__}; only BatchNorm "
                         "and RunningBatchNorm have any: other norms evaluate as they train and need no recalibration")
    device = next(iter((*model.parameters(), *model.buffers()))).device
    ranks = next((m.synced for m in names if isinstance(m, RunningNorm) and m.ranks > 1), None)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        batches = together(ranks, lambda: take_images(loader, n_images, metric), device)
        images = sum(len(xb) for xb, _ in batches)
        modes = [(m, m.training) for m in model.modules()]
        statistics = [(b, b.clone()) for m in names for b in m.buffers()]
        try:
            model.eval()
            core = unwrapped(model)
            before = metric and mean_metric(core, batches, metric, device, ranks)
            runs = order_of_runs(core, names, batches[0][0].to(device))
            for i, norm in enumerate(runs):
                pooled = pooled_moments(core, norm, runs[:i + 1].count(norm), batches, device)
                set_statistics(norm, names[norm], *of_all_ranks(norm, images, *pooled))
            after = metric and mean_metric(core, batches, metric, device, ranks)
            if ranks is not None: images = int(ranks.sum(torch.tensor(images, device=device)))
        except BaseException:
            for b, old in statistics: b.copy_(old)
            raise
        finally:
            for m, training in modes: m.training = training
    return Recalibration(tuple(names[m] for m in dict.fromkeys(runs)), images, before, after)


def together(ranks: Ranks | None, do: Callable[[], list[Batch]], device: torch.device) -> list[Batch]:
    """`do()`; where it raises on one of `ranks` it does on all, for the others would wait for that one."""
    error, done = None, []
    try: done = do()
    except Exception as e: error = e
    failed = 0 if ranks is None else int(ranks.sum(torch.tensor(int(error is not None), device=device)))
    if error is not None: raise error
    if failed:
        raise ValueError(f"recalibrate: {failed} of {ranks.size() if ranks else 1} processes got no images that they "
                         "could take; each needs a loader of its own share, of at least one image")
    return done


def unwrapped(model: nn.Module) -> nn.Module:
    """The module whose function `model` is: on several devices at once a layer's inputs would not be in one place."""
    while type(model).forward in WRAPPERS: model = model.get_submodule("module")
    return model


def take_images(loader: Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]], n_images: int,
                metric: Metric | None) -> list[Batch]:
    """The first `n_images` of `loader` as a list of `(xb, yb)`, the last one cut to fit; `yb` may be None."""
    batches, left = [], n_images
    for batch in loader:
        xb, yb = (*batch, None)[:2] if isinstance(batch, (tuple, list)) else (batch, None)
        if not isinstance(xb, torch.Tensor):
            raise TypeError(f"recalibrate got a batch of {type(xb).__name__}; the loader must give tensors xb or pairs "
                            "(xb, yb): wrap it, as in ((b['image'], b['label']) for b in loader)")
        if yb is None and metric is not None:
            raise ValueError("recalibrate got a metric and a loader without labels; let the loader give (xb, yb)")
        if len(xb): batches.append((xb[:left], None if yb is None else yb[:left]))
        left -= len(xb)
        if left <= 0: return batches
    if not batches:
        raise ValueError("recalibrate got no image from the loader; give one that isn't empty (or used up: a generator "
                         "runs only once)")
    return batches


def mean_metric(model: nn.Module, batches: list[Batch], metric: Metric, device: torch.device,
                ranks: Ranks | None) -> float:
    """The sample-weighted mean of `metric` over `batches`, a plain float; of all of `ranks`, if there are any."""
    total = 0.0
    for xb, yb in batches:
        assert yb is not None                   # `take_images` has seen to it
        total += float(metric(model(xb.to(device)), yb.to(device))) * len(xb)
    images = sum(len(xb) for xb, _ in batches)
    if ranks is None: return total / images
    both = ranks.sum(torch.tensor([total, images], device=device, dtype=torch.float64))
    return (both[0] / both[1]).item()


def order_of_runs(model: nn.Module, norms: Collection[BatchKind], xb: Tensor) -> list[BatchKind]:
    """The `norms` in the order in which an evaluation of `xb` runs them, each as often as it runs."""
    runs: list[BatchKind] = []
    handles = [m.register_forward_pre_hook(lambda m, args: runs.append(m)) for m in norms]
    try: model(xb)
    finally:
        for handle in handles: handle.remove()
    if not runs:
        raise ValueError(f"recalibrate saw none of the {len(norms)} norms of {type(model).__name__} run; if it is "
                         "compiled, pass the model as it was before torch.compile")
    return runs


class _Reached(Exception):
    """The values are in; the rest of the evaluation isn't needed."""


def pooled_moments(model: nn.Module, norm: nn.Module, runs: int, batches: list[Batch],
                   device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Mean and biased variance of all that enters `norm` in its first `runs` runs of every evaluation of `batches`.

    Returns:
        Both `(C,)` in float64 on the CPU, the number of values per channel, and the number of runs.
    """
    mean = var = torch.zeros((), dtype=torch.float64)
    n = taken = left = 0

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal mean, var, n, taken, left
        x = next(iter((*args, *kwargs.values())))                               # (N, C, *spatial)
        n, taken, left = n + x.numel() // x.shape[1], taken + 1, left - 1
        share = torch.tensor(x.numel() // x.shape[1] / n, dtype=torch.float64)
        batch_mean, batch_var = (m.flatten().to("cpu", torch.float64)           # (C,) each
                                 for m in moments(wide(x.detach()), all_but_channels(x))[:2])
        mean, var = merge_moments(mean, var, batch_mean, batch_var, share)
        if not left: raise _Reached
    handle = norm.register_forward_pre_hook(take, with_kwargs=True)
    try:
        for xb, _ in batches:
            left = runs
            try: model(xb.to(device))
            except _Reached: pass
    finally: handle.remove()
    return mean, var, n, taken


def of_all_ranks(norm: BatchKind, images: int, mean: Tensor, var: Tensor, n: int,
                 runs: int) -> tuple[int, Tensor, Tensor, int, int]:
    """The arguments of `set_statistics` over all processes that `norm` is synchronised with, of this one's."""
    if not isinstance(norm, RunningNorm) or norm.synced is None or norm.ranks == 1: return images, mean, var, n, runs
    device = norm.running_mean.device
    mean, var, totals = norm.synced.merge(mean.to(device), var.to(device), images, n)
    batches = norm.synced.sum(torch.tensor(runs, device=device))            # a batch has a share for each process
    return int(totals[0]), mean, var, int(totals[1]), math.ceil(int(batches) / norm.ranks)


def set_statistics(norm: BatchKind, name: str, images: int, mean: Tensor, var: Tensor, n: int, runs: int) -> None:
    """Make `mean` and the biased `var`, each over `n` values from `runs` batches, the statistics of `norm`."""
    if n == 1 or not (mean.isfinite().all() and var.isfinite().all()):
        raise ValueError(f"recalibrate: layer {name!r} ({type(norm).__name__}) gets "
                         + ("one value per channel, which has no spread: take more images" if n == 1 else
                            "values that are not finite: check the images, and the weights of the layers before it"))
    assert norm.running_mean is not None        # `recalibrate` takes only norms with running statistics
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    if isinstance(norm, RunningBatchNorm):
        norm.running_var.copy_(var)
        norm.follow(norm.fresh)
        norm.unclamped_var.copy_(var)
        norm.count.clamp_(min=CARRIED_COUNT)
        norm.seen.fill_(max(images, CLAMP_IMAGES))
    elif isinstance(norm, (_BatchNorm, BatchNorm)):
        norm.running_var.copy_(var * (n / (n - 1)))
        if norm.num_batches_tracked is not None: norm.num_batches_tracked.fill_(runs)
    else:
        norm.running_var.copy_(var)
        norm.follow(norm.fresh)
