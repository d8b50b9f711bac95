"""Norm layers seen from outside: preflight, the gap between training and evaluation, and the statistics of a fit."""

import copy
import math
import random
import statistics

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.data import load_data
from experiments.lab import networks
from experiments.models import GeneralRelu
from experiments.published.small_batch import build
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm, sync_norms
from norms.rivals import BatchChannelNorm, EvoNormS0, FilterResponseNorm, RunningChannelNorm
from runner import (
    Callback,
    DataBunch,
    Dataset,
    Learner,
    NormStats,
    Runner,
    get_dls,
    preflight,
    train_eval_gap,
    view_tfm,
)


def hooks(model): return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


def state(model):
    """All that a forward pass could change, by value."""
    return ({k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())},
            {k: m.training for k, m in model.named_modules()}, torch.get_rng_state(), random.getstate())


def same(a, b):
    return (a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())
            and a[1] == b[1] and torch.equal(a[2], b[2]) and a[3] == b[3])


# --- preflight: what is said --------------------------------------------------------------------------------------

def said(norm, shape=(2, 4, 1, 1), before=None, **kwargs):
    """The text on one norm, and its level before it."""
    model = nn.Sequential(*filter(None, (before, norm)))
    f, = preflight(model, torch.randn(shape), **kwargs).findings
    return f"{f.level}: {f.text}"


CONSTANT = "fail: 1 value per statistic: the output is constant (its bias), nothing passes"
SIGNS = "fail: 2 values per statistic: outputs are about +-1 whatever the input"


@pytest.mark.parametrize(("norm", "shape", "text"), [
    (BatchNorm(4), (2, 4, 1, 1), SIGNS),
    (nn.BatchNorm1d(4), (2, 4), SIGNS),
    (BatchNorm(4), (1, 4, 1, 1), CONSTANT),
    (nn.BatchNorm2d(4), (1, 4, 1, 1), "fail: 1 value per statistic: it refuses to train (Expected more than 1 value "
     "per channel when training, got input size torch.Size([1, 4, 1, 1]))"),
    (nn.BatchNorm2d(4), (2, 4, 2, 2), "warn: 8 values per statistic: the variance has a standard error of 53 %"),
    (nn.BatchNorm2d(4), (32, 4, 1, 1), "warn: 32 values per statistic: the variance has a standard error of 25 %"),
    (nn.BatchNorm2d(4), (33, 4, 1, 1), "ok: 33 values per statistic"),          # sqrt(2 / 32) = 1/4
    (nn.BatchNorm3d(4), (2, 4, 3, 3, 3), "ok: 54 values per statistic"),
    (nn.SyncBatchNorm(4), (8, 4, 3, 3), "ok: 72 values per statistic"),
    (InstanceNorm(4, eps=1e-5), (2, 4, 1, 1), CONSTANT),
    (InstanceNorm(4, eps=1e-5), (2, 4, 1, 2), SIGNS),
    (InstanceNorm(4, eps=1e-5), (2, 4, 2, 2),
     "warn: 4 values per statistic, of which mean and scale take 2"),
    (nn.InstanceNorm1d(4), (2, 4, 8), "ok: 8 values per statistic"),
    (nn.InstanceNorm2d(4), (2, 4, 1, 1), "fail: 1 value per statistic: it refuses to train (Expected more than 1 "
     "spatial element when training, got input size torch.Size([2, 4, 1, 1]))"),
    (GroupNorm(2, 4), (2, 4, 1, 1), SIGNS),
    (nn.GroupNorm(4, 4), (2, 4, 1, 1), CONSTANT),
    (nn.GroupNorm(2, 4), (1, 4, 3, 3), "ok: 18 values per statistic"),
    (LayerNorm(), (2, 4), "warn: 4 values per statistic, of which mean and scale take 2"),
    (LayerNorm(), (2, 4, 3, 3), "ok: 36 values per statistic"),
    (nn.LayerNorm(8), (2, 3, 8), "ok: 8 values per statistic"),
    (nn.LayerNorm((3, 8)), (2, 3, 8), "ok: 24 values per statistic"),
    (nn.RMSNorm(1), (2, 1), "fail: 1 value per statistic: nothing but the input's sign passes, whatever its size"),
    (nn.RMSNorm(2), (2, 2), "warn: 2 values per statistic, of which the scale takes 1"),
    (nn.RMSNorm(4), (2, 4), "ok: 4 values per statistic"),
    (FilterResponseNorm(4), (2, 4, 1, 1), "fail: 1 value per statistic: nothing but the input's sign passes, whatever "
     "its size"),
    (FilterResponseNorm(4), (1, 4), "fail: 1 value per statistic: nothing but the input's sign passes, whatever its "
     "size"),
    (FilterResponseNorm(4), (2, 4, 1, 3), "warn: 3 values per statistic, of which the scale takes 1"),
    (FilterResponseNorm(4), (1, 4, 2, 2), "ok: 4 values per statistic"),
    (EvoNormS0(4, 4), (2, 4, 1, 1), "fail: 1 value per statistic: the variance is 0, so all is divided by sqrt(eps)"),
    (EvoNormS0(4, 2), (2, 4, 1, 1), "warn: 2 values per statistic, of which the scale takes 1"),
    (EvoNormS0(4, 2), (1, 4, 1, 2), "ok: 4 values per statistic"),
])
def test_few_values_and_what_follows(norm, shape, text): assert said(norm, shape) == text


def test_what_is_said_of_few_values_is_what_happens():
    """The failures by experiment: two inputs that differ in size by 100, and the outputs."""
    for norm, shape in ((BatchNorm(4), (2, 4, 1, 1)), (GroupNorm(2, 4), (1, 4)), (InstanceNorm(4, 1e-5), (2, 4, 1, 2))):
        for size in (1, 100):
            y = norm(torch.randn(shape) * size + 3)
            torch.testing.assert_close(y.abs(), torch.ones(shape), rtol=0, atol=0.05)
    assert torch.equal(InstanceNorm(4)(torch.randn(2, 4, 1, 1)), torch.zeros(2, 4, 1, 1))
    x = torch.randn(2, 1)
    torch.testing.assert_close(nn.RMSNorm(1)(x), x.sign(), rtol=0, atol=0.01)
    x = torch.randn(2, 4, 1, 1)
    torch.testing.assert_close(FilterResponseNorm(4, activation=False)(x), x.sign(), rtol=0, atol=0.01)
    torch.testing.assert_close(EvoNormS0(4, 4)(x), F.silu(x) / math.sqrt(1e-5))


