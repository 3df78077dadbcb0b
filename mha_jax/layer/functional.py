"""The layer as pure functions of its parameters: five steps, no module.

B batch   T query length   S key length   N query heads   K key-value heads
D input width   E output width   H query-key head size   V value head size

Fold the attention axes, project, attend, combine, unfold. Sizes are read off the parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mha_jax.attention.cache import Cache, Held
from mha_jax.attention.call import Call
from mha_jax.attention.check import check_mask, mask_array
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.functions import attend, attention_scores
from mha_jax.attention.masks import Causal, Dense, Full, Mask, ValidKeys, ValidQueries, Window
from mha_jax.attention.tokens import Tokens, zero_invalid
from mha_jax.errors import ShapeError
from mha_jax.layer import axes, projections
from mha_jax.types import Array, ArrayLike, DType, Float, Params, Precision, PRNGKey


def init_params(
    rng: PRNGKey,
    query: Any,
    value: Any,
    key: Any = None,
    *,
    num_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    use_bias: bool = True,
    output_shape: int | tuple[int, ...] | None = None,
    use_gate: bool = False,
    num_kv_heads: int | None = None,
    kernel_initializer: Any = "glorot_uniform",
    bias_initializer: Any = "zeros",
    param_dtype: DType = jnp.float32,
) -> Params:
    """Draw the parameters of the layer.

    Args:
      rng: Key; every kernel is drawn from a key of its own.
      query, value, key: Inputs, or `jax.ShapeDtypeStruct`s: only their widths are read.
      num_heads, key_dim, ...: As for `MultiHeadAttention`.

    Returns:
      {"query": {"kernel": ..., "bias": ...}, "key": ..., "value": ..., "attention_output": ...} and
      "gate" if there is one.

    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> params["query"]["kernel"].shape
    (16, 4, 8)
    """
    output_shape = (output_shape,) if isinstance(output_shape, int) else output_shape
    shapes = projections.shapes(
        query.shape[-1],
        value.shape[-1],
        (value if key is None else key).shape[-1],
        num_heads=num_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        output_shape=output_shape,
        use_gate=use_gate,
        num_kv_heads=num_kv_heads,
    )
    keys = jax.random.split(rng, len(shapes))
    bias = bias_initializer if use_bias else None
    return {
        name: projections.init(k, shape, kernel_initializer, bias, param_dtype)
        for k, (name, shape) in zip(keys, shapes.items())
    }


def multi_head_attention(
    params: Params,
    query: Float[ArrayLike, "*axes D"],
    value: Float[ArrayLike, "*axes D2"] | None,
    key: Float[ArrayLike, "*axes D3"] | None = None,
    query_mask: ArrayLike | None = None,
    value_mask: ArrayLike | None = None,
    key_mask: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    return_attention_scores: bool = False,
    use_causal_mask: bool = False,
    *,
    mask: Mask | None = None,
    query_tokens: Tokens | None = None,
    key_tokens: Tokens | None = None,
    attention_axes: int | tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    dropout: Dropout | None = None,
    dtype: DType = None,
    precision: Precision = None,
    backend: Any = None,
    tap: Callable[[str, Array], Array] | None = None,
    cache: Cache | None = None,
) -> Any:
    """Apply the layer to inputs, given its parameters.

    Args:
      params: As `init_params` or `MultiHeadAttention.init` make them; sizes are read off them.
      query: Input of the queries, [B, T, D] or with more axes.
      value: Input of the values, equal to `query` in the axes that are not attended.
      key: Input of the keys, shaped like `value` but for its width; `value` if None.
      query_mask, value_mask, key_mask: Valid tokens, shaped like the input without its features.
      attention_mask: (batch axes, N, query axes, key axes), missing axes as in Keras.
      return_attention_scores: Also return the weights before dropout.
      use_causal_mask: Hide keys after the query, in the order of the folded axes.
      mask: A rule, combined with all of the above by "and".
      query_tokens, key_tokens: Positions and segments that `mask` reads, over the folded axes.
      attention_axes, sliding_window: As for `MultiHeadAttention`.
      dropout: `Dropout(key, rate)`, or None.
      dtype: Of the computation; that of inputs and parameters together if None.
      precision, backend: As for `dot_product_attention`.
      tap: Called with the name and the value of every projection; what it returns is used. It sees
        the projections of masked tokens too, which otherwise are zeroed before.
      cache: Keys and values of the tokens before, or None. Those of `value` are appended, then the
        queries attend to all that it holds; `value=None` appends nothing. Tokens that `value_mask`
        or `key_mask` marks False are not stored. A query stands at the position of its own token
        in self-attention (query and value equally long), at `cache.count` and after otherwise,
        or where `query_tokens` says. Masks and `key_tokens` are over the slots of the cache; slots
        that `key_tokens` call invalid are not seen.

    Returns:
      The output [<axes>, E], or (output, scores (batch axes, N, query axes, key axes)); with a
      cache, it comes last: (output, cache) or (output, scores, cache).

    Raises:
      ShapeError, UnsupportedError, WeightsError: With what was expected and how to fix it.

    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> multi_head_attention(params, x, x, use_causal_mask=True).shape
    (2, 5, 16)
    """
    projections.check_names(params)
    if cache is not None and value is None:
        value = _nothing(query, params, "value", attention_axes)
        key = _nothing(query, params, "key", attention_axes) if key is None else key
    key = value if key is None else key
    inputs = {"query": query, "value": value, "key": key}
    dtype = compute_dtype(inputs, params, dtype)
    query, value, key = jnp.asarray(query), jnp.asarray(value), jnp.asarray(key)
    if value.shape[:-1] != key.shape[:-1]:
        raise ShapeError(
            "value and key must agree in every axis but the features: got "
            f"value.shape={value.shape}, key.shape={key.shape}. The arguments of the layer are query, "
            "value, key, in this order."
        )
    if isinstance(attention_axes, int):
        attention_axes = (attention_axes,)
    q_fold, k_fold = axes.foldings(query, value, attention_axes)
    heads = params["query"]["kernel"].shape[1]

    rule = mask_of(use_causal_mask, sliding_window)
    if mask is not None:
        check_mask("mask", mask)
        rule = rule & mask
    q_tokens = query_tokens or Tokens(q_fold.length)
    k_tokens = key_tokens if key_tokens is not None and cache is None else Tokens(k_fold.length)
    if query_mask is not None:
        q_tokens, rule = _valid(q_tokens, q_fold, "query_mask", query_mask), rule & ValidQueries()
    for name, flags in (("value_mask", value_mask), ("key_mask", key_mask)):
        if flags is not None:
            k_tokens = _valid(k_tokens, k_fold, name, flags)
            rule = rule & ValidKeys() if cache is None else rule
    s_fold = k_fold if cache is None else _slots(q_fold, cache)
    if attention_mask is not None:
        rule = rule & Dense(axes.fold_mask(attention_mask, q_fold, s_fold, heads))
    if tap is None:
        seen_queries = q_tokens if rule.hides_invalid_queries else Tokens(q_fold.length)
        hidden = cache is not None or rule.hides_invalid_keys
        seen_keys = k_tokens if hidden else Tokens(k_fold.length)
    else:
        seen_queries, seen_keys = Tokens(q_fold.length), Tokens(k_fold.length)

    def project(name: str, x: Array) -> Array:
        y = projections.project(name, params, x, precision)
        return y if tap is None else tap(name, y)

    x_q = zero_invalid(q_fold.fold(query.astype(dtype)), seen_queries)
    x_v = zero_invalid(k_fold.fold(value.astype(dtype)), seen_keys)
    x_k = zero_invalid(k_fold.fold(key.astype(dtype)), seen_keys)
    call = Call(
        q=project("query", x_q),
        k=project("key", x_k),
        v=project("value", x_v),
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        mask=rule,
        dropout=dropout,
        precision=precision,
    )
    if cache is not None:
        call, cache = _through(cache, call, query_tokens, key_tokens)
    out, lse = attend(call, backend)
    if "gate" in params:
        gate = jax.nn.sigmoid(projections.project("gate", params, x_q, precision))
        out = out * (gate if tap is None else tap("gate", gate))
    out = projections.combine(params, out, precision)
    out = q_fold.unfold(out if tap is None else tap("attention_output", out))
    results: list[Any] = [out]
    if return_attention_scores:
        results.append(axes.unfold_scores(attention_scores(call, lse), q_fold, s_fold))
    if cache is not None:
        results.append(cache)
    return tuple(results) if len(results) > 1 else out


def _nothing(query: Any, params: Params, name: str, attention_axes: Any) -> Array:
    """Return an input of no tokens, as wide as the kernel `name` wants, beside a query."""
    query = jnp.asarray(query)
    attended = (attention_axes,) if isinstance(attention_axes, int) else attention_axes
    shape = list(query.shape)
    for axis in axes.resolve(attended, query.ndim):
        shape[axis] = 0
    return jnp.zeros((*shape[:-1], params[name]["kernel"].shape[0]), query.dtype)


def _slots(query: axes.Folding, cache: Cache) -> axes.Folding:
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
    shape = (*query.shape[:axis], cache.capacity, *query.shape[axis + 1 :])
    return axes.Folding(shape, query.attended)


def _through(
    cache: Cache, call: Call, query_tokens: Tokens | None, key_tokens: Tokens | None
) -> tuple[Call, Cache]:
    """Append the keys and values of a call; return it over all that is held, and the cache."""
    length, chunk = call.q.shape[1], call.k_tokens
    q_tokens, rule = call.q_tokens, call.mask & Held()
    if query_tokens is None:
        own = chunk.valid if length == chunk.length else None
        q_tokens = dataclasses.replace(q_tokens, index=cache.places(length, own))
    cache = cache.append(call.k, call.v, chunk.valid)
    k_tokens = cache.tokens
    if key_tokens is not None and key_tokens.valid is not None:
        valid = jnp.logical_and(key_tokens.valid, cache.held)
        k_tokens, rule = dataclasses.replace(key_tokens, valid=valid), rule & ValidKeys()
    elif key_tokens is not None:
        k_tokens = dataclasses.replace(key_tokens, valid=cache.held)
    return dataclasses.replace(
        call,
        k=cache.keys.swapaxes(1, 2),
        v=cache.values.swapaxes(1, 2),
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        mask=rule,
        heads_first=True,
    ), cache


def mask_of(use_causal_mask: bool, sliding_window: int | None) -> Mask:
    """Return the rule that Keras's two switches stand for."""
    rule: Mask = Causal() if use_causal_mask else Full()
    if sliding_window is not None:
        rule = rule & Window(sliding_window - 1, sliding_window - 1)
    return rule


def compute_dtype(inputs: dict[str, Any], params: Params, dtype: DType) -> Any:
    """Return the dtype of the computation.

    Raises:
      ShapeError: If an input is no array of floating-point numbers.
    """
    for name, x in inputs.items():
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            kind = f"dtype {x.dtype}" if hasattr(x, "dtype") else type(x).__name__
            raise ShapeError(
                f"{name} must be an array of floating-point numbers: got {kind}. "
                "Expected [B, length, features]; embed token ids first, cast anything else."
            )
    if dtype is not None:
        return jnp.dtype(dtype)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*inputs.values(), *jax.tree.leaves(params))


def _valid(tokens: Tokens, folding: axes.Folding, name: str, flags: ArrayLike) -> Tokens:
    """Return tokens that are valid only where `flags`, a mask over the input's axes, is True."""
    valid = folding.fold_flags(name, mask_array(flags))
    if tokens.valid is not None:
        valid = valid & tokens.valid
    return dataclasses.replace(tokens, valid=valid)
