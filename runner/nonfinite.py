"""Where a run went wrong: `TerminateOnNonFinite` stops it and names the module; `replay` repeats the step.

While all is well the callback keeps a copy of what some steps start from, and looks at the loss. Nothing is hooked
until that is not finite. Then the last steps are done once more, on a copy of the model or, by `replay`, on a learner
built anew, with hooks on every module and on every operation of the backward pass.
"""

import copy
import math
import numbers
import os
import platform
from collections import deque
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import IterableDataset

from runner.backend import use_backend, without_hooks
from runner.core import Callback, CancelTrainException
from runner.repeat import Repeat, flaw, named, norms_of, params_of, parts_of, place
from runner.states import generators_of, random_state, random_states, set_random_state

EMPTY = {"tensors": ([], []), "moved": ([], [])}


class TerminateOnNonFinite(Callback):
    """Stops the fit when the loss or a gradient is NaN or infinite, and says where that began.

    `run.status` is then "diverged"; training and validation are watched. On a CPU the fit ends before the optimizer
    takes the step with the bad loss. One line is printed, such as

        diverged at step 12 (epoch 0): first non-finite value in the output of 2.1 GeneralRelu (forward, training),
        8 infinite of 64; the loss was 4.1e+30 one step before

    That is the first value in the order of computation that is not finite in this step and was in the last good one
    (a mask may hold -inf at every step): the batch, a module's output, a value that a module computes between its
    parts, the loss, a gradient (with the operation that it passes through, whichever module did that), a parameter
    after the optimizer's step. It is found by doing the step again on a copy of model, loss and optimizer, so their own
    hooks (which the copy leaves out), weights, gradients and random state stay as they are at the stop. With
    `compile=True` the copy runs uncompiled, and its losses differ by rounding.

    Args:
        path: a file for the record, written once by `torch.save`; None for none.
        keep: how many of the last batches the record lists.
        every: copy all that training changes every so many steps.
        grads: look at the gradients too, and stop before a bad one reaches the weights. Without, the loss of the step
            after it gives it away, and it is named all the same; that saves a few hundredths of a small network's step
            at batch size 2 (`python -m experiments bench hooks`).

    The steps since a copy are repeated, up to the failing one. On a CPU that one has its own weights and optimizer
    state, which it hasn't changed yet; so whatever callbacks did in the steps before (clipping, say), it repeats bit
    for bit, unless it depends on buffers that they had a part in, as RunningBatchNorm's. Such steps, and on other
    devices all steps that follow a changed one, repeat if `every` is 1; the report says so if they didn't.

    On another device than a CPU losses and norms of gradients stay there, and are brought to the host in one copy each
    `every` batches and at the end of a pass, for which the host waits; by then the optimizer has taken up to `every`
    bad steps. There a norm above 1.8e19, the root of the largest float32, counts as infinite too.

    `record`, None while all is well, holds tensors and plain Python values only and can be read by
    `torch.load(path, weights_only=True)`:

        report      the line above
        finding     {"phase": "start", "batch", "forward", "loss", "backward" or "step", "in_train", "epoch", "step",
                    "batch", "module": its path, "class", "what", "nan", "inf", "of": counts of values}, or None
        repeats     whether the repeated steps had the recorded losses bit for bit
        rows        the last `keep` batches: in_train, epoch, step (training batches done before), batch (in its pass),
                    loss, grad_norm (L2, all gradients; without `grads` of the repeated steps only), stepped (whether
                    the optimizer did), groups (each parameter group's lr, momentum, ...), indices
        indices     how the indices were found, and whether they are confirmed; or why there are none
        snapshots   up to three states that a training step or validation started from, the last before the failing
                    batch: tensors (parameters, buffers), modes, opt, grads (left by a cancelled step; None where
                    buffers and gradients follow from the snapshot before), steps (those since: xb and yb as the model
                    got them, random: torch's state, row)
        random      random states (torch, Python, numpy, loaders' generators) at the start of the pass
        settings, versions    oneDNN and threads; torch and Python

    The memory: two copies of parameters, buffers and optimizer state, and the batches since the older one, at most `2 *
    every`. The indices are drawn anew from the loader's sampler, after the failure, and compared by their targets with
    the batches that are kept; a loader without a sampler, and an `IterableDataset`, has none. A model that draws from
    Python's or numpy's generator, or counts in attributes, may not repeat itself; the report says so then. Leave the
    callback out of a search by `LR_Find`, which means to diverge.

    Raises:
        ValueError: at construction, a `keep` or `every` that is no positive integer; at the start of a fit, a path in
            a folder that doesn't exist.
    """

    _order = 1000   # after whatever changes the batch, the loss or the gradients

    def __init__(self, path=None, *, keep=20, every=20, grads=True):
        for name, n in (("keep", keep), ("every", every)):
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"TerminateOnNonFinite: {name} is {n!r}; it must be an integer of at least 1")
        self.path, self.keep, self.every, self.grads = path, keep, every, grads
        self.record = None
        self._clear()

    def _clear(self):
        self.rows, self.ring = deque(maxlen=self.keep), deque(maxlen=2)     # (row, its pass); snapshots
        self.unseen = []                                                    # rows whose figures lie on the device
        self.now = {"row": None, "batch": 0, "fresh": True}

    def begin_fit(self):
        if self.path is not None and not Path(self.path).absolute().parent.is_dir():
            raise ValueError(f"TerminateOnNonFinite: path is {os.fspath(self.path)!r} and its folder doesn't exist; "
                             "make the folder first, or give another path")
        self._clear()
        self.record, params = None, params_of(self.opt)
        self.device = params[0].device
        self.host = all(p.device.type == "cpu" for p in params)
        self.sound = not flaw(params)

    def begin_epoch(self): self._begin(self.data.train_dl)

    def begin_validate(self):
        self._look()
        if self.rows and self.sound and flaw(self.params):          # by the last step, whose loss nobody will see
            self.ring.append(self._snapshot())
            self._stop(self.rows[-1][0])
        self._begin(self.data.valid_dl)

    def _begin(self, dl):
        """Being the last to hear of a pass, keep the random states from which its order follows."""
        self._look()
        run = self.run
        self.modules, self.slots = parts_of(run.model, run.loss_func, run.opt)
        self.optimizer, self.params = run.opt, params_of(run.opt)
        # Persistent workers draw a seed for their first pass only.
        self.this = {"dl": dl, "random": random_state(generators_of(run.data.train_dl, run.data.valid_dl)),
                     "seeded": getattr(dl, "_iterator", None) is None}
        self.now.update(row=None, batch=0, fresh=True)

    def begin_batch(self):
        run, now = self.run, self.now
        full = now["fresh"] or len(self.ring[-1]["steps"]) >= self.every
        if full: self._look()
        if now["fresh"] or (full and run.in_train):
            self.ring.append(self._snapshot(self.ring.popleft() if len(self.ring) == 2 else EMPTY))
            now["fresh"] = False
        elif full or (self.host and not run.in_train): self.ring[-1]["steps"].clear()   # evaluation changes nothing
        now["row"] = row = {
            "in_train": run.in_train, "epoch": run.epoch, "step": run.n_iter, "batch": now["batch"], "loss": None,
            "grad_norm": None, "backward": False, "stepped": False, "groups": [*map(dict, self.optimizer.param_groups)]}
        random = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda": random["cuda"] = torch.cuda.get_rng_state_all()
        xb = run.xb.clone() if torch.is_tensor(run.xb) else run.xb  # the model may write into its input
        self.ring[-1]["steps"].append({"row": row, "xb": xb, "yb": run.yb, "random": random})
        self.rows.append((row, self.this))

    def after_loss(self):
        row, loss = self.now["row"], self.run.loss
        if self.host:
            row["loss"] = loss.item()
            if not math.isfinite(row["loss"]): self._stop(row)
        else:
            row["loss"] = loss.detach()
            self.unseen.append(row)

    def after_backward(self):
        row = self.now["row"]
        row["backward"] = True
        if not self.grads: return
        norms = norms_of(self.params)
        if self.host:
            row["grad_norm"] = math.hypot(*[n.item() for n in norms])
            # An infinite norm may be that of finite gradients, whose squares overflow.
            if not math.isfinite(row["grad_norm"]) and flaw([p.grad for p in self.params]): self._stop(row)
        elif norms: row["grad_norm"] = torch.linalg.vector_norm(torch.stack([n.to(self.device) for n in norms]))

    def after_step(self): self.now["row"]["stepped"] = True

    def after_cancel_batch(self):
        """Learn how far a batch came that an earlier callback cancelled: this one didn't hear of its last event."""
        row = self.now["row"]
        if row is None or not row["in_train"] or row["loss"] is None: return
        if row["backward"]: row["stepped"] = True
        elif any(p.grad is not None for p in self.params): self.after_backward()    # left to the next batch

    def after_batch(self): self.now.update(row=None, batch=self.now["batch"] + 1)

    def after_epoch(self): self._look()

    def after_fit(self): self._clear()

    # --- while all is well ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _snapshot(self, old=EMPTY):
        """A copy of what training changes, in the memory of an `old` one."""
        now = {name: t for name, (_, d, k) in self.slots.items() if (t := d[k]) is not None}
        state = {p: dict(s) for p, s in self.optimizer.state.items() if torch.is_tensor(p)}
        moved = [v for s in state.values() for v in s.values() if torch.is_tensor(v)]
        return {"names": list(now), "tensors": copies(list(now.values()), *old["tensors"]),
                "state": state, "moved": copies(moved, *old["moved"]),
                "modes": [m.training for m in self.modules.values()], "steps": [],
                "grads": {i: p.grad.clone() for i, p in enumerate(self.params) if p.grad is not None}}

    def _look(self):
        """Bring the losses and norms that lie on the device to the host, in one copy; stop at the first bad one."""
        waiting = [(row, k) for row in self.unseen for k in ("loss", "grad_norm") if torch.is_tensor(row[k])]
        self.unseen = []
        if not waiting: return
        values = torch.stack([row[k].to(self.device) for row, k in waiting]).tolist()
        for (row, k), value in zip(waiting, values, strict=True): row[k] = value
        for (row, _), value in zip(waiting, values, strict=True):
            if not math.isfinite(value): self._stop(row)

    # --- after a failure --------------------------------------------------------------------------------------

    def _stop(self, row):
        """Make the record of the failure at `row`, print its report, and leave the fit."""
        run = self.run
        run.status, self.unseen = "diverged", []
        while self.rows[-1][0] is not row: self.rows.pop()          # what came before anybody looked
        steps = self.ring[-1]["steps"]
        while steps and steps[-1]["row"] is not row: steps.pop()
        if self.host and row["in_train"] and len(steps) > 1 and not row["stepped"]:
            # Weights and optimizer are still what the step began with, the buffers and gradients no longer.
            snap = {**self._snapshot(), "grads": None, "steps": [steps.pop()]}
            now = dict(zip(snap["names"], snap["tensors"][1], strict=True))
            weights = {name: now[name] for name, (_, d, k) in self.slots.items() if isinstance(d[k], nn.Parameter)}
            self.ring = [*self.ring, {**snap, "names": list(weights), "tensors": (None, list(weights.values()))}]
        self.record = record = self._record()
        words = []
        restore = random_states()
        try:
            with without_hooks(run.model, run.loss_func):
                parts = copy.deepcopy((run.model, run.loss_func, run.opt))
            record["finding"], words = Repeat(*parts).run(record)
            record["repeats"] = not words
        # Whatever is in the way of a second look, the failure itself must be told.
        except Exception as e: words = [f"the step can't be repeated on a copy ({type(e).__name__}: {e})"]
        finally: restore()
        record["report"] = report(record, words)
        file = f"run.{self.name}.record" if self.path is None else os.fspath(self.path)
        print(f"{record['report']}; the record is in {file}", flush=True)
        if self.path is not None: torch.save(record, self.path)
        raise CancelTrainException

    def _record(self):
        """All that is kept, as tensors on the host and plain values, with the indices of the batches."""
        rows = [row for row, _ in self.rows]
        found = {id(this): draw_indices(this, self.run.data, [r for r, t in self.rows if t is this], self.ring)
                 for this in {id(this): this for _, this in self.rows}.values()}
        for row, this in self.rows:
            indices, _ = found[id(this)]
            row["indices"] = indices and indices[row["batch"]]
        kept = [step["row"] for snap in self.ring for step in snap["steps"]]        # some of the rows, or more
        for row in (*rows, *kept):
            for group in row["groups"]: group.pop("params", None)
        return plain({
            "report": "", "finding": None, "repeats": False, "rows": rows, "indices": found[id(self.rows[-1][1])][1],
            "snapshots": [self._opened(snap) for snap in self.ring], "random": self.this["random"],
            "optimizer": type(self.run.opt).__name__, "compiled": getattr(self.run, "_compiled", None) is not None,
            "settings": {"onednn": torch.backends.mkldnn.enabled, "threads": torch.get_num_threads()},
            "versions": {"torch": torch.__version__, "python": platform.python_version()}}, {})

    def _opened(self, snap):
        """A snapshot with everything under its name."""
        moved, index = iter(snap["moved"][1]), {p: i for i, p in enumerate(self.params)}
        state = {index[p]: {k: next(moved) if torch.is_tensor(v) else v for k, v in s.items()}
                 for p, s in snap["state"].items()}
        return {"tensors": dict(zip(snap["names"], snap["tensors"][1], strict=True)),
                "modes": dict(zip(self.modules, snap["modes"], strict=True)),
                "opt": {**self.run.opt.state_dict(), "state": state}, "grads": snap["grads"], "steps": snap["steps"]}


