"""Data for the runner: `Dataset`, `DataBunch`, `get_dls`."""

import operator

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)


class Dataset:
    """Inputs `x` and targets `y` in step, indexed by anything that they take: an int, a slice, a list of ints."""

    def __init__(self, x, y):
        if len(x) != len(y):
            raise ValueError(f"Dataset got {len(x)} inputs and {len(y)} targets; it needs one target per input")
        self.x, self.y = x, y

    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        # A list of ints would be made a tensor twice, at more than what fetching a batch of two takes.
        if isinstance(i, list) and i and type(i[0]) is int and torch.is_tensor(self.x) and torch.is_tensor(self.y):
            i = torch.tensor(i)
        return self.x[i], self.y[i]


class DataBunch:
    """A training and a validation loader and `c`, the number of classes."""

    def __init__(self, train_dl, valid_dl, c=None):
        self.train_dl, self.valid_dl, self.c = train_dl, valid_dl, c

    @property
    def train_ds(self): return self.train_dl.dataset

    @property
    def valid_ds(self): return self.valid_dl.dataset


def takes_lists(ds):
    """Whether `ds[[4, 7]]` is the batch of these items: a `Dataset` or `TensorDataset` of arrays, or a part of one."""
    if isinstance(ds, Subset): return takes_lists(ds.dataset)
    if isinstance(ds, Dataset): return all(hasattr(t, "shape") for t in (ds.x, ds.y))
    return isinstance(ds, TensorDataset)


def whole_batch(batch):
    """The collate function where the data set has put the batch together: the batch itself."""
    return batch


class BatchLoader(DataLoader):
    """A `DataLoader` for `batch_size=None`, where the sampler's indices are of whole batches, with less in between.

    Of what torch's does for each batch only `collate_fn(dataset[indices])` is left, and no record for its profiler: at
    batch size 2 that is 5 % of a training step. With workers or pinned memory it is torch's.
    """

    def __iter__(self):
        if self.num_workers or self.pin_memory: return super().__iter__()
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)    # torch's draws a seed for workers: the
        return map(self._fetch, self.sampler)                                   # order of the images stays the same

    def _fetch(self, indices): return self.collate_fn(self.dataset[indices])


def batch_size(bs):
    """`bs` as an int. Raises ValueError unless it is a positive integer, of Python's or another kind."""
    try: whole = operator.index(bs)
    except TypeError: whole = 0
    if isinstance(bs, bool) or whole < 1: raise ValueError(f"batch size is {bs!r}; it must be a positive integer")
    return whole


def get_dls(train_ds, valid_ds, bs, *, valid_bs=None, drop_last=False, generator=None, **kwargs):
    """A shuffled training loader of batch size `bs` and a validation loader, in order, of `valid_bs`.

    Where a data set can be indexed by a list, the loader's sampler yields the indices of a batch and the data set
    returns the batch: no image is ever fetched by itself. (`batch_size=None` is torch's way to say so; such a loader's
    `batch_size` is None.)

    Args:
        train_ds, valid_ds: `Dataset`s or `TensorDataset`s, or `Subset`s of them; any other map-style data set works
            too, item by item.
        bs: training batch size.
        valid_bs: validation batch size; None for `2 * bs`, as in the lesson.
        drop_last: leave out the last training batch if it is smaller than `bs`.
        generator: a `torch.Generator` that decides the order of the training images; torch's global one if None.
        **kwargs: for both `torch.utils.data.DataLoader`s, such as `num_workers` or `pin_memory`.

    Raises:
        ValueError: a batch size that is not a positive integer, an empty data set, a training set smaller than `bs`
            with `drop_last`.
    """
    bs = batch_size(bs)
    valid_bs = 2 * bs if valid_bs is None else batch_size(valid_bs)
    for which, ds in (("training", train_ds), ("validation", valid_ds)):
        if not len(ds): raise ValueError(f"the {which} set is empty; it needs at least one item")
    if drop_last and len(train_ds) < bs:
        raise ValueError(f"batch size is {bs} and the training set has {len(train_ds)} items; with drop_last no batch "
                         f"is left: take a batch size of at most {len(train_ds)}")

    def loader(ds, sampler, bs, drop_last, generator):
        if not takes_lists(ds):
            return DataLoader(ds, bs, sampler=sampler, drop_last=drop_last, generator=generator, **kwargs)
        whole = {"collate_fn": whole_batch, **kwargs}
        return BatchLoader(ds, None, sampler=BatchSampler(sampler, bs, drop_last), generator=generator, **whole)

    return (loader(train_ds, RandomSampler(train_ds, generator=generator), bs, drop_last, generator),
            loader(valid_ds, SequentialSampler(valid_ds), valid_bs, False, None))
