"""The norms per image, by their kernels and by their definitions: values, derivatives, layouts, degenerate inputs."""

import pytest
import torch

from norms import GroupNorm, InstanceNorm, LayerNorm

pytestmark = pytest.mark.usefixtures("kernels")

CASES = [  # shape of x, the norm
    ((3, 6), lambda: GroupNorm(2, 6)), ((3, 4, 3), lambda: GroupNorm(1, 4)), ((2, 6, 2, 3), lambda: GroupNorm(3, 6)),
    ((2, 4, 2, 3), lambda: InstanceNorm(4)), ((2, 4, 2, 3), lambda: InstanceNorm(4, affine=False)),
    ((2, 4, 2, 3), lambda: LayerNorm()), ((3, 6), lambda: LayerNorm()), ((2, 4, 2, 3), lambda: LayerNorm(affine=False)),
    ((2, 4, 2, 3), lambda: LayerNorm((4, 2, 3))), ((2, 4, 2, 3), lambda: LayerNorm((2, 3))),
    ((2, 4, 2, 3), lambda: LayerNorm(3)), ((2, 4, 1, 3, 2), lambda: GroupNorm(2, 4)),
    ((2, 4, 2, 3), lambda: GroupNorm(2, 4, affine=False)), ((1, 4, 2, 3), lambda: LayerNorm((4, 2, 3))),
]


def drawn(make):
    norm = make().double()
    norm.eps = 0.1
    for p in norm.parameters(): torch.nn.init.normal_(p)
    return norm


def by_hand(norm, x):
    """The formula, on the values behind each mean and variance."""
    groups = norm.statistic_groups(x)
    var, mean = torch.var_mean(groups, 1, correction=0, keepdim=True)
    y = ((groups - mean) / (var + norm.eps).sqrt()).view(x.shape)
    if norm.weight is None: return y
    channels = not isinstance(norm, LayerNorm)
    shape = (-1, *[1] * (x.ndim - 2)) if channels else norm.weight.shape
    return y * norm.weight.view(shape) + norm.bias.view(shape)


@pytest.mark.parametrize(("shape", "make"), CASES)
def test_values_and_gradients_equal_the_formula(shape, make, kernels):
    x, norm = (torch.randn(shape, dtype=torch.float64) * 3 + 7).requires_grad_(), drawn(make)
    inputs, g = [x, *norm.parameters()], torch.randn(shape, dtype=torch.float64)
    ours, reference = norm(x), by_hand(norm, x)
    assert (type(ours.grad_fn).__name__ == "_GroupStepBackward") == (kernels == "kernels")
    torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)
    for a, b in zip(*(torch.autograd.grad(y, inputs, g) for y in (ours, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "make"), CASES)
def test_first_and_second_derivatives_pass_gradcheck(shape, make):
    norm = drawn(make)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True), *norm.parameters()]

    def f(x, *wb): return torch.func.functional_call(norm, dict(zip(("weight", "bias"), wb, strict=False)), (x,))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_second_derivatives_with_frozen_parts():
    """With an input or an affine map that wants no gradient, the others' second derivatives are still there."""
    norm, x = drawn(lambda: GroupNorm(3, 6)), torch.randn(2, 6, 3, dtype=torch.float64)
    for wants in ((True, False), (False, True)):
        seconds = []
        for f in (norm, lambda x: by_hand(norm, x)):
            leaf = x.clone().requires_grad_(wants[0])
            norm.requires_grad_(wants[1])
            free = [t for t in (leaf, *norm.parameters()) if t.requires_grad]
            first = torch.autograd.grad(f(leaf).pow(3).sum(), free, create_graph=True)
            seconds.append(torch.autograd.grad(sum(t.pow(2).sum() for t in first), free, allow_unused=True))
        for a, b in zip(*seconds, strict=True):
            if a is not None or b is not None: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [GroupNorm(4, 4), InstanceNorm(4, eps=1e-5)])
def test_one_value_per_statistic_gives_exactly_the_bias(norm):
    torch.nn.init.constant_(norm.bias, 0.3)
    y = norm(torch.randn(5, 4, 1, 1) * 1e4)
    assert torch.equal(y, norm.bias.view(1, 4, 1, 1).expand_as(y))


def test_a_layer_norm_over_features_looks_at_one_position_only():
    norm, x = LayerNorm(16), torch.randn(4, 7, 16)
    other = x.clone()
    other[:, 3:] = 5                                                # what comes later is another text
    assert torch.equal(norm(x)[:, :3], norm(other)[:, :3])
