"""`History`: the base of what keeps rows over several fits."""

from typing import Any

from runner.stateful import Stateful


class History(Stateful):
    """Goes on where the last fit ended: a second fit adds its rows, its epochs and steps counted on from the first's.

        run.fit(2, learn)                           # epochs 0 and 1
        run.fit(1, learn)                           # epoch 2
        run.fit(1, learn, reset_history=True)       # epoch 0, the rows from before are gone

    An epoch that was begun has a number, whatever ended it. A search by `LR_Find` adds nothing. In a runner that has
    the finder among its own callbacks it can be looked at until the next fit begins, which goes on from before it.

    `past_epochs` and `past_steps` are the epochs and steps of the fits before this one. A subclass calls the four
    events below if it has them too, and says what to keep: `clear`, `mark` and `cut`, and for a checkpoint as any
    `Stateful`.
    """

    fit_only = True
    _saved: tuple[str, ...] = "past_epochs", "past_steps", "_begun"

    def __init__(self) -> None: self.forget()

    def forget(self) -> None:
        """Forget all fits."""
        self.past_epochs = self.past_steps = self._begun = 0
        self._kept: Any = None              # where to cut what an undone fit has added
        self._fitting = False
        self.clear()

    def clear(self) -> None:
        """Begin with no rows."""

    def mark(self) -> Any:
        """How much there is, for `cut`."""

    def cut(self, mark: Any) -> None:
        """Leave what there was at `mark`."""

    def begin_fit(self) -> None:
        if getattr(self.run, "reset_history", False): self.forget()
        elif self._kept is not None:
            self.past_epochs, self.past_steps, mark = self._kept
            self.cut(mark)
        undone = any(getattr(cb, "undoes_fit", False) for cb in getattr(self.run, "cbs", ()))
        self._kept = (self.past_epochs, self.past_steps, self.mark()) if undone else None
        self._begun, self._fitting = 0, True

    def begin_epoch(self) -> None: self._begun = self.run.epoch + 1

    def after_epoch(self) -> None: self._begun = self.run.epoch + 1     # another callback may have ended its beginning

    def after_fit(self) -> None:
        if not self._fitting: return        # another's begin_fit failed before this one's
        self._fitting = False
        self.past_epochs, self.past_steps = self.past_epochs + self._begun, self.past_steps + self.run.n_iter
