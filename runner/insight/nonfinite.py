"""Where a run went wrong: `TerminateOnNonFinite` stops it and names the module; `replay` repeats the step.

While all is well the callback keeps a copy of what some steps start from, and looks at the loss. Nothing is hooked
until that is not finite. Then the last steps are done once more, on a copy of the model or, by `replay`, on a learner
built anew, with hooks on every module and on every operation of the backward pass.
"""

import copy
import math
import os
import platform
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from runner.backend import without_hooks
from runner.batches import NoPair, map_tensors
from runner.events import Callback, CancelTrainException
from runner.insight.record import copies, draw_indices, plain, report
from runner.insight.repeat import Repeat, flaw, norms_of
from runner.precision import LEAST_SCALE, precision_of
from runner.ranks import on_its_own, ranks_of
from runner.states import generators_of, params_of, parts_of, random_state, random_states
from runner.values import can_be_encoded

Row = dict[str, Any]            # both as the class below describes them
Snapshot = dict[str, Any]
EMPTY: Snapshot = {"tensors": ([], []), "moved": ([], [])}
AT_HAND = {"rows", "ring", "unseen", "now", "this", "modules", "slots", "optimizer", "params", "precision"}


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

    With `MixedPrecision` the steps are repeated under its autocast. Where it has a scaler, an infinite gradient is no
    failure: the scaler skips that step. One that is left when the scale has fallen to 2^-24 is, on a CPU; on other
    devices the scaler alone looks at gradients, and raises then.

    On another device than a CPU losses and norms of gradients stay there, and are brought to the host in one copy each
    `every` batches and at the end of a pass, for which the host waits; by then the optimizer has taken up to `every`
    bad steps. There a norm above 1.8e19, the root of the largest float32, counts as infinite too.

    `record`, None while all is well, holds tensors and plain Python values only and can be read by
    `torch.load(path, weights_only=True)`:

        report      the line above
        finding     {"phase": "start", "batch", "forward", "loss", "backward" or "step", "in_train", "epoch", "step",
                    "batch", "module": its path, "class", "what", "nan", "inf", "of": counts of values}, or None
        repeats     whether the repeated steps had the recorded losses bit for bit
        rows        the last `keep` batches: in_train, epoch, step (training steps done before), batch (in its pass),
                    loss, grad_norm (L2, all gradients; without `grads` of the repeated steps only), stepped (whether
                    the optimizer did), cleared (whether the gradients were), groups (each parameter group's lr,
                    momentum, ...), indices
        indices     how the indices were found, and whether they are confirmed; or why there are none
        snapshots   up to three states that a training step or validation started from, the last before the failing
                    batch: tensors (parameters, buffers), modes, opt, grads (left by a cancelled step; None where
                    buffers and gradients follow from the snapshot before), steps (those since: xb and yb as the model
                    got them, random: torch's state, row)
        random      random states (torch, Python, numpy, loaders' generators) at the start of the pass
        autocast    the dtype of `MixedPrecision`, or None
        settings, versions    oneDNN and threads; torch and Python

    The memory: two copies of parameters, buffers and optimizer state, and the batches since the older one, at most `2 *
    every`. The indices are drawn anew from the loader's sampler, after the failure, and compared by their targets with
    the batches that are kept; a loader without a sampler, and an `IterableDataset`, has none. A model that draws from
    Python's or numpy's generator, or counts in attributes, may not repeat itself; the report says so then. Leave the
    callback out of a search by `LR_Find`, which means to diverge.

    A checkpoint has the rows and the record, and not the copies: a fit that is resumed makes one at its first batch,
    from which what diverges later is repeated. So that it need not look back, it looks before a checkpoint is written,
    at the weights too, and stops the fit there if they have diverged.

    Raises:
        ValueError: at construction, a `keep` or `every` that is no positive integer; at the start of a fit, a path in
            a folder that doesn't exist.
    """

    _order = 1000   # after whatever changes the batch, the loss or the gradients
    fit_only = True
    may_cancel = ("begin_epoch", "begin_batch", "after_loss", "after_backward", "after_cancel_batch", "begin_validate",
                  "after_epoch")

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep: int = 20, every: int = 20,
                 grads: bool = True) -> None:
        for name, n in (("keep", keep), ("every", every)):
            if not isinstance(n, int) or isinstance(n, bool) or n < 1:
                raise ValueError(f"TerminateOnNonFinite: {name} is {n!r}; it must be an integer of at least 1")
        self.path, self.keep, self.every, self.grads = path, keep, every, grads
        self.record: dict[str, Any] | None = None
        self.sound = True                       # the weights, when the fit began
        self._clear()

    def _clear(self) -> None:
        self.rows: deque[tuple[Row, dict[str, Any]]] = deque(maxlen=self.keep)      # each row with its pass
        self.ring: deque[Snapshot] = deque(maxlen=2)
        self.unseen: list[Row] = []                                         # whose figures lie on the device
        self.now: dict[str, Any] = {"row": None, "batch": 0, "fresh": True}
        self.this: dict[str, Any] = {}                                      # the pass

    def begin_fit(self) -> None:
        if self.path is not None and not Path(self.path).absolute().parent.is_dir():
            raise ValueError(f"TerminateOnNonFinite: path is {os.fspath(self.path)!r} and its folder doesn't exist; "
                             "make the folder first, or give another path")
        self._clear()
        self.record, params, self.precision = None, params_of(self.opt), precision_of(self.run)
        self.device = params[0].device
        self.host = all(p.device.type == "cpu" for p in params)
        self.sound = not flaw(params)

    def begin_epoch(self) -> None: self._begin(self.data.train_dl)

    def begin_validate(self) -> None:
        self._look_at_weights()
        self._begin(self.data.valid_dl)

    def _look_at_weights(self) -> None:
        self._look()
        if self.rows and self.sound and flaw(self.params):          # by the last step, whose loss nobody will see
            self.ring.append(self._snapshot())
            self._stop(self.rows[-1][0])

    def _begin(self, dl: Any) -> None:
        """Being the last to hear of a pass, keep the random states from which its order follows."""
        self._look()
        run = self.run
        self.modules, self.slots = parts_of(run.model, run.loss_func, run.opt)
        self.optimizer, self.params = run.opt, params_of(run.opt)
        # Persistent workers draw a seed for their first pass only.
        self.this = {"dl": dl, "random": random_state(generators_of(run.data.train_dl, run.data.valid_dl)),
                     "seeded": getattr(dl, "_iterator", None) is None}
        self.now.update(row=None, batch=0, fresh=True)

    def begin_batch(self) -> None:
        run, now = self.run, self.now
        full = now["fresh"] or len(self.ring[-1]["steps"]) >= self.every
        if full: self._look()
        if now["fresh"] or (full and run.in_train):
            self.ring.append(self._snapshot(self.ring.popleft() if len(self.ring) == 2 else EMPTY))
            now["fresh"] = False
        elif full or (self.host and not run.in_train): self.ring[-1]["steps"].clear()   # evaluation changes nothing
        now["row"] = row = {
            "in_train": run.in_train, "epoch": run.epoch, "step": run.n_iter, "batch": now["batch"], "loss": None,
            "grad_norm": None, "backward": False, "stepped": False, "cleared": False,
            "groups": [*map(dict, self.optimizer.param_groups)]}
        random: dict[str, Any] = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda": random["cuda"] = torch.cuda.get_rng_state_all()
        xb = map_tensors(torch.clone, run.xb)                       # the model may write into its input
        yb = None if isinstance(run.yb, NoPair) else run.yb
        self.ring[-1]["steps"].append({"row": row, "xb": xb, "yb": yb, "random": random})
        self.rows.append((row, self.this))

    def after_loss(self) -> None:
        row, loss = self.now["row"], self.run.loss
        if self.host:
            row["loss"] = loss.item()
            if not math.isfinite(row["loss"]): self._stop(row)
        else:
            row["loss"] = loss.detach()
            self.unseen.append(row)

    def after_backward(self) -> None:
        row = self.now["row"]
        row["backward"] = True
        if not self.grads: return
        norms, scaler = norms_of(self.params), self.precision and self.precision.scaler
        if self.host:
            scale = scaler.get_scale() if scaler else 1.0
            row["grad_norm"] = math.hypot(*[n.item() for n in norms]) / scale
            if math.isfinite(row["grad_norm"]) or (scaler and scale > LEAST_SCALE): return
            # An infinite norm may be that of finite gradients, whose squares overflow.
            if flaw([p.grad for p in self.params]): self._stop(row)
        elif norms and not scaler:
            row["grad_norm"] = torch.linalg.vector_norm(torch.stack([n.to(self.device) for n in norms]))

    def after_step(self) -> None: self._last.update(stepped=True, cleared=True)

    def zero_grad(self, inner: Callable[[], object]) -> None:
        """Clear the gradients and write that down: those of a group of batches wait, those of a skipped step don't."""
        inner()
        self._last["cleared"] = True

    @property
    def _last(self) -> Row:
        """The row of this batch, or of the last one if a group of batches makes its step between two."""
        return self.now["row"] or self.rows[-1][0]

    def after_cancel_batch(self) -> None:
        """Learn how far a batch came that an earlier callback cancelled: this one didn't hear of its last event."""
        row = self.now["row"]
        if row is None or not row["in_train"] or row["loss"] is None: return
        if row["backward"]: row.update(stepped=True, cleared=True)
        elif any(p.grad is not None for p in self.params): self.after_backward()    # left to the next batch

    def after_batch(self) -> None: self.now.update(row=None, batch=self.now["batch"] + 1)

    def after_epoch(self) -> None:
        if self.run.in_train: self._look_at_weights()               # there was no validation
        else: self._look()

    def after_fit(self) -> None: self._clear()

    def state_dict(self) -> dict[str, Any]:
        """The last rows, how their batches were drawn, and the record.

        Raises:
            CancelTrainException: the fit has diverged in a step that nobody had looked at yet.
        """
        if self.ring and self.run.status == "ok": self.after_epoch()
        passes = list({id(this): this for this in (*(this for _, this in self.rows), self.this) if this}.values())
        at = {id(this): i for i, this in enumerate(passes)}
        record = self.record
        if record and not can_be_encoded(record): record = {k: v for k, v in record.items() if k != "snapshots"}
        return {"record": record, "sound": self.sound, "batch": self.now["batch"],
                "passes": [{**this, "dl": this["dl"] is self.data.train_dl} for this in passes],
                "rows": [({**row, "groups": [{k: v for k, v in group.items() if k != "params"}
                                             for group in row["groups"]]}, at[id(this)]) for row, this in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the rows of `state`, with a fresh copy at the next batch."""
        data = self.data
        passes = [{**this, "dl": data.train_dl if this["dl"] else data.valid_dl} for this in state["passes"]]
        self._clear()
        self.record, self.sound, self.now["batch"] = state["record"], state["sound"], state["batch"]
        self.rows.extend((row, passes[i]) for row, i in state["rows"])
        if passes: self.this = passes[-1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes the record along, and not what a fit has at hand."""
        return {k: v for k, v in super().__getstate__().items() if k not in AT_HAND}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._clear()

    # --- while all is well ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _snapshot(self, old: Snapshot = EMPTY) -> Snapshot:
        """A copy of what training changes, in the memory of an `old` one."""
        now = {name: t for name, (_, d, k) in self.slots.items() if (t := d[k]) is not None}
        state = {p: dict(s) for p, s in self.optimizer.state.items() if torch.is_tensor(p)}
        moved = [v for s in state.values() for v in s.values() if torch.is_tensor(v)]
        return {"names": list(now), "tensors": copies(list(now.values()), *old["tensors"]),
                "state": state, "moved": copies(moved, *old["moved"]),
                "modes": [m.training for m in self.modules.values()], "steps": [],
                "grads": {i: p.grad.clone() for i, p in enumerate(self.params) if p.grad is not None}}

    def _look(self) -> None:
        """Bring the losses and norms that lie on the device to the host, in one copy; stop at the first bad one."""
        waiting = [(row, k) for row in self.unseen for k in ("loss", "grad_norm") if torch.is_tensor(row[k])]
        self.unseen = []
        if not waiting: return
        values = torch.stack([row[k].to(self.device) for row, k in waiting]).tolist()
        for (row, k), value in zip(waiting, values, strict=True): row[k] = value
        for (row, _), value in zip(waiting, values, strict=True):
            if not math.isfinite(value): self._stop(row)

    # --- after a failure --------------------------------------------------------------------------------------

    def _stop(self, row: Row) -> NoReturn:
        """Make the record of the failure at `row`, print its report, and leave the fit."""
        run = self.run
        run.status, self.unseen = "diverged", []
        while self.rows[-1][0] is not row: self.rows.pop()          # what came before anybody looked
        steps = self.ring[-1]["steps"]
        while steps and steps[-1]["row"] is not row: steps.pop()
        if self.host and row["in_train"] and len(steps) > 1 and not row["stepped"]:
            # Weights and optimizer are still what the step began with, the buffers and gradients no longer.
            snap: Snapshot = {**self._snapshot(), "grads": None, "steps": [steps.pop()]}
            now = dict(zip(snap["names"], snap["tensors"][1], strict=True))
            weights = {name: now[name] for name, (_, d, k) in self.slots.items() if isinstance(d[k], nn.Parameter)}
            self.ring = deque([*self.ring, {**snap, "names": [*weights], "tensors": (None, [*weights.values()])}])
        self.record = record = self._record()
        words: list[str] = []
        restore = random_states()
        try:
            with without_hooks(run.model, run.loss_func):
                parts = copy.deepcopy((run.model, run.loss_func, run.opt))
            on_its_own(*parts)
            record["finding"], words = Repeat(*parts).run(record)
            record["repeats"] = not words
        # Whatever is in the way of a second look, the failure itself must be told.
        except Exception as e: words = [f"the step can't be repeated on a copy ({type(e).__name__}: {e})"]
        finally: restore()
        record["report"] = report(record, words)
        file = f"run.{self.name}.record" if self.path is None else os.fspath(self.path)
        print(f"{record['report']}; the record is in {file}", flush=True)
        if self.path is not None and ranks_of(run).size == 1: torch.save(record, self.path)
        raise CancelTrainException

    def after_cancel_train(self) -> None:
        """Of several processes let all have the record of the first that has one, and that one write it."""
        ranks = ranks_of(self.run)
        if ranks.size == 1: return
        found = [(rank, record) for rank, record in enumerate(ranks.gather(self.record)) if record is not None]
        if not found: return
        rank, self.record = found[0]
        if self.path is not None and rank == ranks.rank: torch.save(self.record, self.path)

    def _record(self) -> dict[str, Any]:
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
        record: dict[str, Any] = plain({
            "report": "", "finding": None, "repeats": False, "rows": rows, "indices": found[id(self.rows[-1][1])][1],
            "snapshots": [self._opened(snap) for snap in self.ring], "random": self.this["random"],
            "autocast": self.precision and str(self.precision.dtype).removeprefix("torch."),
            "optimizer": type(self.run.opt).__name__, "compiled": getattr(self.run, "compiled_step", None) is not None,
            "settings": {"onednn": torch.backends.mkldnn.enabled, "threads": torch.get_num_threads()},
            "versions": {"torch": torch.__version__, "python": platform.python_version()}}, {})
        return record

    def _opened(self, snap: Snapshot) -> dict[str, Any]:
        """A snapshot with everything under its name."""
        moved, index = iter(snap["moved"][1]), {p: i for i, p in enumerate(self.params)}
        state = {index[p]: {k: next(moved) if torch.is_tensor(v) else v for k, v in s.items()}
                 for p, s in snap["state"].items()}
        return {"tensors": dict(zip(snap["names"], snap["tensors"][1], strict=True)),
                "modes": dict(zip(self.modules, snap["modes"], strict=True)),
                "opt": {**self.run.opt.state_dict(), "state": state}, "grads": snap["grads"], "steps": snap["steps"]}
