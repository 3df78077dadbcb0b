"""Whether parameters are those of a layer: its sub-trees, and the shape of every weight.

A layer computes with the weights that it is given, as they are stored; those of another layer are refused.
"""

from collections.abc import Mapping
from typing import Any

from mha_jax.errors import WeightsError
from mha_jax.layer import vectors
from mha_jax.layer.arguments import Arguments
from mha_jax.layer.checks import PROJECTIONS
from mha_jax.layer.projections import check_names
from mha_jax.types import Params

_NAMES = (*PROJECTIONS, *vectors.NORMALIZED, "sinks")


def own(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sub-trees of a layer, without what other modules keep in the same scope."""
    return {name: params[name] for name in _NAMES if name in params}


def shapes(layer: Arguments, *widths: Any) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Return {"query": {"kernel": shape, ...}, ...} of a layer for inputs of these widths."""
    expected: dict[str, dict[str, tuple[Any, ...]]] = {}
    for name, shape in layer.shapes(*widths).items():
        bias = {"bias": shape.bias} if layer.has_bias(name) else {}
        expected[name] = {"kernel": shape.kernel, **bias}
    return expected | {name: {one.part: one.shape} for name, one in vectors.of(layer).items()}


def checked(layer: Arguments, stored: Params) -> Params:
    """Return a layer's own parameters, which fit it for inputs of the widths that they tell.

    Args:
      stored: {"query": {"kernel": ..., "bias": ...}, ...}; of modules of norms nothing is known.

    Raises:
      WeightsError: Naming what is missing, too many, or of another shape.
    """
    params = own(stored) if isinstance(stored, Mapping) else stored
    check_names(params or stored, layer.use_gate)
    expected = shapes(layer, *(params[x]["kernel"].shape[0] for x in ("query", "value", "key")))
    if vectors.of_modules(layer.qk_norm):
        expected |= {name: {} for name in vectors.NORMALIZED if name in params}
    lacking, more = [], [_called(name) for name in params if name not in expected]
    for name, parts in expected.items():
        if (biased := "bias" in params.get(name, ())) != ("bias" in parts) and parts:
            (more if biased else lacking).append(f"a bias of {name}")
    if lacking or more:
        raise WeightsError(
            "the parameters do not fit the layer: they "
            f"{'lack' if lacking else 'have'} {', '.join(lacking or more)}. Make the layer with the "
            "use_bias, use_gate, qk_norm and use_sinks of these parameters, or initialise it again."
        )
    for name, parts in expected.items():
        for part, shape in parts.items():
            found = params.get(name, {}).get(part)
            if found is not None and tuple(found.shape) != shape:
                raise WeightsError(
                    f"the parameters do not fit the layer: {name}/{part} of its sizes has the shape {shape}, "
                    f"got {tuple(found.shape)}. Make the layer with the num_heads, num_kv_heads, key_dim, "
                    "value_dim, output_shape and qk_norm of these parameters, or initialise it again."
                )
    return params


def _called(name: str) -> str:
    return "a gate" if name == "gate" else name
