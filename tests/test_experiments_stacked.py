"""Networks side by side: each computes, and becomes, what it would be alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.models import GeneralRelu, Lambda, flatten
from experiments.published.small_batch import build
from experiments.study.stacked import GroupedLinear, stack, unstack
from norms import RunningBatchNorm


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def side_by_side(xs):
    """K tensors `(N, C, H, W)` as `(N, K C, H, W)`."""
    return torch.cat(xs, 1)


@pytest.mark.parametrize("norm", ["none", "BatchNorm", "InstanceNorm", "GroupNorm", "RunningBatchNorm"])
def test_stack_computes_what_each_model_does(norm):
    models = [build(norm, seed) for seed in (3, 4, 5)]
    net, g = stack(models), torch.Generator().manual_seed(0)
    for n in (2, 3):
        xs = [torch.randn(n, 1, 28, 28, generator=g) for _ in models]
        out = net(side_by_side(xs)).view(n, 3, 10)
        for k, (m, x) in enumerate(zip(models, xs, strict=True)):
            torch.testing.assert_close(out[:, k], m(x), rtol=0, atol=1e-12)
    net.eval()
    xs = [torch.randn(2, 1, 28, 28, generator=g) for _ in models]
    out = net(side_by_side(xs)).view(2, 3, 10)
    for k, (m, x) in enumerate(zip(models, xs, strict=True)):
        torch.testing.assert_close(out[:, k], m.eval()(x), rtol=0, atol=1e-12)


def test_a_replica_trains_as_it_does_alone_and_comes_back():
    alone, together = ([build("RunningBatchNorm", seed) for seed in (0, 1, 2)] for _ in range(2))
    net, g = stack(together), torch.Generator().manual_seed(1)
    opts = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (*alone, net)]
    for _ in range(20):
        xs, ys = torch.randn(3, 2, 1, 28, 28, generator=g), torch.randint(10, (3, 2), generator=g)
        for m, x, y, opt in zip(alone, xs, ys, opts, strict=False):
            opt.zero_grad()
            F.cross_entropy(m(x), y).backward()
            opt.step()
        opts[-1].zero_grad()
        out = net(side_by_side(list(xs))).view(2, 3, 10)
        sum(F.cross_entropy(out[:, k], ys[k]) for k in range(3)).backward()
        opts[-1].step()
    unstack(net, together)
    for a, t in zip(alone, together, strict=True):
        for (name, x), y in zip(a.state_dict().items(), t.state_dict().values(), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-9, msg=name)


def test_stack_keeps_the_random_state_mode_and_settings():
    norm = RunningBatchNorm(4, 0.05, 1e-3, rule="per_image", average_backward=True)
    models = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, groups=1), GeneralRelu(0.1), norm, Lambda(flatten),
                            nn.Linear(4 * 36, 2)).eval()]
    state = torch.random.get_rng_state()
    net = stack(models * 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not net.training
    assert str(net[2]) == "RunningBatchNorm(8, mom=0.05, eps=0.001, rule='per_image', average_backward=True)"
    assert (net[0].groups, net[1].leak) == (2, 0.1)
    assert isinstance(net[4], GroupedLinear)


def test_stack_refuses_what_it_cannot_put_side_by_side():
    with pytest.raises(ValueError, match="stack got no models; it needs at least one"): stack([])
    with pytest.raises(ValueError, match="differ in more than their values; build them with the same settings"):
        stack([build("GroupNorm", 0), build("BatchNorm", 0)])
    with pytest.raises(ValueError, match="differ in more than their values"):
        stack([nn.Sequential(RunningBatchNorm(4, mom=0.1)), nn.Sequential(RunningBatchNorm(4, mom=0.2))])
    with pytest.raises(TypeError, match=r"stack can't put LayerNorm side by side; it takes nn\.Sequential"):
        stack([build("LayerNorm", 0)])
    with pytest.raises(TypeError, match="stack can't put Lambda side by side"):
        stack([nn.Sequential(Lambda(lambda x: x.mean(1)))])
    trained, new = build("RunningBatchNorm", 0), build("RunningBatchNorm", 1)
    trained(torch.randn(2, 1, 28, 28))
    with pytest.raises(ValueError, match=r"whose '0\.2\.count' differ, .* seen the same number of batches"):
        stack([trained, new])
