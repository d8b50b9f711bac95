"""Random programs, broken off at random moments and gone on with: they end, to the bit, as if nothing had been."""

import csv
import random
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import Dataset as TorchDataset

import norms
import runner
from runner import (
    SGD,
    ActivationStats,
    AveragedWeights,
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    Checkpoint,
    ClosureStep,
    CSVLogger,
    DataBunch,
    Dataset,
    EarlyStopping,
    GradientAccumulation,
    GradientClip,
    GradientStats,
    KeepBest,
    Learner,
    MixedPrecision,
    NormStats,
    Optimizers,
    ParameterStats,
    ParamScheduler,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    TorchScheduler,
    accuracy,
    combine_scheds,
    get_dls,
    sched_cos,
    sched_exp,
    sched_lin,
)

PROGRAMS = 16       # how many the test draws; more by hand: FIRST is the number of the first
FIRST = 0
SIDE, CLASSES = 4, 3


# --- models ---------------------------------------------------------------------------------------------------------

CONV_NORMS = {
    "BatchNorm": norms.BatchNorm, "RunningBatchNorm": norms.RunningBatchNorm, "GroupNorm": partial(norms.GroupNorm, 2),
    "InstanceNorm": norms.InstanceNorm,
    "RunningBatchNorm, averaged backward": partial(norms.RunningBatchNorm, average_backward=True),
    "RunningBatchNorm, per image": partial(norms.RunningBatchNorm, rule="per_image"),
    "torch's": nn.BatchNorm2d, "torch's, cumulative": partial(nn.BatchNorm2d, momentum=None),
    "torch's, batch alone": partial(nn.BatchNorm2d, track_running_stats=False),
    "torch's InstanceNorm": partial(nn.InstanceNorm2d, track_running_stats=True, affine=True),
    "torch's GroupNorm": partial(nn.GroupNorm, 2), "none": lambda nf: nn.Identity(),
}
FLAT_NORMS = {"BatchNorm": norms.BatchNorm, "RunningBatchNorm": norms.RunningBatchNorm, "torch's": nn.BatchNorm1d,
              "torch's LayerNorm": nn.LayerNorm, "LayerNorm": norms.LayerNorm}
WRAPPED = {"weight norm": parametrizations.weight_norm, "spectral norm": parametrizations.spectral_norm}


class Recomputed(nn.Module):
    """Activations are computed anew in the backward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x): return checkpoint(self.inner, x, use_reentrant=False) if self.training else self.inner(x)


class Carried(nn.Module):
    """A recurrent net that goes on from the state which the last batch has left."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(SIDE, 5, batch_first=True, num_layers=2, dropout=0.2), nn.Linear(5, CLASSES)
        self.state, self.seen = None, 0

    def forward(self, x):
        state = self.state
        if state is not None:
            parts = [s.expand(-1, len(x), -1).contiguous() for s in state]
            state = tuple(parts) if isinstance(self.rnn, nn.LSTM) else parts[0]
        out, state = self.rnn(x.flatten(1, 2), state)
        if self.training:
            state = state if isinstance(state, tuple) else (state,)
            self.state, self.seen = [s.detach().mean(1, keepdim=True) for s in state], self.seen + 1
        return self.head(out[:, -1])


class Memory:
    """Of no module's class, and an object in a module."""

    def __init__(self): self.calls, self.mean, self.latest = 0, torch.zeros(()), []

    def note(self, x):
        self.calls += 1
        self.mean.lerp_(x.mean(), 0.3)
        self.latest = [*self.latest[-2:], float(x.max())]
        return self.mean + sum(self.latest) / self.calls


