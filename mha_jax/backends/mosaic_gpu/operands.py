"""What a kernel reads beside q, k and v, and which tiles it visits.

Facts of tokens, dropout's words and the statistics reach a kernel as vectors, one number a token: those of
its rows stay in registers, those of its columns are copied tile by tile. What is T x S (a dense mask, a dense
bias) is read by tile.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import hidden
from mha_jax.attention.call import Logits, Problem
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Mask
from mha_jax.backends import asked, visits
from mha_jax.backends.arithmetic import Operand, Term
from mha_jax.backends.mosaic_gpu import rules as ruled
from mha_jax.backends.mosaic_gpu.sums import Summed
from mha_jax.types import Array

# Rows of a warpgroup, of which two share the columns; lengths are padded to whole pairs of them.
ROWS, WARPGROUPS = 64, 2
WHOLE = ROWS * WARPGROUPS
LOG2E = float(np.log2(np.e))
HALVES = (jnp.bfloat16, jnp.float16)
DIAGONALS = "diagonals"
_SIDES = {"q": "q", "d_out": "q", "k": "k", "v": "k"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel knows while it is traced.

    Args:
      rows: The side of its rows, "q" or "k".
      columns: Columns of a tile.
      steps: Tiles of columns that are in shared memory at a time.
      blocks: Tiles of columns of one head.
      groups: Query heads of a key-value head.
      masked: Whether there are tiles that are seen in part.
      vectors: Side of every vector by name.
      slabs: Names of what is T x S.
      mask: The rule; its leaves are names.
      integers: Names of leaves that are no booleans.
      padded: Whether keys are padded.
      bias: What is added to the logits.
      diagonals: Where the tile at row 0, column 0 begins in numbers along the diagonals.
      dropout: Without its key.
      rules: How a product becomes a logit.
      summed: What every tile of a bias's cotangent sums up; else rows stay where columns pass by.
    """

    rows: str
    columns: int
    steps: int
    blocks: int
    groups: int
    masked: bool
    vectors: dict[str, str]
    slabs: tuple[str, ...]
    mask: Mask
    integers: tuple[str, ...]
    padded: bool
    bias: tuple[Term, ...]
    diagonals: int
    dropout: Dropout | None
    rules: Logits
    summed: Summed | None

    def of_rows(self, name: str) -> bool:
        """Whether a vector or an operand has tokens of the tiles' rows."""
        return (_SIDES | self.vectors)[name] == self.rows

    @property
    def held(self) -> tuple[str, ...]:
        """Vectors that stay."""
        return tuple(x for x in self.vectors if self.of_rows(x) and self.summed is None)

    def room(self, name: str) -> tuple[int, ...]:
        """Return how many tokens of something are in shared memory, for every copy that brings them."""
        return (WARPGROUPS, ROWS) if self.of_rows(name) else (self.columns,)

    @property
    def passing(self) -> dict[str, tuple[str, ...]]:
        """Vectors that pass by: "vectors" for every tile, "facts" for those that are seen in part."""
        names = [name for name in self.vectors if name not in self.held]
        facts = tuple(name for name in names if name.startswith(("mask.", "q.", "k.")))
        others = tuple(name for name in names if name not in facts)
        return {group: a for group, a in {"vectors": others, "facts": facts}.items() if a}

    @property
    def folds(self) -> bool:
        """Whether the exponent takes the scale, which a bias is added before."""
        return not self.bias and self.rules.scale_can_wait

    @property
    def factor(self) -> float:
        """What turns a tile's logits into the statistics' unit."""
        return self.unit * (self.rules.scale if self.folds else 1.0)

    @property
    def unit(self) -> float:
        """What statistics are multiplied by."""
        return unit(bool(self.bias))


class Operands(NamedTuple):
    """The arrays of a plan.

    Args:
      table: Tiles of every line, [#B, #heads, lines, 2 + tiles]: how many are full, how many are seen in
        part, and their numbers in this order; those of a key-value head's query heads one after the other.
      vectors: [#B, #N, padded length].
      slabs: [#B, #N, padded rows, padded columns].
    """

    table: Array
    vectors: dict[str, Array]
    slabs: dict[str, Array]


def unit(biased: bool) -> float:
    """Return what statistics are multiplied by: powers of two save an operation, but a bias may be huge."""
    return 1.0 if biased else LOG2E


def whole(length: int) -> int:
    """Return a length padded to whole tiles."""
    return length + -length % WHOLE


