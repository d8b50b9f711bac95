"""Swapping the norms of a model, and taking their statistics anew."""

import copy
import pickle
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.models import resnet18
from torchvision.ops import Conv2dNormActivation
from torchvision.ops.misc import FrozenBatchNorm2d

from experiments.models import conv_layer, get_cnn_model
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm, convert_norms, recalibrate
from norms.convert import CARRIED_COUNT

NORMS = (nn.BatchNorm2d, BatchNorm, RunningBatchNorm)


def cnn(norm):
    """The project's five conv layers with 4 to 8 channels, for 28x28 images."""
    return get_cnn_model(SimpleNamespace(c=10), [4, 4, 8, 8, 8], conv_layer, norm=norm)


def trained(model, x, steps=3):
    """`model` after a few training forwards, so that its statistics and counts are its own, with random affine maps."""
    for m in model.modules():
        if isinstance(m, NORMS): nn.init.uniform_(m.weight, 0.5, 2), nn.init.normal_(m.bias)
    with torch.no_grad():
        for _ in range(steps): model(x + torch.randn_like(x))
    return model.eval()


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# --- convert_norms: outputs and state ---------------------------------------------------------------------------------

MODELS = {"resnet18": (resnet18, (2, 3, 64, 64), 20), "cnn": (partial(cnn, nn.BatchNorm2d), (4, 1, 28, 28), 5)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("other", [BatchNorm, RunningBatchNorm])
def test_there_and_back_evaluates_alike(name, dtype, other):
    make, shape, layers = MODELS[name]
    x = torch.randn(shape, dtype=dtype)
    model = trained(make().to(dtype), x)
    tol = 1e-6 if dtype == torch.float32 else 1e-12
    y = model(x)
    before = copy.deepcopy(model)
    assert convert_norms(model, other) == {"BatchNorm2d": layers}
    assert sum(isinstance(m, other) for m in model.modules()) == layers
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model(x), y, rtol=tol, atol=tol * y.abs().max().item())
    assert convert_norms(model, nn.BatchNorm2d) == Counter({other.__name__: layers})
    torch.testing.assert_close(model(x), y, rtol=tol, atol=tol * y.abs().max().item())
    if other is BatchNorm: assert same_state(model, before)
    assert repr(model) == repr(before)


def test_batch_norm_goes_on_training_as_torchs_would():
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    ours = trained(cnn(partial(nn.BatchNorm2d, eps=1e-3, momentum=0.3)).double(), x).train()
    theirs = copy.deepcopy(ours)
    convert_norms(ours, BatchNorm)
    assert {(m.eps, m.mom) for m in ours.modules() if isinstance(m, BatchNorm)} == {(1e-3, 0.3)}
    for _ in range(3): torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-10)
    a, b = ours.state_dict(), theirs.state_dict()
    for k in b: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("torchs", "ours", "shape"), [
    (nn.BatchNorm1d, BatchNorm, (5, 4)), (nn.BatchNorm1d, BatchNorm, (5, 4, 3)),
    (nn.BatchNorm3d, BatchNorm, (3, 4, 2, 2, 2)), (nn.SyncBatchNorm, BatchNorm, (3, 4, 5, 5)),
    (partial(nn.GroupNorm, 2, eps=1e-3), lambda nf: GroupNorm(2, nf), (3, 4, 5, 5)),
    (partial(nn.GroupNorm, 2, affine=False), lambda nf: GroupNorm(2, nf), (3, 4, 5, 5)),
    (partial(nn.InstanceNorm1d, affine=True), InstanceNorm, (3, 4, 5)),
    (nn.InstanceNorm2d, InstanceNorm, (3, 4, 5, 5)),    # without affine and, as the others, with its own eps, not 1
    (partial(nn.InstanceNorm3d, track_running_stats=True), BatchNorm, (3, 4, 2, 2, 2)),
])
def test_each_kind_evaluates_alike_there_and_back(torchs, ours, shape):
    model = nn.Sequential(torchs(4)).double()
    for p in model.parameters(): nn.init.normal_(p)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    for b in model.buffers():
        if b.ndim: nn.init.uniform_(b, 0.5, 2)
    model.eval()
    y, kind, before = model(x), type(model[0]).__name__, copy.deepcopy(model)
    assert convert_norms(model, ours) == {kind: 1}
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    assert convert_norms(model, torchs) == {type(ours(4)).__name__: 1}
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    assert same_state(model, before)


def test_to_group_norm_takes_the_parameters_and_the_factorys_settings():
    model = trained(cnn(BatchNorm), torch.randn(4, 1, 28, 28))
    params = dict(model.named_parameters())
    assert convert_norms(model, lambda nf: GroupNorm(2, nf, eps=1e-3)) == {"BatchNorm": 5}
    assert repr(model[0][2]) == "GroupNorm(2, 4, eps=0.001, affine=True)"
    assert all(p is params[k] for k, p in model.named_parameters())
    # Back again there is nothing to carry: the statistics are those of an untrained layer.
    assert convert_norms(model, BatchNorm) == {"GroupNorm": 5}
    assert model[0][2].running_mean.tolist() == [0] * 4
    assert model[0][2].num_batches_tracked == 0


# --- convert_norms: optimizers, tied and shared things ----------------------------------------------------------------

def test_optimizer_goes_on_with_its_groups_and_momentum():
    model = cnn(nn.BatchNorm2d)
    gains = [p for n, p in model.named_parameters() if n.endswith("2.weight")]
    rest = [p for p in model.parameters() if not any(p is g for g in gains)]
    opt = optim.SGD([{"params": gains, "lr": 0.5}, {"params": rest}], lr=0.1, momentum=0.9)

    def step():
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(8, 1, 28, 28)), torch.arange(8)).backward()
        opt.step()
    step()
    momenta = {p: s["momentum_buffer"] for p, s in opt.state.items()}
    names = [n for n, _ in model.named_parameters()]
    convert_norms(model, RunningBatchNorm)
    assert [n for n, _ in model.named_parameters()] == names
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    old = {p: m.clone() for p, m in momenta.items()}
    step()
    for n, p in model.named_parameters():
        assert not torch.equal(p, before[n]), n
        assert opt.state[p]["momentum_buffer"] is momenta[p]
        torch.testing.assert_close(momenta[p], 0.9 * old[p] + p.grad)
    # The first group's rate reaches the new layers: w' = w - 0.5 momentum.
    w = model[0][2].weight
    assert w is gains[0]
    torch.testing.assert_close(w.detach(), before["0.2.weight"] - 0.5 * momenta[w])


