"""Forward passes that a backward pass does again: activation checkpointing.

A repeated forward must change no state and must give what the first one gave, whose running statistics are gone by
then. So a forward that may be repeated leaves a copy of the statistics that it starts from, and its repetition
starts from that copy and writes to another. Which copy is no guess: both forwards run within the same segment, and
torch has an object for it, which here holds the copies (so they live as long as the graph does), in the order of the
norm's forwards within the segment:

- `checkpoint(..., use_reentrant=False)`: a `_CheckpointFrame`. While the first forward runs, the hook that packs what
  autograd saves holds it; while it is repeated, the hook that unpacks has it and is on the stack.
- `checkpoint(..., use_reentrant=True)`, and any `torch.autograd.Function` that calls the norm in its `forward` and
  again in its `backward`: the `ctx` that both get, found on the stack.

Segments may be nested: a forward can be the repetition of one and the first of another.
"""

import sys
from collections.abc import Callable, Hashable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint

from norms.fast.kernels import Kernels
from norms.running_norm import RunningNorm

# Private names of torch. Without one of them repetitions can't be told apart, and `state` refuses them.
_Frame = getattr(checkpoint, "_CheckpointFrame", ())
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)       # -1 outside of a backward pass
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def in_backward() -> bool:
    """Whether a backward pass is under way."""
    return _graph_task() != -1


def repeating() -> bool:
    """Whether this training forward repeats one that was there before, and so may change no state.

    Within a backward pass every forward is taken for a repetition, also by means that torch has no object for.
    """
    if torch.compiler.is_compiling() or _usual(): return False
    return in_backward() or _segments()[1] is not None


def state(norm: RunningNorm) -> dict[str, Tensor]:
    """The buffers that this forward of `norm` reads and in training writes, by name; in a repetition, what they were.

    An evaluation may be repeated after they have changed, too.

    Raises:
        RuntimeError: a training forward within a backward pass that repeats none of the norm's.
    """
    if torch.compiler.is_compiling() or _usual(): return norm._buffers
    first, again, key = _segments()
    repeats = again is not None or in_backward()
    then = _recall(again, norm, key) if repeats else norm._buffers
    if then is None and not norm.training: return norm._buffers            # an evaluation like any other
    if then is None:
        raise RuntimeError(f"{type(norm).__name__} met a forward pass inside a backward pass that repeats none of its "
                           "training forwards; only a checkpointed forward may run there (torch.utils.checkpoint, or a "
                           "torch.autograd.Function that calls the norm in its forward and in its backward): call the "
                           "norm outside of the backward pass, or in evaluation mode")
    for segment in first: _firsts(segment).setdefault(norm, []).append(_copy(then))
    return _copy(then) if repeats else then


def same_way(norm: nn.Module, kernels: Kernels | None) -> Kernels | None:
    """The `kernels` to take this forward of `norm`, or None; in a repetition those of the first forward.

    The two must save the same tensors, and the choice depends on the number of threads, which may have changed.
    """
    if _usual(): return kernels
    first, again, key = _segments()
    then = None if again is None else _recall(again, (norm, "way"), key)
    if then is not None: (kernels,) = then
    for segment in first: _firsts(segment).setdefault((norm, "way"), []).append((kernels,))
    return kernels


def first_result(norm: nn.Module, what: str, make: Callable[[tuple[Tensor, ...] | None], tuple[Tensor, ...]]
                 ) -> tuple[Tensor, ...]:
    """`make(None)`, or in a repetition `make(then)` with what the forward that is repeated got under the name `what`.

    So a repetition need not ask other processes again, which may have nothing to repeat.
    """
    if torch.compiler.is_compiling() or _usual(): return make(None)
    first, again, key = _segments()
    value = make(None if again is None else _recall(again, (norm, what), key))
    for segment in first: _firsts(segment).setdefault((norm, what), []).append(tuple(t.detach() for t in value))
    return value


def _usual() -> bool:
    """Whether this is no forward that can be, or ever be, repeated: most are of this kind, and this is quick."""
    return not in_backward() and torch.is_grad_enabled() and _top_hooks(True) is None


def _copy(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in buffers.items()}


def _firsts(segment: Any) -> dict[Hashable, list[Any]]:
    """What the first forwards in this segment left, in their order: `{norm: [its buffers before, by name]}`."""
    if not hasattr(segment, "_norms_first"): segment._norms_first, segment._norms_repeated = {}, {}
    found: dict[Hashable, list[Any]] = segment._norms_first
    return found


def _recall(segment: Any, norm: Hashable, key: Hashable) -> Any:
    """What the forward of `norm` in `segment` left that is now done again, or None.

    `key` is that of the repetition: a second backward pass does the segment again from its beginning.
    """
    found = [] if segment is None else getattr(segment, "_norms_first", {}).get(norm, [])
    if not found: return None
    counts, key = segment._norms_repeated, (key, norm)
    counts[key] = k = counts.get(key, -1) + 1
    return found[k] if k < len(found) else None


def _segments() -> tuple[list[Any], Any, Hashable]:
    """The segments that this forward is in for the first time; the innermost that is being done again, and its key."""
    first = _from_hooks()
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "unpack_hook":
            owner = frame.f_locals.get("frame")
            if _Frame and isinstance(owner, _Frame): return first, owner, frame.f_locals.get("gid")
        elif code.co_name in ("forward", "backward") and code.co_varnames:
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, FunctionCtx):
                if code.co_name == "backward": return first, owner, _graph_task()
                first.append(owner)
        frame = frame.f_back
    return first, None, None


def _from_hooks() -> list[Any]:
    """The `_CheckpointFrame`s whose first forward this is, within the innermost that is being done again.

    The hooks are a stack of which only the top is in sight: they are taken off one by one, and put back.
    """
    found, taken = [], []
    while (pair := _top_hooks(True)) is not None:
        code = getattr(pair[0], "__code__", None)
        held = {} if code is None else dict(zip(code.co_freevars, pair[0].__closure__ or (), strict=True))
        if "target_frame_ref" in held: break                                # that one is being done again
        owner = held["frame"].cell_contents if "frame" in held else None
        if _Frame and isinstance(owner, _Frame): found.append(owner)
        taken.append(pair)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(taken): torch._C._autograd._push_saved_tensors_default_hooks(*pair)
    return found