class Odd(nn.Module):
    """Around a net: buffers, attributes and random sources of all kinds, which its output depends on."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.step, self.own = inner, 0, torch.Generator().manual_seed(3)
        self.python, self.numpy = random.Random(7), np.random.default_rng(5)
        self.register_buffer("unsaved", torch.zeros(CLASSES), persistent=False)
        self.register_buffer("queue", torch.zeros(0))
        self.register_buffer("later", None)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.previous = self.current = torch.zeros(CLASSES)         # one and the same, until a batch has been
        self.log, self.table, self.chosen = [], {"n": 0, "mean": torch.zeros(())}, set()
        self.settings, self.memory, self.unlisted = types.SimpleNamespace(a=1), Memory(), [nn.BatchNorm1d(CLASSES)]
        self.whole = torch.zeros(6)
        self.part, self.made = self.whole[2:4], None            # which are written through one another

    def forward(self, x):
        out = self.inner(x)
        if not self.training: return out + self.unsaved + self.current
        self.step += 1
        self.count += len(x)
        now = out.detach().float()
        noise = torch.rand(CLASSES, generator=self.own) * self.python.random() * float(self.numpy.random())
        self.unsaved.lerp_(now.mean(0).to(self.unsaved.dtype), 0.1)
        self.queue = torch.cat((self.queue, now[:, 0]))[-5:]
        self.later = now[:1].clone() if self.later is None else self.later + now.mean()
        self.previous, self.current = self.current, self.current * 0.5 + now.mean(0)
        self.log = [*self.log[-3:], float(now.mean())]
        self.table["n"] += 1
        self.table["mean"] = self.table["mean"] + now.mean()
        self.chosen.add(self.step % 5)
        if self.step == 4: self.register_buffer("added", torch.full((2,), 4.0))
        if self.step == 3: self.whole = torch.ones(8)
        if self.step == 5: self.made = self.whole[1:5].view(2, 2)
        if self.step == 6: self.python = random.Random(8)
        self.whole.add_(now.mean())
        self.part.mul_(0.9)
        if self.made is not None: self.made.t()[0].mul_(0.8)
        self.unlisted[0](now)
        extra = self.queue.sum() + self.later.mean() + (self.current - self.previous).sum() + sum(self.log)
        extra = extra + self.table["mean"] / self.table["n"] + len(self.chosen) + self.count / 9
        extra = extra + self.memory.note(now) + self.unlisted[0].running_mean.sum() + self.whole.sum() + self.part.sum()
        return out * (1 + 0.001 * extra) + noise / self.step


class Loss(nn.Module):
    """With a weight and a running mean."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, pred, yb):
        loss = F.cross_entropy(pred.float() * self.scale, yb)
        if self.training: self.mean.lerp_(loss.detach(), 0.2)
        return loss + 0.1 * self.mean


class Plain:
    """A loss of no module's class, with a memory."""

    def __init__(self): self.memory = Memory()

    def __call__(self, pred, yb):
        loss = F.cross_entropy(pred.float(), yb)
        return loss * (1 + 0.01 * self.memory.note(loss.detach()))


def closure():
    """A loss that counts in a variable of its own."""
    n = 0

    def loss(pred, yb):
        nonlocal n
        n += 1
        return F.cross_entropy(pred.float(), yb) * (1 + n / 100)
    return loss


def wrapped(draw, words, layer):
    if draw.random() < 0.8: return layer
    name = draw.choice([*WRAPPED])
    words.append(name)
    return WRAPPED[name](layer)


def conv_net(draw, words):
    name = draw.choice([*CONV_NORMS])
    words.append(f"conv, {name}")
    norm = CONV_NORMS[name]
    block = [wrapped(draw, words, nn.Conv2d(1, 4, 3, padding=1)), norm(4),
             draw.choice([nn.ReLU, nn.RReLU, nn.GELU])(), draw.choice([nn.Dropout, nn.Dropout2d, nn.Identity])()]
    block += [nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False), norm(4), nn.ReLU()]
    if draw.random() < 0.2:
        words.append("recomputed")
        block = [Recomputed(nn.Sequential(*block))]
    model = nn.Sequential(*block, nn.Flatten(), wrapped(draw, words, nn.Linear(16, CLASSES)))
    if draw.random() < 0.2:
        words.append("channels last")
        model = model.to(memory_format=torch.channels_last)
    return model