def test_the_standard_error_is_that_of_a_variance():
    for n in (8, 33):
        var = torch.randn(20_000, n, dtype=torch.float64).var(1)
        assert (var.std() / var.mean()).item() == pytest.approx(math.sqrt(2 / (n - 1)), rel=0.03)


@pytest.mark.parametrize(("norm", "shape", "text"), [
    (RunningBatchNorm(4), (2, 4, 1, 1), "ok: 2 values of this batch, averaged with about 38 images"),
    (RunningBatchNorm(4), (1, 4, 1, 1), "ok: 1 value of this batch, averaged with about 38 images"),
    (RunningBatchNorm(4), (4, 4, 1, 1), "warn: 4 values of this batch, averaged with about 13 images: the variance has "
     "a standard error of 41 %"),
    (RunningBatchNorm(4, rule="per_image"), (4, 4, 1, 1), "ok: 4 values of this batch, averaged with about 38 images"),
    (RunningChannelNorm(4, 2), (2, 4, 1, 1), "fail: 2 values of this batch, averaged with about 38 images; behind it 2 "
                                             "values of an image per statistic: outputs are about +-1 whatever the "
                                             "input"),
    (BatchChannelNorm(4), (9, 4, 2, 2), "warn: 36 values per statistic; behind it 4 values of an image per statistic, "
                                        "of which mean and scale take 2"),
    (BatchChannelNorm(4, 2), (9, 4, 2, 2), "ok: 36 values per statistic"),
    (RunningBatchNorm(4), (4, 4, 2, 2), "ok: 16 values of this batch, averaged with about 13 images"),
])
def test_statistics_over_past_batches(norm, shape, text):
    if hasattr(norm, "seen"): norm.seen.fill_(20)                   # past the clamp
    assert said(norm, shape) == text


def test_a_clamp_in_force_is_counted():
    norm = RunningBatchNorm(4)
    with torch.no_grad(): conv = nn.Conv2d(4, 4, 1, bias=False)
    conv.weight.data = torch.diag(torch.tensor([0.01, 0.02, 1.0, 2.0])).view(4, 4, 1, 1)
    text = "ok: 128 values of this batch, averaged with about 38 images"
    assert said(norm, (2, 4, 8, 8), conv) == f"{text}; a clamp holds the variance of 2 of 4 channels"
    norm.seen.fill_(18)                                             # with this batch 20: over
    assert said(norm, (2, 4, 8, 8), conv) == text


@pytest.mark.parametrize(("norm", "text"), [
    (FilterResponseNorm(4, 1.0), "; eps 1 is above the variance (median 0.0"),
    (InstanceNorm(4), "; eps 1 is above the variance (median 0.0"),
    (nn.LayerNorm(5, eps=0.5), "; eps 0.5 is above the variance (median 0.0"),
    (nn.InstanceNorm2d(4, track_running_stats=True),
     "; evaluation normalises by running statistics and training by each image's own"),
    (nn.BatchNorm2d(4, momentum=0.0), "; the running statistics don't move in training (momentum 0?), and evaluation"),
    (BatchNorm(4, mom=0), "; the running statistics don't move in training (momentum 0?), and evaluation uses them"),
    (nn.BatchNorm2d(4, track_running_stats=False),
     "; no running statistics: in evaluation an output depends on the rest of its batch"),
])
def test_settings_that_have_consequences(norm, text):
    shrink = nn.Conv2d(4, 4, 1, bias=False)
    shrink.weight.data.fill_(0.1)
    found = said(norm, (9, 4, 5, 5), shrink)
    assert found.startswith("warn: ")
    assert text in found


def test_an_eps_above_one_value_s_square_lets_more_than_its_sign_through():
    assert said(FilterResponseNorm(4, 100.0)).startswith(
        "warn: 1 value per statistic, of which the scale takes 1; eps 100 is above the variance")


def second(model, shape=(2, 4, 8, 8)):
    """Where `preflight` says that an activation stands behind a norm that is one, and the levels of all findings."""
    found = preflight(model, torch.randn(shape)).findings
    said = [f.text.partition("it is an activation too, and ")[2] for f in found]
    return [t.removesuffix(" a second one: take that out") for t in said], [f.level for f in found]


class Sum(nn.Module):
    """A residual block whose activation follows the sum."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 1), norm, nn.ReLU(inplace=True)

    def forward(self, x): return self.relu(x + self.norm(self.conv(x)))


class ReluBlock(nn.Sequential):
    """Of layers, whatever its name."""


def test_an_activation_behind_a_norm_that_is_one_is_named():
    shared, both = FilterResponseNorm(4), nn.LeakyReLU(0.1)
    for act in (nn.ReLU(), nn.ReLU(inplace=True), GeneralRelu(0.1), nn.SiLU(), both):
        assert second(nn.Sequential(EvoNormS0(4, 2), act)) == ([f"1 {type(act).__name__}"], ["warn"])
    assert second(nn.Sequential(FilterResponseNorm(4), nn.ReLU()), (2, 4, 1, 1)) == (["1 ReLU"], ["fail"])
    assert second(nn.Sequential(shared, nn.ReLU(), shared, both)) == (["1 ReLU", "3 LeakyReLU"], ["warn", "warn"])
    assert second(nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(4, 4, 1), both))[0] == ["1 ReLU", ""]
    for model in (Sum(EvoNormS0(4, 2)), nn.Sequential(FilterResponseNorm(4, activation=False), nn.ReLU()),
                  nn.Sequential(GroupNorm(2, 4), nn.ReLU()), nn.Sequential(shared, nn.Conv2d(4, 4, 1), nn.ReLU()),
                  nn.Sequential(shared, nn.Sigmoid()), nn.Sequential(shared, ReluBlock(nn.Conv2d(4, 4, 1)))):
        assert second(model) == ([""], ["ok"])


def test_eps_is_compared_with_channels_that_are_alive():
    class Relu(nn.Module):
        def forward(self, x): return x * torch.tensor([0.0, 0.0, 0.0, 1.0]).view(4, 1, 1)
    assert said(BatchNorm(4), (9, 4, 3, 3), Relu()) == "ok: 81 values per statistic"
    assert said(BatchNorm(4), (9, 4, 3, 3), nn.Threshold(100.0, 0.0)) == (
        "warn: 81 values per statistic; eps 1e-05 is above the variance (median 0): the input is hardly scaled")


def test_a_frozen_norm():
    class Frozen(nn.BatchNorm2d):
        def train(self, mode=True): return super().train(False)
    assert said(Frozen(4), (1, 4, 1, 1)) == "ok: in evaluation mode in training too: its running statistics stay"
    model = nn.Sequential(nn.BatchNorm2d(4))
    model[0].eval()
    f, = preflight(model, torch.randn(9, 4, 3, 3)).findings
    assert (f.level, f.text) == ("warn", "81 values per statistic; it was in evaluation mode, and model.train() at "
                                         "every epoch ends that")
    assert not model[0].training
    f, = preflight(model.eval(), torch.randn(9, 4, 3, 3)).findings  # all of the model was in evaluation mode
    assert f.level == "ok"


CANCELLED = "; the bias of module 0 before it has no effect: the mean takes it off"


@pytest.mark.parametrize(("before", "norm", "cancelled"), [
    (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), True),
    (nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6), True),
    (nn.Conv2d(4, 6, 3), GroupNorm(6, 6), True),
    (nn.Sequential(nn.Flatten(), nn.Linear(256, 40)), BatchNorm(40), False),    # the name is 0.1, see below
    (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), False),
    (nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), False),
    (nn.Conv2d(4, 6, 3), LayerNorm(), False),
    (nn.Conv2d(4, 6, 3), RunningBatchNorm(6), False),               # its mean is not this batch's alone
    (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()), nn.BatchNorm2d(6), False),
])
def test_a_bias_that_the_mean_takes_off(before, norm, cancelled):
    assert (CANCELLED in said(norm, (40, 4, 8, 8), before)) == cancelled
    model = nn.Sequential(before, norm)
    model(torch.randn(40, 4, 8, 8)).square().sum().backward()
    if cancelled: torch.testing.assert_close(before.bias.grad, torch.zeros(6), rtol=0, atol=1e-2)


def test_a_linear_bias_that_the_mean_takes_off():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    assert "the bias of module 0.1 before it has no effect: the mean" in said(BatchNorm(4), (40, 4), linear)
    tokens = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(6))      # (N, T, D): the bias is not the channel's
    assert "bias" not in preflight(tokens, torch.randn(40, 6, 4)).findings[0].text


# --- preflight: which layers --------------------------------------------------------------------------------------

class Mine(nn.Module):
    """A norm of its own by the protocol: one statistic per image, by its past mean and variance."""

    def __init__(self, memory=None):
        super().__init__()
        self.eps, self.memory = 1e-5, memory
        self.inner = nn.LayerNorm(4)

    def statistic_groups(self, x): return x.transpose(0, 1).flatten(1)

    def running_moments(self, b): return torch.zeros(4), torch.ones(4), self.memory

    def forward(self, x): return x


class StrangeNorm(nn.Module):
    def forward(self, x): return x


class PreNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x): return self.norm(x)


def test_norms_are_known_by_class_or_by_protocol():
    assert said(Mine(), (2, 4)) == "ok: 2 values of this batch, averaged with earlier batches"
    assert said(Mine(100), (2, 4)) == "ok: 2 values of this batch, averaged with about 100 images"
    model = nn.Sequential(nn.LocalResponseNorm(2), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    assert str(preflight(model, torch.randn(2, 4, 3, 3))) == "no norm layer"
    assert [f.path for f in preflight(nn.Sequential(PreNorm(), nn.ReLU()), torch.randn(2, 4)).findings] == ["0.norm"]
    f, = preflight(nn.Sequential(StrangeNorm()), torch.randn(2, 4, 3, 3)).findings
    assert str(f) == ("warn  0 StrangeNorm, batch 2, 3x3 map: unknown norm: give its class a method "
                      "statistic_groups(x) that returns x as (statistics, values)")


@pytest.mark.parametrize(("net", "norm", "batch", "warns"), [
    ("resnet", "RunningBatchNorm", 2, True), ("resnet", "RunningChannelNorm", 2, False),
    ("resnet", "RunningBatchNorm", 32, False), ("resnet", "RunningBatchNorm-averaged", 2, False),
    ("resnet", "SteadyBatchNorm", 2, False), ("resnet", "GroupNorm", 2, False),
    ("five-layer", "RunningBatchNorm", 2, False)])
def test_a_deep_network_of_norms_that_lack_most_of_their_gradient(net, norm, batch, warns):
    model = networks.build(net, norm, 0, channels=3)
    report = preflight(model, torch.randn(batch, 3, 64, 64))
    said = [f for f in report.findings if "get the gradient through their statistics by this batch's share" in f.text]
    assert len(said) == (12 if warns else 0)
    for f in said:
        assert f.level == "warn"
        assert "12 such layers" in f.text
        assert "take SteadyBatchNorm or GroupNorm, with WSConv2d" in f.text


def test_layers_come_in_the_order_of_the_forward_and_each_run_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.unused = nn.BatchNorm2d(4), BatchNorm(4), BatchNorm(4)

        def forward(self, x): return self.last(self.first(self.first(x))[..., :1])
    found = preflight(Net(), torch.randn(40, 4, 3, 3)).findings
    assert [f.path for f in found] == ["first", "last", "unused"]
    assert [(f.batch, f.map, f.statistics, f.values, f.level) for f in found] == [
        (40, (3, 3), 4, 360, "ok"), (40, (3, 1), 4, 120, "ok"), (None, (), None, None, "warn")]
    assert str(found[2]) == "warn  unused BatchNorm: didn't run in this forward pass"


def test_what_comes_after_a_refusal_is_not_reached():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    found = preflight(model, torch.randn(1, 4)).findings
    assert [f.level for f in found] == ["fail", "warn"]
    assert found[1].text == "not reached, because 0 refuses"


def test_the_report_of_the_lessons_network_prints_a_line_per_layer():
    model = build("BatchNorm", 0)
    report = preflight(model, torch.randn(2, 784), tfm=view_tfm(1, 28, 28))
    assert str(report).splitlines() == [
        "ok    0.2 BatchNorm, batch 2, 14x14 map: 392 values per statistic",
        "ok    1.2 BatchNorm, batch 2, 7x7 map: 98 values per statistic",
        "warn  2.2 BatchNorm, batch 2, 4x4 map: 32 values per statistic: the variance has a standard error of 25 %",
        "warn  3.2 BatchNorm, batch 2, 2x2 map: 8 values per statistic: the variance has a standard error of 53 %",
        "fail  4.2 BatchNorm, batch 2, 1x1 map: 2 values per statistic: outputs are about +-1 whatever the input",
        "2 ok, 2 warn, 1 fail"]
    assert not report.ok
    assert preflight(build("RunningBatchNorm", 0), torch.randn(2, 784), tfm=view_tfm(1, 28, 28)).ok


# --- preflight: which batches -------------------------------------------------------------------------------------

def loader(n, bs, **kwargs):
    ds = Dataset(torch.randn(n, 4, 1, 1), torch.zeros(n))
    return get_dls(ds, ds, bs, **kwargs)[0]


def test_the_smaller_last_batch_is_reported_where_it_is_worse():
    model = nn.Sequential(RunningBatchNorm(4), nn.BatchNorm2d(4), LayerNorm())
    found = preflight(model, loader(81, 40)).findings
    assert [(f.path, f.batch, f.last, f.level) for f in found] == [
        ("0", 40, False, "ok"), ("1", 40, False, "ok"), ("2", 40, False, "warn"), ("1", 1, True, "fail")]
    assert str(found[3]).startswith("fail  1 BatchNorm2d, last batch of 1, 1x1 map: 1 value per statistic: it refuses")
    # two failures differ if the last batch has fewer values; a warning is not repeated
    assert [(f.batch, f.values) for f in preflight(model[1:2], loader(5, 2)).findings] == [(2, 2), (1, 1)]
    assert [f.batch for f in preflight(model[1:2], loader(30, 20)).findings] == [20]


@pytest.mark.parametrize("data", [
    lambda: loader(82, 41), lambda: loader(81, 40, drop_last=True),
    lambda: torch.utils.data.DataLoader(loader(82, 41).dataset, 41), lambda: [(torch.randn(40, 4, 1, 1), None)],
    lambda: (x for x in torch.randn(2, 40, 4, 1, 1)), lambda: torch.randn(40, 4, 1, 1)])
def test_without_a_smaller_last_batch_there_is_one_finding(data):
    f, = preflight(nn.Sequential(nn.BatchNorm2d(4)), data()).findings
    assert f.batch >= 40


def test_item_by_item_loaders_tell_their_last_batch_too():
    dl = torch.utils.data.DataLoader(torch.randn(81, 4, 1, 1), 40)
    assert [f.batch for f in preflight(nn.Sequential(BatchNorm(4)), dl).findings] == [40, 1]


@pytest.mark.parametrize(("data", "error", "text"), [
    ([], ValueError, "preflight got a loader without a batch; give it at least one"),
    ([{"image": 1}], TypeError, r"preflight got a batch of dict; it needs a tensor xb of images: wrap what gives it"),
])
def test_data_that_makes_no_sense(data, error, text):
    with pytest.raises(error, match=text): preflight(nn.Sequential(BatchNorm(4)), data)


# --- nothing is left behind ---------------------------------------------------------------------------------------

class Changes(nn.Module):
    """Changes all that a forward can: in place, by putting something new in its place, in lists, at random."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3), persistent=False)
        self.plain, self.calls, self.log = torch.zeros(3), 0, [0]

    def forward(self, x):
        self.in_place += 1
        self.replaced, self.new = self.replaced + 1, torch.ones(1)
        if self.calls == 2: self.register_buffer("late", torch.ones(1))
        self.plain.add_(1)
        self.calls += 1
        self.log.append(random.random())
        return x + torch.rand(())


