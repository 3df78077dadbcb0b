"""Which backend runs a problem: the one asked for, or the best one for a platform."""

import dataclasses
import importlib
from typing import Any

import jax

from mha_jax.attention.call import Problem
from mha_jax.backends.base import Backend
from mha_jax.backends.sequence import Gather, Heads, Ring, Shards
from mha_jax.errors import ShapeError, UnsupportedError

# In order of preference; a backend's module is imported when it is first asked. The last one but the
# definition itself runs everything, everywhere.
BACKENDS = {
    "pallas_tpu": ("mha_jax.backends.pallas_tpu", "PallasTPU"),
    "cudnn": ("mha_jax.backends.cudnn", "CuDNN"),
    "mosaic_gpu": ("mha_jax.backends.mosaic_gpu", "MosaicGPU"),
    "blockwise": ("mha_jax.backends.blockwise", "Blockwise"),
    "reference": ("mha_jax.backends.reference", "Reference"),
}
# How devices that have shards of the tokens of an example attend.
STRATEGIES = {"gather": Gather, "ring": Ring, "heads": Heads}
# Platforms that a backend may tell apart; on any other run those that need none.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def default_platform() -> str:
    """Return the platform of this process by the name that lowering uses."""
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform


def load(name: str) -> Backend:
    """Return the backend of that name with its own tuning."""
    module, cls = BACKENDS[name]
    return getattr(importlib.import_module(module), cls)()


def reasons(problem: Problem, platform: str | None) -> dict[str, str]:
    """Say for every backend whether it can run a problem on a platform.

    Raises:
      ShapeError: If the platform is unknown.
    """
    platform = default_platform() if platform is None else platform
    if not isinstance(platform, str) or platform not in PLATFORMS:
        raise ShapeError(
            f"unknown platform {platform!r}. Expected one of {', '.join(map(repr, PLATFORMS))}, "
            "or None for the platform of this process."
        )
    return {name: _says(load(name), problem, platform) for name in BACKENDS}


def _says(backend: Backend, problem: Problem, platform: str) -> str:
    if (why := why_not(backend, problem, platform)) is not None:
        return why
    aside = backend.aside(problem)
    return "can run" if aside is None else f"can run; {aside}"


def why_not(backend: Backend, problem: Problem, platform: str) -> str | None:
    """Say in words why a backend cannot run a problem on `platform`, or return None."""
    if problem.bias_rule is not None and not backend.bias_rules:
        return "it has no biases by rule yet; pass backend=None, or the bias as an array, bias.matrix(...)"
    return backend.why_not(problem, platform)


def choose(problem: Problem, platform: str) -> Backend:
    """Return the first backend that can run the problem on `platform`; the tiled one always can."""
    backends = (load(name) for name in BACKENDS)
    return next(b for b in backends if not b.by_name and why_not(b, problem, platform) is None)


def complete(backend: Backend | None, problem: Problem, platform: str) -> Backend:
    """Return a backend with what it leaves open chosen for a platform: itself, if None."""
    backend = choose(problem, platform) if backend is None else backend
    if isinstance(backend, Shards):
        return dataclasses.replace(backend, inner=complete(backend.inner, problem, platform))
    return backend.on(platform)


def named(problem: Problem, backend: Any) -> Backend:
    """Return the backend that was asked for.

    Raises:
      UnsupportedError: If there is none of that name, or it cannot run this problem.
    """
    if isinstance(backend, str):
        if backend not in BACKENDS:
            raise UnsupportedError(
                f"there is no backend named {backend!r}. Expected one of "
                f"{', '.join(map(repr, BACKENDS))}, a backend object, or None to choose automatically."
            )
        backend = load(backend)
    if not isinstance(backend, Backend):
        raise UnsupportedError(
            f"backend={backend!r} is no backend. Expected one of {', '.join(map(repr, BACKENDS))}, a backend "
            "object such as Blockwise(block_q=256), a dataclass that inherits mha_jax.backends.base.Backend, "
            "or None to choose automatically."
        )
    platform = default_platform()
    why = why_not(backend, problem, platform)
    if why is not None:
        rows = reasons(problem, platform).items() if platform in PLATFORMS else ()
        table = "\n".join(f"    {name:12s}{text}" for name, text in rows)
        raise UnsupportedError(
            f"backend {type(backend).__name__} cannot run this call: {why}.\n"
            f"  Pass backend=None to choose automatically. What could run it on {platform}:\n{table}"
        )
    return backend
