"""Properties over random shapes, momenta, sequences of batches and extreme values, found by Hypothesis."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LiteralRunningBatchNorm
from torch import nn

from norms import BatchNorm, RunningBatchNorm
from norms.rivals import MABN, BatchRenorm, MomentumBatchNorm

# The same examples in every run; the first one pays for torch's start, so there is no deadline.
fixed = settings(derandomize=True, deadline=None, max_examples=100, database=None)
TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}

channels = st.integers(1, 5)
spatial = st.lists(st.integers(1, 4), max_size=3)
momenta = st.floats(1e-3, 1)
rules = st.sampled_from(["lesson", "per_image"])
seeds = st.integers(0, 2**32 - 1)
norms = st.sampled_from([BatchNorm, RunningBatchNorm, partial(BatchRenorm, begin=0, rmax_at=3, dmax_at=3),
                         partial(MomentumBatchNorm, steps=5), partial(MABN, window=2, warmup=0, r_from=3)])


def batches(least):
    """Lists of (images, training, mean, log10 of the spread); the first one trains."""
    batch = st.tuples(st.integers(least, 9), st.sampled_from([True, True, False]), st.floats(-10, 10),
                      st.floats(-2, 2))
    return st.lists(batch, min_size=1, max_size=12).map(lambda bs: [(bs[0][0], True, *bs[0][2:]), *bs[1:]])


def draw(rng, *shape): return torch.randn(shape, generator=rng, dtype=torch.float64)


def step(norm, x, g):
    """Output, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], g)]


def assert_same_over(batches, ours, theirs, nf, spatial, seed, tol):
    """Both norms, with the same affine weights, give the same outputs and gradients on every batch."""
    rng = torch.Generator().manual_seed(seed)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        with torch.no_grad(): p.copy_(draw(rng, nf)), q.copy_(p)
    for n, training, mean, spread in batches:
        shape = (n, nf, *spatial)
        x, g = draw(rng, *shape) * 10**spread + mean, draw(rng, *shape)
        for a, b in zip(*(step(m.train(training), x, g) for m in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tol * max(1, b.abs().max().item()))


@fixed
@given(channels, spatial, momenta, rules, st.data(), seeds)
def test_running_batch_norm_equals_the_definition(nf, spatial, mom, rule, data, seed):
    # One image has no weight by the lesson's rule. The definition's own cancellation, at |mean| / std of 1000, leaves
    # some ten digits of float64.
    steps = data.draw(batches(2 if rule == "lesson" else 1))
    ours, literal = RunningBatchNorm(nf, mom, rule=rule).double(), LiteralRunningBatchNorm(nf, mom, rule=rule).double()
    assert_same_over(steps, ours, literal, nf, spatial, seed, 1e-8)
    assert ours.seen == sum(n for n, training, *_ in steps if training)


@fixed
@given(channels, spatial, st.floats(0, 1), batches(2), seeds)
def test_batch_norm_equals_torch(nf, spatial, mom, steps, seed):
    ours, theirs = BatchNorm(nf, mom).double(), TORCH[2 + len(spatial)](nf, momentum=mom).double()
    assert_same_over(steps, ours, theirs, nf, spatial, seed, 1e-10)
    for k, v in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[k], v, rtol=1e-10, atol=1e-10)


@fixed
@given(norms, st.lists(st.lists(st.floats(-2.0**56, 2.0**56, width=32), min_size=4, max_size=4), min_size=1,
                       max_size=6),
       st.sampled_from([(2, 2), (4, 1), (1, 4), (1, 2, 2), (1, 1, 2, 2), (2, 2, 1, 1, 1)]))
def test_any_numbers_give_finite_outputs_and_gradients(make, values, shape):
    # Up to 7e16 in float32, where squares and their sum over the batch still have room below 3e38.
    norm = make(shape[1])
    for row in values:
        x = torch.tensor(row).view(shape)
        for training in (True, False):
            for t in step(norm.train(training), x, torch.ones_like(x)): assert t.isfinite().all()
    assert all(v.isfinite().all() for v in norm.state_dict().values())
    if "running_var" in norm.state_dict(): assert (norm.running_var >= 0).all()


@fixed
@given(norms, channels, spatial, momenta, batches(1), st.integers(0, 12), seeds)
def test_a_state_dict_taken_anywhere_continues_bit_for_bit(make, nf, spatial, mom, steps, where, seed):
    rng = torch.Generator().manual_seed(seed)
    norm, other = make(nf, mom), make(nf, mom)
    for i, (n, training, mean, spread) in enumerate(steps):
        if i == min(where, len(steps) - 1): other.load_state_dict(copy.deepcopy(norm.state_dict()))
        x, g = (draw(rng, n, nf, *spatial).float() for _ in range(2))
        x = x * 10**spread + mean
        got = step(norm.train(training), x, g)
        if i < min(where, len(steps) - 1): continue
        for a, b in zip(got, step(other.train(training), x, g), strict=True): assert torch.equal(a, b)


@fixed
@given(norms, channels, spatial, momenta, batches(2), st.sampled_from([torch.float16, torch.bfloat16]), seeds)
def test_half_precision_is_float32_rounded(make, nf, spatial, mom, steps, dtype, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("norms.fast.kernels.KERNELS", {})      # half precision goes by the definition: float32 must, too
        half_equals_float32(make, nf, spatial, mom, steps, dtype, seed)


def half_equals_float32(make, nf, spatial, mom, steps, dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    half, single = make(nf, mom), make(nf, mom)
    for n, training, mean, spread in steps:
        x = (draw(rng, n, nf, *spatial) * 10**spread + mean).to(dtype)
        y, z = half.train(training)(x), single.train(training)(x.float())
        assert y.dtype == dtype
        assert torch.equal(y, z.to(dtype))
    for a, b in zip(half.state_dict().values(), single.state_dict().values(), strict=True): assert torch.equal(a, b)


@fixed
@given(norms, channels, spatial, momenta, st.integers(2, 9), seeds)
def test_the_order_of_the_images_plays_no_part(make, nf, spatial, mom, n, seed):
    rng = torch.Generator().manual_seed(seed)
    one, other = make(nf, mom).double(), make(nf, mom).double()
    for _ in range(3):
        x, g, order = draw(rng, n, nf, *spatial), draw(rng, n, nf, *spatial), torch.randperm(n, generator=rng)
        (y, gx, *gp), (z, gz, *gq) = step(one, x, g), step(other, x[order], g[order])
        for a, b in zip([y[order], gx[order], *gp], [z, gz, *gq], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@fixed
@given(channels, rules, st.integers(1, 512), momenta)
def test_a_batch_weighs_between_nothing_and_all(nf, rule, b, mom):
    norm = RunningBatchNorm(nf, mom, rule=rule)
    assert 0 < norm.batch_weight(b) <= 1
    assert norm.batch_weight(2) == pytest.approx(mom)
