"""The kernels: attention forward, backward, and the bias's gradient, tile by tile and part by part.

The mathematics are those of `softmax.py` in powers of two: the factor scale * log2(e) is applied with the
maximum already subtracted, m and l have 128 lanes, l keeps one partial sum a lane until the end, and the
weights enter the second product in the dtype of the values.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.backends.pallas_tpu import diagonals
from mha_jax.backends.pallas_tpu.patterns import LANES
from mha_jax.backends.pallas_tpu.view import Part, View, across, aligned
from mha_jax.types import Array

# No more than any logit, but finite, so that a row that has seen nothing subtracts it without a NaN.
LEAST = float(np.finfo(np.float32).min)
# Less than any sum of weights, the largest of which is 1.
TINY = 0.5
# Rows of cotangents that are multiplied at once; all of the program for them is written out.
MOST_AT_ONCE = 2048


def dot(a: Array, b: Array, axes: tuple[int, int], precision: Any) -> Array:
    """Multiply two matrices over one axis of each, in float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def forward(view: View, precision: Any) -> None:
    """Attend from blocks of queries to one chunk of keys; rows are queries."""
    view.each_block(lambda view: _forward_block(view, precision), lambda: _forget(view))


def _forget(view: View) -> None:
    """Start with rows that have seen nothing."""
    if view.plan.order.fresh:
        return
    m, l, acc = (view.refs[name] for name in ("m_sum", "l_sum", "acc"))
    m[...] = jnp.full_like(m, LEAST)
    l[...] = jnp.zeros_like(l)
    acc[...] = jnp.zeros_like(acc)


def staggered(parts: list[Part], start: Callable, finish: Callable) -> None:
    """Run `finish(part, *start(part))`, the start of the next part before the end of this one.

    The matrix unit computes the logits of one part while the vector unit works on the weights of
    another: the compiler interleaves what lies side by side in the program.
    """
    started = start(parts[0])
    for part, following in itertools.pairwise(parts):
        ahead = start(following)
        finish(part, *started)
        started = ahead
    finish(parts[-1], *started)


def _forward_block(view: View, precision: Any) -> None:
    refs, here = view.refs, view.rows
    q, k, v = refs["q"], refs["k"], refs["v"]
    m_ref, l_ref, acc_ref = refs["m_sum"], refs["l_sum"], refs["acc"]
    dropout = view.plan.dropout

    view.at_first_chunk(view.transpose_rows)

    def start(part):
        x = view.capped(dot(q[view.rows_of_part(part)], k[part.columns], (1, 1), precision))
        x = view.logits(x, part)
        largest = jnp.max(x, axis=1, keepdims=True)
        if part.fresh:
            m = jnp.maximum(largest, LEAST)
            shrink = None
        else:
            old = m_ref[part.rows]
            m = jnp.maximum(old, largest)
            shrink = jnp.exp2((old - m) * view.factor)
        m_ref[part.rows] = across(m, LANES)
        return x, m, shrink

    def finish(part, x, m, shrink):
        def add(ref, new):
            before = 0 if shrink is None else ref[part.rows] * across(shrink, new.shape[1])
            ref[part.rows] = before + new

        p = jnp.exp2((x - across(m, part.width)) * view.factor)
        add(l_ref, by_lane(p))
        if dropout is not None:
            p = jnp.where(view.kept(part), p, 0.0)
        add(acc_ref, dot(p.astype(v.dtype), v[part.columns], (1, 0), precision))

    view.each_tile(lambda parts: staggered(parts, start, finish))

    @view.at_last_chunk
    def _():
        l = jnp.sum(l_ref[...], axis=1, keepdims=True)
        # A row that saw nothing has acc = 0 and stays so, whatever it is divided by.
        share = 1 / jnp.maximum(l, TINY)
        if dropout is not None:
            share = share * dropout.factor
        refs["out"][here] = (acc_ref[...] * share).astype(refs["out"].dtype)
        m, l = as_line(m_ref[...]), as_line(jnp.broadcast_to(l, l_ref.shape))
        refs["m"][:, here] = jnp.where(l != 0, m, -jnp.inf)
        refs["l"][:, here] = l


