"""`runner.SGD` against `torch.optim.SGD`, bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from test_runner_loop import make_learn
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from runner import SGD, Runner


@pytest.fixture
def torchs(monkeypatch):
    """What torch's step is called on, a list."""
    optim.SGD([torch.zeros(())])                        # so that it has its hooks
    calls, step = [], optim.SGD.step

    def spy(self, closure=None):
        calls.append(self)
        return step(self, closure)
    spy.hooked = True
    monkeypatch.setattr(optim.SGD, "step", spy)
    return calls


def parameters(dtype=torch.float32):
    """A weight, one with channels last, one that is frozen, one that is in no loss, a scalar."""
    g = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in ((3, 2), (4, 3, 2, 2), (2,), (5,), ())]
    made[1].data = made[1].data.contiguous(memory_format=torch.channels_last)
    made[2].requires_grad_(False)
    return made


def train(make, params, steps=5):
    """`steps` steps of the optimizer that `make(params)` makes, and the optimizer."""
    opt, g = make(params), torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = sum((p * torch.randn(p.shape, generator=g).to(p.dtype)).sum() ** 2 for p in params if p.shape != (5,))
        loss.backward()
        opt.step()
        opt.zero_grad()
    return opt


def two_groups(kind):
    return lambda ps: kind([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.01}], lr=0.003)


