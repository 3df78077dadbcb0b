"""The layer's arguments, declared once: what they mean, their checks, their JSON form, and the shapes that
follow from them.

A new argument is one line here, with its check, and a sentence; where it is part of a call without a module,
it is marked so. Linen's layer, nnx's, `init_params` and `multi_head_attention` take theirs from here.

N query heads   K key-value heads   H query-key head size   V value head size
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, TypeVar

import jax.numpy as jnp

from mha_jax.attention import cache_checks
from mha_jax.attention.cache import Cache
from mha_jax.attention.given import of_kind
from mha_jax.attention.rotary import Rotary, to_plain
from mha_jax.errors import ShapeError, WeightsError
from mha_jax.layer import checks, saved, vectors
from mha_jax.layer.projections import KernelShape
from mha_jax.types import DType, Params, Precision

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)


def _of_layer(check: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return the metadata of an argument that makes a layer: (name, value) -> the value as it is stored."""
    return {"check": check, "call": False}


def _of_call(check: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return the metadata of an argument that a call without a module takes, too."""
    return {"check": check, "call": True}


def _object(room: str) -> dict[str, Any]:
    """Return the metadata of an argument that is an object of Keras's, which a room reads and writes."""

    def module() -> Any:  # imported when the first layer is made, not with the package
        return importlib.import_module(f"mha_jax.layer.{room}")

    return {"check": lambda name, x: module().get(x), "call": False, "object": module}


def _any(name: str, x: Any) -> Any:
    return x


class _Signature:
    """The signature of a layer's class: that of its `__init__`, where a metaclass would hide it."""

    def __get__(self, layer: Any, cls: type) -> inspect.Signature:
        if layer is not None:
            raise AttributeError("__signature__")  # a layer is called as its `__call__` says
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


@dataclasses.dataclass(eq=False, repr=False)
class Arguments:
    """What an attention layer is.

    Args:
      num_heads: Query heads N.
      key_dim: Size H of a query and key head.
      value_dim: Size V of a value head; `key_dim` if None.
      dropout: Share of the attention weights to drop in training, in [0, 1).
      use_bias: Whether the projections add biases, or the names of those that do.
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
      training: Whether dropout acts; unset means False.
      dtype: Of the computation; that of inputs and parameters together if None.
      param_dtype: Of the parameters.
      precision: Of the products, as for `jnp.einsum`.
      rotary: Rotary positions, `mj.Rotary()`: queries and keys are turned at their tokens' positions.
      qk_norm: Norm of queries and keys, before `rotary`: "rms" or "layer" of every head, with a weight [H];
        "layer_per_head", with weights [N, H]; "rms_over_heads" of all heads together, with weights [N, H];
        "l2", "rms" without a weight. Or a Flax module's class, whose modules see [B, L, N, H] and hold their
        parameters as `query_norm` and `key_norm`: in linen it is called with `name=`, in nnx with `key_dim`
        and `rngs=`.
      use_sinks: Whether every query head has a learned logit in the denominator of its softmax.
      scale: Factor on queries times keys; 1 / sqrt(key_dim) if None. Or a function of the queries' positions
        [#B, T] that returns as many factors.
      logit_cap: Soft cap on the scaled logits, `logit_cap * tanh(x / logit_cap)`, or None.

    Raises:
      ShapeError: When made with values that cannot be right.
      ArgumentError: For an argument that there is not, with what may be meant.

    >>> Arguments(num_heads=4, key_dim=8).shapes(16, 16, 16)["attention_output"].kernel
    (4, 8, 16)
    """

    num_heads: int = field(metadata=_of_layer(checks.positive))
    key_dim: int = field(metadata=_of_layer(checks.positive))
    value_dim: int | None = field(default=None, metadata=_of_layer(checks.positive_or_none))
    dropout: float = field(default=0.0, metadata=_of_layer(checks.rate))
    use_bias: bool | tuple[str, ...] = field(default=True, metadata=_of_layer(checks.biased))
    output_shape: int | tuple[int, ...] | None = field(
        default=None, metadata=_of_layer(checks.sizes_or_none)
    )
    attention_axes: int | tuple[int, ...] | None = field(
        default=None, metadata=_of_call(checks.axes_or_none)
    )
    sliding_window: int | None = field(default=None, metadata=_of_call(checks.positive_or_none))
    kernel_initializer: Any = field(default="glorot_uniform", metadata=_object("initializers"))
    bias_initializer: Any = field(default="zeros", metadata=_object("initializers"))
    kernel_regularizer: Any = field(default=None, metadata=_object("regularizers"))
    bias_regularizer: Any = field(default=None, metadata=_object("regularizers"))
    activity_regularizer: Any = field(default=None, metadata=_object("regularizers"))
    kernel_constraint: Any = field(default=None, metadata=_object("constraints"))
    bias_constraint: Any = field(default=None, metadata=_object("constraints"))
    use_gate: bool = field(default=False, metadata=_of_layer(checks.switch))
    seed: int | None = field(default=None, metadata=_of_layer(checks.seed))
    num_kv_heads: int | None = field(default=None, metadata=_of_layer(checks.positive_or_none))
    backend: Any = field(default=None, metadata=_of_call(_any))
    training: bool | None = field(default=None, metadata=_of_layer(checks.switch_or_none))
    dtype: DType = field(default=None, metadata=_of_call(checks.floating_or_none))
    param_dtype: DType = field(default=jnp.float32, metadata=_of_layer(checks.floating))
    precision: Precision = field(default=None, metadata=_of_call(checks.precision))
    rotary: Rotary | None = field(default=None, metadata=_of_call(checks.rotary_or_none))
    qk_norm: Any = field(default=None, metadata=_of_call(checks.norm_or_none))
    use_sinks: bool = field(default=False, metadata=_of_layer(checks.switch))
    scale: Any = field(default=None, metadata=_of_call(checks.scale_or_none))
    logit_cap: float | None = field(default=None, metadata=_of_call(checks.cap_or_none))

    __signature__ = _Signature()

    def __new__(cls, *args: Any, **kwargs: Any) -> "Arguments":
        if not kwargs.keys() <= cls.__dataclass_fields__.keys():
            call = inspect.signature(cls.__call__).parameters
            checks.refuse_unknown(cls, kwargs, call, IN_A_CALL)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            given = getattr(self, name)
            if (stored := check(name, given)) is not given:
                setattr(self, name, stored)
        if self.num_heads % self.kv_heads:
            raise ShapeError(
                f"num_kv_heads must divide num_heads: got num_kv_heads={self.num_kv_heads}, "
                f"num_heads={self.num_heads}. Every key-value head serves the same number of query heads."
            )
        if self.rotary is not None:
            self.rotary.size(self.key_dim)

    @classmethod
    def of(cls, params: Params, given: Mapping[str, Any]) -> "Arguments":
        """Return the arguments of the layer that has these parameters, as a call without a module has them.

        Args:
          params: {"query": {"kernel": ..., "bias": ...}, ...}; sizes are read off them.
          given: Arguments of a call.

        Raises:
          ShapeError: If one cannot be right.
        """
        layer = object.__new__(cls)
        kernels = [params[name]["kernel"].shape for name in ("query", "value", "attention_output")]
        (_, n, h), (_, k, v), (_, _, *output) = kernels
        sizes = {"num_heads": n, "key_dim": h, "num_kv_heads": k, "value_dim": v}
        for name, value in (sizes | {"output_shape": (*output,)}).items():
            setattr(layer, name, value)
        with_bias = tuple(name for name in checks.PROJECTIONS if "bias" in params.get(name, ()))
        everywhere = len(with_bias) == sum(name in params for name in checks.PROJECTIONS)
        layer.use_bias = everywhere or with_bias or False
        layer.use_gate, layer.use_sinks = "gate" in params, "sinks" in params
        for name, value in given.items():
            setattr(layer, name, _CHECKS[name](name, value))
        if layer.qk_norm is None and "query_norm" in params:
            raise ShapeError(
                "the parameters hold query_norm, of a layer that normalizes queries and keys: got qk_norm="
                f"None. Pass qk_norm={' or '.join(map(repr, vectors.NORMS))}, as the layer was made."
            )
        return layer

    def has_bias(self, name: str) -> bool:
        """Whether a projection adds a bias."""
        return self.use_bias if isinstance(self.use_bias, bool) else name in self.use_bias

    @property
    def kv_heads(self) -> int:
        """Key-value heads K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def value_size(self) -> int:
        """Size V of a value head."""
        return self.key_dim if self.value_dim is None else self.value_dim

    def shapes(self, query_size: Any, value_size: Any, key_size: Any) -> dict[str, KernelShape]:
        """Return the shape of every projection, by Keras's names, for inputs of these widths."""
        n, k, h, v = self.num_heads, self.kv_heads, self.key_dim, self.value_size
        output: Any = self.output_shape or (query_size,)
        return {
            "query": KernelShape((query_size, n, h), 1),
            "key": KernelShape((key_size, k, h), 1),
            "value": KernelShape((value_size, k, v), 1),
            **({"gate": KernelShape((query_size, n, v), 1)} if self.use_gate else {}),
            "attention_output": KernelShape((n, v, *output), 2),
        }

    def empty_cache(
        self,
        batch: int,
        capacity: int,
        dtype: DType = None,
        *,
        rolling: bool = False,
        layers: int | None = None,
    ) -> Cache:
        """Return a cache for calls of this layer that holds nothing yet.

        Args:
          batch: Rows; all axes folded that are not attended.
          capacity: Tokens that a row can hold.
          dtype: Of the computation; the layer's `dtype` or else `param_dtype` if None. "int8" rounds what is
            stored, with a scale for every token and head.
          rolling: Hold the last `capacity` tokens only: of a layer that sees no more, without end.
          layers: How many such layers share the buffers, for `Cache.of_layer`; None for one by itself.

        Raises:
          ShapeError: If a size is no positive integer, `sliding_window` is more than a rolling cache's
            capacity, or the dtype holds no keys of the layer.

        >>> layer = mj.MultiHeadAttention(num_heads=4, key_dim=8)
        >>> x = jnp.ones((2, 5, 16))
        >>> variables = layer.init(jax.random.key(0), x, x)
        >>> cache = layer.empty_cache(batch=2, capacity=7)
        >>> y, cache = layer.apply(variables, x, x, use_causal_mask=True, cache=cache)
        >>> cache.count.tolist()
        [5, 5]
        """
        dtype = self.dtype or self.param_dtype if dtype is None else dtype
        sizes = batch, capacity, self.kv_heads, self.key_dim, self.value_dim
        cache = Cache.empty(*sizes, dtype, rolling=rolling, layers=layers)
        own = jnp.dtype(self.dtype or self.param_dtype)
        if cache.key_scales is not None and own == jnp.float64:
            cache_checks.no_float64()
        if rolling and self.sliding_window is not None:
            cache_checks.window(self.sliding_window - 1, capacity)
        return cache

    def get_config(self) -> dict[str, Any]:
        """Return every argument as plain JSON values; `from_config` reads them back.

        Raises:
          WeightsError: If a value has no plain form, a function of the user's own, say.
        """
        return {name: _plain(name, getattr(self, name)) for name in ("name", *FIELDS)}

    @classmethod
    def from_config(cls, values: Mapping[str, Any], **more: Any) -> Any:
        """Make the layer from `get_config()`, ours or that of Keras's layer.

        Args:
          values: The configuration.
          **more: What a configuration does not hold: nnx's widths and `rngs`.

        Raises:
          WeightsError: If a key is unknown.
        """
        of_kind("values", values, Mapping, "Pass what get_config() returned, ours or Keras's.")
        values = {name: value for name, value in values.items() if name not in _KERAS_ONLY}
        known = (*FIELDS, "name")
        for name in values:
            if name not in known:
                raise WeightsError(
                    f"unknown key {name!r} in the configuration.{checks.meant(name, known)} "
                    f"Known keys: {', '.join(known)}."
                )
        if "param_dtype" not in values and values.get("dtype") is not None:
            values.update(_keras_policy(values["dtype"]))
        return cls(**values, **more)


saved.register()
FIELDS = {one.name: one for one in dataclasses.fields(Arguments)}
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    name: one.metadata["check"] for name, one in FIELDS.items()
}
OF_CALL = {name: one for name, one in FIELDS.items() if one.metadata["call"]}


