"""Which backend runs a call: the one asked for, or the best one for the platform lowered for."""

import dataclasses
import importlib
from functools import lru_cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mha_jax.attention.call import Backend, Call, Gradients, Output
from mha_jax.engine import derivative as differentiation
from mha_jax.engine.lowering import PLATFORMS, by_platform, default_platform
from mha_jax.errors import ShapeError, UnsupportedError
from mha_jax.sharding import Sharded

# In order of preference; a backend's module is imported when it is first asked.
BACKENDS = {
    "pallas_tpu": ("mha_jax.backends.pallas_tpu", "PallasTPU"),
    "blockwise": ("mha_jax.backends.blockwise", "Blockwise"),
    "reference": ("mha_jax.backends.reference", "Reference"),
}


def load(name: str) -> Backend:
    """Return the backend of that name with its own tuning."""
    module, cls = BACKENDS[name]
    return getattr(importlib.import_module(module), cls)()


def reasons(call: Call, platform: str | None) -> dict[str, str]:
    """Say for every backend whether it can run a checked call on a platform.

    Raises:
      ShapeError: If the platform is unknown.
    """
    platform = platform or default_platform()
    if platform not in PLATFORMS:
        raise ShapeError(
            f"unknown platform {platform!r}. Expected one of {', '.join(map(repr, PLATFORMS))}, "
            "or None for the platform of this process."
        )
    return {name: load(name).why_not(call, platform) or "can run" for name in BACKENDS}


def choose(call: Call, platform: str) -> Backend:
    """Return the first backend that can run the call on `platform`; the last one always can."""
    backends = (load(name) for name in BACKENDS)
    return next(b for b in backends if b.why_not(call, platform) is None)


@lru_cache(maxsize=16)
def _method(name: str, platform: str) -> Any:
    return lambda call, *rest: getattr(differentiation.Tiled(choose(call, platform)), name)(
        call, *rest
    )


def output_of(call: Call) -> Output:
    """Return the shapes and dtypes of what a call returns."""
    b, t, n, _ = call.q.shape
    out = jax.ShapeDtypeStruct((b, t, n, call.v.shape[-1]), call.v.dtype)
    return Output(out, jax.ShapeDtypeStruct((b, n, t), call.accumulator))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Automatic:
    """The best backend for every platform that the program is lowered for."""

    plain_autodiff: ClassVar[bool] = False

    def why_not(self, call: Call, platform: str) -> str | None:
        return None

    def forward(self, call: Call) -> Output:
        return by_platform(_FORWARD, output_of(call), call)

    def cotangent(self, call: Call, output: Output, cotangent: Output) -> Gradients:
        result = Gradients(call.q, call.k, call.v, call.bias)
        return by_platform(_COTANGENT, result, call, output, cotangent)

    def tangent(self, call: Call, output: Output, direction: Gradients) -> Output:
        return by_platform(_TANGENT, output, call, output, direction)


_FORWARD, _COTANGENT, _TANGENT = (
    partial(_method, name) for name in ("forward", "cotangent", "tangent")
)


def named(call: Call, backend: Any) -> Backend:
    """Return the backend that was asked for.

    Raises:
      UnsupportedError: If there is none of that name, or it cannot run this call.
    """
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise UnsupportedError(
                f"there is no backend named {backend!r}. Expected one of "
                f"{', '.join(map(repr, BACKENDS))}, a backend object, or None to choose automatically."
            )
        backend = load(backend)
    if isinstance(backend, type) or not hasattr(backend, "why_not"):
        raise UnsupportedError(
            f"backend={backend!r} is no backend. Expected one of {', '.join(map(repr, BACKENDS))}, a backend "
            "object such as Blockwise(block_q=256), or None to choose automatically."
        )
    platform = default_platform()
    why = backend.why_not(call, platform)
    if why is not None:
        table = "\n".join(f"    {name:12s}{text}" for name, text in reasons(call, platform).items())
        raise UnsupportedError(
            f"backend {type(backend).__name__} cannot run this call: {why}.\n"
            f"  Pass backend=None to choose automatically. What could run it on {platform}:\n{table}"
        )
    return backend


def run(call: Call, backend: Any) -> Output:
    """Run a checked call on the backend that was asked for, or on the best one, shard by shard."""
    sharded = backend if isinstance(backend, Sharded) else Sharded(backend)
    inner = Automatic() if sharded.backend is None else named(call, sharded.backend)
    if 0 in (*call.q.shape, *call.k.shape, *call.v.shape):
        return _empty(call)
    if inner.plain_autodiff:  # plain XLA, which partitions by itself
        return differentiation.run(inner, call)
    tiled = differentiation.Tiled(inner)
    return differentiation.run(dataclasses.replace(sharded, backend=tiled), call)


def _empty(call: Call) -> Output:
    """Return zeros and lse -inf: no key, no query or no feature to compute with."""
    out, lse = output_of(call)
    return Output(jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf))