class Breaks(nn.Module):
    def forward(self, x): raise ValueError("mine")


def full_model(*more):
    """Every norm, dropout, and `Changes`; a norm in evaluation mode, gradients, a hook; after two training steps."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), Changes(), RunningBatchNorm(4),
                          BatchNorm(4), GroupNorm(2, 4), nn.InstanceNorm2d(4, track_running_stats=True), *more)
    for _ in range(2): model[:8](torch.randn(6, 3, 6, 6)).square().sum().backward()
    model[5].eval()
    model[0].register_forward_hook(lambda *args: None)
    return model


LOOKS = [preflight, train_eval_gap, lambda m, x: train_eval_gap(m, x, batch_size=2, modules="*")]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_as_it_was(look, breaks):
    model, x = full_model(*[Breaks()] * breaks), torch.randn(5, 3, 6, 6)
    grads = [p.grad.clone() for p in model.parameters()]
    buffers, changes = dict(model.named_buffers()), model[3]
    before, log = state(model), list(changes.log)
    if breaks:
        with pytest.raises(ValueError, match="mine"): look(model, x)
    else: look(model, x)
    assert same(before, state(model))
    assert all(buffers[k] is b for k, b in model.named_buffers())
    assert (changes.calls, changes.log, changes.plain.tolist()) == (2, log, [2.0] * 3)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert len(hooks(model)) == 1


def test_an_attribute_that_a_forward_makes_is_gone_again():
    model = nn.Sequential(Changes(), BatchNorm(3))
    preflight(model, torch.randn(4, 3))
    assert not hasattr(model[0], "new")


@pytest.mark.parametrize("seed", [None, 3])
def test_the_loader_gives_the_same_batches_afterwards(seed):
    orders = []
    for look in (False, True):
        torch.manual_seed(0)
        dl = loader(20, 4, generator=None if seed is None else torch.Generator().manual_seed(seed))
        if look: preflight(nn.Sequential(BatchNorm(4)), dl)
        orders.append(torch.cat([xb for xb, _ in dl]))
    assert torch.equal(*orders)


@pytest.mark.parametrize("look", [preflight, train_eval_gap])
def test_a_model_that_does_not_know_its_channels_yet_is_refused(look):
    with pytest.raises(ValueError, match="Sequential has layers that don't know their channels yet; run one batch"):
        look(nn.Sequential(nn.LazyBatchNorm2d()), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("way", ["wrapped", "in place", "a part"])
def test_a_compiled_model_is_looked_at_as_it_was_written(way):
    plain = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), nn.Flatten())
    twin, x = copy.deepcopy(plain), torch.randn(4, 3, 6, 6)
    torch._dynamo.reset()
    if way == "wrapped": twin = torch.compile(twin, backend="eager")
    elif way == "in place": twin.compile(backend="eager")
    else: twin[0] = torch.compile(twin[0], backend="eager")
    twin(x)
    plain(x)
    f, = preflight(twin, x).findings
    assert (f.path, f.text) == ("0._orig_mod.2" if way == "a part" else "0.2", "64 values per statistic")
    assert train_eval_gap(twin, x).rows["gap"] == train_eval_gap(plain, x).rows["gap"]


# --- training against evaluation ----------------------------------------------------------------------------------

def norm_by_hand(mean, var):
    """A batch norm that evaluates by `mean` and `var`."""
    norm = BatchNorm(len(mean), eps=0.0)
    norm.running_mean.copy_(torch.tensor(mean))
    norm.running_var.copy_(torch.tensor(var))
    return norm


def test_the_gap_by_hand():
    # Channel means 1 and 2, variances 1 and 4: in training both rows are -1 and 1.
    # In evaluation the channels are (0, 1) and (-2, 2); the differences (-1, 0) and (1, -1).
    model, x = nn.Sequential(norm_by_hand([0.0, 2.0], [4.0, 1.0])), torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    report = train_eval_gap(model, x)
    row, out = report.rows
    assert row == {"path": "0", "module": "BatchNorm", "values": 2, "gap": pytest.approx(math.sqrt(3 / 4)),
                   "image": pytest.approx(math.sqrt(1 / 2)), "own": pytest.approx(math.sqrt(3 / 4)), "channel": 1,
                   "limit": 1.0, "share": pytest.approx(2 / 3), "mean_off": pytest.approx(0.0),
                   "var_ratio": pytest.approx(1 / 4), "reach": pytest.approx(2.0),
                   "train_max": pytest.approx(1.0), "eval_max": pytest.approx(2.0)}
    assert {k: out[k] for k in ("path", "module", "values", "gap", "own")} == {
        "path": "output", "module": "Sequential", "values": None, "gap": pytest.approx(math.sqrt(3 / 4)), "own": None}
    assert report.channels == {"0": {"share": pytest.approx([1 / 3, 2 / 3]), "mean_off": pytest.approx([1.0, 0.0]),
                                     "var_ratio": pytest.approx([4.0, 1 / 4]), "reach": pytest.approx([1.0, 2.0])}}
    assert str(report).splitlines() == [
        "layer              values    gap  image    own  channel  share  mean off  var ratio  reach  train  eval",
        "0 BatchNorm             2  0.866  0.707  0.866        1  0.667         0       0.25      2      1     2",
        "output Sequential       -  0.866  0.707      -        1  0.667         -          -      -      1     2",
        "The modes agree: the difference at output is 0.87 of its size, at no layer more than 0.87."]


def test_training_mode_takes_batches_each_from_the_present_state():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), RunningBatchNorm(4), nn.Flatten(),
                          nn.Linear(64, 5)).double()
    for _ in range(30): model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    x = torch.randn(7, 3, 6, 6, dtype=torch.float64) + 0.5
    report = train_eval_gap(model, x, batch_size=3, modules=[nn.Conv2d, "5"])

    def outputs(upto, mode):
        twins = [copy.deepcopy(model).train(mode) for _ in range(3)]
        return torch.cat([twin[:upto](chunk) for twin, chunk in zip(twins, x.split(3), strict=True)]).detach()
    assert [(r["path"], r["values"]) for r in report.rows] == [
        ("0", None), ("1", 48), ("3", 48), ("5", None), ("output", None)]
    for row, upto in zip(report.rows, (1, 2, 4, 6, 6), strict=True):
        t, e = outputs(upto, True), outputs(upto, False)
        assert row["gap"] == pytest.approx(((t - e).norm() / t.norm()).item(), abs=1e-12)
        each = [((a - b).norm() / a.norm()).item() for a, b in zip(t, e, strict=True)]
        assert row["image"] == pytest.approx(sorted(each)[3], abs=1e-12)
        assert (row["train_max"], row["eval_max"]) == pytest.approx((t.abs().max().item(), e.abs().max().item()))
    t, before = outputs(4, True), outputs(3, True)
    alone = copy.deepcopy(model)[3].eval()(before)
    assert report.rows[2]["own"] == pytest.approx(((t - alone).norm() / t.norm()).item())
    # What reaches the norms in evaluation mode, all images together.
    for path, k in (("1", 1), ("3", 3)):
        values, norm = outputs(k, False), model[k]
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), unbiased=False) + norm.eps
        found = report.channels[path]
        assert found["mean_off"] == pytest.approx(((norm.running_mean - mean).abs() / var.sqrt()).tolist())
        assert found["var_ratio"] == pytest.approx(((norm.running_var + norm.eps) / var).tolist())
        away = (values - norm.running_mean.view(-1, 1, 1)) / (norm.running_var + norm.eps).sqrt().view(-1, 1, 1)
        assert found["reach"] == pytest.approx(away.abs().amax((0, 2, 3)).tolist())


def test_norms_of_an_images_own_have_no_gap():
    model = nn.Sequential(GroupNorm(2, 4), InstanceNorm(4), nn.LayerNorm(3), LayerNorm())
    report = train_eval_gap(model, torch.randn(5, 4, 3, 3), batch_size=2)
    assert report.rows["gap"] == [0.0] * 5
    assert report.rows["channel"] == [None] * 5
    assert report.channels == {}
    assert report.cause == "The modes agree: the difference at output is 0 of its size, at no layer more than 0."


def test_what_follows_may_write_into_the_norms_output_and_input():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.norm(x := x * 2)
            x += 1e3
            return y.mul_(0)
    x = torch.randn(8, 3)
    row, _ = train_eval_gap(Add(), x).rows
    alone, _ = train_eval_gap(nn.Sequential(nn.BatchNorm1d(3)), x * 2).rows
    assert {**alone, "path": "norm"} == row


def test_dropout_shows_in_the_output_and_not_as_the_norms_own():
    model = nn.Sequential(nn.Dropout(0.5), GroupNorm(1, 4))
    norm, out = train_eval_gap(model, torch.randn(50, 4)).rows
    assert norm["gap"] == out["gap"] > 0.1
    assert norm["own"] == 0


def test_a_layer_that_runs_twice_has_two_rows():
    norm = nn.BatchNorm1d(3)
    report = train_eval_gap(nn.Sequential(norm, nn.Linear(3, 3), norm), torch.randn(8, 3))
    assert report.rows["path"] == ["0", "0", "output"]


@pytest.mark.parametrize(("mean", "var", "text"), [
    ([0.0, 2.0], [1.0, 0.01], "% of it lies in channel 1: its running variance is 4e+02 times too small for what comes "
     "in, and evaluation mode puts it up to 20 standard deviations from the mean (in training mode 1 at most, of 2 "
     "values)."),
    ([1.0, -38.0], [1.0, 4.0], "its running mean is 20 standard deviations off for what comes in"),
])
def test_the_cause_is_told_from_the_figures(mean, var, text):
    cause = train_eval_gap(nn.Sequential(norm_by_hand(mean, var)), torch.tensor([[0.0, 0.0], [2.0, 4.0]])).cause
    assert cause.startswith("The modes part at 0 (BatchNorm): the difference is ")
    assert text in cause


def test_the_cause_where_the_running_statistics_fit():
    # Each batch of two is normalised to -1 and 1, however near its two values are; over all of them the statistics fit.
    x = torch.tensor([[-2.0], [-1.99], [2.0], [1.99], [0.01], [0.0]])
    norm = norm_by_hand([0.0], [x.var(unbiased=False).item()])
    cause = train_eval_gap(nn.Sequential(norm, nn.Linear(1, 1, bias=False)), x, batch_size=2).cause
    assert "lies in channel 0: its running statistics fit for what comes in" in cause


def test_values_that_are_not_finite_are_named():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Threshold(1e9, math.nan))
    report = train_eval_gap(model, torch.randn(4, 2), modules=nn.Threshold)
    assert report.cause == "What 1 (Threshold) gives is not finite, or all 0 in training mode."


def test_outputs_of_any_shape_are_compared_if_they_have_one_shape_in_both_modes():
    class Pick(nn.Module):
        """`(N, 3)` to `(N,)`, or in training to a tuple of that and something else."""
        def forward(self, x): return (x[:, 0], "more") if self.training else x[:, 0]

    class Fewer(nn.Module):
        def forward(self, x): return x[:1] if self.training else x
    x = torch.randn(8, 3)
    norm, out = train_eval_gap(nn.Sequential(nn.BatchNorm1d(3), Pick()), x).rows
    t, e = (x[:, 0] - x[:, 0].mean()) / x[:, 0].std(unbiased=False), x[:, 0]
    assert out["gap"] == pytest.approx(((t - e).norm() / t.norm()).item(), rel=1e-4)
    assert norm["path"] == "0"
    assert train_eval_gap(Fewer(), x).cause == "No layer gave tensors of one shape in both modes."


def test_a_frozen_norm_has_no_limit_and_no_gap_of_its_own():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True): return super().train(False)
    norm, _ = train_eval_gap(nn.Sequential(Frozen(3)), torch.randn(2, 3)).rows
    assert (norm["gap"], norm["own"], norm["limit"], norm["values"]) == (0.0, None, None, 2)


def small_batch_gap(norm, seed, images, steps=300):
    """The main job's network after some steps at batch size 2 and lr 0.4."""
    model = build(norm, seed)
    opt = torch.optim.SGD(model.parameters(), lr=0.4)
    dl, _ = get_dls(images.train, images.valid, 2, drop_last=True, generator=torch.Generator().manual_seed(seed))
    for _, (xb, yb) in zip(range(steps), dl, strict=False):
        F.cross_entropy(model(xb.view(-1, 1, 28, 28)), yb).backward()
        opt.step()
        opt.zero_grad()
    return train_eval_gap(model, images.valid.x[:100], batch_size=2, tfm=view_tfm(1, 28, 28))


