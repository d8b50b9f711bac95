"""What the lab trains, on a GPU: the networks that a CPU gives. Without a GPU all of this is skipped."""

import copy

import pytest
import torch

from experiments.lab import lab
from experiments.lab.networks import NETS, NORMS, build
from experiments.study.stacked import stack
from experiments.study.stacked_sgd import StackedSGD

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def steps(net, device, rates, seed=0):
    """A few steps of SGD from images of `seed`, each of K networks' outputs at its own rate; their logits."""
    rng, k = torch.Generator().manual_seed(seed), len(rates)
    net = net.to(device)
    opt = (StackedSGD(net.parameters(), torch.tensor(rates, dtype=torch.float64)) if k > 1
           else torch.optim.SGD(net.parameters(), rates[0]))
    outputs = []
    for _ in range(4):
        x = torch.randn(2, 2 * k, 32, 32, generator=rng, dtype=torch.float64).to(device)
        y = net(x)
        opt.zero_grad()
        y.square().sum().backward()
        opt.step()
        outputs.append(y.detach().cpu())
    outputs.append(net.eval()(x).detach().cpu())
    return outputs


@GPU
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("net", NETS)
def test_every_norm_trains_on_a_gpu_as_on_a_cpu(net, norm):
    model = build(net, norm, 3, c=4, channels=2, steps=4).double()
    for a, b in zip(steps(copy.deepcopy(model), "cpu", [0.001]), steps(model, "cuda", [0.001]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)


@GPU
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("net", NETS)
def test_networks_of_every_norm_are_trained_side_by_side_on_a_gpu_as_on_a_cpu(net, norm):
    models = [build(net, norm, seed, c=4, channels=2, steps=4).double() for seed in (3, 4)]
    rates = [0.001, 0.002]
    on_cpu = steps(stack([copy.deepcopy(m) for m in models]), "cpu", rates)
    for a, b in zip(on_cpu, steps(stack(models), "cuda", rates), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8)


@GPU
def test_the_lab_runs_on_a_gpu_and_goes_on_there(tmp_path):
    given = {"data": "digits", "limit": 48, "norms": ["GroupNorm", "SteadyBatchNorm"], "batch_sizes": [2, 16],
             "rates": [0.05, 0.1], "seeds": [0, 1], "device": "cuda"}
    result = lab.run(lab.Config(**given, out=str(tmp_path / "a")))
    assert {r["status"] for r in result.rows} == {"ok"}
    assert {r["together"] for r in result.rows} == {2}
    again = lab.run(lab.Config(**given, out=str(tmp_path / "a"), resume=True))
    assert [r["test_accuracy"] for r in again.rows] == [r["test_accuracy"] for r in result.rows]
