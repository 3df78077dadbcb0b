"""T5: an encoder and a decoder whose positions are biases of buckets, by its published config.

Logits are not scaled, norms have no bias and no mean, and a stack's layers share one table of biases.

B batch   T target length   S source length   D width   W vocabulary   N heads   R buckets

Source: Raffel et al. 2019, arXiv:1910.10683, section 2.1; Shazeer 2020, arXiv:2002.05202 (gates, in T5 1.1).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.biases import Buckets
from mha_jax.attention.cache import Cache
from mha_jax.errors import ShapeError, UnsupportedError
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.models.feed_forward import ACTIVATIONS, FeedForward
from mha_jax.models.sizes import check_config, check_named, check_numbers, published, symbols
from mha_jax.models.weights import arrays, variables_of
from mha_jax.types import Array, ArrayLike, Bool, DType, Float, Int, Params

Caches = tuple[tuple[Cache, Cache], ...]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices; the defaults are T5's small model.

    Args:
      vocabulary: Symbols, W.
      width: Features of a token, D.
      hidden: Inner width of the feed-forward layers.
      num_heads: Attention heads, N.
      head_size: Features of a head, any number.
      encoder_layers, decoder_layers: Layers of the stacks.
      buckets: Rows of the tables of biases, R.
      max_distance: From here on distances share a bucket.
      activation: "relu" (T5) or "gelu_tanh" (1.1).
      gated: Whether the activation multiplies a second projection (1.1).
      tied: Whether the embedding's table gives the logits, scaled by D ** -0.5 (not in 1.1).
      epsilon: Of the norms.

    Raises:
      ShapeError: A size cannot be meant.
    """

    vocabulary: int = 32_128
    width: int = 512
    hidden: int = 2048
    num_heads: int = 8
    head_size: int = 64
    encoder_layers: int = 6
    decoder_layers: int = 6
    buckets: int = 32
    max_distance: int = 128
    activation: str = "relu"
    gated: bool = False
    tied: bool = True
    epsilon: float = 1e-6

    def __post_init__(self):
        names = ("vocabulary", "width", "hidden", "num_heads", "head_size", "buckets")
        check_config(self, **dict.fromkeys(names, 1), encoder_layers=0, decoder_layers=0)
        check_named(self, activation=ACTIVATIONS)
        check_numbers(self, epsilon=0)


def _norm(config: Config, name: str) -> nn.Module:
    return nn.RMSNorm(config.epsilon, name=name)


def _attention(config: Config, name: str) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.num_heads,
        config.head_size,
        use_bias=False,
        output_shape=config.width,
        scale=1.0,
        name=name,
    )


class Layer(nn.Module):
    """Self-attention, attention to the memory where there is one, feed-forward; each with its norm first."""

    config: Config
    causal: bool

    @nn.compact
    def __call__(self, x, bias, mask, memory, memory_mask, caches):
        config = self.config
        own, across = (None, None) if caches is None else caches
        y = _norm(config, "attention_norm")(x)
        options = {"value_mask": mask, "use_causal_mask": self.causal, "bias": bias}
        y = _attention(config, "attention")(y, y, cache=own, **options)
        y, own = (y, None) if own is None else y
        x = x + y
        if self.causal:
            y = _norm(config, "memory_norm")(x)
            y = _attention(config, "memory")(y, memory, value_mask=memory_mask, cache=across)
            y, across = (y, None) if across is None else y
            x = x + y
        sizes = config.hidden, config.width, config.activation, config.gated
        feed_forward = FeedForward(*sizes, use_bias=False, name="feed_forward")
        return x + feed_forward(_norm(config, "hidden_norm")(x)), (own, across)


class Stack(nn.Module):
    """The encoder, or with `causal` the decoder."""

    config: Config
    causal: bool

    @nn.compact
    def __call__(self, x, mask=None, memory=None, memory_mask=None, caches=None):
        config = self.config
        shape = (config.buckets, config.num_heads)
        table = self.param("table", nn.initializers.normal(config.width**-0.5), shape)
        bias = Buckets(table, bidirectional=not self.causal, max_distance=config.max_distance)
        kept = []
        for i in range(config.decoder_layers if self.causal else config.encoder_layers):
            layer = Layer(config, self.causal, name=f"layer_{i}")
            held = None if caches is None else caches[i]
            x, held = layer(x, bias, mask, memory, memory_mask, held)
            kept.append(held)
        return _norm(config, "norm")(x), tuple(kept)


