"""`dot_product_attention` as the `attention_fn` of Flax's layers, against Flax's own."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax.attention import attention_fn
from mha_jax.attention.attention_fn import SharedDropout
from mha_jax.errors import ArgumentError, ShapeError, UnsupportedError
from tests.drawn import draw_variables
from tests.oracles import attention as oracle

B, T, S, N, H, D = 2, 5, 7, 3, 4, 11
ATTEND = mj.dot_product_attention
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, T, D), np.float32)
Y = RNG.standard_normal((B, S, D), np.float32)
PADDING = np.arange(S)[None] < np.array([S, 4])[:, None]
MASKS = {
    "none": None,
    "causal": nn.make_causal_mask(X[..., 0]),  # float32, as Flax makes its masks
    "padding": PADDING[:, None, None],
    "dense": RNG.random((B, N, T, S)) < 0.7,
    "integers": (RNG.random((1, 1, T, S)) < 0.7).astype(np.int32),
    "two axes": RNG.random((T, S)) < 0.7,
    "heads": RNG.random((N, T, S)) < 0.7,  # three axes: heads, in Flax and in NumPy
}


def visible(name):
    """Return the mask with at least one visible key in every row, where Flax differs by design."""
    mask = MASKS[name]
    if mask is None or name in ("causal", "padding"):
        return mask
    mask = np.array(mask)
    mask[..., 0] = 1
    return mask


def linen(function, **options):
    return nn.MultiHeadDotProductAttention(N, qkv_features=N * H, attention_fn=function, **options)


def nnx_layer(function, **options):
    options = {"qkv_features": N * H, "decode": False, "rngs": nnx.Rngs(0), **options}
    return nnx.MultiHeadAttention(N, D, attention_fn=function, **options)


def close(got, want, what="", atol=2e-6):
    """Raise unless two trees have the same structure, dtypes and, nearly, numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype, what
        np.testing.assert_allclose(a, b, atol=atol, rtol=atol, err_msg=what)


@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_in_linen(name):
    y = X if name == "causal" else Y
    layer = linen(nn.dot_product_attention)
    variables = draw_variables(layer, X, y)

    def loss(function, variables, x, y):
        out = linen(function).apply(variables, x, y, mask=visible(name))
        return jnp.sum(jnp.sin(out)), out

    both = [
        jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1, 2), has_aux=True))(
            variables, jnp.asarray(X), jnp.asarray(y)
        )
        for f in (ATTEND, nn.dot_product_attention)
    ]
    (_, out), gradients = both[0]
    (_, their_out), their_gradients = both[1]
    close(out, their_out)
    close(gradients, their_gradients, atol=5e-6)


@pytest.mark.parametrize("name", ["none", "causal", "padding", "dense"])
def test_outputs_and_gradients_in_nnx(name):
    y = X if name == "causal" else Y
    mask = None if MASKS[name] is None else jnp.asarray(visible(name))

    def loss(layer, x, y):
        out = layer(x, y, mask=mask)
        return jnp.sum(jnp.sin(out)), out

    both = [
        nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
            nnx_layer(f), jnp.asarray(X), jnp.asarray(y)
        )
        for f in (ATTEND, nnx.dot_product_attention)
    ]
    (_, out), gradients = both[0]
    (_, their_out), their_gradients = both[1]
    close(out, their_out)
    for mine, theirs in zip(gradients, their_gradients):
        close(jax.tree.leaves(mine), jax.tree.leaves(theirs), atol=5e-6)


def test_is_causal_of_newer_nnx():
    layer = nnx_layer(ATTEND)
    if "is_causal" not in inspect.signature(type(layer).__call__).parameters:
        pytest.skip("this flax.nnx has no is_causal")
    causal = layer(X, is_causal=True)
    close(causal, nnx_layer(nnx.dot_product_attention)(X, is_causal=True))
    close(causal, layer(X, mask=jnp.asarray(MASKS["causal"])), atol=0)


def test_fewer_key_value_heads_in_newer_nnx():
    if "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention.__init__).parameters:
        pytest.skip("this flax.nnx has no num_kv_heads")
    close(*(nnx_layer(f, num_kv_heads=1)(X, Y) for f in (ATTEND, nnx.dot_product_attention)))


@pytest.mark.parametrize("shape", [(T, D), (2, B, T, D)])
def test_any_batch_axes(shape):
    x = RNG.standard_normal(shape, np.float32)
    variables = draw_variables(linen(ATTEND), x)
    both = [linen(f).apply(variables, x) for f in (ATTEND, nn.dot_product_attention)]
    close(*both)


