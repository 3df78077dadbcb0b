"""Keras's layers and ours, both ways and from files."""

import json
import subprocess
import sys
import zipfile

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from mha_jax import MultiHeadAttention
from mha_jax.errors import MissingPackageError, ShapeError, WeightsError
from mha_jax.interop import keras as interop
from tests import keras_peer
from tests.drawn import draw_variables

B, T, S, D, D2 = 2, 5, 7, 11, 3
QUERY, VALUE = (B, T, D), (B, S, D2)
EVERYTHING = {
    "value_dim": 5,
    "dropout": 0.25,
    "output_shape": (3, 2),
    "attention_axes": -2,
    "sliding_window": 4,
    "kernel_initializer": keras.initializers.RandomNormal(stddev=0.2, seed=3),
    "bias_initializer": "ones",
    "kernel_regularizer": keras.regularizers.L1L2(0.1, 0.2),
    "bias_regularizer": "l2",
    "activity_regularizer": "l1",
    "kernel_constraint": keras.constraints.MaxNorm(0.7, axis=[0, 1]),
    "bias_constraint": "non_neg",
    "use_gate": True,
    "seed": 9,
    "name": "attention",
}


@pytest.fixture(autouse=True)
def _lenient():
    with keras_peer.lenient():
        yield


def plain(arguments=None, grouped=False, key=None, **more):
    """Return a Keras layer with random weights."""
    arguments = arguments or (
        {"head_dim": 3, "num_query_heads": 4, "num_key_value_heads": 2}
        if grouped
        else {"num_heads": 2, "key_dim": 3}
    )
    query, value = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (QUERY, VALUE))
    key = None if key is None else jax.ShapeDtypeStruct((B, S, key), jnp.float32)
    return keras_peer.build(grouped, arguments | more, query, value, key)


def assert_same(layer, params):
    """Raise unless the weights are those of the Keras layer, bit for bit."""
    theirs = {
        (name, part): np.asarray(variable.value)
        for variable in layer.trainable_variables
        for name, part in [variable.path.split("/")[-2:]]
    }
    ours = {(n, p): np.asarray(x) for n, group in params.items() for p, x in group.items()}
    assert set(theirs) == set(ours)
    for name, weight in theirs.items():
        assert weight.dtype == ours[name].dtype and weight.shape == ours[name].shape, name
        assert weight.tobytes() == ours[name].tobytes(), name


def model(path, *layers):
    """Save a functional model that calls the layers one after the other, and return it."""
    x = keras.Input((T, D))
    y = x
    for layer in layers:
        y = layer(y, y) if "Attention" in type(layer).__name__ else layer(y)
    result = keras.Model(x, y)
    for variable in result.trainable_variables:
        variable.assign(np.random.default_rng(0).standard_normal(variable.shape))
    result.save(path) if path.suffix == ".keras" else result.save_weights(path)
    return result


@pytest.mark.parametrize(
    "grouped, more",
    [
        (False, {}),
        (False, EVERYTHING),
        (False, {"use_bias": False}),
        (False, {"dtype": "mixed_bfloat16"}),
        (False, {"dtype": "bfloat16"}),
        (True, {}),
        (
            True,
            {"use_gate": True, "use_bias": False, "sliding_window": 2, "dropout": 0.1, "seed": 4},
        ),
    ],
)
def test_there_and_back(grouped, more):
    layer = plain(grouped=grouped, key=13, **more)
    module, variables = interop.import_layer(layer)
    assert_same(layer, variables["params"])
    back = interop.export_layer(module, variables, QUERY, VALUE, (B, S, 13))
    assert type(back) is type(layer) and back.get_config() == layer.get_config()
    assert_same(back, variables["params"])
    again, _ = interop.import_layer(back)
    assert again == module


def test_every_argument_arrives():
    module, _ = interop.import_layer(plain(**EVERYTHING))
    config, own = module.get_config(), {"attention_axes": [1], "output_shape": [3, 2]}
    for name in ("value_dim", "dropout", "sliding_window", "use_gate", "seed", "name"):
        assert config[name] == EVERYTHING[name], name
    assert {name: config[name] for name in own} == own
    assert config["kernel_initializer"]["config"] == {"mean": 0.0, "stddev": 0.2, "seed": 3}
    assert config["kernel_regularizer"]["config"] == pytest.approx({"l1": 0.1, "l2": 0.2})
    assert config["kernel_constraint"]["config"] == {"max_value": 0.7, "axis": [0, 1]}
    assert config["activity_regularizer"]["class_name"] == "L1"
    assert config["dtype"] == config["param_dtype"] == "float32"


