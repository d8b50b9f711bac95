"""An experiment as a study: an arm from a seed is a trial, run beside others, kept, judged, drawn and recorded."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments import spoken
from experiments.arm_trial import ArmTrial, TrainArm, TrainArms, from_trial
from experiments.errors import REPORTED, InputError, WriteError
from experiments.figures import Data
from experiments.image_data import ImageData
from experiments.images import keep_loaded
from experiments.results import Row, SeedCurves, Summary, Table, Trained
from experiments.run_folder import BEFORE, CHECKPOINTS, FREE, STUDY, RunFolder, checkpoint_folder
from experiments.settings import ImageSettings, ImageStudySettings, Settings, StudySettings
from experiments.study import Grid, Study
from experiments.training import convolutions_in_words
from experiments.verdict import Result, Verdict
from runner.progress import format_time

# `f(run)` chooses the arms by a study of its own, whose rows `run(grid)` gives: see `run_arms`.
Before = Callable[[Callable[[Grid], list[Row]]], Grid]


def run_arms(experiment: str, config: StudySettings, data: Data, points: Grid | Before, train_arm: TrainArm, *,
             header: str,
             judge: Callable[[list[Row], str, int], Verdict], table: Callable[[Summary], Table],
             draw: Callable[[list[Row], dict[str, Any], Path], None], published: object,
             train_arms: TrainArms | None = None, said: Callable[[Row], str] = lambda row: "",
             complete: Callable[[list[Trained[Any]]], None] = lambda trained: None) -> Result:
    """Run the arms as a study, print as it goes, write the run folder: a `Result`.

    Args:
        experiment, config: the name and the settings.
        data: what it is run on, with `name`, `train`, `valid` and a `str`.
        points: a grid of arms, the first axis by the name that the rows call it, and of the axis `seed`; or a function
            that chooses it: it gets a function `run(grid)` that runs such a grid as a study in the folder `before/`,
            with the same settings, and gives its rows. They are in the summary too, as `before`.
        train_arm, train_arms: functions of a module, which worker processes find by their names: see `TrainArm`.
            `train_arms` is needed where points are together. The curves of each arm's first seed are kept in the
            folder; those of all are drawn.
        header: the lines above the first arm.
        judge: `f(rows, data's name, size of the training set)` says whether the rows are the published ones.
        table: `f(summary)` makes the header and the lines of a table out of what `summary.json` holds.
        draw: `f(rows, curves, path)` draws the picture; `curves` are `SeedCurves`.
        published: the published figures, for the record.
        said: `f(row)` gives what is said of an arm that has ended, beside its figures.
        complete: called with what all arms gave, before they are judged: it may add to their rows and curves.

    An arm that raised or was killed is named and has no row; then nothing is judged, and `--resume` runs it again.
    After Ctrl-C the finished arms are written and drawn, and KeyboardInterrupt goes on.
    """
    facts: dict[str, object] = {"data": str(data), "published": published, "threads": 1}
    if isinstance(config, ImageStudySettings): facts["convolutions"] = convolutions_in_words(config.convolutions)
    folder = RunFolder(config.out, experiment, config, facts, resume=config.resume)
    with folder.reporting():
        given = replace(config, out=None, resume=False)
        if isinstance(given, ImageSettings) and isinstance(data, ImageData):
            given.data = data.asked         # no process may find another data set
            keep_loaded(given, data)
        trial = ArmTrial(given, (folder.path / CHECKPOINTS).absolute(), train_arm, train_arms)
        run = _Run(experiment, config, data, folder, trial, judge, table, draw, published, said, complete)
        at_once = "as many at once as the cluster has workers" if config.at_once is None else (
            f"{config.at_once} at once")
        print(spoken.fits(f"{header}\nruns:    {at_once} ({run.backend}), on one thread each" + (
            f"; convolutions: {facts['convolutions']}" if "convolutions" in facts else "")), flush=True)
        if not isinstance(points, Grid):
            try: points = points(run.choosing)
            except _Lost as e: return run.not_chosen(e.args[0])
        return run.train(points)


class _Lost(Exception):
    """Arms of the study that was to choose the others have no row: `args[0]` are the study's rows of them."""