def flat_net(draw, words):
    name = draw.choice([*FLAT_NORMS])
    words.append(f"linear, {name}")
    return nn.Sequential(nn.Flatten(), wrapped(draw, words, nn.Linear(SIDE * SIDE, 6)), FLAT_NORMS[name](6), nn.ReLU(),
                         draw.choice([nn.Dropout(0.3), nn.AlphaDropout(0.2), nn.Identity()]), nn.Linear(6, CLASSES))


def lazy_net(draw, words):
    words.append("lazy")
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))


def recurrent(draw, words):
    kind = draw.choice([nn.GRU, nn.LSTM, nn.RNN])
    words.append(kind.__name__)
    return Carried(kind)


def model_of(draw, words):
    model = draw.choice([conv_net, conv_net, conv_net, flat_net, lazy_net, recurrent])(draw, words)
    if draw.random() < 0.3:
        words.append("odd")
        model = Odd(model)
    if draw.random() < 0.15 and "lazy" not in words:
        words.append("float64")
        model = model.double()
    return model


# --- optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1), "runner's SGD": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": partial(torch.optim.Adam, lr=0.01), "AMSGrad": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "Adam, a rate that is a tensor": lambda ps: torch.optim.Adam(ps, torch.tensor(0.01)),
    "Adamax": partial(torch.optim.Adamax, lr=0.01), "NAdam": partial(torch.optim.NAdam, lr=0.01),
    "RAdam": partial(torch.optim.RAdam, lr=0.01), "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "Adadelta": torch.optim.Adadelta, "Adafactor": partial(torch.optim.Adafactor, lr=0.05),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "Rprop": partial(torch.optim.Rprop, lr=0.01), "ASGD": partial(torch.optim.ASGD, lr=0.05, t0=3),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=3, history_size=4),
}


def optimizer_of(draw, words, model, loss):
    params = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    lazy = "lazy" in words
    name = draw.choice([name for name in OPTIMIZERS if not lazy or name != "Adagrad"])
    several = draw.random() < 0.15 and not lazy and name != "LBFGS"
    if several and len(params) > 3:
        other = draw.choice([n for n in OPTIMIZERS if n != "LBFGS"])
        words.append(f"{name} and {other}")
        return Optimizers(OPTIMIZERS[name](params[:2]), rest=OPTIMIZERS[other](params[2:]))
    words.append(name)
    if draw.random() < 0.3 and name not in ("LBFGS", "Adam, a rate that is a tensor"):
        words.append("two groups")
        return OPTIMIZERS[name]([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}])
    return OPTIMIZERS[name](params)


# --- data -----------------------------------------------------------------------------------------------------------

class Augmented(TorchDataset):
    """Items with noise, from a source of its own or from the common ones."""

    def __init__(self, x, y, own): self.x, self.y, self.rng, self.calls = x, y, own, 0

    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        self.calls += 1
        if self.rng is not None: noise = float(self.rng.normal()) + self.calls / 50
        else: noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
        return self.x[i] + 0.1 * noise, self.y[i]


class Order(Sampler):
    """Shuffles one order again and again, by a source of its own or Python's; `set_epoch` rotates it."""

    def __init__(self, n, source): self.n, self.order, self.source, self.epoch = n, [*range(n)], source, 0

    def set_epoch(self, epoch): self.epoch = epoch

    def __len__(self): return self.n

    def __iter__(self):
        self.source.shuffle(self.order)
        return iter([(i + self.epoch) % self.n for i in self.order])


class Positioned:
    """A loader of one's own that says where it is."""

    def __init__(self, x, y, bs): self.x, self.y, self.bs, self.at, self.epoch = x, y, bs, 0, 0

    def __len__(self): return -(-len(self.x) // self.bs)

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch)).split(self.bs)
        while self.at < len(order):
            self.at += 1
            yield self.x[order[self.at - 1]], self.y[order[self.at - 1]]
        self.at, self.epoch = 0, self.epoch + 1

    def state_dict(self): return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state): self.at, self.epoch = state["at"], state["epoch"]


