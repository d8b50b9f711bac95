"""`get_dls` beside torch's loaders: the same batches, in the same order, by the same random draws."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from runner import DataBunch, Dataset, Learner, Runner, get_dls
from runner.data import BatchLoader


class Counted:
    """Its own `__getitem__`, which notes what it is asked for and changes what it gives."""

    def __getitem__(self, i):
        self.__dict__.setdefault("asked", []).append(i)
        x, *rest = super().__getitem__(i)
        return x * 2, *rest


class OwnDataset(Counted, Dataset):
    pass


class OwnTensors(Counted, TensorDataset):
    pass


class Fetching(TensorDataset):
    """A `__getitems__` of its own, as torch's fetcher asks for."""

    def __getitems__(self, indices): return [tuple(t[i] + 1 for t in self.tensors) for i in indices]


class Named(TensorDataset):
    """A subclass that changes nothing about the items."""

    def __init__(self, *tensors): super().__init__(*tensors)


class OwnPart(Subset):
    def __getitem__(self, i): return self.__getitems__([i])[0]

    def __getitems__(self, indices): return [(x - 1, y) for x, y in super().__getitems__(indices)]


class Instance(TensorDataset):
    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.__getitems__ = lambda indices: [(self.tensors[0][i] * 3, self.tensors[1][i]) for i in indices]


def collate(items):
    assert type(items) is list
    assert all(type(item) is tuple for item in items)
    xs, ys = zip(*items, strict=True)
    return torch.stack([torch.as_tensor(x) for x in xs]) * 5, torch.as_tensor(np.array([int(y) for y in ys]))


def data_set(r):
    """A random data set of at least 3 items and whether it is one of those fetched whole."""
    n = r.randint(3, 12)
    x = torch.randn(n, *r.choice([(), (2,), (2, 3)]), dtype=r.choice([torch.float32, torch.float64, torch.float16]))
    y = torch.randint(0, 5, (n,), dtype=r.choice([torch.int64, torch.int32, torch.uint8]))
    kind = r.choice(["tensors", "dataset", "numpy", "half numpy", "lists", "own", "own tensors", "fetching", "named",
                     "instance", "concat", "memmap"])
    made, whole = {
        "tensors": lambda: (TensorDataset(x, y), True), "dataset": lambda: (Dataset(x, y), True),
        "numpy": lambda: (Dataset(x.numpy(), y.numpy()), True), "half numpy": lambda: (Dataset(x, y.numpy()), True),
        "lists": lambda: (Dataset(x.view(n, -1)[:, 0].tolist(), y), False), "own": lambda: (OwnDataset(x, y), False),
        "own tensors": lambda: (OwnTensors(x, y), False), "fetching": lambda: (Fetching(x, y), False),
        "named": lambda: (Named(x, y), True), "instance": lambda: (Instance(x, y), False),
        "concat": lambda: (ConcatDataset([TensorDataset(x, y), TensorDataset(x, y)]), False),
        "memmap": lambda: (Dataset(x.numpy().view(np.memmap), y.numpy()), True)}[kind]()
    for _ in range(r.choice([0, 0, 1, 2])):
        at = [r.randrange(-len(made), len(made)) for _ in range(r.randint(3, 8))]
        n = len(made)
        indices = r.choice([list, tuple, torch.tensor, np.array, lambda at: torch.tensor(at, dtype=torch.int32),
                            lambda at, n=n: range(1, n), lambda at: [np.int64(i) for i in at],
                            lambda at: [torch.tensor(i) for i in at]])(at)
        if isinstance(indices, list) and type(indices[0]) is not int: whole = False
        made = r.choice([Subset, Subset, OwnPart])(made, indices)
        whole = whole and type(made) is Subset
    return made, whole


def torchs(train_ds, valid_ds, bs, valid_bs, drop_last, generator, **kwargs):
    return (DataLoader(train_ds, bs, sampler=RandomSampler(train_ds, generator=generator), drop_last=drop_last,
                       generator=generator, **kwargs),
            DataLoader(valid_ds, valid_bs, shuffle=False, **kwargs))


def seen(loaders, seed, generator):
    """Two passes over each, and the random numbers that are drawn next."""
    torch.manual_seed(seed)
    if generator is not None: generator.manual_seed(seed)
    batches = [[batch for batch in dl] for dl in (*loaders, *loaders)]
    draws = [torch.rand(1, generator=g).item() for g in (None, generator)]
    return batches, draws, [len(dl) for dl in loaders]


