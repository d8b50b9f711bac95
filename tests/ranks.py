"""Starts programs of `distributed_programs` on several processes, over loopback, and ends them all in time."""

import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(forks, size, out, *names, timeout=60):
    """Run the programs `names` one after the other on `size` processes; what each process has
    returned, by name; how it went, and the folder."""
    import torch
    out.mkdir(exist_ok=True)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import ranks; ranks.main({size}, {timeout}, *sys.argv[1:])"
    done = forks.run("-c", code, str(out), *names, cwd=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(size)], done, out


def main(size, timeout, out, *names):
    """Fork `size` processes that run the programs; exits with 1 if one fails or they take too long."""
    import distributed_programs
    port, children = free_port(), {}
    for rank in range(size):
        pid = os.fork()
        if not pid:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port))
            code = 1
            try:
                run(distributed_programs, rank, Path(out), names)
                code = 0
            except BaseException: traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children[pid] = rank
    end, failed = time.monotonic() + timeout, False
    while children and not failed and time.monotonic() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid: failed |= bool(children.pop(pid) is None or status)
        else: time.sleep(0.02)
    for pid in children:
        print(f"rank {children[pid]} didn't end", file=sys.stderr)
        os.kill(pid, 9)
    sys.exit(bool(children) or failed)


def run(programs, rank, out, names):
    import torch
    torch.set_num_threads(1)
    results = {}
    for name in names:
        torch.manual_seed(0)
        begun = time.monotonic()
        results[name] = getattr(programs, name)()
        print(f"rank {rank}: {name} took {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
        torch.save(results, out / f"{rank}.pt")


def torchrun(size, *args, cwd, env=None, timeout=90):
    """`torchrun --nproc-per-node SIZE ARGS`, over loopback."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-addr", "127.0.0.1",
         "--master-port", str(free_port()), *map(str, args)], cwd=cwd, timeout=timeout, text=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)} | (env or {}))
