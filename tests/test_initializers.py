"""Initializers against Keras 3.15 and against their definitions."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from mha_jax.errors import ShapeError, WeightsError
from mha_jax.layer import initializers

NAMES = [
    "zeros",
    "ones",
    "constant",
    "identity",
    "orthogonal",
    "random_normal",
    "truncated_normal",
    "random_uniform",
    "variance_scaling",
    "glorot_uniform",
    "glorot_normal",
    "lecun_uniform",
    "lecun_normal",
    "he_uniform",
    "he_normal",
]
CAMEL_CASE = [name.title().replace("_", "") for name in NAMES]
# Kernels of a layer whose query, key and value heads are large enough for a standard deviation
# within 1 %: name, shape, input axes, and the equation by which Keras uses it.
KERNELS = {
    "query": ((61, 11, 67), 1, "abc,cde->abde"),
    "value": ((127, 7, 43), 1, "abc,cde->abde"),
    "output": ((11, 67, 59), 2, "abcd,cde->abe"),
    "output of rank 4": ((7, 29, 13, 17), 2, "abcd,cdef->abef"),
}
SCALED = ["glorot_normal", "he_uniform", "he_normal", "lecun_uniform"]
SCALED += ["lecun_normal", "random_normal", "truncated_normal", "random_uniform"]
# With a seed: Keras draws one where none is given, and an unlucky one is off by more than 1 %.
SCALED += [
    keras.initializers.VarianceScaling(0.7, "fan_out", "untruncated_normal", 1),
    keras.initializers.VarianceScaling(3.0, "fan_avg", "normal", 1),
    keras.initializers.VarianceScaling(
        0.5, "fan_in", "uniform", 1, input_axes=[1], output_axes=[0]
    ),
]


def keras_kernel(initializer, equation, shape, in_axes):
    """Return the kernel that Keras's EinsumDense draws for one projection."""
    inputs = (1, 1, *shape[:in_axes])
    initializer = keras.initializers.get(initializer)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        layer = keras.layers.EinsumDense(
            equation, (None, *shape[in_axes:]), kernel_initializer=initializer
        )
        layer.build(inputs)
        return np.asarray(layer.kernel)


def check_scale(initializer, kernel):
    shape, in_axes, equation = KERNELS[kernel]
    keras.utils.set_random_seed(1)
    theirs = keras_kernel(initializer, equation, shape, in_axes)
    key = jax.random.key(0)
    ours = np.asarray(initializers.initialize(initializer, key, shape, in_axes=in_axes))
    assert theirs.shape == ours.shape == shape
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.01)
    np.testing.assert_allclose(np.abs(ours).mean(), np.abs(theirs).mean(), rtol=0.01)
    np.testing.assert_allclose(ours.mean(), theirs.mean(), atol=6 * ours.std() / ours.size**0.5)
    if "uniform" in getattr(initializer, "distribution", initializer):  # the bound is sharper
        np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_default_scale_is_that_of_keras(kernel):
    check_scale("glorot_uniform", kernel)


@pytest.mark.parametrize("initializer", SCALED, ids=lambda i: getattr(i, "distribution", i))
def test_the_scale_is_that_of_keras(initializer):
    check_scale(initializer, "output")


@pytest.mark.parametrize("shape", [(20011,), (83, 241), (13, 37, 41)])
@pytest.mark.parametrize("initializer", ["glorot_uniform", "he_normal", "lecun_uniform"])
def test_the_scale_of_a_bias_is_that_of_keras(initializer, shape):
    keras.utils.set_random_seed(2)
    theirs = np.asarray(keras.initializers.get(initializer)(shape))
    ours = np.asarray(initializers.initialize(initializer, jax.random.key(1), shape, in_axes=0))
    assert abs(ours.std() / theirs.std() - 1) < 0.02
    assert ours.shape == shape


