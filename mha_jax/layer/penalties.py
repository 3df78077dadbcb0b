"""Keras's penalties of the layer: of its weights, and of what its projections give."""

from collections.abc import Callable, Iterator
from typing import Any

from mha_jax.layer.arguments import Arguments
from mha_jax.layer.checks import PROJECTIONS
from mha_jax.types import Array, Params


def of_weights(layer: Arguments, params: Params) -> Iterator[tuple[str, Any]]:
    """Yield ("query_kernel", penalty), ... for every weight that has a regularizer."""
    rules = {"kernel": layer.kernel_regularizer, "bias": layer.bias_regularizer}
    for name in (name for name in PROJECTIONS if name in params):
        for part, weight in params[name].items():
            if (rule := rules.get(part)) is not None:
                yield f"{name}_{part}", rule(weight)


def of_activities(
    layer: Arguments, query: Any, value: Any, keep: Callable[[str, Any], Any]
) -> Callable[[str, Array], Array]:
    """Return an `on_projection` that gives `keep` ("query_activity", penalty), ..."""

    def penalize(name: str, x: Array) -> Array:
        # Keras divides by the first axis of the projection's input.
        source = value if name in ("key", "value") else query
        if source is not None:  # None: nothing was projected
            examples = source.shape[0] if len(source.shape) > 2 else 1
            keep(f"{name}_activity", layer.activity_regularizer(x) / max(examples, 1))
        return x

    return penalize
