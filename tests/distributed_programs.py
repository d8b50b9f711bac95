"""Programs that are run alone and on several processes; each returns what must be the same, or what is asked about."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from norms import BatchNorm, RunningBatchNorm, sync_norms
from runner import (
    EVENTS,
    STEPS,
    ActivationStats,
    AveragedWeights,
    AvgStatsCallback,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    Checkpoint,
    ClosureStep,
    CPUBackendCallback,
    CSVLogger,
    CudaCallback,
    DataBunch,
    Dataset,
    Distributed,
    DistributedError,
    EarlyStopping,
    GradientAccumulation,
    GradientClip,
    KeepBest,
    Learner,
    MixedPrecision,
    NormStats,
    Optimizers,
    ParameterStats,
    ParamScheduler,
    ProgressCallback,
    Recorder,
    Runner,
    TerminateOnNonFinite,
    Turns,
    accuracy,
    get_dls,
    sched_cos,
    shard_loader,
)
from runner.compiled import CompiledStep


def images(n, seed=0, size=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, size, size, generator=g, dtype=torch.float64), torch.randint(4, (n,), generator=g)


def network(norm=None, dropout=0.0, seed=1):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), norm(4) if norm else nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2),
              norm(4) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).double()


def learner(n=23, bs=5, valid=7, valid_bs=3, model=None, loss=F.cross_entropy, opt=None, **kwargs):
    model = model or network()
    data = DataBunch(*get_dls(Dataset(*images(n)), Dataset(*images(valid, 1)), bs, valid_bs=valid_bs, **kwargs))
    return Learner(model, opt or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), loss, data)


def told(run, learn):
    """What a fit has left: weights, buffers, the history and the losses of its steps."""
    found = {"state": {k: v.clone() for k, v in learn.model.state_dict().items()}, "status": run.status,
             "n_iter": run.n_iter, "epoch": run.epoch}
    if hasattr(run, "avg_stats"):
        found["history"] = [{k: v for k, v in row.items() if k != "seconds"} for row in run.avg_stats.history]
        found["seconds"] = [row["seconds"] for row in run.avg_stats.history]
    if hasattr(run, "recorder"): found["losses"] = list(run.recorder.losses)
    return found


def fitted(epochs, learn, *cbs, cls=Distributed, **kwargs):
    run = Runner([AvgStatsCallback(accuracy, quiet=True), Recorder(), cls(), *cbs], **kwargs)
    run.fit(epochs, learn)
    return told(run, learn)


# --- the same as one process --------------------------------------------------------------------------------------

def plain(): return fitted(2, learner())


def ragged():
    """Batches that no number of processes divides, and some with fewer images than there are processes."""
    return {(n, bs): fitted(2, learner(n, bs, valid=valid, valid_bs=valid_bs))
            for n, bs, valid, valid_bs in ((21, 5, 1, 3), (7, 2, 4, 3), (4, 1, 2, 1), (9, 4, 5, 4))}


NORMS = {"batch": BatchNorm, "running": RunningBatchNorm,
         "running, averaged": partial(RunningBatchNorm, average_backward=True),
         "running, per image": partial(RunningBatchNorm, rule="per_image")}


def synchronised():
    """Batches of which each process has one image, or none, normalised as one batch."""
    found = {}
    for name, norm in NORMS.items():
        for n, bs in ((8, 2), (9, 5), (7, 3)):
            model = network(norm)
            sync_norms(model)
            found[name, n, bs] = fitted(2, learner(n, bs, model=model, opt=torch.optim.SGD(model.parameters(), 0.02)))
    return found


def own_statistics():
    """Norms that aren't synchronised: rank 0's statistics are everybody's in the end."""
    model = network(RunningBatchNorm)
    return fitted(2, learner(8, 4, model=model), AveragedWeights(0.9, norms="recalibrate"))


