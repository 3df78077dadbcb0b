"""The backends that every test file runs over: the product's own table, and tiles of other sizes.

A backend that is added to the table is here by itself, wherever it can run. Those that run on no machine of
ours as they are (TPU and GPU kernels) have files of their own, where they are interpreted or compiled.
"""

import sys
from typing import Any

import numpy as np

from mha_jax import Call
from mha_jax.attention.check import check
from mha_jax.backends.base import Backend
from mha_jax.backends.blockwise import Blockwise
from mha_jax.engine import choose

_ONE = np.zeros((1, 1, 1, 1), np.float32)


def backends(**others: Backend) -> dict[str, Backend]:
    """Return the backends of the table that run on this platform, "reference" first, and others.

    >>> list(backends(small_tiles=Blockwise(block_q=2)))
    ['reference', 'blockwise', 'small_tiles']
    """
    problem = check(Call(_ONE, _ONE, _ONE))
    table = {name: choose.load(name) for name in reversed(choose.BACKENDS)}
    platform = choose.default_platform()
    return {name: b for name, b in table.items() if b.why_not(problem, platform) is None} | others


def tiles(block_q: int, block_k: int) -> Backend:
    """Return the tiled backend with tiles of this size."""
    return Blockwise(block_q=block_q, block_k=block_k)


def counting(base: type[Any]) -> tuple[Backend, list[int]]:
    """Return a backend that notes how many frames of the package led to its forward pass, and its notes."""
    frames = []

    class Counting(base):
        def forward(self, problem):
            frame, count = sys._getframe().f_back, 0
            while frame is not None:
                count += "mha_jax" in frame.f_code.co_filename
                frame = frame.f_back
            frames.append(count)
            return super().forward(problem)

    return Counting(), frames
