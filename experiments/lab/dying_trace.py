"""Runs from inside, step by step, by the library's own instruments; and what becomes of a run that is changed midway.

Networks are watched as the study trains them, some as one: one that dies there dies here, bit for bit.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from experiments.image_data import ImageData
from experiments.lab.dying_arms import ARMS, BATCH_SIZE
from experiments.models import channels_last_
from experiments.results import Row
from experiments.side_by_side import EachTransform, SideBySide, each_loss
from experiments.study.stacked import stack
from experiments.together import train_together
from norms import RunningBatchNorm
from runner import Callback, CancelEpochException, NormStats
from runner.stateful import Stateful

LAYERS = 5
TRACED, EVERY = 250, 10     # steps that are watched; a copy is kept before every tenth
OTHERS = 12                 # other orders of the images in which a network goes on
Change = Callable[[int, nn.Module], float]
# Of each conv layer: the share of its channels that are silent (0 at all positions of all images of the batch, after
# the ReLU), the least running variance, the median over the channels of the batch's variance, the largest |scale| that
# the norm multiplies by, |dL/dw| of the convolution, its update over its weight, mean and spread of what comes out.
SEEN = "silent", "least_var", "batch_var", "scale", "gradient", "ratio", "mean", "std"


class StopAfter(Stateful):
    """Ends each epoch's training after `steps` batches; validation follows."""

    _saved = "done",

    def __init__(self, steps: int) -> None: self.steps = steps

    def begin_epoch(self) -> None: self.done = 0

    def begin_batch(self) -> None:
        if self.in_train and self.done >= self.steps: raise CancelEpochException

    def after_batch(self) -> None: self.done += self.in_train


class Watch(Callback):
    """Of K networks side by side, after each training batch: what `NormStats` doesn't have of `SEEN`, `(K,)` each.

    Args:
        k: how many networks.
        keep: before these steps, counted from 0, copies of the stack's values are kept, in `kept`.
    """

    def __init__(self, k: int, keep: Iterable[int] = ()) -> None: self.k, self.keep = k, set(keep)

    def begin_fit(self) -> None:
        self.seen = 0
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.out: list[list[Tensor]] = [[] for _ in range(LAYERS)]         # of each step (2, K): mean, spread
        self.moved: list[list[Tensor]] = [[] for _ in range(LAYERS)]       # of each step (2, K): |dL/dw|, |w|
        self.handles: list[RemovableHandle] = [
            self.model[i].register_forward_hook(lambda _m, _x, y, i=i: self.look(i, y)) for i in range(LAYERS)]

    def look(self, i: int, y: Tensor) -> None:
        """The forward hook of layer `i`."""
        if not self.in_train: return
        values = y.detach().unflatten(1, (self.k, -1)).transpose(0, 1).flatten(1)           # (K, N C H W)
        self.out[i].append(torch.stack((values.mean(1), values.std(1))))

    def begin_batch(self) -> None:
        if not self.in_train: return
        if self.seen in self.keep: self.kept[self.seen] = {n: t.clone() for n, t in self.model.state_dict().items()}
        self.seen += 1

    def after_backward(self) -> None:
        for i in range(LAYERS):
            w = self.model[i][0].weight
            self.moved[i].append(torch.stack([t.detach().unflatten(0, (self.k, -1)).flatten(1).norm(dim=1)
                                              for t in (w.grad, w)]))

    def after_fit(self) -> None:
        for handle in self.handles: handle.remove()


def watch(images: ImageData, arm: str, seeds: Sequence[int], lr: float, steps: int, keep: Iterable[int] = (),
          convolutions: str = "rule") -> tuple[list[Row], dict[int, list[nn.Module]]]:
    """Train the `seeds` of an arm as one and watch: a row for each, and the networks as they were before steps `keep`.

    A row is `{"arm", "seed", "loss": of each step, name: a list of steps for each layer}`, the names being `SEEN`.
    """
    models = [ARMS[arm].build(seed, images.c, images.shape[0]) for seed in seeds]
    k, total = len(seeds), len(images.train) // BATCH_SIZE
    rows = [ARMS[arm].row(arm, seed, lr, total) for seed in seeds]
    norms, rest = NormStats(first=steps, verbose=False, max_mb=1000), Watch(k, keep)
    found = train_together(models, images, rows, "cpu", f"{arm}, {k} seeds, watched", [StopAfter(steps), norms, rest],
                           drop_last=True, convolutions=convolutions)
    layers = []
    for i in range(LAYERS):
        mean, batch_var, var, scale = (torch.tensor(values).unflatten(1, (k, -1))                   # (steps, K, C)
                                       for values in norms.series(f"{i}.2", "mean", "var", "running_var", "scale")[1:])
        out, (gradient, weight) = torch.stack(rest.out[i], 1), torch.stack(rest.moved[i], 1)        # (2, steps, K)
        layers.append({"silent": (mean == 0).float().mean(2), "least_var": var.amin(2), "batch_var": batch_var.median(
            2).values, "scale": scale.abs().amax(2), "gradient": gradient, "ratio": lr * gradient / weight,
            "mean": out[0], "std": out[1]})
    traces: list[Row] = [{"arm": arm, "seed": seed, "loss": losses, **{
        name: [layer[name][:, j].tolist() for layer in layers] for name in SEEN}}
        for j, (seed, (_, _, losses)) in enumerate(zip(seeds, found, strict=True))]
    kept: dict[int, list[nn.Module]] = {}
    for step, values in rest.kept.items():
        networks: list[nn.Module] = [*copy.deepcopy(models)]
        for name, t in values.items():
            for j, network in enumerate(networks):
                own = network.state_dict()[name]
                own.copy_(t.chunk(k)[j].view(own.shape) if t.ndim else t)
        kept[step] = networks
    return traces, kept