def data_of(draw, words, dtype):
    items, bs = draw.randint(7, 20), draw.choice([2, 3, 4])
    x, y = torch.randn(items + 7, 1, SIDE, SIDE, dtype=dtype), torch.arange(items + 7) % CLASSES
    xv, yv, x, y = x[items:], y[items:], x[:items], y[:items]
    kind = draw.choice(["get_dls", "get_dls", "get_dls, items", "torch's", "sampler", "sampler of batches", "list",
                        "positioned"])
    augment = draw.choice([None, None, None, "common", "own"])
    generator = torch.Generator().manual_seed(5) if draw.random() < 0.5 else None
    drop_last = items // bs > 1 and draw.random() < 0.3
    words.append(f"{kind}, {items} by {bs}{', generator' * (generator is not None)}{', drop_last' * drop_last}")
    own = np.random.default_rng(0) if augment == "own" else None
    ds = Dataset(x, y) if kind == "get_dls" else TensorDataset(x, y)
    if augment and kind not in ("list", "positioned"):
        words.append(f"noise, {augment}")
        ds = Augmented(x, y, own)
    if draw.random() < 0.2: ds = Subset(ds, [*range(1, items)])
    n = len(ds)
    valid = Augmented(xv, yv, own) if augment and draw.random() < 0.4 else TensorDataset(xv, yv)
    valid_dl = DataLoader(valid, 4, shuffle=draw.random() < 0.3, generator=generator if draw.random() < 0.3 else None)
    if draw.random() < 0.15: valid_dl = None
    if "get_dls" in kind:
        more = {"collate_fn": torch.utils.data.default_collate} if "items" in kind else {}
        train_dl = get_dls(ds, None, bs, drop_last=drop_last, generator=generator, **more)[0]
    elif kind == "torch's":
        train_dl = DataLoader(ds, bs, shuffle=draw.random() < 0.8, generator=generator, drop_last=drop_last)
    elif kind == "list": train_dl = [*zip(x.split(bs), y.split(bs), strict=True)]
    elif kind == "positioned": train_dl = Positioned(x, y, bs)
    else:
        sampler = draw.choice([
            lambda: RandomSampler(ds, replacement=True, num_samples=n + 3, generator=generator),
            lambda: RandomSampler(ds, num_samples=2 * n - 1, generator=generator),
            lambda: WeightedRandomSampler([1 + i % 3 for i in range(n)], n, generator=generator),
            lambda: SubsetRandomSampler(range(1, n), generator=generator), lambda: SequentialSampler(ds),
            lambda: Order(n, random.Random(3)), lambda: Order(n, random), lambda: Order(n, np.random),
            lambda: Order(n, np.random.RandomState(2))])()
        words.append(type(sampler).__name__)
        if kind == "sampler": train_dl = DataLoader(ds, bs, sampler=sampler, drop_last=drop_last)
        else: train_dl = DataLoader(ds, batch_sampler=BatchSampler(sampler, bs, drop_last))
    return DataBunch(train_dl, valid_dl, CLASSES)


# --- callbacks ------------------------------------------------------------------------------------------------------

class Counts:
    """A metric with state."""

    def reset(self): self.table, self.seen = torch.zeros(CLASSES, CLASSES), []

    def update(self, pred, yb):
        self.table.index_put_((yb, pred.argmax(1)), torch.ones(len(yb)), accumulate=True)
        self.seen.append(pred[0].float())

    def compute(self): return {"right": self.table.trace() / self.table.sum(), "first": torch.stack(self.seen).sum()}


class Whitened(nn.Module):
    """A transform with a state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean.lerp_(x.mean().to(self.mean.dtype), 0.1)
        return x - self.mean.to(x.dtype)


class Noise(Callback):
    """Into the batch, from torch's, Python's and numpy's own sources and one of its own; in validation too."""

    def __init__(self, validation): self.validation, self.own = validation, torch.Generator().manual_seed(1)

    def begin_batch(self):
        if not self.run.in_train and not self.validation: return
        noise = random.random() + float(np.random.rand()) + torch.randn(1) + torch.rand(1, generator=self.own)
        self.run.xb = self.run.xb * (1 + 0.1 * noise.to(self.run.xb.dtype))


