"""The arms of an experiment, run one after the other: training one, the loop over all, and their figures in words."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from experiments.data import ImageData
from experiments.errors import InputError
from experiments.models import channels_last_, get_runner
from experiments.results import Result, Row, Summary, Table, Verdict, text_table
from experiments.run_folder import RunFolder
from experiments.settings import Settings
from runner import (
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    Checkpoint,
    CheckpointError,
    CPUBackendCallback,
    CudaCallback,
    DataBunch,
    Learner,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    Runner,
    accuracy,
    combine_scheds,
    get_dls,
    sched_lin,
    view_tfm,
)
from runner.progress import format_time

FIGURES = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
MEASURED = ["valid accuracy", "range", "valid loss", "seeds", "seconds", "status"]     # the columns of `measured`
SMALL_BATCH = 8     # images at most in a batch for which convolutions with channels last are the faster ones, measured
VALID_BATCH = 250   # images at least in a batch of validation, which has nothing to learn from small ones
EVERY_SECONDS = 30  # between two checkpoints of an arm, beside those at the ends of epochs
WARM_UP = 0.3       # the part of training in which a rate of three stops goes from the first to the second

Rate = float | Sequence[float]      # a learning rate, or its stops: see `schedule`
Curve = TypeVar("Curve")


class Data(Protocol):
    """What an experiment is run on: an `ImageData`, or what has these of it, and a `str`."""

    @property
    def name(self) -> str: ...

    @property
    def notice(self) -> str: ...

    @property
    def train(self) -> Sized: ...

    @property
    def valid(self) -> Sized: ...


# --- one arm ------------------------------------------------------------------------------------------------------

def train(model: nn.Module, images: ImageData, row: Row, device: str | torch.device, label: str,
          cbs: Iterable[Callback] = (), *, tfm: Callable[[Tensor], Tensor] | None = None,
          backend: CPUBackendCallback | None = None, drop_last: bool = False, compile: bool = False,
          checkpoint: Path | None = None) -> tuple[list[Row], Row, list[float]]:
    """Train `model` as `row` says: `(rows per epoch, final row, training losses)`.

    Args:
        model: what to train, by plain SGD and cross entropy.
        images: an `ImageData`.
        row: what the arm is, and the beginning of all its rows: the arm's name first, and `batch_size`, `lr` (see
            `schedule`), `epochs` and `seed`, which decides the order of the training images.
        device: where to.
        label: for the progress bar.
        cbs: further callbacks.
        tfm: transform of the flat images of a batch; None views them as `(N, 1, 28, 28)`.
        backend: a `CPUBackendCallback` for a model with convolutions; None for one that measures.
        drop_last: whether to leave out the last training batch if it is smaller than the others.
        compile: whether to compile the steps.
        checkpoint: the folder for checkpoints; training goes on from the newest there. None keeps none.

    The final row has the last epoch's figures, seconds and the status: "ok", "diverged" (a figure that is not finite)
    or "failed", with the error of a norm that refused its input.
    """
    order, device = torch.Generator().manual_seed(row["seed"]), torch.device(device)
    train_dl, valid_dl = get_dls(images.train, images.valid, row["batch_size"], drop_last=drop_last,
                                 valid_bs=max(2 * row["batch_size"], VALID_BATCH), generator=order)
    rate, sched = schedule(row["lr"])
    convolutions = device.type == "cpu" and any(isinstance(m, nn.Conv2d) for m in model.modules())
    if convolutions and row["batch_size"] <= SMALL_BATCH: channels_last_(model)
    backend, watch = backend or CPUBackendCallback(), Stopwatch()
    learn, run = get_runner(model, DataBunch(train_dl, valid_dl, images.c), rate, [
        Recorder(), AvgStatsCallback(accuracy), CudaCallback(device),
        BatchTransformXCallback(tfm or view_tfm(1, 28, 28)), ProgressCallback(label),
        *([backend] if convolutions else []), *([ParamScheduler("lr", sched)] if sched else []), watch, *cbs],
        compile=compile)
    row = {**row, "parameters": sum(p.numel() for p in model.parameters())}
    error: str | None = None
    # A norm that refuses its input (torch's batch norm does, one value per channel) is a row, not a crash.
    try: fit_from(checkpoint, run, row["epochs"], learn)
    except ValueError as e:
        if isinstance(e, InputError): raise
        if not watch.running: raise InputError(str(e)) from e
        error = str(e)
    if convolutions: row["backend"] = {**(backend.choice or {}), "reason": backend.reason}
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
        InputError: the checkpoint is of another run.
    """
    if checkpoint is None: return run.fit(epochs, learn)
    try: run.fit(epochs, learn, Checkpoint(checkpoint, every_seconds=EVERY_SECONDS), resume=checkpoint)
    except CheckpointError as e: raise InputError(f"{e}. Or delete {checkpoint}, and this arm begins anew") from e


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


