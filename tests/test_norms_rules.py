"""What holds for every norm on every route, where random programs don't reach: processes, compilers, exports, hooks.

A graph owns what it needs; a buffer keeps its identity; a backward and a repeated forward change nothing; a repeated
forward is the forward that it repeats; half precision never touches statistics; a constant input gives the bias.
"""

import copy
import io
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.export import Dim, export
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm, SteadyBatchNorm
from norms.rivals import MABN, BatchRenorm, EvoNormS0, FilterResponseNorm, MomentumBatchNorm

pytestmark = pytest.mark.usefixtures("kernels")

RUNNING = {"batch": BatchNorm, "running": RunningBatchNorm,
           "per image": lambda nf: RunningBatchNorm(nf, rule="per_image"),
           "averaged": lambda nf: RunningBatchNorm(nf, average_backward=True),
           "settled": lambda nf: RunningBatchNorm(nf, evaluation_memory=30),
           "renorm": lambda nf: BatchRenorm(nf, 0.3, begin=0, rmax_at=9, dmax_at=6),
           "momentum": lambda nf: MomentumBatchNorm(nf, steps=9)}
NORMS = {**RUNNING, "group": lambda nf: GroupNorm(2, nf), "instance": lambda nf: InstanceNorm(nf, eps=1e-5),
         "layer": lambda nf: LayerNorm(), "layer, trailing": lambda nf: LayerNorm((nf, 5, 3)),
         "filter response": FilterResponseNorm, "evonorm": lambda nf: EvoNormS0(nf, 2)}
CENTRED = [name for name in NORMS if NORMS[name](4).statistics == "mean and variance" and name != "renorm"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(make, nf=4):
    """A norm with weights of its own, after a few batches."""
    norm = make(nf).double()
    with torch.no_grad():
        for i, p in enumerate(norm.parameters()): p.copy_(draw(*p.shape, seed=50 + i) * 0.3 + 1)
    for seed in range(3): norm(draw(3, nf, 5, 3, seed=60 + seed))
    return norm


def gradients(norm, x, call=None):
    """Output and gradients of one step; by `backward`, which reentrant checkpointing needs."""
    x = x.detach().clone().requires_grad_()
    for p in norm.parameters(): p.grad = None
    y = (call or norm)(x)
    y.backward(draw(*y.shape, seed=99).to(y))
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters())]


def close(got, want, tol=1e-10):
    for a, b in zip(got, want, strict=True): torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)


# --- a repeated forward is the one that it repeats -------------------------------------------------------------------

