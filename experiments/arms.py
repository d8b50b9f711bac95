"""An experiment as a study: an arm from a seed is a trial, run beside others, kept, judged, drawn and recorded."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.errors import InputError
from experiments.figures import Data
from experiments.image_data import ImageData
from experiments.images import keep_loaded
from experiments.results import Row, Summary, Table, Trained, text_table
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
            `train_arms` is needed where points are together. The curves of each arm's first seed are kept.
        header: the lines above the first arm.
        judge: `f(rows, data's name, size of the training set)` says whether the rows are the published ones.
        table: `f(summary)` makes the header and the lines of a table out of what `summary.json` holds.
        draw: `f(rows, curves, path)` draws the picture.
        published: the published figures, for the record.
        said: `f(row)` gives what is said of an arm that has ended, beside its figures.
        complete: called with what all arms gave, before they are judged: it may add to their rows and curves.

    An arm that raised or was killed is named and has no row; then nothing is judged, and `--resume` runs it again.
    After Ctrl-C the finished arms are written and drawn, and KeyboardInterrupt goes on.
    """
    facts = {"data": str(data), "published": published, "threads": 1}
    if isinstance(config, ImageStudySettings): facts["convolutions"] = convolutions_in_words(config.convolutions)
    folder = RunFolder(config.out, experiment, config, facts, resume=config.resume)
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
    print(f"{header}\nruns:    {at_once} ({backend}), on one thread each" + (
        f"; convolutions: {facts['convolutions']}" if "convolutions" in facts else ""), flush=True)
    before: list[Row] = []

    def study_of(points: Grid, where: str) -> Study:
        study = Study(experiment, trial, points, out=folder.path / where, version=_settings_of(config))
        study.go_on = folder.go_on
        return study

    def go(study: Study, each: Callable[[list[dict[str, Any]]], str]) -> None:
        study.run(jobs=jobs, backend=backend, scheduler=config.scheduler, again=config.resume, each=each)

    def refused(study: Study) -> list[Row]:
        """The rows of the arms that were lost; bad input is an error of this process."""
        lost = [row for row in study.rows() if row["status"] != "ok"]
        for row in lost:
            if str(row["error"]).startswith("InputError: "):
                raise InputError(str(row["error"]).removeprefix("InputError: "))
        return lost

    def ended(key: str, rows: list[dict[str, Any]]) -> str:
        if any(row["status"] == "ok" for row in rows):
            names = dict.fromkeys(row[key] for row in rows)
            shutil.rmtree(checkpoint_folder(trial.checkpoints, "+".join(names), [row["seed"] for row in rows]),
                          ignore_errors=True)
        return "\n".join(_line(key, row, said) for row in rows)

    def run_before(points: Grid) -> list[Row]:
        study, key = study_of(points, BEFORE), _arm_axis(points)
        if folder.resumed:
            print(f"resumed: {len(study.rows())} of {len(points)} arms had finished that choose the others", flush=True)
        try: go(study, lambda rows: ended(key, rows))
        except KeyboardInterrupt:
            print(f"\nInterrupted before the arms were chosen. {folder.go_on}", flush=True)
            raise KeyboardInterrupt("reported") from None
        if lost := refused(study): raise _Lost([(key, row) for row in lost])
        before.extend(from_trial(row)[1] for row in study.rows())
        return before

    if not isinstance(points, Grid):
        try: points = points(run_before)
        except _Lost as e:
            names = ", ".join(f"{row[key]} (seed {row['seed']}) {_how(row)}" for key, row in e.args[0])
            verdict = f"Not complete: the arms were not chosen; {names}"
            print(f"\n{verdict}\nTracebacks are in {folder.path / BEFORE}. {folder.go_on}", flush=True)
            return Result([], None, verdict, folder.path, lost=len(e.args[0]))
    arms: Grid = points         # chosen, from here on
    key, study = _arm_axis(arms), study_of(arms, STUDY)
    first: dict[str, int] = {}
    for point in arms: first.setdefault(point[key], point["seed"])

    def trained() -> list[Trained[Any]]: return [from_trial(row) for row in study.rows() if row["status"] == "ok"]

    def record(found: list[Trained[Any]]) -> tuple[Summary, dict[str, Any]]:
        rows = [row for _, row, _ in found]
        curves = {row[key]: curve for _, row, curve in found if row["seed"] == first[row[key]]}
        lost = [row for row in study.rows() if row["status"] != "ok"]
        if len(rows) == len(arms): verdict = judge(rows, data.name, len(data.train))
        else:
            names = ", ".join(f"{row[key]} (seed {row['seed']}) {_how(row)}" for row in lost)
            verdict = Verdict(untested=f"Not complete: {len(rows)} of {len(arms)} arms have finished"
                              f"{'; ' * bool(lost)}{names}")
        said_of = verdict.record()
        summary: Summary = {
            "experiment": experiment, "data": data.name, "train_images": len(data.train),
            "valid_images": len(data.valid), "complete": len(rows) == len(arms), "reproduced": said_of["reproduced"],
            "verdict": said_of["verdict"], "claims": said_of["claims"], "published": published, "rows": rows}
        if before: summary["before"] = before
        folder.write_metrics([epoch for epochs, _, _ in found for epoch in epochs])
        folder.write_json("summary.json", summary)
        if rows: folder.write_json("curves.json", curves)
        return summary, curves

    def each(rows: list[dict[str, Any]]) -> str:
        if len(found := trained()) < len(arms): record(found)         # or it is judged below
        return ended(key, rows)

    if folder.resumed: print(f"resumed: {len(trained())} of {len(arms)} arms had finished", flush=True)
    interrupted = False
    try: go(study, each)
    except KeyboardInterrupt: interrupted = True
    refused(study)
    found = trained()
    if len(found) == len(arms):
        shutil.rmtree(trial.checkpoints, ignore_errors=True)
        complete(found)
    summary, curves = record(found)
    if summary["rows"]:
        draw(summary["rows"], curves, picture)
        print("\n" + text_table(*table(summary)))
    if interrupted:
        kept = f"; their rows are in {folder.path / 'summary.json'}" if found else ""
        print(f"\nInterrupted: {len(found)} of {len(arms)} arms had finished{kept}. {folder.go_on}", flush=True)
        raise KeyboardInterrupt("reported")
    what = f"{picture} and summary.json lie" if found else "summary.json lies"
    print(f"\n{what} in the run folder; it took {format_time(time.perf_counter() - start)}.\n{summary['verdict']}",
          flush=True)
    if len(found) < len(arms): print(f"Tracebacks are in {folder.path / STUDY}. {folder.go_on}", flush=True)
    return Result(summary["rows"], summary["reproduced"], summary["verdict"], folder.path,
                  lost=len(arms) - len(found))


