"""Keras's attention layers and ours, both ways, and from a file: same weights bit for bit, same arguments.

D input width   E output width   N query heads   K key-value heads
H query-key head size   V value head size

`MultiHeadAttention` and `GroupQueryAttention` (Keras calls the class `GroupedQueryAttention` in its
source) become one module here. Keras resolves negative `attention_axes` and None when it builds, so an
imported layer has them counted from the front. Keras is imported by `export_layer` and to read a layer's
variables, never to read a file. (Type checkers take `keras` for this file: hence the ignores.)
"""

import inspect
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from mha_jax.attention.given import is_integer, of_kind
from mha_jax.errors import ShapeError, UnsupportedError, WeightsError
from mha_jax.interop import weights
from mha_jax.interop.keras_file import Stored, choose, read
from mha_jax.layer import axes
from mha_jax.layer.arguments import FIELDS
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.types import Array, Params

_CLASSES = ("MultiHeadAttention", "GroupedQueryAttention")
# What a subclass may have of its own. Any other method of Keras's class decides what is computed.
_HARMLESS = {"__init__", "get_config", "compute_output_shape", "compute_output_spec"}
_OBJECTS = tuple(name for name, field in FIELDS.items() if "object" in field.metadata)
_GROUPED = {
    "num_heads": "num_query_heads",
    "key_dim": "head_dim",
    "num_kv_heads": "num_key_value_heads",
}


def import_layer(keras_layer: Any) -> tuple[MultiHeadAttention, dict[str, Params]]:
    """Return our module and variables for a built Keras layer.

    Args:
      keras_layer: A `MultiHeadAttention` or `GroupQueryAttention`, or of a subclass that computes as
        these do. `trainable` and `flash_attention`, which are no arguments here, are left out.

    Returns:
      (module, {"params": ...}) with the layer's weights, and its arguments, name and dtypes.

    Raises:
      WeightsError: If the layer is of another class, not built, computes something else by methods or
        projections of its own, or has weights that do not fit it.

    >>> import keras
    >>> layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")
    >>> layer.build((None, 5, 16), (None, 7, 16))
    >>> module, variables = import_layer(layer)
    >>> module.num_heads, variables["params"]["query"]["kernel"].shape
    (2, (16, 2, 8))
    """
    base = _base(keras_layer)
    _refuse_replaced(keras_layer, base)
    if not keras_layer.built:
        raise WeightsError(
            f"the Keras layer {keras_layer.name!r} is not built and has no weights yet. Call it once, or "
            "layer.build(query_shape, value_shape)."
        )
    _refuse_replaced_part("softmax", keras_layer._softmax, "Softmax")
    config = dict(base.get_config(keras_layer))
    own = "" if base.__name__ == "GroupedQueryAttention" else "_"
    config.update({name: getattr(keras_layer, own + name) for name in _OBJECTS})
    params = {
        name: _dense_weights(name, dense)
        for name in ("query", "key", "value", "gate", "attention_output")
        if (dense := getattr(keras_layer, _attribute(name), None)) is not None
    }
    return _assemble(keras_layer.name, config, params)


