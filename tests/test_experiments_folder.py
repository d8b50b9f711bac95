"""Folders of images: found, decoded once into the cache, and kept right there."""

import os
import random
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from experiments import folder_cache
from experiments.data import load_data
from experiments.errors import InputError
from experiments.folder import load_folder, read_tree, spread
from experiments.image_data import cache_dir
from experiments.run_folder import RunFolder
from experiments.settings import ImageStudySettings
from experiments.together import train_together
from experiments.training import train


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
    assert capsys.readouterr().out.startswith("pets: decoding 30 images of 6x4, once, into the cache (0.0 MB)\n"
                                               "pets: decoded in 0.")
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
    with pytest.raises(InputError, match=r"the data are 'folder:.*pets', and the networks here are for grey images of "
                                         r"28x28 in ten classes; use --data mnist or fashion-mnist or digits"):
        Config(data=f"folder:{tree}")
    from experiments.bench import Config as Bench
    with pytest.raises(InputError, match="the networks here are for grey images"): Bench(data="folder:x")


def test_labels_are_torchvisions_and_valid_will_do(tree, tmp_path):
    (tree / "val").rename(tree / "valid")
    put(tree, "train/cat/more/deep/3.PNG", 3)
    (tree / "train/dog/notes.txt").touch()
    theirs = ImageFolder(str(tree / "train"))
    put(tree, "train/.ipynb_checkpoints/1.png")         # torchvision takes it for a class
    put(tree, "train/dog/._100.png")
    ours = load_folder(tree, held_out=0)
    assert dict(zip(ours.classes, range(3), strict=True)) == theirs.class_to_idx

    found = sorted((x.permute(1, 2, 0).numpy().tobytes(), int(y)) for x, y in zip(*ours.train[:], strict=True))
    assert found == sorted((np.asarray(image).tobytes(), y) for image, y in theirs)
    assert len(ours.train) == 25
    assert torch.equal(ours.valid.x, ours.test.x)


@pytest.mark.parametrize("held_out", [0.1, 0.25, 0.5])
def test_each_class_has_its_share_of_every_part(tmp_path, held_out):
    files = {name: [(f"train/{name}/{j}.png", 0, 0) for j in range(n)] for name, n in (("a", 7), ("b", 20), ("c", 101))}
    order = spread(files)
    assert sorted(order) == sorted((path, label) for label, name in enumerate(files) for path, *_ in files[name])
    assert order == spread({name: its[::-1] for name, its in reversed(files.items())})
    first = [path for path, label in order if label == 2]
    assert first != sorted(first)
    n = len(order)
    for start, stop in ((0, 9), (0, 40), (n - round(n * held_out), n), (30, 77)):
        for label, size in enumerate((7, 20, 101)):
            assert abs(sum(y == label for _, y in order[start:stop]) - (stop - start) * size / n) < 2


# --- pixels -------------------------------------------------------------------------------------------------------

def test_pictures_of_every_mode_are_rgb_and_said(tree, capsys):
    rgb = Image.fromarray(pixels(7))
    alpha = rgb.copy()
    alpha.putalpha(Image.fromarray(pixels(9, channels=1)[:, :, 0]))
    palette = rgb.quantize(4)
    clear = palette.copy()
    clear.info["transparency"] = bytes([0, 100, 255, 255])
    images = {"1": (rgb.convert("1"), "png"), "L": (rgb.convert("L"), "png"), "LA": (alpha.convert("LA"), "png"),
              "P": (palette, "png"), "P clear": (clear, "png"), "RGBA": (alpha, "png"),
              "CMYK": (rgb.convert("CMYK"), "tif"), "grey": (rgb.convert("L"), "jpg"), "RGB": (rgb, "bmp"),
              "webp": (rgb, "webp")}
    for name, (image, ending) in images.items():
        options = {"transparency": image.info["transparency"]} if name == "P clear" else {}
        (tree / "train/cat" / name).mkdir()
        image.save(tree / "train/cat" / name / f"1.{ending}", **options)
    d = load_folder(tree, held_out=0)
    assert ("; converted to RGB: 2 of mode L, 2 of mode P, 1 of mode 1, 1 of mode CMYK, 1 of mode LA, 1 of mode RGBA\n"
            in capsys.readouterr().out)
    order = [path for path, _ in spread(read_tree(tree).parts[0])]
    for name, (_, ending) in images.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = Image.open(tree / "train/cat" / name / f"1.{ending}").convert("RGB")
        found = d.train.x[order.index(f"train/cat/{name}/1.{ending}")]
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(wanted)), name


