"""The kernels: their shapes, their initial values, their products.

D input width   E output width   N query heads   K key-value heads
H query-key head size   V value head size

Kernels are three-dimensional, as in Keras: query (D, N, H), key (D, K, H), value (D, K, V), gate
(D, N, V), output (N, V, *output_shape); biases (N, H), (K, H), (K, V), (N, V), output_shape.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mha_jax.errors import WeightsError
from mha_jax.types import Array, Params, Precision, PRNGKey

# JAX's own product. Qwix for one puts other code into the same function.
_OWN_PRODUCT = jax.lax.dot_general, jax.lax.dot_general.__code__


class KernelShape(NamedTuple):
    """The kernel of one projection and how many of its leading axes it contracts."""

    kernel: tuple[int, ...]
    in_axes: int

    @property
    def bias(self) -> tuple[int, ...]:
        return self.kernel[self.in_axes :]


def in_axes_of(name: str) -> int:
    """Return how many leading axes the kernel of a projection contracts."""
    return 2 if name == "attention_output" else 1


def init(
    rng: PRNGKey,
    shape: KernelShape,
    kernel_initializer: Any,
    bias_initializer: Any | None,
    dtype: Any,
) -> dict[str, Any]:
    """Return the kernel of one projection, and its bias unless its initializer is None; boxed if drawn so."""
    from mha_jax.layer import initializers

    kernel_key, bias_key = jax.random.split(rng)
    params = {
        "kernel": initializers.initialize(
            kernel_initializer, kernel_key, shape.kernel, dtype, shape.in_axes
        )
    }
    if bias_initializer is not None:
        params["bias"] = initializers.initialize(bias_initializer, bias_key, shape.bias, dtype, 0)
    return params


def check_trees(params: Params) -> None:
    """Refuse what is no tree of parameters.

    Raises:
      WeightsError: Saying what is.
    """
    trees = isinstance(params, Mapping) and all(isinstance(x, Mapping) for x in params.values())
    if not trees:
        raise WeightsError(
            f"the parameters must be {{'query': {{'kernel': ..., 'bias': ...}}, ...}}: got "
            f'{type(params).__name__}. Pass variables["params"] of the layer, or what init_params returns.'
        )


def check_names(params: Params, use_gate: bool = False) -> None:
    """Refuse parameters without a kernel for every projection.

    Args:
      params: {"query": {"kernel": ..., "bias": ...}, ...}.

    Raises:
      WeightsError: Naming what is missing.
    """
    check_trees(params)
    names = ("query", "key", "value", *(["gate"] if use_gate else []), "attention_output")
    missing = [name for name in names if name not in params or "kernel" not in params[name]]
    if missing:
        raise WeightsError(
            f"the parameters have no kernel for {', '.join(missing)}: got {sorted(params)}. "
            'Pass variables["params"] of the layer itself, or what init_params returns.'
        )


def product(name: str, kernel: Any, bias: Any, x: Array, precision: Precision = None) -> Array:
    """Multiply the last axes of `x` by a kernel, as it is stored, and add the bias, in the dtype of `x`.

    What replaces products (quantization, adapters) sees `jax.lax.dot_general` with the kernel itself; where
    nothing does, it is a product of matrices, whose gradients XLA need not transpose and copy. On explicit
    mesh axes the result is cut as the batch of `x` and the features of the kernel are.

    Args:
      name: Of the projection, for errors.
      kernel: [*inputs, *features], or what stands for it.
      bias: [*features] or None.
      x: [*L, *inputs]; the inputs are one axis, or two for the output kernel.

    Raises:
      WeightsError: If the kernel was made for inputs of another width.
    """
    in_axes = in_axes_of(name)
    if tuple(kernel.shape[:in_axes]) != tuple(x.shape[x.ndim - in_axes :]):
        raise WeightsError(
            f"the {name} kernel of shape {tuple(kernel.shape)} does not fit its input of shape "
            f"{tuple(x.shape)}: they must share {in_axes} axis or axes. "
            "The arguments of the layer are query, value, key, in this order; if the inputs have changed "
            "width, initialise the layer again."
        )
    kernel = kernel if kernel.dtype == x.dtype else kernel.astype(x.dtype)
    outer = x.ndim - in_axes
    out = _explicit(x, kernel, outer, in_axes)
    replaced = (jax.lax.dot_general, jax.lax.dot_general.__code__) != _OWN_PRODUCT
    if out is None and isinstance(kernel, jax.Array) and not replaced:
        lead, inputs, features = x.shape[:outer], kernel.shape[:in_axes], kernel.shape[in_axes:]
        matrix = kernel.reshape(math.prod(inputs), math.prod(features))
        x = x.reshape(*lead, matrix.shape[0])
        dimensions = ((outer,), (0,)), ((), ())
        y = jax.lax.dot_general(x, matrix, dimensions, precision=precision)
        y = y.reshape(*lead, *features)
    else:
        contracted = tuple(range(outer, x.ndim)), tuple(range(in_axes))
        options: dict[str, Any] = {} if out is None else {"out_sharding": out}
        y = jax.lax.dot_general(x, kernel, (contracted, ((), ())), precision=precision, **options)
    if bias is None:
        return y
    bias = bias if bias.dtype == x.dtype else bias.astype(x.dtype)
    with jax.numpy_rank_promotion("allow"):  # cheaper than to add the missing axes
        return y + bias


def _explicit(x: Array, kernel: Any, outer: int, in_axes: int) -> NamedSharding | None:
    """Return how a product lies on a mesh whose axes stand in types; None on any other."""
    if not isinstance(kernel, jax.Array):
        return None
    places = [jax.typeof(a).sharding for a in (x, kernel)]
    mesh = next((place.mesh for place in places if not place.mesh.empty), None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    batch, features = places[0].spec[:outer], places[1].spec[in_axes:]
    used = {name for axes in batch for name in _names(axes)}
    free = [None if used & set(_names(axes)) else axes for axes in features]
    return NamedSharding(mesh, PartitionSpec(*batch, *free))


def _names(axes: Any) -> tuple[str, ...]:
    """Return the mesh axes that an entry of a PartitionSpec names."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
