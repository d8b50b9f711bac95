"""Results: the form of what a run records, its tables, and the versions that it was made with."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch

import norms
from experiments.errors import InputError
from runner.rows import text_table as text_table  # the plain table beside `markdown_table`

Curve = TypeVar("Curve")
Row = dict[str, Any]                            # figures by name, as JSON takes them; which ones, its experiment says
# What training gives: rows per epoch, final row, and a curve such as the losses, which JSON takes.
Trained = tuple[list[Row], Row, Curve]
Table = tuple[list[str], list[list[str]]]       # header and lines


class SeedCurves(dict[str, Any]):
    """The curve of each arm's first seed by the arm's name, and in `every` those of all its seeds, in their order."""

    def __init__(self, first: Mapping[str, Any] | None = None) -> None:
        super().__init__(first or {})
        self.every: dict[str, list[Any]] = {}


class Recorded(TypedDict):
    """What a record says of the claims: whether they hold (None: not tested), a sentence, and each of them."""

    reproduced: bool | None
    verdict: str
    claims: list[Row]


class Choosing(TypedDict, total=False):
    """What a record holds of a study that was made to choose its arms, if there was one: its rows."""

    before: list[Row]


class Summary(Recorded, Choosing):
    """What an experiment's `summary.json` holds."""

    experiment: str
    data: str
    train_images: int
    valid_images: int
    complete: bool
    published: object
    rows: list[Row]


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the kind of machine."""
    def of(name: str) -> str:
        try: return metadata.version(name)
        except metadata.PackageNotFoundError: return "not installed"
    return {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}",
            "torch": str(torch.__version__), "runnernorms": norms.__version__,
            **{name: of(name) for name in ("torchvision", "scikit-learn", "matplotlib")}}


def read_summary(path: str | Path) -> dict[str, Any]:
    """`summary.json` of a run folder, or a committed record, as a dict.

    Raises:
        InputError: there is none, or it isn't one.
    """
    path = Path(path)
    file = path / "summary.json" if path.is_dir() else path
    try: summary = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"can't read {str(file)!r}: {e.strerror}; name a run folder, or a summary.json") from e
    except ValueError as e:
        raise InputError(f"{str(file)!r} is no JSON ({e}); name a run folder, or a summary.json") from e
    kinds = ({"rows", "verdict", "train_images"}, {"rows", "machine"})      # an experiment's, a bench's
    if not isinstance(summary, dict) or not any(kind <= set(summary) for kind in kinds) or not (
            isinstance(summary["rows"], list) and all(isinstance(row, dict) for row in summary["rows"])):
        raise InputError(f"{str(file)!r} is no summary of a run; name a run folder, or a summary.json")
    return summary


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """The table of `runner.rows.text_table` in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)
