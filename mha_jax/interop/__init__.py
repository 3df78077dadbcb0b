"""Weights and configurations from and to other libraries, one module a library; the core imports none."""

import importlib
from typing import Any

_MODULES = ("flax", "keras", "torch")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mha_jax.interop.{name}")
    raise AttributeError(f"module 'mha_jax.interop' has no attribute {name!r}")
