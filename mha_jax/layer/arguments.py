"""The layer's arguments: their checks, and their plain JSON form, which is Keras's.

What a layer *is* stands here; what it *does* is in `layer.py` and `functional.py`.
"""

import dataclasses
import difflib
import inspect
import numbers
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import ShapeError, WeightsError
from mha_jax.layer import constraints, initializers, regularizers
from mha_jax.layer.functional import check_switch

# Arguments that are objects, and the module that reads and writes them.
_OBJECTS = {
    "kernel_initializer": initializers,
    "bias_initializer": initializers,
    "kernel_regularizer": regularizers,
    "bias_regularizer": regularizers,
    "activity_regularizer": regularizers,
    "kernel_constraint": constraints,
    "bias_constraint": constraints,
}
_DTYPES = ("dtype", "param_dtype")
# What Keras writes of a layer and means nothing here.
_KERAS_ONLY = ("trainable", "flash_attention")


def _fields(layer: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(layer) if f.name not in ("parent", "name")]


def normalized(layer: Any) -> dict[str, Any]:
    """Check a layer's arguments; return those that are stored in another form than given.

    Raises:
      ShapeError: If a value cannot be right.
    """
    for name in ("num_heads", "key_dim"):
        _positive(name, getattr(layer, name), optional=False)
    for name in ("value_dim", "num_kv_heads", "sliding_window"):
        _positive(name, getattr(layer, name), optional=True)
    if layer.num_kv_heads is not None and layer.num_heads % layer.num_kv_heads:
        raise ShapeError(
            f"num_kv_heads must divide num_heads: got num_kv_heads={layer.num_kv_heads}, "
            f"num_heads={layer.num_heads}. Every key-value head serves the same number of query heads."
        )
    rate = layer.dropout
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= float(rate) < 1:
        raise ShapeError(
            f"dropout must be a number in [0, 1): got {rate!r}. It is the share of attention weights to "
            "drop in training; 0.0 drops none."
        )
    for name in ("use_bias", "use_gate"):
        if not isinstance(getattr(layer, name), (bool, np.bool_)):
            raise ShapeError(f"{name} must be True or False: got {getattr(layer, name)!r}.")
    if layer.training is not None and not isinstance(layer.training, (bool, np.bool_)):
        raise ShapeError(f"training must be True, False or None: got {layer.training!r}.")
    if layer.seed is not None and not _is_integer(layer.seed):
        raise ShapeError(
            f"seed must be an integer or None: got {layer.seed!r}. "
            'To drop with a key of your own, pass rngs={"dropout": key} to apply.'
        )
    result: dict[str, Any] = {
        name: module.get(getattr(layer, name)) for name, module in _OBJECTS.items()
    }
    for name in ("num_heads", "key_dim", "value_dim", "num_kv_heads", "sliding_window", "seed"):
        value = getattr(layer, name)
        result[name] = None if value is None else int(value)
    result |= {
        "dropout": float(rate),
        "use_bias": bool(layer.use_bias),
        "use_gate": bool(layer.use_gate),
    }
    result["output_shape"] = _sizes(layer.output_shape)
    result["attention_axes"] = _axes(layer.attention_axes)
    return result