def test_a_channel_of_one_value_is_no_reason_for_nans(tree):
    for file in (tree / "train").rglob("*.png"):
        image = np.array(Image.open(file))
        image[:, :, 1] = 9
        Image.fromarray(image).save(file)
    d = load_folder(tree)
    y = d.tfm(d.test.x)
    assert y.isfinite().all()
    torch.testing.assert_close(y[:, 1], d.test.x[:, 1] / 255 - 9 / 255)
    assert d.std[1] == 0


def test_a_network_is_trained_on_a_folder_alone_and_together(tree):
    d = load_folder(tree)
    rows = [{"norm": "none", "batch_size": 2, "lr": 0.1, "seed": seed, "epochs": 1} for seed in (0, 1)]

    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(32, d.c))
    for (_, row, losses), its in zip(train_together([make(), make()], d, rows, "cpu"), rows, strict=True):
        _, alone, losses_alone = train(make(), d, its, "cpu", "")
        assert losses == pytest.approx(losses_alone, rel=1e-4)
        assert (row["status"], len(losses)) == ("ok", 11)
        assert row["valid_loss"] == pytest.approx(alone["valid_loss"], rel=1e-3)


# --- what is wrong with a folder ----------------------------------------------------------------------------------

def refused(path, match, **kwargs):
    """Assert that the folder is refused so, and that nothing is left in the cache."""
    with pytest.raises(InputError, match=match): load_folder(path, **kwargs)
    assert not [f for f in (cache_dir() / "folders").glob("*") if f.is_file()]


def test_no_folder(tree, tmp_path):
    refused(tmp_path / "nowhere", r"nowhere' does not exist: a folder of images needs train/ and val/ \(or valid/\),")
    refused("", "no folder was named; give one, as in --data folder:DIR")
    refused("~nobody at all/x", "does not exist")
    refused(put(tmp_path, "x.png"), r"x\.png' is a file; unpack it, and name the folder")


def test_a_folder_of_other_things(tree, tmp_path):
    refused(tmp_path, r"has no train/; .*: they are in '.*/pets': name that")
    refused(tree / "train", r"has no train/; .*: name the folder above, '.*/pets'")
    refused(tree / "train/cat", r"has no train/; .*: make or rename one\. It has no folders")
    (tree / "val").rename(tree / "test")
    refused(tree, r"has no val/ or valid/; .* in both a folder for each class: make or rename one\. It has test/, tr")
    for name in ("val", "valid"): put(tree, f"{name}/cat/1.png")
    refused(tree, "has both val/ and valid/; rename the one that is not to be read")


def test_classes_without_images_or_in_one_part(tree):
    (tree / "train/fox").mkdir()
    (tree / "train/gnu").mkdir()
    refused(tree, "2 of the 5 classes in '.*train' have no images: train/fox, train/gnu; give them some, or delete")
    put(tree, "train/fox/1.png")
    put(tree, "train/gnu/1.png")
    put(tree, "val/yak/1.png")
    refused(tree, "the classes of '.*pets' differ: only train/ has fox, gnu, and only val/ has yak; both parts need")


def test_no_images_no_classes_one_class(tree, tmp_path):
    root = tmp_path / "empty"
    for part in ("train", "val"): (root / part).mkdir(parents=True)
    refused(root, r"train' has no folders; its images must lie in a folder for each class, as in train/cat/1\.jpg")
    for part in ("train", "val"): (root / part / "cat").mkdir()
    refused(root, r"train' has no images: in the folders of its 1 classes no file ends in \.jpg, .*; put images there")
    (root / "train/cat/1.gif").touch()
    refused(root, r"no file ends in .*\.webp \(but in \.gif\); put images there, or convert them")
    for part in ("train", "val"): put(root, f"{part}/cat/1.png")
    refused(root, "train' has one class, 'cat'; a network needs at least two to tell apart")


def test_sizes_that_differ_are_told_and_how_to_mend_them(tree, monkeypatch):
    monkeypatch.setattr(folder_cache, "AT_ONCE", 4 * 72)
    for i in range(3): put(tree, f"train/emu/wide{i}.png", size=(9, 4))
    put(tree, "val/cat/high.png", size=(6, 7))
    refused(tree, r"pets differ in size, width x height: 30 of 6x4 \(as .*\), 3 of 9x4 \(as 'train/emu/wide.\.png'\), "
                  r"1 of 6x7 \(as 'val/cat/high\.png'\); batches need one size: resize them into another folder, "
                  r"each by PIL\.ImageOps\.fit\(image, \(6, 4\)\), say, and name that")


