"""MultiHeadAttention as a flax.nnx module: the linen layer, holding its own parameters.

B batch   T query length   S key length   N query heads

The parameters have the linen layer's names and shapes, so `nnx.to_pure_dict(nnx.state(layer, nnx.Param))`
is its `variables["params"]`, and `nnx.update(layer, variables["params"])` goes the other way.
"""

import dataclasses
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from mha_jax.attention.cache import Cache
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError, UnsupportedError
from mha_jax.layer import arguments, projections
from mha_jax.layer.functional import Layer, Masks, check_switch
from mha_jax.layer.initializers import Unflattened, VarianceScaling
from mha_jax.layer.linen import MultiHeadAttention as LinenAttention
from mha_jax.types import Array, ArrayLike, DType, Float, Params, Precision


class Loss(nnx.Variable):
    """A regularization loss of the last call.

    All of a model's: `sum(jax.tree.leaves(nnx.state(model, Loss)))`.
    """


class Losses(nnx.Module):
    """Losses by name."""

    def __init__(self, names: list[str]):
        for name in names:
            setattr(self, name, Loss(jnp.zeros(())))


class Projection(nnx.Module):
    """One projection: its kernel and bias, and the product with them.

    Anything that is called with an input and returns a projection may stand in its place.
    """

    def __init__(self, name: str, in_axes: int, precision: Precision, weights: dict[str, Any]):
        self.name, self.in_axes, self.precision = name, in_axes, precision
        for part, value in weights.items():
            if isinstance(value, nn.meta.AxisMetadata):
                raise UnsupportedError(
                    f"the initializer of a {part} returned a linen box, {type(value).__name__}, which an "
                    "nnx.Param does not hold. Pass nnx.with_partitioning(initializer, names), or shard by "
                    "mha_jax.sharding.partition_specs(layer.params, rules)."
                )
        self.kernel: Any = nnx.Param(weights["kernel"])
        self.bias: Any = nnx.Param(weights["bias"]) if "bias" in weights else None

    def __call__(self, x: Array) -> Array:
        """Return x [*L, *inputs] times the kernel, plus the bias, as [*L, *features]."""
        bias = None if self.bias is None else self.bias[...]
        kernel = _value(self.kernel)
        return projections.product(self.name, kernel, bias, x, self.in_axes, self.precision)


class _Kept:
    """An initializer whose metadata, `nnx.with_partitioning`'s say, are kept beside what it draws."""

    def __init__(self, initializer: Any):
        self.initializer, self.metadata = initializer, None

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
        drawn = self.initializer(key, shape, dtype)
        if not isinstance(drawn, nnx.VariableMetadata):
            return drawn
        self.metadata = drawn
        return drawn.raw_value

    def with_metadata(self, value: Any) -> Any:
        """Return a parameter's value with the metadata that were drawn; names of other axes are left out."""
        if self.metadata is None:
            return value
        names = self.metadata.metadata.items()
        fits = {k: x for k, x in names if not isinstance(x, tuple) or len(x) == value.ndim}
        return dataclasses.replace(self.metadata, raw_value=value, metadata=fits)


def _kept(initializer: Any) -> Any:
    """Return an initializer that keeps metadata, if it is a function that may have any."""
    own = initializer is None or isinstance(initializer, (VarianceScaling, Unflattened))
    return initializer if own else _Kept(initializer)


def _value(kernel: Any) -> Any:
    """Return what a kernel holds: an array, or what a library has put in its place."""
    return kernel[...] if isinstance(kernel, nnx.Variable) else kernel


