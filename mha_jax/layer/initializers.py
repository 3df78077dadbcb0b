"""Keras's initializers by name, config or value, drawn from an explicit JAX key.

A kernel is a matrix whose rows and columns happen to be split into axes: query, key, value and gate
kernels [D, N, H] have one input axis, the output kernel [N, V, *E] has two. `initialize` draws that
matrix and gives it the kernel's shape, so that fans, orthogonality and identity mean the same for
every initializer, `jax.nn.initializers` included. Keras >= 3.15 does so where fans count; Keras
<= 3.14 and `jax.nn.initializers` read the N-D shape as a convolution's and draw a smaller scale:
`unflattened` is the switch for that. A bias has no input axis and is drawn on the shape it has.

`seed` is kept for Keras's configs and never used: numbers come from the key alone, so that query,
key and value differ even where Keras, given one seed, would draw the same kernel three times.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeAlias, cast

import jax
import jax.numpy as jnp

from mha_jax.errors import ShapeError
from mha_jax.layer.keras_objects import Family, Settings, is_number
from mha_jax.types import Array, DType, PRNGKey

Shape: TypeAlias = tuple[int, ...]
_STDDEV_OF_TRUNCATED_NORMAL = 0.87962566103423978  # of a standard normal cut off at +-2
_MODES = ("fan_in", "fan_out", "fan_avg")
_DISTRIBUTIONS = ("truncated_normal", "untruncated_normal", "normal", "uniform")


@dataclasses.dataclass(frozen=True)
class Initializer(Settings):
    """The common type of this module's initializers: settings, checked."""

    rules = (
        ("value gain mean minval maxval", "a finite number", is_number),
        ("stddev", "a finite number of at least 0", lambda v: is_number(v, 0)),
        ("scale", "a finite number above 0", lambda v: is_number(v) and v > 0),
        ("mode", f"one of {_MODES}", lambda v: isinstance(v, str) and v in _MODES),
        (
            "distribution",
            f"one of {_DISTRIBUTIONS}",
            lambda v: isinstance(v, str) and v in _DISTRIBUTIONS,
        ),
        ("seed", "None, an integer or a config", lambda v: v is None or isinstance(v, (int, dict))),
        ("input_axes output_axes", "None or a list", lambda v: v is None or isinstance(v, tuple)),
    )

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        raise NotImplementedError(f"{type(self).__name__} is no initializer by itself")


@dataclasses.dataclass(frozen=True)
class Constant(Initializer):
    """One number everywhere."""

    value: float | int = 0.0

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Identity(Initializer):
    """`gain` on the diagonal of the matrix, zero elsewhere."""

    gain: float | int = 1.0

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        _check_rank(self, shape, most=2)
        return jnp.eye(*shape, dtype=dtype) * self.gain


@dataclasses.dataclass(frozen=True)
class Orthogonal(Initializer):
    """`gain` times a random matrix with orthonormal columns, or rows where these are fewer.

    The matrix is the flattened kernel; Keras flattens all axes but the last, in every layer.

    Source: Saxe et al. 2014, arXiv:1312.6120.
    """

    gain: float | int = 1.0
    seed: Any = dataclasses.field(default=None, hash=False)

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        _check_rank(self, shape, most=len(shape))
        wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32  # QR has no half precision
        return jax.nn.initializers.orthogonal(self.gain)(key, shape, wide).astype(dtype)


