"""The three passes over tiles: forward, cotangent and tangent.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size; * stands for the examples and heads of a tile, r for its rows

`forward` keeps a running softmax over the key blocks. `cotangent` and `tangent` rebuild the weights from a
row's (m, l): see `softmax.shift`. The backward pass walks down the key blocks and computes each tile
transposed, [*, block_k, r], so that the gradients of keys and values are plain products.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mha_jax.attention import hidden, softmax
from mha_jax.attention.call import Moves, Output, State, moving
from mha_jax.attention.hidden import Rows
from mha_jax.backends.blockwise.tiles import ByKeys, ByQueries, Place, Tiles, scan


def forward(tiles: Tiles) -> State:
    """Attend; return the output and every row's (m, l)."""
    problem, order = tiles.problem, tiles.visits(by_rows=True)
    by = ByQueries(tiles, order.masked)
    dropout = problem.dropout

    def row(g, i, _):
        q_row = tiles.rows_of(tiles.q, Place(g, i, 0))

        def block(j, state):
            at = Place(g, i, j)
            dot = tiles.dot("...rh,...sh->...rs", q_row, tiles.keys_of(tiles.k, at))
            x = by.logits(tiles.rules.capped(dot), at)
            if state is None:
                p, m, l = softmax.first(x)
                before = jnp.zeros((), tiles.dtype)
            else:
                p, fix, m, l = softmax.grow(state.m, state.l, x)
                before = state.acc * fix
            if dropout is not None:
                p = jnp.where(by.kept(at), p, 0)
            v_tile = tiles.keys_of(tiles.v, at).astype(tiles.dtype)
            return softmax.Running(before + tiles.dot("...rs,...sv->...rv", p, v_tile), m, l)

        start = softmax.start(q_row.shape[:-1], tiles.v.shape[-1], tiles.dtype)
        end = tiles.over(order, g, i, block, None if order.single else start)
        out = end.acc * softmax.inverse(end.l)
        if dropout is not None:
            out = out * jnp.asarray(dropout.factor, tiles.dtype)
        return None, (out.astype(problem.v.dtype), end.m, end.l)

    _, (out, m, l) = scan(row, None, tiles.layout.groups, tiles.q_blocks)
    return State(tiles.queries_back(out), tiles.statistics_back(m), tiles.statistics_back(l))


def cotangent(tiles: Tiles, state: State, cotangent: Output) -> Moves:
    """Return the cotangents of q, k, v and bias."""
    problem, dtype, order = tiles.problem, tiles.dtype, tiles.visits(by_rows=False)
    by, rules = ByKeys(tiles, order.masked), tiles.rules
    d_out, out = (tiles.queries(x.astype(dtype)) for x in (cotangent.out, state.out))
    shift, ratio = softmax.shift(state.m, state.l)
    shift = tiles.statistics(shift, jnp.inf)
    ratio, l, d_lse = (tiles.statistics(x) for x in (ratio, state.l, cotangent.lse))
    rows = hidden.rows(Rows(tiles.q, d_out, shift, d_lse), out, l, ratio, tiles.hides)
    if problem.dropout is not None:
        rows = rows._replace(d_out=rows.d_out * jnp.asarray(problem.dropout.factor, dtype))

    def column(g, j, carry):
        k_tile = tiles.keys_of(tiles.k, Place(g, 0, j))
        v_tile = tiles.keys_of(tiles.v, Place(g, 0, j)).astype(dtype)
        # The barrier stops XLA from fusing this transpose into the products, which makes them slow.
        k_transposed = lax.optimization_barrier(k_tile.astype(dtype).swapaxes(-1, -2))

        def block(i, carry):
            at = Place(g, i, j)
            d_bias, d_rule, dq, dk, dv = carry
            q, do, shift, delta = (tiles.rows_of(x, at) for x in rows)
            capped = rules.capped(tiles.dot("...sh,...rh->...sr", k_tile, q))
            x = by.logits(capped, at)
            p = jnp.exp(x - shift[..., None, :])
            dp = tiles.dot("...sv,...rv->...sr", v_tile, do)
            kept = p
            if problem.dropout is not None:
                # The sign carries the bit to both products, so that it is hashed once.
                signed = lax.optimization_barrier(jnp.where(by.kept(at), p, -p))
                p, kept = jnp.abs(signed), jnp.maximum(signed, 0)
                dp = jnp.where(signed > 0, dp, 0)
            dx = p * (dp - delta[..., None, :])
            if d_bias is not None:
                d_bias = tiles.add_dense(d_bias, dx.swapaxes(-1, -2), at)
            if d_rule is not None:
                _, pull = jax.vjp(by.ruled(dx.shape, at), tiles.rule_floats)
                d_rule = jax.tree.map(jnp.add, d_rule, *pull(dx))
            q = q.astype(dtype)
            if by.masked and tiles.hides:  # rows of NaN reach nothing that is hidden from them
                q = jnp.where(jnp.isnan(q), 0, q)
            if rules.cap is not None:
                dx = tiles.shown(dx, dx * rules.slope(capped))
            dv = dv + tiles.dot("...sr,...rv->...sv", kept, do)
            dk = dk + tiles.dot("...sr,...rh->...sh", dx, q)
            dq = tiles.add_transposed(dq, tiles.dot("...hs,...sr->...hr", k_transposed, dx), at)
            return d_bias, d_rule, dq, dk, dv

        zeros = jnp.zeros(k_tile.shape, dtype), jnp.zeros(v_tile.shape, dtype)
        *carry, dk, dv = tiles.over(order, g, j, block, (*carry, *zeros))
        return tuple(carry), (dk, dv)

    asked = moving(problem)
    d_bias = None if asked.bias is None else jnp.zeros(tiles.bias.shape, dtype)  # type: ignore[union-attr]
    *lead, length, size = tiles.q.shape
    ruled = bool(jax.tree.leaves(asked.bias_rule))
    d_rule = jax.tree.map(jnp.zeros_like, tiles.rule_floats) if ruled else None
    carry = (d_bias, d_rule, jnp.zeros((*lead, size, length), dtype))
    (d_bias, d_rule, dq), (dk, dv) = scan(column, carry, tiles.layout.groups, tiles.k_blocks)
    dk = tiles.keys_back(dk) * jnp.asarray(rules.scale, dtype)
    dq = tiles.transposed_back(dq) * jnp.asarray(tiles.scale, dtype)
    bias = asked.bias
    if bias is not None and d_bias is not None:
        d_bias = d_bias[tuple(slice(n) for n in bias.shape)].astype(bias.dtype)
    return Moves(
        dq.astype(problem.q.dtype),
        dk.astype(problem.k.dtype),
        tiles.keys_back(dv).astype(problem.v.dtype),
        d_bias,
        jax.tree.map(lambda a, d: d.astype(jnp.result_type(a)), asked.bias_rule, d_rule)
        if ruled
        else asked.bias_rule,
    )


