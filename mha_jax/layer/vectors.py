"""What a layer has beside its projections: norms of the heads of queries and keys, and sinks.

N query heads   H query-key head size

The norms have one weight for every feature of a head, `query_norm/scale` and `key_norm/scale` [H]; the sinks
have a logit for every query head, `sinks/logits` [N].
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from mha_jax.errors import WeightsError
from mha_jax.types import Array, ArrayLike, Float

NORMS = ("rms", "layer")
_EPSILON = 1e-6


class Vector(NamedTuple):
    """A parameter of one axis: its name in its sub-tree, its length, and its first value."""

    part: str
    size: int
    value: float

    def init(self, dtype: Any) -> Array:
        return jnp.full((self.size,), self.value, dtype)


def of(layer: Any) -> dict[str, Vector]:
    """Return the vectors of a layer, by the names of their sub-trees."""
    found = {}
    if layer.qk_norm is not None:
        found |= dict.fromkeys(("query_norm", "key_norm"), Vector("scale", layer.key_dim, 1.0))
    if layer.use_sinks:
        found["sinks"] = Vector("logits", layer.num_heads, 0.0)
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
    kind: str, scale: Float[ArrayLike, "H"], x: Float[Array, "*B L N H"]
) -> Float[Array, "*B L N H"]:
    """Normalize every head of every token, in float32 (float64 for float64).

    Args:
      kind: "rms" divides by the root of the mean square; "layer" subtracts the mean before.
      scale: What the result is multiplied by.
      x: Projected queries or keys.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    y = x.astype(dtype)
    if kind == "layer":
        y = y - jnp.mean(y, -1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + jnp.asarray(_EPSILON, dtype))
    weight = jnp.asarray(scale, dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * weight).astype(x.dtype)
