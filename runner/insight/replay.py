"""`replay`: the step that failed, once more, on a learner built anew."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from runner.backend import use_backend
from runner.base import Learner
from runner.insight.record import report
from runner.insight.repeat import Repeat
from runner.states import random_states


@dataclass
class Replay:
    """What `replay` saw: the finding, the loss of its step, whether all was as recorded, and the report."""

    finding: dict[str, Any] | None
    loss: float
    same: bool
    report: str


def replay(record: str | os.PathLike[str] | dict[str, Any], learn: Learner) -> Replay:
    """Put the recorded states into `learn` and repeat the steps up to the failing one: a `Replay`.

        from runner import replay

        learn = Learner(model, opt, loss_func, data)                # built as for the fit, in this process or another
        again = replay("diverged.pt", learn)
        assert again.same, again.report

    The batches are those of the record, as the model got them; so neither `learn.data` nor callbacks are needed, and
    random transforms repeat. Dropout repeats by the recorded random state. The convolution backend and the number of
    threads are the recorded ones meanwhile. Afterwards model, loss and optimizer of `learn` are what they were in the
    step that the finding names, before the optimizer took it (unless that was at fault), with its gradients if it came
    to them; random state and settings are those from before.

    Args:
        record: a `TerminateOnNonFinite`'s record, or the path of its file.
        learn: a `Learner` with the same model, loss and kind of optimizer.

    Raises:
        TypeError: no record.
        ValueError: a learner whose parameters, buffers or optimizer differ from the recorded in name or shape.
    """
    if isinstance(record, (str, os.PathLike)): record = torch.load(record, map_location="cpu", weights_only=True)
    if not isinstance(record, dict) or "snapshots" not in record:
        raise TypeError(f"replay got {type(record).__name__}; it needs the path of a record or the `record` of a "
                        "TerminateOnNonFinite, which is None unless the fit diverged")
    before, restore = (bool(torch.backends.mkldnn.enabled), torch.get_num_threads()), random_states()
    try:
        use_backend(**record["settings"])
        repeat = Repeat(learn.model, learn.loss_func, learn.opt)
        finding, words = repeat.run(record)
    finally:
        use_backend(*before)
        restore()
    again, versions = {**record, "finding": finding}, (record["versions"]["torch"], str(torch.__version__))
    if finding != record["finding"]: words.append(f"recorded was: {record['report']}")
    if words and len(set(versions)) > 1: words.append("recorded with torch {}, repeated with {}".format(*versions))
    return Replay(finding, repeat.loss, not words, report(again, words))
