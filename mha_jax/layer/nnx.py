"""MultiHeadAttention as a flax.nnx module: the linen layer, holding its own parameters.

B batch   T query length   S key length   N query heads

The parameters have the linen layer's names and shapes, so `nnx.to_pure_dict(nnx.state(layer, nnx.Param))`
is its `variables["params"]`, and `nnx.update(layer, variables["params"])` goes the other way.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Never

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from mha_jax.attention.biases import Bias
from mha_jax.attention.cache import Cache
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.given import of_kind
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError, UnsupportedError
from mha_jax.layer import checks, constraints, fit, penalties, projections, vectors
from mha_jax.layer.arguments import FIELDS, IN_THE_CONSTRUCTOR, Arguments, closed, documented
from mha_jax.layer.called import as_nnx
from mha_jax.layer.functional import Weights, attend_layer
from mha_jax.layer.initializers import Unflattened, VarianceScaling
from mha_jax.layer.inputs import Inputs
from mha_jax.layer.linen import MultiHeadAttention as LinenAttention
from mha_jax.types import Array, ArrayLike, Flags, Float, Params, Precision


class Loss(nnx.Variable):
    """A regularization loss: a weight's at the last call, an activity's added over all calls.

    All of a model's, which begin at zero again: `sum(jax.tree.leaves(nnx.pop(model, Loss)))`.
    """


class Losses(nnx.Module):
    """Losses by name, but those that `nnx.pop` has taken."""

    def __init__(self, names: list[str]):
        for name in names:
            self.keep(name, jnp.zeros(()))

    def keep(self, name: str, loss: Array) -> None:
        """Overwrite a loss."""
        if hasattr(self, name):
            nnx.update(self, {name: loss})
        else:
            setattr(self, name, Loss(loss))

    def add(self, name: str, loss: Array) -> None:
        """Add to a loss."""
        held = getattr(self, name, None)
        self.keep(name, loss if held is None else held[...].astype(loss.dtype) + loss)


class Projection(nnx.Module):
    """One projection: its kernel and bias, and the product with them.

    Anything that is called with an input and returns a projection may stand in its place.
    """

    def __init__(self, name: str, precision: Precision, weights: dict[str, Any]):
        self.name, self.precision = name, precision
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
        return projections.product(self.name, kernel, bias, x, self.precision)


class Vector(nnx.Module):
    """A norm's scale or the sinks' logits: one parameter of one axis."""

    def __init__(self, kind: vectors.Vector, dtype: Any):
        self.part = kind.part
        setattr(self, kind.part, nnx.Param(kind.init(dtype)))

    def __call__(self) -> Array:
        return getattr(self, self.part)[...]


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


@documented
@dataclasses.dataclass(eq=False, repr=False)
class MultiHeadAttention(Arguments, nnx.Module):
    """Keras's MultiHeadAttention for flax.nnx: `mha_jax.MultiHeadAttention` with its parameters inside.

    `query`, `key`, `value`, `attention_output` and `gate` hold `kernel` and `bias` as `nnx.Param`. With
    a regularizer, `losses` holds a `Loss` for each of them; take a step's by `nnx.pop(model, Loss)`.
    `training` is set by `train()` and `eval()` too, as `deterministic` of Flax's own layers is.

    Args:
      As for `Arguments`.
      name: Of the layer, in configurations.
      in_features: Width of `query`.
      value_features: Width of `value`; `in_features` if None.
      key_features: Width of `key`; `value_features` if None.
      rngs: Its `params` stream draws the parameters. With dropout, the layer keeps a fork of its
        `dropout` stream, or with `seed` a stream of that seed.

    Raises:
      ShapeError: When made or called with values that cannot be right.
      ArgumentError: For an argument that there is not, with what may be meant.

    >>> from flax import nnx
    >>> layer = MultiHeadAttention(num_heads=4, key_dim=8, in_features=16, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, 16))
    >>> layer(x, x, use_causal_mask=True).shape
    (2, 5, 16)
    >>> layer.query.kernel.shape
    (16, 4, 8)
    """

    name: str | None = None
    _: dataclasses.KW_ONLY
    in_features: dataclasses.InitVar[int]
    value_features: dataclasses.InitVar[int | None] = None
    key_features: dataclasses.InitVar[int | None] = None
    rngs: dataclasses.InitVar[nnx.Rngs]

    def __post_init__(self, in_features, value_features, key_features, rngs):
        Arguments.__post_init__(self)
        checks.norm_made_by("flax.nnx", nnx.Module, self.qk_norm)
        checks.positive("in_features", in_features)
        checks.positive_or_none("value_features", value_features)
        checks.positive_or_none("key_features", key_features)
        if not isinstance(rngs, nnx.Rngs):
            raise ShapeError(
                f"rngs must be nnx.Rngs: got {type(rngs).__name__}. Pass rngs=nnx.Rngs(0), or "
                "rngs=nnx.Rngs(params=0, dropout=1)."
            )
        value_features = value_features or in_features
        self._features = (in_features, value_features, key_features or value_features)
        shapes = self.shapes(*self._features)
        for name, shape in shapes.items():
            bias = self.bias_initializer if self.has_bias(name) else None
            made = _kept(self.kernel_initializer), _kept(bias)
            drawn = projections.init(rngs.params(), shape, *made, self.param_dtype)
            for part, kept in zip(("kernel", "bias"), made):
                if isinstance(kept, _Kept):
                    drawn[part] = kept.with_metadata(drawn[part])
            setattr(self, name, Projection(name, self.precision, drawn))
        for name, kind in vectors.of(self).items():
            setattr(self, name, Vector(kind, self.param_dtype))
        if vectors.of_modules(self.qk_norm):
            for name in vectors.NORMALIZED:
                setattr(self, name, self.qk_norm(self.key_dim, rngs=rngs))
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

    @as_nnx
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
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        **unknown: Never,
    ) -> Any:
        """Attend from `query` to `value`.

        Args:
          query, ..., on_projection: As for the call of `mha_jax.MultiHeadAttention`.
          rngs: Where the dropout's key is drawn, instead of the layer's own stream.

        Returns:
          The output [B, T, E], or (output, scores [B, N, T, S]); with a cache, it comes last.

        Raises:
          ShapeError, ArgumentError, UnsupportedError, WeightsError: With what was expected and how
            to fix it.
        """
        if unknown:
            checks.refuse_unknown(self.__call__, unknown, FIELDS, IN_THE_CONSTRUCTOR)
        if rngs is not None and not isinstance(rngs, nnx.Rngs | nnx.RngStream):
            raise ShapeError(
                f"rngs must be nnx.Rngs or one of its streams: got {type(rngs).__name__}. Pass "
                "rngs=nnx.Rngs(dropout=key)."
            )
        inputs = Inputs(
            *(query, value, key, query_mask, value_mask, key_mask, attention_mask),
            *(return_attention_scores, use_causal_mask, mask, query_tokens, key_tokens),
            *(cache, bias, on_projection),
        )
        training = checks.switch_or_none("training", training)
        training = self.training if training is None else training
        dropout = None
        if self.dropout > 0 and training:
            # Folded as linen folds the key of a stream, so that both modules drop the same.
            fold = flax.core.apply(lambda scope: scope.make_rng("dropout"))
            dropout = Dropout(fold({}, rngs={"dropout": self._dropout_key(rngs)}), self.dropout)
        # An evaluating layer changes nothing, so that any transformation may close over it.
        found: dict[str, Array] = {}
        penalized, observe = hasattr(self, "losses") and training is not False, None
        if penalized and self.activity_regularizer is not None:
            observe = penalties.of_activities(self, query, value, found.__setitem__)
        weights = Weights(
            lambda name, x: getattr(self, name)(x),
            self._features,
            self._param_dtypes(),
            lambda name, *x: getattr(self, name)(*x),
        )
        result = attend_layer(self, weights, inputs, dropout, observe)
        if penalized:
            for name, loss in penalties.of_weights(self, self.params):
                self.losses.keep(name, loss)
            for name, loss in found.items():
                self.losses.add(name, loss)
        return result

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set whether dropout acts, for `nnx.view`: as Flax's own layers have it."""
        if deterministic is not None:
            self.deterministic = deterministic

    def constrain(self) -> None:
        """Apply `kernel_constraint` and `bias_constraint` to the parameters: after every update."""
        rules = {"kernel": self.kernel_constraint, "bias": self.bias_constraint}
        nnx.update(self, constraints.constrain(self.params, **rules))

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
        of_kind("module", module, LinenAttention, "It is made by mj.MultiHeadAttention(...).")
        of_kind("variables", variables, Mapping, 'Pass {"params": ...}, what module.init returns.')
        params = fit.checked(module, nn.meta.unbox(variables.get("params", {})))
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
            "bias": self.bias_regularizer,
            "activity": self.activity_regularizer,
        }
        return [
            f"{name}_{part}"
            for name in projected
            for part in parts
            if parts[part] is not None and (part != "bias" or self.has_bias(name))
        ]


def _stream(rngs: nnx.Rngs) -> nnx.RngStream | None:
    return rngs.dropout if "dropout" in rngs or "default" in rngs else None
