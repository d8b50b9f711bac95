"""A training step in our loop and in other libraries' loops, against the same step in a hand-written one.

All train the five-layer network with `nn.BatchNorm2d` on the same batches of 2 in the same order, one thread, without
oneDNN, plain SGD, and keep the same books: every loss, the mean loss and the accuracy on the training batches. The
batches lie ready in memory; logging, checkpoints, progress bars, summaries and validation are off, so what differs is
the loops. Each library is set up as its own documentation does it; where that leaves a choice, the faster one is taken
(skorch's accuracy in a
callback, not by scikit-learn's scorer).

What is timed is a whole fit of LONG steps less a whole fit of SHORT steps, per step of the difference: what a fit costs
once (setting up, taking down) is in both, is not counted, and stands in the record as `start_up_ms`.

Before anything is timed every arm trains once and must end with the hand-written loop's weights, buffers and averages.
"""

import copy
import importlib
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.bench import Config
from experiments.bench.norms import network
from experiments.bench.timing import interleave, row, settings
from experiments.results import Row
from runner import AvgStatsCallback, Callback, DataBunch, Learner, Recorder, Runner, accuracy

BARE = "hand-written loop"
SIZE, SHORT, LONG = 2, 20, 420

# Batch norm over two values of a 1x1 map is nearly a step function, so this network amplifies rounding like few others:
# after 420 steps at lr 0.01 a change of 1e-7 in the first weights has grown to the size of the weights, and float32
# says nothing about equal work. In float64 at lr 1e-5 a change of 1e-15 grows to 2e-13, and one wrong batch among the
# 420 makes 1e-3, both relative to the largest weight. The rate has no influence on the time.
LR, TOLERANCE = 1e-5, 1e-8


class Batches:
    """What every loop iterates over: batches that lie ready. (Lightning takes a plain list for a list of loaders.)"""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None: self.batches = batches

    def __len__(self) -> int: return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: return iter(self.batches)


# --- the arms: f(model, batches, folder) trains the model and returns (recorded losses, mean loss, accuracy) ------

Books = tuple[list[float], float, float]
Arm = Callable[[nn.Module, Batches, str], Books]


def hand_written(model: nn.Module, batches: Batches, folder: str) -> Books:
    """The loop that one writes without a library."""
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    losses, n = [], 0
    loss_sum, right = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    model.train()
    for xb, yb in batches:
        pred = model(xb)
        loss = F.cross_entropy(pred, yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
        value = loss.detach()
        losses.append(value)
        with torch.no_grad():
            loss_sum.add_(value, alpha=len(xb))
            right.add_(accuracy(pred, yb), alpha=len(xb))
        n += len(xb)
    return torch.stack(losses).tolist(), loss_sum.item() / n, right.item() / n


class _NoValidation(Callback):
    def begin_validate(self) -> bool: return True


def runner(model: nn.Module, batches: Batches, folder: str) -> Books:
    """Ours."""
    recorder, stats = Recorder(), AvgStatsCallback(accuracy)
    run = Runner([recorder, stats, _NoValidation()])
    run.logger = lambda row: None       # or it prints a line per epoch
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    run.fit(1, Learner(model, opt, F.cross_entropy, DataBunch(batches, None)))
    return recorder.losses, stats.history[0]["train_loss"], stats.history[0]["train_accuracy"]


def fastai(model: nn.Module, batches: Batches, folder: str) -> Books:
    """`Learner.fit` with its default callbacks, without the bar; its recorder keeps the smoothed losses."""
    from fastai.callback import progress  # noqa: F401  (brings `no_bar`)
    from fastai.data.core import DataLoaders
    from fastai.learner import AvgLoss, Learner
    from fastai.optimizer import SGD
    learn = Learner(DataLoaders(batches, Batches([]), path=folder), model, F.cross_entropy, opt_func=SGD, lr=LR,
                    metrics=[AvgLoss(), accuracy], path=folder)
    learn.recorder.train_metrics = True
    smooth, dtype = learn.recorder.smooth_loss, next(model.parameters()).dtype

    def reset() -> None: smooth.count, smooth.val = 0, torch.zeros((), dtype=dtype)
    smooth.reset = reset        # its own starts in float32, which can't average a float64 loss
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn.recorder.losses, *learn.recorder.values[0][1:3]     # [0] is the smoothed loss


def lightning(model: nn.Module, batches: Batches, folder: str) -> Books:
    """`Trainer.fit` of a module that logs the two averages per epoch."""
    lib: Any = importlib.import_module("lightning.pytorch" if _version("lightning") else "pytorch_lightning")

    class Module(lib.LightningModule):      # type: ignore[misc]    # which of the two libraries has it shows here
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.losses: list[Tensor] = []

        def training_step(self, batch: tuple[Tensor, Tensor], i: int) -> Tensor:
            xb, yb = batch
            pred = self.model(xb)
            loss = F.cross_entropy(pred, yb)
            self.losses.append(loss.detach())
            self.log_dict({"loss": loss, "accuracy": accuracy(pred, yb)}, on_step=False, on_epoch=True,
                          batch_size=len(xb))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer: return torch.optim.SGD(self.parameters(), lr=LR)

    module = Module()
    trainer = lib.Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
                          enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                          use_distributed_sampler=False, default_root_dir=folder)
    trainer.fit(module, batches)
    return (torch.stack(module.losses).tolist(), trainer.callback_metrics["loss"].item(),
            trainer.callback_metrics["accuracy"].item())