class Mask(Callback):
    """Without a state: drawn at the beginning of each epoch."""

    def begin_epoch(self): self.mask = (torch.rand(SIDE, SIDE) < 0.8).float()

    def begin_batch(self): self.run.xb = self.run.xb * self.mask.to(self.run.xb.dtype)


class Cancels(Callback):
    """Leaves batches, passes or the fit, by what the run has come to."""

    def __init__(self, event, what, every): self.event, self.what, self.every, self.n = event, what, every, 0

    def __call__(self, event):
        if event != self.event: return False
        self.n += 1
        if self.n % self.every == self.every - 1: raise self.what
        return False

    def state_dict(self): return {"n": self.n}

    def load_state_dict(self, state): self.n = state["n"]


class Skips(Callback):
    """Leaves some passes out."""

    def __init__(self, event, epoch): self.event, self.at = event, epoch

    def __call__(self, event): return event == self.event and self.run.epoch == self.at


class Evaluates(Callback):
    """Evaluates after each epoch, by a runner of its own, and keeps what it finds."""

    def __init__(self, order): self._order, self.found = order, []

    def after_epoch(self):
        dl = self.data.valid_dl if self.data.valid_dl is not None else self.data.train_dl
        inner = Runner([Callback()])
        self.found.append([round(v, 12) for v in inner.evaluate(self.run.learn, dl, metrics=[]).values()])

    def state_dict(self): return {"found": self.found}

    def load_state_dict(self, state): self.found = state["found"]


class Changes(Callback):
    """Changes what one shouldn't in mid-fit: weights, rates, what is frozen, the order of the data."""

    _order = 50

    def __init__(self, what): self.what = what

    def params(self): return [p for group in self.opt.param_groups for p in group["params"]]

    def after_step(self):
        if "weights" in self.what:
            with torch.no_grad():
                for p in self.params(): p.clamp_(-0.9, 0.9)

    def after_batch(self):
        if not self.run.in_train: return
        if "rates" in self.what:
            for group in self.opt.param_groups: group["lr"] = group["lr"] * 0.97
        if "decay" in self.what and self.run.n_iter == 4:
            for group in self.opt.param_groups: group["weight_decay"] = 0.1
        if "frozen" in self.what and self.run.n_iter in (3, 8): self.params()[0].requires_grad_(self.run.n_iter == 8)
        if "modes" in self.what and self.run.n_iter == 5:
            for m in self.model.modules():
                if "Norm" in type(m).__name__: m.eval()

    def begin_epoch(self):
        sampler = getattr(self.data.train_dl, "sampler", None)
        if "epochs" in self.what and hasattr(sampler, "set_epoch"): sampler.set_epoch(self.run.epoch)


class To(Callback):
    def __init__(self, dtype): self.dtype = dtype

    def begin_batch(self): self.run.xb = self.run.xb.to(self.dtype)


two_phases = combine_scheds([0.4, 0.6], [sched_lin(0.01, 0.1), sched_cos(0.1, 0.001)])


