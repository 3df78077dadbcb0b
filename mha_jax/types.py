"""Array aliases and the dimension letters that the whole library shares; no logic.

B batch (all leading axes folded)   T query length   S key length
N query heads   K key-value heads   G = N // K query heads a key-value head
H query-key head size   V value head size   D input width   E output width

Layout is BTNH: queries [B, T, N, H], keys [B, S, K, H], values [B, S, K, V]. `#` before a letter
means that the axis may be 1 and broadcasts. `True` in a mask means "may attend".
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt32

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray
Flags: TypeAlias = ArrayLike | bool | int  # True or 1 where something holds
DType: TypeAlias = Any  # what jnp.dtype() accepts: "bfloat16", jnp.float32, np.dtype("f4")
Precision: TypeAlias = Any  # what jnp.einsum(precision=...) accepts
Params: TypeAlias = Any  # {"query": {"kernel": ..., "bias": ...}, ...}
PRNGKey: TypeAlias = jax.Array
Size: TypeAlias = Any  # of an axis: an int, or a symbol in programs to be exported
Initializer: TypeAlias = Callable[..., jax.Array]  # (key, shape, dtype) -> array

Queries: TypeAlias = Float[Array, "B T N H"]
Keys: TypeAlias = Float[Array, "B S K H"]
Values: TypeAlias = Float[Array, "B S K V"]

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "DType",
    "Flags",
    "Float",
    "Initializer",
    "Int",
    "Keys",
    "PRNGKey",
    "Params",
    "Precision",
    "Queries",
    "Size",
    "UInt32",
    "Values",
]
