"""`Checkpoint` and `fit(..., resume=)`: a fit that is broken off goes on to the bit, whatever lives in it."""

import copy
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import runner
from norms import BatchNorm, RunningBatchNorm
from runner import (
    SGD,
    AvgStatsCallback,
    Callback,
    CancelTrainException,
    Checkpoint,
    CheckpointError,
    ClosureStep,
    DataBunch,
    Dataset,
    EarlyStopping,
    KeepBest,
    Learner,
    Optimizers,
    ParamScheduler,
    Recorder,
    Runner,
    accuracy,
    get_dls,
    sched_cos,
)

EPOCHS, BATCHES = 3, 6


class Stop(Callback):
    """Breaks the fit off at the beginning of its `at`-th training batch."""

    _order = -50

    def __init__(self, at): self.left = at

    def begin_batch(self):
        if not self.run.in_train: return
        if not self.left: raise KeyboardInterrupt
        self.left -= 1


# --- models in which something lives --------------------------------------------------------------------------------

def plain(): return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


def conv(norm):
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(16, 3))


class Noisy(nn.Module):
    """Adds noise that lessens from step to step: from a generator and by a counter of its own; buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.net, self.generator, self.step = plain(), torch.Generator().manual_seed(3), 0
        self.python, self.numpy = random.Random(7), np.random.default_rng(5)
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)
        self.register_buffer("queue", torch.zeros(0))
        self.register_buffer("later", None)
        self.seen, self.hidden, self.plan = [], None, object()

    def forward(self, x):
        out = self.net(x)
        if not self.training: return out + self.unsaved
        self.step += 1
        noise = torch.rand(out.shape, generator=self.generator) * self.python.random() * self.numpy.random()
        self.unsaved.lerp_(out.detach().mean(0), 0.1)
        self.queue = torch.cat((self.queue, out.detach()[:1, 0]))[-5:]
        self.later = out.detach().clone() if self.later is None else self.later + out.detach().mean()
        self.hidden = out.detach() if self.hidden is None else self.hidden.mean() + out.detach()
        self.seen = [*self.seen[-3:], float(out.detach().mean())]
        if self.step == 4: self.register_buffer("added", torch.full((2,), self.step * 1.0))
        extra = getattr(self, "added", torch.zeros(1)).sum() + self.queue.sum() + self.hidden.mean() + sum(self.seen)
        return out * (1 + 0.001 * extra) + noise / self.step


class Carried(nn.Module):
    """A recurrent net that goes on from the state that the last batch has left."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head, self.state = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3), torch.zeros(1, 1, 5)

    def forward(self, x):
        out, state = self.rnn(x.flatten(1, 2), self.state.expand(1, len(x), 5).contiguous())
        if self.training: self.state = state.detach().mean(1, keepdim=True)
        return self.head(out[:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.b.weight = self.a.weight
        self.counts = {"calls": 0, "last": torch.zeros(())}

    def forward(self, x):
        self.counts["calls"] += 1
        self.counts["last"] = x.mean()
        return self.head(self.b(self.a(x.flatten(1)).relu())) + self.counts["calls"] / 100


class Extra(nn.Module):
    """Its state is an object, which `get_extra_state` gives as numbers."""

    def __init__(self):
        super().__init__()
        self.net, self.state = plain(), type("State", (), {"n": 0})()

    def get_extra_state(self): return {"n": torch.tensor(self.state.n)}

    def set_extra_state(self, state): self.state.n = int(state["n"])

    def forward(self, x):
        self.state.n += self.training
        return self.net(x) * (1 + self.state.n / 50)


class Loss(nn.Module):
    """A loss with a weight and a running mean."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, pred, yb):
        loss = F.cross_entropy(pred * self.scale, yb)
        if self.training: self.mean.lerp_(loss.detach(), 0.2)
        return loss + 0.1 * self.mean


class Unfreeze(Callback):
    """Adds the frozen first layer to the optimizer in mid-fit."""

    def begin_fit(self): self.model[1].requires_grad_(False)

    def begin_batch(self):
        if self.run.in_train and self.run.epoch == 1 and self.run.n_iter == BATCHES + 2:
            self.model[1].requires_grad_(True)
            self.opt.add_param_group({"params": [*self.model[1].parameters()], "lr": 0.01})


class Cancels(Callback):
    """Cancels some batches after the backward pass, so that their gradients stay, and ends some epochs early."""

    def after_backward(self):
        if self.run.n_iter % 4 == 2 and self.run.epoch != 1: raise runner.CancelBatchException

    def begin_batch(self):
        if self.run.in_train and self.run.epoch == 1 and self.run.n_epochs > 1.6: raise runner.CancelEpochException


class Draws(Callback):
    """Mixes noise into the batch, from torch's, Python's and numpy's own sources."""

    def begin_batch(self):
        if self.run.in_train:
            self.run.xb = self.run.xb * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand()) * torch.randn(1)


def adam(m, loss): return torch.optim.Adam(m.parameters(), 0.01)


def rest_of_layers(m, loss): return SGD([{"params": [*m[3].parameters()]}], lr=0.05, momentum=0.9)


# model, optimizer of model and loss, loss, callbacks, settings of the runner
PROGRAMS = {
    "SGD": (plain, lambda m, loss: torch.optim.SGD(m.parameters(), 0.1)),
    "runner.SGD": (plain, lambda m, loss: SGD(m.parameters(), 0.1)),
    "momentum": (plain, lambda m, loss: SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "Adam": (plain, adam),
    "AMSGrad": (plain, lambda m, loss: torch.optim.AdamW(m.parameters(), 0.01, amsgrad=True)),
    "Adagrad": (plain, lambda m, loss: torch.optim.Adagrad(m.parameters(), 0.05)),
    "RMSprop": (plain, lambda m, loss: torch.optim.RMSprop(m.parameters(), 0.01, momentum=0.5, centered=True)),
    "ASGD": (plain, lambda m, loss: torch.optim.ASGD(m.parameters(), 0.05)),
    "Rprop": (plain, lambda m, loss: torch.optim.Rprop(m.parameters(), 0.01)),
    "LBFGS": (plain, lambda m, loss: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=3), None, lambda: [ClosureStep()]),
    "a rate that is a tensor": (plain, lambda m, loss: torch.optim.Adam(m.parameters(), torch.tensor(0.01))),
    "several optimizers": (plain, lambda m, loss: Optimizers(a=SGD(m[1].parameters(), 0.1, momentum=0.9),
                                                             b=torch.optim.Adam(m[3].parameters(), 0.01))),
    "RunningBatchNorm": (lambda: conv(RunningBatchNorm), adam),
    "RunningBatchNorm, averaged backward": (lambda: conv(lambda nf: RunningBatchNorm(nf, average_backward=True)), adam),
    "BatchNorm": (lambda: conv(BatchNorm), adam),
    "noise, counters, buffers": (Noisy, adam),
    "a carried state": (Carried, adam),
    "many groups": (lambda: nn.Sequential(nn.Flatten(), *(nn.Linear(16, 16) for _ in range(16)), nn.Linear(16, 3)),
                    lambda m, loss: SGD([{"params": [p]} for p in m.parameters()], lr=0.01, momentum=0.9)),
    "tied weights": (Tied, adam),
    "an extra state": (Extra, adam),
    "a loss with weights": (plain, lambda m, loss: SGD([*m.parameters(), *loss.parameters()], 0.1, momentum=0.9), Loss),
    "lazy layers": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)),
                    lambda m, loss: SGD(m.parameters(), 0.1, momentum=0.9)),
    "a group added later": (plain, rest_of_layers, None, lambda: [Unfreeze(), ParamScheduler("lr", sched_cos(1, 0.1),
                                                                                            relative=True)]),
    "cancelled batches and epochs": (plain, lambda m, loss: SGD(m.parameters(), 0.1, momentum=0.9), None,
                                     lambda: [Cancels()]),
    "draws": (plain, adam, None, lambda: [Draws()]),
    "schedule": (plain, lambda m, loss: SGD(m.parameters(), 0.1, momentum=0.9), None,
                 lambda: [ParamScheduler("lr", sched_cos(0.3, 0.01)), ParamScheduler("momentum", sched_cos(0.9, 0.5))]),
}


