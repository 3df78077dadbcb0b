"""The Flax module: parameters, streams, losses, configs, axes, and its place inside a model."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import mha_jax as mj
from mha_jax import ShapeError
from mha_jax.backends.reference import Reference
from tests import oracles
from tests.backends import counting
from tests.drawn import draw, draw_variables

B, T, S, N, H, D = 2, 5, 7, 4, 3, 6
CLOSE = 1e-5


X, Y, Z = draw(1, B, T, D), draw(2, B, S, D + 1), draw(3, B, S, D + 2)
VALID = np.array([[1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]], bool)
RNG = jax.random.key(0)


def make(**options):
    return mj.MultiHeadAttention(**({"num_heads": N, "key_dim": H} | options))


# ---- parameters -------------------------------------------------------------------------------


def shapes(layer, *inputs):
    return jax.tree.map(lambda a: a.shape, jax.eval_shape(layer.init, RNG, *inputs))


def test_the_tree_has_the_names_and_shapes_of_keras():
    layer = make(value_dim=5, output_shape=(2, 3), use_gate=True, num_kv_heads=2)
    assert shapes(layer, X, Y, Z) == {
        "params": {
            "query": {"kernel": (D, N, H), "bias": (N, H)},
            "key": {"kernel": (D + 2, 2, H), "bias": (2, H)},
            "value": {"kernel": (D + 1, 2, 5), "bias": (2, 5)},
            "gate": {"kernel": (D, N, 5), "bias": (N, 5)},
            "attention_output": {"kernel": (N, 5, 2, 3), "bias": (2, 3)},
        }
    }


def test_no_bias_and_no_gate():
    tree = shapes(make(use_bias=False), X, Y)["params"]
    assert set(tree) == {"query", "key", "value", "attention_output"}
    assert all(set(part) == {"kernel"} for part in tree.values())


def test_init_makes_only_parameters():
    layer = make(dropout=0.1, seed=3, kernel_regularizer="l2", activity_regularizer="l1")
    assert set(jax.eval_shape(layer.init, RNG, X, Y)) == {"params"}


def test_output_shapes_without_computing():
    layer = make(output_shape=(2, 3))
    variables = jax.eval_shape(layer.init, RNG, X, Y)
    run = lambda v: layer.apply(v, X, Y, return_attention_scores=True)  # noqa: E731
    out, scores = jax.eval_shape(run, variables)
    assert (out.shape, scores.shape) == ((B, T, 2, 3), (B, N, T, S))


def test_the_numbers_are_those_of_the_oracle():
    layer = make(value_dim=5, use_gate=True, bias_initializer="random_normal", num_kv_heads=2)
    variables = draw_variables(layer, X, Y, Z)
    out, scores = layer.apply(
        variables, X, Y, Z, value_mask=VALID, use_causal_mask=True, return_attention_scores=True
    )
    visible = np.tri(T, S, dtype=bool) & VALID[:, None, None]
    want, want_scores = oracles.layer(variables["params"], X, Y, Z, visible=visible)
    oracles.assert_close(out, want, CLOSE)
    oracles.assert_close(scores, want_scores, CLOSE)


@pytest.mark.parametrize("output_shape", [3, (3,), (2, 3), (2, 3, 4)])
def test_tuple_outputs_are_reshaped_matrices(output_shape):
    features = output_shape if isinstance(output_shape, tuple) else (output_shape,)
    layer = make(output_shape=output_shape)
    variables = draw_variables(layer, X, Y)
    out = layer.apply(variables, X, Y)
    assert out.shape == (B, T, *features)
    flat = jax.tree.map(lambda a: a, variables["params"])
    kernel, bias = (flat["attention_output"][x] for x in ("kernel", "bias"))
    flat["attention_output"] = {"kernel": kernel.reshape(N, H, -1), "bias": bias.reshape(-1)}
    want, _ = oracles.layer(flat, X, Y)
    oracles.assert_close(out, want.reshape(out.shape), CLOSE)


def test_fewer_kv_heads_are_repeated_heads():
    few, all_ = make(num_kv_heads=2), make()
    params = draw_variables(few, X, Y)["params"]
    whole = {
        name: {
            k: jnp.repeat(a, 2, a.ndim - 2) if name in ("key", "value") else a for k, a in p.items()
        }
        for name, p in params.items()
    }
    np.testing.assert_allclose(
        few.apply({"params": params}, X, Y), all_.apply({"params": whole}, X, Y), atol=CLOSE
    )


def test_a_key_is_the_value_unless_given():
    layer = make()
    variables = draw_variables(layer, X, Y)
    np.testing.assert_array_equal(layer.apply(variables, X, Y), layer.apply(variables, X, Y, Y))


# ---- training, dropout ------------------------------------------------------------------------

DROPPING = make(dropout=0.4)
VARIABLES = draw_variables(DROPPING, X, Y)
STREAM = {"dropout": jax.random.key(5)}


def lowered(layer, **options):
    return jax.jit(lambda v, x, y: layer.apply(v, x, y, **options)).lower(VARIABLES, X, Y).as_text()


@pytest.mark.parametrize("backend", [None, "reference", "blockwise"])
def test_idle_dropout_lowers_to_the_program_without(backend):
    without = lowered(make(backend=backend))
    with_ = make(dropout=0.4, backend=backend)
    assert lowered(with_) == without
    assert lowered(with_, training=False) == without
    assert lowered(make(dropout=0.4, backend=backend, training=False)) == without
    assert lowered(with_, rngs=STREAM) == without
    assert lowered(make(backend=backend), training=True) == without
    assert lowered(with_, training=True, rngs=STREAM) != without


def test_training_in_the_call_or_in_the_layer():
    want = DROPPING.apply(VARIABLES, X, Y, training=True, rngs=STREAM)
    assert np.any(want != DROPPING.apply(VARIABLES, X, Y))
    np.testing.assert_array_equal(
        make(dropout=0.4, training=True).apply(VARIABLES, X, Y, rngs=STREAM), want
    )
    with pytest.raises(ShapeError, match="given to the layer"):
        make(dropout=0.4, training=True).apply(VARIABLES, X, Y, training=False, rngs=STREAM)


def test_a_missing_stream_is_an_error_that_names_it():
    with pytest.raises(ShapeError, match='no "dropout" stream'):
        DROPPING.apply(VARIABLES, X, Y, training=True)
    with pytest.raises(ShapeError, match='no "dropout" stream'):
        jax.jit(lambda v: DROPPING.apply(v, X, Y, training=True))(VARIABLES)


def test_rate_zero_needs_no_stream():
    np.testing.assert_array_equal(
        make().apply(VARIABLES, X, Y, training=True), make().apply(VARIABLES, X, Y)
    )


def test_streams_decide_the_bits():
    first, again, other = (
        DROPPING.apply(VARIABLES, X, Y, training=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_a_seed_counts_its_calls_in_a_collection():
    layer = make(dropout=0.4, seed=3)
    outs, variables = [], VARIABLES
    for call in range(3):
        out, state = layer.apply(variables, X, Y, training=True, mutable=["dropout_state"])
        variables = VARIABLES | state
        outs.append(out)
        assert int(state["dropout_state"]["count"]) == call + 1
    assert np.any(outs[0] != outs[1]) and np.any(outs[1] != outs[2])
    again, _ = layer.apply(VARIABLES, X, Y, training=True, mutable=["dropout_state"])
    np.testing.assert_array_equal(again, outs[0])
    inside = make(dropout=0.4, seed=4)
    other, _ = inside.apply(VARIABLES, X, Y, training=True, mutable=["dropout_state"])
    assert np.any(other != outs[0])


def test_the_seed_counter_works_under_jit_and_scan():
    layer = make(dropout=0.4, seed=3)

    def step(state, _):
        out, state = layer.apply(VARIABLES | state, X, Y, training=True, mutable=["dropout_state"])
        return state, out

    start = {"dropout_state": {"count": jnp.uint32(0)}}
    state, outs = jax.jit(lambda s: jax.lax.scan(step, s, None, length=3))(start)
    assert int(state["dropout_state"]["count"]) == 3
    assert np.any(outs[0] != outs[1]) and np.any(outs[1] != outs[2])


def test_a_stream_wins_over_a_seed():
    layer = make(dropout=0.4, seed=3)
    np.testing.assert_array_equal(
        layer.apply(VARIABLES, X, Y, training=True, rngs=STREAM),
        DROPPING.apply(VARIABLES, X, Y, training=True, rngs=STREAM),
    )


def test_a_seed_without_its_counter_is_an_error():
    with pytest.raises(ShapeError, match="dropout_state"):
        make(dropout=0.4, seed=3).apply(VARIABLES, X, Y, training=True)


def test_scores_are_before_dropout():
    _, scores = DROPPING.apply(
        VARIABLES, X, Y, training=True, return_attention_scores=True, rngs=STREAM
    )
    _, want = DROPPING.apply(VARIABLES, X, Y, return_attention_scores=True)
    np.testing.assert_array_equal(scores, want)


# ---- configs ----------------------------------------------------------------------------------

EVERYTHING = {
    "num_heads": 6,
    "key_dim": 5,
    "value_dim": 7,
    "dropout": 0.25,
    "use_bias": False,
    "output_shape": (3, 2),
    "attention_axes": (1, -2),
    "sliding_window": 9,
    "kernel_initializer": "he_normal",
    "bias_initializer": {"class_name": "Constant", "config": {"value": 0.5}},
    "kernel_regularizer": {"class_name": "L1L2", "config": {"l1": 0.1, "l2": 0.2}},
    "bias_regularizer": "l1",
    "activity_regularizer": "l2",
    "kernel_constraint": {"class_name": "MaxNorm", "config": {"max_value": 3, "axis": 0}},
    "bias_constraint": "non_neg",
    "use_gate": True,
    "seed": 12,
    "num_kv_heads": 3,
    "backend": "blockwise",
    "training": True,
    "dtype": "bfloat16",
    "param_dtype": "float16",
    "precision": "highest",
    "rotary": mj.Rotary(base=500.0, fraction=0.4, axes=(5,)),
    "qk_norm": "layer",
    "use_sinks": True,
    "scale": 0.5,
    "logit_cap": 30.0,
    "name": "mine",
}


@pytest.mark.parametrize(
    "options", [{"num_heads": 2, "key_dim": 4}, EVERYTHING], ids=["few", "all"]
)
def test_a_config_round_trips_through_json(options):
    layer = mj.MultiHeadAttention(**options)
    config = layer.get_config()
    again = mj.MultiHeadAttention.from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    for name in (*config, "dtype", "param_dtype"):
        assert getattr(again, name) == getattr(layer, name), name
        assert type(getattr(again, name)) is type(getattr(layer, name)), name


def test_a_layer_made_of_its_config_is_equal_to_it():
    for dtype in ("float32", jnp.float32, np.dtype("float32"), jnp.bfloat16):
        layer = mj.MultiHeadAttention(num_heads=2, key_dim=4, dtype=dtype, param_dtype=dtype)
        again = mj.MultiHeadAttention.from_config(json.loads(json.dumps(layer.get_config())))
        assert again == layer and hash(again) == hash(layer)


@pytest.mark.parametrize("precision", [None, "highest", *jax.lax.Precision], ids=str)
def test_a_precision_is_that_of_its_name(precision):
    layer = mj.MultiHeadAttention(num_heads=2, key_dim=4, precision=precision)
    again = mj.MultiHeadAttention.from_config(json.loads(json.dumps(layer.get_config())))
    assert again == layer and hash(again) == hash(layer)
    nnx_layer = mj.nnx.MultiHeadAttention(
        2, 4, precision=precision, in_features=3, rngs=nnx.Rngs(0)
    )
    assert nnx_layer.get_config() == layer.get_config()


def test_every_argument_is_in_the_config():
    config = mj.MultiHeadAttention(**EVERYTHING).get_config()
    assert set(config) == set(EVERYTHING)


def test_a_config_makes_a_layer_of_the_same_numbers():
    layer = make(value_dim=5, use_gate=True, sliding_window=2)
    again = mj.MultiHeadAttention.from_config(layer.get_config())
    variables = draw_variables(layer, X, Y)
    np.testing.assert_array_equal(again.apply(variables, X, Y), layer.apply(variables, X, Y))


def test_the_config_of_keras_is_read():
    keras = pytest.importorskip("keras")
    theirs = keras.layers.MultiHeadAttention(
        num_heads=2,
        key_dim=3,
        value_dim=5,
        dropout=0.1,
        use_bias=False,
        output_shape=7,
        attention_axes=(1,),
        kernel_initializer="he_normal",
        kernel_regularizer=keras.regularizers.L2(0.3),
        kernel_constraint=keras.constraints.MaxNorm(2),
        seed=4,
        name="theirs",
    )
    layer = mj.MultiHeadAttention.from_config(theirs.get_config())
    assert (layer.num_heads, layer.key_dim, layer.value_dim, layer.dropout) == (2, 3, 5, 0.1)
    assert (layer.use_bias, layer.output_shape, layer.attention_axes) == (False, (7,), (1,))
    assert (layer.seed, layer.name) == (4, "theirs")
    assert float(layer.kernel_regularizer(jnp.ones(10))) == pytest.approx(3.0)
    np.testing.assert_allclose(
        jnp.linalg.norm(layer.kernel_constraint(jnp.full((4, 1), 9.0))), 2, rtol=1e-5
    )


# ---- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, inputs, out",
    [
        ({}, "float32", "float32"),
        ({"dtype": "bfloat16"}, "float32", "bfloat16"),
        ({"dtype": "float32"}, "bfloat16", "float32"),
        ({}, "bfloat16", "float32"),
        ({"param_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ({"param_dtype": "bfloat16"}, "float32", "float32"),
        ({"dtype": "float16", "param_dtype": "float16"}, "float32", "float16"),
    ],
)
def test_dtypes(options, inputs, out):
    """Under the strict promotion of these tests too: the layer names its dtypes itself."""
    layer = make(**options)
    x, y = X.astype(inputs), Y.astype(inputs)
    variables = draw_variables(layer, x, y)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype(layer.param_dtype)}
    got, scores = layer.apply(variables, x, y, return_attention_scores=True)
    assert (got.dtype, scores.dtype) == (out, out)


def test_precision_reaches_every_product():
    layer = make(precision="highest", use_gate=True, backend="reference")
    variables = draw_variables(layer, X, Y)
    text = jax.jit(lambda v: layer.apply(v, X, Y)).lower(variables).as_text()
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") == 7


# ---- attention axes ---------------------------------------------------------------------------


def by_hand(variables, x, y, axes, **options):
    """Fold by explicit transposes and reshapes, attend over one axis, unfold."""
    layer = make(**options.pop("layer", {}))
    batch = tuple(axis for axis in range(x.ndim - 1) if axis not in axes)

    def fold(a):
        a = jnp.transpose(a, (*batch, *axes, a.ndim - 1))
        sizes = a.shape[: len(batch)]
        return a.reshape(int(np.prod(sizes)), -1, a.shape[-1])

    out = layer.apply(variables, fold(x), fold(y), **options)
    out = out.reshape(*(x.shape[i] for i in (*batch, *axes)), out.shape[-1])
    return jnp.transpose(out, (*np.argsort((*batch, *axes)), x.ndim - 1))


@pytest.mark.parametrize(
    "axes, query, value",
    [
        (1, (2, 3, 5), (2, 7, 5)),
        (2, (2, 3, 5), (2, 3, 7)),
        (-2, (2, 3, 5), (2, 3, 7)),
        (0, (3, 2), (5, 2)),
        ((1, 2), (2, 3, 5), (2, 2, 7)),
        ((2, 1), (2, 3, 5), (2, 2, 7)),
        ((-3, -2), (2, 3, 5), (2, 4, 1)),
        (None, (2, 3, 5), (2, 2, 7)),
        ((1, 3), (2, 3, 5, 2), (2, 1, 5, 3)),
    ],
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_axes_are_folded_sequences(axes, query, value, causal):
    x, y = draw(8, *query, D), draw(9, *value, D)
    layer = make(attention_axes=axes, value_dim=5)
    variables = draw_variables(layer, x, y)
    got = layer.apply(variables, x, y, use_causal_mask=causal)
    places = axes if isinstance(axes, tuple) else (axes,) if axes is not None else (1, 2)
    places = tuple(axis % (x.ndim) for axis in places)
    want = by_hand(variables, x, y, places, use_causal_mask=causal, layer={"value_dim": 5})
    assert got.shape == (*query, D)
    np.testing.assert_allclose(got, want, atol=CLOSE)


def test_everything_together_that_keras_on_jax_cannot_run():
    x, y = draw(8, 2, 3, 5, D), draw(9, 2, 2, 7, D)
    layer = make(
        attention_axes=(1, 2), value_dim=5, dropout=0.3, sliding_window=6, output_shape=(2, 2)
    )
    variables = draw_variables(layer, x, y)
    mask = np.random.default_rng(0).random((2, N, 3, 5, 2, 7)) < 0.7
    out, scores = layer.apply(
        variables,
        x,
        y,
        attention_mask=mask,
        use_causal_mask=True,
        training=True,
        return_attention_scores=True,
        rngs=STREAM,
    )
    assert (out.shape, scores.shape) == ((2, 3, 5, 2, 2), (2, N, 3, 5, 2, 7))
    ahead = np.arange(14) - np.arange(15)[:, None]
    visible = mask.reshape(2, N, 15, 14) & (ahead <= 0) & (ahead > -6)
    flat = {
        name: {
            k: a.reshape(N, 5, -1) if name == "attention_output" and k == "kernel" else a
            for k, a in p.items()
        }
        for name, p in variables["params"].items()
    }
    flat["attention_output"]["bias"] = flat["attention_output"]["bias"].reshape(-1)
    _, want = oracles.layer(flat, x.reshape(2, 15, D), y.reshape(2, 14, D), visible=visible)
    oracles.assert_close(scores.reshape(2, N, 15, 14), want, CLOSE)
    seen = scores.sum((-2, -1))
    np.testing.assert_allclose(seen, visible.any(-1).reshape(2, N, 3, 5), atol=CLOSE)


def test_padding_masks_of_several_axes():
    x, y = draw(8, 2, 3, 5, D), draw(9, 2, 2, 7, D)
    layer = make(attention_axes=(1, 2))
    variables = draw_variables(layer, x, y)
    valid = np.random.default_rng(0).random((2, 2, 7)) < 0.5
    got = layer.apply(variables, x, y, value_mask=valid)
    full = np.broadcast_to(valid[:, None, None], (2, 3, 5, 2, 7))
    np.testing.assert_allclose(got, layer.apply(variables, x, y, attention_mask=full), atol=CLOSE)


# ---- losses and constraints -------------------------------------------------------------------


def test_losses_are_sown_by_their_names():
    layer = make(
        kernel_regularizer="l2",
        bias_regularizer="l1",
        activity_regularizer="l2",
        bias_initializer="ones",
    )
    variables = draw_variables(layer, X, Y)
    out, state = layer.apply(variables, X, Y, mutable=["losses"])
    losses = {name: sum(jax.tree.leaves(values)) for name, values in state["losses"].items()}
    names = ("query", "key", "value", "attention_output")
    assert set(losses) == {f"{n}_{part}" for n in names for part in ("kernel", "bias", "activity")}
    for name in names:
        kernel, bias = (variables["params"][name][x] for x in ("kernel", "bias"))
        np.testing.assert_allclose(losses[f"{name}_kernel"], 0.01 * (kernel**2).sum(), rtol=1e-5)
        np.testing.assert_allclose(losses[f"{name}_bias"], 0.01 * np.abs(bias).sum(), rtol=1e-5)
    want = 0.01 * (out**2).sum() / len(out)  # divided by the batch, as in Keras
    np.testing.assert_allclose(losses["attention_output_activity"], want, rtol=1e-5)


def test_losses_cost_nothing_unless_asked_for():
    regular = make(kernel_regularizer="l2", activity_regularizer="l1")
    assert lowered(regular) == lowered(make())


def test_gradients_of_losses_flow():
    layer = make(kernel_regularizer="l2")

    def loss(params):
        _, state = layer.apply({"params": params}, X, Y, mutable=["losses"])
        return sum(jax.tree.leaves(state["losses"]))

    gradient = jax.grad(loss)(VARIABLES["params"])
    want = 0.02 * VARIABLES["params"]["query"]["kernel"]
    np.testing.assert_allclose(gradient["query"]["kernel"], want, rtol=1e-5)


def test_constraints_are_applied_to_kernels_and_biases():
    layer = make(
        kernel_constraint="unit_norm", bias_constraint="non_neg", bias_initializer="random_normal"
    )
    params = draw_variables(layer, X, Y)["params"]
    constrained = layer.constrain(params)
    for name, part in constrained.items():
        np.testing.assert_allclose(np.linalg.norm(part["kernel"], axis=0), 1, rtol=1e-5)
        np.testing.assert_array_equal(part["bias"], np.maximum(params[name]["bias"], 0))


# ---- under JAX's and Flax's transformations ---------------------------------------------------

LAYER = make()


def plain(variables, x):
    return LAYER.apply(variables, x, x, use_causal_mask=True)


SELF = draw_variables(LAYER, X, X)
WANT = plain(SELF, X)


def test_jit_vmap_scan_remat():
    np.testing.assert_allclose(jax.jit(plain)(SELF, X), WANT, atol=CLOSE)
    np.testing.assert_allclose(jax.vmap(plain, (None, 0))(SELF, X[:, None])[:, 0], WANT, atol=CLOSE)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), SELF)
    by_weights = jax.vmap(plain, (0, None))(stacked, X)
    np.testing.assert_allclose(by_weights[0], WANT, atol=CLOSE)
    _, scanned = jax.lax.scan(lambda c, x: (c, plain(SELF, x[None])[0]), None, X)
    np.testing.assert_allclose(scanned, WANT, atol=CLOSE)
    np.testing.assert_allclose(jax.checkpoint(plain)(SELF, X), WANT, atol=CLOSE)


def test_grad_is_that_of_differences(x64):
    layer = make(param_dtype="float64", backend="blockwise", use_gate=True)
    x = np.random.default_rng(1).standard_normal((1, T, D))
    params = draw_variables(layer, x, x)["params"]
    flat, unravel = ravel_pytree(params)

    def loss(flat):
        return jnp.sin(layer.apply({"params": unravel(flat)}, x, x, use_causal_mask=True)).sum()

    direction = np.random.default_rng(2).standard_normal(flat.shape)
    step = 1e-6
    numeric = (loss(flat + step * direction) - loss(flat - step * direction)) / (2 * step)
    analytic = jax.grad(loss)(flat) @ direction
    assert float(analytic) == pytest.approx(float(numeric), rel=1e-7, abs=1e-8)


def test_nn_vmap_stacks_layers():
    many = nn.vmap(
        mj.MultiHeadAttention,
        in_axes=None,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        axis_size=3,
    )(num_heads=N, key_dim=H)
    variables = jax.jit(many.init)(RNG, X, X)
    assert variables["params"]["query"]["kernel"].shape == (3, D, N, H)
    out = many.apply(variables, X, X)
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], variables)
        np.testing.assert_allclose(out[i], LAYER.apply(one, X, X), atol=CLOSE)


def test_nn_remat_changes_nothing():
    layer = nn.remat(mj.MultiHeadAttention)(num_heads=N, key_dim=H)
    np.testing.assert_allclose(layer.apply(SELF, X, X), LAYER.apply(SELF, X, X), atol=CLOSE)
    grads = [jax.grad(lambda v, f=f: (f.apply(v, X, X) ** 2).sum())(SELF) for f in (layer, LAYER)]
    for a, b in zip(*map(jax.tree.leaves, grads)):
        np.testing.assert_allclose(a, b, atol=1e-4)


class Block(nn.Module):
    """A small block of a model: attention, residual, norm."""

    layers: int = 2

    @nn.compact
    def __call__(self, x, training=False):
        for i in range(self.layers):
            attention = mj.MultiHeadAttention(
                num_heads=N, key_dim=H, dropout=0.2, name=f"attention_{i}"
            )
            x = nn.LayerNorm()(x + attention(x, x, use_causal_mask=True, training=training))
        return nn.Dense(3)(x)


def test_inside_a_flax_model():
    model = Block()
    variables = jax.jit(model.init)(RNG, X)
    assert {"attention_0", "attention_1"} <= set(variables["params"])
    first, second = (variables["params"][f"attention_{i}"]["query"]["kernel"] for i in range(2))
    assert np.any(first != second)
    out = jax.jit(model.apply)(variables, X)
    assert out.shape == (B, T, 3)
    dropped = model.apply(variables, X, training=True, rngs=STREAM)
    assert np.any(dropped != out)
    gradient = jax.grad(lambda v: model.apply(v, X, training=True, rngs=STREAM).sum())(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_two_layers_in_one_model_draw_different_bits():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = mj.MultiHeadAttention(
                num_heads=N, key_dim=H, dropout=0.5, kernel_initializer="ones"
            )
            b = mj.MultiHeadAttention(
                num_heads=N, key_dim=H, dropout=0.5, kernel_initializer="ones"
            )
            return a(x, x, training=True), b(x, x, training=True)

    variables = jax.jit(Twice().init)({"params": RNG, "dropout": RNG}, X)
    first, second = Twice().apply(variables, X, rngs=STREAM)
    assert np.any(first != second)


def test_shared_layers_share_their_weights():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = mj.MultiHeadAttention(num_heads=N, key_dim=H, name="attention")
            return attention(attention(x, x), x)

    assert set(jax.eval_shape(Shared().init, RNG, X)["params"]) == {"attention"}


def test_logical_names_fit_the_ranks_of_the_kernels():
    initializer = nn.with_logical_partitioning(
        jax.nn.initializers.lecun_normal(), ("embed", "heads", "kv")
    )
    biases = nn.with_logical_partitioning(jax.nn.initializers.zeros, ("heads", "kv"))
    layer = make(kernel_initializer=initializer)
    variables = draw_variables(layer, X, X)
    specs = nn.get_partition_spec(variables)["params"]
    for name in ("query", "key", "value", "attention_output"):
        assert specs[name]["kernel"] == jax.sharding.PartitionSpec("embed", "heads", "kv")
        kernel = variables["params"][name]["kernel"]
        assert nn.meta.unbox(kernel).ndim == len(kernel.names) == 3
    out = layer.apply(variables, X, X)
    unboxed = nn.meta.unbox(variables)
    np.testing.assert_array_equal(out, LAYER.apply(unboxed, X, X))
    other = make(bias_initializer=biases, output_shape=(2, 3))
    query_bias = jax.eval_shape(other.init, RNG, X, X)["params"]
    assert nn.get_partition_spec(query_bias)["query"]["bias"] == jax.sharding.PartitionSpec(
        "heads", "kv"
    )


def test_numpy_inputs_give_the_same_bits():
    np.testing.assert_array_equal(
        LAYER.apply(SELF, *map(np.asarray, (X, X))), LAYER.apply(SELF, X, X)
    )


@pytest.mark.parametrize("lengths", [(0, S), (T, 0), (1, 1)], ids=str)
def test_empty_sequences(lengths):
    t, s = lengths
    layer = make()
    variables = draw_variables(layer, X, Y)
    out, scores = layer.apply(variables, X[:, :t], Y[:, :s], return_attention_scores=True)
    assert (out.shape, scores.shape) == ((B, t, D), (B, N, t, s))
    if not s:
        bias = variables["params"]["attention_output"]["bias"]
        np.testing.assert_array_equal(out, np.broadcast_to(bias, out.shape))


def test_parameters_of_another_layer_are_refused():
    biased, plain = (mj.MultiHeadAttention(2, 3, use_bias=b) for b in (True, False))
    gated = mj.MultiHeadAttention(2, 3, use_gate=True)
    params = {m: m.init(jax.random.key(0), X, X) for m in (biased, plain, gated)}
    for layer, given, message in (
        (
            biased,
            plain,
            "they lack a bias of query, a bias of key, a bias of value, a bias of attention_output",
        ),
        (plain, biased, "they have a bias of query, a bias of key"),
        (gated, biased, "no kernel for gate"),
        (biased, gated, "they have a gate"),
    ):
        with pytest.raises(mj.WeightsError, match=message):
            layer.apply(params[given], X, X)
        with pytest.raises(mj.WeightsError, match=message):
            mj.nnx.MultiHeadAttention.from_linen(layer, params[given], rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"num_heads": 2, "key_dim": 6}, r"query/kernel .* \(6, 4, 3\), got \(6, 2, 6\)"),
        ({"num_heads": 2}, r"query/kernel .* \(6, 4, 3\), got \(6, 2, 3\)"),
        ({"num_kv_heads": 2}, r"key/kernel .* \(6, 4, 3\), got \(6, 2, 3\)"),
        ({"value_dim": 5}, r"value/kernel .* \(6, 4, 3\), got \(6, 4, 5\)"),
        ({"output_shape": (2, 3)}, r"attention_output/kernel .* \(4, 3, 6\), got \(4, 3, 2, 3\)"),
        ({"qk_norm": "rms"}, "they have query_norm, key_norm"),
        ({"use_sinks": True}, "they have sinks"),
    ],
)
def test_parameters_of_other_sizes_norms_or_sinks_are_refused(theirs, message):
    layer, given = make(), draw_variables(make(**theirs), X, X)
    for call in (
        lambda: layer.apply(given, X, X),
        lambda: mj.nnx.MultiHeadAttention.from_linen(layer, given, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(mj.WeightsError, match=message):
            call()


@pytest.mark.parametrize(
    ("name", "part"), [("query", "bias"), ("attention_output", "bias"), ("key_norm", "scale")]
)
def test_parameters_that_would_broadcast_are_refused(name, part):
    layer = make(qk_norm="rms")
    variables = draw_variables(layer, X, X)
    variables["params"][name][part] = jnp.ones(1)
    for call in (
        lambda: layer.apply(variables, X, X),
        lambda: mj.multi_head_attention(variables["params"], X, X, qk_norm="rms"),
    ):
        with pytest.raises(mj.WeightsError, match=rf"{name}/{part} .* got \(1,\)"):
            call()


def test_weights_of_a_norm_are_not_left_out():
    params = draw_variables(make(qk_norm="rms"), X, X)["params"]
    with pytest.raises(mj.WeightsError, match=r"they have .*query_norm"):
        mj.multi_head_attention(params, X, X, qk_norm="l2")


class Adapted(nn.Module):
    """A layer whose scope holds a parameter more."""

    base: mj.MultiHeadAttention

    @nn.compact
    def __call__(self, x):
        nn.share_scope(self, self.base)
        gain = self.param("gain", nn.initializers.ones, (), jnp.bfloat16)
        nn.Dense(2, param_dtype=jnp.bfloat16, name="adapter")(x.astype(jnp.bfloat16))
        return gain.astype(x.dtype) * self.base(x, x)


class Scaled(mj.MultiHeadAttention):
    """A layer of a user's own, with a parameter more."""

    @nn.compact
    def __call__(self, x):
        return self.param("gain", nn.initializers.ones, ()) * super().__call__(x, x)


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": "rms", "use_sinks": True}, {"qk_norm": nn.RMSNorm}]
)
def test_a_scope_is_shared_with_other_parameters(options):
    for module in (Adapted(make(**options)), Scaled(N, H, **options)):
        variables = module.init(RNG, X)
        own = {
            name: x for name, x in variables["params"].items() if name not in ("gain", "adapter")
        }
        y = module.apply(variables, X)
        np.testing.assert_array_equal(y, make(**options).apply({"params": own}, X, X))
        shared = {"qk_norm": options.get("qk_norm")}
        trees = {name: x for name, x in variables["params"].items() if name != "gain"}
        np.testing.assert_array_equal(y, mj.multi_head_attention(trees, X, X, **shared))
        assert y.dtype == jnp.float32


def test_parameters_that_are_no_variables_are_told_how_they_are_given():
    params = LAYER.init(jax.random.key(0), X, X)["params"]
    message = (
        r"no parameters of this layer: got the collections %s\. Pass what layer\.init.*of parameters alone, "
        r'layer\.apply\(\{"params": params\}, query, value\)\.'
    )
    names = r"\['attention_output', 'key', 'query', 'value'\]"
    for given, found in ((params, names), ({}, r"\[\]"), ({"batch_stats": {}}, r"\[.*\]")):
        with pytest.raises(mj.WeightsError, match=message % found):
            LAYER.apply(given, X, X)


def test_a_call_without_scores_takes_no_logarithm():
    variables = LAYER.init(jax.random.key(0), X, X)
    for scores in (False, True):
        call = partial(LAYER.apply, return_attention_scores=scores)
        assert (" log " in str(jax.make_jaxpr(call)(variables, X, X))) is scores


def test_a_call_reaches_its_backend_in_few_frames():
    backend, frames = counting(Reference)
    layer = mj.MultiHeadAttention(2, 3, backend=backend)
    variables = layer.init(jax.random.key(0), X, X)
    frames.clear()
    one, two, three = (X[:, :length] for length in (1, 2, 3))  # each is a program of its own
    layer.apply(variables, one, one)
    mj.multi_head_attention(variables["params"], two, two, backend=backend)
    mj.nnx.MultiHeadAttention.from_linen(layer, variables, rngs=nnx.Rngs(0))(three, three)
    assert len(frames) == 3 and max(frames) <= 10, frames
