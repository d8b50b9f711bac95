"""What an experiment trains on: `ImageData`, the moments of its pixels, and the transform of its batches."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from experiments.errors import InputError
from runner import Dataset, view_tfm


@dataclass
class ImageData:
    """Training, validation and test images as `Dataset`s of images and labels `(N,)`, whole tensors.

    `tfm(x)` makes of a batch of images, as they are kept, the network's input `(N, *shape)`, normalised by the training
    set's moments `mean` and `std`, so that a pixel, from 0 to 1, is `tfm(x) * std + mean`. Two forms are kept:

    - MNIST, Fashion-MNIST and the digits: float32, flat `(N, 784)`, normalised already, by moments of all pixels that
      are numbers; `tfm` views them.
    - a folder's (`load_folder`): uint8 `(N, 3, H, W)`, by moments of each channel, `(3, 1, 1)`; `tfm` is `Pixels`.

    `notice` says what a user must know about the choice of data, or is empty; `c` is the number of classes, `classes`
    are their names where they have some; `asked` is what `load_data` gets these by. `digest`, where there is one, names
    the pixels, labels and their order.
    """

    name: str
    train: Dataset
    valid: Dataset
    test: Dataset
    mean: float | Tensor
    std: float | Tensor
    notice: str = ""
    c: int = 10
    shape: tuple[int, int, int] = (1, 28, 28)
    tfm: Callable[[Tensor], Tensor] = field(default_factory=lambda: view_tfm(1, 28, 28))
    classes: tuple[str, ...] = ()
    place: str = ""         # of a folder's, where it is on this machine: for `asked`, and in no record
    digest: str = ""

    @property
    def asked(self) -> str:
        """The name that `load_data` gets these by."""
        return f"folder:{self.place}" if self.place else self.name.split()[0].lower()

    def __str__(self) -> str:
        channels, *size = self.shape
        sizes = "x".join(map(str, size if channels == 1 else self.shape))
        more = f", {self.c} classes" * bool(self.classes) + f" (digest {self.digest})" * bool(self.digest)
        return (f"{self.name}: {len(self.train):,} training, {len(self.valid):,} validation and {len(self.test):,} "
                f"test images, {sizes}{more}")


class Pixels:
    """`(x / 255 - mean) / std` in torch's default dtype, of uint8 images `(..., C, H, W)` and moments `(C, 1, 1)`.

    Made for batches: what is kept of the images then is a quarter of what their floats would be. Computed as
    `(x - 255 mean) / (255 std)`, image by image the same bits whatever batch they are in. A channel that has one value
    in all training images, standard deviation 0, is divided by 1.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        std = torch.where(std > 0, std, 1.0)
        self.shift, self.scale = ((255 * t.double()).float() for t in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        if self.shift.device != x.device: self.shift, self.scale = self.shift.to(x.device), self.scale.to(x.device)
        return x.to(torch.get_default_dtype()).sub_(self.shift).div_(self.scale)


def pixel_moments(images: Tensor, top: int) -> tuple[float, float]:
    """Mean and (unbiased) standard deviation of all pixels of `images`, divided by `top`; float32 numbers.

    In float64, of whole numbers by how often there is each: the result is the same on any number of threads, and so are
    all results that follow from it.
    """
    if images.dtype == torch.uint8:
        return moments_of_counts(torch.arange(256.0), torch.bincount(images.flatten(), minlength=256), top)
    return moments_of_counts(images.flatten(), torch.ones(images.numel()), top)


def moments_of_counts(values: Tensor, counts: Tensor, top: int) -> tuple[float, float]:
    """`pixel_moments` of `values` that occur `counts` times; the deviation of a single value is 0."""
    values, counts = values.double() / top, counts.double()
    n = counts.sum()
    mean = (values * counts).sum() / n
    std = (((values - mean).square() * counts).sum() / (n - 1).clamp_min(1)).sqrt()
    return mean.float().item(), std.float().item()


def check_limit(limit: object) -> None:
    """Raise unless `limit` is a positive integer, or None."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InputError(f"limit is {limit!r}; it must be a positive number of training images, or left out for all")


def cache_dir() -> Path:
    """The user's cache of this project; nothing is created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "runnernorms"
