"""What a user says of a mesh: how parameters and tokens lie on it, and which of its axes cut attention.

Attention itself is cut where JAX says it: along explicit axes, which stand in the types of arrays, or as
XLA's partitioner finds it; `Sharded` names the axes where neither can be asked. In a `jax.shard_map` of the
caller's own, `Ring`, `Gather` and `Heads` are backends for shards of the tokens.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import PartitionSpec

from mha_jax.attention.given import integer, of_kind
from mha_jax.attention.tokens import Tokens
from mha_jax.backends.sequence import Gather as Gather
from mha_jax.backends.sequence import Heads as Heads
from mha_jax.backends.sequence import Ring as Ring
from mha_jax.engine.mesh import explicit_axes
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

    Raises:
      ShapeError: If the params hold no arrays, or an attention layer without kernels.

    >>> from mha_jax.layer.functional import init_params
    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8, use_bias=False)
    >>> logical_axes(params)["attention_output"]
    {'kernel': ('heads', 'kv', 'embed')}
    """
    params = nn.meta.unbox(params)
    of_kind("params", params, Mapping, 'Pass variables["params"], or their shapes.')
    for leaf in jax.tree.leaves(params):
        if not hasattr(leaf, "shape"):
            raise ShapeError(
                f"params must hold arrays, or their shapes: got {leaf!r} among them. Pass "
                'variables["params"], or what jax.eval_shape makes of them.'
            )
    return _named(params)


def _named(params: Params) -> Any:
    if not isinstance(params, Mapping):
        return (None,) * len(params.shape)
    if not {"query", "key", "value", "attention_output"} <= set(params):
        return {name: _named(value) for name, value in params.items()}
    query, key = (_shape_of_kernel(params, name) for name in ("query", "key"))
    stacked = len(query) - 3  # axes of `nn.scan` and `nn.vmap` over layers
    keys = ("embed", "kv_heads" if key[-2] < query[-2] else "heads", "kv")
    names = {"key": keys, "value": keys, "attention_output": ("heads", "kv", "embed")}

    def of(name: str, part: str, array: Any) -> tuple[str | None, ...]:
        known = names.get(name, ("embed", "heads", "kv"))
        if part == "logits":  # of the sinks
            known = ("heads",)
        if part == "bias":
            known = known[2:] if name == "attention_output" else known[1:]
        rest = len(array.shape) - stacked - len(known)
        return (*(None,) * stacked, *known, *(None,) * rest)

    def of_norm(name: str, array: Any) -> tuple[str | None, ...]:
        own = array.shape[stacked:]
        heads, kernel = (keys[1], key) if name == "key_norm" else ("heads", query)
        # Other axes than those of the heads are a module's own.
        known = (heads, "kv")[-len(own) :] if own and own == kernel[-len(own) :] else ()
        return (*(None,) * (len(array.shape) - len(known)), *known)

    return {
        name: jax.tree.map(partial(of_norm, name), weights)
        if name.endswith("_norm")
        else {part: of(name, part, array) for part, array in weights.items()}
        for name, weights in params.items()
    }


def _shape_of_kernel(params: Params, name: str) -> tuple[int, ...]:
    weights = params[name]
    kernel = weights.get("kernel") if isinstance(weights, Mapping) else None
    if len(getattr(kernel, "shape", ())) < 3:
        raise ShapeError(
            f"params have an attention layer whose {name} has no kernel [features, heads, size]. Pass "
            "them as the layer has them: flattened ones have no names."
        )
    return kernel.shape  # type: ignore[union-attr]


def partition_specs(params: Params, rules: Mapping[str, Any]) -> Any:
    """Return the PartitionSpec of every kernel and bias.

    Args:
      params: As for `logical_axes`.
      rules: Mesh axis, or axes, for every name of `logical_axes`; names without one are not cut.

    Returns:
      The tree of `params` with a PartitionSpec for every array.

    Raises:
      ShapeError: If a rule is for a name that no axis has, or is no mesh axis, or if one mesh axis would
        cut an array twice.

    >>> from mha_jax.layer.functional import init_params
    >>> x = jnp.ones((2, 5, 16))
    >>> params = init_params(jax.random.key(0), x, x, num_heads=4, key_dim=8)
    >>> tuple(partition_specs(params, {"heads": "model"})["query"]["kernel"])
    (None, 'model', None)
    """
    of_kind("rules", rules, Mapping, 'Pass {"heads": "model"}, say.')
    unknown = [name for name in rules if name not in NAMES]
    if unknown:
        raise ShapeError(
            f"rules name {', '.join(map(repr, unknown))}, which no axis of the layer has. "
            f"Expected names among {', '.join(map(repr, NAMES))}: see logical_axes(params)."
        )
    for name, axes in rules.items():
        free = axes is None or axes is PartitionSpec.UNCONSTRAINED
        if not free and not all(isinstance(axis, str) for axis in _axes(axes)):
            raise ShapeError(
                f"rules cut {name!r} along {axes!r}. Expected the name of a mesh axis, or a tuple of names."
            )

    def spec(names):
        cut = [None if name is None else rules.get(name) for name in names]
        axes = [axis for entry in cut for axis in _axes(entry) if isinstance(axis, str)]
        twice = {axis for axis in axes if axes.count(axis) > 1}
        if twice:
            raise ShapeError(
                f"rules cut an array of axes {names} twice along {min(twice)!r}: got {dict(rules)}. A "
                "mesh axis cuts one axis of an array."
            )
        return PartitionSpec(*cut)

    return jax.tree.map(spec, logical_axes(params), is_leaf=lambda x: isinstance(x, tuple))


