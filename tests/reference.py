"""Independent references for the tests, written from the published formulas and sharing no code with the packages."""

import math

import torch
from torch import nn


class LiteralRunningBatchNorm(nn.Module):
    """The published definition word for word: averages of sums, squares and counts, divided by their debiasing weight.

    Its state's past is detached at each step; the current batch's part keeps its graph.
    """

    def __init__(self, nf, mom=0.1, eps=1e-5, rule="lesson"):
        super().__init__()
        self.mom, self.eps, self.rule = mom, eps, rule
        self.weight, self.bias = nn.Parameter(torch.ones(nf)), nn.Parameter(torch.zeros(nf))
        self.sums = self.sqrs = torch.zeros(nf)
        self.count = self.dbias = 0.0
        self.step = self.images = 0

    def forward(self, x):
        shape = (1, -1, *[1] * (x.ndim - 2))
        if self.training:
            b, dims = x.shape[0], (0, *range(2, x.ndim))
            alpha = 1 - (1 - self.mom) / math.sqrt(b - 1) if self.rule == "lesson" else 1 - (1 - self.mom) ** (b / 2)
            self.sums = (1 - alpha) * self.sums.detach() + alpha * x.sum(dims)
            self.sqrs = (1 - alpha) * self.sqrs.detach() + alpha * (x * x).sum(dims)
            self.count = (1 - alpha) * self.count + alpha * (x.numel() / x.shape[1])
            self.dbias = (1 - alpha) * self.dbias + alpha
            self.step += 1
            self.images += b
        k = self.dbias if self.step < 100 else 1.0
        mean = (self.sums / k) / (self.count / k)
        var = (self.sqrs / k) / (self.count / k) - mean * mean
        if self.images < 20: var = var.clamp_min(0.01)
        y = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


def train_by_hand(model, opt, loss_func, train_dl, valid_dl, epochs, tfm):
    """A plain loop: per epoch the sample-weighted mean losses of training and validation."""
    history = []
    for _ in range(epochs):
        model.train()
        total = seen = 0.0
        for xb, yb in train_dl:
            loss = loss_func(model(tfm(xb)), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            total, seen = total + loss.item() * len(xb), seen + len(xb)
        train = total / seen
        model.eval()
        total = seen = 0.0
        with torch.no_grad():
            for xb, yb in valid_dl:
                total, seen = total + loss_func(model(tfm(xb)), yb).item() * len(xb), seen + len(xb)
        history.append((train, total / seen))
    return history
