"""Call, Output and Backend: the only signature inside the library.

B batch   T query length   S key length   N query heads   K key-value heads, N = G * K
H query-key head size   V value head size

The logits of a call are `cap(scale * q . k + bias)`, masked, then softmax, then dropout. A query head n
reads the key-value head n // G.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mha_jax.attention.dropout import Dropout
from mha_jax.attention.masks import Full, Mask, static
from mha_jax.attention.tokens import Tokens
from mha_jax.types import Array, Float, Keys, Precision, Queries, Values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """Everything that one attention call is.

    Args:
      q: Queries [B, T, N, H].
      k: Keys [B, S, K, H]; K divides N.
      v: Values [B, S, K, V].
      q_tokens: Tokens of the queries; plain ones if None.
      k_tokens: Tokens of the keys; plain ones if None.
      mask: Which query may attend to which key.
      bias: Added to the scaled logits, broadcasting; differentiable.
      dropout: Dropout on the weights, or None.
      scale: Factor on q . k, a Python number; 1 / sqrt(H) if None.
      logit_cap: The logits become `logit_cap * tanh(logits / logit_cap)`, or None.
      precision: What `jnp.einsum` takes; None is the platform's default.
      heads_first: Keys and values lie as [B, K, S, H] and [B, K, S, V] in memory, those of a `Cache`
        for example; here they are views. It changes what is fast, nothing else.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> Call(x, x, x).groups
    1
    """

    q: Queries
    k: Keys
    v: Values
    q_tokens: Tokens = None  # type: ignore[assignment]  # filled in by `check`
    k_tokens: Tokens = None  # type: ignore[assignment]
    mask: Mask = dataclasses.field(default_factory=Full)
    bias: Float[Array, "#B #N #T #S"] | None = None
    dropout: Dropout | None = None
    scale: float = static(default=None)  # filled in by `check`
    logit_cap: float | None = static(default=None)
    precision: Precision = static(default=None)
    heads_first: bool = static(default=False)

    @property
    def groups(self) -> int:
        """Query heads for each key-value head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def accumulator(self) -> Any:
        """The dtype of logits, softmax and lse: float64 for float64 inputs, else float32."""
        return jnp.float64 if self.q.dtype == jnp.float64 else jnp.float32


class Output(NamedTuple):
    """What attention returns: always both, so that outputs over disjoint keys can be merged."""

    out: Float[Array, "B T N V"]
    lse: Float[Array, "B N T"]  # log of the sum of exp(logits); -inf where a row saw no key


class Gradients(NamedTuple):
    """Cotangents of the four arrays of a call that gradients flow through."""

    q: Queries
    k: Keys
    v: Values
    bias: Array | None


class Backend(Protocol):
    """A frozen dataclass in one file; its fields are its tuning.

    `forward` gets a checked call: four-dimensional arrays, tokens and scale present, no axis of
    length 0. A backend may also bring `backward(call, output, cotangent) -> Gradients`; one that
    does not inherits the tiled one. `plain_autodiff` says that JAX may differentiate `forward`
    itself, whatever that costs in memory.
    """

    plain_autodiff: ClassVar[bool]

    def why_not(self, call: Call, platform: str) -> str | None:
        """Say in words why this call cannot run on `platform`, or return None."""
        ...

    def forward(self, call: Call) -> Output: ...


def logits_of(call: Call, dot: Float[Array, "*R T S"], bias: Array | None) -> Array:
    """Turn q . k into logits: scale, bias and soft cap, in the one order there is."""
    x = dot if call.scale == 1 else dot * jnp.asarray(call.scale, dot.dtype)
    if bias is not None:
        x = x + bias.astype(x.dtype)
    if call.logit_cap is not None:
        cap = jnp.asarray(call.logit_cap, x.dtype)
        x = cap * jnp.tanh(x / cap)
    return x


def logits(call: Call) -> Float[Array, "B N T S"]:
    """Return every logit in the accumulator's dtype, -inf where the mask hides the key."""
    b, t, n, h = call.q.shape
    q = call.q.reshape(b, t, call.k.shape[2], call.groups, h)
    dot = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        q,
        call.k,
        precision=call.precision,
        preferred_element_type=call.accumulator,
    )
    x = logits_of(call, dot.reshape(b, n, t, call.k.shape[1]), call.bias)
    visible = call.mask.visible(call.q_tokens.as_queries(), call.k_tokens.as_keys())
    return jnp.where(visible, x, -jnp.inf)
