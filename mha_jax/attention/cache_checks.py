"""What a cache refuses, in words: sizes and dtypes that do not fit it, and reading what it no longer holds.

Y layers   B batch   C capacity   L tokens of a chunk   K key-value heads
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from mha_jax.attention.biases import apart
from mha_jax.attention.brief import is_here
from mha_jax.attention.call import Call
from mha_jax.attention.given import (
    dtype_of,
    floating,
    floats,
    integers,
    is_integer,
    native,
    shape_of,
    switch,
)
from mha_jax.attention.masks import Dense, Mask
from mha_jax.attention.rules import rules_of
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.types import Array, ArrayLike, Bool, DType

OVERFLOW = (
    "the cache overflowed: row {row} was given {count} tokens and holds at most {capacity}. "
    "Nothing was overwritten, the tokens past the end are missing. Make it larger, "
    "empty_cache(batch, capacity), or stop before."
)


def known(x: Any) -> np.ndarray | None:
    """Return numbers that can be read, also while a program is traced around them; else None."""
    return np.asarray(x) if is_here(x) else None


def symbolic(size: Any) -> bool:
    """Whether a size is one of a program to be exported, which nobody knows yet."""
    return is_symbolic_dim(size)


def sizes(**given: Any) -> None:
    """Refuse sizes of a new cache that are no positive integers."""
    for name, size in given.items():
        if not is_integer(size) or not 0 < size < 2**31:
            raise ShapeError(
                f"{name} of a cache must be a positive integer: got {size!r}. It is part of "
                "the buffers' shape, which no step changes."
            )


def stored(dtype: DType, rolling: Any) -> Any:
    """Return the dtype of a new cache's buffers.

    Raises:
      ShapeError: If keys and values cannot be stored in it, or `rolling` is no switch.
    """
    switch("rolling", rolling)
    wanted = (
        "a floating-point dtype, that of the computation, or 'int8' with a scale for every token"
    )
    return jnp.dtype(floating("dtype", dtype, wanted, (jnp.int8,)))


def layer(cache: Any, number: Any) -> Array:
    """Return the number of a layer.

    Raises:
      ShapeError: If the cache is that of one layer alone, or there is no such layer.
    """
    if cache.keys.ndim != 5:
        raise ShapeError(
            f"a cache of one layer has no others: got of_layer({number}) of keys {cache.keys.shape}. "
            "Make one for all layers, empty_cache(batch, capacity, layers=12) say."
        )
    hint = "They count from 0."
    return integers("layer", number, ((),), 0, cache.keys.shape[0] - 1, hint)


def one_layer(cache: Any) -> None:
    """Refuse the caches of several layers where one of them is meant."""
    if cache.layer is None and cache.keys.ndim != 4:
        raise ShapeError(
            f"these are the caches of {cache.keys.shape[0]} layers, keys {cache.keys.shape}: say which one, "
            "cache.of_layer(i); what comes out is for all of them again by .all_layers()."
        )


def flags(cache: Any, valid: ArrayLike, length: int) -> Bool[Array, "#B L"]:
    """Return what says which tokens of a chunk are real.

    Raises:
      ShapeError: If they are no booleans, or not as many as there are tokens.
    """
    native("valid", valid)
    kind, shape = dtype_of(valid), shape_of(valid)
    batch = cache.count.shape[-1]
    if kind != jnp.bool_ or shape not in ((batch, length), (1, length)):
        got = f"{kind}{list(shape)}" if kind is not None else type(valid).__name__
        raise ShapeError(
            f"valid must hold a boolean for every token, [B, L] = {[batch, length]} or {[1, length]}: "
            f"got {got}. Of lengths, pass jnp.arange(L)[None] < lengths[:, None]; of numbers, valid != 0."
        )
    return jnp.asarray(valid)


def counts(cache: Any) -> None:
    """Refuse counts below 0, where they are known."""
    count = known(cache.count)
    if count is not None and (count < 0).any():
        raise ShapeError(
            "the counts of a cache are tokens that its rows were given, 0 or more: got "
            f"{count.tolist()}. Take what empty_cache or the call before returned."
        )


def chunk(cache: Any, keys: Any, values: Any) -> None:
    """Refuse keys and values that a cache cannot take."""
    shapes = shape_of(keys), shape_of(values)
    if len(shapes[0]) != 4 or shapes[0][:3] != shapes[1][:3]:
        raise ShapeError(
            f"a cache is given keys [B, L, K, H] and values [B, L, K, V]: got {shapes[0]} and "
            f"{shapes[1]}. Project them first; layer.apply(..., cache=cache) does."
        )
    for name, x in (("keys", keys), ("values", values)):
        floats(name, x)
    counts(cache)
    one_layer(cache)
    batch, _, heads, key_dim = keys.shape
    for x in (keys, values):
        fits(cache, batch, heads, key_dim, values.shape[-1], x.dtype)


def kept(cache: Any, count: Array) -> None:
    """Refuse to keep only tokens that a rolling cache no longer holds, where that is known."""
    if not cache.rolling:
        return
    left, oldest = known(count), known(cache.oldest)
    if left is None or oldest is None:
        return
    if ((left < oldest) & (oldest > 0)).any():
        raise ShapeError(
            f"truncated() to {left.tolist()} tokens leaves nothing of some row: a rolling cache "
            f"of capacity {cache.capacity} holds those from {oldest.tolist()} on. Keep "
            "more, or make it larger by the longest draft."
        )


def fits(cache: Any, batch: int, heads: int, key_dim: int, value_dim: int, dtype: DType) -> None:
    """Refuse keys and values of other sizes or another dtype than the cache's."""
    own = (*cache.keys.shape[-4:-2], cache.keys.shape[-1], cache.values.shape[-1])
    given = (batch, heads, key_dim, value_dim)
    if given != own:
        raise ShapeError(
            "the cache does not fit: keys and values have (batch, heads, key_dim, value_dim) = "
            f"{given}, the cache {own}. Make it by layer.empty_cache(batch, capacity) of the "
            "layer that fills it; the batch is all axes that are not attended."
        )
    if cache.key_scales is not None:
        return no_float64() if dtype == jnp.float64 else None
    if cache.keys.dtype != dtype or cache.values.dtype != dtype:
        raise ShapeError(
            f"the cache holds {cache.keys.dtype}, keys and values are {jnp.dtype(dtype)}. "
            f"Make it with dtype={jnp.dtype(dtype).name!r}, or give the layer dtype="
            f"{cache.keys.dtype.name!r}; nothing is cast in silence."
        )


