"""Feed-forward layers of Transformers: two projections, three with a gate, or experts that a router chooses.

B batch   T length   D width   F hidden width   X experts

Source: Shazeer 2020, arXiv:2002.05202 (gates); OpenAI 2025, arXiv:2508.10925 (experts); Meta 2025 (Llama 4:
an expert that all tokens share); DeepSeek-AI 2024, arXiv:2412.19437 (experts in groups).
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from mha_jax.types import Array, DType

ACTIVATIONS = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Experts:
    """Feed-forward layers of which a router chooses a few for every token.

    Args:
      count: How many there are, X.
      chosen: How many a token takes.
      limit: Where the inner features are clipped.
      slope: Of the sigmoid that gates them.

    Source: OpenAI 2025, arXiv:2508.10925, section 2.2.
    """

    count: int
    chosen: int
    limit: float = 7.0
    slope: float = 1.702

    def layer(self, *sizes: Any, name: str) -> nn.Module:
        """Return the feed-forward layer of these experts: hidden, width, dtype."""
        return Mixture(self, *sizes, name=name)


@dataclasses.dataclass(frozen=True)
class SharedExperts:
    """Experts of which a router chooses a few for every token, beside one that all tokens share.

    The router's sigmoid multiplies what a chosen expert reads, not what it writes.

    Args:
      count: How many there are to choose from, X.
      chosen: How many a token takes.
      activation: One of `ACTIVATIONS`.
    """

    count: int
    chosen: int
    activation: str = "silu"

    def layer(self, *sizes: Any, name: str) -> nn.Module:
        """Return the feed-forward layer of these experts: hidden, width, dtype."""
        return SharedMixture(self, *sizes, name=name)


@dataclasses.dataclass(frozen=True)
class GroupedExperts:
    """Experts in groups: a router chooses groups for every token, then experts of these, beside shared ones.

    Groups are chosen by the sum of their two best scores. Scores are sigmoids; what is added to them for the
    choice (the parameter "correction") has no gradient.

    Args:
      count: How many there are to choose from, X.
      chosen: How many a token takes.
      groups: How many groups they are in.
      groups_chosen: How many groups a token's experts come from.
      shared: How many experts all tokens share.
      normalized: Whether a token's weights are divided by their sum.
      scale: What they are multiplied by.
      activation: One of `ACTIVATIONS`.

    Source: DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2.
    """

    count: int
    chosen: int
    groups: int = 1
    groups_chosen: int = 1
    shared: int = 1
    normalized: bool = True
    scale: float = 1.0
    activation: str = "silu"

    def layer(self, *sizes: Any, name: str) -> nn.Module:
        """Return the feed-forward layer of these experts: hidden, width, dtype."""
        return GroupedMixture(self, *sizes, name=name)

    def shares(self, logits: Array, correction: Array) -> Array:
        """Return what every expert counts for: [B, T, X] of the router's logits, and what it adds, [X]."""
        scores = nn.sigmoid(logits)
        choice = scores + correction[None, None]
        grouped = choice.reshape(*choice.shape[:2], self.groups, -1)
        best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        among = _chosen(best, self.groups_chosen)[..., None]
        choice = jnp.where(among, grouped, -jnp.inf).reshape(choice.shape)
        share = jnp.where(_chosen(choice, self.chosen), scores, 0)
        if self.normalized:
            share = share / (share.sum(-1, keepdims=True) + 1e-20)
        return share * self.scale


class FeedForward(nn.Module):
    """Two projections with an activation between, or three with a gate.

    Args:
      hidden: Inner width, F.
      width: Of the output, D.
      activation: One of `ACTIVATIONS`.
      gated: Whether the activation multiplies a second projection.
      use_bias: Whether projections have biases.
      dtype: Of the computation; that of the parameters if None.

    Source: Shazeer 2020, arXiv:2002.05202.
    """

    hidden: int
    width: int
    activation: str = "silu"
    gated: bool = False
    use_bias: bool = True
    dtype: DType = None

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype)
        act = ACTIVATIONS[self.activation]
        up = dense(self.hidden, name="up")(x)
        inner = act(dense(self.hidden, name="gate")(x)) * up if self.gated else act(up)
        return dense(self.width, name="down")(inner)


