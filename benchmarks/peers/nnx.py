"""flax.nnx."""

import functools
from typing import Any, ClassVar

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from benchmarks.peers.base import JaxPeer, Program, dense_mask, sides
from benchmarks.peers.linen import named
from benchmarks.rows import Row


class Nnx(JaxPeer):
    """`nnx.MultiHeadAttention`, split and merged inside jax.jit, which is faster than nnx.jit."""

    name = "nnx"
    packages = ("flax",)
    lacks: ClassVar[dict[str, str]] = {"N-D axes": "attends over the axis before the features only"}
    has = ("rotary",) if hasattr(nnx, "RoPE") else ()  # flax 0.12.9

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
            **_rotary(row),
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


def _rotary(row: Row) -> dict[str, Any]:
    """Return the arguments of a layer that turns queries and keys, with tables made beforehand."""
    if not row.rotary:
        return {}
    from flax.nnx import RoPE, dot_product_attention_with_rope  # type: ignore[attr-defined]

    rope = RoPE(embedding_size=row.size, max_seq_len=row.length)
    return {"attention_fn": functools.partial(dot_product_attention_with_rope, rope=rope)}


PEERS = (Nnx(),)
