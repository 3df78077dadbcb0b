"""flax.nnx."""

from typing import ClassVar

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from benchmarks.peers.base import JaxPeer, Program, dense_mask, sides
from benchmarks.peers.linen import named


class Nnx(JaxPeer):
    """`nnx.MultiHeadAttention`, split and merged inside jax.jit, which is faster than nnx.jit."""

    name = "nnx"
    packages = ("flax",)
    lacks: ClassVar[dict[str, str]] = {"N-D axes": "attends over the axis before the features only"}

    def attend(self, row, q, k, v, extras):
        return nnx.dot_product_attention(
            q,
            k,
            v,
            mask=dense_mask(row, extras, causal=False),
            broadcast_dropout=False,
            dropout_rng=extras["key"],
            dropout_rate=row.dropout,
            deterministic=not row.dropout,
            is_causal=row.causal,
        )

    def layer(self, row, weights, inputs, extras):
        layer = nnx.MultiHeadAttention(
            num_heads=row.heads,
            in_features=row.width,
            num_kv_heads=row.kv_heads,
            dropout_rate=row.dropout,
            broadcast_dropout=False,
            deterministic=not row.dropout,
            decode=False,
            param_dtype=jnp.dtype(row.dtype),
            rngs=nnx.Rngs(0),
            keep_rngs=False,
        )
        graph, state, rest = nnx.split(layer, nnx.Param, ...)
        pure = nnx.to_pure_dict(state)
        for name, parts in named(weights).items():
            for part, value in parts.items():
                if jnp.shape(pure[name][part]) != value.shape:
                    raise ValueError(f"nnx's {name}.{part} is not shaped {value.shape}")
                pure[name][part] = value
        nnx.replace_by_pure_dict(state, pure)

        def apply(weights, inputs, extras):
            query, value = sides(inputs)
            return nnx.merge(graph, weights, rest)(
                query,
                value,
                mask=dense_mask(row, extras, causal=False),
                is_causal=row.causal,
                rngs=nnx.Rngs(dropout=extras["key"]) if row.dropout else None,
            )

        return Program(apply, jax.tree.map(jnp.asarray, state), inputs, extras)


PEERS = (Nnx(),)
