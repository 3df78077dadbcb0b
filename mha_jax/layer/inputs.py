"""What a call of the layer is given: checked, as arrays, with the rule and the tokens that its masks mean."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mha_jax.attention.cache import Cache
from mha_jax.attention.check import check_mask, check_tokens
from mha_jax.attention.masks import Causal, Full, Mask, ValidKeys, ValidQueries, Window
from mha_jax.attention.rules import reads_segments
from mha_jax.attention.tokens import Tokens, zero_invalid
from mha_jax.errors import ShapeError
from mha_jax.layer import axes, checks
from mha_jax.layer.arguments import Arguments
from mha_jax.types import Array, ArrayLike, Flags


class Inputs(NamedTuple):
    """What a call of the layer is given, as the caller wrote it."""

    query: Any
    value: Any
    key: Any = None
    query_mask: Flags | None = None
    value_mask: Flags | None = None
    key_mask: Flags | None = None
    attention_mask: ArrayLike | None = None
    return_attention_scores: bool = False
    use_causal_mask: bool = False
    mask: Mask | None = None
    query_tokens: Tokens | None = None
    key_tokens: Tokens | None = None
    cache: Cache | None = None
    bias: Any = None
    on_projection: Callable[[str, Array], Array] | None = None


def checked_inputs(
    layer: Arguments, inputs: Inputs, widths: tuple[int, int, int], dtypes: tuple[Any, ...]
) -> Inputs:
    """Return inputs that can be meant, as arrays of the computation's dtype; those of no tokens for None.

    Args:
      widths: Of query, value and key.
      dtypes: Of the parameters.

    Raises:
      ShapeError: Naming the argument.
    """
    for name in ("use_causal_mask", "return_attention_scores"):
        checks.switch(name, getattr(inputs, name))
    checks.function_or_none("on_projection", inputs.on_projection)
    q, v, k, mask, cache = inputs.query, inputs.value, inputs.key, inputs.mask, inputs.cache
    if cache is not None and not isinstance(cache, Cache):
        raise ShapeError(
            f"cache must be a Cache or None: got {type(cache).__name__}. Pass what "
            "layer.empty_cache(batch, capacity) or the call before returned."
        )
    query = axes.as_input("query", q)
    if cache is not None and v is None:
        v = axes.nothing(query, layer.attention_axes, widths[1])
        k = axes.nothing(query, layer.attention_axes, widths[2]) if k is None else k
    value = query if v is q else axes.as_input("value", v)
    key = value if k is None or k is v else axes.as_input("key", k)
    if value.shape[:-1] != key.shape[:-1]:
        raise ShapeError(
            "value and key must agree in every axis but the features: got "
            f"value.shape={value.shape}, key.shape={key.shape}. The arguments of the layer are query, "
            "value, key, in this order."
        )
    for name in ("query_tokens", "key_tokens"):
        check_tokens(name, getattr(inputs, name))
    tokens = inputs.query_tokens
    packed = tokens is not None and tokens.segment is not None and inputs.key_tokens is None
    if mask is not None:
        check_mask("mask", mask)
        if packed and key is value is query and cache is None and reads_segments(mask):
            inputs = inputs._replace(key_tokens=tokens)
    with jax.numpy_dtype_promotion("standard"):
        found = {query.dtype, value.dtype, key.dtype, *dtypes}
        try:
            dtype = jnp.dtype(layer.dtype or jnp.result_type(*found))
        except ValueError as error:
            raise ShapeError(
                "query, value, key and the parameters must have dtypes that JAX promotes to one: got "
                f"{', '.join(sorted(map(str, found)))}. Give the layer dtype='bfloat16', say, to compute in."
            ) from error
    query, cast = (x if x.dtype == dtype else x.astype(dtype) for x in (query, value))
    return inputs._replace(query=query, value=cast, key=cast if key is value else key.astype(dtype))


def rule_and_tokens(
    layer: Arguments, inputs: Inputs, q_fold: axes.Folding, k_fold: axes.Folding
) -> tuple[Mask, Tokens, Tokens]:
    """Return the rule and the tokens of a call, all masks but `attention_mask` taken together."""
    rule: Mask = Causal() if inputs.use_causal_mask else Full()
    if layer.sliding_window is not None:
        rule = rule & Window(layer.sliding_window - 1, layer.sliding_window - 1)
    if inputs.mask is not None:
        rule = rule & inputs.mask
    cached = inputs.cache is not None
    q_tokens = inputs.query_tokens or Tokens(q_fold.length)
    k_tokens = inputs.key_tokens
    k_tokens = Tokens(k_fold.length) if k_tokens is None or cached else k_tokens
    if inputs.query_mask is not None:
        q_tokens = _valid(q_tokens, q_fold, "query_mask", inputs.query_mask)
        rule = rule & ValidQueries()
    for name in ("value_mask", "key_mask"):
        if (flags := getattr(inputs, name)) is not None:
            k_tokens = _valid(k_tokens, k_fold, name, flags)
            rule = rule if cached else rule & ValidKeys()
    return rule, q_tokens, k_tokens


def positions(inputs: Inputs, q_tokens: Tokens, k_tokens: Tokens) -> tuple[Any, Any]:
    """Return the positions at which queries and keys are turned: those of their tokens."""
    if inputs.cache is None:
        return q_tokens.positions, k_tokens.positions
    return inputs.cache.positions(q_tokens, k_tokens, inputs.query_tokens, inputs.key_tokens)


def _valid(tokens: Tokens, folding: axes.Folding, name: str, flags: Any) -> Tokens:
    """Return tokens that are valid only where `flags`, a mask over the input's axes, is True."""
    valid = folding.fold_flags(name, flags)
    if tokens.valid is not None:
        valid = valid & tokens.valid
    return dataclasses.replace(tokens, valid=valid)


def entering(x: Array, tokens: Tokens, hidden: bool, seen: bool) -> Array:
    """Return an input without what hidden tokens hold, so that NaN and Inf there reach no kernel's gradient.

    They are zero; where their projections are seen, as Keras's penalties do, only NaN and Inf are.
    """
    if not hidden or tokens.valid is None:
        return x
    zeroed = zero_invalid(x, tokens)
    return jnp.where(jnp.isfinite(x), x, zeroed) if seen else zeroed
