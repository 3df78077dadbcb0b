"""keras on JAX."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

from benchmarks.peers.base import JaxPeer, Program, dense_mask, sides


class Keras(JaxPeer):
    """`keras.layers.MultiHeadAttention` and `GroupQueryAttention`, called without state."""

    name = "keras"
    packages = ("keras",)

    def cannot(self, row):
        if keras.backend.backend() != "jax":
            return f"keras runs on {keras.backend.backend()} here; set KERAS_BACKEND=jax"
        if row.level == "function" and row.dropout:
            return "no dropout in its function"
        return super().cannot(row)

    def attend(self, row, q, k, v, extras):
        mask = dense_mask(row, extras, causal=False)
        return keras.ops.dot_product_attention(q, k, v, mask=mask, is_causal=row.causal)

    def layer(self, row, weights, inputs, extras):
        common = {"dropout": row.dropout, "sliding_window": row.window, "dtype": row.dtype}
        if row.kv_heads is not None:
            layer = keras.layers.GroupQueryAttention(row.size, row.heads, row.kv_heads, **common)
        else:
            axes = None if row.beside is None else (1,)
            layer = keras.layers.MultiHeadAttention(
                row.heads, row.size, attention_axes=axes, **common
            )
        query, value = sides(inputs)
        layer.build(query.shape, value.shape)
        order = ("query", "key", "value", "attention_output")
        trainable = [weights[name][part] for name in order for part in ("kernel", "bias")]
        extras = {**extras, "state": [v.value for v in layer.non_trainable_variables]}

        def apply(weights, inputs, extras):
            query, value = sides(inputs)
            return layer.stateless_call(
                weights,
                extras["state"],
                query,
                value,
                value_mask=extras["valid"] if row.padding else None,
                attention_mask=extras["heads"] if row.per_head else None,
                use_causal_mask=row.causal,
                training=row.dropout > 0,
            )[0]

        return Program(apply, trainable, inputs, extras)


PEERS = (Keras(),)