def check_batch_size(batch_size: int, images: ImageData) -> None:
    """Raise unless the training images fill one batch."""
    if batch_size > len(images.train):
        raise InputError(f"batch size is {batch_size} and there are {len(images.train)} training images; take a "
                         "smaller batch size or a larger limit")


def schedule(lr: Rate) -> tuple[float, Callable[[float], float] | None]:
    """The first rate and the schedule of the learning rate `lr`: `(rate, schedule or None)`.

    `lr` is a number, or the stops of a rate that is linear in between: `(start, end)`, or `(start, top, end)` with the
    top at `WARM_UP` of the training.
    """
    if isinstance(lr, (int, float)): return lr, None
    legs = [sched_lin(*leg) for leg in pairwise(lr)]
    return lr[0], legs[0] if len(legs) == 1 else combine_scheds([WARM_UP, 1 - WARM_UP], legs)


def windows(losses: Sequence[float], n: int = 100) -> tuple[list[float], list[float]]:
    """Means of `losses` over `n` windows, with the step at the middle of each: `(steps, means)`."""
    size = max(1, len(losses) // n)
    starts = range(0, len(losses) - size + 1, size)
    return [s + size / 2 for s in starts], [sum(losses[s:s + size]) / size for s in starts]


# --- all arms -----------------------------------------------------------------------------------------------------

def run_arms(experiment: str, config: Settings, data: Data, arms: list[tuple[str, int]],
             train_arm: Callable[[str, int, str, Path], tuple[list[Row], Row, Curve]], *, header: str,
             judge: Callable[[list[Row], str, int], Verdict], table: Callable[[Summary], Table],
             draw: Callable[[list[Row], dict[str, Curve], Path], None], published: object,
             finished: Callable[[str, int, Row, Curve], None] = lambda name, seed, row, curve: None) -> Result:
    """Run `arms`, print as it goes, write the run folder: a `Result`.

    Args:
        experiment, config: the name and the settings, with `seeds`, `out` and `resume`.
        data: what it is run on, with `name`, `train`, `valid` and a `str`.
        arms: a list of pairs `(name, seed)`; `finished` may append to it.
        train_arm: `f(name, seed, label, checkpoint)` runs one: `(rows per epoch, final row, curve)`. The curves of the
            first seed are kept, anything that JSON takes. `checkpoint` is a folder for an arm of minutes to go on from
            after an interruption; one of seconds may leave it alone and begin anew from its seed.
        header: the lines above the first arm.
        judge: `f(rows, data's name, size of the training set)` says whether the rows are the published ones:
            `(True, False or None (not tested), a sentence)`.
        table: `f(summary)` makes the header and the lines of a table out of what `summary.json` holds.
        draw: `f(rows, curves, path)` draws the picture.
        published: the published figures, for the record.
        finished: `f(name, seed, final row, curve)` is called after each arm, before the next; also of those that an
            earlier part of the run has finished, which are read and not run again.

    After Ctrl-C the finished arms are written and drawn, and KeyboardInterrupt goes on.
    """
    folder = RunFolder(config.out, experiment, config, {"data": str(data), "published": published},
                       resume=config.resume)
    picture = folder.path / f"{experiment.replace('-', '_')}.png"
    print(header, flush=True)
    rows: list[Row] = []
    metrics: list[Row] = []
    curves: dict[str, Curve] = {}
    trained, start, said, interrupted = 0, time.perf_counter(), -1.0, False

    def summary() -> Summary:
        complete = len(rows) == len(arms)
        reproduced, verdict = judge(rows, data.name, len(data.train)) if complete else (
            None, f"Not complete: {len(rows)} of {len(arms)} arms have finished.")
        return {"experiment": experiment, "data": data.name, "train_images": len(data.train),
                "valid_images": len(data.valid), "complete": complete, "reproduced": reproduced,
                "verdict": verdict, "published": published, "rows": rows}

    def record() -> None:
        folder.write_metrics(metrics)
        folder.write_json("summary.json", summary())
    try:
        for i, (name, seed) in enumerate(arms):
            kept = folder.kept_arm(i, name, seed)
            if kept is None:
                if folder.resumed and not trained:
                    print(f"resumed: {len(rows)} of {len(arms)} arms had finished", flush=True)
                kept = folder.keep_arm(i, name, seed, *train_arm(
                    name, seed, f"[{i + 1}/{len(arms)}] {name}, seed {seed}", folder.checkpoint(i, name, seed)))
                trained += 1
            row, curve = kept["row"], kept["curve"]
            metrics += kept["epochs"]
            rows.append(row)
            if seed == config.seeds[0]: curves[name] = curve
            if i == 0 and "backend" in row: print(f"  convolutions: {row['backend']['reason']}")
            if "error" in row: print(f"  {name} failed: {row['error']}")
            finished(name, seed, row, curve)
            if not trained: continue
            record()
            spent = time.perf_counter() - start
            left = spent / trained * (len(arms) - len(rows))
            if left and spent - said > 1:
                print(f"  {format_time(spent)} so far, about {format_time(left)} to go", flush=True)
                said = spent
    except KeyboardInterrupt: interrupted = True
    if folder.resumed and not trained: print(f"resumed: {len(rows)} of {len(arms)} arms had finished")
    if rows:
        record()
        folder.write_json("curves.json", curves)
        draw(rows, curves, picture)
        print("\n" + text_table(*table(summary())))
    if interrupted:
        kept_rows = f"; their rows are in {folder.path / 'summary.json'}" if rows else ""
        print(f"\nInterrupted: {len(rows)} of {len(arms)} arms had finished{kept_rows}. {folder.go_on}", flush=True)
        raise KeyboardInterrupt("reported")
    result = Result(rows, *judge(rows, data.name, len(data.train)), folder.path)
    print(f"\n{picture} and summary.json lie in the run folder.\n{result.verdict}", flush=True)
    return result


# --- figures in words ---------------------------------------------------------------------------------------------

def heading(data: Data, what: str, *lines: str) -> str:
    """The lines above the first arm: a notice if there is one, the data, the network `what`, and further lines."""
    notice = [f"{'*' * 79}\n{data.notice}\n{'*' * 79}"] if data.notice else []
    return "\n".join([*notice, f"data:    {data}", f"network: {what}", *lines])


def seeds_and_device(config: Settings) -> str:
    """These two settings, as the header has them."""
    return f"seeds {', '.join(map(str, config.seeds))}, device {config.device}"


def by_arm(rows: Sequence[Row], key: str = "arm") -> dict[str, list[Row]]:
    """`rows` grouped by their arm's name, in the order of its first: `{name: rows}`."""
    names = dict.fromkeys(r[key] for r in rows)
    return {name: [r for r in rows if r[key] == name] for name in names}


def finite(accuracy: float | None) -> float:
    """An accuracy, 0 where a run diverged to NaN."""
    return accuracy if accuracy is not None and math.isfinite(accuracy) else 0.0


def mean(accuracies: Sequence[float | None]) -> float:
    """Mean of accuracies; a run that diverged to NaN counts as 0 correct."""
    return sum(map(finite, accuracies)) / len(accuracies)


def course(rows: Sequence[Row]) -> list[float]:
    """The validation accuracy after each epoch, the mean over one arm's `rows`, one per seed."""
    # not strict: a run that a norm refused has no epochs, and then there is no mean
    return [mean(accs) for accs in zip(*(r["valid_accuracies"] for r in rows), strict=False)]


def measured(rows: Sequence[Row]) -> list[str]:
    """The cells of one arm's `rows`, one per seed, under the headings `MEASURED`."""
    accs = [a for r in rows if (a := r["valid_accuracy"]) is not None and math.isfinite(a)]
    losses = [math.nan if r["valid_loss"] is None else r["valid_loss"] for r in rows]
    return [f"{sum(accs) / len(accs):.4f}" if accs else "-",
            f"{min(accs):.4f} to {max(accs):.4f}" if len(accs) > 1 else "-",
            f"{sum(losses) / len(losses):.4g}", str(len(rows)), f"{sum(r['seconds'] for r in rows) / len(rows):.0f}",
            statuses(rows)]


def statuses(rows: Sequence[Row]) -> str:
    """'ok', or '2 ok, 1 diverged' where they differ."""
    status = Counter(r["status"] for r in rows)
    return ", ".join(f"{n} {s}" if len(status) > 1 else s for s, n in status.items())


def plural(n: int, noun: str) -> str:
    """'1 epoch', '3 epochs'."""
    return f"{n} {noun}{'s' * (n != 1)}"
