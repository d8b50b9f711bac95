"""Convolutions by standardized weights, their swap in a finished model, and SkipInit."""

import copy
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18

import norms.fast.kernels
from norms import GroupNorm, convert_norms
from norms.rivals import CentredConv2d, SkipInit, WSConv2d, convert_convs
from norms.rivals.weight_standardization import standardized
from runner import preflight

ONE = nn.Conv2d(3, 4, 3)
SETTINGS = [{}, {"stride": 2, "padding": (1, 0)}, {"groups": 2, "bias": False}, {"padding": "same", "dilation": 2},
            {"padding": 1, "padding_mode": "reflect"}, {"padding": (2, 1), "padding_mode": "circular"}]


def literal(w, eps):
    """The formula, filter by filter."""
    out = []
    for f in w:
        values = f.flatten()
        mean = sum(values) / len(values)
        std = (sum((v - mean)**2 for v in values) / len(values))**0.5               # biased
        out.append((f - mean) / (std + eps))
    return torch.stack(out)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_convolves_by_the_standardized_weight(settings, eps):
    conv = WSConv2d(4, 6, 3, eps=eps, **settings).double()
    plain = nn.Conv2d(4, 6, 3, **settings).double()
    plain.load_state_dict(conv.state_dict())
    assert repr(conv) == f"WS{repr(plain)[:-1]}, eps={eps})"
    x, found = torch.randn(3, 4, 7, 6, dtype=torch.float64), []
    for call in (conv, lambda x: plain._conv_forward(x, literal(plain.weight, eps), plain.bias)):
        leaf = x.clone().requires_grad_()
        parameters = (conv if call is conv else plain).parameters()
        y = call(leaf)
        found.append([y, *torch.autograd.grad((y * y.detach().cos()).sum(), [leaf, *parameters])])
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(conv(x[0]), conv(x)[0])
    assert torch.autograd.gradcheck(lambda w: standardized(w, eps), conv.weight, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda w: standardized(w, eps), conv.weight, fast_mode=True)


