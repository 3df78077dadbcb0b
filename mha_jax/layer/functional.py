"""The layer as pure functions of its parameters: five steps, no module.

B batch   T query length   S key length   N query heads   K key-value heads
D input width   E output width   H query-key head size   V value head size

Fold the attention axes, project, attend, combine, unfold. Sizes are read off the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mha_jax.attention import cache_checks, softmax
from mha_jax.attention.biases import Bias
from mha_jax.attention.cache import Cache
from mha_jax.attention.call import Call
from mha_jax.attention.check import Names
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.functions import attention_scores, checked
from mha_jax.attention.given import random_key
from mha_jax.attention.masks import Dense, Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.backends.sequence import Shards
from mha_jax.engine.run import run
from mha_jax.layer import axes, checks, fit, prepared, projections, vectors
from mha_jax.layer.arguments import (
    FIELDS,
    IN_A_CALL,
    IN_THE_PARAMETERS,
    OF_CALL,
    Arguments,
    shows,
)
from mha_jax.layer.called import as_function
from mha_jax.layer.inputs import Inputs, checked_inputs, entering, positions, rule_and_tokens
from mha_jax.types import Array, ArrayLike, DType, Flags, Float, Params, PRNGKey

_NAMES = Names(q_tokens="query_tokens", k_tokens="key_tokens")


@shows(*FIELDS)
def init_params(
    rng: PRNGKey,
    query: Any,
    value: Any,
    key: Any = None,
    *,
    num_heads: int,
    key_dim: int,
    **arguments: Any,
) -> Params:
    """Draw the parameters of the layer.

    Args:
      rng: Key; every kernel is drawn from a key of its own.
      query, value, key: Inputs, or `jax.ShapeDtypeStruct`s: only their widths are read.
      num_heads, key_dim, **arguments: As for `MultiHeadAttention`.

    Returns:
      {"query": {"kernel": ..., "bias": ...}, "key": ..., "value": ..., "attention_output": ...} and
      "gate", "query_norm", "key_norm", "sinks" if there are.

    Raises:
      ShapeError, ArgumentError, WeightsError: As `MultiHeadAttention`.

    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> params["query"]["kernel"].shape
    (16, 4, 8)
    """
    if not arguments.keys() <= FIELDS.keys():
        checks.refuse_unknown(init_params, arguments, Inputs._fields, IN_A_CALL)
    random_key("rng", rng)
    layer = Arguments(num_heads, key_dim, **arguments)
    checks.norm_made_by("flax.linen", nn.Module, layer.qk_norm)
    shapes = layer.shapes(*axes.widths(query, value, key))
    keys = jax.random.split(rng, len(shapes))
    params = {}
    for k, (name, shape) in zip(keys, shapes.items()):
        bias = layer.bias_initializer if layer.has_bias(name) else None
        made = layer.kernel_initializer, bias, layer.param_dtype
        params[name] = projections.init(k, shape, *made)
    return params | vectors.init(layer, rng)


@as_function
@shows(*OF_CALL)
def multi_head_attention(
    params: Params,
    query: Float[ArrayLike, "*queries D"],
    value: Float[ArrayLike, "*values D2"] | None,
    key: Float[ArrayLike, "*values D3"] | None = None,
    query_mask: Flags | None = None,
    value_mask: Flags | None = None,
    key_mask: Flags | None = None,
    attention_mask: ArrayLike | None = None,
    return_attention_scores: bool = False,
    use_causal_mask: bool = False,
    *,
    mask: Mask | None = None,
    query_tokens: Tokens | None = None,
    key_tokens: Tokens | None = None,
    cache: Cache | None = None,
    dropout: Dropout | None = None,
    bias: Bias | ArrayLike | None = None,
    on_projection: Callable[[str, Array], Array] | None = None,
    **arguments: Any,
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
      query_tokens, key_tokens: Positions and segments that `mask` reads, over the folded axes. With
        `SameSegment`, where `value` is `query`, its tokens stand for those of the keys.
      dropout: `Dropout(key, rate)`, or None.
      bias: Added to the logits: a rule of `mj.biases`, or an array over the folded axes, as for `Call`.
      on_projection: Called with the name and the value of every projection; what it returns is used: to
        rotate queries and keys, to normalize them, to look at them. It sees the projections of masked tokens
        too, of zeros where these hold NaN or Inf.
      cache: Keys and values of the tokens before, or None. Those of `value` are appended, then the
        queries attend to all that it holds; `value=None` appends nothing. Tokens that `value_mask`
        or `key_mask` marks False are not stored. A query stands at the position of its own token
        in self-attention (query and value equally long), at `cache.count` and after otherwise,
        or where `query_tokens` says. Masks and `key_tokens` are over the slots of the cache; slots
        that `key_tokens` call invalid are not seen.
      **arguments: Those of `MultiHeadAttention` that are no part of its parameters.

    Returns:
      The output [<axes>, E], or (output, scores (batch axes, N, query axes, key axes)); with a
      cache, it comes last: (output, cache) or (output, scores, cache).

    Raises:
      ShapeError, ArgumentError, UnsupportedError, WeightsError: With what was expected and how to fix it.

    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> multi_head_attention(params, x, x, use_causal_mask=True).shape
    (2, 5, 16)
    """
    if not arguments.keys() <= OF_CALL.keys():
        checks.refuse_unknown(multi_head_attention, arguments, FIELDS, IN_THE_PARAMETERS)
    params = nn.meta.unbox(params)
    projections.check_names(params)
    layer = Arguments.of(params, arguments)
    checks.norm_made_by("flax.linen", nn.Module, layer.qk_norm)
    params = fit.checked(layer, params)

    def project(name: str, x: Array) -> Array:
        own = params[name]
        return projections.product(name, own["kernel"], own.get("bias"), x, layer.precision)

    inputs = Inputs(
        *(query, value, key, query_mask, value_mask, key_mask, attention_mask),
        *(return_attention_scores, use_causal_mask, mask, query_tokens, key_tokens),
        *(cache, bias, on_projection),
    )
    kinds = vectors.of(layer)

    def beside(name: str, *x: Array) -> Any:
        if name in kinds:
            return vectors.stored(params, name, kinds[name])
        return layer.qk_norm(parent=None).apply({"params": params.get(name, {})}, *x)

    return attend_layer(layer, Weights.of(params, project, beside), inputs, dropout)


