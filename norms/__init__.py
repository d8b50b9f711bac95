"""Normalization layers written out by hand: the statistics, the formula and the affine map are all in sight.

Every norm takes `(N, C)` or `(N, C, *spatial)` input, computes its statistics in float32 or wider and returns
the input's dtype. They differ in the axes that share a mean and a variance:

| norm               | one mean and variance per          | state kept for evaluation                         |
| ------------------ | ---------------------------------- | ------------------------------------------------- |
| `BatchNorm`        | channel, over images and positions | running mean and variance                         |
| `LayerNorm`        | image, over channels and positions | none                                              |
| `InstanceNorm`     | image and channel, over positions  | none                                              |
| `GroupNorm`        | image and group of channels        | none                                              |
| `RunningBatchNorm` | channel, over the recent batches   | the same running mean and variance it trains with |
| `SteadyBatchNorm`  | the same, then image               | averages of the running mean and variance         |
"""

from norms.batch import BatchNorm
from norms.convert import convert_norms
from norms.group import GroupNorm
from norms.instance import InstanceNorm
from norms.layer import LayerNorm
from norms.recalibration import recalibrate
from norms.running import RunningBatchNorm
from norms.steady import SteadyBatchNorm
from norms.sync import sync_norms, unsync_norms

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RunningBatchNorm", "SteadyBatchNorm",
           "convert_norms", "recalibrate", "sync_norms", "unsync_norms"]

__version__ = "0.1.0"   # of the whole project; pyproject.toml and CITATION.cff go by it
