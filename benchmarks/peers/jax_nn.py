"""jax.nn.dot_product_attention, XLA's path."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from benchmarks.peers.base import JaxPeer
from benchmarks.rows import Row
from mha_jax.attention.biases import Buckets


class JaxNN(JaxPeer):
    """The function; as a layer, four products around it."""

    name = "jax.nn"
    packages = ("jax",)
    lacks: ClassVar[dict[str, str]] = {"dropout": "no dropout", "N-D axes": "no attention axes"}
    has = ("bias by buckets",)  # as a dense one

    def attend(self, row, q, k, v, extras):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=None if row.buckets is None else _dense(row, extras["table"]),
            mask=extras["heads"] if row.per_head else None,
            is_causal=row.causal,
            key_value_seq_lengths=extras["lengths"] if row.padding else None,
            local_window_size=None if row.window is None else (row.window - 1, 0),
        )


def _dense(row: Row, table: jax.Array) -> jax.Array:
    """Return T5's bias [1, N, T, S] of a table [buckets, N], as T5's own code makes it."""
    rule = Buckets(table)
    ahead = jnp.arange(row.key_length)[None] - jnp.arange(row.length)[:, None]
    far = rule.max_distance
    bucket = jnp.asarray(rule.buckets())[jnp.clip(ahead, -far, far) + far]
    return table[bucket].transpose(2, 0, 1)[None]


PEERS = (JaxNN(),)
