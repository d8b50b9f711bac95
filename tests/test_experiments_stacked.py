"""Networks side by side: each computes, and becomes, what it would be alone."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.beyond.eigen import EigenAdam
from experiments.beyond.recipes import Recipe
from experiments.models import AvgPool, GeneralRelu, Lambda, Residual, ResidualBlock, channels_last_, flatten
from experiments.published.small_batch import build
from experiments.study.stacked import register, stack, unstack
from experiments.study.stacked_layers import GroupedConv2d, GroupedLinear, PerImage, by_patches
from experiments.study.stacked_sgd import StackedSGD
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm
from norms.rivals import (
    MABN,
    BatchChannelNorm,
    BatchRenorm,
    CentredConv2d,
    EvoNormS0,
    FilterResponseNorm,
    MomentumBatchNorm,
    RunningChannelNorm,
    SkipInit,
    WSConv2d,
)
from runner import SGD


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def side_by_side(xs):
    """K tensors `(N, C, *)` as `(N, K C, *)`."""
    return torch.cat(list(xs), 1)


def apart(y, k):
    """K tensors of what a stack of K networks gave."""
    return y.unflatten(1, (k, -1)).unbind(1)


def close(a, b, what):
    """Within 1e-9 of the largest of the values, and of 1."""
    assert a.shape == b.shape, what
    off = (a - b).abs().max() / b.abs().max().clamp_min(1)
    assert off < 1e-9, f"{what}: by {off:.1e}"


def values(m): return {**dict(m.named_parameters()), **dict(m.named_buffers())}


def train(models, shape, steps=20, sizes=(2,), seed=0, optimizers=None, evaluated=5, last=False):
    """Train copies of `models` alone and side by side on images of `shape`, and compare all that there is at each step.

    `sizes` are the batches', in turn; every `evaluated`-th batch is one of evaluation. `optimizers` are one for each
    and one for the stack, functions of the parameters. `last` lays out the stack's weights channels last.
    """
    k, g = len(models), torch.Generator().manual_seed(seed)
    alone, together = copy.deepcopy(models), copy.deepcopy(models)
    net = stack(together)
    if last: channels_last_(net)
    optimizers = optimizers or [lambda p: torch.optim.SGD(p, 0.02, momentum=0.5)] * (k + 1)
    opts = [make(list(m.parameters())) for make, m in zip(optimizers, (*alone, net), strict=True) if [*m.parameters()]]
    for step in range(steps):
        for m in (*alone, net): m.train((step + 1) % evaluated != 0)
        xs = torch.randn(k, sizes[step % len(sizes)], *shape, generator=g).requires_grad_()
        outs = [m(x) for m, x in zip(alone, xs, strict=True)]
        whole = side_by_side(xs.detach()).requires_grad_()
        theirs = apart(net(whole), k)
        for a, b in zip(outs, theirs, strict=True): close(b, a, f"outputs of step {step}")
        targets = torch.randn(k, *outs[0].shape, generator=g)
        for outputs in (outs, theirs):
            sum(F.mse_loss(out, t) for out, t in zip(outputs, targets, strict=True)).backward()
        close(torch.stack(apart(whole.grad, k)), xs.grad, f"gradients of the images of step {step}")
        for name, p in net.named_parameters():
            its = [dict(m.named_parameters())[name].grad for m in alone]
            for part, one in zip(p.grad.chunk(k), its, strict=True):
                close(part.view(one.shape), one, f"gradients of {name} of step {step}")
        for opt in opts:
            if net.training: opt.step()
            opt.zero_grad()
    unstack(net, together)
    for a, t in zip(alone, together, strict=True):
        for name, x in values(a).items(): close(values(t)[name], x, name)
    return net


def randomly(make, k=3):
    """K networks of `make()` whose weights, norms' too, are random."""
    models = [make() for _ in range(k)]
    for m in models:
        for p in m.parameters():
            with torch.no_grad(): p.add_(torch.randn_like(p), alpha=0.1)
    return models


