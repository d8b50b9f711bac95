"""How an event reaches the callbacks, and what becomes of the exceptions that they raise."""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

from runner.events import Callback, CancelException


def answer(cb: Any, event: str) -> Callable[[], Any] | None:
    """What to call when `event` happens: the callback's own method, or None if it has none.

    A callback of a class that is no `Callback` and has no `__call__` is asked for a method of the event's name.
    """
    if isinstance(cb, Callback) and type(cb).__call__ is Callback.__call__: return cb.handler(event)
    found: Callable[[], Any] | None = partial(cb, event) if callable(cb) else getattr(cb, event, None)
    return found


class Always:
    """Dispatches `event` when its block is left, however it is left, and loses no exception.

    Every callback is called even if one before it raises. What the user sees is the first exception; one raised
    while another is on its way is added to that as a note. A cancel exception yields to a real one, and to one that
    leaves more.
    """

    __slots__ = ("event", "run")

    def __init__(self, run: Any, event: str) -> None: self.run, self.event = run, event

    def __enter__(self) -> "Always": return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        first = err
        for respond in self.run._answers[self.event]:
            try: respond()
            except BaseException as e:
                if first is None or weight(e) > weight(first): first = e
                elif hasattr(first, "add_note"): first.add_note(f"then {self.event} raised {type(e).__name__}: {e}")
        if first is not None and first is not err: raise first


def weight(e: BaseException) -> int:
    """What an exception leaves: a cancel its level, a real error more than any."""
    return e.level if isinstance(e, CancelException) else 4
