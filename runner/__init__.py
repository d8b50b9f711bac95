"""A training loop on one screen (`runner.core`) and the callbacks that make it useful.

Importing this package imports torch and neither matplotlib nor fastprogress: `runner.plots` and a live
`ProgressCallback` load them when they draw.
"""

from runner.backend import CPUBackendCallback
from runner.callbacks import BatchTransformXCallback, CudaCallback, view_tfm
from runner.core import (
    EVENTS,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelTrainException,
    Learner,
    Runner,
    TrainEvalCallback,
    camel2snake,
    listify,
)
from runner.data import DataBunch, Dataset, get_dls
from runner.hooks import Hook, Hooks, append_stats
from runner.metrics import AvgStats, AvgStatsCallback, Recorder, accuracy
from runner.nonfinite import TerminateOnNonFinite, replay
from runner.norm_gap import train_eval_gap
from runner.norm_preflight import preflight
from runner.norm_stats import NormStats
from runner.optim import SGD
from runner.progress import ProgressCallback
from runner.rows import Rows
from runner.schedules import (
    LR_Find,
    ParamScheduler,
    annealer,
    combine_scheds,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
)
from runner.stats import ActivationStats, GradientStats, ParameterStats, Probe

__all__ = [
    "EVENTS", "SGD", "ActivationStats", "AvgStats", "AvgStatsCallback", "BatchTransformXCallback", "CPUBackendCallback",
    "Callback", "CancelBatchException", "CancelEpochException", "CancelException", "CancelTrainException",
    "CudaCallback", "DataBunch", "Dataset", "GradientStats", "Hook", "Hooks", "LR_Find", "Learner", "NormStats",
    "ParamScheduler", "ParameterStats", "Probe", "ProgressCallback", "Recorder", "Rows", "Runner",
    "TerminateOnNonFinite", "TrainEvalCallback", "accuracy", "annealer", "append_stats", "camel2snake",
    "combine_scheds", "get_dls", "listify", "preflight", "replay", "sched_cos", "sched_exp", "sched_lin", "sched_no",
    "train_eval_gap", "view_tfm",
]
