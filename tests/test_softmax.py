"""The running softmax: any split of the keys, in any sizes, gives the softmax over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mha_jax.attention import softmax

R, T, S, V = 2, 5, 17, 3
EPSILON = np.finfo(np.float32).eps


def inputs(seed, scale=1.0, hidden=0.3):
    r = np.random.default_rng(seed)
    x = np.where(r.random((R, T, S)) < hidden, -np.inf, scale * r.standard_normal((R, T, S)))
    x[0, 1] = -np.inf  # a row that sees nothing
    return x.astype(np.float32), r.standard_normal((R, S, V)).astype(np.float32)


def exact(x, v):
    x = x.astype(np.float64)
    m = x.max(-1, keepdims=True)
    p = np.exp(x - np.where(np.isinf(m), 0, m))
    total = p.sum(-1, keepdims=True)
    seen = total > 0
    out = np.where(seen, p @ v / np.where(seen, total, 1), 0)
    lse = np.where(seen, np.where(seen, m, 0) + np.log(np.where(seen, total, 1)), -np.inf)
    return out, lse


def run(x, v, cuts, product=False):
    state = softmax.start((R, T), V, jnp.float32)
    for tile, values in zip(np.split(x, cuts, -1), np.split(v, cuts, 1)):
        if tile.shape[-1]:
            p, fix, m, l = softmax.grow(state.m, state.l, jnp.asarray(tile), product)
            state = softmax.Running(state.acc * fix + p @ jnp.asarray(values), m, l)
    out = state.acc * softmax.reciprocal(state.l)
    return np.asarray(out), np.asarray(softmax.logsumexp(state.m, state.l))


@given(
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, S), max_size=5).map(sorted),
    scale=st.sampled_from([1.0, 30.0, 1e5]),
    product=st.booleans(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_split_is_the_softmax(seed, cuts, scale, product):
    x, v = inputs(seed, scale)
    out, lse = run(x, v, cuts, product)
    want_out, want_lse = exact(x, v)
    np.testing.assert_allclose(out, want_out, atol=S * EPSILON * np.abs(v).max(), rtol=0)
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(want_lse))
    seen = ~np.isinf(want_lse)
    np.testing.assert_allclose(lse[seen], want_lse[seen], rtol=4 * EPSILON, atol=4 * EPSILON)


@pytest.mark.parametrize("shift", [-1e30, -1e5, 1e5, 1e30])
def test_logits_of_any_size(shift):
    x = np.full((R, T, S), shift, np.float32)
    v = inputs(0)[1]
    out, lse = run(x, v, [4, 9])
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1)[:, None], out.shape), atol=1e-6)
    np.testing.assert_allclose(lse, shift + np.log(S), rtol=1e-6)


def test_small_and_large_logits_in_one_row():
    x = np.array([[[-1e5, 1e5, -np.inf, -1e5]]], np.float32)
    p = softmax.weights(jnp.asarray(x), jnp.float32(1e5).reshape(1, 1, 1))
    np.testing.assert_array_equal(p, [[[0, 1, 0, 0]]])


def test_a_row_that_sees_nothing_is_zero_without_nan():
    x = jnp.full((1, 2, 3), -jnp.inf)
    state = softmax.start((1, 2), V, jnp.float32)
    p, fix, m, l = softmax.grow(state.m, state.l, x, False)
    np.testing.assert_array_equal(p, 0)
    np.testing.assert_array_equal(l, 0)
    np.testing.assert_array_equal(m, -np.inf)
    assert np.isfinite(fix).all()
    np.testing.assert_array_equal(softmax.reciprocal(l), 0)
    np.testing.assert_array_equal(softmax.logsumexp(m, l), -np.inf)


def test_weights_with_lse_are_the_scores():
    x, v = inputs(3)
    _, lse = run(x, v, [])
    scores = np.asarray(softmax.weights(jnp.asarray(x), jnp.asarray(lse)))
    total = scores.sum(-1)
    np.testing.assert_array_equal(total[0, 1], 0)
    total[0, 1] = 1
    np.testing.assert_allclose(total, 1, atol=S * EPSILON)


def test_gradients_of_empty_rows_are_zero():
    x = jnp.full((1, 1, 3), -jnp.inf)

    def total(x, m, l):
        return jnp.sum(softmax.reciprocal(l)) + jnp.sum(softmax.weights(x, m))

    zeros = jnp.zeros((1, 1, 1))
    with jax.debug_nans(True):
        for gradient in jax.grad(total, (0, 1, 2))(x, zeros - jnp.inf, zeros):
            np.testing.assert_array_equal(gradient, 0)


def test_float64_stays_float64(x64):
    state = softmax.start((1, 2), V, jnp.float64)
    grown = softmax.grow(state.m, state.l, jnp.ones((1, 2, 4), jnp.float64), False)
    assert {a.dtype for a in (*state, *grown)} == {np.dtype("float64")}
