"""One mind in several processes: what a callback decides on one, by a cancel exception or by True, holds on all.

After answers to an event of training that may be such, the processes exchange what they were, and all leave the batch,
the pass or the fit in the same step. Nothing is exchanged where only callbacks of this library answer that
decide by figures which all have (`Callback.may_cancel` names the others). In validation the processes go each at its
own pace, and exchange once, at the end of the pass.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from types import SimpleNamespace
from typing import Any, TypeVar

from runner.console import say
from runner.dispatch import Always
from runner.events import CANCELS, STEPS, CancelBatchException, CancelException
from runner.ranks import Ranks

T = TypeVar("T")
Respond = Callable[[], Any]

OF_A_BATCH = ("begin_batch", "after_pred", "after_loss", "after_backward", "after_step", "after_cancel_batch",
              "after_batch")
TAIL = 10_000       # characters of what a process prints that are kept


class Muted(io.StringIO):
    """The standard output of a process that doesn't print: its end is kept, in case it is what ends the fit."""

    def write(self, text: str) -> int:
        if self.tell() > TAIL: self.clear()
        return super().write(text)

    def clear(self) -> None:
        self.seek(0)
        self.truncate()


class Agreement:
    """Lets the callbacks of a runner, whose fit is about to begin, answer its events as one over all processes.

    Args:
        run: the runner, of which it is settled who answers what.
        decide: an exchange: the largest level of a cancel exception, and whether there was a True, over all processes.
        failed: is told of an exception that is no cancel, and returns what is to be raised.
        muted: where the output of a process goes that doesn't print.
    """

    def __init__(self, run: Any, decide: Callable[[int, bool], tuple[int, bool]],
                 failed: Callable[[BaseException], BaseException], muted: Muted) -> None:
        self.run, self.decide, self.failed, self.muted = run, decide, failed, muted
        self.pending: CancelException | None = None         # of a validation

    def settle(self, first: Respond) -> None:
        """Take over the runner's events and steps for the length of the fit; `first` comes when a pass is over."""
        run = self.run
        for event in ("begin_validate", "after_epoch", "after_cancel_train"): run._answers[event].insert(0, first)
        run._answers = {event: answers if event == "after_fit" else [self._answer(event, answers)]
                        for event, answers in run._answers.items() if answers or event == "after_fit"} | {
                            event: [] for event, answers in run._answers.items() if not answers}
        for step in STEPS:
            methods = [getattr(cb, step) for cb in run.cbs if hasattr(type(cb), step) or step in vars(cb)]
            setattr(run, step, self._step(getattr(run, step), any(may_cancel(m, step) for m in methods)))

    def _answer(self, event: str, answers: list[Respond]) -> Respond:
        """One answer to `event` for all of the callbacks'."""
        if event == "after_batch": stages = [(_all(answers), any(may_cancel(respond, event) for respond in answers))]
        else: stages = [(_in_turn([*some]), asked) for asked, some in groupby(answers, lambda r: may_cancel(r, event))]
        of_batch, run = event in OF_A_BATCH, self.run

        def answer() -> bool:
            skip = False
            for respond, asked in stages:       # the next one may be an exchange of its own
                cancel, its = None, False
                try: its = respond()
                except CancelException as e: cancel = e
                except BaseException as e:
                    if (found := self.failed(e)) is e: raise
                    raise found from e
                if of_batch and not run.in_train: self._put_off(event, cancel)
                elif asked: its = self._agreed(cancel, its)
                elif cancel is not None: raise cancel           # for a reason that all have
                skip |= its
            return skip
        return answer

    def _put_off(self, event: str, cancel: CancelException | None) -> None:
        """In a validation leave the batch at most, and note what the pass is to end with."""
        if cancel is None: return
        if cancel.level > 1 and (self.pending is None or cancel.level > self.pending.level): self.pending = cancel
        if event not in ("after_batch", "after_cancel_batch"): raise CancelBatchException from cancel

    def _step(self, step: Callable[..., Any], asked: bool) -> Callable[..., Any]:
        """A step of the loop; with `asked`, callbacks of somebody's own have a part in it."""
        def guarded(*args: Any, **kwargs: Any) -> Any:
            found, cancel = None, None
            try: found = step(*args, **kwargs)
            except CancelException as e: cancel = e
            except BaseException as e:
                if (other := self.failed(e)) is e: raise
                raise other from e
            if not self.run.in_train: self._put_off("", cancel)
            elif asked: self._agreed(cancel)
            elif cancel is not None: raise cancel
            return found
        return guarded

    def batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches of a pass that a callback's `around_pass` gives, which may leave it by a cancel exception."""
        iterator, run = iter(batches), self.run
        while True:
            if run.in_train: batch = self.together(lambda: next(iterator, iterator))
            else:
                try: batch = next(iterator, iterator)
                except CancelException as e:
                    self._put_off("after_batch", e)
                    return
            if batch is iterator: return
            yield batch

    def _agreed(self, cancel: CancelException | None, skip: bool = False) -> bool:
        """Exchange; returns whether any skips.

        Raises:
            CancelException: one process at least has left by it.
        """
        own = 0 if cancel is None else cancel.level
        level, skip = self.decide(own, skip)
        if level == 0: return skip
        run = self.run
        ranks: Ranks = run.ranks
        told = ranks.gather((own, run.status, self.muted.getvalue() if own == level and not ranks.leads else ""))
        run.status = next((status for _, status, _ in told if status != "ok"), run.status)
        if ranks.leads and own < level:         # the first that has left says why
            rank, text = next((rank, text) for rank, (its, _, text) in enumerate(told) if its == level)
            for line in text.splitlines(): say(f"rank {rank}: {line}")
        self.muted.clear()
        if cancel is not None and own == level: raise cancel
        raise CANCELS[level]

    def together(self, do: Callable[[], T]) -> T:
        """`Ranks.together`."""
        found, cancel = None, None
        try: found = do()
        except CancelException as e: cancel = e
        self._agreed(cancel)
        return found        # type: ignore[return-value]

    def end_of_validation(self) -> None:
        """What the processes have put off.

        Raises:
            CancelException: one at least was to leave the pass, or the fit.
        """
        cancel, self.pending = self.pending, None
        self._agreed(cancel)


def _in_turn(answers: list[Respond]) -> Callable[[], bool]:
    """The answers one after the other, until one raises; whether any is True."""
    def respond() -> bool:
        skip = False
        for answer in answers:
            if answer() is True: skip = True
        return skip
    return respond


def _all(answers: list[Respond]) -> Callable[[], bool]:
    """All answers, whichever of them raise, as to an event that comes always."""
    run = SimpleNamespace(_answers={"": answers})

    def respond() -> bool:
        with Always(run, ""): return False
    return respond


def may_cancel(respond: Respond, event: str) -> bool:
    """Whether the answer to `event` may be another on each process, or a cancel exception on one of them only."""
    module = getattr(respond, "__module__", None) or ""
    return not module.startswith("runner.") or event in getattr(getattr(respond, "__self__", None), "may_cancel", ())