class Weights(NamedTuple):
    """What the layer's steps need of its parameters, whoever owns them."""

    project: Callable[[str, Array], Array]  # a projection's name and its input -> its output
    widths: tuple[int, int, int]  # of query, value and key
    dtypes: tuple[Any, ...]
    # The name of a norm or of the sinks -> what is stored; of a module's norm, and x -> x normalized.
    beside: Callable[..., Any]

    @classmethod
    def of(
        cls,
        params: Params,
        project: Callable[[str, Array], Array],
        beside: Callable[..., Any],
        dtype: DType = None,
    ) -> "Weights":
        """Return what parameters tell; where none are made yet, their dtype to be."""
        if not params:
            return cls(project, (0, 0, 0), (jnp.dtype(dtype),), beside)
        query, value, key = (params[name]["kernel"].shape[0] for name in ("query", "value", "key"))
        own = (weights for name, weights in params.items() if name not in vectors.NORMALIZED)
        dtypes = (leaf.dtype for weights in own for leaf in weights.values())
        return cls(project, (query, value, key), tuple(dtypes), beside)


def attend_layer(
    layer: Arguments,
    weights: Weights,
    inputs: Inputs,
    dropout: Dropout | None = None,
    observe: Callable[[str, Array], Array] | None = None,
) -> Any:
    """Take the layer's steps around its projections; see `multi_head_attention`.

    Args:
      observe: As `on_projection`, and before it: what is there to be watched is what the kernels gave.
    """
    given = checked_inputs(layer, inputs, weights.widths, weights.dtypes)
    query, value, key, cache = given.query, given.value, given.key, given.cache
    q_fold, k_fold = axes.foldings(query, value, layer.attention_axes)
    s_fold = k_fold if cache is None else axes.slots(q_fold, cache.capacity)
    rule, q_tokens, k_tokens = rule_and_tokens(layer, given, q_fold, k_fold)

    def project(name: str, x: Array) -> Array:
        y = weights.project(name, x)
        y = jax.nn.sigmoid(y) if name == "gate" else y
        for watch in watching:
            y = prepared.watched(name, y, watch(name, y))
        return y

    watching = [watch for watch in (observe, given.on_projection) if watch is not None]
    watched, hides = bool(watching), cache is not None or rule.hides_invalid_keys
    x_q = entering(q_fold.fold(query), q_tokens, rule.hides_invalid_queries, watched)
    x_v = entering(k_fold.fold(value), k_tokens, hides, watched)
    x_k = x_v if key is value else entering(k_fold.fold(key), k_tokens, hides, watched)
    q, k, v = project("query", x_q), project("key", x_k), project("value", x_v)
    q, k = prepared.normalized(layer.qk_norm, weights.beside, q, k)
    scale = layer.scale
    if layer.rotary is not None or callable(scale):
        sides = q_tokens, k_tokens
        if isinstance(layer.backend, Shards):  # shards in a shard_map of the caller's own
            sides = map(layer.backend.placed, sides)
        q, k, scale = prepared.placed(layer, q, k, positions(given, *sides))
    if given.attention_mask is not None:
        rule = rule & Dense(axes.fold_mask(given.attention_mask, q_fold, s_fold, q.shape[2]))
    call = Call(
        *(q, k, v, q_tokens, k_tokens, rule, given.bias, dropout),
        sinks=weights.beside("sinks") if layer.use_sinks else None,
        scale=scale,
        logit_cap=layer.logit_cap,
        precision=layer.precision,
    )
    if cache is not None:
        call, cache = cache.extend(call, given.query_tokens, given.key_tokens)
        if given.return_attention_scores:
            cache_checks.scores(cache, call)
    out, m, l = run(checked(call, _NAMES), layer.backend, call.sinks)
    if layer.use_gate:
        out = out * project("gate", x_q)
    results: list[Any] = [q_fold.unfold(project("attention_output", out))]
    if given.return_attention_scores:
        scores = attention_scores(call, softmax.logsumexp(m, l))
        results.append(axes.unfold_scores(scores, q_fold, s_fold))
    if cache is not None:
        results.append(cache)
    return tuple(results) if len(results) > 1 else results[0]
