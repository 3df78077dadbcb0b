"""A call of projected queries, keys and values with a cache, as `dot_product_attention` takes it.

B batch   T query length   L tokens of a chunk   N query heads   K key-value heads
H query-key head size   V value head size
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.cache import Cache
from mha_jax.attention.call import Call
from mha_jax.attention.check import check_tokens
from mha_jax.attention.given import floats, shape_of
from mha_jax.attention.tokens import Tokens, zero_invalid
from mha_jax.errors import ShapeError


def extended(call: Call, cache: Cache) -> tuple[Call, Cache]:
    """Append the keys and values of a call to a cache; return the call over all that is held, and the cache.

    Raises:
      ShapeError: If the arguments do not fit each other, naming them.
    """
    if not isinstance(cache, Cache):
        raise ShapeError(
            f"cache must be a Cache or None: got {type(cache).__name__}. Pass what mj.Cache.empty(batch, "
            "capacity, num_kv_heads, key_dim) or the call before returned."
        )
    if not isinstance(call.q, (jax.Array, np.ndarray)) or call.q.ndim != 4:
        raise ShapeError(
            f"with a cache, query is an array [B, T, N, H] of one batch axis: got shape {shape_of(call.q)}. "
            "Fold the batch axes, or use jax.vmap over query, key, value and cache."
        )
    if (call.k is None) != (call.v is None):
        raise ShapeError(
            "key and value are appended together: got one of them as None. Pass both, or neither to read "
            "what the cache holds."
        )
    check_tokens("query_tokens", call.q_tokens)
    check_tokens("key_tokens", call.k_tokens)
    batch, length = call.q.shape[:2]
    of_slots, chunk = call.k_tokens, Tokens(0)
    if call.k is None:
        heads, key_dim, value_dim = (
            cache.keys.shape[-3],
            cache.keys.shape[-1],
            cache.values.shape[-1],
        )
        k, v = (jnp.zeros((batch, 0, heads, n), call.q.dtype) for n in (key_dim, value_dim))
    else:
        k, v = floats("key", call.k), floats("value", call.v)
        of_slots, chunk = None, _chunk(call.k_tokens, k)
        if k.ndim == v.ndim == 4:
            k, v = (zero_invalid(x, chunk) for x in (k, v))
    given, queries = call.q_tokens, call.q_tokens or Tokens(length)
    call = dataclasses.replace(call, k=k, v=v, q_tokens=queries, k_tokens=chunk)
    return cache.extend(call, given, of_slots)


def _chunk(tokens: Tokens | None, keys: jax.Array) -> Tokens:
    """Return the tokens of keys that are appended.

    Raises:
      ShapeError: If they are told anything but which of them are real.
    """
    length = keys.shape[1] if keys.ndim == 4 else 0
    if tokens is None:
        return Tokens(length)
    given = [name for name in ("index", "pos", "segment") if getattr(tokens, name) is not None]
    if given or tokens.start or tokens.length != length:
        raise ShapeError(
            "a cache stores keys at the positions behind those that it holds; of the keys that are appended, "
            f"key_tokens say which are real: got {given[0] if given else f'start={tokens.start}'} for "
            f"{tokens.length} of {length} tokens. Pass Tokens({length}, valid=...); positions and segments "
            "of slots go into a call with key=None, value=None after cache.append(keys, values)."
        )
    return tokens
