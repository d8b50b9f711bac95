"""What every norm keeps: dtypes, memory formats, copies, state dicts, compilation, and its error messages."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm, SteadyBatchNorm
from norms.rivals import (
    MABN,
    BatchChannelNorm,
    BatchRenorm,
    EvoNormS0,
    FilterResponseNorm,
    MomentumBatchNorm,
    RunningChannelNorm,
)
from norms.running_norm import RunningNorm

pytestmark = pytest.mark.usefixtures("kernels")

NORMS = {"batch": lambda: BatchNorm(4), "layer": LayerNorm, "instance": lambda: InstanceNorm(4),
         "group": lambda: GroupNorm(2, 4), "running": lambda: RunningBatchNorm(4),
         "running per image": lambda: RunningBatchNorm(4, rule="per_image"),
         "running, settled": lambda: RunningBatchNorm(4, evaluation_memory=50),
         "steady": lambda: SteadyBatchNorm(4, 2),
         "batch and group": lambda: BatchChannelNorm(4, 2), "running and group": lambda: RunningChannelNorm(4, 2),
         "renorm": lambda: BatchRenorm(4, begin=2, rmax_at=9, dmax_at=6),
         "momentum": lambda: MomentumBatchNorm(4, steps=9), "mabn": lambda: MABN(4, window=3, warmup=4, r_from=7),
         "filter response": lambda: FilterResponseNorm(4), "evonorm": lambda: EvoNormS0(4, 2)}


@pytest.fixture(params=list(NORMS))
def norm(request): return NORMS[request.param]()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_in_and_out_with_wide_statistics(norm, dtype, training):
    wide = copy.deepcopy(norm)
    x = (torch.randn(8, 4, 6, 6) * 300 + 200).to(dtype)     # squares overflow float16
    y, z = norm.train(training)(x), wide.train(training)(x.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y, z.to(dtype), rtol=1e-2, atol=1e-2)


def test_autocast_forward_and_backward(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    with torch.autocast("cpu", dtype=torch.bfloat16): y = model(torch.randn(4, 3, 8, 8))
    assert y.dtype == torch.bfloat16
    y.float().pow(2).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_channels_last_and_strided_input(norm):
    x = torch.randn(4, 4, 6, 6)
    y = copy.deepcopy(norm)(x)
    last = copy.deepcopy(norm)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(copy.deepcopy(norm)(x.transpose(2, 3)).transpose(2, 3), y)


def test_deepcopy_after_a_training_step(norm):
    norm(torch.randn(4, 4, 3, 3, requires_grad=True)).sum().backward()
    twin = copy.deepcopy(norm)
    x = torch.randn(4, 4, 3, 3)
    assert torch.equal(norm(x), twin(x))


def test_state_dict_in_mid_training_continues_bit_for_bit(norm):
    for _ in range(5): norm(torch.randn(2, 4, 3, 3))
    other = copy.deepcopy(norm)
    for t in (*other.parameters(), *other.buffers()): t.data.zero_()
    other.load_state_dict(norm.state_dict())
    for b in (2, 3, 1, 8, 2, 2, 2, 2):
        x = torch.randn(b, 4, 3, 3)
        assert torch.equal(norm(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(norm.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.one_route
@pytest.mark.parametrize("name", [name for name in NORMS if name not in ("renorm", "momentum", "mabn")])     # slow
def test_compiles_in_one_graph_without_recompiling_and_equals_eager(name):
    torch._dynamo.reset()
    eager = NORMS[name]()
    twin = copy.deepcopy(eager)
    # "aot_eager" traces the backward too and needs no C++ compiler; a backend that returns the forward graph does not.
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, backend=counter, fullgraph=True)
    for _ in range(14):     # past the clamp's 20 images
        x = torch.randn(2, 4, 3, 3)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = eager(a), compiled(b)
        torch.testing.assert_close(ya, yb, rtol=1e-5, atol=1e-5)
        g = torch.randn_like(x)
        ya.backward(g), yb.backward(g)
        for p, q in zip([a, *eager.parameters()], [b, *twin.parameters()], strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    for a, b in zip(eager.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_finite_on_one_element(norm):
    shape = (1, 4, 1, 1)
    x = torch.randn(shape, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_repr_shows_the_settings():
    assert repr(RunningBatchNorm(8, mom=0.2)) == "RunningBatchNorm(8, mom=0.2, eps=1e-05, rule='lesson')"
    assert repr(BatchNorm(8)) == "BatchNorm(8, mom=0.1, eps=1e-05)"
    assert repr(GroupNorm(2, 8)) == "GroupNorm(2, 8, eps=1e-05, affine=True)"
    assert repr(InstanceNorm(8)) == "InstanceNorm(8, eps=1.0)"
    assert repr(LayerNorm()) == "LayerNorm(eps=1e-05)"
    assert repr(EvoNormS0(8, 2)) == "EvoNormS0(8, 2, eps=1e-05)"
    assert repr(FilterResponseNorm(8)) == "FilterResponseNorm(8, eps=1e-06)"
    assert repr(FilterResponseNorm(8, 1e-3, False, activation=False)) == \
        "FilterResponseNorm(8, eps=0.001, affine=False, activation=False)"


@pytest.mark.parametrize("make", [BatchNorm, InstanceNorm, RunningBatchNorm, lambda nf: GroupNorm(2, nf),
                                  BatchRenorm, MomentumBatchNorm, MABN,
                                  FilterResponseNorm, lambda nf: EvoNormS0(nf, 2)])
def test_wrong_channel_count_names_both_and_the_mend(make):
    text = r"made for 4 channels and got 6 \(input of shape \(2, 6, 3, 3\)\).*make the norm with 6 channels"
    with pytest.raises(ValueError, match=text):
        make(4)(torch.randn(2, 6, 3, 3))


def test_integer_input_is_refused(norm):
    with pytest.raises(TypeError, match=r"got an input of torch.int64; it needs a floating-point one.*x\.float\(\)"):
        norm(torch.ones(2, 4, 3, 3, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (0, 4, 0, 3)])
def test_empty_input_is_refused_where_a_statistic_would_need_it(norm, shape):
    # A batch of no images has no statistics where each image has its own, and in evaluation.
    for training in (True, False):
        norm.train(training)
        if shape == (0, 4, 3, 3) and not (training and isinstance(norm, RunningNorm)): continue
        with pytest.raises(ValueError, match=rf"got an empty input of shape {re.escape(str(shape))}.*skip empty batch"):
            norm(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (0, 4, 3)])
def test_no_images_come_out_as_none_with_a_graph(norm, shape, dtype):
    norm.train(not isinstance(norm, RunningNorm))
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = norm(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for p in norm.parameters(): assert not p.grad.any()
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_too_few_dimensions_are_refused(norm):
    with pytest.raises(ValueError, match=r"got an input of shape \(4,\); it needs"):
        norm(torch.randn(4))


def test_refused_input_leaves_the_state_alone(norm):
    before = copy.deepcopy(norm.state_dict())
    for bad in (torch.randn(2, 4, 0, 3), torch.ones(2, 4, 3, 3, dtype=torch.int64), torch.randn(4)):
        with pytest.raises((TypeError, ValueError)): norm(bad)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_instance_norm_needs_positions():
    with pytest.raises(ValueError, match=r"got an input of shape \(2, 4\); it needs \(N, C, \*spatial\) with a spatial "
                                         r"axis.*use LayerNorm or GroupNorm"):
        InstanceNorm(4)(torch.randn(2, 4))


@pytest.mark.parametrize(("make", "error", "text"), [
    (lambda: BatchNorm(0), ValueError, "BatchNorm got 0 as its channel count; it needs a positive integer"),
    (lambda: InstanceNorm(2.5), ValueError, "InstanceNorm got 2.5 as its channel count"),
    (lambda: BatchNorm(4, mom=2), ValueError, "mom is 2; it weighs the new batch and must lie in 0 to 1"),
    (lambda: BatchNorm(4, eps=-1), ValueError, "eps is -1; it must be a number of at least 0"),
    (lambda: RunningBatchNorm(4, mom=0), ValueError, "mom is 0; it weighs the new batch and must be above 0"),
    (lambda: RunningBatchNorm(4, evaluation_memory=0), ValueError, "evaluation_memory is 0; it is a number of images"),
    (lambda: RunningBatchNorm(4, rule="both"), ValueError, "rule is 'both'; choose 'lesson' or 'per_image'"),
    (lambda: EvoNormS0(8), ValueError, r"EvoNormS0 got 32 groups for 8 channels.*choose one of \[1, 2, 4, 8\]"),
    (lambda: GroupNorm(3, 8), ValueError, r"got 3 groups for 8 channels.*choose one of \[1, 2, 4, 8\]"),
    (lambda: LayerNorm(64)(torch.randn(2, 64, 7, 7)), ValueError,
     r"trailing axes of sizes \(64,\) and got an input of shape \(2, 64, 7, 7\).*norm=lambda nf: LayerNorm\(\)"),
    (lambda: LayerNorm(1e-3), TypeError, r"normalized_shape=0.001; .*as in LayerNorm\(eps=1e-5\)"),
    (lambda: LayerNorm(shape=(5, 1, 1)), TypeError, r"shape=\(5, 1, 1\), which is now normalized_shape"),
])
def test_settings_that_make_no_sense(make, error, text):
    with pytest.raises(error, match=text): make()


def test_no_warnings_from_a_training_step(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm(torch.randn(2, 4, 3, 3, requires_grad=True)).sum().backward()


# --- what a norm says of itself -----------------------------------------------------------------------------------

SHAPES = {"batch": (4, 45), "layer": (3, 60), "instance": (12, 15), "group": (6, 30), "running": (4, 45),
          "running per image": (4, 45), "renorm": (4, 45), "momentum": (4, 45), "mabn": (4, 45),
          "filter response": (12, 15), "evonorm": (6, 30)}


@pytest.mark.parametrize("name", SHAPES)
def test_statistic_groups_are_the_values_behind_each_mean_and_variance(name):
    norm, x = NORMS[name]().double(), torch.randn(3, 4, 5, 3, dtype=torch.float64) * 2 + 1
    if name == "evonorm": norm.v.data.fill_(0)              # y = x / 2 / std
    if name == "filter response": norm.tau.data.fill_(-torch.inf)
    groups = norm.statistic_groups(x)
    assert groups.shape == SHAPES[name]
    centred = groups - groups.mean(1, keepdim=True)
    by = {"mean square": groups}.get(norm.statistics, centred)
    if norm.statistics != "mean and variance": centred = groups
    expected = centred / (by.square().mean(1, keepdim=True) + norm.eps).sqrt() / (2 if name == "evonorm" else 1)
    torch.testing.assert_close(norm.statistic_groups(norm(x)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("b", "images"), [(2, 38), (3, 13.5), (4, 12.7), (8, 16.2), (16, 25.7), (32, 44.3)])
def test_running_moments_say_how_many_images_they_remember(b, images):
    assert RunningBatchNorm(4).running_moments(b)[2] == pytest.approx(images, abs=0.05)
    # The definition of it: a weighted mean of batches is as good as the plain one of 1 / sum(w^2).
    alpha = RunningBatchNorm(4).batch_weight(b)
    weights = [alpha * (1 - alpha) ** k for k in range(2000)]
    assert RunningBatchNorm(4).running_moments(b)[2] == pytest.approx(b / sum(w * w for w in weights))
    assert 38 <= round(RunningBatchNorm(4, rule="per_image").running_moments(min(b, 16))[2]) <= 40


def test_running_moments_are_what_a_training_batch_is_normalised_by():
    norm = RunningBatchNorm(3)
    for step in range(12):
        x = torch.randn(2, 3, 4) * torch.tensor([0.01, 0.5, 3.0]).view(1, 3, 1) + 2     # the first below the clamp
        y = norm(x)
        mean, var, _ = norm.running_moments(2)
        torch.testing.assert_close(y, (x - mean.view(-1, 1)) / (var.view(-1, 1) + norm.eps).sqrt())
        assert (var > norm.unclamped_var).tolist() == [step < 9, False, False]           # 20 images are 10 steps
