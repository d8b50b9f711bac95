"""torch's own module database (the inputs by which torch tests its norms) tried on the norms of this project.

Every case either equals torch's module in output, gradients and running statistics, passes gradcheck and
gradgradcheck, or stands under one of the reasons in `NOT_OURS`, with a test that it is refused or has no counterpart.
"""

import warnings

import pytest
import torch
from torch import nn

from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm

pytestmark = pytest.mark.usefixtures("kernels")

pytest.importorskip("expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")     # whatever torch's test utilities say while they are imported
    from torch.testing._internal.common_modules import module_db

BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NOT_OURS = {
    "an empty batch is refused where it would need statistics": lambda m, x, training: x.numel() == 0
        and (x.shape[0] > 0 or (isinstance(m, BATCH) and training)),
    "an input without a batch axis is refused": lambda m, x, training: isinstance(m, INSTANCE)
        and x.ndim == 2 + INSTANCE.index(type(m)),
    "evaluation by running statistics is batch norm's alone": lambda m, x, training: isinstance(m, INSTANCE)
        and m.track_running_stats and not training,
    "evaluation without running statistics is not batch norm's": lambda m, x, training: isinstance(m, BATCH)
        and not m.track_running_stats and not training,
    "cumulative averages (momentum=None) are not offered": lambda m, x, training: isinstance(m, BATCH)
        and m.momentum is None and training,
}


def ours(m):
    """The project's norm with the settings of torch's `m`; a missing bias (`bias=False`) is zeros here."""
    affine = m.weight is not None
    if isinstance(m, BATCH): norm = BatchNorm(m.num_features, mom=m.momentum or 0.0, eps=m.eps, affine=affine)
    elif isinstance(m, INSTANCE): norm = InstanceNorm(m.num_features, eps=m.eps, affine=affine)
    elif isinstance(m, nn.GroupNorm): norm = GroupNorm(m.num_groups, m.num_channels, eps=m.eps, affine=affine)
    else: norm = LayerNorm(m.normalized_shape, eps=m.eps, affine=affine)
    norm = norm.double().train(m.training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(m, name, None) is not None and hasattr(norm, name): getattr(norm, name).copy_(getattr(m, name))
    return norm


def cases():
    for info in module_db:
        if info.module_cls not in (*BATCH, *INSTANCE, nn.GroupNorm, nn.LayerNorm): continue
        for training in (True, False):
            for i in info.module_inputs_func(info, "cpu", torch.float64, True, training):
                yield pytest.param(info, i, training, id=f"{info.name[3:]}-{i.desc or 'plain'}-"
                                                         f"{'train' if training else 'eval'}")


@pytest.mark.parametrize(("info", "case", "training"), list(cases()))
def test_case_of_torchs_database(info, case, training):
    made, (x,) = case.constructor_input, case.forward_input.args
    theirs = info.module_cls(*made.args, **made.kwargs).double().train(training)
    reasons = [reason for reason, holds in NOT_OURS.items() if holds(theirs, x, training)]
    for p in theirs.parameters(): nn.init.normal_(p)
    norm = ours(theirs)
    if reasons:
        if "refused" in reasons[0]:
            with pytest.raises(ValueError, match=r"it needs|a mean needs|was made for 3 channels and got"): norm(x)
        return
    x = x.detach()
    g, results = torch.randn_like(x), []
    for m in (theirs, norm):
        xi = x.clone().requires_grad_()
        y = m(xi)
        params = dict(m.named_parameters())
        wanted = [xi, *(params[k] for k in dict(theirs.named_parameters()))]
        results.append([y, *torch.autograd.grad(y, wanted, g)])
        if isinstance(theirs, BATCH) and theirs.track_running_stats: results[-1] += [m.running_mean, m.running_var]
    for a, b in zip(*results, strict=True): torch.testing.assert_close(b, a, rtol=0, atol=1e-9)
    x = x[:8].clone().requires_grad_()      # a numeric derivative of 150 images takes long
    assert torch.autograd.gradcheck(norm, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(norm, (x,), fast_mode=True)


def test_no_reason_is_idle_and_most_cases_are_compared():
    counts = dict.fromkeys(NOT_OURS, 0)
    compared = 0
    for info, case, training in (p.values for p in cases()):
        m = info.module_cls(*case.constructor_input.args, **case.constructor_input.kwargs).train(training)
        reasons = [r for r, holds in NOT_OURS.items() if holds(m, case.forward_input.args[0], training)]
        for r in reasons: counts[r] += 1
        compared += not reasons
    assert all(counts.values()), counts
    assert compared > sum(counts.values())
