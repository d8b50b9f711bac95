"""What pictures are drawn on: axes, panels on as many figures as they need, and files."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure
from matplotlib.figure import SubFigure

from runner.events import listify
from runner.insight import ends

PAGE = 12           # panels on one figure: of more one could read none


def axis(ax: Axes | None) -> Axes:
    """`ax`, or that of a new figure if None, without a frame above and on the right."""
    if ax is None: _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def panels(axes: Axes | Iterable[Axes] | None, n: int, what: str, names: Iterable[str] = (),
           labels: int = 0) -> list[Axes]:
    """`axes` as a list of `n`, or as many new ones: 2 in a row, 3 of more than 4, on a new figure after each `PAGE`.

    `names` are titles that the new ones must be wide enough for, `labels` characters that stand right of each.
    """
    if axes is None:
        width = 4.6 + ends.SIZE * ends.WIDTH / 72 * labels
        new = []
        for at in range(0, n, PAGE):
            k = min(PAGE, n - at)
            ncols = min(k, 2 if n <= 4 else 3)
            made = figure(ncols, -(-k // ncols), width=width, height=2.9)[1]
            for ax in made[k:]: ax.remove()
            new += made[:k]
        axes = new
    found = listify(getattr(axes, "flat", axes))    # flat: of the array that plt.subplots returns
    if len(found) != n: raise ValueError(f"got {len(found)} axes; {what} needs {n}: pass as many, or None for new ones")
    for ax, name in zip(found, names, strict=False):
        ax.set_title(ends.wrapped(name, ends.fitting(0.95 * inches(ax), 10)), loc="left", fontsize="medium")
    return [axis(ax) for ax in found]


def inches(ax: Axes) -> float:
    """The width of `ax` as it stands, less what a bar or a legend beside it may take."""
    return 0.8 * ax.get_window_extent().width / ax.figure.dpi


def figure(ncols: int = 1, nrows: int = 1, *, width: float = 6.0,
           height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A new figure with panels of `width` by `height` inches: `(fig, axes)`, `axes` a list, row by row."""
    with plt.rc_context({"figure.max_open_warning": 0}):        # a deep network has many pages
        fig, axes = plt.subplots(nrows, ncols, figsize=(width * ncols, height * nrows), squeeze=False,
                                 layout="constrained")
    return fig, list(axes.flat)


def pages(axes: Axes | Iterable[Axes]) -> list[Figure | SubFigure]:
    """The figures that `axes` are on, in their order: one, or several of what takes more than `PAGE` panels."""
    return list(dict.fromkeys(ax.figure for ax in listify(axes)))


def save_pages(axes: Axes | Iterable[Axes], path: str | Path) -> list[Path]:
    """Write every figure that `axes` are on and close it: to `path`, or of several to `path` with -1, -2 and so on."""
    path, found = Path(path), pages(axes)
    paths = [path] if len(found) == 1 else [path.with_name(f"{path.stem}-{i + 1}{path.suffix}")
                                            for i in range(len(found))]
    for fig, at in zip(found, paths, strict=True): save(fig, at)
    return paths


def save(fig: Figure | SubFigure, path: str | Path) -> None:
    """Write `fig`, or the whole of which it is a part, to `path` as its suffix says and close it."""
    whole = fig.figure if isinstance(fig, SubFigure) else fig
    whole.savefig(path, dpi=120)
    plt.close(whole)
