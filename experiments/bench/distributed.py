"""One fit over two processes against one process: what `Distributed` and `sync_norms` cost, and where they pay.

Milliseconds per step of an epoch by the Runner on the five-layer network with RunningBatchNorm, gloo over loopback, one
thread in each process, torch's own convolutions. "2 x 1" is a batch of 2 over two processes. Both processes go through
the arms in turn; one process alone is timed while the other waits.
"""

import multiprocessing
import os
import socket
import time
from typing import Any

import torch
import torch.nn.functional as F

from experiments.bench import Config
from experiments.bench.norms import network
from experiments.bench.timing import row, settings
from experiments.errors import InputError
from experiments.results import Row
from norms import RunningBatchNorm, sync_norms
from runner import SGD, DataBunch, Distributed, Learner, Runner
from runner.processes import Connection, Group

STEPS, WAIT = 100, 120.0    # steps of a measurement; seconds in which the other process must answer
# arm: (images of the whole batch, processes, whether the norms are synchronised)
ARMS: dict[str, tuple[int, int, bool]] = {
    "1 x 2": (2, 1, False), "2 x 1": (2, 2, False), "2 x 1, synchronised": (2, 2, True),
    "1 x 16": (16, 1, False), "2 x 8": (16, 2, False), "2 x 8, synchronised": (16, 2, True)}
AGAINST = {"2 x 1": "1 x 2", "2 x 1, synchronised": "1 x 2", "2 x 8": "1 x 16", "2 x 8, synchronised": "1 x 16"}


def learner(images: int, synchronised: bool) -> Learner:
    """The network with random batches of so many images."""
    model, rng = network(RunningBatchNorm), torch.Generator().manual_seed(0)
    if synchronised: sync_norms(model)
    batches = [(torch.randn(images, 1, 28, 28, generator=rng), torch.arange(images) % 10) for _ in range(STEPS)]
    return Learner(model, SGD(model.parameters(), lr=0.01), F.cross_entropy, DataBunch(batches))


def work(rank: int, port: int, repetitions: int, results: Any) -> None:
    """One of the two processes: time all arms, and if it's the first, send milliseconds per step."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    both = Group(Connection())
    learners = {arm: learner(images, synchronised) for arm, (images, _, synchronised) in ARMS.items()}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with settings(onednn=False):
        for i in range(-1, repetitions):            # the first is not counted
            for arm in [*ARMS][::1 if i % 2 else -1]:
                together = ARMS[arm][1] > 1
                both.first(None)                    # the two begin at once
                start = time.perf_counter()
                if together or both.leads: Runner([Distributed()] if together else []).fit(1, learners[arm])
                if i >= 0: times[arm].append((time.perf_counter() - start) / STEPS * 1e3)
    if both.leads: results.put(times)
    both.first(None)


def rows(config: Config) -> list[Row]:
    """The part's rows.

    Raises:
        InputError: the processes can't reach each other.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=work, args=(rank, port, config.repetitions, results)) for rank in range(2)]
    for worker in workers: worker.start()
    try: times = results.get(timeout=WAIT + 20 * config.repetitions)
    except Exception as e:
        raise InputError(f"the two processes of the part distributed gave no figures ({type(e).__name__}); they need "
                         "loopback, 127.0.0.1, and gloo, see above") from e
    finally:
        for worker in workers:
            worker.join(5)
            if worker.is_alive(): worker.kill()
    return [row("distributed", "RunningBatchNorm", arm, AGAINST.get(arm), times) for arm in ARMS]
