"""Data sets and loaders, small callbacks, hooks."""

import pytest
import torch
from test_runner_loop import make_learn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from runner import (
    BatchTransformXCallback,
    Callback,
    CudaCallback,
    DataBunch,
    Dataset,
    Hook,
    Hooks,
    Runner,
    append_stats,
    get_dls,
    view_tfm,
)


def test_dataset_takes_ints_slices_and_lists():
    ds = Dataset(torch.arange(10.0), torch.arange(10) * 2)
    assert ds[3] == (3.0, 6)
    assert [t.tolist() for t in ds[2:4]] == [[2.0, 3.0], [4, 6]]
    assert [t.tolist() for t in ds[[5, 1]]] == [[5.0, 1.0], [10, 2]]
    assert [t.tolist() for t in ds[[-1, 1]]] == [[9.0, 1.0], [18, 2]]
    for outside in (10, -11):
        with pytest.raises(IndexError, match="out of bounds"): ds[[0, outside]]
    assert len(ds) == 10


def test_loaders_fetch_whole_batches_and_never_items(monkeypatch):
    fetch = Dataset.__getitem__

    def watched(self, i):
        assert isinstance(i, list), "an item was fetched by itself"
        return fetch(self, i)
    monkeypatch.setattr(Dataset, "__getitem__", watched)
    x = torch.arange(10.0)
    train, valid = get_dls(Dataset(x, x), Dataset(x, x), 3, generator=torch.Generator().manual_seed(0))
    batches = [xb for xb, yb in train]
    assert [len(b) for b in batches] == [3, 3, 3, 1]
    assert sorted(torch.cat(batches).tolist()) == x.tolist()
    assert torch.cat(batches).tolist() != x.tolist()
    assert [xb.tolist() for xb, yb in valid] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]      # in order, twice the size
    assert all(torch.equal(xb, yb) for xb, yb in train)
    assert (len(train), len(valid)) == (4, 2)


def test_order_follows_the_generator_alone():
    x = torch.arange(20.0)

    def order(seed, global_seed):
        torch.manual_seed(global_seed)
        dl, _ = get_dls(Dataset(x, x), Dataset(x, x), 4, generator=torch.Generator().manual_seed(seed))
        return torch.cat([xb for xb, _ in dl]).tolist()
    assert order(1, 0) == order(1, 5)
    assert order(1, 0) != order(2, 0)


@pytest.mark.parametrize("own", [True, False])
def test_order_and_random_numbers_are_those_of_torchs_loader(own):
    """Twice through both, and the next random number after each time."""
    x = torch.arange(20.0)
    train, _ = get_dls(Dataset(x, x), Dataset(x, x), 3, drop_last=True,
                       generator=torch.Generator().manual_seed(3) if own else None)
    torchs = DataLoader(train.dataset, None, sampler=train.sampler, collate_fn=train.collate_fn,
                        generator=train.generator)
    assert type(train) is not type(torchs)

    def seen(dl):
        torch.manual_seed(3)
        if own: dl.generator.manual_seed(3)
        return [([xb.tolist() for xb, _ in dl], torch.rand(1, generator=dl.generator).item()) for _ in range(2)]
    a, b = seen(train), seen(torchs)
    assert a == b
    assert a[0] != a[1]
    assert len(train) == len(torchs) == 6


def test_collate_function_and_workers_of_the_user():
    x = torch.arange(10.0)

    def doubled(items): return torch.stack([x * 2 for x, _ in items]), torch.stack([y for _, y in items])
    for workers in (0, 1):
        _, valid = get_dls(Dataset(x, x), Dataset(x, x), 2, collate_fn=doubled, num_workers=workers)
        assert [xb.tolist() for xb, _ in valid] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18]]


def test_drop_last_concerns_training_only():
    x = torch.arange(10.0)
    train, valid = get_dls(Dataset(x, x), Dataset(x, x), 4, drop_last=True)
    assert [len(xb) for xb, _ in train] == [4, 4]
    assert [len(xb) for xb, _ in valid] == [8, 2]


def test_other_datasets_and_loader_options_work():
    x = torch.arange(10.0)
    train, _ = get_dls(TensorDataset(x, x), TensorDataset(x, x), 5, num_workers=1)
    assert [len(xb) for xb, _ in train] == [5, 5]


def test_parts_of_data_sets_and_lists_work():
    x = torch.arange(12.0)
    for ds in (Dataset(x, x), TensorDataset(x, x), Dataset(x.tolist(), x.tolist()), Items()):
        part, rest = random_split(ds, [8, 4], generator=torch.Generator().manual_seed(0))
        train, valid = get_dls(part, rest, 2)
        batches = list(train)
        assert [tuple(b.shape for b in batch) for batch in batches] == [((2,), (2,))] * 4
        assert sorted(torch.cat([xb for xb, _ in (*batches, *valid)]).tolist()) == x.tolist()
    assert next(iter(DataLoader(Dataset(x, x), batch_size=4)))[0].tolist() == [0, 1, 2, 3]     # torch's own, too


class Items(torch.utils.data.Dataset):
    """A data set that knows single items only."""

    def __len__(self): return 12

    def __getitem__(self, i): return torch.tensor(float(i + 0)), i + 0


def test_validation_batch_size():
    x = torch.arange(10.0)
    for valid_bs, sizes in ((None, [6, 4]), (4, [4, 4, 2]), (100, [10])):
        _, valid = get_dls(Dataset(x, x), Dataset(x, x), 3, valid_bs=valid_bs)
        assert [len(xb) for xb, _ in valid] == sizes
    with pytest.raises(ValueError, match="batch size is 0; it must be a positive integer"):
        get_dls(Dataset(x, x), Dataset(x, x), 3, valid_bs=0)