def test_batch_norm_at_batch_size_2_parts_and_running_batch_norm_does_so_less():
    # The median image's difference at the output. Over 8 seeds, 300 and 500 steps and both kinds of convolution it was
    # 0.67 to 7.8e3 with batch norm and 0.03 to 0.34 with running batch norm. The whole batch's difference says less: a
    # few images make it, of which running batch norm has some too (0.04 to 4e3; batch norm 0.8 to 3e10).
    images = load_data("digits")
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.set_flags(False)                          # at batch size 2 twice as fast
    try: gaps = {norm: [small_batch_gap(norm, seed, images) for seed in (0, 1)]
                 for norm in ("BatchNorm2d", "RunningBatchNorm")}
    finally: torch.backends.mkldnn.set_flags(before)
    of = {norm: [g.rows[-1]["image"] for g in found] for norm, found in gaps.items()}
    assert min(of["BatchNorm2d"]) > 0.5 > max(of["RunningBatchNorm"]), of
    for report in gaps["BatchNorm2d"]:
        last = report.rows[4]
        assert (last["path"], last["values"], last["limit"]) == ("4.2", 2, 1.0)
        assert last["reach"] > 5                                    # of at most 1 in training; 10 to 1e11 measured
        assert report.cause.startswith("The modes part at ")


