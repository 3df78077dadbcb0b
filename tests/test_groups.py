"""Tiles of several examples and heads, whoever shares one; and problems too small for products."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax.backends.blockwise import Blockwise


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


# Pairs of an example and a head are 6, 4, 12 and 12; what a group holds is a divisor of them.
@pytest.mark.parametrize(
    "batch, heads, kv_heads, pairs",
    [
        *((2, 6, 3, pairs) for pairs in (1, 2, 6)),
        *((4, 2, 1, pairs) for pairs in (1, 2, 4)),
        *((3, 4, 4, pairs) for pairs in (1, 2, 6, 12)),
        *((6, 4, 2, pairs) for pairs in (1, 2, 6, 12)),
    ],
)
@pytest.mark.parametrize("t, s, block", [(20, 20, 32), (37, 20, 16), (20, 37, 32)])
def test_every_group_has_its_own_place(batch, heads, kv_heads, pairs, t, s, block):
    tiled = Blockwise(block_q=block, block_k=block, pairs=pairs)
    q, k, v, weight = drawn(
        (batch, t, heads, 8), (batch, s, kv_heads, 8), (batch, s, kv_heads, 4), (batch, t, heads, 4)
    )

    def gradients(backend):
        def loss(*inputs):
            return (mj.dot_product_attention(*inputs, backend=backend) * weight).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    for found, wanted in zip(*map(jax.tree.leaves, (gradients(tiled), gradients("reference")))):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def entry(function, *args):
    """Return the operations that a program runs outside of its loops, as (name, shape, inputs)."""
    text = jax.jit(function).lower(*args).compile().as_text()
    pattern = r"^\s+(?:ROOT )?%\S+ = \S*?\[([\d,]*)\]\S* (fusion|copy|transpose|dot)\((.*?)\)"
    found = re.findall(pattern, text[text.index("\nENTRY") :], re.MULTILINE)
    return [
        (name, tuple(map(int, filter(None, shape.split(",")))), args) for shape, name, args in found
    ]


def test_a_tiny_layer_launches_no_more_than_flax():
    (x,) = drawn((1, 4, 8))
    ours = mj.MultiHeadAttention(num_heads=2, key_dim=4)
    theirs = nn.MultiHeadDotProductAttention(num_heads=2)
    counts = []
    for layer in (ours, theirs):
        variables = layer.init(jax.random.key(0), x, x)
        counts.append(len(entry(lambda p, x, layer=layer: layer.apply(p, x, x), variables, x)))
    assert 0 < counts[0] <= counts[1]
