"""The nnx layer against the linen one, with the same parameters."""

import dataclasses
import inspect
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mha_jax as mj
from mha_jax.errors import ShapeError, UnsupportedError, WeightsError
from mha_jax.layer.nnx import Loss, MultiHeadAttention
from tests.drawn import draw_variables

B, T, S, D, D2, D3 = 2, 5, 7, 11, 3, 13
RNG = np.random.default_rng(0)
X, Y, Z = (RNG.standard_normal(s, np.float32) for s in ((B, T, D), (B, S, D2), (B, S, D3)))
PLAIN = {"num_heads": 4, "key_dim": 3}
SETTINGS = {
    "plain": {},
    "everything": {
        "value_dim": 5,
        "dropout": 0.25,
        "output_shape": (3, 2),
        "attention_axes": -2,
        "sliding_window": 4,
        "kernel_initializer": "he_normal",
        "bias_initializer": "ones",
        "kernel_regularizer": "l1",
        "bias_regularizer": "l2",
        "activity_regularizer": "l2",
        "kernel_constraint": "non_neg",
        "bias_constraint": {"class_name": "MaxNorm", "config": {"max_value": 0.5, "axis": 0}},
        "use_gate": True,
        "seed": 9,
        "name": "attention",
    },
    "no bias": {"use_bias": False},
    "fewer key-value heads": {"num_kv_heads": 2, "use_gate": True, "use_bias": False},
    "half precision": {"dtype": "bfloat16", "precision": "highest"},
    "half-precision weights": {"param_dtype": jnp.bfloat16, "backend": "reference"},
    "dropout": {"dropout": 0.5},
}
CALLS = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "masks": {
        "query_mask": np.arange(T)[None] < np.array([[T], [3]]),
        "value_mask": np.arange(S)[None] < np.array([[4], [S]]),
        "attention_mask": RNG.random((B, 1, T, S)) < 0.7,
    },
    "rule": {"mask": mj.Causal() & mj.Window(2, 0), "key_tokens": mj.Tokens(S, start=1)},
    "scores": {"return_attention_scores": True},
}


def pair(**more):
    """Return (linen layer, variables, nnx layer) with the same random parameters."""
    linen = mj.MultiHeadAttention(**PLAIN, **more)
    variables = {"params": draw_variables(linen, X, Y, Z)["params"]}
    return linen, variables, MultiHeadAttention.from_linen(linen, variables, rngs=nnx.Rngs(1))


def fresh(**more):
    widths = {"in_features": D, "value_features": D2, "key_features": D3}
    return MultiHeadAttention(**(PLAIN | widths | {"rngs": nnx.Rngs(0)} | more))


