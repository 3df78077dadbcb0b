"""The decoder of today's language models, composed of `MultiHeadAttention`: one block, many configs.

Families differ in data: the norm and where it stands, the activation, a gate, biases, rotary positions or
learned ones, windows or chunks in some layers, caps, norms of queries and keys, sinks, experts.
`models.llama` and `models.gpt` read configs and weights of published families.

B batch   T length   D width   F hidden width   W vocabulary   X experts

Source: Radford et al. 2019 (GPT-2); Touvron et al. 2023, arXiv:2302.13971 (Llama); Gemma Team 2024,
arXiv:2408.00118 (norms after the sub-layers, caps); OpenAI 2025, arXiv:2508.10925 (sinks, experts).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.biases import Alibi
from mha_jax.attention.cache import Cache
from mha_jax.attention.patterns import ChunkedCausal
from mha_jax.attention.tokens import Tokens
from mha_jax.errors import ShapeError
from mha_jax.layer import vectors
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.models.decoder_config import Config as Config
from mha_jax.models.decoder_config import Local as Local
from mha_jax.models.feed_forward import Experts as Experts
from mha_jax.models.feed_forward import FeedForward, Mixture
from mha_jax.models.feed_forward import GroupedExperts as GroupedExperts
from mha_jax.models.feed_forward import SharedExperts as SharedExperts
from mha_jax.models.latent import LatentAttention
from mha_jax.models.sizes import reals, symbols
from mha_jax.models.weights import variables_of
from mha_jax.types import Array, ArrayLike, Bool, DType, Float, Int, Params


def _norm(config: Config, name: str) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.epsilon, dtype=config.dtype, name=name)
    return nn.LayerNorm(
        config.epsilon,
        dtype=config.dtype,
        use_bias=config.norm_bias,
        use_fast_variance=False,
        name=name,
    )


def _qk_norm(config: Config) -> Any:
    """Return the norm of queries and keys, with the model's epsilon, as a Flax module's class."""
    if config.qk_norm not in vectors.NORMS:
        return config.qk_norm
    norm = vectors.NORMS[config.qk_norm]
    over, weights = (tuple(range(-axes, 0)) for axes in (norm.over, norm.weights))
    options = {"reduction_axes": over, "feature_axes": weights, "use_scale": bool(weights)}
    options |= {"epsilon": config.epsilon, "dtype": config.dtype}
    if norm.centred:
        return partial(nn.LayerNorm, use_bias=False, use_fast_variance=False, **options)
    return partial(nn.RMSNorm, **options)


def _feed_forward(config: Config, sparse: bool) -> nn.Module:
    if config.experts is not None and sparse:
        sizes = config.hidden, config.width, config.dtype
        return Mixture(config.experts, *sizes, name="feed_forward")
    sizes = config.dense_hidden or config.hidden, config.width, config.activation, config.gated
    return FeedForward(*sizes, config.hidden_bias, config.dtype, name="feed_forward")


def _attention(config: Config, local: Local) -> Callable:
    if config.latent is not None:
        sizes = config.latent, config.num_heads, local.rotary, config.scale
        options = {"use_bias": bool(config.use_bias), "dtype": config.dtype}
        attend = LatentAttention(*sizes, **options, name="attention")
        return lambda x, cache, value_mask=None, query_tokens=None, key_tokens=None: attend(
            x, query_tokens, value_mask, cache
        )
    attend = MultiHeadAttention(
        num_heads=config.num_heads,
        key_dim=config.key_dim,
        num_kv_heads=config.num_kv_heads,
        use_bias=config.use_bias,
        output_shape=config.width,
        sliding_window=local.window,
        rotary=local.rotary,
        qk_norm=_qk_norm(config) if local.normed else None,
        use_sinks=config.use_sinks,
        scale=config.scale if local.scale is None else local.scale,
        logit_cap=config.logit_cap,
        dtype=config.dtype,
        name="attention",
    )
    rules: dict[str, Any] = {"use_causal_mask": True}
    if local.chunk is not None:
        rules["mask"] = ChunkedCausal(local.chunk)
    if config.alibi:
        rules["bias"] = Alibi.of_heads(config.num_heads)
    return lambda x, cache, **options: attend(x, x, cache=cache, **rules, **options)


class _Bias(nn.Module):
    """A number added to every feature."""

    @nn.compact
    def __call__(self, x):
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return x + bias[None, None].astype(x.dtype)


class Block(nn.Module):
    """Attention, then feed-forward, each in a residual connection with its norms."""

    config: Config
    local: Local

    @nn.compact
    def __call__(self, x, cache, training, **options):
        config, local = self.config, self.local
        drop = nn.Dropout(config.dropout, deterministic=not training)
        normed = _norm(config, "attention_norm")(x) if config.norm_before else x
        attended = _attention(config, local)(normed, cache, **options)
        attended, cache = (attended, None) if cache is None else attended
        if config.norm_after:
            attended = _norm(config, "attention_norm_after")(attended)
        attended = drop(attended)
        if not (config.parallel and config.one_norm):
            normed = x if config.parallel else x + attended
            normed = _norm(config, "hidden_norm")(normed) if config.norm_before else normed
        out = _feed_forward(config, local.sparse)(normed)
        if config.norm_after:
            out = _norm(config, "hidden_norm_after")(out)
        return x + attended + drop(out), cache


class CausalLM(nn.Module):
    """A decoder with a vocabulary at both ends: tokens in, logits of the next ones out.

    >>> model = CausalLM(Config(11, 8, 16, 2, layers=(Local(mj.Rotary()), Local(window=3))))
    >>> tokens = jnp.ones((3, 5), int)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    >>> jax.eval_shape(model.apply, variables, tokens).shape
    (3, 5, 11)
    """

    config: Config

    @nn.compact
    def __call__(
        self,
        tokens: Int[ArrayLike, "B T"],
        mask: Bool[ArrayLike, "B T"] | Int[ArrayLike, "B T"] | None = None,
        caches: tuple[Cache, ...] | None = None,
        training: bool = False,
    ) -> Float[Array, "B T W"] | tuple[Float[Array, "B T W"], tuple[Cache, ...]]:
        """Map tokens to logits.

        Args:
          tokens: Numbers of the symbols.
          mask: True at real tokens, wherever in a row they stand: positions count these alone.
          caches: Of the tokens before, one for every layer: `empty_caches`. Those of `tokens` are appended.
          training: Whether there is dropout, drawn from the stream "dropout".

        Returns:
          The logits, and the caches where there were some.

        Raises:
          ShapeError: There are more tokens than learned positions, or not one cache for every layer.
        """
        config = self.config
        tokens = symbols("tokens", tokens, config.vocabulary)
        mask = None if mask is None else reals("mask", mask, tokens)
        given = None if caches is None else [isinstance(cache, Cache) for cache in caches]
        if given is not None and (len(given) != len(config.layers) or not all(given)):
            raise ShapeError(
                f"caches must be one for each of the {len(config.layers)} layers: got {len(given)}. "
                "Take model.empty_caches(batch, capacity), then what every call returns."
            )
        positions = _positions(tokens, mask, caches)
        options: dict[str, Any] = {"value_mask": mask}
        if caches is None and mask is not None:
            placed = Tokens(tokens.shape[1], pos=positions)
            options |= {"query_tokens": placed, "key_tokens": placed}
        embed = nn.Embed(config.vocabulary, config.width, dtype=config.dtype, name="embedding")
        x = embed(tokens)
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.positions is not None:
            self._check_length(tokens, caches)
            places = nn.Embed(config.positions, config.width, dtype=config.dtype, name="positions")
            x = x + places(positions)
        if config.embedding_norm:
            x = _norm(config, "embedding_norm")(x)
        x = nn.Dropout(config.dropout, deterministic=not training)(x)
        kept = []
        for i, local in enumerate(config.layers):
            cache = None if caches is None else caches[i]
            x, cache = Block(config, local, name=f"layer_{i}")(x, cache, training, **options)
            kept.append(cache)
        x = _norm(config, "norm")(x)
        if config.tied:
            logits = embed.attend(x)
            logits = _Bias(name="logits")(logits) if config.output_bias else logits
        else:
            biased = {"use_bias": config.output_bias, "dtype": config.dtype}
            logits = nn.Dense(config.vocabulary, **biased, name="logits")(x)
        logits = logits * jnp.asarray(config.output_scale, logits.dtype)
        if config.output_cap is not None:
            logits = config.output_cap * jnp.tanh(logits / config.output_cap)
        return logits if caches is None else (logits, tuple(kept))

    def _check_length(self, tokens, caches):
        longest = caches[0].capacity if caches else tokens.shape[1]
        if longest > (self.config.positions or 0):
            what = "slots of the caches" if caches else "tokens"
            raise ShapeError(
                f"the model has learned {self.config.positions} positions: got {longest} {what}. "
                "Shorten them."
            )

    def empty_caches(
        self, batch: int, capacity: int, dtype: DType = jnp.float32, rolling: bool = False
    ) -> tuple[Cache, ...]:
        """Return a cache for every layer, holding nothing yet.

        Args:
          batch: Texts that are decoded together.
          capacity: The most tokens of a text.
          dtype: Of the computation, or "int8".
          rolling: Whether layers with a window or chunks hold as many tokens alone, of texts of any length;
            the others hold `capacity`.

        Raises:
          ShapeError: The caches shall roll, and the model has learned its positions.

        >>> model = CausalLM(Config(11, 8, 16, 2, layers=(Local(mj.Rotary()),)))
        >>> tokens = jnp.ones((3, 5), int)
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
        >>> caches = model.empty_caches(batch=3, capacity=5)
        >>> logits, caches = jax.eval_shape(model.apply, variables, tokens[:, :2], None, caches)
        >>> logits, caches = jax.eval_shape(model.apply, variables, tokens[:, 2:], None, caches)
        >>> logits.shape
        (3, 3, 11)
        """
        config = self.config
        sizes = config.num_kv_heads or config.num_heads, config.key_dim, config.key_dim
        if config.latent is not None:
            sizes = config.latent.cached
        if rolling and config.positions is not None:
            raise ShapeError(
                f"the model has learned {config.positions} positions, and rolling=True is for texts without "
                "end. Leave it out."
            )
        windows = [local.window or local.chunk if rolling else None for local in config.layers]
        return tuple(
            Cache.empty(batch, window or capacity, *sizes, dtype=dtype, rolling=window is not None)
            for window in windows
        )


def _positions(tokens, mask, caches):
    """Return the positions of tokens: real ones count, and those in the caches come before."""
    length = tokens.shape[1]
    if caches:
        return jnp.maximum(caches[0].next_positions(length, mask), 0)
    if mask is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def filled(
    config: Config, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> tuple[CausalLM, dict[str, Params]]:
    """Return the model of a config, and its parameters from PyTorch's tensors; see `weights.fill`.

    Raises:
      WeightsError: A tensor is missing or has another shape.
    """
    model = CausalLM(config)
    return model, variables_of(model, names, tensors)