# --- the order of a pass ------------------------------------------------------------------------------------------

def draw_indices(this, data, rows, snapshots):
    """The indices of the batches of a pass, drawn anew up to the last of `rows`, or None; and a word on them.

    `this` is what the callback kept at the start of the pass. The loader draws a seed for its workers, then the sampler
    its order. The targets of the batches kept are compared with those that the data set has for the indices.
    """
    dl = this["dl"]
    sampler = getattr(dl, "sampler", None) if getattr(dl, "batch_sampler", None) is None else dl.batch_sampler
    if sampler is None: return None, f"none: the loader, a {type(dl).__name__}, has no sampler to draw them from"
    if isinstance(dl.dataset, IterableDataset): return None, "none: an IterableDataset has none"
    generators = generators_of(data.train_dl, data.valid_dl)
    now = random_state(generators)
    try:
        set_random_state(this["random"], generators)
        if this["seeded"]: torch.empty((), dtype=torch.int64).random_(generator=dl.generator)
        indices = list(islice(sampler, rows[-1]["batch"] + 1))
        kept = [step for snap in snapshots for step in snap["steps"] if any(step["row"] is row for row in rows)]
        for step in kept:
            batch = indices[step["row"]["batch"]]
            items = dl.dataset[batch] if dl.batch_sampler is None else [dl.dataset[i] for i in batch]
            targets = dl.collate_fn(items)[1]
            if not all(map(same_values, tree_leaves(targets), tree_leaves(step["yb"]))):
                return indices, ("drawn anew and not confirmed: the data set has other targets for them; a callback "
                                 "changes yb, or the loader's order doesn't follow from its generators")
    except Exception as e: return None, f"none: to draw them anew failed with {type(e).__name__}"
    finally: set_random_state(now, generators)
    return indices, "drawn anew; the targets of the batches kept agree"


