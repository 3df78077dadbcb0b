"""What O(T) numbers say: a figure for every head, every query, or the keys that matter most."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mha_jax.attention.given import as_array, integer
from mha_jax.errors import ShapeError
from mha_jax.visualize.inputs import each_layer, known, numbers, texts
from mha_jax.visualize.maps import layer_names


def entropy(
    layers: Any,
    path: str | pathlib.Path | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> Any:
    """Draw the entropy of every head, the mean over its queries: 0 looks at one key.

    A head that spreads evenly over n keys has ln(n) nats. Queries that see no key count as 0.

    Args:
      layers: A list with, for every layer, `scores_entropy` of one example [N, T], or its scores
        [N, T, S]; or one array [L, N, T, S].
      path, title: As for `heads`.
      names: A name for every layer; "layer 0" and so on if None.

    Raises:
      ShapeError: If the layers are malformed or differ in heads, or the names in number.

    >>> figure = entropy([np.full((2, 3, 4), 1 / 4)])
    """
    texts(title=title)
    every = each_layer("layers", layers, "[N, T, S]", "[N, T]")
    names = layer_names(names, len(every))
    values = np.stack([_entropies(layer).mean(axis=1) for layer in every])
    from matplotlib import colormaps

    from mha_jax.visualize.pictures import Picture, contrasting, draw_scale, finish, plain

    rows, columns = values.shape
    picture = Picture(
        figsize=(columns * 0.62 + 2.2, rows * 0.42 + (1.3 if title else 0.95)), layout="constrained"
    )
    axes = picture.subplots()
    colors, largest = colormaps["viridis"], max(float(values.max()), 1e-6)
    axes.imshow(values, cmap=colors, vmin=0.0, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        ink = contrasting(colors, float(value / largest))
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(range(columns), [str(head) for head in range(columns)], fontsize=9)
    axes.set_yticks(range(rows), [plain(name) for name in names], fontsize=9)
    axes.set_xlabel("head")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    draw_scale(picture, axes, "entropy (nats)", largest=largest, height=rows * 0.42, colors=colors)
    return finish(picture, path, title)


def by_query(
    values: Any,
    path: str | pathlib.Path | None = None,
    *,
    name: str = "",
    title: str = "",
) -> Any:
    """Draw one number a head and query along the sequence.

    More than 768 queries are drawn in blocks, each in the colour of its mean.

    Args:
      values: [N, T] of one example, as `scores_max` or `scores_entropy` give it.
      path, title: As for `heads`.
      name: What the values are.

    Raises:
      ShapeError: If the values are not [N, T], finite and not negative.

    >>> figure = by_query(np.ones((2, 100)), name="largest weight")
    """
    texts(name=name, title=title)
    values = numbers("values", values, "[N, T]")
    from mha_jax.visualize.pictures import WEIGHTS, Picture, draw_scale, finish

    count, length = values.shape
    picture = Picture(figsize=(9.0, count * 0.26 + (1.3 if title else 0.95)), layout="constrained")
    axes = picture.subplots()
    # As many columns as the page has dots, each the mean of its queries.
    starts = np.arange(0, length, -(-length // 768))
    shown = np.add.reduceat(values, starts, axis=1) / np.diff([*starts, length])
    axes.imshow(
        shown,
        cmap=WEIGHTS,
        vmin=0.0,
        vmax=max(float(shown.max()), 1e-6),
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, length - 0.5, count - 0.5, -0.5),
    )
    axes.hlines(np.arange(1, count) - 0.5, -0.5, length - 0.5, color="white", linewidth=1.5)
    axes.set_yticks(range(count), [str(head) for head in range(count)], fontsize=8)
    axes.set_ylabel("head")
    axes.set_xlabel("query")
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set(color="#bbbbbb", linewidth=0.6)
    draw_scale(picture, axes, name, largest=float(shown.max()), height=count * 0.26)
    return finish(picture, path, title)


def top_keys(
    weights: Any,
    places: Any,
    path: str | pathlib.Path | None = None,
    *,
    length: int | None = None,
    title: str = "",
) -> Any:
    """Draw the keys that every query weighs most: the map of a head of a long sequence.

    Args:
      weights, places: What `scores_top_k` returns, of one example: two arrays [N, T, k].
      path, title: As for `heads`.
      length: Number of keys S; one past the largest place if None.

    Raises:
      ShapeError: If the two arrays do not match, or a place is not below `length`.

    >>> figure = top_keys(np.ones((2, 5, 1)), np.arange(5)[None, :, None] * np.ones((2, 1, 1), int))
    """
    texts(title=title)
    weights = numbers("weights", weights, "[N, T, k]")
    places = np.asarray(known("places", as_array("places", places, "integers [N, T, k]")))
    if places.shape != weights.shape:
        raise ShapeError(
            f"weights and places must be the two arrays of scores_top_k: got shapes {weights.shape} "
            f"and {places.shape}. Expected [N, T, k] twice, of one example."
        )
    if not np.issubdtype(places.dtype, np.integer):
        raise ShapeError(f"places must be numbers of keys, integers: got {places.dtype}.")
    if length is not None:
        integer("length", length, 1, 2**31 - 1, "It is the number of keys, S.")
    length = int(places.max()) + 1 if length is None else length
    if places.min() < 0 or places.max() >= length:
        raise ShapeError(
            f"places must be keys from 0 to {length - 1}: got {places.min()} to {places.max()}. "
            "Pass length=S, the number of keys."
        )
    from mha_jax.visualize.pictures import WEIGHTS, Picture, draw_scale, finish, used

    count, queries, _ = weights.shape
    across = min(count, 4)
    down = -(-count // across)
    picture = Picture(
        figsize=(across * 2.4 + 1.4, down * 2.5 + (0.7 if title else 0.3)), layout="constrained"
    )
    grid = picture.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    largest = max(float(weights.max()), 1e-6)
    for head, axes in used(grid, count):
        seen = weights[head] > 0
        order = np.argsort(weights[head][seen])  # The largest weights on top.
        axes.scatter(
            places[head][seen][order],
            np.nonzero(seen)[0][order],
            c=weights[head][seen][order],
            cmap=WEIGHTS,
            vmin=0.0,
            vmax=largest,
            s=max(3.0, (150 / max(queries, length)) ** 2),
            linewidths=0,
            rasterized=True,
        )
        axes.set(xlim=(-0.5, length - 0.5), ylim=(queries - 0.5, -0.5), box_aspect=1)
        axes.set_title(f"head {head}", fontsize=9, pad=4)
        axes.tick_params(labelsize=8, length=2)
        axes.spines[:].set(color="#bbbbbb", linewidth=0.6)
    for axes in grid[:, 0]:
        axes.set_ylabel("query", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("key", fontsize=9)
    draw_scale(picture, grid, "attention weight", largest=largest, height=down * 2.2)
    return finish(picture, path, title)


def _entropies(layer: np.ndarray) -> np.ndarray:
    """Return the entropy [N, T] of scores [N, T, S], and entropies [N, T] as they are."""
    if layer.ndim == 2:
        return layer
    return -np.sum(layer * np.log(np.where(layer > 0, layer, 1)), axis=-1)
