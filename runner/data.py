"""Data for the runner: `Dataset`, `DataBunch`, `get_dls`."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from runner.batches import length_of
from runner.loading import PositionLoader, Skipped


class Dataset:
    """Inputs `x` and targets `y` in step, indexed by anything that they take: an int, a slice, a list of ints.

    They may be numpy arrays; a loader makes tensors of what they give.
    """

    def __init__(self, x: Any, y: Any) -> None:
        if len(x) != len(y):
            raise ValueError(f"Dataset got {len(x)} inputs and {len(y)} targets; it needs one target per input")
        self.x, self.y = x, y

    def __len__(self) -> int: return len(self.x)

    def __getitem__(self, i: Any) -> tuple[Any, Any]:
        # A list of ints would be made a tensor twice, at more than what fetching a batch of two takes.
        if isinstance(i, list) and i and type(i[0]) is int and torch.is_tensor(self.x) and torch.is_tensor(self.y):
            i = torch.tensor(i)
            # Of two images of 3x64x64 bytes: 4 us, by an index 42.
            try: return self.x.index_select(0, i), self.y.index_select(0, i)
            except (IndexError, RuntimeError): pass     # negative ones, which only an index takes; or its own error
        return self.x[i], self.y[i]


class DataBunch:
    """A training and a validation loader (None for no validation) and `c`, the number of classes."""

    def __init__(self, train_dl: Any, valid_dl: Any = None, c: int | None = None) -> None:
        self.train_dl, self.valid_dl, self.c = train_dl, valid_dl, c

    @property
    def train_ds(self) -> Any: return self.train_dl.dataset

    @property
    def valid_ds(self) -> Any: return None if self.valid_dl is None else self.valid_dl.dataset


def takes_lists(ds: Any, in_process: bool = True) -> bool:
    """Whether the batch of torch's loader is `ds[indices]`: a `Dataset` or `TensorDataset` of arrays, or a part of one.

    A class that has another `__getitem__` or `__getitems__` is asked item by item. `in_process`: `BatchLoader` fetches
    the batches itself, and takes a tensor or an array as a `Subset`'s indices.
    """
    kind = next((kind for kind in (Dataset, TensorDataset, Subset) if isinstance(ds, kind)), None)
    if kind is None or any(name in vars(ds) or getattr(type(ds), name, None) is not getattr(kind, name, None)
                           for name in ("__getitem__", "__getitems__")): return False
    if kind is Subset: return _ints(ds.indices, in_process) and takes_lists(ds.dataset, in_process)
    return all(map(_array, (ds.x, ds.y) if kind is Dataset else ds.tensors))


def _ints(indices: Any, in_process: bool) -> bool:
    """Whether `indices` are known to be ints, or (if `in_process`) can be made ints."""
    if isinstance(indices, range): return True
    if type(indices) in (list, tuple): return all(type(i) is int for i in indices)
    if torch.is_tensor(indices): known = not (indices.is_floating_point() or indices.is_complex())
    else: known = _array(indices) and indices.dtype.kind in "iu"
    return in_process and known and indices.ndim == 1 and getattr(indices, "dtype", None) is not torch.bool


def _array(t: Any) -> bool:
    """Whether `t[indices]` are the items `t[i]` stacked: a dense tensor, or a numpy array of numbers."""
    if torch.is_tensor(t):
        return type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided and not t.is_nested
    return (type(t).__module__, type(t).__name__) in (("numpy", "ndarray"), ("numpy", "memmap")) and (
        t.ndim > 0 and t.dtype.kind in "biufc")


def whole_batch(batch: Sequence[Any]) -> list[torch.Tensor]:
    """The collate function where the data set has put the batch together: a list, as torch's, of tensors."""
    return [torch.as_tensor(t) for t in batch]