def test_shared_layer_and_tied_parameters_stay_so():
    shared, tied = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ModuleDict({"a": tied, "b": shared}))
    assert convert_norms(model, RunningBatchNorm) == {"BatchNorm2d": 2}
    assert model[0] is model[2] is model[3]["b"]
    assert model[3]["a"] is not model[0]
    assert model[3]["a"].weight is model[0].weight is shared.weight
    twice = nn.Module()     # one parent that has the layer under two names
    twice.a = twice.b = shared
    assert convert_norms(twice, BatchNorm) == {"BatchNorm2d": 1}
    assert twice.a is twice.b
    assert isinstance(twice.a, BatchNorm)


def test_modes_and_requires_grad_are_kept_layer_by_layer():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3))
    model[2].bias.requires_grad_(False)
    convert_norms(model, RunningBatchNorm)
    assert [m.training for m in model] == [True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_are_kept_and_running_statistics_are_never_half(dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4)).to(dtype)
    convert_norms(model, RunningBatchNorm)
    assert {p.dtype for p in model.parameters()} == {dtype}     # also of the layer that had none of its own
    assert model[1].running_var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    convert_norms(model, nn.BatchNorm2d)
    assert model[1].running_var.dtype == dtype
    assert model[1].num_batches_tracked.dtype == torch.int64


def test_device_is_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4)).to("meta")
    convert_norms(model, RunningBatchNorm)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


# --- convert_norms: what is carried into RunningBatchNorm and back ----------------------------------------------------

def test_trained_statistics_count_as_seen_and_fresh_ones_do_not():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    for m, batches in zip(model, (0, 3, 500), strict=True):
        m.num_batches_tracked.fill_(batches)
        if batches: m.running_var.fill_(1e-4)
    convert_norms(model, RunningBatchNorm)
    assert [m.seen.item() for m in model] == [0, 20, 500]
    assert [m.count.item() for m in model] == [0, CARRIED_COUNT, CARRIED_COUNT]
    assert [m.floor(m.seen).item() for m in model] == pytest.approx([0.01, 0, 0])
    convert_norms(model, nn.BatchNorm2d)
    assert [m.num_batches_tracked.item() for m in model] == [0, 20, 500]


def test_statistics_of_a_checkpoint_without_a_count_are_not_clamped():
    model = nn.Sequential(nn.BatchNorm2d(1, eps=0.0)).eval()
    model[0].running_var.fill_(1e-4)
    convert_norms(model, RunningBatchNorm)
    assert model(torch.full((1, 1, 1, 1), 0.5)).item() == pytest.approx(50)


def test_carried_statistics_have_their_share_in_the_next_step():
    # Carried: mean 2, var 4. Batch {1, 3} + 10: mean 12, var 1, n = 2 = W, so its share is alpha = 0.1 and d = 10.
    model = nn.Sequential(BatchNorm(1)).double()
    model[0].running_mean.fill_(2), model[0].running_var.fill_(4)
    convert_norms(model, RunningBatchNorm)
    model(torch.tensor([[11.0], [13.0]], dtype=torch.float64))
    assert model[0].running_mean.item() == pytest.approx(0.9 * 2 + 0.1 * 12)
    assert model[0].running_var.item() == pytest.approx(0.9 * 4 + 0.1 * 1 + 0.09 * 100)


def test_clamped_variance_goes_back_as_it_was_used():
    model = nn.Sequential(RunningBatchNorm(1))
    model(torch.tensor([[-0.001], [0.001]]))
    x = torch.randn(3, 1)
    y = model.eval()(x)
    convert_norms(model, BatchNorm)
    assert model[0].running_var.item() == pytest.approx(0.01)
    assert model[0].num_batches_tracked == 2
    assert torch.equal(model(x), y)


def test_running_to_running_keeps_the_whole_state_and_takes_the_factorys_rule():
    model = nn.Sequential(RunningBatchNorm(2, eps=1e-4))
    for _ in range(3): model(torch.randn(2, 2, 3, 3))
    before = copy.deepcopy(model)
    convert_norms(model, partial(RunningBatchNorm, mom=0.01, rule="per_image"))
    assert same_state(model, before)
    assert repr(model[0]) == "RunningBatchNorm(2, mom=0.01, eps=0.0001, rule='per_image')"


def test_momentum_of_the_factory_holds_for_running_batch_norm_and_where_torch_has_none():
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.5))
    convert_norms(model, partial(RunningBatchNorm, mom=0.02))
    assert model[0].mom == 0.02
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=None))
    convert_norms(model, BatchNorm)
    assert model[0].mom == 0.1


# --- convert_norms: layers without affine map or statistics -----------------------------------------------------------

def test_layer_without_affine_gets_a_frozen_identity_and_gives_it_back():
    plain = partial(nn.BatchNorm2d, affine=False)
    x = torch.randn(4, 3, 5, 5)
    model = nn.Sequential(plain(3))
    model(x)
    y = model.eval()(x)
    convert_norms(model, BatchNorm)
    assert [(p.tolist(), p.requires_grad) for p in model.parameters()] == [([1] * 3, False), ([0] * 3, False)]
    torch.testing.assert_close(model(x), y)
    convert_norms(model, plain)
    assert list(model.parameters()) == []
    assert torch.equal(model(x), y)


def test_untracked_batch_norm_starts_with_untrained_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    weight = model[0].weight
    convert_norms(model, RunningBatchNorm)
    assert model[0].weight is weight
    assert (model[0].seen.item(), model[0].count.item(), model[0].running_var.tolist()) == (0, 0, [1] * 3)
    model[0].running_mean.fill_(3)
    convert_norms(model, partial(nn.BatchNorm2d, track_running_stats=False))
    assert model[0].running_mean is None
    assert model[0].weight is weight


@pytest.mark.parametrize("norm", [BatchNorm, RunningBatchNorm])
def test_layer_without_affine_stays_without_where_the_factory_makes_it_so(norm):
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64) * 2 + 1
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False)).double()
    model(x), model[0].num_batches_tracked.fill_(30)
    y, before = model.eval()(x), copy.deepcopy(model)
    convert_norms(model, lambda nf: norm(nf, affine=False))
    assert list(model.parameters()) == []
    assert model[0].weight is model[0].bias is None
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    convert_norms(model, partial(nn.BatchNorm2d, affine=False))
    assert same_state(model, before)
    convert_norms(model, norm)
    convert_norms(model, lambda nf: norm(nf, affine=False))     # the frozen identity goes again
    assert list(model.parameters()) == []
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)


