"""The kernels: one tile of attention forward, backward, and of the bias's gradient.

The mathematics are those of `softmax.py` in powers of two: the factor scale * log2(e) is applied with the
maximum already subtracted, m and l have 128 lanes, l keeps one partial sum a lane until the end, and the
weights enter the second product in the dtype of the values.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.backends.pallas_tpu_tiles import LANES, LOG2E, View, across
from mha_jax.types import Array

# Less than any logit, but finite, so that a row that has seen nothing subtracts it without a NaN.
LEAST = float(np.finfo(np.float32).min) / 2
# Less than any sum of weights, the largest of which is 1.
TINY = 0.5


def dot(a: Array, b: Array, axes: tuple[int, int], precision: Any) -> Array:
    """Multiply two matrices over one axis of each, in float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def forward(view: View, precision: Any) -> None:
    """Attend from blocks of queries to one chunk of keys; rows are queries."""
    view.at_first_chunk(lambda: _forget(view))
    view.each_block(lambda view: _forward_block(view, precision))


def _forget(view: View) -> None:
    """Start with rows that have seen nothing."""
    m, l, acc = (view.refs[name] for name in ("m", "l", "acc"))
    m[...] = jnp.full_like(m, LEAST)
    l[...] = jnp.zeros_like(l)
    acc[...] = jnp.zeros_like(acc)


def _forward_block(view: View, precision: Any) -> None:
    refs, here = view.refs, view.rows
    q, k, v = refs["q"], refs["k"], refs["v"]
    m_ref, l_ref, acc_ref = refs["m"], refs["l"], refs["acc"]
    size_v = acc_ref.shape[1]
    dropout = view.plan.dropout

    view.at_first_chunk(view.turn_rows)

    def tile(at, size, masked):
        x = dot(q[here], k[pl.ds(at, size)], (1, 1), precision)
        x = view.logits(x, at, size, masked)
        old = m_ref[...]
        m = jnp.maximum(old, jnp.max(x, axis=1, keepdims=True))
        shrink = jnp.exp2((old - m) * view.factor)
        p = jnp.exp2((x - across(m, size)) * view.factor)
        m_ref[...] = m
        l_ref[...] = l_ref[...] * shrink + by_lane(p)
        if dropout is not None:
            p = jnp.where(view.kept(at, size), p, 0.0)
        pv = dot(p.astype(v.dtype), v[pl.ds(at, size)], (1, 0), precision)
        acc_ref[...] = acc_ref[...] * across(shrink, size_v) + pv

    view.each_tile(tile)

    @view.at_last_chunk
    def _():
        l = jnp.sum(l_ref[...], axis=1, keepdims=True)
        # A row that saw nothing has acc = 0 and stays so, whatever it is divided by.
        share = 1 / jnp.maximum(l, TINY)
        if dropout is not None:
            share = share * (1 / (1 - dropout.rate))
        refs["out"][here] = (acc_ref[...] * share).astype(refs["out"].dtype)
        lse = m_ref[...] * (view.factor / LOG2E) + jnp.log(jnp.maximum(l, TINY))
        refs["lse"][:, here] = as_line(jnp.where(l > 0, lse, -jnp.inf))
        if view.g.blocks > 1:  # for the next one; here it overlaps with the end of this one
            _forget(view)


def as_line(column: Array) -> Array:
    """Turn columns of 128 equal lanes into one line along the lanes."""
    return column.T[:1]


def by_lane(p: Array) -> Array:
    """Add up columns that lie in the same lane."""
    total = p[:, :LANES]
    for lane in range(LANES, p.shape[1], LANES):
        total = total + p[:, lane : lane + LANES]
    return total


def weights(view: View, x: Array, at: Any, size: int) -> Array:
    """Rebuild the weights of a tile from `lse2`, which is lse * log2(e) and inf for unseen rows."""
    return jnp.exp2(x * view.factor - view.vector("lse2", at, size))


def slopes(
    view: View, p: Array, x: Array, dp: Array, keep: Array | None, at: Any, size: int
) -> Array:
    """Return the cotangent of a tile's logits."""
    if keep is not None:
        dp = jnp.where(keep, dp * (1 / (1 - view.plan.dropout.rate)), 0.0)  # type: ignore[union-attr]
    ds = p * (dp - view.vector("delta", at, size))
    slope = view.slope(x)
    return ds if slope is None else ds * slope


