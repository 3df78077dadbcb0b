"""Keras's weight constraints by name, config or value: functions array -> array of the same shape.

Keras applies a constraint to a weight after every step of the optimizer. Here this is a pure
function, `constrain`, called on the new parameters, or `as_optax`, the last link of an optax chain.

Norms run over `axis`, by default 0: the input of query, key, value and gate kernels [D, N, H], but
the heads of the output kernel [N, V, *E] and of the biases [N, H], as in Keras.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.errors import ShapeError
from mha_jax.layer.keras_objects import Family, Settings, is_number
from mha_jax.layer.vectors import NORMALIZED
from mha_jax.types import Array, ArrayLike, Params

_EPSILON = 1e-7  # Keras's, added to a norm before dividing by it


def _is_axis(value: Any) -> bool:
    return value is None or all(isinstance(axis, int) for axis in _as_tuple(value))


@dataclasses.dataclass(frozen=True)
class Constraint(Settings):
    """The common type of this module's constraints: settings, checked."""

    rules = (
        ("min_value max_value", "a number from 0 to inf", lambda v: is_number(v, 0, float("inf"))),
        ("rate", "a number from 0 to 1", lambda v: is_number(v, 0, 1)),
        ("axis", "an integer, a list of integers, or None for all axes", _is_axis),
    )

    def __call__(self, w: ArrayLike) -> Array:
        raise NotImplementedError(f"{type(self).__name__} is no constraint by itself")


@dataclasses.dataclass(frozen=True)
class MaxNorm(Constraint):
    """Shrink vectors along `axis` that are longer than `max_value` to that norm."""

    max_value: float | int = 2
    axis: Any = 0

    def __call__(self, w: ArrayLike) -> Array:
        wide, norms = _norms(self, w)
        return (wide * (jnp.minimum(norms, self.max_value) / (_EPSILON + norms))).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class NonNeg(Constraint):
    """Set negative weights to 0."""

    def __call__(self, w: ArrayLike) -> Array:
        return jnp.maximum(jnp.asarray(w), 0)


@dataclasses.dataclass(frozen=True)
class UnitNorm(Constraint):
    """Scale vectors along `axis` to norm 1; a vector of zeros stays."""

    axis: Any = 0

    def __call__(self, w: ArrayLike) -> Array:
        wide, norms = _norms(self, w)
        return (wide / (_EPSILON + norms)).astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class MinMaxNorm(Constraint):
    """Move the norms of vectors along `axis` towards [`min_value`, `max_value`]."""

    min_value: float | int = 0.0
    max_value: float | int = 1.0
    rate: float | int = 1.0
    axis: Any = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_value > self.max_value:
            raise ShapeError(
                f"MinMaxNorm got min_value={self.min_value} above max_value={self.max_value}. "
                f"Expected min_value <= max_value."
            )

    def __call__(self, w: ArrayLike) -> Array:
        wide, norms = _norms(self, w)
        clipped = jnp.clip(norms, self.min_value, self.max_value)
        wanted = self.rate * clipped + (1 - self.rate) * norms
        return (wide * (wanted / (_EPSILON + norms))).astype(w.dtype)


_KNOWN = {"max_norm": MaxNorm, "non_neg": NonNeg, "unit_norm": UnitNorm, "min_max_norm": MinMaxNorm}
_FAMILY = Family(
    base=Constraint,
    known=_KNOWN | {kind.__name__: kind for kind in _KNOWN.values()},
    name="max_norm",
    config={"class_name": "UnitNorm", "config": {"axis": 0}},
    function="array -> array",
)


def get(spec: Any) -> Callable[..., Any] | None:
    """Return the function array -> array that `spec` describes.

    Args:
      spec: None, a name of Keras's ("max_norm", "MaxNorm"), a Keras config dict, a Keras constraint
        (read by its config; Keras is not imported), or a function, which returns as it is.

    Raises:
      ShapeError: An unknown name, a setting out of range, or nothing that could be a constraint.
      WeightsError: A dict that is not the config of a constraint of Keras's.

    >>> get("max_norm"), get({"class_name": "UnitNorm", "config": {"axis": [0, 1]}}), get(None)
    (MaxNorm(max_value=2, axis=0), UnitNorm(axis=(0, 1)), None)
    """
    return _FAMILY.get(spec)


def serialize(constraint: Any) -> dict[str, Any] | None:
    """Return the JSON-able config of a constraint, as `initializers.serialize` does.

    >>> serialize("unit_norm")["class_name"], serialize("unit_norm")["config"]
    ('UnitNorm', {'axis': 0})
    """
    return _FAMILY.serialize(constraint)