def callbacks_of(draw, words, learn, epochs, folder):
    lbfgs, has = isinstance(learn.opt, torch.optim.LBFGS), lambda share: draw.random() < share
    cbs = [AvgStatsCallback(draw.choice([accuracy, [accuracy, Counts()], None]), quiet=True), Recorder()]
    if lbfgs: cbs.append(ClosureStep())
    running = any(getattr(m, "running_mean", None) is not None for m in learn.model.modules())
    double, lazy = "float64" in words, "lazy" in words
    if has(0.25) and not lbfgs: cbs.append(GradientAccumulation(draw.choice([2, 3])))
    if has(0.3): cbs.append(GradientClip(**draw.choice([{"max_norm": 0.5}, {"max_value": 0.1}])))
    if has(0.25) and not double and not {"LSTM", "GRU", "RNN"} & {*words}:
        half = lbfgs or has(0.5)
        cbs.append(MixedPrecision("bf16") if half else MixedPrecision("fp16", init_scale=2.0 ** 24, growth_interval=3,
                                                                       verbose=False))
    if has(0.35) and not lazy and "odd" not in words:
        how = ["average", "copy", *(["recalibrate"] if running else [])]
        cbs.append(AveragedWeights(draw.choice([0.8, None]), by=draw.choice(["batch", "batch", "epoch"]),
                                   start=draw.choice([0, 2]), every=draw.choice([1, 2]), norms=draw.choice(how),
                                   n_images=draw.choice([4, 50])))
    if has(0.3): cbs.append(ParamScheduler("lr", draw.choice([two_phases, sched_exp(0.1, 0.01)])))
    elif has(0.3): cbs.append(ParamScheduler("lr", sched_cos(1, 0.1), relative=True))
    elif has(0.4):
        n = epochs * 5
        make, by = draw.choice([
            (partial(lr_scheduler.StepLR, step_size=2, gamma=0.5), "batch"), (
                partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3), "batch"),
            (partial(lr_scheduler.ExponentialLR, gamma=0.7), "epoch"),
            (partial(lr_scheduler.PolynomialLR, total_iters=n), "batch")])
        cbs.append(TorchScheduler(make, by))
    elif has(0.4):
        cbs.append(TorchScheduler(partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5),
                                  monitor="train_loss"))
    if has(0.2): cbs.append(EarlyStopping("train_loss", patience=1, mode=draw.choice(["min", "max"])))
    if has(0.25): cbs.append(KeepBest("train_loss", draw.choice(["min", "max"]), restore=has(0.6)))
    if has(0.15): cbs.append(ActivationStats(phases=draw.choice([["train"], ["train", "valid"]]), every=2))
    if has(0.15): cbs.append(GradientStats(every=2))
    if has(0.15): cbs.append(ParameterStats(verbose=False))
    if has(0.15) and running: cbs.append(NormStats())
    if has(0.25) and not lazy: cbs.append(TerminateOnNonFinite(every=draw.choice([1, 3])))
    if has(0.2): cbs.append(BatchTransformXCallback(Whitened()))
    if has(0.2): cbs.append(CSVLogger(folder / "history.csv", append=has(0.5)))
    if has(0.25): cbs.append(Noise(has(0.5)))
    if has(0.15): cbs.append(Mask())
    if has(0.25):
        event = draw.choice(["begin_batch", "after_pred", "after_loss", "after_backward", "after_step"])
        what = draw.choice([CancelBatchException, CancelBatchException, CancelEpochException, CancelTrainException])
        if event in ("begin_batch", "after_pred"): what = CancelEpochException if what is CancelTrainException else what
        cbs.append(Cancels(event, what, draw.choice([3, 4, 7, 11])))
    if has(0.15): cbs.append(Skips(draw.choice(["begin_epoch", "begin_validate"]), draw.randrange(epochs)))
    if has(0.15): cbs.append(Evaluates(draw.choice([0, 500])))
    if has(0.3): cbs.append(Changes(draw.sample(["weights", "rates", "decay", "frozen", "modes", "epochs"],
                                                draw.choice([1, 2, 6]))))
    draw.shuffle(cbs)
    words += [type(cb).__name__ for cb in cbs]
    return cbs


# --- a program ------------------------------------------------------------------------------------------------------

class Break(Callback):
    """Breaks the fit off at its `at`-th event, before or after the other callbacks."""

    fit_only = True

    def __init__(self, at, order): self.at, self._order, self.events = at, order, []

    def __call__(self, event):
        if self.at == len(self.events): raise KeyboardInterrupt
        self.events.append((event, self.run.in_train))
        return False


