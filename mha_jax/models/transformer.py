"""The Transformer of Vaswani et al. 2017, composed of `MultiHeadAttention`.

`Encoder` is the left half of the paper's figure 1, `Decoder` the right half, `Transformer` both.
`LanguageModel` is a causal encoder with a vocabulary at both ends; `ImageClassifier` is an encoder
that attends over rows and columns at once.

B batch, T target length, S source length, D width, W vocabulary. A padding mask is True at real
tokens.

Attention scores are kept on request, of every layer, in the collection "attention":
`model.apply(variables, ..., mutable=["attention"])`. Nothing is computed for them otherwise.
Keys and values are cached where the collection "cache" holds a `Cache` (a model's `empty_caches`):
`model.apply({**variables, "cache": caches}, ..., mutable=["cache"])`.

Source: Vaswani et al. 2017, arXiv:1706.03762, section 3; Xiong et al. 2020, arXiv:2002.04745
(the norm first).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.cache import Cache
from mha_jax.attention.given import as_array, integer
from mha_jax.errors import ShapeError
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.models.sizes import check_config, symbols


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and choices of a Transformer; the defaults are the paper's base model.

    Args:
      width: Features of a token, D; a multiple of `num_heads`.
      num_heads: Attention heads.
      hidden: Inner width of the feed-forward layers.
      encoder_layers: Layers of the encoder, or of the only stack.
      decoder_layers: Layers of the decoder.
      dropout: Rate on the output of every sub-layer and on the embeddings (section 5.4).
      attention_dropout: Rate on the attention weights.
      norm_first: False is the paper's `LayerNorm(x + f(x))`. True is `x + f(LayerNorm(x))` with one
        more norm at the end, which needs no long warmup and suits short runs.
      attention_axes: Axes that the encoder attends over; None is the one sequence axis.
      sliding_window: Keras's window of the encoder's self-attention; None sees everything.
      kernel_regularizer: Keras's name or config of a regularizer of all attention kernels.
      kernel_constraint: The same of a constraint, which the optimizer applies.

    Raises:
      ShapeError: A size, a rate or the number of heads cannot be meant.
    """

    width: int = 512
    num_heads: int = 8
    hidden: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm_first: bool = False
    attention_axes: tuple[int, ...] | None = None
    sliding_window: int | None = None
    kernel_regularizer: Any = None
    kernel_constraint: Any = None

    def __post_init__(self):
        sizes = {"width": 1, "num_heads": 1, "hidden": 1, "encoder_layers": 0, "decoder_layers": 0}
        check_config(self, "dropout", "attention_dropout", **sizes)


def sinusoids(positions: jax.typing.ArrayLike, width: int) -> jax.Array:
    """Encode positions as sines and cosines of geometric wavelengths.

    Args:
      positions: Integers of any shape.
      width: Features, an even number.

    Returns:
      Float32 array `[*positions.shape, width]`: the sines, then the cosines.

    Raises:
      ShapeError: `width` is odd.

    Source: Vaswani et al. 2017, section 3.5, where sines and cosines alternate: a permutation.

    >>> sinusoids(jnp.arange(5), 8).shape
    (5, 8)
    """
    integer("width", width, 0, 2**31 - 1, "It counts the features of a token.")
    positions = jnp.asarray(as_array("positions", positions, "integers"))
    if width % 2:
        raise ShapeError(
            f"positions are half sines, half cosines, which need an even number of features: got {width}. "
            "Let the width of a model be even, that of an ImageClassifier a multiple of 4."
        )
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = jnp.multiply.outer(positions.astype(jnp.float32), jnp.asarray(rates, jnp.float32))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def add_and_norm(
    config: Config, x: jax.Array, sublayer: Callable[[jax.Array], jax.Array], training: bool
) -> jax.Array:
    """Run a sub-layer inside dropout, residual connection and layer norm: "Add & Norm"."""
    norm = nn.LayerNorm()
    drop = nn.Dropout(config.dropout, deterministic=not training)
    if config.norm_first:
        return x + drop(sublayer(norm(x)))
    return norm(x + drop(sublayer(x)))


class Attention(nn.Module):
    """`MultiHeadAttention` of a config that keeps its scores and its cache where they are wanted."""

    config: Config
    attention_axes: tuple[int, ...] | None = None
    sliding_window: int | None = None

    @nn.compact
    def __call__(self, query, value, **options):
        layer = MultiHeadAttention(
            num_heads=self.config.num_heads,
            key_dim=self.config.width // self.config.num_heads,
            dropout=self.config.attention_dropout,
            attention_axes=self.attention_axes,
            sliding_window=self.sliding_window,
            kernel_regularizer=self.config.kernel_regularizer,
            kernel_constraint=self.config.kernel_constraint,
            name="layer",
        )
        keep_scores = self.is_mutable_collection("attention") and not self.is_initializing()
        cache = self.get_variable("cache", "held")
        out = layer(query, value, return_attention_scores=keep_scores, cache=cache, **options)
        out, *kept = out if isinstance(out, tuple) else (out,)
        if cache is not None:
            self.put_variable("cache", "held", kept.pop())
        if keep_scores:
            self.put_variable("attention", "scores", kept.pop())
        return out