def constrain(params: Params, *, kernel: Any = None, bias: Any = None) -> Params:
    """Return the parameters with every kernel and every bias in its constraint.

    Pass the parameters of one layer: in a whole model, other layers' kernels are kernels too. Of attention
    layers that a scan or a vmap has stacked, each is constrained by itself.

    Args:
      params: A tree of dicts; leaves under the keys "kernel" and "bias" count, at any depth.
      kernel, bias: Anything that `get` takes.

    Raises:
      ShapeError: The constraint has an axis that a weight has not, or changes a weight's shape.

    >>> params = {"query": {"kernel": np.array([[3.0, -4.0]]), "bias": np.array([-1.0])}}
    >>> jax.tree.leaves(constrain(params, kernel="non_neg"))
    [array([-1.]), Array([[3., 0.]], dtype=float32)]
    """
    rules = {"kernel": get(kernel), "bias": get(bias)}

    def project(path: Any, leaf: Any, stacked: int = 0) -> Any:
        if _is_layer(leaf):
            (kernel,) = jax.tree.leaves(leaf["query"]["kernel"])  # out of its box
            each = partial(project, stacked=kernel.ndim - 3)
            return jax.tree_util.tree_map_with_path(each, leaf)
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        # A norm may be a module, whose bias is no projection's.
        of_norm = any(name in NORMALIZED for name in keys[:-1])
        rule = rules.get(keys[-1]) if keys and not of_norm else None
        if rule is None:
            return leaf
        result = reduce(lambda f, _: jax.vmap(f), range(stacked), rule)(leaf)
        if np.shape(result) != np.shape(leaf):
            raise ShapeError(
                f"the constraint {rule!r} turned {keys[-1]} of shape {np.shape(leaf)} into shape "
                f"{np.shape(result)}. Expected a function array -> array of the same shape."
            )
        return result

    return jax.tree_util.tree_map_with_path(project, params, is_leaf=_is_layer)


def _is_layer(tree: Any) -> bool:
    """Whether a tree is that of one attention layer, or of layers stacked in front of its own axes."""
    names = ("query", "key", "value", "attention_output")
    return isinstance(tree, Mapping) and all(
        isinstance(tree.get(name), Mapping) and "kernel" in tree[name] for name in names
    )


def as_optax(*, kernel: Any = None, bias: Any = None) -> Any:
    """Return the optax transformation that keeps the updated parameters in their constraints.

    Put it last in a chain: it rewrites each constrained weight's update as the way from the weight
    to its constrained new value, which `optax.apply_updates` reaches up to one rounding. Where the
    tree holds other layers, wrap it in `optax.masked`.

    Args:
      kernel, bias: As for `constrain`.

    Raises:
      ShapeError: By `update`, if it is called without the parameters, or none is named so.

    >>> import optax
    >>> params = {"kernel": jnp.array([1.0, 1.0])}
    >>> tx = optax.chain(optax.sgd(1.0), as_optax(kernel="non_neg"))
    >>> updates, _ = tx.update({"kernel": jnp.array([0.5, 3.0])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [0.5, 0.0]
    """
    import optax  # here, since it is half of what `import mha_jax` would add to Flax

    kernel, bias = get(kernel), get(bias)

    def update(updates: Params, params: Params | None) -> Params:
        if params is None:
            raise ShapeError(
                "constraints.as_optax needs the parameters, got none. Call tx.update(gradients, "
                "state, params)."
            )
        _check_named(params, {"kernel": kernel, "bias": bias})
        new = optax.apply_updates(params, updates)
        constrained = constrain(new, kernel=kernel, bias=bias)
        return jax.tree.map(_way, updates, params, new, constrained)

    return optax.stateless(update)


def _check_named(params: Params, rules: Mapping[str, Any]) -> None:
    """Refuse rules that meet no weight: of a flattened tree, or of one without names."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    named = {path[-1].key for path in paths if path and isinstance(path[-1], jax.tree_util.DictKey)}
    for name, rule in rules.items():
        if rule is not None and name not in named:
            raise ShapeError(
                f"as_optax({name}={rule!r}) constrains nothing: no parameter has the key {name!r}, the first "
                f"is at {jax.tree_util.keystr(paths[0]) if paths else 'no place'}. Expected a tree of dicts, "
                f'{{"query": {{"{name}": ...}}}}.'
            )


def _way(update: Array, old: Array, new: Array, constrained: Array) -> Array:
    """Return the update that leads from `old` to `constrained`; the one given where no rule is."""
    if constrained is new:
        return update
    return constrained.astype(update.dtype) - old.astype(update.dtype)


def _norms(constraint: Any, w: ArrayLike) -> tuple[Array, Array]:
    """Return `w`, in float32 if it is half precision, and the norms along the constraint's axis."""
    axes = constraint.axis if constraint.axis is None else _as_tuple(constraint.axis)
    if any(axis not in range(-w.ndim, w.ndim) for axis in axes or ()):
        raise ShapeError(
            f"{constraint} has an axis that a weight of shape {w.shape} has not. Expected axes "
            f"from {-w.ndim} to {w.ndim - 1}."
        )
    wide = jnp.asarray(w, jnp.float32 if jnp.finfo(w.dtype).bits < 32 else w.dtype)
    return wide, jnp.sqrt(jnp.sum(jnp.square(wide), axis=axes, keepdims=True))


def _as_tuple(axis: Any) -> tuple[Any, ...]:
    return axis if isinstance(axis, tuple) else (axis,)
