"""The part of each batch that is one process's own, of several that train together: `shard_loader`.

Where the order of the images is known beforehand, each process fetches no others.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from runner.batches import part_of, size_of
from runner.events import CANCELS, CancelException
from runner.loading import is_torchs
from runner.ranks import Ranks
from runner.states import generators_of, random_state, set_random_state

# Samplers that draw their order from one seed, or none: with equal random states all processes have the same.
KNOWN = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

Place = Callable[[], tuple[int, int]]       # a process's rank and how many there are


class ShareError(ValueError):
    """A loader that can't be shared among processes; the text says why, and the mend."""


def part(n: int, rank: int, size: int) -> slice:
    """Which of `n` images are those of process `rank` of `size`: n // size, and one more in the first n mod size."""
    each, more = divmod(n, size)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


class BatchShare:
    """A sampler of batches of indices that gives one process's part of each.

    Where that is none it gives the first index, so that there is something to fetch, or with `leaves_out` nothing;
    `sizes` tells of each batch of the pass how many are the process's own, and how many there are.
    """

    transparent = True      # to whoever looks for a loader's samplers
    complete = False        # whether each process needs an image of each batch

    def __init__(self, batches: Iterable[Any], place: Place, leaves_out: bool = False) -> None:
        self.batch_sampler, self.place, self.leaves_out = batches, place, leaves_out
        self.sizes: list[tuple[int, int]] = []

    def __len__(self) -> int: return len(self.batch_sampler)        # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Any]]:
        sizes = self.sizes = list[tuple[int, int]]()
        rank, size = self.place()
        for batch in self.batch_sampler:
            indices = list(batch)
            own = indices[part(len(indices), rank, size)]
            if self.leaves_out and not own: continue
            if self.complete and not self.leaves_out and len(indices) < size:
                raise ShareError(f"a batch of {len(indices)} has no image for some of {size} processes, and a callback "
                                 "puts something in the place of the loader's batches (around_pass), where that can't "
                                 "be told; take larger batches, or drop the last one (drop_last=True)")
            sizes.append((len(own), len(indices)))
            yield own or indices[:1]


class Share:
    """How the batches of a loader become one process's own.

    `known`: it can be told of each batch how many images it has over all processes, without asking them. `cuts`: whole
    batches come, and are cut here.
    """

    def __init__(self, place: Place, sampler: BatchShare | None = None, *, dl: "ShardedLoader | None" = None,
                 known: bool = True) -> None:
        self.place, self.sampler, self.dl, self.known = place, sampler, dl, known
        self.cuts = known and sampler is None and dl is None

    def take(self, k: int, batch: Any) -> tuple[Any, int, int]:
        """The process's part of the k-th batch of a pass, how many images it has, and how many there are in all."""
        if self.dl is not None and self.dl.sizes is not None: return batch, *self.dl.sizes
        if self.sampler is None:
            n = size_of(batch)
            own = part(n, *self.place())
            return part_of(batch, own.start, own.stop), own.stop - own.start, n
        own_size, n = self.sampler.sizes[k]
        return (batch if own_size else nothing_of(batch)), own_size, n

    def parts(self, batches: Iterable[Any], first: int) -> Iterator[tuple[Any, int, int]]:
        """`take` of each of `batches`, whose first is number `first` of the pass."""
        for k, batch in enumerate(batches, first): yield self.take(k, batch)

    def refuse_none(self) -> None:
        """Have a batch refused of which some process has no image, as a callback has taken the batches' place."""
        if self.sampler is not None: self.sampler.complete = True


def nothing_of(batch: Any) -> Any:
    """`batch` without any of its images."""
    return part_of(batch, 0, 0)


@contextmanager
def shared(dl: Any, ranks: Ranks, train: bool = True) -> Iterator[Share]:
    """For the length of a pass let the loader give one process's part of each batch.

    In training all processes have the same number of batches, some of which may be without images.

    Raises:
        ShareError: a loader of whose batches nobody knows whether all processes would get the same ones.
    """
    def place() -> tuple[int, int]: return ranks.rank, ranks.size
    if isinstance(dl, ShardedLoader):
        yield Share(place, dl=dl, known=dl.cut)
        return
    where = _sampler_of(dl, place())
    if where is None: yield Share(place)
    elif where == "": yield Share(place, known=False)
    else:
        sampler, had = BatchShare(vars(dl)[where], place, not train), {where: vars(dl)[where]}
        changed: dict[str, Any] = {where: sampler}
        if dl.num_workers and ranks.rank:
            had["worker_init_fn"] = dl.worker_init_fn
            changed["worker_init_fn"] = Reseeded(dl.worker_init_fn, ranks.rank)
        vars(dl).update(changed)            # torch's class refuses to have them set
        try: yield Share(place, sampler)
        finally: vars(dl).update(had)


class Reseeded:
    """A worker's beginning, with random numbers that are other ones in each process of training."""

    def __init__(self, init: Callable[[int], Any] | None, rank: int) -> None: self.init, self.rank = init, rank

    def __call__(self, worker: int) -> None:
        reseed(torch.initial_seed(), self.rank)
        if self.init is not None: self.init(worker)