def test_files_that_cannot_be_read_are_listed(tree):
    for i in range(4): (tree / f"train/cat/{i}.png").write_bytes(b"no image")
    file = tree / "val/emu/250.png"
    file.write_bytes(file.read_bytes()[:60])
    (tree / "train/dog/gone.jpg").symlink_to("nowhere")
    os.mkfifo(tree / "train/dog/pipe.jpg")
    Image.fromarray(np.zeros((4, 6), dtype=np.uint16)).save(tree / "train/dog/deep.png")
    refused(tree, r"8 of 33 image files can't be read: 'train/cat/0\.png' \(cannot identify image file .*\), .*"
                  r"'train/dog/deep\.png' \(mode I.*, more than 8 bits a pixel; convert it to 8 bits\) and 3 more; "
                  "delete them, or put sound copies in their place")
    put(tree, "val/cat/high.png", size=(6, 7))
    refused(tree, r"(?s)8 of 34 image files can't be read.*\nthe images of pets differ in size")


def test_no_file_at_all_can_be_read(tree):
    for file in tree.rglob("*.png"): file.write_bytes(b"")
    refused(tree, "30 of 30 image files can't be read: 'train/cat/0.png'")


def test_too_many_images(tree):
    refused(tree, r"the 30 images of pets are 6x4, decoded 0\.0 MB, and the limit is 0\.0 MB; resize them \(a quarter "
                  r"of the bytes at half the width\), take fewer, or raise the limit: load_folder\(.*max_bytes=.*\)",
            max_bytes=30 * 72 - 1)
    assert len(load_folder(tree, max_bytes=30 * 72).train) == 22


@pytest.mark.parametrize("held_out", [-0.1, 0.6, float("nan"), "a half", True])
def test_shares_that_make_no_sense(tree, held_out):
    with pytest.raises(InputError, match=r"held_out is .*; it must be a share of the training images from 0 to 0\.5"):
        load_folder(tree, held_out=held_out)


def test_too_few_images_to_hold_some_out(tmp_path):
    for name in "ab":
        for part in ("train", "val"): put(tmp_path, f"{part}/{name}/1.png")
    with pytest.raises(InputError, match="/train has 2 images of 2 classes, too few to hold out 1 and keep one of "):
        load_folder(tmp_path)
    assert len(load_folder(tmp_path, held_out=0).train) == 2


@pytest.mark.parametrize("name", ["/", "some/where", "."])
def test_a_path_without_its_prefix(name):
    with pytest.raises(InputError, match=f"unknown data set '{name}': if that is a folder of images, write folder:."):
        load_data(name)
    with pytest.raises(InputError, match="names their folder, and data_dir is 'x', the folder of MNIST/raw/; leave"):
        load_data("Folder:y", "x")


# --- the cache ----------------------------------------------------------------------------------------------------

@pytest.fixture
def decodings(monkeypatch):
    """Counts how often a folder is decoded."""
    times = []
    decode = folder_cache._decode
    monkeypatch.setattr(folder_cache, "_decode", lambda *args: (times.append(1), decode(*args)))
    return times


def the_file():
    file, = (cache_dir() / "folders").iterdir()
    return file


def same(a, b):
    return all(torch.equal(getattr(p, k), getattr(q, k)) for p, q in ((a.train, b.train), (a.valid, b.valid),
               (a.test, b.test)) for k in "xy") and torch.equal(a.mean, b.mean) and a.digest == b.digest


def test_a_folder_is_decoded_once_by_whatever_path(tree, tmp_path, decodings, monkeypatch):
    (tmp_path / "link").symlink_to(tree)
    monkeypatch.chdir(tree)
    found = [load_folder(path) for path in (tree, tmp_path / "link", ".", f"{tree}/../pets/")]
    assert len(decodings) == 1
    assert all(same(found[0], other) for other in found)
    assert [d.name for d in found] == ["pets", "link", "pets", "pets"]
    assert {d.place for d in found} == {str(tree)}
    the_file()


CHANGES = {
    "added": lambda root: put(root, "train/cat/new.png", 1),
    "removed": lambda root: (root / "train/emu/200.png").unlink(),
    "renamed": lambda root: (root / "train/emu/200.png").rename(root / "train/emu/300.png"),
    "other pixels": lambda root: put(root, "val/dog/150.png", 77),
    "another class": lambda root: (root / "train/dog/100.png").rename(root / "train/cat/100.png"),
    "a later time": lambda root: os.utime(root / "val/dog/150.png", ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_files_are_decoded_anew(tree, change, decodings, capsys):
    before = load_folder(tree)
    pixels_before = before.test.x.clone()
    CHANGES[change](tree)
    capsys.readouterr()
    after = load_folder(tree)
    assert capsys.readouterr().out.startswith("pets: the files have changed since they were decoded; they are decoded")
    assert len(decodings) == 2
    assert change == "renamed" or same(before, after) == (change == "a later time")     # the order may be another
    assert torch.equal(before.test.x, pixels_before)        # what is in use stays
    assert same(after, load_folder(tree))
    assert len(decodings) == 2


def test_damage_of_any_byte_is_noticed_and_mended(tree, decodings, capsys):
    whole = load_folder(tree)
    content = the_file().read_bytes()
    places = random.Random(0).sample(range(len(content)), 12)
    damaged = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1:] for at in places]
    damaged += [content[:at] for at in (0, 1, 50, *places[:2])] + [b"x" * 500, content + b"\n"]
    for i, bad in enumerate(damaged):
        the_file().write_bytes(bad)
        capsys.readouterr()
        again = load_folder(tree)
        assert "; they are decoded anew" in capsys.readouterr().out.splitlines()[0]
        assert len(decodings) == i + 2
        assert same(whole, again)
        assert the_file().read_bytes() == content


