"""Attention tile by tile in plain XLA: O(T + S) memory, every feature, every platform.

Source: Rabe & Staats 2021, arXiv:2112.05682; Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
"""

import dataclasses
from typing import Any

import numpy as np

from mha_jax.attention.call import Moves, Output, Problem, State
from mha_jax.attention.given import of_kind
from mha_jax.backends.base import Backend
from mha_jax.backends.blockwise import few_rows, passes, stretch
from mha_jax.backends.blockwise.layout import Apart, Grouped
from mha_jax.backends.blockwise.tiles import Tiles, Tiling
from mha_jax.errors import ShapeError
from mha_jax.types import Size

# Weights in a tile of all examples and heads, on all devices together.
_TOGETHER = 2**24


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that suit a kind of processor.

    Args:
      side: Query rows, over the G heads of a pair, and keys of a tile.
      short: Weights in one tile of short sequences.
      weights: Weights in a tile of longer ones, which holds as many pairs, and is as wide up to a quarter of
        the lengths; None: two pairs.
      halves: Multiply what rests on bfloat16 inputs in bfloat16, summed in float32: what tensor cores do.
      written: Tiles of a group that are written out one after the other, without loops, at most.
      branches: Ask which part of a cache is seen before a step reads it, and whether a bias says the same of
        all pairs of a tile, and loop inside of tiles: where branches that the data decide cost little.
    """

    side: int
    short: int
    weights: int | None = None
    halves: bool = False
    written: int = 0
    branches: bool = False


CPU = Tuning(512, 2**19, branches=True)
# Every operation on a tile is a launch, of microseconds, so that tiles are few, and large: 64 MiB of logits.
# Loops launch more: they count turns, copy slices, and ask the host whether to go on.
GPU = Tuning(1024, 2**24, 2**24, halves=True, written=64)
_TUNINGS = {"cuda": GPU, "rocm": GPU}


@dataclasses.dataclass(frozen=True)
class Blockwise(Backend):
    """Attention by tiles.

    Args:
      block_q, block_k: Query rows, over the G heads of a pair, and keys of a tile; None chooses.
      pairs: Pairs of an example and a key-value head in one tile, at most; None chooses.
      exhaustive: Visit also the tiles that nothing can see, so that reverse mode can pass twice.
      apart: Keep examples and heads as axes of their own, which XLA can cut over devices.
      tuning: What the sizes that are None are chosen by; None is that of the platform lowered for.
    """

    bias_rules = True

    block_q: int | None = None
    block_k: int | None = None
    pairs: int | None = None
    exhaustive: bool = False
    apart: bool = False
    tuning: Tuning | None = None

    def on(self, platform: str) -> Backend:
        return dataclasses.replace(self, tuning=self.tuning or _TUNINGS.get(platform, CPU))

    def __post_init__(self):
        for name in ("block_q", "block_k", "pairs"):
            size = getattr(self, name)
            whole = isinstance(size, (int, np.integer)) and not isinstance(size, bool)
            if size is not None and not (whole and size > 0):
                raise ShapeError(
                    f"Blockwise({name}={size!r}) is no size of a tile: expected a positive integer, or None "
                    "to choose one."
                )
        if self.tuning is not None:
            of_kind(
                "tuning of Blockwise",
                self.tuning,
                Tuning,
                "Pass blockwise.CPU or GPU, say, or None.",
            )
        for name in ("exhaustive", "apart"):
            if not isinstance(getattr(self, name), bool):
                raise ShapeError(
                    f"Blockwise({name}={getattr(self, name)!r}) must be True or False."
                )

    def tiling(self, problem: Problem) -> Tiling:
        """Return the tiles of a problem: near the wanted sizes, with little padding.

        Measured on two CPU cores (AVX-512), float32, T 4096 causal, 8 heads, milliseconds forward, and
        forward and backward: 256 x 256 by 8 pairs 275, 889; 512 x 256 by 4 177, 556; by 8 175, 603;
        512 x 512 by 2 178, 545; by 1 207, 594; PyTorch's fused kernel forward 146.

        A step of decoding from a `Cache` is one tile: cutting keys is copying them. Milliseconds so and
        with 512 keys by 2 pairs, N 8, H 64, B, S and T: 8 4096 1 9, 16; 8 4096 16 29, 46; 1 4096 1 1.6, 4.0.
        A cache may be mostly empty, or seen through a window: see `stretch`; beyond 8192, tiles are skipped.
        """
        b, t, _, _ = problem.q.shape
        s, kv = problem.k.shape[1:3]
        tuning = self.tuning or CPU
        rest: dict[str, Any] = {"exhaustive": self.exhaustive}
        rest |= {"halves": tuning.halves, "written": tuning.written, "branches": tuning.branches}
        if self.apart or not all(isinstance(size, int) for size in (b, t, s)):
            return Tiling(*self._blocks_apart(problem), Apart(b, kv), **rest)
        rows, side, wanted = problem.groups * t, tuning.side, 2
        if tuning.weights is not None:
            while 8 * side <= min(rows, s) and 4 * side * side <= tuning.weights:
                side *= 2
            wanted = max(1, tuning.weights // (min(rows, side) * min(s, side)))
        step = self._is_step(problem)
        short = rows <= tuning.side and s <= tuning.side
        wanted = self.pairs or (b * kv if step else tuning.short // (rows * s) if short else wanted)
        pairs = _in_one_piece(b, kv, min(b * kv, wanted))
        if pairs < wanted < kv < 2 * wanted and self.pairs is None:
            pairs = kv
        block_q = _near(max(1, (self.block_q or side) // problem.groups), t)
        block_k = _near(self.block_k or (s if step else side), s)
        return Tiling(block_q, block_k, Grouped(b, kv, pairs), **rest)

    def _blocks_apart(self, problem: Problem) -> tuple[Size, Size]:
        """Return sizes of tiles that hold all examples and heads; whole lengths where they are symbols."""
        b, t, n, _ = problem.q.shape
        s = problem.k.shape[1]
        if not (isinstance(t, int) and isinstance(s, int)):
            return t, s
        side = (self.tuning or CPU).side
        while side > 64 and isinstance(b, int) and b * n * side * side > _TOGETHER:
            side //= 2
        return _near(self.block_q or side, t), _near(self.block_k or side, s)

    def _is_step(self, problem: Problem) -> bool:
        """Whether a problem is a step of decoding from a `Cache` that is one tile."""
        t, s = problem.q.shape[1], problem.k.shape[1]
        known = not self.apart and isinstance(t, int) and isinstance(s, int)
        return known and problem.heads_first and problem.groups * t <= 16 and s <= 8192

    def forward(self, problem: Problem) -> State:
        if not self.apart and few_rows.worthwhile(problem):
            return few_rows.forward(problem)
        stretches = (self.tuning or CPU).branches and self.block_k is None
        if stretches and self._is_step(problem) and not self.exhaustive:
            whole = dataclasses.replace(self, block_k=problem.k.shape[1])
            return stretch.forward(problem, whole.forward)
        return passes.forward(Tiles(problem, self.tiling(problem)))

    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        return passes.cotangent(Tiles(problem, self.tiling(problem)), state, cotangent)

    def tangent(self, problem: Problem, state: State, direction: Moves) -> Output:
        tiling = dataclasses.replace(self.tiling(problem), written=0)
        return passes.tangent(Tiles(problem, tiling), state, direction)

    def differentiable(self) -> Backend:
        return dataclasses.replace(self, exhaustive=True)

    def partitionable(self) -> Backend:
        return dataclasses.replace(self, apart=True)


def _in_one_piece(b: int, kv: int, most: int) -> int:
    """Return how many pairs lie in one piece: some heads of an example, or all heads of some examples."""
    return next(d for d in range(most, 0, -1) if not (kv % d if d < kv else d % kv or b * kv % d))


def _near(wanted: int, length: int) -> int:
    """Return a block size near `wanted`, a multiple of 16, that pads `length` little."""
    count = max(1, round(length / wanted))
    size = -(-length // count)
    return size if count == 1 else -(-size // 16) * 16
