"""A training loop on one screen (`runner.core`) and the callbacks that make it useful.

`runner.insight` looks inside of what it trains. Importing this package imports torch and neither matplotlib nor
fastprogress: `runner.plots` and a live `ProgressCallback` load them when they draw.
"""

from types import ModuleType
from typing import TYPE_CHECKING

from runner.accumulation import GradientAccumulation
from runner.averaged import AveragedWeights
from runner.backend import CPUBackendCallback
from runner.base import Learner
from runner.callbacks import BatchTransformXCallback, CudaCallback, view_tfm
from runner.checkpoint import Checkpoint
from runner.checkpoint_files import CheckpointError
from runner.clipping import GradientClip
from runner.compiled import CompileError
from runner.core import Runner, TrainEvalCallback
from runner.data import DataBunch, Dataset, get_dls
from runner.distributed import Distributed, shard_loader
from runner.events import (
    EVENTS,
    STEPS,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelTrainException,
    camel2snake,
    listify,
)
from runner.insight.gap import train_eval_gap
from runner.insight.hooks import Hook, Hooks, append_stats
from runner.insight.nonfinite import TerminateOnNonFinite
from runner.insight.norm_stats import NormStats
from runner.insight.preflight import preflight
from runner.insight.probe import Probe
from runner.insight.replay import replay
from runner.insight.stats import ActivationStats, GradientStats, ParameterStats
from runner.loggers import CSVLogger, TensorBoardLogger
from runner.lr_find import LR_Find, LRFindResult
from runner.metrics import AvgStats, AvgStatsCallback, accuracy
from runner.monitors import EarlyStopping, KeepBest
from runner.optim import SGD
from runner.optimizers import ClosureStep, Optimizers, Turns
from runner.precision import MixedPrecision
from runner.processes import DistributedError
from runner.profile import Profile
from runner.progress import ProgressCallback
from runner.recorder import Recorder
from runner.rows import Rows
from runner.schedules import (
    ParamScheduler,
    annealer,
    combine_scheds,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)
from runner.torch_scheduler import TorchScheduler

if TYPE_CHECKING:
    from runner.insight import plots as plots

__all__ = [
    "EVENTS",
    "SGD",
    "STEPS",
    "ActivationStats",
    "AveragedWeights",
    "AvgStats",
    "AvgStatsCallback",
    "BatchTransformXCallback",
    "CPUBackendCallback",
    "CSVLogger",
    "Callback",
    "CancelBatchException",
    "CancelEpochException",
    "CancelException",
    "CancelTrainException",
    "Checkpoint",
    "CheckpointError",
    "ClosureStep",
    "CompileError",
    "CudaCallback",
    "DataBunch",
    "Dataset",
    "Distributed",
    "DistributedError",
    "EarlyStopping",
    "GradientAccumulation",
    "GradientClip",
    "GradientStats",
    "Hook",
    "Hooks",
    "KeepBest",
    "LRFindResult",
    "LR_Find",
    "Learner",
    "MixedPrecision",
    "NormStats",
    "Optimizers",
    "ParamScheduler",
    "ParameterStats",
    "Probe",
    "Profile",
    "ProgressCallback",
    "Recorder",
    "Rows",
    "Runner",
    "TensorBoardLogger",
    "TerminateOnNonFinite",
    "TorchScheduler",
    "TrainEvalCallback",
    "Turns",
    "accuracy",
    "annealer",
    "append_stats",
    "camel2snake",
    "combine_scheds",
    "get_dls",
    "listify",
    "preflight",
    "replay",
    "sched_cos",
    "sched_exp",
    "sched_lin",
    "sched_no",
    "shard_loader",
    "train_eval_gap",
    "view_tfm",
]


def __getattr__(name: str) -> ModuleType:
    """`runner.plots`, which imports matplotlib, when somebody asks for it."""
    if name != "plots": raise AttributeError(f"module 'runner' has no attribute {name!r}")
    import runner.insight.plots
    return runner.insight.plots