def random_fits():
    """Fits put together by chance: nets, norms, sizes, loaders and callbacks."""
    found = {}
    for seed in range(12):
        draw = random.Random(seed)
        norm = draw.choice([None, *NORMS.values()])
        model = network(norm, seed=seed)
        if norm: sync_norms(model)
        n, bs = draw.randint(5, 24), draw.randint(2, 7)
        opt = draw.choice([partial(torch.optim.SGD, lr=0.02, momentum=0.5),
                           partial(torch.optim.Adam, lr=1e-3, eps=1e-2)])
        learn = learner(n, bs, valid=draw.randint(1, 9), valid_bs=draw.randint(1, 4), model=model,
                        opt=opt(model.parameters()), drop_last=n >= bs and draw.random() < 0.2)
        if draw.random() < 0.3: learn.data.train_dl = DataLoader(TensorDataset(*images(n)), bs, shuffle=True)
        if draw.random() < 0.2: learn.data.valid_dl = None
        cbs = draw.sample([GradientAccumulation(draw.randint(2, 3)), GradientClip(0.3), AveragedWeights(0.8),
                           ParamScheduler("lr", sched_cos(0.03, 0.001)), TerminateOnNonFinite(), Cancelled(),
                           CPUBackendCallback(False)], draw.randint(0, 4))
        found[seed] = fitted(2, learn, *cbs)
    return found


def in_company():
    """Callbacks that look at losses, gradients and weights, or change what a step is."""
    clip, cosine = GradientClip(0.5), ParamScheduler("lr", sched_cos(0.1, 0.001))
    return {
        "clipped": fitted(2, learner(), clip, cosine),
        "accumulated": fitted(2, learner(), GradientAccumulation(2)),
        "accumulated, three": fitted(2, learner(22, 3), GradientAccumulation(3), clip),
        "averaged": fitted(2, learner(), AveragedWeights(0.9), KeepBest("valid_loss")),
        "stopped": fitted(9, learner(), EarlyStopping("valid_loss", patience=1), KeepBest("valid_loss")),
        "looked after": fitted(1, learner(), TerminateOnNonFinite(), CPUBackendCallback()),
        "bfloat16": fitted(1, learner(model=network().float()), InFloat(), MixedPrecision("bf16")),
        "float16": fitted(1, learner(model=network().float()), InFloat(), MixedPrecision("fp16", init_scale=2.0 ** 10)),
    }


class InFloat(Callback):
    def begin_batch(self): self.run.xb = self.xb.float()


class WithCenters(nn.Module):
    """A loss that is trained too."""

    def __init__(self):
        super().__init__()
        self.centers = nn.Parameter(torch.linspace(0, 1, 16, dtype=torch.float64).view(4, 4))

    def forward(self, pred, yb): return F.cross_entropy(pred, yb) + (pred - self.centers[yb]).square().mean()


class Retained(Callback):
    """Backward passes of which the second adds to the first's gradients."""

    def backward(self): (self.loss / 2).backward(retain_graph=True), (self.loss / 2).backward()


class Thaw(Callback):
    """Unfreezes a layer in the middle of the fit."""

    def begin_batch(self):
        if self.run.in_train and self.run.n_iter == 3: self.model[0].requires_grad_(True)


class Cancelled(Callback):
    """Leaves some batches before their step; their gradients are added to the next one's."""

    def after_backward(self):
        if self.n_iter == 2: raise CancelBatchException


def gan():
    torch.manual_seed(2)
    model = nn.ModuleDict({"gen": nn.Linear(3, 4), "disc": nn.Linear(4, 1)}).double()
    opt = Optimizers(disc=torch.optim.SGD(model.disc.parameters(), 0.1),
                     gen=torch.optim.SGD(model.gen.parameters(), 0.1))
    x, y = torch.linspace(-1, 1, 40, dtype=torch.float64).view(10, 4), torch.zeros(10)

    def disc(run):
        run.fake = run.model.gen(run.xb[:, :3])
        return F.softplus(-run.model.disc(run.xb)).mean() + F.softplus(run.model.disc(run.fake.detach())).mean()

    def gen(run): return F.softplus(-run.model.disc(run.fake)).mean()
    learn = Learner(model, opt, None, DataBunch(get_dls(Dataset(x, y), None, 3)[0]))
    run = Runner([Turns(disc=disc, gen=gen), Recorder(), Distributed()])
    run.fit(2, learn)
    return told(run, learn)


