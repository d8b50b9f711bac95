"""Where results go: run folders, tables, and the record of what they were made with."""

import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from experiments.errors import InputError
from runner.rows import text_table as text_table  # the plain table beside `markdown_table`

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = dict[str, Any]                            # figures by name, as JSON takes them; which ones, its experiment says
Verdict = tuple[bool | None, str]               # reproduced (None: not tested), and a sentence
Table = tuple[list[str], list[list[str]]]       # header and lines


class Summary(TypedDict):
    """What an experiment's `summary.json` holds."""

    experiment: str
    data: str
    train_images: int
    valid_images: int
    complete: bool
    reproduced: bool | None
    verdict: str
    published: object
    rows: list[Row]


@dataclass
class Result:
    """What an experiment's `run(config)` returns.

    `rows` are its final figures, one per arm and seed; `reproduced` is True, False or None (not tested), `verdict`
    says so in a sentence; `folder` is the run folder. `status` is the command's exit status: 1 if the published result
    was looked for and not found, or no arm ran, else 0.
    """

    rows: list[Row] = field(default_factory=list)
    reproduced: bool | None = None
    verdict: str = ""
    folder: Path | None = None

    @property
    def status(self) -> int: return int(self.reproduced is False or all(r["status"] == "failed" for r in self.rows))


class RunFolder:
    """A new folder with `config.json`, `metrics.jsonl`, `summary.json` and pictures.

    Args:
        out: the folder; None makes `runs/<experiment>/<date>-<time>`.
        experiment: its name.
        config: the settings, a dataclass.
        facts: more to record, such as the data's sizes.

    Raises:
        InputError: the folder holds a run already, or can't be written.
    """

    def __init__(self, out: str | Path | None, experiment: str, config: "DataclassInstance",
                 facts: Mapping[str, object]) -> None:
        now = datetime.now()
        self.path = Path(out) if out is not None else _unused(Path("runs") / experiment / f"{now:%Y%m%d-%H%M%S}")
        try:
            if out == "": raise InputError("the run folder has no name; give --out one")
            if any((self.path / f).exists() for f in ("config.json", "metrics.jsonl", "summary.json")):
                raise InputError(f"the run folder {str(self.path)!r} holds a run already and results are not "
                                 "overwritten; name another by --out, or delete it")
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", {
                "experiment": experiment, "config": {k: _shareable(v) for k, v in dataclasses.asdict(config).items()},
                **facts, "versions": versions(), "started": f"{now:%Y-%m-%d %H:%M:%S}",
                "argv": [_shareable(a) for a in sys.argv[1:]]})
            (self.path / "metrics.jsonl").write_text("")
        except OSError as e:
            raise InputError(f"the run folder {str(self.path)!r} can't be written: {e.strerror}; name another by "
                             "--out") from e

    def add_metrics(self, row: Row) -> None:
        """Append one row to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a") as f: f.write(json.dumps(_finite(row)) + "\n")

    def write_json(self, name: str, content: object) -> None:
        """Write `content` in one step: a reader, or an interruption, finds the old file or the new one."""
        half = self.path / f".{name}.half"
        half.write_text(json.dumps(_finite(content), indent=1) + "\n")
        os.replace(half, self.path / name)


def _unused(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that does not exist yet."""
    n, free = 1, path
    while free.exists(): n, free = n + 1, path.with_name(f"{path.name}-{n + 1}")
    return free


def _shareable(value: object) -> object:
    """`value` without the folders of this machine: a path keeps its last part."""
    if isinstance(value, Path) or (isinstance(value, str) and os.sep in value):
        option, eq, path = str(value).rpartition("=")
        return f"{option}{eq}.../{Path(path).name}"
    return value


def _finite(o: object) -> object:
    """`o` with every number that JSON lacks (NaN, infinities) as None."""
    if isinstance(o, float) and not math.isfinite(o): return None
    if isinstance(o, dict): return {k: _finite(v) for k, v in o.items()}
    if isinstance(o, (list, tuple)): return [_finite(v) for v in o]
    return o


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the kind of machine."""
    def of(name: str) -> str:
        try: return metadata.version(name)
        except metadata.PackageNotFoundError: return "not installed"
    packages = ("runnernorms", "torchvision", "scikit-learn", "matplotlib")
    return {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}",
            "torch": str(torch.__version__), **{name: of(name) for name in packages}}


def read_summary(path: str | Path) -> dict[str, Any]:
    """`summary.json` of a run folder, or a committed record, as a dict.

    Raises:
        InputError: there is none, or it isn't one.
    """
    path = Path(path)
    file = path / "summary.json" if path.is_dir() else path
    try: summary = json.loads(file.read_text())
    except OSError as e:
        raise InputError(f"can't read {str(file)!r}: {e.strerror}; name a run folder, or a summary.json") from e
    except ValueError as e:
        raise InputError(f"{str(file)!r} is no JSON ({e}); name a run folder, or a summary.json") from e
    kinds = ({"rows", "verdict", "train_images"}, {"rows", "machine"})      # an experiment's, a bench's
    if not isinstance(summary, dict) or not any(kind <= set(summary) for kind in kinds):
        raise InputError(f"{str(file)!r} is no summary of a run; name a run folder, or a summary.json")
    return summary


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """The table of `runner.rows.text_table` in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)