def _arm_axis(points: Grid) -> str: return next(name for name in points.axes if name != "seed")


def _settings_of(config: Settings) -> str:
    """A name for the settings that an arm's figures depend on; which arms and seeds there are is not among them."""
    free = (*FREE, "seeds", "arms", "norms")
    settings = {k: v for k, v in asdict(config).items() if k not in free}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _line(key: str, row: Mapping[str, Any], said: Callable[[Row], str]) -> str:
    """What is printed when an arm has ended."""
    name = f"  {row[key]}, seed {row['seed']}"
    if row["status"] != "ok": return f"{name}: {_how(row)}"
    figures, (_, plain, _) = [], from_trial(row)
    for k in ("train_loss", "valid_loss", "valid_accuracy", "test_accuracy"):
        if isinstance(row.get(k), float): figures.append(f"{k.replace('_', ' ')} {row[k]:.4g}")
    text = f"{name}: {', '.join([*figures, plain['status']])}, {plain['seconds']:.1f} s"
    if "error" in plain: text += f"\n  {row[key]} failed: {plain['error']}"
    return text + "".join(f"\n  {line}" for line in said(plain).splitlines())


def _how(row: Mapping[str, Any]) -> str:
    """How an arm was lost."""
    return f"{'was killed' if row['status'] == 'killed' else 'raised'}: {row['error']}"