def build(name="SGD", folder=None, seed=0, items=22, bs=4, cbs=(), **settings):
    """Learner and runner of a program, built anew as a script would."""
    model, optimizer, loss, callbacks = (*PROGRAMS[name], None, None)[:4]
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    x, y = torch.randn(items + 8, 1, 4, 4), torch.arange(items + 8) % 3
    dls = get_dls(Dataset(x[:items], y[:items]), Dataset(x[items:], y[items:]), bs)
    model, loss = model(), F.cross_entropy if loss is None else loss()
    learn = Learner(model, optimizer(model, loss), loss, DataBunch(*dls, 3))
    settings = {"every_batches": 1, **settings}
    run = Runner([AvgStatsCallback(accuracy, quiet=True), Recorder(), *(callbacks() if callbacks else ()), *cbs,
                  *([Checkpoint(folder, **settings)] if folder else ())])
    return learn, run


def interrupted(at, name, folder, epochs=EPOCHS, **kwargs):
    """Learner and runner of a fit that was broken off at its `at`-th batch, if it has so many."""
    learn, run = build(name, folder, **kwargs)
    try: run.fit(epochs, learn, cbs=Stop(at))
    except KeyboardInterrupt: pass
    return learn, run


def resumed(name, folder, epochs=EPOCHS, source=None, strict=True, **kwargs):
    learn, run = build(name, folder, **kwargs)
    if [*folder.iterdir()]: scramble()
    run.fit(epochs, learn, resume=folder if source is None else source, strict=strict)
    return learn, run


