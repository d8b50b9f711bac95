"""Adam in the eigenbasis of the inputs, held to torch's Adam."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.beyond.eigen import EigenAdam, patches
from experiments.published.small_batch import build
from experiments.study.stacked_layers import GroupedLinear


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gen(seed): return torch.Generator().manual_seed(seed)


def orthogonal(k, d, seed): return torch.linalg.qr(torch.randn(k, d, d, generator=gen(seed)))[0]


def test_without_a_basis_it_is_adam():
    nets = [nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 4)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    betas = (0.8, 0.99)
    opts = [EigenAdam(nets[0], 0.01, betas, every=1, refresh=10**6),
            torch.optim.Adam(nets[1].parameters(), 0.01, betas)]
    g = gen(0)
    for _ in range(3):                                                  # before the first renewal that makes a basis
        x, y = torch.randn(5, 1, 6, 6, generator=g), torch.randint(4, (5,), generator=g)
        for net, opt in zip(nets, opts, strict=True):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_in_a_basis_it_is_adam_on_the_weights_in_that_basis():
    # y = W a = (W Q) (Q^T a): Adam on V = W Q with the inputs Q^T a takes the same steps.
    q = orthogonal(1, 6, 0)[0]
    layer, turned = nn.Linear(6, 3), nn.Linear(6, 3)
    with torch.no_grad():
        turned.weight.copy_(layer.weight @ q)
        turned.bias.copy_(layer.bias)
    opt = EigenAdam(layer, 0.02, (0.9, 0.95), every=1, refresh=10**6)
    adam = torch.optim.Adam(turned.parameters(), 0.02, (0.9, 0.95))
    opt.close()                                                         # no looks: the basis is given
    opt.state[layer.weight].update(Q=q[None], live=torch.arange(6), A=torch.zeros(1, 6, 6))
    opt.turn = lambda state: None
    g = gen(1)
    for _ in range(30):
        x, y = torch.randn(4, 6, generator=g), torch.randn(4, 3, generator=g)
        for net, o, inp in ((layer, opt, x), (turned, adam, x @ q)):
            o.zero_grad()
            F.mse_loss(net(inp), y).backward()
            o.step()
    torch.testing.assert_close(layer.weight @ q, turned.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.bias, turned.bias, rtol=0, atol=1e-12)


def test_the_direction_is_renewed_from_the_mean_gradient_and_kept_in_between():
    p = nn.Linear(1, 1, bias=False)
    with torch.no_grad(): p.weight.fill_(0.0)
    opt, seen = EigenAdam(p, 0.5, (0.0, 0.0), eps=0.0, every=3), []
    for grad in (1.0, -5.0, 2.0, 7.0, 1.0, 1.0):
        p.weight.grad = torch.tensor([[grad]])
        opt.step()
        seen.append(p.weight.item())
    # Nothing is known for two steps; the mean of 1, -5, 2 is negative, that of 7, 1, 1 positive; each step is 0.5 long.
    assert seen == [0.0, 0.0, 0.5, 1.0, 1.5, 1.0]


def test_patches_times_the_weight_is_the_convolution():
    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), torch.randn(5, 4, 7, 7, generator=gen(0))
    cols = patches(conv, x, 2)                                          # (2, 2 * 9, 5 * 16)
    out = (conv.weight.view(2, 3, 18) @ cols).view(2, 3, 5, 4, 4).permute(2, 0, 1, 3, 4).flatten(1, 2)
    torch.testing.assert_close(out, conv(x), rtol=0, atol=1e-12)
    x = torch.randn(5, 8, generator=gen(1))
    assert torch.equal(patches(GroupedLinear(2, 4, 1), x, 2)[1], x[:, 4:].T)


def test_the_basis_is_that_of_the_inputs_and_leaves_out_what_sees_padding_alone():
    conv = nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False)          # on a 2x2 map: 4 of 9 positions see a value
    before = conv.weight.detach().clone()
    opt, g = EigenAdam(conv, 0.1, every=1), gen(0)
    xs = torch.randn(12, 2, 1, 2, 2, generator=g) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
    for x in xs:
        opt.zero_grad()
        conv(x).square().sum().backward()
        opt.step()
    state = opt.state[conv.weight]
    assert state["live"].tolist() == [4, 5, 7, 8]
    rows = xs.flatten(0, 1).flatten(1)                                  # 24 patches of the 4 pixels
    torch.testing.assert_close(state["A"][0][state["live"]][:, state["live"]], rows.T @ rows / 24)
    q = state["Q"][0]
    torch.testing.assert_close(q.T @ q, torch.eye(4))
    dead = [0, 1, 2, 3, 6]
    assert torch.equal(conv.weight.flatten(1)[:, dead], before.flatten(1)[:, dead])
    assert not (conv.weight.flatten(1)[:, [4, 5, 7, 8]] == before.flatten(1)[:, [4, 5, 7, 8]]).any()


def test_an_input_that_wakes_up_after_the_basis_was_found_is_learnt_from_as_by_adam():
    layer, plain = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    plain.load_state_dict(layer.state_dict())
    opt = EigenAdam(layer, 0.01, (0.9, 0.99), every=1, refresh=10**6)
    adam, g = torch.optim.Adam(plain.parameters(), 0.01, (0.9, 0.99)), gen(0)
    for i in range(20):
        x = torch.randn(4, 3, generator=g)
        if i < 10: x[:, 2] = 0
        for net, o in ((layer, opt), (plain, adam)):
            o.zero_grad()
            net(x).sum().backward()                                     # a gradient that the weights have no part in
            o.step()
    assert opt.state[layer.weight]["live"].tolist() == [0, 1]
    torch.testing.assert_close(layer.weight[:, 2], plain.weight[:, 2], rtol=0, atol=1e-12)
    assert (layer.weight - plain.weight)[:, :2].abs().max() > 1e-3


def test_on_inputs_that_go_together_it_is_ahead_of_adam():
    # Least squares with inputs whose directions differ a hundredfold in length, turned away from the axes.
    q = orthogonal(1, 20, 5)[0]
    target, losses = torch.randn(1, 20, generator=gen(6)), []
    scale = torch.logspace(0, -2, 20)
    for make in (lambda net: EigenAdam(net, 0.02, (0.7, 0.99), every=2, refresh=50),
                 lambda net: torch.optim.Adam(net.parameters(), 0.02, (0.7, 0.99))):
        net = nn.Linear(20, 1, bias=False)
        with torch.no_grad(): net.weight.zero_()
        opt, g = make(net), gen(7)
        for _ in range(1000):
            x = torch.randn(4, 20, generator=g) * scale @ q.T
            opt.zero_grad()
            F.mse_loss(net(x), x @ target.T).backward()
            opt.step()
        losses.append((((net.weight - target) @ q * scale) ** 2).sum().item())
    assert losses[0] < losses[1] / 10, losses


def test_hooks_go_and_the_state_is_the_optimizers_own():
    net = build("RunningBatchNorm", 0)
    opt = EigenAdam(net)
    net(torch.randn(2, 1, 28, 28))
    assert "A" in opt.state[net[0][0].weight]
    opt.close()
    opt.state[net[0][0].weight].pop("A")
    net(torch.randn(2, 1, 28, 28))
    assert "A" not in opt.state[net[0][0].weight]


def test_a_state_dict_from_mid_training_continues_bit_for_bit():
    def steps(net, opt, seed, n):
        g = gen(seed)
        for _ in range(n):
            opt.zero_grad()
            x, y = torch.randn(2, 1, 28, 28, generator=g), torch.randint(10, (2,), generator=g)
            F.cross_entropy(net(x), y).backward()
            opt.step()
    net, other = build("GroupNorm", 0), build("GroupNorm", 1)
    opt = EigenAdam(net, refresh=6)
    steps(net, opt, 2, 37)                                              # in the midst of a renewal, a basis is there
    again = EigenAdam(other, refresh=6)
    other.load_state_dict(net.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for pair in ((net, opt), (other, again)): steps(*pair, 3, 30)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_it_looks_in_training_only():
    net = nn.Linear(3, 1).eval()
    opt = EigenAdam(net)
    net(torch.randn(2, 3))
    assert "A" not in opt.state[net.weight]


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match=r"EigenAdam got lr=0; it needs a positive number, such as 0\.002"):
        EigenAdam(nn.Linear(2, 1), 0)
    for conv in (nn.Conv2d(1, 1, 3, dilation=2), nn.Conv2d(1, 1, 3, padding="same"),
                 nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")):
        with pytest.raises(ValueError, match=r"can't take the inputs of Conv2d.*without dilation, padded by zeros"):
            EigenAdam(conv)
