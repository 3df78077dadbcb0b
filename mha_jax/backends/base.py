"""Backend: what runs a problem, and what it inherits."""

import dataclasses
from typing import Any, ClassVar

from mha_jax.attention.call import Moves, Output, Problem, State


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute attention: a frozen dataclass whose fields are its tuning.

    Write `forward`; `why_not` where it cannot run everything, and `cotangent` and `tangent` where it has
    better ones than the tiled ones that it inherits. All three are linear-time programs of a problem's
    arrays: no axis of a problem has length 0, and its tokens and logits are complete.

    >>> from mha_jax.backends.reference import Reference
    >>> class Doubled(Reference):
    ...     def forward(self, problem):
    ...         out, m, l = super().forward(problem)
    ...         return State(2 * out, m, l)
    >>> x = jnp.ones((1, 2, 1, 4))
    >>> print(mj.dot_product_attention(x, x, x, backend=Doubled())[0, 0, 0, 0])
    2.0
    """

    # Whether the passes add what `problem.bias_rule` says; where they do not, it is refused for them.
    bias_rules: ClassVar[bool] = False
    # Whether only who names it gets it: what was never measured is no choice of ours.
    by_name: ClassVar[bool] = False

    def why_not(self, problem: Problem, platform: str) -> str | None:
        """Say in words why this problem cannot run on `platform`, or return None."""
        return None

    def aside(self, problem: Problem) -> str | None:
        """Say in words what of a problem that it runs another backend does for it, or return None."""
        return None

    def on(self, platform: str) -> "Backend":
        """Return this backend with what it leaves open chosen for a platform."""
        return self

    def forward(self, problem: Problem) -> State:
        """Return the output and the statistics of every row."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward pass: write `forward(problem)`"
        )

    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        """Return the cotangents of q, k, v, bias and the floats of its rules, given those of out and lse."""
        return self.tiled().cotangent(problem, state, cotangent)

    def tangent(self, problem: Problem, state: State, direction: Moves) -> Output:
        """Return the tangents of out and lse along a direction."""
        return self.tiled().tangent(problem, state, direction)

    def tiled(self) -> "Backend":
        """Return the tiled backend, which runs everything."""
        from mha_jax.backends.blockwise import Blockwise

        return Blockwise()

    def differentiable(self) -> "Backend":
        """Return a backend whose `cotangent` and `tangent` JAX can differentiate: the tiled one."""
        return self.tiled().differentiable()

    def rests_on_state(self) -> bool:
        """Whether `cotangent` and `tangent` rebuild weights from the state: keys may be a part of a row's."""
        return True

    def partitionable(self) -> "Backend | None":
        """Return this backend in a form that XLA can cut over devices, or None: then shards run alone."""
        return None

    def effects(self) -> set[Any]:
        """Return the effects of the passes, as JAX names them, if they are more than their results."""
        return set()