def test_models_dtype_holds_whatever_the_factory_and_our_wide_statistics_say():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    convert_norms(model, partial(RunningBatchNorm, device="cpu", dtype=torch.float16))
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float64, torch.int64}
    half = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm(4, affine=False)).bfloat16()     # with float32 statistics
    convert_norms(half, nn.BatchNorm2d)
    assert {p.dtype for p in half.parameters()} == {half[1].running_var.dtype} == {torch.bfloat16}


# --- convert_norms: the state of RunningBatchNorm ---------------------------------------------------------------------

@pytest.mark.parametrize("batches", [0, 3, 500])
@pytest.mark.parametrize("average_backward", [False, True])
def test_loading_a_batch_norms_state_dict_and_converting_agree(batches, average_backward):
    make = partial(RunningBatchNorm, average_backward=average_backward)
    old = nn.Sequential(nn.BatchNorm2d(3)).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 0.01
    if batches: old(x), nn.init.normal_(old[0].weight), old[0].running_var.mul_(1e-3)      # below the clamp
    old[0].num_batches_tracked.fill_(batches)
    loaded = nn.Sequential(make(3)).double()
    loaded.load_state_dict(old.state_dict())
    y = old.eval()(x)
    convert_norms(old, make)
    assert same_state(old, loaded)
    assert (old[0].seen.item(), old[0].count.item()) == (max(batches, 20) * bool(batches), 2 * bool(batches))
    torch.testing.assert_close(old(x), y, rtol=0, atol=1e-12)
    assert torch.equal(loaded.eval()(x), old(x))
    assert torch.equal(loaded.train()(x), old.train()(x))       # and they train on alike
    assert same_state(old, loaded)


@pytest.mark.parametrize("back", [nn.BatchNorm2d, BatchNorm, FrozenBatchNorm2d])
def test_clamped_statistics_evaluate_alike_in_every_other_norm(back):
    model = nn.Sequential(RunningBatchNorm(3)).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 0.01
    model(x)
    hidden = model[0].unclamped_var.clone()
    assert (hidden < model[0].running_var).all()
    y, clone = model.eval()(x), copy.deepcopy(model)
    convert_norms(clone, RunningBatchNorm)                      # to another one the hidden average goes too
    assert same_state(model, clone)
    convert_norms(model, back)
    assert model[0].running_var.tolist() == [0.01] * 3
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    convert_norms(model, RunningBatchNorm)
    assert (model[0].unclamped_var.tolist(), model[0].seen.item()) == ([0.01] * 3, 20)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)


def test_averages_of_the_backward_pass_go_only_to_another_such_norm():
    averaged = partial(RunningBatchNorm, average_backward=True)
    model, x = nn.Sequential(averaged(3)), torch.randn(2, 3, 5, 5, requires_grad=True)
    (model(x) * torch.randn(2, 3, 5, 5)).sum().backward()
    mean, dot = model[0].grad_mean.clone(), model[0].grad_dot.clone()
    assert mean.any()
    assert dot.any()
    recalibrate(model, [x.detach()], 2)                         # which says nothing of the gradients
    convert_norms(model, averaged)
    assert torch.equal(model[0].grad_mean, mean)
    assert torch.equal(model[0].grad_dot, dot)
    convert_norms(model, RunningBatchNorm)
    assert not hasattr(model[0], "grad_mean")
    for start in (RunningBatchNorm, BatchNorm):
        convert_norms(model, start)
        convert_norms(model, averaged)
        assert (model[0].grad_mean.tolist(), model[0].grad_dot.tolist()) == ([0] * 3, [0] * 3)
        (model(x) * torch.randn(2, 3, 5, 5)).sum().backward()


def test_recalibration_ends_the_clamp():
    model, x = nn.Sequential(RunningBatchNorm(2, average_backward=True)).double(), torch.randn(30, 2).double() * 0.01
    model(x[:4])
    assert model[0].running_var.tolist() == [0.01] * 2
    recalibrate(model, [x], 30)
    torch.testing.assert_close(model[0].running_var, x.var(0, correction=0))
    assert torch.equal(model[0].running_var, model[0].unclamped_var)
    assert model[0].seen == 30


# --- convert_norms: layer norms ---------------------------------------------------------------------------------------

def encoder(**kwargs):
    """A transformer layer with two layer norms, of weights and biases of their own, where they have them."""
    model = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **kwargs).double()
    for norm in (model.norm1, model.norm2):
        for p in norm.parameters(): nn.init.normal_(p)
    return model


@pytest.mark.parametrize("training", [False, True])
def test_layer_norms_there_and_back(training):
    model, x = encoder(layer_norm_eps=1e-3).train(training), torch.randn(3, 5, 8, dtype=torch.float64)
    y, before, params = model(x), copy.deepcopy(model), dict(model.named_parameters())
    expected = torch.autograd.grad(y.square().sum(), model.parameters())
    assert convert_norms(model, LayerNorm) == {"LayerNorm": 2}
    assert repr(model.norm1) == "LayerNorm((8,), eps=0.001)"
    assert isinstance(model.norm1, LayerNorm)
    assert all(p is params[k] for k, p in model.named_parameters())
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    for g, e in zip(torch.autograd.grad(model(x).square().sum(), model.parameters()), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-10)
    assert convert_norms(model, partial(nn.LayerNorm, eps=7)).left_alone == {}
    assert torch.equal(model(x), y)
    assert same_state(model, before)
    assert repr(model) == repr(before)
    assert model.norm1.training is training


