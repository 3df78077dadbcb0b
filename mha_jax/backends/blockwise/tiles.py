"""A call cut into tiles: heads first, padded, with the lists of tiles that can be seen.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size   c pairs of an example and a key-value head in one tile
g groups of c pairs: g c = B K   t, s lengths in whole tiles

The G query heads of a pair read the same keys, so they are rows of one tile, [c, r, block_k] with
r = G * block_q; flipped, [c, block_k, r]. Facts and masks come with all their axes, [c, G, block_q,
block_k], and are merged: XLA on CPU copies what has an axis of length 1 in its middle. Padded keys
have row -1, which no query sees; padded queries are cut off at the end.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mha_jax.attention.call import Call, logits_of
from mha_jax.attention.masks import EVERYTHING, Mask, Reach, pytree
from mha_jax.attention.tokens import Facts, extents
from mha_jax.types import Array


@pytree
class RealKeys(Mask):
    """Keys that are no padding of a tile. Tiles add it; callers never see it."""

    def visible(self, q, k):
        return k.rows >= 0

    def reach(self, q, k):
        return Reach(k.rows[1] >= 0, k.rows[0] >= 0)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of one call.

    Args:
      block_q, block_k: Query rows (of every head of a pair) and keys of a tile.
      pairs: Pairs that one tile holds.
      exhaustive: Visit every tile, masked, by loops of fixed length that recompute their steps: what
        reverse mode can differentiate.
    """

    block_q: int
    block_k: int
    pairs: int
    exhaustive: bool = False


class Order(NamedTuple):
    """For every group and line of tiles, the blocks to visit.

    `live` of them, [#groups, lines], from `first` on, [#groups, lines]; or, where those of some line
    have holes or are not known before run time, the first `live` in `blocks`, [#groups, lines, blocks].
    NumPy where the mask and the tokens are static. `masked` is False where every pair of every visited
    tile is known to be visible; `single` is True where a line is one block. A loop of its own for the
    full tiles of other masks would save one per cent of the time (T 4096 causal, two CPU cores) and cost
    a fifth of the compilation.
    """

    first: Any
    live: Any
    blocks: Any
    masked: bool
    single: bool


