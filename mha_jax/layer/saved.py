"""How caches are saved: by Flax as dictionaries of arrays, in exported programs as trees."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import serialization
from jax import export

from mha_jax.attention.cache import Cache
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


def register() -> None:
    """Tell Flax and `jax.export` how to write caches; once in a process."""
    serialization.register_serialization_state(Cache, _to_state, _from_state)
    export.register_pytree_node_serialization(
        Cache,
        serialized_name="mha_jax.Cache",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )
