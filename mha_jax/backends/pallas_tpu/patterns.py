"""Which tiles a kernel visits, and which parts of a tile it computes.

Every kernel has an outer side of the logits, a block of *rows*, and an inner one that passes by, *columns* in
units. Queries are outer in the forward pass and in the gradient of the bias, keys in the backward pass: its
tiles are transposed. Facts, masks and dropout broadcast, so they do not care.

A mask is judged by *grains*, the small squares of a tile: full, partial or empty. A tile with grains of
several kinds has a *pattern*; tiles with one pattern share one program, that leaves out what is empty and
masks only what is partial. Under a causal mask all tiles on the diagonal have the same.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from mha_jax.attention.call import Problem
from mha_jax.backends import visits
from mha_jax.backends.visits import EMPTY, FULL, PARTIAL
from mha_jax.types import Array

LANES = 128
KINDS = "FP."
# One string for every row of grains, one letter of KINDS for every grain in it.
Pattern = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel's tiles, in tokens: multiples of 128.

    Args:
      rows: Tokens of the outer side.
      columns: Tokens of one unit: a tile, which is full, empty, or has a pattern.
      full: How many units are computed at once where all of them are fully visible, most first, then 1.
      sweep: Heights of the parts in which a full tile is computed, if they add up to its rows.
      grain: Side of the squares by which a tile is judged; 128 where it does not divide the tile.
      resident: Most column tokens held in VMEM at once, if its bytes allow so many.
      outer_resident: Most row tokens held in VMEM at once, one block if fewer.
      cost: Bundles that a pair of tokens takes, over those of the first tiles in the same table.
    """

    rows: int = 512
    columns: int = 512
    full: tuple[int, ...] = (1,)
    sweep: tuple[int, ...] = ()
    grain: int = 256
    resident: int = 2**15
    outer_resident: int = 0
    cost: float = 1.0


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The tiles of one problem; everything is static."""

    outer: str  # which side the rows are: "q" or "k"
    batch: int
    heads: int
    groups: int
    lengths: tuple[int, int]  # real T and S
    rows: int
    unit: int
    grain: tuple[int, int]  # rows and columns
    full: tuple[int, ...]  # units of a full tile that are computed at once, most first
    sweep: tuple[int, ...]  # heights of its parts
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
        return {"q": still, "k": moving} if self.outer == "q" else {"q": moving, "k": still}


def split(length: int, most: int) -> tuple[int, int]:
    """Cut a length into equal blocks of at most `most` tokens, each a multiple of 128.

    >>> split(4096, 512), split(600, 512), split(1, 512)
    ((512, 8), (384, 2), (128, 1))
    """
    count = -(-length // most)
    block = -(-length // (count * LANES)) * LANES
    return block, -(-length // block)


def geometry(problem: Problem, outer: str, blocks: Blocks) -> Geometry:
    """Lay tiles over a problem."""
    b, t, heads, _ = problem.q.shape
    s = problem.k.shape[1]
    length, passing = (t, s) if outer == "q" else (s, t)
    rows, row_blocks = split(length, blocks.rows)
    unit, units = split(passing, blocks.columns)
    chunks = -(-units * unit // blocks.resident)
    # A few chunks more rather than padding a length that fits.
    chunks = next((n for n in range(chunks, 2 * chunks) if units % n == 0), chunks)
    units = -(-units // chunks)
    full = tuple(size for size in blocks.full if size <= units)
    sweep = blocks.sweep if sum(blocks.sweep) == rows else (rows,)
    # Several blocks of queries would need as many running sums from chunk to chunk.
    most = 1 if outer == "q" and chunks > 1 else max(1, blocks.outer_resident // rows)
    together = max(n for n in range(1, min(most, row_blocks) + 1) if row_blocks % n == 0)

    def grain(side: int) -> int:
        return blocks.grain if side % blocks.grain == 0 else LANES

    return Geometry(
        *(outer, b, heads, problem.groups, (t, s)),
        *(rows, unit, (grain(rows), grain(unit)), full, sweep, units, row_blocks, together, chunks),
    )


# ---- which tiles -------------------------------------------------------------------------------


class Shape(NamedTuple):
    """One way to compute tiles.

    `size` is how many units it takes at once, `pattern` the kinds of the grains where they are not full.
    """

    size: int
    pattern: Pattern = ()


class Order(NamedTuple):
    """The tiles to visit.

    `table` lists, for every group, block of rows and chunk, how many tiles of each shape there are, then
    the tiles of each shape. `source` is the chunk to hold meanwhile: one without tiles is not fetched.
    `groups` is (#B, #N). `counts` are the numbers that are the same in all lists, and `fixed` the tiles,
    when they are so as well and a loop counter can stand for them. `fresh` says that the only tile of
    the first shape is the first in its block of rows and reaches all of them: nothing comes before it.
    """

    table: Any
    source: Any
    groups: tuple[int, int]
    shapes: tuple[Shape, ...]
    counts: tuple[int | None, ...]
    fixed: tuple[range, ...] | None
    fresh: bool

    def group(self, b: Any, n: Any) -> Any:
        """Return which group's lists belong to an example and a head."""
        some_b, some_n = self.groups
        return b * (some_n if some_b > 1 else 0) + n * (1 if some_n > 1 else 0)


def kinds(problem: Problem, g: Geometry) -> Any:
    """Return FULL, PARTIAL or EMPTY for [#B, #N, row grains, column grains]: NumPy where static."""
    grain_q, grain_k = g.grain if g.outer == "q" else g.grain[::-1]
    kind = visits.kinds(problem, grain_q, grain_k)
    xp = visits.array_module(kind)
    count_q, count_k = kind.shape[2:]
    # What padded queries see is never read: let it be what the last one of their tile sees.
    alike = -count_q % ((g.rows if g.outer == "q" else g.unit) // grain_q)
    kind = xp.pad(kind, ((0, 0), (0, 0), (0, alike), (0, 0)), mode="edge")
    missing = (g.padded["q"] // grain_q - count_q - alike, g.padded["k"] // grain_k - count_k)
    widths = ((0, 0), (0, 0), (0, missing[0]), (0, missing[1]))
    kind = xp.pad(kind, widths, constant_values=EMPTY)
    return kind if g.outer == "q" else kind.swapaxes(2, 3)


def visited_pairs(problem: Problem, g: Geometry) -> int | None:
    """Return the pairs of tokens in the grains that are visited; None where only the data know."""
    kind = kinds(problem, g)
    if not isinstance(kind, np.ndarray):
        return None
    return int((kind != EMPTY).sum()) * g.grain[0] * g.grain[1] // (kind.shape[0] * kind.shape[1])


def order(problem: Problem, g: Geometry, most_words: int = 2**16, most_patterns: int = 4) -> Order:
    """List the tiles of a problem.

    Args:
      problem: The problem.
      g: Its geometry.
      most_words: Scalar memory for the lists; where they need more, all examples and heads share one.
      most_patterns: How many patterns have a program of their own; where there are more, all share one.
    """
    kind = kinds(problem, g)
    static = isinstance(kind, np.ndarray)
    xp: Any = np if static else jnp
    # Where data decide, few shapes: every one is compiled.
    sizes = g.full if static else tuple({g.full[0]: 0, g.full[-1]: 0})
    full = [(Shape(size), 0) for size in sizes]
    lists = kind.shape[0] * kind.shape[1] * g.row_blocks * g.chunks
    shapes = [Shape(size) for size in (*sizes, *(1,) * (most_patterns if static else 1))]
    if lists * entry(g, shapes) > most_words:
        # One list for all, partial where they differ.
        same = (kind == kind[:1, :1]).all((0, 1), keepdims=True)
        kind = xp.where(same, kind[:1, :1], PARTIAL)
    rows, columns = g.rows // g.grain[0], g.unit // g.grain[1]
    tiles: Any = kind.reshape(-1, g.row_blocks, rows, g.chunks * g.units, columns).swapaxes(2, 3)
    code, patterns = _code(tiles, most_patterns) if static else _code_of_data(tiles)
    partial = [(Shape(1, pattern), 1 + i) for i, pattern in enumerate(patterns)]
    first = [way for way in partial if static and g.chunks == 1 and _can_be_first(way, code)][:1]
    ways = [*first, *full, *(way for way in partial if way not in first)]
    groups = kind.shape[0], kind.shape[1]
    return _listed(code, ways, groups, g, xp)._replace(fresh=bool(first))


def entry(g: Geometry, shapes: Any) -> int:
    """Return the words of the lists of one block of rows and one chunk."""
    return sum(1 + g.units // shape.size for shape in shapes)


def _code(tiles: np.ndarray, most: int) -> tuple[np.ndarray, list[Pattern]]:
    """Return 0 for full tiles, n for those of the nth pattern, -1 for empty ones; and the patterns."""
    full, empty = (tiles == FULL).all((-1, -2)), (tiles == EMPTY).all((-1, -2))
    partial = ~full & ~empty
    found, which = np.unique(tiles[partial], axis=0, return_inverse=True)
    if len(found) > most:
        same = (found == found[:1]).all(0)
        found, which = np.where(same, found[:1], PARTIAL), which * 0
    code = np.where(full, 0, -1)
    code[partial] = 1 + which.reshape(-1)
    return code, [tuple("".join(KINDS[kind] for kind in row) for row in one) for one in found]


def _code_of_data(tiles: Array) -> tuple[Array, list[Pattern]]:
    """Return the same where only the data know: all partial tiles are masked as a whole."""
    full, empty = (tiles == FULL).all((-1, -2)), (tiles == EMPTY).all((-1, -2))
    rows, columns = tiles.shape[-2:]
    return jnp.where(full, 0, jnp.where(empty, -1, 1)), [("P" * columns,) * rows]


def _can_be_first(way: tuple[Shape, int], code: Any) -> bool:
    """Return whether every block of rows has one tile with a pattern, and that reaches all rows."""
    shape, wanted = way
    reached = all(row.strip(".") for row in shape.pattern)
    return reached and bool(((code == wanted).sum(-1) == 1).all())


def _listed(
    code: Any, ways: list[tuple[Shape, int]], groups: tuple[int, int], g: Geometry, xp: Any
) -> Order:
    """Share the tiles out among shapes: the first one that takes their code and fits."""
    static = xp is np
    code = code.reshape(-1, g.row_blocks, g.chunks, g.units)
    live = (code >= 0).any(-1)
    kept, counts, lists = [], [], []
    for shape, wanted in ways:
        count = g.units // shape.size
        units = code[..., : count * shape.size].reshape(*code.shape[:3], count, shape.size)
        chosen = (units == wanted).all(-1)
        if static and not chosen.any():
            continue
        kept.append(shape)
        count_of_line, tiles = visits.listed(chosen)
        counts.append(count_of_line)
        lists.append(tiles)
        covered = xp.repeat(chosen, shape.size, axis=-1)
        rest = g.units - covered.shape[-1]
        code = xp.where(xp.pad(covered, ((0, 0),) * 3 + ((0, rest),)), -1, code)
    if not kept:  # nothing is visible: one empty list
        kept, counts, lists = [Shape(1)], [live * 0], [code * 0]
    table = xp.concatenate([xp.stack(counts, -1), *lists], -1).astype(np.int32)
    numbers = xp.where(live, np.arange(g.chunks)[None, None], -1)
    if static:
        source = np.maximum.accumulate(numbers, -1)
        alike = tuple(int(n.flat[0]) if (n == n.flat[0]).all() else None for n in counts)
    else:
        source = lax.cummax(jnp.asarray(numbers), axis=numbers.ndim - 1)
        alike = (None,) * len(kept)
    source = xp.maximum(source, 0).astype(np.int32)
    fixed = _fixed(table, g, kept) if static else None
    return Order(table.reshape(-1), source.reshape(-1), groups, tuple(kept), alike, fixed, False)


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
