"""Attention tile by tile in plain XLA: O(T + S) memory, every feature, every platform.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size   c pairs in a tile

`forward` keeps a running softmax over the key blocks and saves lse. `cotangent` and `tangent` rebuild the
weights p = exp(logits - lse) from it, tile by tile.

Source: Rabe & Staats 2021, arXiv:2112.05682; Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from mha_jax import softmax
from mha_jax.backends.base import Call, Gradients, Output
from mha_jax.backends.tiles import Tiles, Tiling, numbers
from mha_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Attention by tiles.

    Args:
      block_q, block_k: Rows and columns of a tile; None chooses by the sizes of the call.
    """

    block_q: int | None = None
    block_k: int | None = None
    chains: int | None = None
    exhaustive: bool = False

    plain_autodiff: ClassVar[bool] = False

    def why_not(self, call: Call, platform: str) -> str | None:
        return None

    def tiling(self, call: Call) -> Tiling:
        """Choose tiles for a call."""
        b, t, n, _ = call.q.shape
        s, kv = call.k.shape[1:3]
        block_q = min(self.block_q or 512, t)
        block_k = min(self.block_k or 512, s)
        volume = block_q * block_k * (n // kv)
        pairs = _divisor(b * kv, max(1, 2**16 // volume))
        chains = _divisor(b * kv // pairs, self.chains or 2)
        return Tiling(block_q, block_k, pairs, chains, self.exhaustive)

    def forward(self, call: Call) -> Output:
        tiles = Tiles(call, self.tiling(call))
        return _forward(tiles)

    def cotangent(self, call: Call, output: Output, cotangent: Output) -> Gradients:
        """Return the cotangents of q, k, v and bias."""
        return _cotangent(Tiles(call, self.tiling(call)), output, cotangent)

    def tangent(self, call: Call, output: Output, direction: Gradients) -> Output:
        """Return the tangents of out and lse along a direction; None in it means no move."""
        return _tangent(Tiles(call, self.tiling(call)), output, direction)


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def _forward(tiles: Tiles) -> Output:
    call, tiling = tiles.call, tiles.tiling
    dtype = call.accumulator

    def group(inputs):
        g, q, k, v, keys = inputs

        def row(i):
            q_row = tiles.cut_rows(q, i)

            def block(j, masked, states):
                return [chain(c, j, masked, state) for c, state in enumerate(states)]

            def chain(c, j, masked, state):
                pair = g * tiling.chains + c
                x = tiles.logits(q_row[c], tiles.cut_keys(k[c], j), pair, i, j, masked)
                p, fix, m, l = softmax.grow(state.m, state.l, x)
                if keys is not None:
                    p = jnp.where(tiles.kept(pair, c, keys, i, j), p, 0)
                pv = tiles.dot("cgts,csv->cgtv", p, tiles.cut_keys(v[c], j).astype(dtype))
                return softmax.Running(state.acc * fix + pv, m, l)

            rows = (tiling.pairs, tiles.groups, tiling.block_q)
            start = softmax.start(rows, v.shape[-1], dtype)
            states = tiles.over_blocks(g, i, block, [start] * tiling.chains)
            out = jnp.stack([s.acc * softmax.reciprocal(s.l) for s in states])
            return out, jnp.stack([softmax.logsumexp(s.m, s.l) for s in states])

        return lax.map(row, numbers(tiles.rows))

    keys = tiles.row_keys if call.dropout is not None else None
    groups = numbers(tiles.q.shape[0])
    out, lse = lax.map(group, (groups, tiles.q, tiles.k, tiles.v, keys))
    if call.dropout is not None:
        out = out * (1 / (1 - call.dropout.rate))
    lse = jnp.moveaxis(tiles.queries_last(lse)[..., 0], 1, 2)
    return Output(tiles.queries_last(out).astype(call.v.dtype), lse)


def _cotangent(tiles: Tiles, output: Output, cotangent: Output) -> Gradients:
    call, tiling = tiles.call, tiles.tiling
    dtype = call.accumulator
    d_out = cotangent.out.astype(dtype)
    delta = jnp.sum(d_out * output.out.astype(dtype), -1).swapaxes(1, 2) - cotangent.lse
    if call.dropout is not None:
        d_out = d_out * (1 / (1 - call.dropout.rate))
    q_sides = (tiles.q, tiles.queries_first(d_out), tiles.rows_first(output.lse))
    q_sides = (*q_sides, tiles.rows_first(delta))
    keys = tiles.row_keys if call.dropout is not None else None

    def group(d_bias, inputs):
        g, q_side, k, v, keys = inputs

        def row(carry, i):
            q_row, do_row, lse_row, delta_row = (tiles.cut_rows(x, i) for x in q_side)

            def block(j, masked, carry):
                d_bias, *chains = carry
                moved = []
                for c, (dq, dk, dv) in enumerate(chains):
                    pair = g * tiling.chains + c
                    k_tile, v_tile = (tiles.cut_keys(x[c], j).astype(dtype) for x in (k, v))
                    x = tiles.logits(q_row[c], tiles.cut_keys(k[c], j), pair, i, j, masked)
                    p = softmax.weights(x, lse_row[c])
                    dp = tiles.dot("cgtv,csv->cgts", do_row[c], v_tile)
                    kept = p
                    if keys is not None:
                        keep = tiles.kept(pair, c, keys, i, j)
                        kept, dp = jnp.where(keep, p, 0), jnp.where(keep, dp, 0)
                    ds = p * (dp - delta_row[c]) * _slope(call, x)
                    if d_bias is not None:
                        d_bias = tiles.add_tile(d_bias, ds, pair, i, j)
                    dq = dq + tiles.dot("cgts,csh->cgth", ds, k_tile)
                    dk_tile = tiles.dot("cgts,cgth->csh", ds, q_row[c].astype(dtype))
                    dv_tile = tiles.dot("cgts,cgtv->csv", kept, do_row[c])
                    moved.append(
                        (dq, _add_keys(tiles, dk, dk_tile, j), _add_keys(tiles, dv, dv_tile, j))
                    )
                return [d_bias, *moved]

            d_bias, chains = carry
            zeros = [jnp.zeros(q_row.shape[1:], dtype)] * tiling.chains
            start = [d_bias, *((dq, *dkv) for dq, dkv in zip(zeros, chains))]
            d_bias, *chains = tiles.over_blocks(g, i, block, start)
            return (d_bias, [(dk, dv) for _, dk, dv in chains]), jnp.stack(
                [dq for dq, *_ in chains]
            )

        zeros = [(jnp.zeros(k.shape[1:], dtype), jnp.zeros(v.shape[1:], dtype))] * tiling.chains
        (d_bias, chains), dq = lax.scan(row, (d_bias, zeros), numbers(tiles.rows))
        return d_bias, (dq, *(jnp.stack(x) for x in zip(*chains)))

    d_bias = None if tiles.bias is None else jnp.zeros(tiles.bias.shape, dtype)
    groups = numbers(tiles.q.shape[0])
    d_bias, (dq, dk, dv) = lax.scan(group, d_bias, (groups, q_sides, tiles.k, tiles.v, keys))
    scale = jnp.asarray(call.scale, dtype)
    if call.bias is not None and d_bias is not None:
        d_bias = d_bias[tuple(slice(n) for n in call.bias.shape)].astype(call.bias.dtype)
    return Gradients(
        (tiles.queries_last(dq) * scale).astype(call.q.dtype),
        (tiles.keys_last(dk) * scale).astype(call.k.dtype),
        tiles.keys_last(dv).astype(call.v.dtype),
        d_bias,
    )


def _slope(call: Call, x: Array) -> Array | float:
    """Return the derivative of the soft cap at capped logits x."""
    if call.logit_cap is None:
        return 1.0
    ratio = x / jnp.asarray(call.logit_cap, x.dtype)
    return jnp.where(x == -jnp.inf, 0, 1 - ratio * ratio)


def _add_keys(tiles: Tiles, whole: Array, tile: Array, j: Array) -> Array:
    tile = tiles.cut_keys(whole, j) + tile
    return lax.dynamic_update_slice_in_dim(whole, tile, j * tiles.tiling.block_k, 1)


def _tangent(tiles: Tiles, output: Output, direction: Gradients) -> Output:
    call, tiling = tiles.call, tiles.tiling
    dtype = call.accumulator
    scale = jnp.asarray(call.scale, dtype)
    moves = [
        None if d is None else first(d.astype(dtype))
        for d, first in (
            (direction.q, tiles.queries_first),
            (direction.k, tiles.keys_first),
            (direction.v, tiles.keys_first),
        )
    ]
    d_bias = None if direction.bias is None else tiles.pad_dense(direction.bias.astype(dtype))
    inverse = 1.0 if call.dropout is None else 1 / (1 - call.dropout.rate)
    keys = tiles.row_keys if call.dropout is not None else None

    def group(inputs):
        g, q, k, v, lse, (dq, dk, dv), keys = inputs

        def row(i):
            q_row, lse_row = tiles.cut_rows(q, i), tiles.cut_rows(lse, i)
            dq_row = None if dq is None else tiles.cut_rows(dq, i)

            def block(j, masked, sums):
                return [chain(c, j, masked, *state) for c, state in enumerate(sums)]

            def chain(c, j, masked, d_out, d_lse):
                pair = g * tiling.chains + c
                k_tile, v_tile = tiles.cut_keys(k[c], j), tiles.cut_keys(v[c], j).astype(dtype)
                x = tiles.logits(q_row[c], k_tile, pair, i, j, masked)
                p = softmax.weights(x, lse_row[c])
                dx = jnp.zeros_like(x)
                if dq_row is not None:
                    dx = dx + tiles.dot("cgth,csh->cgts", dq_row[c], k_tile.astype(dtype)) * scale
                if dk is not None:
                    dk_tile = tiles.cut_keys(dk[c], j)
                    dx = dx + tiles.dot("cgth,csh->cgts", q_row[c].astype(dtype), dk_tile) * scale
                if d_bias is not None:
                    dx = dx + tiles.tile_of(d_bias, pair, i, j)
                dp = p * dx * _slope(call, x)
                d_lse = d_lse + jnp.sum(dp, -1, keepdims=True)
                kept = p
                if keys is not None:
                    keep = tiles.kept(pair, c, keys, i, j)
                    kept, dp = jnp.where(keep, p, 0), jnp.where(keep, dp, 0)
                d_out = d_out + tiles.dot("cgts,csv->cgtv", dp, v_tile)
                if dv is not None:
                    d_out = d_out + tiles.dot("cgts,csv->cgtv", kept, tiles.cut_keys(dv[c], j))
                return d_out, d_lse

            rows = (tiling.pairs, tiles.groups, tiling.block_q)
            start = jnp.zeros((*rows, v.shape[-1]), dtype), jnp.zeros((*rows, 1), dtype)
            sums = tiles.over_blocks(g, i, block, [start] * tiling.chains)
            return tuple(jnp.stack(x) for x in zip(*sums))

        return lax.map(row, numbers(tiles.rows))

    groups = numbers(tiles.q.shape[0])
    lse = tiles.rows_first(output.lse)
    d_out, d_lse = lax.map(group, (groups, tiles.q, tiles.k, tiles.v, lse, moves, keys))
    d_lse = jnp.moveaxis(tiles.queries_last(d_lse)[..., 0], 1, 2)
    turn = output.out.astype(dtype) * jnp.swapaxes(d_lse, 1, 2)[..., None]
    d_out = tiles.queries_last(d_out) * inverse - turn
    return Output(d_out.astype(call.v.dtype), d_lse)
