"""Biases by rule, made ready for the kernels.

What knows distances alone is laid along the diagonals, out of a table; what knows more, or where positions
are data, is computed pair by pair where it is arithmetic; where one side is one token, all is one line.

N query heads
"""

from collections.abc import Callable, Container
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import biases
from mha_jax.attention.biases import floats, with_floats
from mha_jax.attention.call import Problem
from mha_jax.attention.tokens import far
from mha_jax.backends import arithmetic
from mha_jax.backends.arithmetic import Able, Term, parted
from mha_jax.backends.pallas_tpu.patterns import Geometry
from mha_jax.types import Array

# Distances whose numbers are held in VMEM: 1 MiB, a second time backward.
MOST = 2**18
ABLE = Able(frozenset(map(np.dtype, ("float32", "int32", "bool"))), pairs=False)


def why_not(problem: Problem) -> str | None:
    """Say why the kernels cannot add a problem's bias by rule, or return None."""
    return None if is_line(problem) else arithmetic.why_not(problem, _unlaid, ABLE)


def pair_by_pair(problem: Problem) -> bool:
    """Return whether something of a problem's bias is computed pair by pair."""
    rules = arithmetic.rules(problem)
    return not is_line(problem) and any(_unlaid(problem, rule) for rule in rules)


def _unlaid(problem: Problem, rule: Any) -> str | None:
    """Say why a rule is not laid along the diagonals, or return None."""
    if said := arithmetic.unlaid(problem, rule):
        return said
    length = problem.q_tokens.length + problem.k_tokens.length
    return f"{MOST} distances are held, and here are {length}" if length > MOST else None


def _laid(problem: Problem, rule: Any) -> Any:
    """Return the sum of those rules of a problem's bias that are laid along the diagonals, if any."""
    return biases.together([x for x in biases.apart(rule)[1] if _unlaid(problem, x) is None])


def _parted(problem: Problem, rule: Any) -> list[Any]:
    """Return the other rules as terms with what they read."""
    rules = [x for x in biases.apart(rule)[1] if _unlaid(problem, x) is not None]
    return [parted(problem, x, f"rule.{i}", ABLE) for i, x in enumerate(rules)]


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


class Ruled(NamedTuple):
    """A bias by rule for the kernels: a table of distances [N, rows + columns], and what terms read."""

    table: Array | None
    read: dict[str, Array]


class Made(NamedTuple):
    """`Ruled`, and the terms: what is computed pair by pair."""

    ruled: Ruled
    terms: tuple[Term, ...]


def made(problem: Problem, g: Geometry, moved: Any) -> Made:
    """Return what the kernels read and compute for a problem's bias by rule, given the rule's numbers."""
    rows = g.rows * g.row_blocks
    after = np.arange(-rows, g.chunk * g.chunks, dtype=np.int32)
    t, s = g.lengths
    # What lies beyond the tokens is hidden: it is asked for nothing new.
    distances = np.clip(after if g.outer == "q" else -after, 1 - t, s - 1)
    heads = np.arange(g.heads, dtype=np.int32)[:, None]
    rule = with_floats(problem.bias_rule, moved)
    parts = _parted(problem, rule)
    table = _laid(problem, rule)
    if table is not None:
        moves = far(problem.q_tokens, problem.k_tokens, distances)
        x = jnp.asarray(table.at(moves[None], heads), jnp.float32)
        table = jnp.broadcast_to(x, (g.heads, distances.size))
    read = {name: a for _, one in parts for name, a in one.items()}
    return Made(Ruled(table, read), tuple(term for term, _ in parts))


def ruled(problem: Problem, g: Geometry, names: Container[str]) -> Callable[[Any], Ruled]:
    """Return the table, and what of these names terms read, as a function of the rule's numbers."""

    def of(moved: Any) -> Ruled:
        table, read = made(problem, g, moved).ruled
        return Ruled(table, {name: a for name, a in read.items() if name in names})

    return of
