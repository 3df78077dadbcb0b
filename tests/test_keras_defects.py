"""Where Keras 3.15 on JAX crashes or contradicts itself, the oracle alone decides: one test a defect.

Every test shows what Keras does, then that ours is the oracle's answer in float64 to 1e-12.
"""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from mha_jax import MultiHeadAttention, ShapeError
from mha_jax.interop.keras import import_layer
from tests import keras_peer, layer_cases
from tests.layer_runs import by_oracle, by_us
from tests.oracles import assert_close

B, T, S, D, D2 = 2, 5, 7, 11, 3
BASE = dict(
    num_heads=2,
    key_dim=3,
    attention_axes=None,
    sliding_window=None,
    **dict.fromkeys(layer_cases._RULES),
    kernel_constraint=None,
    bias_constraint=None,
)


@pytest.fixture(autouse=True)
def _lenient():
    with keras_peer.lenient():
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def handmade(query, value, axes=(1,), causal=False, masks=None, **arguments):
    """Return a case in float64 with these inputs' shapes."""
    case = layer_cases.Case(
        seed=0,
        index=0,
        grouped=False,
        arguments=BASE | arguments,
        axes=axes,
        inputs={"query": normal(*query, seed=1), "value": normal(*value, seed=2)},
        masks=masks or {},
        causal=causal,
        scores=True,
    )
    case.d_output, case.d_scores = normal(*query, seed=3), normal(*case.scores_shape, seed=4)
    return case


def assert_ours_is_right(case):
    """Hold output, scores and every gradient against the oracle, with and without scores."""
    arguments = {k: v for k, v in case.arguments.items() if v is not None}
    for backend in ("reference", None):
        module = MultiHeadAttention(**arguments, backend=backend, param_dtype=jnp.float64)
        inputs = jax.tree.map(jnp.asarray, case.inputs)
        shapes = jax.eval_shape(module.init, jax.random.key(0), **inputs)["params"]
        params = jax.tree.map(lambda x: jnp.asarray(normal(*x.shape, seed=x.size)), shapes)
        truth = by_oracle(case, params)
        for name, x in by_us(case, module, params).items():
            assert_close(x, truth[name], 1e-12 * max(1, np.abs(truth[name]).max(initial=0)), name)
        out = module.apply({"params": params}, **inputs, **case.masks, use_causal_mask=case.causal)
        assert_close(out, truth["output"], 1e-12 * np.abs(truth["output"]).max(), "without scores")


def keras_layer(case, **more):
    arguments = {k: v for k, v in (case.arguments | more).items() if v is not None}
    return keras_peer.build(False, arguments, **case.inputs)


def keras_inputs(case):
    return [jnp.asarray(x, jnp.float32) for x in case.inputs.values()]


@pytest.mark.parametrize("causal", [False, True])
def test_value_dim_crashes_the_fused_path(causal, x64):
    case = handmade((B, T, D), (B, S, D2), causal=causal, value_dim=13)
    with pytest.raises((TypeError, ValueError)):
        keras_layer(case)(*keras_inputs(case), use_causal_mask=causal)
    assert_ours_is_right(case)


@pytest.mark.parametrize("given, axes", [(2, (2,)), (-2, (2,)), ((1, 2), (1, 2)), (None, (1, 2))])
def test_causal_with_other_axes_crashes(given, axes, x64):
    case = handmade((B, 3, 5, D), (B, 3, 5, D2), axes, causal=True, attention_axes=given)
    with pytest.raises((TypeError, ValueError)):
        keras_layer(case)(*keras_inputs(case), use_causal_mask=True)
    assert_ours_is_right(case)


def test_a_window_with_other_axes_crashes(x64):
    case = handmade((B, 3, 5, D), (B, 3, 5, D2), (2,), sliding_window=2, attention_axes=2)
    with pytest.raises((TypeError, ValueError)):
        keras_layer(case)(*keras_inputs(case))
    assert_ours_is_right(case)


def test_a_masked_row_depends_on_the_path(x64):
    mask = np.ones((T, S), bool)
    mask[2] = False
    case = handmade((B, T, D), (B, S, D2), masks={"attention_mask": mask})
    layer, inputs = keras_layer(case), keras_inputs(case)
    fused = layer(*inputs, attention_mask=mask)
    explicit, scores = layer(*inputs, attention_mask=mask, return_attention_scores=True)
    np.testing.assert_allclose(fused[:, 3], explicit[:, 3], rtol=1e-4, atol=1e-6)
    assert np.abs(fused[:, 2] - explicit[:, 2]).max() > 0.1, "Keras agrees with itself by now"
    assert not np.asarray(scores[:, :, 2]).any()
    module, variables = import_layer(layer)
    out, ours = module.apply(variables, *inputs, attention_mask=mask, return_attention_scores=True)
    np.testing.assert_array_equal(ours[:, :, 2], 0)
    bias = np.asarray(variables["params"]["attention_output"]["bias"])
    np.testing.assert_array_equal(out[:, 2], np.broadcast_to(bias, (B, D)))
    assert_ours_is_right(case)