def equal(got, want):
    """Raise unless two trees are the same, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_arguments_are_those_of_the_linen_layer():
    def listed(cls):
        fields = [f for f in dataclasses.fields(cls) if f.name != "parent"]
        return {f.name: f.default for f in fields}

    assert listed(MultiHeadAttention) == listed(mj.MultiHeadAttention)
    order = [name for name in listed(mj.MultiHeadAttention) if name != "name"]
    assert list(listed(MultiHeadAttention)) == [*order, "name"]
    ours, theirs = (
        list(inspect.signature(cls.__call__).parameters.values())
        for cls in (MultiHeadAttention, mj.MultiHeadAttention)
    )
    assert [(p.name, p.default) for p in ours if p.name != "rngs"] == [
        (p.name, p.default) for p in theirs
    ]


@pytest.mark.parametrize("settings", SETTINGS)
def test_outputs_for_every_setting(settings):
    linen, variables, layer = pair(**SETTINGS[settings])
    equal(layer.params, variables["params"])
    equal(layer(X, Y, Z), linen.apply(variables, X, Y, Z))
    assert layer.linen == linen and layer.get_config() == linen.get_config()


@pytest.mark.parametrize("call", CALLS)
def test_outputs_for_every_call(call):
    linen, variables, layer = pair(num_kv_heads=2)
    equal(layer(X, Y, Z, **CALLS[call]), linen.apply(variables, X, Y, Z, **CALLS[call]))


def test_a_fresh_layer_has_the_parameters_of_linen_drawn_independently():
    layer = fresh(use_gate=True)
    _, variables, _ = pair(use_gate=True)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), variables["params"])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), layer.params) == shapes
    assert type(layer.query.kernel) is nnx.Param
    same = fresh(value_features=D, key_features=None)
    kernels = [np.asarray(same.params[name]["kernel"]) for name in ("query", "key", "value")]
    assert all(k.shape == (D, 4, 3) for k in kernels)
    assert not np.allclose(kernels[0], kernels[1]) and not np.allclose(kernels[1], kernels[2])


def test_parameters_go_both_ways():
    linen, variables, _ = pair()
    layer = fresh()
    nnx.update(layer, variables["params"])
    equal(layer(X, Y, Z), linen.apply(variables, X, Y, Z))
    back = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    equal(back, variables["params"])


def test_gradients_in_jit():
    linen, variables, layer = pair(use_gate=True, num_kv_heads=2)

    @nnx.jit
    def gradients(layer):
        return nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(X, Y, Z))))(layer)

    want = jax.grad(lambda p: jnp.sum(jnp.sin(linen.apply({"params": p}, X, Y, Z))))
    got = nnx.to_pure_dict(gradients(layer))
    for name, group in jax.jit(want)(variables["params"]).items():
        for part, gradient in group.items():
            np.testing.assert_allclose(got[name][part], gradient, atol=2e-6)


def test_split_and_merge():
    layer = fresh(dropout=0.5, kernel_regularizer="l2")
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    again = nnx.merge(graph, params, rest)
    equal(again(X, Y, Z), layer(X, Y, Z))
    assert jax.tree.structure(params) == jax.tree.structure(nnx.state(again, nnx.Param))


def test_a_new_mask_at_every_call_from_the_kept_stream():
    layer = fresh(dropout=0.5, rngs=nnx.Rngs(params=0, dropout=1))
    first, second = layer(X, Y, Z, training=True), layer(X, Y, Z, training=True)
    assert not np.allclose(first, second)
    again = fresh(dropout=0.5, rngs=nnx.Rngs(params=0, dropout=1))
    equal(again(X, Y, Z, training=True), first)
    equal(
        layer(X, Y, Z), fresh(rngs=nnx.Rngs(params=0))(X, Y, Z)
    )  # the same parameters, no dropout


def test_dropout_is_that_of_the_linen_layer_for_the_same_key():
    linen, variables, layer = pair(dropout=0.5)
    key = nnx.Rngs(dropout=3).dropout()
    got = layer(X, Y, Z, training=True, rngs=nnx.Rngs(dropout=3))
    want = linen.apply(variables, X, Y, Z, training=True, rngs={"dropout": key})
    equal(got, want)
    equal(layer(X, Y, Z, training=True, rngs=nnx.Rngs(dropout=3).dropout), want)
    equal(layer(X, Y, Z, training=True, rngs=nnx.Rngs(3)), want)  # the default stream
    assert not np.allclose(want, linen.apply(variables, X, Y, Z))


def test_a_seed_makes_the_stream():
    one, other = fresh(dropout=0.5, seed=5), fresh(dropout=0.5, seed=5, rngs=nnx.Rngs(params=0))
    equal(one(X, Y, Z, training=True), other(X, Y, Z, training=True))
    assert not np.allclose(one(X, Y, Z, training=True), one(X, Y, Z, training=True))


def test_dropout_in_jit_advances_the_stream():
    layer = fresh(dropout=0.5)
    step = nnx.jit(lambda layer: layer(X, Y, Z, training=True))
    assert not np.allclose(step(layer), step(layer))


def test_train_and_eval_of_a_model_reach_the_layer():
    class Model(nnx.Module):
        def __init__(self):
            self.attention = fresh(dropout=0.5)

    model = Model()
    assert model.attention.training is None and model.attention.deterministic is None
    model.train()
    assert model.attention.training is True and model.attention.deterministic is False
    assert not np.allclose(model.attention(X, Y, Z), model.attention(X, Y, Z))
    model.eval()
    assert model.attention.training is False
    equal(model.attention(X, Y, Z), model.attention(X, Y, Z))
    model.attention.deterministic = None
    assert model.attention.training is None


@pytest.mark.parametrize("jit", [False, True])
def test_losses_are_those_of_the_linen_layer(jit):
    linen, variables, layer = pair(
        kernel_regularizer="l1", bias_regularizer="l2", activity_regularizer="l2", use_gate=True
    )

    def twice(layer, scale):
        layer(scale * X, Y, Z)
        return layer(X, Y, Z)

    def sow(module, scale):
        twice(module, scale)
        return module.variables["losses"]

    call = nnx.jit(twice) if jit else twice
    structure = jax.tree.structure(nnx.state(layer))
    for scale in (2.0, 3.0):  # Two steps: what is taken after one is not in the next.
        sown = linen.apply(variables, scale, method=sow, mutable=["losses"])[0]
        # An activity's penalty adds over calls, a weight's counts once.
        want = {name: sum(jax.tree.leaves(values)) for name, values in sown.items()}
        call(layer, scale)
        assert jax.tree.structure(nnx.state(layer)) == structure
        losses = nnx.to_pure_dict(nnx.pop(layer, Loss))["losses"]
        assert set(losses) == set(want)
        for name, value in want.items():
            np.testing.assert_allclose(losses[name], value, rtol=1e-6, err_msg=name)
        assert not jax.tree.leaves(nnx.state(layer, Loss))


def test_losses_that_are_not_taken_go_on_adding_for_activities_alone():
    layer = fresh(kernel_regularizer="l2", activity_regularizer="l2")
    layer(X, Y, Z)
    once = nnx.to_pure_dict(nnx.state(layer.losses))
    layer(X, Y, Z)
    for name, value in nnx.to_pure_dict(nnx.state(layer.losses)).items():
        times = 2 if name.endswith("activity") else 1
        np.testing.assert_allclose(value, times * once[name], rtol=1e-6, err_msg=name)


def test_gradients_of_losses():
    layer = fresh(kernel_regularizer=mj.regularizers.L2(0.5))

    def loss(layer):
        layer(X, Y, Z)
        layer(X, Y, Z)
        return sum(jax.tree.leaves(nnx.pop(layer, Loss)))

    for _ in range(2):
        gradients = nnx.to_pure_dict(nnx.grad(loss)(layer))
        for name, group in layer.params.items():
            np.testing.assert_allclose(gradients[name]["kernel"], group["kernel"], rtol=1e-6)


def test_no_regularizer_no_losses():
    assert not hasattr(fresh(), "losses")
    biasless = fresh(use_bias=False, bias_regularizer="l2")
    assert not hasattr(biasless, "losses")


def test_constraints():
    linen, variables, layer = pair(kernel_constraint="non_neg", bias_constraint="non_neg")
    layer.constrain()
    equal(layer.params, linen.constrain(variables["params"]))
    assert float(layer.query.kernel[...].min()) == 0


def test_boxed_parameters_are_refused():
    init = nnx.nn.initializers.lecun_normal()
    with pytest.raises(
        UnsupportedError, match=r"a kernel returned a linen box, Partitioned, .*rules"
    ):
        fresh(kernel_initializer=nn.with_partitioning(init, ("embed", "heads")))


def test_metadata_of_initializers_are_kept():
    init = nnx.with_metadata(nnx.nn.initializers.lecun_normal(), note="of the user")
    layer = fresh(kernel_initializer=init)
    assert layer.query.kernel.note == "of the user" and layer.query.kernel.ndim == 3
    assert layer(X, Y, Z).shape == (*X.shape[:2], layer.attention_output.kernel.shape[-1])
    assert not hasattr(layer.query.bias, "note")


def test_a_cache_goes_through():
    linen = mj.MultiHeadAttention(**PLAIN, kernel_regularizer="l2")
    variables = {"params": draw_variables(linen, X, X)["params"]}
    layer = MultiHeadAttention.from_linen(linen, variables, rngs=nnx.Rngs(0))
    cache, outs = layer.empty_cache(B, T), []
    for t in range(T):
        step = X[:, t : t + 1]
        out, cache = layer(step, step, use_causal_mask=True, cache=cache)
        outs.append(out)
    whole = layer(X, X, use_causal_mask=True)
    np.testing.assert_allclose(np.concatenate(outs, 1), whole, atol=2e-6)
    again, cache = layer(X[:, -1:], None, cache=cache)  # nothing is appended
    np.testing.assert_allclose(again, whole[:, -1:], atol=2e-6)


def test_many_layers_in_nnx_vmap_and_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return fresh(value_features=D, key_features=D, rngs=nnx.Rngs(key))

    layers = make(jax.random.split(jax.random.key(0), 3))
    assert layers.query.kernel.shape == (3, D, 4, 3)
    out = nnx.scan(lambda x, layer: layer(x, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        jnp.asarray(X), layers
    )
    want = X
    for i in range(3):
        one = jax.tree.map(lambda a, i=i: a[i], layers.params)
        want = mj.multi_head_attention(one, want, want)
    np.testing.assert_allclose(out, want, atol=2e-6)


def _wrong():
    yield {"num_heads": 0}, r"num_heads must be a positive integer: got 0"
    yield {"dropout": 1.0}, r"dropout must be a number in \[0, 1\): got 1\.0"
    yield {"in_features": 0}, r"in_features must be a positive integer: got 0\. It is the width"
    yield {"in_features": None}, r"in_features must be a positive integer: got None"
    yield {"value_features": -1}, r"value_features must be a positive integer or None: got -1"
    yield {"key_features": 2.0}, r"key_features must be a positive integer or None: got 2\.0"


@pytest.mark.parametrize("arguments, message", list(_wrong()))
def test_wrong_arguments(arguments, message):
    with pytest.raises(ShapeError, match=message):
        fresh(**arguments)


def test_wrong_calls():
    layer = fresh(dropout=0.5, rngs=nnx.Rngs(params=0))
    with pytest.raises(ShapeError, match=r'there is no "dropout" stream\. Make the layer with'):
        layer(X, Y, Z, training=True)
    with pytest.raises(ShapeError, match=r'there is no "dropout" stream'):
        layer(X, Y, Z, training=True, rngs=nnx.Rngs(params=1))
    for training in (True, False):  # of a call that drops nothing, too
        with pytest.raises(ShapeError, match=r"rngs must be nnx.Rngs or one .*Rngs\(dropout=key\)"):
            layer(X, Y, Z, training=training, rngs=jax.random.key(0))
    layer.train()
    assert layer(X, Y, Z, training=False).ndim == 3  # the call wins
    with pytest.raises(
        WeightsError,
        match=r"the key kernel of shape .* does not fit its input of shape \(2, 7, 3\)",
    ):
        fresh()(X, Z, Y)
    with pytest.raises(WeightsError, match="no kernel for query, key, value, attention_output"):
        MultiHeadAttention.from_linen(mj.MultiHeadAttention(2, 3), {}, rngs=nnx.Rngs(0))


def test_nnx_is_not_imported_before_it_is_used():
    program = """
import sys, mha_jax
assert "flax.nnx" not in sys.modules and "mha_jax.layer.nnx" not in sys.modules
assert mha_jax.nnx.MultiHeadAttention.__module__ == "mha_jax.layer.nnx"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
