"""Biases by rule, made ready for the kernels: a table of distances, or a line where one side is one token.

N query heads
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import biases
from mha_jax.attention.biases import floats, with_floats
from mha_jax.attention.call import Problem
from mha_jax.attention.tokens import consecutive, far
from mha_jax.backends.pallas_tpu.patterns import Geometry
from mha_jax.types import Array

# Distances whose numbers are held in VMEM: 1 MiB, a second time backward.
MOST = 2**18


def why_not(problem: Problem) -> str | None:
    """Say why the kernels cannot add a problem's bias by rule, or return None."""
    rule = problem.bias_rule
    if rule is None or is_line(problem):
        return None
    tiles = "tiles run it with backend=None"
    others = [r for r in biases.apart(rule)[1] if not r.only_distances]
    if others:
        names = ", ".join(type(r).__name__ for r in others)
        return (
            f"its kernels add biases that know the distance of two tokens alone, and {names} reads more; "
            + tiles
        )
    if not consecutive(problem.q_tokens, problem.k_tokens):
        return (
            "its kernels add a bias by rule along the diagonals, and here positions are data, those of "
            f"packed sequences or of a cache say; {tiles}"
        )
    length = problem.q_tokens.length + problem.k_tokens.length
    if length > MOST:
        return (
            f"its kernels hold what a bias adds at {MOST} distances, and here are {length}; {tiles}"
        )
    return None


def is_line(problem: Problem) -> bool:
    """Return whether one side is a single token, so that a bias written out is a line."""
    return 1 in (problem.q.shape[1], problem.k.shape[1])


def numbers(rule: Any) -> Any:
    """Return the floats of a rule in float32, in which their gradients are summed up."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), floats(rule))


def written_out(problem: Problem) -> Callable[[Any, Any], Array]:
    """Return the array that a problem's bias adds, as a function of its array and of the rule's numbers."""
    heads = problem.q.shape[2]

    def both(array: Any, moved: Any) -> Array:
        rule = with_floats(problem.bias_rule, moved)
        facts = biases.queries(problem.q_tokens, heads), problem.k_tokens.as_keys()
        x = jnp.asarray(rule.logits(*facts), jnp.float32)
        shape = jnp.broadcast_shapes(x.shape, (1, heads, problem.q.shape[1], problem.k.shape[1]))
        x = jnp.broadcast_to(x, shape)
        return x if array is None else x + array.astype(jnp.float32)

    return both


def table(problem: Problem, g: Geometry) -> Callable[[Any], Array]:
    """Return the table of a problem's tiles, [N, rows + columns], as a function of the rule's numbers."""
    rows = g.rows * g.row_blocks
    after = np.arange(-rows, g.chunk * g.chunks, dtype=np.int32)
    t, s = g.lengths
    # What lies beyond the tokens is hidden: it is asked for nothing new.
    distances = np.clip(after if g.outer == "q" else -after, 1 - t, s - 1)
    distances = far(problem.q_tokens, problem.k_tokens, distances)
    heads = np.arange(g.heads, dtype=np.int32)[:, None]

    def of(moved: Any) -> Array:
        rule = with_floats(problem.bias_rule, moved)
        x = jnp.asarray(rule.at(distances[None], heads), jnp.float32)
        return jnp.broadcast_to(x, (g.heads, distances.size))

    return of
