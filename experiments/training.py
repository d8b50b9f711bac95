"""Training one arm of an experiment, its convolutions by a fixed rule, and its checkpoints: a row of figures."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.errors import InputError, WriteError
from experiments.flips import Flips
from experiments.image_data import ImageData
from experiments.models import channels_last_, get_runner
from experiments.results import Row, Trained
from runner import (
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    CancelEpochException,
    Checkpoint,
    CheckpointError,
    CPUBackendCallback,
    CudaCallback,
    DataBunch,
    Dataset,
    Learner,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    Runner,
    accuracy,
    combine_scheds,
    get_dls,
    sched_lin,
)
from runner.stateful import Stateful

FIGURES = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
VALID_BATCH = 250   # images at least in a batch of validation, which has nothing to learn from small ones
EVERY_SECONDS = 30  # between two checkpoints of an arm, beside those at the ends of epochs
LOOK = 100          # batches between two looks at whether a training is lost
WARM_UP = 0.3       # the part of training in which a rate of three stops goes from the first to the second

# The rule for convolutions on a CPU: up to so many images in a batch torch's own and channels last, above oneDNN's and
# the usual layout; one thread. It is fixed, so that a seed fixes the rows; `python -m experiments convolutions`
# measures it anew. In the committed records, 94 first batches, oneDNN's took 1.6 to 6.5 times as long as torch's own at
# batch size 2, and .64 to .75 of the time at 16, .43 to .63 at 32, .35 to .75 at 128, .23 to .41 at 512.
SMALL_BATCH = 8
CONVOLUTIONS = ("rule", "onednn", "own", "measured")

Rate = float | Sequence[float]      # a learning rate, or its stops: see `schedule`
Losses = list[float]                # of each training step
Windows = tuple[list[float], list[float]]       # steps and means: see `windows`


def onednn_is_faster(images: int) -> bool:
    """The rule for convolutions of so many images at once."""
    return images > SMALL_BATCH


def backend_of(convolutions: str) -> CPUBackendCallback:
    """The callback for a name in `CONVOLUTIONS`; "own" are torch's."""
    if convolutions == "measured": return CPUBackendCallback()
    return CPUBackendCallback(onednn_is_faster if convolutions == "rule" else convolutions == "onednn", threads=1)


def convolutions_in_words(convolutions: str) -> str:
    """What a header says of a name in `CONVOLUTIONS`."""
    return {"rule": f"torch's own up to batch size {SMALL_BATCH}, oneDNN's above", "onednn": "oneDNN's",
            "own": "torch's own", "measured": "whichever is faster on the first batch, measured"}[convolutions]


def train(model: nn.Module, images: ImageData, row: Row, device: str | torch.device, label: str,
          cbs: Iterable[Callback] = (), *, tfm: Callable[[Tensor], Tensor] | None = None,
          flips: bool = False, convolutions: str = "rule", drop_last: bool = False, compile: bool = False,
          checkpoint: Path | None = None) -> Trained[Losses]:
    """Train `model` as `row` says: `(rows per epoch, final row, training losses)`.

    Args:
        model: what to train, by plain SGD and cross entropy.
        images: an `ImageData`.
        row: what the arm is, and the beginning of all its rows: the arm's name first, and `batch_size`, `lr` (see
            `schedule`; `warm_up`, where a rate of three stops has its top, may be there too), `epochs` and `seed`,
            which decides the order of the training images.
        device: where to.
        label: for the progress bar.
        cbs: further callbacks.
        tfm: transform of the images of a batch as they are kept; None is `images.tfm`.
        flips: whether to flip training images left to right at random, by the row's seed: `Flips`.
        convolutions: what a model with convolutions runs on a CPU, a name in `CONVOLUTIONS`.
        drop_last: whether to leave out the last training batch if it is smaller than the others.
        compile: whether to compile the steps.
        checkpoint: the folder for checkpoints; training goes on from the newest there. None keeps none.

    A training whose predictions are all NaN is left (`LeaveLost`). The final row has the last epoch's figures,
    seconds and the status: "ok", "diverged" (a figure that is not finite) or "failed", with the error of a norm
    that refused its input.
    """
    order, device = torch.Generator().manual_seed(row["seed"]), torch.device(device)
    train_dl, valid_dl = get_dls(images.train, images.valid, row["batch_size"], drop_last=drop_last,
                                 valid_bs=max(2 * row["batch_size"], VALID_BATCH), generator=order)
    rate, sched = schedule(row["lr"], row.get("warm_up", WARM_UP))
    convolves = device.type == "cpu" and any(isinstance(m, nn.Conv2d) for m in model.modules())
    if convolves and not onednn_is_faster(row["batch_size"]): channels_last_(model)
    backend, watch = backend_of(convolutions), Stopwatch()
    learn, run = get_runner(model, DataBunch(train_dl, valid_dl, images.c), rate, [
        Recorder(), AvgStatsCallback(accuracy), CudaCallback(device),
        BatchTransformXCallback(tfm or images.tfm), *([Flips(row["seed"])] if flips else []), ProgressCallback(label),
        *([backend] if convolves else []), *([ParamScheduler("lr", sched)] if sched else []), watch, LeaveLost(), *cbs],
        compile=compile)
    row = {**row, "parameters": sum(p.numel() for p in model.parameters())}
    error: str | None = None
    # A norm that refuses its input (torch's batch norm does, one value per channel) is a row, not a crash.
    try: fit_from(checkpoint, run, row["epochs"], learn)
    except ValueError as e:
        if isinstance(e, InputError): raise
        if not watch.running: raise InputError(str(e)) from e
        error = str(e)
    if convolves: row["backend"] = {**(backend.choice or {}), "reason": backend.reason}
    arm = next(iter(row))
    epochs = [{arm: row[arm], "seed": row["seed"], **r} for r in run[AvgStatsCallback].history]
    row.update({n: epochs[-1][n] if epochs else math.nan for n in FIGURES})
    row["valid_accuracies"] = [r["valid_accuracy"] for r in epochs]
    row["seconds"] = watch.seconds
    finite = all(math.isfinite(row[n]) for n in FIGURES)
    row["status"] = "failed" if error else "ok" if finite else "diverged"
    if error: row["error"] = error
    return epochs, row, run[Recorder].losses


