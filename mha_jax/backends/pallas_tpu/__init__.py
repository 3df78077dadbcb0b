"""Attention as one Mosaic kernel forward and one backward, with every feature of a call.

Lengths are padded to whole tiles, and only where they do not fit; padding changes no bit of the result.
Nothing of T x S bytes is ever made.

Source: Dao 2023, arXiv:2307.08691; Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

import dataclasses
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import io_callback

from mha_jax.attention.call import Moves, Output, Problem, State
from mha_jax.attention.given import of_kind
from mha_jax.backends.base import Backend
from mha_jax.backends.pallas_tpu import rules


@dataclasses.dataclass(frozen=True)
class PallasTPU(Backend):
    """Attention on TPU.

    Args:
      sizes: Sizes of the tiles and of what is held, one of `pallas_tpu.sizes.SIZES`; by the device kind of
        this process if None, and what fits every TPU when it has none.
      interpret: True or `pltpu.InterpretParams()` runs the kernels on any platform, slowly: for tests. The
        latter's interpreter has one memory: let it run one kernel at a time.
    """

    bias_rules = True

    sizes: Any = None
    interpret: Any = False

    def __post_init__(self):
        if self.sizes is not None:
            from mha_jax.backends.pallas_tpu.sizes import Sizes

            of_kind(
                "sizes of PallasTPU",
                self.sizes,
                Sizes,
                "Pass one of pallas_tpu.sizes.SIZES.values().",
            )
        if not isinstance(self.interpret, bool):
            from jax.experimental.pallas import tpu as pltpu

            hint = "Pass False, True, or pltpu.InterpretParams()."
            of_kind("interpret of PallasTPU", self.interpret, pltpu.InterpretParams, hint)

    def why_not(self, problem: Problem, platform: str) -> str | None:
        if platform != "tpu" and not self.interpret:
            return f"it needs a TPU; this program is for {platform}"
        if problem.q.dtype == jnp.float64:
            return "TPUs have no float64; cast q, k and v to float32 or bfloat16"
        sizes = (*problem.q.shape[:3], problem.k.shape[1])
        if not all(isinstance(size, int) for size in sizes):
            return (
                f"its tiles need sizes known while compiling; q.shape={problem.q.shape} has symbols"
            )
        return rules.why_not(problem)

    def effects(self) -> set[Any]:
        if isinstance(self.interpret, bool):
            return set()
        # The interpreter's memory lives in callbacks: they keep their order over the whole program.
        return _ordered_effects()

    # Pallas is imported where a kernel is compiled, and nowhere else.

    def forward(self, problem: Problem) -> State:
        from mha_jax.backends.pallas_tpu import passes

        if rules.why_not(problem):  # a part of the keys, whose places are data
            return self.tiled().forward(problem)
        return passes.forward(self._tuning(), problem)

    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        from mha_jax.backends.pallas_tpu import passes

        if rules.why_not(problem):
            return self.tiled().cotangent(problem, state, cotangent)
        return passes.cotangent(self._tuning(), problem, state, cotangent)

    def _tuning(self) -> Any:
        from mha_jax.backends.pallas_tpu.sizes import Tuning, of_this_process

        return Tuning(of_this_process() if self.sizes is None else self.sizes, self.interpret)


@lru_cache(maxsize=1)
def _ordered_effects() -> set[Any]:
    return jax.make_jaxpr(lambda: io_callback(lambda: None, None, ordered=True))().effects
