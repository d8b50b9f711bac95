"""What users of torch's norms do with a norm: settings, devices, checkpoints, tracing, exports, maps, fusions."""

import copy
import io
import itertools
import logging
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor

from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm, convert_norms
from norms.rivals import MABN, BatchRenorm, EvoNormS0, FilterResponseNorm, MomentumBatchNorm

pytestmark = pytest.mark.usefixtures("kernels")

RUNNING = {"batch": BatchNorm, "running": RunningBatchNorm,
           "averaged": lambda nf, **kwargs: RunningBatchNorm(nf, average_backward=True, **kwargs),
           "renorm": BatchRenorm, "momentum": MomentumBatchNorm, "mabn": MABN}
OF_NO_FUNCTION = "averaged", "mabn"         # in training their gradient is not that of what they compute
NORMS = {**RUNNING, "group": lambda nf, **kwargs: GroupNorm(2, nf, **kwargs), "instance": InstanceNorm,
         "layer": lambda nf, **kwargs: LayerNorm(**kwargs),
         "layer, trailing": lambda nf, **kwargs: LayerNorm((nf, 3, 3), **kwargs),
         "filter response": FilterResponseNorm, "evonorm": lambda nf, **kwargs: EvoNormS0(nf, 2, **kwargs)}


def state(norm): return {k: v.clone() for k, v in norm.state_dict().items()}


def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


# --- settings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NORMS)
def test_without_an_affine_map_it_is_that_of_ones_and_zeros(name):
    bare, full = NORMS[name](4, affine=False).double(), NORMS[name](4).double()
    assert bare.weight is bare.bias is None
    assert "affine=False" in repr(bare)
    for seed in range(4):
        x = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
        g, results = torch.randn_like(x), []
        for norm in (bare.train(seed < 3), full.train(seed < 3)):
            y = norm(x)
            results.append((y, *torch.autograd.grad(y, x, g)))
        torch.testing.assert_close(*results)
    assert {name for name, _ in bare.named_parameters()} <= {"tau", "v"}
    bare.reset_parameters()


@pytest.mark.parametrize("name", NORMS)
def test_dtype_and_device_are_torch_s_arguments(name):
    norm = NORMS[name](4, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in norm.parameters()} == {(torch.float64, "meta")}
    assert {b.device.type for b in norm.buffers()} <= {"meta"}
    half = NORMS[name](4, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("name", NORMS)
def test_made_on_meta_it_can_be_filled_and_reset(name):
    with torch.device("meta"): norm = NORMS[name](4)
    norm.to_empty(device="cpu")
    for t in (*norm.parameters(), *norm.buffers()): t.data.fill_(7)
    norm.reset_parameters()
    assert same(state(norm), state(NORMS[name](4)))
    x = torch.randn(3, 4, 3, 3)
    assert torch.equal(norm(x), NORMS[name](4)(x))


@pytest.mark.parametrize("name", RUNNING)
def test_running_statistics_alone_can_be_reset_in_place(name):
    norm = RUNNING[name](4)
    nn.init.constant_(norm.weight, 3)
    norm(torch.randn(3, 4, 3, requires_grad=True)).pow(2).sum().backward()
    held = dict(norm.named_buffers())
    norm.reset_running_stats()
    for k, b in RUNNING[name](4).named_buffers():
        assert held[k] is norm.get_buffer(k)
        assert torch.equal(b, held[k])
    assert norm.weight.tolist() == [3] * 4


# --- checkpoints of others -------------------------------------------------------------------------------------------

def test_batch_norm_and_torch_s_load_each_other_also_from_before_counts():
    theirs = nn.BatchNorm2d(4)
    for _ in range(3): theirs(torch.randn(5, 4, 3, 3))
    full = theirs.state_dict()
    old = OrderedDict((k, v) for k, v in full.items() if k != "num_batches_tracked")        # no metadata either
    for saved, count in ((full, 3), (old, 0)):
        ours, other = BatchNorm(4), nn.BatchNorm2d(4)
        assert ours.load_state_dict(saved).missing_keys == other.load_state_dict(saved).missing_keys == []
        assert same(state(ours), state(other))
        assert ours.num_batches_tracked == count
        assert same(state(nn.Sequential(ours)), state(nn.Sequential(other)))
    nn.BatchNorm2d(4).load_state_dict(ours.state_dict())
    new = OrderedDict(old)
    new._metadata = {"": {"version": 2}}                    # a checkpoint that should have one: torch, too, misses it
    for norm in (BatchNorm(4), nn.BatchNorm2d(4)):
        with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"): norm.load_state_dict(new)
    ours.num_batches_tracked.fill_(5)
    ours.load_state_dict({}, strict=False)
    assert ours.num_batches_tracked == 5


@pytest.mark.parametrize("average_backward", [False, True])
def test_running_batch_norm_loads_a_batch_norm_s_checkpoint(average_backward):
    theirs = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    for _ in range(30): theirs(torch.randn(2, 3, 3, 3, dtype=torch.float64) * 0.01)         # variances below the clamp
    x = torch.randn(5, 3, 3, 3, dtype=torch.float64) * 0.01
    for drop in ((), ("1.num_batches_tracked",)):
        saved = OrderedDict((k, v) for k, v in theirs.state_dict().items() if k not in drop)
        kept = copy.deepcopy(saved)
        ours = nn.Sequential(nn.Conv2d(3, 4, 1), RunningBatchNorm(4, average_backward=average_backward)).double()
        ours.load_state_dict(saved)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=1e-12)
        assert (ours[1].seen.item(), ours[1].count.item()) == (20 if drop else 30, 2)
        assert same(saved, kept)                            # the checkpoint is as it was
        assert ours.train()(x).isfinite().all()
    fresh = RunningBatchNorm(4)
    fresh.load_state_dict(nn.BatchNorm2d(4).state_dict())   # an untrained one counts as untrained
    assert (fresh.seen.item(), fresh.count.item()) == (0, 0)


