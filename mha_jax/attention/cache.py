"""The key-value cache: projected keys and values of the tokens so far, to decode without redoing
them.

B batch   C capacity   L tokens of a chunk   K key-value heads   H query-key head size
V value head size

Heads come before slots, so that the products of a step read a head's tokens in one piece. A row
stores its real tokens one after the other from slot 0, so that a token's slot is its position; rows
may stand at different counts. Nothing is ever overwritten: a token past the
capacity is not stored, yet counted, so that an overflow shows in the count for good. Masks do not
know the cache: cached keys bring their `Tokens`.
"""

import dataclasses

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from mha_jax.attention.brief import brief
from mha_jax.attention.call import Call
from mha_jax.attention.given import floating, integer, integers, is_integer
from mha_jax.attention.masks import Mask, ValidKeys, pytree
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.types import Array, ArrayLike, Bool, DType, Float, Int, Size

_OVERFLOW = (
    "the cache overflowed: row {row} was given {count} tokens and holds at most {capacity}. "
    "Nothing was overwritten, the tokens past the end are missing. Make it larger, "
    "empty_cache(batch, capacity), or stop before."
)


@pytree
class Held(Mask):
    """A slot that holds no token is not seen: `ValidKeys` for buffers that are zero elsewhere.

    It does not say that it hides invalid keys, so that nobody zeroes, and thereby copies, them.
    """

    def visible(self, q, k):
        return ValidKeys().visible(q, k)

    def reach(self, q, k):
        return ValidKeys().reach(q, k)