class T5(nn.Module):
    """Encoder and decoder with their vocabulary.

    >>> model = T5(Config(11, 8, 16, 2, 4, encoder_layers=1, decoder_layers=1))
    >>> source, target = jnp.ones((3, 5), int), jnp.ones((3, 4), int)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), source, target)
    >>> jax.eval_shape(model.apply, variables, source, target).shape
    (3, 4, 11)
    """

    config: Config = Config()

    def setup(self):
        self.embedding = nn.Embed(self.config.vocabulary, self.config.width)
        self.encoder = Stack(self.config, causal=False)
        self.decoder = Stack(self.config, causal=True)
        if not self.config.tied:
            self.logits = nn.Dense(self.config.vocabulary, use_bias=False)

    def __call__(
        self,
        source: Int[ArrayLike, "B S"],
        target: Int[ArrayLike, "B T"],
        mask: Bool[ArrayLike, "B S"] | Int[ArrayLike, "B S"] | None = None,
    ) -> Float[Array, "B T W"]:
        """Map source tokens and shifted target tokens to logits; `mask` is True at real source tokens."""
        return self.decode(target, self.encode(source, mask), mask)

    def encode(
        self,
        source: Int[ArrayLike, "B S"],
        mask: Bool[ArrayLike, "B S"] | Int[ArrayLike, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Map source tokens to the memory."""
        source = symbols("source", source, self.config.vocabulary)
        return self.encoder(self.embedding(source), mask)[0]

    def decode(
        self,
        target: Int[ArrayLike, "B T"],
        memory: Float[ArrayLike, "B S D"] | None,
        mask: Bool[ArrayLike, "B S"] | Int[ArrayLike, "B S"] | None = None,
        caches: Caches | None = None,
    ) -> Any:
        """Map target tokens and the memory to logits.

        Args:
          target: Tokens; with caches those after the ones that these hold.
          memory: Of `encode`; None once the caches hold it.
          mask: True at real tokens of the memory; of no use once the caches hold it.
          caches: `empty_caches`, or what the call before returned.

        Returns:
          Logits [B, T, W]; with caches, they and the caches.
        """
        x = self.embedding(symbols("target", target, self.config.vocabulary))
        mask = None if memory is None else mask
        count = self.config.decoder_layers
        if caches is not None and [*map(_is_pair, caches)] != [True] * count:
            raise ShapeError(
                f"caches must be a pair for each of the {count} layers: got {len(caches)}. Take "
                "model.empty_caches(batch, length, memory_length), then what every call returns."
            )
        x, kept = self.decoder(x, None, memory, mask, caches)
        if self.config.tied:
            logits = self.embedding.attend(x * self.config.width**-0.5)
        else:
            logits = self.logits(x)
        return logits if caches is None else (logits, kept)

    def empty_caches(
        self, batch: int, length: int, memory_length: int, dtype: DType = jnp.float32
    ) -> Caches:
        """Return caches for targets of `length` tokens and memories of `memory_length`, for every layer."""
        heads = (self.config.num_heads, self.config.head_size)

        def layer() -> tuple[Cache, Cache]:
            return (
                Cache.empty(batch, length, *heads, dtype=dtype),
                Cache.empty(batch, memory_length, *heads, dtype=dtype),
            )

        return tuple(layer() for _ in range(self.config.decoder_layers))


def _is_pair(caches: Any) -> bool:
    return isinstance(caches, tuple) and [isinstance(x, Cache) for x in caches] == [True, True]


def config_of(config: Mapping[str, Any]) -> Config:
    """Return our config for a Hugging Face one.

    Raises:
      UnsupportedError: If it is none of T5's, or says two things of the feed-forward layers.

    >>> config_of({"model_type": "t5", "vocab_size": 11, "d_model": 8, "d_ff": 16, "num_heads": 2, "d_kv": 4,
    ...            "num_layers": 1}).decoder_layers
    1
    """
    config = published(config)
    activation = config.get("feed_forward_proj", "relu")
    known = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}
    if config.get("model_type") != "t5" or activation not in tuple(known):
        raise UnsupportedError(
            f"the config is of the family {config.get('model_type')!r} with "
            f"feed_forward_proj={activation!r}: expected t5 with relu or gated-gelu."
        )
    named, gated = known[activation]
    config.refuse(dense_act_fn=named, is_gated_act=gated)
    return Config(
        config["vocab_size"],
        config["d_model"],
        config["d_ff"],
        config["num_heads"],
        config["d_kv"],
        config["num_layers"],
        config.get("num_decoder_layers") or config["num_layers"],
        config.get("relative_attention_num_buckets", 32),
        config.get("relative_attention_max_distance", 128),
        "gelu_tanh" if gated else "relu",
        gated,
        tied=config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
        epsilon=config.get("layer_norm_epsilon", 1e-6),
    )


def _names(stack: str, causal: bool, gated: bool) -> dict[str, str]:
    """Return PyTorch's names of a stack's modules."""
    block = stack + ".block.{i}.layer."
    kinds = {"attention": ("0", "SelfAttention")}
    kinds |= {"memory": ("1", "EncDecAttention")} if causal else {}
    last = "2" if causal else "1"
    dense = f"{block}{last}.DenseReluDense."
    names = {
        stack: f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{stack}/norm": f"{stack}.final_layer_norm",
        f"{stack}/layer_{{i}}/hidden_norm": f"{block}{last}.layer_norm",
        f"{stack}/layer_{{i}}/feed_forward/gate": dense + "wi_0",
        f"{stack}/layer_{{i}}/feed_forward/up": dense + ("wi_1" if gated else "wi"),
        f"{stack}/layer_{{i}}/feed_forward/down": dense + "wo",
    }
    for name, (place, theirs) in kinds.items():
        names[f"{stack}/layer_{{i}}/{name}_norm"] = f"{block}{place}.layer_norm"
        for ours, letter in zip(("query", "key", "value", "attention_output"), "qkvo"):
            names[f"{stack}/layer_{{i}}/{name}/{ours}"] = f"{block}{place}.{theirs}.{letter}"
    return names


def read(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[T5, dict[str, Params]]:
    """Return the model of a published config, and its parameters from PyTorch's tensors.

    Raises:
      UnsupportedError: As `config_of`.
      WeightsError: A tensor is missing or has another shape.
    """
    model = T5(config_of(config))
    names = {"embedding": "shared", "logits": "lm_head"}
    for stack in ("encoder", "decoder"):
        names |= _names(stack, causal=stack == "decoder", gated=model.config.gated)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return model, variables_of(model, names, arrays(tensors), tokens, tokens)