def other_gradients():
    """Gradients that don't come by one backward pass after one forward pass through the model."""
    loss = WithCenters()
    model = network()
    trained = learner(model=model, loss=loss, opt=torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.05))
    frozen = network()
    frozen[0].requires_grad_(False)
    model = network()
    lbfgs = learner(20, 10, model=model, opt=torch.optim.LBFGS(model.parameters(), 0.1, line_search_fn="strong_wolfe"))
    return {
        "of a loss": {**fitted(2, trained), "centers": loss.centers.detach().clone()},
        "twice": fitted(1, learner(), Retained()), "unfrozen": fitted(2, learner(model=frozen), Thaw()),
        "cancelled": fitted(2, learner(), Cancelled()), "gan": gan(), "closure": fitted(1, lbfgs, ClosureStep()),
        "lazy": fitted(2, learner(model=lazy())),
    }


def lazy():
    torch.manual_seed(5)
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).double()


def compiled():
    before = CompiledStep.backend
    CompiledStep.backend = "eager"
    try: return fitted(1, learner(model=network().float(), n=8, bs=4), InFloat(), compile=True)
    finally: CompiledStep.backend = before


class Spread:
    """A metric with state, of predictions in any number of batches."""

    name = "spread"

    def reset(self): self.seen = []

    def update(self, pred, yb): self.seen.append((pred.detach().sum(1), yb))

    def compute(self):
        sums, ys = (torch.cat(t) for t in zip(*self.seen, strict=True))
        return {"std": sums.std(), "ys": ys.double().std(), "batches": len(self.seen)}


def metrics():
    learn = learner(valid=4, valid_bs=3)
    run = Runner([AvgStatsCallback([accuracy, Spread()], quiet=True), Distributed()])
    run.fit(1, learn)
    return told(run, learn)


def rates():
    run, learn = Runner([Distributed()]), learner(40, 5)
    lr = run.find_lr(learn, max_iter=16)
    return {"lrs": lr.lrs, "losses": lr.losses, **fitted(1, learn)}


class Reversed(Sampler):
    def __init__(self, n): self.n = n

    def __iter__(self): return iter(range(self.n - 1, -1, -1))

    def __len__(self): return self.n


class Doubled(Callback):
    """Takes the place of the batches."""

    def around_pass(self, batches): return ((2 * xb, yb) for xb, yb in batches)


def loaders():
    """Loaders of other kinds; those of which each process has its own order are vouched for."""
    x, y = images(23)
    ds = TensorDataset(x, y)
    batches = [(x[i:i + 5], y[i:i + 5]) for i in range(0, 23, 5)]

    def of(dl, *cbs):
        learn = learner()
        learn.data.train_dl = dl
        return fitted(2, learn, *cbs)
    return {
        "torch's": of(DataLoader(ds, 5, shuffle=True)),
        "with workers": of(DataLoader(ds, 5, shuffle=True, num_workers=1)),
        "a list": of(batches), "vouched for": of(shard_loader(DataLoader(ds, 5, sampler=Reversed(23)))),
        "a generator's": of(shard_loader(Anew(batches))), "replaced": of(batches, Doubled()),
        "replaced, sampled": of(DataLoader(ds, 5, shuffle=True), Doubled()),
        "own generator": of(get_dls(ds, None, 5, generator=torch.Generator().manual_seed(3))[0]),
    }


class Anew:
    def __init__(self, batches): self.batches = batches

    def __iter__(self): return (b for b in self.batches)

    def __len__(self): return len(self.batches)


# --- what is decided on one process -------------------------------------------------------------------------------

