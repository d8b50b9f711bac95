"""What a diverged fit leaves: copies of its tensors, the order of its batches, the line that says where it began."""

import numbers
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from runner.batches import leaves, opened, pair
from runner.data import BatchLoader
from runner.insight.repeat import named, place
from runner.states import generators_of, random_state, set_random_state


def copies(tensors: list[Tensor], before: list[Tensor], into: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`tensors` and copies of them: written `into` those of the tensors `before`, if they fit, or into new memory."""
    if len(tensors) == len(before) and all(a is b or (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
                                           for a, b in zip(tensors, before, strict=True)):
        if into: torch._foreach_copy_(into, tensors)
        return tensors, into
    return tensors, [t.detach().clone() for t in tensors]


def plain(o: Any, memo: dict[int, tuple[Any, Any]]) -> Any:
    """`o` with its tensors on the host and its numbers Python's own; what it has twice stays one thing."""
    if id(o) in memo: return memo[id(o)][0]
    new: Any
    if torch.is_tensor(o):
        new = o.detach().cpu()
        if new.untyped_storage().nbytes() > new.nbytes: new = new.clone()   # a batch, not all of its data set
    elif type(o) is dict: new = {k: plain(v, memo) for k, v in o.items()}
    elif type(o) in (list, tuple): new = type(o)(plain(v, memo) for v in o)
    elif o is None or isinstance(o, bool): new = o
    elif isinstance(o, str): new = str(o)
    elif isinstance(o, numbers.Integral): new = int(o)
    elif isinstance(o, numbers.Real): new = float(o)
    elif parts := opened(o): new = parts[1]([plain(v, memo) for v in parts[0]])
    else: new = o
    memo[id(o)] = new, o        # `o` itself, or its id could be another's soon
    return new


def draw_indices(this: dict[str, Any], data: Any, rows: Sequence[dict[str, Any]],
                 snapshots: Iterable[dict[str, Any]]) -> tuple[list[Any] | None, str]:
    """The indices of the batches of a pass, drawn anew up to the last of `rows`, or None; and a word on them.

    `this` is what the callback kept at the start of the pass. The loader draws a seed for its workers, then the sampler
    its order. The targets of the batches kept are compared with those that the data set has for the indices.
    """
    dl = this["dl"]
    sampler = getattr(dl, "sampler", None) if getattr(dl, "batch_sampler", None) is None else dl.batch_sampler
    if sampler is None: return None, f"none: the loader, a {type(dl).__name__}, has no sampler to draw them from"
    if isinstance(getattr(dl, "dataset", None), IterableDataset): return None, "none: an IterableDataset has none"
    generators = generators_of(data.train_dl, data.valid_dl)
    now = random_state(generators)
    try:
        set_random_state(this["random"], generators)
        if this["seeded"]: torch.empty((), dtype=torch.int64).random_(generator=dl.generator)
        indices = list(islice(sampler, rows[-1]["batch"] + 1))
        kept = [step for snap in snapshots for step in snap["steps"] if any(step["row"] is row for row in rows)]
        for step in kept:
            batch = indices[step["row"]["batch"]]
            if isinstance(dl, BatchLoader): again = dl.fetch(batch)
            elif dl.batch_sampler is None: again = dl.collate_fn(dl.dataset[batch])
            else: again = dl.collate_fn([dl.dataset[i] for i in batch])
            xb, yb = pair(again)
            parts = list(leaves(again if xb is again else yb))      # of a batch that is no pair some are the targets
            if not all(any(same_values(part, t) for part in parts) for t in leaves(step["yb"])):
                return indices, ("drawn anew and not confirmed: the data set has other targets for them; a callback "
                                 "changes yb, or the loader's order doesn't follow from its generators")
    except Exception as e: return None, f"none: to draw them anew failed with {type(e).__name__}"
    finally: set_random_state(now, generators)
    return indices, "drawn anew; the targets of the batches kept agree"


def same_values(a: object, b: object) -> bool:
    return torch.equal(a, b.cpu()) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def report(record: dict[str, Any], words: Iterable[str]) -> str:
    """One line: what happened when, and where it began."""
    found, row = record["finding"], record["rows"][-1]
    at = found or row
    if found:
        text = (f"first non-finite value in {found['what']} ({found['phase']}, "
                f"{'training' if found['in_train'] else 'validation'}), {found['nan']} NaN and {found['inf']} infinite "
                f"of {found['of']}")
    else: text = f"the loss is {row['loss']} and the norm of the gradients {row['grad_norm']}; no module was found"
    if place(at) != place(row): text += f"; seen at {named(row)}"
    before = next((a for a, b in pairwise(record["rows"]) if place(b) == place(at)), {"loss": None})
    if before["loss"] is not None and before["in_train"] == at["in_train"]:
        text += f"; the loss was {before['loss']:.3g} one {'step' if at['in_train'] else 'batch'} before"
    return "; ".join([f"diverged at {named(at)}: {text}", *words])
