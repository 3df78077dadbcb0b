"""Keras's weight penalties by name, config or value: functions array -> scalar.

The penalty of a half precision array is summed and returned in float32, that of any other in its
own dtype.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from mha_jax.errors import ShapeError, WeightsError
from mha_jax.types import Array, ArrayLike


@dataclasses.dataclass(frozen=True)
class Regularizer:
    """The common type of this module's regularizers: factors, checked."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "mode":
                continue
            value = value.item() if isinstance(value, np.generic) else value
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ShapeError(
                    f"{type(self).__name__} got {name}={value!r}. Expected a finite number of at "
                    f"least 0: a negative penalty would reward large weights."
                )
            object.__setattr__(self, name, float(value))

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
      factor: A number of at least 0.
      mode: "rows" or "columns".
    """

    factor: float | int = 0.01
    mode: str = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("rows", "columns"):
            raise ShapeError(
                f"OrthogonalRegularizer got mode={self.mode!r}. Expected 'rows' or 'columns'."
            )

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


_KNOWN: dict[str, Callable[..., Regularizer]] = {
    "l1": L1,
    "l2": L2,
    "l1_l2": partial(L1L2, l1=0.01, l2=0.01),
    "l1l2": L1L2,
    "orthogonal_regularizer": OrthogonalRegularizer,
}
_CLASSES = {kind.__name__: kind for kind in (L1, L2, L1L2, OrthogonalRegularizer)}


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
    if type(spec).__module__.partition(".")[0] == "keras":
        spec = {"class_name": type(spec).__name__, "config": spec.get_config()}
    if isinstance(spec, (str, type)):
        spec = {"class_name": getattr(spec, "__name__", spec)}
    if isinstance(spec, dict):
        try:
            name = spec.get("registered_name") or spec["class_name"]
            return _find(name)(**(spec.get("config") or {}))
        except (KeyError, TypeError) as error:
            raise WeightsError(
                f"{spec!r} is not the config of a regularizer: {error}. Expected what Keras "
                f"writes, {{'class_name': 'L2', 'config': {{'l2': 0.01}}}} for example."
            ) from error
    if spec is None or callable(spec):
        return spec
    raise ShapeError(
        f"{spec!r} is not a regularizer. Expected None, a name such as 'l2', a Keras config dict, "
        f"a value of mha_jax.regularizers, or a function array -> scalar."
    )


def serialize(regularizer: Any) -> dict[str, Any] | None:
    """Return the JSON-able config of a regularizer, which `get` and Keras read.

    Args:
      regularizer: Anything that `get` takes.

    Raises:
      WeightsError: The regularizer is a plain function, which no config can hold.

    >>> serialize("l2")["class_name"], serialize("l2")["config"]
    ('L2', {'l2': 0.01})
    """
    regularizer = get(regularizer)
    if regularizer is None:
        return None
    if not isinstance(regularizer, Regularizer):
        raise WeightsError(
            f"the regularizer {regularizer!r} is a plain function and cannot be written to a "
            f"config. Pass a name such as 'l2' or a value of mha_jax.regularizers."
        )
    return {
        "module": "keras.regularizers",
        "class_name": type(regularizer).__name__,
        "config": dataclasses.asdict(regularizer),
        "registered_name": None,
    }


def _find(name: Any) -> Callable[..., Regularizer]:
    known = _KNOWN | _CLASSES
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
        raise ShapeError(
            f"unknown regularizer {name!r}. Did you mean {nearest!r}? Known are "
            f"{', '.join(known)}. Pass another one as a function array -> scalar."
        )
    return known[name]


def _wide(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