def scramble():
    """A process that goes on has drawn other numbers before."""
    torch.manual_seed(random.SystemRandom().randrange(2 ** 31))
    random.seed()
    np.random.seed()


def everything(learn, run):
    """All that a fit has left behind, the times aside."""
    grads = {k: p.grad for k, p in learn.model.named_parameters()} if isinstance(learn.model, nn.Module) else {}
    kept = {k: v for m in learn.model.modules() for k, v in vars(m).items()
            if isinstance(v, (int, float, torch.Tensor, list)) and not k.startswith("_flat_weight")}
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in run.avg_stats.history]
    generators = [m.generator.get_state() for m in learn.model.modules() if hasattr(m, "generator")]
    return {
        "model": learn.model.state_dict(), "buffers": dict(learn.model.named_buffers()), "kept": kept, "grads": grads,
        "loss": learn.loss_func.state_dict() if isinstance(learn.loss_func, nn.Module) else None,
        "requires grad": [p.requires_grad for p in learn.model.parameters()],
        "optimizer": learn.opt.state_dict(), "history": history, "rows": [*run.recorder.rows], "lrs": run.recorder.lrs,
        "status": run.status, "n_iter": run.n_iter, "n_epochs": run.n_epochs, "epoch": run.epoch,
        "past": [run.recorder.past_epochs, run.recorder.past_steps], "generators": generators,
        "random": [torch.get_rng_state(), random.getstate(), [*np.random.get_state()]]}


def same(a, b, where=""):
    """Asserts that two nests are equal to the bit; an error says where they aren't."""
    if isinstance(a, torch.Tensor):
        alike = torch.equal(a, b) or bool((a.isnan() & b.isnan() | (a == b)).all())
        assert alike, where
    elif isinstance(a, np.ndarray): assert (a == b).all(), where
    elif isinstance(a, dict):
        assert [*a] == [*b], f"{where}: {[*a]}, {[*b]}"
        for k in a: same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{where}: {len(a)}, {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)): same(x, y, f"{where}[{i}]")
    else: assert a == b or (a != a and b != b), f"{where}: {a}, {b}"


# --- to the bit -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fit_that_was_broken_off_ends_as_if_it_had_not_been(name, tmp_path):
    torch.manual_seed(0)
    learn, run = build(name)
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    moments = random.Random(name).sample(range(EPOCHS * BATCHES + 1), 2)
    for at in moments:
        interrupted(at, name, tmp_path / str(at))
        same(everything(*resumed(name, tmp_path / str(at))), want, f"{name}, broken off at batch {at}: ")


def test_a_fit_that_is_broken_off_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    name, draw = "noise, counters, buffers", random.Random(1)
    learn, run = build(name)
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    for i in range(40):
        learn, run = build(name, tmp_path, every_epochs=draw.choice((1, None)), every_batches=draw.choice((1, 2, 3, 5)))
        if i and [*tmp_path.iterdir()]: scramble()
        try: run.fit(EPOCHS, learn, resume=tmp_path, cbs=Stop(draw.randrange(1, 6)))
        except KeyboardInterrupt: continue
        break
    assert i > 3
    same(everything(learn, run), want)


@pytest.mark.parametrize("name", ["runner.SGD", "momentum", "Adam", "RunningBatchNorm"])
def test_n_epochs_and_n_more_are_2n_epochs(name, tmp_path):
    learn, run = build(name)
    run.fit(4, learn)
    want = everything(learn, run)
    learn, run = build(name, tmp_path, every_batches=None)
    run.fit(2, learn)
    same(everything(*resumed(name, tmp_path, 4, every_batches=None)), want)


