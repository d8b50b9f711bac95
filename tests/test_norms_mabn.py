"""MABN and its centred convolution: the formula written out literally, what a backward writes, copies, graphs."""

import copy
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from norms import BatchNorm
from norms.rivals import MABN, CentredConv2d, WSConv2d, convert_convs
from runner import preflight


class Literal:
    """The definition by lists of what each step had; step t's statistics are the mean over steps t - m + 1 to t."""

    def __init__(self, nf, mom=0.02, eps=1e-5, window=16, warmup=100, r_from=1000, limit=5.0):
        self.mom, self.eps, self.m, self.warmup, self.r_from, self.limit = mom, eps, window, warmup, r_from, limit
        self.weight, self.bias = torch.ones(nf), torch.zeros(nf)
        self.run, self.squares, self.dots = torch.ones(nf, dtype=torch.float64), [], []

    def alone(self, t): return t <= self.m or t < self.warmup

    def last(self, values, t): return values[-1] if self.alone(t) else sum(values[-self.m:]) / self.m

    def step(self, x, g):
        """Output and gradients of x, weight and bias in training."""
        view, dims = (1, -1, *[1] * (x.ndim - 2)), (0, *range(2, x.ndim))
        self.squares.append((x * x).mean(dims))
        t = len(self.squares)
        v = self.last(self.squares, t)
        r = torch.ones_like(v)
        if t > max(self.r_from, self.warmup):
            r = ((v + self.eps).sqrt() / (self.run + self.eps).sqrt()).clamp(1 / self.limit, self.limit)
        self.run = (1 - self.mom) * self.run + self.mom * v
        root = (v + self.eps).sqrt().view(view)
        z, scaled = x / root, g * (self.weight * r).view(view)
        self.dots.append((scaled * z).mean(dims))
        gx = (scaled - z * self.last(self.dots, t).view(view)) / root
        y = z * r.view(view) * self.weight.view(view) + self.bias.view(view)
        return y, gx, (g * z * r.view(view)).sum(dims), g.sum(dims)

    def evaluate(self, x):
        view = (1, -1, *[1] * (x.ndim - 2))
        return x / (self.run + self.eps).sqrt().view(view) * self.weight.view(view) + self.bias.view(view)


def step(m, x, g, call=None):
    leaf = x.clone().requires_grad_()
    for p in m.parameters(): p.grad = None
    y = (m if call is None else call)(leaf)     # a compiled module has a length
    y.backward(g)
    return [y.detach(), leaf.grad, *(p.grad for p in m.parameters())]


def close(got, want, tol=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol * max(1, b.abs().max().item()))


@pytest.mark.parametrize("seed", range(10))
def test_any_sequence_of_batches_gives_the_formula_s_outputs_and_gradients(seed):
    draw = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    settings = {"mom": draw.choice([0.02, 0.5, 0.0, 1.0]), "eps": draw.choice([1e-5, 0.1]),
                "window": draw.choice([1, 2, 5]), "warmup": draw.choice([0, 4, 9]), "r_from": draw.choice([0, 6, 100]),
                "limit": draw.choice([1.0, 1.3, 5.0])}
    ours, literal = MABN(3, **settings).double(), Literal(3, **settings)
    with torch.no_grad():
        for p in ours.parameters(): p.copy_(torch.randn(3, generator=rng))
    literal.weight, literal.bias = (p.detach() for p in ours.parameters())
    for _ in range(25):
        shape = (draw.choice([1, 2, 2, 5]), 3, *draw.choice([(), (4,), (1, 1), (3, 2)]))
        x, g = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
        x = x * draw.choice([0.01, 1, 3]) + draw.choice([0, 2])
        if draw.random() < 0.2: close([ours.eval()(x).detach()], [literal.evaluate(x)])
        else: close(step(ours.train(), x, g), literal.step(x, g))
    close([ours.running_var], [literal.run])
    assert ours.num_batches_tracked == len(literal.squares)
    assert not ours.running_mean.any()


def trained(steps=6, **settings):
    """One whose window is full and whose r is on."""
    norm = MABN(3, 0.3, **{"window": 3, "warmup": 0, "r_from": 0, **settings}).double()
    with torch.no_grad(): norm.weight.copy_(torch.tensor([0.5, -1, 2]))
    for _ in range(steps): step(norm, *torch.randn(2, 2, 3, 4, dtype=torch.float64))
    return norm


