"""Initial scale: that of Keras 3.15, whose fans are those of the flattened matrix; drawn independently."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj

D_Q, D_V, D_K, N, H, V = 48, 64, 80, 6, 40, 24
QUERY, VALUE, KEY = (jax.ShapeDtypeStruct((1, 2, d), jnp.float32) for d in (D_Q, D_V, D_K))
OUTPUTS = {"default": None, "int": 96, "tuple": (8, 14), "long_tuple": (3, 5, 7)}


def fans(output_shape):
    """Return (fan in, fan out) of every kernel, as Keras 3.15 counts them."""
    features = math.prod(
        output_shape if isinstance(output_shape, tuple) else (output_shape or D_Q,)
    )
    return {
        "query": (D_Q, N * H),
        "key": (D_K, N * H),
        "value": (D_V, N * V),
        "gate": (D_Q, N * V),
        "attention_output": (N * V, features),
    }


def sampled(output_shape, **options):
    """Return many draws of every kernel."""
    layer = mj.MultiHeadAttention(
        num_heads=N, key_dim=H, value_dim=V, output_shape=output_shape, use_gate=True, **options
    )
    inputs = [jnp.zeros(s.shape) for s in (QUERY, VALUE, KEY)]
    draws = jax.vmap(lambda key: layer.init(key, *inputs))(jax.random.split(jax.random.key(0), 8))
    return draws["params"]


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_default_is_glorot_uniform_of_the_matrix(output):
    params = sampled(OUTPUTS[output])
    for name, (fan_in, fan_out) in fans(OUTPUTS[output]).items():
        kernel = np.asarray(params[name]["kernel"], np.float64)
        limit = math.sqrt(6 / (fan_in + fan_out))
        assert kernel.std() == pytest.approx(limit / math.sqrt(3), rel=0.01), name
        assert np.abs(kernel).max() == pytest.approx(limit, rel=0.01), name
        assert abs(kernel.mean()) < 5 * limit / math.sqrt(3 * kernel.size), name
        np.testing.assert_array_equal(params[name]["bias"], 0)


@pytest.mark.parametrize(
    "initializer, variance",
    [
        ("he_normal", lambda fan_in, fan_out: 2 / fan_in),
        ("lecun_uniform", lambda fan_in, fan_out: 1 / fan_in),
        ("glorot_normal", lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        (jax.nn.initializers.he_uniform(), lambda fan_in, fan_out: 2 / fan_in),
    ],
    ids=["he_normal", "lecun_uniform", "glorot_normal", "jax_he_uniform"],
)
def test_other_initializers_count_the_same_fans(initializer, variance):
    params = sampled((8, 14), kernel_initializer=initializer)
    for name, own in fans((8, 14)).items():
        std = float(np.std(params[name]["kernel"]))
        assert std == pytest.approx(math.sqrt(variance(*own)), rel=0.01), name


def test_the_numbers_of_keras_315():
    """D = 64, 8 heads of 16: Keras 3.15.1 draws query kernels of standard deviation 0.102."""
    layer = mj.MultiHeadAttention(num_heads=8, key_dim=16)
    x = jnp.zeros((1, 2, 64))
    params = jax.vmap(lambda k: layer.init(k, x, x))(jax.random.split(jax.random.key(0), 8))[
        "params"
    ]
    for name in params:
        assert float(params[name]["kernel"].std()) == pytest.approx(0.1021, rel=0.01)


@pytest.mark.parametrize(
    "initializer", ["glorot_uniform", {"class_name": "GlorotUniform", "config": {"seed": 7}}]
)
def test_query_key_and_value_are_independent(initializer):
    """Even where Keras, given one seed, draws the same kernel three times."""
    layer = mj.MultiHeadAttention(
        num_heads=8, key_dim=16, use_gate=True, kernel_initializer=initializer
    )
    x = jnp.zeros((1, 2, 64))
    params = layer.init(jax.random.key(0), x, x)["params"]
    flat = [np.ravel(params[name]["kernel"]) for name in ("query", "key", "value", "gate")]
    flat = np.array([f / f.std() for f in flat])
    z = flat @ flat.T / math.sqrt(flat.shape[1])
    assert np.abs(z[np.triu_indices(4, 1)]).max() < 5
    assert len({tuple(f[:4]) for f in flat}) == 4


def test_heads_are_independent():
    layer = mj.MultiHeadAttention(num_heads=16, key_dim=16)
    x = jnp.zeros((1, 2, 64))
    kernel = np.asarray(layer.init(jax.random.key(0), x, x)["params"]["query"]["kernel"])
    heads = kernel.transpose(1, 0, 2).reshape(16, -1) / kernel.std()
    z = heads @ heads.T / math.sqrt(heads.shape[1])
    assert np.abs(z[np.triu_indices(16, 1)]).max() < 5
