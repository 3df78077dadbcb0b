"""The layer without a module: the same parameters, the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax import Causal, Dropout, Window
from tests import oracles
from tests.drawn import draw, draw_variables

B, T, S, N, H, D = 2, 5, 7, 4, 3, 6


X, Y, Z = draw(1, B, T, D), draw(2, B, S, D + 1), draw(3, B, S, D + 2)
PAIRS = np.random.default_rng(4).random((B, N, T, S)) < 0.6
VALID = np.random.default_rng(5).random((B, S)) < 0.7
SIZES = {"num_heads": N, "key_dim": H}
VARIANTS = {
    "plain": ({}, {}),
    "value_dim_causal": ({"value_dim": 5}, {"use_causal_mask": True}),
    "tuple_output": ({"output_shape": (2, 3)}, {"attention_mask": PAIRS}),
    "no_bias_gate": ({"use_bias": False, "use_gate": True}, {"value_mask": VALID}),
    "few_kv_heads": ({"num_kv_heads": 2}, {"mask": Causal() & Window(1, 1)}),
    "scores": ({}, {"return_attention_scores": True, "key_mask": VALID}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_layer_bit_for_bit(name):
    sizes, options = VARIANTS[name]
    layer = mj.MultiHeadAttention(**SIZES, **sizes)
    variables = draw_variables(layer, X, Y, Z)
    want = jax.jit(lambda v, *a: layer.apply(v, *a, **options))(variables, X, Y, Z)
    got = jax.jit(lambda p, *a: mj.multi_head_attention(p, *a, **options))(
        variables["params"], X, Y, Z
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", VARIANTS)
def test_its_parameters_have_the_tree_of_the_layer(name):
    sizes, _ = VARIANTS[name]
    layer = mj.MultiHeadAttention(**SIZES, **sizes)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), X, Y, Z)["params"]
    params = mj.init_params(jax.random.key(0), X, Y, Z, **SIZES, **sizes)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(shapes)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_init_params_reads_only_shapes():
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, Y, Z)]
    from_shapes = mj.init_params(jax.random.key(0), *structs, **SIZES)
    from_arrays = mj.init_params(jax.random.key(0), X, Y, Z, **SIZES)
    for a, b in zip(jax.tree.leaves(from_shapes), jax.tree.leaves(from_arrays)):
        np.testing.assert_array_equal(a, b)


def test_every_kernel_is_drawn_from_a_key_of_its_own():
    params = mj.init_params(jax.random.key(0), X, X, **SIZES, use_gate=True)
    kernels = [params[name]["kernel"] for name in ("query", "key", "value", "gate")]
    for i, a in enumerate(kernels):
        for b in kernels[:i]:
            assert not np.any(np.asarray(a) == np.asarray(b))


def test_init_params_takes_initializers_and_a_dtype():
    params = mj.init_params(
        jax.random.key(0),
        X,
        X,
        **SIZES,
        kernel_initializer="ones",
        bias_initializer={"class_name": "Constant", "config": {"value": 2.0}},
        param_dtype="bfloat16",
    )
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(params["query"]["kernel"], 1)
    np.testing.assert_array_equal(params["query"]["bias"], 2)


def test_dropout_and_the_oracle():
    params = mj.init_params(jax.random.key(0), X, Y, Z, **SIZES, bias_initializer="ones")
    dropout = Dropout(jax.random.key(3), 0.4)
    rows, columns = (np.arange(n, dtype=np.int32)[None] for n in (T, S))
    keep = np.asarray(dropout.keep(B, N, rows, columns))
    got, scores = mj.multi_head_attention(
        params, X, Y, Z, attention_mask=PAIRS, dropout=dropout, return_attention_scores=True
    )
    want, want_scores = oracles.layer(params, X, Y, Z, visible=PAIRS, keep=keep, rate=0.4)
    oracles.assert_close(got, want, 1e-5)
    oracles.assert_close(scores, want_scores, 1e-5)


def test_numpy_parameters_and_inputs():
    params = mj.init_params(jax.random.key(0), X, Y, Z, **SIZES)
    want = mj.multi_head_attention(params, X, Y, Z)
    got = mj.multi_head_attention(jax.tree.map(np.asarray, params), *map(np.asarray, (X, Y, Z)))
    np.testing.assert_array_equal(got, want)


def test_under_jit_vmap_grad_scan_and_remat():
    params = mj.init_params(jax.random.key(0), X, X, **SIZES)

    def run(params, x):
        return mj.multi_head_attention(params, x, x, use_causal_mask=True)

    want = run(params, X)
    np.testing.assert_allclose(jax.jit(run)(params, X), want, atol=1e-6)
    one = jax.vmap(run, (None, 0))(params, X[:, None])[:, 0]
    np.testing.assert_allclose(one, want, atol=1e-6)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), params)

    def loss(params, x, f):
        return (f(params, x) ** 2).sum()

    plain = jax.grad(loss)(params, X, run)
    again = jax.grad(loss)(params, X, jax.checkpoint(run))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    twice = jax.lax.scan(lambda x, p: (run(p, x), None), X, stacked)[0]
    np.testing.assert_allclose(twice, run(params, want), atol=1e-5)


def test_leading_batch_axes_by_attention_axes():
    params = mj.init_params(jax.random.key(0), X, X, **SIZES)
    x = draw(6, 2, 3, T, D)
    got = mj.multi_head_attention(params, x, x, attention_axes=-2, use_causal_mask=True)
    want = mj.multi_head_attention(
        params, x.reshape(6, T, D), x.reshape(6, T, D), use_causal_mask=True
    )
    np.testing.assert_allclose(got, want.reshape(2, 3, T, D), atol=1e-6)


def test_one_unbatched_sequence():
    params = mj.init_params(jax.random.key(0), X, X, **SIZES)
    got = mj.multi_head_attention(params, X[0], X[0])
    np.testing.assert_allclose(got, mj.multi_head_attention(params, X, X)[0], atol=1e-6)


def test_on_projection_sees_every_projection():
    params = mj.init_params(jax.random.key(0), X, X, **SIZES, use_gate=True)
    seen = {}

    def look(name, x):
        seen[name] = x.shape
        return x

    mj.multi_head_attention(params, X, X, on_projection=look)
    heads = (B, T, N, H)
    assert seen == {
        "query": heads,
        "key": heads,
        "value": heads,
        "gate": heads,
        "attention_output": (B, T, D),
    }


def test_nan_of_padding_reaches_no_gradient_where_projections_are_seen():
    params = mj.init_params(jax.random.key(0), X, Y, Z, **SIZES)
    hole = np.where(VALID[..., None], Y, np.nan)
    seen = {}

    def look(name, y):
        seen[name] = y
        return y

    def loss(params, value, look=None):
        options = {"value_mask": VALID, "on_projection": look}
        return (mj.multi_head_attention(params, X, value, Z, **options) ** 2).sum()

    want = jax.grad(loss)(params, Y)
    got = jax.grad(loss)(params, hole, lambda _, y: y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    loss(params, hole, look)
    whole = jnp.einsum("BSD,DNH->BSNH", Y, params["value"]["kernel"])  # the bias is 0
    np.testing.assert_allclose(
        seen["value"], np.where(VALID[..., None, None], whole, 0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("door", ["linen", "nnx", "function"])
def test_packed_queries_tell_the_segments_of_the_keys_in_self_attention(door):
    segment = np.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, -1]])
    tokens = mj.Tokens(T, pos=np.array([[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]]), segment=segment)
    packed = {"mask": mj.SameSegment() & Causal(), "query_tokens": tokens}
    layer = mj.MultiHeadAttention(**SIZES)
    variables = draw_variables(layer, X, X)
    call = {
        "linen": lambda *a, **k: layer.apply(variables, *a, **k),
        "nnx": mj.nnx.MultiHeadAttention.from_linen(layer, variables, rngs=nnx.Rngs(0)),
        "function": lambda *a, **k: mj.multi_head_attention(variables["params"], *a, **k),
    }[door]
    np.testing.assert_array_equal(call(X, X, **packed), call(X, X, key_tokens=tokens, **packed))
    own = np.asarray(X)
    np.testing.assert_array_equal(call(own, own, **packed), call(X, X, **packed))
    for other in ((X, X + 0), (X, X, X + 0)):
        with pytest.raises(mj.ShapeError, match=r"key_tokens\.segment=None"):
            call(*other, **packed)
    # Without SameSegment keys are plain, as ever.
    plain = call(X, X, mask=Causal(), query_tokens=tokens)
    np.testing.assert_array_equal(
        plain, call(X, X, mask=Causal(), query_tokens=tokens, key_tokens=mj.Tokens(T))
    )
