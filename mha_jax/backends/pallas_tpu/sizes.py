"""What each kind of TPU core is given: sizes of tiles, and of what is held in VMEM.

B batch   T query length   S key length   N query heads   H query-key head size
"""

import dataclasses
from typing import Any

import jax

from mha_jax.attention.call import Problem
from mha_jax.backends.pallas_tpu import rules
from mha_jax.backends.pallas_tpu.patterns import LANES, Blocks, Geometry, geometry, visited_pairs

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What one kind of TPU core is given.

    Args:
      forward, backward: Tiles of the two passes: the first fit every problem; others are taken where the
        mask does not depend on data and the pairs that they visit, times their cost, are fewer.
      vmem: Bytes of VMEM that a kernel may use.
      resident: Bytes of the columns held at once: keys and values, or queries and their cotangents.
      outer_resident: Bytes of the rows held at once, with what is computed for them.
      dropout: Tiles forward with dropout or a bias pair by pair, if others than without.
    """

    forward: tuple[Blocks, ...]
    backward: tuple[Blocks, ...]
    vmem: int
    resident: int
    outer_resident: int
    dropout: tuple[Blocks, ...] = ()

    def lay(self, problem: Problem, outer: str, writes_slab: bool = False) -> Geometry:
        """Lay tiles over a problem: queries are outer in the forward pass, keys in the backward pass.

        Columns and rows are held as many at once as their bytes allow, in VMEM, where a row of a
        narrow head takes all 128 lanes.
        """
        forward = outer == "q" and not writes_slab
        choices = self.forward if forward else self.backward
        if forward and self.dropout and (problem.dropout or rules.pair_by_pair(problem)):
            choices = self.dropout
        lanes = sum(-(-x.shape[-1] // LANES) * LANES for x in (problem.q, problem.v))
        token = lanes * problem.q.dtype.itemsize * 2
        shape = (problem.q.shape[1], problem.k.shape[1])
        dense = [a for a in (*jax.tree.leaves(problem.mask), problem.bias) if a is not None]
        slabs = sum(a.dtype.itemsize for a in dense if a.shape[2:] == shape)
        if slabs or writes_slab or problem.q.dtype.itemsize > 2:
            choices = choices[:1]
        if problem.bias_rule is not None:  # its diagonals are laid by whole squares of lanes
            whole = (tuple(h for h in x.sweep if h % LANES == 0) for x in choices)
            choices = tuple(dataclasses.replace(x, sweep=h) for x, h in zip(choices, whole))
        column = token + choices[0].rows * 2 * (slabs + 4 * writes_slab)
        resident = self.resident // column // LANES * LANES
        # Backward, a row of k and v brings float32 sums in and out.
        outer_resident = (
            0 if slabs or writes_slab else self.outer_resident // (token if forward else 5 * token)
        )

        def laid(blocks: Blocks) -> Geometry:
            most = max(min(blocks.resident, resident), blocks.columns)
            blocks = dataclasses.replace(blocks, resident=most, outer_resident=outer_resident)
            if problem.q.dtype.itemsize > 2:
                # A float32 product is six of bfloat16: one tile at a time keeps the program small.
                blocks = dataclasses.replace(blocks, full=(1,), sweep=())
            return geometry(problem, outer, blocks)

        first, *others = choices
        pairs = visited_pairs(problem, laid(first)) if others else None
        if pairs is None:  # there is nothing to choose from, or only the data know
            return laid(first)

        def cost(blocks: Blocks) -> float:
            return visited_pairs(problem, laid(blocks)) * blocks.cost  # type: ignore[operator]

        return laid(min(choices, key=cost))


def _medium(forward: tuple[Blocks, ...], backward: tuple[Blocks, ...], **options: Any) -> Sizes:
    memory = {"vmem": 56 * MIB, "resident": 12 * MIB, "outer_resident": 12 * MIB}
    return Sizes(forward, backward, **memory, **options)


def _large(forward: tuple[Blocks, ...], backward: tuple[Blocks, ...], **options: Any) -> Sizes:
    # Backward, 32768 tokens are held at once: of more, float32 sums go in and out for every chunk.
    memory = {"vmem": 100 * MIB, "resident": 32 * MIB, "outer_resident": 24 * MIB}
    return Sizes(forward, backward, **memory, **options)


# By device kind, chosen by thousands of bundles for B 1, N 1, T 4096, H 128, bfloat16 (python -m
# benchmarks tpu), by the rows of a tile and the heights of the parts of a full one, 2048 columns wide.
# The compiler's schedules jump by a few per cent with nothing to explain it: heights are found by trying.
#
#     rows   heights          v5e: full causal window dropout      v6e: full causal window dropout
#     512    512                   64.6   37.8   22.6    99.3            44.5   29.3   19.7    83.6
#     1024   1024                  65.2   36.5   20.9    98.7            41.1   23.8   14.8    81.4
#     1024   512, 512              64.6   35.3   20.9    94.5            38.7   22.7   14.8    77.9
#     1024   256 each              65.8   36.4   20.9    90.8            41.4   23.7   14.8    81.8
#     1024   256, 320, 256, 192                          89.6
#     1024   192, 512, 320                                                                    76.0
#
#     backward                v5e: full causal                     v6e: full causal
#     512    512                  141.8   81.3                           88.3   50.7
#     1024   1024                 147.9   81.9                           85.9   49.0
#     512    512, full (4, 2, 1), grains of 128   143.6   81.3
_SHORT = Blocks(512, 512, full=(4, 1))
_TALL = Blocks(1024, 1024, full=(2, 1), sweep=(512, 512), cost=0.93)
_FINE_BACKWARD = Blocks(512, 512, full=(4, 2, 1), grain=128)
_TALL_BACKWARD = Blocks(1024, 1024, full=(2, 1), cost=0.97)
_V4 = Blocks(512, 512, full=(2, 1)), Blocks(256, 512)
_V5_DROPOUT = _SHORT, dataclasses.replace(_TALL, sweep=(256, 320, 256, 192))
_V6_DROPOUT = _SHORT, dataclasses.replace(_TALL, sweep=(192, 512, 320))
SIZES = {
    # Dropout takes as much VMEM again for what one tile computes, before libtpu 0.0.30.
    "v4": Sizes(_V4[:1], _V4[1:], 16 * MIB, 3 * MIB, outer_resident=MIB, dropout=_V4[1:]),
    "v5e": _large((_SHORT, _TALL), (_SHORT, _FINE_BACKWARD), dropout=_V5_DROPOUT),
    "v5p": _medium((_SHORT, _TALL), (_SHORT, _FINE_BACKWARD), dropout=_V5_DROPOUT),
    "v6e": _large((_SHORT, _TALL), (_SHORT, _TALL_BACKWARD), dropout=_V6_DROPOUT),
    "tpu7x": _medium((_SHORT, _TALL), (_SHORT, _TALL_BACKWARD), dropout=_V6_DROPOUT),
}
# The smallest core: what a program is compiled for when nothing says which TPU will run it.
ANY = "v4"
# What JAX calls the devices.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What the passes are given beside a problem: sizes, and whether kernels are interpreted."""

    sizes: Sizes
    interpret: Any = False


def of_this_process() -> Sizes:
    """Return the sizes for the TPU of this process; those of any TPU where it has none."""
    return SIZES[KINDS.get(jax.devices()[0].device_kind, ANY)]
