"""Attention axes: fold any axes of an input into one sequence, and back.

An input is [<axes>, D]; the attended axes are folded, in the order given, into one of length T or S, all
others into one batch axis B. Causality, windows and positions then follow the folded, row-major order.
Masks are laid out as Keras lays out scores: (batch axes, N, query axes, key axes).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.fitted import mask_array
from mha_jax.attention.given import native
from mha_jax.errors import ShapeError
from mha_jax.types import Array, ArrayLike


def resolve(attention_axes: int | tuple[int, ...] | None, rank: int) -> tuple[int, ...]:
    """Return the attended axes as non-negative numbers.

    Args:
      attention_axes: Axes of the input, negative ones counted with the features included, as in Keras;
        None means all but the first and the features.
      rank: Rank of the input, features included. Rank 2 without axes is one unbatched sequence.

    Raises:
      ShapeError: If an axis is out of range, repeated, or the features' own.

    >>> resolve((-3, -2), 4)
    (1, 2)
    """
    if rank < 2:
        raise ShapeError(
            f"query, value and key must have at least 2 axes: got rank {rank}. "
            "Expected [B, T, D], or [T, D] for one sequence."
        )
    if attention_axes is None:
        return tuple(range(min(1, rank - 2), rank - 1))
    given = (attention_axes,) if isinstance(attention_axes, int) else attention_axes
    axes = tuple(axis + rank if axis < 0 else axis for axis in given)
    if any(not 0 <= axis < rank - 1 for axis in axes):
        raise ShapeError(
            f"attention_axes={attention_axes} do not fit an input of rank {rank}: each must be in "
            f"[0, {rank - 2}], or in [{-rank}, -2] counted from the end. The last axis holds the features."
        )
    if len(set(axes)) < len(axes) or not axes:
        raise ShapeError(
            f"attention_axes={attention_axes} must name at least one axis and each axis once; "
            f"for an input of rank {rank} they mean {axes}."
        )
    return axes


@dataclasses.dataclass(frozen=True)
class Folding:
    """How one input's axes fold: `shape` without the features, and which axes are attended.

    >>> folding = Folding((2, 3, 5), (1,))        # attend over the axis of length 3
    >>> folding.fold(jnp.ones((2, 3, 5, 7))).shape
    (10, 3, 7)
    >>> folding.unfold(jnp.ones((10, 3, 7))).shape
    (2, 3, 5, 7)
    """

    shape: tuple[int, ...]
    attended: tuple[int, ...]

    @property
    def batch_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.attended)

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the axes that are not attended."""
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def extent(self) -> tuple[int, ...]:
        """Sizes of the attended axes."""
        return tuple(self.shape[axis] for axis in self.attended)

    @property
    def length(self) -> int:
        return math.prod(self.extent)

    def fold(self, x: Array) -> Array:
        """Turn [<axes>, *rest] into [B, length, *rest]."""
        rest = x.shape[len(self.shape) :]
        shape = (math.prod(self.batch), self.length, *rest)
        x = _transposed(x, (*self.batch_axes, *self.attended))
        return x if x.shape == shape else x.reshape(shape)

    def unfold(self, y: Array) -> Array:
        """Turn [B, length, *rest] back into [<axes>, *rest]."""
        order = (*self.batch_axes, *self.attended)
        shape = (*self.batch, *self.extent, *y.shape[2:])
        y = y if y.shape == shape else y.reshape(shape)
        return _transposed(y, tuple(sorted(range(len(order)), key=order.__getitem__)))

    def fold_flags(self, name: str, flags: Any) -> Array:
        """Fold a padding mask over the input's axes, missing leading ones broadcast, to [B, length].

        Raises:
          ShapeError: If it does not broadcast to the input's shape without its features.
        """
        flags = mask_array(flags, name)
        if flags.ndim > len(self.shape) or any(
            x not in (1, y) for x, y in zip(flags.shape[::-1], self.shape[::-1])
        ):
            raise ShapeError(
                f"{name} of shape {flags.shape} does not fit: expected {self.shape}, the input's shape "
                "without its features; axes of 1 broadcast."
            )
        return self.fold(jnp.broadcast_to(flags, self.shape))


def _transposed(x: Array, order: tuple[int, ...]) -> Array:
    """Put the leading axes in order; the others stay."""
    if order == tuple(range(len(order))):
        return x
    return jnp.transpose(x, (*order, *range(len(order), x.ndim)))