@pytest.mark.parametrize(("kwargs", "plain"), [
    ({}, True), ({"foreach": True}, True), ({"dampening": 0.5}, True), ({"lr": 1}, True),
    ({"momentum": 0.9}, False), ({"momentum": 0.9, "nesterov": True}, False), ({"weight_decay": 0.1}, False),
    ({"maximize": True}, False), ({"foreach": False}, False), ({"fused": True}, False),
    ({"lr": torch.tensor(0.003)}, False), ({"differentiable": True}, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_are_torchs_to_the_last_bit(kwargs, plain, dtype, torchs):
    kwargs = {"lr": 0.003, **kwargs}
    if kwargs.get("differentiable"):                    # torch refuses it for leaves
        with pytest.raises(RuntimeError, match="in-place operation"): train(lambda p: SGD(p, **kwargs), parameters(), 1)
        return
    ours, theirs = parameters(dtype), parameters(dtype)
    opt = train(lambda p: SGD(p, **kwargs), ours)
    assert torchs == ([] if plain else [opt] * 5)
    other = train(lambda p: optim.SGD(p, **kwargs), theirs)
    for a, b, before in zip(ours, theirs, parameters(dtype), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        if kwargs.get("fused"): continue    # torch 2.11 leaves bfloat16 with channels last as it was
        assert torch.equal(a, before) == (a.shape in ((2,), (5,)))
    state, others = opt.state_dict(), other.state_dict()
    assert state["param_groups"] == others["param_groups"]
    assert state["state"].keys() == others["state"].keys()


def test_groups_have_rates_of_their_own(torchs):
    ours, theirs = parameters(), parameters()
    train(two_groups(SGD), ours)
    assert not torchs
    train(two_groups(optim.SGD), theirs)
    assert all(map(torch.equal, ours, theirs))
    assert not all(map(torch.equal, ours, train(lambda p: SGD(p, lr=0.003), parameters()).param_groups[0]["params"]))


def test_one_group_that_is_not_plain_leaves_all_to_torch(torchs):
    def make(kind): return lambda ps: kind([{"params": ps[:2], "momentum": 0.5}, {"params": ps[2:]}], lr=0.003)
    ours, theirs = parameters(), parameters()
    opt = train(make(SGD), ours)
    assert torchs == [opt] * 5
    train(make(optim.SGD), theirs)
    assert all(map(torch.equal, ours, theirs))


def test_sparse_gradients_and_tensors_of_a_kind_of_their_own(torchs):
    def embedding(kind):
        torch.manual_seed(0)
        layer = nn.Embedding(5, 3, sparse=True)
        opt = kind(layer.parameters(), lr=0.1)
        layer(torch.tensor([1, 1, 4])).square().sum().backward()
        opt.step()
        return layer.weight

    class Own(nn.Parameter): pass

    def own(kind):
        p = Own(torch.ones(3))
        opt = kind([p], lr=0.1)
        (p * 2).sum().backward()
        opt.step()
        return p
    for f in (embedding, own):
        del torchs[:]
        ours = f(SGD)
        assert len(torchs) == 1
        assert torch.equal(ours, f(optim.SGD))


def test_hooks_run_once_and_may_change_the_gradient(torchs):
    p = nn.Parameter(torch.ones(2))
    opt, seen = SGD([p], lr=0.5), []

    def forget(opt, args, kwargs):
        seen.append("before")
        p.grad.zero_()
    handles = [opt.register_step_pre_hook(forget),
               opt.register_step_post_hook(lambda *_: seen.append("after")),
               register_optimizer_step_pre_hook(lambda *_: seen.append("before any")),
               register_optimizer_step_post_hook(lambda *_: seen.append("after any"))]
    try:
        p.grad = torch.ones(2)
        opt.step()
        assert seen == ["before any", "before", "after", "after any"]
        assert p.tolist() == [1, 1]
    finally:
        for h in handles: h.remove()
    del torchs[:]
    p.grad = torch.ones(2)
    opt.step()
    assert len(seen) == 4
    assert p.tolist() == [0.5, 0.5]
    assert not torchs


def test_hooks_run_where_torchs_sgd_was_never_made(forks):
    code = ("import torch; from runner import SGD\n"
            "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); opt = SGD([p], lr=0.5); seen = []\n"
            "opt.register_step_post_hook(lambda *_: seen.append(p.tolist()))\n"
            "opt.step(); print(seen)")
    out = forks.run("-c", code)
    assert out.stdout.strip() == "[[0.5, 0.5]]", out.stderr


def test_closure(torchs):
    p = nn.Parameter(torch.tensor(3.0))
    opt = SGD([p], lr=0.25)

    def closure():
        opt.zero_grad()
        loss = p.square()
        loss.backward()
        return loss
    assert opt.step(closure).item() == 9
    assert p.item() == 1.5
    assert torchs == [opt]


def test_zero_grad():
    p = nn.Parameter(torch.ones(2))
    opt = SGD([p], lr=0.1)
    p.grad = torch.ones(2)
    opt.zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0, 0]
    opt.zero_grad()
    assert p.grad is None
    opt.step()                                          # nothing to do
    assert p.tolist() == [1, 1]


def test_torchs_scheduler():
    p = nn.Parameter(torch.tensor(1.0))
    opt = SGD([p], lr=0.5)
    sched, values = StepLR(opt, 1, gamma=0.5), []
    for _ in range(3):
        p.grad = torch.tensor(1.0)
        opt.step()
        sched.step()                                    # would warn if it hadn't noticed the optimizer's step
        values.append(p.item())
    assert values == [0.5, 0.25, 0.125]


def test_gradient_scaler_skips_what_is_not_finite():
    p = nn.Parameter(torch.tensor(1.0))
    opt, scaler = SGD([p], lr=0.5), torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, after in ((1.0, 0.5), (float("inf"), 0.5), (1.0, 0.0)):
        opt.zero_grad()
        scaler.scale(p * value).backward()
        scaler.step(opt)
        scaler.update()
        assert p.item() == after


def test_copies_and_saved_ones_go_on_alike():
    p = nn.Parameter(torch.ones(3))
    opt = SGD([p], lr=0.1)
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), torch.load(file, weights_only=False)):
        q, = other.param_groups[0]["params"]
        q.grad = torch.ones(3)
        other.step()
        torch.testing.assert_close(q.detach(), torch.full((3,), 0.9))
    fresh = SGD([p], lr=0.7)
    fresh.load_state_dict(optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1).state_dict())
    assert fresh.param_groups[0]["lr"] == 0.1


def test_a_compiled_step():
    p = nn.Parameter(torch.ones(3))
    opt = SGD([p], lr=0.5)
    step = torch.compile(opt.step, backend="eager")
    for want in (0.5, 0.0):
        p.grad = torch.ones(3)
        step()
        assert p.tolist() == [want] * 3


def test_in_a_runner():
    """A fit with it is a fit with torch's; its step does not grow a graph, and callbacks set the rate."""
    def fit(kind):
        learn = make_learn()
        learn.opt = kind(learn.model.parameters(), lr=0.3)
        Runner().fit(2, learn)
        return list(learn.model.parameters())
    ours, theirs = fit(SGD), fit(optim.SGD)
    assert all(map(torch.equal, ours, theirs))
    assert all(p.is_leaf and p.requires_grad for p in ours)