IN_A_CALL = (
    "is an argument of the call, not of the constructor. Pass it where the layer is called: "
    "layer.apply(variables, query, value, {name}=...), or layer(query, value, {name}=...) in flax.nnx."
)
IN_THE_PARAMETERS = (
    "makes a layer or its parameters, and this call has none to make: sizes are read off params, as "
    "init_params(..., {name}=...) made them; to drop in training, pass dropout=Dropout(key, rate)."
)
IN_THE_CONSTRUCTOR = (
    "is an argument of the constructor, not of the call: MultiHeadAttention(..., {name}=...)."
)


def documented(cls: _Class) -> _Class:
    """Write out the arguments of a layer's class in its docstring, where it says "As for `Arguments`."."""
    arguments = str(inspect.getdoc(Arguments)).partition("Args:\n")[2].partition("\n\n")[0]
    cls.__doc__ = str(inspect.getdoc(cls)).replace("  As for `Arguments`.", arguments)
    return cls


def shows(*names: str) -> Callable[[_Function], _Function]:
    """Show in a function's signature the arguments that its `**arguments` stand for."""

    def show(function: _Function) -> _Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(FIELDS[name]))
            for name in names
            if name not in signature.parameters
        ]
        shown = [p.replace(annotation=FIELDS[p.name].type) for p in taken]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return show


