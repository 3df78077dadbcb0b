"""MultiHeadAttention as a flax.linen module: parameters, streams and losses around the pure
functions.

B batch   T query length   S key length   N query heads   K key-value heads
D input width   E output width   H query-key head size   V value head size
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Never

import flax.linen as nn
import jax
import jax.numpy as jnp

from mha_jax.attention.biases import Bias
from mha_jax.attention.cache import Cache
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError, WeightsError
from mha_jax.layer import (
    axes,
    checks,
    fit,
    penalties,
    projections,
    vectors,
)
from mha_jax.layer.arguments import FIELDS, IN_THE_CONSTRUCTOR, Arguments, closed, documented
from mha_jax.layer.called import as_linen
from mha_jax.layer.functional import Weights, attend_layer
from mha_jax.layer.inputs import Inputs
from mha_jax.types import Array, ArrayLike, DType, Flags, Float, Params, Precision


@dataclasses.dataclass(frozen=True)
class Made:
    """How the parameters of a projection are made; one field of its module, since each costs Flax time."""

    shape: projections.KernelShape
    kernel_initializer: Any
    bias_initializer: Any | None
    param_dtype: DType


class Projection(nn.Module):
    """One projection: its kernel and bias, and the product with them.

    Parameters are made when the layer is initialized, by a shape that its inputs tell, and later read as
    they are stored: what may be stored in their place (quantized, adapted) is used as it is.
    """

    made: Made | None
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return x [*L, *inputs] times the kernel, plus the bias, as [*L, *features]."""
        if self.made is not None:
            kernel, bias = _make(self, self.made)
        else:
            kernel, bias = (
                nn.meta.unbox(self.get_variable("params", part)) for part in ("kernel", "bias")
            )
        return projections.product(str(self.name), kernel, bias, x, self.precision)


# Functions, not methods: Flax wraps every method of a module, and each costs an eager call time.


def _make(module: Projection, made: Made) -> tuple[Any, Any | None]:
    """Draw and store a kernel, and a bias if there is one."""

    from mha_jax.layer import initializers

    def draw(rng, initializer, shape, in_axes):
        return initializers.initialize(initializer, rng, shape, made.param_dtype, in_axes)

    kernel = made.shape.kernel, made.shape.in_axes
    weights = [module.param("kernel", draw, made.kernel_initializer, *kernel)]
    if made.bias_initializer is not None:
        weights.append(module.param("bias", draw, made.bias_initializer, made.shape.bias, 0))
    return weights[0], weights[1] if len(weights) > 1 else None


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
        checks.norm_made_by("flax.linen", nn.Module, self.qk_norm)
        nn.Module.__post_init__(self)

    @as_linen
    @nn.compact
    @closed
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Float[ArrayLike, "*queries D"],
        value: Float[ArrayLike, "*values D2"] | None,
        key: Float[ArrayLike, "*values D3"] | None = None,
        query_mask: Flags | None = None,
        value_mask: Flags | None = None,
        key_mask: Flags | None = None,
        attention_mask: ArrayLike | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        mask: Mask | None = None,
        query_tokens: Tokens | None = None,
        key_tokens: Tokens | None = None,
        cache: Cache | None = None,
        bias: Bias | ArrayLike | None = None,
        *,
        on_projection: Callable[[str, Array], Array] | None = None,
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
          on_projection: Called with the name and the value of every projection; what it returns is used.

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
            *(return_attention_scores, use_causal_mask, mask, query_tokens, key_tokens),
            *(cache, bias, on_projection),
        )
        training = checks.merged("training", self.training, training)
        projected = _projections(self, inputs)
        stored = nn.meta.unbox(self.variables.get("params", {}))
        params = fit.own(stored)
        observe = None
        if not self.is_initializing():
            if not stored:
                raise WeightsError(
                    "the variables hold no parameters of this layer: got the collections "
                    f"{sorted(self.variables)}. Pass what layer.init(rng, query, value) returned, "
                    '{"params": ...}; of parameters alone, layer.apply({"params": params}, query, value).'
                )
            params = fit.checked(self, stored)
            if self.is_mutable_collection("losses"):
                observe = _sow_losses(self, params, query, value)
        kept: dict[str, Any] = {
            name: Vector(kind, self.param_dtype, name=name)
            for name, kind in vectors.of(self).items()
        }
        if vectors.of_modules(self.qk_norm):
            kept |= {name: self.qk_norm(name=name) for name in vectors.NORMALIZED}
        weights = Weights.of(
            params,
            lambda name, x: projected[name](x),
            lambda name, *x: kept[name](*x),
            self.param_dtype,
        )
        dropout = _dropout(self) if training and self.dropout > 0 else None
        return attend_layer(self, weights, inputs, dropout, observe)

    def constrain(self, params: Params) -> Params:
        """Return the parameters with `kernel_constraint` and `bias_constraint` applied."""
        from mha_jax.layer import constraints

        return constraints.constrain(
            params, kernel=self.kernel_constraint, bias=self.bias_constraint
        )


def _projections(layer: MultiHeadAttention, inputs: Inputs) -> dict[str, Projection]:
    """Return the projections; told how to make parameters while initializing, only then."""
    names = ["query", "key", "value", *(["gate"] if layer.use_gate else []), "attention_output"]
    made: dict[str, Made | None] = dict.fromkeys(names)
    if layer.is_initializing():
        for name, shape in layer.shapes(*axes.widths(*inputs[:3])).items():
            bias = layer.bias_initializer if layer.has_bias(name) else None
            made[name] = Made(shape, layer.kernel_initializer, bias, layer.param_dtype)
    return {name: Projection(made[name], layer.precision, name=name) for name in names}


def _dropout(layer: MultiHeadAttention) -> Dropout:
    """Return the dropout of this call: from the stream, or from `seed` and a counter.

    Raises:
      ShapeError: If there is neither a stream nor a seed whose counter can be kept.
    """
    if layer.has_rng("dropout") or (layer.seed is None and layer.is_initializing()):
        return Dropout(layer.make_rng("dropout"), layer.dropout)
    if layer.seed is None:
        raise ShapeError(
            'dropout needs a key in training: no "dropout" stream was given. '
            'Pass rngs={"dropout": jax.random.key(0)} to apply, a new key for every step.'
        )
    if not layer.is_mutable_collection("dropout_state"):
        raise ShapeError(
            f'with seed={layer.seed} and no "dropout" stream the layer counts its calls in the '
            'collection "dropout_state", which is not mutable here. Pass mutable=["dropout_state"] to '
            'apply and feed the collection back, or pass rngs={"dropout": key}.'
        )
    count = layer.variable("dropout_state", "count", lambda: jnp.zeros((), jnp.uint32))
    key = jax.random.fold_in(jax.random.key(layer.seed), count.value)
    count.value = count.value + 1
    return Dropout(key, layer.dropout)


def _sow_losses(layer: MultiHeadAttention, params: Params, query: Any, value: Any) -> Any:
    """Keep every weight's penalty, once however often the layer is called; watch the activities'."""
    for name, loss in penalties.of_weights(layer, params):
        layer.sow("losses", name, loss, lambda _, new: new, lambda: 0.0)
    if layer.activity_regularizer is None:
        return None
    return penalties.of_activities(layer, query, value, partial(layer.sow, "losses"))
