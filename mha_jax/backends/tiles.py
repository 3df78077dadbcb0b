"""A call cut into tiles: heads first, padded, with the list of tiles that can be seen.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size   P = B * K pairs of an example and a key-value head

The G query heads of a pair read the same keys, so they are rows of one tile, [c, G, block_q, block_k] for
c pairs. Padded keys have row -1, which no query sees; padded queries are cut off at the end.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mha_jax.backends.base import Call, logits_of
from mha_jax.masks import EVERYTHING, Mask, Reach, pytree
from mha_jax.tokens import Facts, extents
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
      block_q, block_k: Rows and columns of a tile.
      pairs: Pairs that one tile holds; 1 unless the tiles are small.
      chains: Tiles computed side by side, which do not wait for each other.
      exhaustive: Visit every tile, masked, by loops of fixed length: what reverse mode can differentiate.
    """

    block_q: int
    block_k: int
    pairs: int = 1
    chains: int = 1
    exhaustive: bool = False


class Order(NamedTuple):
    """For every group and row of tiles, its key blocks: fully visible ones first, then partly visible.

    `blocks` is [#groups, rows, columns]; the first `full` run unmasked, up to `live` masked, the rest
    is skipped. NumPy where the mask and the tokens are static.
    """

    blocks: Any
    full: Any
    live: Any


class Side(NamedTuple):
    """One row of tiles of one group: what stays while its key blocks pass by."""

    q: Array  # [chains, c, G, block_q, H]
    i: Array | int
    pair: Array | int


