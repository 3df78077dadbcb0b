"""How figures changed in a training run."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mha_jax.attention.given import of_kind
from mha_jax.errors import ShapeError
from mha_jax.visualize.inputs import texts


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | pathlib.Path | None = None,
) -> Any:
    """Draw how figures changed with the training step, one panel each.

    Args:
      series: Steps and values by name.
      path: The PNG, SVG or PDF file to write; None returns the Figure.

    Raises:
      ShapeError: There are none.

    >>> figure = curves({"loss": ([0, 50, 100], [4.0, 1.2, 0.7])})
    """
    from mha_jax.visualize.pictures import INK, Picture, finish, plain

    hint = "Pass steps and values by name, {'loss': ([0, 50], [4.0, 1.2])}."
    of_kind("series", series, Mapping, hint)
    texts(**{f"name {name!r}": name for name in series})
    for name, pair in series.items():
        fits = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not fits or np.ndim(pair[0]) != 1 or np.shape(pair[0]) != np.shape(pair[1]):
            raise ShapeError(
                f"series[{name!r}] must be steps and as many values: got {pair!r}. {hint}"
            )
    if not series:
        raise ShapeError("series holds no figures to draw. Expected steps and values by name.")
    picture = Picture(figsize=(3.6 * len(series), 2.8), layout="constrained")
    panels = picture.subplots(1, len(series), squeeze=False)[0]
    for axes, (name, (steps, values)) in zip(panels, series.items()):
        marker = "o" if len(steps) < 10 else ""
        axes.plot(steps, values, color=INK, linewidth=1.5, marker=marker, markersize=4)
        axes.set_title(plain(name.replace("_", " ")), fontsize=10)
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.grid(color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return finish(picture, path)
