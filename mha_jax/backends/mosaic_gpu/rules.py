"""Biases by rule, made ready for the kernels: arithmetic of pairs, or numbers along the diagonals.

Arithmetic is computed pair by pair (`arithmetic`). What looks a pair up in a table is laid along the
diagonals where it knows distances alone: a tile reads it out of 64 rows, each the one before moved by one.

N query heads   T query length   S key length
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import biases
from mha_jax.attention.call import Moves, Problem, moving
from mha_jax.attention.tokens import far
from mha_jax.backends import arithmetic
from mha_jax.backends.arithmetic import Term, parted
from mha_jax.types import Array


def why_not(problem: Problem) -> str | None:
    """Say why the kernels cannot add a problem's bias by rule, or return None."""
    return arithmetic.why_not(problem, arithmetic.unlaid)


def unsummed(problem: Problem) -> str | None:
    """Say which rule's gradient, if it is asked for, is no sum along the diagonals, or return None."""
    asked = biases.apart(moving(problem).bias_rule)[1]
    for rule, floats in zip(arithmetic.rules(problem), asked):
        if jax.tree.leaves(floats) and (where := arithmetic.unlaid(problem, rule)) is not None:
            return f"{type(rule).__name__} is asked for, and {where}"
    return None


def terms(problem: Problem) -> tuple[list[tuple[Term, dict[str, Array]]], Any]:
    """Return the rules that are arithmetic with their operands, and the sum of the others, if any."""
    found, others = [], []
    for i, rule in enumerate(arithmetic.rules(problem)):
        term = parted(problem, rule, f"rule.{i}")
        others.append(rule) if isinstance(term, str) else found.append(term)
    return found, biases.together(others)


def laid(problem: Problem, rule: Any, rows: str, height: int, lengths: tuple[int, int]) -> Array:
    """Return numbers of distances as rows of a tile, [N, height, columns]: (i, x) is that of diagonal x - i.

    Args:
      problem: The problem.
      rule: Of distances.
      rows: The side of the rows.
      height: Their number.
      lengths: Padded lengths of rows and columns; the tile at (row, column) begins at column - row +
        lengths[0] - height.
    """
    t, s = problem.q.shape[1], problem.k.shape[1]
    first = lengths[0] - height
    after = (
        np.arange(first + lengths[1], dtype=np.int32) - np.arange(height, dtype=np.int32)[:, None]
    )
    after = after - np.int32(first)
    # What lies beyond the tokens is hidden: it is asked for nothing new.
    distances = np.clip(after if rows == "q" else -after, 1 - t, s - 1)
    return numbers(problem, rule)[:, distances + np.int32(t - 1)]


def numbers(problem: Problem, rule: Any) -> Array:
    """Return what a rule of distances says of all that tokens have, [N, T + S - 1]."""
    heads, t, s = problem.q.shape[2], problem.q.shape[1], problem.k.shape[1]
    edges = np.arange(1 - t, s, dtype=np.int32)
    moved = far(problem.q_tokens, problem.k_tokens, edges)
    line = jnp.asarray(rule.at(moved[None], np.arange(heads, dtype=np.int32)[:, None]), jnp.float32)
    return jnp.broadcast_to(line, (heads, edges.size))


def pulled(problem: Problem, asked: Moves, numbers_moved: Array) -> Any:
    """Return the cotangent of rules, given that of `numbers`; all that are asked for know distances."""

    def line(floats):
        rules = biases.apart(biases.with_floats(problem.bias_rule, floats))[1]
        return numbers(problem, biases.together([x for x in rules if x.only_distances]))

    return jax.vjp(line, asked.bias_rule)[1](numbers_moved)[0]
