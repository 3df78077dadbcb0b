"""What the pictures are drawn from, checked: scores, layers of them, labels."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import numpy as np

from mha_jax.attention.given import as_array, text
from mha_jax.errors import ShapeError
from mha_jax.types import ArrayLike, Float

Labels: TypeAlias = Sequence[Any] | ArrayLike | None


def numbers(name: str, array: Any, *forms: str) -> np.ndarray:
    """Return an array of one example as float32, of the rank of one of the `forms`: "[N, T, S]".

    Raises:
      ShapeError: If it is of another rank, empty, or holds NaN, Inf or negative numbers.
    """
    array = np.asarray(known(name, as_array(name, array, f"{' or '.join(forms)}, numbers")))
    if np.iscomplexobj(array):
        raise ShapeError(f"{name} must be real numbers: got {array.dtype}. Pass weights.")
    array = array.astype(np.float32)
    if array.ndim not in [_rank(form) for form in forms]:
        raise ShapeError(
            f"{name} must be {' or '.join(forms)}: got shape {array.shape}. Pictures are of one example: "
            f"{name}[0] picks the first of a batch."
        )
    if array.size == 0:
        raise ShapeError(f"{name} of shape {array.shape} hold nothing to draw.")
    if not np.isfinite(array).all() or array.min() < 0:
        raise ShapeError(
            f"{name} must be finite and not negative: got {array.min()} to {array.max()}. "
            "Pass weights after the softmax, not logits."
        )
    return array


def known(name: str, array: Any) -> Any:
    """Return an array that has numbers.

    Raises:
      ShapeError: If it is traced.
    """
    if isinstance(array, jax.core.Tracer):
        raise ShapeError(
            f"{name} are traced: got {array.dtype}{list(array.shape)} without numbers yet. Return them from "
            "the jitted function, and draw what it returns."
        )
    return array


def each_layer(name: str, arrays: Any, *forms: str) -> list[np.ndarray]:
    """Return the array of every layer, each of one of the `forms`, all with the same heads.

    Raises:
      ShapeError: If there is no layer, one is malformed, or they disagree.
    """
    stacked = hasattr(arrays, "ndim")
    if stacked and arrays.ndim != 1 + max(map(_rank, forms)):
        raise ShapeError(
            f"{name} must be a list with one array for each layer: got one array of shape "
            f"{arrays.shape}. For a single layer write [{name}]."
        )
    if not stacked and not (isinstance(arrays, (list, tuple)) and arrays):
        raise ShapeError(
            f"{name} must be a list with one array for each layer: got {arrays!r}. "
            f"Expected {' or '.join(forms)} a layer."
        )
    checked = [numbers(f"{name}[{i}]", array, *forms) for i, array in enumerate(arrays)]
    for i, array in enumerate(checked):
        if array.shape[0] != checked[0].shape[0]:
            raise ShapeError(
                f"every layer must have the same heads: got {checked[0].shape[0]} in {name}[0] and "
                f"{array.shape[0]} in {name}[{i}]. Draw layers of other sizes by themselves."
            )
    return checked


def sequence(name: str, labels: Any) -> None:
    """Refuse what is neither None nor labels in their order.

    Raises:
      ShapeError: Saying what is.
    """
    flat = isinstance(labels, (str, list, tuple)) or np.ndim(labels) == 1
    if labels is not None and not (flat and hasattr(labels, "__len__")):
        raise ShapeError(
            f"{name} must be labels, one for each, or None: got {type(labels).__name__}. Pass a list."
        )


def texts(**given: Any) -> None:
    """Refuse titles and names that are no texts.

    Raises:
      ShapeError: Naming the argument.
    """
    for name, x in given.items():
        text(name, x, "It is written into the picture; pass '' for none.")


def check_labels(
    scores: Float[np.ndarray, "*N T S"], queries: Labels, keys: Labels
) -> tuple[list[str] | None, list[str] | None]:
    """Return the labels of the rows and columns as lists of text.

    Raises:
      ShapeError: If their number is not that of the rows or columns.
    """
    for side, labels in (("queries", queries), ("keys", keys)):
        sequence(side, labels)
    rows, columns = scores.shape[-2:]
    counts = (
        len(queries) if queries is not None else rows,
        len(keys) if keys is not None else columns,
    )
    if counts != (rows, columns):
        raise ShapeError(
            f"the scores have shape {scores.shape}, the labels are {counts[0]} queries and "
            f"{counts[1]} keys. Expected scores [N, T, S] with a label for every row and column."
        )
    return _texts(queries), _texts(keys)


def whole(label: str) -> str:
    """Return a text whose halves of characters, which cannot be written, are question marks."""
    return label.encode(errors="replace").decode()


def _rank(form: str) -> int:
    return form.count(",") + 1


def _texts(labels: Labels) -> list[str] | None:
    """Return labels as they can be seen: blanks as an open box, line breaks as an arrow."""
    if labels is None:
        return None
    shown = (whole(str(label)).replace("\n", "↵") for label in labels)
    return [text if text.strip() else "␣" * max(1, len(text)) for text in shown]