def fit_from(checkpoint: Path | None, run: Runner, epochs: int, learn: Learner) -> None:
    """`run.fit(epochs, learn)`, from the newest checkpoint in the folder `checkpoint` on and with more written there.

    None is a fit without checkpoints.

    Raises:
        InputError: the checkpoint is of another run, or can't be written.
    """
    if checkpoint is None: return run.fit(epochs, learn)
    try: run.fit(epochs, learn, Checkpoint(checkpoint, every_seconds=EVERY_SECONDS), resume=checkpoint)
    except CheckpointError as e: raise InputError(f"{e}. Or delete {checkpoint}, and this arm begins anew") from e
    except BrokenPipeError: raise           # of the output
    except OSError as e:
        raise WriteError(f"the checkpoints in {str(checkpoint)!r} can't be written: {e.strerror or e}; make room for "
                         f"them, or make it writable. The same command with --resume goes on.") from e


class LeaveLost(Stateful):
    """Leaves out what is left of a training in which every prediction is NaN: it would change nothing.

    The step after such a batch makes the last layer's bias NaN, and no step mends that. It is looked at every `every`
    training batches of an epoch; the training figures are those of the batches until then, and validation goes on.
    """

    _saved = "seen", "lost"

    def __init__(self, every: int = LOOK) -> None: self.every = every

    def begin_fit(self) -> None: self.seen, self.lost = 0, False

    def begin_epoch(self) -> None: self.seen = 0

    def begin_batch(self) -> None:
        if self.lost and self.in_train: raise CancelEpochException

    def after_batch(self) -> None:
        if not self.in_train or self.lost: return
        self.seen += 1
        if self.seen % self.every == 0: self.lost = bool(self.pred.isnan().all())


class Stopwatch(Callback):
    """The `seconds` since a fit began, those before an interruption included, and nothing of what came between.

    `running` is whether the fit has come to its first epoch.
    """

    def __init__(self) -> None: self.begin_fit()

    def begin_fit(self) -> None: self.start, self.running = time.perf_counter(), False

    def begin_epoch(self) -> None: self.running = True

    @property
    def seconds(self) -> float: return time.perf_counter() - self.start

    def state_dict(self) -> dict[str, float]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from the seconds of `state_dict`."""
        self.start = time.perf_counter() - state["seconds"]


@torch.no_grad()
def measured_on(model: nn.Module, data: Dataset, tfm: Callable[[Tensor], Tensor],
                batch_size: int = VALID_BATCH) -> tuple[float, float]:
    """Mean loss and accuracy of `model` on `data`, whose batches go through `tfm`, in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for xb, yb in zip(*(t.split(batch_size) for t in (data.x, data.y)), strict=True):
        xb, yb = xb.to(device), yb.to(device)
        pred = model(tfm(xb))
        sums[0].add_(F.cross_entropy(pred, yb), alpha=len(yb))
        sums[1].add_(accuracy(pred, yb), alpha=len(yb))
    loss, right = (sums / len(data)).tolist()
    return loss, right


def check_batch_size(batch_size: int, images: ImageData, option: str = "") -> None:
    """Raise unless the training images fill one batch; `option` is the command's for the batch size, if it has one."""
    if batch_size > len(images.train):
        smaller = f"take a smaller batch size ({option}) or" if option else "take"
        raise InputError(f"batch size is {batch_size} and there are {len(images.train)} training images; {smaller} "
                         "a larger --limit")


def schedule(lr: Rate, warm_up: float = WARM_UP) -> tuple[float, Callable[[float], float] | None]:
    """The first rate and the schedule of the learning rate `lr`: `(rate, schedule or None)`.

    `lr` is a number, or the stops of a rate that is linear in between: `(start, end)`, or `(start, top, end)` with the
    top at `warm_up` of the training.
    """
    if isinstance(lr, (int, float)): return lr, None
    legs = [sched_lin(*leg) for leg in pairwise(lr)]
    return lr[0], legs[0] if len(legs) == 1 else combine_scheds([warm_up, 1 - warm_up], legs)


def windows(losses: Sequence[float], n: int = 100) -> Windows:
    """Means of `losses` over `n` windows, with the step at the middle of each: `(steps, means)`."""
    size = max(1, len(losses) // n)
    starts = range(0, len(losses) - size + 1, size)
    return [s + size / 2 for s in starts], [sum(losses[s:s + size]) / size for s in starts]