def test_what_is_loaded_can_be_changed_and_the_cache_stays(tree):
    d = load_folder(tree)
    content = the_file().read_bytes()
    d.train.x.zero_()
    assert the_file().read_bytes() == content
    assert load_folder(tree).train.x.any()


def test_a_full_disk_leaves_nothing_and_is_told(tree, monkeypatch):
    class Full:
        def __init__(self, fd, mode): self.file = os.fdopen(fd, mode)
        def __enter__(self): return self
        def __exit__(self, *args): self.file.close()

        def write(self, content):
            if self.file.tell() > 500: raise OSError(28, "No space left on device")
            self.file.write(content)

    def open_(path, mode): return Full(path, mode) if isinstance(path, int) else open(path, mode)
    monkeypatch.setattr(folder_cache, "open", open_, raising=False)
    refused(tree, r"can't be kept in '.*folders': No space left on device; make room, or name another place by the env")


def test_a_cache_that_cannot_be_made_is_told(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(put(tmp_path, "x.png")))
    with pytest.raises(InputError, match=r"can't be kept in '.*': Not a directory; make room, or name another place"):
        load_folder(tree)


def test_interrupted_decoding_leaves_nothing(tree, monkeypatch):
    def stop(self, done): raise KeyboardInterrupt
    monkeypatch.setattr(folder_cache._Progress, "__call__", stop)
    with pytest.raises(KeyboardInterrupt): load_folder(tree)
    assert list((cache_dir() / "folders").iterdir()) == []


def test_what_a_killed_process_left_is_deleted_when_it_is_old(tree):
    folder = cache_dir() / "folders"
    folder.mkdir(parents=True)
    for name, age in (("old.part", 200_000), ("new.part", 10)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    load_folder(tree)
    assert sorted(f.suffix for f in folder.iterdir()) == [".images", ".part"]


def test_files_that_change_while_they_are_decoded(tree, monkeypatch):
    progress = folder_cache._Progress.__call__

    def meddle(self, done):
        put(tree, f"train/cat/{done}0.png", done)
        progress(self, done)
    monkeypatch.setattr(folder_cache._Progress, "__call__", meddle)
    with pytest.raises(InputError, match="changed while they were decoded; start again when no one writes there"):
        load_folder(tree)


def test_several_at_once_all_get_the_same(tree, decodings):
    gate = threading.Barrier(4)

    def load(_):
        gate.wait()
        return load_folder(tree)
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(load, range(4)))
    assert decodings
    assert all(same(found[0], other) for other in found)
    the_file()


def test_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(folder_cache, "is_terminal", lambda: True)
    show = folder_cache._Progress("pets", 30)
    show(15)
    assert "pets |" in (bar := capsys.readouterr().out)
    assert "50% [15/30 0 s]" in bar
    show(30)
    assert capsys.readouterr().out.strip() == ""
    monkeypatch.setattr(folder_cache, "is_terminal", lambda: False)
    monkeypatch.setattr(folder_cache, "EVERY_SECONDS", -1)
    show = folder_cache._Progress("pets", 3000)
    show(1500)
    show(3000)
    assert capsys.readouterr().out == "pets: 1,500 of 3,000 images, 0 s\n"


def test_no_record_has_the_path_and_none_could_be_taken_for_another_data_set(tree, tmp_path, monkeypatch):
    class Config(ImageStudySettings): folders = True
    d, config = load_folder(tree), Config(data=f"folder:{tree}", out=str(tmp_path / "run"))
    monkeypatch.setattr("sys.argv", ["x", "--data", config.data, f"--data={config.data}"])
    RunFolder(config.out, "lab", config, {"data": str(d)})
    record = (tmp_path / "run/config.json").read_text()
    assert str(tmp_path) not in record
    assert f'"pets: 22 training, 2 validation and 6 test images, 3x4x6, 3 classes (digest {d.digest})"' in record
    other = tmp_path / "MNIST"
    tree.rename(other)
    assert load_folder(other).name == "folder MNIST"