@dataclasses.dataclass(frozen=True)
class RandomNormal(Initializer):
    """A normal distribution."""

    mean: float | int = 0.0
    stddev: float | int = 0.05
    seed: Any = dataclasses.field(default=None, hash=False)

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        return self.mean + jax.nn.initializers.normal(self.stddev)(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class TruncatedNormal(RandomNormal):
    """A normal distribution of `stddev`, then cut off at `mean` plus and minus twice that."""

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        return self.mean + jax.nn.initializers.truncated_normal(self.stddev)(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class RandomUniform(Initializer):
    """A uniform distribution on [minval, maxval)."""

    minval: float | int = -0.05
    maxval: float | int = 0.05
    seed: Any = dataclasses.field(default=None, hash=False)

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, self.minval, self.maxval)


@dataclasses.dataclass(frozen=True)
class VarianceScaling(Initializer):
    """Zero mean and variance `scale / n`, n being the fan in, the fan out or their mean.

    Args:
      scale, mode: A positive number; "fan_in", "fan_out" or "fan_avg".
      distribution: "truncated_normal" (or "normal"), "untruncated_normal" or "uniform".
      input_axes, output_axes: Axes of the N-D kernel that count as inputs and as outputs. As in
        Keras, they hold only where both are given; else the layer's own do.

    Source: Glorot and Bengio 2010, AISTATS, sec. 4.2; He et al. 2015, arXiv:1502.01852, sec. 2.2.
    """

    scale: float | int = 1.0
    mode: str = "fan_in"
    distribution: str = "truncated_normal"
    seed: Any = dataclasses.field(default=None, hash=False)
    input_axes: Any = None
    output_axes: Any = None

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        fan_in, fan_out = self._fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        stddev = math.sqrt(self.scale / max(1.0, fan))
        if self.distribution == "uniform":
            limit = math.sqrt(3) * stddev
            return jax.random.uniform(key, shape, dtype, -limit, limit)
        if self.distribution == "untruncated_normal":
            return jax.nn.initializers.normal(stddev)(key, shape, dtype)
        stddev /= _STDDEV_OF_TRUNCATED_NORMAL
        return jax.nn.initializers.truncated_normal(stddev)(key, shape, dtype)

    @property
    def axes(self) -> tuple[Any, Any] | None:
        axes = (self.input_axes, self.output_axes)
        return None if None in axes else axes

    def _fans(self, shape: Shape) -> tuple[int, int]:
        if self.axes is not None:
            inputs, outputs = self.axes
            if any(a not in range(-len(shape), len(shape)) for a in inputs + outputs):
                raise ShapeError(
                    f"input_axes={inputs} and output_axes={outputs} do not fit shape {shape}. "
                    f"Expected axes of it; with None for both, the layer's own hold."
                )
            return math.prod(shape[a] for a in inputs), math.prod(shape[a] for a in outputs)
        if len(shape) < 2:
            return math.prod(shape), math.prod(shape)
        window = math.prod(shape[:-2])  # further axes count as those of a convolution's window
        return window * shape[-2], window * shape[-1]


def _preset(name: str, kind: type[Initializer], **settings: Any) -> type[Initializer]:
    """Return `kind` with some settings fixed, under the name that Keras has for it."""
    fixed = partial(dataclasses.field, init=False, repr=False)
    fields = [(key, Any, fixed(default=value)) for key, value in settings.items()]
    said = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    known = {"__module__": __name__, "__doc__": f"`{kind.__name__}` with {said}."}
    return dataclasses.make_dataclass(name, fields, bases=(kind,), namespace=known, frozen=True)


def _scaled(name: str, scale: float, mode: str, distribution: str) -> type[Initializer]:
    return _preset(name, VarianceScaling, scale=scale, mode=mode, distribution=distribution)


Zeros = _preset("Zeros", Constant, value=0.0)
Ones = _preset("Ones", Constant, value=1.0)
GlorotUniform = _scaled("GlorotUniform", 1.0, "fan_avg", "uniform")
GlorotNormal = _scaled("GlorotNormal", 1.0, "fan_avg", "truncated_normal")
LecunUniform = _scaled("LecunUniform", 1.0, "fan_in", "uniform")
LecunNormal = _scaled("LecunNormal", 1.0, "fan_in", "truncated_normal")
HeUniform = _scaled("HeUniform", 2.0, "fan_in", "uniform")
HeNormal = _scaled("HeNormal", 2.0, "fan_in", "truncated_normal")


@dataclasses.dataclass(frozen=True)
class Unflattened(Initializer):
    """What `unflattened` returns; Keras has no such thing."""

    initializer: Callable[..., Array]
    home: ClassVar[str] = "mha_jax"

    def __call__(self, key: PRNGKey, shape: Shape, dtype: DType = jnp.float32) -> Array:
        return self.initializer(key, shape, dtype)


def unflattened(initializer: Any) -> Unflattened:
    """Return the initializer that reads fans off the N-D shape, as Keras <= 3.14 and JAX do.

    >>> old, key = unflattened(jax.nn.initializers.glorot_uniform()), jax.random.key(0)
    >>> [round(float(initialize(i, key, (64, 8, 16)).std()), 2) for i in (old, "glorot_uniform")]
    [0.04, 0.1]
    """
    return Unflattened(get(initializer))


_ALIASES = {"zero": "zeros", "one": "ones", "normal": "random_normal", "uniform": "random_uniform"}


def _canonical(name: Any) -> str:
    snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(name)).lower()
    return _ALIASES.get(snake_case, snake_case.removesuffix("_initializer"))


def _takes_a_key(spec: Any) -> bool:
    try:
        return callable(spec) and bool(inspect.signature(spec).bind("key", "shape", "dtype"))
    except TypeError:
        return False


