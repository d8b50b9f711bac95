"""One fit over several processes: `Distributed`, to be started by `torchrun`."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DistributedSampler

from runner.accumulation import GradientAccumulation, averages_of
from runner.agreement import Agreement, Muted
from runner.batches import length_of, size_of
from runner.events import Callback
from runner.loading import samplers
from runner.processes import (
    LOST,
    WAIT,
    Connection,
    DistributedError,
    Group,
    launched,
    place_now,
    require_equal,
)
from runner.ranks import synced
from runner.reducing import Reducer
from runner.sharing import Place, ShardedLoader, Share, counted, longest, own_randomness, same_order, shared


def shard_loader(loader: Any, *, parts: bool = False, rank: int | None = None, size: int | None = None,
                 ) -> ShardedLoader:
    """A loader of this process's part of each batch, of several processes that train together.

        rank r of W gets of n images n // W, and one more if r < n mod W

        for xb, yb in shard_loader(train_dl): ...       # in a loop of your own, under torchrun

    `Distributed` does so by itself with the loaders whose order it knows: those of `get_dls`, torch's `DataLoader` with
    torch's samplers, lists of batches. By this function you vouch for another: that all processes get the same batches
    from it, in the same order. The number of images may be smaller than that of the processes; then some get a batch of
    none, tensors of length 0. Of a loader with a sampler of batches of indices no image is fetched that isn't used (one
    for a process with none); batches of others are cut.

    Args:
        loader: any iterable of batches.
        parts: its batches are each process's own already, as with a `DistributedSampler`, and of any size and number;
            `Distributed` counts them, in a further exchange per batch.
        rank, size: of the process; None for those of torch.distributed's group at the time of iteration, 0 and 1
            without a group.

    Raises:
        TypeError: no iterable.
        ValueError: a rank that isn't in 0 to size - 1, or one of the two alone.
    """
    if not hasattr(loader, "__iter__"):
        raise TypeError(f"shard_loader got a {type(loader).__name__}; it needs a loader, an iterable of batches")
    place: Place = place_now
    if rank is not None and size is not None and 0 <= rank < size: place = _fixed(rank, size)
    elif (rank, size) != (None, None):
        raise ValueError(f"shard_loader got rank {rank!r} and size {size!r}; give both, 0 <= rank < size, or none of "
                         "them for those of the process group")
    return ShardedLoader(loader, place, not parts)


def _fixed(rank: int, size: int) -> Place: return lambda: (rank, size)


# --- the callback -------------------------------------------------------------------------------------------------

class Distributed(Callback):
    """Trains one model in several processes, as one process would train it, and faster.

        torchrun --nproc-per-node 2 script.py

        run = Runner([AvgStatsCallback(accuracy), Distributed()])       # the script: nothing else is different
        sync_norms(learn.model)                                         # from norms, where a model has batch norms
        run.fit(10, learn)

        for batch in train_dl:                                          # what it does: of B images over W processes
            own = part(batch)                                           # b_r, in rank r
            loss = loss_func(ddp(own.x), own.y)
            (W b_r / B * loss).backward()                               # and ddp takes the mean over the processes
            opt.step()                                                  # the same on all

    Without `torchrun` it does nothing. The batch size stays that of the whole, and so do rates and schedules: every
    process takes its part of the same batches (`shard_loader`), in the order that one process would have them in from
    the same random state. Parts may be uneven, and of a batch with fewer images than there are processes some have
    none; each loss counts by its images. The loss is taken for a mean over images. Dropout and other random numbers are
    other ones in each process; the order of the images is the same in all.

    The process group is joined (nccl with GPUs, one for each process, and gloo), unless there is one, and left when the
    process ends. For the length of the fit the forward pass of training goes through `DistributedDataParallel`, of
    which nobody else sees anything: `run.model` is the model itself. Every parameter that is trained gets the mean
    gradient, also where it belongs to the loss, is unfrozen in mid-fit, or has a second backward pass
    (`runner.reducing`). Rank 0's weights are all processes' at the beginning, and after each step its buffers. Batch
    norms normalise by their own process's part unless they are synchronised (`norms.sync_norms`).

    What callbacks see: `run.xb`, `run.pred` and `run.loss` are the process's own. Histories, metrics and the losses of
    `Recorder` are of all images, equal on all processes; so is what is decided by them. A cancel exception of any
    callback, on any process, holds on all in the same step (`runner.agreement`). Validation is shared, each image once.
    Rank 0 prints and writes; others only what has ended the fit. `Checkpoint` writes one file, and any number of
    processes goes on from it. `run.ranks` (`runner.ranks.Ranks`) has sums and means over the processes for callbacks of
    your own. `Runner.evaluate` and `predict` are done by each process for itself, over all images.

    An exception on one process ends the others too, with a `DistributedError` that names it.

    Args:
        broadcast_buffers: give rank 0's buffers to all after each step, but those of synchronised norms, which are
            equal. Without, each process keeps its own until the pass is over.
        **settings: for `torch.nn.parallel.DistributedDataParallel`, such as `find_unused_parameters=True` for a model
            that doesn't use all parameters in each batch.

    Raises:
        DistributedError: another process has failed, or has other callbacks, epochs or lengths of loaders; the group
            has another size than `torchrun` says, or than the one that it was begun with.
        ShareError: a loader of whose order nobody knows whether it is the same on all processes; see `shard_loader`.
    """

    _order = 9_500      # around the batches of a fit that is resumed, and next to the model; before Checkpoint
    fit_only = True

    def __init__(self, *, broadcast_buffers: bool = True, **settings: Any) -> None:
        self.broadcast_buffers, self.settings = broadcast_buffers, settings
        self.size: int | None = None        # of the group that it was begun with
        self._clear()

    def _clear(self) -> None:
        self._connection: Connection | None = None
        self._group: Group | None = None
        self._agreement: Agreement | None = None
        self._reducer: Reducer | None = None
        self._share: Share | None = None
        self._muted = Muted()
        self._pass = ExitStack()            # what a pass is to undo at its end
        self._stale = self._wait = False
        self._heard = 0.0

    # --- the fit ----------------------------------------------------------------------------------------------

    @contextmanager
    def around_fit(self, run: Any, learn: Any) -> Iterator[None]:
        """Join the processes before the fit begins; afterwards the runner is alone."""
        self._clear()
        if not launched():
            yield
            return
        connection = self._connection = Connection()
        group = self._group = Group(connection)
        if self.size not in (None, group.size):
            raise DistributedError(f"this Distributed() was begun with {self.size} processes and is to go on with "
                                   f"{group.size}; make a new one")
        self.size = group.size
        try:
            with nullcontext() if group.leads else redirect_stdout(self._muted): yield
        except BaseException as e:
            if (found := self._failed(e)) is e: raise
            raise found from e
        finally:
            vars(run).pop("ranks", None)
            self._end_pass()
            self._clear()

    @contextmanager
    def around_loop(self) -> Iterator[None]:
        """For the length of the loop the callbacks of all processes decide together."""
        group, run = self._group, self.run
        if group is None:
            yield
            return
        require_equal(group, epochs=run.epochs, callbacks=", ".join(type(cb).__name__ for cb in run.cbs))
        run.ranks = group
        self._agreement = group.agreement = Agreement(run, group.decide, self._failed, self._muted)
        self._agreement.settle(self._after_pass)
        try: yield
        except BaseException as e:
            if (found := self._failed(e)) is e: raise
            raise found from e

    def _failed(self, e: BaseException) -> BaseException:
        """Let the others know of `e`, which ends the fit here, or hear from them why it does; what is to be raised."""
        group, connection = self._group, self._connection
        if group is None or connection is None or group.broken: return e
        group.broken = True
        lost = isinstance(e, RuntimeError) and LOST.search(str(e)) is not None
        if not lost: connection.tell(f"{type(e).__name__}: {e}")
        other = connection.heard(WAIT) if lost else None
        connection.leave()
        if other is not None: return _of_other(*other)
        if not lost: return e
        return DistributedError("the connection to another process was lost, and it has said nothing: it was killed, "
                                "or ran out of memory; see what torchrun says of it, and go on from a checkpoint "
                                "(fit(..., resume=folder))")

    def begin_fit(self) -> None:
        if self._group is not None: self._wrap()

    def _wrap(self) -> None:
        assert self._group is not None
        waiting = self._reducer is not None and self._reducer.waiting
        self._reducer = Reducer(self.run.model, self._group, self.settings)
        self._reducer.waiting = waiting

    def begin_batch(self) -> None:
        run, reducer = self.run, self._reducer
        if reducer is None or not run.in_train: return
        if not reducer.fits(run.model): self._wrap()
        accumulation = next((cb for cb in run.cbs if isinstance(cb, GradientAccumulation)), None)
        self._wait = accumulation is not None and not accumulation.completes

    # --- the steps of a batch ---------------------------------------------------------------------------------

    def predict(self, inner: Callable[[], None]) -> None:
        """The prediction; in training by `DistributedDataParallel`."""
        run, reducer = self.run, self._reducer
        if reducer is None or not run.in_train: return inner()
        learn, model = run.learn, run.learn.model
        # One backward pass after the forward pass, by the runner itself: else `Reducer` does all.
        if reducer.ddp is not None and "backward" not in run._replaced: learn.model = reducer.ddp
        try:
            with reducer.alone(self._wait), self._explained(): inner()
        finally: learn.model = model

    def get_loss(self, inner: Callable[[], None]) -> None:
        """The loss; of no images 0, with a graph, as all processes take part in a backward pass."""
        run, group = self.run, self._group
        if group is None or not run.in_train: return inner()
        with self._explained(): inner()
        if not group.weight: run.loss = torch.nan_to_num(run.loss, 0.0, 0.0, 0.0)

    def backward(self, inner: Callable[[], None]) -> None:
        """The gradients of all images' mean loss, W b_r / B of it this process's, on each process."""
        run, group, reducer = self.run, self._group, self._reducer
        if group is None or reducer is None: return inner()
        scale, own, compiled = group.size * group.weight, run.loss, getattr(run, "compiled_step", None)
        # Synchronised, they are means over the processes, as is the gradient.
        averages = [m for m in averages_of(run.model, run.loss_func) if not synced(m)] if scale != 1 else []
        if compiled is not None: inner = partial(_divided, compiled, scale, inner)
        elif scale != 1: run.loss = own * scale
        try:
            for m in averages: m.rescale_(scale)
            with self._explained(): reducer.backward(run, inner, self._wait)
        finally:
            if compiled is None: run.loss = own
            for m in averages: m.rescale_(1 / scale)
        self._stale = True
        if self.broadcast_buffers and not self._wait: self._settle()

    def step(self, inner: Callable[[], None]) -> None:
        """The step, with gradients that all have."""
        if self._reducer is not None: self._reducer.settle(self.run)
        inner()

    def _after_pass(self) -> None:
        self._end_pass()
        if self._reducer is not None: self._reducer.settle(self.run)    # a step may follow, of batches that wait for it
        self._settle()

    def _settle(self) -> None:
        """Rank 0's buffers for all, but those of synchronised norms, which are equal."""
        group, model = self._group, self.run.model
        if group is None or not self._stale or not isinstance(model, nn.Module): return
        self._stale = False
        group.share([b for m in model.modules() if not synced(m) for b in m._buffers.values() if b is not None])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of an exception of a batch without images that it is one."""
        try: yield
        except Exception as e:
            group = self._group
            if group is not None and not group.weight and hasattr(e, "add_note"):
                e.add_note(f"{group} has no image in a batch of {group.images}: the model got tensors of length 0, "
                           "which a norm that needs an image in each process can't take; synchronise the norms "
                           "(norms.sync_norms), take larger batches, or drop the last one (drop_last=True)")
            raise

    # --- the batches ------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None: self._begin_pass(resumed=self.run.first_batch > 0)

    def begin_validate(self) -> None: self._begin_pass()

    def _begin_pass(self, resumed: bool = False) -> None:
        """Share the loader, before any callback's `around_pass` begins with it."""
        group, dl = self._group, self.run._loader
        if group is None: return
        self._end_pass()
        for sampler in samplers(dl):
            if isinstance(sampler, DistributedSampler): sampler.set_epoch(self.run.epoch)
        self._share = self._pass.enter_context(shared(dl, group, self.run.in_train))
        if self._share.known:
            require_equal(group, batches=length_of(dl), items=length_of(getattr(dl, "dataset", None)))
        if not resumed: same_order(group, dl)       # else random states are put back by what resumes

    def around_pass(self, batches: Iterable[Any]) -> Iterable[Any]:
        """This process's part of each batch."""
        group, share = self._group, self._share
        return batches if group is None or share is None else self._own(batches, self.run._loader, group, share)

    def _own(self, batches: Iterable[Any], dl: Any, group: Group, share: Share) -> Iterator[Any]:
        # A pass that is left early leaves this generator where it is: what is to be undone `_end_pass` does.
        run, train, agreement = self.run, self.run.in_train, self._agreement
        assert agreement is not None
        resumed = train and run.first_batch > 0
        if share.known and (batches is dl or resumed or share.cuts):
            given = batches if batches is dl or resumed else agreement.batches(batches)
            parts = share.parts(given, run.first_batch if train else 0)
        else:
            share.refuse_none()
            run.iters = longest(group.gather(run.iters))
            # In validation nobody needs to know of the others, and each goes at its own pace.
            parts = counted(batches, group) if train else ((b, n := size_of(b), n) for b in agreement.batches(batches))
        drawn = True            # the order, by all alike
        for k, (batch, own, n) in enumerate(parts):
            if drawn and (not resumed or run.resume.borrowed) and not (self._reducer and self._reducer.lazy and not k):
                own_randomness(group)       # once all have made the same of what the first batch makes
                drawn = False
            group.images, group.weight = n, own / n if n else 0.0
            self._listen()
            if own or train: yield batch
            if agreement.pending is not None: break
        self._end_pass()
        if not train: agreement.end_of_validation()

    def _end_pass(self) -> None:
        """The loader is as it was."""
        self._pass.close()
        self._share = None
        if self._group is not None: self._group.images, self._group.weight = None, 1.0

    def _listen(self) -> None:
        """Once a second, hear whether another process has failed, which may be long before they meet again."""
        if (now := time.monotonic()) - self._heard < 1.0: return
        self._heard = now
        assert self._connection is not None
        if (other := self._connection.heard()) is not None: raise _of_other(*other)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no fit."""
        idle = dict.fromkeys(("_connection", "_group", "_agreement", "_reducer", "_share"))
        return {**super().__getstate__(), **idle, "_muted": Muted(), "_pass": ExitStack(), "_stale": False,
                "_wait": False}


def _of_other(rank: int, text: str) -> DistributedError:
    return DistributedError(f"rank {rank} failed, and so this process ends: {text}")


def _divided(compiled: Any, scale: float, inner: Callable[[], None]) -> None:
    """A compiled step's gradients, `scale` times as large; of no images none, which might be 0 / 0."""
    if not scale: return
    divisor = compiled.divisor
    compiled.divisor = divisor / scale
    try: inner()
    finally: compiled.divisor = divisor