@pytest.mark.parametrize("axes, resolved", [(None, (1, 2)), (-2, (2,)), ((-2, 1), (2, 1))])
def test_axes_are_as_keras_resolved_them(axes, resolved):
    layer = keras.layers.MultiHeadAttention(2, 3, attention_axes=axes)
    layer.build((B, T, S, D), (B, T, S, D))
    module, _ = interop.import_layer(layer)
    assert module.attention_axes == resolved


def test_functions_arrive_as_they_are():
    def penalty(x):
        return jnp.sum(x**4)

    module, _ = interop.import_layer(plain(kernel_regularizer=penalty))
    assert module.kernel_regularizer is penalty


def test_the_policy_is_two_dtypes():
    module, variables = interop.import_layer(plain(dtype="mixed_float16"))
    assert (module.dtype, module.param_dtype) == ("float16", "float32")
    x, y = jnp.ones(QUERY), jnp.ones(VALUE)
    assert module.apply(variables, x, y).dtype == jnp.float16


def test_float64_needs_64_bit_types(x64):
    layer = plain(dtype="float64")
    assert interop.import_layer(layer)[1]["params"]["query"]["kernel"].dtype == jnp.float64
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(
        WeightsError, match=r"query kernel is float64, .* round to float32.*jax_enable_x64"
    ):
        interop.import_layer(layer)


def test_no_kv_heads_no_grouped_layer():
    module = MultiHeadAttention(2, 3, num_kv_heads=2, precision="highest", backend="reference")
    variables = draw_variables(module, np.ones(QUERY, np.float32), np.ones(VALUE, np.float32))
    layer = interop.export_layer(module, variables, (None, None, D), (None, None, D2))
    assert type(layer) is keras.layers.MultiHeadAttention and "flax" not in str(layer.get_config())
    assert_same(layer, variables["params"])


def test_a_boxed_parameter_is_unboxed():
    import flax.linen as nn

    init = nn.with_partitioning(lambda k, s, d: jnp.ones(s, d), ("embed", "heads", "size"))
    boxed = {"kernel": init(None, (D, 2, 3), jnp.float32)}
    module = MultiHeadAttention(2, 3, use_bias=False)
    variables = draw_variables(module, np.ones(QUERY, np.float32), np.ones(VALUE, np.float32))
    variables = {"params": variables["params"] | {"query": boxed}}
    layer = interop.export_layer(module, variables, QUERY, VALUE)
    np.testing.assert_array_equal(layer.query_dense.kernel, np.ones((D, 2, 3)))


class Renamed(keras.layers.MultiHeadAttention):
    """Computes what its base computes."""


class Doubled(keras.layers.MultiHeadAttention):
    def _compute_attention(self, *args, **options):
        output, scores = super()._compute_attention(*args, **options)
        return 2 * output, scores


class Reticent(keras.layers.MultiHeadAttention):
    """Has a configuration and shapes of its own, but computes what its base computes."""

    def __init__(self, *args, level=1, **options):
        super().__init__(*args, **options)
        self.level = level

    def get_config(self):
        config = {**super().get_config(), "level": self.level}
        del config["sliding_window"]
        return config

    def compute_output_shape(self, *shapes):
        return super().compute_output_shape(*shapes)


@pytest.mark.parametrize("kind", [Renamed, Reticent])
def test_a_subclass_that_computes_the_same_is_welcome(kind):
    layer = kind(2, 3, sliding_window=2)
    layer.build(QUERY, VALUE)
    module, variables = interop.import_layer(layer)
    assert_same(layer, variables["params"])
    assert module.sliding_window == 2


KINDS = {
    keras.layers.MultiHeadAttention: ("_build_attention", "_make_output_dense"),
    keras.layers.GroupQueryAttention: (),
}
SHARED = ("__call__", "call", "build", "_compute_causal_mask", "_get_common_kwargs_for_sublayer")


@pytest.mark.parametrize("base, name", [(b, n) for b, more in KINDS.items() for n in SHARED + more])
def test_methods_that_compute_are_not_replaced(base, name):
    def own(self, *args, **options):
        return getattr(base, name)(self, *args, **options)

    layer = type("Own", (base,), {name: own})(4, 2, 2)
    layer.build(QUERY, VALUE)
    with pytest.raises(WeightsError, match=f"Own is a {base.__name__} with its own {name}: "):
        interop.import_layer(layer)