def ignite(model: nn.Module, batches: Batches, folder: str) -> Books:
    """`create_supervised_trainer` with two metrics and a handler that keeps the losses."""
    from ignite.engine import Events, create_supervised_trainer
    from ignite.metrics import Accuracy, Average
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    trainer = create_supervised_trainer(model, opt, F.cross_entropy,
                                        output_transform=lambda x, y, pred, loss: (pred, y, loss.detach()))
    Accuracy(output_transform=lambda out: out[:2]).attach(trainer, "accuracy")
    Average(output_transform=lambda out: out[2]).attach(trainer, "loss")
    losses: list[Tensor] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output[2]))
    state = trainer.run(batches, max_epochs=1)
    return torch.stack(losses).tolist(), state.metrics["loss"], state.metrics["accuracy"]


def skorch(model: nn.Module, batches: Batches, folder: str) -> Books:
    """`NeuralNet.fit` with its default callbacks, which average the loss, and one for the accuracy."""
    from skorch import NeuralNet
    from skorch.callbacks import Callback

    class Accuracy(Callback):       # type: ignore[misc]    # skorch has no annotations
        def on_epoch_begin(self, net: NeuralNet, **kwargs: Any) -> None:
            self.right, self.n = torch.zeros((), dtype=torch.float64), 0

        def on_batch_end(self, net: NeuralNet, batch: tuple[Tensor, Tensor], training: bool, y_pred: Tensor,
                         **kwargs: Any) -> None:
            with torch.no_grad(): self.right.add_(accuracy(y_pred, batch[1]), alpha=len(batch[1]))
            self.n += len(batch[1])

        def on_epoch_end(self, net: NeuralNet, **kwargs: Any) -> None:
            net.history.record("train_acc", self.right.item() / self.n)

    net = NeuralNet(model, nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=LR, max_epochs=1, train_split=None,
                    iterator_train=lambda dataset, **kwargs: batches,
                    callbacks=[Accuracy()], callbacks__print_log=None)
    xb, yb = batches.batches[0]
    net.fit(xb, yb)                                                  # the iterator knows the batches
    losses = net.history[0, "batches", :, "train_loss"]
    if len(losses) < len(batches): raise KeyboardInterrupt           # which `fit` keeps to itself
    return losses, net.history[0, "train_loss"], net.history[0, "train_acc"]


# name: (distributions that hold it, the first that is installed counts; its arm)
PEERS: dict[str, tuple[tuple[str, ...], Arm]] = {
    "fastai": (("fastai",), fastai),
    "Lightning": (("lightning", "pytorch-lightning"), lightning),
    "ignite": (("pytorch-ignite",), ignite),
    "skorch": (("skorch",), skorch),
}


# --- the comparison -----------------------------------------------------------------------------------------------

def installed() -> dict[str, tuple[str, Arm]]:
    """The peers that are here, `{name: (version, arm)}`; says which are not, and how to get them."""
    found = {}
    for name, (distributions, arm) in PEERS.items():
        version = next(filter(None, map(_version, distributions)), None)
        if version: found[name] = version, arm
        else: print(f"{name}: not installed: pip install -e '.[bench]'", flush=True)
    return found


def _version(distribution: str) -> str | None:
    try: return metadata.version(distribution)
    except metadata.PackageNotFoundError: return None


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines below errors: a fit of Lightning's alone writes half a dozen."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally: logging.disable(before)