def same(a, b):
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("seed", range(150))
def test_batches_are_those_of_torchs_loaders(seed):
    r = random.Random(seed)
    torch.manual_seed(seed)
    (train_ds, whole), (valid_ds, _) = data_set(r), data_set(r)
    generator = r.choice([None, torch.Generator()])
    bs, valid_bs, drop_last = r.randint(1, 5), r.randint(1, 5), r.choice([True, False])
    if drop_last: bs = min(bs, len(train_ds))
    kwargs = r.choice([{}, {}, {"collate_fn": None}, {"collate_fn": default_collate}, {"collate_fn": collate}])
    ours = get_dls(train_ds, valid_ds, bs, valid_bs=valid_bs, drop_last=drop_last, generator=generator, **kwargs)
    assert isinstance(ours[0], BatchLoader) == (whole and kwargs.get("collate_fn") is not collate)
    got = seen(ours, seed, generator)
    want = seen(torchs(train_ds, valid_ds, bs, valid_bs, drop_last, generator, **kwargs), seed, generator)
    assert same(list(got), list(want))


@pytest.mark.parametrize("kind", [OwnDataset, OwnTensors])
def test_an_own_getitem_is_called_once_per_item(kind):
    ds = kind(torch.arange(5.0), torch.arange(5))
    train, valid = get_dls(ds, Subset(ds, range(3)), 2)
    assert sorted(torch.cat([xb for xb, _ in train]).tolist()) == [0, 2, 4, 6, 8]
    assert [i for i in ds.asked if type(i) is int] == ds.asked
    assert sorted(ds.asked) == [0, 1, 2, 3, 4]
    assert torch.cat([xb for xb, _ in valid]).tolist() == [0, 2, 4]
    assert len(ds.asked) == 8


@pytest.mark.parametrize("indices", [[4, 1, 3], torch.tensor([4, 1, 3]), np.array([4, 1, 3]), range(3)])
@pytest.mark.parametrize("base", [TensorDataset, Dataset])
def test_a_subset_with_workers_takes_any_indices(base, indices):
    part = Subset(Subset(base(torch.arange(6.0), torch.arange(6)), torch.tensor([5, 4, 3, 2, 1])), indices)
    _, valid = get_dls(part, part, 2, num_workers=1)
    want = [5 - int(i) for i in indices]
    assert torch.cat([xb for xb, _ in valid]).tolist() == want
    assert torch.cat([yb for _, yb in valid]).tolist() == want


def test_a_subset_whose_indices_change_gives_the_new_ones():
    part = Subset(TensorDataset(torch.arange(6.0)), [0, 1])
    _, valid = get_dls(part, part, 1, valid_bs=1)
    part.indices = torch.tensor([5, 3])
    assert [xb.tolist() for xb, in valid] == [[5], [3]]


def test_numpy_arrays_become_tensors_and_train():
    x, y = np.random.default_rng(0).normal(size=(8, 4)).astype("float32"), np.arange(8) % 3
    dls = get_dls(Dataset(x, y), Dataset(x, y), 4, generator=torch.Generator().manual_seed(0))
    twins = get_dls(Dataset(torch.tensor(x), torch.tensor(y)), Dataset(torch.tensor(x), torch.tensor(y)), 4,
                    generator=torch.Generator().manual_seed(0))
    models = []
    for loaders in (dls, twins):
        torch.manual_seed(0)
        models.append(m := torch.nn.Linear(4, 3))
        Runner().fit(2, Learner(m, torch.optim.SGD(m.parameters(), 0.1), torch.nn.functional.cross_entropy,
                                DataBunch(*loaders)))
    assert torch.equal(models[0].weight, models[1].weight)


def test_no_validation_set_no_validation_loader():
    ds = TensorDataset(torch.arange(4.0), torch.arange(4))
    train, valid = get_dls(ds, None, 2)
    assert len(train) == 2
    assert valid is None
    assert DataBunch(train).valid_ds is None
    assert DataBunch(train).train_ds is ds


def test_a_set_without_a_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self): yield torch.zeros(1)
    with pytest.raises(TypeError, match=r"the training set, a Stream, has no length and can't be put in an order; give "
                                        r"DataBunch a loader of it, DataLoader\(ds, bs\)"):
        get_dls(Stream(), None, 2)


def test_the_samplers_are_torchs():
    ds = TensorDataset(torch.arange(4.0))
    train, valid = get_dls(ds, ds, 2)
    assert isinstance(train.sampler, BatchSampler)
    assert isinstance(train.sampler.sampler, RandomSampler)
    assert isinstance(valid.sampler.sampler, SequentialSampler)
