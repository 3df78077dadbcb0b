"""Tokens: what a mask may know about one side of the logits, O(length) and nothing more.

A *row* is a token's place in the whole, unsharded array; a *position* is logical, may restart
(packed sequences) or run ahead (a cache). Slicing a tile, sharding, rotating around a ring and
caching keys are the same operation on the same pytree. A plain sequence has no arrays at all, so
that everything about its tiles is decided in NumPy while tracing.

`Facts` is the shape in which masks read tokens: the query side broadcasts as [#B, 1, T, 1], the key
side as [#B, 1, 1, S]; for whole tiles each fact is an interval (low, high), `Facts` of pairs.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.brief import alike, brief
from mha_jax.attention.given import as_array, is_integer
from mha_jax.errors import ShapeError
from mha_jax.types import ArrayLike, Bool, Int, Size


class Facts(NamedTuple):
    """Facts about the tokens of one side, shaped to broadcast against the other side.

    `None` means that nothing is known: no segments were given, or every token is valid.
    In `Mask.reach` every field is a pair (low, high) over a tile's tokens instead.
    """

    rows: Any
    positions: Any
    segment: Any = None
    valid: Any = None
    head: Any = None  # the number of the query head, for biases


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of the queries or of the keys.

    Args:
      length: Number of tokens.
      start: Row of the first token: `Tokens(T, start=S - T)` aligns the last query with the last
        key.
      index: Rows, when they are not `start + arange(length)`: a shard, or one decoding step.
      pos: Logical positions, when they are not the rows.
      segment: Ids of packed sequences, for `SameSegment`; a negative id is padding.
      valid: True for real tokens, for `ValidKeys` and `ValidQueries`.

    >>> Tokens(3, start=2).rows.tolist()
    [[2, 3, 4]]
    """

    length: int = dataclasses.field(metadata={"static": True})
    start: int = dataclasses.field(default=0, metadata={"static": True})
    index: Int[ArrayLike, "#B L"] | None = None
    pos: Int[ArrayLike, "#B L"] | None = None
    segment: Int[ArrayLike, "#B L"] | None = None
    valid: Bool[ArrayLike, "#B L"] | None = None

    def __post_init__(self):
        for name in ("length", "start"):  # a number of few bits is not to be added to
            if is_integer(number := getattr(self, name)):
                object.__setattr__(self, name, int(number))

    def __repr__(self) -> str:
        return brief(self)

    __eq__ = alike

    @classmethod
    def packed(cls, ids: Int[ArrayLike, "*B L"]) -> "Tokens":
        """Return the tokens of sequences packed one behind the other: positions restart with each.

        Args:
          ids: A number for every sequence, the same for its tokens side by side; negative for padding.

        Raises:
          ShapeError: If the ids are no integers.

        >>> Tokens.packed(np.array([[4, 4, 4, 7, 7, -1]])).positions.tolist()
        [[0, 1, 2, 0, 1, 0]]
        """
        ids = as_array("ids of Tokens.packed", ids, "integers [*B, L]")
        if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim == 0:
            raise ShapeError(
                f"Tokens.packed takes one integer for every token, the number of its sequence: got "
                f"{ids.dtype}{list(ids.shape)}. Expected [*B, L], [[0, 0, 0, 1, 1, -1]] say."
            )
        xp, last = (np if isinstance(ids, np.ndarray) else jnp), ids.ndim - 1
        rows = xp.arange(ids.shape[-1], dtype=np.int32).reshape((*(1,) * last, -1))
        first = xp.concatenate(
            [xp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], last
        )
        begins = xp.where(first, rows, xp.zeros((), np.int32))
        if isinstance(begins, np.ndarray):
            begins = np.maximum.accumulate(begins, last)
        else:
            begins = jax.lax.cummax(begins, axis=last)
        return cls(ids.shape[-1], pos=rows - begins, segment=ids)

    @property
    def rows(self) -> Int[ArrayLike, "#B L"]:
        if self.index is not None:
            return self.index
        if not isinstance(self.length, int):  # a symbolic length, of a program to be exported
            return self.start + jnp.arange(self.length, dtype=jnp.int32)[None]
        return np.arange(self.start, self.start + self.length, dtype=np.int32)[None]

    @property
    def positions(self) -> Int[ArrayLike, "#B L"]:
        return self.rows if self.pos is None else self.pos

    def map(self, function: Callable[[ArrayLike], ArrayLike], length: Size, start: int) -> "Tokens":
        """Apply `function` to every array; a plain sequence stays plain and starts at `start`."""
        arrays = (self.index, self.pos, self.segment, self.valid)
        return Tokens(length, start, *(a if a is None else function(a) for a in arrays))

    def cut(self, first: int, size: Size) -> "Tokens":
        """Return tokens `first` to `first + size`, both Python integers."""
        return self.map(lambda a: a[:, first : first + size], size, self.start + first)

    def facts(self) -> Facts:
        """Return the facts as [#B, L] arrays, for a backend that slices them itself."""
        return Facts(self.rows, self.positions, self.segment, self.valid)

    def as_queries(self) -> Facts:
        """Return the facts shaped [#B, 1, T, 1]."""
        return jax.tree.map(lambda a: a[:, None, :, None], self.facts())

    def as_keys(self) -> Facts:
        """Return the facts shaped [#B, 1, 1, S]."""
        return jax.tree.map(lambda a: a[:, None, None, :], self.facts())