@dataclasses.dataclass(eq=False, repr=False)
class MultiHeadAttention(nnx.Module):
    """Keras's MultiHeadAttention for flax.nnx: `mha_jax.MultiHeadAttention` with its parameters inside.

    `query`, `key`, `value`, `attention_output` and `gate` hold `kernel` and `bias` as `nnx.Param`. With
    a regularizer, `losses` holds a `Loss` for each of them, overwritten by every call; else it is absent.

    Args:
      num_heads, ..., name: As for `mha_jax.MultiHeadAttention`, in its order. `training` is set by
        `train()` and `eval()` too, as `deterministic` of Flax's own layers is.
      in_features: Width of `query`.
      value_features: Width of `value`; `in_features` if None.
      key_features: Width of `key`; `value_features` if None.
      rngs: Its `params` stream draws the parameters. With dropout, the layer keeps a fork of its
        `dropout` stream, or with `seed` a stream of that seed.

    Raises:
      ShapeError: When made or called with values that cannot be right.

    >>> from flax import nnx
    >>> layer = MultiHeadAttention(num_heads=4, key_dim=8, in_features=16, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, 16))
    >>> layer(x, x, use_causal_mask=True).shape
    (2, 5, 16)
    >>> layer.query.kernel.shape
    (16, 4, 8)
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
    name: str | None = None
    _: dataclasses.KW_ONLY
    in_features: dataclasses.InitVar[int]
    value_features: dataclasses.InitVar[int | None] = None
    key_features: dataclasses.InitVar[int | None] = None
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, in_features, value_features, key_features, rngs):
        linen = self.linen
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(linen, field.name))
        for name, size in (
            ("in_features", in_features),
            ("value_features", value_features),
            ("key_features", key_features),
        ):
            _check_width(name, size)
        value_features = value_features or in_features
        shapes = projections.shapes(
            in_features,
            value_features,
            key_features or value_features,
            **arguments.sizes(self),
        )
        bias = self.bias_initializer if self.use_bias else None
        for name, shape in shapes.items():
            made = _kept(self.kernel_initializer), _kept(bias)
            drawn = projections.init(rngs.params(), shape, *made, self.param_dtype)
            for part, kept in zip(("kernel", "bias"), made):
                if isinstance(kept, _Kept):
                    drawn[part] = kept.with_metadata(drawn[part])
            setattr(self, name, Projection(name, shape.in_axes, self.precision, drawn))
        self._features = (in_features, value_features, key_features or value_features)
        losses = self._loss_names(list(shapes))
        if losses:
            self.losses = Losses(losses)
        if self.dropout > 0:
            self.stream = self._own_stream(rngs)

    @property
    def linen(self) -> LinenAttention:
        """The linen layer with the same arguments: `linen.apply({"params": ...}, ...)`."""
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return LinenAttention(**arguments, parent=None)

    @property
    def params(self) -> Params:
        """The parameters as linen's layer takes them: {"query": {"kernel": ..., "bias": ...}, ...}."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    @property
    def deterministic(self) -> bool | None:
        """The opposite of `training`, so that `train()` and `eval()` of a model reach the layer."""
        return None if self.training is None else not self.training

    @deterministic.setter
    def deterministic(self, value: bool | None) -> None:
        self.training = None if value is None else not value

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
        *,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Attend from `query` to `value`.

        Args:
          query, ..., cache: As for the call of `mha_jax.MultiHeadAttention`.
          rngs: Where the dropout's key is drawn, instead of the layer's own stream.

        Returns:
          The output [B, T, E], or (output, scores [B, N, T, S]); with a cache, it comes last.

        Raises:
          ShapeError, UnsupportedError, WeightsError: With what was expected and how to fix it.
        """
        if training is None:
            training = self.training
        else:
            check_switch("training", training)
        dropout = None
        if self.dropout > 0 and training:
            # Folded as linen folds the key of a stream, so that both modules drop the same.
            fold = flax.core.apply(lambda scope: scope.make_rng("dropout"))
            dropout = Dropout(fold({}, rngs={"dropout": self._dropout_key(rngs)}), self.dropout)
        found: dict[str, Array] = {}

        def penalize(name: str, x: Array) -> Array:
            source = value if name in ("key", "value") else query
            if source is None:
                return x  # nothing was projected
            examples = source.shape[0] if len(source.shape) > 2 else 1
            found[f"{name}_activity"] = self.activity_regularizer(x) / max(examples, 1)
            return x

        # An evaluating layer changes nothing, so that any transformation may close over it.
        penalized = hasattr(self, "losses") and training is not False
        layer = Layer(
            project=lambda name, x: getattr(self, name)(x),
            widths=self._features,
            heads=self.num_heads,
            gated=self.use_gate,
            dtype=self.dtype,
            param_dtypes=self._param_dtypes(),
            attention_axes=self.attention_axes,
            sliding_window=self.sliding_window,
            precision=self.precision,
            backend=self.backend,
            on_projection=penalize if penalized and self.activity_regularizer is not None else None,
        )
        masks = Masks(query_mask, value_mask, key_mask, attention_mask, use_causal_mask, mask)
        tokens = query_tokens, key_tokens
        result = layer(query, value, key, masks, tokens, dropout, cache, return_attention_scores)
        if penalized:
            self._keep_losses(found)
        return result

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set whether dropout acts, for `nnx.view`: as Flax's own layers have it."""
        if deterministic is not None:
            self.deterministic = deterministic

    def empty_cache(self, batch: int, capacity: int, dtype: DType = None) -> Cache:
        """Return a cache for calls of this layer that holds nothing yet, as the linen layer's."""
        return self.linen.empty_cache(batch, capacity, dtype)

    def constrain(self) -> None:
        """Apply `kernel_constraint` and `bias_constraint` to the parameters: after every update."""
        nnx.update(self, self.linen.constrain(self.params))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the linen layer as plain JSON values, without the widths."""
        return self.linen.get_config()

    @classmethod
    def from_linen(
        cls, module: LinenAttention, variables: dict[str, Params], *, rngs: nnx.Rngs
    ) -> "MultiHeadAttention":
        """Return the layer with the arguments and parameters of a linen layer.

        Raises:
          WeightsError: If the variables are not the layer's.

        >>> module, x = LinenAttention(num_heads=4, key_dim=8), jnp.ones((2, 5, 16))
        >>> variables = module.init(jax.random.key(0), x, x)
        >>> layer = MultiHeadAttention.from_linen(module, variables, rngs=nnx.Rngs(0))
        >>> bool((layer(x, x) == module.apply(variables, x, x)).all())
        True
        """
        params = nn.meta.unbox(variables.get("params", {}))
        projections.check_names(params)
        widths = (params[name]["kernel"].shape[0] for name in ("query", "value", "key"))
        names = (field.name for field in dataclasses.fields(cls))
        layer = cls(
            **{name: getattr(module, name) for name in names},
            **dict(zip(("in_features", "value_features", "key_features"), widths)),
            rngs=rngs,
        )
        nnx.update(layer, params)
        return layer

    def _param_dtypes(self) -> tuple[Any, ...]:
        """Return the dtypes of the projections' own parameters, or what new ones would have."""
        own = [getattr(self, name) for name in ("query", "key", "value", "attention_output")]
        weights = [w for p in own if isinstance(p, Projection) for w in (p.kernel, p.bias)]
        dtypes = tuple(w.dtype for w in weights if isinstance(w, nnx.Variable))
        return dtypes or (jnp.dtype(self.param_dtype),)

    def _keep_losses(self, found: dict[str, Array]) -> None:
        rules = {"kernel": self.kernel_regularizer, "bias": self.bias_regularizer}
        for name, weights in self.params.items():
            for part, weight in weights.items():
                if rules.get(part) is not None:
                    found[f"{name}_{part}"] = rules[part](weight)
        nnx.update(self.losses, found)

    def _dropout_key(self, rngs: nnx.Rngs | nnx.RngStream | None) -> Array:
        if rngs is None:
            stream = getattr(self, "stream", None)
        else:
            stream = rngs if isinstance(rngs, nnx.RngStream) else _stream(rngs)
        if stream is None:
            raise ShapeError(
                'dropout needs a key in training: there is no "dropout" stream. Make the layer with '
                "rngs=nnx.Rngs(params=0, dropout=1), or pass rngs=nnx.Rngs(dropout=1) to the call."
            )
        return stream()

    def _own_stream(self, rngs: nnx.Rngs) -> nnx.RngStream | None:
        if self.seed is not None:
            return nnx.RngStream(jax.random.key(self.seed), tag="dropout")
        stream = _stream(rngs)
        return None if stream is None else stream.fork()

    def _loss_names(self, projected: list[str]) -> list[str]:
        """Return the names under which the linen layer sows its losses."""
        parts = {
            "kernel": self.kernel_regularizer,
            "bias": self.bias_regularizer if self.use_bias else None,
            "activity": self.activity_regularizer,
        }
        return [f"{name}_{part}" for name in projected for part in parts if parts[part] is not None]


def _stream(rngs: nnx.Rngs) -> nnx.RngStream | None:
    return rngs.dropout if "dropout" in rngs or "default" in rngs else None


def _check_width(name: str, size: Any) -> None:
    optional = name != "in_features"
    if (size is None and optional) or (isinstance(size, int) and size > 0):
        return
    wanted = "a positive integer or None" if optional else "a positive integer"
    raise ShapeError(
        f"{name} must be {wanted}: got {size!r}. It is the width, x.shape[-1], of what the layer will be "
        "called with."
    )
