"""Regularizers against Keras 3.15 and against their definitions."""

import json

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from mha_jax.errors import ShapeError, WeightsError
from mha_jax.layer import regularizers

WEIGHTS = np.asarray(np.random.default_rng(0).normal(size=(7, 3, 5)), np.float32)
BIAS = WEIGHTS[0]
VALUES = [
    regularizers.L1(),
    regularizers.L1(0.3),
    regularizers.L2(),
    regularizers.L2(np.float32(0.25)),
    regularizers.L1L2(),
    regularizers.L1L2(0.5, 2),
    regularizers.OrthogonalRegularizer(),
    regularizers.OrthogonalRegularizer(0.7, "columns"),
]


def keras_penalty(config, x):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return np.asarray(keras.regularizers.get(config)(jnp.asarray(x)))


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_the_penalty_is_that_of_keras(value):
    x = BIAS if isinstance(value, regularizers.OrthogonalRegularizer) else WEIGHTS
    theirs = keras_penalty(regularizers.serialize(value), x)
    np.testing.assert_allclose(value(x), theirs, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(value)(x), theirs, rtol=1e-6)
    assert value(x).shape == () and value(x).dtype == jnp.float32


@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_the_penalty_of_a_matrix_by_hand(mode):
    x = BIAS.astype(np.float64)
    vectors = x if mode == "rows" else x.T
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [abs(vectors[i] @ vectors[j]) for i in range(len(vectors)) for j in range(i)]
    ours = regularizers.OrthogonalRegularizer(2.0, mode)(BIAS)
    np.testing.assert_allclose(ours, 2 * np.mean(pairs), rtol=1e-6)


def test_gradients_are_those_of_keras():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = jax.grad(keras.regularizers.OrthogonalRegularizer(0.5))(jnp.asarray(BIAS))
    ours = jax.grad(regularizers.OrthogonalRegularizer(0.5))(BIAS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.grad(regularizers.L2(0.5))(BIAS), BIAS, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (3, 5)])
def test_no_nan_where_keras_has_one(shape):
    """A single row has no pairs; a bias of zeros, every bias at the start, has no direction."""
    value, grad = jax.value_and_grad(regularizers.OrthogonalRegularizer())(jnp.zeros(shape))
    assert value == 0 and not grad.any()
    value = regularizers.OrthogonalRegularizer()(jnp.ones((1, 5)))
    assert value == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    x = jnp.ones(4099, dtype)
    assert regularizers.L1(1)(x) == regularizers.L2(1)(x) == 4099
    assert regularizers.L1(1)(x).dtype == jnp.float32


def test_under_vmap_and_eval_shape():
    stacked = jnp.stack([WEIGHTS, 2 * WEIGHTS])
    values = jax.vmap(regularizers.L1L2(0.1, 0.2))(stacked)
    one = regularizers.L1L2(0.1, 0.2)
    np.testing.assert_allclose(values, [one(WEIGHTS), one(2 * WEIGHTS)], rtol=1e-6)
    assert jax.eval_shape(one, WEIGHTS).shape == ()


@pytest.mark.parametrize(
    "name",
    ["l1", "l2", "l1l2", "L1", "L2", "L1L2", "OrthogonalRegularizer", "orthogonal_regularizer"],
)
def test_names_and_configs_are_those_of_keras(name):
    theirs = keras.regularizers.get(name)
    ours = regularizers.get(name)
    config = keras.regularizers.serialize(theirs)
    written = regularizers.serialize(ours)
    assert {**written, "config": None} == {**config, "config": None}
    assert written["config"].keys() == config["config"].keys()
    x = BIAS if "rthogonal" in name else WEIGHTS
    for read in (
        regularizers.get(config),
        regularizers.get(theirs),
        regularizers.get(type(theirs)),
    ):
        assert type(read) is type(ours)
        np.testing.assert_allclose(read(x), ours(x), rtol=1e-6)


def test_l1_l2_is_what_keras_documents():
    assert regularizers.get("l1_l2") == regularizers.L1L2(0.01, 0.01)
    assert regularizers.get("L1L2") == regularizers.L1L2(0.0, 0.0)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_round_trip_through_json(value):
    config = json.loads(json.dumps(regularizers.serialize(value)))
    assert regularizers.get(config) == value == regularizers.get(value)
    x = BIAS if isinstance(value, regularizers.OrthogonalRegularizer) else WEIGHTS
    theirs = regularizers.get(keras.regularizers.get(config))
    np.testing.assert_allclose(theirs(x), value(x), rtol=1e-6)


def test_none_and_functions_return_as_they_are():
    assert regularizers.get(None) is None and regularizers.serialize(None) is None
    assert regularizers.get(jnp.sum) is jnp.sum


WRONG = {
    "unknown name": (lambda: regularizers.get("L3"), "unknown regularizer 'L3'. Did you mean 'L"),
    "near name": (lambda: regularizers.get("orthogonal"), "mean 'orthogonal_regularizer'"),
    "no regularizer": (lambda: regularizers.get(0.01), "0.01 is not a regularizer"),
    "class of one's own": (
        lambda: regularizers.get({"class_name": "L2", "registered_name": "my>L2"}),
        "unknown regularizer 'my>L2'",
    ),
    "negative": (lambda: regularizers.L2(-0.1), "L2 got l2=-0.1. Expected a finite number of at"),
    "infinite": (lambda: regularizers.L1(float("inf")), "L1 got l1=inf. Expected"),
    "text": (lambda: regularizers.L1L2("a"), "L1L2 got l1='a'. Expected"),
    "factor": (lambda: regularizers.OrthogonalRegularizer(-1), "factor=-1. Expected"),
    "mode": (lambda: regularizers.OrthogonalRegularizer(mode="both"), "'rows' or 'columns'"),
    "rank": (lambda: regularizers.OrthogonalRegularizer()(WEIGHTS), "rank 2, got shape (7, 3, 5)"),
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
        ({"class_name": "L2", "config": {"l3": 1}}, "unexpected keyword argument 'l3'"),
        ({"name": "L2"}, "is not the config of a regularizer: 'class_name'"),
    ],
)
def test_wrong_configs_are_explained(config, message):
    with pytest.raises(WeightsError) as error:
        regularizers.get(config)
    assert message in str(error.value)


def test_a_function_cannot_be_written():
    with pytest.raises(WeightsError, match="is a plain function and cannot be written to a config"):
        regularizers.serialize(jnp.sum)


def test_the_base_class_has_no_penalty():
    with pytest.raises(NotImplementedError, match="Regularizer is no regularizer by itself"):
        regularizers.Regularizer()(WEIGHTS)