class FeedForward(nn.Module):
    """Two dense layers with a ReLU between, at every position alike (section 3.3)."""

    config: Config

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.config.hidden, name="inner")(x))
        return nn.Dense(self.config.width, name="outer")(x)


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward: the left box of figure 1."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, causal: bool, training: bool):
        config = self.config
        attend = Attention(
            config, config.attention_axes, config.sliding_window, name="self_attention"
        )
        options = {"value_mask": mask, "use_causal_mask": causal, "training": training}
        x = add_and_norm(config, x, lambda x: attend(x, x, **options), training)
        return add_and_norm(config, x, FeedForward(config, name="feed_forward"), training)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the memory, feed-forward: the right box of figure 1."""

    config: Config

    @nn.compact
    def __call__(self, x, memory, memory_mask, training: bool):
        config = self.config
        attend_self = Attention(config, name="self_attention")
        attend_memory = Attention(config, name="cross_attention")
        causal = {"use_causal_mask": True, "training": training}
        across = {"value_mask": memory_mask, "training": training}
        x = add_and_norm(config, x, lambda x: attend_self(x, x, **causal), training)
        x = add_and_norm(config, x, lambda x: attend_memory(x, memory, **across), training)
        return add_and_norm(config, x, FeedForward(config, name="feed_forward"), training)


class Encoder(nn.Module):
    """A stack of encoder layers; with `causal` it is a decoder-only stack."""

    config: Config

    @nn.compact
    def __call__(self, x, mask=None, causal: bool = False, training: bool = False):
        for i in range(self.config.encoder_layers):
            x = EncoderLayer(self.config, name=f"layer_{i}")(x, mask, causal, training)
        return nn.LayerNorm(name="norm")(x) if self.config.norm_first else x


class Decoder(nn.Module):
    """A stack of decoder layers over the encoder's output, the memory."""

    config: Config

    @nn.compact
    def __call__(self, x, memory, memory_mask=None, training: bool = False):
        for i in range(self.config.decoder_layers):
            x = DecoderLayer(self.config, name=f"layer_{i}")(x, memory, memory_mask, training)
        return nn.LayerNorm(name="norm")(x) if self.config.norm_first else x


class Embedding(nn.Module):
    """Token table plus positions on the way in; the same table as classifier on the way out.

    Source: Vaswani et al. 2017, section 3.4 (shared weights, scaled by sqrt(D)).
    """

    vocabulary: int
    config: Config

    def setup(self):
        scale = self.config.width**-0.5
        self.table = nn.Embed(
            self.vocabulary, self.config.width, embedding_init=nn.initializers.normal(scale)
        )
        self.drop = nn.Dropout(self.config.dropout)

    def __call__(self, tokens, training: bool, start=0):
        tokens = symbols("tokens", tokens, self.vocabulary)
        positions = jnp.arange(tokens.shape[1])[None, :] + start
        x = self.table(tokens) * self.config.width**0.5 + sinusoids(positions, self.config.width)
        return self.drop(x, deterministic=not training)

    def logits(self, x):
        return self.table.attend(x)


class Transformer(nn.Module):
    """Encoder and decoder with their embeddings: figure 1 whole.

    Args:
      vocabulary: Symbols of the target, W.
      source_vocabulary: Symbols of the source; None shares the target's table, as in the paper.
      config: Sizes and choices.

    >>> model = Transformer(11, 7, Config(width=8, num_heads=2, hidden=16))
    >>> source, target = jnp.ones((3, 5), int), jnp.ones((3, 4), int)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), source, target)
    >>> jax.eval_shape(model.apply, variables, source, target).shape
    (3, 4, 11)
    """

    vocabulary: int
    source_vocabulary: int | None = None
    config: Config = Config()

    def setup(self):
        self.target_embedding = Embedding(self.vocabulary, self.config)
        self.source_embedding = (
            self.target_embedding
            if self.source_vocabulary is None
            else Embedding(self.source_vocabulary, self.config)
        )
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def __call__(self, source, target, source_mask=None, training: bool = False):
        """Map source `[B, S]` and shifted target `[B, T]` to logits `[B, T, W]`."""
        memory = self.encode(source, source_mask, training)
        return self.decode(target, memory, source_mask, training)

    def encode(self, source, source_mask=None, training: bool = False):
        """Map source tokens `[B, S]` to the memory `[B, S, D]`."""
        return self.encoder(self.source_embedding(source, training), source_mask, training=training)

    def decode(self, target, memory, memory_mask=None, training: bool = False, start=0):
        """Map target tokens `[B, T]` and the memory to logits `[B, T, W]` of the next tokens.

        With caches, `target` are the tokens from position `start` on (an integer, or `[B, 1]`), and
        `memory` is None once the caches hold it.
        """
        x = self.target_embedding(target, training, start)
        x = self.decoder(x, memory, memory_mask, training)
        return self.target_embedding.logits(x)

    def empty_caches(
        self, batch: int, length: int, memory_length: int, dtype: Any = jnp.float32
    ) -> dict[str, Any]:
        """Return the collection "cache" for `decode`, holding nothing yet.

        Args:
          batch: Targets B that are decoded together.
          length: The most tokens of a target.
          memory_length: Tokens S of the memory.
          dtype: Of the computation.

        Cost: 2 B D numbers a decoder layer and token of target and memory.

        >>> model = Transformer(11, 7, Config(width=8, num_heads=2, hidden=16))
        >>> source, target = jnp.ones((3, 5), int), jnp.ones((3, 4), int)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), source, target)
        >>> memory = jax.ShapeDtypeStruct((3, 5, 8), jnp.float32)
        >>> held = {"cache": model.empty_caches(batch=3, length=4, memory_length=5)}
        >>> decode = partial(model.apply, method="decode", mutable=["cache"])
        >>> logits, held = jax.eval_shape(decode, variables | held, target[:, :1], memory)
        >>> logits, held = jax.eval_shape(decode, variables | held, target[:, 1:], None)
        >>> logits.shape
        (3, 3, 11)
        """
        capacities = {"self_attention": length, "cross_attention": memory_length}
        layers = self.config.decoder_layers
        return {"decoder": _empty_stack(layers, batch, self.config, dtype, **capacities)}


