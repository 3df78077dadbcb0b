"""Sizes and choices of `models.decoder`, and what cannot be meant of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from mha_jax.attention.given import floating, integer, of_kind
from mha_jax.attention.rotary import Rotary
from mha_jax.errors import ShapeError
from mha_jax.layer.checks import scale_or_none
from mha_jax.models.feed_forward import ACTIVATIONS, Experts, GroupedExperts, SharedExperts
from mha_jax.models.latent import Latent, check_beside
from mha_jax.models.sizes import FLOAT32, check_config, check_named, check_numbers
from mha_jax.types import Array, DType


@dataclasses.dataclass(frozen=True)
class Local:
    """What one layer has of its own.

    Args:
      rotary: Rotary positions; None turns nothing.
      window: Tokens that a query sees, its own included; None sees all before it.
      chunk: Tokens of the chunks that a query does not see beyond, as in Llama 4; None cuts nothing.
      scale: Instead of the `Config`'s.
      normed: Whether queries and keys have the `Config`'s `qk_norm`.
      sparse: Whether the feed-forward layer has the `Config`'s experts.
    """

    rotary: Rotary | None = None
    window: int | None = None
    chunk: int | None = None
    scale: float | Callable[[Array], Array] | None = None
    normed: bool = True
    sparse: bool = True

    def __post_init__(self):
        for name in ("window", "chunk"):
            if (size := getattr(self, name)) is not None:
                integer(
                    f"{name} of a Local", size, 1, 2**31 - 1, "It counts tokens; None has no end."
                )
        scale_or_none("scale of a Local", self.scale)
        if self.rotary is not None:
            of_kind("rotary of a Local", self.rotary, Rotary, "Pass mj.Rotary(), or None.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices of a decoder; the defaults are Llama's ways.

    Args:
      vocabulary: Symbols, W.
      width: Features of a token, D.
      hidden: Inner width of the feed-forward layers, F.
      num_heads: Query heads.
      layers: One `Local` for every layer.
      num_kv_heads: Key-value heads; `num_heads` if None.
      head_size: Features of a head; `width / num_heads` if None.
      norm: "rms" or "layer".
      epsilon: Of the norms, those of queries and keys among them.
      norm_before: Whether a sub-layer's input is normed; OLMo 2 has norms after alone.
      norm_after: Whether a sub-layer's output is normed too, as in Gemma 2.
      norm_bias: Whether norms of the kind "layer" have biases; Cohere's have none.
      parallel: Whether both sub-layers read the same input, as in GPT-NeoX.
      one_norm: Whether parallel sub-layers share their norm, too, as in GPT-J.
      activation: One of `ACTIVATIONS`.
      gated: Whether the activation multiplies a second projection.
      experts: Instead of one feed-forward layer.
      dense_hidden: Inner width of the layers without experts; `hidden` if None.
      use_bias: Of the attention, as of `MultiHeadAttention`.
      hidden_bias: Whether the feed-forward layers have biases.
      positions: Learned positions, as many; None has none.
      alibi: Whether logits fall with the distance, by the slopes of `biases.Alibi.of_heads`.
      qk_norm, use_sinks, scale, logit_cap: As of `MultiHeadAttention`.
      latent: Of what keys and values are made, as in DeepSeek V3, instead of `MultiHeadAttention`.
      embedding_norm: Whether embeddings are normed, as in BLOOM.
      embedding_scale: What embeddings are multiplied by.
      output_cap: The logits of the vocabulary are `cap * tanh(logit / cap)`; None leaves them.
      output_scale: What the logits of the vocabulary are multiplied by.
      output_bias: Whether they have biases.
      tied: Whether the embedding's table gives the logits, too.
      dropout: Rate on the embeddings and on the output of every sub-layer.
      dtype: Of the computation; that of the parameters if None.

    Raises:
      ShapeError: A size, a rate or a name cannot be meant.
    """

    vocabulary: int
    width: int
    hidden: int
    num_heads: int
    layers: tuple[Local, ...]
    num_kv_heads: int | None = None
    head_size: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-6
    norm_before: bool = True
    norm_after: bool = False
    norm_bias: bool = True
    parallel: bool = False
    one_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    experts: Experts | SharedExperts | GroupedExperts | None = None
    dense_hidden: int | None = None
    use_bias: bool | tuple[str, ...] = False
    hidden_bias: bool = False
    positions: int | None = None
    alibi: bool = False
    embedding_norm: bool = False
    qk_norm: Any = None
    use_sinks: bool = False
    scale: float | None = None
    logit_cap: float | None = None
    latent: Latent | None = None
    embedding_scale: float = 1.0
    output_cap: float | None = None
    output_scale: float = 1.0
    output_bias: bool = False
    tied: bool = False
    dropout: float = 0.0
    dtype: DType = None

    def __post_init__(self):
        sizes = dict.fromkeys(("vocabulary", "width", "hidden", "num_heads"), 1)
        given = ("num_kv_heads", "head_size", "positions", "dense_hidden")
        optional = {name: 1 for name in given if getattr(self, name) is not None}
        check_config(self, "dropout", **sizes, **optional)
        check_named(self, norm=("rms", "layer"), activation=ACTIVATIONS)
        check_numbers(self, epsilon=0, embedding_scale=-FLOAT32, output_scale=-FLOAT32)
        if self.output_cap is not None:
            check_numbers(self, output_cap=1e-30)
        if self.dtype is not None:
            floating("dtype", self.dtype)
        if not isinstance(self.layers, (tuple, list)):
            raise ShapeError(f"layers must be a Local for each: got {self.layers!r}.")
        for layer in self.layers:
            of_kind("each of layers", layer, Local, "Pass layers=(Local(Rotary()),) * 12, say.")
        object.__setattr__(self, "layers", tuple(self.layers))
        kinds = Experts | SharedExperts | GroupedExperts | None
        if not isinstance(self.experts, kinds):
            raise ShapeError(
                f"experts must be Experts, SharedExperts or GroupedExperts, or None: got {self.experts!r}."
            )
        if self.latent is not None:
            check_beside(self)

    @property
    def key_dim(self) -> int:
        """Features of a head."""
        return self.head_size or self.width // self.num_heads
