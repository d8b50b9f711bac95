"""The norms that hold their own activation: FilterResponseNorm and EvoNormS0."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from norms import BatchNorm, GroupNorm, RunningBatchNorm, convert_norms
from norms.rivals import EvoNormS0, FilterResponseNorm

SHAPES = [(2, 6), (3, 6, 7), (2, 6, 5, 4), (1, 6, 2, 3, 4), (2, 6, 1, 1)]
MAKES = {"filter response": FilterResponseNorm, "filter response alone": partial(FilterResponseNorm, activation=False),
         "filter response, eps 1e-2": lambda nf: FilterResponseNorm(nf, 1e-2), "evonorm": lambda nf: EvoNormS0(nf, 3),
         "evonorm of channels": lambda nf: EvoNormS0(nf, nf), "evonorm of images": lambda nf: EvoNormS0(nf, 1, 1e-2)}


def drawn(make, nf=6):
    """A norm in float64 whose parameters are random."""
    norm = make(nf).double()
    for p in norm.parameters(): nn.init.normal_(p, 0.5)
    return norm


def literal(norm, x):
    """The published formula, value by value."""
    weight, bias, out = norm.weight, norm.bias, []
    for image in x:                                                         # (C, *spatial)
        for c in range(len(image)):
            if isinstance(norm, FilterResponseNorm):
                nu2 = sum(v**2 for v in image[c].flatten()) / image[c].numel()
                z = weight[c] * image[c] / (nu2 + norm.eps)**0.5 + bias[c]
                out.append(z if norm.tau is None else torch.where(z > norm.tau[c], z, norm.tau[c]))
            else:
                size = len(image) // norm.groups
                group = image[c // size * size:c // size * size + size]
                var = ((group - group.mean())**2).mean()
                swish = image[c] / (1 + (-norm.v[c] * image[c]).exp())
                out.append(swish / (var + norm.eps)**0.5 * weight[c] + bias[c])
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAKES)
def test_values_and_gradients_are_the_formula_s(name, shape):
    norm = drawn(MAKES[name])
    x, found = torch.randn(shape, dtype=torch.float64) * 2 + 0.7, []
    g = torch.randn_like(x)
    for call in (norm, partial(literal, norm), copy.deepcopy(norm).eval()):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        parameters = call.parameters() if isinstance(call, nn.Module) else norm.parameters()
        found.append([y, *torch.autograd.grad(y, [leaf, *parameters], g)])
    for got in (found[0], found[2]):
        for a, b in zip(got, found[1], strict=True): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(norm, (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(norm, (leaf,), fast_mode=True)


def test_values_and_gradients_are_timm_s(monkeypatch):
    timm = pytest.importorskip("timm.layers")
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t)         # it takes its statistics in float32
    pairs = [(FilterResponseNorm(6, 1e-5), timm.FilterResponseNormTlu2d(6)),
             (FilterResponseNorm(6, 1e-5, activation=False), timm.FilterResponseNormTlu2d(6, apply_act=False)),
             (EvoNormS0(6, 3), timm.EvoNorm2dS0(6, 3)), (EvoNormS0(64), timm.EvoNorm2dS0(64))]
    for ours, theirs in pairs:
        ours, theirs = ours.double(), theirs.double()
        assert {k: v.tolist() for k, v in ours.state_dict().items()} == {
            k: v.tolist() for k, v in theirs.state_dict().items()}                  # both as made
        for p in ours.parameters(): nn.init.normal_(p, 0.5)
        theirs.load_state_dict(ours.state_dict())
        x, found = torch.randn(3, len(ours.weight), 4, 5, dtype=torch.float64) * 2 + 1, []
        g = torch.randn_like(x)
        for m in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y, named = m(leaf), dict(m.named_parameters())
            found.append([y, *torch.autograd.grad(y, [leaf, *(named[k] for k in sorted(named))], g)])
        for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_as_made_the_threshold_is_a_relu_and_evonorm_a_swish():
    x = torch.randn(2, 8, 3, 3)
    bare = FilterResponseNorm(8, activation=False)
    assert torch.equal(FilterResponseNorm(8)(x), bare(x).relu())
    torch.testing.assert_close(bare(x).square().mean((2, 3)), torch.ones(2, 8), rtol=1e-3, atol=1e-3)
    std = x.view(2, 4, -1).std(2, correction=0).repeat_interleave(2, 1)[..., None, None]
    torch.testing.assert_close(EvoNormS0(8, 4)(x), nn.SiLU()(x) / std, rtol=1e-3, atol=1e-3)


def test_whether_there_is_an_activation_is_said():
    assert FilterResponseNorm.activates
    assert FilterResponseNorm(4).activates
    assert EvoNormS0(4, 2).activates
    assert not FilterResponseNorm(4, activation=False).activates
    assert not GroupNorm(2, 4).activates
    assert [k for k, _ in FilterResponseNorm(4, activation=False).named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e8])
def test_one_value_per_statistic_gives_its_sign(size):
    x = torch.tensor([[-2.0, 3.0], [5.0, -7.0]]) * size
    norm = FilterResponseNorm(2, 1e-12, activation=False)
    assert norm(x).sign().equal(x.sign())
    for y in (norm(x), norm(x[..., None, None]).flatten(1)): torch.testing.assert_close(y, x.sign(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MAKES)
def test_no_value_of_another_image_plays_a_part(name):
    norm, x = drawn(MAKES[name]), torch.randn(4, 6, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(norm(x), torch.cat([norm(one[None]) for one in x]), rtol=1e-12, atol=1e-12)


# --- convert_norms ----------------------------------------------------------------------------------------------------

CONVERTED = {"filter response": FilterResponseNorm, "evonorm": lambda nf: EvoNormS0(nf, 2)}


def network(norm, act=nn.ReLU):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), act(), nn.Conv2d(4, 6, 3), norm(6), act()).double()


@pytest.mark.parametrize("other", [nn.BatchNorm2d, BatchNorm, RunningBatchNorm, lambda nf: GroupNorm(2, nf),
                                   lambda nf: nn.GroupNorm(2, nf), lambda nf: nn.InstanceNorm2d(nf, affine=True)])
@pytest.mark.parametrize("name", CONVERTED)
def test_there_and_back_the_affine_map_stays_and_activations_too(name, other):
    make = CONVERTED[name]
    model = network(other)
    for p in model.parameters(): nn.init.normal_(p, 0.5)
    kind, before = type(model[1]).__name__, copy.deepcopy(model).eval()
    kept = {k: p for k, p in model.named_parameters()}
    assert convert_norms(model, make) == {kind: 2}
    new = make(1 if name == "filter response" else 2)
    assert type(model[1]) is type(new)
    assert model[1].eps == new.eps
    assert isinstance(model[2], nn.ReLU)
    extra = "tau" if name == "filter response" else "v"
    assert dict(model.named_parameters()).keys() == kept.keys() | {f"1.{extra}", f"4.{extra}"}
    assert all(dict(model.named_parameters())[k] is p for k, p in kept.items())
    assert getattr(model[1], extra).dtype == torch.float64
    assert model(torch.randn(2, 3, 8, 8, dtype=torch.float64)).min() >= 0
    getattr(model[4], extra).data.fill_(3)
    assert convert_norms(model, other) == {type(new).__name__: 2}
    assert all(dict(model.named_parameters())[k] is p for k, p in kept.items())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), before(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CONVERTED)
def test_one_of_a_class_takes_all_of_another(name):
    make, model = CONVERTED[name], network(CONVERTED[name], nn.Identity)
    for p in model.parameters(): nn.init.normal_(p, 0.5)
    for m in (model[1], model[4]): m.eps = 0.25
    kept, x = dict(model.named_parameters()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    y = model(x)
    assert convert_norms(model, make) == {type(model[1]).__name__: 2}
    assert all(p is kept[k] for k, p in model.named_parameters())
    assert torch.equal(model(x), y)


def test_to_a_filter_response_norm_without_activation_and_back():
    model = network(nn.BatchNorm2d)
    convert_norms(model, partial(FilterResponseNorm, activation=False))
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in network(nn.BatchNorm2d).named_parameters()]
    convert_norms(model, FilterResponseNorm)
    model[1].tau.data.fill_(7)
    convert_norms(model, partial(FilterResponseNorm, activation=False))
    assert model[1].tau is None
    assert not model[1].activates


def test_what_has_parameters_of_its_own_is_still_refused():
    model = nn.Sequential(FilterResponseNorm(4))
    model[0].register_parameter("more", nn.Parameter(torch.ones(4)))
    with pytest.raises(ValueError, match=r"layer '0' \(FilterResponseNorm\) is parametrized"):
        convert_norms(model, BatchNorm)
