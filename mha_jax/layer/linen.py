"""MultiHeadAttention as a flax.linen module: parameters, streams and losses around the pure
functions.

B batch   T query length   S key length   N query heads   K key-value heads
D input width   E output width   H query-key head size   V value head size
"""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mha_jax.attention.cache import Cache
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.layer import arguments as config
from mha_jax.layer import constraints, initializers, projections
from mha_jax.layer.functional import Layer, Masks
from mha_jax.types import Array, ArrayLike, DType, Float, Params, Precision


class Projection(nn.Module):
    """One projection: its kernel and bias, and the product with them.

    Parameters are made when the layer is initialized, by a shape that its inputs tell, and later read as
    they are stored: what may be stored in their place (quantized, adapted) is used as it is.
    """

    in_axes: int
    shape: projections.KernelShape | None
    kernel_initializer: Any
    bias_initializer: Any | None
    param_dtype: DType
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return x [*L, *inputs] times the kernel, plus the bias, as [*L, *features]."""
        kernel = self._stored("kernel", self.kernel_initializer, self.in_axes)
        bias = self._stored("bias", self.bias_initializer, 0)
        return projections.product(str(self.name), kernel, bias, x, self.in_axes, self.precision)

    def _stored(self, part: str, initializer: Any, in_axes: int) -> Any:
        """Return a parameter, made now if the layer is being initialized; None for no bias."""
        if self.shape is not None and initializer is not None:
            shape = self.shape.kernel if part == "kernel" else self.shape.bias

            def draw(rng):
                return initializers.initialize(initializer, rng, shape, self.param_dtype, in_axes)

            return self.param(part, draw)
        if self.has_variable("params", part):
            return nn.meta.unbox(self.get_variable("params", part))
        return None


class MultiHeadAttention(nn.Module):
    """Keras's MultiHeadAttention: the same arguments, numbers and weights.

    The parameters are {"query" | "key" | "value" | "attention_output" | "gate": {"kernel",
    "bias"}}, with N (D + 1) H + K (D + 1) (H + V) + (N V + 1) E numbers for one input width D:
    `key_dim` is the size of one head, not of all heads together. Dropout takes the `"dropout"`
    stream, or with `seed` a key folded with a counter that the mutable collection `"dropout_state"`
    keeps. Regularization losses go to the collection `"losses"` when it is mutable.

    Args:
      num_heads: Query heads N.
      key_dim: Size H of a query and key head.
      value_dim: Size V of a value head; `key_dim` if None.
      dropout: Share of the attention weights to drop in training, in [0, 1).
      use_bias: Whether the projections add biases.
      output_shape: Features of the output, an int or a tuple; those of `query` if None.
      attention_axes: Axes of the input to attend over, an int or a tuple; negative ones count with
        the features included. None: all axes but the first and the features.
      sliding_window: Keys on each side, oneself included, that a query may see: |i - j| <
        sliding_window.
      kernel_initializer, bias_initializer: Keras names, Keras configs, or JAX initializers.
      kernel_regularizer, bias_regularizer: Keras names, Keras configs, or functions array ->
        scalar.
      activity_regularizer: The same, applied to every projection's output, as in Keras.
      kernel_constraint, bias_constraint: Keras names, Keras configs, or functions array -> array;
        applied by `constrain`, or by the optax transformation `mha_jax.layer.constraints.as_optax`.
      use_gate: Whether to multiply the heads by a sigmoid of a further projection of `query`.
      seed: Of the dropout when no `"dropout"` stream is given.
      num_kv_heads: Key-value heads K, a divisor of `num_heads`; `num_heads` if None.
      backend: As for `mha_jax.attend`.
      training: Whether dropout acts; here or in the call, not in both. Unset means False.
      dtype: Of the computation; that of inputs and parameters together if None.
      param_dtype: Of the parameters.
      precision: Of the products, as for `jnp.einsum`.

    Raises:
      ShapeError: When made or called with values that cannot be right.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2; keras.layers.MultiHeadAttention 3.15;
      Qiu et al. 2025, arXiv:2505.06708 (the gate); Ainslie et al. 2023, arXiv:2305.13245 (fewer key
      heads).

    >>> layer = MultiHeadAttention(num_heads=4, key_dim=8)
    >>> x = jnp.ones((2, 5, 16))
    >>> variables = layer.init(jax.random.key(0), x, x)
    >>> layer.apply(variables, x, x, use_causal_mask=True).shape
    (2, 5, 16)
    """

    num_heads: int
    key_dim: int
    value_dim: int | None = None
    dropout: float = 0.0
    use_bias: bool = True
    output_shape: int | tuple[int, ...] | None = None
    attention_axes: int | tuple[int, ...] | None = None
    sliding_window: int | None = None
    kernel_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    kernel_regularizer: Any = None
    bias_regularizer: Any = None
    activity_regularizer: Any = None
    kernel_constraint: Any = None
    bias_constraint: Any = None
    use_gate: bool = False
    seed: int | None = None
    num_kv_heads: int | None = None
    backend: Any = None
    training: bool | None = None
    dtype: DType = None
    param_dtype: DType = jnp.float32
    precision: Precision = None

    def __new__(cls, *args, **kwargs):
        config.refuse_unknown_arguments(cls.__name__, cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self):
        for name, value in config.normalized(self).items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        query: Float[ArrayLike, "*axes D"],
        value: Float[ArrayLike, "*axes D2"] | None,
        key: Float[ArrayLike, "*axes D3"] | None = None,
        query_mask: ArrayLike | None = None,
        value_mask: ArrayLike | None = None,
        key_mask: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        mask: Mask | None = None,
        query_tokens: Tokens | None = None,
        key_tokens: Tokens | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Attend from `query` to `value`.

        Args:
          query, value, key: Inputs; `key` is `value` if None. The order is Keras's, not torch's.
          query_mask, value_mask, key_mask: True for real tokens, shaped like the input without its
            features.
          attention_mask: True where a query may attend to a key: [T, S], [B, T, S] or [B, N, T, S];
            with several attention axes (batch axes, N, query axes, key axes).
          return_attention_scores: Also return the weights before dropout.
          training: Whether dropout acts.
          use_causal_mask: Hide keys after the query.
          mask: A rule of `mha_jax.attention.masks`, combined with all of the above by "and".
          query_tokens, key_tokens: Positions and segments that `mask` reads.
          cache: What `empty_cache` or the call before returned: the tokens of `value` are appended,
            then `query` attends to all that it holds; `value=None` appends nothing.

        Returns:
          The output [B, T, E], or (output, scores [B, N, T, S]); with a cache, it comes last.

        Raises:
          ShapeError, UnsupportedError, WeightsError: With what was expected and how to fix it.
        """
        if self.is_initializing() and value is None:
            raise ShapeError(
                "value=None reads a cache and tells no width: got it while initialising. "
                "Initialise with the inputs of a first call, layer.init(rng, query, value)."
            )
        inputs = {"query": query, "value": value, "key": value if key is None else key}
        config.check_inputs(**{k: x for k, x in inputs.items() if x is not None or cache is None})
        training = config.merged("training", self.training, training)
        keep_losses = self.is_mutable_collection("losses") and not self.is_initializing()
        projected = self._projections(inputs)
        stored = nn.meta.unbox(self.variables.get("params", {}))
        if not self.is_initializing():
            projections.check_names(stored)
        if keep_losses:
            self._sow_weight_losses(stored)

        def penalize(name: str, x: Array) -> Array:
            # Keras divides by the first axis of the projection's input.
            source = value if name in ("key", "value") else query
            if source is None:
                return x  # nothing was projected
            examples = source.shape[0] if len(source.shape) > 2 else 1
            loss = self.activity_regularizer(x) / max(examples, 1)
            self.sow("losses", f"{name}_activity", loss)
            return x

        penalized = keep_losses and self.activity_regularizer is not None
        layer = Layer(
            project=lambda name, x: projected[name](x),
            widths=_widths(stored) if stored else (0, 0, 0),
            heads=self.num_heads,
            gated="gate" in projected,
            dtype=self.dtype,
            param_dtypes=_dtypes(stored) if stored else (jnp.dtype(self.param_dtype),),
            attention_axes=self.attention_axes,
            sliding_window=self.sliding_window,
            precision=self.precision,
            backend=self.backend,
            on_projection=penalize if penalized else None,
        )
        masks = Masks(query_mask, value_mask, key_mask, attention_mask, use_causal_mask, mask)
        dropout = self._dropout() if training and self.dropout > 0 else None
        tokens = query_tokens, key_tokens
        return layer(query, value, key, masks, tokens, dropout, cache, return_attention_scores)

    def empty_cache(self, batch: int, capacity: int, dtype: DType = None) -> Cache:
        """Return a cache for calls of this layer that holds nothing yet.

        Args:
          batch: Rows; all axes folded that are not attended.
          capacity: Tokens that a row can hold.
          dtype: Of the computation; the layer's `dtype` or else `param_dtype` if None.

        Raises:
          ShapeError: If a size is no positive integer.

        >>> layer = MultiHeadAttention(num_heads=4, key_dim=8)
        >>> x = jnp.ones((2, 5, 16))
        >>> variables = layer.init(jax.random.key(0), x, x)
        >>> cache = layer.empty_cache(batch=2, capacity=7)
        >>> y, cache = layer.apply(variables, x, x, use_causal_mask=True, cache=cache)
        >>> cache.count.tolist()
        [5, 5]
        """
        heads = self.num_kv_heads or self.num_heads
        dtype = dtype or self.dtype or self.param_dtype
        return Cache.empty(batch, capacity, heads, self.key_dim, self.value_dim, dtype)

    def constrain(self, params: Params) -> Params:
        """Return the parameters with `kernel_constraint` and `bias_constraint` applied."""
        return constraints.constrain(
            params, kernel=self.kernel_constraint, bias=self.bias_constraint
        )

    def get_config(self) -> dict[str, Any]:
        """Return every argument as plain JSON values; `from_config` reads them back."""
        return config.to_dict(self)

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> "MultiHeadAttention":
        """Make the layer from `get_config()`, ours or that of Keras's layer.

        Raises:
          WeightsError: If a key is unknown.
        """
        return cls(**config.from_dict(cls, values))

    def _projections(self, inputs: dict[str, Any]) -> dict[str, Projection]:
        """Return the projections; with shapes while initializing, without them later."""
        names = ["query", "key", "value", *(["gate"] if self.use_gate else []), "attention_output"]
        shapes: dict[str, Any] = dict.fromkeys(names)
        if self.is_initializing():
            widths = (inputs[name].shape[-1] for name in ("query", "value", "key"))
            shapes = projections.shapes(*widths, **config.sizes(self))
        bias = self.bias_initializer if self.use_bias else None
        made = self.kernel_initializer, bias, self.param_dtype, self.precision
        outputs = ("attention_output",)
        return {
            name: Projection(2 if name in outputs else 1, shapes[name], *made, name=name)
            for name in names
        }

    def _dropout(self) -> Dropout:
        """Return the dropout of this call: from the stream, or from `seed` and a counter."""
        if self.has_rng("dropout") or (self.seed is None and self.is_initializing()):
            return Dropout(self.make_rng("dropout"), self.dropout)
        config.require_seed(self.seed, self.is_mutable_collection("dropout_state"))
        count = self.variable("dropout_state", "count", lambda: jnp.zeros((), jnp.uint32))
        key = jax.random.fold_in(jax.random.key(self.seed), count.value)  # type: ignore[arg-type]
        count.value = count.value + 1
        return Dropout(key, self.dropout)

    def _sow_weight_losses(self, params: Params) -> None:
        """Keep every weight's penalty: once, however often the layer is called."""
        rules = {"kernel": self.kernel_regularizer, "bias": self.bias_regularizer}
        for name, weights in params.items():
            for part, weight in weights.items():
                if rules[part] is not None:
                    loss = rules[part](weight)
                    self.sow("losses", f"{name}_{part}", loss, lambda _, new: new, lambda: 0.0)


def _widths(params: Params) -> tuple[int, int, int]:
    query, value, key = (params[name]["kernel"].shape[0] for name in ("query", "value", "key"))
    return query, value, key


def _dtypes(params: Params) -> tuple[Any, ...]:
    return tuple(leaf.dtype for weights in params.values() for leaf in weights.values())


# `__new__` takes anything, to name what is wrong; what it should be given is what `__init__` takes.
_INIT = inspect.signature(MultiHeadAttention.__init__)
MultiHeadAttention.__signature__ = _INIT.replace(  # type: ignore[attr-defined]
    parameters=list(_INIT.parameters.values())[1:]
)