@pytest.mark.parametrize("shape", [(5,), (2, 5), (3, 2, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_of_every_shape_keeps_it_and_its_affine_map_or_none(shape, affine):
    model = nn.Sequential(nn.LayerNorm(shape, elementwise_affine=affine)).double()
    for p in model.parameters(): nn.init.normal_(p)
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64) + 3
    y, before = model(x), repr(model)
    convert_norms(model, LayerNorm)
    assert repr(model[0]) == f"LayerNorm({shape}, eps=1e-05{'' if affine else ', affine=False'})"
    assert len(list(model.parameters())) == 2 * affine
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    convert_norms(model, nn.LayerNorm)
    assert repr(model) == before
    assert torch.equal(model(x), y)


def test_layer_norm_without_bias_gets_a_frozen_one_and_gives_it_back():
    model, x = nn.Sequential(nn.LayerNorm(5, bias=False)).double(), torch.randn(4, 5, dtype=torch.float64)
    nn.init.normal_(model[0].weight)
    y, weight = model(x), model[0].weight
    convert_norms(model, LayerNorm)
    assert model[0].weight is weight
    assert (model[0].bias.tolist(), model[0].bias.requires_grad) == ([0] * 5, False)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    convert_norms(model, partial(nn.LayerNorm, bias=False))
    assert model[0].weight is weight
    assert model[0].bias is None
    assert torch.equal(model(x), y)


def test_shared_layer_norm_stays_shared_and_keeps_its_mode():
    norm = nn.LayerNorm(4).eval()
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    assert convert_norms(model, LayerNorm) == {"LayerNorm": 1}
    assert model[0] is model[2]
    assert [m.training for m in model] == [False, True, False]


class NormAndGelu(nn.LayerNorm):
    def forward(self, x): return F.gelu(super().forward(x))


class Ours(LayerNorm):
    pass


@pytest.mark.parametrize(("change", "factory", "error", "text"), [
    (lambda n: NormAndGelu(8), LayerNorm, ValueError, r"layer 'norm2' \(NormAndGelu\) has a forward of its own"),
    (lambda n: n.register_forward_hook(print) and n, LayerNorm, ValueError, r"layer 'norm2' \(LayerNorm\) has hooks"),
    (lambda n: nn.utils.parametrize.register_parametrization(n, "weight", nn.Softplus(), unsafe=True), LayerNorm,
     ValueError, r"\(ParametrizedLayerNorm\) is parametrized"),
    (lambda n: n, partial(nn.LayerNorm, elementwise_affine=False), ValueError,
     r"needs a weight of shape \(8,\) .*LayerNorm has no weight; use norms.LayerNorm or nn.LayerNorm as they are"),
    (lambda n: n, partial(nn.LayerNorm, bias=False), ValueError, r"a bias of shape \(8,\) .*LayerNorm has no bias"),
    (lambda n: n, partial(LayerNorm, shift=1), TypeError,
     r"called with the normalized_shape \(8,\), raised a TypeError: .*unexpected keyword argument 'shift'; it needs "
     "a function of the normalized_shape alone, such as norms.LayerNorm or nn.LayerNorm, or a partial with more "),
    (lambda n: n, partial(LayerNorm, (8, 8)), ValueError, r"eps is \(8,\)"),
    (lambda n: n, lambda n: LayerNorm(n), ValueError, r"leaves LayerNorm alone\); .*layer norms are replaced by "
     r"norms.LayerNorm or nn.LayerNorm as the factory"),
])
def test_layer_norms_that_are_refused(change, factory, error, text):
    model = nn.TransformerEncoderLayer(8, 2, 16)
    model.norm2 = change(model.norm2)
    modules = list(model.modules())
    with pytest.raises(error, match=text): convert_norms(model, factory)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_layer_norms_are_left_alone_by_a_channel_norm_and_channel_norms_by_a_layer_norm():
    def make(): return nn.Sequential(nn.BatchNorm1d(5), encoder(), LayerNorm(), nn.RMSNorm(8), nn.LocalResponseNorm(2))
    model, left = make(), {"LayerNorm": 3, "RMSNorm": 1, "LocalResponseNorm": 1}
    layer_norms = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, LayerNorm, nn.RMSNorm))]
    done = convert_norms(model, BatchNorm)
    assert done == Counter({"BatchNorm1d": 1})
    assert done.left_alone == left
    assert [m for m in model.modules() if isinstance(m, (nn.LayerNorm, LayerNorm, nn.RMSNorm))] == layer_norms
    model = make()
    batch, lessons = model[0], model[2]
    for factory in (LayerNorm, Ours, nn.LayerNorm):
        done = convert_norms(model, factory)
        assert done == {"Ours" if factory is nn.LayerNorm else "LayerNorm": 2}
        assert type(model[1].norm1) is factory
        assert done.left_alone == left | {"LayerNorm": 1, "BatchNorm1d": 1}
    assert model[0] is batch                                    # and the lesson's, of a shape that the input tells
    assert model[2] is lessons
    for factory in (BatchNorm, lambda nf: GroupNorm(1, nf)):
        with pytest.raises(ValueError, match=r"found no norm to swap in TransformerEncoderLayer \(it leaves LayerNorm "
                                             r"alone\); it needs batch, instance or group norms \(layer norms are "
                                             r"replaced by norms.LayerNorm or nn.LayerNorm as the factory"):
            convert_norms(encoder(), factory)
    with pytest.raises(ValueError, match=r"leaves LayerNorm, RMSNorm alone\); it needs layer norms with a norm"):
        convert_norms(nn.Sequential(LayerNorm(), nn.RMSNorm(8)), LayerNorm)
    with pytest.raises(ValueError, match="got a LayerNorm itself"): convert_norms(nn.LayerNorm(8), LayerNorm)


class PreNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fn = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)