def test_the_defaults_are_the_paper_s():
    norm = MABN(2)
    assert (norm.mom, norm.window, norm.warmup, norm.r_from, norm.limit) == (0.02, 16, 100, 1000, 5)


def test_a_second_backward_over_the_same_graph_takes_nothing_more_in():
    norm = trained()
    x, g = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    leaf = x.requires_grad_()
    y = norm(leaf)
    first, = torch.autograd.grad(y, leaf, g, retain_graph=True)
    window = norm.grad_window.clone()
    again, = torch.autograd.grad(y, leaf, g)
    close([again, norm.grad_window], [first, window], 1e-15)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_is_the_plain_one(reentrant):
    norm = trained()
    twin = copy.deepcopy(norm)
    for _ in range(5):
        x, g = torch.randn(2, 2, 3, 4, dtype=torch.float64)
        close(step(norm, x, g, lambda x: checkpoint(norm, x, use_reentrant=reentrant)), step(twin, x, g))
        close(norm.buffers(), twin.buffers())


def test_a_compiled_step_is_the_plain_one_and_compiles_once():
    from torch._dynamo.testing import CompileCounterWithBackend
    norm = trained(0, r_from=4)
    twin, counter = copy.deepcopy(norm), CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(norm, backend=counter, fullgraph=True)
    for _ in range(8):
        x, g = torch.randn(2, 2, 3, 4, dtype=torch.float64)
        close(step(norm, x, g, compiled), step(twin, x, g))
        close(norm.buffers(), twin.buffers())
    assert counter.frame_count == 1


def test_what_is_not_finite_stays_out_of_the_window_and_in_its_channel():
    norm = trained()
    for bad in (float("inf"), float("nan")):
        x, g = torch.randn(2, 2, 3, 4, dtype=torch.float64)
        g[0, 1, 2] = bad
        before = norm.grad_window.clone()
        _, gx, *_ = step(norm, x, g)
        assert not gx[:, 1].isfinite().all()                # a GradScaler has to see it
        assert gx[:, [0, 2]].isfinite().all()
        assert torch.equal(norm.grad_window[1], before[1])
        assert (norm.grad_window[[0, 2]] != before[[0, 2]]).any(1).all()
    x, g = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    assert all(t.isfinite().all() for t in step(norm, x, g))


def test_a_change_of_the_loss_scale_goes_through_by_rescale():
    plain, scaled, scale = trained(0), trained(0), 1.0
    for new in (1.0, 1.0, 8.0, 8.0, 2.0, 2.0):
        scaled.rescale_(new / scale)
        scale = new
        x, g = torch.randn(2, 2, 3, 4, dtype=torch.float64)
        (_, want, *_), (_, got, *_) = step(plain, x, g), step(scaled, x, g * scale)
        close([got / scale, scaled.grad_window / scale], [want, plain.grad_window])


