"""How the tiles of examples and heads lie side by side: in groups, one after the other, or all at once.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K

One device computes `Grouped` tiles: c pairs of an example and a key-value head are one axis of a tile, and a
loop goes over g = B K / c groups of them. A program for several devices computes them `Apart`: examples and
key-value heads are two axes of every tile, and no loop goes over them, so that XLA cuts either of them over
devices and gathers nothing. Sizes that are not known before the program runs lie apart, too.

Arrays of one side of the logits are [g, *lead, length, ...], where lead is (c,) or (B, K).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.types import Array, Size


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Pairs of an example and a key-value head in groups of `pairs`: heads of an example, or all of some."""

    batch: int
    kv_heads: int
    pairs: int

    @property
    def lead(self) -> tuple[int, ...]:
        return (self.pairs,)

    @property
    def groups(self) -> int:
        return self.batch * self.kv_heads // self.pairs

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Of how many groups are the examples, and the heads, and how many of either are in a group."""
        heads = min(self.pairs, self.kv_heads)
        examples = self.pairs // heads
        return self.batch // examples, self.kv_heads // heads, examples, heads

    def split(self, x: Array) -> Array:
        """Turn [B, K, ...] into [g, c, ...]."""
        return x.reshape(self.groups, self.pairs, *x.shape[2:])

    def take(self, x: Array, group: Any) -> Array:
        """Take a group's pairs out of [#B, #K, ...]: [#c, ...]."""
        return x[0] if x.shape[:2] == (1, 1) else x[self._pairs(x, group)]

    def add(self, whole: Array, tile: Array, group: Any) -> Array:
        """Add a group's tile [c, ...] to [#B, #K, ...], summed where that broadcasts."""
        return whole.at[self._pairs(whole, group)].add(tile)

    def reduced(self, certain: Any, reduce: str) -> Any:
        """Reduce [#B, #N, ...] by "any" or "all" to [#g, ...]."""
        if certain.shape[:2] == (1, 1):
            return certain[0]
        xp: Any = jnp if isinstance(certain, jax.Array) else np
        heads = certain.shape[1] if certain.shape[1] > 1 else self.kv_heads
        certain = xp.broadcast_to(certain, (self.batch, heads, *certain.shape[2:]))
        return getattr(certain.reshape(self.groups, -1, *certain.shape[2:]), reduce)(axis=1)

    def _pairs(self, x: Array, group: Any) -> tuple[Array, Array]:
        """Return where a group's pairs are in [#B, #K, ...]."""
        pairs = jnp.asarray(group, jnp.uint32) * self.pairs + jnp.arange(
            self.pairs, dtype=jnp.uint32
        )
        b = pairs // self.kv_heads if x.shape[0] > 1 else jnp.zeros_like(pairs)
        k = pairs % self.kv_heads if x.shape[1] > 1 else jnp.zeros_like(pairs)
        return b, k


@dataclasses.dataclass(frozen=True)
class Apart:
    """Examples and key-value heads as axes of their own, all of them in every tile."""

    batch: Size
    kv_heads: int

    groups = 1

    @property
    def lead(self) -> tuple[Size, ...]:
        return self.batch, self.kv_heads

    @property
    def box(self) -> tuple[int, int, Size, int]:
        return 1, 1, self.batch, self.kv_heads

    def split(self, x: Array) -> Array:
        return x[None]

    def take(self, x: Array, group: Any) -> Array:
        return x

    def add(self, whole: Array, tile: Array, group: Any) -> Array:
        axes = tuple(axis for axis in (0, 1) if whole.shape[axis] == 1)
        return whole + jnp.sum(tile, axes, keepdims=True)

    def reduced(self, certain: Any, reduce: str) -> Any:
        return getattr(certain, reduce)(axis=(0, 1))[None]