def test_dataset_is_indexed_as_its_arrays_are():
    x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
    for a, b in ((x, y), (x.numpy(), y.numpy()), (x, y.numpy())):
        ds = Dataset(a, b)
        for i in (2, -1, slice(1, 4), [4, 0, 4], [-1], [], [True, False] * 3, torch.tensor([1, 2])):
            got, want = ds[i], (a[i], b[i])
            for g, w in zip(got, want, strict=True):
                assert type(g) is type(w)
                assert torch.equal(torch.as_tensor(g), torch.as_tensor(w))
    with pytest.raises(IndexError): Dataset(x, y)[[6]]


def test_data_bunch_shows_its_data_sets():
    learn = make_learn()
    assert len(learn.data.train_ds) == len(learn.data.valid_ds) == 4
    assert learn.data.c == 3
    assert DataBunch(*get_dls(learn.data.train_ds, learn.data.valid_ds, 2)).c is None


@pytest.mark.parametrize(("n", "m", "bs", "text"), [
    (10, 10, 0, "batch size is 0; it must be a positive integer"), (10, 10, 2.0, "batch size is 2.0"),
    (0, 10, 2, "the training set is empty"), (10, 0, 2, "the validation set is empty"),
    (10, 10, 11, "batch size is 11 and the training set has 10 items; with drop_last no batch is left")])
def test_loaders_that_make_no_sense(n, m, bs, text):
    with pytest.raises(ValueError, match=text):
        get_dls(Dataset(torch.zeros(n), torch.zeros(n)), Dataset(torch.zeros(m), torch.zeros(m)), bs, drop_last=True)


def test_dataset_of_unequal_lengths():
    with pytest.raises(ValueError, match="got 3 inputs and 2 targets"): Dataset(torch.zeros(3), torch.zeros(2))


def test_batch_transform_sees_every_batch():
    shapes = []

    class Look(Callback):
        _order = 3

        def begin_batch(self): shapes.append(tuple(self.xb.shape))
    learn = make_learn(model=nn.Sequential(nn.Flatten(), nn.Linear(6, 3)))
    Runner([BatchTransformXCallback(view_tfm(1, 2, 3)), Look()]).fit(1, learn)
    assert shapes == [(2, 1, 2, 3), (2, 1, 2, 3), (4, 1, 2, 3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_cuda_callback_does_nothing_without_a_gpu():
    cb = CudaCallback()
    assert cb.device is None
    Runner(cb).fit(1, make_learn())


def test_cuda_callback_moves_model_optimizer_state_and_batches():
    # The "meta" device stands for a GPU: tensors there have a device and no values.
    learn = make_learn(momentum=0.9)
    Runner().fit(1, learn)
    devices = []

    class Look(Callback):
        def begin_batch(self): devices.append((self.xb.device.type, self.yb.device.type))
    Runner([CudaCallback("meta"), Look()]).fit(1, learn)
    assert set(devices) == {("meta", "meta")}
    assert all(p.device.type == "meta" for p in learn.model.parameters())
    assert all(s["momentum_buffer"].device.type == "meta" for s in learn.opt.state.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_callback_trains_on_the_gpu():
    learn = make_learn(momentum=0.9)
    Runner(CudaCallback()).fit(2, learn)
    assert all(p.is_cuda and p.isfinite().all() for p in learn.model.parameters())


# --- hooks --------------------------------------------------------------------------------------------------------

def test_hooks_record_training_statistics_on_the_device():
    learn = make_learn()
    outputs = []
    with Hooks(learn.model, append_stats) as hooks:
        learn.model[0].register_forward_hook(lambda m, i, o: outputs.append(o.detach()) if m.training else None)
        Runner().fit(3, learn)
    assert len(hooks) == 3
    for means, stds in (h.stats for h in hooks): assert len(means) == len(stds) == 6      # 2 training batches, 3 epochs
    means, stds = hooks[0].stats
    assert all(torch.is_tensor(m) and m.ndim == 0 and not m.requires_grad for m in means + stds)
    assert torch.stack(means).tolist() == [o.mean().item() for o in outputs]
    assert torch.stack(stds).tolist() == [o.std().item() for o in outputs]


def test_hooks_are_gone_after_an_exception_in_the_block():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(KeyError), Hooks(model, append_stats): raise KeyError
    assert not any(m._forward_hooks for m in model)


def test_hooks_half_made_are_taken_off_again():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AttributeError): Hooks([model[0], "no module"], append_stats)
    assert not model[0]._forward_hooks


def test_hooks_are_a_list():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    hooks = Hooks(model, append_stats)
    assert isinstance(hooks, list)
    del hooks[0]
    del hooks[1:3]
    hooks.pop(0)
    assert [bool(m._forward_hooks) for m in model] == [False, False, False, False, True]
    hooks.clear()
    assert not any(m._forward_hooks for m in model)
    assert hooks == []


def test_hook_calls_f_with_itself_and_may_replace_the_output():
    m, seen = nn.Linear(2, 3), []

    def f(hook, mod, inp, outp):
        seen.append((hook, mod, inp[0].shape, outp.shape))
        return outp * 0
    hook = Hook(m, f)
    assert m(torch.ones(4, 2)).abs().sum() == 0
    assert seen == [(hook, m, (4, 2), (4, 3))]
    hook.remove(), hook.remove()
    assert m(torch.ones(4, 2)).abs().sum() > 0
