"""The keys or values of a cache where they lie, read some slots at a time: rounded to eight bits, those of
one layer among several, or followed by tokens that are not stored yet.

Y layers   B batch   C capacity   L fresh tokens   K key-value heads   H head size

A block of slots is all that is ever turned into numbers of the computation: a whole cache is neither copied
nor widened.

Source: one scale for every token and head, symmetric, as in Dettmers et al. 2022, arXiv:2208.07339, sec. 3.1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from mha_jax.attention.masks import Mask, ValidKeys, pytree
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import UnsupportedError
from mha_jax.types import Array, Float, Int

_LARGEST = 127.0


@pytree
class Held(Mask):
    """A slot that holds no token is not seen: `ValidKeys` for buffers that are zero elsewhere.

    It does not say that it hides invalid keys, so that nobody zeroes, and thereby copies, them.
    """

    def visible(self, q, k):
        return ValidKeys().visible(q, k)

    def reach(self, q, k):
        return ValidKeys().reach(q, k)


@pytree
class Slots:
    """Keys or values of C slots and of L fresh tokens behind them, as an array [B, C + L, K, H].

    Args:
      numbers: [B, K, C, H], or [Y, B, K, C, H] with `layer`; floats, or int8 with `scales`.
      scales: What a token of a head is multiplied by, [B, K, C] or [Y, B, K, C]; None for floats.
      layer: Which of the Y layers.
      fresh: Tokens behind those of the slots, [B, L, K, H], or None.
      dtype: Of the computation that reads them.
    """

    numbers: Any
    scales: Any
    layer: Any
    fresh: Any
    dtype: Any = dataclasses.field(metadata={"static": True})

    ndim = 4

    @property
    def capacity(self) -> int:
        """Slots, C."""
        return self.numbers.shape[-2]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, C + L, K, H)."""
        batch, heads, capacity, size = self.numbers.shape[-4:]
        more = 0 if self.fresh is None else self.fresh.shape[1]
        return batch, capacity + more, heads, size

    def block(self, start: Any, size: int) -> Float[Array, "B S K H"]:
        """Return `size` slots from `start` on, a view of [B, K, size, H], in a dtype that loses nothing."""
        wide = jnp.float64 if self.dtype == jnp.float64 else jnp.float32
        block = _part(self.numbers, self.layer, start, size, -2).astype(wide)
        if self.scales is not None:
            block = block * _part(self.scales, self.layer, start, size, -1)[..., None].astype(wide)
        return block.swapaxes(1, 2)

    def of_heads(self, heads: Int[Any, "M"]) -> "Slots":
        """Return those of some heads."""
        axis = self.numbers.ndim - 3
        numbers = jnp.take(self.numbers, heads, axis)
        scales = None if self.scales is None else jnp.take(self.scales, heads, axis)
        fresh = None if self.fresh is None else self.fresh[:, :, heads]
        return dataclasses.replace(self, numbers=numbers, scales=scales, fresh=fresh)


def lying(cache: Any, dtype: Any, k: Any = None, v: Any = None) -> tuple[Any, Any]:
    """Return keys and values of a cache as a call takes them: views, or `Slots`, fresh ones behind."""
    if cache.layer is None and cache.key_scales is None and k is None:
        return cache.keys.swapaxes(1, 2), cache.values.swapaxes(1, 2)
    return (
        Slots(cache.keys, cache.key_scales, cache.layer, k, dtype),
        Slots(cache.values, cache.value_scales, cache.layer, v, dtype),
    )


def with_fresh(slots: Tokens, positions: Int[Array, "B L"], chunk: Tokens) -> Tokens:
    """Return the tokens of slots, and of a chunk behind them that is not stored yet, at their positions."""
    valid = True if chunk.valid is None else jnp.asarray(chunk.valid)
    valid = jnp.broadcast_to(valid, positions.shape)
    return Tokens(
        slots.length + chunk.length,
        index=jnp.concatenate([jnp.asarray(slots.index), positions], 1),
        valid=jnp.concatenate([jnp.asarray(slots.valid), valid], 1),
    )


def _part(x: Array, layer: Any, start: Any, size: int, axis: int) -> Array:
    """Return `size` entries of an axis of x, of one layer."""
    if layer is None and isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=x.ndim + axis)
    rows = x.shape[0] if layer is None else x.shape[1]
    x = x if layer is None else x.reshape(-1, *x.shape[2:])  # rows of one long batch: not turned
    begins, sizes = [jnp.int32(0)] * x.ndim, [rows, *x.shape[1:]]
    begins[0] = jnp.int32(0) if layer is None else layer * rows
    begins[axis], sizes[axis] = jnp.asarray(start, jnp.int32), size
    return jax.lax.dynamic_slice(x, begins, sizes)


@jax.custom_jvp
def rounded(x: Float[Array, "B L K H"]) -> tuple[Array, Array]:
    """Return int8 numbers and a float32 scale for every token and head; x is about their product.

    Raises:
      UnsupportedError: If it is differentiated, since rounding has no derivative.
    """
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), -1) / np.float32(_LARGEST)
    divisor = jnp.where(scales == 0, 1, scales)[..., None]
    return jnp.round(x / divisor).astype(jnp.int8), scales


def _rounded_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    if not isinstance(tangents[0], SymbolicZero):
        raise UnsupportedError(
            "keys and values that are stored as int8 have no gradient: rounding has none. Train with a cache "
            "of floats, or without one; to differentiate the queries alone, pass "
            "jax.lax.stop_gradient of keys and values."
        )
    numbers, scales = rounded(*primals)
    return (numbers, scales), (np.zeros(numbers.shape, jax.dtypes.float0), jnp.zeros_like(scales))


rounded.defjvp(_rounded_jvp, symbolic_zeros=True)


def as_stored(x: Float[Array, "B L K H"]) -> Float[Array, "B L K H"]:
    """Return what is read of tokens once they are rounded."""
    numbers, scales = rounded(x)
    return numbers.astype(jnp.float32) * scales[..., None]


def put(buffer: Array, layer: Any, slots: Int[Array, "B L"], tokens: Array) -> Array:
    """Write tokens [B, L, K, *H] into slots of their rows, of one layer; slots past the end are dropped.

    Args:
      buffer: [B, K, C, *H], or [Y, B, K, C, *H] with `layer`.
    """
    if slots.size == 1:
        # Of one token alone XLA makes a slice, which it writes for each reader, on a copy of the buffer.
        last = np.iinfo(np.int32).max
        slots = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=last)
        tokens = jnp.pad(tokens, ((0, 0), (0, 1), *[(0, 0)] * (tokens.ndim - 2)))

    if layer is not None:
        # Not mapped over the second axis, which would turn the buffer.
        rows = jnp.arange(buffer.shape[1], dtype=jnp.int32)[:, None]
        return buffer.at[layer, rows, :, slots].set(tokens, mode="drop")

    def of_row(row, slots, tokens):
        return row.at[:, slots].set(tokens.swapaxes(0, 1), mode="drop", unique_indices=True)

    return jax.vmap(of_row)(buffer, slots, tokens)