# Each layer behind a convolution, on (3, 6, 6) maps; batches of 3 images, for torch's batch norm.
LAYERS = {
    "LayerNorm": lambda: LayerNorm(), "LayerNorm of images": lambda: LayerNorm((4, 6, 6), 1e-3),
    "LayerNorm of rows": lambda: LayerNorm((6, 6)), "LayerNorm without weights": lambda: LayerNorm(affine=False),
    "BatchNorm": lambda: BatchNorm(4, 0.3), "GroupNorm": lambda: GroupNorm(2, 4, affine=False),
    "InstanceNorm": lambda: InstanceNorm(4, affine=False),
    "RunningBatchNorm": lambda: RunningBatchNorm(4, affine=False),
    "averaged backward": lambda: RunningBatchNorm(4, 0.2, rule="per_image", average_backward=True),
    "settled": lambda: RunningBatchNorm(4, 0.2, evaluation_memory=20),
    "BatchChannelNorm": lambda: BatchChannelNorm(4, 2, 0.3, 1e-3),
    "RunningChannelNorm": lambda: RunningChannelNorm(4, 2, eps=1e-3, affine=False, constant_statistics=True),
    "RunningChannelNorm, averaged": lambda: RunningChannelNorm(4, 2, 0.2, rule="per_image", average_backward=True),
    "FilterResponseNorm": lambda: FilterResponseNorm(4), "FilterResponseNorm alone": lambda: FilterResponseNorm(
        4, affine=False, activation=False),
    "EvoNormS0": lambda: EvoNormS0(4, 2), "EvoNormS0 without weights": lambda: EvoNormS0(4, 1, affine=False),
    "BatchRenorm": lambda: BatchRenorm(4, 0.1, 1e-3, affine=False, rmax=2, dmax=1, begin=2, rmax_at=9, dmax_at=7),
    "MomentumBatchNorm": lambda: MomentumBatchNorm(4, 0.3, affine=False, m0=8, steps=15),
    "MABN": lambda: nn.Sequential(CentredConv2d(4, 4, 3, groups=2), MABN(4, 0.3, 1e-3, window=3, warmup=5, r_from=7,
                                                                         limit=2)),
    "nn.BatchNorm2d": lambda: nn.BatchNorm2d(4, momentum=None), "untracked": lambda: nn.BatchNorm2d(
        4, affine=False, track_running_stats=False), "nn.GroupNorm": lambda: nn.GroupNorm(2, 4, affine=False),
    "nn.LayerNorm": lambda: nn.LayerNorm((4, 6, 6)), "nn.LayerNorm of rows": lambda: nn.LayerNorm(6),
    "without bias": lambda: nn.LayerNorm((4, 6, 6), bias=False),
    "nn.InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "nn.InstanceNorm2d, running": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "MaxPool2d": lambda: nn.MaxPool2d(3, 2, 1), "AvgPool2d": lambda: nn.AvgPool2d(2), "AvgPool": AvgPool,
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d((2, 3)), "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(2),
    "GeneralRelu": lambda: GeneralRelu(0.1, 0.2, 1.0), "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh, "GELU": nn.GELU,
    "Softmax": lambda: nn.Softmax(1), "LogSoftmax": lambda: nn.LogSoftmax(-3),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3, 0.5), "Upsample": lambda: nn.Upsample(scale_factor=2),
    "Conv2d": lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), "same": lambda: nn.Conv2d(
        4, 4, 3, padding="same", bias=False), "reflect": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "WSConv2d": lambda: nn.Sequential(WSConv2d(4, 6, 3, 2, (1, 0), groups=2, eps=0.1), GroupNorm(2, 6)),
    "WSConv2d by patches": lambda: nn.Sequential(nn.Conv2d(4, 16, 1), WSConv2d(16, 4, 3, bias=False), BatchNorm(4)),
    "CentredConv2d": lambda: nn.Sequential(CentredConv2d(4, 16, 1), CentredConv2d(16, 4, 3, 2, bias=False)),
    "WSConv2d, reflect": lambda: WSConv2d(4, 4, 3, padding="same", padding_mode="reflect"),
    "SkipInit": lambda: Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), SkipInit(0.5))),
    "SkipInit, flat": lambda: nn.Sequential(nn.Flatten(), SkipInit(-1.0)),
    "Linear of rows": lambda: nn.Linear(6, 5), "Dropout of nothing": lambda: nn.Dropout(0.0),
    "Residual": lambda: Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), BatchNorm(4), nn.ReLU())),
    "shortcut": lambda: Residual(nn.Conv2d(4, 5, 3, 2, 1), nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 5, 1))),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 7), nn.BatchNorm1d(7), nn.LayerNorm(7), LayerNorm(7)),
    "flat, no bias": lambda: nn.Sequential(Lambda(flatten), nn.Linear(144, 7, bias=False), nn.Unflatten(1, (7, 1))),
    "Conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 2, 5, 3), nn.InstanceNorm1d(2)),
    "Conv3d": lambda: nn.Sequential(nn.Unflatten(2, (3, 2)), nn.Conv3d(4, 2, 2), nn.BatchNorm3d(2)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_in_a_stack_is_what_it_is_alone(layer):
    torch.manual_seed(0)
    train(randomly(lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), LAYERS[layer]())), (3, 6, 6), sizes=(3, 2))


