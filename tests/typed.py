"""Annotations of the whole package, checked while the tests run.

jaxtyping makes two functions of every function's annotations: one of the arguments, called before it runs,
and one of the arguments and the result, called once it has returned. Only the second is checked: what a
function refuses in its own words is seen by the tests of errors, and whatever it accepts must be as it is
annotated.

What makes an instance is left out: settings take names and NumPy's numbers for what they store, and JAX
remakes pytrees with anything in the place of arrays.
"""

import functools
import inspect
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jax import export
from jaxtyping import AbstractArray, install_import_hook

_SYMBOL = type(*export.symbolic_shape("n"))  # a size that is known when the program is called
_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for pyright


def checked(function: Callable) -> Callable:
    """Check the annotations of a function that jaxtyping has made of arguments and result."""
    arguments = inspect.signature(function).parameters
    if function.__name__ == "__init__" or not any(re.fullmatch(r"ret\d+", x) for x in arguments):
        return function
    for name, kind in function.__annotations__.items():
        if kind is Never:  # an argument that there is not, which the package refuses by name
            kind = Any
        elif kind is int and not re.fullmatch(r"ret\d+", name):
            kind = int | np.integer  # NumPy's numbers are taken for ours, and never returned
        function.__annotations__[name] = widened(kind)
    return _typed(function)


def widened(kind: Any) -> Any:
    """Let NumPy's arrays stand for JAX's, as which it hands on constants, and symbols for sizes."""
    if kind is int:
        return int | _SYMBOL
    if kind is jax.Array:
        return jax.Array | np.ndarray
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return kind.dtype[widened(kind.array_type), kind.dim_str]
    origin, inner = typing.get_origin(kind), tuple(map(widened, typing.get_args(kind)))
    if origin is typing.Unpack and typing.get_origin(*typing.get_args(kind)):
        return Any  # a generic TypedDict, which beartype does not read
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, inner)
    if origin in (tuple, list, dict, Sequence, Mapping):
        return origin[inner]
    return kind


def install() -> None:
    """Check what is imported of the package from now on."""
    install_import_hook("mha_jax", f"{__name__}.{checked.__name__}")