def go_on(images: ImageData, network: nn.Module, seeds: Sequence[int], start: int, steps: int, lr: float,
          change: Change = lambda step, net: 1.0) -> Tensor:
    """The losses `(steps, K)` of K copies of `network` that train on from step `start`, each in the order of its seed.

    `change(step, stack)` is called before each step of the optimizer: it may change the stack, and gives the factor of
    this step's rate.
    """
    tfm, losses = EachTransform(len(seeds), images.tfm), []
    net = channels_last_(stack([copy.deepcopy(network) for _ in seeds]).train())
    for step, (x, y) in enumerate(itertools.islice(SideBySide(images.train, BATCH_SIZE, seeds), start, start + steps)):
        each = each_loss(net(tfm(x)), y)
        net.zero_grad()
        each.sum().backward()
        rate = lr * change(start + step, net)
        with torch.no_grad():
            for p in net.parameters(): p.sub_(p.grad, alpha=rate)       # type: ignore[arg-type]
        losses.append(each.detach())
    return torch.stack(losses)


def with_eps(eps: float) -> Change:
    """A change: all running norms add `eps` to the variance."""
    def change(step: int, net: nn.Module) -> float:
        for m in net.modules():
            if isinstance(m, RunningBatchNorm): m.eps = eps
        return 1.0
    return change


def inside(images: ImageData, arm: str, seeds: Sequence[int], dead: int, lr: float, convolutions: str = "rule") -> Row:
    """How the seed `dead` dies among the `seeds` that are trained as one with it, and what had kept it alive.

    Its `burst` is the step from the 20th to the 239th in which a layer's weights are moved most, beside their length.
    The same network then goes on from up to 10 steps before it, in the same order of images, with one thing changed;
    and from up to 10 steps after it, in other orders too. `late` is the mean loss of the last 200 of 280 further steps.

    Returns:
        `traces`, of the dead seed and of the living one with the least loss, `burst`, `moved` (of each seed its own
        burst and how far that moved), and `went_on`, a row for each continuation.
    """
    rows, kept = watch(images, arm, seeds, lr, TRACED, range(0, TRACED, EVERY), convolutions)
    most = torch.tensor([row["ratio"] for row in rows]).amax(1)[:, 20:TRACED - EVERY]                   # (K, steps)
    moved = [{"seed": seed, "step": 20 + int(at), "ratio": _short(float(r))}
             for seed, r, at in zip(seeds, *most.max(1), strict=True)]
    j = list(seeds).index(dead)
    burst = int(moved[j]["step"])
    before, after = burst // EVERY * EVERY, burst // EVERY * EVERY + EVERY
    others = [10_000 + i for i in range(OTHERS)]
    went_on = []
    for what, start, orders, change in (
            ("as it was", before, [dead], with_eps(1e-5)), ("without that step", before, [dead],
                                                            lambda step, net: float(step != burst)),
            ("with eps 1e-2", before, [dead], with_eps(1e-2)), ("at half the rate", before, [dead],
                                                                lambda step, net: 0.5),
            ("in other orders", before, others, with_eps(1e-5)), ("in other orders", after, others, with_eps(1e-5)),
            ("in other orders, with eps 1e-2", after, others, with_eps(1e-2)),
            ("in other orders, at half the rate", after, others, lambda step, net: 0.5)):
        late = go_on(images, kept[start][j], orders, start, 280, lr, change)[-200:].mean(0).tolist()
        went_on.append({"what": what, "from": start, "late": [_short(x) for x in late]})
    best = min((i for i in range(len(rows)) if i != j), key=lambda i: sum(rows[i]["loss"][-100:]), default=j)
    return {"traces": [packed(rows[j]), packed(rows[best])], "burst": burst, "moved": moved, "went_on": went_on}


def _short(x: float) -> float: return float(f"{x:.3g}")


def packed(row: Row) -> Row:
    """A trace with each list of numbers as a text, which takes a line in a JSON file and not one for each number."""
    def text(values: Sequence[float]) -> str: return " ".join(f"{v:.3g}" for v in values)
    return {**row, "loss": text(row["loss"]), **{name: [*map(text, row[name])] for name in SEEN}}


def unpacked(row: Row) -> Row:
    """The trace of which `packed` made `row`."""
    def numbers(text: str) -> list[float]: return [*map(float, text.split())]
    return {**row, "loss": numbers(row["loss"]), **{name: [*map(numbers, row[name])] for name in SEEN}}
