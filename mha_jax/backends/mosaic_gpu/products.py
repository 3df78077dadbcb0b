"""The two products of attention on tensor cores, and the same on a CPU, where kernels are interpreted.

All else in the kernels, barriers, copies and masks, is what both run.
"""

from typing import Any, Protocol, cast, runtime_checkable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.types import Array

# How a warpgroup holds a tile: what the tensor cores read and write.
TILE = plgpu.Layout.WGMMA


@runtime_checkable
class Products(Protocol):
    """Products of operands in shared memory, summed in float32."""

    def outer(self, a: Any, b: Any) -> Array:
        """Return a @ b.T for a [R, H] and b [C, H], both in shared memory."""
        ...

    def add(self, total: Array, a: Array, b: Any) -> Array:
        """Return total + a @ b for a [R, C] in registers and b [C, H] in shared memory."""
        ...


class TensorCores:
    """The products of compute capability 9.0."""

    def outer(self, a: Any, b: Any) -> Array:
        def product(total):
            plgpu.wgmma(total, a, b.transpose((1, 0)))
            return total[...]  # waits for it

        shape = a.shape[0], b.shape[0]
        return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))

    def add(self, total: Array, a: Array, b: Any) -> Array:
        summed = pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))
        return cast(Array, summed)


class Plain:
    """The same where the interpreter has no tensor cores, which read by the way that copies write."""

    def outer(self, a: Any, b: Any) -> Array:
        product = lax.dot_general(
            a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        plgpu.commit_smem()
        return product

    def add(self, total: Array, a: Array, b: Any) -> Array:
        total = total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        return total


def constant(shape: tuple[int, ...], value: float) -> Array:
    """Return a tile, or the numbers of its rows, of one number."""
    layout = TILE if len(shape) == 2 else TILE.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load(ref: Any, layout: Any) -> Array:
    """Read numbers from global or shared memory, each thread its own."""
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]