@pytest.mark.parametrize("norm", ["none", "BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RunningBatchNorm"])
def test_the_network_of_small_batch_trains_in_a_stack_as_alone(norm):
    sizes = (5, 6) if norm == "BatchNorm" else (2, 3)       # of two values it makes 1 and -1, and rounding as large
    train([build(norm, seed) for seed in (3, 4, 5)], (1, 28, 28), steps=10, sizes=sizes)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_one_image_of_any_stride_is_an_image(onednn, last):
    x = torch.randn(1, 6, 6, 24).permute(0, 3, 1, 2)
    odd = x.as_strided(x.shape, (24, *x.stride()[1:]))      # of one image any stride will do
    conv = GroupedConv2d(24, 6, 3, groups=3)
    if last: channels_last_(conv)
    wanted = [torch.autograd.grad(F.conv2d(x[:, 8 * k:8 * k + 8], conv.weight[2 * k:2 * k + 2]).sum(), conv.weight)[0]
              for k in range(3)]
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(onednn)
    try: close(torch.autograd.grad(conv(odd).sum(), conv.weight)[0], sum(wanted), "gradients")
    finally: torch.backends.mkldnn.set_flags(before)


def test_residual_block_trains_in_a_stack_as_alone():
    train(randomly(lambda: ResidualBlock(4, BatchNorm)), (4, 4, 4), sizes=(4, 2))


def test_one_network_and_a_layer_used_twice():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = train([nn.Sequential(shared, nn.Tanh(), shared)], (3, 5, 5))
    assert net[0] is net[2]


