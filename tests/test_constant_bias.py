"""A bias that nobody asks a gradient of costs none: no array of its size, no product, nothing by rule."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mha_jax as mj
from mha_jax import Causal, biases
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.reference import Reference
from tests.backends import backends, tiles
from tests.drawn import draw

T, N, H = 13, 2, 5
Q, K, V = (draw(i, 1, T, N, H) for i in range(3))
ARRAY, TABLE = draw(3, 1, N, T, T), biases.Buckets(draw(4, 8, N), max_distance=9)
BIASES = {
    "array": ARRAY,
    "of_keys": ARRAY[:, :, :1],
    "of_queries": ARRAY[..., :1],
    "rule": TABLE,
    "both": TABLE + biases.Array(ARRAY),
}


class Unknowing(Reference):
    """A backend of one's own that has not heard of constants."""

    def cotangent(self, problem, state, cotangent):
        function, moved = self._of_moves(problem)
        return jax.vjp(function, moved)[1](cotangent)[0]


BACKENDS = backends(
    small_tiles=tiles(8, 4), kernel=PallasTPU(interpret=True), unknowing=Unknowing()
)


def loss(arrays, bias, backend=None):
    out = mj.dot_product_attention(*arrays, mask=Causal(), bias=bias, backend=backend)
    return (out**2).sum()


def stopped(arrays, bias, backend=None):
    return loss(arrays, jax.tree.map(jax.lax.stop_gradient, bias), backend)


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_other_gradients_are_the_same(backend, name):
    given = (Q, K, V), jax.tree.map(jnp.asarray, BIASES[name])
    want, _ = jax.grad(loss, (0, 1))(*given, BACKENDS[backend])
    got, nothing = jax.grad(stopped, (0, 1))(*given, BACKENDS[backend])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not any(np.any(x) for x in jax.tree.leaves(nothing))
    right, _ = jax.grad(loss, (0, 1))(*given, "reference")
    for x, y in zip(got, right, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("name", ["array", "rule"])
def test_a_second_derivative_moves_what_the_first_did_not(name):
    def of_bias(bias, backend):
        slope = jax.grad(lambda q: loss((q, K, V), bias, backend))(Q)
        return (slope**2).sum()

    bias = jax.tree.map(jnp.asarray, BIASES[name])
    got, want = (jax.grad(of_bias)(bias, name) for name in ("blockwise", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("name", ["array", "rule"])
@pytest.mark.parametrize("strategy", ["ring", "gather", "heads"])
def test_tokens_cut_over_devices(strategy, name):
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, "context"))
    arrays = tuple(x[:, :12] for x in (Q, K, V))
    bias = ARRAY[:, :, :12, :12] if name == "array" else TABLE
    backend = mj.sharding.Sharded(sequence=("context",), strategy=strategy)
    there = jax.device_put(arrays, place)
    got = jax.jit(jax.grad(lambda x: loss(x, bias, backend)))(there)
    want = jax.grad(loss)(arrays, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_nothing_as_large_as_the_array_is_made_and_no_further_product():
    length = 1024
    x = jax.ShapeDtypeStruct((1, length, N, 8), jnp.float32)
    array = jax.ShapeDtypeStruct((1, N, length, length), jnp.float32)
    table = jax.ShapeDtypeStruct((32, N), jnp.float32)

    def compiled(bias, *arguments):
        function = jax.grad(lambda x, *rest: stopped((x, x, x), bias(*rest)))
        return jax.jit(function).lower(x, *arguments).compile()

    plain, dense, ruled = (
        compiled(lambda: None),
        compiled(lambda bias: bias, array),
        compiled(biases.Buckets, table),
    )
    base = plain.memory_analysis().temp_size_in_bytes
    products = len(re.findall(r"\bdot\(", plain.as_text()))
    for program in (dense, ruled):
        # A tile of the bias and its numbers, far from N x T x S.
        assert program.memory_analysis().temp_size_in_bytes < base + N * length**2 * 4 / 2
        assert len(re.findall(r"\bdot\(", program.as_text())) == products
    assert "scatter" not in ruled.as_text()
    moved = jax.grad(lambda x, table: loss((x, x, x), biases.Buckets(table)), (0, 1))
    assert "scatter" in jax.jit(moved).lower(x, table).compile().as_text()
