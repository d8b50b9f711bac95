"""Where a loader stands within a pass, and how it goes on from there without fetching what came before."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from runner.states import generators_of, random_state, set_random_state
from runner.values import can_be_encoded, decoded, encoded

MANY = 1000     # of what may be something else than indices

MEND = ("give the loader the two methods state_dict and load_state_dict (get_dls' loaders and torchdata's "
        "StatefulDataLoader have them), or write at the ends of epochs only: every_batches=None, every_seconds=None")


class LoaderError(ValueError):
    """A loader can't go on in the middle of a pass; the text says why, and the mend."""


def has_position(dl: object) -> bool:
    """Whether the loader says itself where it is, and can be put there: `state_dict` and `load_state_dict`."""
    return all(callable(getattr(dl, name, None)) for name in ("state_dict", "load_state_dict"))


def position_of(dl: Any, in_pass: bool) -> dict[str, Any] | None:
    """The state of a loader that says where it is; None for others.

    Between two passes of a torch `DataLoader`, and of classes made of it, there is none: what it keeps from one to the
    next its samplers and generators keep.
    """
    if not has_position(dl) or (isinstance(dl, DataLoader) and not in_pass): return None
    state: dict[str, Any] = dl.state_dict()
    return state


def is_torchs(dl: object) -> bool:
    """Whether `dl` iterates as torch's `DataLoader` of a data set with indices does."""
    return (isinstance(dl, DataLoader) and type(dl).__iter__ in (DataLoader.__iter__, PositionLoader.__iter__)
            and not isinstance(dl.dataset, IterableDataset))


def why_not(dl: Any) -> str | None:
    """Why the loader can't go on in the middle of a pass; None if it can."""
    if has_position(dl) or is_torchs(dl) or isinstance(dl, Sequence): return None
    if isinstance(dl, DataLoader) and isinstance(dl.dataset, IterableDataset):
        return f"the training loader has an IterableDataset ({type(dl.dataset).__name__}), whose items can't be skipped"
    return (f"the training loader, a {type(dl).__name__}, is no torch DataLoader and doesn't say where it is, so what "
            "it has given before would have to be fetched again")


def draws_in_workers(dl: Any, states: Callable[[], Any]) -> bool:
    """Whether the data set of a loader with workers draws random numbers where it fetches an item.

    It fetches one item here. `states` gives the states of all random sources.
    """
    if not is_torchs(dl) or not dl.num_workers: return False
    before = states()
    try:
        index: Any = next(iter(range(len(dl.dataset))), None)
        if index is None: return False
        if dl.batch_sampler is not None: dl.collate_fn([dl.dataset[index]])
        else: dl.collate_fn(dl.dataset[[index]])
    except Exception: return False          # its keys are no numbers from 0, or it works in a worker only
    return not same_states(before, states())


def same_states(a: Any, b: Any) -> bool:
    """Whether two nests of random states are equal."""
    if torch.is_tensor(a): return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(
        same_states(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)): return isinstance(b, (list, tuple)) and len(a) == len(b) and all(
        map(same_states, a, b))
    return bool(a == b)


def rest_of(dl: Any, n: int, rewound: Callable[[], None], seeded: bool) -> Iterator[Any]:
    """What is left of a pass over `dl` after its first `n` batches, which nobody fetches.

    `seeded`: whether the pass drew a seed for workers, as each does but those by persistent workers after their first.
    `rewound` puts all random sources back to the beginning of the pass. Then the loader draws its order anew. The
    caller puts the sources to where they were after `n` batches before the first of the rest is asked for.

    Raises:
        LoaderError: a loader that can't, or whose sampler draws, between batches, from a source that others share.
    """
    if isinstance(dl, Sequence): return islice(iter(dl), n, None) if type(dl) is not list else iter(dl[n:])
    if reason := why_not(dl): raise LoaderError(f"{reason}; {MEND}")
    rewound()
    whole = dl.batch_sampler is not None
    skipped = Skipped(dl.batch_sampler if whole else dl.sampler, n)
    more = {"in_order": dl.in_order} if hasattr(dl, "in_order") else {}
    if dl.num_workers: more["prefetch_factor"] = dl.prefetch_factor
    which = {"batch_sampler": skipped} if whole else {"batch_size": None, "sampler": skipped}
    rest: DataLoader[Any] = DataLoader(
        dl.dataset, **which, num_workers=dl.num_workers, collate_fn=dl.collate_fn, pin_memory=dl.pin_memory,
        timeout=dl.timeout, worker_init_fn=dl.worker_init_fn, multiprocessing_context=dl.multiprocessing_context,
        generator=dl.generator if seeded else torch.Generator(), **more)
    # Torch's iterator asks the sampler for an iterator, then draws a seed for workers, then the first indices: with
    # workers at once, and without when the first batch is fetched, by which time the random sources are elsewhere.
    batches = iter(rest)
    if skipped.last is not None: skipped.last.skip()
    return batches


class Skipped:
    """A sampler without its first `n` indices, or batches of them."""

    def __init__(self, sampler: Iterable[Any], n: int) -> None:
        self.sampler, self.n = sampler, n
        self.last: SkippedIterator | None = None

    def __len__(self) -> int: return max(0, len(self.sampler) - self.n)     # type: ignore[arg-type]

    def __iter__(self) -> "SkippedIterator":
        self.last = SkippedIterator(iter(self.sampler), self.n, type([self.sampler, *samplers(self)][-1]).__name__)
        return self.last


