"""Tiles that have one number for every diagonal, without gathers: biases that know distances alone."""

import jax.numpy as jnp

from mha_jax.types import Array


def laid(numbers: Array, rows: int, columns: int) -> Array:
    """Lay numbers along the diagonals of a tile.

    Args:
      numbers: [..., rows + columns - 1], that of the lower left corner first.

    Returns:
      [..., rows, columns], whose element (i, j) is number j - i + rows - 1.

    Cost: two copies of the tile; so does the transpose, which sums up the diagonals.

    >>> laid(jnp.arange(4), rows=2, columns=3).tolist()
    [[1, 2, 3], [0, 1, 2]]
    """
    lead, width = numbers.shape[:-1], rows + columns
    # Rows of `width` numbers, read in rows of one less, move by one from row to row.
    wide = jnp.pad(numbers, [(0, 0)] * len(lead) + [(0, 1)])
    wide = jnp.broadcast_to(wide[..., None, :], (*lead, rows, width)).reshape(*lead, rows * width)
    wide = wide[..., : rows * (width - 1)].reshape(*lead, rows, width - 1)
    return wide[..., rows - 1 :]