def test_report_names_norms_and_neither_blocks_around_them_nor_weight_norm():
    blocks = Conv2dNormActivation(3, 4), Conv2dNormActivation(3, 4, norm_layer=None), PreNorm()
    model = nn.Sequential(*blocks, nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    done = convert_norms(model, BatchNorm)
    assert done.left_alone == {}
    assert repr(done) == "Counter({'BatchNorm2d': 2})"
    model.append(nn.RMSNorm(4)), model.append(model[-1])        # one layer, twice
    done = convert_norms(model, nn.BatchNorm2d)
    assert repr(done) == "Counter({'BatchNorm': 2}), left alone: {'RMSNorm': 1}"
    for other in (copy.copy(done), copy.deepcopy(done), done.copy(), pickle.loads(pickle.dumps(done))):
        assert (other, other.left_alone) == (done, done.left_alone)


# --- convert_norms: torchvision's frozen batch norm -------------------------------------------------------------------

def frozen(nf=4, eps=1e-3):
    model = nn.Sequential(nn.Conv2d(3, nf, 1), FrozenBatchNorm2d(nf, eps)).double()
    for b in model.buffers(): nn.init.uniform_(b, 0.5, 2)
    return model


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm, RunningBatchNorm])
def test_frozen_batch_norm_there_and_back(norm):
    model, x = frozen(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    y, before = model(x), copy.deepcopy(model)
    done = convert_norms(model, norm)
    assert done == {"FrozenBatchNorm2d": 1}
    assert done.left_alone == {}
    assert [m.training for m in model] == [True, False]
    assert [p.requires_grad for p in model.parameters()] == [True] * 2 + [False] * 2
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    assert all(not torch.equal(p, torch.ones(4)) for p in model[1].parameters())
    convert_norms(model, FrozenBatchNorm2d)
    assert same_state(model, before)
    assert repr(model) == repr(before)
    assert torch.equal(model(x), y)


def test_frozen_batch_norm_to_its_like_and_to_group_norm():
    model = frozen()
    state = copy.deepcopy(model.state_dict())
    old = model[1]
    convert_norms(model, FrozenBatchNorm2d)
    assert model[1] is not old
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    convert_norms(model, lambda nf: GroupNorm(2, nf))
    assert torch.equal(model[1].weight, state["1.weight"])
    assert not model[1].weight.requires_grad
    assert model[1].training


@pytest.mark.parametrize("norm", [*NORMS, nn.SyncBatchNorm])
def test_batch_norm_freezes_to_the_same_evaluation(norm):
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    model = trained(cnn(nn.BatchNorm2d).double(), x)
    convert_norms(model, norm)
    y, params = model(x), list(model.parameters())
    convert_norms(model, FrozenBatchNorm2d)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-10)
    assert torch.equal(model.train()(x), model.eval()(x))
    assert len(list(model.parameters())) == len(params) - 10    # which are buffers now, and copies:
    for p in params: p.data.zero_()                             # an optimizer made before moves nothing
    assert all(m.weight.all() and m.bias.all() for m in model.modules() if isinstance(m, FrozenBatchNorm2d))


def test_batch_norm_without_affine_freezes_to_the_identity():
    model, x = nn.Sequential(nn.BatchNorm2d(3, affine=False)).double(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    model(x)
    y = model.eval()(x)
    convert_norms(model, FrozenBatchNorm2d)
    assert (model[0].weight.tolist(), model[0].bias.tolist()) == ([1] * 3, [0] * 3)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    convert_norms(model, lambda nf: BatchNorm(nf, affine=False))
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)


class FrozenAndRelu(FrozenBatchNorm2d):
    def forward(self, x): return super().forward(x).relu()


class Named(nn.Module):     # another library's, with a formula that is not known
    def forward(self, x): return x * 2


Named.__name__ = "FrozenBatchNorm2d"


@pytest.mark.parametrize(("layer", "factory", "text"), [
    (FrozenAndRelu(4), BatchNorm, r"\(FrozenAndRelu\) has a forward of its own"),
    (FrozenBatchNorm2d(4), lambda nf: BatchNorm(8), r"needs a weight of shape \(4,\)"),
    (nn.GroupNorm(2, 4), FrozenBatchNorm2d, "keeps no running statistics, and a FrozenBatchNorm2d has nothing else"),
    (nn.BatchNorm2d(4, track_running_stats=False), FrozenBatchNorm2d, "keeps no running statistics.*recalibrate"),
    (nn.BatchNorm1d(4), FrozenBatchNorm2d, r"is not for images \(N, C, H, W\), the only input of a FrozenBatchNorm2d"),
    (nn.BatchNorm3d(4), FrozenBatchNorm2d, "is not for images"),
])
def test_frozen_batch_norm_refusals(layer, factory, text):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=text): convert_norms(model, factory)
    assert model[0] is layer


def test_frozen_batch_norm_of_another_library_is_left_alone_and_hooks_are_seen():
    model = nn.Sequential(Named(), nn.BatchNorm2d(4))
    assert convert_norms(model, BatchNorm).left_alone == {"FrozenBatchNorm2d": 1}
    model = frozen()
    model[1].register_forward_hook(print)
    with pytest.raises(ValueError, match="has hooks"): convert_norms(model, BatchNorm)
    with pytest.raises(ValueError, match="got a FrozenBatchNorm2d itself"): convert_norms(frozen()[1], BatchNorm)


# --- convert_norms: refusals ------------------------------------------------------------------------------------------

class NormAndRelu(nn.BatchNorm2d):
    def forward(self, x): return super().forward(x).relu()


class Renamed(nn.BatchNorm2d):
    pass


def hooked(register):
    layer = nn.BatchNorm2d(4)
    getattr(layer, register)(lambda *args: None)
    return layer


@pytest.mark.parametrize(("layer", "factory", "error", "text"), [
    (nn.ReLU(), BatchNorm, ValueError, "found no norm to swap in Sequential; .*check that this is the model you mean"),
    (NormAndRelu(4), BatchNorm, ValueError, r"layer '1\.0' \(NormAndRelu\) has a forward of its own.*put a plain norm"),
    (nn.LazyBatchNorm2d(), BatchNorm, ValueError, r"\(LazyBatchNorm2d\) doesn't know its channels.*run one batch"),
    (hooked("register_forward_hook"), BatchNorm, ValueError, r"layer '1\.0' \(BatchNorm2d\) has hooks.*remove them"),
    (hooked("register_full_backward_hook"), BatchNorm, ValueError, "has hooks"),
    (hooked("register_forward_pre_hook"), BatchNorm, ValueError, "has hooks"),
    (nn.BatchNorm2d(4), lambda nf: LayerNorm(), ValueError,
     r"layer '0' \(InstanceNorm2d\) needs a weight of shape \(4,\) in its place and the factory's LayerNorm has a "
     r"weight of shape \(\); .*such as GroupNorm\(1, nf\) for layer norm"),
    (nn.BatchNorm2d(4), lambda nf: BatchNorm(8), ValueError, r"BatchNorm has a weight of shape \(8,\)"),
    (nn.BatchNorm2d(4), partial(nn.BatchNorm2d, affine=False), ValueError, "factory's BatchNorm2d has no weight; make"),
    (nn.BatchNorm2d(4), lambda nf: nn.Identity(), ValueError, "the factory's Identity has no weight"),
    (nn.BatchNorm2d(4, affine=False), lambda nf: nn.BatchNorm2d(8, affine=False), ValueError,
     r"has a running_mean of shape \(4,\) and the factory's BatchNorm2d one of shape \(8,\), which can't take it over"),
    (nn.BatchNorm2d(4), nn.BatchNorm2d(4), TypeError, r"got factory=BatchNorm2d\(4.*callable that makes a mod"),
    (nn.BatchNorm2d(4), None, TypeError, "got factory=None"),
    (nn.BatchNorm2d(4), lambda nf: nf, TypeError, "got a factory that makes 4; it needs a callable"),
])
def test_refusals_leave_the_model_as_it_was(layer, factory, error, text):
    model = nn.Sequential(nn.InstanceNorm2d(4) if "no norm" not in text else nn.ReLU(), nn.Sequential(layer))
    modules, params = list(model.modules()), list(model.parameters())
    with pytest.raises(error, match=text): convert_norms(model, factory)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))


