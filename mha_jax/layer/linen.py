"""MultiHeadAttention as a flax.linen module: parameters, streams and losses around the pure
functions.

B batch   T query length   S key length   N query heads   K key-value heads
D input width   E output width   H query-key head size   V value head size
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import Never

from mha_jax.attention.biases import Bias
from mha_jax.attention.cache import Cache
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.layer import (
    axes,
    checks,
    constraints,
    initializers,
    penalties,
    projections,
    vectors,
)
from mha_jax.layer.arguments import FIELDS, IN_THE_CONSTRUCTOR, Arguments, closed, documented
from mha_jax.layer.functional import Inputs, Weights, attend_layer
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


class Vector(nn.Module):
    """A norm's scale or the sinks' logits: one parameter of one axis."""

    kind: vectors.Vector
    param_dtype: DType

    @nn.compact
    def __call__(self) -> Any:
        if self.is_initializing():
            return self.param(self.kind.part, lambda rng: self.kind.init(self.param_dtype))
        params = nn.meta.unbox(self.variables.get("params", {}))
        return vectors.stored({self.name: params}, str(self.name), self.kind)


@documented
class MultiHeadAttention(Arguments, nn.Module):
    """Keras's MultiHeadAttention: the same arguments, numbers and weights.

    The parameters are {"query" | "key" | "value" | "attention_output" | "gate": {"kernel",
    "bias"}}, with N (D + 1) H + K (D + 1) (H + V) + (N V + 1) E numbers for one input width D:
    `key_dim` is the size of one head, not of all heads together. Dropout takes the `"dropout"`
    stream, or with `seed` a key folded with a counter that the mutable collection `"dropout_state"`
    keeps. Regularization losses go to the collection `"losses"` when it is mutable.

    Args:
      As for `Arguments`.

    Raises:
      ShapeError: When made or called with values that cannot be right.
      ArgumentError: For an argument that there is not, with what may be meant.

    Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2; keras.layers.MultiHeadAttention 3.15;
      Qiu et al. 2025, arXiv:2505.06708 (the gate); Ainslie et al. 2023, arXiv:2305.13245 (fewer key
      heads).

    >>> layer = MultiHeadAttention(num_heads=4, key_dim=8)
    >>> x = jnp.ones((2, 5, 16))
    >>> variables = layer.init(jax.random.key(0), x, x)
    >>> layer.apply(variables, x, x, use_causal_mask=True).shape
    (2, 5, 16)
    """

    def __post_init__(self):
        Arguments.__post_init__(self)
        nn.Module.__post_init__(self)

    @nn.compact
    @closed
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
        bias: Bias | ArrayLike | None = None,
        **unknown: Never,
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
          bias: Added to the logits: a rule of `mj.biases`, or an array [T, S] or [B, N, T, S].

        Returns:
          The output [B, T, E], or (output, scores [B, N, T, S]); with a cache, it comes last.

        Raises:
          ShapeError, ArgumentError, UnsupportedError, WeightsError: With what was expected and how
            to fix it.
        """
        if unknown:
            checks.refuse_unknown(self.__call__, unknown, FIELDS, IN_THE_CONSTRUCTOR)
        if self.is_initializing() and value is None:
            raise ShapeError(
                "value=None reads a cache and tells no width: got it while initialising. "
                "Initialise with the inputs of a first call, layer.init(rng, query, value)."
            )
        inputs = Inputs(
            *(query, value, key, query_mask, value_mask, key_mask, attention_mask),
            *(
                return_attention_scores,
                use_causal_mask,
                mask,
                query_tokens,
                key_tokens,
                cache,
                bias,
            ),
        )
        training = checks.merged("training", self.training, training)
        projected = self._projections(inputs)
        params = nn.meta.unbox(self.variables.get("params", {}))
        observe = None
        if not self.is_initializing():
            projections.check_names(params)
            if self.is_mutable_collection("losses"):
                observe = self._sow_losses(params, query, value)
        kept = {
            name: Vector(kind, self.param_dtype, name=name)
            for name, kind in vectors.of(self).items()
        }
        weights = Weights.of(
            params,
            lambda name, x: projected[name](x),
            lambda name: kept[name](),
            self.param_dtype,
        )
        dropout = self._dropout() if training and self.dropout > 0 else None
        return attend_layer(self, weights, inputs, dropout, observe)

    def constrain(self, params: Params) -> Params:
        """Return the parameters with `kernel_constraint` and `bias_constraint` applied."""
        return constraints.constrain(
            params, kernel=self.kernel_constraint, bias=self.bias_constraint
        )

    def _projections(self, inputs: Inputs) -> dict[str, Projection]:
        """Return the projections; with shapes while initializing, without them later."""
        names = ["query", "key", "value", *(["gate"] if self.use_gate else []), "attention_output"]
        shapes: dict[str, Any] = dict.fromkeys(names)
        if self.is_initializing():
            shapes = self.shapes(*axes.widths(*inputs[:3]))
        made = {}
        for name in names:
            in_axes = 2 if name == "attention_output" else 1
            bias = self.bias_initializer if self.has_bias(name) else None
            drawn = self.kernel_initializer, bias, self.param_dtype, self.precision
            made[name] = Projection(in_axes, shapes[name], *drawn, name=name)
        return made

    def _dropout(self) -> Dropout:
        """Return the dropout of this call: from the stream, or from `seed` and a counter.

        Raises:
          ShapeError: If there is neither a stream nor a seed whose counter can be kept.
        """
        if self.has_rng("dropout") or (self.seed is None and self.is_initializing()):
            return Dropout(self.make_rng("dropout"), self.dropout)
        if self.seed is None:
            raise ShapeError(
                'dropout needs a key in training: no "dropout" stream was given. '
                'Pass rngs={"dropout": jax.random.key(0)} to apply, a new key for every step.'
            )
        if not self.is_mutable_collection("dropout_state"):
            raise ShapeError(
                f'with seed={self.seed} and no "dropout" stream the layer counts its calls in the '
                'collection "dropout_state", which is not mutable here. Pass mutable=["dropout_state"] to '
                'apply and feed the collection back, or pass rngs={"dropout": key}.'
            )
        count = self.variable("dropout_state", "count", lambda: jnp.zeros((), jnp.uint32))
        key = jax.random.fold_in(jax.random.key(self.seed), count.value)
        count.value = count.value + 1
        return Dropout(key, self.dropout)

    def _sow_losses(self, params: Params, query: Any, value: Any) -> Any:
        """Keep every weight's penalty, once however often the layer is called; watch the activities'."""
        for name, loss in penalties.of_weights(self, params):
            self.sow("losses", name, loss, lambda _, new: new, lambda: 0.0)
        if self.activity_regularizer is None:
            return None
        return penalties.of_activities(self, query, value, partial(self.sow, "losses"))
