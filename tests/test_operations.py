"""What XLA makes of a small layer is no more than what it makes of Flax's own."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import mha_jax as mj
from mha_jax.layer import projections

# What takes no time: names of what is there.
FREE = {"parameter", "bitcast", "constant", "tuple", "get-tuple-element"}


def operations(layer, *inputs):
    """Return how many operations run one after the other in a compiled call."""
    return compiled(layer.apply, layer.init(jax.random.key(0), *inputs), *inputs)


def compiled(function, *args):
    """Return how many operations run one after the other in a compiled function."""
    text = jax.jit(function).lower(*args).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    return sum(name not in FREE for name in re.findall(r" = \S+ ([a-z-]+)\(", entry))


@pytest.mark.parametrize("batch, length", [(1, 4), (3, 5), (2, 17)])
def test_a_call_of_few_rows_has_no_more_operations_than_flax(batch, length):
    x = jnp.ones((batch, length, 8))
    ours = operations(mj.MultiHeadAttention(num_heads=2, key_dim=4), x, x)
    theirs = operations(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), x, x)
    assert 2 < ours <= theirs


@pytest.mark.parametrize("name, features", [("query", (4, 6)), ("attention_output", (5,))])
def test_the_gradient_of_a_kernel_is_that_of_a_matrix(name, features):
    inputs = (24,) if name == "query" else (4, 6)
    x, kernel = jnp.ones((3, 7, *inputs)), jnp.ones((*inputs, *features))

    def gradient(x, kernel):
        return jax.grad(lambda w: jnp.sin(projections.product(name, w, None, x)).sum())(kernel)

    def of_matrices(x, matrix):
        x = x.reshape(3, 7, -1)
        return jax.grad(lambda w: jnp.sin(x @ w).sum())(matrix)

    own = compiled(gradient, x, kernel)
    assert 2 < own <= compiled(of_matrices, x, kernel.reshape(24, -1))


def test_what_replaces_products_sees_the_kernel_as_it_is_stored(monkeypatch):
    x, kernel = jnp.ones((3, 7, 24)), jnp.ones((24, 4, 6))

    def instead(*args, **_):
        raise LookupError(args[1].shape)

    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "dot_general", instead)
        with pytest.raises(LookupError, match="24, 4, 6"):
            projections.product("query", kernel, None, x)
    monkeypatch.setattr(jax.lax.dot_general, "__code__", instead.__code__)
    with pytest.raises(LookupError, match="24, 4, 6"):
        projections.product("query", kernel, None, x)