@dataclass
class _Run:
    """`run_arms` in its folder: the study that chooses the arms, if there is one; the arms; what is said of them."""

    experiment: str
    config: StudySettings
    data: Data
    folder: RunFolder
    trial: ArmTrial
    judge: Callable[[list[Row], str, int], Verdict]
    table: Callable[[Summary], Table]
    draw: Callable[[list[Row], dict[str, Any], Path], None]
    published: object
    said: Callable[[Row], str]
    complete: Callable[[list[Trained[Any]]], None]
    before: list[Row] = field(default_factory=list)         # the rows that have chosen the arms
    start: float = field(default_factory=time.perf_counter)

    @property
    def backend(self) -> str:
        """Where arms are trained; in this process if only one is at a time, and this process is as good as a new one.

        What a process was started with decides the last bits of oneDNN's gradients, whatever torch is told later.
        """
        here = self.config.device.startswith("cuda") or os.environ.get("OMP_NUM_THREADS") == "1"
        alone = self.config.backend == "loky" and self.config.at_once == 1 and here
        return "sequential" if alone else self.config.backend

    # --- the studies ----------------------------------------------------------------------------------------------

    def study_of(self, points: Grid, where: str) -> Study:
        with _of_options(self.folder):
            study = Study(self.experiment, self.trial, points, out=self.folder.path / where,
                          version=_settings_of(self.config))
        study.go_on = spoken.in_options("run() goes on", self.folder.go_on)
        return study

    def go(self, study: Study, each: Callable[[list[dict[str, Any]]], str]) -> None:
        with _of_options(self.folder):
            study.run(jobs=self.config.at_once, backend=self.backend, scheduler=self.config.scheduler,
                      again=self.config.resume, each=each)

    def ended(self, key: str, rows: list[dict[str, Any]]) -> str:
        """What is said of arms that have just ended; their checkpoints go."""
        for row in rows: _refuse(row, self.folder)       # now, and not after all others
        if any(row["status"] == "ok" for row in rows):
            names = dict.fromkeys(row[key] for row in rows)
            shutil.rmtree(checkpoint_folder(self.trial.checkpoints, "+".join(names), [row["seed"] for row in rows]),
                          ignore_errors=True)
        return "\n".join(spoken.line(key, row, from_trial(row)[1] if row["status"] == "ok" else {}, self.said)
                         for row in rows)

    def choosing(self, points: Grid) -> list[Row]:
        """Run the arms that choose the others: their rows."""
        study, key = self.study_of(points, BEFORE), _arm_axis(points)
        if self.folder.resumed:
            print(spoken.fits(f"resumed: {len(study.rows())} of {len(points)} arms had finished that choose the "
                              "others"), flush=True)
        try: self.go(study, lambda rows: self.ended(key, rows))
        except KeyboardInterrupt:
            print(spoken.fits(f"\nInterrupted before the arms were chosen. {self.folder.go_on}"), flush=True)
            raise KeyboardInterrupt(REPORTED) from None
        if lost := [row for row in study.rows() if row["status"] != "ok"]: raise _Lost([(key, row) for row in lost])
        self.before.extend(from_trial(row)[1] for row in study.rows())
        return self.before

    def not_chosen(self, lost: Sequence[tuple[str, Row]]) -> Result:
        verdict = f"Not complete: the arms were not chosen; {_names_of(lost)}"
        print(spoken.fits(f"\n{verdict}\nTracebacks are in {self.folder.path / BEFORE}. {self.folder.go_on}"),
              flush=True)
        return Result([], None, verdict, self.folder.path, lost=len(lost))

    def train(self, arms: Grid) -> Result:
        """Run `arms`, write what they gave, say it."""
        key, study = _arm_axis(arms), self.study_of(arms, STUDY)

        def trained() -> list[Trained[Any]]: return [from_trial(row) for row in study.rows() if row["status"] == "ok"]

        def each(rows: list[dict[str, Any]]) -> str:
            text = self.ended(key, rows)
            if len(found := trained()) < len(arms): self.write(found, *self.record(arms, study, found))  # or see below
            return text

        if self.folder.resumed:
            print(spoken.fits(f"resumed: {len(trained())} of {len(arms)} arms had finished"), flush=True)
        interrupted, trouble = False, None
        try: self.go(study, each)
        except KeyboardInterrupt: interrupted = True
        except InputError as e: trouble = e         # a full disk, say: what has finished is shown all the same
        found = trained()
        if len(found) == len(arms):
            shutil.rmtree(self.trial.checkpoints, ignore_errors=True)
            self.complete(found)
        summary, curves = self.record(arms, study, found)
        if found: print("\n" + spoken.table_text(*self.table(summary)), flush=True)
        picture = self.folder.path / f"{self.experiment.replace('-', '_')}.png"
        try:
            self.write(found, summary, curves)
            if found:
                with self.folder.new_files() as new: self.draw(summary["rows"], curves, new / picture.name)
        except WriteError as e: trouble = trouble or e
        where = self.folder.path / ("summary.json" if trouble is None else STUDY)
        had = f"{len(found)} of {len(arms)} arms had finished" + f"; their rows are in {where}" * bool(found)
        if trouble is not None:
            print(spoken.fits(f"\nStopped: {had}."), flush=True)
            raise trouble
        if interrupted:
            print(spoken.fits(f"\nInterrupted: {had}. {self.folder.go_on}"), flush=True)
            raise KeyboardInterrupt(REPORTED)
        what = f"{picture} and summary.json lie" if found else "summary.json lies"
        print(spoken.fits(f"\n{what} in the run folder; it took {format_time(time.perf_counter() - self.start)}.\n"
                          f"{summary['verdict']}"), flush=True)
        if len(found) < len(arms):
            print(spoken.fits(f"Tracebacks are in {self.folder.path / STUDY}. {self.folder.go_on}"), flush=True)
        return Result(summary["rows"], summary["reproduced"], summary["verdict"], self.folder.path,
                      lost=len(arms) - len(found))

    # --- what is written ------------------------------------------------------------------------------------------

    def record(self, arms: Grid, study: Study, found: list[Trained[Any]]) -> tuple[Summary, SeedCurves]:
        """The summary of the arms that have finished, judged if all have, and their curves."""
        key = _arm_axis(arms)
        first: dict[str, int] = {}
        for point in arms: first.setdefault(point[key], point["seed"])
        rows = [row for _, row, _ in found]
        curves = SeedCurves({row[key]: curve for _, row, curve in found if row["seed"] == first[row[key]]})
        for _, row, curve in found: curves.every.setdefault(row[key], []).append(curve)
        complete = len(rows) == len(arms)
        if complete: verdict = self.judge(rows, self.data.name, len(self.data.train))
        else:
            names = _names_of([(key, row) for row in study.rows() if row["status"] != "ok"])
            verdict = Verdict(untested=f"Not complete: {len(rows)} of {len(arms)} arms have finished"
                              f"{'; ' * bool(names)}{names}")
        said = verdict.record()
        summary: Summary = {
            "experiment": self.experiment, "data": self.data.name, "train_images": len(self.data.train),
            "valid_images": len(self.data.valid), "complete": complete, "reproduced": said["reproduced"],
            "verdict": said["verdict"], "claims": said["claims"], "published": self.published, "rows": rows}
        if self.before: summary["before"] = self.before
        return summary, curves

    def write(self, found: list[Trained[Any]], summary: Summary, curves: SeedCurves) -> None:
        self.folder.write_metrics([epoch for epochs, _, _ in found for epoch in epochs])
        self.folder.write_json("summary.json", summary)
        if summary["rows"]: self.folder.write_json("curves.json", curves)


