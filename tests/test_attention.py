"""The public calls: attend, dot_product_attention, attention_scores, explain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mha_jax as mj
from mha_jax import Call, Causal, Dense, Dropout, Full, SameSegment, Tokens, ValidKeys, Window
from mha_jax.backends.blockwise import Blockwise
from mha_jax.backends.pallas_tpu import PallasTPU
from tests import oracles
from tests.backends import backends, tiles

B, T, S, N, K, H, V = 2, 5, 7, 6, 3, 4, 2
BACKENDS = backends(blockwise=tiles(4, 4))
CLOSE = 1e-5  # of float32 numbers of size 1: far above rounding, far below any mistake


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


attend = jax.jit(mj.attend, static_argnums=1)
attention_scores = jax.jit(mj.attention_scores)

Q, KEYS, VALUES = draw(1, B, T, N, H), draw(2, B, S, K, H), draw(3, B, S, K, V)
BIAS = draw(4, B, N, T, S)
FLAGS = np.random.default_rng(5).random((B, N, T, S)) < 0.6
CAUSAL = np.tri(T, S, dtype=bool)


# ---- dot_product_attention --------------------------------------------------------------------


def test_numpy_and_jax_arrays_give_the_same_bits():
    from_numpy = mj.dot_product_attention(Q, KEYS, VALUES, mask=FLAGS, bias=BIAS)
    from_jax = mj.dot_product_attention(
        *map(jnp.asarray, (Q, KEYS, VALUES)), mask=jnp.asarray(FLAGS), bias=jnp.asarray(BIAS)
    )
    assert isinstance(from_numpy, jax.Array)
    np.testing.assert_array_equal(from_numpy, from_jax)
    want, _, _ = oracles.attention(Q, KEYS, VALUES, visible=FLAGS, bias=BIAS)
    oracles.assert_close(from_numpy, want, CLOSE)


@pytest.mark.parametrize(
    "options, meaning",
    [
        ({}, {}),
        ({"scale": 0.7}, {"scale": 0.7}),
        ({"logit_cap": 1.5, "bias": BIAS}, {"cap": 1.5, "bias": BIAS}),
        ({"mask": Causal()}, {"visible": CAUSAL}),
        ({"mask": FLAGS[0, 0]}, {"visible": FLAGS[0, 0]}),
        ({"mask": FLAGS[:, 0]}, {"visible": FLAGS[:, :1]}),
        ({"mask": FLAGS[:1, :, :1]}, {"visible": FLAGS[:1, :, :1]}),
        ({"mask": FLAGS.astype(int)}, {"visible": FLAGS}),
        ({"mask": Dense(FLAGS[0, 0]) & Causal()}, {"visible": FLAGS[0, 0] & CAUSAL}),
        ({"bias": BIAS[0, 0]}, {"bias": BIAS[:1, :1]}),
        ({"bias": BIAS[:1, :, :, :1]}, {"bias": BIAS[:1, :, :, :1]}),
        (
            {"mask": Causal(), "query_tokens": Tokens(T, start=2)},
            {"visible": np.tri(T, S, 2, bool)},
        ),
        (
            {"mask": ValidKeys(), "key_tokens": Tokens(S, valid=FLAGS[0, 0, 0])},
            {"visible": FLAGS[0, 0, 0]},
        ),
        ({"precision": "highest"}, {}),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_means_what_the_oracle_says(backend, options, meaning):
    got = mj.dot_product_attention(Q, KEYS, VALUES, backend=BACKENDS[backend], **options)
    want, _, _ = oracles.attention(Q, KEYS, VALUES, **meaning)
    oracles.assert_close(got, want, CLOSE)


def test_it_is_jax_nn_where_both_exist():
    got = mj.dot_product_attention(Q, KEYS, VALUES[..., [0, 1, 0, 1]], mask=Causal(), bias=BIAS)
    want = jax.nn.dot_product_attention(
        *map(jnp.asarray, (Q, KEYS, VALUES[..., [0, 1, 0, 1]])),
        bias=jnp.asarray(BIAS),
        is_causal=True,
    )
    oracles.assert_close(got, want, CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_leading_batch_axes(backend):
    lead = (2, 3)
    q, k, v = draw(1, *lead, T, N, H), draw(2, *lead, S, K, H), draw(3, *lead, S, K, V)
    mask = np.random.default_rng(6).random((*lead, N, T, S)) < 0.6
    valid = np.random.default_rng(7).random((3, S)) < 0.7
    bias = draw(8, 2, 1, N, T, S)
    call = Call(q, k, v, None, Tokens(S, valid=valid), Dense(mask) & ValidKeys(), bias)
    out, lse = attend(call, BACKENDS[backend])
    assert (out.shape, lse.shape) == ((*lead, T, N, V), (*lead, N, T))

    def folded(a):
        return a.reshape(6, *a.shape[2:])

    visible = folded(mask) & np.tile(valid, (2, 1))[:, None, None]
    options = {"visible": visible, "bias": folded(np.broadcast_to(bias, (*lead, N, T, S)))}
    want, want_lse, want_scores = oracles.attention(folded(q), folded(k), folded(v), **options)
    oracles.assert_close(folded(np.asarray(out)), want, CLOSE)
    oracles.assert_close(folded(np.asarray(lse)), want_lse, CLOSE)
    scores = attention_scores(call)
    assert scores.shape == (*lead, N, T, S)
    oracles.assert_close(folded(np.asarray(scores)), want_scores, CLOSE)


def test_no_batch_axis_at_all():
    out = mj.dot_product_attention(Q[0], KEYS[0], VALUES[0], mask=FLAGS[0])
    want, _, _ = oracles.attention(Q[:1], KEYS[:1], VALUES[:1], visible=FLAGS[:1])
    oracles.assert_close(out, want[0], CLOSE)


@pytest.mark.parametrize("lengths", [(0, S), (T, 0), (0, 0), (1, 1), (1, S), (T, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_single_lengths(backend, lengths):
    t, s = lengths
    q, k, v = Q[:, :t], KEYS[:, :s], VALUES[:, :s]
    want, want_lse, want_scores = oracles.attention(q, k, v, visible=np.tri(t, s, dtype=bool))
    call = Call(q, k, v, mask=Causal(), dropout=Dropout(jax.random.key(0), 0.0))
    out, lse = attend(call, BACKENDS[backend])
    oracles.assert_close(out, want, CLOSE)
    oracles.assert_close(lse, want_lse, CLOSE)
    oracles.assert_close(attention_scores(call), want_scores, CLOSE)

    def total(q, k, v):
        return mj.dot_product_attention(q, k, v, backend=BACKENDS[backend]).sum()

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert all(np.isfinite(g).all() for g in gradients)


@given(
    t=st.integers(0, 40),
    s=st.integers(0, 40),
    h=st.integers(1, 9),
    v=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (3, 1), (2, 2), (4, 2)]),
    tiles=st.sampled_from([(8, 8), (16, 4), (5, 64)]),
    causal=st.booleans(),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_size(t, s, h, v, heads, tiles, causal):
    q, k, values = (
        draw(1, 2, t, heads[0], h),
        draw(2, 2, s, heads[1], h),
        draw(3, 2, s, heads[1], v),
    )
    want, want_lse, _ = oracles.attention(
        q, k, values, visible=np.tri(t, s, dtype=bool) if causal else True
    )
    call = Call(q, k, values, mask=Causal() if causal else Full())
    out, lse = jax.jit(lambda call: mj.attend(call, Blockwise(*tiles)))(call)
    oracles.assert_close(out, want, CLOSE)
    oracles.assert_close(lse, want_lse, CLOSE)


@pytest.mark.parametrize(
    "transform", [jax.jit, jax.checkpoint, lambda f: f], ids=["jit", "remat", "none"]
)
def test_under_transformations(transform):
    out = transform(lambda *a: mj.dot_product_attention(*a, mask=Causal()))(Q, KEYS, VALUES)
    want, _, _ = oracles.attention(Q, KEYS, VALUES, visible=CAUSAL)
    oracles.assert_close(out, want, CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_vmap_and_scan(backend):
    def one(q, k, v):
        return mj.dot_product_attention(q, k, v, mask=Causal(), backend=BACKENDS[backend])

    want, _, _ = oracles.attention(Q, KEYS, VALUES, visible=CAUSAL)
    oracles.assert_close(jax.jit(jax.vmap(one))(Q, KEYS, VALUES), want, CLOSE)
    _, scanned = jax.lax.scan(lambda c, a: (c, one(*a)), None, (Q, KEYS, VALUES))
    oracles.assert_close(scanned, want, CLOSE)
    shared = jax.jit(jax.vmap(one, in_axes=(0, None, None)))(Q, KEYS[0], VALUES[0])
    oracles.assert_close(shared[0], want[0], CLOSE)


def test_calls_are_pytrees_that_jit_takes():
    call = Call(
        Q, KEYS, VALUES, mask=Causal() & Window(3, 3), dropout=Dropout(jax.random.key(0), 0.2)
    )
    out = jax.jit(mj.attend)(call).out
    oracles.assert_close(out, mj.attend(call).out, CLOSE)


def test_new_values_compile_nothing_new():
    traces = []

    @jax.jit
    def run(call):
        traces.append(1)
        return mj.attend(call)

    for seed in range(3):
        valid = np.random.default_rng(seed).random((B, S)) < 0.5
        dropout = Dropout(jax.random.key(seed), 0.2, batch_start=jnp.int32(seed))
        run(
            Call(
                Q, KEYS, VALUES, k_tokens=Tokens(S, valid=valid), mask=ValidKeys(), dropout=dropout
            )
        )
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_the_results(backend, dtype):
    call = Call(*(jnp.asarray(a, dtype) for a in (Q, KEYS, VALUES)))
    out, lse = mj.attend(call, BACKENDS[backend])
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    assert mj.attention_scores(call).dtype == dtype


# ---- attention_scores -------------------------------------------------------------------------

SCORED = Call(Q, KEYS, VALUES, mask=Dense(FLAGS) & Causal(), bias=BIAS)
_, LSE, SCORES = oracles.attention(Q, KEYS, VALUES, visible=FLAGS & CAUSAL, bias=BIAS)
PICKS = {
    "none": None,
    "slice": slice(1, 4),
    "steps": slice(None, None, 2),
    "from_the_end": slice(-2, None),
    "list_of_numbers": np.array([3, 0, 3]),
    "negative": np.array([-1]),
    "jax": jnp.array([2, 1]),
}


@pytest.mark.parametrize("rows", PICKS)
@pytest.mark.parametrize("heads", ["none", "slice", "list_of_numbers"])
def test_scores_of_some_rows_and_heads(rows, heads):
    picked = SCORES
    if PICKS[heads] is not None:
        picked = picked[:, PICKS[heads]]
    if PICKS[rows] is not None:
        picked = picked[:, :, PICKS[rows]]
    got = mj.attention_scores(SCORED, rows=PICKS[rows], heads=PICKS[heads])
    oracles.assert_close(got, picked, CLOSE)


def test_scores_of_some_rows_know_their_positions_segments_and_validity():
    r = np.random.default_rng(0)
    q_tokens = Tokens(T, start=1, segment=np.sort(r.integers(0, 3, (B, T))))
    k_tokens = Tokens(S, segment=np.sort(r.integers(0, 3, (B, S))), valid=r.random((B, S)) < 0.8)
    call = Call(Q, KEYS, VALUES, q_tokens, k_tokens, SameSegment() & Causal() & ValidKeys())
    whole = mj.attention_scores(call)
    part = mj.attention_scores(call, rows=np.array([4, 1]), heads=slice(2, 5))
    np.testing.assert_allclose(part, whole[:, 2:5][:, :, np.array([4, 1])], atol=CLOSE)
    assert np.asarray(whole).sum() > 0


def test_scores_from_a_given_lse_are_the_same():
    lse = mj.attend(SCORED).lse
    scores = mj.attention_scores(SCORED)  # normalized by themselves: the same but for a rounding
    np.testing.assert_allclose(mj.attention_scores(SCORED, lse), scores, rtol=1e-6)
    oracles.assert_close(lse, LSE, CLOSE)


def test_scores_are_before_dropout():
    dropped = Call(
        Q, KEYS, VALUES, mask=SCORED.mask, bias=BIAS, dropout=Dropout(jax.random.key(0), 0.5)
    )
    np.testing.assert_array_equal(mj.attention_scores(dropped), mj.attention_scores(SCORED))


def test_scores_of_one_row_take_no_memory_for_the_others():
    t = s = 512
    call = Call(*(jnp.zeros((1, n, 2, 4)) for n in (t, s, s)), mask=Causal())
    lse = jnp.zeros((1, 2, t))
    compiled = (
        jax.jit(lambda c, l: mj.attention_scores(c, l, rows=slice(7, 9))).lower(call, lse).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < t * s


def test_gradients_flow_through_scores():
    def total(q, backend):
        call = Call(q, KEYS, VALUES, mask=Causal())
        return (mj.attention_scores(call, mj.attend(call, backend).lse) ** 2).sum()

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    reference, blockwise = (gradient(Q, BACKENDS[x]) for x in BACKENDS)
    assert np.abs(reference).max() > 1e-3
    oracles.assert_close(blockwise, reference, CLOSE)


def test_gradients_flow_through_lse():
    dq = jax.jit(jax.grad(lambda q: mj.attend(Call(q, KEYS, VALUES, mask=Causal())).lse.sum()))(Q)
    ones = np.ones((B, N, T))
    zeros = np.zeros((B, T, N, V))
    want, *_ = oracles.gradients(Q, KEYS, VALUES, zeros, ones, visible=CAUSAL)
    oracles.assert_close(dq, want, CLOSE)


# ---- explain ----------------------------------------------------------------------------------


def test_explain_says_a_sentence_for_every_backend():
    for platform in ("cpu", "cuda", "rocm", "tpu", None):
        reasons = mj.explain(Call(Q, KEYS, VALUES), platform)
        assert {"reference", "blockwise"} <= set(reasons)
        assert reasons["reference"] == "can run"
        assert all(isinstance(text, str) and text for text in reasons.values())


def test_explain_runs_nothing():
    x = jax.ShapeDtypeStruct((8, 65536, 16, 128), jnp.bfloat16)
    assert mj.explain(Call(x, x, x), "cpu")["blockwise"] == "can run"


def test_the_default_backend_is_the_first_that_can_run():
    call = Call(Q, KEYS, VALUES)
    first = next(name for name, text in mj.explain(call, "cpu").items() if text == "can run")
    default, named = mj.attend(call), mj.attend(call, first)
    np.testing.assert_array_equal(default.out, named.out)


SCALES = [0.5, np.float32(0.5), np.array(0.5), jnp.float32(0.5), jnp.bfloat16(0.5)]


@pytest.mark.parametrize("scale", SCALES, ids=lambda x: type(x).__name__)
def test_a_call_with_any_scale_goes_into_programs(scale):
    x = jax.random.normal(jax.random.key(0), (2, 5, 2, 4))
    want = mj.attend(mj.Call(x, x, x, scale=0.5)).out

    def out(call):
        return mj.attend(call).out

    for function in (out, jax.jit(out), jax.checkpoint(out), jax.jit(jax.jit(out))):
        for _ in range(2):
            np.testing.assert_allclose(function(mj.Call(x, x, x, scale=scale)), want, atol=1e-6)
    traced = jax.jit(lambda s: jax.jit(out)(mj.Call(x, x, x, scale=s)))
    np.testing.assert_allclose(traced(jnp.float32(0.5)), want, atol=1e-6)
    slope = jax.grad(lambda s: jax.jit(out)(mj.Call(x, x, x, scale=s)).sum())(0.5)
    near = [mj.attend(mj.Call(x, x, x, scale=s)).out.sum() for s in (0.51, 0.49)]
    np.testing.assert_allclose(slope, (near[0] - near[1]) / 0.02, rtol=1e-2)
    each = jax.vmap(out)(mj.Call(*[jnp.stack([x, x])] * 3, scale=jnp.array([0.5, 1.0])))
    np.testing.assert_allclose(each[0], want, atol=1e-6)
    np.testing.assert_allclose(each[1], out(mj.Call(x, x, x, scale=1.0)), atol=1e-6)


@pytest.mark.parametrize("name", ["reference", "blockwise", "pallas_tpu"])
def test_a_scale_that_makes_all_logits_alike_attends_evenly(name):
    backend = PallasTPU(interpret=True) if name == "pallas_tpu" else name
    for scale in (1e-38, 1e-39, 1e-45):  # the last two are no normal numbers of float32
        out = mj.dot_product_attention(Q, KEYS, VALUES, scale=scale, backend=backend)
        even = np.broadcast_to(np.mean(VALUES, 1, keepdims=True).repeat(N // K, 2), out.shape)
        np.testing.assert_allclose(out, even, atol=1e-6)


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
def test_a_key_that_outweighs_all_others_gives_its_value_bit_by_bit(size, scale):
    # A weight of exp(0): exactly 1, also where a compiler could round a product with the difference.
    q, k, v = (n * draw(i, 2, 37, 2, size) for i, n in enumerate((1e3, 1e3, 1)))
    out = jax.jit(lambda *x: mj.dot_product_attention(*x, scale=scale, backend="blockwise"))(
        q, k, v
    )
    logits = np.einsum("btnh,bsnh->bnts", *(x.astype(np.float64) for x in (q, k)))
    first, second = np.moveaxis(np.sort(logits * (scale or size**-0.5))[..., -2:], -1, 0)
    sure = (second - first > 150).swapaxes(1, 2)
    assert sure.mean() > 0.9
    want = np.take_along_axis(v.swapaxes(1, 2), logits.argmax(-1)[..., None], 2).swapaxes(1, 2)
    np.testing.assert_array_equal(np.asarray(out)[sure], want[sure])


def test_explain_takes_any_scale_and_cap_that_a_call_takes():
    x = jnp.ones((1, 5, 2, 4))
    want = mj.explain(mj.Call(x, x, x, scale=0.5, logit_cap=2.0))
    for number in SCALES:
        assert mj.explain(mj.Call(x, x, x, scale=number, logit_cap=number)) == want
    found = []
    jax.jit(lambda s: found.append(mj.explain(mj.Call(x, x, x, scale=s))))(0.5)
    assert found[0]["blockwise"] == "can run"
    for wrong in ({"scale": jnp.ones(3)}, {"scale": [1.0]}, {"logit_cap": [1.0]}, {"scale": "1"}):
        with pytest.raises(mj.ShapeError, match=next(iter(wrong))):
            mj.explain(mj.Call(x, x, x, **wrong))


def test_a_cap_that_becomes_traced_is_refused_in_words():
    x = jnp.ones((1, 5, 2, 4))
    with pytest.raises(mj.ShapeError, match="logit_cap must be known while tracing"):
        jax.jit(lambda call: mj.attend(call).out)(mj.Call(x, x, x, logit_cap=jnp.float32(2.0)))