def test_the_query_mask_argument_is_ignored(x64):
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]], bool)
    case = handmade((B, T, D), (B, S, D2), masks={"query_mask": mask})
    layer, inputs = keras_layer(case), keras_inputs(case)
    options = {"return_attention_scores": True}
    _, without = layer(*inputs, **options)
    _, scores = layer(*inputs, query_mask=jnp.asarray(mask), **options)
    np.testing.assert_array_equal(scores, without)
    assert_ours_is_right(case)


def test_padding_masks_with_other_axes_crash_or_miss(x64):
    mask = normal(B, 3, 5, seed=9) > 0
    case = handmade((B, 3, 5, D), (B, 3, 5, D2), (1,), masks={"value_mask": mask}, attention_axes=1)
    with pytest.raises((TypeError, ValueError)):
        keras_layer(case)(
            *keras_inputs(case), value_mask=jnp.asarray(mask), return_attention_scores=True
        )
    assert_ours_is_right(case)


@pytest.mark.parametrize("heads", [2, 3])
def test_a_mask_by_head_meets_a_padding_mask(heads, x64):
    """Keras aligns the padding mask's batch with the heads: wrong if both are 2, else a crash."""
    masks = {
        "attention_mask": normal(B, heads, T, S, seed=9) > -0.5,
        "value_mask": np.array([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]], bool),
    }
    case = handmade((B, T, D), (B, S, D2), masks=masks, num_heads=heads)
    layer, inputs = keras_layer(case), keras_inputs(case)
    options = {name: jnp.asarray(mask) for name, mask in masks.items()}
    if heads != B:
        with pytest.raises((TypeError, ValueError)):
            layer(*inputs, **options, return_attention_scores=True)
    else:
        _, scores = layer(*inputs, **options, return_attention_scores=True)
        assert np.asarray(scores)[0, 1, :, 2].any(), "Keras hides the masked key by now"
    assert_ours_is_right(case)


def test_the_symbolic_shape_of_scores():
    layer = keras.layers.MultiHeadAttention(2, 3)
    query, value = keras.Input((T, D)), keras.Input((S, D2))
    _, scores = layer(query, value, return_attention_scores=True)
    assert scores.shape == (None, 2, T, T), "Keras knows the length of the keys by now"
    module, variables = import_layer(layer)
    x, y = jnp.ones((B, T, D)), jnp.ones((B, S, D2))
    _, ours = jax.eval_shape(
        lambda x, y: module.apply(variables, x, y, return_attention_scores=True), x, y
    )
    assert ours.shape == (B, 2, T, S)


def test_the_same_dropout_in_every_call_under_jit():
    layer = keras.layers.MultiHeadAttention(2, 3, dropout=0.5, seed=1)
    layer.build((B, T, D), (B, S, D2))
    x, y = (jnp.asarray(normal(B, *s), jnp.float32) for s in ((T, D), (S, D2)))
    module, variables = import_layer(layer)
    call = jax.jit(lambda x, y: layer(x, y, training=True))
    np.testing.assert_array_equal(call(x, y), call(x, y))

    @jax.jit
    def ours(variables, x, y):
        return module.apply(variables, x, y, training=True, mutable=["dropout_state"])

    first, state = ours(variables, x, y)
    second, _ = ours(variables | state, x, y)
    assert np.abs(first - second).max() > 1e-3


def test_an_additive_mask_is_inverted():
    case = handmade((B, T, D), (B, S, D2))
    layer, inputs = keras_layer(case), keras_inputs(case)
    additive = np.where(np.tri(T, S), 0.0, -1e9).astype(np.float32)
    _, scores = layer(*inputs, attention_mask=additive, return_attention_scores=True)
    assert np.asarray(scores)[0, 0, 0, 1:].any() and not np.asarray(scores)[0, 0, 0, 0].any()
    module, variables = import_layer(layer)
    with pytest.raises(ShapeError, match="attention_mask holds True or False"):
        module.apply(variables, *inputs, attention_mask=additive)


def test_one_seeded_initializer_draws_one_kernel():
    seeded = keras.initializers.GlorotUniform(seed=1)
    layer = keras.layers.MultiHeadAttention(2, 3, kernel_initializer=seeded)
    layer.build((B, T, D), (B, T, D))
    np.testing.assert_array_equal(layer.query_dense.kernel, layer.key_dense.kernel)
    module, _ = import_layer(layer)
    x = jnp.ones((B, T, D))
    params = module.init(jax.random.key(0), x, x)["params"]
    assert np.abs(params["query"]["kernel"] - params["key"]["kernel"]).max() > 0.1
