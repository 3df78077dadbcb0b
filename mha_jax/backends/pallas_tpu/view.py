"""What a kernel reads while it works: one block of rows, one chunk of columns, one part of a tile.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.attention.tokens import Facts
from mha_jax.backends.arithmetic import Term
from mha_jax.backends.pallas_tpu import diagonals
from mha_jax.backends.pallas_tpu.operands import Plan, folds
from mha_jax.backends.pallas_tpu.patterns import LANES, Geometry, Shape, entry
from mha_jax.types import Array

LOG2E = float(np.log2(np.e))


@dataclasses.dataclass(frozen=True)
class Part:
    """What is computed of a tile at once: some of the block's rows, some columns of the chunk.

    Args:
      top: First row, in the block.
      height: Number of rows.
      at: First column, in the chunk; known when the kernel runs.
      width: Number of columns.
      kinds: F or P for every grain of columns; all are fully visible if empty.
      fresh: Whether nothing was computed for these rows before.
    """

    top: int
    height: int
    at: Any
    width: int
    kinds: str = ""
    fresh: bool = False

    @property
    def rows(self) -> Any:
        """Where the rows are in what holds one block."""
        return pl.ds(self.top, self.height)

    @property
    def columns(self) -> Any:
        """Where the columns are in the chunk."""
        return pl.ds(aligned(self.at), self.width)

    def runs(self) -> Iterator[tuple[bool, int, "Part"]]:
        """Yield whether they are masked, their offset and themselves for columns of the same kind."""
        grain, offset = self.width // len(self.kinds), 0
        for kind, letters in itertools.groupby(self.kinds):
            width = grain * len(list(letters))
            yield kind == "P", offset, Part(self.top, self.height, self.at + offset, width)
            offset += width


def parts(g: Geometry, shape: Shape, at: Any, fresh: bool = False) -> list[Part]:
    """Return the parts of a tile that begins at column `at`."""
    if not shape.pattern:
        tops = itertools.accumulate(g.sweep[:-1], initial=0)
        return [Part(top, height, at, shape.size * g.unit) for top, height in zip(tops, g.sweep)]
    found, top = [], 0
    for kinds, alike in itertools.groupby(shape.pattern):
        height = g.grain[0] * len(list(alike))
        live = kinds.strip(".")
        if live:
            start = at + kinds.index(live) * g.grain[1]
            width, live = len(live) * g.grain[1], live.replace(".", "P")
            found.append(Part(top, height, start, width, live if "P" in live else "", fresh))
        top += height
    return found


class View:
    """What a kernel reads while it works on one block of rows and one chunk of columns."""

    def __init__(self, plan: Plan, refs: dict[str, Any]):
        self.plan, self.refs, self.g = plan, refs, plan.geometry
        self.b, self.n = pl.program_id(0), pl.program_id(1)
        self.r = pl.program_id(2) * self.g.blocks
        self.m = pl.program_id(3) + refs["at"][0]
        self.place: Any = 0

    @property
    def rows(self) -> Any:
        """Where the block's rows are in what holds the rows of a grid step."""
        return pl.ds(aligned(self.place * self.g.rows), self.g.rows)

    def rows_of_part(self, part: Part) -> Any:
        """Where a part's rows are in what holds the rows of a grid step."""
        return pl.ds(aligned(self.place * self.g.rows + part.top), part.height)

    def block(self, place: Any) -> "View":
        """Return the view of one of the blocks of rows of this grid step."""
        view = copy.copy(self)
        view.place, view.r = place, self.r + place
        return view

    def each_block(self, body: Callable[["View"], None], clear: Callable[[], None]) -> None:
        """Run `body` over the blocks of rows of this grid step, and `clear` before each of them."""
        self.at_first_chunk(clear)
        if self.g.blocks == 1:
            return body(self)

        def step(i, carry):
            body(self.block(i))
            clear()  # for the next one; here it overlaps with the end of this one
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

    def transpose_rows(self) -> None:
        """Turn the vectors of the rows into columns of 128 equal lanes."""
        for name in self.plan.outer_vectors:
            line = self.refs[name][:, self.rows]
            self.refs[f"{name}.column"][...] = jnp.broadcast_to(line, (LANES, line.shape[1])).T

    # ---- tiles ---------------------------------------------------------------------------------

    def each_tile(self, tile: Callable[[list[Part]], None]) -> None:
        """Run `tile(parts)` over the tiles of this block of rows and this chunk."""
        g, order = self.g, self.plan.order

        def run(shape: Shape, count: Any, number: Callable[[Any], Any]) -> None:
            size = shape.size * g.unit

            def step(i, carry):
                at = aligned(number(i) * size)
                tile(parts(g, shape, at, order.fresh and shape is order.shapes[0]))
                return carry

            # What is no loop is scheduled together with what follows.
            step(0, None) if _is_one(count) else lax.fori_loop(0, count, step, None)

        if order.fixed is not None:
            for shape, tiles in zip(order.shapes, order.fixed):
                run(shape, len(tiles), lambda i, first=tiles.start: first + i)
            return
        table = self.refs["table"]
        group = order.group(self.b, self.n)
        base = (group * g.row_blocks + self.r) * g.chunks + self.m
        counts = base * entry(g, order.shapes)
        tiles = counts + len(order.shapes)
        for place, (shape, count) in enumerate(zip(order.shapes, order.counts)):
            known = table[counts + place] if count is None else count
            run(shape, known, lambda i, first=tiles: table[first + i])
            tiles += g.units // shape.size

    # ---- one part of a tile --------------------------------------------------------------------

    def vector(self, name: str, part: Part) -> Array:
        """Return per-token data that broadcasts against a part."""
        if self.plan.vectors[name] == self.g.outer:
            return across(self.refs[f"{name}.column"][part.rows], part.width)
        return self.refs[name][:, part.columns]

    def whole(self, name: str, part: Part) -> Array:
        return jnp.broadcast_to(self.vector(name, part), (part.height, part.width))

    def slab(self, name: str, part: Part) -> Array:
        ref = self.refs[name]
        if self.g.outer == "q":
            return ref[part.rows, part.columns]
        tile = ref[part.columns, part.rows]
        if tile.dtype == jnp.int8:
            tile = tile.astype(jnp.int32)
        elif tile.dtype != jnp.float32:
            tile = tile.astype(jnp.float32)
        return tile.T

    def dense(self, name: str, part: Part) -> Array:
        return self.slab(name, part) if name in self.plan.slabs else self.whole(name, part)

    def places(self, side: str, part: Part, whole: bool = True) -> Array:
        """Return the places of tokens in the padded array."""
        if side == self.g.outer:
            first = self.r * self.g.rows + part.top
            return lax.broadcasted_iota(jnp.int32, (part.height, part.width), 0) + first
        first = self.m * self.g.chunk + part.at
        line = lax.broadcasted_iota(jnp.int32, (1, part.width), 1) + first
        return jnp.broadcast_to(line, (part.height, part.width)) if whole else line

    def tokens_of(self, side: str, part: Part, whole: bool = True) -> Array:
        """Return the rows of tokens: their places in the unsharded array."""
        tokens = self.plan.q_tokens if side == "q" else self.plan.k_tokens
        if tokens.index is not None:
            read = self.whole if whole else self.vector
            return read(f"{side}.index", part)
        place = self.places(side, part, whole)
        return place + tokens.start if tokens.start else place

    def facts(self, side: str, part: Part) -> Facts:
        """Return the facts of one side that a mask reads, as tiles."""
        tokens = self.plan.q_tokens if side == "q" else self.plan.k_tokens

        def fact(field):
            name = f"{side}.{field}"
            return self.whole(name, part) if name in self.plan.vectors else None

        rows = self.tokens_of(side, part) if tokens.index is None else fact("index")
        valid = fact("valid")
        return Facts(
            rows,
            rows if tokens.pos is None else fact("pos"),
            fact("segment"),
            None if valid is None else valid != 0,
        )

    def visible(self, part: Part) -> Array:
        """Return which pairs of a part are visible."""

        def leaf(name):
            x = self.dense(name, part).astype(jnp.int32)
            return x if name in self.plan.integers else x != 0

        mask = jax.tree.map(leaf, self.plan.mask)
        seen = mask.visible(self.facts("q", part), self.facts("k", part))
        if self.g.padded["k"] > self.g.lengths[1]:
            inside = self.places("k", part) < self.g.lengths[1]
            seen = inside & jnp.broadcast_to(seen, inside.shape)
        return jnp.broadcast_to(seen, (part.height, part.width))

    def distances(self, part: Part) -> Any:
        """Return where the numbers of a part's diagonals are in the table, see `diagonals.spread`."""
        rows = self.g.rows * self.g.row_blocks
        after = self.m * self.g.chunk + part.at - (self.r * self.g.rows + part.top)
        return pl.ds(aligned(after + (rows - part.height)), part.height + part.width)

    @property
    def factor(self) -> float:
        """What turns the logits that `logits` returns into powers of two."""
        return LOG2E * (self.plan.rules.scale if folds(self.plan) else 1.0)

    def capped(self, dot: Array) -> Array:
        """Return scaled and capped products; as they are where the exponent takes the scale."""
        return dot if folds(self.plan) else self.plan.rules.capped(dot)

    def logits(self, capped: Array, part: Part) -> Array:
        """Return the logits of a part over `factor`, -inf where hidden."""
        x = capped + self.dense("bias", part).astype(capped.dtype) if self.plan.has_bias else capped
        if self.plan.by_distance:
            line = self.refs["distances"][:, self.distances(part)]
            x = x + diagonals.spread(line, part.height, part.width)
        for term in self.plan.terms:
            x = x + self.term(term, part)
        if not part.kinds:
            return x
        pieces = []
        for masked, offset, run in part.runs():
            piece = x[:, offset : offset + run.width]
            pieces.append(jnp.where(self.visible(run), piece, -jnp.inf) if masked else piece)
        return jnp.concatenate(pieces, 1) if len(pieces) > 1 else pieces[0]

    def term(self, term: Term, part: Part, moved: dict[str, Array] | None = None) -> Array:
        """Return what a rule adds to a part, given some of what it reads, or all as it is."""

        def read(name: str) -> Array:
            return moved[name] if moved and name in moved else self.dense(name, part)

        return term.tile((part.height, part.width), read)

    def moves(self, ds: Array, part: Part) -> dict[str, Array]:
        """Return the cotangents of the vectors that a bias is made of, given those of a part's logits."""
        found = {"bias": ds}
        for term in self.plan.terms:
            given = {
                name: self.dense(name, part) for name in self.plan.moved if name in term.moving
            }
            if not given:
                continue
            (moved,) = jax.vjp(functools.partial(self.term, term, part), given)[1](ds)
            # Where a part hides something, slopes may be NaN there.
            found |= {x: jnp.where(ds == 0, 0.0, a) if part.kinds else a for x, a in moved.items()}
        return {name: found[name] for name in self.plan.moved}

    def slope(self, capped: Array) -> Array | None:
        """Return the derivative of the soft cap at capped products; None without a cap."""
        return None if self.plan.rules.cap is None else self.plan.rules.slope(capped)

    def kept(self, part: Part) -> Array:
        """Return dropout's keep bits for a part."""
        a, c = (
            lax.bitcast_convert_type(self.vector(f"dropout.{name}", part), jnp.uint32)
            for name in "ac"
        )
        return self.plan.dropout.kept(a, c, self.tokens_of("k", part, whole=False))  # type: ignore[union-attr]


def aligned(place: Any) -> Any:
    """Say that a place, in tokens, is a multiple of 128."""
    return place if isinstance(place, int) else pl.multiple_of(place, LANES)


def _is_one(count: Any) -> bool:
    return isinstance(count, int) and count == 1


def _at(axis: int, steps: int, first: bool, body: Callable[[], None]) -> None:
    if steps == 1:
        body()
    else:
        pl.when(pl.program_id(axis) == (0 if first else steps - 1))(body)


def across(column: Array, size: int) -> Array:
    """Repeat one column, or columns of 128 equal lanes, to `size` lanes.

    Compilers before libtpu 0.0.30 cannot tile what they know to be equal in all lanes.
    """
    if column.shape[1] == 1:
        return jnp.broadcast_to(column, (column.shape[0], size))
    return jnp.tile(column, (1, -(-size // LANES)))[:, :size]
