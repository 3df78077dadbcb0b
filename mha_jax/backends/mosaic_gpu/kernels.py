"""The kernels: attention forward, and backward by queries, by keys, and by what a bias shares.

Two warpgroups have 64 rows each, and a third one copies what they read, tile of columns by tile of columns,
in the order of the table: full tiles, then those that are seen in part. Weights are powers of two, and enter
the second product in the dtype of the values.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691, algorithms 1 and 2; Shah et
al. 2024, arXiv:2407.08608, section 3.1.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.backends.mosaic_gpu.operands import LOG2E, ROWS, WARPGROUPS, WHOLE, Plan
from mha_jax.backends.mosaic_gpu.products import TILE, Products, constant, load
from mha_jax.backends.mosaic_gpu.sums import Summed
from mha_jax.backends.mosaic_gpu.view import Tile, place
from mha_jax.types import Array

# No more than any logit, but finite, so that a row that has seen nothing subtracts it without a NaN.
LEAST = float(np.finfo(np.float32).min)
# Less than any sum of weights, the largest of which is 1.
TINY = 0.5
# Registers of a thread: who computes takes what who copies leaves.
COMPUTES, COPIES = 240, 24


class Spot(NamedTuple):
    """Where a tile of logits lies: its example, its query head, its first row and its first column."""

    example: Any
    head: Any
    row: Any
    column: Any


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A kernel's work at one place of its grid: rows that stay, columns that pass by.

    Args:
      plan: What it knows.
      refs: References by name; those of shared memory are "name.tile", of barriers "name.ready", "name.free".
      rows: Names of operands whose rows stay.
      streams: Names of operands whose columns pass by.
      outputs: Names of the results by the name of the tile of rows whose memory they take.
    """

    plan: Plan
    refs: dict[str, Any]
    rows: tuple[str, ...]
    streams: tuple[str, ...]
    outputs: dict[str, str]

    # Asked for where they are used: what is known before the warpgroups part stays in registers of all.

    @property
    def example(self) -> Any:
        return lax.axis_index("example")

    @property
    def head(self) -> Any:
        return lax.axis_index("head")

    @property
    def block(self) -> Any:
        return lax.axis_index("block")

    @property
    def warpgroup(self) -> Any:
        return lax.axis_index("warpgroup")

    def run(self, start: Callable, step: Callable, finish: Callable) -> None:
        """Run `carry = step(tile, carry)` over all tiles of columns.

        Args:
          start: Returns the first carry.
          step: Takes the columns of a tile and a carry, and returns the next one.
          finish: Returns the results by name, from the last carry.
        """

        @pl.when(self.warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(COMPUTES, action="increase")
            held = self._rows()
            line, full, count = self._line()

            def turn(i, carry, masked=False):
                tile = self._tile(self._spot(line, i), held)
                return step(Columns(self, tile, i, i - full if masked else None), carry)

            carry = lax.fori_loop(0, full, turn, start())
            if self.plan.masked:
                carry = lax.fori_loop(full, count, partial(turn, masked=True), carry)
            self._write(finish(carry))

        @pl.when(self.warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(COPIES, action="decrease")
            line, full, count = self._line()
            lax.fori_loop(0, count, lambda i, _: self._copy(i, i - full, self._spot(line, i)), None)

    def _line(self) -> tuple[Any, Any, Any]:
        """Return the table's line, and how many of its tiles are full, and visited."""
        line = self.refs["table"]
        line = line.at[(*place(line, self.example, self.head), self.block)]
        full = line[0]
        return line, full, full + line[1]

    # ---- rows ---------------------------------------------------------------------------------------

    @property
    def first_row(self) -> Any:
        return self.block * WHOLE + self.warpgroup * ROWS

    def row(self, name: str) -> Any:
        """Return the rows of an operand, in shared memory."""
        return self.refs[f"{name}.tile"].at[self.warpgroup]

    def _rows(self) -> dict[str, Array]:
        """Copy the rows; return their vectors."""
        ready, here = self.refs["rows.ready"].at[self.warpgroup], pl.ds(self.first_row, ROWS)
        for name in self.rows:
            ref = self.refs[name]
            head = self._head_of(ref, self.head)
            plgpu.copy_gmem_to_smem(ref.at[self.example, here, head], self.row(name), ready)
        held = {}
        for name in self.plan.held:
            ref = self.refs[name]
            at = place(ref, self.example, self.head)
            held[name] = load(ref.at[(*at, here)], TILE.reduce(1))
        plgpu.barrier_wait(ready)
        return held

    def _head_of(self, ref: Any, head: Any) -> Any:
        """Return the head of an operand that goes with a query head, or a key-value head."""
        if self.plan.rows == "k" or self.plan.groups == 1 or ref.shape[2] == self._heads:
            return head
        return lax.div(head, jnp.int32(self.plan.groups))

    @property
    def _heads(self) -> int:
        return self.refs["q"].shape[2]

    def _write(self, results: dict[str, Array]) -> None:
        here = pl.ds(self.first_row, ROWS)
        for name, x in results.items():
            tile = self.row(self.outputs[name])
            tile[...] = x.astype(tile.dtype)
        plgpu.commit_smem()
        for name in results:
            ref = self.refs[name]
            if len(ref.shape) == 3:
                target = ref.at[self.example, self.head, here]
            else:
                target = ref.at[self.example, here, self.head]
            plgpu.copy_smem_to_gmem(self.row(self.outputs[name]), target)
        plgpu.wait_smem_to_gmem(0)

    # ---- columns ------------------------------------------------------------------------------------

    def _spot(self, line: Any, turn: Any) -> Spot:
        """Return where the tile of a turn lies, by its line of the table."""
        plan, entry, row = self.plan, line[2 + turn], self.block * WHOLE
        if plan.rows == "q":
            return Spot(self.example, self.head, row, entry * plan.columns)
        head = self.head * plan.groups + lax.div(entry, jnp.int32(plan.blocks))
        column = lax.rem(entry, jnp.int32(plan.blocks)) * plan.columns
        return Spot(self.example, head, row, column)

    def slot(self, turn: Any) -> Any:
        return lax.rem(turn, jnp.int32(self.plan.steps))

    def room(self, name: str, slot: Any) -> Any:
        """Return what this warpgroup reads of something that passes by, in shared memory."""
        at = (slot, self.warpgroup) if self.plan.of_rows(name) else slot
        return self.refs[f"{name}.tile"].at[at]

    def _tile(self, spot: Spot, held: dict[str, Array]) -> Tile:
        slabs = {name: self.refs[name] for name in self.plan.slabs}
        row = spot.row + self.warpgroup * ROWS
        return Tile(self.plan, held, {}, slabs, spot.example, spot.head, row, spot.column)

    def _parts(self, name: str, spot: Spot, slot: Any) -> list[tuple[Any, Any]]:
        """Return which tokens are copied, and to where."""
        if not self.plan.of_rows(name):
            return [(pl.ds(spot.column, self.plan.columns), slot)]
        return [(pl.ds(spot.row + i * ROWS, ROWS), (slot, i)) for i in range(WARPGROUPS)]

    def _copy(self, i: Any, masked: Any, spot: Spot) -> None:
        """Copy what tile i reads as soon as there is room; it is number `masked` of those with facts."""

        def copy(group: str, names: tuple[str, ...], turn: Any) -> None:
            slot = self.slot(turn)
            ready, free = (self.refs[f"{group}.{x}"].at[slot] for x in ("ready", "free"))
            pl.when(turn >= self.plan.steps)(lambda: plgpu.barrier_wait(free))
            for name in names:
                ref, tile = self.refs[name], self.refs[f"{name}.tile"]
                for here, room in self._parts(name, spot, slot):
                    if name in self.streams:
                        source = ref.at[spot.example, here, self._head_of(ref, spot.head)]
                    else:
                        source = ref.at[(*place(ref, spot.example, spot.head), here)]
                    plgpu.copy_gmem_to_smem(source, tile.at[room], ready)

        for name in self.streams:
            copy(name, (name,), i)
        for group, names in self.plan.passing.items():
            if group == "facts":
                pl.when(masked >= 0)(partial(copy, group, names, masked))
            else:
                copy(group, names, i)


class Sum(Sweep):
    """A kernel's work at one tile of a bias's cotangent: nothing stays, tiles of logits pass by."""

    @property
    def _summed(self) -> Summed:
        return cast(Summed, self.plan.summed)

    def _rows(self) -> dict[str, Array]:
        return {}

    def _line(self) -> tuple[Any, Any, Any]:
        line, full, count = super()._line()
        again = self._summed.again
        return line, full * again, count * again

    def _spot(self, line: Any, turn: Any) -> Spot:
        summed = self._summed
        entry, again = _divided(turn, summed.again)
        listed, tile = _divided(line[2 + entry], summed.tiles)
        example, head = _divided(listed, summed.listed_heads)
        more_examples, more_heads = _divided(again, summed.again_heads)
        row, column = _divided(tile, summed.across)
        return Spot(
            self.example + example + more_examples,
            self.head + head + more_heads,
            row * WHOLE,
            column * self.plan.columns,
        )

    def _write(self, results: dict[str, Array]) -> None:
        """Write the tile; its memory is that of both warpgroups, one after the other."""
        (total,) = results.values()
        tile, turn, columns = self.refs["d_bias.tile"], self.refs["turn"], self.plan.columns
        row, column = _divided(self.block, self._summed.shape[1])
        rows = pl.ds(row * WHOLE + self.warpgroup * ROWS, ROWS)
        pl.when(self.warpgroup == 1)(lambda: plgpu.barrier_wait(turn))
        tile[...] = total
        plgpu.commit_smem()
        target = self.refs["d_bias"].at[
            self.example, self.head, rows, pl.ds(column * columns, columns)
        ]
        plgpu.copy_smem_to_gmem(tile, target)
        plgpu.wait_smem_to_gmem(0)
        pl.when(self.warpgroup == 0)(lambda: plgpu.barrier_arrive(turn))


def _divided(x: Any, by: int) -> tuple[Any, Any]:
    """Return an index and what remains."""
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


@dataclasses.dataclass(frozen=True)
class Columns:
    """What passes by for one tile, in shared memory: its columns, or all that it reads.

    Args:
      sweep: The kernel's work.
      tile: The tile.
      turn: Its number.
      masked: Its number among those that are seen in part; None where all of it is seen.
    """

    sweep: Sweep
    tile: Tile
    turn: Any
    masked: Any

    def wait(self, stream: str) -> Any:
        """Wait for a stream; return its tile."""
        slot = self.sweep.slot(self.turn)
        plgpu.barrier_wait(self.sweep.refs[f"{stream}.ready"].at[slot])
        return self.sweep.room(stream, slot)

    def free(self, stream: str) -> None:
        """Leave a stream's room to the next tile."""
        self._free(stream, self.turn)

    def _free(self, group: str, turn: Any) -> None:
        plgpu.barrier_arrive(self.sweep.refs[f"{group}.free"].at[self.sweep.slot(turn)])

    def _passing(self) -> list[tuple[str, tuple[str, ...], Any]]:
        groups = self.sweep.plan.passing.items()
        turns = {"vectors": self.turn, "facts": self.masked}
        return [(group, names, turns[group]) for group, names in groups if turns[group] is not None]

    def wait_vectors(self) -> Tile:
        """Wait for the vectors; return the tile with them."""
        refs, found = self.sweep.refs, {}
        for group, names, turn in self._passing():
            slot = self.sweep.slot(turn)
            plgpu.barrier_wait(refs[f"{group}.ready"].at[slot])
            found |= {name: self.sweep.room(name, slot) for name in names}
        return dataclasses.replace(self.tile, columns=found)

    def free_vectors(self) -> None:
        """Leave the vectors' room to the next tile."""
        for group, _, turn in self._passing():
            self._free(group, turn)


def _across(numbers: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(numbers, (ROWS, columns), [0])


def forward(sweep: Sweep, products: Products) -> None:
    """Attend; rows are queries."""
    plan = sweep.plan
    size = sweep.refs["v"].shape[3]

    def start():
        return constant((ROWS, size), 0), constant((ROWS,), LEAST), constant((ROWS,), 0)

    def step(columns: Columns, carry):
        total, m, l = carry
        product = products.outer(sweep.row("q"), columns.wait("k"))
        columns.free("k")
        tile = columns.wait_vectors()
        x = tile.biased(tile.capped(product))
        if columns.masked is not None:
            x = jnp.where(tile.visible(), x, -jnp.inf)
        new = jnp.maximum(m, x.max(axis=1) * plan.factor)
        shrink = jnp.exp2((m - new) * (LOG2E / plan.unit))
        p = tile.powers(x, _across(new, plan.columns))
        l = l * shrink + p.sum(axis=1)
        if plan.dropout is not None:
            p = tile.kept(p, 0.0)
        p = p.astype(sweep.refs["v"].dtype)
        columns.free_vectors()
        total = total * _across(shrink, size)
        total = products.add(total, p, columns.wait("v"))
        columns.free("v")
        return total, new, l

    def finish(carry):
        total, m, l = carry
        # A row that saw nothing has a total of 0 and stays so, whatever it is divided by.
        share = 1 / jnp.maximum(l, TINY)
        if plan.dropout is not None:
            share = share * plan.dropout.factor
        return {"out": total * _across(share, size), "m": m, "l": l}

    sweep.run(start, step, finish)


def _weights(tile: Tile, x: Array, masked: bool) -> Array:
    """Rebuild the weights of capped products, but for what `softmax.shift` leaves to the rows' cotangents.

    Those that dropout drops are negative: one number says both, where registers are scarce.
    """
    p = tile.powers(tile.biased(x), tile.vector("shift"))
    p = jnp.where(tile.visible(), p, 0.0) if masked else p
    return p if tile.plan.dropout is None else tile.kept(p, -p)


def _pulled(tile: Tile, p: Array, dp: Array) -> Array:
    """Return the cotangent of a tile's logits."""
    if tile.plan.dropout is not None:
        dp = jnp.where(p > 0, dp * tile.plan.dropout.factor, 0.0)
        p = jnp.abs(p)
    return p * (dp - tile.vector("delta"))


def _slopes(tile: Tile, x: Array, p: Array, dp: Array) -> Array:
    """Return the cotangent of a tile's products over the scale; x is capped."""
    ds = _pulled(tile, p, dp)
    return ds if tile.plan.rules.cap is None else ds * tile.slope(x)


def backward_queries(sweep: Sweep, products: Products) -> None:
    """Pull back to the queries; rows are queries."""
    plan = sweep.plan
    size = sweep.refs["q"].shape[3]

    def step(columns: Columns, total):
        k = columns.wait("k")
        product = products.outer(sweep.row("q"), k)
        dp = products.outer(sweep.row("d_out"), columns.wait("v"))
        columns.free("v")
        tile = columns.wait_vectors()
        x = tile.capped(product)
        ds = _slopes(tile, x, _weights(tile, x, columns.masked is not None), dp)
        columns.free_vectors()
        total = products.add(total, ds.astype(sweep.refs["k"].dtype), k)
        columns.free("k")
        return total

    sweep.run(
        lambda: constant((ROWS, size), 0), step, lambda total: {"dq": total * plan.rules.scale}
    )


def backward_keys(sweep: Sweep, products: Products) -> None:
    """Pull back to the keys, the values, or both; rows are keys, tiles are transposed."""
    plan = sweep.plan

    def start():
        return {name: constant((ROWS, sweep.refs[name].shape[3]), 0) for name in sweep.outputs}

    def step(columns: Columns, total):
        q, dtype = columns.wait("q"), sweep.refs["q"].dtype
        product = products.outer(sweep.row("k"), q)
        tile = columns.wait_vectors()
        x = tile.capped(product)
        p = _weights(tile, x, columns.masked is not None)
        kept = p if plan.dropout is None else jnp.maximum(p, 0.0)
        d_out = columns.wait("d_out")
        # One after the other: both sums and two tiles are all that the registers hold.
        found = {}
        if "dv" in total:
            found["dv"] = products.add(total["dv"], kept.astype(dtype), d_out)
        dp = products.outer(sweep.row("v"), d_out) if "dk" in total else None
        columns.free("d_out")
        ds = None if dp is None else _slopes(tile, x, p, dp)
        columns.free_vectors()
        if ds is not None:
            found["dk"] = products.add(total["dk"], ds.astype(dtype), q)
        columns.free("q")
        return found

    def finish(total):
        share = 1.0 if plan.dropout is None else plan.dropout.factor
        factors = {"dk": plan.rules.scale, "dv": np.float32(share)}
        return {name: x * factors[name] for name, x in total.items()}

    sweep.run(start, step, finish)


def backward_bias(sweep: Sweep, products: Products) -> None:
    """Pull back to a bias; all tiles that pass by read the same numbers of it."""

    def step(columns: Columns, total):
        product = products.outer(columns.wait("q"), columns.wait("k"))
        dp = products.outer(columns.wait("d_out"), columns.wait("v"))
        for name in sweep.streams:
            columns.free(name)
        tile = columns.wait_vectors()
        p = _weights(tile, tile.capped(product), columns.masked is not None)
        total = total + _pulled(tile, p, dp)
        columns.free_vectors()
        return total

    shape = ROWS, sweep.plan.columns
    sweep.run(lambda: constant(shape, 0), step, lambda total: {"d_bias": total})
