"""What a run is made of, in plain values: a checkpoint of another run is told by it, and what differs is named."""

import platform
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from runner.batches import length_of
from runner.loading import samplers
from runner.states import parts_of

Fingerprint = dict[str, Any]

# Without these there is nothing to go on with. The others may differ, if somebody says so.
NEEDED = ("parameters", "groups", "optimizer")

SETTINGS = ("batch_size", "drop_last", "replacement", "_num_samples", "shuffle", "num_replicas", "rank")  # of samplers


def fingerprint(run: Any) -> Fingerprint:
    """The fingerprint of a fit that begins, after all `begin_fit`s."""
    modules, slots = parts_of(run.model, run.loss_func, run.opt)
    params = {name: d[k] for name, (_, d, k) in slots.items() if isinstance(d[k], nn.Parameter)}
    device = next(iter(params.values())).device if params else torch.device("cpu")
    by_position = [cb for cb in run.cbs if getattr(cb, "by_position", False)]
    return {
        "model": type(run.model).__name__,
        "loss function": getattr(run.loss_func, "__name__", type(run.loss_func).__name__),
        "optimizer": type(run.opt).__name__,
        "parameters": {name: None if is_lazy(p) else [list(p.shape), str(p.dtype)] for name, p in params.items()},
        "modules": {path: type(m).__name__.removeprefix("Lazy") for path, m in modules.items()},
        "groups": [len(group["params"]) for group in run.opt.param_groups],
        "callbacks": {cb.name: type(cb).__name__ for cb in run.cbs if has_state(cb)},
        **({"epochs of a schedule": run.epochs} if by_position else {}),
        "training loader": loader(run.data.train_dl),
        "validation loader": loader(run.data.valid_dl),
        "settings": {
            "threads": torch.get_num_threads(), "oneDNN": torch.backends.mkldnn.enabled,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "float32 products": torch.get_float32_matmul_precision(), "default dtype": str(torch.get_default_dtype()),
            "device": device.type, **_cuda(device)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": getattr(sys.modules.get("numpy"), "__version__", None),
                     "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"},
    }


def _cuda(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda": return {}
    return {"GPU": torch.cuda.get_device_name(device), "GPUs": torch.cuda.device_count(),
            "cuDNN": [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark]}


def has_state(cb: object) -> bool:
    """Whether `cb` has `state_dict` and `load_state_dict`."""
    return all(callable(getattr(cb, name, None)) for name in ("state_dict", "load_state_dict"))


def loader(dl: Any) -> dict[str, Any] | None:
    """What decides which batches a loader gives, and in what order."""
    if dl is None: return None
    found: dict[str, Any] = {"class": type(dl).__name__, "length": length_of(dl)}
    ds = getattr(dl, "dataset", None)
    if ds is not None: found |= {"data set": type(ds).__name__, "items": length_of(ds)}
    if isinstance(dl, DataLoader):
        found |= {"workers": dl.num_workers, "persistent": dl.persistent_workers, "generator": dl.generator is not None}
    for i, sampler in enumerate(samplers(dl)):
        settings = {k: v for k, v in _plain(sampler).items() if k in SETTINGS}
        found[f"sampler {i}" if i else "sampler"] = {"class": type(sampler).__name__, **settings}
    return found


def _plain(o: object) -> dict[str, Any]:
    return {k: v for k, v in getattr(o, "__dict__", {}).items() if isinstance(v, (bool, int, float, str))}


def differences(saved: Fingerprint, now: Fingerprint, in_epoch: bool) -> tuple[list[str], list[str]]:
    """What differs, in words: what can't be, and what may be if somebody says so.

    `in_epoch`: the checkpoint is from the middle of an epoch, which goes on with the same batches or not at all.
    """
    never: list[str] = []
    perhaps: list[str] = []
    for what in dict.fromkeys((*saved, *now)):
        a, b = saved.get(what), now.get(what)
        if what == "parameters": a, b = _made(a, b), _made(b, a)
        if a == b: continue
        needed = what in NEEDED or (in_epoch and what == "training loader" and not _same_order(a, b))
        (never if needed else perhaps).append(words(what, a, b))
    return never, perhaps


def _made(a: Any, b: Any) -> Any:
    """The parameters `a`, with what those of `b` say of one that was yet to be made."""
    return {name: b.get(name) if shape is None else shape for name, shape in a.items()}


def _same_order(a: Any, b: Any) -> bool:
    """Whether two loaders differ in nothing but who fetches the batches."""
    free = ("class", "workers", "persistent")
    return all(isinstance(x, dict) for x in (a, b)) and {k: v for k, v in a.items() if k not in free} == {
        k: v for k, v in b.items() if k not in free}


def words(what: str, a: Any, b: Any) -> str:
    """How two values of `what` differ: the first entries that do, if they are dicts."""
    if not (isinstance(a, dict) and isinstance(b, dict)): return f"{what} {_value(a)}, now {_value(b)}"
    keys = [k for k in dict.fromkeys((*a, *b)) if a.get(k) != b.get(k)]
    parts = [words(f"{what}: {k}", a.get(k), b.get(k)) for k in keys[:3]]
    return "; ".join(parts) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")


def _value(v: Any) -> str:
    if v is None: return "none"
    if isinstance(v, list) and len(v) == 2 and isinstance(v[0], list): return f"{tuple(v[0])} {v[1]}"
    return str(v)
