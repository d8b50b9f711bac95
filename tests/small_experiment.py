"""An experiment of a few milliseconds, for tests of what holds of all."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from experiments.arms import run_arms
from experiments.settings import StudySettings, from_args
from experiments.settings import add_arguments as add_shared
from experiments.study import grid
from experiments.verdict import Verdict

ARMS = ("a", "b")
SAMPLES = range(3)


class Samples:
    """Data of three numbers."""

    name, notice, train, valid = "numbers", "", SAMPLES, SAMPLES

    def __str__(self): return "numbers: 3"


@dataclass
class Config(StudySettings):
    jobs: int | None = 1


def train_arm(config, name, seed, checkpoint):
    print(f"{name} begins")
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "half.txt").write_text("half")
    return [{"arm": name, "epoch": 1}], {"arm": name, "seed": seed, "valid_accuracy": 0.5, "seconds": 0.0,
                                         "status": "ok"}, [1.0, 2.0]


def draw(rows, curves, path: Path):
    path.write_bytes(b"one")
    path.with_name("another.png").write_bytes(b"two")


def add_arguments(parser: argparse.ArgumentParser): add_shared(parser, "small")


def main(args):
    config = Config(**from_args(args))
    return run_arms("small", config, Samples(), grid(arm=list(ARMS), seed=config.seeds), train_arm, header="small",
                    judge=lambda rows, data, n: Verdict(untested="Nothing was tested"), draw=draw, published=None,
                    table=lambda summary: (["arm", "accuracy"], [[r["arm"], "0.5"] for r in summary["rows"]])).status