class Twice(keras.layers.EinsumDense):
    def call(self, inputs):
        return 2 * super().call(inputs)


def _changes():
    twice = Twice("abc,cde->abde", (None, 2, 3))
    yield {"call": max}, "MultiHeadAttention with its own call: "
    yield {"_compute_attention": max}, "MultiHeadAttention with its own _compute_attention: "
    yield (
        {"_query_dense": twice},
        r"query projection of the layer was replaced or changed: got <Twice",
    )
    yield {"_output_dense": twice}, "attention_output projection of the layer was replaced"
    yield {"_key_dense": {"activation": keras.activations.relu}}, "key projection of the layer was"
    yield {"_value_dense": {"call": max}}, "value projection of the layer was replaced"
    yield (
        {"_softmax": max},
        "softmax of the layer was replaced or changed: got <built-in function max>",
    )


@pytest.mark.parametrize("changes, message", list(_changes()))
def test_a_layer_that_was_changed(changes, message):
    layer = plain()
    layer._tracker.unlock()
    for name, change in changes.items():
        if isinstance(change, dict):
            [(name, change)], layer_or_part = change.items(), getattr(layer, name)
            layer_or_part._tracker.unlock()
        else:
            layer_or_part = layer
        setattr(layer_or_part, name, change)
    with pytest.raises(WeightsError, match=message):
        interop.import_layer(layer)


def _imports():
    unbuilt = keras.layers.MultiHeadAttention(2, 3, name="fresh")
    doubled = Doubled(2, 3)
    doubled.build(QUERY, VALUE)
    quantized = keras.layers.MultiHeadAttention(2, 3, dtype="int8_from_float32")
    quantized.build(QUERY, VALUE)
    yield keras.layers.Dense(3), r"cannot import a keras.*\.Dense: expected a .*get_layer\(name\)"
    yield MultiHeadAttention(2, 3), r"cannot import a mha_jax\.layer\.linen\.MultiHeadAttention"
    yield keras.layers.Attention(), r"cannot import a keras.*\.Attention"
    yield unbuilt, r"'fresh' is not built and has no weights yet\. Call it once"
    yield doubled, r"the Doubled is a MultiHeadAttention with its own _compute_attention"
    yield quantized, r"is quantized \(int8\) and computes something else"


def test_refused_imports():
    for layer, message in _imports():
        with pytest.raises(WeightsError, match=message):
            interop.import_layer(layer)


def _exports():
    def variables(module):
        return draw_variables(module, np.ones(QUERY, np.float32), np.ones(VALUE, np.float32))

    fine = MultiHeadAttention(4, 3)
    grouped = {"num_heads": 4, "key_dim": 3, "num_kv_heads": 2}
    yield (
        fine,
        variables(fine),
        (B, T, 13),
        VALUE,
        r"query kernel: \(11, 4, 3\), expected \(13, 4, 3\)",
    )
    yield fine, variables(fine), QUERY, (B, S, 2), r"key kernel: \(3, 4, 3\), expected \(2, 4, 3\)"
    yield fine, variables(fine)["params"], QUERY, VALUE, r'must be \{"params": \.\.\.\}.*\[.*query'
    broken = variables(fine)
    del broken["params"]["value"]
    yield fine, broken, QUERY, VALUE, r"value kernel: missing, expected \(3, 4, 3\)"
    bias = fine.clone(use_bias=False)
    yield bias, variables(fine), QUERY, VALUE, r"query bias: \(4, 3\), expected none"
    for more, why in (
        ({"value_dim": 5}, r"value_dim=5 differs from key_dim=3"),
        ({"output_shape": (2, 3)}, r"output_shape=\(2, 3\) is not the width of the query"),
        ({"attention_axes": 0}, r"attention_axes=\(0,\) are not axis 1"),
    ):
        module = MultiHeadAttention(**grouped, **more)
        yield module, variables(fine), QUERY, VALUE, f"num_kv_heads=2 of 4 heads for this: {why}"
    module = MultiHeadAttention(**grouped)
    yield module, variables(module), (B, 2, T, D), (B, 2, T, D2), r"has not three axes"
    mixed = MultiHeadAttention(4, 3, dtype="float32", param_dtype="bfloat16")
    yield (
        mixed,
        variables(mixed),
        QUERY,
        VALUE,
        r"no dtype policy for dtype=float32 and param_dtype=bf",
    )
    half = bias.clone(param_dtype="bfloat16")
    yield half, variables(bias), QUERY, VALUE, r"kernel is float32 and would be rounded .*bfloat16"
    own = MultiHeadAttention(4, 3, kernel_initializer=lambda k, s, d: jnp.ones(s, d))
    yield own, variables(own), QUERY, VALUE, r"is a plain function and cannot be written"
    eye = MultiHeadAttention(4, 3, kernel_initializer="identity")
    yield eye, variables(fine), QUERY, VALUE, r"Keras cannot build MultiHeadAttention .*2D"


