"""Constraints against Keras 3.15, as functions and within its optimizer's step."""

import json
from functools import partial

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import mha_jax as mj
from mha_jax.errors import ShapeError, WeightsError
from mha_jax.layer import constraints

RNG = np.random.default_rng(0)
WEIGHTS = np.asarray(RNG.normal(size=(7, 3, 5)), np.float32)
VALUES = [
    constraints.MaxNorm(),
    constraints.MaxNorm(0.75, [0, 1]),
    constraints.MaxNorm(np.float32(1.5), None),
    constraints.NonNeg(),
    constraints.UnitNorm(),
    constraints.UnitNorm(-1),
    constraints.MinMaxNorm(),
    constraints.MinMaxNorm(0.5, 2, 0.25, 1),
]


def as_keras(function, *args):
    """Call Keras, which promotes dtypes and ranks by JAX's usual rules."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return function(*args)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize(
    "w", [WEIGHTS, 0 * WEIGHTS, 1e-6 * WEIGHTS, WEIGHTS[:, :, :0]], ids=np.shape
)
def test_the_weight_is_that_of_keras(value, w):
    theirs = as_keras(keras.constraints.get(constraints.serialize(value)), jnp.asarray(w))
    np.testing.assert_allclose(value(w), theirs, rtol=3e-7)
    np.testing.assert_allclose(jax.jit(value)(w), theirs, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_half_precision_is_the_float32_result_rounded(value, dtype):
    w = jnp.asarray(WEIGHTS, dtype)
    expected = value(w.astype(jnp.float32)).astype(dtype)
    assert value(w).dtype == dtype
    np.testing.assert_array_equal(value(w), expected)


def keras_layer(kernel, bias):
    layer = keras.layers.MultiHeadAttention(
        3, 5, value_dim=2, output_shape=(7, 2), kernel_constraint=kernel, bias_constraint=bias
    )
    layer.build((1, 2, 7), (1, 2, 11))
    return layer


def tree_of(layer, arrays):
    """Return arrays in the order of the layer's variables as our tree of parameters."""
    tree = {}
    for variable, array in zip(layer.trainable_variables, arrays, strict=True):
        tree.setdefault(variable.path.split("/")[-2], {})[variable.name] = array
    return tree


RULES = {
    "names": ("max_norm", "non_neg"),
    "kernels only": ("unit_norm", None),
    "settings": (constraints.MaxNorm(0.4, [0, 1]), constraints.MinMaxNorm(0.1, 0.3, 0.5)),
}


@pytest.mark.parametrize("rules", RULES)
def test_training_is_that_of_keras(rules):
    """The layer's weights after each of five steps of Keras's SGD, by both of our ways."""
    kernel, bias = RULES[rules]
    write = constraints.serialize
    layer = as_keras(keras_layer, write(kernel), write(bias))
    start = [RNG.normal(size=v.shape).astype(np.float32) for v in layer.trainable_variables]
    as_keras(layer.set_weights, start)
    assert {v.name for v in layer.trainable_variables} == {"kernel", "bias"}

    keras_sgd = keras.optimizers.SGD(0.3, momentum=0.8)
    plain = optax.sgd(0.3, momentum=0.8)
    chain = optax.chain(plain, constraints.as_optax(kernel=kernel, bias=bias))
    projected = chained = tree_of(layer, start)
    plain_state, chain_state = plain.init(projected), chain.init(chained)

    @jax.jit
    def step(gradients, projected, plain_state, chained, chain_state):
        updates, plain_state = plain.update(gradients, plain_state)
        projected = optax.apply_updates(projected, updates)
        projected = constraints.constrain(projected, kernel=kernel, bias=bias)
        updates, chain_state = chain.update(gradients, chain_state, chained)
        return projected, plain_state, optax.apply_updates(chained, updates), chain_state

    for _ in range(5):
        gradients = [RNG.normal(size=w.shape).astype(np.float32) for w in start]
        as_keras(keras_sgd.apply, gradients, layer.trainable_variables)
        projected, plain_state, chained, chain_state = step(
            tree_of(layer, gradients), projected, plain_state, chained, chain_state
        )
        theirs = tree_of(layer, [np.asarray(v) for v in layer.trainable_variables])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), projected, theirs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), chained, theirs)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_updates_land_on_the_constraint_up_to_one_rounding(size):
    params = {"kernel": jnp.asarray(WEIGHTS), "bias": jnp.asarray(WEIGHTS[0])}
    updates = {
        "kernel": jnp.asarray(size * RNG.normal(size=WEIGHTS.shape), jnp.float32),
        "bias": jnp.asarray(size * RNG.normal(size=WEIGHTS[0].shape), jnp.float32),
    }
    tx = constraints.as_optax(kernel="unit_norm", bias="non_neg")
    rewritten, _ = tx.update(updates, tx.init(params), params)
    landed = optax.apply_updates(params, rewritten)
    wanted = constraints.constrain(
        optax.apply_updates(params, updates), kernel="unit_norm", bias="non_neg"
    )
    one_rounding = 2 * np.spacing(np.abs(WEIGHTS).max())
    np.testing.assert_allclose(landed["kernel"], wanted["kernel"], rtol=0, atol=one_rounding)
    np.testing.assert_allclose(landed["bias"], wanted["bias"], rtol=3e-7, atol=one_rounding)
    assert bool((landed["bias"] >= 0).all())