def groups_and_channels(groups, nf): return GroupNorm(groups, nf)


@pytest.mark.parametrize(("factory", "text"), [
    (GroupNorm, r"layer '1' \(BatchNorm2d\): the factory, called with the channel count 8, raised a TypeError: .*"
     r"missing 1 required positional argument: 'num_channels'; .* alone, such as lambda nf: GroupNorm\(4, nf\)$"),
    (nn.GroupNorm, r"'num_channels'; .*such as lambda nf: nn\.GroupNorm\(4, nf\)$"),
    (partial(nn.GroupNorm, num_groups=4), r"multiple values for argument 'num_groups'; .* nn\.GroupNorm\(4, nf\)$"),
    (groups_and_channels, r"argument: 'nf'; .*such as lambda nf: groups_and_channels\(\.\.\.\) with nf a"),
    (lambda groups, nf: nf, r"argument: 'nf'; .*such as lambda nf: GroupNorm\(4, nf\)$"),
    (partial(nn.BatchNorm2d, epsilon=1), r"argument 'epsilon'; .*such as lambda nf: BatchNorm2d\(\.\.\.\) with nf amo"),
    (lambda nf: BatchNorm("8" + nf), r"raised a TypeError: can only concatenate str .*from within the factory"),
])
def test_factory_that_fails_is_named_with_what_it_said(factory, text):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    old = model[1]
    with pytest.raises(TypeError, match=text) as error: convert_norms(model, factory)
    assert isinstance(error.value.__cause__, TypeError)
    assert str(error.value.__cause__) in str(error.value)
    assert model[1] is old
    with pytest.raises(ValueError, match="the groups must divide"):     # other errors come as they are
        convert_norms(model, lambda nf: GroupNorm(3, nf))


@pytest.mark.parametrize("factory", [LayerNorm, nn.LayerNorm, partial(LayerNorm, eps=1e-3), lambda nf: LayerNorm(nf),
                                     lambda nf: nn.LayerNorm(nf, elementwise_affine=False), nn.RMSNorm])
def test_norm_over_the_last_axis_in_a_channel_norms_place_is_refused(factory):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    old = list(model)
    with pytest.raises(TypeError, match=r"would normalise the last axis. write lambda nf: GroupNorm\(1, nf\), layer n"):
        convert_norms(model, factory)
    assert all(a is b for a, b in zip(model, old, strict=True))


@pytest.mark.parametrize(("factory", "plain"), [
    (nn.LazyBatchNorm2d, "BatchNorm2d"), (lambda nf: nn.LazyInstanceNorm1d(affine=True), "InstanceNorm1d")])
def test_factory_of_lazy_modules_is_refused(factory, plain):
    with pytest.raises(TypeError, match=rf"gives a Lazy{plain}, which has no weights .*; use {plain}, the class witho"):
        convert_norms(nn.Sequential(nn.BatchNorm2d(4)), factory)


def test_parametrized_layer_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(4))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus(), unsafe=True)
    with pytest.raises(ValueError, match=r"is parametrized; fold that .*remove_parametrizations"):
        convert_norms(model, BatchNorm)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert convert_norms(model, BatchNorm) == {"BatchNorm2d": 1}


def test_factory_that_gives_one_module_twice_is_refused():
    one = BatchNorm(4)
    with pytest.raises(ValueError, match="gives the same module twice; every layer needs its own"):
        convert_norms(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), lambda nf: one)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), RunningBatchNorm(4), nn.GroupNorm(2, 4)])
def test_norm_as_the_model_itself_is_refused(norm):
    with pytest.raises(ValueError, match=rf"got a {type(norm).__name__} itself; .*nn.Sequential\(layer\)"):
        convert_norms(norm, BatchNorm)


def test_subclass_that_adds_nothing_and_initialised_lazy_layer_are_swapped():
    model = nn.Sequential(Renamed(4), nn.LazyBatchNorm2d())
    model(torch.randn(2, 4, 3, 3))
    assert convert_norms(model, BatchNorm) == {"Renamed": 1, "BatchNorm2d": 1}


# --- recalibrate ------------------------------------------------------------------------------------------------------

def images(n=30, size=4, **kwargs):
    """Batches of `size` images and labels, `n` in all."""
    x, y = torch.randn(n, 1, 28, 28, **kwargs) * 2 + 1, torch.arange(n) % 10
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_every_layers_statistics_are_those_of_its_own_inputs(norm):
    model, batches = trained(cnn(norm).double(), torch.randn(4, 1, 28, 28).double()), images(dtype=torch.float64)
    result = recalibrate(model, batches, 26)
    assert result.layers == ("0.2", "1.2", "2.2", "3.2", "4.2")
    assert (result.images, result.before, result.after) == (26, None, None)
    x = torch.cat([xb for xb, _ in batches])[:26]
    for layer in model[:5]:     # in plain torch, all images at once, by the recalibrated layers before
        conv, act, bn = layer
        x = act(conv(x))
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=int(norm is not RunningBatchNorm))
        torch.testing.assert_close(bn.running_mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(bn.running_var, var, rtol=1e-12, atol=0)
        x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        x = x * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(model[5:](x), model(torch.cat([xb for xb, _ in batches])[:26]), rtol=1e-10, atol=1e-10)


def test_hand_computed_statistics():
    # Values 1, 2, 3 | 6: mean 3, squares about it 4 + 1 + 0 + 9 = 14; the fifth image is not wanted.
    loader = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[6.0], [100.0]])]
    batch, running = nn.Sequential(BatchNorm(1)), nn.Sequential(RunningBatchNorm(1))
    for model in (batch, running): assert recalibrate(model, loader, 4).images == 4
    assert (batch[0].running_mean.item(), batch[0].running_var.item()) == pytest.approx((3, 14 / 3))
    assert batch[0].num_batches_tracked == 2
    assert (running[0].running_mean.item(), running[0].running_var.item()) == pytest.approx((3, 14 / 4))
    assert (running[0].seen.item(), running[0].count.item()) == (20, CARRIED_COUNT)


