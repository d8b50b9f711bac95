"""An experiment as a study: an arm from a seed is a trial, run beside others, kept, judged, drawn and recorded."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments import spoken
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

# `f(config, arm, seed, checkpoint)` trains an arm, `f(config, arms, seeds, checkpoint)` several as one, a pair each.
# `checkpoint` is a folder to go on from after an interruption; an arm of seconds may leave it alone.
TrainArm = Callable[[Any, str, int, Path], Trained[Any]]
TrainArms = Callable[[Any, Sequence[str], Sequence[int], Path], Sequence[Trained[Any]]]
# `f(run)` chooses the arms by a study of its own, whose rows `run(grid)` gives: see `run_arms`.
Before = Callable[[Callable[[Grid], list[Row]]], Grid]


# --- in the process of a trial ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ArmTrial:
    """What the study of an experiment runs: one arm from one seed, or what is trained as one, in any process.

    The row has `outcome` and `trained_seconds`, for a study has `status` and `seconds` of its own, and `refusal` where
    a norm refused its input; `per_epoch` and `curve` are lists.
    """

    config: Settings
    checkpoints: Path
    one: TrainArm
    several: TrainArms | None

    def __call__(self, **point: Any) -> Row | list[Row]:
        seeds = point.pop("seed")
        arms, = point.values()
        if not isinstance(seeds, list):
            return as_trial(self.one(self.config, arms, seeds, checkpoint_folder(self.checkpoints, arms, [seeds])))
        assert self.several is not None
        names = arms if isinstance(arms, list) else [arms] * len(seeds)
        folder = checkpoint_folder(self.checkpoints, "+".join(dict.fromkeys(names)), seeds)
        return [*map(as_trial, self.several(self.config, names, seeds, folder))]


def as_trial(trained: Trained[Any]) -> Row:
    """The row of a study for what training an arm gave."""
    epochs, row, curve = trained
    renamed = {"status": "outcome", "seconds": "trained_seconds", "error": "refusal"}
    return {**{renamed.get(k, k): v for k, v in row.items()}, "per_epoch": epochs, "curve": curve}


def from_trial(trial: Mapping[str, Any]) -> Trained[Any]:
    """What `as_trial` had, of a row of the study."""
    own = ("status", "seconds", "attempts", "error", "traceback", "key", "per_epoch", "curve")
    renamed = {"outcome": "status", "trained_seconds": "seconds", "refusal": "error"}
    return trial["per_epoch"], {renamed.get(k, k): v for k, v in trial.items() if k not in own}, trial["curve"]


# --- all arms -----------------------------------------------------------------------------------------------------

class _Lost(Exception):
    """Arms of the study that was to choose the others have no row: `args[0]`."""


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
        return _run_in(folder, experiment, config, data, points, train_arm, header, judge, table, draw, published,
                       train_arms, said, complete, facts)


def _run_in(folder: RunFolder, experiment: str, config: StudySettings, data: Data, points: Grid | Before,
            train_arm: TrainArm, header: str, judge: Callable[[list[Row], str, int], Verdict],
            table: Callable[[Summary], Table], draw: Callable[[list[Row], dict[str, Any], Path], None],
            published: object, train_arms: TrainArms | None, said: Callable[[Row], str],
            complete: Callable[[list[Trained[Any]]], None], facts: Mapping[str, object]) -> Result:
    """`run_arms` in its folder."""
    picture = folder.path / f"{experiment.replace('-', '_')}.png"
    given = replace(config, out=None, resume=False)
    if isinstance(given, ImageSettings) and isinstance(data, ImageData):
        given.data = data.asked         # no process may find another data set
        keep_loaded(given, data)
    trial = ArmTrial(given, (folder.path / CHECKPOINTS).absolute(), train_arm,
                     train_arms)
    jobs, start = config.at_once, time.perf_counter()
    # What a process was started with decides the last bits of oneDNN's gradients, whatever torch is told later.
    here = config.device.startswith("cuda") or os.environ.get("OMP_NUM_THREADS") == "1"
    backend = "sequential" if config.backend == "loky" and jobs == 1 and here else config.backend
    at_once = "as many at once as the cluster has workers" if jobs is None else f"{jobs} at once"
    print(spoken.fits(f"{header}\nruns:    {at_once} ({backend}), on one thread each" + (
        f"; convolutions: {facts['convolutions']}" if "convolutions" in facts else "")), flush=True)
    before: list[Row] = []

    def study_of(points: Grid, where: str) -> Study:
        with _of_options(folder):
            study = Study(experiment, trial, points, out=folder.path / where, version=_settings_of(config))
        study.go_on = spoken.in_options("run() goes on", folder.go_on)
        return study

    def go(study: Study, each: Callable[[list[dict[str, Any]]], str]) -> None:
        with _of_options(folder):
            study.run(jobs=jobs, backend=backend, scheduler=config.scheduler, again=config.resume, each=each)

    def ended(key: str, rows: list[dict[str, Any]]) -> str:
        for row in rows: _refuse(row, folder)       # now, and not after all others
        if any(row["status"] == "ok" for row in rows):
            names = dict.fromkeys(row[key] for row in rows)
            shutil.rmtree(checkpoint_folder(trial.checkpoints, "+".join(names), [row["seed"] for row in rows]),
                          ignore_errors=True)
        return "\n".join(spoken.line(key, row, from_trial(row)[1] if row["status"] == "ok" else {}, said)
                         for row in rows)

    def run_before(points: Grid) -> list[Row]:
        study, key = study_of(points, BEFORE), _arm_axis(points)
        if folder.resumed:
            print(spoken.fits(f"resumed: {len(study.rows())} of {len(points)} arms had finished that choose the "
                              "others"), flush=True)
        try: go(study, lambda rows: ended(key, rows))
        except KeyboardInterrupt:
            print(spoken.fits(f"\nInterrupted before the arms were chosen. {folder.go_on}"), flush=True)
            raise KeyboardInterrupt(REPORTED) from None
        if lost := [row for row in study.rows() if row["status"] != "ok"]: raise _Lost([(key, row) for row in lost])
        before.extend(from_trial(row)[1] for row in study.rows())
        return before

    if not isinstance(points, Grid):
        try: points = points(run_before)
        except _Lost as e:
            names = ", ".join(f"{row[key]} (seed {row['seed']}) {spoken.how(row)}" for key, row in e.args[0])
            verdict = f"Not complete: the arms were not chosen; {names}"
            print(spoken.fits(f"\n{verdict}\nTracebacks are in {folder.path / BEFORE}. {folder.go_on}"), flush=True)
            return Result([], None, verdict, folder.path, lost=len(e.args[0]))
    arms: Grid = points         # chosen, from here on
    key, study = _arm_axis(arms), study_of(arms, STUDY)
    first: dict[str, int] = {}
    for point in arms: first.setdefault(point[key], point["seed"])

    def trained() -> list[Trained[Any]]: return [from_trial(row) for row in study.rows() if row["status"] == "ok"]

    def record(found: list[Trained[Any]]) -> tuple[Summary, dict[str, Any]]:
        rows = [row for _, row, _ in found]
        curves = SeedCurves({row[key]: curve for _, row, curve in found if row["seed"] == first[row[key]]})
        for _, row, curve in found: curves.every.setdefault(row[key], []).append(curve)
        lost = [row for row in study.rows() if row["status"] != "ok"]
        if len(rows) == len(arms): verdict = judge(rows, data.name, len(data.train))
        else:
            names = ", ".join(f"{row[key]} (seed {row['seed']}) {spoken.how(row)}" for row in lost)
            verdict = Verdict(untested=f"Not complete: {len(rows)} of {len(arms)} arms have finished"
                              f"{'; ' * bool(lost)}{names}")
        said_of = verdict.record()
        summary: Summary = {
            "experiment": experiment, "data": data.name, "train_images": len(data.train),
            "valid_images": len(data.valid), "complete": len(rows) == len(arms), "reproduced": said_of["reproduced"],
            "verdict": said_of["verdict"], "claims": said_of["claims"], "published": published, "rows": rows}
        if before: summary["before"] = before
        return summary, curves

    def write(found: list[Trained[Any]], summary: Summary, curves: dict[str, Any]) -> None:
        folder.write_metrics([epoch for epochs, _, _ in found for epoch in epochs])
        folder.write_json("summary.json", summary)
        if summary["rows"]: folder.write_json("curves.json", curves)

    def each(rows: list[dict[str, Any]]) -> str:
        text = ended(key, rows)
        if len(found := trained()) < len(arms): write(found, *record(found))         # or it is judged below
        return text

    if folder.resumed: print(spoken.fits(f"resumed: {len(trained())} of {len(arms)} arms had finished"), flush=True)
    interrupted, trouble = False, None
    try: go(study, each)
    except KeyboardInterrupt: interrupted = True
    except InputError as e: trouble = e         # a full disk, say: what has finished is shown all the same
    found = trained()
    if len(found) == len(arms):
        shutil.rmtree(trial.checkpoints, ignore_errors=True)
        complete(found)
    summary, curves = record(found)
    if found: print("\n" + spoken.table_text(*table(summary)), flush=True)
    try:
        write(found, summary, curves)
        if found:
            with folder.new_files() as new: draw(summary["rows"], curves, new / picture.name)
    except WriteError as e: trouble = trouble or e
    kept = f"; their rows are in {folder.path / ('summary.json' if trouble is None else STUDY)}" if found else ""
    if trouble is not None:
        print(spoken.fits(f"\nStopped: {len(found)} of {len(arms)} arms had finished{kept}."), flush=True)
        raise trouble
    if interrupted:
        print(spoken.fits(f"\nInterrupted: {len(found)} of {len(arms)} arms had finished{kept}. {folder.go_on}"),
              flush=True)
        raise KeyboardInterrupt(REPORTED)
    what = f"{picture} and summary.json lie" if found else "summary.json lies"
    print(spoken.fits(f"\n{what} in the run folder; it took {format_time(time.perf_counter() - start)}.\n"
                      f"{summary['verdict']}"), flush=True)
    if len(found) < len(arms):
        print(spoken.fits(f"Tracebacks are in {folder.path / STUDY}. {folder.go_on}"), flush=True)
    return Result(summary["rows"], summary["reproduced"], summary["verdict"], folder.path,
                  lost=len(arms) - len(found))


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


def _arm_axis(points: Grid) -> str: return next(name for name in points.axes if name != "seed")


def _settings_of(config: Settings) -> str:
    """A name for the settings that an arm's figures depend on; which arms and seeds there are is not among them."""
    free = (*FREE, "seeds", "arms", "norms")
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
