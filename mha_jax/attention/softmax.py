"""The running softmax: attention over some keys, then over more keys, without keeping logits.

For every query row the state holds m, the largest logit so far, l, the sum of exp(logit - m), and
acc, the same sum weighted by the values. Masked logits are -inf, so exp gives them exactly zero; a
row that has seen no key has m = -inf and l = 0 and ends as zeros with lse = -inf. The statistics
have one trailing axis of 1 so that they broadcast against a tile of logits, whatever its leading
axes are.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682, sec. 2.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax, nn

from mha_jax.types import Array, Float, Size


class Running(NamedTuple):
    """State of a running softmax over tiles of keys."""

    acc: Array  # [*R, T, V]
    m: Array  # [*R, T, 1]
    l: Array  # [*R, T, 1]


def start(rows: tuple[Size, ...], value_size: int, dtype) -> Running:
    """Return the state of rows that have seen no key yet."""
    return Running(
        jnp.zeros((*rows, value_size), dtype),
        jnp.full((*rows, 1), -jnp.inf, dtype),
        jnp.zeros((*rows, 1), dtype),
    )


def finite(m: Float[Array, "*R"]) -> Float[Array, "*R"]:
    """Replace -inf by 0: the shift of a row that sees nothing may be any number, but finite.

    A row with a logit of inf has no weights: its shift is NaN, 0 times inf.
    """
    shift = jnp.where(m == -jnp.inf, 0, m)
    return shift + 0 * shift


def weights(x: Float[Array, "*R"], m: Float[Array, "..."]) -> Float[Array, "*R"]:
    """Return exp(x - m), exactly 0 where the logit is -inf; m broadcasts."""
    return jnp.exp(x - finite(m))


def first(x: Float[Array, "*R T S"], product: bool) -> tuple[Array, Array, Array]:
    """Return (p, m, l) of the first, or only, tile of logits: `grow` of rows that have seen no key."""
    m = jnp.max(x, axis=-1, keepdims=True)
    p = weights(_settled(x) if product else x, m)
    return p, m, jnp.sum(p, axis=-1, keepdims=True)


def apart(x: Float[Array, "*R T S"]) -> tuple[Array, Array, Array]:
    """Return what `first` does, by two passes over the logits with nothing between them: two launches."""
    m = jnp.max(x, axis=-1, keepdims=True)
    settled = jnp.maximum(x, jnp.finfo(x.dtype).min)  # a logit of inf stays, and makes its row NaN
    p = jnp.where(x == -jnp.inf, jnp.zeros((), x.dtype), jnp.exp(settled - m))
    return p, m, jnp.sum(p, axis=-1, keepdims=True)


def statistics(x: Float[Array, "*R T S"]) -> tuple[Array, Array]:
    """Return (m, l) of whole rows of logits, without the last axis; m counts as a constant in derivatives."""
    m = lax.stop_gradient(jnp.max(x, axis=-1, initial=-jnp.inf))
    return m, jnp.sum(weights(x, m[..., None]), axis=-1)


def scores(x: Float[Array, "*R T S"], near: Array | None = None) -> Float[Array, "*R T S"]:
    """Return the softmax of whole rows: they sum to 1, or are 0 where all logits are -inf.

    Args:
      x: Logits.
      near: A number near every row's largest logit, [*R, T, 1], its lse say, that saves looking for it.
    """
    if x.shape[-1] == 0:
        return x
    near = jnp.max(x, axis=-1, keepdims=True) if near is None else near
    p = weights(x, lax.stop_gradient(near))
    return p * reciprocal(jnp.sum(p, axis=-1, keepdims=True))


def grow(
    m: Float[Array, "*R T 1"], l: Float[Array, "*R T 1"], x: Float[Array, "*R T S"], product: bool
) -> tuple[Array, Array, Array, Array]:
    """Take a tile of logits into the statistics.

    Args:
      m, l: The statistics before.
      x: The tile.
      product: Whether the last operation on a logit may be a multiplication; see `_settled`.

    Returns:
      (p, fix, m, l): the tile's weights relative to the new maximum, the factor exp(old m - new m)
      by which everything summed before must shrink, and the new statistics.
    """
    new = jnp.maximum(m, jnp.max(x, axis=-1, keepdims=True))
    shift = finite(new)
    p, fix = jnp.exp((_settled(x) if product else x) - shift), jnp.exp(m - shift)
    return p, fix, new, l * fix + jnp.sum(p, axis=-1, keepdims=True)


def merge(*parts: Running) -> Running:
    """Return the state of rows that have seen the keys of all parts, none of them twice."""
    m = functools.reduce(jnp.maximum, (x.m for x in parts))
    shrunk = [jnp.exp(x.m - finite(m)) for x in parts]
    acc, l = (
        functools.reduce(jnp.add, (getattr(x, name) * s for x, s in zip(parts, shrunk)))
        for name in ("acc", "l")
    )
    return Running(acc, m, l)


def _settled(x: Float[Array, "*R"]) -> Float[Array, "*R"]:
    """Return logits as they are, as far as weights go, after an operation that no compiler merges.

    Else `scale * dot - m` may be rounded once, as one operation, or twice, as what is around the pass has it:
    then asking for scores would change bits of the output. What is hidden stays -inf: the smallest number may
    be the largest logit of a row.
    """
    return jnp.minimum(x, jnp.finfo(x.dtype).max)


def reciprocal(l: Float[Array, "*R"]) -> Float[Array, "*R"]:
    """Return 1 / l, and 0 for rows that saw no key. A NaN, of a row that saw one, stays."""
    seen = l != 0
    return jnp.where(seen, 1 / jnp.where(seen, l, jnp.ones_like(l)), jnp.zeros_like(l))


def inverse(l: Float[Array, "*R"]) -> Float[Array, "*R"]:
    """Return 1 / l, or a large finite number for rows that saw no key: what these have summed up is 0.

    One operation, which merges with the sum.
    """
    return 1 / jnp.maximum(l, jnp.asarray(4 * jnp.finfo(l.dtype).tiny, l.dtype))


def logsumexp(m: Float[Array, "*R"], l: Float[Array, "*R"]) -> Float[Array, "*R"]:
    """Return m + log(l), -inf for rows that saw no key, NaN for those whose sum is none.

    m counts as a constant in derivatives, and the sums of NaN as their own logarithm: a row that nobody asks
    for then moves nothing.
    """
    m = lax.stop_gradient(m)
    seen = l > 0
    log = finite(m) + jnp.log(jnp.where(seen, l, jnp.ones_like(l)))
    return jnp.where(seen, log, jnp.where(l == 0, -jnp.inf, l))


def share(
    m: Float[Array, "B N T"], l: Float[Array, "B N T"], sinks: Array
) -> Float[Array, "B N T"]:
    """Return the part of every row's weight that its keys keep beside a sink: sigmoid(lse - sink).

    The differences are taken before the sums, so that large logits lose nothing.

    Source: Xiao et al. 2023, arXiv:2309.17453; gpt-oss, a learned logit for each head.
    """
    seen = l > 0
    sinks = jnp.asarray(sinks, m.dtype)[None, :, None]
    gap = finite(lax.stop_gradient(m)) - sinks + jnp.log(jnp.where(seen, l, jnp.ones_like(l)))
    return jnp.where(
        seen, nn.sigmoid(jnp.where(seen, gap, jnp.zeros_like(gap))), jnp.zeros_like(gap)
    )


def parts(m: Float[Array, "*R"], l: Float[Array, "*R"]) -> tuple[Array, Array]:
    """Return (c, log) that rebuild weights where they are subtracted one after the other: exp(x - c - log).

    c is the largest logit, so that nothing is lost to rounding, as large as logits may be. A row that saw no
    key has c = inf: its weights are 0 whatever its logits are. A row of NaN has c = NaN.
    """
    c = lax.stop_gradient(jnp.where(l == 0, jnp.inf, m + 0 * l))
    return c, jnp.log(jnp.where(l > 0, l, jnp.ones_like(l)))


def shift(m: Float[Array, "*R"], l: Float[Array, "*R"]) -> tuple[Array, Array]:
    """Return (c, r) that rebuild weights: exp(x - m) / l = exp(x - c) * r.

    c is lse, rounded, and r, all but 1 unless logits are huge, what the rounding lost. So a pass over
    tiles subtracts one number from a logit, and multiplies a row's cotangent, not its weights, by r.
    A row that saw no key has c = inf and r = 0: its weights are 0 whatever its logits are.
    """
    m = lax.stop_gradient(m)
    seen = l != 0
    log = jnp.log(jnp.where(seen, l, jnp.ones_like(l)))
    c = lax.stop_gradient(finite(m) + log)
    r = jnp.exp((c - finite(m)) - log)
    return jnp.where(seen, c, jnp.inf), jnp.where(seen, r, jnp.zeros_like(r))
