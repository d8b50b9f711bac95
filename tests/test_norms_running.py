"""RunningBatchNorm against the literal definition, by hand, and where the definition gives out."""

import copy

import pytest
import torch
from reference import LiteralRunningBatchNorm
from torch import nn
from torch.utils.checkpoint import checkpoint

from norms import BatchNorm, RunningBatchNorm, convert_norms, recalibrate

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("rule", ["lesson", "per_image"])
def test_equals_the_definition_over_ragged_steps(rule):
    ours, literal = RunningBatchNorm(3, rule=rule).double(), LiteralRunningBatchNorm(3, rule=rule).double()
    # Spreads of 0.02 to 3, so that the clamp at 0.01 holds some channels in the first steps and not others.
    spread, centre = torch.tensor([0.02, 1, 3]).view(3, 1, 1), torch.tensor([0, 1, -2.0]).view(3, 1, 1)
    for p, q in zip(ours.parameters(), literal.parameters(), strict=True):
        with torch.no_grad(): p.copy_(torch.randn(3)), q.copy_(p)
    for step in range(200):
        x = torch.randn(int(torch.randint(2, 9, ())), 3, 2, 2, dtype=torch.float64) * spread + centre
        g = torch.randn_like(x)
        results = []
        for m in (ours, literal):
            m.train(step % 50 != 49)
            xi = x.clone().requires_grad_()
            y = m(xi)
            results.append([y, *torch.autograd.grad(y, [xi, m.weight, m.bias], g)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("shape", [(5, 3), (3, 3, 3), (3, 3, 1, 3), (2, 3, 1, 2, 2)])
@pytest.mark.parametrize("held", [False, True], ids=["free", "clamped"])
def test_derivatives_of_every_order_and_direction(shape, held):
    x = (torch.randn(shape, dtype=torch.float64) * 0.05).requires_grad_()
    w, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    # The statistics as the module makes them, from the input: the numeric derivative sees all of it.
    state = RunningBatchNorm(3).double()
    if not held: state.seen.fill_(100)
    state.count.fill_(5.0)
    state.running_var.fill_(0.002)
    saved = {k: v.clone() for k, v in state.state_dict().items()}

    def f(x, w, b):
        m = RunningBatchNorm(3).double()
        m.load_state_dict(saved)
        return torch.func.functional_call(m, {"weight": w, "bias": b}, (x,))
    assert torch.autograd.gradcheck(f, (x, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, w, b))


@pytest.mark.parametrize("make", [BatchNorm, RunningBatchNorm])
def test_func_transforms_equal_autograd(make):
    """`torch.func` with the buffers handed in; left inside, torch refuses to write into them."""
    m = make(3).double()
    for _ in range(3): m(torch.randn(4, 3, 5, dtype=torch.float64) * 0.05)
    params = {k: v.detach() for k, v in m.named_parameters()}
    buffers = {k: v.clone() for k, v in m.named_buffers()}
    x = torch.randn(4, 3, 5, dtype=torch.float64)

    def loss(x, params):
        fresh = {k: v.clone() for k, v in buffers.items()}
        return torch.func.functional_call(m, (params, fresh), (x,)).pow(3).sum()
    by_func = torch.func.grad(loss, argnums=(0, 1))(x, params)
    leaves = x.clone().requires_grad_(), {k: v.clone().requires_grad_() for k, v in params.items()}
    by_autograd = torch.autograd.grad(loss(*leaves), [leaves[0], *leaves[1].values()])
    for a, b in zip([by_func[0], *by_func[1].values()], by_autograd, strict=True): torch.testing.assert_close(a, b)
    _, tangent = torch.func.jvp(lambda x: loss(x, params), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, by_autograd[0].sum())
    assert copy.deepcopy(m)(x).shape == x.shape     # nothing of the transforms has stayed behind
    with pytest.raises(RuntimeError, match="in-place operation"):
        torch.func.grad(lambda x: torch.func.functional_call(m, params, (x,)).sum())(x)


def test_first_step_is_batch_norm():
    x = torch.randn(32, 4, 3, 3) * 2 + 1
    torch.testing.assert_close(RunningBatchNorm(4)(x), BatchNorm(4)(x))


def test_hand_computed_second_step():
    # Batches {1, 3} and {5, 9} of one channel, alpha(2) = 0.1. Step 1: mean 2, var 1, W = 0.1 * 2 = 0.2.
    # Step 2: W = 0.9 * 0.2 + 0.2 = 0.38, a = 0.2 / 0.38 = 10/19; batch mean 7, var 4, d = 5.
    m = RunningBatchNorm(1).double()
    for batch in ([[1.0], [3.0]], [[5.0], [9.0]]): m(torch.tensor(batch, dtype=torch.float64))
    a = 10 / 19
    assert m.running_mean.item() == pytest.approx(2 + 5 * a, abs=1e-12)
    assert m.running_var.item() == pytest.approx((1 - a) * 1 + a * 4 + a * (1 - a) * 25, abs=1e-12)
    assert (m.seen.item(), m.count.item()) == (4, pytest.approx(0.38))


@pytest.mark.parametrize(("b", "lesson", "per_image"), [
    (1, 1 - 0.9**0.5, 1 - 0.9**0.5), (2, 0.1, 0.1), (5, 1 - 0.9 / 2, 1 - 0.9**2.5), (17, 1 - 0.9 / 4, 1 - 0.9**8.5)])
def test_batch_weight_by_hand(b, lesson, per_image):
    assert RunningBatchNorm(1).batch_weight(b) == pytest.approx(lesson)
    assert RunningBatchNorm(1, rule="per_image").batch_weight(b) == pytest.approx(per_image)


def test_training_and_evaluation_agree_and_eval_changes_nothing():
    m = RunningBatchNorm(3)
    for _ in range(30): m(torch.randn(2, 3, 4, 4))
    x = torch.randn(2, 3, 4, 4)
    y = m(x)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    m.eval()
    torch.testing.assert_close(m(x), y)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_clamp_holds_until_twenty_images():
    m = RunningBatchNorm(1, eps=0.0)
    x = torch.tensor([[-0.001], [0.001]])
    largest = [m(x).abs().max().item() for _ in range(10)]
    assert largest[:9] == pytest.approx([0.001 / 0.1] * 9)      # divided by sqrt(0.01); 18 images
    assert largest[9] == pytest.approx(1.0, rel=1e-3)           # by its own spread; 20 images


def test_evaluation_before_training_is_the_affine_map():
    m = RunningBatchNorm(2, eps=0.0).eval()
    nn.init.constant_(m.weight, 3.0)
    x = torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(m(x), 3 * x)


@pytest.mark.parametrize("shape", [(1, 2), (1, 2, 1, 1), (2, 2, 1, 1), (1, 2, 5, 5)])
def test_finite_on_one_image_and_one_element(shape):
    m = RunningBatchNorm(2)
    for _ in range(15):
        x = torch.randn(shape, requires_grad=True)
        y = m(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_large_mean_in_float32_stays_near_float64(ratio):
    single, double = RunningBatchNorm(4), RunningBatchNorm(4).double()
    for _ in range(40):
        x = torch.randn(4, 4, 6, 6) + ratio
        y, z = single(x), double(x.double())
    # The inputs are already rounded to ratio * 6e-8; the norm may not lose much more than they did.
    assert (y - z).abs().max() < 20 * ratio * 6e-8
    torch.testing.assert_close(single.running_var.double(), double.running_var, rtol=1e-3, atol=0)


def test_two_forwards_then_one_backward_equal_the_definition():
    ours, literal = RunningBatchNorm(3).double(), LiteralRunningBatchNorm(3).double()
    grads = []
    for m in (ours, literal):
        torch.manual_seed(1)
        xs = [torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        first, second = m(xs[0]), m(xs[1].clone())
        # The definition lets the second step see the first only through detached averages.
        (first.pow(3).sum() + second.pow(3).sum()).backward()
        grads.append([x.grad for x in xs])
    for a, b in zip(*grads, strict=True): torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_checkpointed_forward_counts_once_and_keeps_the_gradient():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    ends = []
    for checkpointed in (False, True):
        norms = nn.Sequential(BatchNorm(3), nn.Tanh(), RunningBatchNorm(3), nn.Linear(5, 5)).double()
        nn.init.eye_(norms[3].weight)
        nn.init.zeros_(norms[3].bias)

        def run(x, norms=norms, checkpointed=checkpointed):
            return checkpoint(norms, x, use_reentrant=False) if checkpointed else norms(x)
        for _ in range(3): run(x.clone().requires_grad_()).sum().backward()
        # Two forwards with the same input, then one backward: each recomputed forward must find its own step.
        leaf = x.clone().requires_grad_()
        (run(leaf).pow(3).sum() + run(leaf).pow(2).sum()).backward()
        ends.append([leaf.grad, *(p.grad for p in norms.parameters()), *norms.state_dict().values()])
    for a, b in zip(*ends, strict=True): assert torch.equal(a, b)


def test_forward_in_a_backward_that_is_no_checkpoint():
    m, x = RunningBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    y = m(x)
    y.register_hook(lambda g: m(torch.randn(4, 3)))
    with pytest.raises(RuntimeError, match="repeats none of its training forwards; only a checkpointed"):
        y.sum().backward()


def test_averaged_backward_by_its_definition():
    m = RunningBatchNorm(2, average_backward=True).double()
    with torch.no_grad(): m.weight.copy_(torch.tensor([1.5, -0.5]))
    mean, var, count, averages = torch.zeros(2), torch.ones(2), 0.0, [torch.zeros(2), torch.zeros(2)]
    for b in (4, 2, 3, 2, 8, 2, 2, 5, 2, 2):
        x = (torch.randn(b, 2, 3, dtype=torch.float64) + 1).requires_grad_()
        g = torch.randn(b, 2, 3, dtype=torch.float64)
        y = m(x)
        grads = torch.autograd.grad(y, [x, m.weight, m.bias], g)

        alpha = 1 - 0.9 / (b - 1) ** 0.5
        count = (1 - alpha) * count + alpha * 3 * b
        a = alpha * 3 * b / count
        xd = x.detach()
        second = (1 - a) * (var + mean ** 2) + a * (xd ** 2).mean((0, 2))
        mean = (1 - a) * mean + a * xd.mean((0, 2))
        var = second - mean ** 2
        rstd = (var + 1e-5).rsqrt()
        xhat = (xd - mean.view(2, 1)) * rstd.view(2, 1)
        averages = [(1 - a) * averages[0] + a * g.mean((0, 2)), (1 - a) * averages[1] + a * (g * xhat).mean((0, 2))]
        gx = (m.weight * rstd).view(2, 1) * (g - averages[0].view(2, 1) - xhat * averages[1].view(2, 1))
        for ours, ref in zip(grads, (gx, (g * xhat).sum((0, 2)), g.sum((0, 2))), strict=True):
            torch.testing.assert_close(ours, ref, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close([m.grad_mean, m.grad_dot], averages, rtol=1e-10, atol=1e-10)


def test_averaged_backward_starts_as_batch_norm_and_refuses_what_it_can_not_do():
    x, g = torch.randn(16, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(16, 3, 4, dtype=torch.float64)
    both = RunningBatchNorm(3, average_backward=True), BatchNorm(3)
    grads = [torch.autograd.grad(m.double()(x), x, g)[0] for m in both]
    # 16 images: the clamp is on, but holds no channel of spread 1.
    torch.testing.assert_close(*grads)
    m = RunningBatchNorm(3, average_backward=True).double()
    loss = m(x).pow(3).sum()
    first, = torch.autograd.grad(loss, x, create_graph=True)
    none = "a second derivative was asked for .*It has none.*: take average_backward=False or another norm$"
    with pytest.raises(RuntimeError, match=none): first.sum().backward(retain_graph=True)
    # on any way to what is asked for, and not only on all of them: a penalty must not be left out in silence
    for wanted in (x, m.weight, [m.bias, x]):
        with pytest.raises(RuntimeError, match=none):
            torch.autograd.grad(loss + first.square().sum(), wanted, retain_graph=True)
    y = m(x)
    with pytest.raises(RuntimeError, match="takes in one gradient at a time and got a batch of them"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape, dtype=torch.float64), is_grads_batched=True)


def test_averaged_backward_is_part_of_the_state():
    m = RunningBatchNorm(3, average_backward=True)
    m(torch.randn(4, 3, 2, requires_grad=True)).pow(2).sum().backward()
    assert {"grad_mean", "grad_dot"} <= set(m.state_dict())
    assert m.state_dict()["grad_dot"].abs().min() > 0
    assert repr(m) == "RunningBatchNorm(3, mom=0.1, eps=1e-05, rule='lesson', average_backward=True)"


def test_half_leaves_the_statistics_at_float32():
    m = RunningBatchNorm(2).half()
    assert m.weight.dtype == torch.float16
    assert {m.running_mean.dtype, m.running_var.dtype, m.count.dtype} == {torch.float32}
    y = m(torch.randn(512, 2, 14, 14).half() + 3)       # 100,352 values per channel, above float16's largest number
    assert y.dtype == torch.float16
    assert y.float().mean().abs() < 1e-2
    assert m.double().running_mean.dtype == torch.float64


# --- evaluation_memory --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("average_backward", [False, True])
@pytest.mark.parametrize("sizes", [[2] * 40, [1] * 30, [1, 7, 2, 30, 3, 3, 64, 1, 2, 2, 5], [200, 1, 1]])
def test_evaluation_goes_by_averages_of_what_training_went_by(sizes, average_backward):
    memory = 25
    plain = RunningBatchNorm(3, average_backward=average_backward).double()
    ours = RunningBatchNorm(3, average_backward=average_backward, evaluation_memory=memory).double()
    first, second, seen = torch.zeros(3).double(), torch.ones(3).double(), 0        # E[x] and E[x^2]
    for i, b in enumerate(sizes):
        x = torch.randn(b, 3, 2, 2, dtype=torch.float64, requires_grad=True) + i
        y, z = ours(x), plain(x)
        assert torch.equal(y, z)                                                    # training is the same
        g = torch.randn_like(y)
        assert torch.equal(*(torch.autograd.grad(out, x, g)[0] for out in (y, z)))
        seen += b
        beta = min(1, max(2 * b / (memory + b), b / seen))
        first = (1 - beta) * first + beta * plain.running_mean
        second = (1 - beta) * second + beta * (plain.running_var + plain.running_mean ** 2)
        torch.testing.assert_close(ours.running_mean, first)
        torch.testing.assert_close(ours.running_var, second - first ** 2)
        torch.testing.assert_close([ours.recent_mean, ours.recent_var], [plain.running_mean, plain.running_var])
    x = torch.randn(4, 3, 2, 2).double()
    wanted = (x - first.view(3, 1, 1)) / (second - first ** 2 + 1e-5).sqrt().view(3, 1, 1)
    torch.testing.assert_close(ours.eval()(x), wanted)
    assert repr(ours).count("evaluation_memory=25") == 1


def test_evaluation_memory_steadies_evaluation():
    """Of one distribution: the mean for evaluation is off by a fraction of what training's is off."""
    rng, m = torch.Generator().manual_seed(0), RunningBatchNorm(160, evaluation_memory=1000)    # 160 channels' own
    for _ in range(1000): m(torch.randn(2, 160, generator=rng))
    recent, running = (mean.square().mean() for mean in (m.recent_mean, m.running_mean))
    assert recent == pytest.approx(1 / 38, rel=0.25)                # the mean of 38 images' values, one each
    assert running < recent / 15


def test_evaluation_memory_goes_through_state_dicts_conversion_and_recalibration():
    trained = BatchNorm(3)
    for _ in range(5): trained(torch.randn(8, 3) * 2 + 1)
    x = torch.randn(6, 3)
    for make in (lambda nf: RunningBatchNorm(nf, evaluation_memory=50),
                 lambda nf: RunningBatchNorm(nf, evaluation_memory=50, average_backward=True)):
        loaded = make(3)
        loaded.load_state_dict(trained.state_dict())
        model = torch.nn.Sequential(BatchNorm(3))
        model[0].load_state_dict(trained.state_dict())
        convert_norms(model, make)
        for m in (loaded, model[0]):
            torch.testing.assert_close(m.eval()(x), trained.eval()(x))
            torch.testing.assert_close([m.recent_mean, m.recent_var], [m.running_mean, m.running_var])
            before = m.running_mean.clone()
            m.train()(torch.randn(2, 3))
            assert (m.recent_mean - before).norm() > (m.running_mean - before).norm() > 0
        recalibrate(model, [x], 6)
        torch.testing.assert_close([model[0].recent_mean, model[0].running_mean], [x.mean(0)] * 2)
    plain = RunningBatchNorm(3)
    plain(x)
    settled = RunningBatchNorm(3, evaluation_memory=50)
    settled.load_state_dict(plain.state_dict())
    assert torch.equal(settled.recent_var, plain.running_var)
