"""Biases by rule: what is added to the capped logits, as a function of tokens and heads, never T x S.

N query heads   R rows of a table

A bias says `logits`: how much is added for this query token, this key token and this head? It is written with
facts that broadcast, as a mask is, and may differ by head: `q.head` is the number of the query's head. Its
floating-point arrays are parameters: their gradients are summed up tile by tile, in O(T) memory. Biases add.

To add a bias: subclass `Bias`, register it as a pytree (`pytree`, `static`), write `logits`; where it knows
the distance of two tokens and the head alone, subclass `OfDistance` and write `at`, which is faster.

>>> bias = Alibi.of_heads(8) + Buckets(jnp.zeros((32, 8)))
>>> x = jnp.ones((2, 5, 8, 4))
>>> mj.dot_product_attention(x, x, x, mask=mj.Causal(), bias=bias).shape
(2, 5, 8, 4)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.given import integer, is_integer, shape_of, switch
from mha_jax.attention.masks import pytree, static
from mha_jax.attention.tokens import Facts, Tokens, distance
from mha_jax.errors import ShapeError
from mha_jax.types import ArrayLike, Float, Int

__all__ = ["Alibi", "Array", "Bias", "Buckets", "OfDistance", "Relative", "Sum", "pytree", "static"]


class Bias:
    """A rule on (query token, key token, query head)."""

    def logits(self, q: Facts, k: Facts) -> Any:
        """Return floats that broadcast to the tile: what is added to its logits.

        Args:
          q: Facts of the queries; `q.head` is the number of the query head.
          k: Facts of the keys.
        """
        raise NotImplementedError(f"{type(self).__name__} says nothing: write `logits(q, k)`")

    @property
    def only_distances(self) -> bool:
        """Whether `at` says all: then it is asked once for every distance, not for every pair."""
        return False

    def at(self, distance: Int[ArrayLike, "..."], head: Int[ArrayLike, "..."]) -> jax.Array:
        """Return what is added at distances of heads, which broadcast against each other.

        Args:
          distance: Key position minus query position; further ones than 2**31 - 1 as that.
          head: The number of the query head.
        """
        raise NotImplementedError(f"{type(self).__name__} says nothing: write `at(distance, head)`")

    @property
    def alike_from(self) -> int | None:
        """From which distance on `at` says the same of all, on either side by itself; None if it may not."""
        return None

    def check(self, heads: int) -> None:
        """Refuse numbers that do not fit a call of so many query heads.

        Raises:
          ShapeError: Saying what would.
        """

    def matrix(self, q: Tokens, k: Tokens, heads: int = 1) -> Float[np.ndarray, "*B N T S"]:
        """Return the bias of every pair as NumPy, [#B, N, T, S]: to look at, not to compute with."""
        x = np.asarray(self.logits(queries(q, heads), k.as_keys()))
        return np.broadcast_to(x, np.broadcast_shapes(x.shape, (1, heads, q.length, k.length)))

    __array_ufunc__ = None  # NumPy leaves `array + bias` to the bias

    def __add__(self, other: "Bias | ArrayLike") -> "Bias":
        return Sum(self, other)

    def __radd__(self, other: ArrayLike | int) -> "Bias":
        return self if is_integer(other) and other == 0 else Sum(other, self)  # `sum` begins with 0


class OfDistance(Bias):
    """A rule on the distance of two tokens and on the query head alone: write `at`."""

    @property
    def only_distances(self) -> bool:
        return True

    def logits(self, q, k):
        return self.at(distance(q.positions, k.positions), q.head)


@pytree
class Sum(Bias):
    """Both; arrays among them stand for themselves."""

    a: Any
    b: Any

    def logits(self, q, k):
        return self.a.logits(q, k) + self.b.logits(q, k)

    @property
    def only_distances(self):
        return self.a.only_distances and self.b.only_distances

    @property
    def alike_from(self):
        a, b = self.a.alike_from, self.b.alike_from
        return None if a is None or b is None else max(a, b)

    def at(self, distance, head):
        return self.a.at(distance, head) + self.b.at(distance, head)

    def check(self, heads):
        self.a.check(heads)
        self.b.check(heads)


@pytree
class Array(Bias):
    """An array that is added as it is, [T, S] or [*B, N, T, S]: the only bias that costs T x S memory."""

    array: Float[ArrayLike, "..."]

    def logits(self, q, k):
        return self.array


@pytree
class Alibi(OfDistance):
    """Minus a slope for every head times the distance, on both sides.

    Args:
      slopes: [N].

    Source: Press et al. 2021, arXiv:2108.12409, section 3.

    >>> Alibi(np.array([0.5])).matrix(Tokens(2), Tokens(3))[0, 0].tolist()
    [[-0.0, -0.5, -1.0], [-0.5, -0.0, -0.5]]
    """

    slopes: Float[ArrayLike, "N"]

    @classmethod
    def of_heads(cls, heads: int) -> "Alibi":
        """Return the slopes of the paper: 2 ** (-8 n / N) for N a power of two, others with those between.

        Raises:
          ShapeError: If `heads` is no count of heads.

        >>> Alibi.of_heads(4).slopes.tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
        """
        integer("heads of Alibi.of_heads", heads, 1, 2**31 - 1, "It is num_heads of the layer.")
        whole = 2 ** math.floor(math.log2(heads))
        first = [2.0 ** (-8 * n / whole) for n in range(1, whole + 1)]
        between = [2.0 ** (-4 * n / whole) for n in range(1, 2 * whole + 1, 2)]
        return cls(np.array([*first, *between][:heads], np.float32))

    def at(self, distance, head):
        slopes = jnp.asarray(self.slopes)
        return -jnp.abs(distance).astype(slopes.dtype) * slopes[head]

    def check(self, heads):
        if shape_of(self.slopes) != (heads,):
            raise ShapeError(
                f"slopes of Alibi must be one for every query head, [N] = [{heads}]: got "
                f"{shape_of(self.slopes)}. Alibi.of_heads({heads}) has those of the paper."
            )


@pytree
class Buckets(OfDistance):
    """A number for every head and bucket of distances: small distances have one each, larger ones share.

    Args:
      table: [R, N].
      bidirectional: Keys after the query have half of the buckets for themselves; else they have that of
        distance 0.
      max_distance: From here on all distances share the last bucket.

    Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1; T5's `relative_attention_bias`.
    """

    table: Float[ArrayLike, "R N"]
    bidirectional: bool = static(default=True)
    max_distance: int = static(default=128)

    def __post_init__(self):
        if is_integer(self.max_distance):
            object.__setattr__(self, "max_distance", int(self.max_distance))

    @property
    def alike_from(self):
        return self.max_distance

    def at(self, distance, head):
        far = self.max_distance
        bucket = jnp.asarray(self.buckets())[jnp.clip(distance, -far, far) + far]
        return _looked_up(self.table, bucket, head)

    def buckets(self) -> Int[np.ndarray, "distances"]:
        """Return the bucket of every distance from -max_distance to max_distance."""
        count, far = np.shape(self.table)[0], self.max_distance
        ahead = np.arange(-far, far + 1)
        first, back = np.zeros_like(ahead), np.maximum(-ahead, 0)
        if self.bidirectional:
            count //= 2
            first, back = np.where(ahead > 0, count, 0), np.abs(ahead)
        exact = count // 2
        # In the order of operations of T5, in float32: where a logarithm is whole it decides the bucket.
        logs = np.log(np.maximum(back, 1).astype(np.float32) / np.float32(exact))
        share = logs / np.float32(math.log(far / exact)) * np.float32(count - exact)
        shared = np.minimum(exact + share.astype(np.int32), count - 1)
        return (first + np.where(back < exact, back, shared)).astype(np.int32)

    def check(self, heads):
        switch("bidirectional of Buckets", self.bidirectional)
        _check_table(self, "[R, N]", heads)
        count = np.shape(self.table)[0] // (2 if self.bidirectional else 1)
        far = self.max_distance
        if not is_integer(far) or count < 2 or not count // 2 < far < 2**24:
            raise ShapeError(
                f"Buckets have a number each for distances below {count // 2} and share the rest up to "
                f"max_distance: got max_distance={self.max_distance!r} and a table of "
                f"{np.shape(self.table)[0]} rows, bidirectional={self.bidirectional}. Expected an integer "
                f"larger than {count // 2} and below 2**24, and at least two rows for each direction."
            )


@pytree
class Relative(OfDistance):
    """A number for every head and distance, query position minus key position.

    Args:
      table: [2 n - 1, N] for distances from -(n - 1) to n - 1, further ones as these; with `axes`,
        [(2 n_1 - 1) (2 n_2 - 1) ..., N] row by row, as Swin's `relative_position_bias_table`.
      axes: The lengths n_1, n_2, ... of several attention axes that are folded into one, row by row.

    Source: Shaw et al. 2018, arXiv:1803.02155; Liu et al. 2021, arXiv:2103.14030, eq. 4.
    """

    table: Float[ArrayLike, "R N"]
    axes: tuple[int, ...] | None = static(default=None)

    def __post_init__(self):
        if isinstance(self.axes, (tuple, list)):
            axes = tuple(int(n) if is_integer(n) else n for n in self.axes)
            object.__setattr__(self, "axes", axes)

    def at(self, distance, head):
        most = np.shape(self.table)[0] // 2
        return _looked_up(self.table, most - jnp.clip(distance, -most, most), head)

    @property
    def only_distances(self):
        return self.axes is None

    @property
    def alike_from(self):
        return np.shape(self.table)[0] // 2

    def logits(self, q, k):
        if self.axes is None:
            return super().logits(q, k)
        row: Any = None
        inside = [math.prod(self.axes[i + 1 :]) for i in range(len(self.axes))]
        for step, length in zip(inside, self.axes):
            apart = q.positions // step % length - k.positions // step % length + (length - 1)
            row = apart if row is None else row * (2 * length - 1) + apart
        return _looked_up(self.table, row, q.head)

    def check(self, heads):
        lengths = () if self.axes is None else self.axes
        listed = isinstance(lengths, (tuple, list)) and all(
            is_integer(n) and n > 0 for n in lengths
        )
        if not listed:
            raise ShapeError(
                f"axes of Relative are the lengths of the attention axes: got {self.axes!r}. Expected "
                "positive integers, (7, 7) for a window of Swin, or None for a sequence."
            )
        _check_table(self, "[2 n - 1, N]" if self.axes is None else "[R, N]", heads)
        rows = np.shape(self.table)[0]
        wanted = math.prod(2 * n - 1 for n in self.axes or ())
        if rows % 2 == 0 or (self.axes is not None and rows != wanted):
            said = "an odd number of" if self.axes is None else f"{wanted}"
            raise ShapeError(
                f"the table of Relative has {said} rows, 2 n - 1 for an axis of length n: got "
                f"{np.shape(self.table)} with axes={self.axes}."
            )


@pytree
class OfHeads(Bias):
    """The bias of some heads only, which are numbered anew."""

    bias: Any  # a rule, or floats of one
    numbers: Any  # [N], or None beside floats

    def logits(self, q, k):
        return self.bias.logits(q._replace(head=jnp.asarray(self.numbers)[q.head]), k)

    @property
    def only_distances(self):
        return self.bias.only_distances

    @property
    def alike_from(self):
        return self.bias.alike_from

    def at(self, distance, head):
        return self.bias.at(distance, jnp.asarray(self.numbers)[head])


def _check_table(bias: Any, form: str, heads: int) -> None:
    shape = shape_of(bias.table)
    if len(shape) != 2 or shape[1] != heads:
        raise ShapeError(
            f"the table of {type(bias).__name__} must have a column for every query head, {form} with "
            f"N = {heads}: got {shape}. T5 and Swin store it so; transpose one that has heads first."
        )


def _looked_up(table: Any, rows: Any, heads: Any) -> Any:
    """Return table[rows, heads], rows and heads broadcast, all of them inside."""
    table = jnp.asarray(table)
    flat = rows * table.shape[1] + heads
    return table.reshape(-1).at[flat].get(mode="promise_in_bounds")


# ---- what backends need -------------------------------------------------------------------------


def queries(tokens: Tokens, heads: int) -> Facts:
    """Return the facts of queries shaped [#B, #N, T, 1], the number of the head among them."""
    head = np.arange(heads, dtype=np.int32)[None, :, None, None]
    return tokens.as_queries()._replace(head=head)


def floats(bias: Any) -> Any:
    """Return a rule with None in the place of arrays that are no floating-point numbers."""

    def moving(a):
        return a if jnp.issubdtype(jnp.result_type(a), jnp.floating) else None

    return jax.tree.map(moving, bias)


def with_floats(bias: Any, moved: Any) -> Any:
    """Return a rule with other arrays where `moved`, of its structure, has some."""
    return jax.tree.map(lambda a, m: a if m is None else m, bias, moved)


def apart(bias: Any) -> tuple[list[Any], list[Bias]]:
    """Return the arrays of a sum, and its rules."""
    if isinstance(bias, Sum):
        (arrays, rules), (more, others) = apart(bias.a), apart(bias.b)
        return arrays + more, rules + others
    if isinstance(bias, Array):
        return [bias.array], []
    return ([], [bias]) if isinstance(bias, Bias) else ([bias], [])


def together(rules: Sequence[Bias]) -> Bias | None:
    """Return the sum of rules."""
    if not rules:
        return None
    whole, *rest = rules
    for rule in rest:
        whole = Sum(whole, rule)
    return whole
