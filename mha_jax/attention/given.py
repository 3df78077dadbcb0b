"""What a caller gave, told apart at every door in the same words: arrays, integers, switches, dtypes, keys.

(name, value) -> the value as it is used. What cannot be meant is a `ShapeError` that names the argument, says
what was expected, and how to fix it.
"""

import dataclasses
import functools
import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import ShapeError
from mha_jax.types import Array, ArrayLike


def is_integer(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def is_number(x: Any) -> TypeGuard[float]:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def integer(name: str, x: Any, least: int, most: int, hint: str) -> int:
    """Return an integer from `least` to `most`."""
    if not is_integer(x) or not least <= x <= most:
        raise ShapeError(f"{name} must be an integer from {least} to {most}: got {x!r}. {hint}")
    return int(x)


def shape_of(x: Any) -> Any:
    """Return the shape of an array or a nested list; of lists of several lengths, their kind."""
    try:
        return np.shape(x)
    except ValueError:
        return type(x).__name__


def dtype_of(x: Any) -> Any:
    """Return the dtype of an array; None of what has none, or has one of another library, of torch say."""
    kind: Any = getattr(x, "dtype", None)
    try:
        jnp.issubdtype(kind, np.generic)
    except TypeError:
        return None
    return kind


def native(name: str, x: Any) -> None:
    """Refuse an array of NumPy's that JAX does not take: masked, or of numbers that it has not.

    Raises:
      ShapeError: Saying what JAX takes instead.
    """
    if not isinstance(x, np.ndarray):
        return
    if isinstance(x, np.ma.MaskedArray):
        got = "a masked array of NumPy's", f"Pass {name}.filled(0), and what it hides as a mask"
    elif not x.dtype.isnative:
        fix = f"Pass {name}.astype({name}.dtype.newbyteorder('='))"
        got = f"dtype {x.dtype.str}, of another byte order", fix
    elif x.dtype.char in "gG":
        got = f"dtype {x.dtype}, of a long double", f"Pass {name}.astype(numpy.float64)"
    else:
        return
    raise ShapeError(f"{name} must be an array that JAX takes: got {got[0]}. {got[1]}.")


def as_array(name: str, x: Any, wanted: str) -> ArrayLike:
    """Return an array of real numbers or truth values, of a nested list too."""
    native(name, x)
    a = x
    if not isinstance(x, (jax.Array, np.ndarray)):
        text = any(isinstance(leaf, str) for leaf in jax.tree.leaves(x))  # a dtype, for JAX
        try:
            a = None if text else jnp.asarray(x)
        except (OverflowError, TypeError, ValueError):
            a = None
    kinds = jnp.floating, jnp.integer, jnp.bool_
    if a is None or not any(jnp.issubdtype(a.dtype, kind) for kind in kinds):
        got = type(x).__name__ if not hasattr(x, "dtype") else f"{x.dtype}{list(np.shape(x))}"
        fix = _cure(x)
        if a is not None and jnp.issubdtype(a.dtype, jnp.complexfloating):
            fix = real_numbers(a.dtype)
        raise ShapeError(f"{name} must be {wanted}: got {got}. {fix}")
    return a


def _cure(x: Any) -> str:
    """Return how to make an array of what is none."""
    if isinstance(x, type):
        return f"That is the class {x.__name__}, not one of its values: write {x.__name__}(...)."
    if dataclasses.is_dataclass(x):
        return f"A rule for masks goes into mask=, one for biases into bias=: not {type(x).__name__} here."
    if isinstance(x, tuple):
        return "Of what a call returned pass one part: y, scores = layer.apply(...)."
    return "Convert it with np.asarray first."


def real_numbers(dtype: Any) -> str:
    """Return how to make floating-point numbers of numbers of another dtype."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (
            "Attention is of real numbers: pass real and imaginary parts as features, "
            "jnp.concatenate([x.real, x.imag], -1)."
        )
    return "Embed or cast it first, for example x.astype(jnp.float32)."


def floats(name: str, x: Any) -> Array:
    """Return queries, keys or values as an array.

    Raises:
      ShapeError: If they are no floating-point numbers.
    """
    native(name, x)
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise ShapeError(
            f"{name} must be a NumPy or JAX array: got {type(x).__name__}. "
            "Expected [*B, length, heads, size]; convert it with jnp.asarray."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(
            f"{name} must hold floating-point numbers: got dtype {x.dtype}. {real_numbers(x.dtype)}"
        )
    return jnp.asarray(x)


def integers(
    name: str, x: Any, forms: Sequence[tuple[int | None, ...]], least: int, most: int, hint: str
) -> Array:
    """Return 32-bit integers of one of the shapes `forms`, None for any size; known ones are in their range.

    Raises:
      ShapeError: If they are none.
    """
    a = as_array(name, x, "integers")
    fits = any(
        len(form) == len(a.shape) and all(n in (None, m) for n, m in zip(form, a.shape))
        for form in forms
    )
    known = not isinstance(a, jax.core.Tracer)
    got = f"{a.dtype}{list(a.shape)}"
    if fits and known and jnp.issubdtype(a.dtype, jnp.integer) and a.size:
        # While a program is traced, so is JAX's own minimum of a known array.
        plain = np.asarray(a)
        low, high = int(plain.min()), int(plain.max())
        fits, got = least <= low and high <= most, f"values from {low} to {high}"
    if not fits or not jnp.issubdtype(a.dtype, jnp.integer):
        shapes = " or ".join(str(list(form)).replace("None", "R") for form in forms)
        raise ShapeError(
            f"{name} must be integers from {least} to {most} of shape {shapes}: got {got}. {hint}"
        )
    return jnp.asarray(a).astype(jnp.int32)


def of_kind(name: str, x: Any, kind: type, hint: str) -> Any:
    """Return a value that is of a class."""
    if not isinstance(x, kind):
        got = x.__name__ + " itself" if isinstance(x, type) else type(x).__name__
        raise ShapeError(f"{name} must be of class {kind.__name__}: got {got}. {hint}")
    return x


def text(name: str, x: Any, hint: str) -> str:
    """Return a text."""
    if not isinstance(x, str):
        raise ShapeError(f"{name} must be a text: got {type(x).__name__}. {hint}")
    return x


def random_key(name: str, key: Any) -> Any:
    """Return the words of one JAX key, two or four of them.

    Raises:
      ShapeError: If it is not one key.
    """
    kind = dtype_of(key)
    typed = kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key)
    words = jax.random.key_data(key) if typed else key
    shape = jnp.shape(words) if kind is not None else None
    if (typed and key.ndim) or shape not in ((2,), (4,)) or words.dtype != jnp.uint32:
        got = f"{kind}{list(jnp.shape(key))}" if kind is not None else repr(key)
        raise ShapeError(
            f"{name} must be one JAX key: got {got}. Pass jax.random.key(0), or one of those that "
            "jax.random.split returns."
        )
    return words


def switch(name: str, x: Any, wanted: str = "True or False") -> bool:
    """Return a switch, which is part of the compiled program.

    Raises:
      ShapeError: If it is traced, or neither True nor False.
    """
    if isinstance(x, (bool, np.bool_)):
        return bool(x)
    if isinstance(x, jax.core.Tracer):
        raise ShapeError(
            f"{name} must be True or False while tracing: got a traced value. "
            f"Mark it static (jax.jit(..., static_argnames='{name}'))."
        )
    got = f"an array of shape {x.shape}" if isinstance(x, (jax.Array, np.ndarray)) else repr(x)
    raise ShapeError(
        f"{name} must be {wanted}: got {got}. No text, number or array stands for a switch; an array that "
        "says which query may attend to which key is attention_mask."
    )


def floating(
    name: str, x: Any, wanted: str = "a floating-point dtype", also: Sequence[Any] = ()
) -> Any:
    """Return a dtype.

    Args:
      also: Dtypes that are meant as well.

    Raises:
      ShapeError: If it is none of floating-point numbers.
    """
    try:
        array = x is None or isinstance(x, (jax.Array, np.ndarray))
        found = None if array else jnp.dtype(x)
    except (TypeError, ValueError):
        found = None
    if found is None or not (jnp.issubdtype(found, jnp.floating) or found in also):
        raise ShapeError(
            f"{name} must be {wanted}: got {x!r}. Pass jnp.bfloat16 or 'float32', say."
        )
    return found


def precision(name: str, x: Any) -> Any:
    """Return a precision of products, by its name where it has one.

    Raises:
      ShapeError: If `jnp.einsum` does not take it.
    """
    try:
        if x is not None:
            _try_precision(x)
    except (TypeError, ValueError) as error:
        raise ShapeError(
            f"{name} must be what jnp.einsum takes, or None for the platform's default: got {x!r}. "
            "Pass 'default', 'high', 'highest' or a jax.lax.Precision."
        ) from error
    return x.name.lower() if isinstance(x, jax.lax.Precision) else x


@functools.cache
def _try_precision(x: Any) -> None:
    a = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    jax.eval_shape(functools.partial(jnp.matmul, precision=x), a, a)
