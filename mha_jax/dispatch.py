"""Which backend runs a call, and on which platform."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from mha_jax import differentiation
from mha_jax.backends.base import Backend, Call, Output
from mha_jax.errors import ShapeError, UnsupportedError

# In order of preference; a backend's module is imported when it is first asked.
BACKENDS = {
    "blockwise": ("mha_jax.backends.blockwise", "Blockwise"),
    "reference": ("mha_jax.backends.reference", "Reference"),
}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def load(name: str) -> Backend:
    """Return the backend of that name with its own tuning."""
    module, cls = BACKENDS[name]
    return getattr(importlib.import_module(module), cls)()


def reasons(call: Call, platform: str | None) -> dict[str, str]:
    """Say for every backend whether it can run a checked call on a platform."""
    platform = platform or default_platform()
    if platform not in PLATFORMS:
        raise ShapeError(
            f"unknown platform {platform!r}. Expected one of {', '.join(map(repr, PLATFORMS))}, "
            "or None for the platform of this process."
        )
    return {name: load(name).why_not(call, platform) or "can run" for name in BACKENDS}


def default_platform() -> str:
    """Return the platform of this process by the name that lowering uses."""
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform


def choose(call: Call, platform: str) -> Backend:
    """Return the first backend that can run the call on `platform`; the last one always can."""
    backends = (load(name) for name in BACKENDS)
    return next(b for b in backends if b.why_not(call, platform) is None)


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
    """Run a checked call on the backend that was asked for, or on the best one."""
    if backend is not None:
        backend = named(call, backend)
    if 0 in (*call.q.shape, *call.k.shape, *call.v.shape):
        return _empty(call)
    backend = backend or choose(call, default_platform())
    return differentiation.run(backend, call)


def _empty(call: Call) -> Output:
    """Return zeros and lse -inf: no key, no query or no feature to compute with."""
    b, t, n, _ = call.q.shape
    out = jnp.zeros((b, t, n, call.v.shape[-1]), call.v.dtype)
    return Output(out, jnp.full((b, n, t), -jnp.inf, call.accumulator))