def test_running_batch_norm_is_not_clamped_and_keeps_the_count_of_its_training():
    model = nn.Sequential(RunningBatchNorm(1, eps=0.0))
    for _ in range(100): model(torch.randn(2, 1, 3, 3))
    count = model[0].count.item()
    x = torch.randn(40, 1, 3, 3) * 0.01
    recalibrate(model, [x], 40)
    assert (model[0].seen.item(), model[0].count.item()) == (40, count)
    assert model.eval()(x).std().item() == pytest.approx(1, rel=1e-2)


def test_large_mean_in_float32():
    x = torch.randn(64, 2, 5, 5) + 3e3
    model = nn.Sequential(nn.BatchNorm2d(2))
    recalibrate(model, x.split(3), 64)
    torch.testing.assert_close(model[0].running_var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)


def test_metric_is_the_weighted_mean_over_the_same_images_before_and_after():
    def hits(pred, yb): return (pred.argmax(1) == yb).float().mean()
    model, batches = trained(cnn(BatchNorm), torch.randn(4, 1, 28, 28)), images(30, 7)
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    before = hits(model(x), y).item()
    model.train()
    result = recalibrate(model, batches, 1000, metric=hits)
    assert result.images == 30
    assert type(result.before) is type(result.after) is float
    assert result.before == pytest.approx(before)
    assert result.after == pytest.approx(hits(model.eval()(x), y).item())


def test_recalibration_repairs_spoiled_statistics():
    x, y = torch.randn(200, 1, 28, 28), torch.arange(200) % 2
    x += 0.5 * y.view(-1, 1, 1, 1)
    model = cnn(nn.BatchNorm2d)
    opt = optim.SGD(model.parameters(), lr=0.1)
    for _ in range(40):
        idx = torch.randperm(200)[:25]
        F.cross_entropy(model(x[idx]), y[idx]).backward()
        opt.step(), opt.zero_grad()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.add_(2), m.running_var.mul_(9)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16, shuffle=True)
    result = recalibrate(model, loader, 200, metric=lambda pred, yb: (pred.argmax(1) == yb).float().mean())
    assert result.before < 0.7
    assert result.after > 0.95


def test_resnet18_statistics_come_in_order_of_execution():
    model = resnet18()
    x = torch.randn(4, 3, 48, 48)
    result = recalibrate(model, [x], 4)
    assert len(result.layers) == 20
    assert result.layers[:3] == ("bn1", "layer1.0.bn1", "layer1.0.bn2")
    seen = {}
    handles = [m.register_forward_hook(lambda m, args, y: seen.__setitem__(m, y.clone())) for m in model.modules()
               if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad(): model.eval()(x)
    for h in handles: h.remove()
    assert len(seen) == 20
    # Unit weight, no bias: what leaves each layer has mean 0 and unbiased variance var / (var + eps).
    for m, y in seen.items():
        assert y.mean((0, 2, 3)).abs().max() < 1e-4
        torch.testing.assert_close(y.var((0, 2, 3)), m.running_var / (m.running_var + m.eps), rtol=1e-3, atol=1e-3)


def test_all_else_is_as_before():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.BatchNorm2d(2).eval())
    model[0].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    hooks = [dict(m._forward_pre_hooks) for m in model.modules()]
    loader = torch.utils.data.DataLoader(torch.randn(40, 1, 5, 5), 8, shuffle=True)
    params, random = copy.deepcopy(list(model.parameters())), torch.get_rng_state()
    recalibrate(model, loader, 20)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model] == [True, True, True, False]
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad and a.grad is None
               for a, b in zip(model.parameters(), params, strict=True))
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert calls == [8] + [8, 8, 4] * 2     # the order, then one pass per layer; the second layer's runs the first too


def test_passes_stop_at_the_layer_in_hand():
    model = nn.Sequential(BatchNorm(1), nn.Linear(1, 1), BatchNorm(1), nn.ReLU())
    calls = []
    model[3].register_forward_hook(lambda *args: calls.append(1))
    recalibrate(model, [torch.randn(4, 1)] * 5, 20)
    assert len(calls) == 1      # the pass that finds the order, over one batch


@pytest.mark.parametrize(("n", "batches"), [(10, [0, 1, 2]), (8, [0, 1])])
def test_one_shot_generator_is_read_once_and_no_further_than_needed(n, batches):
    read = []

    def loader():
        for i in range(10):
            read.append(i)
            yield torch.randn(4, 9), None
    model = nn.Sequential(nn.Unflatten(1, (1, 3, 3)), BatchNorm(1), nn.Conv2d(1, 2, 3), BatchNorm(2))
    assert recalibrate(model, ((xb * 2, yb) for xb, yb in loader()), n).images == n
    assert read == batches


def test_layer_that_runs_twice_pools_its_runs_and_one_that_does_not_run_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.unused = BatchNorm(1), BatchNorm(1)

        def forward(self, x): return self.bn(input=None) if x is None else self.bn(x=self.bn(x) * 2)
    model, x = Net().double(), torch.randn(50, 1, dtype=torch.float64) * 3 + 7
    model.unused.running_mean.fill_(5)
    assert recalibrate(model, [x], 50).layers == ("bn",)
    # By hand: the first pass gives the mean and variance of x, by which the first run of the second pass goes.
    first = (x - x.mean()) / (x.var() + 1e-5).sqrt() * 2
    pooled = torch.cat([x, first])
    torch.testing.assert_close(model.bn.running_mean, pooled.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.bn.running_var, pooled.var(0), rtol=1e-12, atol=0)
    assert model.unused.running_mean.item() == 5