def _is_integer(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _positive(name: str, x: Any, optional: bool) -> None:
    if x is None and optional:
        return
    if not isinstance(x, numbers.Integral) or isinstance(x, bool) or int(x) <= 0:
        wanted = "a positive integer or None" if optional else "a positive integer"
        raise ShapeError(
            f"{name} must be {wanted}: got {x!r}. key_dim and value_dim are the sizes of one head; "
            "torch's embed_dim is num_heads * key_dim here."
        )


def _sizes(x: Any) -> tuple[int, ...] | None:
    sizes = (x,) if _is_integer(x) else x
    if sizes is None:
        return None
    if (
        not isinstance(sizes, (tuple, list))
        or not sizes
        or any(not _is_integer(size) or size <= 0 for size in sizes)
    ):
        raise ShapeError(
            f"output_shape must be a positive integer, a tuple of them, or None: got {x!r}. "
            "It is the shape of the output's features, without batch and sequence axes."
        )
    return tuple(int(size) for size in sizes)


def _axes(x: Any) -> tuple[int, ...] | None:
    axes = (x,) if _is_integer(x) else x
    if axes is None:
        return None
    if not isinstance(axes, (tuple, list)) or not axes or not all(map(_is_integer, axes)):
        raise ShapeError(
            f"attention_axes must be an integer, a tuple of integers, or None: got {x!r}. "
            "They are the axes of the input to attend over."
        )
    return tuple(int(axis) for axis in axes)


# What other libraries call our arguments.
_ALIASES = {
    "dropout_rate": "dropout",
    "deterministic": "training",
    "is_causal": "use_causal_mask",
    "qkv_features": "key_dim",
    "embed_dim": "key_dim",
    "out_features": "output_shape",
    "kernel_init": "kernel_initializer",
    "bias_init": "bias_initializer",
    "inputs_q": "query",
    "inputs_k": "key",
    "inputs_v": "value",
}


def refuse_unknown_arguments(layer: str, cls: type, given: dict[str, Any]) -> None:
    """Refuse arguments that the constructor does not have, those of a call above all.

    Raises:
      ShapeError: For arguments of a call, naming them.
      TypeError: For others, with what they may be called here.
    """
    known = [*(field.name for field in dataclasses.fields(cls)), "parent", "name"]
    call = [name for name in inspect.signature(cls.__call__).parameters if name != "self"]
    unknown = [name for name in given if name not in known]
    found = [name for name in unknown if name in call]
    if found:
        raise ShapeError(
            f"{', '.join(found)} belong to the call, not to the constructor of {layer}. "
            f"Write layer.apply(variables, query, value, {found[0]}=...)."
        )
    if unknown:
        near = _ALIASES.get(unknown[0]) or next(
            iter(difflib.get_close_matches(unknown[0], known, 1)), None
        )
        hint = f" Did you mean {near!r}?" if near else ""
        raise TypeError(f"{layer}() got an unexpected keyword argument {unknown[0]!r}.{hint}")


def sizes(layer: Any) -> dict[str, Any]:
    """Return what the shapes of a layer's kernels rest on, beside the widths of its inputs."""
    names = ("num_heads", "key_dim", "value_dim", "output_shape", "use_gate", "num_kv_heads")
    return {name: getattr(layer, name) for name in names}


def check_inputs(**inputs: Any) -> None:
    """Refuse inputs without a shape.

    Raises:
      ShapeError: Naming the input.
    """
    for name, x in inputs.items():
        if not hasattr(x, "shape") or len(x.shape) < 2:
            got = f"shape {x.shape}" if hasattr(x, "shape") else type(x).__name__
            raise ShapeError(
                f"{name} must be an array [B, length, features]: got {got}. "
                "Convert lists with jnp.asarray; add the missing axes with x[None]."
            )


def merged(name: str, field: bool | None, argument: bool | None) -> bool:
    """Return a switch given to the layer or to the call; unset means False.

    Raises:
      ShapeError: If it was given to both.
    """
    if field is not None and argument is not None:
        raise ShapeError(
            f"{name} was given to the layer ({field}) and to the call ({argument}). Give it to one of them."
        )
    value = field if argument is None else argument
    if value is not None:
        check_switch(name, value)
    return bool(value)


def require_seed(seed: int | None, mutable: bool) -> None:
    """Refuse to drop without a key.

    Raises:
      ShapeError: If there is neither a "dropout" stream nor a seed whose counter can be kept.
    """
    if seed is None:
        raise ShapeError(
            'dropout needs a key in training: no "dropout" stream was given. '
            'Pass rngs={"dropout": jax.random.key(0)} to apply, a new key for every step.'
        )
    if not mutable:
        raise ShapeError(
            f'with seed={seed} and no "dropout" stream the layer counts its calls in the collection '
            '"dropout_state", which is not mutable here. Pass mutable=["dropout_state"] to apply and feed '
            'the collection back, or pass rngs={"dropout": key}.'
        )


def to_dict(layer: Any) -> dict[str, Any]:
    """Return a layer's arguments as plain JSON values.

    Raises:
      WeightsError: If a value has no plain form, a function of the user's own, say.
    """
    values: dict[str, Any] = {"name": layer.name}
    for name in _fields(layer):
        value = getattr(layer, name)
        if name in _OBJECTS:
            value = _OBJECTS[name].serialize(value)
        elif name in _DTYPES:
            value = None if value is None else jnp.dtype(value).name
        elif name == "precision":
            value = _precision_name(value)
        elif name == "backend" and not (value is None or isinstance(value, str)):
            raise WeightsError(
                f"backend={value!r} has no plain form: a configuration holds a backend by name. "
                "Pass backend='blockwise', say, or None."
            )
        elif isinstance(value, tuple):
            value = list(value)
        values[name] = value
    return values


def _precision_name(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, jax.lax.Precision):
        return value.name.lower()
    raise WeightsError(
        f"precision={value!r} has no plain form. Pass a name: 'default', 'high' or 'highest'."
    )


def from_dict(layer: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments in a configuration, ours or that of a Keras layer.

    Raises:
      WeightsError: If a key is unknown.
    """
    values = {name: value for name, value in values.items() if name not in _KERAS_ONLY}
    known = [*_fields(layer), "name"]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise WeightsError(
                f"unknown key {name!r} in the configuration.{hint} Known keys: {', '.join(known)}."
            )
    if "param_dtype" not in values and values.get("dtype") is not None:
        values.update(_keras_policy(values["dtype"]))
    return values


def _keras_policy(policy: Any) -> dict[str, str]:
    """Turn Keras's dtype policy, a name or a serialized object, into our two dtypes."""
    name = policy if isinstance(policy, str) else policy.get("config", {}).get("name")
    if not isinstance(name, str):
        raise WeightsError(
            f"dtype={policy!r} is no dtype policy that a Flax layer has: expected a name such as "
            "'float32' or 'mixed_bfloat16'."
        )
    compute = name.removeprefix("mixed_")
    params = "float32" if name.startswith("mixed_") else name
    return {"dtype": compute, "param_dtype": params}