def random_network(rng, c, depth):
    """A network of random layers for maps of `c` channels."""
    layers, eps = [], 0.1       # a map that is nearly constant would make rounding a thousand times as large
    norms = [lambda c: BatchNorm(c, eps=eps), lambda c: RunningBatchNorm(c, eps=eps), lambda c: GroupNorm(2, c, eps),
             lambda c: LayerNorm(eps=eps), InstanceNorm, lambda c: nn.BatchNorm2d(c, eps), nn.Identity,
             lambda c: nn.GroupNorm(1, c, eps), lambda c: FilterResponseNorm(c, eps),
             lambda c: EvoNormS0(c, 2, eps),
             lambda c: RunningBatchNorm(c, 0.3, eps, rule="per_image", average_backward=True),
             lambda c: BatchChannelNorm(c, 2, eps=eps), lambda c: RunningChannelNorm(c, c, eps=eps),
             lambda c: RunningChannelNorm(c, 1, eps=eps, average_backward=True)]
    for _ in range(depth):
        new = rng.choice([2, 4, 6])
        layers.append(nn.Conv2d(c, new, rng.choice([1, 3]), padding=1, bias=rng.random() < 0.5))
        c = new
        norm = rng.choice(norms)
        activation = rng.choice([nn.ReLU, nn.Tanh, GeneralRelu, lambda: nn.LeakyReLU(0.2), nn.Sigmoid])
        layers += rng.sample([norm(c), activation()], 2)
        if rng.random() < 0.3:
            body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c, 0.1), nn.Tanh())
            layers.append(Residual(body, rng.choice([None, nn.Conv2d(c, c, 1)])))
        if rng.random() < 0.3: layers.append(rng.choice([nn.MaxPool2d, nn.AvgPool2d])(2, 1))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("seed", range(10))
def test_random_networks_train_in_a_stack_as_alone(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    depth, k, c = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 3)
    body = random_network(rng, c, depth)
    with torch.no_grad(): features = copy.deepcopy(body)(torch.randn(2, c, 7, 7)).flatten(1).shape[1]
    head = rng.choice([[nn.Flatten(), nn.Linear(features, 3)], [Lambda(flatten), nn.Linear(features, 3, bias=False)],
                       [nn.Flatten(), nn.LayerNorm(features), nn.Linear(features, 3), nn.LogSoftmax(1)]])
    whole = nn.Sequential(body, *head)
    train(randomly(lambda: copy.deepcopy(whole), k), (c, 7, 7), seed=seed, evaluated=rng.randint(2, 6),
          last=rng.random() < 0.5, sizes=[rng.randint(1, 5) for _ in range(4)],
          # at higher rates some diverge, and their rounding too
          optimizers=[lambda p: torch.optim.SGD(p, 0.001, momentum=0.5)] * (k + 1))


# --- rates --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"weight_decay": 0.1},
                                      {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}], ids=str)
def test_each_network_has_its_own_rate(settings):
    rates = [0.0, 0.005, 0.02]
    optimizers = [lambda p, lr=lr: torch.optim.SGD(p, lr, **settings) for lr in rates]
    optimizers.append(lambda p: StackedSGD(p, torch.tensor(rates), **settings))
    make = lambda: nn.Sequential(nn.Conv2d(2, 2, 3), LayerNorm(), nn.Flatten(), nn.Linear(18, 2))      # noqa: E731
    train(randomly(make), (2, 5, 5), optimizers=optimizers)


def test_rates_that_make_no_sense_are_refused():
    p = [torch.zeros(6, requires_grad=True)]
    with pytest.raises(ValueError, match="needs a tensor of rates, one for each network and none below 0"):
        StackedSGD(p, torch.tensor([0.1, -0.1]))
    with pytest.raises(ValueError, match=r"for one rate take runner\.SGD"): StackedSGD(p, 0.1)
    two, four = torch.ones(2), torch.ones(4)
    with pytest.raises(ValueError, match=r"4 rates and parameters of the shapes \[\(6,\)\]"): StackedSGD(p, four)
    with pytest.raises(ValueError, match="Nesterov's way needs a momentum"): StackedSGD(p, two, nesterov=True)


@pytest.mark.parametrize("make", [lambda net: StackedSGD(net.parameters(), torch.tensor([0.1, 0.1])),
                                  lambda net: EigenAdam(net, every=1)], ids=["StackedSGD", "EigenAdam"])
