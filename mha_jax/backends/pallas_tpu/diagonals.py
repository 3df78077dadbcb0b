"""Biases that know distances alone, inside a kernel: one number for every diagonal of a part of a tile.

A table [N, rows + columns], made outside by the rule itself (`rules.made`), holds what is added where a
column lies so many places after a row, that of a whole side before it first. A part reads a line of it, and
moves it by one lane from row to row; backward, a part is summed along its diagonals into the gradient of the
table, of which JAX knows the way back to the rule's own numbers. So a kernel needs no gathers.

N query heads
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from mha_jax.backends.pallas_tpu.patterns import LANES
from mha_jax.types import Array

SUBLANES = 8


def spread(line: Array, height: int, width: int) -> Array:
    """Lay a line along the diagonals of a part.

    Args:
      line: [1, height + width].
      height, width: Multiples of 128.

    Returns:
      [height, width], whose element (i, j) is that of the line at j - i + height.
    """
    # A square of 128 rows by doubling; those below are the same, by whole lanes further on.
    x = jnp.broadcast_to(line, (SUBLANES, line.shape[1]))
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in (1, 2, 4):
        x = jnp.where(row & bit != 0, pltpu.roll(x, bit, 1), x)
    while x.shape[0] < LANES:
        x = jnp.concatenate([x, pltpu.roll(x, x.shape[0], 1)], 0)
    firsts = range(height, 0, -LANES)
    return jnp.concatenate([x[:, first : first + width] for first in firsts], 0)


def summed(part: Array) -> Array:
    """Sum a part [height, width] along its diagonals, [1, height + width]: the transpose of `spread`."""
    height, width = part.shape
    down, across = height // LANES, width // LANES
    blocks = [[] for _ in range(down + across)]
    for i in range(down):
        for j in range(across):
            rows, columns = (slice(n * LANES, (n + 1) * LANES) for n in (i, j))
            blocks[j - i + down].append(part[rows, columns])
    empty = jnp.zeros((LANES, LANES), part.dtype)
    x = jnp.concatenate([sum(block[1:], block[0]) if block else empty for block in blocks], 1)
    while x.shape[0] > SUBLANES:
        half = x.shape[0] // 2
        x = x[:half] + pltpu.roll(x[half:], height + width - half, 1)
    for bit in (4, 2, 1):
        x = x + pltpu.roll(pltpu.roll(x, height + width - bit, 1), SUBLANES - bit, 0)
    return x[:1]
