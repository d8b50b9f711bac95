"""Where the numbers of a `Probe` lie: on the device until a block is full, then on the host."""

from array import array

import torch
from torch import Tensor

from runner.stateful import column


class Store:
    """The rows of one thing: those on the host, and after them those in a block on its device that is being filled.

    `sizes` has one entry per measured batch, 0 where the thing did not run; its row is zeros.
    """

    def __init__(self, width: int, most: int) -> None:
        self.width, self.most = width, most
        self.sizes, self.numbers, self.at = array("q"), array("f"), 0
        self.row: list[float] | None = None
        self.block: Tensor | None = None

    def skip(self, batches: int) -> None:
        """So many batches were measured before this thing was looked at."""
        self.sizes.extend([0] * batches)
        self.numbers.extend([0.0] * (batches * self.width))

    def begin(self) -> None: self.sizes.append(0)

    def put(self, values: list[float] | Tensor, n: int) -> None:
        self.sizes[-1] = n
        if self.block is None:
            if not isinstance(values, Tensor):
                self.row = values
                return
            self.block = torch.zeros(self.most, self.width, device=values.device)
        self.block[self.at].copy_(torch.as_tensor(values))

    def end(self) -> None:
        if self.block is None:
            self.numbers.extend(self.row or [0.0] * self.width)
            self.row = None
        else:
            self.at += 1
            if self.at == self.most:
                self.numbers.extend(self.block.flatten().tolist())
                self.block.zero_()
                self.at = 0

    def rows(self) -> Tensor:
        """All rows of finished batches, `(batches, width)`."""
        fetched = column(self.numbers, "f").view(-1, self.width)
        return fetched if self.block is None else torch.cat((fetched, self.block[:self.at].cpu()))

    def load(self, sizes: Tensor, rows: Tensor) -> None:
        """Go on after these."""
        self.sizes, self.numbers, self.at = array("q", sizes.tolist()), array("f", rows.flatten().tolist()), 0
        self.row = self.block = None