def test_a_step_calls_its_closure_for_the_loss_and_then_moves(make):
    net, x, called = nn.Linear(3, 2), torch.randn(4, 3), []
    opt, before = make(net), [p.detach().clone() for p in net.parameters()]

    def closure():
        called.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss
    hooked = []
    opt.register_step_post_hook(lambda *args: hooked.append(True))
    assert opt.step(closure) > net(x).square().mean()
    assert (called, hooked) == ([True], [True])
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert opt.step() is None


# --- convolutions -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("size", "settings"), [
    (2, {"padding": 1}), (3, {"padding": 1, "bias": False}), (5, {}), (6, {"stride": 3}), ((5, 4), {"padding": (0, 1)}),
    (5, {"padding": 2, "stride": (1, 2)}), (7, {"dilation": 2, "padding": 1}), (5, {"dilation": (1, 2)})], ids=str)
def test_convolutions_by_patches_are_torchs(size, settings, layout):
    torch.manual_seed(0)
    settings = {"stride": 2, **settings}
    torchs, ours = (cls(3 * 64, 6, 3, groups=3, **settings) for cls in (nn.Conv2d, GroupedConv2d))
    ours.load_state_dict(torchs.state_dict())
    for m in (torchs, ours): m.weight.data = m.weight.data.contiguous(memory_format=layout)
    x = torch.randn(2, 192, *(size if isinstance(size, tuple) else (size, size))).requires_grad_()
    assert "ByPatches" in str(ours(x).grad_fn)
    found = []
    for layer in (torchs, ours):
        y = layer(x)
        target = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        found.append([y, *torch.autograd.grad((y * target).sum(), [x, *layer.parameters()])])
        (gx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found[-1] += torch.autograd.grad(gx.square().sum() + layer(x).sum(), [x, *layer.parameters()])
    for a, b in zip(*found, strict=True): close(b, a, settings)


def test_convolutions_of_any_kind_and_layout_are_torchs():
    rng, by_patches_ = random.Random(5), 0

    def two(low, high): return rng.randint(low, high), rng.randint(low, high)
    for trial in range(300):
        k, c, no = rng.randint(1, 4), rng.choice([1, 3, 8, 16, 32]), rng.randint(1, 5)
        settings = {"kernel_size": two(1, 4), "stride": two(1, 3), "padding": two(0, 3), "dilation": two(1, 2)}
        torchs, ours = (cls(k * c, k * no, groups=k, **settings) for cls in (nn.Conv2d, GroupedConv2d))
        ours.load_state_dict(torchs.state_dict())
        ours = ours.to(memory_format=rng.choice([torch.contiguous_format, torch.channels_last]))
        x = torch.randn(rng.randint(1, 9), k * c, *two(1, 7))
        x = x.contiguous(memory_format=rng.choice([torch.contiguous_format, torch.channels_last])).requires_grad_()
        found = []
        for layer in (torchs, ours):
            try: y = layer(x)
            except RuntimeError as e: found.append(str(e))
            else:
                target = torch.randn(y.shape, generator=torch.Generator().manual_seed(trial))
                found.append([y, *torch.autograd.grad((y * target).sum(), [x, *layer.parameters()])])
                by_patches_ += "ByPatches" in str(y.grad_fn)
        if isinstance(found[0], str): assert found[0] == found[1]
        else:
            for a, b in zip(*found, strict=True): close(b, a, settings)
    assert by_patches_ > 20


def test_which_convolutions_go_by_patches():
    assert [by_patches(2, 8, c) for c in (1, 8, 16, 64)] == [False, False, True, True]
    assert not by_patches(9, 9, 64)
    conv = GroupedConv2d(48, 6, 3, groups=3)        # 16 channels for each

    def patched(x): return "ByPatches" in str(conv(x).grad_fn)
    assert patched(torch.randn(2, 48, 4, 4))        # 2 x 4 positions
    assert not patched(torch.randn(2, 48, 6, 4))    # 2 x 8
    assert patched(torch.randn(3, 48, 5, 3))        # 3 x 3
    assert not patched(torch.randn(9, 48, 3, 3))
    assert not patched(torch.randn(48, 4, 4))
    assert conv(torch.randn(0, 48, 4, 4)).shape == (0, 6, 2, 2)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"): conv(torch.randn(2, 48, 1, 2))
    conv.by_rule = False
    assert not patched(torch.randn(2, 48, 4, 4))
    conv.by_rule = True
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(False)
    try: assert not patched(torch.randn(2, 48, 4, 4))
    finally: torch.backends.mkldnn.set_flags(before)
    with torch.autocast("cpu"): assert conv.float()(torch.randn(2, 48, 4, 4).float()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="expected input"): conv(torch.randn(2, 47, 4, 4).float())


@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("norm", ["none", "BatchNorm", "InstanceNorm", "GroupNorm", "LayerNorm", "RunningBatchNorm",
                                  "averaged backward"])
def test_a_network_that_diverges_leaves_its_neighbours_alone(norm, dead):
    if norm != "averaged backward": torch.set_default_dtype(torch.float32)
    recipe = Recipe("RunningBatchNorm", "SGD", 0.1)

    def make(seed): return recipe.build(seed) if norm == "averaged backward" else build(norm, seed)

    def trained(spoilt):
        net, g = stack([make(seed) for seed in (0, 1, 2)]), torch.Generator().manual_seed(0)
        opt = SGD(net.parameters(), lr=0.1)
        for step in range(4):
            xs = torch.randn(3, 2, 1, 28, 28, generator=g)
            if spoilt and step == 1: xs[dead, 0, 0, 3, 4] = float("inf")
            losses = net(side_by_side(xs)).view(2, 3, 10).log_softmax(2)[:, :, 0].sum(0)
            assert losses[dead].isfinite() == (not spoilt or step == 0)
            losses.sum().backward()
            opt.step()
            opt.zero_grad()
        found = [make(0) for _ in range(3)]
        unstack(net, found)
        return found
    for k, (a, b) in enumerate(zip(trained(False), trained(True), strict=True)):
        pairs = list(zip(values(a).values(), values(b).values(), strict=True))
        if k == dead: assert b[0][0].weight.isnan().any()
        elif norm == "averaged backward": assert all(torch.allclose(x, y, 1e-10, 1e-12) for x, y in pairs)   # rounding
        else: assert all(torch.equal(x, y) for x, y in pairs)


# --- what comes in ------------------------------------------------------------------------------------------------

def test_stack_keeps_the_random_state_mode_and_settings():
    norm = RunningBatchNorm(4, 0.05, 1e-3, rule="per_image", average_backward=True)
    models = [nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, groups=1), GeneralRelu(0.1), norm, Lambda(flatten),
                            nn.Linear(4 * 36, 2)).eval()]
    models[0][2].train()
    models[0][0].weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    net = stack(models * 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in net] == [False, False, True, False, False]
    assert not net[0].weight.requires_grad
    assert str(net[2]) == "RunningBatchNorm(8, mom=0.05, eps=0.001, rule='per_image', average_backward=True)"
    assert (net[0].groups, net[1].leak) == (2, 0.1)
    assert isinstance(net[4], GroupedLinear)
    assert stack([m.float() for m in models])(torch.zeros(2, 1, 6, 6, dtype=torch.float32)).dtype == torch.float32


