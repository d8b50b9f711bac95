"""A copy of a buffer that a compiled backward pass keeps.

torch's compiler cuts a training step into a forward and a backward graph, and may let the backward compute again what
the forward has computed, a copy too, from the tensors that the forward was given. Of a buffer that the forward has
written to since, these are other values, and nothing says so. So the copy carries the mark by which selective
activation checkpointing tells the compiler what to keep.
"""

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

_library = torch.library.Library("runnernorms", "DEF")
_library.define("owned(Tensor buffer) -> Tensor")


def _owned(buffer):
    """Runs while the compiler makes its graph, and leaves nothing there but a marked copy.

    The copy is a maximum, for the compiler may take a `clone` for nothing and hand the buffer on.
    """
    mode = get_proxy_mode()
    before = len(mode.tracer.graph.nodes) if mode else 0
    copy = torch.maximum(buffer, buffer)
    # After the operation: checkpointing within what is compiled marks every operation of its own accord.
    for node in list(mode.tracer.graph.nodes)[before:] if mode else ():
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return copy


_library.impl("owned", _owned, "CompositeImplicitAutograd")


def owned(buffer):
    """A copy of `buffer` for the graph of this step: what writes to the buffer later changes no gradient."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting(): return torch.ops.runnernorms.owned(buffer)
    return buffer.clone()
