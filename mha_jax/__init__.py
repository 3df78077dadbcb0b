"""Keras's MultiHeadAttention as pure JAX functions and a Flax module: one answer on every path."""

import importlib
import typing

from mha_jax.attention import attend, attention_scores, dot_product_attention, explain
from mha_jax.backends.base import Call, Output
from mha_jax.cache import Cache
from mha_jax.dropout import Dropout
from mha_jax.errors import MhaError, ShapeError, UnsupportedError, WeightsError
from mha_jax.functional import init_params, multi_head_attention
from mha_jax.layer import MultiHeadAttention
from mha_jax.masks import (
    Causal,
    Dense,
    Full,
    Mask,
    SameSegment,
    ValidKeys,
    ValidQueries,
    Window,
)
from mha_jax.summaries import scores_entropy, scores_max, scores_mean, scores_top_k
from mha_jax.tokens import Tokens

__version__ = "0.1.0"

# Sub-packages that need more than the core does, imported when first used: `mha_jax.interop.keras`.
_LAZY = ("bench", "interop", "models", "nnx", "sharding", "visualize")


def __getattr__(name: str) -> typing.Any:
    if name in _LAZY:
        return importlib.import_module(f"mha_jax.{name}")
    raise AttributeError(f"module 'mha_jax' has no attribute {name!r}")


__all__ = [
    "Cache",
    "Call",
    "Causal",
    "Dense",
    "Dropout",
    "Full",
    "Mask",
    "MhaError",
    "MultiHeadAttention",
    "Output",
    "SameSegment",
    "ShapeError",
    "Tokens",
    "UnsupportedError",
    "ValidKeys",
    "ValidQueries",
    "WeightsError",
    "Window",
    "attend",
    "attention_scores",
    "dot_product_attention",
    "explain",
    "init_params",
    "multi_head_attention",
    "scores_entropy",
    "scores_max",
    "scores_mean",
    "scores_top_k",
]
