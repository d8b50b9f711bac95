"""BatchRenorm: the formula written out literally, Keras's layer if it is installed, limits that grow, state dicts."""

import os
import random

import pytest
import torch
from torch import nn

from norms import BatchNorm
from norms.rivals import BatchRenorm
from runner import preflight


class Literal(nn.Module):
    """The paper's algorithm word for word: sigma is averaged and holds eps; r and d carry no gradient."""

    def __init__(self, nf, mom=0.01, eps=1e-5, rmax=3.0, dmax=5.0, begin=5000, rmax_at=40000, dmax_at=25000):
        super().__init__()
        self.mom, self.eps, self.limits = mom, eps, (rmax, dmax, begin, rmax_at, dmax_at)
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.mu, self.sigma = torch.zeros(nf, dtype=torch.float64), torch.ones(nf, dtype=torch.float64)
        self.sigma = (self.sigma + eps).sqrt()
        self.t = 0

    def part(self, end):
        begin = self.limits[2]
        if self.t <= begin: return 0.0
        return 1.0 if self.t >= end else (self.t - begin) / (end - begin)

    def forward(self, x):
        shape = (1, -1, *[1] * (x.ndim - 2))
        if self.training:
            self.t += 1
            rmax, dmax, _, rmax_at, dmax_at = self.limits
            rmax, dmax = 1 + (rmax - 1) * self.part(rmax_at), dmax * self.part(dmax_at)
            dims = (0, *range(2, x.ndim))
            mu_b = x.mean(dims)
            sigma_b = (self.eps + (x - mu_b.view(shape)).pow(2).mean(dims)).sqrt()
            r = (sigma_b / self.sigma).clamp(1 / rmax, rmax).detach()
            d = ((mu_b - self.mu) / self.sigma).clamp(-dmax, dmax).detach()
            y = (x - mu_b.view(shape)) / sigma_b.view(shape) * r.view(shape) + d.view(shape)
            self.mu = self.mu + self.mom * (mu_b.detach() - self.mu)
            self.sigma = self.sigma + self.mom * (sigma_b.detach() - self.sigma)
        else: y = (x - self.mu.view(shape)) / self.sigma.view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape)