def test_a_learner_that_was_trained_meanwhile_goes_on_all_the_same(tmp_path):
    learn, run = build("momentum")
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    learn, run = build("momentum", tmp_path)
    with pytest.raises(KeyboardInterrupt): run.fit(EPOCHS, learn, cbs=Stop(9))
    run.fit(EPOCHS, learn, resume=tmp_path)         # the same objects, as in a notebook
    same(everything(learn, run), want)


def test_a_checkpoint_changes_nothing_in_the_fit(tmp_path):
    ends = []
    for folder in (None, tmp_path):
        learn, run = build("draws", folder)
        run.fit(EPOCHS, learn)
        ends.append(everything(learn, run))
    same(*ends)


def test_a_second_fit_goes_on_in_the_middle_and_its_history_with_the_first_ones(tmp_path):
    def script(folder=None, stop=None):
        learn, run = build("momentum", folder and folder / "first")
        run.fit(2, learn, **({"resume": folder / "first"} if folder else {}))
        cbs = [Checkpoint(folder / "second", every_batches=1)] if folder else []
        if folder: run.cbs = [cb for cb in run.cbs if not isinstance(cb, Checkpoint)]
        if folder: del run.checkpoint
        run.fit(2, learn, cbs=[*cbs, *([Stop(stop)] if stop is not None else [])],
                **({"resume": folder / "second"} if folder else {}))
        return learn, run
    want = everything(*script())
    with pytest.raises(KeyboardInterrupt): script(tmp_path, 8)
    scramble()
    same(everything(*script(tmp_path)), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype, tmp_path):
    PROGRAMS["dtype"] = (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(dtype), adam,
                         lambda: lambda pred, yb: F.cross_entropy(pred.float(), yb), lambda: [To(dtype)])
    learn, run = build("dtype")
    run.fit(EPOCHS, learn)
    interrupted(8, "dtype", tmp_path)
    same(everything(*resumed("dtype", tmp_path)), everything(learn, run))


class To(Callback):
    def __init__(self, dtype): self.dtype = dtype

    def begin_batch(self): self.run.xb = self.run.xb.to(self.dtype)


# --- where a fit goes on ----------------------------------------------------------------------------------------------

class Sees(Callback):
    """Which images the training batches have, as they are fetched."""

    _order = -100

    def __init__(self): self.seen = []

    def begin_batch(self):
        if self.run.in_train: self.seen.append((self.run.epoch, self.run.xb[:, 0, 0, 0].tolist()))


class Counted(Dataset):
    """A data set that remembers which items were fetched."""

    def __init__(self, ds):
        super().__init__(ds.x, ds.y)
        self.fetched = []

    def __getitem__(self, i):
        self.fetched.append(i)
        return super().__getitem__(i)


def test_it_goes_on_at_the_right_image_and_fetches_none_before(tmp_path):
    def fit(cbs, folder=None, **kwargs):
        learn, run = build("SGD", folder)
        ds = Counted(learn.data.train_ds)           # item by item, as any class of one's own
        learn.data = DataBunch(*get_dls(ds, learn.data.valid_ds, 4), 3)
        with pytest.raises(KeyboardInterrupt) if isinstance(cbs[-1], Stop) else nullcontext():
            run.fit(EPOCHS, learn, cbs=cbs, **kwargs)
        return ds.fetched
    sees = Sees()
    fetched = fit([sees])
    for at in (3, BATCHES, BATCHES + 2):
        fit([Stop(at)], folder := tmp_path / str(at))
        scramble()
        again = fit([rest := Sees()], folder, resume=folder)
        assert rest.seen == sees.seen[at:]
        assert again == fetched[-len(again):]
        assert len(again) == sum(len(xs) for _, xs in rest.seen)


def test_a_complete_fit_returns_at_once_with_its_history_and_its_weights(tmp_path, capsys):
    def cbs(): return [KeepBest("train_loss", mode="max"), Sees()]      # the worst, which is not the last
    learn, run = build("Adam", tmp_path, cbs=cbs())
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    learn, run = resumed("Adam", tmp_path, cbs=cbs())
    assert run.sees.seen == []
    same(everything(learn, run), want)
    assert "the fit was complete" in capsys.readouterr().out