def test_each_filter_has_mean_0_and_std_1():
    w = standardized(torch.randn(5, 3, 3, 3, dtype=torch.float64) * 7 + 2)
    torch.testing.assert_close(w.mean((1, 2, 3)), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(w.std((1, 2, 3), correction=0), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-5)
    # The authors' program divides by n - 1.
    unbiased = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    theirs = (unbiased - unbiased.mean((1, 2, 3), keepdim=True)) / (unbiased.std((1, 2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(standardized(unbiased), theirs * (27 / 26)**0.5, rtol=1e-6, atol=1e-6)


def test_values_and_gradients_are_timm_s():
    timm, x = pytest.importorskip("timm.layers"), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    ours = WSConv2d(4, 6, 3, eps=0, stride=2, padding=1, groups=2).double()
    theirs = timm.StdConv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True, eps=1e-30).double()
    scaled = timm.ScaledStdConv2d(4, 6, 3, stride=2, padding=1, groups=2, eps=1e-30).double()
    scaled.gain.data.fill_(18**0.5)                     # of the fan-in, by which it divides
    found = []
    for m in (theirs, scaled): m.load_state_dict(ours.state_dict(), strict=False)
    for m in (ours, theirs, scaled):
        y = m(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [m.weight, m.bias])])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_filter_of_equal_weights_is_0_and_its_gradient_finite(dtype):
    w = torch.zeros(3, 4, 3, 3, dtype=dtype)
    w[1], w[2] = 0.5, torch.randn(4, 3, 3).to(dtype)
    w.requires_grad_()
    out = standardized(w)
    assert out.dtype == dtype
    assert not out[:2].any()
    (out * torch.randn_like(out)).sum().backward()
    assert w.grad.isfinite().all()
    assert w.grad[0].any()              # it can leave


def test_half_precision_weights_are_standardized_in_float32():
    w = torch.randn(4, 64, 3, 3) * 0.05 + 3
    assert torch.equal(standardized(w.bfloat16()), standardized(w.bfloat16().float()).bfloat16())
    conv = WSConv2d(3, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16): y = conv(torch.randn(2, 3, 5, 5))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_a_step_between_forward_and_backward_changes_no_gradient():
    for layer, shape in ((WSConv2d(3, 4, 3), (2, 3, 5, 5)), (SkipInit(0.5), (2, 3))):
        x, found = torch.randn(shape), []
        for moved in (False, True):
            leaf, m = x.clone().requires_grad_(), copy.deepcopy(layer)
            y = m(leaf).square().sum()
            if moved:
                with torch.no_grad():
                    for p in m.parameters(): p.mul_(2).add_(1)
            found.append(torch.autograd.grad(y, [leaf, *m.parameters()]))
        for a, b in zip(*found, strict=True): assert torch.equal(a, b)


@pytest.mark.one_route
def test_both_compile_into_one_graph_and_are_one_node_to_a_tracer():
    torch._dynamo.reset()
    model = nn.Sequential(WSConv2d(3, 4, 3), GroupNorm(2, 4), SkipInit(0.5))
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 5, 5)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for f in (model, compiled): f(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
    graph = torch.fx.symbolic_trace(model)
    assert "0" in {node.target for node in graph.graph.nodes if node.op == "call_module"}
    with torch.no_grad(): model[0].weight.mul_(2).add_(torch.randn(4, 3, 3, 3))
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize(("make", "text"), [
    (lambda: WSConv2d(3, 3, 1, groups=3), "3 channels in 3 groups and a kernel of 1x1, one weight for .* nn.Conv2d"),
    (lambda: WSConv2d(3, 3, 3, eps=-1), "eps is -1; it must be a number of at least 0"),
    (lambda: WSConv2d(3, 4, 3, groups=2), "in_channels must be divisible by groups")])
def test_settings_that_make_no_sense(make, text):
    with pytest.raises(ValueError, match=text): make()


# --- convert_convs ----------------------------------------------------------------------------------------------------

def test_a_resnet_there_and_back():
    model = resnet18()
    x, before, kept = torch.randn(2, 3, 32, 32), copy.deepcopy(model), dict(model.named_parameters())
    state = torch.random.get_rng_state()
    assert convert_convs(model, WSConv2d) == {"Conv2d": 20}
    assert torch.equal(torch.random.get_rng_state(), state)
    convert_norms(model, lambda nf: GroupNorm(4, nf))
    assert all(p is kept[k] for k, p in model.named_parameters())
    assert [k for k, _ in model.named_parameters()] == list(kept)
    assert sum(type(m) is WSConv2d for m in model.modules()) == 20
    assert model(x).isfinite().all()
    found = preflight(model, torch.randn(2, 3, 64, 64))
    assert found.ok
    assert {f.level for f in found.findings} == {"ok"}
    convert_norms(model, nn.BatchNorm2d)
    assert convert_convs(model, nn.Conv2d) == Counter({"WSConv2d": 20})
    assert repr(model) == repr(before)
    assert torch.equal(model.eval()(x), before.eval()(x))


def test_settings_modes_sharing_and_types_are_kept():
    shared = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect").eval()
    tied = nn.Conv2d(4, 4, 3, stride=2, dilation=(1, 2), groups=2, bias=False)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ModuleDict({"a": tied, "b": shared}),
                          nn.Conv2d(4, 4, 3, padding="same"), nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)).double()
    model[4].weight = shared.weight
    shared.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    answer = convert_convs(model, partial(WSConv2d, eps=0.5))
    assert answer == {"Conv2d": 3}
    assert answer.left_alone == {"Conv1d": 1, "ConvTranspose2d": 1}
    assert repr(pickle.loads(pickle.dumps(answer))) == repr(answer)
    assert model[0] is model[2] is model[3]["b"]
    assert model[4].weight is model[0].weight
    assert [m.training for m in model[:5]] == [False, True, False, True, True]
    assert not model[0].weight.requires_grad
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    for i in (0, 4):
        a, b = model[i](x), before[i]._conv_forward(x, standardized(before[i].weight, 0.5), before[i].bias)
        torch.testing.assert_close(a, b)
    assert convert_convs(model, WSConv2d) == {"WSConv2d": 3}
    assert model[0].eps == 0.5
    assert convert_convs(model, CentredConv2d) == {"WSConv2d": 3}
    assert convert_convs(model, nn.Conv2d) == {"CentredConv2d": 3}
    assert repr(model) == repr(before)


