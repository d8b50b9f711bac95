"""The pairs of a norm over the batch and group norm: each equals its two parts in a row, and the formula."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import LiteralRunningBatchNorm
from torch import nn

import norms.fast.kernels
from norms import BatchNorm, GroupNorm, RunningBatchNorm, convert_norms, recalibrate, sync_norms
from norms.rivals import BatchChannelNorm, RunningChannelNorm

# settings of the pair, and the class of its first part with the settings of it
PAIRS = {
    "batch": (BatchChannelNorm, BatchNorm, {}),
    "running": (RunningChannelNorm, RunningBatchNorm, {}),
    "per image": (RunningChannelNorm, RunningBatchNorm, {"rule": "per_image"}),
    "averaged": (RunningChannelNorm, RunningBatchNorm, {"average_backward": True}),
    "averaged, per image": (RunningChannelNorm, RunningBatchNorm,
                            {"average_backward": True, "rule": "per_image", "evaluation_memory": 30})}
LAYOUTS = {"contiguous": lambda x: x,
           "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
           "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)}

fixed = settings(derandomize=True, deadline=None, max_examples=15, database=None)
batch = st.tuples(st.integers(1, 7), st.sampled_from([True, True, True, False]), st.floats(-5, 5), st.floats(-1.5, 1.5),
                  st.sampled_from(list(LAYOUTS)))
programs = st.lists(batch, min_size=1, max_size=10)
sizes = st.sampled_from([(4, 2), (6, 3), (3, 1), (2, 2), (12, 4), (5, 5)])
spatial = st.lists(st.integers(1, 4), max_size=3)


def draw(rng, *shape): return torch.randn(shape, generator=rng, dtype=torch.float64)


def gradients(m, x, g):
    """Output, and the gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    y = m(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *m.parameters()], g)]


def near(got, want, tol):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol * max(1, b.abs().max().item()))


def same_over(program, pair, parts, spatial, seed, tol, buffers=True):
    """`pair` and `parts` give the same outputs, gradients and buffers on every batch of the program."""
    rng, nf = torch.Generator().manual_seed(seed), pair.nf
    for p, q in zip(pair.parameters(), parts.parameters(), strict=True):
        with torch.no_grad(): p.copy_(draw(rng, nf)), q.copy_(p)
    for n, training, mean, spread, layout in program:
        shape = (n, nf, *spatial)
        x, g = LAYOUTS[layout](draw(rng, *shape) * 10**spread + mean), draw(rng, *shape)
        near(*(gradients(m.train(training), x, g) for m in (pair, parts)), tol)
        if buffers: near(pair.buffers(), parts.buffers(), tol)


@pytest.mark.parametrize("route", ["definition", "kernels"])
@pytest.mark.parametrize("name", PAIRS)
@fixed
@given(sizes, spatial, st.floats(1e-3, 1), st.sampled_from([1e-5, 1e-2]), programs, st.integers(0, 2**32 - 1))
def test_it_is_the_two_norms_in_a_row(name, route, size, spatial, mom, eps, program, seed):
    cls, first, more = PAIRS[name]
    nf, groups = size
    pair = cls(nf, groups, mom, eps, **more).double()
    parts = nn.Sequential(first(nf, mom, eps, affine=False, **more), GroupNorm(groups, nf, eps)).double()
    with pytest.MonkeyPatch.context() as patch:
        if route == "definition": patch.setattr(norms.fast.kernels, "KERNELS", {})
        # The kernels take the sums in another order. Of two values in a channel, or nearly equal ones in a group, the
        # gradient is some 1e5 times as large as what its terms come to.
        same_over(program, pair, parts, spatial, seed, 1e-12 if route == "definition" else 1e-8)
    assert list(pair.state_dict())[2:] == [k.removeprefix("0.") for k in parts.state_dict() if k.startswith("0.")]


@pytest.mark.skipif(not norms.fast.kernels.AVAILABLE, reason="the norms' kernels are not built here")
@pytest.mark.parametrize("name", PAIRS)
def test_a_plain_step_goes_by_the_kernels_and_by_the_definition_where_they_are_of_an_older_build(name, monkeypatch):
    cls, _, more = PAIRS[name]
    norm, x = cls(4, 2, **more), torch.randn(2, 4, 3, 3)
    assert type(norm(x).grad_fn).__name__ == ("_AveragedPairStepBackward" if "averaged" in name else
                                              "_PairStepBackward")
    older = {dtype: copy.copy(kernels) for dtype, kernels in norms.fast.kernels.KERNELS.items()}
    for kernels in older.values(): del kernels.pair_backward
    monkeypatch.setattr(norms.fast.kernels, "KERNELS", older)
    assert type(norm(x).grad_fn).__name__ not in ("_AveragedPairStepBackward", "_PairStepBackward")
    assert type(RunningBatchNorm(4)(x).grad_fn).__name__ == "_StepBackward"