def test_a_fit_that_a_callback_ended_is_complete(tmp_path, capsys):
    def cbs(): return [EarlyStopping("train_loss", patience=1, mode="max"), Sees()]
    learn, run = build("Adam", tmp_path, cbs=cbs())
    run.fit(9, learn)
    assert run.status == "cancelled"
    want, stopped = everything(learn, run), run.early_stopping.stopped_epoch
    for epochs in (9, 20):
        learn, run = resumed("Adam", tmp_path, epochs, cbs=cbs())
        assert run.sees.seen == []
        assert run.early_stopping.stopped_epoch == stopped
        same(everything(learn, run), want)


class Leaves(Callback):
    """Leaves the fit at a batch, or in an `after_epoch`; or doesn't."""

    def __init__(self, at=None, epoch=None): self.at, self.at_epoch, self.batches = at, epoch, 0

    def after_backward(self):
        self.batches += 1
        if self.run.n_iter == self.at: raise CancelTrainException

    def after_epoch(self):
        if self.run.epoch == self.at_epoch: raise CancelTrainException


@pytest.mark.parametrize("where", [{"at": 8}, {"at": 0}, {"epoch": 1}], ids=str)
def test_a_fit_that_a_callback_left_is_left_again_or_goes_on(where, tmp_path):
    ends = []
    for cb in (Leaves(**where), Leaves()):
        learn, run = build("momentum", cbs=[cb])
        run.fit(EPOCHS, learn)
        ends.append(everything(learn, run))
    learn, run = build("momentum", tmp_path, cbs=[Leaves(**where)])
    run.fit(EPOCHS, learn)
    assert run.status == "cancelled"
    same(everything(learn, run), ends[0])
    again = build("momentum", tmp_path, cbs=[Leaves(**where)])
    again[1].fit(EPOCHS, again[0], resume=tmp_path)
    assert again[1].leaves.batches <= BATCHES
    same(everything(*again), ends[0])
    on = build("momentum", tmp_path, cbs=[Leaves()])
    on[1].fit(EPOCHS, on[0], resume=tmp_path)
    same(everything(*on), ends[1])


@pytest.mark.parametrize("source", [True, 3, None, ["a"]])
def test_what_is_no_path_is_told(source):
    learn, run = build("SGD")
    if source is None: run.fit(1, learn, resume=None)
    else:
        with pytest.raises(TypeError, match=r"resume is .*must be the path of a checkpoint"):
            run.fit(1, learn, resume=source)


def test_fewer_epochs_than_were_done_are_an_error(tmp_path):
    interrupted(2 * BATCHES + 2, "SGD", tmp_path)
    for epochs in (1, 2):
        learn, run = build("SGD", tmp_path)
        with pytest.raises(CheckpointError, match=r"written in epoch 3, and the fit is to have .*: give at least 3"):
            run.fit(epochs, learn, resume=tmp_path)


def test_a_schedule_over_other_epochs_is_another_run(tmp_path):
    interrupted(2, "schedule", tmp_path)
    learn, run = build("schedule", tmp_path)
    with pytest.raises(CheckpointError, match=r"epochs of a schedule 3, now 5"): run.fit(5, learn, resume=tmp_path)
    with pytest.warns(RuntimeWarning, match="epochs of a schedule"):
        run.fit(5, learn, resume=tmp_path, strict=False)


def test_validation_that_was_broken_off_is_done_anew(tmp_path):
    class StopsInValidation(Callback):
        def begin_batch(self):
            if not self.run.in_train and self.run.epoch == 1: raise KeyboardInterrupt

    learn, run = build("RunningBatchNorm")
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    learn, run = build("RunningBatchNorm", tmp_path)
    with pytest.raises(KeyboardInterrupt): run.fit(EPOCHS, learn, cbs=StopsInValidation())
    same(everything(*resumed("RunningBatchNorm", tmp_path)), want)


def test_seconds_are_summed_over_the_parts(tmp_path):
    import time

    class Slow(Callback):
        def after_batch(self):
            if self.run.in_train: time.sleep(0.05)

    learn, run = build("SGD", tmp_path)
    with pytest.raises(KeyboardInterrupt): run.fit(1, learn, cbs=[Slow(), Stop(4)])
    learn, run = build("SGD", tmp_path)
    run.fit(1, learn, cbs=Slow(), resume=tmp_path)
    assert run.avg_stats.history[0]["seconds"] > BATCHES * 0.05


