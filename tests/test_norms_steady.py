"""SteadyBatchNorm against the norms that it is made of, and by the formulas of its four steps."""

import copy

import pytest
import torch
from torch import nn

from experiments.study.stacked import stack
from norms import BatchNorm, GroupNorm, RunningBatchNorm, SteadyBatchNorm, convert_norms, recalibrate
from norms.rivals import RunningChannelNorm
from norms.testing import check_norm

pytestmark = pytest.mark.usefixtures("kernels")
C = 6


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made_of(groups, mom, memory):
    """The norms that it is, one after the other."""
    first = RunningBatchNorm(C, mom, affine=False, rule="per_image", average_backward=True, evaluation_memory=memory)
    return nn.Sequential(first, GroupNorm(groups, C)).double()


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("memory", [None, 30])
def test_it_is_running_batch_norm_with_everything_averaged_and_group_norm_behind(groups, memory):
    rng = torch.Generator().manual_seed(groups)
    ours = SteadyBatchNorm(C, groups, 0.2, evaluation_memory=memory).double()
    theirs = made_of(groups, 0.2, memory)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True): q.copy_(p.copy_(draw(C, seed=groups) + 1))
    for i in range(40):
        b, side = (int(torch.randint(1, 5, (), generator=rng)) for _ in range(2))
        x = draw(b, C, side, side, seed=i).mul_(1 + i % 3).requires_grad_()
        g = draw(b, C, side, side, seed=i + 100)
        if side == 1 and groups == 3: continue          # two values a group: +-1, whose gradient is all rounding
        y, z = ours(x), theirs(x)
        torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-11)
        for a, w in zip(*(torch.autograd.grad(out, [x, *m.parameters()], g) for out, m in ((y, ours), (z, theirs))),
                        strict=True):
            torch.testing.assert_close(a, w, rtol=1e-9, atol=1e-9)
    for name, b in theirs[0].named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_its_first_step_by_hand():
    """One step on two images, from the formulas: a = 1, so all averages are the batch's own."""
    x, g = draw(2, C, 3, seed=1).requires_grad_(), draw(2, C, 3, seed=2)
    m = SteadyBatchNorm(C, 2, eps=1e-3).double()
    y = m(x)
    mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), keepdim=True, correction=0)
    z = ((x - mean) / (var + 1e-3).sqrt()).detach()
    leaf = z.clone().requires_grad_()
    each = leaf.view(2, 2, -1)
    wanted = ((each - each.mean(2, keepdim=True)) / (each.var(2, keepdim=True, correction=0) + 1e-3).sqrt()).view_as(x)
    torch.testing.assert_close(y, wanted)
    h, = torch.autograd.grad(wanted, leaf, g)
    gx = (h - h.mean((0, 2), keepdim=True) - z * (h * z).mean((0, 2), keepdim=True)) / (var + 1e-3).sqrt()
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], gx)
    torch.testing.assert_close(m.grad_mean, h.mean((0, 2)))
    torch.testing.assert_close([m.running_mean, m.running_var], [mean.flatten(), var.flatten()])


