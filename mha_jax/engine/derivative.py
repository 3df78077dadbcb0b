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

`jax.experimental.jet` makes its series of the same rule, order by order.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from mha_jax.attention.call import Moves, Output, Problem, State, after_sinks
from mha_jax.engine.attention_pass import Pass, Runner, attention_pass_p, forward
from mha_jax.engine.linear_map import linear_map


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """What the derivative of a problem rests on."""

    problem: Problem
    state: State
    runner: Runner = dataclasses.field(metadata={"static": True})


def attend(runner: Runner, problem: Problem, sinks: Any = None) -> State:
    """Run a problem, differentiable to any order."""
    return runner.forward(problem, sinks)


def _jvp(primals: Sequence, tangents: Sequence, *, this: Pass, **_: Any) -> tuple[list, list]:
    """Return the results of a pass and their tangents."""

    def moved(primals, directions):
        return (_moved if this.run is forward else _moved_as_written)(this, primals, directions)

    for level in reversed(this.levels):
        axes = [0 if there else None for there in level.mapped]
        moved = jax.vmap(moved, (axes, axes), axis_size=level.size)
    directions = [None if type(t) is ad.Zero else t for t in tangents]
    results, moves = moved(list(primals), directions)
    zeros = (ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results)
    return results, [zero if t is None else t for t, zero in zip(moves, zeros, strict=True)]


def _moved(this: Pass, primals: list, directions: list) -> tuple[list, list]:
    """Return the results of a forward pass and their tangents, None for what does not move."""
    runner = Runner(this.backend, this.wanted)
    sides = (jax.tree.unflatten(this.tree, x) for x in (primals, directions))
    (problem, sinks), (direction, sinks_move) = sides
    named = {x: checkpoint_name(getattr(problem, x), f"attention_{x}") for x in "qkv"}
    problem = dataclasses.replace(problem, **named)
    out, m, l = attend(runner, problem)
    # What a policy of jax.checkpoint may keep: the output, and what rebuilds the weights.
    statistics = (checkpoint_name(x, "attention_lse") for x in (m, l))
    state = State(checkpoint_name(out, "attention_out"), *statistics)
    moves = Moves(*(getattr(direction, name) for name in Moves._fields))
    types = Output(jax.typeof(state.out), jax.typeof(state.l))
    still = tuple(x for x in ("bias", "bias_rule") if not jax.tree.leaves(getattr(moves, x)))
    saved = Saved(dataclasses.replace(problem, constants=still), state, runner)
    moved = linear_map(_tangent, _cotangent, saved, moves, types)
    per_lse = jnp.where(jnp.isnan(state.l), 1, state.l)  # as in `softmax.logsumexp`
    moved = State(moved.out, jnp.zeros_like(state.m), per_lse * moved.lse)
    if sinks is not None:
        sinks_move = jnp.zeros_like(sinks) if sinks_move is None else sinks_move
        state, moved = jax.jvp(after_sinks, (state, sinks), (moved, sinks_move))
    return list(state), [moved.out, None, moved.l]


def _tangent(saved: Saved, direction: Moves) -> Output:
    return saved.runner.tangent(saved.problem, saved.state, direction)


def _cotangent(saved: Saved, cotangent: Output) -> Moves:
    return saved.runner.cotangent(saved.problem, saved.state, cotangent)


def _moved_as_written(this: Pass, primals: list, directions: list) -> tuple[list, list]:
    """Return the results of another pass and their tangents, by differentiating how it is computed."""
    backend = Runner(this.backend).differentiable()
    moving = [i for i, t in enumerate(directions) if t is not None]

    def function(*values):
        leaves = list(primals)
        for i, value in zip(moving, values):
            leaves[i] = value
        return jax.tree.leaves(this.run(backend, *jax.tree.unflatten(this.tree, leaves)))

    return jax.jvp(function, [primals[i] for i in moving], [directions[i] for i in moving])


def _series(primals: Sequence, series: Sequence, **params: Any) -> tuple[list, list]:
    """Return the results of a pass and the coefficients of their series in t, given its arguments'."""

    def along(t):
        def at(x, terms):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return sum((c * t.astype(x.dtype) ** n for n, c in enumerate(terms, 1)), x)

        return [attention_pass_p.bind(*map(at, primals, series), **params)]

    def with_next(orders):
        def function(t):
            found, (*_, highest) = jax.jvp(orders, (t,), (jnp.ones_like(t),))
            return [*found, highest]

        return function

    for _ in series[0]:
        along = with_next(along)
    results, *orders = along(jnp.float32(0))
    scaled = ([d / math.factorial(n) for d in found] for n, found in enumerate(orders, 1))
    return results, list(map(list, zip(*scaled)))


ad.primitive_jvps[attention_pass_p] = _jvp
try:
    from jax.experimental.jet import jet_rules
except ImportError:  # an experimental module: without it there is nobody to ask for series
    pass
else:
    jet_rules[attention_pass_p] = _series
