"""The layer as pure functions of its parameters: five steps, no module.

B batch   T query length   S key length   N query heads   K key-value heads
D input width   E output width   H query-key head size   V value head size

Fold the attention axes, project, attend, combine, unfold. Sizes are read off the parameters.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.cache import Cache
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
    on_projection: Callable[[str, Array], Array] | None = None,
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
      on_projection: Called with the name and the value of every projection; what it returns is used: to
        rotate queries and keys, to normalize them, to look at them. It sees the projections of masked tokens
        too, which otherwise are zeroed before.
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
    params = unboxed(params)
    projections.check_names(params)

    def project(name: str, x: Array) -> Array:
        weights, in_axes = params[name], 2 if name == "attention_output" else 1
        return projections.product(
            name, weights["kernel"], weights.get("bias"), x, in_axes, precision
        )

    layer = Layer(
        project=project,
        widths=tuple(params[name]["kernel"].shape[0] for name in ("query", "value", "key")),
        heads=params["query"]["kernel"].shape[-2],
        gated="gate" in params,
        dtype=dtype,
        param_dtypes=tuple(leaf.dtype for leaf in jax.tree.leaves(params)),
        attention_axes=attention_axes,
        sliding_window=sliding_window,
        precision=precision,
        backend=backend,
        on_projection=on_projection,
    )
    masks = Masks(query_mask, value_mask, key_mask, attention_mask, use_causal_mask, mask)
    tokens = query_tokens, key_tokens
    return layer(query, value, key, masks, tokens, dropout, cache, return_attention_scores)


class Masks(NamedTuple):
    """What a call says of who may attend to whom."""

    query: ArrayLike | None = None
    value: ArrayLike | None = None
    key: ArrayLike | None = None
    attention: ArrayLike | None = None
    causal: bool = False
    rule: Mask | None = None


@dataclasses.dataclass(frozen=True)
class Layer:
    """The layer's steps around its projections, whoever owns their kernels.

    Args:
      project: Called with a projection's name and its input.
      widths: Of query, value and key.
      heads: Query heads N.
      gated: Whether there is a gate.
      dtype: Of the computation; that of inputs and parameters together if None.
      param_dtypes: Of the parameters.
      attention_axes, sliding_window, precision, backend, on_projection: As for `multi_head_attention`.
    """

    project: Callable[[str, Array], Array]
    widths: tuple[int, int, int]
    heads: int
    gated: bool = False
    dtype: DType = None
    param_dtypes: tuple[Any, ...] = ()
    attention_axes: int | tuple[int, ...] | None = None
    sliding_window: int | None = None
    precision: Precision = None
    backend: Any = None
    on_projection: Callable[[str, Array], Array] | None = None

    def __call__(
        self,
        query: Any,
        value: Any,
        key: Any,
        masks: Masks,
        tokens: tuple[Tokens | None, Tokens | None] = (None, None),
        dropout: Dropout | None = None,
        cache: Cache | None = None,
        return_attention_scores: bool = False,
    ) -> Any:
        for name, given in (
            ("use_causal_mask", masks.causal),
            ("return_attention_scores", return_attention_scores),
        ):
            check_switch(name, given)
        if cache is not None and not isinstance(cache, Cache):
            raise ShapeError(
                f"cache must be a Cache or None: got {type(cache).__name__}. Pass what "
                "layer.empty_cache(batch, capacity) or the call before returned."
            )
        if cache is not None and value is None:
            value = self._nothing(query, self.widths[1])
            key = self._nothing(query, self.widths[2]) if key is None else key
        key = value if key is None else key
        dtype = compute_dtype({"query": query, "value": value, "key": key}, self)
        query, value, key = (jnp.asarray(x) for x in (query, value, key))
        if value.shape[:-1] != key.shape[:-1]:
            raise ShapeError(
                "value and key must agree in every axis but the features: got "
                f"value.shape={value.shape}, key.shape={key.shape}. The arguments of the layer are query, "
                "value, key, in this order."
            )
        attended = (
            (self.attention_axes,) if isinstance(self.attention_axes, int) else self.attention_axes
        )
        q_fold, k_fold = axes.foldings(query, value, attended)
        s_fold = k_fold if cache is None else _slots(q_fold, cache)
        rule, q_tokens, k_tokens = self._seen(masks, tokens, q_fold, k_fold, s_fold, cache)

        # Zeroed here as after the projections, unless somebody looks at them, as Keras's penalties do.
        zeroed = self.on_projection is None
        shown = _hidden(q_tokens, zeroed and rule.hides_invalid_queries)
        read = _hidden(k_tokens, zeroed and (cache is not None or rule.hides_invalid_keys))
        x_q = zero_invalid(q_fold.fold(query.astype(dtype)), shown)
        x_v = zero_invalid(k_fold.fold(value.astype(dtype)), read)
        x_k = x_v if key is value else zero_invalid(k_fold.fold(key.astype(dtype)), read)
        call = Call(
            q=self._projected("query", x_q),
            k=self._projected("key", x_k),
            v=self._projected("value", x_v),
            q_tokens=q_tokens,
            k_tokens=k_tokens,
            mask=rule,
            dropout=dropout,
            precision=self.precision,
        )
        if cache is not None:
            call, cache = cache.extend(call, *tokens)
        out, lse = attend(call, self.backend)
        if self.gated:
            gate = jax.nn.sigmoid(self.project("gate", x_q))
            out = out * (gate if self.on_projection is None else self.on_projection("gate", gate))
        results: list[Any] = [q_fold.unfold(self._projected("attention_output", out))]
        if return_attention_scores:
            results.append(axes.unfold_scores(attention_scores(call, lse), q_fold, s_fold))
        if cache is not None:
            results.append(cache)
        return tuple(results) if len(results) > 1 else results[0]

    def _projected(self, name: str, x: Array) -> Array:
        y = self.project(name, x)
        return y if self.on_projection is None else self.on_projection(name, y)

    def _seen(
        self,
        masks: Masks,
        tokens: tuple[Tokens | None, Tokens | None],
        q_fold: axes.Folding,
        k_fold: axes.Folding,
        s_fold: axes.Folding,
        cache: Cache | None,
    ) -> tuple[Mask, Tokens, Tokens]:
        """Return the rule and the tokens of a call, all masks taken together."""
        rule = mask_of(masks.causal, self.sliding_window)
        if masks.rule is not None:
            check_mask("mask", masks.rule)
            rule = rule & masks.rule
        query_tokens, key_tokens = tokens
        q_tokens = query_tokens or Tokens(q_fold.length)
        k_tokens = key_tokens if key_tokens is not None and cache is None else Tokens(k_fold.length)
        if masks.query is not None:
            q_tokens = _valid(q_tokens, q_fold, "query_mask", masks.query)
            rule = rule & ValidQueries()
        for name, flags in (("value_mask", masks.value), ("key_mask", masks.key)):
            if flags is not None:
                k_tokens = _valid(k_tokens, k_fold, name, flags)
                rule = rule & ValidKeys() if cache is None else rule
        if masks.attention is not None:
            rule = rule & Dense(axes.fold_mask(masks.attention, q_fold, s_fold, self.heads))
        return rule, q_tokens, k_tokens

    def _nothing(self, query: Any, width: int) -> Array:
        """Return an input of no tokens beside a query."""
        query = jnp.asarray(query)
        attended = (
            (self.attention_axes,) if isinstance(self.attention_axes, int) else self.attention_axes
        )
        shape = list(query.shape)
        for axis in axes.resolve(attended, query.ndim):
            shape[axis] = 0
        return jnp.zeros((*shape[:-1], width), query.dtype)


def unboxed(params: Params) -> Params:
    """Return parameters without the boxes of Flax's partitioning metadata."""
    return nn.meta.unbox(params)