def build(seed, folder, every=None, at=None, order=0):
    """Learner, runner, number of epochs and a description of the program `seed`, made anew as a script would."""
    draw, words = random.Random(seed), []
    for source in (torch.manual_seed, random.seed, np.random.seed): source(seed)
    model = model_of(draw, words)
    kind = draw.choice([Loss, Plain, closure, *[None] * 6])
    if kind is not None: words.append(f"the loss {kind.__name__}")
    loss = F.cross_entropy if kind is None else kind()
    opt = optimizer_of(draw, words, model, loss)
    data = data_of(draw, words, torch.float64 if "float64" in words else torch.float32)
    epochs, learn = draw.randint(2, 4), Learner(model, opt, loss, data)
    cbs = callbacks_of(draw, words, learn, epochs, folder)
    return learn, Runner([*cbs, Break(at, order), *([Checkpoint(folder / "checkpoints", **every)] if every else [])]), \
        epochs, words


def scramble():
    """Whoever goes on has drawn other numbers before."""
    torch.manual_seed(random.SystemRandom().randrange(2 ** 31))
    random.seed()
    np.random.seed()


# Times and places; and what callbacks have at hand for the rest of an epoch.
TIMES = {"seconds", "run", "file", "path", "modules", "slots", "optimizer", "params"}


def seen(o, depth=6):
    """`o` in values that can be compared: tensors by their bytes and how they lie."""
    if isinstance(o, torch.Tensor):
        if type(o).__name__ == "UninitializedParameter": return "lazy"
        grad = seen(o.grad, depth) if o.is_leaf else None
        t = o.detach().clone()
        if t.layout is not torch.strided or t.is_quantized: return str(t)
        return str(t.dtype), tuple(t.shape), t.stride(), t.contiguous().flatten().view(torch.uint8).numpy().tobytes(), \
            o.requires_grad, grad
    if isinstance(o, (float, np.ndarray, np.generic)): return repr(o) if not isinstance(o, np.ndarray) else o.tolist()
    if o is None or isinstance(o, (bool, int, str, bytes, Path)): return o
    if isinstance(o, torch.Generator): return seen(o.get_state())
    if isinstance(o, random.Random): return o.getstate()
    if isinstance(o, np.random.Generator): return str(o.bit_generator.state)
    if isinstance(o, np.random.RandomState): return str(o.get_state())
    if isinstance(o, nn.Module):
        held = {**vars(o), **o._parameters, **o._buffers, **o._modules}
        return type(o).__name__.removeprefix("Lazy"), {k: seen(v, depth) for k, v in held.items()
                                                       if "hook" not in k and "dynamo" not in k}
    if isinstance(o, torch.optim.Optimizer):
        return [({k: seen(v) for k, v in group.items() if k != "params"},
                 [seen(o.state.get(p)) for p in group["params"]]) for group in o.param_groups]
    if callable(o) and not hasattr(o, "state_dict"): return getattr(o, "__name__", type(o).__name__)
    if depth == 0: return type(o).__name__
    if isinstance(o, dict): return {str(k): seen(v, depth - 1) for k, v in o.items() if k not in TIMES}
    if isinstance(o, (set, frozenset)): return sorted(map(repr, o))
    if isinstance(o, (list, tuple)) or type(o).__name__ in ("deque", "array"): return [seen(v, depth - 1) for v in o]
    if isinstance(o, lr_scheduler.LRScheduler): return seen(o.state_dict(), depth)
    own = getattr(o, "__dict__", {})
    return type(o).__name__, {k: seen(v, depth - 1) for k, v in own.items()
                              if not k.startswith("_") and k not in TIMES}