def closed(function: _Function) -> _Function:
    """Hide `**unknown`, which is there to be refused in words, from a function's signature."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return function


def _default(one: dataclasses.Field) -> Any:
    return inspect.Parameter.empty if one.default is dataclasses.MISSING else one.default


# What Keras writes of a layer and means nothing here.
_KERAS_ONLY = ("trainable", "flash_attention")


def _plain(name: str, value: Any) -> Any:
    """Return an argument as JSON has it."""
    written = FIELDS[name].metadata.get("object") if name in FIELDS else None
    if written is not None:
        return written().serialize(value)
    if name == "rotary":
        return None if value is None else to_plain(value)
    if name in ("qk_norm", "scale") and callable(value):
        raise WeightsError(
            f"{name}={value!r} has no plain form: a configuration holds names and numbers. Leave it out, and "
            f"pass {name}= again when the layer is made from it."
        )
    if name in ("dtype", "param_dtype"):
        return None if value is None else jnp.dtype(value).name
    if name in ("backend", "precision") and not (value is None or isinstance(value, str)):
        names = "'blockwise', say" if name == "backend" else "'default', 'high' or 'highest'"
        raise WeightsError(
            f"{name}={value!r} has no plain form: a configuration holds it by name. Pass {names}, or None."
        )
    return list(value) if isinstance(value, tuple) else value


def _keras_policy(policy: Any) -> dict[str, str]:
    """Turn Keras's dtype policy, a name or a serialized object, into our two dtypes."""
    name = policy if isinstance(policy, str) else policy.get("config", {}).get("name")
    if not isinstance(name, str):
        raise WeightsError(
            f"dtype={policy!r} is no dtype policy that a Flax layer has: expected a name such as "
            "'float32' or 'mixed_bfloat16'."
        )
    compute = name.removeprefix("mixed_")
    params = "float32" if name.startswith("mixed_") else name
    return {"dtype": compute, "param_dtype": params}