BATCH = (*EVENTS[2:7], "after_cancel_batch", "after_batch")


class At(Callback):
    """On rank 1 does something at the k-th of an event."""

    def __init__(self, event, k, do): self.event, self.k, self.do, self.seen, self.heard = event, k, do, 0, []

    def __call__(self, event):
        self.heard.append((event, self.in_train))
        if event != self.event: return False
        self.seen += 1
        return bool(self.seen == self.k and rank() == 1 and self.do())


def rank(): return int(os.environ.get("RANK", 0))


def decide(what):
    if what is True: return True
    raise what


def decisions():
    """Cancel exceptions of all levels, and True, at each event on one process: all hear the same events of training."""
    cases = []
    for event in ("begin_fit", "begin_epoch", *BATCH, "begin_validate", "after_epoch"):
        if event == "after_cancel_batch": continue
        cases += [(event, CancelTrainException), (event, True)]
        if event not in ("begin_fit", "after_epoch"): cases.append((event, CancelEpochException))
        if event in BATCH and event != "after_batch": cases.append((event, CancelBatchException))
    found = {}
    for i, (event, what) in enumerate(cases):
        at, learn = At(event, 8 if i % 2 and event in BATCH else 1, partial(decide, what)), learner(13, 5)
        run = Runner([AvgStatsCallback(accuracy, quiet=True), at, Distributed()])
        run.fit(2, learn)
        trained = [e for e, in_train in at.heard if in_train or e not in BATCH]
        found[event, getattr(what, "__name__", "True")] = {**told(run, learn), "heard": trained}
    for step in STEPS:
        run, learn = Runner([AvgStatsCallback(accuracy, quiet=True), InStep(step), Distributed()]), learner(13, 5)
        run.fit(2, learn)
        found[step, "in training"] = told(run, learn)
    for name, own in (("parts", True), ("batches", False)):
        learn, (x, y) = learner(13, 5), images(7, 1)
        learn.data.valid_dl = shard_loader([(x, y)] * 3, parts=True) if own else [(x, y)] * 3
        run = Runner([AvgStatsCallback(accuracy, quiet=True), InValidation(), Distributed()])
        run.fit(2, learn)
        found[name, "in validation"] = told(run, learn)
    return found


class InStep(Callback):
    """Leaves the fit on rank 1 from within a step of training."""

    def __init__(self, step): setattr(self, step, self.leave)

    def leave(self, inner):
        inner()
        if self.in_train and self.n_iter == 1 and rank() == 1: raise CancelTrainException


class InValidation(Callback):
    """Leaves the fit on rank 1 in the middle of a pass over the validation's batches."""

    def around_pass(self, batches):
        for i, batch in enumerate(batches):
            if not self.in_train and i == 1 and rank() == 1: raise CancelTrainException
            yield batch




class Spoilt(Callback):
    """Gives rank 1 a batch with NaN in training step `at`."""

    def __init__(self, at): self.at = at

    def begin_batch(self):
        if self.in_train and self.n_iter == self.at and rank() == 1: self.run.xb = self.xb * torch.nan


def diverged():
    stop, learn = TerminateOnNonFinite("record.pt"), learner()
    run = Runner([AvgStatsCallback(quiet=True), Spoilt(3), stop, Distributed()])
    run.fit(2, learn)
    record = run.terminate_on_non_finite.record
    return {**told(run, learn), "report": record["report"], "rows": len(record["rows"])}


class Failing(Callback):
    """Fails on rank 1 at some place."""

    def __init__(self, where): self.where, self.ended = where, False

    def __call__(self, event):
        if event == "after_fit": self.ended = True
        if event == self.where and rank() == 1 and self.run.epoch == 1: raise KeyError("bad label")

    def predict(self, inner):
        inner()
        if self.where == "predict" and rank() == 1 and self.run.epoch == 1: raise KeyError("bad label")

    def around_pass(self, batches):
        for i, batch in enumerate(batches):
            if (self.where == "batches" and self.in_train) or (self.where == "validation" and not self.in_train):
                if i == 1 and rank() == 1 and self.run.epoch == 1: raise KeyError("bad label")
            yield batch