def test_refused_exports():
    for module, variables, query, value, message in _exports():
        with pytest.raises(WeightsError, match=message):
            interop.export_layer(module, variables, query, value)


SHAPES = [16, (), (D,), "abc", (B, T, float(D)), (B, T, None), (B, -1, D), (B, "T", D), None]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
@pytest.mark.parametrize("name", ["query", "value", "key"])
def test_shapes_that_are_none_of_an_input(name, shape):
    module = MultiHeadAttention(2, 3)
    variables = draw_variables(module, np.ones(QUERY, np.float32), np.ones(QUERY, np.float32))
    shapes = {f"{x}_shape": QUERY for x in ("query", "value", "key")} | {f"{name}_shape": shape}
    if name == "key" and shape is None:
        assert_same(interop.export_layer(module, variables, **shapes), variables["params"])
        return
    with pytest.raises(ShapeError, match=rf"{name}_shape must be the sizes of an input.*got"):
        interop.export_layer(module, variables, **shapes)


def test_exports_of_no_module_or_of_shapes_alone():
    x = jnp.ones(QUERY)
    module = MultiHeadAttention(2, 3)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, x)
    with pytest.raises(WeightsError, match=r"is a ShapeDtypeStruct, expected floating-point"):
        interop.export_layer(module, shapes, QUERY, QUERY)
    with pytest.raises(
        ShapeError, match=r"module must be of class MultiHeadAttention: got NoneType"
    ):
        interop.export_layer(None, shapes, QUERY, QUERY)


def test_inputs_without_a_batch():
    module, x = MultiHeadAttention(2, 3, attention_axes=-2), jnp.ones((T, D))
    variables = draw_variables(module, x, x)
    layer = interop.export_layer(module, variables, x.shape, x.shape)
    np.testing.assert_allclose(layer(x, x), module.apply(variables, x, x), atol=1e-6)


def test_a_grouped_layer_may_say_its_output_shape():
    module = MultiHeadAttention(
        4, 3, num_kv_heads=2, output_shape=D, attention_axes=-2, value_dim=3
    )
    variables = draw_variables(module, np.ones(QUERY, np.float32), np.ones(VALUE, np.float32))
    assert_same(interop.export_layer(module, variables, QUERY, VALUE), variables["params"])


def test_a_file_with_several_layers(tmp_path):
    first = keras.layers.MultiHeadAttention(2, 3, sliding_window=4, use_gate=True, name="first")
    second = keras.layers.GroupQueryAttention(3, 4, 2, use_bias=False, name="second")
    inner = keras.Sequential([keras.Input((T, D)), keras.layers.Dense(D)], name="inner")
    path = tmp_path / "model.keras"
    model(path, first, inner, second)
    for layer in (first, second):
        module, variables = interop.load(path, layer.name)
        assert_same(layer, variables["params"])
        assert module == interop.import_layer(layer)[0]
    place = "layers/grouped_query_attention"
    assert interop.load(path, place)[0].name == "second"
    with pytest.raises(
        WeightsError, match=r"more than one attention layer: 'second' at .*'first' at"
    ):
        interop.load(path)
    with pytest.raises(
        WeightsError, match=r"no attention layer named 'third': .*Pass the name of one"
    ):
        interop.load(path, "third")