def test_a_search_for_a_rate_writes_nothing_and_can_not_be_resumed(tmp_path):
    learn, run = build("SGD", tmp_path)
    run.find_lr(learn, max_iter=5)
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(CheckpointError, match="LR_Find"):
        run.fit(1, learn, cbs=runner.LR_Find(5), resume=tmp_path)


def test_a_callback_of_ones_own_goes_on_by_its_state(tmp_path):
    class Sum(Callback):
        def __init__(self): self.total, self.array, self.order = 0.0, np.zeros(3), {1, 2}

        def after_batch(self):
            if not self.run.in_train: return
            self.total += float(self.run.loss.detach())
            self.array[self.run.n_iter % 3] += 1

        def state_dict(self): return {"total": np.float64(self.total), "array": self.array, "set": self.order}

        def load_state_dict(self, state): self.total, self.array, self.order = state.values()

    learn, run = build("SGD", cbs=[Sum()])
    run.fit(EPOCHS, learn)
    interrupted(8, "SGD", tmp_path, cbs=[Sum()])
    other = resumed("SGD", tmp_path, cbs=[Sum()])[1]
    assert other.sum.total == run.sum.total
    assert (other.sum.array == run.sum.array).all()
    assert isinstance(other.sum.array, np.ndarray)
    assert other.sum.order == {1, 2}


def test_compiled_steps_go_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.compiled.CompiledStep, "backend", "aot_eager")       # code is generated elsewhere

    def script(folder=None, at=None, **kwargs):
        torch.manual_seed(0)
        learn, run = build("RunningBatchNorm", items=24)
        run = Runner([AvgStatsCallback(accuracy, quiet=True), Recorder(),
                      *([Checkpoint(folder, every_batches=1)] if folder else [])], compile=True)
        try: run.fit(2, learn, cbs=Stop(at) if at is not None else None, **kwargs)
        except KeyboardInterrupt: pass
        return learn, run
    try: runner.compiled.require_compiler()
    except runner.CompileError as e: pytest.skip(str(e))
    want = everything(*script())
    script(tmp_path, 8)
    same(everything(*script(tmp_path, resume=tmp_path)), want)


class Asks(Callback):
    """Asks for a checkpoint in an event, and takes down how the fit was when it was written."""

    _order = 20_000

    def __init__(self, event, at): self.event, self.at, self.asked, self.was = event, at, False, None

    def __call__(self, event):
        if self.was is None and self.asked and self.run.checkpoint.path is not None:
            self.was = self.held = torch.load(self.run.checkpoint.path, weights_only=True)
        if event == self.event and self.run.n_iter >= self.at and not self.asked:
            self.run.checkpoint.request()
            self.asked = True


@pytest.mark.parametrize("event", ["begin_batch", "after_loss", "after_batch", "begin_validate", "begin_epoch",
                                   "after_epoch"])
def test_a_checkpoint_that_was_asked_for_is_written_when_the_batch_or_the_epoch_is_over(event, tmp_path):
    learn, run = build("momentum")
    run.fit(EPOCHS, learn)
    want = everything(learn, run)
    learn, run = build("momentum", tmp_path, every_batches=None, every_epochs=9)
    at = 0 if event == "begin_epoch" else BATCHES if event in ("begin_validate", "after_epoch") else 3
    run.fit(EPOCHS, learn, cbs=(asks := Asks(event, at)))
    want_at = {"begin_epoch": (0, 1), "after_batch": (0, 3), "begin_validate": (1, None), "after_epoch": (1, 1)}
    assert (asks.held["epoch"], asks.held["batch"]) == want_at.get(event, (0, 4))
    source = min(tmp_path.iterdir())
    same(everything(*resumed("momentum", tmp_path, source=source, every_batches=None, every_epochs=9)), want)


def test_what_is_written_is_the_state_at_that_moment(tmp_path):
    """And not memory that training goes on writing into."""
    learn, run = build("momentum", tmp_path, every_batches=None)
    taken = []

    class Takes(Callback):
        _order = 20_000

        def after_epoch(self): taken.append((self.run.checkpoint.path, copy.deepcopy(everything(learn, run))))

    run.fit(2, learn, cbs=Takes())
    path, was = taken[0]
    held = torch.load(path, weights_only=True)
    for name, p in was["model"].items(): assert torch.equal(held["learner"]["tensors"][name], p)
    assert (held["epoch"], held["batch"], held["n_iter"]) == (1, None, BATCHES)