def export_layer(
    module: MultiHeadAttention,
    variables: dict[str, Params],
    query_shape: tuple[int | None, ...],
    value_shape: tuple[int | None, ...],
    key_shape: tuple[int | None, ...] | None = None,
) -> Any:
    """Return a built Keras layer with the weights and arguments of a module.

    Args:
      module: The layer. Its `backend`, `training` and `precision` have no counterpart in Keras and are
        left out; without a `dtype`, Keras computes in `param_dtype`.
      variables: {"params": ...}, as `module.init` makes them.
      query_shape, value_shape, key_shape: Shapes of the inputs, batch axis included, sizes but the last
        may be None; `key_shape` is `value_shape` if None.

    Returns:
      A `keras.layers.GroupQueryAttention` if there are fewer key-value heads than query heads, else a
      `keras.layers.MultiHeadAttention`.

    Raises:
      WeightsError: If Keras has no layer for these arguments, or the weights do not fit the shapes.
      ShapeError: If a shape is none.

    >>> import jax
    >>> module, x = MultiHeadAttention(num_heads=4, key_dim=8, num_kv_heads=2), jnp.ones((1, 5, 16))
    >>> variables = module.init(jax.random.key(0), x, x)
    >>> type(export_layer(module, variables, x.shape, x.shape)).__name__
    'GroupedQueryAttention'
    """
    from keras import layers  # type: ignore[attr-defined]

    of_kind("module", module, MultiHeadAttention, "It is made by mj.MultiHeadAttention(...).")
    _check_shape("query_shape", query_shape)
    _check_shape("value_shape", value_shape)
    _check_shape("key_shape", value_shape if key_shape is None else key_shape)
    config = module.get_config()
    if lost := weights.ours(module):
        raise UnsupportedError(
            "Keras's layer has no counterpart for "
            + "; ".join(f"{name} ({reason})" for name, reason in lost.items())
            + ". Change it with module.clone(...) if that means the same to you."
        )
    of_flax = ("backend", "training", "precision", "dtype", "param_dtype", "num_kv_heads")
    for name in (*of_flax, "rotary", "qk_norm", "use_sinks", "scale", "logit_cap"):
        del config[name]
    config["dtype"] = _policy(module)
    if config["name"] is None:
        del config["name"]
    layer_class = layers.MultiHeadAttention
    if module.num_kv_heads not in (None, module.num_heads):
        config["num_kv_heads"] = module.num_kv_heads
        config = _grouped(module, config, query_shape)
        layer_class = layers.GroupQueryAttention
    config = _without_the_young(config)
    params = weights.params_of(variables)
    weights.check_shapes(
        module, params, query_shape[-1], value_shape[-1], (key_shape or value_shape)[-1]
    )
    try:
        layer = layer_class(**config)
        layer.build(query_shape, value_shape, key_shape)
    except ValueError as error:
        raise WeightsError(
            f"Keras cannot build {layer_class.__name__} with these arguments: {error}"
        ) from error
    for name, group in params.items():
        dense = getattr(layer, _attribute(name))
        for part, weight in group.items():
            _assign(f"{name} {part}", getattr(dense, part), weight)
    return layer


def _check_shape(name: str, shape: Any) -> None:
    """Refuse what is not the shape of an input, whose last size is known."""
    sizes = shape if isinstance(shape, (tuple, list)) else ()
    fits = len(sizes) > 1 and sizes[-1] is not None
    if not fits or any(n is not None and not (is_integer(n) and n >= 0) for n in sizes):
        raise ShapeError(
            f"{name} must be the sizes of an input, (B, T, D): got {shape!r}. Sizes but the last may be "
            "None. Pass x.shape."
        )


