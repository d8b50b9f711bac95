"""The four norms with a torch counterpart equal it in float64: output, gradients, buffers, state dict."""

import pytest
import torch
from torch import nn

from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = {2: (6, 4), 3: (3, 4, 3), 4: (2, 4, 2, 3), 5: (2, 4, 1, 3, 2)}
BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
INSTANCE = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def pairs(ndim):
    shape = SHAPES[ndim]
    yield "batch", BatchNorm(4, mom=0.3), BATCH[ndim](4, momentum=0.3)
    yield "group", GroupNorm(2, 4), nn.GroupNorm(2, 4)
    yield "group without affine", GroupNorm(4, 4, affine=False), nn.GroupNorm(4, 4, affine=False)
    yield "layer", LayerNorm(shape[1:]), nn.LayerNorm(shape[1:])
    if ndim > 2: yield "instance", InstanceNorm(4, eps=1e-5), INSTANCE[ndim](4, affine=True)


CASES = [pytest.param(n, *pair[1:], id=f"{pair[0]}-{n}d") for n in SHAPES for pair in pairs(n)]


@pytest.mark.parametrize(("ndim", "ours", "theirs"), CASES)
def test_train_and_eval_equal_torch_over_steps(ndim, ours, theirs):
    ours, theirs = ours.double(), theirs.double()
    for p in theirs.parameters(): nn.init.normal_(p)
    assert ours.load_state_dict(theirs.state_dict()) is not None
    for step in range(6):
        for m in (ours, theirs): m.train(step not in (3, 5))
        x = torch.randn(SHAPES[ndim], dtype=torch.float64) * 3 + 5
        g = torch.randn_like(x)
        results = []
        for m in (ours, theirs):
            xi = x.clone().requires_grad_()
            y = m(xi)
            results.append([y, *torch.autograd.grad(y, [xi, *m.parameters()], g)])
        for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        a, b = ours.state_dict(), theirs.state_dict()
        assert list(a) == list(b)
        for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("ndim", "ours", "theirs"), CASES)
def test_first_and_second_derivatives_pass_gradcheck(ndim, ours, theirs):
    ours = ours.double().train()
    x = torch.randn(SHAPES[ndim], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x,))
    assert torch.autograd.gradgradcheck(ours, (x,))


def test_layernorm_scalar_affine_equals_torch_with_filled_affine():
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    ours = LayerNorm().double()
    nn.init.constant_(ours.weight, 1.7)
    nn.init.constant_(ours.bias, -0.3)
    full = torch.full((4, 5, 5), 1.7, dtype=torch.float64), torch.full((4, 5, 5), -0.3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), nn.functional.layer_norm(x, (4, 5, 5), *full), rtol=0, atol=1e-12)


def test_hand_computed_batch_of_two():
    # Values 1 and 3: mean 2, biased variance 1, unbiased 2. With mom 0.1 and eps 0 the outputs are -1 and 1.
    m = BatchNorm(1, eps=0.0)
    y = m(torch.tensor([[1.0], [3.0]]))
    assert y.flatten().tolist() == [-1.0, 1.0]
    torch.testing.assert_close(m.running_mean, torch.tensor([0.2]))
    torch.testing.assert_close(m.running_var, torch.tensor([0.9 + 0.1 * 2]))


def test_batchnorm_on_one_value_keeps_running_var_and_gives_bias():
    m = BatchNorm(3)
    nn.init.constant_(m.bias, 0.5)
    assert m(torch.randn(1, 3)).tolist() == [[0.5, 0.5, 0.5]]
    assert m.running_var.tolist() == [1, 1, 1]
    assert m.num_batches_tracked == 1
