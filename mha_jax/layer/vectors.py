"""What a layer has beside its projections: norms of the heads of queries and keys, and sinks.

N query heads   K key-value heads   H query-key head size

The norms' weights are `query_norm/scale` and `key_norm/scale`, of the axes that their kind says; where
`qk_norm` is a module's class, its own parameters stand there. The sinks have a logit for every query head,
`sinks/logits` [N].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mha_jax.errors import WeightsError
from mha_jax.types import Array, ArrayLike, Float

_EPSILON = 1e-6


class Norm(NamedTuple):
    """A norm of queries and keys [..., N, H].

    Args:
      over: Last axes that are normalized together: 1 for every head by itself, 2 for all heads.
      weights: Last axes that have a weight for every element: none, H, or N and H.
      centred: Whether the mean is subtracted before.
    """

    over: int = 1
    weights: int = 1
    centred: bool = False


NORMS = {
    "rms": Norm(),
    "layer": Norm(centred=True),
    "rms_over_heads": Norm(over=2, weights=2),
    "layer_per_head": Norm(weights=2, centred=True),
    "l2": Norm(weights=0),
}
NORMALIZED = ("query_norm", "key_norm")


def of_modules(norm: Any) -> bool:
    """Say whether a layer's `qk_norm` is a module's class, and no norm of ours."""
    return norm is not None and not isinstance(norm, str)


class Vector(NamedTuple):
    """A parameter: its name in its sub-tree, its shape, and its first value."""

    part: str
    shape: tuple[int, ...]
    value: float

    def init(self, dtype: Any) -> Array:
        return jnp.full(self.shape, self.value, dtype)


def of(layer: Any) -> dict[str, Vector]:
    """Return the vectors of a layer, by the names of their sub-trees."""
    found = {}
    if isinstance(layer.qk_norm, str) and (axes := NORMS[layer.qk_norm].weights):
        for name, heads in zip(NORMALIZED, (layer.num_heads, layer.kv_heads)):
            found[name] = Vector("scale", (heads, layer.key_dim)[-axes:], 1.0)
    if layer.use_sinks:
        found["sinks"] = Vector("logits", (layer.num_heads,), 0.0)
    return found


def init(layer: Any, rng: Any) -> dict[str, dict[str, Any]]:
    """Return the first values of a layer's vectors, and of its modules of norms, linen's."""
    found: dict[str, dict[str, Any]] = {
        name: {vector.part: vector.init(layer.param_dtype)} for name, vector in of(layer).items()
    }
    if not of_modules(layer.qk_norm):
        return found
    for i, (name, heads) in enumerate(zip(NORMALIZED, (layer.num_heads, layer.kv_heads))):
        x = jnp.zeros((1, 1, heads, layer.key_dim), layer.param_dtype)
        made = layer.qk_norm(parent=None).init(jax.random.fold_in(rng, i), x)
        found[name] = dict(made.get("params", {}))
    return found


def stored(params: Any, name: str, vector: Vector) -> Any:
    """Return a vector of stored parameters.

    Raises:
      WeightsError: If it is not there.
    """
    if vector.part not in params.get(name, ()):
        raise WeightsError(
            f"the parameters have no {name}/{vector.part}, which qk_norm and use_sinks ask for: got "
            f"{sorted(params)}. Initialise the layer with the same arguments, or leave them out."
        )
    return params[name][vector.part]


def normalized(
    kind: str, scale: Float[ArrayLike, "..."] | None, x: Float[Array, "*B L N H"]
) -> Float[Array, "*B L N H"]:
    """Normalize the heads of every token, in float32 (float64 for float64).

    Args:
      kind: One of `NORMS`. "rms" and "l2" divide by the root of the mean square; "layer" subtracts the mean
        before.
      scale: What the result is multiplied by, [H] or [N, H]; None where the norm has no weight.
      x: Projected queries or keys.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """
    norm, dtype = NORMS[kind], jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    axes = tuple(range(-norm.over, 0))
    y = x.astype(dtype)
    if norm.centred:
        y = y - jnp.mean(y, axes, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axes, keepdims=True) + jnp.asarray(_EPSILON, dtype))
    if scale is not None:
        weight = jnp.asarray(scale, dtype)
        y = y * weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
    return y.astype(x.dtype)
