"""Which tiles of the logits are visited: one answer for every tiled backend.

A tile is FULL where every pair of its tokens is visible, EMPTY where none is, PARTIAL where it may be either:
the mask's `reach` says so from the intervals of facts, in NumPy where mask and tokens are static.

B batch   T query length   S key length   N query heads
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.call import Problem
from mha_jax.attention.tokens import extents

FULL, PARTIAL, EMPTY = 0, 1, 2


def kinds(problem: Problem, size_q: int, size_k: int) -> Any:
    """Return FULL, PARTIAL or EMPTY for tiles of some tokens: [#B, #N, blocks of T, blocks of S].

    The last tile of a side may be short: it is judged by the tokens that it has, and padded keys make it
    PARTIAL where it would be FULL.
    """
    q = jax.tree.map(lambda a: a[:, None, :, None], extents(problem.q_tokens.facts(), size_q))
    k = jax.tree.map(lambda a: a[:, None, None, :], extents(problem.k_tokens.facts(), size_k))
    some, every = problem.mask.reach(q, k)
    xp = array_module(some, every)
    t, s = problem.q.shape[1], problem.k.shape[1]
    counts = -(-t // size_q), -(-s // size_k)
    ends = np.arange(1, counts[1] + 1).reshape(1, 1, 1, -1) * size_k
    visible = np.where(ends > s, PARTIAL, FULL)
    kind = xp.where(some, xp.where(every, visible, PARTIAL), EMPTY)
    return xp.broadcast_to(kind, jnp.broadcast_shapes(kind.shape, (1, 1, *counts))).astype(np.int32)


def listed(chosen: Any) -> tuple[Any, Any]:
    """Return how many tiles of every line are chosen, and all tiles, those first and in order."""
    return chosen.sum(-1), array_module(chosen).argsort(~chosen, axis=-1, stable=True)


def array_module(*arrays: Any) -> Any:
    """Return NumPy where all is known while tracing, else jax.numpy."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np
