"""Half precision within two units in the last place, float64 to 1e-12, softmax rows that sum to 1."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Call, Causal, Dropout, Tokens, ValidKeys
from tests import oracles
from tests.backends import backends, tiles
from tests.drawn import draw_variables

B, T, S, N, K, H, V, D = 2, 23, 29, 4, 2, 7, 5, 6
BACKENDS = backends(small_tiles=tiles(8, 8))
HALVES = {"bfloat16": (ml_dtypes.bfloat16, 8, -126), "float16": (np.float16, 11, -14)}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def half_inputs(dtype, largest):
    """Return q, k, v in half precision whose largest logit is about `largest`."""
    kind = HALVES[dtype][0]
    q, k, v = draw(1, B, T, N, H), draw(2, B, S, K, H), draw(3, B, S, K, V)
    x = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, 2)) * H**-0.5
    return (q * largest / np.abs(x).max()).astype(kind), k.astype(kind), v.astype(kind)


def unit(x, dtype):
    """Return the unit in the last place of numbers, in a half precision."""
    _, digits, smallest = HALVES[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**smallest)))
    return 2.0 ** (exponent - (digits - 1))


def assert_within_two_units(got, exact, dtype, what):
    rounded = np.asarray(exact, np.float32).astype(HALVES[dtype][0]).astype(np.float64)
    error = np.abs(np.asarray(got, np.float64) - rounded) / unit(rounded, dtype)
    assert error.max() <= 2, f"{what}: {error.max():.1f} units in the last place"


@partial(jax.jit, static_argnums=0)
def causal(name, q, k, v):
    return mj.attend(Call(q, k, v, mask=Causal()), BACKENDS[name])


@partial(jax.jit, static_argnums=0)
def gradients(name, q, k, v, d_out):
    return jax.vjp(lambda *a: causal(name, *a).out, q, k, v)[1](d_out)


@partial(jax.jit, static_argnums=0)
def biased(name, q, k, v, k_tokens, bias):
    return mj.attend(Call(q, k, v, None, k_tokens, ValidKeys(), bias), BACKENDS[name])


@pytest.mark.parametrize("largest", [1.0, 20.0, 80.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", BACKENDS)
def test_half_precision_is_the_float32_result_rounded(name, dtype, largest):
    q, k, v = half_inputs(dtype, largest)
    wide = [x.astype(np.float32) for x in (q, k, v)]
    out, lse = causal(name, q, k, v)
    want, want_lse = causal(name, *wide)
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    assert_within_two_units(out, want, dtype, "out")
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    exact, exact_lse, _ = oracles.attention(*wide, visible=np.tri(T, S, dtype=bool))
    assert_within_two_units(out, exact, dtype, "out against float64")
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_scale_rounds_no_query_whose_dtype_has_few_exponents(name, dtype):
    """A power of two, which may go into queries of other dtypes."""
    size = 64
    given = draw(1, B, T, N, size) * 1e-2, draw(2, B, S, K, size), draw(3, B, S, K, V)
    q, k, v = (jnp.asarray(x, dtype) for x in given)
    _, lse = causal(name, q, k, v)
    wide = (np.asarray(x, np.float64) for x in (q, k, v))
    _, exact, _ = oracles.attention(*wide, visible=np.tri(T, S, dtype=bool))
    np.testing.assert_allclose(lse, exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_scores_are_rounded_once_and_their_rows_sum_to_one(dtype):
    q, k, v = half_inputs(dtype, 80.0)
    call = Call(*map(jax.device_put, (q, k, v)), mask=Causal())
    scores = mj.attention_scores(call)
    assert scores.dtype == dtype
    wide = [np.asarray(x, np.float32) for x in (q, k, v)]
    _, _, want = oracles.attention(*wide, visible=np.tri(T, S, dtype=bool))
    # A logit of 80 in float32 is known to 80 * 2**-24, and so is the weight's logarithm.
    _, digits, smallest = HALVES[dtype]
    allowed = 2.0**-digits + S * 80 * 2.0**-24
    np.testing.assert_allclose(
        np.asarray(scores, np.float64), want, rtol=allowed, atol=2.0**smallest
    )
    sums = np.asarray(scores, np.float64).sum(-1)
    np.testing.assert_allclose(sums, 1, atol=2.0**-digits + S * 2.0**smallest)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["blockwise", "small_tiles"])
def test_half_precision_gradients_are_as_good_as_those_of_the_definition(name, dtype):
    q, k, v = half_inputs(dtype, 5.0)
    d_out = draw(4, B, T, N, V).astype(HALVES[dtype][0])
    visible = np.tri(T, S, dtype=bool)
    wide = [np.asarray(x, np.float64) for x in (q, k, v, d_out)]
    want = oracles.gradients(*wide, visible=visible)[:3]

    def errors(name):
        got = gradients(name, q, k, v, d_out)
        assert all(g.dtype == dtype for g in got)
        return [oracles.relative_error(g, w) for g, w in zip(got, want)]

    epsilon = 2.0 ** -HALVES[dtype][1]
    for own, plain in zip(errors(name), errors("reference")):
        assert own <= max(3 * plain, epsilon)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("name", BACKENDS)
def test_float64_to_twelve_digits(name, rate, x64):
    q, k, v = draw(1, B, T, N, H), draw(2, B, S, K, H), draw(3, B, S, K, V)
    bias, d_out, d_lse = draw(4, B, N, T, S), draw(5, B, T, N, V), draw(6, B, N, T)
    dropout = Dropout(jax.random.key(1), rate) if rate else None
    keep = None
    if rate:
        rows, columns = (np.arange(n, dtype=np.int32)[None] for n in (T, S))
        keep = np.asarray(dropout.keep(B, N, rows, columns))
    visible = np.tri(T, S, dtype=bool)
    options = {"visible": visible, "bias": bias, "keep": keep, "rate": rate}

    @jax.jit
    def run(q, k, v, bias):
        def forward(q, k, v, bias):
            call = Call(q, k, v, mask=Causal(), bias=bias, dropout=dropout)
            return mj.attend(call, BACKENDS[name])

        output, vjp = jax.vjp(forward, q, k, v, bias)
        return output, vjp(mj.Output(jnp.asarray(d_out), jnp.asarray(d_lse)))

    (out, lse), gradients = run(*map(jnp.asarray, (q, k, v, bias)))
    assert {x.dtype for x in (out, lse, *gradients)} == {np.dtype("float64")}
    want, want_lse, _ = oracles.attention(q, k, v, **options)
    oracles.assert_close(out, want, 1e-12, "out")
    oracles.assert_close(lse, want_lse, 1e-12, "lse")
    wanted = oracles.gradients(q, k, v, d_out, d_lse, **options)
    for what, got, want in zip("qkvb", gradients, wanted):
        oracles.assert_close(got, want, 1e-12 * max(1, np.abs(want).max()), f"d{what}")


def test_float64_scores_to_twelve_digits(x64):
    q, k, v = draw(1, B, T, N, H) * 20, draw(2, B, S, K, H), draw(3, B, S, K, V)
    scores = mj.attention_scores(Call(*map(jnp.asarray, (q, k, v))))
    _, _, want = oracles.attention(q, k, v)
    oracles.assert_close(scores, want, 1e-12)
    np.testing.assert_allclose(np.asarray(scores).sum(-1), 1, atol=1e-12)


def test_float64_layer_to_twelve_digits(x64):
    layer = mj.MultiHeadAttention(num_heads=N, key_dim=H, param_dtype="float64", use_gate=True)
    x, y = draw(7, B, T, D), draw(8, B, S, D)
    variables = draw_variables(layer, x, y)
    out, scores = layer.apply(variables, x, y, return_attention_scores=True, use_causal_mask=True)
    want, want_scores = oracles.layer(variables["params"], x, y, visible=np.tri(T, S, dtype=bool))
    oracles.assert_close(out, want, 1e-12)
    oracles.assert_close(scores, want_scores, 1e-12)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("low", [-1e5, 1e5])
def test_logits_around_a_hundred_thousand(name, low):
    """A finite stand-in for minus infinity would hide logits below it."""
    k_tokens = Tokens(S, valid=np.arange(S)[None] % 3 != 0)
    q, k, v = (
        draw(i, *s).astype(np.float32)
        for i, s in ((1, (B, T, N, H)), (2, (B, S, K, H)), (3, (B, S, K, V)))
    )
    bias = np.full((1, 1, 1, S), low, np.float32)
    out, lse = biased(name, q, k, v, k_tokens, bias)
    want, want_lse, _ = oracles.attention(q, k, v, visible=k_tokens.valid, bias=bias)
    # Logits of 1e5 are known to 2**-7 in float32: so are the weights.
    oracles.assert_close(out, want, 2.0**-6 * np.abs(v).max())
    oracles.assert_close(lse, want_lse, 2.0**-6)


def test_large_and_small_logits_mixed():
    bias = np.zeros((1, 1, 1, 4), np.float32)
    bias[..., 0], bias[..., 1], bias[..., 2] = 1e5, -1e5, 1e5
    q = jnp.zeros((1, 3, 1, 2))
    k, v = jnp.zeros((1, 4, 1, 2)), jnp.arange(4.0).reshape(1, 4, 1, 1)
    for backend in BACKENDS.values():
        out, lse = mj.attend(Call(q, k, v, bias=jnp.asarray(bias)), backend)
        np.testing.assert_array_equal(out, 1)  # the mean of values 0 and 2
        np.testing.assert_allclose(lse, 1e5 + np.log(2), rtol=1e-6)