def test_an_error_that_channels_share_cancels_and_outputs_are_bounded():
    m, x = SteadyBatchNorm(C, 2, eps=0.0).double(), draw(3, C, 4, seed=5)
    for i in range(20): m(draw(2, C, 4, seed=i))
    y = m.eval()(x)
    with torch.no_grad():
        for group, scale, shift in ((slice(0, 3), 4.0, 0.3), (slice(3, 6), 0.25, -2.0)):
            m.running_mean[group] += shift * m.running_var[group].sqrt()
            m.running_var[group] *= scale
    torch.testing.assert_close(m(x), y)
    assert m.train()(1e4 * x).abs().max() <= (C // 2 * 4) ** 0.5


@pytest.mark.one_route
def test_it_keeps_what_norms_keep_but_for_what_an_averaged_gradient_can_not():
    failed = check_norm(lambda nf: SteadyBatchNorm(nf, 1, evaluation_memory=20)).failed
    # Its backward is no gradient, and has a state of its own: as with RunningBatchNorm's averaged one.
    without = ("numeric derivative", "deepcopy", "two forwards", "buffers as inputs", "buffers may change",
               "backward changes nothing")
    assert [name for name in failed if not any(part in name for part in without)] == []


def test_it_takes_a_batch_norms_place_and_evaluates_by_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU())
    for i in range(5): model(draw(4, 3, 8, 8, seed=i, dtype=torch.float32))
    old, x = model[1], draw(4, 3, 8, 8, seed=9, dtype=torch.float32)
    weight, mean = old.weight, old.running_mean.clone()
    assert convert_norms(model, lambda nf: SteadyBatchNorm(nf, 1)) == {"BatchNorm2d": 1}
    new = model[1]
    assert new.weight is weight and new.eps == old.eps          # noqa: PT018
    torch.testing.assert_close([new.running_mean, new.recent_mean], [mean, mean])
    wanted = GroupNorm(1, C)(BatchNorm(C, affine=False).eval()(model[0](x)) * 0 + old.eval()(model[0](x)))
    torch.testing.assert_close(model[:2].eval()(x), wanted, rtol=1e-4, atol=1e-4)
    assert recalibrate(model, [x], 4).layers == ("1",)
    torch.testing.assert_close(new.running_mean, model[0](x).mean((0, 2, 3)))
    torch.testing.assert_close(new.recent_mean, new.running_mean)


def test_wrong_settings_are_refused_in_its_own_name():
    with pytest.raises(ValueError, match="SteadyBatchNorm got 4 groups for 6 channels"): SteadyBatchNorm(6, 4)
    with pytest.raises(ValueError, match="evaluation_memory is -1; it is a number of images"):
        SteadyBatchNorm(6, 3, evaluation_memory=-1)
    with pytest.raises(ValueError, match="mom is 2; it weighs the new batch"): SteadyBatchNorm(6, 3, mom=2)
    assert repr(SteadyBatchNorm(8)).startswith("SteadyBatchNorm(8, num_groups=4, mom=0.1")


def test_what_training_goes_by_stays_where_the_old_norm_has_it_and_follows_where_it_has_not():
    def with_memory(nf): return RunningBatchNorm(nf, evaluation_memory=50)
    for make_old in (RunningBatchNorm, with_memory, lambda nf: SteadyBatchNorm(nf, 1), BatchNorm):
        for make in (with_memory, lambda nf: SteadyBatchNorm(nf, 2)):
            model = nn.Sequential(make_old(C))
            for i in range(30): model(draw(2, C, 3, seed=i, dtype=torch.float32) + i)
            old = model[0]
            convert_norms(model, make)
            wanted = getattr(old, "recent_mean", old.running_mean)
            assert torch.equal(model[0].running_mean, old.running_mean)
            assert torch.equal(model[0].recent_mean, wanted)
            recalibrate(model, [draw(4, C, 3, seed=9, dtype=torch.float32)], 4)
            assert torch.equal(model[0].recent_mean, model[0].running_mean)
            assert torch.equal(model[0].recent_var, model[0].running_var)


@pytest.mark.parametrize("make", [lambda: RunningBatchNorm(4), lambda: RunningChannelNorm(4, 2),
                                  lambda: SteadyBatchNorm(4, 2)])
def test_side_by_side_a_norm_keeps_a_clamp_of_its_own(make):
    models = [nn.Sequential(make()), nn.Sequential(make())]
    for m in models: m[0].clamp_images, m[0].clamp_var = 2000, 0.5
    together = stack([copy.deepcopy(m) for m in models])
    x = 0.1 * draw(2, 8, 3, seed=3, dtype=torch.float32)
    for _ in range(15): alone = torch.cat([m(t) for m, t in zip(models, x.chunk(2, 1), strict=True)], 1)
    for _ in range(15): beside = together(x)
    torch.testing.assert_close(beside, alone)