def _axes(entry: Any) -> tuple[Any, ...]:
    """Return the mesh axes of an entry of a PartitionSpec."""
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


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
    names = logical_axes(params)
    params = nn.meta.unbox(params)
    return jax.tree.map(lambda array, names: nn.LogicallyPartitioned(array, names), params, names)


# ---- the order of tokens ------------------------------------------------------------------------


def balanced(x: Any, axis: int, parts: int, tokens: Tokens | None = None) -> tuple[Any, Tokens]:
    """Reorder tokens so that devices with equal shards of them have equal work under a causal mask.

    The tokens are cut into 2 x `parts` pieces; a device has an early piece and the late one that mirrors it.
    The tokens that are returned say which row each of them was, so masks, windows, rotary and dropout give
    what they give in the first order. It is an order of data, best made where the data is loaded: embeddings
    of positions, and losses that pair a token with the next one, are reordered likewise.

    Args:
      x: An array, or a tree of them, whose axis `axis` is the tokens'.
      axis: That axis.
      parts: The number of devices that have shards of the tokens.
      tokens: The tokens of `x`, plain ones if None.

    Returns:
      The arrays in the new order, and their tokens: `query_tokens` and `key_tokens` of a layer.

    Raises:
      ShapeError: If there are fewer than one part, or the lengths differ.

    >>> x, tokens = balanced(jnp.arange(8.0), axis=0, parts=2)
    >>> x.tolist(), tokens.rows.tolist()
    ([0.0, 1.0, 6.0, 7.0, 2.0, 3.0, 4.0, 5.0], [[0, 1, 6, 7, 2, 3, 4, 5]])
    >>> restored(x, axis=0, parts=2).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    """
    order = _zigzag(_length(x, axis, tokens), parts)
    tokens = Tokens(len(order)) if tokens is None else tokens
    found = dataclasses.replace(tokens, index=tokens.rows)
    return _taken(x, order, axis), found.map(lambda a: _taken(a, order, a.ndim - 1), len(order), 0)


def restored(x: Any, axis: int, parts: int) -> Any:
    """Return arrays that `balanced` has reordered, or what was computed from them, in the first order.

    Arguments and errors as `balanced`.
    """
    return _taken(x, np.argsort(_zigzag(_length(x, axis), parts)), axis)


def _taken(x: Any, order: np.ndarray, axis: int) -> Any:
    """Take entries of an axis of arrays, which keep their type where it says how they lie on a mesh."""

    def take(a):
        where = (*[slice(None)] * (axis % a.ndim), order)
        if isinstance(a, np.ndarray):
            return a[where]
        place = jax.typeof(a).sharding
        if explicit_axes(place.mesh):
            return a.at[where].get(out_sharding=place)
        return a[where]

    return jax.tree.map(take, x)


def _length(x: Any, axis: int, tokens: Tokens | None = None) -> int:
    leaves = jax.tree.leaves(x)
    for a in leaves:
        if not isinstance(a, (jax.Array, np.ndarray)) or a.ndim == 0:
            raise ShapeError(
                f"x must be arrays with an axis of tokens: got {a!r} among them. See axis=."
            )
        integer("axis", axis, -a.ndim, a.ndim - 1, "It is the axis of the tokens.")
    if tokens is not None:
        of_kind("tokens", tokens, Tokens, "Pass mj.Tokens(length, ...), or None for plain ones.")
    lengths = {a.shape[axis] for a in leaves}
    lengths |= set() if tokens is None else {tokens.length}
    if len(lengths) != 1:
        raise ShapeError(
            f"axis {axis} of all arrays is the tokens', of one length: got {sorted(lengths)}. "
            "Reorder queries and keys of different lengths one after the other."
        )
    return lengths.pop()


def _zigzag(length: int, parts: int) -> np.ndarray:
    """Return the tokens in the order in which every part has an early and a late piece."""
    integer("parts", parts, 1, 2**31 - 1, "It is the number of devices that share the tokens.")
    pieces = np.array_split(np.arange(length), 2 * parts)
    return np.concatenate([np.concatenate([pieces[i], pieces[-1 - i]]) for i in range(parts)])