def distance(q: ArrayLike, k: ArrayLike) -> Any:
    """Return k - q of positions that broadcast; what leaves 32 bits is the last number on its side.

    >>> distance(np.int32([5, -5]), np.int32([2, 2**31 - 1])).tolist()
    [-3, 2147483647]
    """
    xp: Any = np if isinstance(q, np.ndarray) and isinstance(k, np.ndarray) else jnp
    most = np.iinfo(np.int32).max
    apart = k - q
    left = ((k ^ q) & (k ^ apart)) < 0  # another sign than both may give
    return xp.where(left, xp.where(k < 0, -most, most), xp.maximum(apart, -most)).astype(np.int32)


def consecutive(q: Tokens, k: Tokens) -> bool:
    """Return whether all distances follow from where the sides begin: no rows or positions are data."""
    return all(a is None for tokens in (q, k) for a in (tokens.index, tokens.pos))


def near(q: Tokens, k: Tokens) -> bool:
    """Return whether tokens are consecutive, and no difference of two of them leaves 32 bits."""
    return consecutive(q, k) and abs(k.start - q.start) < 2**30


def far(q: Tokens, k: Tokens, steps: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Return the distances of consecutive tokens that lie some steps further apart than the first ones."""
    most = np.iinfo(np.int32).max
    apart = steps.astype(np.int64) + (k.start - q.start)
    return np.clip(apart, -most, most).astype(np.int32)


def extents(facts: Facts, size: int) -> Facts:
    """Reduce [#B, L] facts to an interval for every block of `size` tokens, the last one maybe
    short.

    Returns:
      Facts of pairs (low, high), each [#B, blocks]: NumPy where the facts are NumPy, so that a
      plain sequence is analysed while tracing and costs nothing at run time.
    """

    def interval(a):
        xp = np if isinstance(a, np.ndarray) else jnp
        blocks = -(-a.shape[1] // size)
        padded = xp.pad(a, ((0, 0), (0, blocks * size - a.shape[1])), mode="edge")
        tiles = padded.reshape(a.shape[0], blocks, size)
        return tiles.min(-1), tiles.max(-1)

    return Facts(*(a if a is None else interval(a) for a in facts))


def zero_invalid(x: jax.Array, tokens: Tokens) -> jax.Array:
    """Zero the data [B, L, ...] of tokens that are not valid, so that NaN there reaches nothing."""
    if tokens.valid is None:
        return x
    valid = tokens.valid.reshape(*tokens.valid.shape, *(1,) * (x.ndim - 2))
    return jnp.where(valid, x, jnp.zeros((), x.dtype))


def finite(x: jax.Array) -> jax.Array:
    """Return which tokens of data [..., H] hold finite numbers only, [..., 1]."""
    # A sum of numbers: that of booleans takes XLA seconds to compile where x is a constant.
    return jnp.sum(jnp.where(jnp.isfinite(x), 0.0, 1.0), -1, keepdims=True) == 0


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def replaced(x: jax.Array, keep: jax.Array, value: float) -> jax.Array:
    """Return x, and `value` in place of what is not kept; its derivative is that of x everywhere.

    What stands for a number does not hide that it was one: who sees it has its gradient.
    """
    return jnp.where(keep, x, jnp.asarray(value, x.dtype))


@replaced.defjvp
def _replaced_jvp(value, primals, tangents):
    return replaced(*primals, value), tangents[0]
