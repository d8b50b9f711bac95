"""Where the rows of a study's points are or will be: the trial of each point, and which of the trial's rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.study.points import Grid, Handed, Point, cell
from experiments.study.store import Record, Store
from experiments.study.work import Task

Place = tuple[Task, int]        # a trial, and which of its rows
Found = Mapping[str, Place]     # by the point's text


def places(store: Store, points: Grid) -> list[Place]:
    """The place of each point in turn.

    Of points together some may be finished, in trials of other lists of values: then only the others are run.
    """
    handed = [*points.handed()]
    unfinished = any(given.together and not store.has(store.key(given.arguments)) for given in handed)
    finished = _finished_together(store) if unfinished else {}
    return [place for given in handed for place in _places(store, given, finished)]


def _places(store: Store, given: Handed, finished: Found) -> list[Place]:
    task = _task(store, given)
    own = [(task, i) for i in range(len(task.points))]
    if not task.together or store.has(task.key): return own
    there = {text: finished[text] for point in task.points if (text := cell(point)) in finished}
    left = tuple(point for point in task.points if cell(point) not in there)
    if not there: return own
    if left:
        rest = _task(store, Handed(left, {name: [p[name] for p in left] if name in given.together else value
                                          for name, value in given.arguments.items()}, given.together))
        there |= {cell(point): (rest, i) for i, point in enumerate(left)}
    return [there[cell(point)] for point in task.points]


def _task(store: Store, given: Handed) -> Task:
    return Task(store.key(given.arguments), given.points, given.arguments, bool(given.together))


def _finished_together(store: Store) -> dict[str, Place]:
    """The places of the points in trials of several that have ended well."""
    records = [(key, store.peek(key)) for key in sorted(store.finished())]
    return {cell(point): (_task_of(key, record), i) for key, record in records
            if record is not None and record.get("points") and record["status"] == "ok"
            for i, point in enumerate(record["points"])}


def _task_of(key: str, record: Record) -> Task:
    """The trial of a file."""
    return Task(key, tuple(record.get("points") or [record["point"]]), record["point"], bool(record.get("points")))


def found(store: Store, axes: Mapping[str, Sequence[Any]]) -> tuple[Grid, list[Place]]:
    """The points that have a row in the folder, of these axes, and their places.

    They are in the order of the axes' values; those of an earlier, larger grid come after the others.
    """
    tasks = [_task_of(key, record) for key in sorted(store.finished()) if (record := store.peek(key)) is not None]
    there = [(task, i) for task in tasks if all(set(point) == set(axes) for point in task.points)
             for i in range(len(task.points))]
    order = {name: {cell(v): i for i, v in enumerate(values)} for name, values in axes.items()}

    def at(place: Place) -> list[tuple[int, str]]:
        point: Point = place[0].points[place[1]]
        return [(order[name].get(text := cell(point[name]), len(order[name])), text) for name in axes]
    values = {name: (*those, *(task.points[i][name] for task, i in there)) for name, those in axes.items()}
    return Grid({name: tuple({cell(v): v for v in those}.values()) for name, those in values.items()}), sorted(
        there, key=at)


def tasks_of(places: Sequence[Place]) -> list[Task]:
    """The trials of `places`, each once."""
    return list({task.key: task for task, _ in places}.values())