def test_decoding_step_by_step():
    layers = [linen(f, decode=True) for f in (ATTEND, nn.dot_product_attention)]
    variables = jax.jit(layers[0].init)(jax.random.key(0), X)
    caches = [variables["cache"], variables["cache"]]
    for t in range(T):
        outs = []
        for i, layer in enumerate(layers):
            given = {"params": variables["params"], "cache": caches[i]}
            out, changed = layer.apply(given, X[:, t : t + 1], mutable=["cache"])
            outs.append(out)
            caches[i] = changed["cache"]
        close(*outs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_good_as_float32_rounded(dtype):
    variables = draw_variables(linen(ATTEND), X, Y)
    half = linen(ATTEND, dtype=dtype).apply(variables, X, Y)
    assert half.dtype == dtype
    forced = linen(ATTEND, dtype=dtype, force_fp32_for_softmax=True).apply(variables, X, Y)
    close(half, forced, atol=0)
    exact = linen(nn.dot_product_attention).apply(variables, X, Y)
    theirs = linen(nn.dot_product_attention, dtype=dtype).apply(variables, X, Y)
    errors = [np.abs(np.asarray(o, np.float32) - exact).max() for o in (half, theirs)]
    assert errors[0] <= 1.5 * errors[1]


def test_inputs_of_several_dtypes_are_promoted():
    q, k = (jnp.ones((B, n, N, H), d) for n, d in ((T, jnp.bfloat16), (S, jnp.float32)))
    assert ATTEND(q, k, k, deterministic=True).dtype == jnp.float32
    assert ATTEND(q, k, k, deterministic=True, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ShapeError, match="must have one dtype"):
        ATTEND(q, k, k)


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_dropout_is_that_of_the_key_that_flax_gives(library, broadcast):
    seen = {}

    @attention_fn.shows_flax_arguments
    def spy(query, key, value, *, mask=None, precision=None, **flax):
        seen.update(q=query, k=key, v=value, **flax)
        seen["out"] = ATTEND(query, key, value, mask=mask, precision=precision, **flax)
        return seen["out"]

    options = {"dropout_rate": 0.5, "broadcast_dropout": broadcast, "deterministic": False}
    if library == "linen":
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        linen(spy, **options).init_with_output(keys, X, Y)
    else:
        nnx_layer(spy, **options)(X, Y)
    kind = SharedDropout if broadcast else mj.Dropout
    keep = kind(seen["dropout_rng"], 0.5).keep(B, N, np.arange(T)[None], np.arange(S)[None])
    assert bool((keep == keep[:1, :1]).all()) == broadcast
    assert 0.3 < float(keep.mean()) < 0.7
    want, _, _ = oracle(seen["q"], seen["k"], seen["v"], keep=np.asarray(keep), rate=0.5)
    np.testing.assert_allclose(seen["out"], want, atol=2e-6)


def test_nothing_is_dropped_when_deterministic():
    options = {"dropout_rate": 0.5, "deterministic": True}
    variables = draw_variables(linen(ATTEND), X, Y)
    close(*(linen(ATTEND, **o).apply(variables, X, Y) for o in (options, {})), atol=0)
    close(nnx_layer(ATTEND, **options)(X, Y), nnx_layer(ATTEND)(X, Y), atol=0)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_shared_bits_on_every_backend_also_with_rows_of_their_own(backend):
    q, k, v = (RNG.standard_normal((B, n, N, H), np.float32) for n in (T, S, S))
    dropout = SharedDropout(jax.random.key(3), 0.4, batch_start=5, head_start=7)
    rows = np.stack([np.arange(T), np.arange(T) + 2])
    keep = np.asarray(dropout.keep(B, N, rows, np.arange(S)[None]))
    one = mj.Dropout(jax.random.key(3), 0.4).keep(1, 1, rows[1:], np.arange(S)[None])
    np.testing.assert_array_equal(keep[1], np.broadcast_to(one[0], (N, T, S)))
    tokens = mj.Tokens(T, index=rows)
    out = ATTEND(q, k, v, dropout=dropout, query_tokens=tokens, backend=backend)
    np.testing.assert_allclose(out, oracle(q, k, v, keep=keep, rate=0.4)[0], atol=2e-6)


def test_shared_bits_in_gradients_and_on_many_devices():
    q, k, v = (jnp.asarray(RNG.standard_normal((4, n, 2, H), np.float32)) for n in (T, S, S))

    def loss(backend, q, k, v):
        arguments = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.4, "backend": backend}
        return jnp.sum(jnp.sin(ATTEND(q, k, v, **arguments)))

    def gradients(backend, *arrays):
        return jax.jit(jax.grad(functools.partial(loss, backend), (0, 1, 2)))(*arrays)

    want = gradients("reference", q, k, v)
    close(gradients("blockwise", q, k, v), want)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data", None, "model")
    sharded = jax.device_put((q, k, v), jax.sharding.NamedSharding(mesh, spec))
    close(jax.device_get(gradients(None, *sharded)), jax.device_get(want))


def test_a_query_that_sees_nothing_gives_zeros_where_flax_gives_a_mean():
    x = jnp.asarray(RNG.standard_normal((B, T, N, H), np.float32))
    mask = np.ones((B, 1, T, T), bool)
    mask[0, 0, 2] = False
    out = ATTEND(x, x, x, mask=mask, deterministic=True)
    assert not out[0, 2].any() and out[1].all()
    theirs = nn.dot_product_attention(x, x, x, mask=mask, deterministic=True)
    np.testing.assert_allclose(theirs[0, 2], x[0].mean(0), atol=1e-6)
    np.testing.assert_allclose(out[1], theirs[1], atol=2e-6)