def reseed(seed: int, rank: int) -> None:
    """Random numbers for process `rank` out of a common seed: torch's, Python's, and numpy's if it is in use."""
    own = random.Random(f"{seed} {rank}").getrandbits(63)
    torch.manual_seed(own)
    random.seed(own)
    if (numpy := sys.modules.get("numpy")) is not None: numpy.random.seed(own % 2 ** 32)


def same_order(ranks: Ranks, dl: Any) -> None:
    """Give rank 0's random states to all, before a loader draws the order of its images."""
    generators = generators_of(dl)
    state = {k: v for k, v in random_state(generators).items() if k != "cuda"}
    common = ranks.first(state)
    if not ranks.leads: set_random_state(common, generators)


def own_randomness(ranks: Ranks) -> None:
    """Let each process but rank 0 go on with random numbers of its own, once the order is drawn."""
    if ranks.leads: return
    common = torch.Generator()
    common.set_state(torch.get_rng_state())
    reseed(int(torch.randint(2 ** 62, (), generator=common)), ranks.rank)


def longest(iters: Sequence[int | None]) -> int | None:
    """The number of batches of a pass, which is over with the last process's last; None if one doesn't know."""
    return None if any(n is None for n in iters) else max(n for n in iters if n is not None)


def counted(batches: Iterable[Any], ranks: Ranks) -> Iterator[tuple[Any, int, int]]:
    """Of batches that are each process's own: the batch, its images and those of all processes.

    Who has no more batches than others goes on with ones without images. A cancel exception on the way holds for all.
    """
    iterator, last = iter(batches), None
    while True:
        batch, level = None, 0
        try: batch = next(iterator, None)
        except CancelException as e: level = e.level
        n = 0 if batch is None else size_of(batch)
        told = ranks.gather((batch is not None, n, level))
        if level := max(level for *_, level in told): raise CANCELS[level]
        if not any(more for more, *_ in told): return
        if batch is None and last is None:
            raise ShareError(f"{ranks} has no batch in this pass, and others have; give each process one at least")
        last = nothing_of(last) if batch is None else batch
        yield last, n, sum(n for _, n, _ in told)


def _sampler_of(dl: Any, place: tuple[int, int]) -> str | None:
    """Where a loader has its sampler of batches; None where whole batches are to be cut, "" if they are parts already.
    """
    if isinstance(dl, Sequence): return None
    if not is_torchs(dl):
        raise ShareError(f"the loader, a {type(dl).__name__}, can't be shared among {place[1]} processes: nobody knows "
                         "whether all get the same batches from it; if they do, give shard_loader(loader), or if "
                         "each gets its own part, as with a DistributedSampler, shard_loader(loader, parts=True)")
    where = "sampler" if dl.batch_sampler is None else "batch_sampler"
    batches = getattr(dl, where)
    order = getattr(batches, "sampler", None)
    if isinstance(order, DistributedSampler):
        if (order.rank, order.num_replicas) != place:
            raise ShareError(f"the DistributedSampler is for rank {order.rank} of {order.num_replicas} processes, and "
                             f"this is rank {place[0]} of {place[1]}; make it without these two, after the group was "
                             "joined, or leave it out: Distributed shares the batches itself")
        return ""
    if type(batches) is BatchSampler and type(order) in KNOWN: return where
    if type(batches) in KNOWN and where == "sampler": return None       # batches from the data set
    name = type(batches if order is None or type(batches) is not BatchSampler else order).__name__
    raise ShareError(f"the loader can't be shared among {place[1]} processes: nobody knows whether its sampler, a "
                     f"{name}, gives all of them the same order; if it does, give shard_loader(loader), else a "
                     "torch.utils.data.DistributedSampler, whose batches are each process's own")


class ShardedLoader:
    """What `shard_loader` gives: an iterable of one process's batches, with the loader's own attributes.

    `sizes` says of the last batch how many images are the process's own, and how many there are over all; None where
    nobody has counted.
    """

    def __init__(self, loader: Any, place: Place, cut: bool) -> None:
        self.loader, self.place, self.cut = loader, place, cut
        self.sizes: tuple[int, int] | None = None

    def __len__(self) -> int: return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "loader" not in vars(self): raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        dl = self.loader
        where = _batches_at(dl) if self.cut else None
        sampler = None if where is None else BatchShare(vars(dl)[where], self.place)
        if where is not None: vars(dl)[where] = sampler
        try:
            share, batches = Share(self.place, sampler), iter(dl)
            first = getattr(dl, "_given", 0) if where else 0        # of a loader that goes on in the middle of a pass
            for k, batch in enumerate(batches, first):
                if self.cut:
                    batch, own, n = share.take(k, batch)
                    self.sizes = own, n
                yield batch
        finally:
            if sampler is not None: vars(dl)[where] = sampler.batch_sampler


def _batches_at(dl: Any) -> str | None:
    """Where a loader of torch's has a sampler of batches of indices."""
    if not is_torchs(dl): return None
    if dl.batch_sampler is not None: return "batch_sampler"
    return "sampler" if isinstance(dl.sampler, BatchSampler) else None
