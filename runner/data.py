"""Data for the runner: `Dataset`, `DataBunch`, `get_dls`."""

from torch.utils.data import DataLoader


class Dataset:
    """Inputs `x` and targets `y` in step, indexed by anything their tensors take: an int, a slice, a list.

    `__getitems__` is torch's hook for fetching many items at once: the loader hands over a batch's indices and
    gets the batch, so no batch is ever put together image by image.
    """

    def __init__(self, x, y):
        if len(x) != len(y):
            raise ValueError(f"Dataset got {len(x)} inputs and {len(y)} targets; it needs one target per input")
        self.x, self.y = x, y

    def __len__(self): return len(self.x)

    def __getitem__(self, i): return self.x[i], self.y[i]

    def __getitems__(self, indices): return self.x[indices], self.y[indices]


class DataBunch:
    """A training and a validation loader and `c`, the number of classes."""

    def __init__(self, train_dl, valid_dl, c=None):
        self.train_dl, self.valid_dl, self.c = train_dl, valid_dl, c

    @property
    def train_ds(self): return self.train_dl.dataset

    @property
    def valid_ds(self): return self.valid_dl.dataset


def whole_batch(batch):
    """The collate function of a data set that already returns whole batches: the batch itself."""
    return batch


def get_dls(train_ds, valid_ds, bs, *, drop_last=False, generator=None, **kwargs):
    """A shuffled training loader of batch size `bs` and a validation loader, in order, of `2 * bs`.

    Args:
        train_ds, valid_ds: `Dataset`s, fetched a whole batch at a time; any other map-style data set works too,
            item by item.
        bs: training batch size.
        drop_last: leave out the last training batch if it is smaller than `bs`.
        generator: a `torch.Generator` that decides the order of the training images; torch's global one if None.
        **kwargs: for both `torch.utils.data.DataLoader`s, such as `num_workers` or `pin_memory`.

    Raises:
        ValueError: a batch size that is not a positive integer, an empty data set, a training set smaller than `bs`
            with `drop_last`.
    """
    if not isinstance(bs, int) or isinstance(bs, bool) or bs < 1:
        raise ValueError(f"batch size is {bs!r}; it must be a positive integer")
    for which, ds in (("training", train_ds), ("validation", valid_ds)):
        if not len(ds): raise ValueError(f"the {which} set is empty; it needs at least one item")
    if drop_last and len(train_ds) < bs:
        raise ValueError(f"batch size is {bs} and the training set has {len(train_ds)} items; with drop_last no batch "
                         f"is left: take a batch size of at most {len(train_ds)}")

    def loader(ds, bs, **more):
        collate = {"collate_fn": whole_batch} if hasattr(ds, "__getitems__") else {}
        return DataLoader(ds, batch_size=bs, **collate, **more, **kwargs)

    return (loader(train_ds, bs, shuffle=True, drop_last=drop_last, generator=generator),
            loader(valid_ds, 2 * bs))
