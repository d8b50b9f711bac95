"""The norms' kernels: they are built, equal the definitions, and are left alone where they may not work."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import norms.fast.kernels
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm
from norms.rivals import BatchChannelNorm, RunningChannelNorm

ROOT = Path(__file__).parent.parent
NORMS = {"batch": BatchNorm, "running": RunningBatchNorm,
         "per image": lambda nf: RunningBatchNorm(nf, rule="per_image"),
         "layer": lambda nf: LayerNorm(), "instance": InstanceNorm, "group": lambda nf: GroupNorm(2 - nf % 2, nf),
         "batch and group": lambda nf: BatchChannelNorm(nf, 2 - nf % 2),
         "running and group": lambda nf: RunningChannelNorm(nf, 2 - nf % 2),
         "constant statistics": lambda nf: RunningChannelNorm(nf, 2 - nf % 2, constant_statistics=True)}
needs_kernels = pytest.mark.skipif(not norms.fast.kernels.AVAILABLE, reason="the norms' kernels are not built here")


def test_they_are_built_where_there_is_a_compiler():
    if os.environ.get("NORMS_KERNELS") == "0": pytest.skip("switched off by NORMS_KERNELS=0")
    if not (shutil.which("cc") or shutil.which("gcc")): pytest.skip("there is no C compiler")
    tree = Path(__file__).parent.parent
    if not (tree / ".git").exists() and not list(tree.glob("norms/fast/_kernels*")):
        pytest.skip("an unpacked sdist, which is installed elsewhere")
    assert norms.fast.kernels.AVAILABLE, "pip install -e . builds them"


def used(y): return type(y.grad_fn).__name__ in ("_StepBackward", "_GroupStepBackward", "_PairStepBackward")


def steps(norm, batches):
    """Outputs and all gradients of training steps on `batches` of `(x, g)`, and the state after them."""
    found = []
    for x, g in batches:
        x = x.clone().requires_grad_()
        y = norm(x)
        found += [y, *torch.autograd.grad(y, [x, *norm.parameters()], g)]
    return [*found, *norm.state_dict().values()]


def both(make, batches, monkeypatch):
    """What `steps` gives with the kernels and by the definition, from the same weights, in this order."""
    ours, other = make(), make()
    for p, q in zip(ours.parameters(), other.parameters(), strict=True):
        with torch.no_grad(): p.copy_(torch.randn(p.shape)), q.copy_(p)
    got = steps(ours, batches)
    assert used(got[0])
    with monkeypatch.context() as patch:
        patch.setattr(norms.fast.kernels, "KERNELS", {})
        want = steps(other, batches)
    assert not used(want[0])
    return got, want


# More channels than the kernels take at a time (64), one position and several, one image, ragged batches.
@needs_kernels
@pytest.mark.parametrize("size", [(3,), (130,), (3, 5), (130, 1, 1), (70, 3, 2), (2, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_same_numbers_as_by_the_definition(name, size, monkeypatch):
    if name == "instance" and len(size) == 1: pytest.skip("needs positions")
    # Small spreads, so that the floor under the variance holds some channels at first and not others.
    spread = torch.linspace(0.02, 2, size[0], dtype=torch.float64).view(-1, *[1] * (len(size) - 1))
    batches = [(torch.randn(n, *size, dtype=torch.float64) * spread + 3, torch.randn(n, *size, dtype=torch.float64))
               for n in (2, 5, 1, 8, 2, 3, 2, 1, 4)]
    for a, b in zip(*both(lambda: NORMS[name](size[0]).double(), batches, monkeypatch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * max(1, b.abs().max().item()))


@needs_kernels
@pytest.mark.parametrize("name", NORMS)
def test_channels_last(name):
    """The same numbers, and the layout stays; a gradient of the other layout is no matter."""
    first, last = NORMS[name](70).double(), NORMS[name](70).double()
    for n in (3, 2, 1, 5):
        x, g = torch.randn(2, n, 70, 3, 2, dtype=torch.float64)
        results = []
        for norm, fmt, other in ((first, torch.contiguous_format, torch.channels_last),
                                 (last, torch.channels_last, torch.contiguous_format)):
            xi = x.contiguous(memory_format=fmt).requires_grad_()
            y = norm(xi)
            assert y.is_contiguous(memory_format=fmt)
            results.append([y, *torch.autograd.grad(y, [xi, *norm.parameters()], g.contiguous(memory_format=other))])
            second = torch.autograd.grad(norm.eval()(xi).pow(2).sum(), xi, create_graph=True)[0]
            results[-1].append(torch.autograd.grad(second.pow(2).sum(), xi)[0])
            norm.train()
        for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(first.state_dict().values(), last.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (6, 3, 4)], ids=str)
def test_layer_norm_s_shapes(shape, monkeypatch):
    batches = [(torch.randn(n, 6, 3, 4, dtype=torch.float64), torch.randn(n, 6, 3, 4, dtype=torch.float64))
               for n in (2, 5)]
    for a, b in zip(*both(lambda: LayerNorm(shape or None).double(), batches, monkeypatch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@needs_kernels
@pytest.mark.parametrize("name", NORMS)
def test_float32_is_float64_rounded(name):
    """Sums are of double precision: what is left is the rounding of the steps, here at most 20 of float32's."""
    batches = [(torch.randn(n, 9, 7, 7) + 2, torch.randn(n, 9, 7, 7)) for n in (2, 2, 5)]
    exact = [(x.double(), g.double()) for x, g in batches]
    for a, b in zip(steps(NORMS[name](9), batches), steps(NORMS[name](9).double(), exact), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=2e-6 * b.double().abs().max().item())


