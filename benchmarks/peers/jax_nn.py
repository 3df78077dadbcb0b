"""jax.nn.dot_product_attention, XLA's path."""

from typing import ClassVar

import jax

from benchmarks.peers.base import JaxPeer


class JaxNN(JaxPeer):
    """The function; as a layer, four products around it."""

    name = "jax.nn"
    packages = ("jax",)
    lacks: ClassVar[dict[str, str]] = {"dropout": "no dropout", "N-D axes": "no attention axes"}

    def attend(self, row, q, k, v, extras):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=extras["heads"] if row.per_head else None,
            is_causal=row.causal,
            key_value_seq_lengths=extras["lengths"] if row.padding else None,
            local_window_size=None if row.window is None else (row.window - 1, 0),
        )


PEERS = (JaxNN(),)
