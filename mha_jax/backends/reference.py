"""The plain definition: every logit at once, plain autodiff. What the other backends are held to.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K   V value size
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mha_jax.attention import hidden, softmax
from mha_jax.attention.biases import floats, with_floats
from mha_jax.attention.call import Moves, Output, Problem, State, logits
from mha_jax.attention.hidden import Rows
from mha_jax.attention.masks import Dense
from mha_jax.backends.base import Backend


@dataclasses.dataclass(frozen=True)
class Reference(Backend):
    """Attention by the formula. O(T S) memory."""

    bias_rules = True

    def forward(self, problem: Problem) -> State:
        problem = hidden.forward(problem)
        x = logits(problem)
        m = lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
        p = softmax.weights(x, m)
        l = jnp.sum(p, axis=-1, keepdims=True)
        p = p * softmax.reciprocal(l)
        if hidden.anything(problem):
            p = jnp.where(x == -jnp.inf, 0, p)  # in rows of NaN too
        b, n, t, s = p.shape
        if problem.dropout is not None:
            kept = problem.dropout.keep(b, n, problem.q_tokens.rows, problem.k_tokens.rows)
            p = jnp.where(kept, p * problem.dropout.factor, 0)
        out = jnp.einsum(
            "BKGTS,BSKV->BTKGV",
            p.reshape(b, n // problem.groups, problem.groups, t, s),
            problem.v.astype(p.dtype),
            precision=problem.logits.precision,
        )
        out = out.reshape(b, t, n, problem.v.shape[-1]).astype(problem.v.dtype)
        return State(out, m[..., 0], l[..., 0])

    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        if hidden.anything(problem):
            problem, cotangent = self._contained(problem, state, cotangent)
        function, moved = self._of_moves(problem)
        return jax.vjp(function, moved)[1](cotangent)[0]

    def _contained(self, problem: Problem, state: State, cotangent: Output):
        """Return the same for autodiff: rows without weights see nothing, NaN stands in q alone."""
        dtype = state.m.dtype
        given = problem.q, cotangent.out, state.out
        q, d_out, out = (x.astype(dtype).swapaxes(1, 2) for x in given)
        rows = Rows(q, d_out, jnp.zeros_like(state.m), cotangent.lse)
        # The sum of a row that saw a NaN is one.
        rows = hidden.rows(rows, out, state.l, 1 + 0 * state.l, True)
        lse = jnp.where(jnp.isfinite(rows.delta) & jnp.isfinite(cotangent.lse), cotangent.lse, 0)
        mask = problem.mask & Dense((rows.shift != jnp.inf)[..., None])
        q, d_out = (
            x.swapaxes(1, 2).astype(like.dtype) for x, like in zip((rows.q, rows.d_out), given)
        )
        return dataclasses.replace(problem, q=q, mask=mask), Output(d_out, lse)

    def tangent(self, problem: Problem, state: State, direction: Moves) -> Output:
        function, moved = self._of_moves(problem)
        moves = jax.tree.map(lambda x, d: jnp.zeros_like(x) if d is None else d, moved, direction)
        told = hidden.forward(dataclasses.replace(problem, k=moves.k, v=moves.v))
        moves = moves._replace(k=told.k, v=told.v)
        return jax.jvp(function, (moved,), (moves,))[1]

    def _of_moves(self, problem: Problem):
        """Return (out, lse) as a function of what moves, and that."""

        def function(moved: Moves) -> Output:
            moving = moved._asdict()
            moving["bias_rule"] = with_floats(problem.bias_rule, moved.bias_rule)
            out, m, l = self.forward(dataclasses.replace(problem, **moving))
            return Output(out, softmax.logsumexp(m, l))

        moved = Moves(*(getattr(problem, name) for name in Moves._fields))
        return function, moved._replace(bias_rule=floats(problem.bias_rule))

    def differentiable(self) -> Backend:
        return self

    def rests_on_state(self) -> bool:
        return False

    def partitionable(self) -> Backend:
        return self