@pytest.mark.parametrize("kernel", ["query", "output"])
@pytest.mark.parametrize("name", ["glorot_uniform", "he_normal"])
def test_jax_initializers_see_the_matrix(name, kernel):
    shape, in_axes, _ = KERNELS[kernel]
    key = jax.random.key(2)
    function = getattr(jax.nn.initializers, name)()
    ours = initializers.initialize(name, key, shape, in_axes=in_axes)
    theirs = initializers.initialize(function, key, shape, in_axes=in_axes)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["query", "output"])
def test_unflattened_is_the_scale_of_old(kernel):
    shape, in_axes, _ = KERNELS[kernel]
    key = jax.random.key(3)
    function = jax.nn.initializers.glorot_uniform()
    for initializer in (function, "glorot_uniform"):
        old = initializers.unflattened(initializer)
        ours = initializers.initialize(old, key, shape, in_axes=in_axes)
        np.testing.assert_allclose(ours, function(key, shape, jnp.float32), rtol=1e-6)


def test_default_scale_in_numbers():
    """The measured standard deviations of Keras 3.15.1 for D=64, N=8, H=16."""
    keys = jax.random.split(jax.random.key(4), 64)
    draw = lambda key, shape, axes: initializers.initialize(  # noqa: E731
        "glorot_uniform", key, shape, jnp.float32, axes
    )
    query = jax.vmap(lambda key: draw(key, (64, 8, 16), 1))(keys)
    output = jax.vmap(lambda key: draw(key, (8, 16, 64), 2))(keys)
    expected = np.sqrt(2 / (64 + 128))
    np.testing.assert_allclose([query.std(), output.std()], [expected, expected], rtol=0.005)


