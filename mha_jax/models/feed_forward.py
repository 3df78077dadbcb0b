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

from mha_jax.attention.given import integer
from mha_jax.errors import ShapeError
from mha_jax.models.sizes import FLOAT32, check_named, check_numbers
from mha_jax.types import Array, DType

ACTIVATIONS = {
    "relu": nn.relu,
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
}


def _check_experts(experts: Any) -> None:
    """Refuse experts of which as many cannot be chosen."""
    hint = "A router chooses `chosen` of `count` experts for every token."
    integer("count of experts", experts.count, 1, 2**31 - 1, hint)
    integer("chosen experts", experts.chosen, 1, experts.count, hint)
    if hasattr(experts, "activation"):
        check_named(experts, activation=ACTIVATIONS)


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

    def __post_init__(self):
        _check_experts(self)
        check_numbers(self, limit=0, slope=-FLOAT32)

    def output(self, of: "Mixture", x: Array) -> Array:
        logits = nn.Dense(self.count, dtype=of.dtype, name="router")(x)
        share = nn.softmax(jnp.where(_chosen(logits, self.chosen), logits, -jnp.inf))
        expert = partial(_OfExperts, self.count)
        inner = expert(2 * of.hidden, name="experts_gate_up")(x[:, :, None])
        gate = jnp.minimum(inner[..., ::2], self.limit)
        up = jnp.clip(inner[..., 1::2], -self.limit, self.limit)
        inner = (up + 1) * gate * nn.sigmoid(gate * self.slope)
        return jnp.einsum("btx,btxd->btd", share, expert(of.width, name="experts_down")(inner))


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

    def __post_init__(self):
        _check_experts(self)

    def output(self, of: "Mixture", x: Array) -> Array:
        logits = nn.Dense(self.count, use_bias=False, dtype=of.dtype, name="router")(x)
        share = jnp.where(_chosen(logits, self.chosen), nn.sigmoid(logits), 0)
        return of.experts_of(x[:, :, None] * share[..., None]).sum(2) + of.shared(x)


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
      shared: How many experts all tokens share; none if 0.
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

    def __post_init__(self):
        _check_experts(self)
        integer("groups of experts", self.groups, 1, self.count, "They are as large as each other.")
        if self.count % self.groups:
            raise ShapeError(
                f"groups of experts must be as large as each other: got {self.count} experts in "
                f"{self.groups} groups. Pass a number that divides the experts'."
            )
        hint = "A router chooses `groups_chosen` of `groups` for every token, and experts of these alone."
        integer("chosen groups of experts", self.groups_chosen, 1, self.groups, hint)
        among = self.groups_chosen * self.count // self.groups
        integer("chosen experts", self.chosen, 1, among, hint)
        integer("shared experts", self.shared, 0, 2**20, "All tokens share them; 0 has none.")
        check_numbers(self, scale=-FLOAT32)

    def output(self, of: "Mixture", x: Array) -> Array:
        route = nn.Dense(self.count, use_bias=False, dtype=jnp.float32, name="router")
        correction = of.param("correction", nn.initializers.zeros, (self.count,))
        share = self.shares(route(x), correction).astype(x.dtype)
        out = jnp.einsum("btx,btxd->btd", share, of.experts_of(x[:, :, None]))
        return out + of.shared(x, self.shared) if self.shared else out

    def shares(self, logits: Array, correction: Array) -> Array:
        """Return what every expert counts for: [B, T, X] of the router's logits, and what it adds, [X]."""
        scores = nn.sigmoid(logits)
        choice = scores + correction[None, None]
        grouped = choice.reshape(*choice.shape[:2], self.groups, self.count // self.groups)
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
    """Experts, all computed and few weighed: right, and as dear as all of them together.

    Args:
      experts: Which; their `output` is the layer's.
      hidden: Inner width of each, F.
      width: Of the output, D.
      dtype: Of the computation; that of the parameters if None.
    """

    experts: Any
    hidden: int
    width: int
    dtype: DType = None

    @nn.compact
    def __call__(self, x):
        return self.experts.output(self, x)

    def experts_of(self, x: Array) -> Array:
        """Return what every expert writes: [B, T, X or 1, D] -> [B, T, X, D]."""
        expert = partial(_OfExperts, self.experts.count, use_bias=False)
        gate, up = jnp.split(expert(2 * self.hidden, name="experts_gate_up")(x), 2, axis=-1)
        activated = ACTIVATIONS[self.experts.activation](gate)
        return expert(self.width, name="experts_down")(activated * up)

    def shared(self, x: Array, count: int = 1) -> Array:
        """Return what the experts that all tokens share write, as one."""
        sizes = self.hidden * count, self.width, self.experts.activation, True, False, self.dtype
        return FeedForward(*sizes, name="shared")(x)


def _chosen(scores: Array, count: int) -> Array:
    """Return booleans that are true at the largest along the last axis."""
    places = jax.lax.top_k(scores, count)[1]
    return jax.nn.one_hot(places, scores.shape[-1], dtype=bool).any(-2)


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
