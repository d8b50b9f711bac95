"""An arm of an experiment as a trial of a study: what it is given, and its row there and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.results import Row, Trained
from experiments.run_folder import checkpoint_folder
from experiments.settings import Settings

# `f(config, arm, seed, checkpoint)` trains an arm, `f(config, arms, seeds, checkpoint)` several as one, a pair each.
# `checkpoint` is a folder to go on from after an interruption; an arm of seconds may leave it alone.
TrainArm = Callable[[Any, str, int, Path], Trained[Any]]
TrainArms = Callable[[Any, Sequence[str], Sequence[int], Path], Sequence[Trained[Any]]]


@dataclass(frozen=True)
class ArmTrial:
    """What the study of an experiment runs: one arm from one seed, or what is trained as one, in any process.

    The row has `outcome` and `trained_seconds`, for a study has `status` and `seconds` of its own, and `refusal` where
    a norm refused its input; `per_epoch` and `curve` are lists.
    """

    config: Settings
    checkpoints: Path
    one: TrainArm
    several: TrainArms | None

    def __call__(self, **point: Any) -> Row | list[Row]:
        seeds = point.pop("seed")
        arms, = point.values()
        if not isinstance(seeds, list):
            return as_trial(self.one(self.config, arms, seeds, checkpoint_folder(self.checkpoints, arms, [seeds])))
        assert self.several is not None
        names = arms if isinstance(arms, list) else [arms] * len(seeds)
        folder = checkpoint_folder(self.checkpoints, "+".join(dict.fromkeys(names)), seeds)
        return [*map(as_trial, self.several(self.config, names, seeds, folder))]


def as_trial(trained: Trained[Any]) -> Row:
    """The row of a study for what training an arm gave."""
    epochs, row, curve = trained
    renamed = {"status": "outcome", "seconds": "trained_seconds", "error": "refusal"}
    return {**{renamed.get(k, k): v for k, v in row.items()}, "per_epoch": epochs, "curve": curve}


def from_trial(trial: Mapping[str, Any]) -> Trained[Any]:
    """What `as_trial` had, of a row of the study."""
    own = ("status", "seconds", "attempts", "error", "traceback", "key", "per_epoch", "curve")
    renamed = {"outcome": "status", "trained_seconds": "seconds", "refusal": "error"}
    return trial["per_epoch"], {renamed.get(k, k): v for k, v in trial.items() if k not in own}, trial["curve"]