def as_line(column: Array) -> Array:
    """Turn columns of 128 equal lanes into one line along the lanes.

    Of every 8 rows, 8 lanes are kept, and of these the diagonal.
    """
    row, lane = (lax.broadcasted_iota(jnp.int32, (8, LANES), axis) for axis in (0, 1))
    lines = []
    for square in range(0, column.shape[0], LANES):
        found = column[square : square + 8]
        for at in range(8, LANES, 8):
            found = jnp.where(lane < at, found, column[square + at : square + at + 8])
        lines.append(jnp.sum(jnp.where(lane % 8 == row, found, 0), axis=0, keepdims=True))
    return jnp.concatenate(lines, 1)


def by_lane(p: Array) -> Array:
    """Add up columns that lie in the same lane."""
    total = p[:, :LANES]
    for lane in range(LANES, p.shape[1], LANES):
        total = total + p[:, lane : lane + LANES]
    return total


def weights(view: View, x: Array, part: Part) -> Array:
    """Rebuild the weights of a part, but for the ratio of `softmax.shift`, which their rows take."""
    return jnp.exp2((x - view.vector("shift", part)) * view.factor)


def slopes(view: View, p: Array, dp: Array, keep: Array | None, part: Part) -> Array:
    """Return the cotangent of a part's logits."""
    if keep is not None:
        dp = jnp.where(keep, dp * view.plan.dropout.factor, 0.0)  # type: ignore[union-attr]
    return p * (dp - view.vector("delta", part))


def without_nan(x: Array) -> Array:
    """Put zeros in place of NaN; not every TPU compares numbers of 16 bits."""
    wide = x.astype(jnp.float32)
    return jnp.where(wide == wide, wide, 0.0).astype(x.dtype)


def backward(view: View, precision: Any) -> None:
    """Add what blocks of keys give to dq, dk and dv; rows are keys, tiles are transposed."""
    refs = view.refs
    sums = [f"d.{name}" for name in view.plan.moved if view.plan.vectors[name] == "q"]
    sums += ["d_distances"] if "d_distances" in refs else []

    @view.at_first_rows
    def _():
        _begin(refs)
        for name in sums:
            refs[name][...] = jnp.zeros_like(refs[name])

    view.each_block(lambda view: _backward_block(view, precision), lambda: _clear(view))

    @view.at_last_rows
    def _():
        refs["dq"][...] = (refs["dq_sum"][...] * view.plan.rules.scale).astype(refs["dq"].dtype)


