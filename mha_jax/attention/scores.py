"""What the attention scores say, without the scores: reductions over a few rows at a time.

B batch   T query length   S key length   N query heads   R rows at a time
"""

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mha_jax.attention.call import Call
from mha_jax.attention.check import check
from mha_jax.attention.functions import attention_scores
from mha_jax.errors import ShapeError
from mha_jax.types import Array, Float, Int

# Scores that are held at a time, in numbers.
_HELD = 2**20


def scores_mean(call: Call, lse: Array | None = None) -> Float[Array, "*B T S"]:
    """Return the scores averaged over the heads.

    Args:
      call: The call whose scores are wanted; any leading batch axes.
      lse: As for `attention_scores`.

    Cost: The time of `attention_scores`; O(B T S) memory, for the result.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> scores_mean(Call(x, x, x)).shape
    (1, 5, 5)
    """
    return _by_rows(call, lse, partial(jnp.mean, axis=-3), -2)


def scores_max(call: Call, lse: Array | None = None) -> Float[Array, "*B N T"]:
    """Return the largest score of every query, 0 where it sees no key. Arguments as `scores_mean`.

    Cost: The time of `attention_scores`; O(B N T) memory.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> print(f"{scores_max(Call(x, x, x))[0, 0, 0]:.3f}")
    0.200
    """
    return _by_rows(call, lse, partial(jnp.max, axis=-1, initial=0), -1)


def scores_entropy(call: Call, lse: Array | None = None) -> Float[Array, "*B N T"]:
    """Return the entropy of the scores of every query in nats, 0 where it sees no key.

    Arguments as `scores_mean`. Cost: The time of `attention_scores`; O(B N T) memory.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> bool(jnp.isclose(scores_entropy(Call(x, x, x))[0, 0, 0], jnp.log(5.0)))
    True
    """
    return _by_rows(call, lse, _entropy, -1)


def scores_top_k(
    call: Call, k: int, lse: Array | None = None
) -> tuple[Float[Array, "*B N T k"], Int[Array, "*B N T k"]]:
    """Return the k largest scores of every query and the keys that they belong to.

    Arguments as `scores_mean`; k is at most S. Cost: The time of `attention_scores` and of k maxima a
    row; O(B N T k) memory.

    Raises:
      ShapeError: If k is not between 1 and S.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> [a.shape for a in scores_top_k(Call(x, x, x), 3)]
    [(1, 2, 5, 3), (1, 2, 5, 3)]
    """
    check(call)
    if not isinstance(k, numbers.Integral) or not 1 <= k <= call.k.shape[-3]:
        raise ShapeError(
            f"k={k!r} largest scores of {call.k.shape[-3]} keys cannot be had: expected an integer k from "
            "1 to S."
        )
    return _by_rows(call, lse, partial(_top_k, k=int(k)), -2)


def _top_k(scores: Array, k: int) -> tuple[Array, Array]:
    place = jax.typeof(scores).sharding
    if place.spec and place.spec[-1] is not None:  # keys cut along an explicit axis: sorted whole
        spec = jax.sharding.PartitionSpec(*place.spec[:-1], None)
        scores = jax.sharding.reshard(scores, jax.sharding.NamedSharding(place.mesh, spec))
    largest, keys = lax.top_k(scores, k)
    return largest, keys


def _entropy(scores: Array) -> Array:
    seen = scores > 0
    return -jnp.sum(jnp.where(seen, scores * jnp.log(jnp.where(seen, scores, 1)), 0), axis=-1)


def _by_rows(call: Call, lse: Array | None, reduce: Callable[[Array], Any], row_axis: int) -> Any:
    """Apply `reduce` to scores [*B, N, R, S], R rows at a time, and join the rows on `row_axis`."""
    check(call)
    *lead, t, n, _ = call.q.shape
    if not all(isinstance(size, int) for size in (*lead, t, call.k.shape[-3])):
        return reduce(attention_scores(call, lse))
    at_once = max(1, _HELD // max(1, math.prod(lead) * n * call.k.shape[-3]))
    if at_once >= t:
        return reduce(attention_scores(call, lse))

    def block(start):
        # The last block repeats the last row, which is cut off below.
        rows = jnp.minimum(start + jnp.arange(at_once), t - 1)
        return reduce(attention_scores(call, lse, rows=rows))

    def join(blocks):
        axis = blocks.ndim + row_axis
        blocks = jnp.moveaxis(blocks, 0, axis - 1)
        whole = blocks.reshape(*blocks.shape[: axis - 1], -1, *blocks.shape[axis + 1 :])
        return lax.slice_in_dim(whole, 0, t, axis=axis - 1)

    return jax.tree.map(join, lax.map(block, jnp.arange(0, t, at_once)))
