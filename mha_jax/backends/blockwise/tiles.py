"""A problem cut into tiles: heads first, padded, with the lists of tiles that can be seen.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size   t, s lengths in whole tiles
g groups and *lead, the examples and heads of a group: see `layout`

The G query heads of a key-value head read the same keys, so they are rows of one tile, [*lead, r, block_k]
with r = G block_q. The backward pass computes tiles transposed, [*lead, block_k, r]: `ByQueries` and `ByKeys`
are the two ways to lay what broadcasts against a tile. Facts and masks come with all their axes, and are
merged: XLA on CPU copies what has an axis of length 1 in its middle. Padded keys are hidden; padded queries
have no weights, and are cut off at the end.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mha_jax.attention import hidden
from mha_jax.attention.biases import Sum, floats, with_floats
from mha_jax.attention.call import Problem
from mha_jax.attention.tokens import Facts, near
from mha_jax.backends import visits
from mha_jax.backends.blockwise import diagonals, loops
from mha_jax.backends.blockwise.layout import Apart, Grouped
from mha_jax.backends.blockwise.loops import Lines
from mha_jax.types import Array, Size

# Multiplications of queries and keys up to which it is faster not to call for a product of matrices. Time of
# the layer over that with such products: 128 of them 0.83, 1024 0.95, 2048 0.89, 4096 1.1, 16384 1.1.
_TINY = 2**11


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of one problem.

    Args:
      block_q, block_k: Query rows (of every head of a pair) and keys of a tile.
      layout: How examples and heads lie side by side.
      exhaustive: Visit every tile, masked, by loops of fixed length that recompute their steps: what
        reverse mode can differentiate.
      halves: Multiply in bfloat16 where the inputs are, and no other precision is asked for.
      written: Write tiles out one after the other, without loops, where a group has no more than these, and
        they are known while compiling.
      branches: Ask of every tile whether a bias by rule says the same of all its pairs, and sum up the
        diagonals of others in a loop.
    """

    block_q: Size
    block_k: Size
    layout: Grouped | Apart
    exhaustive: bool = False
    halves: bool = False
    written: int = 0
    branches: bool = False


class Visits(NamedTuple):
    """For every group and line of tiles, the blocks to visit.

    `live` of them, [#groups, lines], from `first` on, [#groups, lines]; or, where those of some line
    have holes or are not known before run time, the first `live` in `blocks`, [#groups, lines, blocks].
    NumPy where the mask and the tokens are static. `masked` is False where every pair of every visited
    tile is known to be visible; `single` is True where a line is one block. A loop of its own for the
    full tiles of other masks would save one per cent of the time (T 4096 causal, two CPU cores) and cost
    a fifth of the compilation. `lines` are the blocks of every line of a group where tiles are written out,
    and `full`, [lines, blocks], says which of them are seen as a whole.
    """

    first: Any
    live: Any
    blocks: Any
    masked: bool
    single: bool
    lines: Lines = ()
    full: Any = None


class Place(NamedTuple):
    """Where a tile is: its group, its block of queries, its block of keys."""

    group: Any
    q: Any
    k: Any


