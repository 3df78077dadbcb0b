"""The three passes over tiles: forward, cotangent and tangent.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size; * stands for the examples and heads of a tile, r for its rows

`forward` keeps a running softmax over the key blocks. `cotangent` and `tangent` rebuild the weights from a
row's (m, l): see `softmax.parts`. The backward pass walks down the key blocks and computes each tile
transposed, [*, block_k, r], so that the gradients of keys and values are plain products.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mha_jax.attention import hidden, softmax
from mha_jax.attention.call import Moves, Output, State, moving
from mha_jax.backends.blockwise.loops import after, in_turn, scan
from mha_jax.backends.blockwise.tiles import ByKeys, ByQueries, Place, Tiles, featured
from mha_jax.types import Array


def forward(tiles: Tiles) -> State:
    """Attend; return the output and every row's (m, l)."""
    problem, order = tiles.problem, tiles.visits(by_rows=True)
    by, q = ByQueries(tiles, order), featured(tiles.q)
    k_of, v_of = (functools.partial(tiles.keys_of, x) for x in (featured(tiles.k), tiles.v))
    if tiles.hides and not problem.heads_first:  # what a cache holds is not looked through
        k_of, v_of = tiles.told(tiles.v), tiles.numbers(tiles.v, tiles.keys_of)
    dropout = problem.dropout
    product = tiles.rules.multiplies or q.shape[-1] == 1  # of one feature: XLA multiplies

    def tile(q_row, at, state):
        x = by.logits(tiles.rules.capped(tiles.weighed(q_row, k_of(at))), at)
        if state is None:
            p, m, l = softmax.apart(x) if tiles.written else softmax.first(x, product)
            before = jnp.zeros((), tiles.dtype)
        else:
            p, fix, m, l = softmax.grow(state.m, state.l, x, product)
            before = state.acc * fix
        if dropout is not None:
            p = jnp.where(by.kept(at), p, 0)
        v_tile = v_of(at).astype(tiles.dtype)
        return softmax.Running(before + tiles.summed(p, v_tile), m, l)

    def finished(end):
        out = end.acc * softmax.inverse(end.l)
        if dropout is not None:
            out = out * jnp.asarray(dropout.factor, tiles.dtype)
        return out.astype(problem.v.dtype), end.m, end.l

    def start(q_row):
        return softmax.start(q_row.shape[:-1], tiles.v.shape[-1], tiles.dtype)

    def row(g, i, whole):
        q_row = tiles.rows_of(q, Place(g, i, 0))
        first = None if order.single else start(q_row)
        end = tiles.over(order, g, i, lambda j, state: tile(q_row, Place(g, i, j), state), first)
        out, *statistics = finished(end)
        return tiles.put_back(whole, out, g, i), statistics

    def row_in_turn(g, i, blocks, _, last):
        q_row = tiles.rows_of(q, Place(g, i, 0))
        parts = []
        for j in blocks:
            parts.append(tile(after(q_row, last), Place(g, i, j), None))
            last = parts[-1].acc
        return None, finished(softmax.merge(*parts or [start(q_row)])), last

    if tiles.written:
        _, (out, m, l), _ = in_turn(row_in_turn, None, tiles.layout.groups, order.lines)
        out = tiles.queries_back(out)
    else:
        b, t, n, _ = problem.q.shape
        out = jnp.zeros((b, tiles.t, n, problem.v.shape[-1]), problem.v.dtype)
        out, (m, l) = scan(row, out, tiles.layout.groups, tiles.q_blocks)
        out = out[:, :t]
    return State(out, tiles.statistics_back(m), tiles.statistics_back(l))


