"""Pictures of attention. matplotlib is imported when a picture is drawn, never before."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mha_jax.errors import ShapeError


def alignment(
    scores: np.ndarray,
    path: str | pathlib.Path,
    *,
    queries: Sequence[str],
    keys: Sequence[str],
    query_name: str = "query",
    key_name: str = "key",
    title: str = "",
) -> None:
    """Draw the cross-attention of one example: the mean over heads large, every head small.

    Args:
      scores: Attention weights `[N, T, S]`.
      path: The PNG, SVG or PDF file to write.
      queries: T labels of the rows.
      keys: S labels of the columns.
      query_name: What the rows are.
      key_name: What the columns are.
      title: Above the picture.

    Raises:
      ShapeError: The labels do not match the scores.
    """
    scores = np.asarray(scores, np.float32)
    if scores.ndim != 3 or scores.shape[1:] != (len(queries), len(keys)):
        raise ShapeError(
            f"the scores have shape {scores.shape}, the labels are {len(queries)} queries and "
            f"{len(keys)} keys. Expected scores [N, T, S] with a label for every row and column."
        )
    from matplotlib.figure import Figure

    heads, rows, columns = scores.shape
    cell = 0.42
    large = (columns * cell, rows * cell)
    figure = Figure(figsize=(large[0] * 2 + 2.6, large[1] + 1.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1), wspace=0.04, squeeze=False)[0]
    figure.suptitle(title)

    axes = left.subplots()
    image = _map(axes, scores.mean(axis=0), queries, keys, size=11)
    axes.set_title("mean over heads", fontsize=10)
    axes.set_xlabel(key_name)
    axes.set_ylabel(query_name)
    left.colorbar(image, ax=axes, label="attention weight", shrink=0.8)

    across = int(np.ceil(np.sqrt(heads)))
    grid = right.subplots(-(-heads // across), across, squeeze=False)
    for head, axes in enumerate(grid.flat):
        if head >= heads:
            axes.set_axis_off()
            continue
        _map(axes, scores[head], queries, keys, size=6)
        axes.set_title(f"head {head}", fontsize=8)
    figure.savefig(path, dpi=150)


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | pathlib.Path
) -> None:
    """Draw how figures changed with the training step, one panel each.

    Args:
      series: Steps and values by name.
      path: The PNG, SVG or PDF file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(series), 2.8), layout="constrained")
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    for axes, (name, (steps, values)) in zip(panels, series.items()):
        marker = "o" if len(steps) < 10 else ""
        axes.plot(steps, values, color="#51127c", linewidth=1.5, marker=marker, markersize=4)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.grid(color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _map(axes, weights: np.ndarray, queries: Sequence[str], keys: Sequence[str], size: int):
    image = axes.imshow(weights, cmap="magma_r", vmin=0.0, vmax=1.0, aspect="equal")
    axes.set_xticks(range(len(keys)), keys, fontsize=size)
    axes.set_yticks(range(len(queries)), queries, fontsize=size)
    axes.tick_params(length=0, pad=2)
    axes.set_xticks(np.arange(len(keys)) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(queries)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image