def no_float64() -> None:
    """Refuse to round float64 to eight bits."""
    raise ShapeError(
        "the cache holds int8, keys and values are float64: eight bits keep two digits of fifteen. "
        "Make it with dtype='float64', or compute in float32."
    )


def window(behind: int, capacity: int) -> None:
    """Refuse a window that a rolling cache does not hold."""
    if behind + 1 > capacity:
        raise ShapeError(
            f"the mask sees {behind + 1} tokens, the query's own and {behind} before: a rolling cache of "
            f"capacity {capacity} holds fewer. Make it with capacity {behind + 1} or more."
        )


def overwrites(cache: Any, call: Call) -> bool:
    """Whether a chunk may overwrite what its own tokens see, in a rolling cache."""
    length = call.k_tokens.length
    return symbolic(length) or call.mask.behind + length > cache.capacity  # type: ignore[operator]


def scores(cache: Any, call: Call) -> None:
    """Refuse scores over slots where a chunk overwrites what its own tokens see."""
    if call.k.shape[1] != cache.capacity:
        raise ShapeError(
            "return_attention_scores are over the slots of the cache, and this chunk overwrites slots that "
            f"its own tokens see: a rolling cache of capacity {cache.capacity}. Pass the chunk in shorter "
            "pieces, one token say, or make the cache larger."
        )


def _over_keys(rule: Mask) -> bool:
    """Whether a rule holds an array over keys."""
    arrays = () if rule.holds_numbers else jax.tree.leaves(rule)
    return isinstance(rule, Dense) or any(np.shape(a)[-1:] not in ((), (1,)) for a in arrays)


def rolling(cache: Any, call: Call, key_tokens: Tokens | None) -> None:
    """Refuse what reads tokens that a rolling cache no longer holds, or counts on a slot for a token.

    Raises:
      ShapeError: If the mask looks further back than the capacity, or without a known limit; if, where it is
        known, the oldest token that it may see is gone; if anything is given over slots.
    """
    behind, capacity = call.mask.behind, cache.capacity
    if behind is None:
        raise ShapeError(
            f"a rolling cache holds the last {capacity} tokens, and the mask sees keys without a known "
            f"limit: got {call.mask}. Give the layer sliding_window={capacity} or less, or pass mask="
            f"Window({capacity - 1}, 0) & ..., which sees {capacity} tokens; for all tokens make a cache "
            "that does not roll."
        )
    window(behind, capacity)
    over_slots = {
        "key_tokens": key_tokens is not None,
        "a mask array": any(map(_over_keys, rules_of(call.mask))),
        "a bias array": call.bias is not None and bool(apart(call.bias)[0]),
    }
    for name, given in over_slots.items():
        if given:
            raise ShapeError(
                f"{name} would be over the slots of a rolling cache, whose tokens change with every step. "
                "Write a rule on positions: mj.Window, mj.ChunkedCausal, mj.biases, or a class of your own."
            )
    count, oldest = (known(cache.of_this_layer(x)) for x in (cache.count, cache.oldest))
    if count is not None and oldest is not None:
        needed = np.maximum(count - behind, 0)
        if oldest[row := int(np.argmax(oldest - needed))] > needed[row]:
            raise ShapeError(
                f"row {row} no longer holds the tokens from {int(needed[row])} on, which the mask sees: its "
                f"oldest is {int(oldest[row])}, after truncated(). Make a rolling cache larger by the "
                f"longest draft that may be rejected: its capacity is {capacity}, the mask sees {behind + 1} "
                "tokens."
            )
