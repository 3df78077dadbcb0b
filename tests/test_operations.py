"""What XLA makes of a small layer is no more than what it makes of Flax's own."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import mha_jax as mj

# What takes no time: names of what is there.
FREE = {"parameter", "bitcast", "constant", "tuple", "get-tuple-element"}


def operations(layer, *inputs):
    """Return how many operations run one after the other in a compiled call."""
    variables = layer.init(jax.random.key(0), *inputs)
    text = jax.jit(layer.apply).lower(variables, *inputs).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    return sum(name not in FREE for name in re.findall(r" = \S+ ([a-z-]+)\(", entry))


@pytest.mark.parametrize("batch, length", [(1, 4), (3, 5), (2, 17)])
def test_a_call_of_few_rows_has_no_more_operations_than_flax(batch, length):
    x = jnp.ones((batch, length, 8))
    ours = operations(mj.MultiHeadAttention(num_heads=2, key_dim=4), x, x)
    theirs = operations(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), x, x)
    assert 2 < ours <= theirs
