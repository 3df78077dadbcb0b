"""Attention to a cache that is read some slots at a time: each block is a problem of its own, and their
results are merged by the rows' (max, sum).

B batch   T query length   S slots, and fresh tokens behind them   N query heads   K key-value heads
H query-key head size   V value head size

So every backend reads what is rounded to eight bits, or lies among other layers, and nothing as long as the
cache is ever made. Blocks that no query sees are not read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from mha_jax.attention import softmax
from mha_jax.attention.call import Problem, State, of_keys
from mha_jax.attention.call import logits as logits_of
from mha_jax.attention.slots import Slots
from mha_jax.attention.tokens import zero_invalid
from mha_jax.backends import visits
from mha_jax.types import Array, Float

# Numbers in a block of keys and values together: what a processor's own cache holds.
_NUMBERS = 2**20
_SHORTEST = 128


def attend(problem: Problem, run: Callable[[Problem], State]) -> State:
    """Run a problem whose keys are `Slots`, block by block.

    Args:
      problem: The problem.
      run: What attends to the keys of one block.
    """
    wide, size = problem.accumulator, _size(problem)
    q = problem.q.astype(wide)
    problem = dataclasses.replace(problem, q=q)
    b, t, n, _ = q.shape
    states = softmax.start((b, n, t), problem.v.shape[-1], wide)
    known = t and not is_symbolic_dim(problem.k.shape[1])
    live = visits.kinds(problem, t, size) != visits.EMPTY if known else None

    def grown(states: softmax.Running, start: Any, size: int, fresh: bool = False):
        out, m, l = run(_block(problem, start, size, fresh))
        l = l[..., None]
        return softmax.merge(states, softmax.Running(out.swapaxes(1, 2) * l, m[..., None], l))

    def step(states, number):
        def read(states):
            return grown(states, number * size, size)

        if isinstance(live, jax.Array):
            return lax.cond(live[..., number].any(), read, lambda states: states, states), None
        return read(states), None

    count, rest = divmod(problem.k.capacity, size)
    if count > 1 or rest:
        states, _ = lax.scan(step, states, jnp.arange(count, dtype=jnp.int32))
    else:
        states = grown(states, 0, size)
    if rest:
        states = grown(states, count * size, rest)
    if problem.k.fresh is not None:
        states = grown(states, problem.k.capacity, problem.k.fresh.shape[1], True)
    out = states.acc * softmax.reciprocal(states.l)
    return State(out.swapaxes(1, 2).astype(problem.v.dtype), states.m[..., 0], states.l[..., 0])


def logits(problem: Problem) -> Float[Array, "B N T S"]:
    """Return every logit of a problem whose keys are `Slots`; see `attention.call.logits`."""
    size, wide = _size(problem), problem.accumulator
    problem = dataclasses.replace(problem, q=problem.q.astype(wide))
    count, rest = divmod(problem.k.capacity, size)
    starts = jnp.arange(count, dtype=jnp.int32) * size
    parts = lax.map(lambda start: logits_of(_block(problem, start, size)), starts)
    parts = jnp.moveaxis(parts, 0, -2)
    parts = [parts.reshape(*parts.shape[:-2], -1)]
    if rest:
        parts.append(logits_of(_block(problem, count * size, rest)))
    if problem.k.fresh is not None:
        length = problem.k.fresh.shape[1]
        parts.append(logits_of(_block(problem, problem.k.capacity, length, True)))
    return jnp.concatenate(parts, -1)


def first(problem: Problem) -> Problem:
    """Return the problem of the first block."""
    problem = dataclasses.replace(problem, q=problem.q.astype(problem.accumulator))
    return _block(problem, 0, _size(problem))


def _size(problem: Problem) -> int:
    """Return how many slots a block holds."""
    b, _, kv, h = problem.k.shape
    wanted = _NUMBERS // max(1, b * kv * (h + problem.v.shape[-1])) if isinstance(b, int) else 0
    return min(problem.k.capacity, max(_SHORTEST, wanted // 16 * 16))


def _block(problem: Problem, start: Any, size: int, fresh: bool = False) -> Problem:
    """Return the problem of `size` keys from `start` on, in a dtype that loses nothing."""
    slots: tuple[Slots, Slots] = problem.k, problem.v  # type: ignore[assignment]
    wide = problem.accumulator
    if fresh:
        k, v = (x.fresh.astype(wide) for x in slots)
    else:
        k, v = (x.block(start, size) for x in slots)

    block = dataclasses.replace(of_keys(problem, k, v, start, size), heads_first=not fresh)
    if problem.mask.hides_invalid_keys:
        k, v = (zero_invalid(x, block.k_tokens) for x in (k, v))
        block = dataclasses.replace(block, k=k, v=v)
    return block