def backward(view: View, precision: Any) -> None:
    """Add what blocks of keys give to dq, dk and dv; rows are keys, tiles are transposed."""
    refs = view.refs
    bias_of_queries = view.plan.vectors.get("bias") == "q"

    @view.at_first_rows
    def _():
        refs["dq_sum"][...] = jnp.zeros_like(refs["dq_sum"])
        if bias_of_queries:
            refs["d_bias"][...] = jnp.zeros_like(refs["d_bias"])

    if "dk_before" not in refs:
        _clear(view)
    view.each_block(lambda view: _backward_block(view, precision))

    @view.at_last_rows
    def _():
        refs["dq"][...] = (refs["dq_sum"][...] * view.plan.rules.scale).astype(refs["dq"].dtype)


def _clear(view: View) -> None:
    """Start with keys that have given nothing."""
    for name in ("dk_sum", "dv_sum", "d_bias_sum"):
        if name in view.refs:
            view.refs[name][...] = jnp.zeros_like(view.refs[name])


def _backward_block(view: View, precision: Any) -> None:
    refs, plan, rows = view.refs, view.plan, view.rows
    q, d_out = refs["q"], refs["d_out"]
    k, v = refs["k"].at[rows], refs["v"].at[rows]
    dq_sum, dk_sum, dv_sum = refs["dq_sum"], refs["dk_sum"], refs["dv_sum"]
    bias_side = plan.vectors.get("bias")
    last = "dk_before" not in refs
    if not last:
        _clear(view)
        dk_sum[...], dv_sum[...] = refs["dk_before"][rows], refs["dv_before"][rows]
    view.turn_rows()

    def tile(at, size, masked):
        here = pl.ds(at, size)
        x = dot(k[...], q[here], (1, 1), precision)
        x = view.logits(x, at, size, masked)
        p = weights(view, x, at, size)
        keep = None if plan.dropout is None else view.kept(at, size)
        kept = p if keep is None else jnp.where(keep, p, 0.0)
        dv_sum[...] += dot(kept.astype(d_out.dtype), d_out[here], (1, 0), precision)
        dp = dot(v[...], d_out[here], (1, 1), precision)
        ds = slopes(view, p, x, dp, keep, at, size)
        if bias_side == "k":
            refs["d_bias_sum"][...] += by_lane(ds)
        if bias_side == "q":
            refs["d_bias"][:, here] += jnp.sum(ds, axis=0, keepdims=True)
        ds = ds.astype(q.dtype)
        dk_sum[...] += dot(ds, q[here], (1, 0), precision)
        dq_sum[here] += dot(ds, k[...], (0, 0), precision)

    view.each_tile(tile)
    share = 1.0 if plan.dropout is None else 1 / (1 - plan.dropout.rate)
    refs["dk"][rows] = (dk_sum[...] * (plan.rules.scale if last else 1.0)).astype(refs["dk"].dtype)
    refs["dv"][rows] = (dv_sum[...] * (share if last else 1.0)).astype(refs["dv"].dtype)
    if bias_side == "k":
        total = jnp.sum(refs["d_bias_sum"][...], axis=1, keepdims=True)
        line = as_line(jnp.broadcast_to(total, (total.shape[0], LANES)))
        refs["d_bias"][:, rows] = line
    if last and view.g.blocks > 1:  # for the next one; here it overlaps with the end of this one
        _clear(view)


def bias_gradient(view: View, precision: Any) -> None:
    """Write the cotangent of the logits of a block of queries and one chunk of keys."""
    refs = view.refs
    q, k, v, d_out, out = (refs[name] for name in ("q", "k", "v", "d_out", "d_bias"))
    view.turn_rows()
    out[...] = jnp.zeros_like(out)

    def tile(at, size, masked):
        here = pl.ds(at, size)
        x = dot(q[...], k[here], (1, 1), precision)
        x = view.logits(x, at, size, masked)
        p = weights(view, x, at, size)
        keep = None if view.plan.dropout is None else view.kept(at, size)
        dp = dot(d_out[...], v[here], (1, 1), precision)
        out[:, here] = slopes(view, p, x, dp, keep, at, size)

    view.each_tile(tile)
