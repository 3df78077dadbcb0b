"""Loops over the lines of tiles: while a program runs, or written out."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mha_jax.types import Array

Lines: TypeAlias = tuple[list[int], ...]  # the blocks of every line of a group


def scan(step: Callable, carry: Any, groups: int, lines: int) -> tuple[Any, Any]:
    """Run `carry, out = step(group, line, carry)` over all lines of all groups; stack what comes out."""

    def of_line(carry, n):
        return step(*divided(n, lines), carry) if groups > 1 else step(0, n, carry)

    if groups * lines > 1:
        return lax.scan(of_line, carry, numbers(groups * lines))
    carry, out = step(0, 0, carry)
    return carry, jax.tree.map(lambda a: a[None], out)


def in_turn(
    step: Callable, carry: Any, groups: int, lines: Lines, end: Callable = lambda turn: None
) -> tuple[Any, Any, Any]:
    """Run `carry, out, turn = step(group, line, blocks, carry, turn)` over all groups' lines, written out.

    A line leaves `turn` to the next one of its group; the first gets None, and the last's goes to `end`.

    Returns:
      (carry, out, end): the last carry, and what came out of all lines, and of `end`, stacked.
    """

    def group(carry, g):
        turn, outs = None, []
        for line, blocks in enumerate(lines):
            carry, out, turn = step(g, line, blocks, carry, turn)
            outs.append(out)
        return carry, (jax.tree.map(lambda *a: jnp.stack(a), *outs), end(turn))

    if groups == 1:
        carry, stacked = group(carry, 0)
    else:
        carry, stacked = lax.scan(group, carry, numbers(groups))
        stacked = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacked)
    return carry, *stacked


def after(x: Any, last: Any) -> Any:
    """Return x, from which nothing is computed before `last` is there: one tile is held at a time."""
    return x if last is None else lax.optimization_barrier((x, last))[0]


def divided(n: Any, size: int) -> tuple[Any, Any]:
    """Return n // size and n % size of an index, without what negative numbers would need."""
    if isinstance(n, int):
        return divmod(n, size)
    return lax.div(n, np.uint32(size)), lax.rem(n, np.uint32(size))


def numbers(count: int) -> Array:
    """Return 0 to `count` as what all indices are: unsigned, so that slices check for no negative ones."""
    return jnp.arange(count, dtype=jnp.uint32)
