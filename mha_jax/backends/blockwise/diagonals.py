"""Tiles that have one number for every diagonal, without gathers: biases that know distances alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mha_jax.types import Array

# Rows of a strip.
_STRIP = 8


def laid(numbers: Array, rows: int, columns: int) -> Array:
    """Lay numbers along the diagonals of a tile.

    Args:
      numbers: [..., rows + columns - 1], that of the lower left corner first.

    Returns:
      [..., rows, columns], whose element (i, j) is number j - i + rows - 1.

    Cost: two copies of the tile.

    >>> laid(jnp.arange(4), rows=2, columns=3).tolist()
    [[1, 2, 3], [0, 1, 2]]
    """
    lead, width = numbers.shape[:-1], rows + columns
    # Rows of `width` numbers, read in rows of one less, move by one from row to row.
    wide = jnp.pad(numbers, [(0, 0)] * len(lead) + [(0, 1)])
    wide = jnp.broadcast_to(wide[..., None, :], (*lead, rows, width)).reshape(*lead, rows * width)
    wide = wide[..., : rows * (width - 1)].reshape(*lead, rows, width - 1)
    return wide[..., rows - 1 :]


def summed(x: Array, strips: bool = True) -> Array:
    """Sum up every diagonal of tiles: the transpose of `laid`.

    Args:
      x: [..., rows, columns].
      strips: Add strips of a few rows to each other, moved by as many numbers, in a loop, and sum up the
        diagonals of their sum alone: a seventh of the time on a CPU, where a loop costs little.

    Returns:
      [..., rows + columns - 1].

    >>> summed(jnp.array([[1, 2, 3], [10, 20, 30]])).tolist()
    [10, 21, 32, 3]
    """
    rows, columns = x.shape[-2:]
    if strips and rows > _STRIP:
        x = _one_strip(x)
        sums = summed(x, strips=False)
        return sums[..., sums.shape[-1] - (rows + columns - 1) :]
    numbers = jax.ShapeDtypeStruct((*x.shape[:-2], rows + columns - 1), x.dtype)
    return jax.linear_transpose(lambda n: laid(n, rows, columns), numbers)(x)[0]


def _one_strip(x: Array) -> Array:
    """Return a strip of few rows whose diagonals sum up to those of x, with some of 0 before them."""
    rows, columns = x.shape[-2:]
    lead = [(0, 0)] * (x.ndim - 2)
    count = -(-rows // _STRIP)
    if count * _STRIP != rows:
        x = jnp.pad(x, [*lead, (0, count * _STRIP - rows), (0, 0)])
    last = (count - 1) * _STRIP
    corner = [np.uint32(0)] * len(lead)

    def step(n, strip):
        first = n * np.uint32(_STRIP)
        part = lax.dynamic_slice(
            x, [*corner, first, np.uint32(0)], (*x.shape[:-2], _STRIP, columns)
        )
        at = [*corner, np.uint32(0), np.uint32(last) - first]
        return lax.dynamic_update_slice(strip, lax.dynamic_slice(strip, at, part.shape) + part, at)

    strip = jnp.pad(x[..., :_STRIP, :], [*lead, (0, 0), (last, 0)])
    return lax.fori_loop(np.uint32(1), np.uint32(count), step, strip)
