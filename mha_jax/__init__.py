"""Keras's MultiHeadAttention as pure JAX functions and a Flax module: one answer on every path."""

import typing as _typing

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
from mha_jax.attention.patterns import ChunkedCausal, Dilated, PrefixLM
from mha_jax.attention.rotary import Rotary
from mha_jax.attention.scores import scores_entropy, scores_max, scores_mean, scores_top_k
from mha_jax.attention.tokens import Tokens
from mha_jax.engine.remat import remat_policy
from mha_jax.errors import ArgumentError, MhaError, ShapeError, UnsupportedError, WeightsError
from mha_jax.layer.functional import init_params, multi_head_attention
from mha_jax.layer.linen import MultiHeadAttention

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Cache",
    "Call",
    "Causal",
    "ChunkedCausal",
    "Dense",
    "Dilated",
    "Dropout",
    "Full",
    "Mask",
    "MhaError",
    "MultiHeadAttention",
    "Output",
    "PrefixLM",
    "Rotary",
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
    "remat_policy",
    "scores_entropy",
    "scores_max",
    "scores_mean",
    "scores_top_k",
]

if _typing.TYPE_CHECKING:
    from mha_jax import interop as interop
    from mha_jax import models as models
    from mha_jax import sharding as sharding
    from mha_jax import train as train
    from mha_jax import visualize as visualize
    from mha_jax.attention import biases as biases
    from mha_jax.attention import rotary as rotary
    from mha_jax.layer import constraints as constraints
    from mha_jax.layer import initializers as initializers
    from mha_jax.layer import nnx as nnx
    from mha_jax.layer import regularizers as regularizers
else:
    from mha_jax.rooms import inside as _inside
    from mha_jax.rooms import lazy as _lazy

    __getattr__, __dir__ = _lazy(
        __name__,
        _inside(__name__, "interop", "models", "sharding", "train", "visualize")
        | _inside(f"{__name__}.attention", "biases", "rotary")
        | _inside(f"{__name__}.layer", "constraints", "initializers", "nnx", "regularizers"),
        (*__all__, "__version__"),
    )