class Mixture(nn.Module):
    """Experts, all computed and few weighed: right, and as dear as all of them together."""

    experts: Experts
    hidden: int
    width: int
    dtype: DType = None

    @nn.compact
    def __call__(self, x):
        experts = self.experts
        logits = nn.Dense(experts.count, dtype=self.dtype, name="router")(x)
        share = nn.softmax(jnp.where(_chosen(logits, experts.chosen), logits, -jnp.inf))
        expert = partial(_OfExperts, experts.count)
        inner = expert(2 * self.hidden, name="experts_gate_up")(x[:, :, None])
        gate = jnp.minimum(inner[..., ::2], experts.limit)
        up = jnp.clip(inner[..., 1::2], -experts.limit, experts.limit)
        inner = (up + 1) * gate * nn.sigmoid(gate * experts.slope)
        out = expert(self.width, name="experts_down")(inner)
        return jnp.einsum("btx,btxd->btd", share, out)


class SharedMixture(nn.Module):
    """Experts beside a shared one, all computed: right, and as dear as all of them together."""

    experts: SharedExperts
    hidden: int
    width: int
    dtype: DType = None

    @nn.compact
    def __call__(self, x):
        experts = self.experts
        logits = nn.Dense(experts.count, use_bias=False, dtype=self.dtype, name="router")(x)
        share = jnp.where(_chosen(logits, experts.chosen), nn.sigmoid(logits), 0)
        read = x[:, :, None] * share[..., None]
        out = _gated(read, experts.count, self.hidden, self.width, experts.activation)
        sizes = self.hidden, self.width, experts.activation, True, False, self.dtype
        return out.sum(2) + FeedForward(*sizes, name="shared")(x)


class GroupedMixture(nn.Module):
    """Experts in groups, all computed: right, and as dear as all of them together."""

    experts: GroupedExperts
    hidden: int
    width: int
    dtype: DType = None

    @nn.compact
    def __call__(self, x):
        experts = self.experts
        route = nn.Dense(experts.count, use_bias=False, dtype=jnp.float32, name="router")
        correction = self.param("correction", nn.initializers.zeros, (experts.count,))
        share = experts.shares(route(x), correction).astype(x.dtype)
        out = _gated(x[:, :, None], experts.count, self.hidden, self.width, experts.activation)
        sizes = self.hidden * experts.shared, self.width, experts.activation, True, False
        return jnp.einsum("btx,btxd->btd", share, out) + FeedForward(
            *sizes, self.dtype, name="shared"
        )(x)


def _chosen(scores: Array, count: int) -> Array:
    """Return booleans that are true at the largest along the last axis."""
    places = jax.lax.top_k(scores, count)[1]
    return jax.nn.one_hot(places, scores.shape[-1], dtype=bool).any(-2)


def _gated(x: Array, experts: int, hidden: int, width: int, activation: str) -> Array:
    """Return what every expert of the module that calls this writes: [B, T, X or 1, D] -> [B, T, X, D]."""
    expert = partial(_OfExperts, experts, use_bias=False)
    gate, up = jnp.split(expert(2 * hidden, name="experts_gate_up")(x), 2, axis=-1)
    return expert(width, name="experts_down")(ACTIVATIONS[activation](gate) * up)


class _OfExperts(nn.Module):
    """A dense layer of every expert: [B, T, X or 1, D] -> [B, T, X, F]."""

    experts: int
    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        shape = (self.experts, x.shape[-1], self.features)
        weight = self.param("weight", nn.initializers.lecun_normal(batch_axis=(0,)), shape)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.experts, self.features))
        x, weight, bias = promote_dtype(x, weight, bias)
        x = jnp.broadcast_to(x, (*x.shape[:2], *shape[:2]))
        y = jnp.einsum("btxd,xdf->btxf", x, weight)
        return y if bias is None else y + bias[None, None]