class Tiles:
    """The tiles of a call."""

    def __init__(self, call: Call, tiling: Tiling):
        b, t, n, _ = call.q.shape
        s, kv = call.k.shape[1:3]
        self.call, self.tiling = call, tiling
        self.batch, self.kv_heads, self.groups = b, kv, n // kv
        self.rows, self.columns = -(-t // tiling.block_q), -(-s // tiling.block_k)
        self.t, self.s = self.rows * tiling.block_q, self.columns * tiling.block_k
        self.at_once = tiling.pairs * tiling.chains
        self.q = self.queries_first(call.q)
        self.k, self.v = self.keys_first(call.k), self.keys_first(call.v)
        self.q_facts = _pad_facts(call.q_tokens.facts(), self.t)
        self.k_facts = _pad_facts(call.k_tokens.facts(), self.s)
        self.mask = call.mask if self.s == s else call.mask & RealKeys()
        self.leaves = jax.tree.map(self.pad_dense, self.mask)
        self.bias = None if call.bias is None else self.pad_dense(call.bias)
        self.order = self._order()
        if call.dropout is not None:
            words = call.dropout.row_keys(b, n, self.q_facts.rows)
            self.row_keys = tuple(self._grouped(w.reshape(-1, self.groups, self.t)) for w in words)

    # ---- layout -------------------------------------------------------------------------------

    def queries_first(self, x: Array) -> Array:
        """Turn [B, T, N, H] into [P / at_once, chains, c, G, t, H], padded."""
        b, t, _, h = x.shape
        x = x.reshape(b, t, self.kv_heads, self.groups, h).transpose(0, 2, 3, 1, 4)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.t - t), (0, 0)))
        return self._grouped(x.reshape(-1, self.groups, self.t, h))

    def rows_first(self, x: Array) -> Array:
        """Turn statistics [B, N, T] into [P / at_once, chains, c, G, t, 1], padded."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.t - x.shape[2])))
        return self._grouped(x.reshape(-1, self.groups, self.t, 1))

    def keys_first(self, x: Array) -> Array:
        """Turn [B, S, K, H] into [P / at_once, chains, c, s, H], padded."""
        x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, self.s - x.shape[1]), (0, 0)))
        return self._grouped(x.reshape(-1, self.s, x.shape[-1]))

    def _grouped(self, x: Array) -> Array:
        return x.reshape(-1, self.tiling.chains, self.tiling.pairs, *x.shape[1:])

    def queries_last(self, x: Array) -> Array:
        """Turn tiles [P / at_once, rows, chains, c, G, block_q, H] back into [B, T, N, H]."""
        x = jnp.moveaxis(x, 1, 4)
        x = x.reshape(self.batch, self.kv_heads, self.groups, self.t, x.shape[-1])
        x = x[:, :, :, : self.call.q.shape[1]].transpose(0, 3, 1, 2, 4)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def keys_last(self, x: Array) -> Array:
        """Turn [P / at_once, chains, c, s, H] back into [B, S, K, H]."""
        x = x.reshape(self.batch, self.kv_heads, self.s, x.shape[-1])
        return x[:, :, : self.call.k.shape[1]].transpose(0, 2, 1, 3)

    # ---- which tiles --------------------------------------------------------------------------

    def _order(self) -> Order:
        q = extents(self.q_facts, self.tiling.block_q)
        k = extents(self.k_facts, self.tiling.block_k)
        q = jax.tree.map(lambda a: a[:, None, :, None], q)
        k = jax.tree.map(lambda a: a[:, None, None, :], k)
        reach = EVERYTHING if self.tiling.exhaustive else self.mask.reach(q, k)
        some, every = self._by_group(reach.some, "any"), self._by_group(reach.every, "all")
        xp = jnp if isinstance(some, jax.Array) or isinstance(every, jax.Array) else np
        if self.tiling.exhaustive:
            every = np.zeros_like(every)
        # 0 for full tiles, 1 for partial ones, 2 for those that nothing can see.
        kind = xp.where(some, xp.where(every, 0, 1), 2)
        blocks = xp.argsort(kind, axis=-1, stable=True).astype(np.int32)
        return Order(blocks, (kind == 0).sum(-1), (kind < 2).sum(-1))

    def _by_group(self, certain: Any, reduce: str) -> Any:
        """Reduce [#B, #N, rows, columns] to [#groups, rows, columns]."""
        xp = jnp if isinstance(certain, jax.Array) else np
        shape = np.broadcast_shapes(certain.shape, (1, 1, self.rows, self.columns))
        certain = xp.broadcast_to(certain, shape)
        if shape[:2] == (1, 1):
            return certain[0]
        heads = self.kv_heads * self.groups
        certain = xp.broadcast_to(certain, (self.batch, heads, *shape[2:]))
        groups = self.batch * heads // (self.at_once * self.groups)
        return getattr(certain.reshape(groups, -1, *shape[2:]), reduce)(axis=1)

    # ---- one tile -----------------------------------------------------------------------------

    def cut_rows(self, x: Array, i: Any) -> Array:
        """Return row `i` of blocks of one group's [chains, c, G, t, .]."""
        return lax.dynamic_slice_in_dim(x, i * self.tiling.block_q, self.tiling.block_q, 3)

    def cut_keys(self, x: Array, j: Any) -> Array:
        """Return block `j` of one chain's [c, s, .]."""
        return lax.dynamic_slice_in_dim(x, j * self.tiling.block_k, self.tiling.block_k, 1)

    def dot(self, spec: str, a: Array, b: Array) -> Array:
        """Multiply tiles in the accumulator's dtype."""
        dtype = self.call.accumulator
        precision = self.call.precision
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=dtype)

    def logits(self, q: Array, k: Array, pair: Any, i: Any, j: Any, masked: bool) -> Array:
        """Return a tile of logits [c, G, block_q, block_k], -inf where hidden if `masked`."""
        x = self.dot("cgth,csh->cgts", q, k)
        bias = None if self.bias is None else self.tile_of(self.bias, pair, i, j)
        x = logits_of(self.call, x, bias)
        return jnp.where(self.visible(pair, i, j), x, -jnp.inf) if masked else x

    def visible(self, pair: Any, i: Any, j: Any) -> Array:
        """Return which pairs of a tile are visible, broadcasting to [c, G, block_q, block_k]."""
        bq, bk = self.tiling.block_q, self.tiling.block_k
        q = jax.tree.map(lambda a: self._facts(a, pair, i, bq)[:, None, :, None], self.q_facts)
        k = jax.tree.map(lambda a: self._facts(a, pair, j, bk)[:, None, None, :], self.k_facts)
        mask = jax.tree.map(lambda a: self.tile_of(a, pair, i, j), self.leaves)
        return mask.visible(q, k)

    def kept(self, pair: Any, chain: int, group_keys: tuple, i: Any, j: Any) -> Array:
        """Return a tile of keep bits [c, G, block_q, block_k]."""
        a, c = (self.cut_rows(w[..., None], i)[chain] for w in group_keys)
        columns = self._facts(self.k_facts.rows, pair, j, self.tiling.block_k)
        return self.call.dropout.kept(a, c, columns[:, None, None, :])  # type: ignore[union-attr]

    def tile_of(self, dense: Array, pair: Any, i: Any, j: Any) -> Array:
        """Cut [#B, #N, #T, #S] to a tile [#c, #G, #block_q, #block_k]."""
        for axis, index, size in ((2, i, self.tiling.block_q), (3, j, self.tiling.block_k)):
            if dense.shape[axis] > 1:
                dense = lax.dynamic_slice_in_dim(dense, index * size, size, axis)
        heads = dense.shape[1]
        if heads > 1:
            dense = dense.reshape(-1, self.kv_heads, self.groups, *dense.shape[2:])
        else:
            dense = dense[:, :, None]
        return self._of_pairs(dense, pair)

    def add_tile(self, whole: Array, tile: Array, pair: Any, i: Any, j: Any) -> Array:
        """Add a tile [c, G, block_q, block_k] into [#B, #N, #T, #S], summed where that broadcasts."""
        _, heads, t, s = whole.shape
        shape = whole.shape
        whole = whole.reshape(shape[0], heads // self.groups or 1, -1, t, s)
        summed = tuple(axis for axis in (1, 2, 3) if whole.shape[axis + 1] == 1)
        tile = jnp.sum(tile, summed, keepdims=True)
        count = self.tiling.pairs
        pairs = jnp.asarray(pair, jnp.int32) * count + numbers(count)
        b = pairs // self.kv_heads if shape[0] > 1 else jnp.zeros_like(pairs)
        k = pairs % self.kv_heads if whole.shape[1] > 1 else jnp.zeros_like(pairs)
        at = [
            0 if n == 1 else x
            for n, x in ((t, i * self.tiling.block_q), (s, j * self.tiling.block_k))
        ]
        if count == 1:
            start = _indices(b[0], k[0], 0, *at)
            slab = lax.dynamic_slice(whole, start, (1, 1, *tile.shape[1:])) + tile[None]
        else:
            start = _indices(0, 0, 0, *at)
            slab = lax.dynamic_slice(whole, start, (*whole.shape[:3], *tile.shape[2:]))
            slab = slab.at[b, k].add(tile)
        return lax.dynamic_update_slice(whole, slab, start).reshape(shape)

    def _of_pairs(self, x: Array, pair: Any) -> Array:
        """Take the tile's pairs out of [#B, #K, ...]: [#c, ...]."""
        count = self.tiling.pairs
        if x.shape[:2] == (1, 1):
            return x[0]
        first = jnp.asarray(pair, jnp.int32) * count
        if count == 1:
            b = first // self.kv_heads if x.shape[0] > 1 else 0
            k = first % self.kv_heads if x.shape[1] > 1 else 0
            start = _indices(b, k, *(0,) * (x.ndim - 2))
            return lax.dynamic_slice(x, start, (1, 1, *x.shape[2:]))[0]
        pairs = first + numbers(count)
        b = pairs // self.kv_heads if x.shape[0] > 1 else jnp.zeros_like(pairs)
        k = pairs % self.kv_heads if x.shape[1] > 1 else jnp.zeros_like(pairs)
        return x[b, k]

    def _facts(self, a: Any, pair: Any, index: Any, size: int) -> Array:
        """Cut facts [#B, L] to a tile's [#c, size]."""
        a = lax.dynamic_slice_in_dim(jnp.asarray(a), index * size, size, 1)
        return a if a.shape[0] == 1 else self._of_pairs(a[:, None], pair)

    def pad_dense(self, dense: Array) -> Array:
        wanted = {2: self.t, 3: self.s}
        widths = [(0, 0), (0, 0)] + [
            (0, wanted[axis] - dense.shape[axis]) if dense.shape[axis] > 1 else (0, 0)
            for axis in (2, 3)
        ]
        return jnp.pad(dense, widths) if any(after for _, after in widths) else dense

    # ---- loops --------------------------------------------------------------------------------

    def over_blocks(self, group: Any, i: Any, body: Callable, carry: Any) -> Any:
        """Run `body(j, masked, carry)` over the key blocks that row `i` of a group can see."""
        order = self.order
        at = group if order.blocks.shape[0] > 1 else 0
        if self.tiling.exhaustive:
            step = jax.checkpoint(lambda carry, j: (body(j, True, carry), None))
            return lax.scan(step, carry, numbers(self.columns))[0]
        blocks, full, live = (jnp.asarray(a, jnp.int32)[at, i] for a in order)
        static = isinstance(order.blocks, np.ndarray)
        if not static or order.full.any():
            carry = lax.fori_loop(0, full, lambda n, c: body(blocks[n], False, c), carry)
        if not static or (order.live > order.full).any():
            carry = lax.fori_loop(full, live, lambda n, c: body(blocks[n], True, c), carry)
        return carry


def _indices(*starts: Any) -> tuple[Array, ...]:
    """Return start indices of one type, as slices want them."""
    return tuple(jnp.asarray(x, jnp.int32) for x in starts)


def numbers(count: int) -> Array:
    """Return 0 to `count` as the 32-bit integers that all indices are."""
    return jnp.arange(count, dtype=jnp.int32)


def _pad_facts(facts: Facts, length: int) -> Facts:
    """Pad [#B, L] facts to `length`: padding has row -1, and else what the last token has."""

    def pad(a, **how):
        width = ((0, 0), (0, length - a.shape[1]))
        if not width[1][1]:
            return a
        return (np if isinstance(a, np.ndarray) else jnp).pad(a, width, **how)

    rest = (a if a is None else pad(a, mode="edge") for a in facts[1:])
    return Facts(pad(facts.rows, constant_values=-1), *rest)
