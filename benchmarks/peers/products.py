"""The matrix products of attention and nothing else: what no program made of them can be faster than."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from benchmarks.peers.base import JaxPeer

_ROWS, _PAIRS = 512, 2
_REASON = "stands for plain self-attention only"


class Products(JaxPeer):
    """No softmax, no mask, no dropout: not an attention, and no rival.

    The products are cut into the tiles that are fastest on CPU; of a causal call only those that are
    seen. Its gradient keeps every tile of the forward pass instead of computing it again.
    """

    name = "products alone"
    framework = "floor"
    packages = ("jax",)
    lacks: ClassVar[dict[str, str]] = dict.fromkeys(
        ("grouped heads", "N-D axes", "window", "padding", "per-head mask", "cross"), _REASON
    )

    def attend(self, row, q, k, v, extras):
        b, t, n, _ = q.shape
        pairs = _PAIRS if b * n % _PAIRS == 0 else 1

        def group(heads):
            q, k, v = heads

            def tile(i, j):
                rows, columns = slice(i, i + _ROWS), slice(j, j + _ROWS)
                x = jnp.einsum("crh,csh->crs", q[:, rows], k[:, columns])
                return jnp.einsum("crs,csv->crv", x, v[:, columns])

            lines = []
            for i in range(0, t, _ROWS):
                seen = range(0, i + 1 if row.causal else t, _ROWS)
                lines.append(functools.reduce(jnp.add, [tile(i, j) for j in seen]))
            return jnp.concatenate(lines, axis=1)

        groups = (x.swapaxes(1, 2).reshape(-1, pairs, t, x.shape[-1]) for x in (q, k, v))
        out = jax.lax.map(group, tuple(groups))
        return out.reshape(b, n, t, -1).swapaxes(1, 2)


PEERS = (Products(),)