def test_updates_without_a_rule_keep_their_bits():
    params = {"kernel": jnp.full(3, 1e8), "bias": jnp.full(3, 1e8), "scale": jnp.full(3, 1e8)}
    updates = jax.tree.map(lambda x: jnp.full(3, 0.1), params)
    tx = constraints.as_optax(kernel="non_neg")
    rewritten, _ = tx.update(updates, tx.init(params), params)
    assert rewritten["bias"].tolist() == updates["bias"].tolist() == rewritten["scale"].tolist()


def test_only_kernels_and_biases_change_at_any_depth():
    leaf = jnp.asarray([-1.0, 2.0])
    params = {"a": {"kernel": leaf, "bias": leaf}, "b": {"c": {"kernel": leaf}}, "scale": leaf}
    done = constraints.constrain(params, kernel="non_neg")
    assert done["a"]["kernel"].tolist() == done["b"]["c"]["kernel"].tolist() == [0.0, 2.0]
    assert done["a"]["bias"] is leaf and done["scale"] is leaf
    both = constraints.constrain(params, kernel="non_neg", bias=lambda w: -w)
    assert both["a"]["bias"].tolist() == [1.0, -2.0]
    assert constraints.constrain(leaf, kernel="non_neg") is leaf


def test_frozen_dicts_and_boxes_are_trees_too():
    box = nn.Partitioned(jnp.asarray([-1.0, 2.0]), ("embed",))
    params = flax.core.freeze({"query": {"kernel": box}})
    done = constraints.constrain(params, kernel="non_neg")
    assert isinstance(done, flax.core.FrozenDict)
    assert isinstance(done["query"]["kernel"], nn.Partitioned)
    assert done["query"]["kernel"].value.tolist() == [0.0, 2.0]