def _empty_stack(layers: int, batch: int, config: Config, dtype: Any, **capacities: int) -> Any:
    """Return the caches of a stack whose layers attend by these names over so many tokens."""
    heads = (config.num_heads, config.width // config.num_heads)

    def layer() -> dict[str, Any]:
        return {
            name: {"held": Cache.empty(batch, capacity, *heads, dtype=dtype)}
            for name, capacity in capacities.items()
        }

    return {f"layer_{i}": layer() for i in range(layers)}


class LanguageModel(nn.Module):
    """A causal stack that predicts the next token.

    >>> model = LanguageModel(11, Config(width=8, num_heads=2, hidden=16, encoder_layers=1))
    >>> tokens = jnp.ones((3, 5), int)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    >>> jax.eval_shape(model.apply, variables, tokens).shape
    (3, 5, 11)
    """

    vocabulary: int
    config: Config = Config()

    def setup(self):
        self.embedding = Embedding(self.vocabulary, self.config)
        self.encoder = Encoder(self.config)

    def __call__(self, tokens, training: bool = False, start=0):
        """Map tokens `[B, T]` to logits `[B, T, W]` of the next tokens.

        With caches, `tokens` are those from position `start` on.
        """
        x = self.embedding(tokens, training, start)
        return self.embedding.logits(self.encoder(x, causal=True, training=training))

    def empty_caches(self, batch: int, length: int, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Return the collection "cache" for texts of at most `length` tokens, holding nothing yet.

        Cost: 2 B D numbers a layer and token.

        >>> model = LanguageModel(11, Config(width=8, num_heads=2, hidden=16, encoder_layers=1))
        >>> tokens = jnp.ones((3, 5), int)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        >>> held = {"cache": model.empty_caches(batch=3, length=5)}
        >>> step = partial(model.apply, mutable=["cache"])
        >>> logits, held = jax.eval_shape(step, variables | held, tokens[:, :2])
        >>> logits, held = jax.eval_shape(step, variables | held, tokens[:, 2:], start=2)
        >>> logits.shape
        (3, 3, 11)
        """
        layers = self.config.encoder_layers
        return {"encoder": _empty_stack(layers, batch, self.config, dtype, self_attention=length)}


class ImageClassifier(nn.Module):
    """An encoder over the pixels of an image, each attending to all rows and columns.

    Half of a pixel's position code is its row's, half its column's.

    >>> config = Config(width=8, num_heads=2, hidden=16, encoder_layers=1, attention_axes=(1, 2))
    >>> model, images = ImageClassifier(10, config), jnp.ones((3, 5, 7, 1))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
    >>> jax.eval_shape(model.apply, variables, images).shape
    (3, 10)
    """

    classes: int
    config: Config = Config(attention_axes=(1, 2))

    @nn.compact
    def __call__(self, images, training: bool = False):
        """Map images `[B, rows, columns, channels]` to logits `[B, classes]`."""
        half = partial(sinusoids, width=self.config.width // 2)
        rows, columns = (half(jnp.arange(n)) for n in images.shape[1:3])
        place = jnp.concatenate(jnp.broadcast_arrays(rows[:, None], columns[None, :]), axis=-1)
        x = nn.Dense(self.config.width, name="pixels")(images) + place[None]
        x = nn.Dropout(self.config.dropout)(x, deterministic=not training)
        x = Encoder(self.config, name="encoder")(x, training=training)
        return nn.Dense(self.classes, name="classes")(x.mean(axis=(1, 2)))
