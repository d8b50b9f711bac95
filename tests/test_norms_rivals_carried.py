"""What BatchRenorm, MomentumBatchNorm and MABN take over in a conversion and a recalibration, and give back."""

import pytest
import torch
from torch import nn

from norms import BatchNorm, convert_norms, recalibrate
from norms.rivals import MABN, BatchRenorm, MomentumBatchNorm


def trained(norm, steps=40):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), norm(3))
    for _ in range(steps): model(torch.randn(4, 2, 3, 3) * 2 + 1)
    return model.eval()


@pytest.mark.parametrize("rival", [BatchRenorm, MomentumBatchNorm, MABN])
@pytest.mark.parametrize("plain", [nn.BatchNorm2d, BatchNorm])
def test_there_and_back_evaluation_stays_or_becomes_that_of_second_moments(rival, plain):
    model, x = trained(plain), torch.randn(5, 2, 3, 3)
    old, h = model[1], model[0](x)
    before, square = model(x), (old.running_var + old.running_mean.square()).view(-1, 1, 1)
    assert convert_norms(model, rival) == {plain.__name__: 1}
    new, there = model[1], model(x)
    torch.testing.assert_close(there, h / (square + old.eps).sqrt() if rival is MABN else before)
    assert new.num_batches_tracked == 40
    if rival is MomentumBatchNorm: assert torch.equal(new.train_mean, old.running_mean)
    if rival is MABN: torch.testing.assert_close(new.square_window[:, 3], square.flatten())
    assert convert_norms(model, plain) == {rival.__name__: 1}
    torch.testing.assert_close(model(x), there)
    assert model[1].weight is old.weight


@pytest.mark.parametrize("rival", [BatchRenorm, MomentumBatchNorm, MABN])
def test_recalibration_gives_the_moments_of_all_images_and_leaves_the_steps(rival):
    model, images = trained(rival), torch.randn(30, 2, 3, 3) * 3 - 1
    recalibrate(model, images.split(7), 30)
    h, norm = model[0](images).detach(), model[1]
    mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)
    want = (torch.zeros(3), var + mean.square()) if rival is MABN else (mean, var)
    torch.testing.assert_close((norm.running_mean, norm.running_var), want, rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == 40