@needs_kernels
@pytest.mark.parametrize("make", [BatchNorm, RunningBatchNorm])
def test_not_a_number_stays_one(make):
    norm, x = make(3), torch.randn(4, 3, 2)
    x[1, 2, 0] = float("nan")
    y = norm(x.requires_grad_())
    (gx,) = torch.autograd.grad(y.sum(), x)
    for t in (y, gx): assert t[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()
    assert norm.running_mean.isnan().tolist() == norm.running_var.isnan().tolist() == [False, False, True]


@needs_kernels
@pytest.mark.parametrize("make", [BatchNorm, RunningBatchNorm, lambda nf: LayerNorm(), lambda nf: GroupNorm(2, nf)])
def test_gradients_that_are_views(make):
    """A gradient need not be contiguous: that of a sum is one number expanded."""
    norm, x = make(4).double(), torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = norm(x)
    assert used(y)
    g = torch.randn(5, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    for a, b in zip(*(torch.autograd.grad(y, [x, *norm.parameters()], t, retain_graph=True)
                      for t in (g, g.contiguous())), strict=True): assert torch.equal(a, b)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-12)     # a normalised sum can't change


@needs_kernels
@pytest.mark.parametrize("name", NORMS)
def test_a_batch_of_gradients(name):
    """As the rows of a Jacobian are computed: the gradient that comes is a batch of them, and no bare memory."""
    norm, x = NORMS[name](4).double(), torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    y, inputs = norm(x), [x, *norm.parameters()]
    assert used(y)
    many = torch.randn(5, *y.shape, dtype=torch.float64)
    rows = zip(*(torch.autograd.grad(y, inputs, g, retain_graph=True) for g in many), strict=True)
    batched = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda g: torch.autograd.grad(y, inputs, g, retain_graph=True))(many)
    for a, b, want in zip(batched, mapped, rows, strict=True):
        for got in (a, b): torch.testing.assert_close(got, torch.stack(want), rtol=1e-10, atol=1e-10)


