"""The processes that train together: how many, the group that they join, what they tell one another."""

import atexit
import os
import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runner.agreement import Agreement
from runner.ranks import Ranks

T = TypeVar("T")

WAIT = 2.0          # seconds in which another process may say why it has gone
# In names of keys: the store outlives those whom torchrun starts again, with the addresses of the last ones in it.
RESTARTS = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
LOST = re.compile("gloo|nccl|connection (closed|reset)|broken pipe|socket|process group", re.IGNORECASE)


class DistributedError(RuntimeError):
    """Another process has failed, or the processes don't fit together; the text names the rank and the error."""


def world_size() -> int:
    """How many processes train together: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def processes_to_come() -> int:
    """How many processes were started, where they have joined no group yet; else 1."""
    told = os.environ.get("WORLD_SIZE", "")
    return int(told) if launched() and not dist.is_initialized() and told.isdecimal() else 1


def place_now() -> tuple[int, int]:
    """This process's rank and how many there are: 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if world_size() > 1 else (0, 1)


def shared_store(name: str) -> Any:
    """torch's key-value store (`torch.distributed.Store`) that the processes of `torchrun` share, of keys under `name`.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # there only if torch has all this
    from torch.distributed.rendezvous import rendezvous
    # One for as long as the process lives: without torchrun rank 0 serves it, and others would meet one that closes.
    if not _stores: _stores.append(next(iter(rendezvous("env://")))[0])
    return PrefixStore(name, _stores[0])


_stores: list[Any] = []


def launched() -> bool:
    """Whether a process group is there, or this process was started by `torchrun`, or as one of several by its rules.
    """
    if not dist.is_available(): return False
    return dist.is_initialized() or all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR",
                                                                        "MASTER_PORT"))


class Connection:
    """The process group, joined if there is none yet, and a word from whoever leaves it with an error."""

    joined = fits = 0                           # times; a group that was broken off leaves its addresses behind
    group: Any = None                           # that was joined here, and its connections
    sockets: frozenset[str] = frozenset()

    def __init__(self) -> None:
        if not dist.is_initialized(): self._join()
        self.own = dist.group.WORLD is Connection.group
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        told = os.environ.get("WORLD_SIZE", "")
        if told.isdecimal() and dist.is_torchelastic_launched() and int(told) != self.size:
            raise DistributedError(f"Distributed: the process group has {self.size} processes and torchrun has started "
                                   f"{told}; let Distributed join the group, or init_process_group without a size")
        self.store = dist.distributed_c10d._get_default_store()
        Connection.fits += 1
        self.key = f"runner/failed/{RESTARTS}/{Connection.fits}"

    def _join(self) -> None:
        kind = "gloo"
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
            if local < torch.cuda.device_count():
                torch.cuda.set_device(local)
                kind = "cpu:gloo,cuda:nccl"
        Connection.joined += 1
        store = shared_store(f"runner/{RESTARTS}/{Connection.joined}")
        before = frozenset(open_sockets())
        dist.init_process_group(kind, store=store, rank=int(os.environ["RANK"]),
                                world_size=int(os.environ["WORLD_SIZE"]))
        dist.all_reduce(torch.zeros(1))         # by now all are connected
        Connection.group, Connection.sockets = dist.group.WORLD, frozenset(open_sockets()) - before
        if Connection.joined == 1: atexit.register(_leave_at_exit)

    def tell(self, text: str) -> None:
        """Say why this process leaves; the first word counts."""
        with suppress(Exception): self.store.compare_set(self.key, "", f"{self.rank}\n{text}")

    def heard(self, seconds: float = 0.0) -> tuple[int, str] | None:
        """The rank that has failed and its error, for which it may wait; None if there is none."""
        with suppress(Exception):
            if seconds: self.store.wait([self.key], timedelta(seconds=seconds))
            if not self.store.check([self.key]): return None
            rank, text = self.store.get(self.key).decode().split("\n", 1)
            return int(rank), text
        return None

    def leave(self) -> None:
        """Break off: whoever waits for this process gets an error at once.

        To destroy the group is not enough: what holds it, as a `DistributedDataParallel` in a traceback, keeps the
        connections open, and the others waiting. A group that wasn't joined here is left to its owner, and ends with
        the process.
        """
        for name, fd in open_sockets().items():
            if name not in Connection.sockets: continue
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as s:
                s.getpeername()         # of one that listens there is none, and gloo would end the process
                s.shutdown(socket.SHUT_RDWR)
        if self.own:
            with suppress(Exception): dist.destroy_process_group()
        Connection.group, Connection.sockets = None, frozenset()


def _leave_at_exit() -> None:
    if dist.is_initialized() and dist.group.WORLD is Connection.group:
        with suppress(Exception): dist.destroy_process_group()


def open_sockets() -> dict[str, int]:
    """The sockets that this process has open, where the system tells (Linux): names and file descriptors."""
    found = {}
    with suppress(OSError):
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError): found[os.readlink(f"/proc/self/fd/{fd}")] = int(fd)
    return {name: fd for name, fd in found.items() if name.startswith("socket")}


class Group(Ranks):
    """The processes of a fit that goes on; once one has failed, each is alone."""

    def __init__(self, connection: Connection) -> None:
        self.rank, self.size, self.broken = connection.rank, connection.size, False
        self.agreement: Agreement | None = None
        # Of a group that somebody made for GPUs alone numbers on the host have to go there.
        self.moves = dist.get_backend() == "nccl"

    def _all_reduce(self, t: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        new = t.detach().clone(memory_format=torch.contiguous_format)
        if self.moves and t.is_cpu: new = new.cuda()
        dist.all_reduce(new, op)
        return new.to(t.device)

    def sum(self, t: Tensor) -> Tensor:
        if self.broken: return t
        return self.sum_later(t.detach()).wait() if t.is_cpu and not self.moves else self._all_reduce(t)

    def sum_later(self, t: Tensor) -> Any:
        # In the order of the ranks: gloo's own sum takes an order that depends on what else is in the tensor.
        rows = t.new_empty(self.size, *t.shape)
        gathered = dist.all_gather(list(rows.unbind()), t.contiguous(), async_op=True)
        return gathered.get_future().then(lambda _: rows.sum(0, dtype=t.dtype))

    def mean(self, t: Tensor) -> Tensor: return self.sum(t.detach() * self.weight)

    def gather(self, value: T) -> list[T]:
        if self.broken: return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, value: T) -> T:
        if self.broken: return value
        found: list[Any] = [value if self.leads else None]
        dist.broadcast_object_list(found, 0)
        made: T = value if self.leads else found[0]
        return made

    def any(self, yes: bool) -> bool:
        if self.broken: return yes
        return bool(self.sum(torch.tensor(int(yes))))

    def decide(self, level: int, skip: bool) -> tuple[int, bool]:
        """The largest `level` of all, and whether any skips."""
        if self.broken: return level, skip
        level, skips = self._all_reduce(torch.tensor([level, int(skip)]), dist.ReduceOp.MAX).tolist()
        return level, bool(skips)

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        if self.broken: return
        # In one exchange on a CPU: float64 holds float32, and counts up to 2^53, as they are.
        kinds: dict[Any, list[Tensor]] = {}
        for t in tensors:
            wide = torch.float64 if t.is_cpu and not t.is_complex() else t.dtype
            kinds.setdefault((wide, t.device), []).append(t)
        for (wide, _), some in kinds.items():
            flat = torch.cat([t.flatten().to(wide) for t in some])
            dist.broadcast(flat, 0)
            for t, new in zip(some, flat.split([t.numel() for t in some]), strict=True): t.copy_(new.view_as(t))

    def together(self, do: Callable[[], T]) -> T:
        if self.broken or self.agreement is None: return do()
        return self.agreement.together(do)


def require_equal(group: Group, **values: Any) -> None:
    """Raises DistributedError where the processes don't do the same, and would wait for one another."""
    told = group.gather(values)
    for rank, others in enumerate(told):
        for name, value in others.items():
            if value == told[0][name]: continue
            mend = {"callbacks": "give all the same, for rank 0 alone prints and writes in any case",
                    "epochs": "give all the same number"}.get(
                        name, "give all the same data, of whose batches each gets its part, or "
                              "shard_loader(loader, parts=True)")
            raise DistributedError(f"{name} on rank 0: {told[0][name]}; on rank {rank}: {value}; {mend}")
