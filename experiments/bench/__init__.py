"""What things cost, as ratios within one run.

Every part times its arms in turn on this machine and prints each arm's ratio to the one that it is compared with: the
median over the repetitions, the middle half, and milliseconds for orientation. On one thread unless the part says
otherwise; nothing else should run meanwhile. Writes summary.json and a picture per part into the run folder.
"""

import argparse
import importlib
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.data import pick_data
from experiments.errors import InputError, pick
from experiments.results import Row, Table, markdown_table, text_table, versions
from experiments.run_folder import RunFolder
from experiments.settings import positive
from norms.kernels import AVAILABLE
from runner.compiled import CompileError

# part: (module, what it compares)
PARTS = {
    "norms": ("experiments.bench.norms", "a training step with each norm, against torch's own norm"),
    "runner": ("experiments.bench.runner", "an epoch by the Runner, against a loop written out by hand"),
    "hooks": ("experiments.bench.hooks", "the Runner with statistics of all layers, or a watch, against without"),
    "epoch": ("experiments.bench.epoch", "the main job at batch size 2, against the lesson's way of doing it"),
    "whole": ("experiments.bench.whole", "a whole epoch of the main job, compiled too, against the lesson's way"),
    "compiled": ("experiments.bench.compiled", "the Runner with compile=True, against the Runner without"),
    "checkpoint": ("experiments.bench.checkpoint", "the Runner with a checkpoint every 30 s, against without"),
    "growth": ("experiments.bench.growth", "a step at batch sizes 1 to 512, against the network without a norm"),
    "stacked": ("experiments.bench.stacked", "20 networks trained as one, against one alone and torch.func.vmap"),
    "lab": ("experiments.bench.lab", "the lab's loop on the residual network, against one by hand; each norm's cost"),
    "distributed": ("experiments.bench.distributed", "a step over two processes, against one process"),
    "peers": ("experiments.bench.peers",
              "a training step in our loop and in other libraries', against a hand-written loop"),
}


@dataclass
class Config:
    """Which parts, how many repetitions, and the run folder (None: runs/bench/<date>-<time>).

    Raises:
        InputError: an unknown part, or a number of repetitions that is not a positive integer.
    """

    parts: Sequence[str] = tuple(PARTS)
    repetitions: int = 15
    data: str = "auto"
    data_dir: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        self.parts = tuple(dict.fromkeys(pick(p, PARTS, "part") for p in self.parts)) or tuple(PARTS)
        self.data = pick_data(self.data, folders=False)
        positive("repetitions", self.repetitions, 15)

    def rng(self) -> torch.Generator:
        """A generator for the parts' random batches, always the same."""
        return torch.Generator().manual_seed(0)


def machine() -> str:
    """The machine in words: processor, cores, what of it torch uses, and whose kernels the norms have."""
    kernels = "their own" if AVAILABLE else "torch's"
    return (f"{_processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__} "
            f"({torch.backends.cpu.get_cpu_capability()}), norms with {kernels} kernels")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def table(rows: Sequence[Row]) -> Table:
    """Header and lines of the table of one part."""
    lines = []
    for r in rows:
        compared = r["against"] is not None
        low, high = r.get("ratio_quartiles", (math.nan,) * 2)
        lines.append([f"{r['arm']}, {r['setting']}", f"{r['ratio']:.3f}" if compared else "-",
                      f"{low:.3f} to {high:.3f}" if compared else "-", r["against"] or "-",
                      f"{r['target']:.3g}" if r.get("target") else "-", f"{r['ms']:.3f}", r.get("note", "")])
    return ["arm", "ratio", "middle half", "to", "target", "ms", ""], lines


def markdown(summary: dict[str, Any]) -> str:
    """The ratios of a record as a Markdown table, without those that only the figure of `growth` shows."""
    lines = [[r["part"], f"{r['arm']}, {r['setting']}", r["against"], f"**{r['ratio']:.2f}**",
              "{:.2f} to {:.2f}".format(*r["ratio_quartiles"]), f"{r['target']:.2f}" if r["target"] else "-",
              f"{r['ms']:.3f}"] for r in summary["rows"] if r["against"] is not None and r["part"] != "growth"]
    n = sorted({r["repetitions"] for r in summary["rows"]})
    return (f"{markdown_table(['part', 'arm', 'to', 'ratio', 'middle half', 'target', 'ms'], lines)}\n\n"
            f"{summary['machine']}; {' to '.join(map(str, dict.fromkeys((n[0], n[-1]))))} repetitions.")


def run(config: Config) -> list[Row]:
    """Time the parts: prints their tables, writes the record and the picture, returns the rows."""
    folder = RunFolder(config.out, "bench", config, {"machine": machine()})
    print(machine(), flush=True)
    with folder.reporting(): rows = _timed(config, folder)
    print(f"\nsummary.json and a picture per part lie in {folder.path}.")
    return rows


def _timed(config: Config, folder: RunFolder) -> list[Row]:
    """The rows of all parts, each of which is written and drawn when it has ended."""
    rows: list[Row] = []
    for part in config.parts:
        module = importlib.import_module(PARTS[part][0])
        print(f"\n{part}: {PARTS[part][1]}, at most {config.repetitions} repetitions", flush=True)
        try: found = module.rows(config)
        except (CompileError, subprocess.CalledProcessError) as e:
            others = " ".join(p for p in config.parts if p != part) or "other parts"
            raise InputError(f"the part {part} can't be timed: {e}; time {others} alone") from e
        rows += found
        print(text_table(*table(found)), flush=True)
        folder.write_json("summary.json", {"machine": machine(), "versions": versions(), "rows": rows})
        with folder.new_files() as new: (module.draw if hasattr(module, "draw") else draw)(found, new / f"{part}.png")
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """The picture of a part: every ratio with its middle half, its target as a tick."""
    from runner import plots
    compared = [r for r in rows if r["against"] is not None]
    fig, (ax,) = plots.figure(1, width=7.5, height=1.2 + 0.28 * len(compared))
    plots.plot_ratios([(f"{r['arm']}, {r['setting']}", r["ratio"], r["ratio_quartiles"], r["target"])
                       for r in compared], ax, title=f"to {compared[0]['against']}" if len(
                           {r["against"] for r in compared}) == 1 else "each to its counterpart")
    plots.save(fig, path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m experiments bench`."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"parts (default: all of {', '.join(PARTS)})")
    parser.add_argument("--repetitions", type=int, default=15, metavar="N",
                        help="repetitions of each arm (default: 15)")
    parser.add_argument("--data", default="auto", metavar="NAME",
                        help="for the parts that train: mnist, digits or auto")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that holds MNIST/raw/")
    parser.add_argument("--out", metavar="DIR", help="run folder to make (default: runs/bench/<date>-<time>)")


def main(args: argparse.Namespace) -> int:
    """Run with parsed options; the exit status is 0: a time is no pass or failure."""
    run(Config(**vars(args)))
    return 0