class BatchLoader(PositionLoader):
    """A loader for `batch_size=None`, where the sampler's indices are of whole batches, with less in between.

    Of what torch's does for each batch only `collate_fn(dataset[indices])` is left, and no record for its profiler: at
    batch size 2 that is 5 % of a training step. With workers or pinned memory it is torch's.
    """

    def batches(self) -> Iterator[Any]:
        """A whole pass."""
        if self.num_workers or self.pin_memory: return super().batches()
        self._draw_seed()
        return map(self.fetch, self.sampler)

    def rest(self, n: int, rewound: Callable[[], None], seeded: bool) -> Iterator[Any]:
        """The pass without its first `n` batches."""
        if self.num_workers or self.pin_memory: return super().rest(n, rewound, seeded)
        rewound()
        self._draw_seed()
        indices = iter(Skipped(self.sampler, n))
        indices.skip()
        return map(self.fetch, indices)

    def _draw_seed(self) -> None:
        """torch's loader draws a seed for workers: the order of the images stays the same."""
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)

    def fetch(self, indices: Any) -> Any:
        """The batch of these items."""
        ds = self.dataset
        while isinstance(ds, Subset):
            indices = [ds.indices[i] for i in indices]
            if type(indices[0]) is not int: indices = [operator.index(i) for i in indices]
            ds = ds.dataset
        return self.collate_fn(ds[indices])


def batch_size(bs: Any) -> int:
    """`bs` as an int. Raises ValueError unless it is a positive integer, of Python's or another kind."""
    try: whole = operator.index(bs)
    except TypeError: whole = 0
    if isinstance(bs, bool) or whole < 1: raise ValueError(f"batch size is {bs!r}; it must be a positive integer")
    return whole


def get_dls(train_ds: Any, valid_ds: Any, bs: int, *, valid_bs: int | None = None, drop_last: bool = False,
            generator: torch.Generator | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """A shuffled training loader of batch size `bs` and a validation loader, in order, of `valid_bs`.

    They give what torch's loaders would: the same batches in the same order; and they can go on in the middle of a pass
    (`runner.loading.PositionLoader`). Where a data set is known to be arrays,
    the sampler yields the indices of a batch and the data set returns the batch: no image is ever fetched by itself.
    (`batch_size=None` is torch's way to say so; such a loader's `batch_size` is None.) That is a `Dataset` or
    `TensorDataset` of tensors or numpy arrays, or a `Subset` of one, with their own `__getitem__` and torch's own
    `collate_fn`. Any other map-style data set works item by item.

    Args:
        train_ds, valid_ds: the data sets; without a `valid_ds` (None) there is no validation loader (None).
        bs: training batch size.
        valid_bs: validation batch size; None for `2 * bs`, as in the lesson.
        drop_last: leave out the last training batch if it is smaller than `bs`.
        generator: a `torch.Generator` that decides the order of the training images; torch's global one if None.
        **kwargs: for both `torch.utils.data.DataLoader`s, such as `num_workers`, `pin_memory`, or a `collate_fn`, which
            gets a list of items.

    Raises:
        TypeError: a data set without a length.
        ValueError: a batch size that is not a positive integer, an empty data set, a training set smaller than `bs`
            with `drop_last`.
    """
    bs = batch_size(bs)
    valid_bs = 2 * bs if valid_bs is None else batch_size(valid_bs)
    for which, ds in (("training", train_ds), ("validation", valid_ds)):
        if ds is None and which == "validation": continue
        if isinstance(ds, IterableDataset) or (size := length_of(ds)) is None:
            raise TypeError(f"the {which} set, a {type(ds).__name__}, has no length and can't be put in an order; give "
                            "DataBunch a loader of it, DataLoader(ds, bs), or any iterable of batches")
        if not size: raise ValueError(f"the {which} set is empty; it needs at least one item")
    if drop_last and len(train_ds) < bs:
        raise ValueError(f"batch size is {bs} and the training set has {len(train_ds)} items; with drop_last no batch "
                         f"is left: take a batch size of at most {len(train_ds)}")
    items = kwargs.get("collate_fn") not in (None, default_collate)
    in_process = not (kwargs.get("num_workers") or kwargs.get("pin_memory"))

    def loader(ds: Any, sampler: Any, bs: int, drop_last: bool, generator: torch.Generator | None) -> Any:
        if items or not takes_lists(ds, in_process):
            return PositionLoader(ds, bs, sampler=sampler, drop_last=drop_last, generator=generator, **kwargs)
        whole = {**kwargs, "collate_fn": whole_batch}
        return BatchLoader(ds, None, sampler=BatchSampler(sampler, bs, drop_last), generator=generator, **whole)

    train_dl = loader(train_ds, RandomSampler(train_ds, generator=generator), bs, drop_last, generator)
    if valid_ds is None: return train_dl, None
    return train_dl, loader(valid_ds, SequentialSampler(valid_ds), valid_bs, False, None)