class Fails(nn.Module):
    """Raises `error` at its `n`-th forward."""

    def __init__(self, n, error):
        super().__init__()
        self.left, self.error = n, error

    def forward(self, x):
        self.left -= 1
        if not self.left: raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_error_in_the_model_restores_everything(error):
    # One forward for the order; pass 1 stops at the first norm; the third forward is in the second norm's pass.
    model = nn.Sequential(RunningBatchNorm(1), Fails(3, error), BatchNorm(1).eval())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)): recalibrate(model, [torch.randn(4, 1)] * 3, 12)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model] == [True, True, False]
    assert not any(m._forward_pre_hooks for m in model)
    assert recalibrate(model, [torch.randn(4, 1)] * 3, 12).layers == ("0", "2")


@pytest.mark.parametrize(("make", "loader", "n", "error", "text"), [
    (lambda: nn.GroupNorm(1, 1), [torch.randn(4, 1)], 4, ValueError, "no norm with running statistics in Sequential; "),
    (lambda: nn.BatchNorm1d(1, track_running_stats=False), [torch.randn(4, 1)], 4, ValueError, "no norm with running"),
    (lambda: BatchNorm(1), [], 4, ValueError, "got no image from the loader; give one that isn't empty"),
    (lambda: BatchNorm(1), [torch.randn(0, 1)], 4, ValueError, "got no image from the loader"),
    (lambda: BatchNorm(1), [torch.randn(4, 1)], 0, ValueError, "got n_images=0; it needs a positive integer"),
    (lambda: BatchNorm(1), [torch.randn(4, 1)], 2.5, ValueError, "got n_images=2.5; it needs a positive integer"),
    (lambda: BatchNorm(1), [torch.randn(4, 1)], True, ValueError, "got n_images=True"),
    (lambda: BatchNorm(1), [{"x": 1}], 4, TypeError, r"got a batch of dict; the loader must give tensors xb or pairs"),
    (lambda: RunningBatchNorm(1), [torch.randn(1, 1)], 4, ValueError,
     r"layer '0' \(RunningBatchNorm\) gets one value per channel, which has no spread: take more images"),
    (lambda: BatchNorm(1), [torch.tensor([[1.0], [float("inf")]])], 4, ValueError,
     r"layer '0' \(BatchNorm\) gets values that are not finite: check the images, and the weights"),
])
def test_recalibrate_refusals(make, loader, n, error, text):
    model = nn.Sequential(make())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text): recalibrate(model, loader, n)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_metric_without_labels_and_norms_that_never_run_are_refused():
    with pytest.raises(ValueError, match=r"a metric and a loader without labels; let the loader give \(xb, yb\)"):
        recalibrate(nn.Sequential(BatchNorm(1)), [torch.randn(4, 1)], 4, metric=lambda pred, yb: 0)
    model = nn.Sequential(nn.ReLU())
    model[0].aside = BatchNorm(1)
    with pytest.raises(ValueError, match=r"saw none of the 1 norms of Sequential run; if it is compiled"):
        recalibrate(model, [torch.randn(4, 1)], 4)


def test_converted_model_is_recalibrated_to_the_same_function():
    x = torch.randn(64, 1, 28, 28, dtype=torch.float64)
    ours = trained(cnn(nn.BatchNorm2d).double(), x[:8])
    theirs = copy.deepcopy(ours)
    convert_norms(ours, lambda nf: GroupNorm(1, nf))
    convert_norms(ours, BatchNorm)      # statistics lost on the way
    for model in (ours, theirs): recalibrate(model, x.split(10), 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-10)


# --- recalibrate: models in wrappers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", NORMS)
def test_averaged_model_gets_the_statistics_of_its_averaged_weights(norm):
    x = torch.randn(40, 1, 28, 28, dtype=torch.float64)
    model = trained(cnn(norm).double(), x[:4]).train()
    averaged = AveragedModel(model)
    for _ in range(2):
        for p in model.parameters(): p.data.add_(torch.randn_like(p), alpha=0.1)
        averaged.update_parameters(model)
    averaged.module[0][2].eval()
    modes, params = [m.training for m in averaged.modules()], copy.deepcopy(list(averaged.parameters()))
    plain = copy.deepcopy(averaged.module)
    result = recalibrate(averaged, x.split(8), 40)
    assert result.layers == tuple(f"module.{name}" for name in recalibrate(plain, x.split(8), 40).layers)
    assert same_state(averaged.module, plain)
    assert averaged.n_averaged == 2
    assert [m.training for m in averaged.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(averaged.parameters(), params, strict=True))
    averaged.update_parameters(model)       # and it goes on averaging
    assert averaged.n_averaged == 3


def test_torchs_update_bn_passes_our_norms_by_and_recalibrate_does_not():
    x = torch.randn(64, 2, dtype=torch.float64) * 3 + 5
    for norm, correction in ((BatchNorm, 1), (RunningBatchNorm, 0), (nn.BatchNorm1d, 1)):
        averaged = AveragedModel(nn.Sequential(norm(2)).double())
        update_bn([x], averaged)
        assert (averaged.module[0].running_mean != 0).any() == (norm is nn.BatchNorm1d)
        recalibrate(averaged, [x], 64)
        torch.testing.assert_close(averaged.module[0].running_mean, x.mean(0))
        torch.testing.assert_close(averaged.module[0].running_var, x.var(0, correction=correction))


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda m: AveragedModel(nn.DataParallel(m))])
def test_wrapped_model_is_recalibrated_and_converted_as_it_is_bare(wrap):
    x, y = torch.randn(12, 1, 28, 28), torch.arange(12) % 10
    bare = trained(cnn(nn.BatchNorm2d), x[:4]).train()
    model = wrap(copy.deepcopy(bare))
    model.register_forward_pre_hook(lambda *args: pytest.fail("with several devices, the images would be spread"))
    results = []
    for m in (bare, model):
        convert_norms(m, RunningBatchNorm)
        results.append(recalibrate(m, [(x, y)], 12, metric=F.cross_entropy))
    assert [results[0].before, results[0].after] == [results[1].before, results[1].after]
    assert all(torch.equal(a, b) for a, b in zip(bare.eval().state_dict().values(),
                                                 [v for k, v in model.state_dict().items() if k != "n_averaged"],
                                                 strict=True))
    assert all(m.training for m in model.modules())


def test_wrapper_with_a_forward_of_its_own_is_run():
    class Scaled(AveragedModel):
        def forward(self, x): return super().forward(x * 2)
    model = Scaled(nn.Sequential(BatchNorm(1)))
    recalibrate(model, [torch.tensor([[1.0], [2.0], [3.0]])], 3)
    assert model.module[0].running_mean.item() == pytest.approx(4)
