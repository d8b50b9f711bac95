"""What a compiled step reads of a buffer, and what it writes there.

*Reads.* torch's compiler cuts a training step into a forward and a backward graph, and may let the backward compute
again what the forward has computed, a copy too, from the tensors that the forward was given. Of a buffer that the
forward has written to since, these are other values, and nothing says so. So the copy carries the mark by which
selective activation checkpointing tells the compiler what to keep.

*Writes.* Checkpointing around a compiled function runs it a second time, within the backward pass, and a graph that was
made before can't know. So it asks while it runs, by an operation that answers with a tensor: `repeated`, whether this
is a repetition, in which `write` leaves the buffer as it is; or `once`, which refuses one, where a repetition would
have to start from statistics that are gone. The compiler makes one call of all equal ones in a graph (some 10 us).
"""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy

from norms.fast.repeats import in_backward

_library = torch.library.Library("runnernorms", "DEF")
_library.define("owned(Tensor buffer) -> Tensor")
for _name in ("repeated", "once"): _library.define(f"{_name}(Device device) -> Tensor")


def _owned(buffer: Tensor) -> Tensor:
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


def _repeated(device: torch.device) -> Tensor: return torch.full((), in_backward(), device=device)


def _once(device: torch.device) -> Tensor:
    if in_backward():
        raise RuntimeError("checkpointing repeats a compiled function in which a running norm trains: the norm would "
                           "have to start from running statistics that are gone. Put the checkpoint inside of what is "
                           "compiled, torch.compile(lambda x: checkpoint(model, x, use_reentrant=False)), or leave the "
                           "norm out of it")
    return torch.full((), False, device=device)


def _answer(device: torch.device) -> Tensor: return torch.empty((), dtype=torch.bool, device=device)


for _name, _f in (("repeated", _repeated), ("once", _once)):
    _library.impl(_name, _f, "BackendSelect")               # for operators that get no tensor
    torch.library.register_fake(f"runnernorms::{_name}", _answer, lib=_library)


def owned(buffer: Tensor) -> Tensor:
    """A copy of `buffer` for the graph of this step: what writes to the buffer later changes no gradient."""
    return torch.ops.runnernorms.owned(buffer) if _compiled() else buffer.clone()


def write(buffer: Tensor, value: Tensor, refuse: bool = False) -> None:
    """Set `buffer` to `value`, in place; in a compiled step that is repeated leave it, or with `refuse` raise."""
    if _compiled():
        asked = torch.ops.runnernorms.once if refuse else torch.ops.runnernorms.repeated
        value = torch.where(asked(buffer.device), buffer, value)
        buffer = buffer.detach()        # torch 2.11 forgets what is written to a float64 number of the module's itself
    buffer.copy_(value)


def _compiled() -> bool:
    """Whether this is traced for `torch.compile`, and not for an export, whose program knows torch's operators alone.

    A compiler of torch 2.11 takes `torch.compiler.is_exporting()` for True whatever it does; so its flag is read.
    """
    return torch.compiler.is_compiling() and not getattr(torch.compiler, "_is_exporting_flag", False)
