"""`Flips`: training images flipped left to right at random, the same for a run's seed however it is run."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.errors import InputError
from runner.stateful import Stateful

BLOCK = 4096        # flips drawn at a time, for 24 networks side by side in a thousandth of the time of their steps


class Flips(Stateful):
    """Flips each training image left to right with probability 1/2; validation sees the images as they are.

        xb[i] = xb[i].flip(-1) where bits[i]

    The bits of an epoch are drawn from its number and the seed, image by image in the order of the batches. So a run of
    this seed has the same whether it is resumed, trained alone or beside others; and they have nothing to do with the
    order of the images, which another generator of that seed gives.

    Args:
        seeds: the seed of a network, whose batches are `(N, C, H, W)`; or the seeds of K side by side, of `(N, K C, H,
            W)`, each of which is flipped by bits of its own.

    It comes after the batch's transform. Several processes that share a run's batches would all draw the same.
    """

    _order = 3          # after BatchTransformXCallback
    _saved = ("at",)
    fit_only = True
    bits: Tensor | None     # (K, *), of the images from the `first` on of this epoch; None until the first batch

    def __init__(self, seeds: int | Sequence[int]) -> None:
        self.alone = isinstance(seeds, int)
        self.seeds: list[int] = [seeds] if isinstance(seeds, int) else [*seeds]
        self._fresh()

    def _fresh(self) -> None:
        self.at, self.bits = 0, None    # images seen in this epoch

    def begin_fit(self) -> None: self._fresh()

    def begin_epoch(self) -> None: self._fresh()

    def begin_batch(self) -> None:
        run = self.run
        if not run.in_train: return
        x, k = run.xb, len(self.seeds)
        if not torch.is_tensor(x) or x.ndim != 4 or x.shape[1] % k:
            raise InputError(f"Flips got a batch {tuple(getattr(x, 'shape', ()))}; it needs images (N, C, H, W), or "
                             f"(N, {k} C, H, W) of {k} networks: give a transform that makes them")
        bits = self.take(len(x)).to(x.device)                                                       # (N, K)
        each = x.unflatten(1, (k, -1))                                                              # (N, K, C, H, W)
        run.xb = torch.where(bits[:, :, None, None, None], each.flip(-1), each).flatten(1, 2)

    def take(self, n: int) -> Tensor:
        """The next n images' bits `(n, K)`."""
        if self.bits is None:
            self.draws = [torch.Generator().manual_seed(self._seed(seed)) for seed in self.seeds]
            self.first, self.bits = 0, self._block()
        while self.at + n > self.first + self.bits.shape[1]:
            past = min(self.at - self.first, self.bits.shape[1])    # after a resume there may be whole blocks of them
            self.bits = torch.cat([self.bits[:, past:], self._block()], 1)
            self.first += past
        start = self.at - self.first
        self.at += n
        return self.bits[:, start:start + n].t()

    def _block(self) -> Tensor: return torch.stack([torch.rand(BLOCK, generator=g) < 0.5 for g in self.draws])

    def _seed(self, seed: int) -> int:
        """That of an epoch's bits: a digest, for neighbouring seeds and epochs must have nothing in common."""
        text = f"flips, seed {seed}, fit {self.run.fits}, epoch {self.run.epoch}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after so many images of the epoch."""
        super().load_state_dict(state)
        self.bits = None