class SkippedIterator:
    """Draws the first `n` of `indices` when it is told so, or asked for the first of the rest."""

    def __init__(self, indices: Iterator[Any], n: int, name: str) -> None:
        self.indices, self.left, self.name = indices, n, name

    def __iter__(self) -> Iterator[Any]: return self

    def __next__(self) -> Any:
        if self.left: self.skip()
        return next(self.indices)

    def skip(self) -> None:
        """Draw the first `n`.

        Raises:
            LoaderError: the numbers drawn after the first come from a source that others draw from in between.
        """
        n, self.left = self.left, 0
        k = sum(1 for _ in islice(self.indices, min(n, 1)))
        before = random_state()
        k += sum(1 for _ in islice(self.indices, n - k))
        if k < n:
            raise LoaderError(f"the checkpoint was written after {n} training batches of an epoch, and the sampler, a "
                              f"{self.name}, has {k}; give the loader as it was")
        if not same_states(before, random_state()):
            raise LoaderError(f"the sampler, a {self.name}, draws random numbers between batches, from torch's, "
                              "Python's or numpy's own source, which others draw from too, so its order can't be drawn "
                              "anew alone; give it a generator of its own (torch.Generator, random.Random), or go on "
                              "from the end of an epoch")


# --- what samplers and data sets keep -------------------------------------------------------------------------------

def samplers(dl: Any) -> list[Any]:
    """The samplers of a loader, however nested, from the outside in."""
    found: list[Any] = []
    todo = [dl]
    while todo:
        owner = todo.pop(0)
        for name in ("batch_sampler", "sampler"):
            sampler = getattr(owner, name, None)
            if sampler is None or any(sampler is other for other in found) or isinstance(sampler, Sequence): continue
            if not getattr(sampler, "transparent", False): found.append(sampler)       # `runner.sharing`'s
            todo.append(sampler)
    return found


def data_sets(dl: Any) -> list[Any]:
    """The data set of a loader, and those within, as a `Subset`'s."""
    found: list[Any] = []
    ds = getattr(dl, "dataset", None)
    while hasattr(ds, "__dict__") and not any(ds is other for other in found):
        found.append(ds)
        ds = getattr(ds, "dataset", None)
    return found


def feeding_state(dl: Any) -> list[dict[str, Any]]:
    """What samplers keep from pass to pass (numbers, strings, an order), and the numbers and strings of data sets."""
    found: list[dict[str, Any]] = []
    for objects, order in ((samplers(dl), True), (data_sets(dl), False)):
        found += [{k: encoded(v, k) for k, v in getattr(o, "__dict__", {}).items()
                   if isinstance(v, (bool, int, float, str)) or (order and _is_order(v))} for o in objects]
    return found


def _is_order(v: object) -> bool:
    """Whether `v` may be the order in which a sampler gives its indices."""
    if isinstance(v, torch.Tensor): return v.ndim == 1 and not v.is_floating_point()
    if isinstance(v, list): return set(map(type, v)) <= {int} or (0 < len(v) <= MANY and can_be_encoded(v))
    return type(v).__module__ == "numpy" and getattr(v, "ndim", 0) == 1 and can_be_encoded(v)


def put_feeding(dl: Any, state: Sequence[dict[str, Any]]) -> None:
    """Put back what `feeding_state` gave."""
    for o, had in zip([*samplers(dl), *data_sets(dl)], state, strict=False):
        for k, v in had.items():
            if isinstance(now := vars(o).get(k), list): now[:] = v
            else: vars(o)[k] = decoded(v)


# --- loaders that know their position -------------------------------------------------------------------------------

class PositionLoader(DataLoader[Any]):
    """A torch `DataLoader` that says where it is within a pass and goes on from there: `get_dls`' loaders.

        state = dl.state_dict()             # after 20 of 100 batches
        dl.load_state_dict(state)           # this one, or one built alike, in another process
        for batch in dl: ...                # the other 80

    Of the first 20 the sampler's indices are drawn again, from the random state in which the pass began, and nothing is
    fetched. `state_dict` holds tensors and plain values.
    """

    _given = 0
    _began: dict[str, Any] | None = None
    _state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many batches the pass has given, and the random states at its beginning; `batch` is 0 between passes."""
        running = self._began if self._given else None
        return {"batch": self._given if running else 0, "length": len(self), **(running or {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on from there.

        Raises:
            LoaderError: the state of a loader of another length.
        """
        if state["length"] != len(self):
            raise LoaderError(f"the state is of a loader with {state['length']} batches and this one has {len(self)}; "
                              "load it into one with the same data set, batch size and drop_last")
        self._state = dict(state) if state["batch"] else None

    def __iter__(self) -> Iterator[Any]:        # type: ignore[override]
        state, self._state = self._state, None
        generators = generators_of(self)
        if state is None:
            self._given = 0
            self._began = {"random": random_state(generators), "seeded": self._iterator is None}
            return Counted(self, self.batches())
        self._given, self._began = state["batch"], {k: state[k] for k in ("random", "seeded")}
        before = random_state()
        # The loader's own generators are where they belong once the indices are drawn; others' are not its business.
        try: rest = self.rest(state["batch"], lambda: set_random_state(state["random"], generators), state["seeded"])
        finally: set_random_state(before)
        return Counted(self, rest)

    def batches(self) -> Iterator[Any]:
        """A whole pass."""
        return super().__iter__()

    def rest(self, n: int, rewound: Callable[[], None], seeded: bool) -> Iterator[Any]:
        """What `rest_of` says."""
        return rest_of(self, n, rewound, seeded)



class Counted:
    """The iterator of a pass over a `PositionLoader`, which learns what it has given."""

    __slots__ = ("batches", "dl")

    def __init__(self, dl: PositionLoader, batches: Iterator[Any]) -> None: self.dl, self.batches = dl, batches

    def __iter__(self) -> Iterator[Any]: return self

    def __next__(self) -> Any:
        try: batch = next(self.batches)
        except BaseException:
            self.dl._given, self.dl._began = 0, None
            raise
        self.dl._given += 1
        return batch