class Tiles:
    """The tiles of a call. A line is a group's row of tiles, or its column of tiles."""

    def __init__(self, call: Call, tiling: Tiling):
        b, t, n, _ = call.q.shape
        s, kv = call.k.shape[1:3]
        self.tiling, self.dtype, self.scale = tiling, call.accumulator, call.scale
        # A power of two goes into q, once for each row instead of each logit: it rounds nothing.
        if math.frexp(call.scale)[0] == 0.5:
            q = call.q * jnp.asarray(call.scale, call.q.dtype)
            call = dataclasses.replace(call, q=q, scale=1.0)
        self.call, self.batch, self.kv_heads, self.groups = call, b, kv, n // kv
        self.rows, self.columns = -(-t // tiling.block_q), -(-s // tiling.block_k)
        self.t, self.s = self.rows * tiling.block_q, self.columns * tiling.block_k
        self.q, self.k, self.v = self.queries(call.q), self.keys(call.k), self.keys(call.v)
        self.q_facts = _pad_facts(call.q_tokens.facts(), self.t)
        self.k_facts = _pad_facts(call.k_tokens.facts(), self.s)
        self.mask = call.mask if self.s == s else call.mask & RealKeys()
        self.dense = jax.tree.map(self.pad_dense, self.mask)
        self.bias = None if call.bias is None else self.pad_dense(call.bias)
        self.row_keys = None
        if call.dropout is not None:
            words = call.dropout.row_keys(b, n, self.q_facts.rows)
            self.row_keys = tuple(self._grouped(w.reshape(-1, self.groups * self.t)) for w in words)

    # ---- layout -------------------------------------------------------------------------------

    def queries(self, x: Array) -> Array:
        """Turn [B, T, N, H] into [g, c, G t, H], padded."""
        x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, self.t - x.shape[1]), (0, 0)))
        return self._grouped(x.reshape(-1, self.groups * self.t, x.shape[-1]))

    def statistics(self, x: Array) -> Array:
        """Turn [B, N, T] into [g, c, G t], padded."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.t - x.shape[2])))
        return self._grouped(x.reshape(-1, self.groups * self.t))

    def keys(self, x: Array) -> Array:
        """Turn [B, S, K, H] into [g, c, s, H], padded."""
        x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, self.s - x.shape[1]), (0, 0)))
        return self._grouped(x.reshape(-1, self.s, x.shape[-1]))

    def _grouped(self, x: Array) -> Array:
        return x.reshape(-1, self.tiling.pairs, *x.shape[1:])

    def queries_back(self, x: Array) -> Array:
        """Turn lines [g rows, c, r, H] back into [B, T, N, H]."""
        return self._rows_back(x).swapaxes(1, 2)

    def statistics_back(self, x: Array) -> Array:
        """Turn lines of statistics [g rows, c, r, 1] back into [B, N, T]."""
        return self._rows_back(x)[..., 0]

    def turned_back(self, x: Array) -> Array:
        """Turn [g, c, H, G t] back into [B, T, N, H]."""
        x = x.reshape(self.batch * self.kv_heads, x.shape[2], -1).swapaxes(1, 2)
        return self._heads_first(x).swapaxes(1, 2)

    def keys_back(self, x: Array) -> Array:
        """Turn lines [g columns, c, block_k, H] back into [B, S, K, H]."""
        x = _lines_inward(x, self.columns, at=2)
        x = x.reshape(self.batch, self.kv_heads, self.s, x.shape[-1])
        return x[:, :, : self.call.k.shape[1]].transpose(0, 2, 1, 3)

    def _rows_back(self, x: Array) -> Array:
        """Turn lines [g rows, c, r, H] back into [B, N, T, H]."""
        x = x.reshape(*x.shape[:2], self.groups, -1, x.shape[-1])
        return self._heads_first(_lines_inward(x, self.rows, at=3))

    def _heads_first(self, x: Array) -> Array:
        """Turn what holds pairs, G, t and H in this order into [B, N, T, H], without padding."""
        x = x.reshape(self.batch, self.kv_heads * self.groups, self.t, x.shape[-1])
        return x[:, :, : self.call.q.shape[1]]

    def pad_dense(self, dense: Array) -> Array:
        """Pad [#B, #N, #T, #S] to whole tiles."""
        wanted = {2: self.t, 3: self.s}
        widths = [(0, 0), (0, 0)] + [
            (0, wanted[axis] - dense.shape[axis]) if dense.shape[axis] > 1 else (0, 0)
            for axis in (2, 3)
        ]
        return jnp.pad(dense, widths) if any(after for _, after in widths) else dense

    # ---- one tile -----------------------------------------------------------------------------

    def row_of(self, x: Array, group: Any, i: Any) -> Array:
        """Cut [g, c, G t, ...] to block `i` of a group's rows: [c, r, ...]."""
        x = x.reshape(*x.shape[:2], self.groups, self.t, *x.shape[3:])
        x = _cut(x, {0: (group, 1), 3: (i, self.tiling.block_q)})
        return x.reshape(x.shape[1], -1, *x.shape[4:])

    def keys_of(self, x: Array, group: Any, j: Any) -> Array:
        """Cut [g, c, s, ...] to block `j` of a group's keys: [c, block_k, ...]."""
        return _cut(x, {0: (group, 1), 2: (j, self.tiling.block_k)})[0]

    def dot(self, spec: str, a: Array, b: Array) -> Array:
        """Multiply tiles, summing in the accumulator's dtype."""
        precision = self.call.precision
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=self.dtype)

    def logits(self, dot: Array, group: Any, i: Any, j: Any, masked: bool, flip: bool) -> Array:
        """Turn a tile of q . k into logits, -inf where hidden if `masked`."""
        bias = None if self.bias is None else self.dense_of(self.bias, group, i, j, flip)
        x = logits_of(self.call, dot, bias)
        return jnp.where(self.visible(group, i, j, flip), x, -jnp.inf) if masked else x

    def visible(self, group: Any, i: Any, j: Any, flip: bool) -> Array:
        """Return which pairs of a tile are visible, broadcasting to the tile."""
        bq, bk = self.tiling.block_q, self.tiling.block_k
        q = jax.tree.map(lambda a: _as_rows(self._fact(a, group, i, bq), flip), self.q_facts)
        k = jax.tree.map(lambda a: _as_columns(self._fact(a, group, j, bk), flip), self.k_facts)
        mask = jax.tree.map(lambda a: self._dense_of(a, group, i, j, flip), self.dense)
        return self.merged(mask.visible(q, k), flip)

    def kept(self, group: Any, i: Any, j: Any, flip: bool) -> Array:
        """Return a tile of keep bits."""
        a, c = (self.row_of(w, group, i) for w in self.row_keys)  # type: ignore[union-attr]
        a, c = (x[:, None] if flip else x[..., None] for x in (a, c))
        columns = self._fact(self.k_facts.rows, group, j, self.tiling.block_k)
        columns = columns[:, :, None] if flip else columns[:, None, :]
        return self.call.dropout.kept(a, c, columns)  # type: ignore[union-attr]

    def merged(self, tile: Array, flip: bool) -> Array:
        """Merge [#c, #G, #block_q, #block_k] to [#c, #r, #block_k], or the same flipped."""
        if tile.ndim == 0:  # a rule that says the same of every pair
            return tile
        at = 2 if flip else 1
        heads, rows = tile.shape[at : at + 2]
        size = self.tiling.block_q
        if heads * rows > 1 and (heads, rows) != (self.groups, size):
            whole = (*tile.shape[:at], self.groups, size, *tile.shape[at + 2 :])
            tile = jnp.broadcast_to(tile, whole)
        return tile.reshape(*tile.shape[:at], -1, *tile.shape[at + 2 :])

    def dense_of(self, dense: Array, group: Any, i: Any, j: Any, flip: bool = False) -> Array:
        """Cut [#B, #N, #T, #S] to a tile."""
        return self.merged(self._dense_of(dense, group, i, j, flip), flip)

    def _dense_of(self, dense: Array, group: Any, i: Any, j: Any, flip: bool) -> Array:
        """Cut [#B, #N, #T, #S] to [#c, #G, #block_q, #block_k], with the keys second under `flip`."""
        blocks = {2: (i, self.tiling.block_q), 3: (j, self.tiling.block_k)}
        dense = _cut(dense, {axis: at for axis, at in blocks.items() if dense.shape[axis] > 1})
        tile = self._of_group(self._by_kv_head(dense), group)
        return tile.transpose(0, 3, 1, 2) if flip else tile

    def add_dense(self, whole: Array, tile: Array, group: Any, i: Any, j: Any) -> Array:
        """Add a tile into [#B, #N, #T, #S], summed where that broadcasts."""
        tile = tile.reshape(-1, self.groups, self.tiling.block_q, self.tiling.block_k)
        shape, whole = whole.shape, self._by_kv_head(whole)
        summed = tuple(axis for axis in (1, 2, 3) if whole.shape[axis + 1] == 1)
        tile = jnp.sum(tile, summed, keepdims=True)
        blocks = {3: (i, self.tiling.block_q), 4: (j, self.tiling.block_k)}
        blocks = {axis: at for axis, at in blocks.items() if whole.shape[axis] > 1}
        slab = _cut(whole, blocks).at[self._pairs(whole, group)].add(tile)
        start = _corner(whole.ndim, blocks)
        return lax.dynamic_update_slice(whole, slab, start).reshape(shape)

    def add_turned(self, whole: Array, tile: Array, group: Any, i: Any) -> Array:
        """Add a tile [c, H, r] at block `i` of a group of [g, c, H, G t]."""
        heads = (*whole.shape[:3], self.groups, self.t)
        tile = tile.reshape(1, *tile.shape[:2], self.groups, -1)
        return _add(whole.reshape(heads), tile, {0: group, 4: i}).reshape(whole.shape)

    def _by_kv_head(self, dense: Array) -> Array:
        """Split the heads: [#B, #N, ...] to [#B, #K, #G, ...]."""
        if dense.shape[1] == 1:
            return dense[:, :, None]
        return dense.reshape(dense.shape[0], self.kv_heads, self.groups, *dense.shape[2:])

    def _pairs(self, x: Array, group: Any) -> tuple[Array, Array]:
        """Return where a group's pairs are in [#B, #K, ...]."""
        count = self.tiling.pairs
        pairs = jnp.asarray(group, jnp.uint32) * count + numbers(count)
        b = pairs // self.kv_heads if x.shape[0] > 1 else jnp.zeros_like(pairs)
        k = pairs % self.kv_heads if x.shape[1] > 1 else jnp.zeros_like(pairs)
        return b, k

    def _of_group(self, x: Array, group: Any) -> Array:
        """Take a group's pairs out of [#B, #K, ...]: [#c, ...]."""
        return x[0] if x.shape[:2] == (1, 1) else x[self._pairs(x, group)]

    def _fact(self, a: Any, group: Any, index: Any, size: int) -> Array:
        """Cut facts [#B, L] to a tile's [#c, size]."""
        return self._of_group(_cut(jnp.asarray(a), {1: (index, size)})[:, None], group)

    # ---- which tiles, in which order ------------------------------------------------------------

    def order(self, by_rows: bool) -> Order:
        """Return the key blocks of every row of tiles, or the query blocks of every column."""
        q = jax.tree.map(lambda a: a[:, None, :, None], extents(self.q_facts, self.tiling.block_q))
        k = jax.tree.map(lambda a: a[:, None, None, :], extents(self.k_facts, self.tiling.block_k))
        reach = EVERYTHING if self.tiling.exhaustive else self.mask.reach(q, k)
        some, every = self._by_group(reach.some, "any"), self._by_group(reach.every, "all")
        xp = jnp if isinstance(some, jax.Array) or isinstance(every, jax.Array) else np
        some = some if by_rows else some.swapaxes(-1, -2)
        every = every if by_rows else every.swapaxes(-1, -2)
        # A line of one block visits it, whatever is seen of it: no loop, no state before it.
        single = some.shape[-1] == 1 and not self.tiling.exhaustive
        masked = xp is jnp or self.tiling.exhaustive or bool(np.any((single | some) & ~every))
        live = some.sum(-1).astype(np.uint32)
        blocks = xp.argsort(~some, axis=-1, stable=True).astype(np.uint32)
        first = blocks[..., :1]
        at = np.arange(blocks.shape[-1], dtype=np.uint32)
        if xp is np and np.all((blocks == first + at) | (at >= live[..., None])):
            blocks = None
        return Order(first[..., 0], live, blocks, masked, single)

    def _by_group(self, certain: Any, reduce: str) -> Any:
        """Reduce [#B, #N, rows, columns] to [#groups, rows, columns]."""
        xp = jnp if isinstance(certain, jax.Array) else np
        shape = np.broadcast_shapes(certain.shape, (1, 1, self.rows, self.columns))
        certain = xp.broadcast_to(certain, shape)
        if shape[:2] == (1, 1):
            return certain[0]
        heads = self.kv_heads * self.groups
        certain = xp.broadcast_to(certain, (self.batch, heads, *shape[2:]))
        certain = certain.reshape(self.q.shape[0], -1, *shape[2:])
        return getattr(certain, reduce)(axis=1)

    def over(self, order: Order, group: Any, line: Any, body: Callable, carry: Any) -> Any:
        """Run `body(block, masked, carry)` over the blocks of a line of tiles that can be seen."""

        def of_line(a):
            if isinstance(a, np.ndarray) and np.ptp(a) == 0:
                return a.flat[0]
            return jnp.asarray(a)[group if a.shape[0] > 1 else 0, line]

        if order.single:
            return body(0, order.masked, carry)
        first, live = of_line(order.first), of_line(order.live)
        blocks = None if order.blocks is None else of_line(order.blocks)

        def step(n, carry):
            return body(first + n if blocks is None else blocks[n], order.masked, carry)

        if self.tiling.exhaustive:
            again = jax.checkpoint(lambda carry, n: (step(n, carry), None))
            return lax.scan(again, carry, numbers(int(live)))[0]
        return lax.fori_loop(np.uint32(0), live, step, carry)