@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", RUNNING)
def test_many_segments_open_at_once_each_find_their_own_forward(name, reentrant):
    """Twenty forwards, some of the same batch and some with NaN, before backwards in another order."""
    norm = made(RUNNING[name])
    twin = copy.deepcopy(norm)
    batches = [draw(3, 4, 2, 2, seed=seed // 2) for seed in range(20)]              # every batch twice
    batches[7][0, 0] = float("nan")
    order, found = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist(), {}
    for m in (norm, twin):
        leaves = [x.clone().requires_grad_() for x in batches]
        ys = [checkpoint(m, x, use_reentrant=reentrant) if m is norm else m(x) for x in leaves]
        state = {k: b.clone() for k, b in m.named_buffers()}
        for i in order: ys[i].backward(draw(*ys[i].shape, seed=i))
        for k, b in m.named_buffers():
            if not k.startswith("grad"): assert torch.equal(b.nan_to_num(7), state[k].nan_to_num(7))
        found[m] = [*ys, *(x.grad for x in leaves), *m.buffers(), *(p.grad for p in m.parameters())]
    close(found[norm], found[twin])


@pytest.mark.parametrize("name", RUNNING)
def test_segments_within_segments_and_a_norm_that_runs_twice(name):
    norm = made(RUNNING[name])
    twin = copy.deepcopy(norm)

    def inner(x): return norm(norm(x).tanh())
    ways = {
        "both kinds, reentrant outside": lambda x: checkpoint(
            lambda x: checkpoint(inner, x, use_reentrant=False) + norm(x), x, use_reentrant=True),
        "both kinds, reentrant inside": lambda x: checkpoint(
            lambda x: checkpoint(inner, x, use_reentrant=True) + norm(x), x, use_reentrant=False),
        "three deep": lambda x: checkpoint(lambda x: norm(x) + checkpoint(lambda x: checkpoint(
            inner, x, use_reentrant=False) * norm(x), x, use_reentrant=False), x, use_reentrant=False),
    }
    plain = {"both kinds, reentrant outside": lambda x: twin(twin(x).tanh()) + twin(x),
             "both kinds, reentrant inside": lambda x: twin(twin(x).tanh()) + twin(x),
             "three deep": lambda x: twin(x) + twin(twin(x).tanh()) * twin(x)}
    for way, f in ways.items():
        for seed in range(2):
            x = draw(3, 4, 2, 2, seed=seed)
            close(gradients(norm, x, f), gradients(twin, x, plain[way]), 1e-9)
            close(norm.buffers(), twin.buffers())


@pytest.mark.parametrize("name", ["batch", "running", "per image"])
def test_a_segment_is_repeated_as_often_as_asked(name):
    """By several backward passes, and by a look at a saved tensor outside of any."""
    norm = made(RUNNING[name])
    state = copy.deepcopy(norm)
    x = draw(3, 4, 2, 2).requires_grad_()
    y = checkpoint(lambda x: norm(x).exp(), x, use_reentrant=False)
    after = [b.clone() for b in norm.buffers()]
    want, = torch.autograd.grad(state(x).exp().sum(), x)
    assert torch.equal(y.grad_fn._saved_result, y)
    for _ in range(3):
        got, = torch.autograd.grad(y.sum(), x, retain_graph=True)
        close([got], [want])
    first, = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.autograd.grad(first.pow(2).sum(), x)
    close(norm.buffers(), after, 0)


def test_selective_checkpointing_and_a_function_of_one_s_own_repeat_it_too():
    def keeps(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mean.dim else CheckpointPolicy.PREFER_RECOMPUTE

    class Repeats(torch.autograd.Function):                 # as reversible networks and others do
        @staticmethod
        def forward(ctx, x, norm):
            ctx.save_for_backward(x)
            ctx.norm = norm
            with torch.no_grad(): return norm(x)

        @staticmethod
        def backward(ctx, g):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad(): y = ctx.norm(x)
            y.backward(g)
            return x.grad, None
    norm = made(RunningBatchNorm)
    twin = copy.deepcopy(norm)
    ways = [lambda x: Repeats.apply(x, norm),
            lambda x: checkpoint(norm, x, use_reentrant=False,
                                 context_fn=lambda: create_selective_checkpoint_contexts(keeps))]
    for f in ways:
        for seed in range(3):
            x = draw(3, 4, 2, 2, seed=seed)
            close(gradients(norm, x, f), gradients(twin, x))
            close(norm.buffers(), twin.buffers())


# --- graphs that others cut ------------------------------------------------------------------------------------------

@pytest.mark.one_route
@pytest.mark.parametrize(("name", "inside"), [*((name, False) for name in NORMS), ("batch", True), ("running", True)],
                         ids=lambda o: o if isinstance(o, str) else ["plain", "checkpoint inside"][o])
def test_a_compiled_step_keeps_what_it_has_read_and_the_buffers(name, inside):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), made(NORMS[name]), nn.Tanh()).double()
    twin, buffers = copy.deepcopy(model), dict(model.named_buffers())
    f = torch.compile((lambda x: checkpoint(model, x, use_reentrant=False)) if inside else model, backend="aot_eager",
                      fullgraph=True)
    for seed in range(10):                                  # past the clamp's 20 images
        x = draw(3, 4, 5, 3, seed=seed) * (seed + 1)
        close(gradients(model, x, f), gradients(twin, x), 1e-8)
        close(model.buffers(), twin.buffers(), 1e-8)
    for k, b in model.named_buffers(): assert b is buffers[k]


@pytest.mark.one_route
@pytest.mark.parametrize(("backend", "reentrant"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_a_compiled_function_that_is_repeated_counts_once_or_is_refused(backend, reentrant):
    torch._dynamo.reset()
    for name in ("batch", "running")[: 1 if backend == "inductor" else 2]:      # what is refused is so before the code
        model = nn.Sequential(made(NORMS[name]), nn.Tanh(), made(NORMS[name]))
        twin, f = copy.deepcopy(model), torch.compile(model, backend=backend, fullgraph=True)
        def step(x, f=f): return checkpoint(f, x, use_reentrant=reentrant)
        if name == "running":
            with pytest.raises(RuntimeError, match="Put the checkpoint inside of what is compiled"):
                gradients(model, draw(3, 4, 5, 3), step)
            continue
        xs = [draw(3, 4, 5, 3, seed=seed).requires_grad_() for seed in range(3)]        # and then all backwards
        for m, f in ((model, step), (twin, twin)):
            sum(f(x).exp().sum() for x in xs).backward()
            m.found = [g for t in (*xs, *m.parameters()) for g in [t.grad]]
            for x in xs: x.grad = None
        close(model.found, twin.found, 1e-8)
        close(model.buffers(), twin.buffers(), 1e-8)


@pytest.mark.one_route
def test_a_compiled_function_within_nested_checkpoints_and_in_a_function_of_one_s_own():
    torch._dynamo.reset()
    norm = made(NORMS["batch"])
    twin, f = copy.deepcopy(norm), torch.compile(norm, backend="aot_eager", fullgraph=True)
    def inner(x): return checkpoint(f, x, use_reentrant=False) * 1
    x = draw(3, 4, 5, 3).contiguous(memory_format=torch.channels_last)
    close(gradients(norm, x, lambda x: checkpoint(inner, x, use_reentrant=False)), gradients(twin, x), 1e-8)
    close(norm.buffers(), twin.buffers(), 1e-8)
    g = torch.compile(made(NORMS["running"]), backend="aot_eager", fullgraph=True)

    class Repeats(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return g(x)

        @staticmethod
        def backward(ctx, gy):
            with torch.enable_grad(): g(ctx.saved_tensors[0].detach().requires_grad_())
    with pytest.raises(RuntimeError, match="Put the checkpoint inside of what is compiled"):
        Repeats.apply(draw(3, 4, 5, 3).requires_grad_()).sum().backward()


@pytest.mark.one_route
@pytest.mark.parametrize(("training", "strict"), [(True, False), (True, True), (False, False)],
                         ids=["training", "training, strict", "evaluation"])
@pytest.mark.parametrize("name", NORMS)
def test_an_exported_program_trains_as_the_module_does_on_any_batch(name, training, strict):
    model = nn.Sequential(made(NORMS[name])).train(training)
    program = export(model, (draw(6, 4, 5, 3),), dynamic_shapes=({0: Dim("b", min=2)},), strict=strict).module()
    kept, model, found = dict(program.named_buffers()), copy.deepcopy(model), []    # a program has the module's own
    for f in (model, program):
        leaves = [draw(b, 4, 5, 3, seed=b).requires_grad_() for b in (5, 2, 8, 7, 3)]
        ys = [f(x) for x in leaves]                         # several forwards, then their backwards
        sum((y * draw(*y.shape, seed=9)).sum() for y in ys).backward()
        found.append([*ys, *(x.grad for x in leaves)])
    close(*found)
    if training:
        for k, b in model.named_buffers():
            assert program.get_buffer(k) is kept[k]
            close([program.get_buffer(k)], [b])


# --- buffers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", RUNNING)
def test_whoever_holds_a_buffer_sees_it_change(name):
    """In every mode, and in memory that processes share."""
    for way in ("as it is", "no_grad", "inference", "transposed", "checkpoint", "half"):
        norm = RUNNING[name](4).share_memory()
        held = dict(norm.named_buffers())
        x = draw(3, 4, 5, 3, dtype=torch.float32) + 3
        if way == "transposed": x = x.transpose(2, 3)
        with torch.inference_mode(way == "inference"), torch.set_grad_enabled(way != "no_grad"):
            if way == "checkpoint": checkpoint(norm, x.requires_grad_(), use_reentrant=False).sum().backward()
            else: norm(x.bfloat16() if way == "half" else x)
        for k, b in norm.named_buffers():
            assert b is held[k], (way, k)
            assert b.is_shared(), (way, k)
        assert held["running_mean"].abs().min() > 0
        norm.load_state_dict(RUNNING[name](4).state_dict())
        norm(x.detach().clone().requires_grad_()).sum().backward()
        norm.eval()(x.detach().clone().requires_grad_()).sum().backward()


def _two_ranks(rank, port, errors):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for make in (RUNNING["batch"], RUNNING["running"]): _two_forwards(rank, make)
    except BaseException as e:
        errors.put(f"rank {rank}: {e}")
        raise
    finally: dist.destroy_process_group()


def _two_forwards(rank, make):
    norm = nn.Sequential(made(make))
    twin, ddp = copy.deepcopy(norm), DistributedDataParallel(norm)
    for seed in range(2):                               # two forwards, a broadcast before each, then one backward
        xs = [draw(3, 4, 5, 3, seed=10 * seed + 2 * i + rank) + rank for i in range(2)]
        sum((ddp(x) * draw(*x.shape, seed=i)).sum() for i, x in enumerate(xs)).backward()
        total = 0
        for i, x in enumerate(xs):
            for b in twin.buffers(): dist.broadcast(b, 0)
            total = total + (twin(x) * draw(*x.shape, seed=i)).sum()
            wants = torch.autograd.grad(total, list(twin.parameters()))         # before anything else happens
            total = sum((p * w).sum() for p, w in zip(twin.parameters(), wants, strict=True))
        for p, w in zip(norm.parameters(), wants, strict=True):
            dist.all_reduce(w)
            torch.testing.assert_close(p.grad, w / 2, rtol=1e-9, atol=1e-9)
            p.grad = None


@pytest.mark.one_route
def test_two_forwards_under_distributed_data_parallel():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    errors = mp.get_context("spawn").SimpleQueue()
    ranks = mp.spawn(_two_ranks, (port, errors), nprocs=2, join=False)
    end = time.monotonic() + 120
    while not ranks.join(1): assert time.monotonic() < end, "no answer within two minutes"
    assert errors.empty()


# --- half precision --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RUNNING)
def test_statistics_are_never_half(name, dtype):
    def wide(norm): return {b.dtype for b in norm.buffers() if b.is_floating_point()} == {torch.float32}
    norm = RUNNING[name](4).to(dtype)
    assert wide(norm)
    norm((draw(16, 4, 8, 8, dtype=torch.float32) * 600).to(dtype))
    assert wide(norm)
    assert norm.running_var.isfinite().all()                # the squares are beyond float16
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in norm.state_dict().items()}
    for assign in (False, True):
        other = RUNNING[name](4).to(dtype)
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert wide(other)
        other(draw(2, 4, 3, 3, dtype=dtype))
    assert wide(RUNNING[name](4, dtype=dtype) if name in ("batch", "running") else norm)
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    assert wide(torch.load(file, weights_only=False).half())


# --- constant inputs, and values that are not finite -----------------------------------------------------------------

LAYOUTS = {"contiguous": lambda x: x, "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
           "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
           "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CENTRED)
def test_a_constant_input_gives_exactly_the_bias(name, dtype, layout):
    for value in (1.1, 1000.1, -1e4 / 3, 3e-5):
        for n, steps in ((6, 3), (1, 3)):
            norm = NORMS[name](4).to(dtype)
            with torch.no_grad():
                for i, p in enumerate(norm.parameters()): p.copy_(draw(*p.shape, seed=i))
            norm.eps = 1e-12
            bias = norm.bias.view(1, -1, 1, 1) if norm.bias.ndim == 1 else norm.bias
            for _ in range(steps):
                x = LAYOUTS[layout](torch.full((n, 4, 5, 3), value, dtype=dtype))
                y = norm(x)
                assert torch.equal(y, bias.expand_as(y)), (value, n)
            if "running" in name or name in ("per image", "averaged"):
                assert torch.equal(norm.eval()(x), bias.expand_as(x)), "in evaluation"


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", NORMS)
def test_what_is_not_finite_stays_in_its_image_or_channel(name, bad):
    norm, x = made(NORMS[name]), draw(3, 4, 5, 3)
    x[1, 2, 4, 1] = bad
    y, gx, *_ = gradients(norm, x)
    own = torch.zeros_like(x, dtype=torch.bool)
    if name in RUNNING: own[:, 2] = True
    elif name in ("group", "evonorm"): own[1, 2:] = True
    elif name in ("instance", "filter response"): own[1, 2] = True
    else: own[1] = True
    for t in (y, gx): assert t[~own].isfinite().all()
    assert not y[1, 2, 4, 1].isfinite()
    if name in RUNNING:
        for k, b in norm.named_buffers():
            if b.ndim and not k.startswith("grad"): assert b.isfinite().tolist() == [True, True, False, True], k


@pytest.mark.parametrize("make", [lambda: RunningBatchNorm(4, average_backward=True), lambda: SteadyBatchNorm(4, 2),
                                  lambda: MABN(4)], ids=["running", "steady", "mabn"])
@pytest.mark.parametrize("way", ["channels last", "checkpointed", "made weights", "autocast"])
def test_a_gradient_penalty_is_refused_by_norms_without_a_second_derivative(make, way):
    norm, conv, made = make(), nn.Conv2d(4, 4, 1), torch.ones(4, requires_grad=True)
    x = torch.randn(4, 4, 3, 3)
    if way == "channels last": x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()

    def forward(x): return torch.func.functional_call(norm, {"weight": made.exp()}, (conv(x),))
    if way == "checkpointed": y = checkpoint(lambda x: norm(conv(x)), x, use_reentrant=False)
    elif way == "autocast":
        with torch.autocast("cpu", torch.bfloat16): y = norm(conv(x))
    else: y = forward(x) if way == "made weights" else norm(conv(x))
    loss = y.float().square().sum()
    gx, = torch.autograd.grad(loss, x, create_graph=True)
    for wanted in (conv.weight, made if way == "made weights" else norm.weight):
        with pytest.raises(RuntimeError, match="a second derivative was asked for"):
            torch.autograd.grad(loss + gx.square().sum(), wanted, retain_graph=True)
