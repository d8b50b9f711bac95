"""Folders of images: found, decoded once into the cache, and kept right there."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data import load_data
from experiments.errors import InputError
from experiments.folder import load_folder


def pixels(seed, size=(6, 4), channels=3):
    """Random pixels (H, W, channels) of an image of this width and height."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def put(root, path, seed=0, size=(6, 4)):
    """An image file with `pixels`, without loss."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size)).save(file)
    return file


@pytest.fixture
def tree(tmp_path):
    """A folder of three classes, 4, 8 and 12 images to train and 2 each to test, of which the seed is in the name."""
    root = tmp_path / "pets"
    for i, name in enumerate(("cat", "dog", "emu")):
        for j in range(4 * (i + 1)): put(root, f"train/{name}/{100 * i + j}.png", 100 * i + j)
        for j in range(50, 52): put(root, f"val/{name}/{100 * i + j}.png", 100 * i + j)
    return root


def seeds_of(ds):
    """The seed by which each image was made."""
    known = {pixels(100 * i + j).tobytes(): 100 * i + j for i in range(3) for j in range(52)}
    return [known[x.permute(1, 2, 0).contiguous().numpy().tobytes()] for x in ds.x]


def test_a_folder_is_images_labels_and_classes(tree, capsys):
    d = load_data(f"folder:{tree}")
    assert capsys.readouterr().out.splitlines()[0] == ("pets: decoding 30 images of 6x4, once, into the cache (0.0 MB)")
    assert (d.name, d.c, d.classes, d.shape, d.asked) == ("pets", 3, ("cat", "dog", "emu"), (3, 4, 6), f"folder:{tree}")
    assert [len(ds) for ds in (d.train, d.valid, d.test)] == [22, 2, 6]
    assert (d.train.x.dtype, d.train.x.shape, d.train.y.dtype) == (torch.uint8, (22, 3, 4, 6), torch.int64)
    found = [seeds_of(ds) for ds in (d.train, d.valid, d.test)]
    for seeds, ds in zip(found, (d.train, d.valid, d.test), strict=True):
        assert ds.y.tolist() == [s // 100 for s in seeds]
    assert sorted(found[0] + found[1]) == [100 * i + j for i in range(3) for j in range(4 * (i + 1))]
    assert sorted(found[2]) == [50, 51, 150, 151, 250, 251]


def test_pixels_are_normalised_by_the_training_images_and_come_back(tree):
    d = load_folder(tree, held_out=0)
    assert len(d.train) == 24
    x = d.train.x.double() / 255
    torch.testing.assert_close(d.mean.flatten().double(), x.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(d.std.flatten().double(), x.transpose(0, 1).flatten(1).std(1), atol=1e-6, rtol=0)
    y = d.tfm(d.train.x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), (x - d.mean) / d.std, atol=1e-5, rtol=0)
    assert torch.equal((y * d.std + d.mean).mul(255).round().byte(), d.train.x)
    assert torch.equal(torch.cat([d.tfm(part) for part in d.train.x.split(5)]), y)
    part = load_folder(tree, 3)
    assert (torch.equal(part.mean, d.mean), len(part.train), len(part.valid), len(part.test)) == (True, 3, 2, 6)


def test_experiments_of_other_shapes_refuse_a_folder(tree):
    from experiments.published.small_batch import Config
    with pytest.raises(InputError, match=r"the data are 'folder:.*pets', and this experiment's networks are for grey "
                                         r"images of 28x28 in ten classes; use --data mnist or fashion-mnist or dig"):
        Config(data=f"folder:{tree}")