class Tiles:
    """The tiles of a problem. A line is a group's row of tiles, or its column of tiles."""

    def __init__(self, problem: Problem, tiling: Tiling):
        b, t, n, _ = problem.q.shape
        s, kv = problem.k.shape[1:3]
        self.tiling, self.layout, self.dtype = tiling, tiling.layout, problem.accumulator
        self.scale = problem.logits.scale
        if _goes_into_q(self.scale, problem):
            q = problem.q * jnp.asarray(self.scale, problem.q.dtype)
            logits = dataclasses.replace(problem.logits, scale=1.0)
            problem = dataclasses.replace(problem, q=q, logits=logits)
        self.problem, self.rules = problem, problem.logits
        self.hides = hidden.anything(problem)
        self.batch, self.kv_heads, self.groups = b, kv, n // kv
        self.q_blocks, self.k_blocks = _blocks(t, tiling.block_q), _blocks(s, tiling.block_k)
        self.t, self.s = self.q_blocks * tiling.block_q, self.k_blocks * tiling.block_k
        self.written = self._is_written()
        sizes = b, t, s, n, max(problem.q.shape[-1], problem.v.shape[-1])
        known = all(isinstance(size, int) for size in sizes)
        self.tiny = known and not self.written and math.prod(sizes) <= _TINY
        self.q, self.k, self.v = self.queries(problem.q), self.keys(problem.k), self.keys(problem.v)
        self.q_facts = _pad_facts(problem.q_tokens.facts(), self.t)
        self.k_facts = _pad_facts(problem.k_tokens.facts(), self.s)
        self.mask = jax.tree.map(self.pad_dense, problem.mask)
        self.bias = None if problem.bias is None else self.pad_dense(jnp.asarray(problem.bias))
        self.rule = problem.bias_rule
        fixed = all(isinstance(n, int) for n in (tiling.block_q, tiling.block_k))
        self.consecutive = fixed and near(problem.q_tokens, problem.k_tokens)
        # In the accumulator's dtype, in which its gradients are summed up.
        self.rule_floats = jax.tree.map(lambda a: jnp.asarray(a, self.dtype), floats(self.rule))
        self.row_keys = None
        if problem.dropout is not None:
            words = problem.dropout.row_keys(b, n, self.q_facts.rows)
            self.row_keys = tuple(self._rows(w) for w in words)

    # ---- layout -------------------------------------------------------------------------------

    def queries(self, x: Array) -> Array:
        """Turn [B, T, N, H] into [g, *lead, G t, H], padded."""
        return self._rows(_pad(x.transpose(0, 2, 1, 3), 2, self.t))

    def statistics(self, x: Array, padding: float = 0.0) -> Array:
        """Turn [B, N, T] into [g, *lead, G t], padded."""
        return self._rows(_pad(x, 2, self.t, padding))

    def keys(self, x: Array) -> Array:
        """Turn [B, S, K, H] into [g, *lead, s, H], padded; written out [g, k_blocks, *lead, block_k, H]."""
        x = self.layout.split(_pad(x.transpose(0, 2, 1, 3), 2, self.s))
        if not self.written:
            return x
        x = x.reshape(*x.shape[:-2], self.k_blocks, self.tiling.block_k, x.shape[-1])
        return jnp.moveaxis(x, -3, 1)

    def _rows(self, x: Array) -> Array:
        """Turn [B, N, t, ...] into [g, *lead, G t, ...]; [g, q_blocks, *lead, r, ...] if written out."""
        rest = x.shape[3:]
        if not self.written:
            rows = (self.batch, self.kv_heads, self.groups * self.t, *rest)
            return self.layout.split(x.reshape(rows))
        blocks = self.groups, self.q_blocks, self.tiling.block_q
        x = self.layout.split(x.reshape(self.batch, self.kv_heads, *blocks, *rest))
        axis = len(self.layout.lead) + 2
        x = jnp.moveaxis(x, axis, 1)
        return x.reshape(*x.shape[:axis], -1, *rest)

    def queries_back(self, x: Array) -> Array:
        """Turn lines [g q_blocks, *lead, r, H] back into [B, T, N, H]."""
        return self._back(x, self.q_blocks, self.groups)[:, : self.problem.q.shape[1]]

    def statistics_back(self, x: Array) -> Array:
        """Turn lines of statistics [g q_blocks, *lead, r, 1] back into [B, N, T]."""
        return self.queries_back(x)[..., 0].swapaxes(1, 2)

    def keys_back(self, x: Array) -> Array:
        """Turn lines [g k_blocks, *lead, block_k, H] back into [B, S, K, H]."""
        return self._back(x, self.k_blocks, 1)[:, : self.problem.k.shape[1]]

    def transposed_back(self, x: Array) -> Array:
        """Turn [g, *lead, H, G t] back into [B, T, N, H]."""
        x = x.reshape(self.batch, self.kv_heads, -1, self.groups, self.t).transpose(0, 4, 1, 3, 2)
        x = x.reshape(self.batch, self.t, self.kv_heads * self.groups, -1)
        return x[:, : self.problem.q.shape[1]]

    def _back(self, x: Array, lines: int, heads: int) -> Array:
        """Turn lines [g lines, *lead, heads block, H] into [B, lines block, K heads, H].

        One transposition: of two, the last of which merges no axes, XLA makes two copies.
        """
        *outer, b, k = self.layout.box
        block, size = x.shape[-2] // heads, x.shape[-1]
        x = x.reshape(*outer, lines, b, k, heads, block, size).transpose(0, 3, 2, 6, 1, 4, 5, 7)
        return x.reshape(self.batch, lines * block, self.kv_heads * heads, size)

    def pad_dense(self, dense: Array) -> Array:
        """Pad [#B, #N, #T, #S] to whole tiles."""
        for axis, length in ((2, self.t), (3, self.s)):
            dense = dense if dense.shape[axis] == 1 else _pad(dense, axis, length)
        return dense

    # ---- one tile -----------------------------------------------------------------------------

    def rows_of(self, x: Array, at: Place) -> Array:
        """Cut what `queries` or `statistics` returned to a tile's rows: [*lead, r, ...]."""
        if self.written:
            return self._block(x, at.group, at.q)
        first = 1 + len(self.layout.lead)
        rest = x.shape[first + 1 :]
        x = x.reshape(*x.shape[:first], self.groups, self.t, *rest)
        x = _cut(x, {0: (at.group, 1), first + 1: (at.q, self.tiling.block_q)})[0]
        return x.reshape(*x.shape[: first - 1], -1, *rest)

    def keys_of(self, x: Array, at: Place) -> Array:
        """Cut what `keys` returned to a tile's keys: [*lead, block_k, ...]."""
        if self.written:
            return self._block(x, at.group, at.k)
        own = {0: (at.group, 1), 1 + len(self.layout.lead): (at.k, self.tiling.block_k)}
        return _cut(x, own)[0]

    def numbers(self, x: Array, cut: Callable) -> Callable[[Place], Array]:
        """Return what cuts x by `cut` to a tile's, finite where something is hidden."""
        if self.hides and not self.written:  # as it is read: no copy of the whole
            return lambda at: hidden.numbers(cut(x, at))
        return functools.partial(cut, hidden.numbers(x) if self.hides else x)

    def told(self, other: Array) -> Callable[[Place], Array]:
        """Return what cuts k to a tile's, by `hidden.told` of it and of another array laid out as keys.

        Without features k gets one of zeros, so that there is a product.
        """
        k = featured(self.k)
        if self.written:
            return functools.partial(self.keys_of, hidden.told(k, other))
        return lambda at: hidden.told(self.keys_of(k, at), self.keys_of(other, at))

    def _block(self, x: Array, group: Any, block: int) -> Array:
        """Cut [g, blocks, ...] to a block, which lies in one piece: products read it where it is."""
        return lax.dynamic_index_in_dim(x, _start(group, 1), 0, keepdims=False)[block]

    def dot(self, spec: str, a: Array, b: Array) -> Array:
        """Multiply tiles [*lead, _, _], summing in the accumulator's dtype; `spec` names their last axes."""
        precision = self.rules.precision
        if self.tiling.halves and precision is None and self.problem.q.dtype == jnp.bfloat16:
            a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        lead = "xyz"[: a.ndim - 2]  # written out: an ellipsis takes three times as long to trace
        spec = lead + spec.replace(",", "," + lead).replace("->", "->" + lead)
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=self.dtype)

    def weighed(self, q: Array, k: Array) -> Array:
        """Multiply the queries and the keys of a tile, [*, r, H] and [*, s, H], to [*, r, s]."""
        if not self.tiny:
            return self.dot("rh,sh->rs", q, k)
        q, k = q.astype(self.dtype), k.astype(self.dtype)
        return jnp.sum(q[..., None, :] * k[..., None, :, :], -1)

    def summed(self, p: Array, v: Array) -> Array:
        """Sum up the values of a tile, [*, s, V], by weights [*, r, s], to [*, r, V]."""
        if not self.tiny:
            return self.dot("rs,sv->rv", p, v)
        return jnp.sum(p[..., None] * v[..., None, :, :], -2)

    def shown(self, p: Array, x: Array) -> Array:
        """Return x, and 0 where the weights p of a tile are 0, whatever x is there."""
        return jnp.where(p == 0, jnp.zeros((), x.dtype), x) if self.hides else x

    def dense_of(self, dense: Array, at: Place) -> Array:
        """Cut [#B, #N, #T, #S] to [*#lead, #G, #block_q, #block_k]."""
        return self.layout.take(self._by_kv_head(_cut(dense, self._blocks_of(dense, at))), at.group)

    def q_fact(self, a: Any, at: Place) -> Array:
        """Cut facts [#B, t] to a tile's [*#lead, block_q]."""
        return self._fact(a, at, at.q, self.tiling.block_q)

    def k_fact(self, a: Any, at: Place) -> Array:
        """Cut facts [#B, s] to a tile's [*#lead, block_k]."""
        return self._fact(a, at, at.k, self.tiling.block_k)

    def _fact(self, a: Any, at: Place, index: Any, size: Size) -> Array:
        return self.layout.take(_cut(jnp.asarray(a), {1: (index, size)})[:, None], at.group)

    def distances(self, at: Place) -> Array:
        """Return the distances of a tile of consecutive tokens, that of its lower left corner first."""
        q, k = (jnp.asarray(n, jnp.uint32).astype(jnp.int32) for n in (at.q, at.k))
        size_q, size_k = self.tiling.block_q, self.tiling.block_k
        starts = self.problem.k_tokens.start - self.problem.q_tokens.start
        first = k * jnp.int32(size_k) - q * jnp.int32(size_q) + jnp.int32(starts - (size_q - 1))
        return first + jnp.arange(size_q + size_k - 1, dtype=jnp.int32)

    def real_keys(self, at: Place) -> Array | None:
        """Return which of a tile's keys are no padding, [block_k]; None where all are."""
        if self.s == self.problem.k.shape[1]:
            return None
        places = jnp.arange(self.tiling.block_k, dtype=jnp.uint32) + _start(
            at.k, self.tiling.block_k
        )
        return places < jnp.uint32(self.problem.k.shape[1])

    def add_dense(self, whole: Array, tile: Array, at: Place) -> Array:
        """Add a tile [*lead, r, block_k] into [#B, #N, #T, #S], summed where that broadcasts."""
        lead = len(self.layout.lead)
        tile = tile.reshape(*tile.shape[:lead], self.groups, self.tiling.block_q, tile.shape[-1])
        slab = self._by_kv_head(_cut(whole, self._blocks_of(whole, at)))
        axes = tuple(axis for axis in (-3, -2, -1) if slab.shape[axis] == 1)
        slab = self.layout.add(slab, jnp.sum(tile, axes, keepdims=True), at.group)
        slab = slab.reshape(*whole.shape[:2], *slab.shape[3:])
        return _put(whole, slab, self._blocks_of(whole, at))

    def add_transposed(self, whole: Array, tile: Array, at: Place) -> Array:
        """Add a tile [*lead, H, r] into [g, *lead, H, G t]."""
        heads = whole.reshape(*whole.shape[:-1], self.groups, self.t)
        tile = tile.reshape(1, *tile.shape[:-1], self.groups, -1)
        blocks = {0: (at.group, 1), heads.ndim - 1: (at.q, self.tiling.block_q)}
        return _put(heads, _cut(heads, blocks) + tile, blocks).reshape(whole.shape)

    def put_back(self, whole: Array, tile: Array, group: Any, block: Any) -> Array:
        """Put a tile [*lead, r, H] where it belongs in [B, t, N, H], or one of keys in [B, s, K, H]."""
        _, heads_of, b, k = self.layout.box
        tile = tile.reshape(b, k, whole.shape[2] // self.kv_heads, -1, tile.shape[-1])
        tile = tile.transpose(0, 3, 1, 2, 4)
        tile = tile.reshape(*tile.shape[:2], -1, tile.shape[-1])
        first, second = (group, 0) if heads_of == 1 else loops.divided(group, heads_of)
        at = (first, block, second)
        return _put(whole, tile, {axis: (n, tile.shape[axis]) for axis, n in enumerate(at)})

    def _blocks_of(self, dense: Array, at: Place) -> dict[int, tuple[Any, Size]]:
        blocks = {2: (at.q, self.tiling.block_q), 3: (at.k, self.tiling.block_k)}
        return {axis: block for axis, block in blocks.items() if dense.shape[axis] != 1}

    def _by_kv_head(self, dense: Array) -> Array:
        """Split the heads: [#B, #N, ...] to [#B, #K, #G, ...]."""
        if dense.shape[1] == 1:
            return dense[:, :, None]
        return dense.reshape(dense.shape[0], self.kv_heads, self.groups, *dense.shape[2:])

    # ---- which tiles, in which order ------------------------------------------------------------

    def visits(self, by_rows: bool) -> Visits:
        """Return the key blocks of every row of tiles, or the query blocks of every column."""
        exhaustive = self.tiling.exhaustive
        single = (self.k_blocks if by_rows else self.q_blocks) == 1 and not exhaustive
        if exhaustive or not all(isinstance(size, int) for size in (self.t, self.s)):
            lines, blocks = (self.q_blocks, self.k_blocks)[:: 1 if by_rows else -1]
            every = np.full((1, lines), blocks, np.uint32)
            return Visits(np.zeros_like(every), every, None, True, single)
        kind = self.kinds
        kind = kind if by_rows else kind.swapaxes(2, 3)
        live = self.layout.reduced(kind != visits.EMPTY, "any")
        every = self.layout.reduced(kind == visits.FULL, "all")
        if self.written:
            lines = tuple(np.flatnonzero(line).tolist() for line in live[0])
            masked = bool(np.any(live & ~every))
            return Visits(None, live.sum(-1), None, masked, False, lines, every[0])
        xp = visits.array_module(kind)
        # A line of one block visits it, whatever is seen of it: no loop, no state before it.
        masked = xp is jnp or bool(np.any((single | live) & ~every))
        count, blocks = visits.listed(live)
        count, blocks = count.astype(np.uint32), blocks.astype(np.uint32)
        first = blocks[..., :1]
        at = np.arange(blocks.shape[-1], dtype=np.uint32)
        if xp is np and np.all((blocks == first + at) | (at >= count[..., None])):
            blocks = None
        return Visits(first[..., 0], count, blocks, masked, single)

    @functools.cached_property
    def kinds(self) -> Any:
        """What is seen of every tile; see `visits.kinds`."""
        return visits.kinds(self.problem, self.tiling.block_q, self.tiling.block_k)

    def _is_written(self) -> bool:
        tiling = self.tiling
        sizes = self.t, self.s
        if not tiling.written or tiling.exhaustive or not all(isinstance(n, int) for n in sizes):
            return False
        live = self.layout.reduced(self.kinds != visits.EMPTY, "any")
        known = isinstance(live, np.ndarray) and len(live) == 1
        return known and int(live.sum()) <= tiling.written

    def over(self, order: Visits, group: Any, line: Any, body: Callable, carry: Any) -> Any:
        """Run `body(block, carry)` over the blocks of a line of tiles that can be seen."""

        def of_line(a):
            if isinstance(a, np.ndarray) and np.ptp(a) == 0:
                return a.flat[0]
            row = _cut(jnp.asarray(a), {0: (group if a.shape[0] > 1 else 0, 1), 1: (line, 1)})
            return row[0, 0]

        if order.single:
            return body(0, carry)
        first, live = of_line(order.first), of_line(order.live)
        blocks = None if order.blocks is None else of_line(order.blocks)

        def step(n, carry):
            return body(first + n if blocks is None else _cut(blocks, {0: (n, 1)})[0], carry)

        if self.tiling.exhaustive:
            again = jax.checkpoint(lambda carry, n: (step(n, carry), None))
            return lax.scan(again, carry, loops.numbers(int(live)))[0]
        return lax.fori_loop(np.uint32(0), live, step, carry)


@dataclasses.dataclass(frozen=True)
class ByQueries:
    """What broadcasts against tiles whose rows are queries: [*lead, r, block_k]."""

    by_rows: ClassVar[bool] = True

    tiles: Tiles
    order: Visits

    def masks(self, at: Place) -> bool:
        """Return whether something may be hidden in a tile."""
        order = self.order
        if order.full is None:
            return order.masked
        line, block = (at.q, at.k) if self.by_rows else (at.k, at.q)
        return not order.full[line, block]

    def logits(self, x: Array, at: Place, parts: tuple[Array, ...] = ()) -> Array:
        """Turn capped products of a tile into logits minus numbers of their rows, -inf where hidden."""
        tiles = self.tiles
        if tiles.bias is not None:
            x = x + self.dense(tiles.bias, at).astype(x.dtype)
        if tiles.rule is not None:
            x = x + self.ruled(x.shape, at)(tiles.rule_floats)
        for part in parts:
            x = x - self._rows(part)
        return jnp.where(self.visible(at), x, -jnp.inf) if self.masks(at) else x

    def ruled(self, shape: tuple[Size, ...], at: Place) -> Callable[[Any], Array]:
        """Return a tile of the bias by rule as a function of the rule's floats."""
        tiles = self.tiles
        q, k = self._facts(at)
        heads = self._heads(at)
        q = q._replace(head=self._lay(heads))

        def added(rule):
            if tiles.consecutive and rule.only_distances:
                distances = tiles.distances(at).reshape((1,) * (heads.ndim - 2) + (-1,))
                shape = (*heads.shape[:-2], distances.shape[-1])
                numbers = jnp.broadcast_to(rule.at(distances, heads[..., 0]), shape)
                tile = self._of_diagonals(numbers)
            elif isinstance(rule, Sum):
                return added(rule.a) + added(rule.b)
            else:
                tile = jnp.asarray(rule.logits(q, k))
            return self._merged(tile).astype(tiles.dtype)

        return lambda moved: jnp.broadcast_to(added(with_floats(tiles.rule, moved)), shape)

    def pulled(self, dx: Array, at: Place) -> Any:
        """Return the cotangents of the rule's floats, of those of a tile.

        A rule that knows distances alone is asked for them with the sums of the diagonals, or, where all
        distances of a tile are alike to it, with one sum. T 4096, 32 buckets of T5: 42 tiles of 64 are of one
        number.
        """
        tiles = self.tiles
        rule: Any = tiles.rule
        if not (tiles.consecutive and rule.only_distances):
            return jax.vjp(self.ruled(dx.shape, at), tiles.rule_floats)[1](dx)[0]
        heads, branches = self._heads(at)[..., 0], tiles.tiling.branches

        def of_sums(distances, sums):
            distances = distances.reshape((1,) * (heads.ndim - 1) + (-1,))

            def numbers(moved):
                found = with_floats(rule, moved).at(distances, heads).astype(tiles.dtype)
                return jnp.broadcast_to(found, sums.shape)

            return jax.vjp(numbers, tiles.rule_floats)[1](sums)[0]

        def of_all(dx):
            return of_sums(distances, self._sums_of_diagonals(dx, branches))

        def of_one(dx):
            return of_sums(distances[:1], self._sum_of_heads(dx)[..., None])

        distances = tiles.distances(at)
        if rule.alike_from is None or not branches or tiles.tiling.exhaustive:
            return of_all(dx)
        far = jnp.int32(rule.alike_from)
        alike = (distances[0] >= far) | (distances[-1] <= -far)
        return lax.cond(alike, of_one, of_all, dx)

    def _heads(self, at: Place) -> Array:
        """Return the numbers of a tile's query heads, [*#lead, #G, 1, 1]."""
        heads = np.arange(self.tiles.kv_heads * self.tiles.groups, dtype=np.int32)
        return self.tiles.dense_of(jnp.asarray(heads[None, :, None, None]), at)

    def _sum_of_heads(self, dx: Array) -> Array:
        """Sum up a tile for every head, [*lead, G]."""
        return jnp.sum(dx.reshape(*dx.shape[:-2], self.tiles.groups, -1), -1)

    def _sums_of_diagonals(self, dx: Array, strips: bool) -> Array:
        """Sum up the diagonals of a tile for every head, [*lead, G, distances]."""
        heads = self.tiles.groups, self.tiles.tiling.block_q
        return diagonals.summed(dx.reshape(*dx.shape[:-2], *heads, dx.shape[-1]), strips)

    def _facts(self, at: Place) -> tuple[Facts, Facts]:
        """Return the facts of a tile's queries and keys, which broadcast against each other."""
        tiles = self.tiles
        q = jax.tree.map(lambda a: self._of_queries(tiles.q_fact(a, at)), tiles.q_facts)
        k = jax.tree.map(lambda a: self._of_keys(tiles.k_fact(a, at)), tiles.k_facts)
        return q, k

    def visible(self, at: Place) -> Any:
        """Return which pairs of a tile are visible, broadcasting to the tile."""
        tiles = self.tiles
        q, k = self._facts(at)
        mask = jax.tree.map(lambda a: self._lay(tiles.dense_of(a, at)), tiles.mask)
        seen = self._merged(mask.visible(q, k))
        real = tiles.real_keys(at)
        return seen if real is None else seen & self._against(real)

    def kept(self, at: Place) -> Array:
        """Return a tile of keep bits."""
        tiles = self.tiles
        a, c = (self._rows(tiles.rows_of(w, at)) for w in tiles.row_keys)  # type: ignore[union-attr]
        columns = self._columns(tiles.k_fact(tiles.k_facts.rows, at))
        return tiles.problem.dropout.kept(a, c, columns)  # type: ignore[union-attr]

    def dense(self, dense: Array, at: Place) -> Array:
        """Cut [#B, #N, #T, #S] to what broadcasts against a tile."""
        return self._merged(self._lay(self.tiles.dense_of(dense, at)))

    def _of_diagonals(self, numbers: Array) -> Array:
        """Lay numbers of distances [*#lead, #G, distances] along the diagonals of a tile."""
        return diagonals.laid(numbers, self.tiles.tiling.block_q, self.tiles.tiling.block_k)

    def _lay(self, tile: Array) -> Array:
        return tile

    def _of_queries(self, fact: Array) -> Array:
        return fact[..., None, :, None]

    def _of_keys(self, fact: Array) -> Array:
        return fact[..., None, None, :]

    def _rows(self, x: Array) -> Array:
        return x[..., None]

    def _columns(self, x: Array) -> Array:
        return x[..., None, :]

    def _against(self, real: Array) -> Array:
        lead = (1,) * len(self.tiles.layout.lead)
        return self._columns(real.reshape(*lead, -1))

    def _merged(self, tile: Any) -> Any:
        """Merge [*#lead, #G, #block_q, #block_k] to [*#lead, #r, #block_k]."""
        if np.ndim(tile) == 0:  # a rule that says the same of every pair
            return tile
        lead, (heads, rows, columns) = tile.shape[:-3], tile.shape[-3:]
        groups, size = self.tiles.groups, self.tiles.tiling.block_q
        if (heads, rows) not in ((1, 1), (groups, size)):
            tile = jnp.broadcast_to(tile, (*lead, groups, size, columns))
        return tile.reshape(*lead, -1, columns)


class ByKeys(ByQueries):
    """The same against transposed tiles: [*lead, block_k, r]."""

    by_rows = False

    def _of_diagonals(self, numbers: Array) -> Array:
        sizes = self.tiles.tiling.block_k, self.tiles.tiling.block_q
        return jnp.moveaxis(diagonals.laid(numbers[..., ::-1], *sizes), -2, -3)

    def _sum_of_heads(self, dx: Array) -> Array:
        rows = jnp.sum(dx, -2)
        return jnp.sum(rows.reshape(*rows.shape[:-1], self.tiles.groups, -1), -1)

    def _sums_of_diagonals(self, dx: Array, strips: bool) -> Array:
        heads = dx.reshape(*dx.shape[:-1], self.tiles.groups, self.tiles.tiling.block_q)
        return diagonals.summed(jnp.moveaxis(heads, -2, -3), strips)[..., ::-1]

    def _lay(self, tile: Array) -> Array:
        return jnp.moveaxis(tile, -1, -3)

    def _of_queries(self, fact: Array) -> Array:
        return fact[..., None, None, :]

    def _of_keys(self, fact: Array) -> Array:
        return fact[..., :, None, None]

    def _rows(self, x: Array) -> Array:
        return x[..., None, :]

    def _columns(self, x: Array) -> Array:
        return x[..., None]

    def _merged(self, tile: Any) -> Any:
        """Merge [*#lead, #block_k, #G, #block_q] to [*#lead, #block_k, #r]."""
        if np.ndim(tile) == 0:
            return tile
        lead, (columns, heads, rows) = tile.shape[:-3], tile.shape[-3:]
        groups, size = self.tiles.groups, self.tiles.tiling.block_q
        if (heads, rows) not in ((1, 1), (groups, size)):
            tile = jnp.broadcast_to(tile, (*lead, columns, groups, size))
        return tile.reshape(*lead, columns, -1)


def featured(x: Array) -> Array:
    """Return x, with one feature of zeros in the place of none."""
    return x if x.shape[-1] else jnp.zeros((*x.shape[:-1], 1), x.dtype)


def _goes_into_q(scale: float, problem: Problem) -> bool:
    """Say whether to scale every query instead of every logit.

    A moderate power of two rounds nothing where numbers are as small as those of float32.
    """
    exact = abs(math.frexp(scale)[0]) == 0.5 and jnp.finfo(problem.q.dtype).minexp <= -126
    return 2**-16 <= abs(scale) < 1 and exact


def _blocks(length: Size, size: Size) -> int:
    """Return how many blocks hold a length; one where the length is a symbol."""
    return -(-length // size) if isinstance(length, int) else 1


def _pad(x: Array, axis: int, length: Size, value: float = 0.0) -> Array:
    if x.shape[axis] == length:
        return x
    widths = [(0, length - x.shape[axis]) if a == axis else (0, 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _start(index: Any, size: Size) -> Any:
    start = index if size == 1 else index * size
    return np.uint32(start) if isinstance(start, int) else jnp.asarray(start, jnp.uint32)


def _cut(x: Array, blocks: dict[int, tuple[Any, Size]]) -> Array:
    """Cut `x`, along every axis named, to the block of that number and size."""
    blocks = {axis: block for axis, block in blocks.items() if x.shape[axis] != block[1]}
    if not blocks:
        return x
    sizes = [blocks[axis][1] if axis in blocks else n for axis, n in enumerate(x.shape)]
    return lax.dynamic_slice(x, _corner(x.ndim, blocks), sizes)


def _put(whole: Array, block: Array, blocks: dict[int, tuple[Any, Size]]) -> Array:
    """Put a block where `_cut` took it."""
    blocks = {axis: at for axis, at in blocks.items() if whole.shape[axis] != at[1]}
    if not blocks:
        return block
    return lax.dynamic_update_slice(whole, block, _corner(whole.ndim, blocks))


def _corner(rank: int, blocks: dict[int, tuple[Any, Size]]) -> list[Any]:
    """Return where a block begins."""
    first = {axis: _start(index, size) for axis, (index, size) in blocks.items()}
    return [first[axis] if axis in first else _start(0, 0) for axis in range(rank)]


def _pad_facts(facts: Facts, length: Size) -> Facts:
    """Pad [#B, L] facts to `length` with what the last token has."""

    def pad(a):
        if a is None or a.shape[1] == length:
            return a
        widths = ((0, 0), (0, length - a.shape[1]))
        return (np if isinstance(a, np.ndarray) else jnp).pad(a, widths, mode="edge")

    return Facts(*map(pad, facts))
