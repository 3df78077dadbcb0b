"""mha_jax itself."""

from typing import Any

import jax.numpy as jnp

import mha_jax as mj
from benchmarks.peers.base import JaxPeer, Program, sides
from benchmarks.results import OURS
from benchmarks.rows import Row


class Ours(JaxPeer):
    """The layer and the function, with their defaults. Names that no row needs are not looked up: a
    checkout from before them can be measured."""

    name = OURS
    packages = ("mha_jax",)
    has = ("rotary", "bias by buckets")

    def attend(self, row, q, k, v, extras):
        mask = mj.Causal() if row.causal else mj.Full()
        if row.window is not None:
            mask = mj.Window(row.window - 1, 0)
        if row.per_head:
            mask = mask & mj.Dense(extras["heads"])
        tokens = None
        if row.padding:
            mask, tokens = mask & mj.ValidKeys(), mj.Tokens(row.key_length, valid=extras["valid"])
        dropout = mj.Dropout(extras["key"], row.dropout) if row.dropout else None
        bias = None if row.buckets is None else mj.biases.Buckets(extras["table"])
        return mj.dot_product_attention(
            q, k, v, mask=mask, dropout=dropout, key_tokens=tokens, bias=bias
        )

    def layer(self, row: Row, weights, inputs, extras) -> Program:
        rotary: dict[str, Any] = {"rotary": mj.Rotary()} if row.rotary else {}
        layer = mj.MultiHeadAttention(
            num_heads=row.heads,
            key_dim=row.size,
            dropout=row.dropout,
            attention_axes=None if row.beside is None else 1,
            sliding_window=row.window,
            num_kv_heads=row.kv_heads,
            training=row.dropout > 0,
            param_dtype=jnp.dtype(row.dtype),
            **rotary,
        )

        def apply(weights, inputs, extras):
            query, value = sides(inputs)
            return layer.apply(
                {"params": weights},
                query,
                value,
                value_mask=extras["valid"] if row.padding else None,
                attention_mask=extras["heads"] if row.per_head else None,
                use_causal_mask=row.causal,
                rngs={"dropout": extras["key"]} if row.dropout else None,
            )

        return Program(apply, weights, inputs, extras)


PEERS = (Ours(),)
