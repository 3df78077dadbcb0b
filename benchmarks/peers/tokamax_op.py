"""tokamax, its two paths that need no accelerator."""

from typing import ClassVar, Literal

import tokamax
from absl import flags

from benchmarks.peers.base import JaxPeer

# Its settings are absl flags, which it would otherwise read from our command line.
flags.FLAGS.mark_as_parsed()


class Tokamax(JaxPeer):
    """The function with one implementation; as a layer, four products around it."""

    packages = ("tokamax",)
    lacks: ClassVar[dict[str, str]] = {
        "dropout": "no dropout in its public function",
        "N-D axes": "no attention axes",
    }

    def __init__(self, implementation: Literal["xla", "xla_chunked"]):
        self.implementation: Literal["xla", "xla_chunked"] = implementation
        self.name = f"tokamax {implementation}"

    def attend(self, row, q, k, v, extras):
        return tokamax.dot_product_attention(
            q,
            k,
            v,
            mask=extras["heads"] if row.per_head else None,
            is_causal=row.causal,
            key_value_seq_lengths=extras["lengths"] if row.padding else None,
            local_window_size=None if row.window is None else (row.window - 1, 0),
            implementation=self.implementation,
        )


PEERS = (Tokamax("xla"), Tokamax("xla_chunked"))
