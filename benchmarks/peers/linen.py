"""flax.linen."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from benchmarks.peers.base import JaxPeer, Program, dense_mask, sides


class Linen(JaxPeer):
    """`MultiHeadDotProductAttention`; a dropout mask of its own for every head and example."""

    name = "linen"
    packages = ("flax",)
    lacks: ClassVar[dict[str, str]] = {
        "grouped heads": "no grouped heads",
        "N-D axes": "attends over the axis before the features only",
    }

    def attend(self, row, q, k, v, extras):
        return nn.dot_product_attention(
            q,
            k,
            v,
            mask=dense_mask(row, extras),
            broadcast_dropout=False,
            dropout_rng=extras["key"],
            dropout_rate=row.dropout,
            deterministic=not row.dropout,
        )

    def layer(self, row, weights, inputs, extras):
        layer = nn.MultiHeadDotProductAttention(
            num_heads=row.heads,
            qkv_features=row.width,
            out_features=row.width,
            dropout_rate=row.dropout,
            broadcast_dropout=False,
            deterministic=not row.dropout,
            param_dtype=jnp.dtype(row.dtype),
        )

        def apply(weights, inputs, extras):
            query, value = sides(inputs)
            return layer.apply(
                {"params": weights},
                query,
                value,
                mask=dense_mask(row, extras),
                rngs={"dropout": extras["key"]} if row.dropout else None,
            )

        return Program(apply, named(weights), inputs, extras)


def named(weights):
    """Return the weights under Flax's names."""
    return {("out" if name == "attention_output" else name): w for name, w in weights.items()}


PEERS = (Linen(),)
