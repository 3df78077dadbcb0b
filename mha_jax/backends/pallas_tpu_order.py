"""Which tiles a kernel visits, what it streams for them, and what it knows of one tile.

Every kernel keeps one side of the logits still, a block of *rows*, and lets the other pass by, *columns*
in units. The forward pass and the gradient of the bias keep queries still, the backward pass keeps keys:
its tiles are transposed. Facts, masks and dropout broadcast, so they do not care.

Per-token data reaches a kernel as vectors along the lanes, [1, L]; those of the rows are turned once a
block into columns of 128 equal lanes. What is T x S (a dense mask, a dense bias) is streamed by tile.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.backends.base import Call, logits_of
from mha_jax.dropout import Dropout
from mha_jax.masks import Mask
from mha_jax.tokens import Facts, Tokens, extents
from mha_jax.types import Array

LANES = 128
LOG2E = float(np.log2(np.e))
FULL, PARTIAL, EMPTY = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel's tiles, in tokens: multiples of 128.

    Args:
      rows: Tokens that stay still while the columns pass by.
      columns: Tokens of one unit: what is skipped, masked or computed as a whole.
      full: How many units are computed at once where all of them are fully visible, most first, then 1.
      resident: Most column tokens held in VMEM at once, if its bytes allow so many.
      standing: Most row tokens held in VMEM at once, one block if fewer.
      cost: Bundles that a pair of tokens takes, over those of the first tiles in the same table.
    """

    rows: int = 512
    columns: int = 512
    full: tuple[int, ...] = (1,)
    resident: int = 2**15
    standing: int = 0
    cost: float = 1.0


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The tiles of one call; everything is static."""

    still: str  # which side the rows are: "q" or "k"
    batch: int
    heads: int
    groups: int
    lengths: tuple[int, int]  # real T and S
    rows: int
    unit: int
    full: tuple[int, ...]
    units: int  # in one resident chunk
    row_blocks: int
    blocks: int  # of rows in one grid step
    chunks: int

    @property
    def steps(self) -> int:
        """Grid steps over the rows."""
        return self.row_blocks // self.blocks

    @property
    def chunk(self) -> int:
        """Column tokens of one resident chunk."""
        return self.units * self.unit

    @property
    def padded(self) -> dict[str, int]:
        """Padded lengths of the queries and of the keys."""
        still, moving = self.rows * self.row_blocks, self.chunk * self.chunks
        return {"q": still, "k": moving} if self.still == "q" else {"q": moving, "k": still}


def split(length: int, most: int) -> tuple[int, int]:
    """Cut a length into equal blocks of at most `most` tokens, each a multiple of 128.

    >>> split(4096, 512), split(600, 512), split(1, 512)
    ((512, 8), (384, 2), (128, 1))
    """
    count = -(-length // most)
    block = -(-length // (count * LANES)) * LANES
    return block, -(-length // block)


def geometry(call: Call, still: str, blocks: Blocks) -> Geometry:
    """Lay tiles over a call."""
    b, t, heads, _ = call.q.shape
    s = call.k.shape[1]
    length, moving = (t, s) if still == "q" else (s, t)
    rows, row_blocks = split(length, blocks.rows)
    unit, units = split(moving, blocks.columns)
    chunks = -(-units * unit // blocks.resident)
    units = -(-units // chunks)
    full = tuple(size for size in blocks.full if size <= units)
    # Several blocks of queries would need as many running sums from chunk to chunk.
    most = 1 if still == "q" and chunks > 1 else max(1, blocks.standing // rows)
    together = max(n for n in range(1, min(most, row_blocks) + 1) if row_blocks % n == 0)
    return Geometry(
        *(still, b, heads, call.groups, (t, s)),
        *(rows, unit, full, units, row_blocks, together, chunks),
    )


# ---- which tiles -------------------------------------------------------------------------------


class Shape(NamedTuple):
    """One way to compute tiles: how many units at once, and whether masked."""

    size: int
    masked: bool


class Order(NamedTuple):
    """The tiles to visit.

    `table` lists, for every group, block of rows and chunk, how many tiles of each shape there are, then
    the tiles of each shape. `source` is the chunk to hold meanwhile: one without tiles is not fetched.
    `groups` is (#B, #N).
    """

    table: Any
    source: Any
    groups: tuple[int, int]
    shapes: tuple[Shape, ...]
    fixed: (
        tuple[range, ...] | None
    )  # the tiles of each shape, when every list is the same and in order

    def group(self, b: Any, n: Any) -> Any:
        """Return which group's lists belong to an example and a head."""
        some_b, some_n = self.groups
        return b * (some_n if some_b > 1 else 0) + n * (1 if some_n > 1 else 0)


def kinds(call: Call, g: Geometry) -> Any:
    """Return FULL, PARTIAL or EMPTY for [#B, #N, row blocks, column units]: NumPy where static."""
    block_q, block_k = (g.rows, g.unit) if g.still == "q" else (g.unit, g.rows)
    q = jax.tree.map(lambda a: a[:, None, :, None], extents(call.q_tokens.facts(), block_q))
    k = jax.tree.map(lambda a: a[:, None, None, :], extents(call.k_tokens.facts(), block_k))
    some, every = call.mask.reach(q, k)
    count_q, count_k = -(-g.lengths[0] // block_q), -(-g.lengths[1] // block_k)
    xp = jnp if isinstance(some, jax.Array) or isinstance(every, jax.Array) else np
    kind = xp.where(some, xp.where(every, FULL, PARTIAL), EMPTY)
    shape = np.broadcast_shapes(kind.shape, (1, 1, count_q, count_k))
    # Padded keys are hidden by the kernel: the block that holds the last key is never full.
    ends = np.where(np.arange(count_k) * block_k + block_k > g.lengths[1], PARTIAL, FULL)
    kind = xp.maximum(xp.broadcast_to(kind, shape), ends[None, None, None]).astype(np.int32)
    blocks_q, blocks_k = g.padded["q"] // block_q, g.padded["k"] // block_k
    widths = ((0, 0), (0, 0), (0, blocks_q - count_q), (0, blocks_k - count_k))
    kind = xp.pad(kind, widths, constant_values=EMPTY)
    return kind if g.still == "q" else kind.swapaxes(2, 3)


def visited_pairs(call: Call, g: Geometry) -> int:
    """Return the pairs of tokens in the tiles that are visited; all where only the data know."""
    kind = kinds(call, g)
    if not isinstance(kind, np.ndarray):
        return g.padded["q"] * g.padded["k"]
    return int((kind != EMPTY).sum()) * g.rows * g.unit // (kind.shape[0] * kind.shape[1])


def shapes(g: Geometry, static: bool) -> tuple[Shape, ...]:
    """Return the shapes of tiles, by preference; few where data decide, since every one is compiled."""
    full = g.full if static else tuple({g.full[0]: 0, 1: 0})
    return (*(Shape(size, False) for size in full), Shape(1, True))


def entry(g: Geometry, kept: tuple[Shape, ...]) -> int:
    """Return the words of the lists of one block of rows and one chunk."""
    return sum(1 + g.units // shape.size for shape in kept)


def order(call: Call, g: Geometry, most_words: int = 2**16) -> Order:
    """List the tiles of a call."""
    kind = kinds(call, g)
    static = isinstance(kind, np.ndarray)
    xp = np if static else jnp
    ways = shapes(g, static)
    words = kind.shape[0] * kind.shape[1] * g.row_blocks * g.chunks * entry(g, ways)
    if words > most_words:
        # Too many lists for scalar memory: one for all, partial where they differ.
        same = (kind == kind[:1, :1]).all((0, 1), keepdims=True)
        kind = xp.where(same, kind[:1, :1], PARTIAL)
    groups = kind.shape[:2]
    kind = kind.reshape(-1, g.row_blocks, g.chunks, g.units)
    live = (kind != EMPTY).any(-1)
    kept, counts, lists = [], [], []
    for shape in ways:
        chosen = _tiles_of(shape, kind, xp)
        if static and not chosen.any():
            continue
        kept.append(shape)
        counts.append(chosen.sum(-1))
        lists.append(xp.argsort(~chosen, axis=-1, stable=True))
        covered = xp.repeat(chosen, shape.size, axis=-1)
        rest = g.units - covered.shape[-1]
        kind = xp.where(xp.pad(covered, ((0, 0),) * 3 + ((0, rest),)), EMPTY, kind)
    if not kept:  # nothing is visible: one empty list
        kept, counts, lists = [Shape(1, True)], [live * 0], [kind * 0]
    table = xp.concatenate([xp.stack(counts, -1), *lists], -1).astype(np.int32)
    numbers = xp.where(live, np.arange(g.chunks)[None, None], -1)
    if static:
        source = np.maximum.accumulate(numbers, -1)
    else:
        source = lax.cummax(jnp.asarray(numbers), axis=numbers.ndim - 1)
    source = xp.maximum(source, 0).astype(np.int32)
    fixed = _fixed(table, g, kept) if isinstance(table, np.ndarray) else None
    return Order(table.reshape(-1), source.reshape(-1), groups, tuple(kept), fixed)  # type: ignore[arg-type]


def _tiles_of(shape: Shape, kind: Any, xp: Any) -> Any:
    """Return which tiles of a shape there are, among units of these kinds."""
    count = kind.shape[-1] // shape.size
    units = kind[..., : count * shape.size].reshape(*kind.shape[:3], count, shape.size)
    return (units == (PARTIAL if shape.masked else FULL)).all(-1)


def _fixed(table: np.ndarray, g: Geometry, kept: list[Shape]) -> tuple[range, ...] | None:
    """Return the lists if all blocks have the same, and a loop counter can stand for each of them."""
    first = table[0, 0, 0]
    at, ranges = len(kept), []
    for count, shape in zip(first, kept):
        tiles = first[at : at + count]
        ranges.append(range(int(tiles[0]), int(tiles[0] + count)) if count else range(0))
        at += g.units // shape.size
        if list(tiles) != list(ranges[-1]):
            return None
    return tuple(ranges) if (table == first).all() else None


# ---- operands ----------------------------------------------------------------------------------


class Stream(NamedTuple):
    """One operand of a kernel: an array and how it is cut."""

    array: Array
    spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel knows while tracing; static, but for the arrays that `streams` hands over."""

    geometry: Geometry
    order: Order
    vectors: dict[str, str]  # name -> side, "q" or "k"
    slabs: tuple[str, ...]
    mask: Mask  # its leaves are names
    q_tokens: Tokens
    k_tokens: Tokens
    dropout: Dropout | None
    rules: Call  # scale and soft cap only
    has_bias: bool

    @property
    def still_vectors(self) -> list[str]:
        return [name for name, side in self.vectors.items() if side == self.geometry.still]


def make_plan(
    call: Call, g: Geometry, extra: dict[str, Array] | None = None
) -> tuple[Plan, dict[str, Stream]]:
    """Decide on a kernel's streams beside q, k and v.

    Args:
      call: The call.
      g: Its tiles.
      extra: Further vectors of the queries, [B, N, T].
    """
    vectors: dict[str, Array] = {}
    slabs: dict[str, Array] = {}
    sides: dict[str, str] = {}

    def add_vector(name: str, side: str, a: Any) -> None:
        if a.dtype == jnp.bool_:
            a = a.astype(np.int32)
        vectors[name], sides[name] = a, side

    def add_dense(name: str, a: Array) -> str:
        if a.dtype == jnp.bool_:
            a = a.astype(jnp.int8)
        t, s = g.lengths
        if a.shape[2] == t and a.shape[3] == s and (t, s) != (1, 1) and t > 1 and s > 1:
            slabs[name] = a
            return name
        if a.dtype != jnp.float32:
            a = a.astype(np.float32 if jnp.issubdtype(a.dtype, jnp.floating) else np.int32)
        if a.shape[3] == s and s > 1:
            add_vector(name, "k", a[:, :, 0, :])
        else:
            add_vector(name, "q", jnp.broadcast_to(a[:, :, :, 0], (*a.shape[:2], t)))
        return name

    for side, tokens in (("q", call.q_tokens), ("k", call.k_tokens)):
        for field in ("index", "pos", "segment", "valid"):
            a = getattr(tokens, field)
            if a is not None:
                add_vector(f"{side}.{field}", side, jnp.asarray(a)[:, None])
    leaves, tree = jax.tree.flatten(call.mask)
    names = [add_dense(f"mask.{i}", leaf) for i, leaf in enumerate(leaves)]
    if call.bias is not None:
        add_dense("bias", call.bias)
    if call.dropout is not None:
        a, c = call.dropout.row_keys(g.batch, g.heads, jnp.asarray(call.q_tokens.rows))
        add_vector("dropout.a", "q", lax.bitcast_convert_type(a, jnp.int32))
        add_vector("dropout.c", "q", lax.bitcast_convert_type(c, jnp.int32))
    for name, a in (extra or {}).items():
        add_vector(name, "q", a)
    streams = {name: _vector_stream(g, sides[name], a) for name, a in vectors.items()}
    streams |= {name: _slab_stream(g, a) for name, a in slabs.items()}
    dropout = call.dropout and dataclasses.replace(
        call.dropout, key=None, batch_start=None, head_start=None
    )
    plan = Plan(
        geometry=g,
        order=order(call, g),
        vectors=sides,
        slabs=tuple(slabs),
        mask=jax.tree.unflatten(tree, names),
        q_tokens=_plain(call.q_tokens),
        k_tokens=_plain(call.k_tokens),
        dropout=dropout,
        rules=Call(None, None, None, scale=call.scale, logit_cap=call.logit_cap),  # type: ignore[arg-type]
        has_bias=call.bias is not None,
    )
    return plan, streams


def _plain(tokens: Tokens) -> Tokens:
    """Keep the start; arrays become a mark that they are streamed."""
    return dataclasses.replace(tokens.map(lambda a: True, tokens.length, tokens.start))  # type: ignore[arg-type, return-value]


def pad_to(x: Array, axis: int, length: int) -> Array:
    """Pad one axis with zeros; nothing happens where the length fits."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if a == axis % x.ndim else 0) for a in range(x.ndim)])


def _vector_stream(g: Geometry, side: str, a: Array) -> Stream:
    """Stream [#B, #N, L] as [#B, #N, 1, L]."""
    some_b, some_n = int(a.shape[0] > 1), int(a.shape[1] > 1)
    a = pad_to(jnp.asarray(a), 2, g.padded[side])[:, :, None]
    if side == g.still:
        block = (None, None, 1, g.rows * g.blocks)
        return Stream(
            a,
            pl.BlockSpec(block, lambda b, n, r, m, *_: (b * some_b, n * some_n, 0, r)),
        )
    block = (None, None, 1, g.chunk)
    return Stream(
        a,
        pl.BlockSpec(block, lambda b, n, r, m, at, *_: (b * some_b, n * some_n, 0, at[0] + m)),
    )


def _slab_stream(g: Geometry, a: Array) -> Stream:
    """Stream [#B, #N, T, S] by tile."""
    some_b, some_n = int(a.shape[0] > 1), int(a.shape[1] > 1)
    a = pad_to(pad_to(a, 2, g.padded["q"]), 3, g.padded["k"])
    if g.still == "q":
        block = (None, None, g.rows, g.chunk)
        return Stream(
            a,
            pl.BlockSpec(block, lambda b, n, r, m, at, *_: (b * some_b, n * some_n, r, at[0] + m)),
        )
    block = (None, None, g.chunk, g.rows)
    return Stream(
        a,
        pl.BlockSpec(block, lambda b, n, r, m, at, *_: (b * some_b, n * some_n, at[0] + m, r)),
    )


# ---- one tile, inside a kernel -----------------------------------------------------------------


class View:
    """What a kernel reads while it works on one block of rows and one chunk of columns."""

    def __init__(self, plan: Plan, refs: dict[str, Any]):
        self.plan, self.refs, self.g = plan, refs, plan.geometry
        self.b, self.n = pl.program_id(0), pl.program_id(1)
        self.r = pl.program_id(2) * self.g.blocks
        self.m = pl.program_id(3) + refs["at"][0]
        self.rows = slice(None)

    def each_block(self, body: Callable[["View"], None]) -> None:
        """Run `body` over the blocks of rows of this grid step: `rows` is where its operands are."""
        if self.g.blocks == 1:
            return body(self)

        def step(i, carry):
            view = copy.copy(self)
            view.r = self.r + i
            view.rows = pl.ds(pl.multiple_of(i * self.g.rows, self.g.rows), self.g.rows)
            body(view)
            return carry

        lax.fori_loop(0, self.g.blocks, step, None)

    def at_first_chunk(self, body: Callable[[], None]) -> None:
        """Run `body` before the first chunk of columns."""
        _at(3, self.g.chunks, True, body)

    def at_last_chunk(self, body: Callable[[], None]) -> None:
        """Run `body` after the last chunk of columns."""
        _at(3, self.g.chunks, False, body)

    def at_first_rows(self, body: Callable[[], None]) -> None:
        """Run `body` before the first block of rows."""
        _at(2, self.g.steps, True, body)

    def at_last_rows(self, body: Callable[[], None]) -> None:
        """Run `body` after the last block of rows."""
        _at(2, self.g.steps, False, body)

    def turn_rows(self) -> None:
        """Turn the vectors of the rows into columns of 128 equal lanes."""
        for name in self.plan.still_vectors:
            line = self.refs[name][:, self.rows]
            self.refs[f"{name}.column"][...] = jnp.broadcast_to(line, (LANES, line.shape[1])).T

    def vector(self, name: str, at: Any, size: int) -> Array:
        """Return per-token data that broadcasts against a tile [rows, size]."""
        if self.plan.vectors[name] == self.g.still:
            return across(self.refs[f"{name}.column"][...], size)
        return self.refs[name][:, pl.ds(at, size)]

    def whole(self, name: str, at: Any, size: int) -> Array:
        return jnp.broadcast_to(self.vector(name, at, size), (self.g.rows, size))

    def slab(self, name: str, at: Any, size: int) -> Array:
        ref = self.refs[name]
        if self.g.still == "q":
            return ref[:, pl.ds(at, size)]
        tile = ref[pl.ds(at, size), :]
        if tile.dtype == jnp.int8:
            tile = tile.astype(jnp.int32)
        elif tile.dtype != jnp.float32:
            tile = tile.astype(jnp.float32)
        return tile.T

    def dense(self, name: str, at: Any, size: int) -> Array:
        return self.slab(name, at, size) if name in self.plan.slabs else self.whole(name, at, size)

    def places(self, side: str, at: Any, size: int, whole: bool = True) -> Array:
        """Return the places of tokens in the padded array."""
        shape = (self.g.rows, size)
        if side == self.g.still:
            place = lax.broadcasted_iota(jnp.int32, (self.g.rows, LANES), 0) + self.r * self.g.rows
            return across(place, size)
        line = lax.broadcasted_iota(jnp.int32, (1, size), 1) + (self.m * self.g.chunk + at)
        return jnp.broadcast_to(line, shape) if whole else line

    def rows_of(self, side: str, at: Any, size: int, whole: bool = True) -> Array:
        """Return the rows of tokens: their places in the unsharded array."""
        tokens = self.plan.q_tokens if side == "q" else self.plan.k_tokens
        if tokens.index is not None:
            read = self.whole if whole else self.vector
            return read(f"{side}.index", at, size)
        place = self.places(side, at, size, whole)
        return place + tokens.start if tokens.start else place

    def facts(self, side: str, at: Any, size: int) -> Facts:
        tokens = self.plan.q_tokens if side == "q" else self.plan.k_tokens
        rows = self.rows_of(side, at, size)

        def fact(field):
            if getattr(tokens, field) is None:
                return None
            return self.whole(f"{side}.{field}", at, size)

        positions, valid = fact("pos"), fact("valid")
        return Facts(
            rows,
            rows if positions is None else positions,
            fact("segment"),
            None if valid is None else valid != 0,
        )

    def visible(self, at: Any, size: int) -> Array:
        """Return which pairs of a tile are visible."""

        def leaf(name):
            return self.dense(name, at, size).astype(jnp.int32) != 0

        mask = jax.tree.map(leaf, self.plan.mask)
        seen = mask.visible(self.facts("q", at, size), self.facts("k", at, size))
        if self.g.padded["k"] > self.g.lengths[1]:
            inside = self.places("k", at, size) < self.g.lengths[1]
            seen = inside & jnp.broadcast_to(seen, inside.shape)
        return jnp.broadcast_to(seen, (self.g.rows, size))

    @property
    def factor(self) -> float:
        """What turns the logits that `logits` returns into powers of two."""
        return LOG2E * (self.plan.rules.scale if self.folds else 1.0)  # type: ignore[operator]

    @property
    def folds(self) -> bool:
        """Whether the scale can wait until the exponent: no bias, no cap, and order is kept."""
        rules = self.plan.rules
        return not self.plan.has_bias and rules.logit_cap is None and rules.scale > 0  # type: ignore[operator]

    def logits(self, dot: Array, at: Any, size: int, masked: bool) -> Array:
        """Return a tile of logits over `factor`, -inf where hidden."""
        x = dot
        if not self.folds:
            bias = self.dense("bias", at, size) if self.plan.has_bias else None
            x = logits_of(self.plan.rules, dot, bias)
        return jnp.where(self.visible(at, size), x, -jnp.inf) if masked else x

    def slope(self, x: Array) -> Array | None:
        """Return the derivative of the soft cap at capped logits x, 0 where hidden."""
        cap = self.plan.rules.logit_cap
        if cap is None:
            return None
        ratio = x * (1 / cap)
        return jnp.where(x == -jnp.inf, 0.0, 1 - ratio * ratio)

    def kept(self, at: Any, size: int) -> Array:
        """Return a tile of dropout's keep bits."""
        a, c = (
            lax.bitcast_convert_type(self.vector(f"dropout.{name}", at, size), jnp.uint32)
            for name in "ac"
        )
        return self.plan.dropout.kept(a, c, self.rows_of("k", at, size, whole=False))  # type: ignore[union-attr]

    def each_tile(self, tile: Callable[[Any, int, bool], None]) -> None:
        """Run `tile(at, size, masked)` over the tiles of this block of rows and this chunk."""
        g, order = self.g, self.plan.order

        def run(shape: Shape, count: Any, number: Callable[[Any], Any]) -> None:
            size = shape.size * g.unit

            def step(i, carry):
                tile(pl.multiple_of(number(i) * size, size), size, shape.masked)
                return carry

            lax.fori_loop(0, count, step, None)

        if order.fixed is not None:
            for shape, tiles in zip(order.shapes, order.fixed):
                run(shape, len(tiles), lambda i, first=tiles.start: first + i)
            return
        table = self.refs["table"]
        group = order.group(self.b, self.n)
        base = (group * g.row_blocks + self.r) * g.chunks + self.m
        counts = base * entry(g, order.shapes)
        tiles = counts + len(order.shapes)
        for place, shape in enumerate(order.shapes):
            run(shape, table[counts + place], lambda i, first=tiles: table[first + i])
            tiles += g.units // shape.size


def _at(axis: int, steps: int, first: bool, body: Callable[[], None]) -> None:
    if steps == 1:
        body()
    else:
        pl.when(pl.program_id(axis) == (0 if first else steps - 1))(body)


def across(column: Array, size: int) -> Array:
    """Repeat columns of 128 equal lanes to `size` lanes."""
    return jnp.tile(column, (1, -(-size // LANES)))[:, :size]
