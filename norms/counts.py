"""What a function that changes a model's norms answers: how many it changed, and which it left."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

C = TypeVar("C", bound="Counts")


class Counts(Counter[str]):
    """How many layers of each class were changed; `left_alone` counts the norms that were not."""

    left_alone: Counter[str]

    def __init__(self, changed: Mapping[str, int] | Iterable[str] = (),
                 left_alone: Mapping[str, int] | Iterable[str] = ()) -> None:
        super().__init__(changed)
        self.left_alone = Counter(left_alone)

    def __repr__(self) -> str:
        return repr(Counter(self)) + (f", left alone: {dict(self.left_alone)}" if self.left_alone else "")

    def __reduce__(self: C) -> tuple[type[C], tuple[dict[str, int], Counter[str]]]:
        return type(self), (dict(self), self.left_alone)

    def copy(self: C) -> C: return type(self)(self, self.left_alone)