def make_batches(config: Config, n: int, dtype: torch.dtype = torch.float32) -> Batches:
    """`n` batches of noise, always the same: images `(SIZE, 1, 28, 28)` and labels `(SIZE,)`."""
    rng = config.rng()
    return Batches([(torch.randn(SIZE, 1, 28, 28, generator=rng).to(dtype),
                     torch.randint(10, (SIZE,), generator=rng)) for _ in range(n)])


def check(arms: Mapping[str, Arm], config: Config, folder: str) -> dict[str, float]:
    """Train every arm once in float64 and compare with the hand-written loop.

    Returns `{name: largest difference of a weight or buffer, relative to the largest weight}`, without the arms whose
    library can't be imported.

    Raises:
        RuntimeError: an arm did other work than the hand-written loop.
    """
    batches, initial = make_batches(config, LONG, torch.float64), network(nn.BatchNorm2d)
    ended: dict[str, dict[str, Tensor]] = {}
    books: dict[str, Books] = {}
    for name, fit in arms.items():
        model = copy.deepcopy(initial).double()
        try: books[name] = fit(model, batches, folder)
        except ImportError as e:
            print(f"{name}: left out, it is installed and can't be imported: {e}", flush=True)
            continue
        ended[name] = {k: v.detach().double() for k, v in model.state_dict().items()}
    largest = max(ended[BARE][k].abs().max().item() for k, _ in initial.named_parameters())
    differences: dict[str, float] = {}
    for name in ended:
        apart = {k: (v - ended[BARE][k]).abs().max().item() / largest for k, v in ended[name].items()}
        where = max(apart, key=apart.__getitem__)
        differences[name] = apart[where]
        losses, *averages = books[name]
        faults = []
        if not apart[where] <= TOLERANCE:
            faults.append(f"ended with weights that differ from the {BARE}'s, in {where!r} by {apart[where]:.1g} of "
                          "the largest weight")
        if len(losses) != LONG: faults.append(f"recorded {len(losses)} losses")
        for what, mine, other in zip(("mean loss", "accuracy"), averages, books[BARE][1:], strict=True):
            # Lightning averages in float32.
            if not abs(mine - other) <= 1e-5 * abs(other): faults.append(f"has the {what} {mine:.7g} for {other:.7g}")
        if faults:
            raise RuntimeError(f"{name} {' and '.join(faults)}; the same {LONG} steps in float64 leave at most "
                               f"{TOLERANCE:g}, so it did other work and its time would mean nothing: mend its arm in "
                               f"{__name__}, or uninstall it")
    return differences


def rows(config: Config) -> list[Row]:
    """The part's rows.

    Raises:
        RuntimeError: an arm that didn't end with the hand-written loop's weights.
    """
    peers = installed()
    versions = {f"{name} {version}": version for name, (version, _) in peers.items()}
    arms: dict[str, Arm] = {BARE: hand_written, "Runner": runner,
                            **{f"{name} {version}": arm for name, (version, arm) in peers.items()}}
    initial, batches = network(nn.BatchNorm2d), {n: make_batches(config, n) for n in (SHORT, LONG)}

    def fit(arm: Arm, n: int) -> Callable[[], Books]: return lambda: arm(copy.deepcopy(initial), batches[n], folder)
    with quiet(), settings(onednn=False), tempfile.TemporaryDirectory() as folder:
        apart = check(arms, config, folder)
        arms = {name: arm for name, arm in arms.items() if name in apart}
        whole = interleave({(name, n): fit(arm, n) for name, arm in arms.items() for n in (SHORT, LONG)},
                           config.repetitions)
    times = {name: [(long - short) / (LONG - SHORT)
                    for long, short in zip(whole[name, LONG], whole[name, SHORT], strict=True)] for name in arms}
    found = []
    for name in arms:
        against, target = None if name == BARE else BARE, 1.05 if name == "Runner" else None
        r = row("peers", f"batch {SIZE}", name, against, times, target)
        start_up = statistics.median(a - SHORT * b for a, b in zip(whole[name, SHORT], times[name], strict=True))
        note = "" if name == BARE else "same weights" if not apart[name] else f"weights within {apart[name]:.0e}"
        found.append({**r, "version": versions.get(name), "start_up_ms": start_up,
                      "max_weight_difference": apart[name], "note": note})
    return found
