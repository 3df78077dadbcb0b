"""Which facts of tokens a mask reads: a kernel is handed no others."""

from typing import Any

import jax
import numpy as np

from mha_jax.attention.call import Problem
from mha_jax.attention.tokens import Facts


class _Asked:
    """The facts of one side, which note which of them a mask reads."""

    def __init__(self, facts: Facts):
        self._facts, self.names = facts, set()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._facts, name)
        if found is not None:
            self.names.add(name)
        return found


def facts(problem: Problem) -> list[tuple[str, str]]:
    """Return the side and the name of every fact that a problem's mask reads."""
    one = {name: np.zeros((1, 1, 1, 1), np.int32) for name in Facts._fields if name != "head"}
    sides = {"q": problem.q_tokens.facts(), "k": problem.k_tokens.facts()}
    asked = {
        side: _Asked(
            Facts(**{n: a if getattr(facts, n) is not None else None for n, a in one.items()})
        )
        for side, facts in sides.items()
    }
    mask = jax.tree.map(lambda leaf: np.zeros((1, 1, 1, 1), leaf.dtype), problem.mask)
    mask.visible(asked["q"], asked["k"])
    return [(side, name) for side in "qk" for name in sorted(asked[side].names)]
