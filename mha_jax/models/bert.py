"""The encoder of BERT and of ALBERT, composed of `MultiHeadAttention`.

It is the encoder of Vaswani et al. 2017 (the norm after every sub-layer) with learned positions, GELU
and a norm on the embeddings. ALBERT embeds in fewer features than it computes in, and runs one layer
again and again.

B batch   T length   N heads   M of them   D width   W vocabulary

Source: Devlin et al. 2018, arXiv:1810.04805, section 3; Lan et al. 2019, arXiv:1909.11942, section 3.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.call import Call
from mha_jax.attention.functions import attention_scores
from mha_jax.attention.given import integer, is_integer, of_kind
from mha_jax.attention.masks import ValidKeys
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.layer.projections import product
from mha_jax.models.sizes import check_config, reals, symbols
from mha_jax.types import Array, ArrayLike, Bool, Float, Int

# By the mean of squared deviations, as accurate as the tiny epsilon needs.
LayerNorm = partial(nn.LayerNorm, epsilon=1e-12, use_fast_variance=False)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an encoder; the defaults are BERT's base model.

    Args:
      vocabulary: Symbols, W.
      positions: Longest sequence.
      segments: Kinds of tokens that `segments` in the call tells apart.
      embedding: Features of the embeddings; None is `width`, anything else adds a projection.
      width: Features of a token, D; a multiple of `num_heads`.
      num_heads: Attention heads, N.
      hidden: Inner width of the feed-forward layers.
      layers: Which parameters each layer uses, in order: `(0, 1, 2)` is BERT with three layers, and
        `(0, 0, 0)` ALBERT, whose three layers share one set.
      dropout: Rate on the embeddings, on every sub-layer and on the attention weights.

    Raises:
      ShapeError: A size, the rate or the number of heads cannot be meant.
    """

    vocabulary: int = 30_522
    positions: int = 512
    segments: int = 2
    embedding: int | None = None
    width: int = 768
    num_heads: int = 12
    hidden: int = 3072
    layers: tuple[int, ...] = tuple(range(12))
    dropout: float = 0.1

    def __post_init__(self):
        sizes = dict.fromkeys(
            ("vocabulary", "positions", "segments", "width", "num_heads", "hidden"), 1
        )
        optional = {} if self.embedding is None else {"embedding": 1}
        check_config(self, "dropout", **sizes, **optional)
        hint = "A layer is the number of the parameters it uses: tuple(range(12)), say."
        for layer in of_kind("layers", self.layers, tuple, hint):
            integer("each of layers", layer, 0, 2**20, hint)


class Embeddings(nn.Module):
    """Symbol, position and segment embedded, summed and normed."""

    config: Config

    @nn.compact
    def __call__(self, tokens, segments, training: bool):
        config = self.config
        embed = partial(nn.Embed, features=config.embedding or config.width)
        places = jnp.arange(tokens.shape[1])[None, :]
        x = embed(config.vocabulary, name="symbols")(tokens)
        x = x + embed(config.positions, name="positions")(places)
        x = x + embed(config.segments, name="segments")(segments)
        x = nn.Dropout(config.dropout, deterministic=not training)(LayerNorm(name="norm")(x))
        return x if config.embedding is None else nn.Dense(config.width, name="projection")(x)


