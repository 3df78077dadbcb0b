"""What a warpgroup of a kernel reads of one tile: its facts, logits and keep bits.

R rows of the warpgroup   C columns of the tile
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.attention.tokens import Facts
from mha_jax.backends.mosaic_gpu.operands import DIAGONALS, LOG2E, ROWS, Plan
from mha_jax.backends.mosaic_gpu.products import TILE, load
from mha_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile.

    Args:
      plan: Of the kernel.
      held: Vectors of the rows, in registers.
      columns: Vectors that pass by, in shared memory.
      slabs: What is T x S, in global memory.
      example, head: The example and the query head.
      row, column: First row and first column in the padded arrays.
    """

    plan: Plan
    held: dict[str, Array]
    columns: dict[str, Any]
    slabs: dict[str, Any]
    example: Any
    head: Any
    row: Any
    column: Any

    @property
    def shape(self) -> tuple[int, int]:
        return ROWS, self.plan.columns

    def vector(self, name: str) -> Array:
        """Return a vector as a tile."""
        axis = 0 if self.plan.of_rows(name) else 1
        numbers = self.held.get(name)
        if numbers is None:
            numbers = load(self.columns[name], TILE.reduce(1 - axis))
        return lax.broadcast_in_dim(numbers, self.shape, [axis])

    def dense(self, name: str) -> Array:
        """Return what broadcasts to T x S as a tile."""
        if name not in self.plan.slabs:
            return self.vector(name)
        ref = self.slabs[name]
        at = place(ref, self.example, self.head)
        row, column = self.row, self.column
        if name == DIAGONALS:
            row, column = 0, column - row + self.plan.diagonals
        rows, columns = pl.ds(row, ROWS), pl.ds(column, self.plan.columns)
        return load(ref.at[(*at, rows, columns)], TILE)

    def visible(self) -> Array:
        """Return which pairs are visible."""
        plan = self.plan

        def leaf(name: str) -> Array:
            x = self.dense(name)
            return x if name in plan.integers else x != 0

        seen = jax.tree.map(leaf, plan.mask).visible(_Facts(self, "q"), _Facts(self, "k"))
        seen = jnp.broadcast_to(seen, self.shape)
        return seen & (self.vector("k.real") != 0) if plan.padded else seen

    def capped(self, product: Array) -> Array:
        """Return scaled and capped products; bare ones where the exponent takes the scale."""
        plan = self.plan
        if plan.folds:
            return product
        x = product * plan.rules.scale
        if (cap := plan.rules.cap) is not None:
            # tanh by the exponential: the card's own has 11 bits.
            x = cap * (1 - 2 / (1 + jnp.exp(x * (2 / cap))))
        return x

    def biased(self, x: Array) -> Array:
        """Return logits: capped products with what is added to them."""
        for term in self.plan.bias:
            x = x + term.tile(self.shape, self.dense)
        return x

    def powers(self, x: Array, m: Array) -> Array:
        """Return exp(x - m) for logits and a number for each of them, in the statistics' unit."""
        if self.plan.unit == 1:
            return jnp.exp2((x - m) * LOG2E)
        return jnp.exp2(x * self.plan.factor - m)

    def slope(self, capped: Array) -> Array:
        """Return the derivative of the cap at capped products."""
        ratio = capped * (1 / self.plan.rules.cap)  # type: ignore[operator]
        return 1 - ratio * ratio

    def kept(self, x: Array, other: Array | float) -> Array:
        """Return x where dropout keeps the weight, else the other."""
        words = (self.vector(f"dropout.{name}") for name in ("a", "c", "rows"))
        x = jnp.where(self.plan.dropout.kept(*words), x, other)  # type: ignore[union-attr]
        # Selected in float32, not in halves of a register.
        return lax.optimization_barrier(x)


class _Facts(Facts):
    """The facts of one side as tiles, read where a mask asks for them."""

    def __new__(cls, tile: Tile, side: str) -> "_Facts":
        vectors = tile.plan.vectors

        def fact(name: str) -> Array | None:
            return tile.vector(f"{side}.{name}") if f"{side}.{name}" in vectors else None

        valid = fact("valid")
        return super().__new__(
            cls,
            fact("rows"),
            fact("positions"),
            fact("segment"),
            None if valid is None else valid != 0,
        )


def place(ref: Any, example: Any, head: Any) -> tuple[Any, Any]:
    """Return where an example and a head are in [#B, #N, ...]."""
    return (example if ref.shape[0] > 1 else 0), (head if ref.shape[1] > 1 else 0)
