"""Random programs: whatever is done with a norm, in whatever order, it computes what its definition computes.

A program is a sequence of forwards, backwards, evaluations, loads, copies, casts, steps of an optimizer, broadcasts,
checkpointed segments, changes of layout, batch size and threads, found by Hypothesis. The norm under test takes
whatever route it likes. Beside it runs its twin, by the definition alone, in the simplest way there is: no segment is
checkpointed, and each gradient is computed as soon as its forward is done, before anything else can happen. Outputs,
gradients and buffers must agree, and the buffers must be the very tensors that they were.
"""

import contextlib
import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import norms.fast.kernels as kernels
from norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RunningBatchNorm
from norms.fast import dispatch
from norms.rivals import (
    BatchChannelNorm,
    BatchRenorm,
    EvoNormS0,
    FilterResponseNorm,
    MomentumBatchNorm,
    RunningChannelNorm,
)

C, SIDES = 3, (4, 3)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 5e-2}
WAYS = ["as it is", "checkpoint", "reentrant checkpoint", "nested checkpoints", "twice in a checkpoint",
        "saved elsewhere", "inference mode", "no_grad"]


DISTURBANCES = ["save", "load", "broadcast", "optimizer_step", "deep_copy", "cast", "threads", "reset"]


@contextlib.contextmanager
def definition():
    """Within it every norm runs by its definition."""
    found, kernels.KERNELS = kernels.KERNELS, {}
    try: yield
    finally: kernels.KERNELS = found


def segment(norm, way, x):
    """`norm(x)`, or `norm(norm(x))`, in this way."""
    if way == "checkpoint": return checkpoint(norm, x, use_reentrant=False)
    if way == "reentrant checkpoint": return checkpoint(norm, x, use_reentrant=True)
    if way == "nested checkpoints":
        return checkpoint(lambda x: checkpoint(norm, x, use_reentrant=False) * 1, x, use_reentrant=False)
    if way == "twice in a checkpoint": return checkpoint(lambda x: norm(norm(x)), x, use_reentrant=False)
    if way == "saved elsewhere":
        # As `save_on_cpu` does on its way from and to a GPU, and compression: another tensor comes back, laid out anew.
        with saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t): return norm(x)
    return norm(x)


def centres(norm):
    """Whether what `norm` makes of a constant batch is its bias."""
    return norm.statistics == "mean and variance" and not isinstance(norm, (BatchRenorm, MomentumBatchNorm,
                                                                           RunningBatchNorm))


def share_of(norm, x):
    """The mean and variance that a step of running batch norm on `x` normalises by, its share of them, the floor."""
    old = {name: b.double() for name, b in norm.named_buffers()}
    old_mean, old_var = (old[name] for name in norm.trains_by)
    alpha, n = norm.batch_weight(len(x)), x.numel() // C
    a = alpha * n / ((1 - alpha) * old["count"] + alpha * n)
    hidden = (old["seen"] < 20) & (old_var == norm.floor(old["seen"]))
    var, d = torch.where(hidden, old["unclamped_var"], old_var), x.mean((0, 2, 3)) - old_mean
    var = (1 - a) * var + a * x.var((0, 2, 3), correction=0) + a * (1 - a) * d * d
    return old_mean + a * d, var, a, norm.floor(old["seen"] + len(x)).double()


def averaged_gradients(step, averages, g):
    """The gradients of `average_backward=True` by hand, where `step` is what the forward had; updates `averages`."""
    x, weight, eps, mean, var, a, floor = step
    view, dims = (1, -1, 1, 1), (0, 2, 3)
    rstd = (var.clamp_min(floor) + eps).rsqrt()
    xhat = (x - mean.view(view)) * rstd.view(view)
    means = g.mean(dims), (g * xhat).mean(dims)
    new = [(1 - a) * old.double() + a * m for old, m in zip(averages, means, strict=True)]
    if (g.sum() * xhat.sum()).isfinite():
        for old, value in zip(averages, new, strict=True): old.copy_(value)
    gx = (weight * rstd).view(view) * (g - new[0].view(view) - xhat * (new[1] * (var >= floor)).view(view))
    return [gx, (g * xhat).sum(dims), g.sum(dims)]


def near(got, want, dtype, what):
    """Raise unless both are close where `want` is finite, and `got` is not finite elsewhere."""
    finite = want.isfinite()
    off = (got.double() - want.double())[finite].abs()
    limit = TOLERANCE[dtype] * max(1, want.double()[finite].abs().max().item() if finite.any() else 1)
    assert not got[~finite].isfinite().any(), f"{what} is finite and should not be"
    assert not off.numel() or off.max() <= limit, f"{what} is off by {off.max():.2g}"


class Program(RuleBasedStateMachine):
    """The rules for one kind of norm; `make` gives one."""

    make = None

    @initialize(seed=st.integers(0, 2**20))
    def begin(self, seed):
        torch.set_num_threads(1)
        self.rng = torch.Generator().manual_seed(seed)
        self.norm, self.dtype = self.make().double(), torch.float64
        with torch.no_grad():
            for p in self.norm.parameters(): p.copy_(self.draw(*p.shape) * 0.5 + 1)
        self.twin, self.waiting, self.saved = copy.deepcopy(self.norm), [], []
        self.remember_buffers()

    def draw(self, *shape): return torch.randn(shape, generator=self.rng, dtype=torch.float64)

    def remember_buffers(self): self.known = {name: (b, b.data_ptr()) for name, b in self.norm.named_buffers()}

    def choose(self, *choices): return choices[int(torch.randint(len(choices), (), generator=self.rng))]

    @rule(times=st.integers(1, 6))
    def forwards(self, times):
        for _ in range(times):
            kind = self.choose("drawn", "drawn", "drawn", "again", "constant", "small", "nan", "inf")
            self.forward(self.choose(1, 2, 2, 3, 5), self.choose(*LAYOUTS), self.choose(*LAYOUTS), self.choose(*WAYS),
                         self.choose(True, True, True, False), kind)

    def forward(self, n, layout, g_layout, way, training, kind):
        x = self.draw(n, C, *SIDES) * (0.03 if kind == "small" else 1.5) + 0.5
        if kind == "again" and self.waiting: x = self.waiting[-1]["x"].detach().double()
        if kind == "constant": x = torch.full_like(x, 1.1)
        if kind in ("nan", "inf"): x[0, 1, 0, 0] = float(kind)
        x = LAYOUTS[layout](x.to(self.dtype))
        g = LAYOUTS[g_layout](self.draw(*x.shape).to(self.dtype))
        for m in (self.norm, self.twin): m.train(training)

        steps, leaf = [], x.clone(memory_format=torch.preserve_format).requires_grad_()
        with definition():
            want = leaf
            for _ in range(2 if way == "twice in a checkpoint" else 1):
                if training and getattr(self.twin, "average_backward", False):
                    steps.append((want.detach().double(), self.twin.weight.detach().double().clone(), self.twin.eps,
                                  *share_of(self.twin, want.detach().double())))
                want = self.twin(want)
            gradients = torch.autograd.grad(want, [leaf, *self.twin.parameters()], g) if not steps else None
        x.requires_grad_(way not in ("inference mode", "no_grad"))
        with torch.inference_mode(way == "inference mode"), torch.set_grad_enabled(x.requires_grad):
            y = segment(self.norm, way, x)
        what = f"{way}, {layout}, {kind}, {'training' if training else 'evaluation'}"
        near(y, want.detach(), self.dtype, f"the output, {what},")
        if kind == "constant" and training and "twice" not in way and centres(self.norm):
            bias = self.norm.bias if isinstance(self.norm, LayerNorm) else self.norm.bias.view(1, -1, 1, 1)
            assert torch.equal(y, bias.to(y.dtype).expand_as(y)), f"not exactly the bias, {what}"
        if x.requires_grad:
            self.waiting.append({"x": x, "y": y, "g": g, "gradients": gradients, "steps": steps, "norm": self.norm,
                                 "averages": steps and (self.twin.grad_mean, self.twin.grad_dot), "what": what,
                                 "training": training, "repeated": "checkpoint" in way})

    @precondition(lambda self: self.waiting)
    @rule(times=st.integers(1, 6))
    def backwards(self, times):
        for _ in range(min(times, len(self.waiting))):
            self.backward(self.choose(*range(len(self.waiting))), self.choose(True, False),
                          self.choose(False, False, False, True))

    def backward(self, at, keep, spoiled):
        item = self.waiting[at] if keep else self.waiting.pop(at)
        x, y, g, gradients, norm, what = (item[k] for k in ("x", "y", "g", "gradients", "norm", "what"))
        if item["steps"]:
            if spoiled:
                g = g.clone()
                g[-1, 0] = float("inf")
            h, gradients = g.double(), None
            for step in reversed(item["steps"]):
                h, *affine = averaged_gradients(step, item["averages"], h)
                gradients = [h, *affine] if gradients is None else [h, *map(torch.add, gradients[1:], affine)]
        before = {name: b.clone() for name, b in norm.named_buffers() if not name.startswith("grad_")}
        leaves = x, *norm.parameters()
        for t in leaves: t.grad = None
        norm.train(item["training"])        # a repeated forward runs in whatever mode the module is in
        torch.autograd.backward(y, g, retain_graph=keep)
        for t, want, name in zip(leaves, gradients, ("the input", "weight", "bias", "another"), strict=False):
            near(t.grad, want.detach(), self.dtype, f"the gradient of {name}, {what},")
            t.grad = None
        for name, b in before.items():
            assert torch.equal(b.nan_to_num(7), norm.get_buffer(name).nan_to_num(7)), f"a backward wrote {name}, {what}"

    @rule(at=st.integers(0, 99), what=st.sampled_from(DISTURBANCES))
    def disturb(self, what, at): getattr(self, what)(at)

    def save(self, at): self.saved.append(copy.deepcopy(self.norm.state_dict()))

    def load(self, at):
        if not self.saved: return
        self.new_weights()
        for m in (self.norm, self.twin): m.load_state_dict(self.saved[at % len(self.saved)])

    def new_weights(self):
        """A repeated forward reads the weights anew, so that one from before the change would be another."""
        self.waiting = [item for item in self.waiting if not item["repeated"]]

    def broadcast(self, at):
        """Every buffer is overwritten in place, as DistributedDataParallel does before a forward."""
        for b, t in zip(self.norm.buffers(), self.twin.buffers(), strict=True):
            if b.is_floating_point(): b.copy_(t.mul_(0.5).add_(0.25))

    def optimizer_step(self, at):
        self.new_weights()
        with torch.no_grad():
            for p, q in zip(self.norm.parameters(), self.twin.parameters(), strict=True):
                change = (self.draw(*p.shape) * 0.1).to(p.dtype)
                p.add_(change), q.add_(change)

    def deep_copy(self, at):
        self.norm, self.twin = copy.deepcopy(self.norm), copy.deepcopy(self.twin)
        self.remember_buffers()

    def cast(self, at):
        self.waiting.clear()                # autograd, too, refuses parameters of another type than they were
        self.saved.clear()
        self.twin.load_state_dict(self.norm.state_dict())       # of a narrower type they may differ in the last bits
        self.dtype = [torch.float64, torch.float64, torch.float64, torch.float32, torch.bfloat16][at % 5]
        self.norm, self.twin = self.norm.to(self.dtype), self.twin.to(self.dtype)
        self.remember_buffers()

    def threads(self, at): torch.set_num_threads(1 + at % 3)

    def reset(self, at):
        for m in (self.norm, self.twin):
            if hasattr(m, "reset_running_stats"): m.reset_running_stats()

    @invariant()
    def the_state_is_that_of_the_definition_in_the_same_buffers(self):
        if not hasattr(self, "known"): return
        for name, b in self.norm.named_buffers():
            known, address = self.known[name]
            assert b is known and b.data_ptr() == address, f"{name} is another tensor than before"     # noqa: PT018
            assert b.dtype not in (torch.float16, torch.bfloat16), f"{name} is {b.dtype}"
            near(b, self.twin.get_buffer(name), self.dtype, name)


# Of a constant both variances of a pair are 0: its gradient is divided by eps, and so is what rounding leaves of it.
EPS = 1e-2
MAKES = {"batch": lambda: BatchNorm(C), "running": lambda: RunningBatchNorm(C), "group": lambda: GroupNorm(1, C),
         "running per image": lambda: RunningBatchNorm(C, mom=0.3, rule="per_image"), "layer": LayerNorm,
         "settled": lambda: RunningBatchNorm(C, average_backward=True, evaluation_memory=20),
         "averaged": lambda: RunningBatchNorm(C, average_backward=True), "instance": lambda: InstanceNorm(C, eps=1e-5),
         "layer, trailing axes": lambda: LayerNorm((C, *SIDES)),
         "batch and group": lambda: BatchChannelNorm(C, 1, eps=EPS),
         "running and group": lambda: RunningChannelNorm(C, 1, eps=EPS),
         "renorm": lambda: BatchRenorm(C, 0.3, begin=1, rmax_at=20, dmax_at=10),
         "momentum": lambda: MomentumBatchNorm(C, steps=30),
         "filter response": lambda: FilterResponseNorm(C), "evonorm": lambda: EvoNormS0(C, 1)}


@pytest.mark.parametrize("name", MAKES)
def test_random_programs(name, monkeypatch):
    examples = 16 if type(MAKES[name]()) in dispatch._LAUNCHERS else 4          # these others have one route
    monkeypatch.setattr(kernels, "GRAIN", 100)      # so that three threads change the route of the larger batches
    threads = torch.get_num_threads()
    machine = type("Of", (Program,), {"make": staticmethod(MAKES[name])})
    try:
        run_state_machine_as_test(machine, settings=settings(derandomize=True, deadline=None, database=None,
                                                             max_examples=examples, stateful_step_count=30))
    finally: torch.set_num_threads(threads)