def test_weights_alone_show_sizes(tmp_path):
    layer = keras.layers.MultiHeadAttention(2, 3, value_dim=7, output_shape=(3, D), use_gate=True)
    path = tmp_path / "model.weights.h5"
    x = keras.Input((T, D))
    keras.Model(x, layer(x, x)).save_weights(path)
    module, variables = interop.load(path)
    assert_same(layer, variables["params"])
    assert (module.num_heads, module.key_dim, module.value_dim) == (2, 3, 7)
    assert module.output_shape == (3, D) and module.use_gate and module.num_kv_heads is None
    grouped = keras.layers.GroupQueryAttention(3, 4, 2, use_bias=False)
    model(path, grouped)
    module, variables = interop.load(path)
    assert_same(grouped, variables["params"])
    assert module.num_kv_heads == 2 and not module.use_bias and module.output_shape is None


def test_bfloat16_in_a_file(tmp_path):
    path = tmp_path / "model.keras"
    layer = keras.layers.MultiHeadAttention(2, 3, dtype="bfloat16")
    model(path, layer)
    module, variables = interop.load(path)
    assert_same(layer, variables["params"])
    assert jnp.dtype(module.dtype) == jnp.bfloat16


@keras.saving.register_keras_serializable()
class Block(keras.layers.Layer):
    """A class of the user's own: the file holds no arguments of the layers in it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.attention = keras.layers.MultiHeadAttention(2, 3, name="hidden")
        self.more = [keras.layers.MultiHeadAttention(2, 3, name="same") for _ in range(2)]

    def build(self, shape):
        for layer in (self.attention, *self.more):
            layer.build(shape, shape)

    def call(self, x):
        return self.attention(x, x) + self.more[0](x, x) + self.more[1](x, x)


@keras.saving.register_keras_serializable("own")
class CausalAttention(keras.layers.MultiHeadAttention):
    def call(self, query, value, key=None, **options):
        return super().call(query, value, key, use_causal_mask=True, **options)


@keras.saving.register_keras_serializable("own", "MultiHeadAttention")
class Masked(CausalAttention):
    pass


Masked.__name__ = "MultiHeadAttention"


@pytest.mark.parametrize("kind", [CausalAttention, Masked])
def test_a_layer_of_a_class_that_is_not_of_keras(tmp_path, kind):
    path = tmp_path / "model.keras"
    layer, plain = kind(2, 3, name="own"), keras.layers.MultiHeadAttention(2, 3, name="plain")
    whole = model(path, layer, plain)
    with pytest.raises(WeightsError, match=rf"'own' .*of the class '{kind.__name__}', .*clone"):
        interop.load(path, "own")
    assert interop.load(path, "plain")[0] == interop.import_layer(plain)[0]
    whole.save_weights(path := tmp_path / "model.weights.h5")
    assert_same(layer, interop.load(path, "own")[1]["params"])


def test_layers_inside_other_layers(tmp_path):
    path = tmp_path / "model.keras"
    block = Block()
    deep = keras.layers.MultiHeadAttention(2, 3, sliding_window=2, name="deep")
    x = keras.Input((T, D))
    inner = keras.Model(x, deep(x, x))
    model(path, block, keras.layers.Dense(D), inner)
    assert_same(block.attention, interop.load(path, "hidden")[1]["params"])
    module, variables = interop.load(path, "deep")
    assert_same(deep, variables["params"])
    assert module.sliding_window == 2
    with pytest.raises(
        WeightsError, match=r"2 attention layers named 'same': .*Pass the place of one"
    ):
        interop.load(path, "same")
    place = "layers/block/more/multi_head_attention_1"
    assert_same(block.more[1], interop.load(path, place)[1]["params"])


def test_files_without_names(tmp_path):
    """Keras before 3.10 wrote no names beside the weights: the place finds the configuration."""
    path, old = tmp_path / "new.keras", tmp_path / "old.keras"
    layers = [keras.layers.MultiHeadAttention(2, 3, sliding_window=i + 1) for i in range(3)]
    model(path, *layers)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        weights = tmp_path / "weights.h5"
        weights.write_bytes(source.read("model.weights.h5"))
        with h5py.File(weights, "a") as file:
            file.visititems(lambda _, item: item.attrs.pop("name", None) and None)
        target.writestr("config.json", source.read("config.json"))
        target.write(weights, "model.weights.h5")
    for layer in layers:
        module, variables = interop.load(old, layer.name)
        assert_same(layer, variables["params"])
        assert module.sliding_window == layer._sliding_window


def test_refused_files(tmp_path):
    text, archive = tmp_path / "a.keras", tmp_path / "b.keras"
    text.write_text("not a model")
    with pytest.raises(
        WeightsError, match=r"a\.keras is not a file that Keras saved: .*b'not a mo'"
    ):
        interop.load(text)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other.txt", "")
    with pytest.raises(
        WeightsError, match=r"it holds config\.json 0 times, among other\.txt\. Expected"
    ):
        interop.load(archive)
    model(path := tmp_path / "c.weights.h5", keras.layers.Dense(3))
    with pytest.raises(WeightsError, match=r"holds no attention layer: expected groups with query"):
        interop.load(path)
    with pytest.raises(FileNotFoundError):
        interop.load(tmp_path / "nothing.keras")


def test_damaged_files(tmp_path):
    path = tmp_path / "model.weights.h5"
    place = "layers/multi_head_attention"

    def damaged(change):
        model(path, keras.layers.MultiHeadAttention(2, 3, name="attention"))
        with h5py.File(path, "a") as file:
            change(file)

    def narrow(file):
        kernel = file[f"{place}/key_dense/vars/0"][()]
        del file[f"{place}/key_dense/vars/0"]
        file[f"{place}/key_dense/vars/0"] = kernel[:, :, :2]

    def integers(file):
        kernel = file[f"{place}/query_dense/vars/0"][()]
        del file[f"{place}/query_dense/vars/0"]
        file[f"{place}/query_dense/vars/0"] = kernel.astype(np.int8)

    damaged(narrow)
    with pytest.raises(WeightsError, match=r"key kernel: \(11, 2, 2\), expected \(11, 2, 3\)"):
        interop.load(path)
    damaged(lambda file: file.pop(f"{place}/key_dense/vars/0") and None)
    with pytest.raises(
        WeightsError, match=r"'attention' has no key kernel: found .*written completely"
    ):
        interop.load(path)
    damaged(lambda file: file.pop(f"{place}/query_dense/vars/0") and None)
    with pytest.raises(
        WeightsError, match=r"does not hold the kernels of an attention layer: found"
    ):
        interop.load(path)
    damaged(lambda file: file.pop(f"{place}/key_dense/vars/1") and None)
    with pytest.raises(WeightsError, match=r"key bias: missing, expected \(2, 3\)"):
        interop.load(path)
    damaged(integers)
    with pytest.raises(WeightsError, match=r"query kernel has dtype int8.*quantized"):
        interop.load(path)


def test_a_configuration_of_something_newer_is_refused(tmp_path):
    model(path := tmp_path / "model.keras", keras.layers.MultiHeadAttention(2, 3))
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    config = json.loads(parts["config.json"])
    config["config"]["layers"][1]["config"]["num_sinks"] = 4
    parts["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    with pytest.raises(WeightsError, match=r"unknown key 'num_sinks'"):
        interop.load(path)


def test_reading_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingPackageError, match=r'h5py is not .*pip install "mha_jax\[keras\]"'):
        interop.load(tmp_path / "model.keras")


def test_keras_is_not_imported(tmp_path):
    model(path := tmp_path / "model.keras", keras.layers.MultiHeadAttention(2, 3, name="attention"))
    program = f"""
