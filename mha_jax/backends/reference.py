"""The plain definition: every logit at once, plain autodiff. What the other backends are held to.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K   V value size
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from mha_jax.attention import softmax
from mha_jax.attention.call import Call, Output, logits


@dataclasses.dataclass(frozen=True)
class Reference:
    """Attention by the formula. O(T S) memory."""

    plain_autodiff: ClassVar[bool] = True

    def why_not(self, call: Call, platform: str) -> str | None:
        return None

    def forward(self, call: Call) -> Output:
        x = logits(call)
        m = lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True, initial=-jnp.inf))
        p = softmax.weights(x, m)
        l = jnp.sum(p, axis=-1, keepdims=True)
        p = p * softmax.reciprocal(l)
        b, n, t, s = p.shape
        if call.dropout is not None:
            kept = call.dropout.keep(b, n, call.q_tokens.rows, call.k_tokens.rows)
            p = jnp.where(kept, p / (1 - call.dropout.rate), 0)
        out = jnp.einsum(
            "BKGTS,BSKV->BTKGV",
            p.reshape(b, n // call.groups, call.groups, t, s),
            call.v.astype(p.dtype),
            precision=call.precision,
        )
        out = out.reshape(b, t, n, call.v.shape[-1]).astype(call.v.dtype)
        return Output(out, softmax.logsumexp(m, l)[..., 0])