class Literal(nn.Module):
    """The formula with the batch's statistics by torch, or by those of the running norm's definition."""

    def __init__(self, nf, groups, first):
        super().__init__()
        self.groups, self.first = groups, [first]           # in a list: its parameters are none of this
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        z = self.first[0].train(self.training)(x)
        zs = z.reshape(len(z), self.groups, -1)
        m = zs.mean(2, keepdim=True)
        zs = (zs - m) / ((zs - m).square().mean(2, keepdim=True) + 1e-5).sqrt()
        shape = (1, -1, *[1] * (x.ndim - 2))
        return zs.view_as(z) * self.weight.view(shape) + self.bias.view(shape)


@pytest.mark.parametrize("rule", ["batch", "lesson", "per_image"])
@fixed
@given(sizes, spatial, programs, st.integers(0, 2**32 - 1))
def test_it_is_the_published_formula(rule, size, spatial, program, seed):
    nf, groups = size
    # One image has no weight by the lesson's rule, and torch refuses one value per channel.
    program = [(n + 1, training or not i, *more) for i, (n, training, *more) in enumerate(program)]
    if rule == "batch":
        bn = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(spatial)]
        pair, first = BatchChannelNorm(nf, groups), bn(nf, affine=False)
    else: pair, first = RunningChannelNorm(nf, groups, rule=rule), LiteralRunningBatchNorm(nf, rule=rule)
    # A group of nearly equal values makes rounding 300 times as large, and batch norm of two values the same again. The
    # running norm's definition cancels besides.
    same_over(program, pair.double(), Literal(nf, groups, first.double()).double(), spatial, seed,
              1e-8 if rule == "batch" else 1e-7, buffers=False)


@pytest.mark.usefixtures("kernels")
def test_constant_statistics_are_constants_to_the_gradient_and_nothing_else():
    rng = torch.Generator().manual_seed(0)
    one, other = (RunningChannelNorm(4, 2, constant_statistics=c).double() for c in (True, False))
    for n in (2, 3, 1, 5):
        x, g = draw(rng, n, 4, 3, 2) * 3 + 1, draw(rng, n, 4, 3, 2)
        got, through = gradients(one, x, g), gradients(other, x, g)
        mean, var = (t.clone().view(-1, 1, 1) for t in (one.running_mean, one.running_var))
        leaf = x.clone().requires_grad_()
        y = F.group_norm((leaf - mean) / (var + one.eps).sqrt(), 2)
        near(got[:2], [y.detach(), *torch.autograd.grad(y, leaf, g)], 1e-12)
        near([got[0], *got[2:], *one.buffers()], [through[0], *through[2:], *other.buffers()], 1e-12)
        assert (got[1] - through[1]).abs().max() > 1e-3


def test_a_state_dict_moves_between_the_pair_and_its_first_norm():
    for name, (cls, first, more) in PAIRS.items():
        pair, plain = cls(4, 2, **more), first(4, **more)
        assert list(pair.state_dict()) == list(plain.state_dict()), name
        for seed in range(3): pair(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed)))
        plain.load_state_dict(pair.state_dict())
        other = cls(4, 2, **more)
        other.load_state_dict(plain.state_dict())
        x = torch.randn(3, 4, 3)
        assert torch.equal(pair(x), other(x)), name


@pytest.mark.parametrize("name", ["batch", "running"])
def test_convert_recalibrate_and_sync_take_it_for_the_norm_that_it_begins_with(name):
    cls, first, more = PAIRS[name]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    for seed in range(3): model(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)))
    norm = model[1]
    kept = copy.deepcopy(norm.state_dict())
    assert convert_norms(model, lambda nf: cls(nf, 2, **more)) == {"BatchNorm2d": 1}
    assert type(model[1]) is cls
    assert model[1].weight is norm.weight
    assert torch.equal(model[1].running_var, kept["running_var"])
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(model[1].eval()(x), F.group_norm(norm.eval()(x), 2))       # weights are ones, biases 0
    assert convert_norms(model, first) == {cls.__name__: 1}
    torch.testing.assert_close(model[1].eval()(x), norm(x))
    convert_norms(model.train(), lambda nf: cls(nf, 2))
    xs = torch.randn(6, 3, 5, 5)
    recalibrate(model, [xs], 6)
    torch.testing.assert_close(model[1].running_mean, model[0](xs).mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert sync_norms(model) == {cls.__name__: 1}
    assert repr(model[1]).endswith("synced)")


def test_its_settings_show_and_those_that_make_no_sense_are_refused():
    assert repr(BatchChannelNorm(8)) == "BatchChannelNorm(8, num_groups=4, mom=0.1, eps=1e-05)"
    assert repr(RunningChannelNorm(8, 2, affine=False, constant_statistics=True)) == (
        "RunningChannelNorm(8, num_groups=2, mom=0.1, eps=1e-05, rule='lesson', affine=False, "
        "constant_statistics=True)")
    for cls in (BatchChannelNorm, RunningChannelNorm):
        for groups in (3, 0, True, 2.0):
            with pytest.raises(ValueError, match=rf"{cls.__name__} got {groups} groups for 8 channels; the groups must "
                                                 r"divide the channels: choose one of \[1, 2, 4, 8\]"): cls(8, groups)
        with pytest.raises(ValueError, match=f"{cls.__name__} got 0 as its channel count"): cls(0)
    with pytest.raises(ValueError, match=r"average_backward=True and constant_statistics=True.*choose one of the two"):
        RunningChannelNorm(8, average_backward=True, constant_statistics=True)
