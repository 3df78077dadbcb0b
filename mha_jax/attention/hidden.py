"""What a mask hides reaches nothing, not even a NaN.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size

A product serves all pairs of a tile, the hidden ones too, and a weight of 0 times NaN is NaN. So what goes
into products of weights is finite: tokens that hold a NaN or an Inf are zeros there. Who may see them is told
by a NaN in the other operand of q . k, which comes before the mask: forward among the keys, and backward,
where a row already knows whether it saw one, among the queries. All of it is O(T + S), outside of the tiles.
Tiles of plain XLA add zeros made of them to the keys that they read (`told`), and backward subtract a number
in every row (`judged`).

A row that sees a NaN or an Inf, in a key or in a value, is NaN, and so are the gradients of what it sees, if
anybody asks for its own. Where a mask hides nothing, all of this is left out.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from mha_jax.attention.call import Problem
from mha_jax.attention.masks import Full
from mha_jax.attention.tokens import finite, replaced
from mha_jax.types import Array, Float


def anything(problem: Problem) -> bool:
    """Whether a problem's mask may hide some pair."""
    return not isinstance(problem.mask, Full)


def forward(problem: Problem) -> Problem:
    """Return a problem whose values are finite, and whose keys are NaN where they or their values are not."""
    if not anything(problem):
        return problem
    real = finite(problem.v)
    k = replaced(problem.k, real & finite(problem.k), jnp.nan)
    return dataclasses.replace(problem, k=k, v=replaced(problem.v, real, 0.0))


def cleaned(problem: Problem) -> Problem:
    """Return a problem whose keys and values are finite, for the passes that have seen them."""
    if not anything(problem):
        return problem
    return dataclasses.replace(problem, k=numbers(problem.k), v=numbers(problem.v))


def numbers(x: Array) -> Array:
    """Return x with 0 in the place of what is no finite number."""
    return replaced(x, jnp.isfinite(x), 0.0)


def told(k: Float[Array, "*L H"], other: Float[Array, "*L _"]) -> Float[Array, "*L H"]:
    """Return keys with a NaN in those tokens that hold a NaN or an Inf, in their keys or in another array.

    Feature by feature, so that it is done as keys are read; what has more features than keys is summed up.
    What is added is a constant in derivatives.
    """
    zero, more = (0 * other).astype(k.dtype), k.shape[-1] - other.shape[-1]
    if more < 0:
        zero = jnp.sum(zero, -1, keepdims=True)
    elif more:
        zero = jnp.pad(zero, [(0, 0)] * (k.ndim - 1) + [(0, more)])
    return k + lax.stop_gradient(0 * k + zero)


def judged(
    c: Float[Array, "*R"],
    delta: Float[Array, "*R"],
    l: Float[Array, "*R"],
    d_out: Float[Array, "*R V"],
    d_lse: Float[Array, "*R"],
) -> Float[Array, "*R"]:
    """Return the c of a backward pass that subtracts it from logits before the mask; see `softmax.parts`.

    It is NaN in rows whose gradients are NaN, and inf in rows without weights: those that saw nothing, and
    those of NaN that nobody asked for.
    """
    real = jnp.isfinite(delta)  # then all that it is made of is, too
    silent = jnp.sum(jnp.abs(d_out), -1) + jnp.abs(d_lse) == 0
    none = (l == 0) | (silent & ~real)
    return jnp.where(none, jnp.inf, jnp.where(real, c, jnp.nan))


class Rows(NamedTuple):
    """What a backward pass reads of its queries, heads first; R stands for all axes before the features.

    Where something is hidden, all but q is finite, and q is NaN in rows whose gradients are NaN.
    """

    q: Float[Array, "*R H"]
    d_out: Float[Array, "*R V"]
    shift: Float[Array, "*R"]  # inf in rows without weights
    delta: Float[Array, "*R"]


def rows(given: Rows, out: Array, l: Array, ratio: Array | None, hides: bool) -> Rows:
    """Return the rows of a backward pass.

    Args:
      given: Queries, the cotangent of out, the shift, and the cotangent of lse.
      out, l: What the forward pass returned.
      ratio: As `softmax.shift` returns it: what rebuilt weights lack to be weights, their rows' cotangents
        take. None where they have taken it.
      hides: Whether the mask may hide something.
    """
    q, d_out, shift, d_lse = given
    silent = (jnp.sum(jnp.where(d_out == 0, 0.0, 1.0), -1) == 0) & (d_lse == 0)
    delta = jnp.sum(d_out * out, -1) - d_lse
    if ratio is not None:
        delta, d_out = delta * ratio, d_out * ratio[..., None]
    if not hides:
        return Rows(q, d_out, shift, delta)
    real = jnp.isfinite(delta)  # then all that it is made of is, too
    # A row that saw nothing, or that nobody asked for a NaN of, has no weights.
    none = (l == 0) | (silent & ~real)
    shift = jnp.where(none, jnp.inf, jnp.where(real, shift, 0))
    q = replaced(replaced(q, real[..., None], jnp.nan), ~none[..., None], 0.0)
    return Rows(q, replaced(d_out, real[..., None], 0.0), shift, jnp.where(real, delta, 0))