def test_hooks_stay_with_the_models():
    heard = []
    models = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    models[0].register_forward_hook(lambda *args: heard.append(1))
    stack(models)(torch.zeros(3, 4))
    assert not heard
    models[0](torch.zeros(3, 2))
    assert heard == [1]


class Scale(nn.Module):
    """A user's own layer, with a weight per channel."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.weight = channels, nn.Parameter(torch.ones(channels))

    def forward(self, x): return x * self.weight.view(-1, 1, 1)


class Block(nn.Module):
    """A user's own block, of layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), Scale(3)

    def forward(self, x): return torch.relu(self.a(x)) * self.b(x)


class Centre(nn.Module):
    """A user's own layer without parameters, over all of an image."""

    def forward(self, x): return x - x.mean((1, 2, 3), keepdim=True)


@pytest.fixture
def _registered(monkeypatch):
    from experiments.study import stacked
    monkeypatch.setattr(stacked, "_MAKERS", dict(stacked._MAKERS))


@pytest.mark.usefixtures("_registered")
def test_layers_of_ones_own_are_registered():
    def make(): return nn.Sequential(Block(), Centre())
    with pytest.raises(TypeError, match=r"stack can't put Block \(at '0'\) side by side; it takes nn\.Sequential, .*"
                                        r"call experiments\.study\.stacked\.register\(Block, \.\.\.\)"):
        stack([make()])
    register(Block)
    register(Centre, PerImage)
    with pytest.raises(TypeError, match=r"stack can't put Scale \(at '0\.b'\) side by side"): stack([make()])
    register(Scale)
    with pytest.raises(TypeError, match=r"it has \['weight'\] of its own; tell register by what"): stack([make()])
    register(Scale, lambda m, k: Scale(m.channels))
    with pytest.raises(TypeError, match=r"made '0\.b\.weight' of shape \(3,\) and has values of shape \(6,\)"):
        stack([make() for _ in range(2)])
    register(Scale, lambda m, k: nn.Identity())
    with pytest.raises(TypeError, match="must make a layer with the same ones"): stack([make()])
    register(Scale, lambda m, k: Scale(k * m.channels))
    train(randomly(make), (3, 4, 4))