@contextmanager
def _of_options(folder: RunFolder) -> Iterator[None]:
    """What a study finds fault with, in the words of the command line's options."""
    try: yield
    except InputError as e: raise type(e)(spoken.in_options(str(e), folder.go_on)) from e


def _refuse(row: Mapping[str, Any], folder: RunFolder) -> None:
    """Raise if an arm was lost to bad input or a full disk, which are errors of the command and no arm's."""
    kind, _, text = str(row["error"]).partition(": ")
    if row["status"] == "ok" or kind not in ("InputError", "WriteError", "OSError", "PermissionError"): return
    if kind == "InputError": raise InputError(text)
    if kind == "WriteError": raise WriteError(text)
    raise WriteError(f"an arm stopped, for a file can't be read or written: {text}; make room for it, or make it "
                     f"writable. {folder.go_on}")


def _names_of(lost: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Arms without a row, of `(their axis, the study's row)`: which, and how they ended."""
    return ", ".join(f"{row[key]} (seed {row['seed']}) {spoken.how(row)}" for key, row in lost)


def _arm_axis(points: Grid) -> str: return next(name for name in points.axes if name != "seed")


def _settings_of(config: Settings) -> str:
    """A name for the settings that an arm's figures depend on; which arms and seeds there are is not among them."""
    free = (*FREE, "seeds", "arms", "norms")
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
