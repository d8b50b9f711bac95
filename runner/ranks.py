"""What a fit over several processes asks of them all: how many they are, sums and agreement. Alone it costs nothing.

A callback reads `self.run.ranks`, which is `ALONE` but for the length of a fit with `Distributed`. What it does there
all processes must do at the same place, or they wait for one another.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

from runner.batches import size_of

T = TypeVar("T")


class Ranks:
    """One process, alone; `runner.processes.Group` has the methods for several.

    `rank` is this one's number, from 0, and `size` how many there are. `images` is the number of images in the running
    batch over all of them (None alone: the batch's own), and `weight` this one's share of these, in 0 to 1.
    """

    rank, size = 0, 1
    images: int | None = None
    weight = 1.0

    @property
    def leads(self) -> bool:
        """Whether this is the one process that prints, draws and writes."""
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t` over all, the same bits on each."""
        return t

    def sum_later(self, t: Tensor) -> Any:
        """`sum`, of a tensor on a CPU, as a `torch.futures.Future`."""
        raise NotImplementedError("a process alone has nothing to wait for")

    def mean(self, t: Tensor) -> Tensor:
        """The mean over the images of all of `t`, a mean over the running batch's own: `sum(weight t)`."""
        return t

    def gather(self, value: T) -> list[T]:
        """The values of all, in the order of the ranks: anything that can be pickled."""
        return [value]

    def first(self, value: T) -> T:
        """Rank 0's value."""
        return value

    def any(self, yes: bool) -> bool:
        """Whether it is so on any."""
        return yes

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give `tensors` the values that they have on rank 0, in place."""

    def together(self, do: Callable[[], T]) -> T:
        """`do()`, and if it leaves the fit on one by a cancel exception, it does so on all."""
        return do()

    def __str__(self) -> str: return f"rank {self.rank} of {self.size}"


ALONE = Ranks()


def synced(module: object) -> bool:
    """Whether a norm's statistics are those of several processes: then they are the same on all."""
    return bool(getattr(module, "ranks", 1) > 1)


def on_its_own(*parts: object) -> None:
    """Let synchronised norms in `parts`, which are copies, ask no other process: these don't do what this one does."""
    for part in parts:
        for m in part.modules() if isinstance(part, nn.Module) else ():
            if getattr(m, "synced", None) is not None: m.synced = None      # type: ignore[assignment]


def ranks_of(run: Any) -> Ranks:
    """The processes of the runner's fit; a runner of somebody's own is alone."""
    found: Ranks = getattr(run, "ranks", ALONE)
    return found


def images_of(run: Any) -> int:
    """How many images the running batch has, over all processes."""
    images = ranks_of(run).images
    return size_of(run.xb) if images is None else images
