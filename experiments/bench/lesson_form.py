"""The lesson's way of doing it, for comparison: what its RunningBatchNorm, its loop and its loader cost.

Written anew from the published definitions (fastai part 2 v3, notebooks 04 to 07), with their costs left in: sums,
squares, count and debiasing weight averaged one by one in buffers; every event looked up on every callback at every
batch; loss and metrics brought to the host at every batch; images fetched one by one and stacked.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset


class LessonRunningBatchNorm(nn.Module):
    """The published definition, its state in tensors; `(N, C, H, W)` only, batches of two and more."""

    sums: Tensor
    sqrs: Tensor
    count: Tensor
    debias: Tensor

    def __init__(self, nf: int, mom: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.mom, self.eps, self.images, self.steps = mom, eps, 0, 0
        self.weight, self.bias = nn.Parameter(torch.ones(nf, 1, 1)), nn.Parameter(torch.zeros(nf, 1, 1))
        for name, shape in (("sums", (1, nf, 1, 1)), ("sqrs", (1, nf, 1, 1)), ("count", ()), ("debias", ())):
            self.register_buffer(name, torch.zeros(shape))

    def update(self, x: Tensor) -> None:
        """Average the batch in; its own part keeps the graph, the past loses it."""
        self.sums.detach_()
        self.sqrs.detach_()
        total, squares = x.sum((0, 2, 3), keepdim=True), (x * x).sum((0, 2, 3), keepdim=True)
        alpha = total.new_tensor(1 - (1 - self.mom) / math.sqrt(len(x) - 1))
        self.sums.lerp_(total, alpha)
        self.sqrs.lerp_(squares, alpha)
        self.count.lerp_(self.count.new_tensor(x.numel() / x.shape[1]), alpha)
        self.debias = self.debias * (1 - alpha) + alpha
        self.images += len(x)
        self.steps += 1

    def forward(self, x: Tensor) -> Tensor:
        if self.training: self.update(x)
        sums, sqrs, count = self.sums, self.sqrs, self.count
        if self.steps < 100: sums, sqrs, count = sums / self.debias, sqrs / self.debias, count / self.debias
        mean = sums / count
        var = (sqrs / count).sub_(mean * mean)
        if self.images < 20: var.clamp_min_(0.01)
        return (x - mean).div_((var + self.eps).sqrt()).mul_(self.weight).add_(self.bias)


class _Callback:
    order = 0

    def __getattr__(self, name: str) -> Any: return getattr(self.__dict__["run"], name)

    def __call__(self, event: str) -> bool:
        f = getattr(type(self), event, None)
        return bool(f and f(self))


class _Mode(_Callback):
    def begin_epoch(self) -> None:
        self.model.train()
        self.run.in_train = True

    def begin_validate(self) -> None:
        self.model.eval()
        self.run.in_train = False

    def after_batch(self) -> None:
        if self.in_train: self.run.n_epochs += 1 / self.run.iters


class _View(_Callback):
    order = 2

    def begin_batch(self) -> None: self.run.xb = self.run.xb.view(-1, 1, 28, 28)


class _Stats(_Callback):
    def begin_epoch(self) -> None: self.totals: list[float | Tensor] = [0.0, 0.0, 0]

    def after_loss(self) -> None:
        n = len(self.xb)
        hits = (torch.argmax(self.pred, dim=1) == self.yb).float().mean()
        self.totals = [self.totals[0] + self.loss.item() * n, self.totals[1] + hits * n, self.totals[2] + n]


class _Recorder(_Callback):
    def begin_fit(self) -> None:
        self.lrs: list[float] = []
        self.losses: list[Tensor] = []

    def after_batch(self) -> None:
        if not self.in_train: return
        self.lrs.append(self.opt.param_groups[-1]["lr"])
        self.losses.append(self.loss.detach().cpu())


class _Loop:
    """The lesson's runner: one epoch of training and its validation."""

    def __init__(self, model: nn.Module, opt: optim.Optimizer,
                 loss_func: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.opt, self.loss_func, self.n_epochs, self.in_train = model, opt, loss_func, 0.0, False
        self.cbs = [_Mode(), _Stats(), _Recorder(), _View()]
        for cb in self.cbs: cb.__dict__["run"] = self

    def fit(self, train_dl: DataLoader[tuple[Tensor, ...]], valid_dl: DataLoader[tuple[Tensor, ...]]) -> None:
        self("begin_fit")
        self("begin_epoch")
        self.batches(train_dl)
        with torch.no_grad():
            self("begin_validate")
            self.batches(valid_dl)
        self("after_epoch")

    def batches(self, dl: DataLoader[tuple[Tensor, ...]]) -> None:
        self.iters = len(dl)
        for self.xb, self.yb in dl:
            self("begin_batch")
            self.pred = self.model(self.xb)
            self("after_pred")
            self.loss = self.loss_func(self.pred, self.yb)
            self("after_loss")
            if self.in_train:
                self.loss.backward()
                self("after_backward")
                self.opt.step()
                self("after_step")
                self.opt.zero_grad()
            self("after_batch")

    def __call__(self, event: str) -> bool:
        skip = False
        for cb in sorted(self.cbs, key=lambda cb: cb.order): skip = cb(event) or skip
        return skip


def fit(model: nn.Module, opt: optim.Optimizer, loss_func: Callable[[Tensor, Tensor], Tensor],
        train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], size: int) -> None:
    """One epoch over the pairs of tensors `train` and `valid` in batches of `size` and `2 * size`."""
    _Loop(model, opt, loss_func).fit(DataLoader(TensorDataset(*train), size, shuffle=True, drop_last=True),
                                     DataLoader(TensorDataset(*valid), 2 * size))
