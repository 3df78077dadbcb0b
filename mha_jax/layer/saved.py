"""How values that hold arrays are saved: caches by Flax as dictionaries, all of them in exported programs."""

import ast
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import export

from mha_jax.attention.biases import Bias
from mha_jax.attention.cache import Cache
from mha_jax.attention.call import Call, Output
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Mask
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import WeightsError


def _to_state(cache: Cache) -> dict[str, Any]:
    fields = {one.name: getattr(cache, one.name) for one in dataclasses.fields(cache)}
    return {name: x for name, x in fields.items() if x is not None}


def _from_state(cache: Cache, state: dict[str, Any]) -> Cache:
    names, own = sorted(state), sorted(_to_state(cache))
    if names != own:
        raise WeightsError(
            f"the saved cache has {names}, the one to restore it into has {own}. Make that by "
            "empty_cache with the rolling, dtype and layers of the saved one."
        )
    return dataclasses.replace(cache, **{name: jnp.asarray(x) for name, x in state.items()})


def _kinds(base: type) -> Iterator[type]:
    """Yield the dataclasses below a class."""
    for kind in base.__subclasses__():
        if dataclasses.is_dataclass(kind):
            yield kind
        yield from _kinds(kind)


def _plain(static: Any) -> Any:
    """Return a static field with Python's numbers in the place of NumPy's."""
    if isinstance(static, np.generic):
        return static.item()
    return tuple(map(_plain, static)) if type(static) is tuple else static


def _written(static: tuple[Any, ...]) -> bytes:
    """Return the static fields of a value as a Python literal.

    Raises:
      WeightsError: If one is no number, text, or tuple of these.
    """
    written = repr(_plain(static))
    try:
        if ast.literal_eval(written) == static:
            return written.encode()
    except (SyntaxError, ValueError):
        pass
    raise WeightsError(
        f"an exported program cannot hold {static}, of which one is no number, text or tuple of these: it "
        "would belong to an argument of the program. Make the call inside the function that is exported."
    )


def register() -> None:
    """Tell Flax and `jax.export` how to write what holds arrays; once in a process."""
    serialization.register_serialization_state(Cache, _to_state, _from_state)
    for kind in (Cache, Call, Dropout, Tokens, *_kinds(Mask), *_kinds(Bias)):
        export.register_pytree_node_serialization(
            kind,
            serialized_name=f"mha_jax.{kind.__name__}",
            serialize_auxdata=_written,
            deserialize_auxdata=lambda written: ast.literal_eval(bytes(written).decode()),
        )
    export.register_namedtuple_serialization(Output, serialized_name="mha_jax.Output")
