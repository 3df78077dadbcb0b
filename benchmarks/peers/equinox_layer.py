"""equinox."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.peers.base import JaxPeer, Program, dense_mask, sides


class Equinox(JaxPeer):
    """`eqx.nn.MultiheadAttention` under vmap over the batch."""

    name = "equinox"
    packages = ("equinox",)
    lacks: ClassVar[dict[str, str]] = {
        "function": "has a layer only",
        "grouped heads": "no grouped heads",
        "N-D axes": "attends over one axis only",
    }

    def layer(self, row, weights, inputs, extras):
        layer = eqx.nn.MultiheadAttention(
            row.heads,
            row.width,
            use_query_bias=True,
            use_key_bias=True,
            use_value_bias=True,
            use_output_bias=True,
            dropout_p=row.dropout,
            inference=not row.dropout,
            dtype=jnp.dtype(row.dtype),
            key=jax.random.key(0),
        )
        names = {"query": "query_proj", "key": "key_proj", "value": "value_proj"}
        names["attention_output"] = "output_proj"
        for name, own in names.items():
            linear = getattr(layer, own)
            new = (
                weights[name]["kernel"].reshape(linear.in_features, -1).T,
                weights[name]["bias"].reshape(-1),
            )
            layer = eqx.tree_at(
                lambda m, own=own: (getattr(m, own).weight, getattr(m, own).bias), layer, new
            )
        arrays, rest = eqx.partition(layer, eqx.is_array)

        def apply(weights, inputs, extras):
            layer = eqx.combine(weights, rest)
            query, value = sides(inputs)
            mask = dense_mask(row, extras)
            if mask is not None:
                mask = mask if row.per_head else mask[:, 0]
                mask = jnp.broadcast_to(mask, (*mask.shape[:-2], row.length, row.key_length))
            keys = jax.random.split(extras["key"], row.batch) if row.dropout else None

            def one(query, value, mask, key):
                return layer(query, value, value, mask=mask, key=key)

            if mask is not None and mask.shape[0] == 1:
                return jax.vmap(one, (0, 0, None, 0))(query, value, mask[0], keys)
            return jax.vmap(one)(query, value, mask, keys)

        return Program(apply, arrays, inputs, extras)


PEERS = (Equinox(),)
