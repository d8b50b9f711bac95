"""Finding, checking and loading images."""

import gc
import gzip
import hashlib
import http.server
import threading
import time

import pytest
import torch
from torchvision.datasets import MNIST

from experiments import data
from experiments.errors import InputError
from experiments.models import conv_layer

REAL_DOWNLOAD = data.download     # before the fixture that forbids it


def idx(images, labels):
    """The bytes of an IDX image file and an IDX label file."""
    n = len(labels)
    head = (2051).to_bytes(4, "big") + n.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    return head + images.numpy().tobytes(), (2049).to_bytes(4, "big") + n.to_bytes(4, "big") + labels.numpy().tobytes()


@pytest.fixture
def tiny(monkeypatch):
    """Contents of a small stand-in for MNIST's four files (12 training, 4 validation, 5 test), accepted as sound."""
    g = torch.Generator().manual_seed(0)
    parts = [idx(torch.randint(0, 256, (n, 28, 28), generator=g).byte(), torch.randint(0, 10, (n,), generator=g).byte())
             for n in (16, 5)]
    files = dict(zip(data.FILES["MNIST"], (f for part in parts for f in part), strict=True))
    sound = {k: (len(v), hashlib.md5(v).hexdigest()) for k, v in files.items()}
    for kind in data.FILES: monkeypatch.setitem(data.FILES, kind, sound)
    monkeypatch.setattr(data, "TRAIN_IMAGES", 12)
    return files


def put(files, root, kind="MNIST"):
    raw = root / kind / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items(): (raw / name).write_bytes(content)
    return root


def test_files_are_read_as_torchvision_reads_them_and_without_it(tiny, tmp_path, monkeypatch):
    root = put(tiny, tmp_path)
    for file in (root / "MNIST" / "raw").iterdir(): file.chmod(0o444)
    both, test = (MNIST(str(root), train=train) for train in (True, False))
    monkeypatch.setattr(data, "_class", None)       # whose import takes seconds, in each worker process
    d = data.load_data("mnist", root)
    for part, x, y in ((d.train, both.data[:12], both.targets[:12]), (d.valid, both.data[12:], both.targets[12:]),
                       (d.test, test.data, test.targets)):
        assert torch.equal((part.x * d.std + d.mean).mul(255).round().byte().view(-1, 28, 28), x)
        assert torch.equal(part.y, y)
        assert part.y.dtype == torch.int64
    assert {f.name: f.read_bytes() for f in (root / "MNIST" / "raw").iterdir()} == tiny


def test_real_mnist_is_split_and_normalised(mnist_dir):
    d = data.load_data("mnist", mnist_dir)
    assert (len(d.train), len(d.valid), len(d.test), d.notice) == (50_000, 10_000, 10_000, "")
    assert d.train.x.shape == (50_000, 784)
    assert d.train.x.mean().item() == pytest.approx(0, abs=1e-4)
    assert d.train.x.std().item() == pytest.approx(1, abs=1e-4)
    assert d.train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert d.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    # The training set's own moments, 0.1304 and 0.3073 of a pixel's range, normalise all three.
    assert d.valid.x.min().item() == pytest.approx(-0.1304 / 0.3073, abs=1e-3)


def test_digits_are_flat_normalised_and_always_the_same():
    a, b = data.load_data("digits"), data.load_data("digits")
    assert [len(s) for s in (a.train, a.valid, a.test)] == [1197, 300, 300]
    assert a.train.x.shape == (1197, 784)
    assert abs(a.train.x.mean()) < 1e-5
    assert a.train.x.std().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(a.train.x, b.train.x)
    assert a.train.y.bincount().min() > 80
    assert a.notice == ""


def test_limit_cuts_training_and_validation_but_not_the_moments():
    whole, cut = data.load_data("digits"), data.load_data("digits", limit=50)
    assert [len(s) for s in (cut.train, cut.valid, cut.test)] == [50, 50, 300]
    assert torch.equal(cut.train.x, whole.train.x[:50])