_FAMILY = Family(
    base=Initializer,
    known={
        "zeros": Zeros,
        "ones": Ones,
        "constant": Constant,
        "identity": Identity,
        "orthogonal": Orthogonal,
        "random_normal": RandomNormal,
        "truncated_normal": TruncatedNormal,
        "random_uniform": RandomUniform,
        "variance_scaling": VarianceScaling,
        "glorot_uniform": GlorotUniform,
        "glorot_normal": GlorotNormal,
        "lecun_uniform": LecunUniform,
        "lecun_normal": LecunNormal,
        "he_uniform": HeUniform,
        "he_normal": HeNormal,
        "unflattened": unflattened,
    },
    name="glorot_uniform",
    config={"class_name": "Constant", "config": {"value": 0.5}},
    function="(key, shape, dtype) -> array",
    unless="; Keras's own take no key and cannot be used",
    accepts=_takes_a_key,
    canonical=_canonical,
)


def get(spec: Any) -> Callable[..., Any]:
    """Return the initializer that `spec` describes, to be called as `f(key, shape, dtype)`.

    Args:
      spec: A name of Keras's ("glorot_uniform", "GlorotUniform"), a Keras config dict, a Keras
        initializer (read by its config; Keras is not imported), a function `(key, shape, dtype) ->
        array`, or an initializer of this module. Functions and initializers return as they are.

    Raises:
      ShapeError: An unknown name, a setting out of range, or nothing that could be an initializer.
      WeightsError: A dict that is not the config of an initializer of Keras's.

    >>> get("he_normal").scale
    2.0
    >>> get({"class_name": "Constant", "config": {"value": 3}})
    Constant(value=3)
    """
    return _FAMILY.get(spec)


def serialize(initializer: Any) -> dict[str, Any]:
    """Return the JSON-able config of an initializer, which `get` and Keras read.

    Args:
      initializer: Anything that `get` takes; Keras cannot read `Unflattened`.

    Raises:
      WeightsError: The initializer is a plain function, which no config can hold.

    >>> serialize("he_normal")["class_name"], serialize(Constant(2.0))["config"]
    ('HeNormal', {'value': 2.0})
    """
    return _FAMILY.serialize(initializer)


def initialize(
    initializer: Any,
    key: PRNGKey | None,
    shape: Shape,
    dtype: DType = jnp.float32,
    in_axes: int = 1,
) -> Any:
    """Draw a kernel or a bias.

    Args:
      initializer: Anything that `get` takes.
      key: Give every parameter its own; a seed in the initializer is not used.
      shape, dtype: The parameter's.
      in_axes: How many leading axes the projection sums over: 1 for query, key, value and gate
        kernels, 2 for the output kernel, 0 for a bias.

    Returns:
      An array of `shape` and `dtype`; boxed (Flax's partitioning metadata) if a function boxes it.

    Raises:
      ShapeError: `in_axes` exceeds the rank, or no array of the shape that is needed was drawn.

    Source: `keras/src/layers/core/einsum_dense.py` of Keras 3.15 for the fans.

    >>> matrix = initialize("orthogonal", jax.random.key(0), (12, 2, 3)).reshape(12, 6)
    >>> bool(jnp.allclose(matrix.T @ matrix, jnp.eye(6), atol=1e-6))
    True
    """
    initializer, shape = get(initializer), tuple(shape)
    if not 0 <= in_axes <= len(shape):
        raise ShapeError(
            f"in_axes={in_axes} does not fit shape {shape}. Expected 0 for a bias, else the number "
            f"of leading axes that the projection sums over."
        )
    named = isinstance(initializer, VarianceScaling) and initializer.axes is not None
    wanted = (math.prod(shape[:in_axes]), math.prod(shape[in_axes:]))
    if in_axes == 0 or named or isinstance(initializer, Unflattened):
        wanted = shape
    drawn = cast(Any, initializer)(key, wanted, dtype)  # of one's own, it may need no key
    got = [getattr(leaf, "shape", type(leaf).__name__) for leaf in jax.tree.leaves(drawn)]
    if got != [wanted]:
        raise ShapeError(
            f"{initializer} returned {got} instead of one array of shape {wanted}. Expected a "
            f"function (key, shape, dtype) -> array; those of jax.nn.initializers that take "
            f"settings must be called first: glorot_uniform(), not glorot_uniform."
        )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype).reshape(shape), drawn)


def _check_rank(initializer: Initializer, shape: Shape, most: int) -> None:
    if not 2 <= len(shape) <= most:
        raise ShapeError(
            f"{type(initializer).__name__} cannot draw shape {shape}. Expected a kernel, or a bias "
            f"[N, H]; initialize other biases with 'zeros'."
        )