def cotangent(tiles: Tiles, state: State, cotangent: Output) -> Moves:
    """Return the cotangents of q, k, v and bias."""
    problem, dtype, order = tiles.problem, tiles.dtype, tiles.visits(by_rows=False)
    by, rules = ByKeys(tiles, order), tiles.rules
    b, d_out = problem.q.shape[0], cotangent.out.astype(dtype)
    delta = tiles.statistics(jnp.sum(d_out * state.out.astype(dtype), -1).swapaxes(1, 2))
    d_out = tiles.queries(d_out)
    m, l, d_lse = (tiles.statistics(x) for x in (state.m, state.l, cotangent.lse))
    c, log = softmax.parts(m, l)
    delta = delta - d_lse
    if tiles.hides:
        c = hidden.judged(c, delta, l, d_out, d_lse)
    if problem.dropout is not None:
        d_out = d_out * jnp.asarray(problem.dropout.factor, dtype)
    k_of, v_of = (tiles.numbers(x, tiles.keys_of) for x in (tiles.k, tiles.v))
    # Transposed as it is cut, and cleaned then: one loop. XLA takes long to compile a transpose alone.
    transposed = tiles.numbers(
        tiles.k, lambda x, at: tiles.keys_of(x, at).astype(dtype).swapaxes(-1, -2)
    )
    q_of, d_out_of = (tiles.numbers(x, tiles.rows_of) for x in (tiles.q, d_out))

    def tile(k_tile, v_tile, at, sums):
        """Return the sums over all tiles, a tile's cotangent of products, and its parts of dk and dv."""
        d_bias, d_rule = sums
        q, do = q_of(at), d_out_of(at)
        delta_row, *parts = (tiles.rows_of(x, at) for x in (delta, c, log))
        capped = rules.capped(tiles.dot("sh,rh->sr", k_tile, q))
        p = _rebuilt(by.logits(capped, at, tuple(parts)))
        dp = tiles.dot("sv,rv->sr", v_tile, do)
        kept = p
        if problem.dropout is not None:
            # The sign carries the bit to both products, so that it is hashed once.
            signed = lax.optimization_barrier(jnp.where(by.kept(at), p, -p))
            p, kept = jnp.abs(signed), jnp.maximum(signed, 0)
            dp = jnp.where(signed > 0, dp, 0)
        dx = tiles.shown(p, p * (dp - delta_row[..., None, :]))
        if d_bias is not None:
            d_bias = tiles.add_dense(d_bias, dx.swapaxes(-1, -2), at)
        if d_rule is not None:
            d_rule = jax.tree.map(jnp.add, d_rule, by.pulled(dx, at))
        if rules.cap is not None:
            dx = tiles.shown(dx, dx * rules.slope(capped))
        dv = tiles.dot("sr,rv->sv", kept, do)
        dk = tiles.dot("sr,rh->sh", dx, q.astype(dtype))
        return (d_bias, d_rule), dx, dk, dv

    def of_queries(dq):
        return (dq * jnp.asarray(tiles.scale, dtype)).astype(problem.q.dtype)

    def of_keys(dk, dv):
        dk = (dk * jnp.asarray(rules.scale, dtype)).astype(problem.k.dtype)
        return dk, dv.astype(problem.v.dtype)

    def keys_and_values(g, j):
        return tuple(of(Place(g, 0, j)) for of in (k_of, v_of))

    def column(g, j, carry):
        k_tile, v_tile = keys_and_values(g, j)
        v_tile = v_tile.astype(dtype)
        # The barrier stops XLA from fusing this transpose into the products, which makes them slow.
        k_transposed = lax.optimization_barrier(transposed(Place(g, 0, j)))

        def block(i, carry):
            at = Place(g, i, j)
            sums, dq, dk, dv = carry
            sums, dx, dk_part, dv_part = tile(k_tile, v_tile, at, sums)
            dq = tiles.add_transposed(dq, tiles.dot("hs,sr->hr", k_transposed, dx), at)
            return sums, dq, dk + dk_part, dv + dv_part

        sums, dq, dk, dv = carry
        zeros = (jnp.zeros(x.shape, dtype) for x in (k_tile, v_tile))
        own = no_dq if alone else dq
        sums, own, *parts = tiles.over(order, g, j, block, (sums, own, *zeros))
        dk, dv = (tiles.put_back(x, y, g, j) for x, y in zip((dk, dv), of_keys(*parts)))
        if alone:  # the barrier stops XLA from turning the product instead, in which its AMX fails
            own = of_queries(lax.optimization_barrier(own)[0].swapaxes(-1, -2))
            own = tiles.put_back(dq, own, g, 0)
        return (sums, own, dk, dv), None

    def column_in_turn(g, j, blocks, sums, turn):
        k_tile, v_tile = keys_and_values(g, j)
        dq, last = ([None] * tiles.q_blocks, None) if turn is None else turn
        parts = []
        for i in blocks:
            k_here, v_here = after((k_tile, v_tile), last)
            sums, dx, *part = tile(k_here, v_here.astype(dtype), Place(g, i, j), sums)
            more = tiles.dot("sr,sh->rh", dx, k_here.astype(dtype))
            dq[i] = more if dq[i] is None else dq[i] + more
            parts.append(part)
            last = dq[i], *part
        zeros = jnp.zeros(k_tile.shape, dtype), jnp.zeros(v_tile.shape, dtype)
        return sums, tuple(map(_sum, zip(*parts))) or zeros, (dq, last)

    def queries(turn):
        zeros = jnp.zeros(tiles.q.shape[2:], dtype)
        return jnp.stack([zeros if x is None else x for x in turn[0]])

    asked = moving(problem)
    d_bias = None if asked.bias is None else jnp.zeros(tiles.bias.shape, dtype)  # type: ignore[union-attr]
    ruled = bool(jax.tree.leaves(asked.bias_rule))
    sums = d_bias, jax.tree.map(jnp.zeros_like, tiles.rule_floats) if ruled else None
    groups = tiles.layout.groups
    if tiles.written:
        (d_bias, d_rule), (dk, dv), dq = in_turn(column_in_turn, sums, groups, order.lines, queries)
        dk, dv = map(tiles.keys_back, of_keys(dk, dv))
        dq = tiles.queries_back(of_queries(dq))
    else:
        alone = tiles.k_blocks == 1  # a group's queries are done with its only column
        *lead, length, size = tiles.q.shape[1:]
        no_dq = jnp.zeros((1 if alone else groups, *lead, size, length), dtype)
        q, k, v = problem.q, problem.k, problem.v
        dq = jnp.zeros((b, tiles.t, *q.shape[2:]), q.dtype) if alone else no_dq
        dk, dv = (jnp.zeros((b, tiles.s, *x.shape[2:]), x.dtype) for x in (k, v))
        carry, _ = scan(column, (sums, dq, dk, dv), groups, tiles.k_blocks)
        (d_bias, d_rule), dq, dk, dv = carry
        dk, dv = dk[:, : k.shape[1]], dv[:, : k.shape[1]]
        dq = dq[:, : q.shape[1]] if alone else tiles.transposed_back(of_queries(dq))
    bias = asked.bias
    if bias is not None and d_bias is not None:
        d_bias = d_bias[tuple(slice(n) for n in bias.shape)].astype(bias.dtype)
    return Moves(
        dq,
        dk,
        dv,
        d_bias,
        jax.tree.map(lambda a, d: d.astype(jnp.result_type(a)), asked.bias_rule, d_rule)
        if ruled
        else asked.bias_rule,
    )


