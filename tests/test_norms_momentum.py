"""MomentumBatchNorm: the formula written out literally, its schedule, and what it takes from a batch norm."""

import copy
import random

import pytest
import torch
from torch import nn

from norms import BatchNorm
from norms.rivals import MomentumBatchNorm
from runner import preflight


class Literal(nn.Module):
    """The paper's algorithm word for word, with T as a number of steps; the past is detached, the batch is not."""

    def __init__(self, nf, mom=0.1, eps=1e-5, m0=32, steps=None):
        super().__init__()
        self.mom, self.eps, self.m0, self.steps = mom, eps, m0, steps
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.mu = self.mu_inf = torch.zeros(nf, dtype=torch.float64)
        self.sigma2 = self.sigma2_inf = torch.ones(nf, dtype=torch.float64)
        self.t = 0

    def lam(self, b):
        T, s = self.steps, min(b / self.m0, 1)
        if T is None or T == 1: return 0.0 if self.t == 1 else 1 - s
        rho = s ** (1 / T)
        return rho ** (T / (T - 1) * max(T - self.t, 0)) - rho ** T

    def forward(self, x):
        shape = (1, -1, *[1] * (x.ndim - 2))
        mu, sigma2 = self.mu_inf, self.sigma2_inf
        if self.training:
            self.t += 1
            dims, lam, tau = (0, *range(2, x.ndim)), self.lam(len(x)), (1 - self.mom) ** (len(x) / self.m0)
            mu_b, sigma2_b = x.mean(dims), x.var(dims, correction=0)
            mu, sigma2 = lam * self.mu + (1 - lam) * mu_b, lam * self.sigma2 + (1 - lam) * sigma2_b
            self.mu, self.sigma2 = mu.detach(), sigma2.detach()
            self.mu_inf = tau * self.mu_inf + (1 - tau) * mu_b.detach()
            self.sigma2_inf = tau * self.sigma2_inf + (1 - tau) * sigma2_b.detach()
        y = (x - mu.view(shape)) / (sigma2.view(shape) + self.eps).sqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_batches_gives_the_formula_s_outputs_and_gradients(seed):
    draw = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    settings = {"mom": draw.choice([0.1, 0.5, 0.0, 1.0]), "eps": draw.choice([1e-5, 0.1]), "m0": draw.choice([32, 5]),
                "steps": draw.choice([None, 1, 2, 7, 40])}
    ours, literal = (cls(3, **settings).double() for cls in (MomentumBatchNorm, Literal))
    for p, q in zip(ours.parameters(), literal.parameters(), strict=True):
        with torch.no_grad(): q.copy_(p.copy_(torch.randn(3, generator=rng)))
    for _ in range(30):
        training, b = draw.random() < 0.8, draw.choice([1, 2, 2, 2, 4, 40])
        shape = (b, 3, *draw.choice([(), (4,), (1, 1), (3, 2)]))
        x, g = torch.randn(2, *shape, generator=rng, dtype=torch.float64)
        x, found = x * draw.choice([0.01, 1, 30]) + 5, []
        for m in (ours.train(training), literal.train(training)):
            leaf = x.clone().requires_grad_()
            y = m(leaf)
            found.append([y, *torch.autograd.grad(y, [leaf, *m.parameters()], g)])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10 * max(1, want.abs().max().item()))
    for name, want in (("train_mean", "mu"), ("train_var", "sigma2"), ("running_mean", "mu_inf"),
                       ("running_var", "sigma2_inf")):
        torch.testing.assert_close(ours.get_buffer(name), getattr(literal, want), rtol=1e-10, atol=1e-10)
    assert ours.num_batches_tracked == literal.t


def past(norm, b, t): return norm.past(b, torch.tensor(t), torch.float64).item()


def test_lambda_begins_at_0_grows_and_ends_at_1_minus_a_share():
    norm = MomentumBatchNorm(2, steps=100)
    for b, end in ((1, 31 / 32), (2, 0.9375), (16, 0.5), (32, 0), (64, 0)):
        values = [past(norm, b, t) for t in range(1, 150)]
        assert values[0] == 0
        assert values == sorted(values)
        assert values[99] == values[-1] == pytest.approx(end)
        assert (values[98] < values[99]) == (b < 32)
    always = MomentumBatchNorm(2)
    assert [past(always, 2, t) for t in (1, 2, 3)] == [0, 0.9375, 0.9375]


def test_the_first_step_is_batch_norm():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for steps in (None, 1, 2, 100):
        torch.testing.assert_close(MomentumBatchNorm(3, steps=steps).double()(x), BatchNorm(3).double()(x))


def test_at_m0_images_and_more_it_trains_as_batch_norm():
    ours, theirs = MomentumBatchNorm(3, m0=4).double(), BatchNorm(3).double()
    for b in (4, 5, 8):
        x = torch.randn(b, 3, 2, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))


def test_running_moments_are_what_training_normalises_by_and_remember_the_formula_s_images():
    norm = MomentumBatchNorm(3)
    for _ in range(4):
        x = torch.randn(2, 3, 5)
        y = norm(x)
        mean, var, images = norm.running_moments(2)
        torch.testing.assert_close(y, (x - mean.view(-1, 1)) / (var.view(-1, 1) + norm.eps).sqrt())
        weights = [0.0625 * 0.9375**k for k in range(2000)]
        assert images == pytest.approx(2 / sum(w * w for w in weights))     # as a plain mean of so many


def test_a_batch_norm_s_state_dict_loads_with_its_statistics_for_training():
    theirs = nn.BatchNorm2d(3)
    for _ in range(5): theirs(torch.randn(4, 3, 2, 2) * 2 + 1)
    state = copy.deepcopy(theirs.state_dict())
    norm = MomentumBatchNorm(3, steps=10)
    norm.load_state_dict(state)
    assert torch.equal(norm.train_mean, theirs.running_mean)
    assert torch.equal(norm.train_var, theirs.running_var)
    assert past(norm, 2, int(norm.num_batches_tracked) + 1) > 0
    x = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(norm.eval()(x), theirs.eval()(x))


def test_preflight_knows_how_long_it_remembers():
    (found,) = preflight(MomentumBatchNorm(3), torch.randn(2, 3, 1, 1)).findings
    assert (found.level, found.text) == ("ok", "2 values of this batch, averaged with about 62 images")
    (found,) = preflight(MomentumBatchNorm(3, steps=1000), torch.randn(2, 3, 1, 1)).findings
    assert found.level == "warn"
    assert "averaged with about 2 images: the variance has a standard error of 141 %" in found.text


@pytest.mark.parametrize(("settings", "text"), [
    ({"mom": 2}, "mom is 2; it weighs the new batch in the averages for evaluation and must lie in 0 to 1"),
    ({"m0": 0}, "m0 is 0; it is a batch size, .* above 0, such as 32"),
    ({"steps": 0}, r"steps is 0; it needs the number of training steps, .* or None for the last lambda at once"),
    ({"steps": 1.5}, "steps is 1.5; it needs the number of training steps, an integer"),
    ({"eps": -1}, "eps is -1")])
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError, match=f"MomentumBatchNorm: {text}"): MomentumBatchNorm(3, **settings)


def test_repr_shows_the_settings():
    assert repr(MomentumBatchNorm(8, steps=5)) == "MomentumBatchNorm(8, mom=0.1, eps=1e-05, m0=32, steps=5)"