class Layer(nn.Module):
    """Self-attention, then feed-forward, each with "Add & Norm"."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, training: bool):
        config = self.config
        drop = nn.Dropout(config.dropout, deterministic=not training)
        attend = MultiHeadAttention(
            num_heads=config.num_heads,
            key_dim=config.width // config.num_heads,
            dropout=config.dropout,
            name="attention",
        )
        attended = attend(x, x, value_mask=mask, training=training)
        x = LayerNorm(name="attention_norm")(x + drop(attended))
        inner = nn.gelu(nn.Dense(config.hidden, name="inner")(x), approximate=False)
        outer = nn.Dense(config.width, name="outer")(inner)
        return LayerNorm(name="outer_norm")(x + drop(outer))


class Bert(nn.Module):
    """BERT, or ALBERT, without a head: tokens in, features out.

    The states between the layers are kept on request in the collection "hidden": a tuple `states`,
    the embeddings first, the output last.

    >>> model = Bert(Config(11, width=8, num_heads=2, hidden=16, layers=(0, 0, 0)))
    >>> tokens = jnp.ones((3, 5), int)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    >>> keep = partial(model.apply, mutable=["hidden"])
    >>> out, kept = jax.eval_shape(keep, variables, tokens)
    >>> out.shape, len(kept["hidden"]["states"])
    ((3, 5, 8), 4)
    """

    config: Config = Config()

    @nn.compact
    def __call__(
        self,
        tokens: Int[ArrayLike, "B T"],
        mask: Bool[ArrayLike, "B T"] | Int[ArrayLike, "B T"] | None = None,
        segments: Int[ArrayLike, "B T"] | None = None,
        training: bool = False,
    ) -> Float[Array, "B T D"]:
        """Encode tokens.

        Args:
          tokens: Numbers of the symbols.
          mask: True at real tokens, False at padding; None is all real.
          segments: Kind of every token; 0 if None.
          training: Whether dropout acts, by the "dropout" stream.

        Raises:
          ShapeError: The sequence is longer than there are positions.
        """
        config = self.config
        tokens = symbols("tokens", tokens, config.vocabulary)
        if tokens.shape[-1] > config.positions:
            raise ShapeError(
                f"tokens of shape {tokens.shape} are longer than the {config.positions} positions that "
                "the model has. Shorten them, or split them into several sequences."
            )
        segments = jnp.zeros_like(tokens) if segments is None else segments
        segments = symbols("segments", segments, config.segments)
        layers = {i: Layer(config, name=f"layer_{i}") for i in sorted(set(config.layers))}
        x = Embeddings(config, name="embeddings")(tokens, segments, training)
        self._keep(x)
        for i in config.layers:
            x = layers[i](x, mask, training)
            self._keep(x)
        return x

    def _keep(self, x):
        if not self.is_initializing():
            self.sow("hidden", "states", x)


def scores(
    model: Bert,
    variables: dict[str, Any],
    tokens: Int[ArrayLike, "B T"],
    mask: Bool[ArrayLike, "B T"] | None = None,
    *,
    layer: int,
    heads: Sequence[int],
) -> Float[Array, "B M T T"]:
    """Return the attention scores of some heads of one layer.

    Args:
      model: The encoder.
      variables: Its parameters.
      tokens, mask: As for the encoder.
      layer: Place of the layer in `model.config.layers`, from 0.
      heads: Which heads of it.

    Raises:
      ShapeError: There is no such layer or head.

    Cost: The layers below, and O(B M T T) memory; neither the layer's other heads nor the layers
      above it are computed.

    >>> model = Bert(Config(11, width=8, num_heads=2, hidden=16, layers=(0, 1)))
    >>> tokens = jnp.ones((3, 5), int)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    >>> jax.eval_shape(partial(scores, model, layer=1, heads=[1]), variables, tokens).shape
    (3, 1, 5, 5)
    """
    config = model.config
    if not is_integer(layer) or not 0 <= layer < len(config.layers):
        raise ShapeError(
            f"layer={layer} does not exist: expected one from 0 to {len(config.layers) - 1}."
        )
    listed = isinstance(heads, (Sequence, np.ndarray))
    if not listed or not all(is_integer(x) and 0 <= x < config.num_heads for x in heads):
        raise ShapeError(
            f"heads={heads!r} do not exist: expected integers from 0 to {config.num_heads - 1}."
        )
    if mask is not None:
        mask = reals("mask", mask, jnp.asarray(tokens))
    return _scores(model, int(layer), tuple(map(int, heads)), variables, tokens, mask)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _scores(model, layer, heads, variables, tokens, mask):
    config = model.config
    below = Bert(dataclasses.replace(config, layers=config.layers[:layer]))
    x = jnp.asarray(below.apply(variables, tokens, mask))
    params = variables["params"][f"layer_{config.layers[layer]}"]["attention"]
    chosen = {
        name: {part: weight[..., np.asarray(heads), :] for part, weight in params[name].items()}
        for name in ("query", "key")
    }
    q, k = (
        product(name, weights["kernel"], weights.get("bias"), x) for name, weights in chosen.items()
    )
    key_tokens = Tokens(x.shape[1], valid=None if mask is None else jnp.asarray(mask))
    return attention_scores(Call(q, k, k, k_tokens=key_tokens, mask=ValidKeys()))
