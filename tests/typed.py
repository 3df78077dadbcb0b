"""Annotations of the whole package, checked while the tests run.

jaxtyping makes two functions of every function's annotations: one of the arguments, called before it runs,
and one of the arguments and the result, called once it has returned. Only the second is checked: what a
function refuses in its own words is seen by the tests of errors, and whatever it accepts must be as it is
annotated.

What makes an instance is left out: settings take names and NumPy's numbers for what they store, and JAX
remakes pytrees with anything in the place of arrays.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, Never

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

_typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for pyright


def checked(function: Callable) -> Callable:
    """Check the annotations of a function that jaxtyping has made of arguments and result."""
    arguments = inspect.signature(function).parameters
    if function.__name__ == "__init__" or not any(re.fullmatch(r"ret\d+", x) for x in arguments):
        return function
    for name, kind in function.__annotations__.items():
        if kind is Never:  # no such argument, which the package refuses by name
            function.__annotations__[name] = Any
    return _typed(function)


def install() -> None:
    """Check everything in the package that is imported from now on."""
    install_import_hook("mha_jax", f"{__name__}.{checked.__name__}")
