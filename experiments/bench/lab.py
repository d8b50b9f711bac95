"""The lab's training of the residual network at batch size 2: what the loop adds, and what each norm costs.

The loop: 200 steps as the lab runs them (images as bytes, normalised and flipped batch by batch, a rate that is
scheduled, figures, callbacks) against a loop written out by hand that does the same work. The norms: a step of the
network with each, in the layout that the lab uses, against `nn.BatchNorm2d`'s. One thread; drawn images of 3x64x64.
"""

import contextlib
import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench import Config
from experiments.bench.timing import interleave, row, settings
from experiments.image_data import ImageData, Pixels
from experiments.lab.arms import Arm
from experiments.lab.networks import NORMS, build
from experiments.models import channels_last_
from experiments.results import Row
from experiments.training import onednn_is_faster, schedule, train
from runner import SGD, Dataset

BATCH, STEPS, CLASSES = 2, 200, 10
LOOP = ("BatchNorm2d", "SteadyBatchNorm")       # the norms of the networks in the two loops
SETTING = f"batch {BATCH}, 3x64x64"


def drawn(rng: torch.Generator, n: int) -> Dataset:
    """`n` images of bytes and labels."""
    return Dataset(torch.randint(256, (n, 3, 64, 64), generator=rng, dtype=torch.uint8),
                   torch.randint(CLASSES, (n,), generator=rng))


def by_hand(norm: str, data: Dataset, tfm: Pixels) -> None:
    """An epoch of what the lab does with the network of the norm called `norm`, without the Runner."""
    row = Arm(norm, BATCH, "warm-up", 0.02).row(0, 1)
    model = channels_last_(build("resnet", norm, 0, CLASSES, 3))
    opt, order = SGD(model.parameters(), lr=0.02), torch.randperm(len(data))
    rate = schedule(row["lr"], row["warm_up"])[1]
    assert rate is not None             # it is scheduled
    flips, losses = torch.rand(len(data)) < 0.5, []
    right = torch.zeros(())
    model.train()
    for i, at in enumerate(order.split(BATCH)):
        for group in opt.param_groups: group["lr"] = rate(i / STEPS)
        x, y = tfm(data.x[at]), data.y[at]
        x = torch.where(flips[i * BATCH:(i + 1) * BATCH, None, None, None], x.flip(-1), x)
        pred = model(x)
        loss = F.cross_entropy(pred, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
        right += (pred.detach().argmax(1) == y).float().mean()


def rows(config: Config) -> list[Row]:
    """The part's rows."""
    rng = config.rng()
    data, tfm = drawn(rng, BATCH * STEPS), Pixels(torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.3))
    images = ImageData("drawn", data, drawn(rng, 2), drawn(rng, 2), tfm.shift, tfm.scale, c=CLASSES, shape=(3, 64, 64),
                       tfm=tfm)

    def ours(norm: str) -> Callable[[], object]:
        def run() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                train(build("resnet", norm, 0, CLASSES, 3), images, Arm(norm, BATCH, "warm-up", 0.02).row(0, 1), "cpu",
                      "", flips=True)
        return run

    def hand(norm: str) -> Callable[[], None]: return lambda: by_hand(norm, data, tfm)
    loops = {f"{who}, {norm}": f(norm) for norm in LOOP for who, f in (("the lab's loop", ours), ("by hand", hand))}
    with settings(onednn=onednn_is_faster(BATCH)):
        times = interleave(loops, max(3, config.repetitions // 3), 0.1, warm_up=0.0)
        times = {name: [ms / STEPS for ms in each] for name, each in times.items()}
        found = [row("lab", SETTING, f"the lab's loop, {norm}", f"by hand, {norm}", times, 1.05) for norm in LOOP]
        found += [row("lab", SETTING, f"by hand, {norm}", None, times) for norm in LOOP]
        x, y = tfm(data.x[:BATCH]).contiguous(memory_format=torch.channels_last), data.y[:BATCH]
        times = interleave({norm: step_of(norm, x, y) for norm in NORMS}, config.repetitions)
    return found + [row("lab", SETTING, norm, None if norm == "BatchNorm2d" else "BatchNorm2d", times)
                    for norm in NORMS]


def step_of(norm: str, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward and backward pass of the network with the norm called `norm`."""
    model = channels_last_(build("resnet", norm, 0, CLASSES, 3))

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    return step