# --- the step once more -------------------------------------------------------------------------------------------

@dataclass
class Replay:
    """What `replay` saw: the finding, the loss of its step, whether all was as recorded, and the report."""

    finding: dict
    loss: float
    same: bool
    report: str


def replay(record, learn):
    """Put the recorded states into `learn` and repeat the steps up to the failing one: a `Replay`.

        from runner import replay

        learn = Learner(model, opt, loss_func, data)                # built as for the fit, in this process or another
        again = replay("diverged.pt", learn)
        assert again.same, again.report

    The batches are those of the record, as the model got them; so neither `learn.data` nor callbacks are needed, and
    random transforms repeat. Dropout repeats by the recorded random state. The convolution backend and the number of
    threads are the recorded ones meanwhile. Afterwards model, loss and optimizer of `learn` are what they were in the
    step that the finding names, before the optimizer took it (unless that was at fault), with its gradients if it came
    to them; random state and settings are those from before.

    Args:
        record: a `TerminateOnNonFinite`'s record, or the path of its file.
        learn: a `Learner` with the same model, loss and kind of optimizer.

    Raises:
        TypeError: no record.
        ValueError: a learner whose parameters, buffers or optimizer differ from the recorded in name or shape.
    """
    if isinstance(record, (str, os.PathLike)): record = torch.load(record, map_location="cpu", weights_only=True)
    if not isinstance(record, dict) or "snapshots" not in record:
        raise TypeError(f"replay got {type(record).__name__}; it needs the path of a record or the `record` of a "
                        "TerminateOnNonFinite, which is None unless the fit diverged")
    before, restore = (torch.backends.mkldnn.enabled, torch.get_num_threads()), random_states()
    try:
        use_backend(**record["settings"])
        repeat = Repeat(learn.model, learn.loss_func, learn.opt)
        finding, words = repeat.run(record)
    finally:
        use_backend(*before)
        restore()
    again, versions = {**record, "finding": finding}, (record["versions"]["torch"], str(torch.__version__))
    if finding != record["finding"]: words.append(f"recorded was: {record['report']}")
    if words and len(set(versions)) > 1: words.append("recorded with torch {}, repeated with {}".format(*versions))
    return Replay(finding, repeat.loss, not words, report(again, words))


