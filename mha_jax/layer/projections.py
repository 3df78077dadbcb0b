"""The kernels: their shapes, their initial values, their products.

D input width   E output width   N query heads   K key-value heads
H query-key head size   V value head size

Kernels are three-dimensional, as in Keras: query (D, N, H), key (D, K, H), value (D, K, V), gate
(D, N, V), output (N, V, *output_shape); biases (N, H), (K, H), (K, V), (N, V), output_shape.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mha_jax.errors import WeightsError
from mha_jax.layer import initializers
from mha_jax.types import Array, Float, Params, Precision, PRNGKey


class Shape(NamedTuple):
    """The kernel of one projection and how many of its leading axes it contracts."""

    kernel: tuple[int, ...]
    in_axes: int

    @property
    def bias(self) -> tuple[int, ...]:
        return self.kernel[self.in_axes :]


def shapes(
    query_size: int,
    value_size: int,
    key_size: int,
    *,
    num_heads: int,
    key_dim: int,
    value_dim: int | None = None,
    output_shape: tuple[int, ...] | None = None,
    use_gate: bool = False,
    num_kv_heads: int | None = None,
) -> dict[str, Shape]:
    """Return the shape of every projection of the layer, by Keras's names.

    >>> shapes(16, 16, 16, num_heads=2, key_dim=8)["attention_output"].kernel
    (2, 8, 16)
    """
    value_dim = value_dim or key_dim
    kv_heads = num_kv_heads or num_heads
    result = {
        "query": Shape((query_size, num_heads, key_dim), 1),
        "key": Shape((key_size, kv_heads, key_dim), 1),
        "value": Shape((value_size, kv_heads, value_dim), 1),
    }
    if use_gate:
        result["gate"] = Shape((query_size, num_heads, value_dim), 1)
    result["attention_output"] = Shape((num_heads, value_dim, *(output_shape or (query_size,))), 2)
    return result


def init(
    rng: PRNGKey,
    shape: Shape,
    kernel_initializer: Any,
    bias_initializer: Any | None,
    dtype: Any,
) -> dict[str, Array]:
    """Return the kernel of one projection, and its bias unless `bias_initializer` is None."""
    kernel_key, bias_key = jax.random.split(rng)
    params = {
        "kernel": initializers.initialize(
            kernel_initializer, kernel_key, shape.kernel, dtype, shape.in_axes
        )
    }
    if bias_initializer is not None:
        params["bias"] = initializers.initialize(bias_initializer, bias_key, shape.bias, dtype, 0)
    return params


def check_names(params: Params) -> None:
    """Refuse parameters that are not the layer's.

    Raises:
      WeightsError: Naming what is missing.
    """
    missing = [
        name
        for name in ("query", "key", "value", "attention_output")
        if name not in params or "kernel" not in params[name]
    ]
    if missing:
        raise WeightsError(
            f"the parameters have no kernel for {', '.join(missing)}: got {sorted(params)}. "
            'Pass variables["params"] of the layer itself, or what init_params returns.'
        )


def project(
    name: str, params: Params, x: Float[Array, "*L D"], precision: Precision = None
) -> Float[Array, "*L N H"]:
    """Multiply the features of `x` by a kernel and add its bias, in the dtype of `x`.

    Raises:
      WeightsError: If the kernel was made for inputs of another width.
    """
    return _product(name, params[name], x, 1, precision)


def combine(params: Params, x: Float[Array, "*L N V"], precision: Precision = None) -> Array:
    """Multiply heads and values by the output kernel and add its bias, in the dtype of `x`."""
    return _product("attention_output", params["attention_output"], x, 2, precision)


def _product(name: str, weights: Params, x: Array, in_axes: int, precision: Precision) -> Array:
    kernel = weights["kernel"]
    if kernel.shape[:in_axes] != x.shape[x.ndim - in_axes :]:
        raise WeightsError(
            f"the {name} kernel of shape {tuple(kernel.shape)} does not fit its input of shape "
            f"{tuple(x.shape)}: they must share {in_axes} axis or axes. "
            "The arguments of the layer are query, value, key, in this order; if the inputs have changed "
            "width, initialise the layer again."
        )
    # As matrices: XLA on CPU transposes and copies the gradients of kernels with more axes.
    outer, features = x.shape[: x.ndim - in_axes], kernel.shape[in_axes:]
    matrix = jnp.asarray(kernel, x.dtype).reshape(math.prod(kernel.shape[:in_axes]), -1)
    y = jax.lax.dot_general(
        x.reshape(*outer, matrix.shape[0]),
        matrix,
        (((len(outer),), (0,)), ((), ())),
        precision=precision,
    )
    bias = weights.get("bias")
    if bias is not None:
        y = y + jnp.asarray(bias, x.dtype).reshape((1,) * len(outer) + (-1,))
    return y.reshape(*outer, *features)