def pad(x: Array, axis: int, length: int, value: float | None = 0) -> Array:
    """Pad one axis by a value, or by the last one; nothing happens where the length fits."""
    if x.shape[axis] == length:
        return x
    widths = [(0, length - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    if value is None:
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=value)


def plan(
    problem: Problem,
    rows: str,
    columns: int,
    steps: int,
    extra: dict[str, Array],
    summed: Summed | None = None,
) -> tuple[Plan, Operands]:
    """Decide on what a kernel reads beside its operands.

    Args:
      problem: The problem.
      rows: The side of the kernel's rows.
      columns: Columns of a tile.
      steps: Tiles of columns that are held.
      extra: Further vectors of the queries, [B, N, T].
      summed: What every tile of a bias's cotangent sums up.
    """
    t, s = problem.q.shape[1], problem.k.shape[1]
    table, masked = _table(problem, rows, columns, summed)
    vectors: dict[str, tuple[str, Any]] = {}
    slabs: dict[str, Array] = {}

    def dense(name: str, a: Any) -> None:
        a = jnp.asarray(a)
        pairs = a.shape[2] == t > 1 and a.shape[3] == s > 1
        if not (pairs and a.dtype in HALVES):  # of what is T x S no wider copy is made
            a = a.astype(jnp.float32 if jnp.issubdtype(a.dtype, jnp.floating) else jnp.int32)
        if pairs:
            a = pad(pad(a, 2, whole(t)), 3, whole(s))
            slabs[name] = a if rows == "q" else a.swapaxes(2, 3)
        elif a.shape[3] == s > 1:
            vectors[name] = "k", a[:, :, 0]
        else:
            vectors[name] = "q", jnp.broadcast_to(a[..., 0], (*a.shape[:2], t))

    leaves, tree = jax.tree.flatten(problem.mask)
    names = [f"mask.{i}" for i in range(len(leaves))]
    if masked:
        for name, leaf in zip(names, leaves):
            dense(name, leaf)
        for side, field in asked.facts(problem):
            tokens = problem.q_tokens if side == "q" else problem.k_tokens
            fact = jnp.asarray(getattr(tokens.facts(), field))
            vectors[f"{side}.{field}"] = side, fact.astype(jnp.int32)[:, None]
        if s != whole(s):
            real = np.arange(whole(s), dtype=np.int32)[None, None] < s
            vectors["k.real"] = "k", jnp.asarray(real, jnp.int32)
    bias, lengths = [], {"q": whole(t), "k": whole(s)}
    if problem.bias is not None:
        dense("bias", problem.bias)
        bias.append(Term((), Operand("bias", jnp.float32)))
    arithmetic, others = ruled.terms(problem)
    for term, read in arithmetic:
        bias.append(term)
        for name, array in read.items():
            dense(name, array)
    of_rows, of_columns = lengths[rows], lengths["k" if rows == "q" else "q"]
    if others is not None:
        slabs[DIAGONALS] = ruled.laid(problem, others, rows, ROWS, (of_rows, of_columns))[None]
        bias.append(Term((), Operand(DIAGONALS, jnp.float32)))
    if problem.dropout is not None:
        b, n = problem.q.shape[0], problem.q.shape[2]
        words = problem.dropout.row_keys(b, n, jnp.asarray(problem.q_tokens.rows))
        vectors |= {f"dropout.{name}": ("q", word) for name, word in zip("ac", words)}
        vectors["dropout.rows"] = "k", jnp.asarray(problem.k_tokens.rows, jnp.int32)[:, None]
    vectors |= {name: ("q", a) for name, a in extra.items()}
    # Queries that only pad have no weights; what a rule makes of other tokens than there are is not asked.
    padding = {"shift": np.inf} | {name: None for name in vectors if name.startswith("rule.")}
    arrays = {
        name: pad(a, 2, lengths[side], padding.get(name, 0)) for name, (side, a) in vectors.items()
    }
    integers = tuple(name for name, leaf in zip(names, leaves) if leaf.dtype != jnp.bool_)
    planned = Plan(
        rows=rows,
        columns=columns,
        steps=steps,
        blocks=-(-(s if rows == "q" else t) // columns),
        groups=problem.groups,
        masked=masked,
        vectors={name: side for name, (side, _) in vectors.items()},
        slabs=tuple(slabs),
        mask=jax.tree.unflatten(tree, names),
        integers=integers,
        padded="k.real" in vectors,
        bias=tuple(bias),
        diagonals=of_rows - ROWS,
        dropout=problem.dropout
        and dataclasses.replace(problem.dropout, key=None, batch_start=None, head_start=None),
        rules=problem.logits,
        summed=summed,
    )
    return planned, Operands(table, arrays, slabs)


def _table(problem: Problem, rows: str, columns: int, summed: Summed | None) -> tuple[Array, bool]:
    """Return the tiles of every line, and whether some of them may be seen in part."""
    sizes = (WHOLE, columns) if rows == "q" else (columns, WHOLE)
    kind = visits.kinds(problem, *sizes)
    xp = visits.array_module(kind)
    if rows == "k":
        # [#B, #N, blocks of T, blocks of S] to [#B, #K, blocks of S, G blocks of T]
        b, n, blocks_q, blocks_k = kind.shape
        kind = kind.reshape(b, -1, 1 if n == 1 else problem.groups, blocks_q, blocks_k)
        kind = xp.broadcast_to(kind, (*kind.shape[:2], problem.groups, blocks_q, blocks_k))
        kind = xp.moveaxis(kind, 4, 2).reshape(b, -1, blocks_k, problem.groups * blocks_q)
    if summed is not None:
        kind = summed.lines(kind)
    # FULL, PARTIAL, EMPTY are in this order.
    order = xp.argsort(kind, axis=-1, stable=True)
    if summed is not None:
        order = xp.take_along_axis(xp.broadcast_to(summed.numbers, kind.shape), order, axis=-1)
    counts = [xp.sum(kind == x, -1, keepdims=True) for x in (visits.FULL, visits.PARTIAL)]
    table = xp.concatenate([x.astype(np.int32) for x in (*counts, order)], -1)
    masked = xp is jnp or bool(np.any(kind == visits.PARTIAL))
    return jnp.asarray(table), masked


def contains(problem: Problem) -> bool:
    """Return whether NaN and Inf are kept from what a mask hides them from: where data decide that."""
    facts = problem.mask, problem.q_tokens, problem.k_tokens
    return hidden.anything(problem) and bool(jax.tree.leaves(facts))