import sys, mha_jax.interop.keras as interop
module, variables = interop.load({str(path)!r})
assert module.name == "attention" and "keras" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_older_keras_is_given_what_it_knows(monkeypatch):
    """Keras 3.13, as in Colab, has no windows and no gate."""

    class Older(keras.layers.MultiHeadAttention):
        def __init__(self, **arguments):
            if unknown := {"sliding_window", "use_gate"} & arguments.keys():
                raise ValueError(f"Unrecognized keyword arguments: {sorted(unknown)}")
            assert "axes" not in str(arguments["kernel_initializer"])  # of 3.15's initializers
            super().__init__(**arguments)

    monkeypatch.setattr(keras.layers, "MultiHeadAttention", Older)
    x = np.ones((1, 5, 16), np.float32)
    for arguments, message in (
        ({}, None),
        ({"sliding_window": 3}, "window"),
        ({"use_gate": True}, "gate"),
    ):
        module = MultiHeadAttention(num_heads=2, key_dim=8, **arguments)
        variables = module.init(jax.random.key(0), x, x)
        if message is None:
            assert type(interop.export_layer(module, variables, x.shape, x.shape)) is Older
            continue
        with pytest.raises(WeightsError, match=f"Keras cannot build Older.*{message}"):
            interop.export_layer(module, variables, x.shape, x.shape)