def step(m, x, g):
    leaf = x.clone().requires_grad_()
    y = m(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *m.parameters()], g)]


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_batches_gives_the_formula_s_outputs_and_gradients(seed):
    draw = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    begin = draw.choice([0, 1, 5])
    settings = {"mom": draw.choice([0.01, 0.3, 0.0, 1.0]), "eps": draw.choice([1e-5, 0.1]), "begin": begin,
                "rmax": draw.choice([1.0, 1.5, 3.0]), "dmax": draw.choice([0.0, 0.5, 5.0]),
                "rmax_at": begin + draw.choice([0, 3, 12]), "dmax_at": begin + draw.choice([0, 2, 8])}
    ours, literal = (cls(3, **settings).double() for cls in (BatchRenorm, Literal))
    for p, q in zip(ours.parameters(), literal.parameters(), strict=True):
        with torch.no_grad(): q.copy_(p.copy_(torch.randn(3, generator=rng)))
    for _ in range(25):
        training, shape = draw.random() < 0.8, draw.choice([(), (4,), (1, 1), (3, 2)])
        x, g = torch.randn(2, draw.choice([1, 2, 2, 5]), 3, *shape, generator=rng, dtype=torch.float64)
        x = x * draw.choice([0.01, 1, 3]) + draw.choice([0, 5])
        found = [step(m.train(training), x, g) for m in (ours, literal)]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * max(1, want.abs().max().item()))
    torch.testing.assert_close(ours.running_mean, literal.mu, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((ours.running_var + ours.eps).sqrt(), literal.sigma, rtol=1e-10, atol=1e-10)
    assert ours.num_batches_tracked == literal.t


def test_it_equals_keras(monkeypatch):
    """Training and evaluation against Keras 3, whose layer has fixed limits and begins with sigma = 1."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", "3.13")
    if keras.backend.backend() != "torch": pytest.skip("needs Keras on torch")
    for name in ("keras.src.backend.result_type", "keras.src.backend.common.dtypes.result_type"):
        monkeypatch.setattr(name, lambda *dtypes: "float64")            # by its own rule it computes in float32
    limits = {"rmax": 2.0, "rmin": 0.5, "dmax": 0.5}          # which are rounded to float32
    theirs = keras.layers.BatchNormalization(axis=1, momentum=0.9, epsilon=1e-3, renorm=True, renorm_clipping=limits,
                                             renorm_momentum=0.9, dtype="float64")
    ours = BatchRenorm(3, 0.1, 1e-3, rmax=2.0, dmax=0.5, begin=0, rmax_at=0, dmax_at=0).double()
    theirs.build((None, 3, 4, 4))
    for t in (theirs.moving_stddev, theirs.renorm_stddev): t.assign(torch.full((3,), 1.001, dtype=torch.float64).sqrt())
    w, b = torch.randn(2, 3, dtype=torch.float64)
    theirs.gamma.assign(w), theirs.beta.assign(b)
    with torch.no_grad(): ours.weight.copy_(w), ours.bias.copy_(b)
    for i in range(30):
        training = i % 5 != 4
        x, g = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
        x, found = x * (i + 1) / 5 + 0.3, []
        def keras_s(x, training=training): return theirs(x, training=training)
        for call, parameters in ((ours.train(training), list(ours.parameters())),
                                 (keras_s, [theirs.gamma.value, theirs.beta.value])):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            found.append([y, *torch.autograd.grad(y, [leaf, *parameters], g)])
        for got, want in zip(*found, strict=True): torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.running_mean, theirs.moving_mean.value.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.running_var, theirs.moving_variance.value.detach(), rtol=1e-10, atol=1e-10)


def limits(norm, t): return tuple(v.item() for v in norm.limits(torch.tensor(t), torch.float64))


def test_the_limits_grow_evenly_at_the_paper_s_steps():
    norm = BatchRenorm(2)
    assert limits(norm, 1) == limits(norm, 5000) == (1, 0)
    assert limits(norm, 15000) == pytest.approx((1 + 2 * 10 / 35, 2.5))
    assert limits(norm, 25000) == pytest.approx((1 + 2 * 20 / 35, 5))
    assert limits(norm, 40000) == limits(norm, 10**6) == (3, 5)
    assert limits(BatchRenorm(2, begin=0, rmax_at=0, dmax_at=0), 1) == (3, 5)


def test_until_the_limits_grow_it_trains_as_batch_norm_bit_for_bit():
    ours, theirs = BatchRenorm(3, begin=4, rmax_at=9, dmax_at=9), BatchNorm(3)
    for t in range(1, 7):
        x, g = torch.randn(2, 2, 3, 4, 4) + 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("norms.fast.kernels.KERNELS", {})
            same = [torch.equal(a, b) for a, b in zip(step(ours, x, g), step(theirs, x, g), strict=True)]
        assert all(same) == (t <= 4)


def test_without_limits_training_is_evaluation_by_the_averages_of_before():
    norm = BatchRenorm(3, 0.2, rmax=1e9, dmax=1e9, begin=0, rmax_at=0, dmax_at=0).double()
    for _ in range(5):
        x = torch.randn(2, 3, 4, dtype=torch.float64) * 2 + 1
        want = norm.eval()(x)
        torch.testing.assert_close(norm.train()(x), want)


def test_state_dicts_are_torch_s_both_ways():
    theirs, norm = nn.BatchNorm1d(3), BatchRenorm(3, begin=0, rmax_at=5, dmax_at=5)
    for _ in range(3): norm(torch.randn(4, 3) * 3 + 1)
    theirs.load_state_dict(norm.state_dict())
    x = torch.randn(4, 3)
    torch.testing.assert_close(theirs.eval()(x), norm.eval()(x))
    other = BatchRenorm(3)
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other.eval()(x), norm(x))


@pytest.mark.parametrize(("settings", "text"), [
    ({"mom": 2}, "mom is 2; it weighs the new batch"),
    ({"rmax": 0.5}, "rmax is 0.5 and dmax 5.0; .* rmax must be at least 1 and dmax at least 0, such as 3 and 5"),
    ({"dmax": -1}, "rmax is 3.0 and dmax -1"),
    ({"begin": 30000}, "begin is 30000, rmax_at 40000 and dmax_at 25000; .* neither may be below begin"),
    ({"begin": -1}, "begin is -1")])
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError, match=f"BatchRenorm: {text}"): BatchRenorm(3, **settings)


def test_preflight_says_from_when_on_it_is_more_than_batch_norm():
    (found,) = preflight(BatchRenorm(3, begin=7), torch.randn(2, 3, 1, 1)).findings
    assert found.level == "warn"
    assert found.text == ("2 values per statistic: the variance has a standard error of 141 %; from step 8 on the "
                          "output is moved towards running statistics; the gradient rests on the batch alone")