@pytest.mark.parametrize(("layer", "said"), [
    (nn.Dropout(0.5), "what it draws comes from one source of random numbers.*take p=0"),
    (nn.RReLU(), "what it draws comes from one source"),
    (nn.Flatten(0), "it takes images together; use start_dim=1"),
    (nn.Softmax(), r"it has dim=None, which takes images together .*; use dim=1"),
    (Lambda(lambda x: x.mean(1)), "nobody knows what its function does with the channels"),
    (nn.LSTM(2, 2), "it takes nn.Sequential, ")])
def test_stack_refuses_what_it_cannot_put_side_by_side(layer, said):
    with pytest.raises(TypeError, match=rf"stack can't put {type(layer).__name__} \(at '0'\) side by side.*{said}"):
        stack([nn.Sequential(layer)])


def test_stack_refuses_models_that_differ():
    differ = "differ in more than their values; build them with the same settings"
    with pytest.raises(ValueError, match="stack got no models; it needs at least one"): stack([])
    with pytest.raises(ValueError, match=differ): stack([build("GroupNorm", 0), build("BatchNorm", 0)])
    both = r"'0' is RunningBatchNorm\(4, mom=0\.1.* in one and RunningBatchNorm\(4, mom=0\.2"
    with pytest.raises(ValueError, match=both):
        stack([nn.Sequential(RunningBatchNorm(4, mom=0.1)), nn.Sequential(RunningBatchNorm(4, mom=0.2))])
    with pytest.raises(ValueError, match=differ): stack([nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU())])
    with pytest.raises(ValueError, match="in the same mode"): stack([nn.Linear(1, 1), nn.Linear(1, 1).eval()])
    with pytest.raises(ValueError, match="with gradients or without"):
        stack([nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)])
    with pytest.raises(ValueError, match="same shapes, dtypes"): stack([nn.Linear(1, 1), nn.Linear(1, 1).float()])
    trained, new = build("RunningBatchNorm", 0), build("RunningBatchNorm", 1)
    trained(torch.randn(2, 1, 28, 28))
    with pytest.raises(ValueError, match=r"whose '0\.2\.count' differ, .* seen the same number of batches"):
        stack([trained, new])


def test_stack_refuses_a_parameter_that_two_layers_share():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(TypeError, match="layers must not share a parameter"): stack([model])