def everything(learn, run, folder):
    """All that a fit has left behind."""
    cbs = [cb for cb in run.cbs if not isinstance(cb, (Break, Checkpoint))]
    rows = {cb.name: seen([*cb.rows]) for cb in cbs if hasattr(type(cb), "rows")}
    states = {cb.name: seen(cb.state_dict()) for cb in cbs if hasattr(cb, "state_dict")}
    table = (folder / "history.csv").read_text().splitlines() if (folder / "history.csv").exists() else []
    return {
        "model": seen(learn.model), "loss": seen(learn.loss_func), "optimizer": seen(learn.opt),
        "requires grad": [p.requires_grad for p in learn.model.parameters()],
        "data": [seen(dl) for dl in (learn.data.train_dl, learn.data.valid_dl)],
        "samplers": seen(runner.loading.samplers(learn.data.train_dl)),
        "data sets": [seen(getattr(dl, "dataset", None)) for dl in (learn.data.train_dl, learn.data.valid_dl)],
        "run": (run.status, run.n_iter, run.n_epochs, run.epoch, run.epochs, run.fits), "rows": rows,
        "states": states, "callbacks": {cb.name: seen(cb)[1] for cb in cbs},
        "csv": [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(table)],
        "random": [seen(torch.get_rng_state()), random.getstate(), str(np.random.get_state())]}


def differing(a, b, at=""):
    """Where two of them differ, and how."""
    if type(a) is type(b) and isinstance(a, dict):
        return [d for k in dict.fromkeys((*a, *b)) for d in differing(a.get(k, "-"), b.get(k, "-"), f"{at}.{k}")]
    if type(a) is type(b) and isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for i in range(len(a)) for d in differing(a[i], b[i], f"{at}[{i}]")]
    return [] if a == b else [f"{at}: {a!r:.80} and {b!r:.80}"]


def moment(draw, events):
    """The number of an event: of any, or of a kind of event that is rarer."""
    if draw.random() < 0.6: return draw.randrange(len(events))
    kind = draw.choice(sorted(set(events)))
    return draw.choice([i for i, event in enumerate(events) if event == kind])


def check(seed, folder):
    """Run the program undisturbed and broken off; the differences, and what it is."""
    for name in ("whole", "broken"): (folder / name).mkdir(parents=True)
    learn, run, epochs, words = build(seed, folder / "whole")
    try: run.fit(epochs, learn)
    except (ValueError, TypeError, FloatingPointError, RuntimeError) as e: return [], [*words, f"refused: {e}"]
    events, want = vars(run)["break"].events, everything(learn, run, folder / "whole")
    draw = random.Random(f"{seed}")
    every = draw.choice([{"every_epochs": 1}, {"every_epochs": 2}, {"every_epochs": None, "every_batches": 1},
                         {"every_epochs": None, "every_batches": 2}, {"every_batches": 3}, {"every_batches": 1}])
    every = {**every, "keep": draw.choice([1, 2, 3])}
    breaks = [(moment(draw, events), draw.choice([-10_000, 9_500, 20_000])) for _ in range(draw.randint(1, 4))]
    words += [str(every), str([(i, events[i][0], order) for i, order in breaks])]
    folder, begun = folder / "broken", 0
    for at, order in [*breaks, (None, 0)]:
        learn, run, epochs, _ = build(seed, folder, every, at, order)
        if any((folder / "checkpoints").glob("*.pt")): scramble()
        elif begun and (folder / "history.csv").exists(): (folder / "history.csv").unlink()
        begun += 1
        try: run.fit(epochs, learn, resume=folder / "checkpoints")
        except KeyboardInterrupt:
            if draw.random() < 0.7 or not any((folder / "checkpoints").glob("*.pt")): continue
            vars(run)["break"].at = None            # in the same process, with the same objects
            scramble()
            run.fit(epochs, learn, resume=folder / "checkpoints")
            break
    return differing(everything(learn, run, folder), want), words


@pytest.mark.filterwarnings("ignore:Full backward hook|The .* optimizer is experimental")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + PROGRAMS))
def test_a_random_program_that_is_broken_off_ends_as_if_it_had_not_been(seed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.fsync", lambda fd: None)        # the disk has tests of its own
    found, words = check(seed, tmp_path)
    assert not found, f"{'; '.join(words)}:\n" + "\n".join(found[:8])
