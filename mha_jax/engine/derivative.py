"""The one differentiation rule.

A forward pass gives the output and every row's (m, l). With p the weights, g the cotangent of the output, and
x the logits of q, k and bias, all rebuilt tile by tile from (m, l), and with c the slope of the soft cap,

    dp = g v^T       delta = sum(g * out) - d_lse       dx = p (dp - delta)
    dv = p^T g       dk = scale (c dx)^T q              dq = scale (c dx) k        dbias = dx

is the transpose of the linear map from a direction of (q, k, v, bias) to one of (out, lse). JAX sees that map
as one operation and derives from it reverse mode, forward mode and every mixture. Orders above the first
differentiate the passes of `Backend.differentiable()` as they are written, by loops of fixed length whose
steps are recomputed, so that they stay O(T + S) too.

m moves nothing: it is a constant that l, the sum of exp(x - m), refers to. So l moves by l times lse's move.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from mha_jax.attention.call import Moves, Output, Problem, State
from mha_jax.engine.attention_pass import Runner
from mha_jax.engine.linear_map import linear_map


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """What the derivative of a problem rests on."""

    problem: Problem
    state: State
    runner: Runner = dataclasses.field(metadata={"static": True})


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(runner: Runner, problem: Problem) -> State:
    """Run a problem, differentiable to any order."""
    return runner.forward(problem)


def _attend_jvp(runner: Runner, primals: tuple, tangents: tuple) -> tuple[State, State]:
    (problem,), (direction,) = primals, tangents
    named = {x: checkpoint_name(getattr(problem, x), f"attention_{x}") for x in "qkv"}
    problem = dataclasses.replace(problem, **named)
    # Itself, not its forward pass: out and l are residuals with derivatives of their own.
    out, m, l = attend(runner, problem)
    # What a policy of jax.checkpoint may keep: the output, and what rebuilds the weights.
    statistics = (checkpoint_name(x, "attention_lse") for x in (m, l))
    state = State(checkpoint_name(out, "attention_out"), *statistics)
    moves = Moves(*(jax.tree.map(_moving, getattr(direction, name)) for name in Moves._fields))
    if not jax.tree.leaves(moves):
        return state, State(*map(jnp.zeros_like, state))
    types = Output(jax.typeof(state.out), jax.typeof(state.l))
    moved = linear_map(_tangent, _cotangent, Saved(problem, state, runner), moves, types)
    per_lse = jnp.where(jnp.isnan(state.l), 1, state.l)  # as in `softmax.logsumexp`
    return state, State(moved.out, jnp.zeros_like(state.m), per_lse * moved.lse)


attend.defjvp(_attend_jvp, symbolic_zeros=True)


def _moving(tangent: Any) -> Any:
    if isinstance(tangent, SymbolicZero):
        return None
    return None if tangent.dtype == jax.dtypes.float0 else tangent


def _differentiated_as(slow: Callable) -> Callable:
    """Use `fast` for values, and `slow`, which computes the same, for derivatives."""

    def decorate(fast: Callable) -> Callable:
        function = jax.custom_jvp(fast)

        @function.defjvp
        def _jvp(primals, tangents):
            return jax.jvp(slow, primals, tangents)

        return function

    return decorate


def _differentiable_tangent(saved: Saved, direction: Moves) -> Output:
    return saved.runner.differentiable().tangent(saved.problem, saved.state, direction)


def _differentiable_cotangent(saved: Saved, cotangent: Output) -> Moves:
    return saved.runner.differentiable().cotangent(saved.problem, saved.state, cotangent)


@_differentiated_as(_differentiable_tangent)
def _tangent(saved: Saved, direction: Moves) -> Output:
    return saved.runner.tangent(saved.problem, saved.state, direction)


@_differentiated_as(_differentiable_cotangent)
def _cotangent(saved: Saved, cotangent: Output) -> Moves:
    return saved.runner.cotangent(saved.problem, saved.state, cotangent)