def _without_the_young(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what Keras 3.15 has added, as far as it changes nothing.

    An older Keras, Colab's, does not know these names.
    """
    young = {"sliding_window": None, "use_gate": False, "input_axes": None, "output_axes": None}
    return {
        name: _without_the_young(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if not (name in young and value is young[name])
    }


def load(
    path: str | os.PathLike[str], name: str | None = None
) -> tuple[MultiHeadAttention, dict[str, Params]]:
    """Return our module and variables for an attention layer in a file that Keras saved.

    Keras is not needed, h5py is. A `.keras` file holds the arguments of layers in functional and
    sequential models. A `.weights.h5` file holds none, nor does a `.keras` file those of a layer inside
    a class of the user's own; then what the weights show is taken from them (heads, sizes, bias, gate),
    the rest is the default: set it with `module.clone(sliding_window=..., attention_axes=...)`.

    Args:
      path: A `.keras`, `.weights.h5` or `.weights.json` file, the last with its shards beside it.
      name: Name of the layer, or its place in the file where two have the same name; may be left out
        if the file holds one attention layer.

    Raises:
      WeightsError: If the file is none of Keras's, damaged, or refers to other files; the layer is not in
        it or not the only one, of another class, or was quantized; its weights do not fit its arguments.
        The message lists the layers.
      MissingPackageError: If h5py is not installed.

    >>> import keras, tempfile
    >>> x = keras.Input((5, 16))
    >>> y = keras.layers.MultiHeadAttention(2, 8, sliding_window=3, name="attention")(x, x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     keras.Model(x, y).save(f"{folder}/model.keras")
    ...     module, variables = load(f"{folder}/model.keras", "attention")
    >>> module.sliding_window, variables["params"]["attention_output"]["kernel"].shape
    (3, (2, 8, 16))
    """
    found = choose(read(path), os.fspath(path), name)
    config = found.config
    if config is None:
        config = _shown_by_weights(found)
    return _assemble(found.name, config, found.params)


def _base(layer: Any) -> type:
    """Return the one of the two classes that a Keras layer is of, or of a subclass of it."""
    for base in type(layer).__mro__:
        if base.__module__.startswith("keras.") and base.__name__ in _CLASSES:
            return base
    raise WeightsError(
        f"cannot import a {type(layer).__module__}.{type(layer).__name__}: expected a "
        "keras.layers.MultiHeadAttention or keras.layers.GroupQueryAttention. From a model, pass "
        "model.get_layer(name)."
    )


def _refuse_replaced(layer: Any, base: type) -> None:
    """Refuse methods of a subclass, or of the layer itself, in the place of those that compute."""
    methods = {name for name, x in vars(base).items() if inspect.isfunction(x)} - _HARMLESS
    methods |= {"__call__"}
    replaced = {n for n in methods if getattr(type(layer), n) is not getattr(base, n)}
    replaced |= methods & vars(layer).keys() - {"build"}  # Keras wraps build in every layer
    if replaced:
        raise WeightsError(
            f"the {type(layer).__name__} is a {base.__name__} with its own {', '.join(sorted(replaced))}: "
            "what it computes is not what mha_jax would. Copy its weights into a keras.layers."
            f"{base.__name__.replace('Grouped', 'Group')} and import that, if they mean the same."
        )


def _attribute(name: str) -> str:
    return f"_{name.removeprefix('attention_')}_dense"


def _refuse_replaced_part(name: str, part: Any, kind: str, activation: Any = None) -> None:
    """Refuse a layer inside the attention layer that is not as Keras made it."""
    from keras import layers  # type: ignore[attr-defined]

    own = type(part) is getattr(layers, kind) and "call" not in vars(part)
    if not own or getattr(part, "activation", None) is not activation:
        raise WeightsError(
            f"the {name} of the layer was replaced or changed: got {part!r}, expected a "
            f"keras.layers.{kind} as Keras makes it. Copy the weights into a new layer and "
            "import that, if they mean the same."
        )


def _dense_weights(name: str, dense: Any) -> dict[str, Any]:
    from keras import activations, ops  # type: ignore[attr-defined]

    activation = activations.sigmoid if name == "gate" else activations.linear
    _refuse_replaced_part(f"{name} projection", dense, "EinsumDense", activation)
    if mode := getattr(dense, "quantization_mode", None):
        raise WeightsError(
            f"the Keras layer {dense.name!r} is quantized ({mode}) and computes something else than its "
            "kernel says. Import the layer before quantizing it."
        )
    weights = {"kernel": dense.kernel, "bias": dense.bias}
    return {
        part: ops.convert_to_numpy(ops.convert_to_tensor(weight))
        for part, weight in weights.items()
        if weight is not None
    }


def _assemble(
    name: str, config: dict[str, Any], params: dict[str, dict[str, np.ndarray]]
) -> tuple[MultiHeadAttention, dict[str, Params]]:
    for ours, theirs in _GROUPED.items():
        if theirs in config:
            config[ours] = config.pop(theirs)
    try:
        module = MultiHeadAttention.from_config(config)
    except WeightsError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise WeightsError(
            f"the arguments of the layer {name!r} are damaged, or of another version: {error}. Expected "
            "those that Keras's get_config() gives. Save the model again."
        ) from error
    for part in ("query", "key", "value", "attention_output"):
        if "kernel" not in params.get(part, {}):
            raise WeightsError(
                f"the layer {name!r} has no {part} kernel: found {_listed(params)}. Expected the "
                "kernels of query, key, value and attention_output; was the file written completely?"
            )
    weights.check_shapes(
        module, params, *(params[p]["kernel"].shape[0] for p in ("query", "value", "key"))
    )
    arrays = {
        part: {k: weights.array(f"{part} {k}", w) for k, w in group.items()}
        for part, group in params.items()
    }
    return module, {"params": arrays}


def _listed(params: Params) -> str:
    return ", ".join(f"{a} {b}" for a, group in params.items() for b in group) or "nothing"


def _policy(module: MultiHeadAttention) -> str:
    """Return the name of the Keras dtype policy that means our two dtypes."""
    weights = jnp.dtype(module.param_dtype).name
    compute = weights if module.dtype is None else jnp.dtype(module.dtype).name
    if compute == weights:
        return weights
    if weights == "float32" and compute in ("bfloat16", "float16"):
        return f"mixed_{compute}"
    raise WeightsError(
        f"Keras has no dtype policy for dtype={compute} and param_dtype={weights}: expected equal ones, "
        "or bfloat16 or float16 with float32 parameters. Export module.clone(dtype=None)."
    )


def _grouped(
    module: MultiHeadAttention, config: dict[str, Any], query_shape: tuple[int | None, ...]
) -> dict[str, Any]:
    """Return the configuration of Keras's GroupQueryAttention.

    Raises:
      WeightsError: Naming every argument that it does not have.
    """
    why = []
    if module.value_dim not in (None, module.key_dim):
        why.append(f"value_dim={module.value_dim} differs from key_dim={module.key_dim}")
    if module.output_shape not in (None, (query_shape[-1],)):
        why.append(f"output_shape={module.output_shape} is not the width of the query")
    if len(query_shape) != 3:
        why.append(f"query_shape={query_shape} has not three axes")
    elif axes.resolve(module.attention_axes, 3) != (1,):  # type: ignore[arg-type]
        why.append(f"attention_axes={module.attention_axes} are not axis 1")
    if why:
        raise WeightsError(
            f"Keras has no layer with num_kv_heads={module.num_kv_heads} of {module.num_heads} heads for "
            f"this: {', '.join(why)}. Its GroupQueryAttention has one head size and attends over axis 1 of "
            "[B, T, D]; its MultiHeadAttention has as many key-value heads as query heads."
        )
    for name in ("value_dim", "output_shape", "attention_axes"):
        del config[name]
    return {_GROUPED.get(name, name): value for name, value in config.items()}


def _assign(what: str, variable: Any, weight: Array) -> None:
    from keras import ops  # type: ignore[attr-defined]

    value = np.asarray(weight)
    variable.assign(value)
    stored: Any = ops.convert_to_numpy(variable.value)
    if stored.astype(value.dtype).tobytes() != value.tobytes():
        raise WeightsError(
            f"the {what} is {value.dtype} and would be rounded to Keras's {stored.dtype}. Export a module "
            f"with param_dtype={value.dtype}."
        )


def _shown_by_weights(found: Stored) -> dict[str, Any]:
    """Return what shapes and dtypes say about a layer whose arguments are not in the file."""
    kernels = {name: group["kernel"] for name, group in found.params.items() if "kernel" in group}
    try:
        query_size, heads, key_dim = kernels["query"].shape
        _, kv_heads, value_dim = kernels["value"].shape
        output_shape = kernels["attention_output"].shape[2:]
    except (KeyError, ValueError) as error:
        shapes = {name: kernel.shape for name, kernel in kernels.items()}
        raise WeightsError(
            f"{found.path!r} does not hold the kernels of an attention layer: found {shapes}, expected "
            "query (D, N, H), key (D, K, H), value (D, K, V) and attention_output (N, V, *E)."
        ) from error
    return {
        "name": found.name,
        "num_heads": heads,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "output_shape": None if output_shape == (query_size,) else output_shape,
        "use_bias": "bias" in found.params["query"],
        "use_gate": "gate" in kernels,
        "param_dtype": weights.array("query kernel", kernels["query"]).dtype.name,
    }