def test_masked_for_one_layer_of_a_model():
    params = {name: {"kernel": jnp.asarray([1.0, 1.0])} for name in ("attention", "dense")}
    mask = {"attention": True, "dense": False}
    tx = optax.chain(optax.sgd(1.0), optax.masked(constraints.as_optax(kernel="non_neg"), mask))
    gradients = jax.tree.map(lambda w: 3 * w, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert new["attention"]["kernel"].tolist() == [0.0, 0.0]
    assert new["dense"]["kernel"].tolist() == [-2.0, -2.0]


def test_stacked_layers_by_vmap():
    params = {"kernel": jnp.stack([WEIGHTS, 2 * WEIGHTS])}
    done = jax.vmap(lambda p: constraints.constrain(p, kernel="unit_norm"))(params)
    expected = constraints.UnitNorm()(WEIGHTS)
    np.testing.assert_allclose(done["kernel"], [expected, expected], rtol=1e-5)
    abstract = jax.eval_shape(lambda p: constraints.constrain(p, kernel="unit_norm"), params)
    assert abstract["kernel"].shape == (2, 7, 3, 5)


@pytest.mark.parametrize(
    "name",
    [
        "max_norm",
        "non_neg",
        "unit_norm",
        "min_max_norm",
        "MaxNorm",
        "NonNeg",
        "UnitNorm",
        "MinMaxNorm",
    ],
)
def test_names_and_configs_are_those_of_keras(name):
    theirs = keras.constraints.get(name)
    config = keras.constraints.serialize(theirs)
    ours = constraints.get(name)
    assert constraints.serialize(ours) == config
    assert (
        ours == constraints.get(config) == constraints.get(theirs) == constraints.get(type(theirs))
    )


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_round_trip_through_json(value):
    config = json.loads(json.dumps(constraints.serialize(value)))
    assert constraints.get(config) == value == constraints.get(value)
    assert constraints.get(keras.constraints.get(config)) == value
    assert hash(constraints.get(config)) == hash(value)


def test_none_and_functions_return_as_they_are():
    assert constraints.get(None) is None and constraints.serialize(None) is None
    assert constraints.get(jnp.abs) is jnp.abs


KERNEL = {"kernel": WEIGHTS}


def constrained_step(params, **rules):
    return constraints.as_optax(**rules).update(params, optax.EmptyState(), params)


WRONG = {
    "unknown name": (lambda: constraints.get("maxnorm"), "'maxnorm'. Did you mean 'max_norm'?"),
    "no constraint": (lambda: constraints.get(2), "2 is not a constraint"),
    "class of one's own": (
        lambda: constraints.get({"class_name": "NonNeg", "registered_name": "my>NonNeg"}),
        "unknown constraint 'my>NonNeg'",
    ),
    "negative": (
        lambda: constraints.MaxNorm(-1),
        "MaxNorm got max_value=-1. Expected a number from",
    ),
    "rate": (lambda: constraints.MinMaxNorm(rate=1.5), "rate=1.5. Expected a number from 0 to 1"),
    "order": (lambda: constraints.MinMaxNorm(2, 1), "min_value=2 above max_value=1"),
    "axis": (lambda: constraints.UnitNorm("rows"), "axis='rows'. Expected an integer"),
    "axis of the shape": (
        lambda: constraints.constrain(KERNEL, kernel=constraints.UnitNorm(3)),
        "UnitNorm(axis=3) has an axis that a weight of shape (7, 3, 5) has not",
    ),
    "shape": (
        lambda: constraints.constrain(KERNEL, kernel=lambda w: w.sum(0)),
        "kernel of shape (7, 3, 5) into shape (3, 5)",
    ),
    "no parameters": (
        lambda: constraints.as_optax(kernel="non_neg").update(KERNEL, optax.EmptyState()),
        "as_optax needs the parameters, got none",
    ),
    "flattened": (
        lambda: constrained_step({"query/kernel": WEIGHTS}, kernel="non_neg"),
        "constrains nothing: no parameter has the key 'kernel', the first is at ['query/kernel']",
    ),
    "no names": (
        lambda: constrained_step((WEIGHTS,), bias="non_neg"),
        "constrains nothing: no parameter has the key 'bias', the first is at [0]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_explained(case):
    call, message = WRONG[case]
    with pytest.raises(ShapeError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_name": "NonNeg", "config": {"axis": 1}}, "is not the config of a constraint:"),
        ({"name": "NonNeg"}, "is not the config of a constraint: 'class_name'"),
    ],
)
def test_wrong_configs_are_explained(config, message):
    with pytest.raises(WeightsError) as error:
        constraints.get(config)
    assert message in str(error.value)


def test_a_function_cannot_be_written():
    with pytest.raises(WeightsError, match="is a plain function and cannot be written to a config"):
        constraints.serialize(jnp.abs)


def test_the_base_class_has_no_rule():
    with pytest.raises(NotImplementedError, match="Constraint is no constraint by itself"):
        constraints.Constraint()(WEIGHTS)


def test_stacked_layers_are_constrained_each_by_itself():
    x = jnp.ones((2, 5, 7))
    keys = jax.random.split(jax.random.key(0), 3)
    draw = partial(mj.init_params, query=x, value=x, num_heads=2, key_dim=3, use_gate=True)
    draw = partial(draw, bias_initializer="random_normal")
    layers = [draw(key) for key in keys]
    for rule in (
        "unit_norm",
        {"class_name": "MaxNorm", "config": {"max_value": 0.3, "axis": [0, 1]}},
    ):
        each = [constraints.constrain(layer, kernel=rule) for layer in layers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        boxed = jax.tree.map(lambda a: nn.Partitioned(a, (None,) * a.ndim), stacked)
        got = constraints.constrain({"block": stacked}, kernel=rule)["block"]
        unboxed = nn.meta.unbox(constraints.constrain({"block": boxed}, kernel=rule)["block"])
        jax.tree.map(np.testing.assert_array_equal, unboxed, got)
        want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, want)
