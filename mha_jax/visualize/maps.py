"""Maps of weights, queries down and keys across: one layer, many layers, masks."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mha_jax.attention.given import as_array, of_kind
from mha_jax.attention.masks import Mask, check_mask
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.visualize.inputs import (
    Labels,
    check_labels,
    each_layer,
    known,
    numbers,
    sequence,
    texts,
)

# Inches of a whole picture, about the width of a page.
_PAGE = 11.0


def heads(
    scores: Any,
    path: str | pathlib.Path | None = None,
    *,
    queries: Labels = None,
    keys: Labels = None,
    query_name: str = "query",
    key_name: str = "key",
    title: str = "",
) -> Any:
    """Draw every head of one layer, all on one scale of colours.

    Args:
      scores: Attention weights [N, T, S] of one example, or their mean over the heads [T, S]. More
        than 768 rows or columns are drawn by blocks, each in the colour of its largest weight.
      path: The PNG, SVG or PDF file to write; None returns the Figure.
      queries, keys: T and S labels; numbers if None.
      query_name, key_name: What the rows and the columns are.
      title: Above the picture.

    Raises:
      ShapeError: If the scores are not of one example, or the labels do not match them.

    >>> figure = heads(np.full((2, 3, 3), 1 / 3), queries="abc", keys="abc")
    """
    texts(query_name=query_name, key_name=key_name, title=title)
    wanted = "weights [N, T, S], or their mean over the heads [T, S]"
    scores = known("scores", as_array("scores", scores, wanted))
    if np.ndim(scores) == 2:
        scores, names = np.asarray(scores)[None], ["mean over heads"]
    else:
        scores = numbers("scores", scores, "[N, T, S]")
        names = [f"head {n}" for n in range(len(scores))]
    scores = numbers("scores", scores, "[N, T, S]")
    rows, columns = check_labels(scores, queries, keys)
    return _grid(
        dict(zip(names, scores)),
        *(path, rows, columns),
        largest=float(scores.max()),
        names=(query_name, key_name),
        title=title,
        label="attention weight",
    )


def alignment(
    scores: Any,
    path: str | pathlib.Path | None = None,
    *,
    queries: Sequence[str],
    keys: Sequence[str],
    query_name: str = "query",
    key_name: str = "key",
    title: str = "",
) -> Any:
    """Draw the cross-attention of one example: the mean over heads large, every head small.

    Args:
      scores: Attention weights [N, T, S].
      path, query_name, key_name, title: As for `heads`.
      queries: T labels of the rows.
      keys: S labels of the columns.

    Raises:
      ShapeError: The labels do not match the scores.

    >>> figure = alignment(np.full((2, 2, 3), 1 / 3), queries=["K", "AE"], keys="cat")
    """
    texts(query_name=query_name, key_name=key_name, title=title)
    scores = numbers("scores", scores, "[N, T, S]")
    row_labels, column_labels = check_labels(scores, queries, keys)
    from mha_jax.visualize import pictures

    count, rows, columns = scores.shape
    large = pictures.panel(rows, columns, labelled=True, cell=0.42)
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    # As large as the mean is high, within what a page has beside it.
    small = pictures.panel(rows, columns, True, cell=max(0.1, large.height / rows / down * 0.8))
    beside = pictures.label_space(row_labels, small.size) + 0.15
    below = pictures.label_space(column_labels, small.size, turned=True) + 0.25
    left_width = large.width + pictures.label_space(row_labels, large.size) + 1.5
    right_width = across * (small.width + beside)
    height = max(large.height + 0.8, down * (small.height + below)) + (0.4 if title else 0.1)
    picture = pictures.Picture(figsize=(left_width + right_width, height), layout="constrained")
    left, right = picture.subfigures(
        1, 2, width_ratios=(left_width, right_width), wspace=0.02, squeeze=False
    )[0]

    axes = left.subplots()
    largest = float(scores.max())
    pictures.draw_map(axes, scores.mean(axis=0), row_labels, column_labels, large, largest)
    axes.set_title("mean over heads", fontsize=10)
    axes.set_xlabel(pictures.plain(key_name))
    axes.set_ylabel(pictures.plain(query_name))
    pictures.draw_scale(left, axes, "attention weight", largest=largest, height=large.height)

    grid = right.subplots(down, across, squeeze=False)
    for head, axes in pictures.used(grid, count):
        pictures.draw_map(axes, scores[head], row_labels, column_labels, small, largest)
        axes.set_title(f"head {head}", fontsize=8, pad=3)
    return pictures.finish(picture, path, title)


def layers(
    scores: Any,
    path: str | pathlib.Path | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> Any:
    """Draw every head of every layer, small: a layer a row, a head a column.

    Args:
      scores: A list with the attention weights [N, T, S] of every layer, or one array of them; T
        and S may differ from layer to layer.
      path, title: As for `heads`.
      names: A name for every layer; "layer 0" and so on if None.

    Raises:
      ShapeError: If the layers are malformed or differ in heads, or the names in number.

    >>> figure = layers([np.eye(3)[None], np.eye(3)[None]])
    """
    texts(title=title)
    every = each_layer("scores", scores, "[N, T, S]")
    names = layer_names(names, len(every))
    from mha_jax.visualize.pictures import Panel, Picture, draw_map, draw_scale, finish, plain

    side = float(np.clip(_PAGE / len(every[0]), 0.55, 1.1))
    largest = max(float(layer.max()) for layer in every)
    picture = Picture(
        figsize=(
            len(every[0]) * (side + 0.08) + 1.6,
            len(every) * (side + 0.08) + (0.9 if title else 0.5),
        ),
        layout="constrained",
    )
    picture.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr]
    grid = picture.subplots(len(every), len(every[0]), squeeze=False)
    for row, layer, name in zip(grid, every, names):
        for head, axes in enumerate(row):
            sized = Panel(side, side, 6.0)
            draw_map(axes, layer[head], None, None, sized, largest, lines=False)
            axes.set_aspect("auto")
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(plain(name), fontsize=9, rotation=0, ha="right", va="center")
    for head, axes in enumerate(grid[0]):
        axes.set_title(f"head {head}", fontsize=9, pad=4)
    draw_scale(picture, grid, "attention weight", largest=largest, height=len(every) * side)
    return finish(picture, path, title)


def masks(
    rules: Mapping[str, Mask],
    queries: Tokens,
    keys: Tokens | None = None,
    path: str | pathlib.Path | None = None,
    *,
    title: str = "",
) -> Any:
    """Draw which query may see which key: dark cells are visible.

    Args:
      rules: Masks by name.
      queries: The tokens of the queries; of the first example where they are of a batch.
      keys: The tokens of the keys; `queries` if None.
      path, title: As for `heads`.

    Raises:
      ShapeError: If there is no mask to draw.

    >>> from mha_jax import Causal, Window
    >>> figure = masks({"Causal()": Causal(), "Window(1, 1)": Window(1, 1)}, Tokens(5))
    """
    of_kind("rules", rules, Mapping, "Pass masks by name, {'causal': mj.Causal()}.")
    texts(title=title, **{f"name {name!r}": name for name in rules})
    for name, rule in rules.items():
        check_mask(f"rules[{name!r}]", rule)
    if not rules:
        raise ShapeError("there is no mask to draw: got {}. Expected masks by name.")
    keys = queries if keys is None else keys
    seen = {name: _matrix(name, rule, queries, keys) for name, rule in rules.items()}
    maps = {
        name: np.asarray(matrix if matrix.ndim == 2 else matrix[0, 0], np.float32)
        for name, matrix in seen.items()
    }
    return _grid(maps, path, None, None, largest=1.25, names=("query", "key"), title=title)


def _matrix(name: str, rule: Mask, queries: Tokens, keys: Tokens) -> np.ndarray:
    """Return what a mask shows of tokens, [T, S] or [#B, #N, T, S]."""
    for side, tokens in (("queries", queries), ("keys", keys)):
        of_kind(side, tokens, Tokens, "Pass mj.Tokens(length, start=..., segment=...).")
    try:
        matrix = rule.matrix(queries, keys)
    except (ValueError, IndexError) as error:
        raise ShapeError(
            f"rules[{name!r}] does not fit {queries.length} queries and {keys.length} keys: {error}. Arrays "
            "of tokens are [B, length] here, those of a mask [T, S] or [B, N, T, S]."
        ) from error
    if matrix.size == 0:
        raise ShapeError(f"rules[{name!r}] has no pair to draw: got {matrix.shape} pairs.")
    return matrix


def layer_names(names: Sequence[str] | None, count: int) -> Sequence[str]:
    """Return a name for every layer.

    Raises:
      ShapeError: If there are too few or too many.
    """
    sequence("names", names)
    if names is None:
        return [f"layer {i}" for i in range(count)]
    if len(names) != count:
        raise ShapeError(
            f"got {len(names)} names for {count} layers. Expected one for each, or None."
        )
    texts(**{f"name {name!r}": name for name in names})
    return names


def _grid(
    maps: Mapping[str, np.ndarray],
    path: str | pathlib.Path | None,
    queries: Sequence[str] | None,
    keys: Sequence[str] | None,
    *,
    largest: float,
    names: tuple[str, str],
    title: str,
    label: str | None = None,
) -> Any:
    """Draw maps of one size side by side, labelled at the left and below only."""
    from mha_jax.visualize import pictures

    rows, columns = next(iter(maps.values())).shape
    labelled = queries is not None or keys is not None
    beside = 0.45 + pictures.label_space(queries, 8)
    # Four maps across a page, if their labels can be read then.
    share = (_PAGE - beside - 1.0) / min(len(maps), 4) - 0.15
    sized = pictures.panel(rows, columns, labelled, cell=float(np.clip(share / columns, 0.13, 0.3)))
    across = max(1, min(len(maps), int((_PAGE - beside - 0.9) // (sized.width + 0.15))))
    down = -(-len(maps) // across)
    across = -(-len(maps) // down)
    below = 0.35 + pictures.label_space(keys, sized.size, turned=True)
    width = across * (sized.width + 0.15) + beside + (0.9 if label else 0.1)
    height = down * (sized.height + 0.3) + below + (0.45 if title else 0.1)
    picture = pictures.Picture(figsize=(width, height), layout="constrained")
    grid = picture.subplots(down, across, squeeze=False)
    for place, axes in pictures.used(grid, len(maps)):
        name, weights = list(maps.items())[place]
        pictures.draw_map(axes, weights, queries, keys, sized, largest)
        fitting = sized.width * 72 / (0.6 * max(1, len(name)))
        axes.set_title(pictures.plain(name), fontsize=float(np.clip(fitting, 6, 9)), pad=4)
        first, last = place % across == 0, place + across >= len(maps)
        axes.tick_params(labelleft=first, labelbottom=last)
        axes.set_ylabel(pictures.plain(names[0]) if first else "", fontsize=9)
        axes.set_xlabel(pictures.plain(names[1]) if last else "", fontsize=9)
    if label:
        pictures.draw_scale(picture, grid, label, largest=largest, height=height)
    return pictures.finish(picture, path, title)
