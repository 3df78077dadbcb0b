"""What a kernel streams beside q, k and v.

Per-token data reaches a kernel as vectors along the lanes, [1, L]; those of the rows are turned once a
block into columns of 128 equal lanes. What is T x S (a dense mask, a dense bias) is streamed by tile.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.attention import hidden
from mha_jax.attention.call import Logits, Problem
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.backends import asked
from mha_jax.backends.arithmetic import Term
from mha_jax.backends.pallas_tpu import rules
from mha_jax.backends.pallas_tpu.patterns import Geometry, Order, order
from mha_jax.types import Array


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
    integers: tuple[str, ...]  # those of leaves that are no booleans
    q_tokens: Tokens
    k_tokens: Tokens
    dropout: Dropout | None
    rules: Logits
    has_bias: bool
    hides: bool
    by_distance: bool  # whether a bias by rule has a table of distances
    terms: tuple[Term, ...]  # what of it is computed pair by pair
    moved: tuple[str, ...] = ()  # the vectors whose cotangents are summed up

    @property
    def biased(self) -> bool:
        return self.has_bias or self.by_distance or bool(self.terms)

    @property
    def outer_vectors(self) -> list[str]:
        return [name for name, side in self.vectors.items() if side == self.geometry.outer]


def make_plan(
    problem: Problem, g: Geometry, extra: dict[str, Array] | None = None
) -> tuple[Plan, dict[str, Stream]]:
    """Decide on a kernel's streams beside q, k and v.

    Args:
      problem: The problem.
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

    def add_dense(name: str, a: Array) -> None:
        if a.dtype == jnp.bool_:
            a = a.astype(jnp.int8)
        t, s = g.lengths
        if a.shape[2] == t and a.shape[3] == s and (t, s) != (1, 1) and t > 1 and s > 1:
            slabs[name] = a
            return
        if a.dtype != jnp.float32:
            a = a.astype(np.float32 if jnp.issubdtype(a.dtype, jnp.floating) else np.int32)
        if a.shape[3] == s and s > 1:
            add_vector(name, "k", a[:, :, 0, :])
        else:
            add_vector(name, "q", jnp.broadcast_to(a[:, :, :, 0], (*a.shape[:2], t)))

    visited = order(problem, g)
    # What nobody reads may not be there: compilers fail on a vector that is turned, and not used then.
    masked = any("P" in row for shape in visited.shapes for row in shape.pattern)
    facts = asked.facts(problem) if masked else []
    if problem.dropout is not None:
        facts = [*facts, ("k", "rows")]
    for side, fact in facts:
        tokens = problem.q_tokens if side == "q" else problem.k_tokens
        field = _field(tokens, fact)
        if (a := getattr(tokens, field)) is not None:
            add_vector(f"{side}.{field}", side, jnp.asarray(a)[:, None])
    leaves, tree = jax.tree.flatten(problem.mask)
    names = [f"mask.{i}" for i in range(len(leaves))]
    for name, leaf in zip(names, leaves if masked else []):
        add_dense(name, leaf)
    integers = tuple(name for name, leaf in zip(names, leaves) if leaf.dtype != jnp.bool_)
    if problem.bias is not None:
        add_dense("bias", jnp.asarray(problem.bias))
    if problem.dropout is not None:
        a, c = problem.dropout.row_keys(g.batch, g.heads, jnp.asarray(problem.q_tokens.rows))
        add_vector("dropout.a", "q", lax.bitcast_convert_type(a, jnp.int32))
        add_vector("dropout.c", "q", lax.bitcast_convert_type(c, jnp.int32))
    for name, a in (extra or {}).items():
        add_vector(name, "q", a)
    rule = problem.bias_rule
    (table, read), terms = rules.made(problem, g, rules.numbers(rule))
    for name, a in read.items():
        add_dense(name, a)
    # Queries that only pad have no weights; what a rule makes of other tokens than there are is not asked.
    padding = {"shift": np.inf} | dict.fromkeys(read)
    streams = {
        name: _vector_stream(g, sides[name], a, padding.get(name, 0)) for name, a in vectors.items()
    }
    streams |= {name: _slab_stream(g, a) for name, a in slabs.items()}
    if table is not None:
        streams["distances"] = Stream(table[:, None], _table_spec(table.shape[1]))
    dropout = problem.dropout and dataclasses.replace(
        problem.dropout, key=None, batch_start=None, head_start=None
    )
    plan = Plan(
        geometry=g,
        order=visited,
        vectors=sides,
        slabs=tuple(slabs),
        mask=jax.tree.unflatten(tree, names),
        integers=integers,
        q_tokens=_plain(problem.q_tokens),
        k_tokens=_plain(problem.k_tokens),
        dropout=dropout,
        rules=problem.logits,
        has_bias=problem.bias is not None,
        hides=contains(problem),
        by_distance=table is not None,
        terms=terms,
    )
    return plan, streams


def _field(tokens: Tokens, fact: str) -> str:
    """Return the field of tokens that a fact is read from."""
    if fact == "positions":
        fact = "rows" if tokens.pos is None else "pos"
    return "index" if fact == "rows" else fact


def contains(problem: Problem) -> bool:
    """Return whether NaN and Inf are kept from what a mask hides them from: where data decide what that is.

    Looking through keys and values takes 15 % of the forward kernel's bundles at T 4096, H 128 (v5e). Under a
    mask that is known while compiling, causal or a window, a NaN reaches the rows of the tiles of its key.
    """
    facts = problem.mask, problem.q_tokens, problem.k_tokens
    return hidden.anything(problem) and bool(jax.tree.leaves(facts))