def test_folder_then_environment_then_cache(tiny, tmp_path, monkeypatch):
    folder, env, cache = (put(tiny, tmp_path / n) for n in ("folder", "env", "cache/runnernorms"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.find_images("MNIST")[0] == cache
    monkeypatch.setenv("NORMS_DATA_DIR", str(env))
    assert data.find_images("MNIST")[0] == env
    assert data.find_images("MNIST", str(folder))[0] == folder
    d = data.load_data("auto", folder)
    assert (d.name, len(d.train), len(d.valid), len(d.test)) == ("MNIST", 12, 4, 5)


def test_auto_falls_back_to_the_digits_loudly():
    d = data.load_data("auto")
    assert d.name.startswith("digits")
    assert "THIS IS NOT MNIST" in d.notice
    assert "the download failed: no network in the tests" in d.notice
    assert "--data-dir" in d.notice


def test_the_first_of_several_that_can_be_had(tiny, tmp_path):
    both = ("FashionMNIST", "MNIST")
    d = data.load_data("auto", put(tiny, tmp_path), auto=both)
    assert d.name == "MNIST"
    assert d.notice.startswith("THIS IS NOT Fashion-MNIST. Fashion-MNIST is unavailable:\n  - --data-dir: ")
    assert d.notice.endswith("In its place: MNIST.")
    with pytest.raises(InputError, match=r"FashionMNIST/raw' lacks .* must hold FashionMNIST/raw/"):
        data.load_data("fashion-mnist", tmp_path, auto=both)
    put(tiny, tmp_path, "FashionMNIST")
    for name in ("auto", "fashion-mnist"):
        d = data.load_data(name, tmp_path, auto=both)
        assert (d.name, d.notice, len(d.train)) == ("Fashion-MNIST", "", 12)
    assert data.load_data("mnist", tmp_path, auto=both).name == "MNIST"
    notice = data.load_data("auto", auto=both).notice
    assert "THIS IS NOT Fashion-MNIST" in notice
    assert "THIS IS NOT MNIST" in notice
    assert "For Fashion-MNIST put its four files into FOLDER/FashionMNIST/raw" in notice


def test_pixels_come_back_by_the_moments():
    d = data.load_data("digits", limit=50)
    pixels = d.train.x * d.std + d.mean
    assert pixels.min().item() == pytest.approx(0, abs=1e-6)
    assert pixels.max().item() == pytest.approx(1, abs=1e-6)


def test_environment_without_mnist_goes_on_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMS_DATA_DIR", str(tmp_path))
    assert "NORMS_DATA_DIR" in data.load_data("auto").notice


def test_mnist_asked_for_and_not_to_be_had():
    with pytest.raises(InputError, match=r"(?s)MNIST is unavailable.*no network.*or use --data digits"):
        data.load_data("mnist")


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_folder_that_lacks_files(name, tiny, tmp_path):
    with pytest.raises(InputError, match=r"nowhere' does not exist.*must hold MNIST/raw/"):
        data.load_data(name, tmp_path / "nowhere")
    del tiny["t10k-labels-idx1-ubyte"]
    with pytest.raises(InputError, match=r"raw' lacks t10k-labels-idx1-ubyte\. A data folder must hold"):
        data.load_data(name, put(tiny, tmp_path))
    with pytest.raises(InputError, match="lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k"):
        data.load_data(name, tmp_path / "MNIST")


@pytest.mark.parametrize("place", ["folder", "environment", "cache"])
def test_truncated_and_corrupted_files(place, tiny, tmp_path, monkeypatch):
    root = tmp_path / "runnernorms"
    if place == "environment": monkeypatch.setenv("NORMS_DATA_DIR", str(root))
    if place == "cache": monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = root if place == "folder" else None
    name = "train-images-idx3-ubyte"
    whole = tiny[name]
    put({**tiny, name: whole[:-100]}, root)
    with pytest.raises(InputError, match=rf"{name}' is 12,460 bytes long and must be 12,560 \(half-written\?\)\. Del"):
        data.load_data("auto", folder)
    put({**tiny, name: whole[:-1] + bytes([whole[-1] ^ 1])}, root)
    with pytest.raises(InputError, match=rf"{name}' is damaged: its MD5 is .* and MNIST's is .*put a sound copy"):
        data.load_data("auto", folder)


@pytest.mark.parametrize(("name", "hint"), [("mnits", "mnist"), ("digit", "digits"), ("MNISTT", "mnist")])
def test_unknown_data_set_names_the_nearest(name, hint):
    with pytest.raises(InputError, match=f"unknown data set '{name}': did you mean '{hint}'"): data.load_data(name)


@pytest.mark.parametrize("limit", [0, -3, 1.5])
def test_limit_that_makes_no_sense(limit):
    with pytest.raises(InputError, match=f"limit is {limit}; it must be a positive number"):
        data.load_data("digits", limit=limit)


# --- the download, from a server on this machine -------------------------------------------------------------------

@pytest.fixture
def server(tiny, monkeypatch):
    """Serves the small stand-in, gzipped, and takes the place of torchvision's mirrors; yields the served files."""
    packed = {f"/{name}.gz": gzip.compress(content) for name, content in tiny.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path in packed
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(packed.get(self.path, b""))))
            self.end_headers()
            if found and self.command == "GET": self.wfile.write(packed[self.path])
        do_HEAD = do_GET

        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as srv:
        threading.Thread(target=srv.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{srv.server_address[1]}/"])
        monkeypatch.setattr(MNIST, "resources", [(k[1:], hashlib.md5(v).hexdigest()) for k, v in packed.items()])
        monkeypatch.setattr(data, "download", REAL_DOWNLOAD)
        yield packed
        srv.shutdown()


def test_download_goes_into_the_cache_once(server):
    assert data.load_data("auto").name == "MNIST"
    server.clear()
    assert data.load_data("mnist").name == "MNIST"
    assert [p.name for p in data.cache_dir().iterdir()] == ["MNIST"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")     # torchvision leaves the 404 open
def test_broken_download_leaves_nothing_behind(server):
    del server["/t10k-labels-idx1-ubyte.gz"]
    d = data.load_data("auto")
    assert d.name.startswith("digits")
    assert "the download failed: Error downloading t10k-labels" in d.notice
    assert list(data.cache_dir().iterdir()) == []
    del d
    gc.collect()


def test_no_network_gives_up_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])      # nothing listens there
    with pytest.raises(OSError, match="no network"): REAL_DOWNLOAD(tmp_path / "cache", "MNIST")
    assert not (tmp_path / "cache").exists()


def test_silent_network_gives_up_after_the_probe(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: time.sleep(3))    # as a hanging name look-up does
    with pytest.raises(OSError, match=r"no answer from the network within 0\.3 s"): REAL_DOWNLOAD(tmp_path, "MNIST")


def test_conv_layer_needs_a_maker_of_norms():
    for bad in (torch.nn.BatchNorm2d(4), "batch", lambda nf: nf):
        with pytest.raises(TypeError, match="it needs a callable that makes a module from a channel count"):
            conv_layer(1, 4, norm=bad)