def scan(step: Callable, carry: Any, groups: int, lines: int) -> tuple[Any, Any]:
    """Run `carry, out = step(group, line, carry)` over all lines of all groups; stack what comes out."""

    def of_line(carry, n):
        group = n // lines if groups > 1 else 0
        return step(group, n % lines if groups > 1 else n, carry)

    if groups * lines > 1:
        return lax.scan(of_line, carry, numbers(groups * lines))
    carry, out = step(0, 0, carry)
    return carry, jax.tree.map(lambda a: a[None], out)


def numbers(count: int) -> Array:
    """Return 0 to `count` as what all indices are: unsigned, so that slices check for no negative ones."""
    return jnp.arange(count, dtype=jnp.uint32)


def _cut(x: Array, blocks: dict[int, tuple[Any, int]]) -> Array:
    """Cut `x`, along every axis named, to the block of that number and size."""
    sizes = [blocks[axis][1] if axis in blocks else n for axis, n in enumerate(x.shape)]
    return lax.dynamic_slice(x, _corner(x.ndim, blocks), sizes)


def _add(whole: Array, tile: Array, at: dict[int, Any]) -> Array:
    """Add a tile to `whole`: along every axis named, at the block of that number."""
    blocks = {axis: (index, tile.shape[axis]) for axis, index in at.items()}
    added = _cut(whole, blocks) + tile
    return lax.dynamic_update_slice(whole, added, _corner(whole.ndim, blocks))