def test_a_checkpoint_of_before_has_the_average_where_the_clamped_variance_is_now():
    norm = RunningBatchNorm(2)
    norm(torch.tensor([[-0.001, -1.0], [0.001, 1.0]]))
    old = {k: v.clone() for k, v in norm.state_dict().items() if k != "unclamped_var"}
    old["running_var"] = norm.unclamped_var.clone()
    again = RunningBatchNorm(2)
    again.load_state_dict(old)
    assert same(state(again), state(norm))
    assert again.running_var.tolist() == pytest.approx([0.01, 1])
    assert again.unclamped_var.tolist() == pytest.approx([1e-6, 1])


def test_a_half_written_state_is_refused_as_ever():
    with pytest.raises(RuntimeError, match=r"Missing key.*running_mean"):
        RunningBatchNorm(2).load_state_dict({"weight": torch.ones(2), "bias": torch.zeros(2)})
    norm = RunningBatchNorm(2)
    norm(torch.randn(4, 2))
    before = state(norm)
    norm.load_state_dict({}, strict=False)
    assert same(state(norm), before)


# --- tracing, exports ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_symbolic_trace_keeps_the_norm_as_one_node(name, training):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(NORMS[name](4)), nn.ReLU()).train(training)
    graph = torch.fx.symbolic_trace(model)
    assert "1.0" in {node.target for node in graph.graph.nodes if node.op == "call_module"}
    x, twin = torch.randn(3, 3, 3, 3), copy.deepcopy(model)
    assert torch.equal(graph(x), twin(x))
    assert torch.equal(copy.deepcopy(graph)(x), twin(x))
    body = create_feature_extractor(model, ["1.0"])
    assert torch.equal(body.eval()(x)["1.0"], model[:2].eval()(x))


class Own(RunningBatchNorm):
    def floor(self, seen): return super().floor(seen) * 2


def test_a_subclass_is_traced_too():
    assert torch.fx.symbolic_trace(nn.Sequential(Own(4)))(torch.randn(3, 4)).shape == (3, 4)


@pytest.mark.one_route
@pytest.mark.parametrize("name", [name for name in NORMS if name not in (
    "filter response", "evonorm", "renorm", "momentum", "mabn")])                                               # slow
def test_onnx_of_the_evaluation_takes_any_batch(name):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[name](4))
    for _ in range(3): model(torch.randn(2, 3, 3, 3) * 0.05)             # while the variance is clamped
    file, x = io.BytesIO(), torch.randn(5, 3, 3, 3)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # of the exporter, of its own ways
            torch.onnx.export(model.eval(), (torch.randn(3, 3, 3, 3),), dynamo=True, input_names=["x"], verbose=False,
                              dynamic_shapes=({0: "b"},)).save(file)
    finally: logging.disable(logging.NOTSET)
    got = runtime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.tensor(got), model(x).detach(), rtol=1e-4, atol=1e-5)


