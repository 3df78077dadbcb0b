"""Weights and configurations from and to other libraries, one module a library; the core imports none."""

import typing as _typing

if _typing.TYPE_CHECKING:
    from mha_jax.interop import flax as flax
    from mha_jax.interop import keras as keras
    from mha_jax.interop import torch as torch
else:
    from mha_jax.rooms import inside as _inside
    from mha_jax.rooms import lazy as _lazy

    __getattr__, __dir__ = _lazy(__name__, _inside(__name__, "flax", "keras", "torch"))
