"""Keras's weight penalties by name, config or value: functions array -> scalar.

A half precision array's penalty is summed and returned in float32, any other's in its own dtype.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from mha_jax.errors import ShapeError
from mha_jax.layer.keras_objects import Family, Settings, is_number
from mha_jax.types import Array, ArrayLike

_FACTOR = "a finite number of at least 0: a negative penalty would reward large weights"


@dataclasses.dataclass(frozen=True)
class Regularizer(Settings):
    """The common type of this module's regularizers: factors, checked."""

    rules = (
        ("l1 l2 factor", _FACTOR, lambda value: is_number(value, 0)),
        ("mode", "'rows' or 'columns'", lambda v: isinstance(v, str) and v in ("rows", "columns")),
    )
    floats = True

    def __call__(self, x: ArrayLike) -> Array:
        raise NotImplementedError(f"{type(self).__name__} is no regularizer by itself")


@dataclasses.dataclass(frozen=True)
class L1(Regularizer):
    """`l1` times the sum of the magnitudes."""

    l1: float | int = 0.01

    def __call__(self, x: ArrayLike) -> Array:
        return self.l1 * jnp.sum(jnp.abs(_wide(x)))


@dataclasses.dataclass(frozen=True)
class L2(Regularizer):
    """`l2` times the sum of the squares."""

    l2: float | int = 0.01

    def __call__(self, x: ArrayLike) -> Array:
        return self.l2 * jnp.sum(jnp.square(_wide(x)))


@dataclasses.dataclass(frozen=True)
class L1L2(Regularizer):
    """The sum of `L1` and `L2`. As in Keras, both factors are 0 unless given."""

    l1: float | int = 0.0
    l2: float | int = 0.0

    def __call__(self, x: ArrayLike) -> Array:
        return L1(self.l1)(x) + L2(self.l2)(x)


@dataclasses.dataclass(frozen=True)
class OrthogonalRegularizer(Regularizer):
    """`factor` times the mean magnitude of the cosines between the rows, or columns, of a matrix.

    Only matrices have it: in an attention layer these are the biases [N, H], [N, V] and [E, E2]. A
    matrix of one row has no pairs and no penalty, and a row of zeros is orthogonal to every other;
    Keras gives NaN for the one, and for the other's gradient.

    Args:
      factor, mode: A number of at least 0; "rows" or "columns".
    """

    factor: float | int = 0.01
    mode: str = "rows"

    def __call__(self, x: ArrayLike) -> Array:
        x = _wide(x)
        if x.ndim != 2:
            raise ShapeError(
                f"OrthogonalRegularizer needs an array of rank 2, got shape {x.shape}. Kernels of "
                f"attention have more axes: pass a function that reshapes them to a matrix first."
            )
        rows = x if self.mode == "rows" else x.T
        squares = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
        rows = rows / jnp.sqrt(jnp.maximum(squares, 1e-14))
        count = rows.shape[0]
        cosines = jnp.where(jnp.eye(count, dtype=bool), 0, rows @ rows.T)
        return self.factor * jnp.sum(jnp.abs(cosines)) / max(1, count * (count - 1))


_FAMILY = Family(
    base=Regularizer,
    known={
        "l1": L1,
        "l2": L2,
        "l1_l2": partial(L1L2, l1=0.01, l2=0.01),
        "l1l2": L1L2,
        "orthogonal_regularizer": OrthogonalRegularizer,
        **{kind.__name__: kind for kind in (L1, L2, L1L2, OrthogonalRegularizer)},
    },
    name="l2",
    config={"class_name": "L2", "config": {"l2": 0.01}},
    function="array -> scalar",
)


def get(spec: Any) -> Callable[..., Any] | None:
    """Return the function array -> scalar that `spec` describes.

    The name "l1_l2" has both factors at 0.01, as Keras documents; Keras itself knows only "L1L2"
    and "l1l2", whose factors are 0.

    Args:
      spec: None, a name of Keras's ("l2", "L2"), a Keras config dict, a Keras regularizer (read by
        its config; Keras is not imported), or a function, which returns as it is.

    Raises:
      ShapeError: An unknown name, a factor out of range, or nothing that could be a regularizer.
      WeightsError: A dict that is not the config of a regularizer of Keras's.

    >>> get("l2"), get({"class_name": "L1", "config": {"l1": 0.5}}), get(None)
    (L2(l2=0.01), L1(l1=0.5), None)
    >>> float(get("l2")(jnp.full((3, 2), 10.0)))
    6.0
    """
    return _FAMILY.get(spec)


def serialize(regularizer: Any) -> dict[str, Any] | None:
    """Return the JSON-able config of a regularizer, as `initializers.serialize` does.

    >>> serialize("l2")["class_name"], serialize("l2")["config"]
    ('L2', {'l2': 0.01})
    """
    return _FAMILY.serialize(regularizer)


def _wide(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