@needs_kernels
def test_a_buffer_changes_in_place_and_says_so():
    """Another reference to it sees the update, and a graph that had saved it before refuses to go on."""
    for norm in (BatchNorm(3), RunningBatchNorm(3)):
        buffers = dict(norm.named_buffers())
        x = torch.randn(2, 3, 4)
        evaluated = (norm.running_mean * torch.ones(3, requires_grad=True)).sum()
        norm(x)
        for name, t in norm.named_buffers(): assert t is buffers[name]
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2)) * (0.1 if isinstance(norm, BatchNorm) else 1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"): evaluated.backward()


def replaced(name, change):
    """A norm with one tensor changed, as no one should leave it."""
    norm = RunningBatchNorm(4)
    if name in norm._buffers: norm._buffers[name] = change(norm._buffers[name])
    else: norm._parameters[name] = nn.Parameter(change(norm._parameters[name].detach()))
    return norm


@needs_kernels
def test_kernels_touch_only_memory_that_is_as_they_think():
    x = torch.randn(2, 4, 3, 3)
    assert used(RunningBatchNorm(4)(x))
    two_apart = replaced("running_var", lambda t: torch.ones(8)[::2])
    for norm in (replaced("weight", lambda t: torch.ones(8)[::2]), two_apart,
                 replaced("count", lambda t: t.double())): assert not used(norm(x))
    assert two_apart.running_var.shape == (4,)
    for name in ("weight", "bias", "running_mean", "running_var"):
        with pytest.raises(RuntimeError): replaced(name, lambda t: t[:3].clone())(x)
        with pytest.raises((RuntimeError, NotImplementedError)): replaced(name, lambda t: t.to("meta"))(x)


@needs_kernels
@pytest.mark.parametrize("name", NORMS)
def test_a_parametrized_weight_is_no_bare_memory(name):
    class Squared(nn.Module):
        def forward(self, w): return w * w
    norm, x = NORMS[name](4), torch.randn(2, 4, 3)
    with torch.no_grad(): norm.weight.fill_(3)
    y = norm.train()(x)
    parametrized = NORMS[name](4)
    with torch.no_grad(): parametrized.weight.fill_(3**0.5)
    parametrize.register_parametrization(parametrized, "weight", Squared())
    torch.testing.assert_close(parametrized(x), y, rtol=1e-5, atol=1e-5)
    parametrized(x).sum().backward()
    assert parametrized.parametrizations.weight.original.grad.shape == norm.weight.shape


@needs_kernels
@pytest.mark.parametrize("name", NORMS)
def test_other_inputs_go_by_the_definition(name, monkeypatch):
    norm, x = NORMS[name](4), torch.randn(2, 4, 8, 8)
    assert used(norm(x))
    assert not used(norm(x[..., ::2]))
    assert not used(norm(x.bfloat16()))
    monkeypatch.setattr(norms.fast.kernels, "GRAIN", 100)
    for threads in (2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert used(norm(x)) == (threads == 2)


@needs_kernels
@pytest.mark.parametrize("method", ["track", "floor"])
def test_a_norm_with_a_rule_of_its_own_keeps_it(method):
    """The kernels know the project's rules alone: a class that changes one is not run by them."""
    for base in (BatchNorm, RunningBatchNorm):
        if not hasattr(base, method): continue
        called = []

        def own(self, *args, base=base, called=called):
            called.append(method)
            return getattr(base, method)(self, *args)
        norm = type("Own", (base,), {method: own})(3)
        norm(torch.randn(2, 3, 4))
        assert set(called) == {method}


@pytest.mark.parametrize("name", NORMS)
def test_a_traced_graph_computes_and_is_no_constant(name):
    """Neither a number that the norm looked at nor what the kernels did may be baked into a graph."""
    x, other = torch.randn(2, 2, 4, 3, 3).double()
    norm = NORMS[name](4).double()
    state = {k: v.clone() for k, v in norm.state_dict().items()}

    def step(x, state):
        y = torch.func.functional_call(norm, state, (x,))
        return y, *torch.autograd.grad(y.pow(2).sum(), x)
    inputs = [t.clone().requires_grad_() for t in (x, other)]
    graph = make_fx(step)(inputs[0], {k: v.clone() for k, v in state.items()})
    got, want = (f(inputs[1], {k: v.clone() for k, v in state.items()}) for f in (graph, step))
    for a, b in zip(got, want, strict=True): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NORMS)
def test_jit_trace_gives_what_can_be_saved(name, tmp_path):
    norm, x, other = NORMS[name](4).eval(), *torch.randn(2, 2, 4, 3, 3)
    with warnings.catch_warnings():
        # torch deprecates it, though models are still shipped so; and it says that the check of the input is fixed.
        for kind in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning): warnings.simplefilter("ignore", kind)
        torch.jit.save(torch.jit.trace(norm, x), tmp_path / "norm.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "norm.pt")(other), norm(other))


def test_without_them_the_norms_work_the_same(tmp_path, forks):
    """Switched off, and where the file is of another system."""
    code = ("import norms.kernels, torch; from norms import RunningBatchNorm; assert not norms.fast.kernels.AVAILABLE; "
            "y = RunningBatchNorm(3)(torch.arange(12.).view(2, 3, 2)); print(y.square().mean().item())")
    run = forks.run("-c", code, env=os.environ | {"NORMS_KERNELS": "0", "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(1, abs=1e-4)
    from importlib.machinery import EXTENSION_SUFFIXES
    (tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    assert norms.fast.kernels.load(tmp_path) == {}
    assert norms.fast.kernels.load(tmp_path / "nowhere") == {}


def test_the_installation_goes_on_without_a_compiler(tmp_path):
    """As pip does it: `build_ext` of what pyproject.toml says, here in a copy. With one: see test_package.py."""
    if not shutil.which("false"): pytest.skip("there is no `false` for a compiler that fails")
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "norms" / "fast").mkdir(parents=True)
    for name in ("norms/__init__.py", "norms/fast/kernels.c"): shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "norms" / "fast" / "__init__.py").touch()
    pytest.importorskip("setuptools", minversion="77")
    code = "from setuptools import setup; setup(packages=['norms', 'norms.fast'])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, "build_ext", "--inplace"], cwd=tmp_path,
                          env=os.environ | {"CC": "false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stdout + done.stderr
    assert norms.fast.kernels.load(tmp_path / "norms" / "fast") == {}