def failures():
    """An exception on one process ends all, which can begin anew."""
    found = {}
    for where in ("begin_epoch", "begin_batch", "predict", "after_loss", "after_backward", "after_step", "after_batch",
                  "begin_validate", "batches", "validation", "after_epoch"):
        failing, learn = Failing(where), learner()
        run = Runner([AvgStatsCallback(accuracy, quiet=True), Recorder(), failing, Distributed()])
        begun = time.monotonic()
        try: run.fit(3, learn)
        except Exception as e:
            causes = []
            while e is not None:
                causes.append(f"{type(e).__name__}: {e}")
                e = e.__cause__
            found[where] = {"errors": causes, "status": run.status, "ended": failing.ended,
                            "losses": len(run.recorder.losses), "seconds": time.monotonic() - begun,
                            "alone": run.ranks.size == 1}
    return {"failures": found, "anew": fitted(1, learner())}


def refused():
    """What can't be shared, or doesn't fit, is an error on every process."""
    x, y = images(23)
    ds = TensorDataset(x, y)

    def error(do):
        try: do()
        except Exception as e: return f"{type(e).__name__}: {e}", [*getattr(e, "__notes__", ())]

    def fit(dl, model=None, cb=None):
        learn = learner(model=model)
        learn.data.train_dl = dl
        Runner([cb or Distributed()]).fit(1, learn)
    used = Distributed()
    used.size = 5
    return {
        "sampler": error(lambda: fit(DataLoader(ds, 5, sampler=Reversed(23)))),
        "iterable": error(lambda: fit(Anew([(x, y)]))),
        "no image": error(lambda: fit([(x[:1], y[:1])], network(BatchNorm))),
        "size": error(lambda: fit([(x, y)], cb=used)),
        "replaced": error(lambda: Runner([Doubled(), Distributed()]).fit(1, learner(21, 5))),
        "another's sampler": error(lambda: fit(DataLoader(ds, 5, sampler=DistributedSampler(ds, 7, 2)))),
        "callbacks": error(lambda: Runner([Distributed(), *[Loud()] * rank()]).fit(1, learner())),
        "epochs": error(lambda: Runner([Distributed()]).fit(1 + rank(), learner())),
        "own data": error(lambda: fit([(x, y)] * (1 + rank()))),
        "shared already": error(lambda: (fitted(1, learner()), fit([(x, y)], nn.parallel.DistributedDataParallel(
            network())))),
        "fewer batches": error(lambda: fit(shard_loader([(x, y)] * (1 - rank()), parts=True))),
    }


def parts():
    """Batches that are each process's own, of any size and number: weights of all, and what the histories count."""
    x, y = images(23)
    cuts = {0: ((0, 3), (3, 4), (4, 9)), 1: ((9, 14), (14, 16))}[rank()]
    learn = learner()
    learn.data.train_dl = shard_loader([(x[a:b], y[a:b]) for a, b in cuts], parts=True)
    found = fitted(2, learn)
    ds = TensorDataset(x, y)
    learn = learner()
    learn.data.train_dl = DataLoader(ds, 2, sampler=DistributedSampler(ds, seed=4))
    return {"parts": found, "sampled": fitted(2, learn)}


def whole_of_parts():
    """What `parts` is on one process."""
    x, y = images(23)
    rows = ([*range(0, 3), *range(9, 14)], [3, 14, 15], [*range(4, 9)])
    learn = learner()
    learn.data.train_dl = [(x[i], y[i]) for i in rows]
    return {"parts": fitted(2, learn)}


class Drawn(Callback):
    """Keeps what each process draws, and which images it had."""

    def __init__(self): self.drawn, self.images = [], []

    def after_pred(self):
        self.images += self.xb[:, 0, 0, 0].tolist()
        self.drawn.append(float(torch.rand(())))


