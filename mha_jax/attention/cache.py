"""The key-value cache: projected keys and values of the tokens so far, to decode without redoing
them.

Y layers   B batch   C capacity   L tokens of a chunk   K key-value heads   H query-key head size
V value head size

Heads come before slots, so that the products of a step read a head's tokens in one piece. A row
stores its real tokens one after the other from slot 0, so that a token's slot is its position; rows
may stand at different counts. Nothing is ever overwritten: a token past the
capacity is not stored, yet counted, so that an overflow shows in the count for good. Masks do not
know the cache: cached keys bring their `Tokens`.

A rolling cache holds the last C tokens: a token's slot is its position modulo C, and masks know how
far back they look, less than C. Where a chunk would overwrite what its first tokens still see, they
attend to the slots as they were and to the chunk behind them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from mha_jax.attention import cache_checks as checks
from mha_jax.attention.call import Call
from mha_jax.attention.given import integer, integers
from mha_jax.attention.masks import ValidKeys, pytree
from mha_jax.attention.slots import Held, as_stored, lying, put, rounded, with_fresh
from mha_jax.attention.tokens import Tokens, consecutive
from mha_jax.errors import ShapeError
from mha_jax.types import Array, ArrayLike, Bool, DType, Float, Int, Size


@pytree
class Cache:
    """Keys and values of the tokens so far; a pytree, passed in and returned.

    Donate it to the jitted step (`donate_argnums`), or carry it through `lax.scan` or
    `lax.while_loop`, and the buffers are updated in place.

    Args:
      keys: Projected keys; zero where no token is.
      values: Projected values; zero where no token is.
      count: Tokens that every row was given; more than the capacity where a row overflowed, or rolls.
      oldest: Position of the first token that a row still holds; None in a cache that does not roll.
      key_scales, value_scales: What int8 keys and values are multiplied by; None where they are floats.
      layer: Which of Y layers this cache is, whose buffers lie in one array, or None; see `of_layer`.

    >>> cache = Cache.empty(batch=2, capacity=7, num_kv_heads=3, key_dim=4)
    >>> chunk = jnp.ones((2, 5, 3, 4))
    >>> cache = cache.append(chunk, chunk, valid=jnp.arange(5)[None] < jnp.array([[5], [2]]))
    >>> cache.count.tolist()
    [5, 2]
    """

    keys: Any  # [B, K, C, H], of several layers [Y, B, K, C, H]
    values: Any
    count: Any  # [B] or [Y, B]
    oldest: Any = None
    key_scales: Any = None
    value_scales: Any = None
    layer: Any = None

    @classmethod
    def empty(
        cls,
        batch: Size,
        capacity: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dtype: DType = jnp.float32,
        *,
        rolling: bool = False,
        layers: int | None = None,
    ) -> "Cache":
        """Return a cache that holds nothing; `MultiHeadAttention.empty_cache` knows the sizes.

        Args:
          batch: Rows B, all axes folded that are not attended.
          capacity: Tokens C that a row can hold.
          num_kv_heads: Key-value heads K.
          key_dim, value_dim: Sizes of a head; `value_dim` is `key_dim` if None.
          dtype: Of keys and values: that of the computation, or "int8", rounded with a scale for every
            token and head.
          rolling: Hold the last C tokens only, of a sequence without end.
          layers: Layers Y whose buffers are one array, for `of_layer`; None for a cache of one layer.

        Raises:
          ShapeError: If a size is no positive integer, or the dtype is neither floating-point nor int8.

        Cost: Y B C K (H + V) numbers; of int8, a byte each and 8 Y B C K for the scales.

        >>> Cache.empty(2, 7, num_kv_heads=3, key_dim=4, value_dim=5).values.shape
        (2, 3, 7, 5)
        """
        value_dim = key_dim if value_dim is None else value_dim
        more = {} if layers is None else {"layers": layers}
        own = {"batch": batch, "capacity": capacity, "num_kv_heads": num_kv_heads}
        checks.sizes(**own, key_dim=key_dim, value_dim=value_dim, **more)
        dtype, outer = checks.stored(dtype, rolling), () if layers is None else (layers,)
        heads = (*outer, batch, num_kv_heads, capacity)
        scales = [jnp.zeros(heads, jnp.float32) if dtype == jnp.int8 else None for _ in range(2)]
        return cls(
            jnp.zeros((*heads, key_dim), dtype),
            jnp.zeros((*heads, value_dim), dtype),
            jnp.zeros((*outer, batch), jnp.int32),
            jnp.zeros((*outer, batch), jnp.int32) if rolling else None,
            *scales,
        )

    def of_layer(self, layer: int | Int[ArrayLike, ""]) -> "Cache":
        """Return the cache of one layer, whose steps read and write the buffers of all layers in place.

        So `lax.scan` over layers carries all their caches without copying any. `all_layers` goes back.

        Args:
          layer: A number from 0, traced or not.

        Raises:
          ShapeError: If the cache is that of one layer alone, or there is no such layer.

        >>> caches = Cache.empty(2, 7, num_kv_heads=1, key_dim=1, layers=3)
        >>> chunk = jnp.ones((2, 5, 1, 1))
        >>> caches.of_layer(1).append(chunk, chunk).all_layers().count.tolist()
        [[0, 0], [5, 5], [0, 0]]
        """
        return dataclasses.replace(self, layer=checks.layer(self, layer))

    def all_layers(self) -> "Cache":
        """Return the caches of all layers that `of_layer` chose one of."""
        return dataclasses.replace(self, layer=None)

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold, C."""
        return self.keys.shape[-2]

    @property
    def rolling(self) -> bool:
        """Whether it holds the last tokens only."""
        return self.oldest is not None

    def of_this_layer(self, numbers: Array) -> Int[Array, "B"]:
        """Return the counts of this layer.

        Raises:
          ShapeError: If these are the caches of several layers.
        """
        checks.one_layer(self)
        return numbers if self.layer is None else numbers[self.layer]

    @property
    def positions_of_slots(self) -> Int[Array, "B C"]:
        """Positions of the tokens in all slots; below `oldest`, or past the count, where none is."""
        slots = jnp.arange(self.capacity, dtype=jnp.int32)[None]
        last = self.of_this_layer(self.count)[:, None] - 1
        if not self.rolling:
            return jnp.broadcast_to(slots, (last.shape[0], self.capacity))
        return last - (last - slots) % self.capacity

    @property
    def overflowed(self) -> Bool[Array, "*Y B"]:
        """True for rows that were given more tokens than they can hold; never False again."""
        return (self.count > self.capacity) & (not self.rolling)

    @property
    def held(self) -> Bool[Array, "B C"]:
        """True for the slots that hold a token."""
        positions = self.positions_of_slots
        if self.rolling:
            return positions >= self.of_this_layer(self.oldest)[:, None]
        return positions < self.of_this_layer(self.count)[:, None]

    @property
    def tokens(self) -> Tokens:
        """The tokens of all slots, as masks read them: valid where the row holds one."""
        index = self.positions_of_slots if self.rolling else None
        return Tokens(self.capacity, index=index, valid=self.held)

    def next_positions(
        self, length: int, valid: Bool[ArrayLike, "#B L"] | None = None
    ) -> Int[Array, "B L"]:
        """Return the positions of the next `length` tokens; those not valid take up no place.

        >>> cache = Cache.empty(batch=1, capacity=7, num_kv_heads=1, key_dim=1)
        >>> cache.next_positions(4, np.array([[False, True, True, False]])).tolist()
        [[-1, 0, 1, 1]]
        """
        if not checks.symbolic(length):
            integer("length", length, 0, 2**31 - 1, "It counts the tokens of a chunk.")
        if valid is None:
            steps = jnp.arange(length, dtype=jnp.int32)[None]
        else:
            steps = jnp.cumsum(checks.flags(self, valid, length), axis=1, dtype=jnp.int32) - 1
        return self.of_this_layer(self.count)[:, None] + steps

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
            A rolling cache keeps the last `capacity` of them.

        Raises:
          ShapeError: If sizes or dtypes differ from the cache's, or, where the counts are known
            (not traced) or the chunk is longer than the capacity, if a row overflows. A traced
            overflow raises nothing: see `check`.

        Cost: O(B L) slots written; in place inside a compiled program that owns the cache.
        """
        checks.chunk(self, keys, values)
        length = keys.shape[1]
        if length == 0:
            return self
        slots = self.next_positions(length, valid)
        if valid is None:
            if not self.rolling and not checks.symbolic(length) and length > self.capacity:
                raise ShapeError(
                    checks.OVERFLOW.format(row=0, count=length, capacity=self.capacity)
                )
            count, stored = self.of_this_layer(self.count) + length, None
        else:
            count, stored = slots[:, -1] + 1, checks.flags(self, valid, length)
        if self.rolling:
            last = slots >= count[:, None] - self.capacity
            stored = last if stored is None else stored & last
            slots = slots % self.capacity
        if stored is not None:
            # Slots that do not exist, one for each token: what is written there is dropped.
            nowhere = self.capacity + jnp.arange(length, dtype=jnp.int32)
            slots = jnp.where(stored, slots, nowhere[None])
        cache = self._with(slots, keys, values, count)
        return cache if checks.known(count) is None else cache.check()

    def _with(self, slots: Array, keys: ArrayLike, values: ArrayLike, count: Array) -> "Cache":
        """Return the cache with tokens written into slots, and new counts."""
        found: dict[str, Any] = {}
        for name, scales, x in (
            ("keys", "key_scales", jnp.asarray(keys)),
            ("values", "value_scales", jnp.asarray(values)),
        ):
            if getattr(self, scales) is not None:
                x, scale = rounded(x)
                found[scales] = put(getattr(self, scales), self.layer, slots, scale)
            found[name] = put(getattr(self, name), self.layer, slots, x)
        counts = {"count": count}
        if self.rolling:
            counts["oldest"] = jnp.maximum(self.of_this_layer(self.oldest), count - self.capacity)
        if self.layer is not None:
            counts = {n: getattr(self, n).at[self.layer].set(x) for n, x in counts.items()}
        return dataclasses.replace(self, **found, **counts)

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
        if self.rolling:
            checks.rolling(self, call, key_tokens)
        if query_tokens is None:
            q_tokens = dataclasses.replace(q_tokens, index=self._rows(q_tokens, chunk))
        cache = self.append(call.k, call.v, chunk.valid)
        seen, k_tokens, fresh = cache, cache.tokens, {}
        if self.rolling and checks.overwrites(self, call):
            # The chunk overwrites what its own tokens see: they see the slots before, and then the chunk.
            seen, fresh = self, {"k": call.k, "v": call.v}
            if self.key_scales is not None:  # as they will be stored, however the chunks are cut
                fresh = {name: as_stored(x) for name, x in fresh.items()}
            k_tokens = with_fresh(
                self.tokens, self.next_positions(chunk.length, chunk.valid), chunk
            )
        if key_tokens is not None and key_tokens.valid is not None:
            valid = jnp.logical_and(key_tokens.valid, cache.held)
            k_tokens, rule = dataclasses.replace(key_tokens, valid=valid), rule & ValidKeys()
        elif key_tokens is not None:
            k_tokens = dataclasses.replace(key_tokens, valid=cache.held)
        k, v = lying(seen, call.q.dtype, **fresh)
        tokens = {"q_tokens": q_tokens, "k_tokens": k_tokens}
        return dataclasses.replace(call, k=k, v=v, **tokens, mask=rule, heads_first=True), cache

    def truncated(self, count: int | Int[ArrayLike, "*#B"]) -> "Cache":
        """Return the cache with the first `count` tokens of every row only: after a draft was rejected.

        Args:
          count: Tokens to keep, for all rows or for each, in all layers that share the buffers; rows that
            hold fewer keep what they hold.

        Raises:
          ShapeError: If they are no counts, or a rolling cache holds none of the tokens to keep.

        >>> cache = Cache.empty(batch=2, capacity=7, num_kv_heads=1, key_dim=1)
        >>> chunk = jnp.ones((2, 5, 1, 1))
        >>> cache.append(chunk, chunk).truncated(np.array([3, 6])).count.tolist()
        [3, 5]
        """
        forms = tuple(dict.fromkeys(((), (1,), self.count.shape[-1:], self.count.shape)))
        counts = integers(
            "count", count, forms, 0, 2**31 - 1, "It is how many tokens every row keeps."
        )
        # Traced counts cannot be looked at: one below 0 keeps nothing.
        kept = jnp.broadcast_to(jnp.maximum(counts, 0), self.count.shape)
        kept = jnp.minimum(self.count, kept)
        checks.kept(self, kept)
        return dataclasses.replace(self, count=kept)

    def reorder(self, rows: Int[ArrayLike, "R"]) -> "Cache":
        """Return the cache of chosen rows, which may repeat: of the beams that survive a step.

        Args:
          rows: Indices of rows, in all layers that share the buffers.

        Cost: a copy of the buffers.

        >>> Cache.empty(2, 7, num_kv_heads=1, key_dim=1).reorder(np.array([1, 1, 0])).keys.shape
        (3, 1, 7, 1)
        """
        hint = "They are the rows of the beams that survive; one that is not there would be another one."
        batch = self.count.ndim - 1  # their axis, behind that of the layers
        chosen = integers("rows", rows, ((None,),), 0, self.count.shape[batch] - 1, hint)
        chosen = jax.tree.map(lambda a: a[(slice(None),) * batch + (chosen,)], self.all_layers())
        return dataclasses.replace(chosen, layer=self.layer)

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
        known = key_tokens is not None and consecutive(key_tokens, key_tokens)
        if key_tokens is not None and (key_tokens.start or not known):  # of slots
            slots = jnp.clip(k, 0, self.capacity - 1)
            rows = jnp.asarray(key_tokens.positions)
            rows = jnp.broadcast_to(rows, (k.shape[0], self.capacity))
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
        checks.counts(self)
        if self.rolling:
            return self
        read = checks.known(self.count)
        xp: Any = jnp if read is None else np
        counts = (self.count if read is None else read).reshape(-1)
        largest = xp.argmax(counts)
        row, count = largest % self.count.shape[-1], counts[largest]
        found = {"row": row, "count": count, "capacity": xp.asarray(self.capacity)}
        if read is None:
            checkify.check(~self.overflowed.any(), checks.OVERFLOW, **found)
        elif count > self.capacity:
            raise ShapeError(checks.OVERFLOW.format(**found))
        return self
