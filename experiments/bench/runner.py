"""The runner with `Recorder` and `AvgStatsCallback(accuracy)` against a loop written out by hand.

Both fetch the same batches from the same kind of loader and compute the same: forward, cross entropy, backward, SGD,
every loss kept, means of loss and accuracy weighted by images. nn.BatchNorm2d, one thread; at batch size 2 without
oneDNN, at 64 with it. Milliseconds per step, of whole fits without validation. Optimizer and loader are alike for both:
torch's SGD and the loader of `get_dls`. Two more arms say what `runner.SGD` and that loader are worth at batch size 2.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from experiments.bench import Config
from experiments.bench.norms import network
from experiments.bench.timing import interleave, row, settings
from experiments.models import NormFactory
from experiments.results import Row
from runner import (
    SGD,
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    DataBunch,
    Dataset,
    Learner,
    Recorder,
    Runner,
    accuracy,
    get_dls,
    view_tfm,
)

LR = 0.01

Loader = DataLoader[tuple[Tensor, Tensor]]
Means = tuple[list[float], list[float]]         # the losses, and the two means
Fit = Callable[[nn.Sequential, optim.Optimizer, Loader], object]


def loader(batches: int, size: int, rng: torch.Generator) -> Loader:
    """A shuffled loader of random flat images and labels, as the main job's; no batch of another size."""
    n = batches * size
    ds = Dataset(torch.randn(n, 784, generator=rng), torch.randint(0, 10, (n,), generator=rng))
    dl: Loader = get_dls(ds, ds, size, generator=torch.Generator().manual_seed(0))[0]
    return dl


def by_hand(model: nn.Module, opt: optim.Optimizer, dl: Loader) -> Means:
    """One epoch: the losses and the two means."""
    losses, n = [], 0
    loss_sum, hits = (torch.zeros((), dtype=torch.float64) for _ in range(2))
    model.train()
    for xb, yb in dl:
        pred = model(xb.view(-1, 1, 28, 28))
        loss = F.cross_entropy(pred, yb)
        with torch.no_grad():
            losses.append(loss.detach())
            loss_sum.add_(loss.detach(), alpha=len(xb))
            hits.add_(accuracy(pred, yb), alpha=len(xb))
        n += len(xb)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return torch.stack(losses).tolist(), [loss_sum.item() / n, hits.item() / n]


class _TrainOnly(Callback):
    def begin_validate(self) -> bool: return True


def trainer(*cbs: Callback, compile: bool = False) -> Runner:
    """A runner that keeps what `by_hand` keeps and prints nothing."""
    run = Runner([Recorder(), AvgStatsCallback(accuracy), BatchTransformXCallback(view_tfm(1, 28, 28)), _TrainOnly(),
                  *cbs], compile=compile)
    run.logger = lambda row: None
    return run


def with_runner(model: nn.Module, opt: optim.Optimizer, dl: Loader) -> Means:
    """The same epoch by the runner: the losses and the two means."""
    run = trainer()
    run.fit(1, Learner(model, opt, F.cross_entropy, DataBunch(dl, None, 10)))
    return run[Recorder].losses, [run[AvgStatsCallback].history[0][f"train_{k}"] for k in ("loss", "accuracy")]


def torchs_loader(model: nn.Module, opt: optim.Optimizer, dl: Loader) -> Means:
    """`by_hand` with the same batches from torch's own loader."""
    return by_hand(model, opt, DataLoader(dl.dataset, None, sampler=dl.sampler, collate_fn=dl.collate_fn,
                                          generator=dl.generator))


def own_sgd(model: nn.Module, opt: optim.Optimizer, dl: Loader) -> Means:
    """`with_runner` with `runner.SGD` at the rate of `opt`."""
    return with_runner(model, SGD(model.parameters(), lr=opt.param_groups[0]["lr"]), dl)


def epoch(f: Fit, dl: Loader, norm: NormFactory = nn.BatchNorm2d) -> Callable[[], object]:
    """A function that trains one network through `dl` by `f`, and goes on at every call."""
    model = network(norm)
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    return lambda: f(model, opt, dl)


def per_step(arms: Mapping[str, Fit], size: int, batches: int, config: Config) -> dict[str, list[float]]:
    """Milliseconds per training step of `arms`, functions as `by_hand`, in epochs of `batches`: `{name: [ms, ...]}`."""
    dl = loader(batches, size, config.rng())
    with settings(onednn=size > 8):
        times = interleave({name: epoch(f, dl) for name, f in arms.items()}, config.repetitions, 0.15)
    return {name: [ms / batches for ms in values] for name, values in times.items()}


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    found = []
    for size, batches, target in ((2, 100, 1.05), (64, 20, 1.02)):
        arms: dict[str, Fit] = {"by hand": by_hand, "Runner": with_runner}
        if size == 2: arms |= {"Runner, runner.SGD": own_sgd, "by hand, torch's loader": torchs_loader}
        times = per_step(arms, size, batches, config)
        found += [row("runner", f"batch {size}", name, None if name == "by hand" else "by hand", times,
                      target if name == "Runner" else None) for name in arms]
    return found
