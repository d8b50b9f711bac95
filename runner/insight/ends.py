"""Names at the ends of lines, apart from each other wherever the axes come to lie, and names made to fit."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

SIZE = 8.0          # points: of the names at the ends
LEADING = 1.25      # from one name to the next, in sizes
WIDTH = 0.62        # of a character on average, in sizes
INK = "#333333"


def shortened(name: str, most: int) -> str:
    """`name` with its middle left out if it has more than `most` characters: both ends of a path tell what it is."""
    if len(name) <= most: return name
    head = max(1, most // 3)
    return name[:head] + "\u2026" + name[len(name) - max(1, most - head - 1):]


def distinct(names: Sequence[str], most: int) -> list[str]:
    """`names` shortened to `most` characters, with a number before those that would be the same then."""
    short = [shortened(name, most) for name in names]
    return [f"{i}: {shortened(name, max(3, most - 4))}" if short.count(s) > 1 and len(set(names)) > 1 else s
            for i, (name, s) in enumerate(zip(names, short, strict=True))]


def wrapped(text: str, width: int, most: int = 2) -> str:
    """`text` in at most `most` lines of `width` characters, broken behind a dot, a dash or a space where there is one.

    What does not fit is shortened in its middle.
    """
    width = max(width, 4)
    for length in range(min(len(text), most * width), 3, -1):
        lines = _lines(shortened(text, length), width)
        if len(lines) <= most: return "\n".join(lines)
    return shortened(text, width)


def _lines(text: str, width: int) -> list[str]:
    """`text` broken into lines of `width` characters."""
    lines = []
    while len(text) > width:
        breaks = [max((i + 1 for i, c in enumerate(text[:width]) if c in of), default=0) for of in (" ", ".-_,/")]
        at = next((at for at in breaks if at >= width // 3), width)         # at a space, or else within a name
        lines.append(text[:at].rstrip())
        text = text[at:]
    return [*lines, text]


def fitting(inches: float, size: float = SIZE) -> int:
    """How many characters of `size` points fit into `inches`."""
    return max(6, int(inches * 72 / (WIDTH * size)))


def apart(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Ascending places as near to `wanted` (ascending) as can be, `distance` apart, between `low` and `high`.

    Neighbours that would come too near become one block around the mean of what they want. Where the room does not
    suffice the places reach beyond both ends alike.
    """
    n = len(wanted)
    lack = (n - 1) * distance - (high - low)
    if lack > 0: low, high = low - lack / 2, high + lack / 2
    blocks: list[list[float]] = []          # sum of what its members want of its first, members
    for k, y in enumerate(min(max(w, low), high) for w in wanted):
        blocks.append([y - k * distance, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            total, members = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + members]
    firsts = [total / members for total, members in blocks for _ in range(int(members))]
    return [min(max(first, low), high - (n - 1) * distance) + k * distance for k, first in enumerate(firsts)]


class Ends:
    """Where the names of `lines` stand beside `ax`: worked out whenever the figure is drawn, for only then its size,
    its limits and its scale are settled."""

    def __init__(self, ax: Any, lines: Sequence[Any]) -> None: self.ax, self.lines = ax, lines

    def end(self, line: Any) -> tuple[float, float]:
        """Where `line` ends, in pixels, within the axes; of nothing that can be drawn half way up the right edge."""
        box = self.ax.bbox
        for x, y in reversed(list(zip(*line.get_data(orig=False), strict=True))):
            if not (math.isfinite(x) and math.isfinite(y)) or (self.ax.get_yscale() == "log" and y <= 0): continue
            px, py = self.ax.transData.transform((x, y))
            return min(max(float(px), box.x0), box.x1), min(max(float(py), box.y0), box.y1)
        return box.x1, (box.y0 + box.y1) / 2

    def places(self) -> list[float]:
        """The height of each name, in pixels."""
        box, step = self.ax.bbox, SIZE * LEADING * self.ax.figure.dpi / 72
        ends = [self.end(line)[1] for line in self.lines]
        order = sorted(range(len(ends)), key=ends.__getitem__)
        at = apart([ends[i] for i in order], step, box.y0 + step / 2, box.y1 - step / 2)
        found = dict(zip(order, at, strict=True))
        return [found[i] for i in range(len(ends))]

    def box(self, i: int, name: bool, renderer: object) -> Any:
        """The point of the `i`-th name, or of its line's end, as a box of no size: what `annotate` takes for it."""
        x, y = (self.ax.bbox.x1 + SIZE * self.ax.figure.dpi / 72, self.places()[i]) if name else self.end(self.lines[i])
        return self.ax.bbox.frozen().from_extents(x, y, x + 1, y + 1)


def label_ends(ax: Any, lines: Sequence[Any], names: Sequence[str]) -> None:
    """Write the `names` right of `ax`, each at the height of its line's end and tied to it."""
    ends = Ends(ax, lines)
    for i, (line, name) in enumerate(zip(lines, names, strict=True)):
        ax.annotate(name, (0, 0), (0, 0), xycoords=partial(ends.box, i, False), textcoords=partial(ends.box, i, True),
                    va="center", ha="left", fontsize=SIZE, color=INK, annotation_clip=False, arrowprops={
                        "arrowstyle": "-", "color": line.get_color(), "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0,
                        "relpos": (0, 0.5)})