@pytest.mark.parametrize(("args", "error", "text"), [
    ({"xb": [1]}, TypeError, "train_eval_gap got a batch of list; it needs a tensor xb of images"),
    ({"xb": torch.zeros(0, 2)}, ValueError, "train_eval_gap got an empty batch; give it images"),
    ({"batch_size": 0}, ValueError, "train_eval_gap: batch_size is 0; it must be a positive integer, such as 2"),
    ({"modules": "conv"}, ValueError, r"train_eval_gap: 'conv' finds no module.*'0' \(BatchNorm1d\)"),
])
def test_arguments_of_the_gap_that_make_no_sense(args, error, text):
    model = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(error, match=text): train_eval_gap(model, **{"xb": torch.ones(2, 2)} | args)


# --- NormStats ----------------------------------------------------------------------------------------------------

class Keep(Callback):
    """Every training batch as the runner sees it."""

    def __init__(self): self.xbs = []

    def begin_batch(self):
        if self.in_train: self.xbs.append(self.xb.clone())


def fitted(norm, stats, n=22, bs=4, scale=1.0, epochs=1, cbs=()):
    """Fit a norm that gets the images themselves, 4 channels of 3x3: five batches of 4 and one of 2."""
    ds = Dataset(torch.randn(n, 4, 3, 3) * scale + 0.5, torch.randint(0, 3, (n,)))
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(36, 3))
    learn = Learner(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy,
                    DataBunch(*get_dls(ds, ds, bs), 3))
    keep = Keep()
    Runner([stats, keep, *cbs]).fit(epochs, learn)
    return keep.xbs, learn