def fold_mask(mask: ArrayLike, query: Folding, key: Folding, heads: int) -> Array:
    """Fold an attention mask (batch axes, N, query axes, key axes) to [#B, #N, #T, #S].

    Missing axes are inserted where Keras inserts them: before the query axes.

    Raises:
      ShapeError: If the mask does not broadcast to the scores.
    """
    mask = mask_array(mask, "attention_mask")
    groups = (query.batch, (heads,), query.extent, key.extent)
    shape = sum(groups, ())
    pairs = len(query.extent) + len(key.extent)
    first = max(mask.ndim - pairs, 0)
    missing = (1,) * (len(shape) - mask.ndim)
    whole = (*mask.shape[:first], *missing, *mask.shape[first:])
    if (
        mask.ndim < pairs
        or len(whole) != len(shape)
        or any(x not in (1, y) for x, y in zip(whole, shape))
    ):
        raise ShapeError(
            f"attention_mask of shape {mask.shape} does not fit scores of shape {shape}: expected "
            "(query axes, key axes), with the batch axes before them, and the heads between. "
            "Axes of 1 broadcast. A mask over keys alone goes into value_mask or key_mask."
        )
    own, wanted, at = [], [], 0
    for group in groups:
        part = whole[at : at + len(group)]
        at += len(group)
        sizes = (1,) * len(group) if set(part) <= {1} else group
        wanted.extend(sizes)
        own.append(math.prod(sizes))
    return jnp.broadcast_to(mask.reshape(whole), wanted).reshape(own)


def unfold_scores(scores: Array, query: Folding, key: Folding) -> Array:
    """Turn [B, N, T, S] into (batch axes, N, query axes, key axes)."""
    return scores.reshape(*query.batch, scores.shape[1], *query.extent, *key.extent)


def foldings(
    query: jax.Array, value: jax.Array, attention_axes: int | tuple[int, ...] | None
) -> tuple[Folding, Folding]:
    """Return the foldings of query and value (and key).

    Raises:
      ShapeError: If their ranks differ or an axis that is not attended has two sizes.
    """
    if query.ndim != value.ndim:
        raise ShapeError(
            f"query and value must have the same rank: got query.shape={query.shape}, "
            f"value.shape={value.shape}. Expected [B, T, D] and [B, S, D], or more axes on both."
        )
    axes = resolve(attention_axes, query.ndim)
    q, k = Folding(query.shape[:-1], axes), Folding(value.shape[:-1], axes)
    if q.batch != k.batch:
        once = all(n == m or 1 in (n, m) for n, m in zip(q.batch, k.batch))
        fix = (
            "Repeat what stands once along an axis: jnp.broadcast_to(x, shape)"
            if once
            else ("Name every axis along which they may differ in attention_axes")
        )
        raise ShapeError(
            f"query and value must agree on the axes that are not attended: got "
            f"query.shape={query.shape}, value.shape={value.shape} with attention over axes {axes}. {fix}."
        )
    return q, k


def slots(query: Folding, capacity: int) -> Folding:
    """Return the folding of the cached keys: that of the query, with the capacity as its length.

    Raises:
      ShapeError: If several axes are attended.
    """
    if len(query.attended) != 1:
        raise ShapeError(
            f"a cache grows along one axis: got attention over the axes {query.attended}. Attend over "
            "one axis, or call the layer without a cache."
        )
    (axis,) = query.attended
    shape = (*query.shape[:axis], capacity, *query.shape[axis + 1 :])
    return Folding(shape, query.attended)


def widths(query: Any, value: Any, key: Any = None) -> tuple[int, int, int]:
    """Return the widths of a layer's inputs, arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ShapeError: If one has no features.
    """
    key = value if key is None else key
    return _width("query", query), _width("value", value), _width("key", key)


def _width(name: str, x: Any) -> int:
    shape = getattr(x, "shape", None)
    if not isinstance(shape, tuple) or len(shape) < 2:
        got = f"shape {shape}" if isinstance(shape, tuple) else type(x).__name__
        raise ShapeError(
            f"{name} must be an array [B, length, features]: got {got}. Pass a NumPy or JAX array: "
            "jnp.asarray(x) of a list; add missing axes with x[None]."
        )
    return shape[-1]


def as_input(name: str, x: Any) -> Array:
    """Return an input as a JAX array.

    Raises:
      ShapeError: If it is no array of floating-point numbers with features.
    """
    _width(name, x)
    native(name, x)
    known = isinstance(x, (jax.Array, np.ndarray))
    if not known or not jnp.issubdtype(x.dtype, jnp.floating):
        kind = f"dtype {x.dtype}" if known else f"{type(x).__module__}.{type(x).__name__}"
        raise ShapeError(
            f"{name} must be an array of floating-point numbers: got {kind}. Expected [B, length, features] "
            "of NumPy or JAX; embed token ids first, cast or convert anything else. Of complex numbers pass "
            "real and imaginary parts as features, jnp.concatenate([x.real, x.imag], -1)."
        )
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def nothing(query: Array, attention_axes: int | tuple[int, ...] | None, width: int) -> Array:
    """Return an input of no tokens beside a query."""
    shape = list(query.shape)
    for axis in resolve(attention_axes, query.ndim):
        shape[axis] = 0
    return jnp.zeros((*shape[:-1], width), query.dtype)
