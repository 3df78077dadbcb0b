"""Checks that the modules of this package share: weights that fit, and what they are."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention.given import of_kind
from mha_jax.errors import UnsupportedError, WeightsError
from mha_jax.layer import fit, projections
from mha_jax.layer.arguments import FIELDS
from mha_jax.layer.linen import MultiHeadAttention
from mha_jax.types import Array, Params

# Arguments of the layer that shape training only, and their values where there is nothing to carry over.
_TRAINING_ONLY = (*(x for x in FIELDS if x.endswith(("_regularizer", "_constraint"))), "seed")


def params_of(variables: dict[str, Params]) -> Params:
    """Return the parameters in variables, without boxes.

    Raises:
      WeightsError: If there are none, or one is no array of floating-point numbers, as none of
        `jax.eval_shape` is.
    """
    of_kind("variables", variables, Mapping, 'Pass {"params": ...}, as module.init returns them.')
    params = variables.get("params")
    if params is None:
        raise WeightsError(
            f'variables must be {{"params": ...}}, as module.init returns them: got the keys '
            f"{list(variables)}."
        )
    params = nn.meta.unbox(params)
    projections.check_trees(params)
    for name, weights in params.items():
        for part, weight in weights.items():
            if not _floating(weight):
                array = hasattr(weight, "__array__") and hasattr(weight, "dtype")
                got = f"has dtype {weight.dtype}" if array else f"is a {type(weight).__name__}"
                raise WeightsError(
                    f"the {name} {part} {got}, expected floating-point numbers in an array. Pass the "
                    "variables as module.init or an import returned them."
                )
    return {name: dict(weights) for name, weights in params.items()}


def array(what: str, weight: Any) -> Array:
    """Return a weight as a JAX array with the same bits.

    Raises:
      WeightsError: If it holds no floating-point numbers, or more bits than JAX would keep.
    """
    if isinstance(weight, np.ndarray) and not weight.dtype.isnative:
        weight = weight.astype(weight.dtype.newbyteorder("="))  # of a machine of the other kind
    if not _floating(weight) or weight.dtype.itemsize < 2:
        raise WeightsError(
            f"the {what} has dtype {weight.dtype}, expected floating-point numbers of 16 bits or more: "
            "quantized layers cannot be read. Save the layer before quantizing it."
        )
    if weight.dtype == np.float64 and jnp.asarray(np.float64(0)).dtype != jnp.float64:
        raise WeightsError(
            f"the {what} is float64, which JAX would round to float32. Switch 64-bit types on with "
            'jax.config.update("jax_enable_x64", True).'
        )
    # A copy, so that the caller's memory is never aliased; putting it compiles nothing, where
    # jnp.asarray compiles an identity for every shape.
    return weight if isinstance(weight, jax.Array) else jax.device_put(np.array(weight))


def _floating(x: Any) -> bool:
    """Return whether these are floating-point numbers; a jax.ShapeDtypeStruct holds none."""
    try:
        return hasattr(x, "__array__") and jnp.issubdtype(x.dtype, jnp.floating)
    except (AttributeError, TypeError):  # no array, or of a dtype that JAX has not
        return False


def check_shapes(
    module: MultiHeadAttention, params: Params, query_size: Any, value_size: Any, key_size: Any
) -> None:
    """Refuse weights that are not exactly those that the module has for inputs of these widths.

    Raises:
      WeightsError: Naming every weight that is missing, too many or of another shape.
    """
    expected = fit.shapes(module, query_size, value_size, key_size)
    found = {
        name: {part: tuple(np.shape(weight)) for part, weight in weights.items()}
        for name, weights in params.items()
    }
    if found != expected:
        wrong = [
            f"{name} {part}: {found.get(name, {}).get(part, 'missing')}, expected "
            f"{expected.get(name, {}).get(part, 'none')}"
            for name in expected | found
            for part in sorted({*expected.get(name, {}), *found.get(name, {})})
            if found.get(name, {}).get(part) != expected.get(name, {}).get(part)
        ]
        raise WeightsError(
            f"the weights do not fit the layer and its inputs: {'; '.join(wrong)}. The layer has "
            f"num_heads={module.num_heads}, key_dim={module.key_dim}, value_dim={module.value_dim}, "
            f"num_kv_heads={module.num_kv_heads}, use_bias={module.use_bias}, "
            f"use_gate={module.use_gate}, output_shape={module.output_shape}."
        )


def widths(params: Params) -> tuple[int, int, int]:
    """Return the widths of the inputs query, value and key that the weights are for.

    Raises:
      WeightsError: If a kernel is missing.
    """
    projections.check_names(params)
    query, value, key = (params[p]["kernel"].shape[0] for p in ("query", "value", "key"))
    return query, value, key


def require_plain(
    module: MultiHeadAttention,
    target: str,
    also: dict[str, str],
    *,
    num_kv_heads: bool = False,
    norm: str | None = None,
) -> None:
    """Refuse to export what only our layer has.

    Args:
      module: The layer to export.
      target: Name of the other layer.
      also: Further reasons, by argument.
      num_kv_heads: Whether the other layer can have fewer key-value heads.
      norm: The norm of queries and keys that the other layer can have.

    Raises:
      UnsupportedError: Listing every argument that would be lost.
    """
    of_kind("module", module, MultiHeadAttention, "It is made by mj.MultiHeadAttention(...).")
    why = dict(also) | ours(module)
    if module.qk_norm == norm:
        why.pop("qk_norm", None)
    if module.value_dim not in (None, module.key_dim):
        why["value_dim"] = f"{module.value_dim} differs from key_dim={module.key_dim}"
    if module.attention_axes not in (None, (1,), (-2,)):
        why["attention_axes"] = f"{module.attention_axes} is not the axis before the features"
    if module.output_shape is not None and len(module.output_shape) > 1:  # type: ignore[arg-type]
        why["output_shape"] = f"{module.output_shape} has more than one axis"
    if module.sliding_window is not None:
        why["sliding_window"] = f"{module.sliding_window}: clear it and pass a mask to the call"
    if module.use_gate:
        why["use_gate"] = "there is no gate"
    if not num_kv_heads and module.num_kv_heads not in (None, module.num_heads):
        why["num_kv_heads"] = f"{module.num_kv_heads} of {module.num_heads} heads"
    for name in _TRAINING_ONLY:
        if getattr(module, name) is not None:
            why[name] = f"{getattr(module, name)!r}: apply it yourself, and clear it for the export"
    if why:
        raise UnsupportedError(
            f"{target} has no counterpart for "
            + "; ".join(f"{name} ({reason})" for name, reason in why.items())
            + ". Change it with module.clone(...) if that means the same to you."
        )


def ours(module: MultiHeadAttention) -> dict[str, str]:
    """Return the arguments of a layer that none of another library has, each with a reason."""
    found = {
        name: f"{getattr(module, name)!r}"
        for name in ("rotary", "qk_norm", "scale", "logit_cap")
        if getattr(module, name) is not None
    }
    if module.use_sinks:
        found["use_sinks"] = "there are no sinks"
    if not isinstance(module.use_bias, bool):
        found["use_bias"] = f"{module.use_bias} only"
    return found


def require_nothing(source: str, found: dict[str, str]) -> None:
    """Refuse to import arguments that our layer has not.

    Raises:
      UnsupportedError: Listing them.
    """
    if found:
        raise UnsupportedError(
            f"mha_jax.MultiHeadAttention has no counterpart for these arguments of {source}: "
            + "; ".join(f"{name} ({reason})" for name, reason in found.items())
            + "."
        )
