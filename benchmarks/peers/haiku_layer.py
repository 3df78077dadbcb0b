"""dm-haiku."""

from typing import ClassVar

import haiku as hk

from benchmarks.peers.base import JaxPeer, Program, dense_mask, sides

PREFIX = "multi_head_attention"


class Haiku(JaxPeer):
    """`hk.MultiHeadAttention`."""

    name = "haiku"
    packages = ("dm-haiku",)
    lacks: ClassVar[dict[str, str]] = {
        "function": "has a layer only",
        "dropout": "no dropout",
        "grouped heads": "no grouped heads",
        "N-D axes": "attends over the axis before the features only",
    }

    def layer(self, row, weights, inputs, extras):
        def forward(query, value, mask):
            layer = hk.MultiHeadAttention(
                row.heads, row.size, w_init=hk.initializers.VarianceScaling(), model_size=row.width
            )
            return layer(query, value, value, mask)

        transformed = hk.without_apply_rng(hk.transform(forward))

        def apply(weights, inputs, extras):
            return transformed.apply(weights, *sides(inputs), dense_mask(row, extras))

        def flat(name, parts):
            kernel, bias = parts["kernel"], parts["bias"]
            inner = kernel.shape[0] if name != "attention_output" else row.width
            return {"w": kernel.reshape(inner, -1), "b": bias.reshape(-1)}

        linear = {
            f"{PREFIX}/{'linear' if name == 'attention_output' else name}": flat(name, parts)
            for name, parts in weights.items()
        }
        return Program(apply, linear, inputs, extras)


PEERS = (Haiku(),)
