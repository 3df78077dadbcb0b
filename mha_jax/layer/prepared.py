"""Projected queries and keys made ready to attend: normalized, turned and scaled at their tokens' positions.

B batch   T query length   S key length   N query heads   K key-value heads   H query-key head size
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import ShapeError
from mha_jax.layer import vectors
from mha_jax.layer.arguments import Arguments
from mha_jax.types import Array


def normalized(kind: Any, beside: Callable[..., Any], q: Array, k: Array) -> tuple[Array, Array]:
    """Return queries and keys normalized, by a norm of ours or by modules.

    Args:
      kind: `qk_norm` of the layer.
      beside: (name) -> a norm's weights, or of a module's (name, x) -> x normalized.
    """
    if kind is None:
        return q, k
    q, k = (_normalized(kind, beside, *side) for side in zip(vectors.NORMALIZED, (q, k)))
    return q, k


def _normalized(kind: Any, beside: Callable[..., Any], name: str, x: Array) -> Array:
    if isinstance(kind, str):
        scale = beside(name) if vectors.NORMS[kind].weights else None
        return vectors.normalized(kind, scale, x)
    y = beside(name, x)
    if jnp.shape(y) != x.shape:
        raise ShapeError(
            f"{name}, a module of qk_norm={kind!r}, must return what it is given, normalized: got "
            f"{jnp.shape(y)} for {x.shape}, [B, L, heads, key_dim]."
        )
    return y.astype(x.dtype)


def placed(
    layer: Arguments, q: Array, k: Array, positions: tuple[Any, Any]
) -> tuple[Array, Array, float | None]:
    """Return queries and keys turned and scaled at their positions, and the scale that is left to apply."""
    if layer.rotary is not None:
        q, k = (layer.rotary(x, at) for x, at in zip((q, k), positions))
    if not callable(layer.scale):
        return q, k, layer.scale
    factors: Any = layer.scale(positions[0])
    array = isinstance(factors, (jax.Array, np.ndarray)) and factors.ndim == 2
    if not array or any(n not in (1, m) for n, m in zip(factors.shape, q.shape)):
        raise ShapeError(
            f"scale, a function of the queries' positions, must return a factor for each of them: got "
            f"{getattr(factors, 'shape', factors)} for positions {jnp.shape(positions[0])}, [B, T]."
        )
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    return (q.astype(wide) * factors.astype(wide)[..., None, None]).astype(q.dtype), k, 1.0


def watched(name: str, given: Array, returned: Any) -> Any:
    """Return what `on_projection` returned, where nothing after it says whether that fits.

    Raises:
      ShapeError: If it does not.
    """
    axes = {"gate": given.ndim, "attention_output": 2}.get(name, 0)
    array = isinstance(returned, (jax.Array, np.ndarray))
    if axes and not (array and returned.shape[:axes] == given.shape[:axes]):
        raise ShapeError(
            f"on_projection must return of {name!r} what has its shape, {given.shape}: got "
            f"{getattr(returned, 'shape', returned)}. Return the value itself where it is only looked at."
        )
    return returned
