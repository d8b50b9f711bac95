"""When a norm may go another way than its definition, and these ways. The definitions stand one folder up.

A norm's forward asks `step` once. It takes the project's kernels (`kernels.c`) where nothing but plain tensors on a CPU
can notice, and else answers None: then the definition runs. `register` says which function takes a norm of exactly this
class there; a subclass, which may have rules of its own, runs by the definition.

Whatever of torch is private stands in this folder, with its reason; where a version of torch lacks such a name, the
definition runs.
"""

from norms.fast.channels import batch_norm, running_batch_norm
from norms.fast.compiled import owned, write
from norms.fast.dispatch import register, step
from norms.fast.images import group_norm
from norms.fast.once import once
from norms.fast.pairs import batch_pair, running_pair
from norms.fast.repeats import first_result, repeating, state
from norms.fast.weights import standardized

__all__ = ["batch_norm", "batch_pair", "first_result", "group_norm", "once", "owned", "register", "repeating",
           "running_batch_norm", "running_pair", "standardized", "state", "step", "write"]