def tangent(tiles: Tiles, state: State, direction: Moves) -> Output:
    """Return the tangents of out and lse along a direction."""
    problem, dtype, order = tiles.problem, tiles.dtype, tiles.visits(by_rows=True)
    by, rules = ByQueries(tiles, order.masked), tiles.rules
    scale = jnp.asarray(tiles.scale, dtype)
    dq = None if direction.q is None else tiles.queries(direction.q.astype(dtype) * scale)
    dk, dv = (None if x is None else tiles.keys(x.astype(dtype)) for x in direction[1:3])
    d_bias = None if direction.bias is None else tiles.pad_dense(direction.bias.astype(dtype))
    d_rule = None
    if jax.tree.leaves(direction.bias_rule):
        d_rule = jax.tree.map(
            lambda a, d: jnp.zeros_like(a) if d is None else d.astype(dtype),
            *(tiles.rule_floats, direction.bias_rule),
        )
    shift, ratio = softmax.shift(state.m, state.l)
    shift, ratio = tiles.statistics(shift, jnp.inf), tiles.statistics(ratio)

    def row(g, i, _):
        here = Place(g, i, 0)
        q_row = tiles.rows_of(tiles.q, here)
        shift_row, ratio_row = (tiles.rows_of(x, here)[..., None] for x in (shift, ratio))

        def block(j, sums):
            at = Place(g, i, j)
            d_out, d_lse = sums
            k_tile = tiles.keys_of(tiles.k, at)
            v_tile = tiles.keys_of(tiles.v, at).astype(dtype)
            capped = rules.capped(tiles.dot("...rh,...sh->...rs", q_row, k_tile))
            p = jnp.exp(by.logits(capped, at) - shift_row) * ratio_row
            dx = jnp.zeros_like(capped)
            if dq is not None:
                dq_row = tiles.rows_of(dq, at)
                dx = dx + tiles.dot("...rh,...sh->...rs", dq_row, k_tile.astype(dtype))
            if dk is not None:
                q_scaled = q_row.astype(dtype) * jnp.asarray(rules.scale, dtype)
                dx = dx + tiles.dot("...rh,...sh->...rs", q_scaled, tiles.keys_of(dk, at))
            dx = dx * rules.slope(capped)
            if d_bias is not None:
                dx = dx + by.dense(d_bias, at)
            if d_rule is not None:
                dx = dx + jax.jvp(by.ruled(dx.shape, at), (tiles.rule_floats,), (d_rule,))[1]
            dp = tiles.shown(p, p * dx)
            d_lse = d_lse + jnp.sum(dp, -1, keepdims=True)
            kept = p
            if problem.dropout is not None:
                keep = by.kept(at)
                kept, dp = jnp.where(keep, p, 0), jnp.where(keep, dp, 0)
            d_out = d_out + tiles.dot("...rs,...sv->...rv", dp, v_tile)
            if dv is not None:
                d_out = d_out + tiles.dot("...rs,...sv->...rv", kept, tiles.keys_of(dv, at))
            return d_out, d_lse

        rows = q_row.shape[:-1]
        start = jnp.zeros((*rows, tiles.v.shape[-1]), dtype), jnp.zeros((*rows, 1), dtype)
        return None, tiles.over(order, g, i, block, start)

    _, (d_out, d_lse) = scan(row, None, tiles.layout.groups, tiles.q_blocks)
    d_lse = tiles.statistics_back(d_lse)
    d_out = tiles.queries_back(d_out)
    if problem.dropout is not None:
        d_out = d_out * jnp.asarray(problem.dropout.factor, dtype)
    d_out = d_out - state.out.astype(dtype) * jnp.swapaxes(d_lse, 1, 2)[..., None]
    return Output(d_out.astype(problem.v.dtype), d_lse)