# --- small parts --------------------------------------------------------------------------------------------------

def copies(tensors, before, into):
    """`tensors` and copies of them: written `into` those of the tensors `before`, if they fit, or into new memory."""
    if len(tensors) == len(before) and all(a is b or (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
                                           for a, b in zip(tensors, before, strict=True)):
        if into: torch._foreach_copy_(into, tensors)
        return tensors, into
    return tensors, [t.detach().clone() for t in tensors]


def plain(o, memo):
    """`o` with its tensors on the host and its numbers Python's own; what it has twice stays one thing."""
    if id(o) in memo: return memo[id(o)][0]
    if torch.is_tensor(o):
        new = o.detach().cpu()
        if new.untyped_storage().nbytes() > new.nbytes: new = new.clone()   # a batch, not all of its data set
    elif isinstance(o, dict): new = {k: plain(v, memo) for k, v in o.items()}
    elif isinstance(o, (list, tuple)): new = type(o)(plain(v, memo) for v in o)
    elif o is None or isinstance(o, bool): new = o
    elif isinstance(o, str): new = str(o)
    elif isinstance(o, numbers.Integral): new = int(o)
    elif isinstance(o, numbers.Real): new = float(o)
    else: new = o
    memo[id(o)] = new, o        # `o` itself, or its id could be another's soon
    return new


def same_values(a, b): return torch.equal(a, b.cpu()) if torch.is_tensor(a) and torch.is_tensor(b) else a == b


def report(record, words):
    """One line: what happened when, and where it began."""
    found, row = record["finding"], record["rows"][-1]
    at = found or row
    if found:
        text = (f"first non-finite value in {found['what']} ({found['phase']}, "
                f"{'training' if found['in_train'] else 'validation'}), {found['nan']} NaN and {found['inf']} infinite "
                f"of {found['of']}")
    else: text = f"the loss is {row['loss']} and the norm of the gradients {row['grad_norm']}; no module was found"
    if place(at) != place(row): text += f"; seen at {named(row)}"
    before = next((a for a, b in pairwise(record["rows"]) if place(b) == place(at)), {"loss": None})
    if before["loss"] is not None and before["in_train"] == at["in_train"]:
        text += f"; the loss was {before['loss']:.3g} one {'step' if at['in_train'] else 'batch'} before"
    return "; ".join([f"diverged at {named(at)}: {text}", *words])
