"""Attention tile by tile in plain XLA: O(T + S) memory, every feature, every platform.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K
H query-key head size   V value head size   c pairs of an example and a key-value head in one tile

`forward` keeps a running softmax over the key blocks and saves lse. `cotangent` and `tangent` rebuild
the weights p = exp(logits - lse) from it, tile by tile; a rebuilt weight carries the rounding of lse,
relative to it epsilon times |lse|. The backward pass walks down the key blocks and computes each
tile transposed, [c, block_k, r], so that the gradients of keys and values are plain products.

Source: Rabe & Staats 2021, arXiv:2112.05682; Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from mha_jax.attention import softmax
from mha_jax.attention.call import Call, Gradients, Output
from mha_jax.backends.blockwise import few_rows
from mha_jax.backends.blockwise.tiles import Tiles, Tiling, scan
from mha_jax.types import Array

# Weights in one tile of short sequences.
_WHOLE = 2**19


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Attention by tiles.

    Args:
      block_q, block_k: Query rows, over the G heads of a pair, and keys of a tile; None chooses.
      pairs: Pairs of an example and a key-value head in one tile, at most; None chooses.
      exhaustive: Visit also the tiles that nothing can see, so that reverse mode can pass twice.
    """

    block_q: int | None = None
    block_k: int | None = None
    pairs: int | None = None
    exhaustive: bool = False

    plain_autodiff: ClassVar[bool] = False

    def why_not(self, call: Call, platform: str) -> str | None:
        return None

    def tiling(self, call: Call) -> Tiling:
        """Return the tiles of a call: near the wanted sizes, with little padding.

        Measured on two CPU cores (AVX-512), float32, T 4096 causal, 8 heads, milliseconds forward, and
        forward and backward: 256 x 256 by 8 pairs 275, 889; 512 x 256 by 4 177, 556; by 8 175, 603;
        512 x 512 by 2 178, 545; by 1 207, 594; PyTorch's fused kernel forward 146.

        A step of decoding from a `Cache` is one tile: cutting keys is copying them. Milliseconds so and
        with 512 keys by 2 pairs, N 8, H 64, B, S and T: 8 4096 1 9, 16; 8 4096 16 29, 46; 1 4096 1 1.6, 4.0.
        A cache that is longer may be mostly empty, or seen through a window: there tiles are skipped.
        """
        b, t, _, _ = call.q.shape
        s, kv = call.k.shape[1:3]
        rows = call.groups * t
        step = call.heads_first and rows <= 16 and s <= 8192
        short = rows <= 512 and s <= 512
        wanted = self.pairs or (b * kv if step else _WHOLE // (rows * s) if short else 2)
        pairs = next(d for d in range(min(b * kv, wanted), 0, -1) if b * kv % d == 0)
        block_q = _near(max(1, (self.block_q or 512) // call.groups), t)
        block_k = _near(self.block_k or (s if step else 512), s)
        return Tiling(block_q, block_k, pairs, self.exhaustive)

    def forward(self, call: Call) -> Output:
        if few_rows.worthwhile(call):
            return few_rows.forward(call)
        return _forward(Tiles(call, self.tiling(call)))

    def cotangent(self, call: Call, output: Output, cotangent: Output) -> Gradients:
        """Return the cotangents of q, k, v and bias."""
        return _cotangent(Tiles(call, self.tiling(call)), output, cotangent)

    def tangent(self, call: Call, output: Output, direction: Gradients) -> Output:
        """Return the tangents of out and lse along a direction; None in it means no move."""
        return _tangent(Tiles(call, self.tiling(call)), output, direction)


def _near(wanted: int, length: int) -> int:
    """Return a block size near `wanted`, a multiple of 16, that pads `length` little."""
    count = max(1, round(length / wanted))
    size = -(-length // count)
    return size if count == 1 else -(-size // 16) * 16


def _forward(tiles: Tiles) -> Output:
    call, order = tiles.call, tiles.order(by_rows=True)
    inverse = 1 if call.dropout is None else 1 / (1 - call.dropout.rate)

    def row(g, i, _):
        q_row = tiles.row_of(tiles.q, g, i)

        def block(j, masked, state):
            x = tiles.dot("crh,csh->crs", q_row, tiles.keys_of(tiles.k, g, j))
            x = tiles.logits(x, g, i, j, masked, flip=False)
            if state is None:
                p, m, l = softmax.first(x)
                before = jnp.zeros((), tiles.dtype)
            else:
                p, fix, m, l = softmax.grow(state.m, state.l, x)
                before = state.acc * fix
            if call.dropout is not None:
                p = jnp.where(tiles.kept(g, i, j, flip=False), p, 0)
            pv = tiles.dot("crs,csv->crv", p, tiles.keys_of(tiles.v, g, j).astype(tiles.dtype))
            return softmax.Running(before + pv, m, l)

        start = softmax.start(q_row.shape[:2], tiles.v.shape[-1], tiles.dtype)
        end = tiles.over(order, g, i, block, None if order.single else start)
        out = end.acc * (softmax.reciprocal(end.l) * jnp.asarray(inverse, tiles.dtype))
        return None, (out.astype(call.v.dtype), softmax.logsumexp(end.m, end.l))

    _, (out, lse) = scan(row, None, len(tiles.q), tiles.rows)
    return Output(tiles.queries_back(out), tiles.statistics_back(lse))


def _cotangent(tiles: Tiles, output: Output, cotangent: Output) -> Gradients:
    call, dtype, order = tiles.call, tiles.dtype, tiles.order(by_rows=False)
    d_out = tiles.queries(cotangent.out.astype(dtype))
    delta = jnp.sum(d_out * tiles.queries(output.out.astype(dtype)), -1)
    delta = delta - tiles.statistics(cotangent.lse)
    if call.dropout is not None:
        d_out = d_out * jnp.asarray(1 / (1 - call.dropout.rate), dtype)
    sides = (tiles.q, d_out, tiles.statistics(output.lse), delta)

    def column(g, j, carry):
        k_tile = tiles.keys_of(tiles.k, g, j)
        v_tile = tiles.keys_of(tiles.v, g, j).astype(dtype)
        # Kept apart from the products below, where XLA would fold it into slow ones.
        k_turned = lax.optimization_barrier(k_tile.astype(dtype).transpose(0, 2, 1))

        def block(i, masked, carry):
            d_bias, dq, dk, dv = carry
            q, do, lse, delta = (tiles.row_of(x, g, i) for x in sides)
            x = tiles.dot("csh,crh->csr", k_tile, q)
            x = tiles.logits(x, g, i, j, masked, flip=True)
            p = softmax.weights(x, lse[:, None])
            dp = tiles.dot("csv,crv->csr", v_tile, do)
            kept = p
            if call.dropout is not None:
                # The sign carries the bit to both products, so that it is hashed once.
                keep = tiles.kept(g, i, j, flip=True)
                signed = lax.optimization_barrier(jnp.where(keep, p, -p))
                p, kept = jnp.abs(signed), jnp.maximum(signed, 0)
                dp = jnp.where(signed > 0, dp, 0)
            ds = p * (dp - delta[:, None])
            if call.logit_cap is not None:
                ds = ds * _slope(call, x)
            if d_bias is not None:
                d_bias = tiles.add_dense(d_bias, ds.swapaxes(1, 2), g, i, j)
            dv = dv + tiles.dot("csr,crv->csv", kept, do)
            dk = dk + tiles.dot("csr,crh->csh", ds, q.astype(dtype))
            dq = tiles.add_turned(dq, tiles.dot("chs,csr->chr", k_turned, ds), g, i)
            return d_bias, dq, dk, dv

        zeros = (jnp.zeros(k_tile.shape, dtype), jnp.zeros(v_tile.shape, dtype))
        d_bias, dq, dk, dv = tiles.over(order, g, j, block, (*carry, *zeros))
        return (d_bias, dq), (dk, dv)

    d_bias = None if tiles.bias is None else jnp.zeros(tiles.bias.shape, dtype)
    groups, pairs, rows, h = tiles.q.shape
    carry = (d_bias, jnp.zeros((groups, pairs, h, rows), dtype))
    (d_bias, dq), (dk, dv) = scan(column, carry, groups, tiles.columns)
    scale = jnp.asarray(tiles.scale, dtype)
    dk = tiles.keys_back(dk) * jnp.asarray(call.scale, dtype)
    dq = tiles.turned_back(dq) * scale
    if call.bias is not None and d_bias is not None:
        d_bias = d_bias[tuple(slice(n) for n in call.bias.shape)].astype(call.bias.dtype)
    return Gradients(
        dq.astype(call.q.dtype),
        dk.astype(call.k.dtype),
        tiles.keys_back(dv).astype(call.v.dtype),
        d_bias,
    )


def _tangent(tiles: Tiles, output: Output, direction: Gradients) -> Output:
    call, dtype, order = tiles.call, tiles.dtype, tiles.order(by_rows=True)
    scale = jnp.asarray(tiles.scale, dtype)
    moves = (
        None if direction.q is None else tiles.queries(direction.q.astype(dtype) * scale),
        None if direction.k is None else tiles.keys(direction.k.astype(dtype)),
        None if direction.v is None else tiles.keys(direction.v.astype(dtype)),
    )
    d_bias = None if direction.bias is None else tiles.pad_dense(direction.bias.astype(dtype))
    inverse = 1 if call.dropout is None else 1 / (1 - call.dropout.rate)

    lse, (dq, dk, dv) = tiles.statistics(output.lse), moves

    def row(g, i, _):
        q_row = tiles.row_of(tiles.q, g, i)
        lse_row = tiles.row_of(lse, g, i)[..., None]

        def block(j, masked, sums):
            d_out, d_lse = sums
            k_tile = tiles.keys_of(tiles.k, g, j)
            v_tile = tiles.keys_of(tiles.v, g, j).astype(dtype)
            x = tiles.dot("crh,csh->crs", q_row, k_tile)
            x = tiles.logits(x, g, i, j, masked, flip=False)
            p = softmax.weights(x, lse_row)
            dx = jnp.zeros_like(x)
            if dq is not None:
                dx = dx + tiles.dot("crh,csh->crs", tiles.row_of(dq, g, i), k_tile.astype(dtype))
            if dk is not None:
                q_scaled = q_row.astype(dtype) * jnp.asarray(call.scale, dtype)
                dx = dx + tiles.dot("crh,csh->crs", q_scaled, tiles.keys_of(dk, g, j))
            if d_bias is not None:
                dx = dx + tiles.dense_of(d_bias, g, i, j)
            dp = p * dx * _slope(call, x)
            d_lse = d_lse + jnp.sum(dp, -1, keepdims=True)
            kept = p
            if call.dropout is not None:
                keep = tiles.kept(g, i, j, flip=False)
                kept, dp = jnp.where(keep, p, 0), jnp.where(keep, dp, 0)
            d_out = d_out + tiles.dot("crs,csv->crv", dp, v_tile)
            if dv is not None:
                d_out = d_out + tiles.dot("crs,csv->crv", kept, tiles.keys_of(dv, g, j))
            return d_out, d_lse

        rows = q_row.shape[:2]
        start = jnp.zeros((*rows, tiles.v.shape[-1]), dtype), jnp.zeros((*rows, 1), dtype)
        return None, tiles.over(order, g, i, block, start)

    _, (d_out, d_lse) = scan(row, None, len(tiles.q), tiles.rows)
    d_lse = tiles.statistics_back(d_lse)
    turn = output.out.astype(dtype) * jnp.swapaxes(d_lse, 1, 2)[..., None]
    d_out = tiles.queries_back(d_out) * jnp.asarray(inverse, dtype) - turn
    return Output(d_out.astype(call.v.dtype), d_lse)


def _slope(call: Call, x: Array) -> Array:
    """Return the derivative of the soft cap at capped logits x."""
    if call.logit_cap is None:
        return jnp.ones((), x.dtype)
    ratio = x / jnp.asarray(call.logit_cap, x.dtype)
    return jnp.where(x == -jnp.inf, 0, 1 - ratio * ratio)
