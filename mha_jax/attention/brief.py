"""How values that hold arrays are printed, an array by its dtype and shape, and how they are compared."""

import dataclasses
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import ShapeError

# As many numbers as one reads at a glance: the counts of a cache's rows.
_FEW = 8


def brief(value: Any) -> str:
    """Return a dataclass as its call is written.

    >>> from mha_jax.attention.call import Call
    >>> x = np.ones((1, 5, 2, 4), np.float32)
    >>> brief(Call(x, x, x, scale=0.5))
    'Call(q=float32[1,5,2,4], k=float32[1,5,2,4], v=float32[1,5,2,4], scale=0.5)'
    """
    held = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
    written = (f"{f.name}={short(x)}" for f, x in held if not _is_default(f, x))
    return f"{type(value).__name__}({', '.join(written)})"


def short(x: Any) -> str:
    """Return a value as `brief` prints it among others.

    >>> short(jax.random.key(0)), short(np.arange(3)), short(0.5)
    ('key<fry>[]', '[0, 1, 2]', '0.5')
    """
    if isinstance(x, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        if x.ndim == 1 and x.size <= _FEW and not is_key and is_here(x):
            return str(np.asarray(x).tolist())
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return brief(x) if dataclasses.is_dataclass(x) and not isinstance(x, type) else repr(x)


def alike(a: Any, b: Any, /) -> Any:
    """Return whether two dataclasses are of one class and hold the same, arrays by dtype, shape and numbers.

    Raises:
      ShapeError: If it depends on the numbers of traced arrays.

    >>> from mha_jax.attention.tokens import Tokens
    >>> Tokens(2, pos=np.arange(2)) == Tokens(2, pos=np.arange(2))
    True
    """
    if type(a) is not type(b):
        return NotImplemented
    return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    arrays = [isinstance(one, (jax.Array, np.ndarray)) for one in (x, y)]
    if not any(arrays):
        return bool(x == y)
    if not all(arrays) or (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    if any(isinstance(one, jax.core.Tracer) for one in (x, y)):
        raise ShapeError(
            f"traced arrays have no numbers to compare yet: got {short(x)} twice. Compare the arrays "
            "themselves, (a.array == b.array).all() say, or compare before tracing."
        )
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = map(jax.random.key_data, (x, y))
    return np.array_equal(x, y)


def is_here(x: Any) -> bool:
    """Return whether an array has values, and this process has them all."""
    if isinstance(x, (np.ndarray, jax.ShapeDtypeStruct, jax.core.Tracer)):
        return isinstance(x, np.ndarray)
    return (x.is_fully_addressable or x.is_fully_replicated) and not x.is_deleted()


def _is_default(field: dataclasses.Field, x: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return type(x) is type(field.default_factory()) and not dataclasses.fields(x)
    return field.default is x