def test_weights_are_sown():
    variables = draw_variables(linen(ATTEND), X, Y)
    sown = [
        linen(f).apply(variables, X, Y, sow_weights=True, mutable=["intermediates"])[1]
        for f in (ATTEND, nn.dot_product_attention)
    ]
    close(*sown)
    assert sown[0]["intermediates"]["attention_weights"][0].shape == (B, N, T, S)


@pytest.mark.filterwarnings("ignore:.*outside of 'nnx.capture:DeprecationWarning")
def test_weights_are_sown_in_nnx():
    layers = [nnx_layer(f) for f in (ATTEND, nnx.dot_product_attention)]
    for layer in layers:
        layer(X, Y, sow_weights=True)
    close(*(jax.tree.leaves(nnx.pop(layer, nnx.Intermediate)) for layer in layers))


def test_a_backend_is_chosen_by_partial():
    variables = draw_variables(linen(ATTEND), X, Y)
    reference = functools.partial(ATTEND, backend="reference")
    close(*(linen(f).apply(variables, X, Y) for f in (reference, ATTEND)))
    with pytest.raises(UnsupportedError, match="no backend named 'nothing'"):
        linen(functools.partial(ATTEND, backend="nothing")).apply(variables, X, Y)


@pytest.mark.parametrize("theirs", [nn.dot_product_attention, nnx.dot_product_attention])
def test_every_argument_of_flax_is_known(theirs):
    names = set(inspect.signature(theirs).parameters)
    assert names <= set(inspect.signature(ATTEND).parameters)
    assert names <= set(attention_fn._NAMES) | {
        "query",
        "key",
        "value",
        "bias",
        "mask",
        "precision",
    }


def test_bias_is_aligned_as_in_flax():
    q, k, v = (RNG.standard_normal((B, n, N, H), np.float32) for n in (T, S, S))
    bias = RNG.standard_normal((N, 1, S), np.float32)
    close(ATTEND(q, k, v, bias=bias, is_causal=False), ATTEND(q, k, v, bias=bias[None]), atol=0)


def test_our_own_meaning_is_untouched_without_flax_arguments():
    x = jnp.ones((B, T, N, H))
    with pytest.raises(ShapeError, match="a mask holds True or False"):
        ATTEND(x, x, x, mask=np.ones((T, T), np.float32))


def _wrong():
    key = jax.random.key(0)
    yield {"dropout_rate": 0.1}, ShapeError, r"needs a key: got dropout_rate=0\.1 .*dropout_rng="
    yield (
        {"dropout_rate": 0.1, "dropout_rng": key, "dropout": mj.Dropout(key, 0.2)},
        ShapeError,
        r"dropout was given twice: with rate 0\.2 as dropout= and as dropout_rate=0\.1",
    )
    yield {"dropout_rate": 1.0, "dropout_rng": key}, ShapeError, r"in \[0, 1\): got 1\.0"
    for name in attention_fn._REFUSED:
        yield {name: jnp.einsum}, UnsupportedError, rf"{name} would replace the products"
    yield {"is_casual": True}, TypeError, r"keyword argument 'is_casual'\. Did you mean 'is_causal'"
    yield (
        {"zzz": 1},
        TypeError,
        r"unexpected keyword argument 'zzz'\. It takes query, key, value, mask",
    )
    yield {"is_causal": True, "mask": jnp.ones((4, T, T))}, ShapeError, r"does not fit the logits"


THEIRS = {
    "jax.nn": [*inspect.signature(jax.nn.dot_product_attention).parameters],
    "torch": [
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
    ],
    "the layer": [*inspect.signature(mj.MultiHeadAttention.__call__).parameters][1:],
    "others": ["causal", "segment_ids", "window_size", "softmax_scale", "sm_scale", "softcap"],
}


@pytest.mark.parametrize("whose", THEIRS)
def test_names_from_elsewhere_are_answered(whose):
    x, ours = jnp.ones((B, T, N, H)), inspect.signature(ATTEND).parameters
    names = {*THEIRS[whose]} - {*ours} - {"on_projection"}
    for name in names:
        with pytest.raises(
            ArgumentError, match=rf"argument '{name}'\. Here (pass|call|leave) .*\. It"
        ):
            ATTEND(x, x, x, **{name: None})
        with pytest.raises(ArgumentError, match=rf"argument '{name}'\. Here"):
            ATTEND(x, x, x, cache=mj.Cache.empty(B, T, N, H), **{name: None})
    assert names


@pytest.mark.parametrize("arguments, error, message", list(_wrong()))
def test_refused(arguments, error, message):
    x = jnp.ones((B, T, N, H))
    with pytest.raises(error, match=message):
        ATTEND(x, x, x, **arguments)


def test_a_linen_layer_with_its_own_products_is_refused():
    def own():
        return jnp.einsum

    options = {"qk_attn_weights_einsum_cls": own, "attn_weights_value_einsum_cls": own}
    with pytest.raises(UnsupportedError, match="qk_attn_weights_einsum would replace"):
        linen(ATTEND, **options).init(jax.random.key(0), X)
