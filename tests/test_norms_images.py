"""The closed forms of the per-image norms, by the project's kernels and by torch's, against the plain formula."""

import pytest
import torch

from norms import GroupNorm, InstanceNorm
from norms.images import normalise_groups, plain

pytestmark = pytest.mark.usefixtures("kernels")

CASES = [  # shape of x, groups, shape of weight and bias
    ((3, 6), 2, (6,)), ((3, 6, 5), 1, (6,)), ((2, 6, 3, 4), 3, (6,)), ((2, 6, 3, 4), 6, (6,)),
    ((2, 6, 3, 4), 1, ()), ((2, 6, 3, 4), 3, ()), ((3, 6), 1, ()), ((2, 6, 3, 4), 1, (6, 3, 4)),
    ((2, 4, 2, 3, 2), 2, (4,)), ((2, 6, 3, 4), 2, None), ((1, 6, 3, 4), 1, (6, 3, 4)),
]


def affine(shape):
    if shape is None: return []
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize(("shape", "groups", "of"), CASES)
def test_closed_form_equals_plain_in_values_and_gradients(shape, groups, of, kernels):
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 7).requires_grad_()
    inputs = [x, *affine(of)]
    g = torch.randn(shape, dtype=torch.float64)
    fused, reference = (f(x, groups, 1e-5, *inputs[1:]) for f in (normalise_groups, plain))
    assert type(fused.grad_fn).__name__ == {"own": "_KernelStepBackward", "torch's": "_FusedBackward"}[kernels]
    torch.testing.assert_close(fused, reference, rtol=1e-11, atol=1e-11)
    for a, b in zip(*(torch.autograd.grad(y, inputs, g) for y in (fused, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("shape", "groups", "of"), CASES)
def test_closed_form_passes_gradcheck_twice(shape, groups, of):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True), *affine(of)]

    def f(x, *wb): return normalise_groups(x, groups, 0.1, *wb)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_second_derivatives_with_frozen_parts():
    """With an input or an affine map that wants no gradient, the others' second derivatives are still there."""
    data = [torch.randn(2, 6, 3, dtype=torch.float64), *(t.detach() for t in affine((6,)))]
    for wants in ((True, False, False), (False, True, True)):
        seconds = []
        for f in (normalise_groups, plain):
            inputs = [t.clone().requires_grad_(want) for t, want in zip(data, wants, strict=True)]
            free = [t for t in inputs if t.requires_grad]
            first = torch.autograd.grad(f(inputs[0], 3, 0.1, *inputs[1:]).pow(3).sum(), free, create_graph=True)
            seconds.append(torch.autograd.grad(sum(t.pow(2).sum() for t in first), free))
        for a, b in zip(*seconds, strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", [GroupNorm(4, 4), InstanceNorm(4, eps=1e-5)])
def test_one_value_per_statistic_gives_exactly_the_bias(norm):
    torch.nn.init.constant_(norm.bias, 0.3)
    y = norm(torch.randn(5, 4, 1, 1) * 1e4)
    assert torch.equal(y, norm.bias.view(1, 4, 1, 1).expand_as(y))
