"""The lesson's networks."""

from functools import partial

import pytest
import torch
from torch import nn

from experiments.models import (
    CHANNELS,
    AvgPool,
    GeneralRelu,
    Lambda,
    channels_last_,
    conv_layer,
    flatten,
    get_cnn_model,
    get_learn_run,
    get_runner,
    init_alike,
    init_cnn,
)
from experiments.published.small_batch import NORMS, build
from norms import BatchNorm, GroupNorm
from runner import AvgStatsCallback, DataBunch, Dataset, Recorder, accuracy, get_dls


@pytest.fixture
def bunch():
    x, y = torch.randn(24, 1, 28, 28), torch.arange(24) % 10
    return DataBunch(*get_dls(Dataset(x, y), Dataset(x, y), 8), 10)


def test_general_relu_by_hand():
    x = torch.tensor([-2.0, 0.5, 9.0])
    assert GeneralRelu()(x).tolist() == [0, 0.5, 9]
    assert GeneralRelu(leak=0.1)(x).tolist() == pytest.approx([-0.2, 0.5, 9])
    assert GeneralRelu(leak=0.1, sub=0.4, maxv=6.0)(x).tolist() == pytest.approx([-0.6, 0.1, 6])
    assert x.tolist() == [-2, 0.5, 9]


def test_lambda_and_flatten():
    assert Lambda(flatten)(torch.zeros(3, 2, 4)).shape == (3, 8)
    assert repr(Lambda(flatten)) == "Lambda(flatten)"


def test_avg_pool_is_torch_s():
    for size in ((1, 1), (3, 2), (1, 4)):
        x = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
        y, want = AvgPool()(x), nn.AdaptiveAvgPool2d(1)(x)
        torch.testing.assert_close(y, want, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(*(torch.autograd.grad(t.pow(2).sum(), x)[0] for t in (y, want)))


@pytest.mark.parametrize("norm", ["RunningBatchNorm", "BatchNorm2d", "GroupNorm", "none"])
def test_channels_last_changes_the_layout_and_not_the_network(norm):
    first, last = (build(norm, 0).double() for _ in range(2))
    assert channels_last_(last) is last
    convs = [m.weight for m in last.modules() if isinstance(m, nn.Conv2d)]
    assert [w.is_contiguous() for w in convs] == [True] + [False] * 4
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convs[1:])
    for _ in range(3):
        x, results = torch.randn(2, 1, 28, 28, dtype=torch.float64), []
        for m in (first, last):
            y = m(x)
            results.append([y, *torch.autograd.grad(y.pow(2).sum(), list(m.parameters()))])
        for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(first.state_dict().values(), last.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_conv_layer_is_conv_relu_norm_and_has_a_bias_only_without_a_norm():
    layer = conv_layer(3, 8, norm=partial(GroupNorm, 4), leak=0.1)
    assert [type(m) for m in layer] == [nn.Conv2d, GeneralRelu, GroupNorm]
    assert layer[0].bias is None
    assert layer[1].leak == 0.1
    assert conv_layer(3, 8)[0].bias is not None
    assert layer(torch.randn(2, 3, 9, 9)).shape == (2, 8, 5, 5)


def test_maps_shrink_as_published(bunch):
    model, shapes, x = get_cnn_model(bunch, CHANNELS, conv_layer, norm=BatchNorm), [], torch.randn(4, 1, 28, 28)
    for layer in model:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(8, 14, 14), (16, 7, 7), (32, 4, 4), (64, 2, 2), (64, 1, 1), (64, 1, 1), (64,), (10,)]
    assert [m.kernel_size[0] for m in model.modules() if isinstance(m, nn.Conv2d)] == [5, 3, 3, 3, 3]


def test_init_cnn_reaches_nested_convolutions():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv2d(16, 400, 3))))
    init_cnn(model)
    conv = model[0][0][0]
    # Kaiming with a = 0.1 and fan-in 144: std = sqrt(2 / (1 + 0.01) / 144); 57,600 draws.
    assert conv.weight.std().item() == pytest.approx((2 / 1.01 / 144) ** 0.5, rel=0.02)
    assert conv.bias.abs().max() == 0
    init_cnn(model, uniform=True)
    assert conv.weight.abs().max().item() <= (6 / 1.01 / 144) ** 0.5


def test_every_norm_starts_from_the_same_weights():
    def weights(norm, seed):
        return [p for m in build(norm, seed).modules() if isinstance(m, (nn.Conv2d, nn.Linear))
                for p in m.parameters() if p.ndim > 1 or isinstance(m, nn.Linear)]
    reference = weights("none", 3)
    assert len(reference) == 7
    for norm in NORMS:
        for p, q in zip(reference, weights(norm, 3), strict=True): assert torch.equal(p, q)
    assert not torch.equal(reference[0], weights("none", 4)[0])


def test_init_alike_depends_on_nothing_but_the_seed():
    a, b = (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2)) for _ in range(2))
    init_alike(a, 1)
    torch.rand(5)
    init_alike(b, 1)
    for p, q in zip(a.parameters(), b.parameters(), strict=True): assert torch.equal(p, q)


def test_get_learn_run_trains_with_instances_and_factories(bunch, capsys):
    learn, run = get_learn_run([4, 8], bunch, 0.2, conv_layer, cbs=[Recorder, partial(AvgStatsCallback, accuracy)],
                               norm=BatchNorm, leak=0.1)
    run.fit(1, learn)
    assert len(run.recorder.losses) == 3
    assert run.recorder.lrs[0] == [0.2] * 3
    assert "train: [" in capsys.readouterr().out
    recorder = Recorder()
    learn, run = get_runner(learn.model, bunch, cbs=recorder, opt_func=partial(torch.optim.SGD, momentum=0.9))
    run.fit(1, learn)
    assert run.recorder is recorder
    assert learn.opt.param_groups[0]["momentum"] == 0.9
    assert learn.opt.param_groups[0]["lr"] == 0.6


def test_data_without_a_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"whose number of classes, c, is None; give it, as in DataBunch\(train_dl"):
        get_cnn_model(DataBunch(None, None), [4], conv_layer)
