"""The plain definition: every logit at once, plain autodiff. What the other backends are held to.

B batch   T query length   S key length   N query heads   K key-value heads   G = N // K   V value size
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mha_jax.attention import softmax
from mha_jax.attention.biases import floats, with_floats
from mha_jax.attention.call import Moves, Output, Problem, State, logits
from mha_jax.backends.base import Backend


@dataclasses.dataclass(frozen=True)
class Reference(Backend):
    """Attention by the formula. O(T S) memory."""

    bias_rules = True

    def forward(self, problem: Problem) -> State:
        x = logits(problem)
        m = lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
        p = softmax.weights(x, m)
        l = jnp.sum(p, axis=-1, keepdims=True)
        p = p * softmax.reciprocal(l)
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
        function, moved = self._of_moves(problem)
        return jax.vjp(function, moved)[1](cotangent)[0]

    def tangent(self, problem: Problem, state: State, direction: Moves) -> Output:
        function, moved = self._of_moves(problem)
        moves = jax.tree.map(lambda x, d: jnp.zeros_like(x) if d is None else d, moved, direction)
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