def _plain(tokens: Tokens) -> Tokens:
    """Keep the start; arrays become a mark that they are streamed."""
    return dataclasses.replace(tokens.map(lambda a: True, tokens.length, tokens.start))  # type: ignore[arg-type, return-value]


def pad_to(x: Array, axis: int, length: int, value: float | None = 0.0) -> Array:
    """Pad one axis by a value, or by the last one; nothing happens where the length fits."""
    missing = length - x.shape[axis]
    if not missing:
        return x
    widths = [(0, missing if a == axis % x.ndim else 0) for a in range(x.ndim)]
    if value is None:
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=value)


def _vector_stream(g: Geometry, side: str, a: Array, padding: float | None) -> Stream:
    """Stream [#B, #N, L] as [#B, #N, 1, L]."""
    some_b, some_n = int(a.shape[0] > 1), int(a.shape[1] > 1)
    a = pad_to(jnp.asarray(a), 2, g.padded[side], padding)[:, :, None]
    if side == g.outer:
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


def _table_spec(size: int) -> pl.BlockSpec:
    """Cut tables of distances [N, 1, size] by head."""
    return pl.BlockSpec((None, 1, size), lambda b, n, r, m, *_: (n, 0, 0))


def _slab_stream(g: Geometry, a: Array) -> Stream:
    """Stream [#B, #N, T, S] by tile."""
    some_b, some_n = int(a.shape[0] > 1), int(a.shape[1] > 1)
    a = pad_to(pad_to(a, 2, g.padded["q"]), 3, g.padded["k"])
    if g.outer == "q":
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


# ---- the sides of the logits -------------------------------------------------------------------


def folds(problem: "Problem | Plan") -> bool:
    """Return whether the scale can wait until the exponent, which a bias is added before."""
    if isinstance(problem, Plan):
        logits, has_bias = problem.rules, problem.biased
    else:
        logits = problem.logits
        has_bias = problem.bias is not None or problem.bias_rule is not None
    return not has_bias and logits.scale_can_wait


def _heads_first(x: Array, length: int) -> Array:
    return pad_to(x.swapaxes(1, 2), 2, length)


def outer_stream(g: Geometry, x: Array, groups: int) -> Stream:
    """Stream [B, L, N, H] block of rows by block of rows."""
    x = _heads_first(x, g.rows * g.row_blocks)
    block = (None, None, g.rows * g.blocks, x.shape[-1])
    return Stream(x, pl.BlockSpec(block, lambda b, n, r, m, *_: (b, _shared(n, groups), r, 0)))


def inner_stream(g: Geometry, x: Array, groups: int, chunk: Callable) -> Stream:
    """Stream [B, L, N, H] chunk by chunk."""
    x = _heads_first(x, g.chunk * g.chunks)
    block = (None, None, g.chunk, x.shape[-1])

    def index(b, n, r, m, *prefetched):
        return b, _shared(n, groups), chunk(b, n, r, m, *prefetched), 0

    return Stream(x, pl.BlockSpec(block, index))


def _shared(n: Any, groups: int) -> Any:
    """Return the key-value head of a query head."""
    return n if groups == 1 else lax.div(n, groups)


def chunk(b: Any, n: Any, r: Any, m: Any, at: Any, *_: Any) -> Any:
    return at[0] + m


def source(plan: Plan) -> Callable:
    """Return the index map that stays where it is when a chunk has no tiles."""
    g, order = plan.geometry, plan.order
    if g.chunks == 1:
        return chunk

    def index(b, n, r, m, at, table, held):
        return held[(order.group(b, n) * g.row_blocks + r) * g.chunks + m]

    return index


def outer_output(g: Geometry, size: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    shape = (g.batch, g.heads, g.rows * g.row_blocks, size)
    block = (None, None, g.rows * g.blocks, size)
    return jax.ShapeDtypeStruct(shape, dtype), pl.BlockSpec(
        block, lambda b, n, r, m, *_: (b, n, r, 0)
    )


def vector_output(g: Geometry) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    shape = (g.batch, g.heads, 1, g.rows * g.row_blocks)
    spec = pl.BlockSpec((None, None, 1, g.rows * g.blocks), lambda b, n, r, m, *_: (b, n, 0, r))
    return jax.ShapeDtypeStruct(shape, jnp.float32), spec


def table_output(g: Geometry) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    size = g.rows * g.row_blocks + g.chunk * g.chunks
    spec = pl.BlockSpec((None, None, 1, size), lambda b, n, r, m, *_: (b, n, 0, 0))
    return jax.ShapeDtypeStruct((g.batch, g.heads, 1, size), jnp.float32), spec


def resident_output(
    g: Geometry, size: int, dtype: Any
) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    shape = (g.batch, g.heads, g.chunk, size)
    spec = pl.BlockSpec((None, None, g.chunk, size), lambda b, n, r, m, *_: (b, n, 0, 0))
    return jax.ShapeDtypeStruct(shape, dtype), spec


def resident_vector(g: Geometry) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    shape = (g.batch, g.heads, 1, g.chunk)
    spec = pl.BlockSpec((None, None, 1, g.chunk), lambda b, n, r, m, *_: (b, n, 0, 0))
    return jax.ShapeDtypeStruct(shape, jnp.float32), spec
