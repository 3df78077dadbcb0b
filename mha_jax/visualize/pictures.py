"""The parts that every picture is made of; the only module that imports matplotlib."""

import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mha_jax.rooms import packages
from mha_jax.visualize.inputs import whole

with packages():
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.ticker import MaxNLocator

INK = "#3b0f70"
# White where nothing is seen, so that a mask looks like the page; from light to dark in all three
# kinds of colour blindness.
WEIGHTS = LinearSegmentedColormap.from_list(
    "weights", ["#ffffff", "#fde3c8", "#fbb18a", "#ee6a5c", "#b5367a", "#641a80", "#221150"]
)
# Inches, and points of the largest and smallest text.
_CELL, _LARGEST, _SMALLEST = 0.3, 10.0, 5.5
# Inches of the longer side of the largest map with labels, and of every map without.
_WIDEST, _PLAIN = 7.0, 2.1
# Inches of the smallest cell that is framed.
_LINED = 0.1
# Labels under a map that are longer are turned by a quarter.
_UPRIGHT = 2
# Rows and columns beyond which a map is drawn by blocks: a screen has no more dots.
_DOTS = 768


class Picture(Figure):
    """A matplotlib Figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def used(grid: Any, count: int) -> Iterator[tuple[int, Axes]]:
    """Number the first axes of a grid; those after them are left blank."""
    for place, axes in enumerate(grid.flat):
        if place < count:
            yield place, axes
        else:
            axes.set_axis_off()


def finish(picture: Picture, path: str | pathlib.Path | None, title: str = "") -> Picture | None:
    """Write the picture, with its title, to a file, or return it if there is none to write."""
    if title:
        picture.suptitle(plain(title), fontsize=12)
    if path is None:
        return picture
    picture.savefig(path, dpi=150)
    return None


class Panel(NamedTuple):
    """The size of a map on paper: inches across and down, and points of its labels."""

    width: float
    height: float
    size: float


def panel(rows: int, columns: int, labelled: bool, cell: float = _CELL) -> Panel:
    """Return the size of a map: cells of `cell` inches, fewer where there are many.

    A map without labels is a picture of a fixed size, whatever its resolution.
    """
    cell = min(cell, _WIDEST / max(rows, columns)) if labelled else _PLAIN / max(rows, columns)
    size = float(np.clip(cell * 72 * 0.55, _SMALLEST, _LARGEST))
    return Panel(max(columns * cell, 0.5), max(rows * cell, 0.5), size)


def label_space(labels: Sequence[str] | None, size: float, turned: bool = False) -> float:
    """Return the inches that labels need beside their axis; `turned` are those under a map."""
    longest = max(len(label) for label in labels) if labels else 4
    upright = turned and (labels is None or longest <= _UPRIGHT)
    return 0.1 + (1.3 if upright else longest * 0.62) * size / 72


def draw_map(
    axes: Axes,
    weights: np.ndarray,
    queries: Sequence[str] | None,
    keys: Sequence[str] | None,
    sized: Panel,
    largest: float,
    lines: bool = True,
) -> None:
    """Draw weights [T, S] with labels, or with numbers where there are none; `lines` part cells."""
    rows, columns = weights.shape
    dots = blocks_of_maxima(weights, _DOTS)
    axes.imshow(
        dots,
        cmap=WEIGHTS,
        vmin=0.0,
        vmax=max(largest, 1e-6),
        aspect="equal" if max(rows, columns) <= 4 * min(rows, columns) else "auto",
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
    )
    draw_ticks(axes.xaxis, keys, sized.width / columns, sized.size)
    draw_ticks(axes.yaxis, queries, sized.height / rows, sized.size)
    if lines and min(sized.width / columns, sized.height / rows) > _LINED:
        axes.set_xticks(np.arange(columns) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows) - 0.5, minor=True)
        axes.grid(which="minor", color="#e8e8e8", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")
        spine.set_linewidth(0.6)


def draw_scale(
    picture: FigureBase,
    grid: Any,
    label: str,
    *,
    largest: float,
    height: float,
    colors: Colormap = WEIGHTS,
) -> None:
    """Draw the scale from 0 to `largest` right of `grid`, `height` inches high, of one width."""
    scale = ScalarMappable(Normalize(0.0, max(largest, 1e-6)), colors)
    bar = picture.colorbar(
        scale, ax=grid, label=plain(label), aspect=max(5, height / 0.14), pad=0.02
    )
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]


def blocks_of_maxima(weights: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` rows and columns, each the largest of a block: no thin line vanishes.

    >>> blocks_of_maxima(np.eye(6), 3).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    for axis in (0, 1):
        count = weights.shape[axis]
        if count > most:
            starts = np.arange(0, count, -(-count // most))
            weights = np.maximum.reduceat(weights, starts, axis=axis)
    return weights


def plain(label: str) -> str:
    """Keep matplotlib from reading dollar signs as mathematics; halves of characters cannot be drawn."""
    return whole(label).replace("$", r"\$")


def contrasting(colors: Colormap, share: float) -> str:
    """Return black or white, whichever can be read on the colour of `share` in [0, 1]."""
    red, green, blue, _ = colors(share)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


def draw_ticks(axis: Axis, labels: Sequence[str] | None, cell: float, size: float) -> None:
    """Label cells of `cell` inches, every one or as many as can be read; or number a few."""
    axis.set_tick_params(which="both", length=0, pad=2, labelsize=size)
    if labels is None:
        axis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        return
    step = max(1, int(np.ceil(size * 1.1 / 72 / cell)))
    places = range(0, len(labels), step)
    axis.set_ticks(places, [plain(labels[i]) for i in places])
    if axis is axis.axes.xaxis and max(len(label) for label in labels) > _UPRIGHT:
        axis.set_tick_params(labelrotation=90)