def quiet(**kwargs): return NormStats(verbose=False, **kwargs)


def weights_of(norm, weights):
    """A callback that keeps the norm's weight before every step."""
    class Look(Callback):
        def begin_batch(self):
            if self.in_train: weights.append(norm.weight.detach().clone())
    return Look()


@pytest.mark.parametrize("norm", [BatchNorm(4), nn.BatchNorm2d(4)])
def test_norm_stats_of_batch_norm_by_hand(norm):
    stats, weights = quiet(), []
    xbs, _ = fitted(norm, stats, cbs=[weights_of(norm, weights)])
    assert [(r["module"], r["step"], r["n"]) for r in stats.rows] == [
        *(("0", i, 36) for i in range(5)), ("0", 5, 18)]            # the last batch has 2 images
    mean, var = torch.zeros(4), torch.ones(4)
    for row, x, w in zip(stats.rows, xbs, weights, strict=True):
        m, v = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * v * row["n"] / (row["n"] - 1)
        assert row["mean"] == pytest.approx(m.tolist(), abs=1e-6)
        assert row["var"] == pytest.approx(v.tolist(), rel=1e-5)
        assert row["running_mean"] == pytest.approx(mean.tolist(), abs=1e-6)
        assert row["running_var"] == pytest.approx(var.tolist(), rel=1e-5)
        assert row["scale"] == pytest.approx((w / (v + 1e-5).sqrt()).tolist(), rel=1e-5)
        assert "clamped" not in row


def test_norm_stats_of_running_batch_norm_by_hand_with_its_clamp():
    stats, norm, weights = quiet(), RunningBatchNorm(4, rule="per_image"), []
    xbs, _ = fitted(norm, stats, scale=torch.tensor([0.02, 0.05, 0.5, 2.0]).view(4, 1, 1),
                    cbs=[weights_of(norm, weights)])
    # 4, 8, 12, 16 images are fewer than 20; the variances are about 0.0004, 0.0025, 0.25 and 4
    assert stats.series("0", "clamped") == ([0, 1, 2, 3, 4, 5], [2, 2, 2, 2, 0, 0])
    total = count = square = 0.0
    for i, (row, x, w) in enumerate(zip(stats.rows, xbs, weights, strict=True)):
        alpha = 1 - 0.9 ** (len(x) / 2)                             # the definition: averages of sums and counts
        x = x.double()
        total = (1 - alpha) * total + alpha * x.sum((0, 2, 3))
        square = (1 - alpha) * square + alpha * x.square().sum((0, 2, 3))
        count = (1 - alpha) * count + alpha * x.numel() / 4
        mean, var = total / count, square / count - (total / count).square()
        assert row["running_mean"] == pytest.approx(mean.tolist(), abs=1e-5)
        used = var.clamp_min(0.01) if i < 4 else var
        assert row["running_var"] == pytest.approx(used.tolist(), rel=1e-3)
        assert row["scale"] == pytest.approx((w / (used + 1e-5).sqrt()).tolist(), rel=1e-3)
        assert type(row["clamped"]) is int


@pytest.mark.parametrize(("norm", "groups"), [
    (GroupNorm(2, 4), 2), (nn.GroupNorm(2, 4), 2), (InstanceNorm(4), 4), (GroupNorm(1, 4), 1),
    (nn.InstanceNorm2d(4, affine=True), 4), (EvoNormS0(4, 2), 2), (FilterResponseNorm(4), 4)])
