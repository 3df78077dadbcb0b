"""Random arrays and weights without a program of JAX's: one is compiled for every new shape.

NumPy draws and rounds; `jax.device_put` only copies, where `jnp.asarray` may compile an identity.
"""

import contextlib
import random
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np


@contextlib.contextmanager
def double_precision(wanted=True):
    """Compute with 64-bit types where they are wanted."""
    jax.config.update("jax_enable_x64", wanted)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def draw(seed, *shape, dtype=np.float32):
    """Return standard normal numbers as a JAX array."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def redraw(tree, seed=0):
    """Return a tree with random numbers in place of all leaves: biases too, which start as zeros."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jax.device_put((rng.standard_normal(a.shape) / 2).astype(a.dtype)), tree
    )


def draw_variables(module, *inputs, **options):
    """Return random variables of the tree, shapes and dtypes that `module.init` makes."""
    return redraw(jax.eval_shape(partial(module.init, **options), jax.random.key(0), *inputs))


def damaged(good: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield a file again and again, cut short or with one to four bytes changed."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(good)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(len(data))] = rng.choice([0, 255, rng.randrange(256)])
        yield bytes(data)