def randomness():
    drawn, learn = Drawn(), learner(model=network(dropout=0.5))
    run = Runner([drawn, Distributed()])
    run.fit(2, learn)
    return {**told(run, learn), "drawn": drawn.drawn, "images": drawn.images}


def experiment():
    """The command as torchrun starts it, or alone: its processes share the arms."""
    import experiments.__main__ as command
    argv = ["small-batch", "--data", "digits", "--limit", "30", "--norms", "BatchNorm", "GroupNorm", "RunningBatchNorm",
            "--seeds", "2", "--out", f"experiment of {os.environ.get('WORLD_SIZE', 1)}"]
    if "WORLD_SIZE" in os.environ: os.environ["TORCHELASTIC_RUN_ID"] = "a test's"
    try: return command.main([*argv, *([] if "WORLD_SIZE" in os.environ else ["--jobs", "1"])])
    finally: os.environ.pop("TORCHELASTIC_RUN_ID", None)


def on_gpu(): return fitted(2, learner(model=network().float()), InFloat(), CudaCallback())


# --- checkpoints --------------------------------------------------------------------------------------------------

class Stop(Callback):
    """Ends the fit after some training batches as a killed process does, as far as its files are concerned."""

    _order = 20_000

    def __init__(self, at): self.at, self.seen = at, 0

    def begin_batch(self):
        self.seen += self.in_train
        if self.seen > self.at: raise KeyboardInterrupt


def going_on(epochs, folder, *cbs, dropout=0.0):
    learn = learner(model=network(dropout=dropout))
    run = Runner([AvgStatsCallback([accuracy, Spread()], quiet=True), Recorder(), Distributed(), AveragedWeights(0.9),
                  Checkpoint(folder, every_batches=1), *cbs])
    run.fit(epochs, learn, resume=folder)
    averages = run.averaged_weights.averaged_model.module
    return {**told(run, learn), "averages": [t.clone() for t in averages.parameters()]}


def interrupted():
    """Fits that ended after some batches, in a folder of each, and one that didn't."""
    whole = going_on(3, Path("whole"), dropout=0.5)
    for at in (3, 7):
        try: going_on(3, Path(f"at {at}"), Stop(at), dropout=0.5)
        except (KeyboardInterrupt, DistributedError): pass
        try: going_on(3, Path(f"plain {at}"), Stop(at))
        except (KeyboardInterrupt, DistributedError): pass
    return {"whole": whole, "plain": going_on(3, Path("whole, plain"))}


def resumed(): return {at: going_on(3, Path(f"at {at}"), dropout=0.5) for at in (3, 7)}


def resumed_plain(): return {at: going_on(3, Path(f"plain {at}")) for at in (3, 7)}


# --- what is written ----------------------------------------------------------------------------------------------

class Killed(Callback):
    """Kills rank 1's process in the middle of an epoch, once."""

    _order = 20_000

    def begin_batch(self):
        mark = Path(f"killed {self.n_iter}")
        if self.in_train and rank() == 1 and self.n_iter == 8 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def killed():
    """A script for torchrun."""
    torch.set_num_threads(1)
    found = going_on(3, Path("runs"), Killed(), dropout=0.5)
    if not rank(): torch.save(found, "found.pt")


def looked_at():
    """What probes say of whose images they see."""
    stats = ActivationStats(nn.Conv2d), ParameterStats(), NormStats()
    fitted(1, learner(9, 4), *stats)
    return {type(cb).__name__: cb.sees for cb in stats}


class Loud(Callback):
    def after_epoch(self): print(f"rank {rank()} speaks")


def written():
    learn = learner()
    run = Runner([AvgStatsCallback(accuracy), ProgressCallback(), CSVLogger("history.csv"), KeepBest(path="best.pt"),
                  Loud(), CPUBackendCallback(), Distributed()])
    run.fit(2, learn)
    return told(run, learn)