def test_second_derivatives_and_batches_of_gradients_are_refused():
    norm, x = trained(), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    first, = torch.autograd.grad(norm(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"): first.sum().backward()
    y = norm(x)
    with pytest.raises(RuntimeError, match="call the backward pass once for each"):
        torch.autograd.grad(y, x, torch.randn(2, *y.shape).double(), is_grads_batched=True)


def test_a_batch_norm_s_statistics_become_second_moments():
    theirs = nn.BatchNorm1d(3)
    for _ in range(60): theirs(torch.randn(50, 3) * 2 + 1)
    norm = MABN(3, window=4, warmup=0)
    norm.load_state_dict(copy.deepcopy(theirs.state_dict()))
    x = torch.randn(500, 3) * 2 + 1
    close([norm.eval()(x)], [x / (theirs.running_var + theirs.running_mean.square() + norm.eps).sqrt()], 1e-5)
    close([norm.train()(x).pow(2).mean(0)], [torch.ones(3)], 0.1)      # the window is of that size from the beginning
    other = nn.BatchNorm1d(3)
    other.load_state_dict({k: v for k, v in norm.state_dict().items() if "window" not in k})
    close([other.eval()(x)], [norm.eval()(x)], 1e-5)


def test_half_precision_in_and_out_with_wide_statistics():
    for dtype in (torch.float16, torch.bfloat16):
        norm, twin = MABN(3, window=2, warmup=0, r_from=2).to(dtype), MABN(3, window=2, warmup=0, r_from=2)
        for _ in range(5):
            x, g = (torch.randn(2, 4, 3, 5) * 300).to(dtype)                # squares overflow float16
            got, want = step(norm, x, g), step(twin, x.float(), g.float())
            assert {t.dtype for t in got} == {dtype}
            close([t.float() for t in got], want, 0.03)
        assert {b.dtype for b in norm.buffers()} == {torch.float32, torch.int64}


def test_running_moments_are_what_training_divides_by():
    # The last one divides by a running average that doesn't move.
    for settings in ({"warmup": 100}, {"r_from": 100}, {"mom": 0.0, "limit": 1e9}):
        norm = MABN(3, **{"window": 3, "warmup": 0, "r_from": 0, **settings})
        for _ in range(7):
            x = torch.randn(2, 3, 5)
            y = norm(x)
            mean, var, images = norm.running_moments(2)
            torch.testing.assert_close(y, x / (var.view(-1, 1) + norm.eps).sqrt())
            assert (mean.any(), images) == (False, 6)
            assert torch.equal(norm.unclamped_var, var)


@pytest.mark.parametrize(("make", "warned"), [
    (nn.Conv2d, True), (CentredConv2d, False), (WSConv2d, False), (partial(CentredConv2d, bias=False), False),
    (partial(nn.Conv2d, bias=False), True), (lambda *a: nn.Sequential(nn.Conv2d(*a), nn.ReLU()), False),
    (lambda *a: nn.Sequential(nn.Conv2d(*a), nn.ReLU(inplace=True)), False)])
def test_preflight_asks_for_a_centred_convolution_right_before_it(make, warned):
    model = nn.Sequential(make(3, 4, 3), nn.Sequential(MABN(4)), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    found, other = preflight(model, torch.randn(8, 3, 9, 9)).findings
    text = ("it takes no mean away, and the weights of module 0 before it give one: "
            "convert_convs(model, CentredConv2d)")
    assert (text in found.text, "takes no mean away" in other.text) == (warned, False)
    assert found.level == ("warn" if warned else "ok")
    if warned:
        convert_convs(model, CentredConv2d)
        assert preflight(model, torch.randn(8, 3, 9, 9)).findings[0].level == "ok"


def test_preflight_counts_the_window():
    (found,) = preflight(MABN(3), torch.randn(2, 3, 1, 1)).findings
    assert (found.level, found.text) == ("warn", "2 values of this batch, averaged with about 32 images: the variance "
                                                 "has a standard error of 25 %")


@pytest.mark.parametrize(("settings", "text"), [
    ({"mom": 2}, "mom is 2; it weighs the new batch"),
    ({"window": 0}, "window is 0; it needs a number of batches, .* such as 32 divided by the batch size"),
    ({"warmup": -1}, "warmup is -1, r_from 1000 and limit 5.0; the first two are steps"),
    ({"limit": 0.5}, "warmup is 100, r_from 1000 and limit 0.5; .* must be at least 1")])
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError, match=f"MABN: {text}"): MABN(3, **settings)


# --- the convolution -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{}, {"bias": False, "stride": 2}, {"padding": 1, "padding_mode": "reflect"},
                                      {"groups": 2, "dilation": 2}, {"padding": "same"}], ids=str)
def test_the_convolution_centres_each_output_channel_s_weights(settings):
    conv, x = CentredConv2d(4, 6, 3, **settings).double(), torch.randn(2, 4, 7, 7, dtype=torch.float64)
    stored = conv.weight.detach().clone()
    plain = nn.Conv2d(4, 6, 3, **settings).double()
    plain.load_state_dict({**conv.state_dict(), "weight": torch.stack([w - w.mean() for w in stored])})
    torch.testing.assert_close(conv(x), plain(x))
    assert torch.equal(conv.weight, stored)
    found = [torch.autograd.grad(m(x).pow(2).sum(), m.weight)[0] for m in (conv, plain)]
    torch.testing.assert_close(found[0], torch.stack([g - g.mean() for g in found[1]]))


def test_behind_it_equal_inputs_give_nothing_so_that_no_mean_is_to_take_away():
    conv = CentredConv2d(3, 4, 3, bias=False)
    assert F.relu(conv(torch.full((1, 3, 5, 5), 2.5))).abs().max() < 1e-5
    assert isinstance(conv, nn.Conv2d)
    assert BatchNorm(4)(conv(torch.randn(2, 3, 5, 5))).shape == (2, 4, 3, 3)