@pytest.mark.parametrize(("shape", "in_axes"), [((29, 3, 5), 1), ((3, 5, 29), 2), ((7, 5, 7), 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orthogonal_and_identity_mean_the_matrix(shape, in_axes, dtype):
    rows = int(np.prod(shape[:in_axes]))
    draw = lambda i: initializers.initialize(i, jax.random.key(5), shape, dtype, in_axes)  # noqa: E731
    orthogonal, identity = draw(initializers.Orthogonal(gain=2.0)), draw("identity")
    assert orthogonal.dtype == identity.dtype == dtype
    matrix = np.asarray(orthogonal, np.float64).reshape(rows, -1)
    short = matrix if matrix.shape[0] < matrix.shape[1] else matrix.T
    tolerance = 1e-5 if dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(short @ short.T, 4 * np.eye(len(short)), atol=tolerance)
    np.testing.assert_array_equal(
        np.asarray(identity, np.float64).reshape(rows, -1), np.eye(*matrix.shape)
    )


def test_a_seed_does_not_tie_query_key_and_value():
    spec = {"class_name": "GlorotUniform", "config": {"seed": 7}}
    keys = jax.random.split(jax.random.key(6), 3)
    q, k, v = (initializers.initialize(spec, key, (5, 3, 7)) for key in keys)
    assert not np.intersect1d(q, k).size and not np.intersect1d(k, v).size
    again = initializers.initialize(spec, keys[0], (5, 3, 7))
    np.testing.assert_array_equal(q, again)
    assert initializers.serialize(spec)["config"]["seed"] == 7


@pytest.mark.parametrize("name", NAMES + CAMEL_CASE)
def test_names_and_configs_are_those_of_keras(name):
    # Keras does not take the name of Constant by itself.
    alone = name.lower() != "constant"
    theirs = keras.initializers.get(name) if alone else keras.initializers.Constant(0.0)
    config = keras.initializers.serialize(theirs)
    ours = initializers.get(name)
    assert ours == initializers.get(config) == initializers.get(theirs)
    written = initializers.serialize(ours)
    if name.lower() == "identity":
        assert written["config"] == {"gain": 1.0}  # which Keras forgets to write
    else:
        assert written == config
    assert hash(ours) == hash(initializers.get(written))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("zero", "zeros"),
        ("one", "ones"),
        ("normal", "random_normal"),
        ("uniform", "random_uniform"),
        ("IdentityInitializer", "identity"),
        ("OrthogonalInitializer", "orthogonal"),
    ],
)
def test_aliases_are_those_of_keras(alias, name):
    assert type(keras.initializers.get(alias)) is type(keras.initializers.get(name))
    assert initializers.get(alias) == initializers.get(name)


@pytest.mark.parametrize(
    "value",
    [
        initializers.Constant(3),
        initializers.Constant(np.float32(0.25)),
        initializers.Identity(2.0),
        initializers.Orthogonal(0.5, seed=3),
        initializers.RandomNormal(1.0, 0.5),
        initializers.TruncatedNormal(stddev=0.1, seed={"class_name": "SeedGenerator"}),
        initializers.RandomUniform(-1, 2.5),
        initializers.VarianceScaling(0.3, "fan_out", "untruncated_normal"),
        initializers.VarianceScaling(2.0, "fan_in", "uniform", 5, [0], (1, 2)),
        initializers.HeNormal(seed=1, input_axes=[0], output_axes=[1, 2]),
        initializers.unflattened("he_uniform"),
        initializers.unflattened(initializers.unflattened(initializers.Orthogonal(3.0))),
    ],
    ids=repr,
)
def test_round_trip_through_json(value):
    text = json.dumps(initializers.serialize(value))
    assert initializers.get(json.loads(text)) == value
    if not isinstance(value, initializers.Unflattened) and "SeedGenerator" not in text:
        theirs = keras.initializers.get(json.loads(text))
        read = initializers.get(theirs)
        if isinstance(value, initializers.Identity):  # its gain is not in the config Keras writes
            assert (type(read), theirs.gain) == (type(value), value.gain)
        else:
            assert read == value


def test_a_keras_seed_generator_survives():
    theirs = keras.initializers.HeNormal(seed=keras.random.SeedGenerator(3))
    ours = initializers.get(theirs)
    assert initializers.serialize(ours) == keras.initializers.serialize(theirs)
    assert hash(ours) == hash(initializers.get(initializers.serialize(ours)))
    again = keras.initializers.get(initializers.serialize(ours))
    assert again.get_config()["seed"]["config"]["seed"] == 3


def test_classes_and_presets_stand_for_their_defaults():
    assert initializers.get(initializers.RandomNormal) == initializers.RandomNormal()
    assert initializers.get(initializers.HeNormal) == initializers.get("he_normal")
    assert initializers.get(keras.initializers.LecunNormal) == initializers.get("lecun_normal")


def test_one_axes_list_counts_for_nothing_as_in_keras():
    half = initializers.GlorotUniform(input_axes=[1])
    np.testing.assert_array_equal(
        initializers.initialize(half, jax.random.key(0), (5, 3, 7)),
        initializers.initialize("glorot_uniform", jax.random.key(0), (5, 3, 7)),
    )


@pytest.mark.parametrize("name", NAMES)
def test_under_jit_vmap_and_eval_shape(name):
    shape, key = (7, 3, 5), jax.random.key(8)

    def draw(key):
        return initializers.initialize(name, key, shape, jnp.float32, 2)

    np.testing.assert_allclose(jax.jit(draw)(key), draw(key), atol=1e-6)
    abstract = jax.eval_shape(jax.vmap(draw), jax.random.split(key, 2))
    assert (abstract.shape, abstract.dtype) == ((2, *shape), jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_that_dtype(name):
    drawn = initializers.initialize(name, jax.random.key(9), (7, 3, 5), jnp.float16)
    assert drawn.dtype == jnp.float16 and bool(jnp.isfinite(drawn).all())


def test_a_box_is_kept_around_its_array():
    boxed = nn.with_partitioning(jax.nn.initializers.lecun_normal(), ("embed", "heads", "kv"))
    drawn = initializers.initialize(boxed, jax.random.key(0), (7, 3, 5))
    assert isinstance(drawn, nn.Partitioned)
    assert drawn.names == ("embed", "heads", "kv") and drawn.value.shape == (7, 3, 5)


def test_a_numpy_function_will_do():
    drawn = initializers.initialize(lambda key, shape, dtype: np.ones(shape), None, (3, 2, 5))
    assert isinstance(drawn, jax.Array) and drawn.dtype == jnp.float32 and drawn.shape == (3, 2, 5)


def _draw(initializer, shape=(7, 3, 5), in_axes=1):
    return initializers.initialize(initializer, jax.random.key(0), shape, jnp.float32, in_axes)


WRONG = {
    "unknown name": (lambda: initializers.get("glorot_unifrom"), "mean 'glorot_uniform'"),
    "no such name by itself": (lambda: initializers.get("orthogonal_"), "mean 'orthogonal'"),
    "wrong case": (
        lambda: initializers.get("Xavier"),
        "unknown initializer 'Xavier'. Did you mean",
    ),
    "no initializer": (lambda: initializers.get(0.5), "0.5 is not an initializer"),
    "none": (lambda: initializers.get(None), "None is not an initializer"),
    "array": (lambda: initializers.get(np.ones(3)), "is not an initializer"),
    "Keras function": (lambda: initializers.get(lambda shape, dtype=None: 0), "take no key"),
    "Keras class of one's own": (
        lambda: initializers.get({"class_name": "Zeros", "registered_name": "my>Zeros"}),
        "unknown initializer 'my>Zeros'",
    ),
    "factory": (lambda: _draw(jax.nn.initializers.he_normal), "must be called first"),
    "wrong shape": (lambda: _draw(lambda k, s, d: jnp.ones((7, 3, 5))), "of shape (7, 15)"),
    "scale": (lambda: initializers.VarianceScaling(0), "scale=0. Expected a finite number above 0"),
    "mode": (lambda: initializers.VarianceScaling(1.0, "fan"), "mode='fan'. Expected one of"),
    "distribution": (
        lambda: initializers.VarianceScaling(1.0, "fan_in", "cauchy"),
        "distribution='cauchy'. Expected one of",
    ),
    "stddev": (lambda: initializers.RandomNormal(0.0, -1.0), "stddev=-1.0. Expected"),
    "gain": (lambda: initializers.Orthogonal("big"), "gain='big'. Expected a finite number"),
    "infinite": (lambda: initializers.Constant(float("inf")), "value=inf. Expected a finite"),
    "seed": (lambda: initializers.HeNormal(seed=1.5), "seed=1.5. Expected None, an integer"),
    "axes": (lambda: initializers.HeNormal(input_axes=1), "input_axes=1. Expected None or a list"),
    "axes of the shape": (
        lambda: _draw(initializers.HeNormal(input_axes=[3], output_axes=[0])),
        "do not fit shape (7, 3, 5)",
    ),
    "in_axes": (lambda: _draw("zeros", in_axes=4), "in_axes=4 does not fit shape (7, 3, 5)"),
    "identity bias": (lambda: _draw("identity", (7,), 0), "Identity cannot draw shape (7,)"),
    "orthogonal bias": (lambda: _draw("orthogonal", (7,), 0), "Orthogonal cannot draw shape (7,)"),
}
WRONG_CONFIGS = {
    "setting": ({"class_name": "HeNormal", "config": {"gain": 1}}, "argument 'gain'"),
    "fixed setting": ({"class_name": "HeNormal", "config": {"scale": 1}}, "'scale'"),
    "unflattened what": ("unflattened", "argument: 'initializer'"),
    "no class_name": ({"name": "HeNormal"}, "is not the config of an initializer: 'class_name'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_explained(case):
    call, message = WRONG[case]
    with pytest.raises(ShapeError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configs_are_explained(case):
    config, message = WRONG_CONFIGS[case]
    with pytest.raises(WeightsError) as error:
        initializers.get(config)
    assert message in str(error.value)


@pytest.mark.parametrize("wrap", [lambda f: f, initializers.unflattened])
def test_a_function_cannot_be_written(wrap):
    with pytest.raises(WeightsError, match="is a plain function and cannot be written to a config"):
        initializers.serialize(wrap(jax.nn.initializers.he_normal()))


def test_the_base_class_draws_nothing():
    with pytest.raises(NotImplementedError, match="Initializer is no initializer by itself"):
        initializers.Initializer()(jax.random.key(0), (3,))