def test_what_cannot_be_swapped_without_loss_is_refused_and_nothing_changes():
    class Own(nn.Conv2d):
        def forward(self, x): return super().forward(x) + 1
    hooked = nn.Conv2d(3, 4, 3)
    hooked.register_forward_hook(lambda *args: None)
    cases = [(Own(3, 4, 3), "a forward of its own"), (hooked, "has hooks"),
             (parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "is parametrized"),
             (nn.LazyConv2d(4, 3), "doesn't know its channels yet"),
             (nn.Conv2d(3, 3, 1, groups=3), "the factory refuses it: WSConv2d got 3 channels in 3 groups")]
    for layer, text in cases:
        model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Sequential(layer))
        with pytest.raises(ValueError, match=rf"convert_convs: layer '1\.0' \({type(layer).__name__}\).*{text}"):
            convert_convs(model, WSConv2d)
        assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(("model", "factory", "error", "text"), [
    (nn.Conv2d(3, 4, 3), WSConv2d, ValueError, "got a Conv2d itself; .*nn.Sequential"),
    (nn.Sequential(nn.Conv1d(3, 4, 3)), WSConv2d, ValueError, r"no convolution to swap in Sequential \(it leaves "),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), WSConv2d(3, 4, 3), TypeError, "it needs a class that takes what nn.Conv2d "),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), 3, TypeError, "got factory=3"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), lambda nf: nn.Conv2d(nf, nf, 1), TypeError, "layer '0'.*raised a TypeError"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), lambda *a, **k: nn.Identity(), TypeError, r"makes Identity\(\)"),
    (nn.Sequential(nn.Conv2d(3, 4, 3)), lambda *a, **k: nn.Conv2d(3, 4, 1), ValueError,
     r"weight of shape \(4, 3, 3, 3\) and a bias, which the factory's Conv2d\(3, 4, kernel_size=\(1, 1\)"),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)), lambda *a, **k: ONE, ValueError,
     "gives the same module twice")])
def test_arguments_that_make_no_sense(model, factory, error, text):
    with pytest.raises(error, match=text): convert_convs(model, factory)


def test_devices_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, device="meta"))
    convert_convs(model, WSConv2d)
    assert model[0].weight.is_meta


# --- SkipInit ---------------------------------------------------------------------------------------------------------

def test_a_block_begins_as_the_identity_and_learns():
    scale = SkipInit()
    branch, x = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), scale), torch.randn(2, 4, 5, 5)
    assert torch.equal(x + branch(x), x)
    F.mse_loss(x + branch(x), torch.randn_like(x)).backward()
    assert scale.scale.grad.abs() > 0
    assert not branch[0].weight.grad.any()
    assert scale.scale.shape == (1,)
    assert list(scale.state_dict()) == ["scale"]


def test_skip_init_multiplies_in_the_input_s_type():
    scale = SkipInit(0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(2, 3).to(dtype)
        assert torch.equal(scale(x), x / 2)
    assert repr(scale) == "SkipInit(init=0.5)"
    with torch.no_grad(): scale.scale.fill_(3)
    scale.reset_parameters()
    assert scale.scale.tolist() == [0.5]
    assert SkipInit(dtype=torch.float64, device="meta").scale.is_meta
    with pytest.raises(TypeError, match=r"got init='a'; it needs the number"): SkipInit("a")


# --- by the kernels -----------------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(not hasattr(norms.fast.kernels.KERNELS.get(torch.float64), "standardize"),
                                   reason="the norms' kernels are not built here")
SHAPES = [(5, 3, 3, 3), (70, 2, 1, 1), (1, 4, 2, 3), (4, 1, 3, 1)]


