"""Multi-head latent attention: keys and values of all heads are made of one small vector for each token.

The vectors, and one key with rotary positions that all heads share, are all that a cache holds. Without a
cache keys and values are written out; with one, their matrices are absorbed by queries and outputs, so that
the vectors themselves are the keys and the values of one head.

B batch   T length   D width   N heads   R rank of the latents   H size of a head's keys without positions
V value head size

Source: DeepSeek-AI 2024, arXiv:2405.04434 (DeepSeek V2), section 2.1.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from mha_jax.attention.cache import Cache
from mha_jax.attention.functions import dot_product_attention
from mha_jax.attention.given import integer
from mha_jax.attention.masks import Causal, ValidKeys
from mha_jax.attention.rotary import Rotary
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.types import Array, Bool, DType, Float


@dataclasses.dataclass(frozen=True)
class Latent:
    """Sizes of latent attention.

    Args:
      rank: Features of a token's latent, R.
      key_size: Features of a head's keys that have no positions, H.
      turned_size: Features of the key that has them, one for all heads.
      value_size: Features of a head's values, V.
      query_rank: Features of what queries are made of; they are made of the inputs if None.

    Raises:
      ShapeError: A size is not a whole number from 1 on.
    """

    rank: int
    key_size: int
    turned_size: int
    value_size: int
    query_rank: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name != "query_rank" or size is not None:
                integer(field.name, size, 1, 2**31 - 1, "It counts features.")

    @property
    def cached(self) -> tuple[int, int, int]:
        """Heads, and sizes of keys and values, that a cache holds."""
        return 1, self.rank + self.turned_size, self.rank


def check_beside(config: Any) -> None:
    """Refuse what a decoder's configuration asks of attention and latent attention has not.

    Raises:
      ShapeError: Naming it.
    """
    names = "num_kv_heads", "qk_norm", "use_sinks", "logit_cap", "alibi"
    given = [name for name in names if getattr(config, name)]
    for name in ("window", "chunk", "scale"):
        if any(getattr(layer, name) for layer in config.layers):
            given.append(f"{name} of a layer")
    if given:
        raise ShapeError(
            "latent attention has one latent for all heads, a causal mask and one scale: got "
            f"{', '.join(given)} beside latent=. Leave either out."
        )


class LatentAttention(nn.Module):
    """Causal self-attention through latents.

    Args:
      sizes: See `Latent`.
      num_heads: N.
      rotary: Positions of the last `turned_size` features of queries and keys; None turns nothing.
      scale: Factor on the logits; 1 / sqrt(H + turned_size) if None.
      use_bias: Whether projections of the inputs, and to the output, have biases.
      epsilon: Of the norms of latents and of what queries are made of.
      dtype: Of the computation; that of the parameters if None.

    >>> layer = LatentAttention(Latent(rank=4, key_size=3, turned_size=2, value_size=5), num_heads=2)
    >>> x = jnp.ones((1, 7, 6))
    >>> y, variables = layer.init_with_output(jax.random.key(0), x)
    >>> y.shape
    (1, 7, 6)
    >>> cache = Cache.empty(1, 7, *layer.sizes.cached)
    >>> y, cache = layer.apply(variables, x, cache=cache)
    >>> cache.keys.shape, cache.values.shape
    ((1, 1, 7, 6), (1, 1, 7, 4))
    """

    sizes: Latent
    num_heads: int
    rotary: Rotary | None = Rotary(interleaved=True)
    scale: float | None = None
    use_bias: bool = False
    epsilon: float = 1e-6
    dtype: DType = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens | None = None,
        valid: Bool[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Cache]:
        """Attend to this and what came before.

        Args:
          x: One vector for each token.
          tokens: Their positions, without a cache; from 0 on if None.
          valid: True at real tokens; others are not seen, and not put into the cache.
          cache: Of the tokens before: `Cache.empty(batch, capacity, *sizes.cached)`.

        Returns:
          The attended values, and the cache where there was one.

        Cost: Without a cache, that of attention with N heads; with one, that of N queries to one head of
          R + turned_size features, and R values.
        """
        sizes, heads = self.sizes, self.num_heads
        dense = partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype)
        norm = partial(nn.RMSNorm, self.epsilon, dtype=self.dtype)
        of_queries = x
        if sizes.query_rank is not None:
            of_queries = norm(name="query_norm")(dense(sizes.query_rank, name="query_down")(x))
        size = sizes.key_size + sizes.turned_size
        queries = nn.DenseGeneral((heads, size), use_bias=False, dtype=self.dtype, name="query")
        q, q_turned = jnp.split(queries(of_queries), [sizes.key_size], axis=-1)
        latent = dense(sizes.rank + sizes.turned_size, name="latent")(x)[:, :, None]
        latent, k_turned = jnp.split(latent, [sizes.rank], axis=-1)
        latent = norm(name="latent_norm")(latent)
        if self.rotary is not None:
            places = self._places(x.shape[1], tokens, valid, cache)
            q_turned, k_turned = (self.rotary(a, places) for a in (q_turned, k_turned))
        to_keys = _Kernel((sizes.rank, heads, sizes.key_size), name="key")()
        to_values = _Kernel((sizes.rank, heads, sizes.value_size), name="value")()
        q, latent, to_keys, to_values = promote_dtype(
            q, latent, to_keys, to_values, dtype=self.dtype
        )
        attend = partial(
            dot_product_attention, scale=size**-0.5 if self.scale is None else self.scale
        )
        own = Tokens(x.shape[1], valid=valid)
        if cache is None:
            k, v = (jnp.einsum("btor,rnh->btnh", latent, w) for w in (to_keys, to_values))
            k_turned = jnp.broadcast_to(k_turned, (*k.shape[:3], sizes.turned_size))
            q, k = jnp.concatenate([q, q_turned], -1), jnp.concatenate([k, k_turned], -1)
            placed = own if tokens is None else dataclasses.replace(tokens, valid=valid)
            mask = Causal() & ValidKeys()
            out = attend(q, k, v, mask=mask, query_tokens=placed, key_tokens=placed)
        else:
            q = jnp.einsum("btnh,rnh->btnr", q, to_keys)
            q, k = jnp.concatenate([q, q_turned], -1), jnp.concatenate([latent, k_turned], -1)
            out, cache = attend(q, k, latent, mask=Causal(), key_tokens=own, cache=cache)
            out = jnp.einsum("btnr,rnv->btnv", out, to_values)
        to_output = partial(nn.DenseGeneral, x.shape[-1], axis=(-2, -1), name="attention_output")
        y = to_output(use_bias=self.use_bias, dtype=self.dtype)(out)
        return y if cache is None else (y, cache)

    def _places(self, length, tokens, valid, cache) -> Any:
        if cache is not None:
            return jnp.maximum(cache.next_positions(length, valid), 0)
        return (Tokens(length) if tokens is None else tokens).positions


class _Kernel(nn.Module):
    """A matrix from one input axis to heads."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self):
        initializer = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        return self.param("kernel", initializer, self.shape)
