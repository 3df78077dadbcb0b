"""Keras's MultiHeadAttention as pure JAX functions and a Flax module: one answer on every path."""

import importlib
import typing

from mha_jax.attention.cache import Cache
from mha_jax.attention.call import Call, Output
from mha_jax.attention.dropout import Dropout
from mha_jax.attention.functions import attend, attention_scores, dot_product_attention, explain
from mha_jax.attention.masks import (
    Causal,
    Dense,
    Full,
    Mask,
    SameSegment,
    ValidKeys,
    ValidQueries,
    Window,
)
from mha_jax.attention.scores import scores_entropy, scores_max, scores_mean, scores_top_k
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import MhaError, ShapeError, UnsupportedError, WeightsError
from mha_jax.layer.functional import init_params, multi_head_attention
from mha_jax.layer.linen import MultiHeadAttention

__version__ = "0.1.0"

# Rooms that are imported when first used: `mha_jax.interop.keras`, `mha_jax.nnx`.
_ROOMS = {
    "constraints": "mha_jax.layer.constraints",
    "initializers": "mha_jax.layer.initializers",
    "interop": "mha_jax.interop",
    "models": "mha_jax.models",
    "nnx": "mha_jax.layer.nnx",
    "regularizers": "mha_jax.layer.regularizers",
    "sharding": "mha_jax.sharding",
    "train": "mha_jax.train",
    "visualize": "mha_jax.visualize",
}


def __getattr__(name: str) -> typing.Any:
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
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
