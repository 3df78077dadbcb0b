"""What a user says of a mesh: how parameters lie on it, and which of its axes cut a kernel.

Attention itself is cut where JAX says it: along explicit axes, which stand in the types of arrays, or as
XLA's partitioner finds it; `Sharded` names the axes where neither can be asked.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from mha_jax.engine.run import Sharded as Sharded
from mha_jax.errors import ShapeError
from mha_jax.types import Params

NAMES = ("embed", "heads", "kv_heads", "kv")

# ---- parameters ---------------------------------------------------------------------------------


def logical_axes(params: Params) -> Any:
    """Return the names of the axes of every kernel and bias: "embed", "heads", "kv_heads", "kv".

    Args:
      params: Parameters of the layer, or of a model made of it, or their shapes.

    Returns:
      The tree of `params` with a tuple of names for every array, as long as its rank. "kv_heads" are
      key-value heads where they are fewer than query heads. Axes that have no name have None.

    >>> from mha_jax.layer.functional import init_params
    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8, use_bias=False)
    >>> logical_axes(params)["attention_output"]
    {'kernel': ('heads', 'kv', 'embed')}
    """
    return _named(nn.meta.unbox(params))


def _named(params: Params) -> Any:
    if not isinstance(params, Mapping):
        return (None,) * len(params.shape)
    if not {"query", "key", "value", "attention_output"} <= set(params):
        return {name: _named(value) for name, value in params.items()}
    query, key = (params[name]["kernel"].shape for name in ("query", "key"))
    stacked = len(query) - 3  # axes of `nn.scan` and `nn.vmap` over layers
    keys = ("embed", "kv_heads" if key[-2] < query[-2] else "heads", "kv")
    names = {"key": keys, "value": keys, "attention_output": ("heads", "kv", "embed")}

    def of(name: str, part: str, array: Any) -> tuple[str | None, ...]:
        known = names.get(name, ("embed", "heads", "kv"))
        if part == "scale":  # of a norm
            known = ("kv",)
        if part == "logits":  # of the sinks
            known = ("heads",)
        if part == "bias":
            known = known[2:] if name == "attention_output" else known[1:]
        rest = len(array.shape) - stacked - len(known)
        return (*(None,) * stacked, *known, *(None,) * rest)

    return {
        name: {part: of(name, part, array) for part, array in weights.items()}
        for name, weights in params.items()
    }


def partition_specs(params: Params, rules: Mapping[str, Any]) -> Any:
    """Return the PartitionSpec of every kernel and bias.

    Args:
      params: As for `logical_axes`.
      rules: Mesh axis, or axes, for every name of `logical_axes`; names without one are not cut.

    Returns:
      The tree of `params` with a PartitionSpec for every array.

    Raises:
      ShapeError: If a rule is for a name that no axis has.

    >>> from mha_jax.layer.functional import init_params
    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> tuple(partition_specs(params, {"heads": "model"})["query"]["kernel"])
    (None, 'model', None)
    """
    unknown = [name for name in rules if name not in NAMES]
    if unknown:
        raise ShapeError(
            f"rules name {', '.join(map(repr, unknown))}, which no axis of the layer has. "
            f"Expected names among {', '.join(map(repr, NAMES))}: see logical_axes(params)."
        )

    def spec(names):
        return PartitionSpec(*(None if name is None else rules.get(name) for name in names))

    return jax.tree.map(spec, logical_axes(params), is_leaf=lambda x: isinstance(x, tuple))


def with_logical_names(params: Params) -> Any:
    """Box every kernel and bias with its names, as `flax.linen.with_logical_partitioning` does.

    That function gives one tuple of names to every kernel that an initializer draws; here the output
    kernel and the biases have those of their own axes.

    >>> from mha_jax.layer.functional import init_params
    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> with_logical_names(params)["query"]["bias"].names
    ('heads', 'kv')
    """
    params = nn.meta.unbox(params)
    return jax.tree.map(
        lambda array, names: nn.LogicallyPartitioned(array, names), params, logical_axes(params)
    )