def _put(buffer: Array, slots: Array, tokens: ArrayLike) -> Array:
    """Write tokens [B, L, K, H] into the slots [B, L] of their rows; those past the end are dropped."""
    tokens = jnp.asarray(tokens)
    if slots.size == 1:
        # Of one token alone XLA makes a slice, which it writes for each reader, on a copy of the buffer.
        last = np.iinfo(np.int32).max
        slots = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=last)
        tokens = jnp.pad(tokens, ((0, 0), (0, 1), (0, 0), (0, 0)))

    def put(row, slots, tokens):
        return row.at[:, slots].set(tokens.swapaxes(0, 1), mode="drop", unique_indices=True)

    return jax.vmap(put)(buffer, slots, tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far; a pytree, passed in and returned.

    Donate it to the jitted step (`donate_argnums`), or carry it through `lax.scan` or
    `lax.while_loop`, and the buffers are updated in place.

    Args:
      keys: Projected keys; zero where no token is.
      values: Projected values; zero where no token is.
      count: Tokens that every row was given; more than the capacity where a row overflowed.

    >>> cache = Cache.empty(batch=2, capacity=7, num_kv_heads=3, key_dim=4)
    >>> chunk = jnp.ones((2, 5, 3, 4))
    >>> cache = cache.append(chunk, chunk, valid=jnp.arange(5)[None] < jnp.array([[5], [2]]))
    >>> cache.count.tolist()
    [5, 2]
    """

    keys: Float[Array, "B K C H"]
    values: Float[Array, "B K C V"]
    count: Int[Array, "B"]

    def __repr__(self) -> str:
        return brief(self)

    @classmethod
    def empty(
        cls,
        batch: Size,
        capacity: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dtype: DType = jnp.float32,
    ) -> "Cache":
        """Return a cache that holds nothing; `MultiHeadAttention.empty_cache` knows the sizes.

        Args:
          batch: Rows B, all axes folded that are not attended.
          capacity: Tokens C that a row can hold.
          num_kv_heads: Key-value heads K.
          key_dim, value_dim: Sizes of a head; `value_dim` is `key_dim` if None.
          dtype: Of keys and values: that of the computation.

        Raises:
          ShapeError: If a size is no positive integer.

        Cost: B C K (H + V) numbers.

        >>> Cache.empty(2, 7, num_kv_heads=3, key_dim=4, value_dim=5).values.shape
        (2, 3, 7, 5)
        """
        value_dim = key_dim if value_dim is None else value_dim
        sizes = {
            "batch": batch,
            "capacity": capacity,
            "num_kv_heads": num_kv_heads,
            "key_dim": key_dim,
            "value_dim": value_dim,
        }
        for name, size in sizes.items():
            if not is_integer(size) or not 0 < size < 2**31:
                raise ShapeError(
                    f"{name} of a cache must be a positive integer: got {size!r}. It is part of "
                    "the buffers' shape, which no step changes."
                )
        floating("dtype", dtype)
        heads = (batch, num_kv_heads, capacity)
        return cls(
            jnp.zeros((*heads, key_dim), dtype),
            jnp.zeros((*heads, value_dim), dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold, C."""
        return self.keys.shape[2]

    @property
    def overflowed(self) -> Bool[Array, "B"]:
        """True for rows that were given more tokens than they can hold; never False again."""
        return self.count > self.capacity

    @property
    def held(self) -> Bool[Array, "B C"]:
        """True for the slots that hold a token."""
        return jnp.arange(self.capacity, dtype=jnp.int32)[None] < self.count[:, None]

    @property
    def tokens(self) -> Tokens:
        """The tokens of all slots, as masks read them: valid where the row holds one."""
        return Tokens(self.capacity, valid=self.held)

    def next_positions(
        self, length: int, valid: Bool[ArrayLike, "#B L"] | None = None
    ) -> Int[Array, "B L"]:
        """Return the positions of the next `length` tokens; those not valid take up no place.

        >>> cache = Cache.empty(batch=1, capacity=7, num_kv_heads=1, key_dim=1)
        >>> cache.next_positions(4, np.array([[False, True, True, False]])).tolist()
        [[-1, 0, 1, 1]]
        """
        integer("length", length, 0, 2**31 - 1, "It counts the tokens of a chunk.")
        if valid is None:
            steps = jnp.arange(length, dtype=jnp.int32)[None]
        else:
            steps = jnp.cumsum(self._flags(valid, length), axis=1, dtype=jnp.int32) - 1
        return self.count[:, None] + steps

    def _flags(self, valid: ArrayLike, length: int) -> Bool[Array, "#B L"]:
        """Return what says which tokens of a chunk are real.

        Raises:
          ShapeError: If they are no booleans, or not as many as there are tokens.
        """
        kind, shape = getattr(valid, "dtype", None), np.shape(valid)
        batch = self.count.shape[0]
        if kind != jnp.bool_ or shape not in ((batch, length), (1, length)):
            got = f"{kind}{list(shape)}" if kind is not None else type(valid).__name__
            raise ShapeError(
                f"valid must hold a boolean for every token, [B, L] = {[batch, length]} or {[1, length]}: "
                f"got {got}. Of lengths, pass jnp.arange(L)[None] < lengths[:, None]; of numbers, valid != 0."
            )
        return jnp.asarray(valid)

    def append(
        self,
        keys: Float[ArrayLike, "B L K H"],
        values: Float[ArrayLike, "B L K V"],
        valid: Bool[ArrayLike, "#B L"] | None = None,
    ) -> "Cache":
        """Return the cache with a chunk of any length behind what every row holds.

        Args:
          keys, values: Projected keys and values, in the cache's dtype.
          valid: True for real tokens, all if None: only these are stored, without gaps, wherever
            in the chunk they stand. `jnp.arange(L)[None] < lengths[:, None]` for ragged lengths.

        Raises:
          ShapeError: If sizes or dtypes differ from the cache's, or, where the counts are known
            (not traced) or the chunk is longer than the capacity, if a row overflows. A traced
            overflow raises nothing: see `check`.

        Cost: O(B L) slots written; in place inside a compiled program that owns the cache.
        """
        if np.ndim(keys) != 4 or np.shape(keys)[:3] != np.shape(values)[:3]:
            raise ShapeError(
                f"a cache is given keys [B, L, K, H] and values [B, L, K, V]: got {np.shape(keys)} and "
                f"{np.shape(values)}. Project them first; layer.apply(..., cache=cache) does."
            )
        self._check_counts()
        batch, length, heads, key_dim = keys.shape
        self.check_fits(batch, heads, key_dim, values.shape[-1], keys.dtype)
        self.check_fits(batch, heads, key_dim, values.shape[-1], values.dtype)
        if length == 0:
            return self
        slots = self.next_positions(length, valid)
        if valid is None:
            if length > self.capacity:
                raise ShapeError(_OVERFLOW.format(row=0, count=length, capacity=self.capacity))
            count = self.count + length
        else:
            count = slots[:, -1] + 1
            # Slots that do not exist, one for each token: what is written there is dropped.
            nowhere = self.capacity + jnp.arange(length, dtype=jnp.int32)
            slots = jnp.where(self._flags(valid, length), slots, nowhere[None])
        cache = Cache(_put(self.keys, slots, keys), _put(self.values, slots, values), count)
        return cache if isinstance(count, jax.core.Tracer) else cache.check()

    def extend(
        self, call: Call, query_tokens: Tokens | None = None, key_tokens: Tokens | None = None
    ) -> tuple[Call, "Cache"]:
        """Append the keys and values of a call; return it over all that is held, and the cache.

        Args:
          call: A call whose `k_tokens` say which of its keys and values are real.
          query_tokens: Tokens of the queries that the caller gave; if None they stand at their own positions
            in self-attention (as many queries as keys), and after all that was held otherwise.
          key_tokens: Tokens of the slots that the caller gave, or None.
        """
        chunk = call.k_tokens
        q_tokens, rule = call.q_tokens, call.mask & Held()
        if query_tokens is None:
            q_tokens = dataclasses.replace(q_tokens, index=self._rows(q_tokens, chunk))
        cache = self.append(call.k, call.v, chunk.valid)
        k_tokens = cache.tokens
        if key_tokens is not None and key_tokens.valid is not None:
            valid = jnp.logical_and(key_tokens.valid, cache.held)
            k_tokens, rule = dataclasses.replace(key_tokens, valid=valid), rule & ValidKeys()
        elif key_tokens is not None:
            k_tokens = dataclasses.replace(key_tokens, valid=cache.held)
        k, v = cache.keys.swapaxes(1, 2), cache.values.swapaxes(1, 2)
        tokens = {"q_tokens": q_tokens, "k_tokens": k_tokens}
        return dataclasses.replace(call, k=k, v=v, **tokens, mask=rule, heads_first=True), cache

    def truncated(self, count: int | Int[ArrayLike, "#B"]) -> "Cache":
        """Return the cache with the first `count` tokens of every row only: after a draft was rejected.

        Args:
          count: Tokens to keep, for all rows or for each; rows that hold fewer keep what they hold.

        >>> cache = Cache.empty(batch=2, capacity=7, num_kv_heads=1, key_dim=1)
        >>> chunk = jnp.ones((2, 5, 1, 1))
        >>> cache.append(chunk, chunk).truncated(np.array([3, 6])).count.tolist()
        [3, 5]
        """
        forms = ((), (1,), self.count.shape)
        counts = integers(
            "count", count, forms, 0, 2**31 - 1, "It is how many tokens every row keeps."
        )
        # Traced counts cannot be looked at: one below 0 keeps nothing.
        kept = jnp.minimum(self.count, jnp.maximum(counts, 0))
        return dataclasses.replace(self, count=kept)

    def reorder(self, rows: Int[ArrayLike, "R"]) -> "Cache":
        """Return the cache of chosen rows, which may repeat: of the beams that survive a step.

        Args:
          rows: Indices of rows.

        Cost: a copy of the buffers.

        >>> Cache.empty(2, 7, num_kv_heads=1, key_dim=1).reorder(np.array([1, 1, 0])).keys.shape
        (3, 1, 7, 1)
        """
        hint = "They are the rows of the beams that survive; one that is not there would be another one."
        chosen = integers("rows", rows, ((None,),), 0, self.count.shape[0] - 1, hint)
        return jax.tree.map(lambda a: a[chosen], self)

    def _rows(self, queries: Tokens, chunk: Tokens) -> Int[Array, "B T"]:
        """Return the rows of queries: in self-attention those of their own tokens, else the next ones."""
        own = chunk.valid if queries.length == chunk.length else None
        return self.next_positions(queries.length, own)

    def positions(
        self,
        queries: Tokens,
        chunk: Tokens,
        query_tokens: Tokens | None = None,
        key_tokens: Tokens | None = None,
    ) -> tuple[Int[ArrayLike, "#B T"], Int[Array, "#B L"]]:
        """Return the positions of queries and of the keys of a chunk, as `extend` sees them.

        Args:
          queries, chunk: Tokens of the call, whose `valid` tells real ones.
          query_tokens, key_tokens: As for `extend`.
        """
        q = self._rows(queries, chunk) if query_tokens is None else query_tokens.positions
        k = self.next_positions(chunk.length, chunk.valid)
        if key_tokens is not None and key_tokens.pos is not None:
            slots = jnp.clip(k, 0, self.capacity - 1)
            rows = jnp.broadcast_to(jnp.asarray(key_tokens.pos), (k.shape[0], self.capacity))
            k = jnp.take_along_axis(rows, slots, axis=1)
        return q, k

    def check(self) -> "Cache":
        """Return the cache if no row has overflowed.

        On the host this reads the counts. In a traced function it is a
        `jax.experimental.checkify.check`, and the function must be transformed by
        `checkify.checkify`.

        Raises:
          ShapeError: If a row overflowed, naming it, or a count is negative. In a traced function, what
            `error.throw()` raises: `checkify.JaxRuntimeError` with the same text.

        >>> Cache.empty(batch=1, capacity=7, num_kv_heads=1, key_dim=1).check().capacity
        7
        """
        self._check_counts()
        row = jnp.argmax(self.count)
        count, capacity = self.count[row], jnp.asarray(self.capacity)
        if isinstance(self.count, jax.core.Tracer):
            fits = ~self.overflowed.any()
            checkify.check(fits, _OVERFLOW, row=row, count=count, capacity=capacity)
        elif self.overflowed.any():
            raise ShapeError(_OVERFLOW.format(row=row, count=count, capacity=capacity))
        return self

    def _check_counts(self) -> None:
        """Refuse counts below 0, where they are known."""
        if not isinstance(self.count, jax.core.Tracer) and (self.count < 0).any():
            raise ShapeError(
                "the counts of a cache are tokens that its rows were given, 0 or more: got "
                f"{np.asarray(self.count).tolist()}. Take what empty_cache or the call before returned."
            )

    def check_fits(
        self, batch: int, heads: int, key_dim: int, value_dim: int, dtype: DType
    ) -> None:
        """Refuse keys and values of other sizes or another dtype than the cache's.

        Raises:
          ShapeError: Naming both.
        """
        own = (*self.keys.shape[:2], self.keys.shape[3], self.values.shape[3])
        given = (batch, heads, key_dim, value_dim)
        if given != own:
            raise ShapeError(
                "the cache does not fit: keys and values have (batch, heads, key_dim, value_dim) = "
                f"{given}, the cache {own}. Make it by layer.empty_cache(batch, capacity) of the "
                "layer that fills it; the batch is all axes that are not attended."
            )
        if self.keys.dtype != dtype or self.values.dtype != dtype:
            raise ShapeError(
                f"the cache holds {self.keys.dtype}, keys and values are {jnp.dtype(dtype)}. "
                f"Make it with dtype={jnp.dtype(dtype).name!r}, or give the layer dtype="
                f"{self.keys.dtype.name!r}; nothing is cast in silence."
            )