def test_norm_stats_of_an_images_own_statistics_are_means_over_images(norm, groups):
    stats, weights = quiet(), []
    xbs, _ = fitted(norm, stats, cbs=[weights_of(norm, weights)])
    for row, x, w in zip(stats.rows, xbs, weights, strict=True):
        parts = x.view(len(x), groups, -1)                          # (N, G, values)
        mean, var = parts.mean(2), parts.var(2, unbiased=False)
        if isinstance(norm, FilterResponseNorm): var = parts.square().mean(2)
        assert row["n"] == 36 // groups
        assert row["mean"] == pytest.approx(mean.mean(0).tolist(), abs=1e-6)
        assert row["var"] == pytest.approx(var.mean(0).tolist(), rel=1e-5)
        scale = (var + norm.eps).rsqrt().mean(0).repeat_interleave(4 // groups)
        assert row["scale"] == pytest.approx((w.flatten() * scale).tolist(), rel=1e-5)
        assert "running_mean" not in row


@pytest.mark.parametrize(("norm", "k", "scales"), [
    (LayerNorm(), 1, 1), (nn.LayerNorm((4, 3, 3)), 1, 36), (nn.RMSNorm(3), 1, 3), (nn.InstanceNorm2d(4), 4, 4),
    (nn.GroupNorm(2, 4, affine=False), 2, 2), (GroupNorm(2, 4, affine=False), 2, 2),
    (nn.BatchNorm2d(4, affine=False), 4, 4)])
def test_as_many_numbers_as_the_norm_has(norm, k, scales):
    stats = quiet()
    xbs, _ = fitted(norm, stats)
    row = stats.rows[0]
    assert (len(row["mean"]), len(row["var"]), len(row["scale"])) == (k, k, scales)
    if isinstance(norm, nn.RMSNorm):                                # of 4 x 3 rows per image
        square = xbs[0].square().mean(-1)
        assert row["var"] == pytest.approx([square.mean().item()], rel=1e-5)
        scale = (square + torch.finfo(torch.float32).eps).rsqrt().mean().item()
        assert row["scale"] == pytest.approx([scale] * 3, rel=1e-5)


def test_in_validation_the_scale_is_by_what_evaluation_uses():
    stats, norm = quiet(phases=["train", "valid"]), nn.BatchNorm2d(4)
    fitted(norm, stats, epochs=2)
    rows = stats.rows.where(phase="valid", epoch=1)
    assert rows["n"] == [72, 72, 54]
    for row in rows:
        assert row["running_var"] == pytest.approx(norm.running_var.tolist())
        expected = norm.weight / (norm.running_var + 1e-5).sqrt()
        assert row["scale"] == pytest.approx(expected.tolist(), rel=1e-5)


def test_norm_layers_are_chosen_and_nothing_else():
    for which, paths in ((None, ["0"]), (nn.BatchNorm2d, ["0"]), ("0", ["0"])):
        stats = quiet(which=which)
        fitted(nn.BatchNorm2d(4), stats)
        assert stats.paths == paths
    with pytest.raises(ValueError, match=r"NormStats: '2' finds no module.*which has '0' \(BatchNorm2d\)$"):
        fitted(nn.BatchNorm2d(4), quiet(which="2"))
    with pytest.raises(ValueError, match="NormStats found no norm layer in Sequential; it needs one of torch's, or one "
                                         r"with a method statistic_groups\(x\)"):
        fitted(nn.ReLU(), quiet())


def test_a_norm_of_ones_own_is_measured_by_the_protocol():
    class Own(nn.Module):
        """Divides by the root of the mean square of a batch's channel."""

        def __init__(self, channels):
            super().__init__()
            if channels: self.num_features = channels
            self.eps = 0.0

        def statistic_groups(self, x): return x.transpose(0, 1).flatten(1)

        def forward(self, x): return x / x.square().mean((0, 2, 3), keepdim=True).sqrt()
    stats = quiet()
    xbs, _ = fitted(Own(4), stats)
    assert stats.rows[0]["mean"] == pytest.approx(xbs[0].mean((0, 2, 3)).tolist(), abs=1e-6)
    text = r"NormStats can't tell how many channels the layer '0' \(Own\) has; give it an attribute num_features"
    with pytest.raises(ValueError, match=text): fitted(Own(None), quiet())


def test_past_statistics_without_buffers_are_used_for_the_scale():
    stats = quiet()
    own = Mine()
    own.num_features, own.eps, own.running_moments = 4, 0.0, lambda b: (torch.zeros(4), torch.full((4,), 4.0), None)
    fitted(own, stats)
    assert list(stats.rows[0])[-3:] == ["mean", "var", "scale"]
    assert stats.rows[0]["scale"] == [0.5] * 4


def test_the_picture_has_a_panel_for_each_norm_with_running_statistics():
    stats = quiet()
    fitted(nn.Sequential(GroupNorm(2, 4), BatchNorm(4)), stats)
    for name in ("mean", "var"):
        ax, = stats.plot(name)
        steps, batch, running = stats.series("0.1", name, f"running_{name}")
        assert (ax.get_title(loc="left"), ax.get_ylabel()) == ("0.1", name)
        for label, values in (("batch: median", batch), ("running: median", running)):
            line = next(line for line in ax.lines if line.get_label() == label)
            assert list(line.get_xdata()) == steps
            assert list(line.get_ydata()) == pytest.approx([statistics.median(v) for v in values])
    plt.close("all")
    with pytest.raises(ValueError, match="name is 'scale'; choose 'mean' or 'var'"): stats.plot("scale")
    stats = quiet()
    fitted(GroupNorm(2, 4), stats)
    with pytest.raises(ValueError, match="no norm that was looked at keeps any; plot a number"): stats.plot()


@pytest.mark.parametrize("norm", [BatchNorm(4), RunningBatchNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(3), LayerNorm()])
def test_nothing_comes_to_the_host_inside_a_batch(norm, monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("a host copy")
    stats, taken = quiet(), []
    stats.layouts = {"": stats.layout("", norm)}
    stats.take = lambda path, values, n: taken.append(values)
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    stats.tap("", norm, (torch.ones(2, 4, 3, 3),), {}, None)
    assert taken[0].shape == (sum(k or 1 for k in stats.layouts[""].values()),)


@pytest.mark.parametrize("event", ["after_pred", "after_loss", "after_step"])
def test_norm_stats_hooks_are_gone_after_an_exception(event):
    seen = []

    class Fails(Callback):
        def __call__(self, name):
            if name == event and self.n_iter == 2:
                seen.append((self.model, len(hooks(self.model))))
                raise ZeroDivisionError("broken")
    stats = quiet()
    with pytest.raises(ZeroDivisionError, match="broken"): fitted(nn.BatchNorm2d(4), stats, cbs=[Fails()])
    (model, during), = seen
    assert during == 1
    assert not hooks(model)
    assert len(stats.rows) == 3


def test_looking_at_norms_changes_nothing():
    ends = []
    for cbs in ([Callback()], [quiet(phases=["train", "valid"])]):
        torch.manual_seed(5)
        _, learn = fitted(RunningBatchNorm(4), *cbs)
        ends.append(learn.model.state_dict())
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_preflight_says_before_there_is_a_group_that_processes_are_to_come(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), BatchNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    ours, torchs = (f.text for f in preflight(model, torch.randn(2, 1, 8, 8)).findings)
    text = "2 processes were started, and each is to normalise by its own part of the batch's 2 images: "
    assert f"{text}sync_norms(model)" in ours
    assert f"{text}convert_norms(model, norms.BatchNorm) and sync_norms(model)" in torchs
    sync_norms(model)
    assert "processes" not in preflight(model, torch.randn(2, 1, 8, 8)).findings[0].text


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("between", [None, nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True),
                                     nn.LeakyReLU(0.1, inplace=True), nn.Dropout(0.5, inplace=True)], ids=str)
def test_a_bias_has_an_effect_if_anything_changes_it_before_the_norm(between, inference):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *[between] * (between is not None), nn.BatchNorm2d(4))
    with torch.inference_mode(inference): found, = preflight(model, torch.randn(8, 3, 9, 9)).findings
    plain = between is None or isinstance(between, nn.Identity)
    # Tensors of inference mode don't count their changes: there nothing is known, and nothing said.
    assert ("has no effect" in found.text) == (plain and not inference)