def tangent(tiles: Tiles, state: State, direction: Moves) -> Output:
    """Return the tangents of out and lse along a direction."""
    problem, dtype, order = tiles.problem, tiles.dtype, tiles.visits(by_rows=True)
    rules = tiles.rules
    scale = jnp.asarray(tiles.scale, dtype)
    dq = None if direction.q is None else tiles.queries(direction.q.astype(dtype) * scale)
    dk, dv = (None if x is None else tiles.keys(x.astype(dtype)) for x in direction[1:3])
    dq, dk = (None if x is None else featured(x) for x in (dq, dk))
    by, v_of = ByQueries(tiles, order), tiles.numbers(tiles.v, tiles.keys_of)
    # Whether a row saw what is no number the state tells; in products it would reach derivatives of these.
    q_of = tiles.numbers(featured(tiles.q), tiles.rows_of)
    k_of = tiles.numbers(featured(tiles.k), tiles.keys_of)
    d_bias = None if direction.bias is None else tiles.pad_dense(direction.bias.astype(dtype))
    d_rule = None
    if jax.tree.leaves(direction.bias_rule):
        d_rule = jax.tree.map(
            lambda a, d: jnp.zeros_like(a) if d is None else d.astype(dtype),
            *(tiles.rule_floats, direction.bias_rule),
        )
    parts = softmax.parts(*(tiles.statistics(x) for x in (state.m, state.l)))

    def row(g, i, _):
        here = Place(g, i, 0)
        q_row = q_of(here)
        part_rows = tuple(tiles.rows_of(x, here) for x in parts)

        def block(j, sums):
            at = Place(g, i, j)
            d_out, d_lse = sums
            k_tile, v_tile = k_of(at), v_of(at).astype(dtype)
            if tiles.hides and dv is not None:
                k_tile = hidden.told(k_tile, tiles.keys_of(dv, at))
            capped = rules.capped(tiles.dot("rh,sh->rs", q_row, k_tile))
            p = _rebuilt(by.logits(capped, at, part_rows))
            dx = jnp.zeros_like(capped)
            if dq is not None:
                dq_row = tiles.rows_of(dq, at)
                dx = dx + tiles.dot("rh,sh->rs", dq_row, k_tile.astype(dtype))
            if dk is not None:
                q_scaled = q_row.astype(dtype) * jnp.asarray(rules.scale, dtype)
                dx = dx + tiles.dot("rh,sh->rs", q_scaled, tiles.keys_of(dk, at))
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
            d_out = d_out + tiles.dot("rs,sv->rv", dp, v_tile)
            if dv is not None:
                dv_tile = tiles.numbers(dv, tiles.keys_of)(at)
                d_out = d_out + tiles.dot("rs,sv->rv", kept, dv_tile)
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


def _rebuilt(x: Array) -> Array:
    """Return exp(x), at most 1: a product taken again may exceed the largest by its last bit."""
    return jnp.exp(x - lax.stop_gradient(jnp.maximum(x, 0)))  # what is cut off is rounding: no move


def _sum(parts: tuple[Array, ...]) -> Array:
    return functools.reduce(jnp.add, parts)
