import os
import tempfile
from pathlib import Path

# Hypothesis keeps what it learns in a folder, by default here: tests write to their own temporary folders only.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "runnernorms-hypothesis"))

# Two processes of pytest-xdist with two threads each would wait for one another on two cores; and experiments run their
# arms in the test's own process only if that was started with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# One job at a time, in the test's own process; tests of worker processes ask for them.
os.environ["NORMS_JOBS"] = "1"

import matplotlib
import pytest
import torch
from forking import Forks

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    """Every test starts from the same random state, with an empty cache of its own and without a network."""
    # torch.manual_seed files a traceback for each kind of device that there isn't, which takes longer than most tests.
    if torch.cuda.is_available(): torch.manual_seed(0)
    else: torch.default_generator.manual_seed(0)
    monkeypatch.setattr("os.fsync", lambda fd: None)        # a disk's time; what a crash leaves has tests of its own
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("experiments.data.download", no_network)
    monkeypatch.delenv("NORMS_DATA_DIR", raising=False)


def pytest_configure(config):
    """Let a process of pytest-xdist that is through take over another's tests: by default each keeps what it is given.
    """
    if getattr(config.option, "dist", None) == "load": config.option.dist = "worksteal"


# Their single tests take longest: at the end of a run one of them would keep one process busy and the other waiting.
LONGEST = ("test_typing.py", "test_lessons.py", "test_readme.py", "test_experiments_small_batch.py",
           "test_experiments_resume.py", "test_experiments_inside.py", "test_runner_compile.py",
           "test_runner_distributed.py")


# The names in the tests' lists of norms that have a definition and no kernels: they run once, and by that.
NO_KERNELS = {"evonorm", "filter response", "mabn", "momentum", "renorm"}


def pytest_collection_modifyitems(items):
    """Tests marked `one_route` run with the kernels only: what is compiled, exported or elsewhere has its own.
    """
    def second(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        one = bool(item.get_closest_marker("one_route"))
        none = any(isinstance(v, str) and v in NO_KERNELS for v in params.values())
        return (one or none) and params.get("kernels") == ("definition" if one else "kernels")
    items[:] = [item for item in items if not second(item)]
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def forks():
    """Runs Python in a process of its own that has imported torch, and nothing of this project."""
    forks = Forks("torch")
    yield forks
    forks.close()


def no_network(root, kind):
    raise OSError("no network in the tests")


MNIST_DIR = os.environ.get("NORMS_DATA_DIR")
MNIST_DIR = str(Path(MNIST_DIR).resolve()) if MNIST_DIR else None


@pytest.fixture
def mnist_dir():
    """The folder that holds MNIST, from NORMS_DATA_DIR; a test that can't do without it is skipped elsewhere."""
    if MNIST_DIR is None: pytest.skip("needs MNIST: set NORMS_DATA_DIR")
    return MNIST_DIR


@pytest.fixture(params=["kernels", "definition"])
def kernels(request, monkeypatch):
    """Once with the norms' kernels and once by their definitions, as without a C compiler."""
    import norms.fast.kernels
    if request.param == "definition": monkeypatch.setattr(norms.fast.kernels, "KERNELS", {})
    elif not norms.fast.kernels.AVAILABLE: pytest.skip("the norms' kernels are not built: pip install -e . builds them")
    return request.param
