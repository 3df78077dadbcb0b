"""The one differentiation rule.

`forward` saves (out, lse). The tangent of both is a linear map that rebuilds the weights from lse, tile
by tile, and its transpose is the hand-written backward pass; JAX sees one operation and derives from it
reverse mode, forward mode and every mixture. A backend brings `forward`, and `cotangent` and `tangent` if
it has better ones than the tiled ones. Orders above the first differentiate the tiled passes as they are
written, by loops of fixed length whose steps are recomputed, so that they stay O(T + S) too.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from mha_jax.attention.call import Backend, Call, Gradients, Output
from mha_jax.engine.linear_map import linear_map

_MOVING = ("q", "k", "v", "bias")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """What the derivative of a call rests on."""

    call: Call
    output: Output
    backend: Any = dataclasses.field(metadata={"static": True})


def run(backend: Backend, call: Call) -> Output:
    """Run a checked call, differentiable to any order.

    Unless JAX may differentiate its `forward`, the backend has all three passes: see `Tiled`.
    """
    if backend.plain_autodiff:
        return backend.forward(call)
    return _run(backend, call)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(backend: Backend, call: Call) -> Output:
    return backend.forward(call)


def _run_jvp(backend: Backend, primals: tuple, tangents: tuple) -> tuple[Output, Output]:
    (call,), (direction,) = primals, tangents
    # Itself, not forward: out and lse are residuals with derivatives of their own.
    out, lse = _run(backend, call)
    output = Output(checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse"))
    moves = Gradients(*(_moving(getattr(direction, name)) for name in _MOVING))
    return output, linear_map(_tangent, _cotangent, Saved(call, output, backend), moves)


_run.defjvp(_run_jvp, symbolic_zeros=True)


def _moving(tangent: Any) -> Any:
    if tangent is None or isinstance(tangent, SymbolicZero):
        return None
    return None if tangent.dtype == jax.dtypes.float0 else tangent


def _differentiated_as(slow: Callable) -> Callable:
    """Let JAX differentiate a function as if it were `slow`, which computes the same."""

    def decorate(fast: Callable) -> Callable:
        function = jax.custom_jvp(fast)

        @function.defjvp
        def _jvp(primals, tangents):
            return jax.jvp(slow, primals, tangents)

        return function

    return decorate


def _blockwise(**tuning: Any) -> Any:
    """Return the tiled backend, whose module is imported when it is first needed."""
    from mha_jax.backends.blockwise import Blockwise

    return Blockwise(**tuning)


def _tangent_exhaustive(saved: Saved, direction: Gradients) -> Output:
    return _blockwise(exhaustive=True).tangent(saved.call, saved.output, direction)


def _cotangent_exhaustive(saved: Saved, cotangent: Output) -> Gradients:
    return _blockwise(exhaustive=True).cotangent(saved.call, saved.output, cotangent)


@_differentiated_as(_tangent_exhaustive)
def _tangent(saved: Saved, direction: Gradients) -> Output:
    return saved.backend.tangent(saved.call, saved.output, direction)


@_differentiated_as(_cotangent_exhaustive)
def _cotangent(saved: Saved, cotangent: Output) -> Gradients:
    return saved.backend.cotangent(saved.call, saved.output, cotangent)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """A backend that has all three passes: its own, and the tiled ones where it has none."""

    backend: Any

    def forward(self, call: Call) -> Output:
        return self.backend.forward(call)

    def cotangent(self, call: Call, output: Output, cotangent: Output) -> Gradients:
        return self._pass("cotangent")(call, output, cotangent)

    def tangent(self, call: Call, output: Output, direction: Gradients) -> Output:
        return self._pass("tangent")(call, output, direction)

    def _pass(self, name: str) -> Callable:
        return getattr(self.backend if hasattr(self.backend, name) else _blockwise(), name)