# --- maps ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_a_map_over_any_of_its_inputs(name, training):
    """Over x, weight, bias, running mean and variance, in every combination, equals the loop."""
    norm = NORMS[name](4).double()
    if name in OF_NO_FUNCTION: norm.eval()
    norm(torch.randn(3, 4, 3, 3, dtype=torch.float64))
    norm.train(training and name not in OF_NO_FUNCTION)
    tensors = {"x": torch.randn(3, 4, 3, 3, dtype=torch.float64), **state(norm)}
    names = [k for k, t in tensors.items() if t.is_floating_point() and t.ndim]
    many = {k: torch.rand(5, *tensors[k].shape, dtype=torch.float64) + 0.5 for k in names}

    def f(*values):
        given = {**{k: t.clone() for k, t in tensors.items()}, **dict(zip(names, values, strict=True))}
        given = {k: t + 0 for k, t in given.items()}        # buffers of this call's own, which it may write
        return functional_call(norm, {k: t for k, t in given.items() if k != "x"}, (given["x"],))
    for mapped in itertools.product((False, True), repeat=len(names)):
        if not any(mapped): continue
        stateful = training and name in RUNNING and name not in OF_NO_FUNCTION
        if stateful and mapped[0] and not all(mapped[names.index(k)] for k in names if "running" in k or "var" in k):
            continue                                        # mapped statistics don't fit into a buffer that isn't
        if stateful and name in ("running", "momentum"): continue         # its counts, scalars, are not mapped
        args = [many[k] if m else tensors[k] for k, m in zip(names, mapped, strict=True)]
        got = vmap(f, in_dims=tuple(0 if m else None for m in mapped))(*args)
        want = torch.stack([f(*(a[i] if m else a for a, m in zip(args, mapped, strict=True))) for i in range(5)])
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# --- fusions ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("steps", [0, 3, 12])
@pytest.mark.parametrize("name", RUNNING)
def test_fused_with_what_comes_before_it_evaluates_the_same(name, steps, affine):
    """Also while the clamp holds, and after copies, casts and state dicts on the way."""
    conv, linear = nn.Conv2d(3, 4, 1).double(), nn.Linear(3, 4).double()
    ways = [(conv, fuse_conv_bn_eval, (2, 3, 2, 2)), (linear, fuse_linear_bn_eval, (2, 3))]
    for layer, fuse, shape in ways if affine else ways[:1]:     # torch's for linear layers needs a weight
        norm = RUNNING[name](4, affine=affine).double()
        with torch.no_grad():
            for p in layer.parameters(): p.mul_(0.05)
        model = nn.Sequential(layer, norm)
        for _ in range(steps): model(torch.randn(shape, dtype=torch.float64))
        model = copy.deepcopy(model).eval()
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(fuse(*model)(x), model(x), rtol=1e-10, atol=1e-10)
        theirs = nn.Sequential(copy.deepcopy(model[0]), copy.deepcopy(model[1]))
        convert_norms(theirs, nn.BatchNorm2d if layer is conv else nn.BatchNorm1d)
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-10, atol=1e-10)


# --- averaged gradients ----------------------------------------------------------------------------------------------

def test_a_change_of_the_loss_scale_goes_through_by_rescale():
    """Steps at scales 1, 8 and 2, the averages rescaled between, are those at scale 1."""
    plain, scaled = (RunningBatchNorm(3, average_backward=True).double() for _ in range(2))
    scale = 1.0
    for step, new in enumerate((1.0, 1.0, 8.0, 8.0, 2.0)):
        scaled.rescale_(new / scale)
        scale = new
        x, g = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind()
        for norm, by in ((plain, 1.0), (scaled, scale)):
            leaf = x.clone().requires_grad_()
            norm.grad, = torch.autograd.grad(norm(leaf), leaf, g * by)
        torch.testing.assert_close(scaled.grad / scale, plain.grad, msg=f"step {step}")
    torch.testing.assert_close(scaled.grad_dot / scale, plain.grad_dot)
    RunningBatchNorm(3).rescale_(2.0)                       # nothing to do


def test_a_gradient_that_is_not_finite_is_not_taken_in():
    norm = RunningBatchNorm(3, average_backward=True)
    for bad in (float("inf"), float("nan")):
        for kind in (torch.float32, torch.bfloat16):
            norm(torch.randn(2, 3, 4, requires_grad=True)).sum().backward()
            before = norm.grad_mean.clone(), norm.grad_dot.clone()
            x, g = torch.randn(2, 3, 4, dtype=kind, requires_grad=True), torch.randn(2, 3, 4, dtype=kind)
            g[0, 1, 2] = bad
            (gx,) = torch.autograd.grad(norm(x), x, g)
            assert torch.equal(norm.grad_mean, before[0])
            assert torch.equal(norm.grad_dot, before[1])
            assert not gx[:, 1].isfinite().all()            # a GradScaler has to see it
            assert gx[:, [0, 2]].isfinite().all()