def check_switch(name: str, value: Any) -> None:
    """Refuse what is no switch.

    Raises:
      ShapeError: If it is traced, or neither True nor False.
    """
    if isinstance(value, jax.core.Tracer):
        raise ShapeError(
            f"{name} must be True or False while tracing: got a traced value. "
            f"Mark it static (jax.jit(..., static_argnames='{name}'))."
        )
    if not isinstance(value, (bool, np.bool_)):
        raise ShapeError(f"{name} must be True or False: got {value!r}.")


def _hidden(tokens: Tokens, hides: bool) -> Tokens:
    """Return tokens whose validity counts only where invalid ones are surely not seen."""
    return tokens if hides else Tokens(tokens.length)


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


def mask_of(use_causal_mask: bool, sliding_window: int | None) -> Mask:
    """Return the rule that Keras's two switches stand for."""
    rule: Mask = Causal() if use_causal_mask else Full()
    if sliding_window is not None:
        rule = rule & Window(sliding_window - 1, sliding_window - 1)
    return rule


def compute_dtype(inputs: dict[str, Any], layer: Layer) -> Any:
    """Return the dtype of the computation.

    Raises:
      ShapeError: If an input is no array of floating-point numbers.
    """
    for name, x in inputs.items():
        if not isinstance(x, (jax.Array, np.ndarray)) or not jnp.issubdtype(x.dtype, jnp.floating):
            known = isinstance(x, (jax.Array, np.ndarray))
            kind = f"dtype {x.dtype}" if known else f"{type(x).__module__}.{type(x).__name__}"
            raise ShapeError(
                f"{name} must be an array of floating-point numbers: got {kind}. "
                "Expected [B, length, features]; embed token ids first, cast anything else."
            )
    if layer.dtype is not None:
        return jnp.dtype(layer.dtype)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*inputs.values(), *layer.param_dtypes)


def _valid(tokens: Tokens, folding: axes.Folding, name: str, flags: ArrayLike) -> Tokens:
    """Return tokens that are valid only where `flags`, a mask over the input's axes, is True."""
    valid = folding.fold_flags(name, mask_array(flags))
    if tokens.valid is not None:
        valid = valid & tokens.valid
    return dataclasses.replace(tokens, valid=valid)