def _begin(refs: dict[str, Any]) -> None:
    """Start with queries that were given nothing, and multiply their cotangents by what weights lack.

    In here, once a head, that takes a quarter of the bundles that it takes XLA. What a ratio is more than 1
    is as small as logits are rounded: it is turned in the dtype of the cotangents, in half as many registers.
    """
    total, size = refs["d_out"].shape
    step = next(n for n in range(min(total, MOST_AT_ONCE), 0, -LANES) if total % n == 0)

    def some(i, carry):
        here = pl.ds(aligned(i * step), step)
        refs["dq_sum"][here] = jnp.zeros((step, refs["dq_sum"].shape[1]), jnp.float32)
        more = (refs["ratio"][:, here] - 1).astype(refs["d_out"].dtype)
        more = jnp.broadcast_to(more, (LANES, step)).T.astype(jnp.float32)
        d_out = refs["d_out"][here].astype(jnp.float32)
        scaled = d_out + d_out * across(more, size)
        refs["d_out_scaled"][here] = scaled.astype(refs["d_out"].dtype)
        return carry

    lax.fori_loop(0, total // step, some, None)


def _clear(view: View) -> None:
    """Start with keys that were given nothing."""
    of_keys = [name for name in view.plan.moved if view.plan.vectors[name] == "k"]
    for name in ("dk_sum", "dv_sum", *(f"d.{name}.sum" for name in of_keys)):
        view.refs[name][...] = jnp.zeros_like(view.refs[name])


def _backward_block(view: View, precision: Any) -> None:
    refs, plan, rows = view.refs, view.plan, view.rows
    q, k, v, d_out = (refs[name] for name in ("q", "k", "v", "d_out_scaled"))
    dq_sum, dk_sum, dv_sum = refs["dq_sum"], refs["dk_sum"], refs["dv_sum"]
    last = "dk_before" not in refs
    if not last:
        dk_sum[...], dv_sum[...] = refs["dk_before"][rows], refs["dv_before"][rows]
    view.transpose_rows()

    def start(part):
        capped = view.capped(dot(k[view.rows_of_part(part)], q[part.columns], (1, 1), precision))
        return view.logits(capped, part), view.slope(capped)

    def finish(part, x, slope):
        here = part.columns
        p = weights(view, x, part)
        keep = None if plan.dropout is None else view.kept(part)
        kept = p if keep is None else jnp.where(keep, p, 0.0)
        dv_sum[part.rows] += dot(kept.astype(d_out.dtype), d_out[here], (1, 0), precision)
        dp = dot(v[view.rows_of_part(part)], d_out[here], (1, 1), precision)
        ds = slopes(view, p, dp, keep, part)
        for name, moved in view.moves(ds, part).items():
            if plan.vectors[name] == "k":
                refs[f"d.{name}.sum"][part.rows] += by_lane(moved)
            else:
                refs[f"d.{name}"][:, here] += jnp.sum(moved, axis=0, keepdims=True)
        if "d_distances" in refs:
            refs["d_distances"][:, view.distances(part)] += diagonals.summed(ds)
        if slope is not None:
            # Where a part hides something, slopes may be NaN there.
            some = part.kinds and view.plan.hides
            ds = jnp.where(ds == 0, 0.0, ds * slope) if some else ds * slope
        ds = ds.astype(q.dtype)
        q_rows = without_nan(q[here]) if part.kinds and view.plan.hides else q[here]
        dk_sum[part.rows] += dot(ds, q_rows, (1, 0), precision)
        dq_sum[here] += dot(ds, k[view.rows_of_part(part)], (0, 0), precision)

    view.each_tile(lambda parts: staggered(parts, start, finish))
    share = 1.0 if plan.dropout is None else plan.dropout.factor
    refs["dk"][rows] = (dk_sum[...] * (plan.rules.scale if last else 1.0)).astype(refs["dk"].dtype)
    refs["dv"][rows] = (dv_sum[...] * (share if last else 1.0)).astype(refs["dv"].dtype)
    for name in plan.moved:
        if plan.vectors[name] == "k":
            total = jnp.sum(refs[f"d.{name}.sum"][...], axis=1, keepdims=True)
            line = as_line(jnp.broadcast_to(total, (total.shape[0], LANES)))
            refs[f"d.{name}"][:, rows] = line


def bias_gradient(view: View, precision: Any) -> None:
    """Write the cotangent of the logits of a block of queries and one chunk of keys."""
    refs = view.refs
    q, k, v, d_out, out = (refs[name] for name in ("q", "k", "v", "d_out", "d_bias"))
    view.transpose_rows()
    out[...] = jnp.zeros_like(out)

    def start(part):
        capped = view.capped(dot(q[part.rows], k[part.columns], (1, 1), precision))
        return view.logits(capped, part), dot(d_out[part.rows], v[part.columns], (1, 1), precision)

    def finish(part, x, dp):
        p = weights(view, x, part)
        keep = None if view.plan.dropout is None else view.kept(part)
        dp = dp * view.vector("ratio", part)
        out[part.rows, part.columns] = slopes(view, p, dp, keep, part)

    view.each_tile(lambda parts: staggered(parts, start, finish))