def _corner(rank: int, blocks: dict[int, tuple[Any, int]]) -> list[Array]:
    """Return where a block begins."""
    first = {axis: index * size for axis, (index, size) in blocks.items()}
    return [jnp.asarray(first.get(axis, 0), jnp.uint32) for axis in range(rank)]


def _lines_inward(x: Array, lines: int, at: int) -> Array:
    """Turn [g lines, c, ...] into [g, c, ..., lines, ...], the lines before what was axis `at`."""
    x = x.reshape(-1, lines, *x.shape[1:])
    return x if lines == 1 else jnp.moveaxis(x, 1, at)


def _as_rows(a: Array, flip: bool) -> Array:
    """Shape a tile's query facts [#c, block_q] to broadcast with the tile."""
    return a[:, None, None, :] if flip else a[:, None, :, None]


def _as_columns(a: Array, flip: bool) -> Array:
    """Shape a tile's key facts [#c, block_k] to broadcast with the tile."""
    return a[:, :, None, None] if flip else a[:, None, None, :]


def _pad_facts(facts: Facts, length: int) -> Facts:
    """Pad [#B, L] facts to `length`: padding has row -1, and else what the last token has."""

    def pad(a, **how):
        width = ((0, 0), (0, length - a.shape[1]))
        if not width[1][1]:
            return a
        return (np if isinstance(a, np.ndarray) else jnp).pad(a, width, **how)

    rest = (a if a is None else pad(a, mode="edge") for a in facts[1:])
    return Facts(pad(facts.rows, constant_values=-1), *rest)