def by_definition(f):
    """`f()` without the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms.fast.kernels, "KERNELS", {})
        return f()


def gradients(weight, g, eps, twice=False):
    """The standardized weight of a convolution that has this one, and the gradient for `g`; or that one's own."""
    conv = WSConv2d(weight.shape[1], len(weight), weight.shape[2:], bias=False, eps=eps, dtype=weight.dtype)
    conv.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    g = g.clone().requires_grad_()
    taken = []
    conv._conv_forward = lambda x, w, b: taken.append(w) or w
    w = conv(torch.zeros(1, weight.shape[1], 8, 8, dtype=weight.dtype))
    found, = torch.autograd.grad(w, conv.weight, g, create_graph=twice)
    if not twice: return w.detach(), found
    return torch.autograd.grad(found.square().sum(), (conv.weight, g))


@needs_kernels
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_give_what_the_definition_gives(shape, eps, last):
    rng = torch.Generator().manual_seed(0)
    weight, g = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    if last: weight = weight.contiguous(memory_format=torch.channels_last)
    for twice in (True, False):
        if not twice: weight[0] = 0.7               # a filter without a spread, which has no second derivative
        ours = gradients(weight, g, eps, twice)
        for a, b in zip(ours, by_definition(lambda: gradients(weight, g, eps, twice)), strict=True):  # noqa: B023
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert "_Standardize" in str(WSConv2d(3, 4, 3, dtype=torch.float64)(torch.randn(1, 3, 4, 4).double()).grad_fn
                                 .next_functions)


@needs_kernels
def test_the_kernels_take_float32_and_leave_half_precision_to_the_definition():
    weight = torch.randn(6, 4, 3, 3) * 0.05 + 3
    ours = gradients(weight, torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), 1e-5)
    exact = by_definition(lambda: gradients(weight.double(), torch.randn(
        weight.shape, generator=torch.Generator().manual_seed(1)).double(), 1e-5))
    for a, b in zip(ours, exact, strict=True): torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    conv = WSConv2d(4, 6, 3, dtype=torch.bfloat16)
    assert conv(torch.randn(1, 4, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@needs_kernels
def test_the_weight_may_be_written_before_the_backward_pass_as_by_the_definition():
    def go(twice):
        torch.manual_seed(0)
        conv = WSConv2d(3, 4, 3, dtype=torch.float64)
        y = conv(torch.randn(2, 3, 6, 6, dtype=torch.float64))
        with torch.no_grad(): conv.weight.normal_(generator=torch.Generator().manual_seed(2))
        found, = torch.autograd.grad(y.square().sum(), conv.weight, create_graph=twice)
        return torch.autograd.grad(found.square().sum(), conv.weight)[0] if twice else found
    for twice in (False, True): torch.testing.assert_close(go(twice), by_definition(lambda: go(twice)))  # noqa: B023


@needs_kernels
def test_many_gradients_in_one_vmap_and_forward_mode_are_the_definitions():
    torch.manual_seed(0)
    conv, x = WSConv2d(3, 4, 3, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def go():
        y = conv(x)
        many, = torch.autograd.grad(y, conv.weight, torch.eye(3, dtype=torch.float64)[:, :2, None, None, None].expand(
            3, 2, 4, 4, 4), is_grads_batched=True)
        params = {name: p.detach() for name, p in conv.named_parameters()}
        each = torch.func.vmap(torch.func.grad(lambda p, xi: torch.func.functional_call(
            conv, p, (xi[None],)).square().sum()), (None, 0))(params, x)
        _, forward = torch.func.jvp(lambda w: torch.func.functional_call(conv, {"weight": w}, (x,)),
                                    (params["weight"],), (torch.ones_like(params["weight"]) * x[0, 0, 0, 0],))
        return many, each["weight"], forward
    for a, b in zip(go(), by_definition(go), strict=True): torch.testing.assert_close(a, b)


@needs_kernels
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_convolution_takes_the_same_way_again(reentrant, monkeypatch):
    torch.manual_seed(0)
    conv = WSConv2d(3, 4, 3, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    expected, = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    y = checkpoint(conv, x, use_reentrant=reentrant)
    monkeypatch.setattr(norms.fast.kernels, "GRAIN", 1)                     # now the kernels would not be taken
    monkeypatch.setattr(norms.fast.kernels, "THREADS", 0)
    y.square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, expected)
