"""Attention as Mosaic GPU kernels for compute capability 9.0: one forward, two backward, one for a bias.

They take what cuDNN refuses: dropout inside, masks of any rule judged by tiles, soft caps, biases as arrays,
values of another size than keys. Lengths are padded to whole tiles, and only where they do not fit. Nothing
of T x S bytes is ever made.

Source: Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608 (warps of their own for copies).
"""

import dataclasses
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback

from mha_jax.attention.call import Moves, Output, Problem, State
from mha_jax.backends.base import Backend

_DTYPES = (jnp.bfloat16, jnp.float16)
# Accumulators of 64 rows stand in registers: so many numbers a row fit there.
_LARGEST = 256
_SINCE = (0, 11)


@dataclasses.dataclass(frozen=True)
class MosaicGPU(Backend):
    """Attention on NVIDIA GPUs of compute capability 9.0 (H100, H200), where it is named.

    No choice falls on it by itself yet: it is compiled and counted, and never was measured.

    Args:
      interpret: `plgpu.InterpretGPUParams()` runs the kernels on a CPU, slowly: for tests.
    """

    bias_rules: ClassVar[bool] = True
    by_name: ClassVar[bool] = True

    interpret: Any = None

    def why_not(self, problem: Problem, platform: str) -> str | None:
        if jax.__version_info__[:2] < _SINCE:
            return f"it needs jax 0.11, for Mosaic GPU's interface; this is {jax.__version__}"
        if self.interpret is None and platform != "cuda":
            return f"it needs an NVIDIA GPU; this program is for {platform}"
        capability = None if self.interpret else _capability()
        if capability not in (None, "9.0"):
            return f"its products are those of compute capability 9.0; this GPU has {capability}"
        return _of_the_call(problem)

    def aside(self, problem: Problem) -> str | None:
        if not (taken := _by_tiles(problem)):
            return None
        return f"all gradients go through the tiles, blockwise, {taken}"

    def effects(self) -> set[Any]:
        # The interpreter's memory lives in callbacks: they keep their order over the whole program.
        return set() if self.interpret is None else _ordered_effects()

    # Pallas is imported where a kernel is compiled, and nowhere else.

    def forward(self, problem: Problem) -> State:
        from mha_jax.backends.mosaic_gpu import passes, rules

        if rules.why_not(problem):  # a part of the keys, whose places are data
            return self.tiled().on("cuda").forward(problem)
        return passes.forward(problem, self.interpret)

    def cotangent(self, problem: Problem, state: State, cotangent: Output) -> Moves:
        from mha_jax.backends.mosaic_gpu import passes

        if _by_tiles(problem):
            return self.tiled().on("cuda").cotangent(problem, state, cotangent)
        return passes.cotangent(problem, state, cotangent, self.interpret)


def _of_the_call(problem: Problem) -> str | None:
    """Say what of a call the kernels cannot do."""
    rules, sizes = problem.logits, (problem.q.shape[3], problem.v.shape[3])
    if problem.q.dtype not in _DTYPES:
        return (
            f"its products are of float16 or bfloat16; q, k and v are {problem.q.dtype}: cast them, "
            "or pass dtype=jnp.bfloat16 to the layer"
        )
    if max(sizes) > _LARGEST:
        return f"its accumulators hold head sizes up to {_LARGEST}; this call has {max(sizes)}"
    if rules.precision not in (None, "default", lax.Precision.DEFAULT):
        return f"it rounds weights to {problem.q.dtype}; precision is {rules.precision}"
    if not all(isinstance(size, int) for size in (*problem.q.shape, problem.k.shape[1])):
        return f"its tiles need sizes known while compiling; q.shape={problem.q.shape} has symbols"
    if problem.bias_rule is not None:
        from mha_jax.backends.mosaic_gpu import rules as ruled

        return ruled.why_not(problem)
    return None


def _by_tiles(problem: Problem) -> str | None:
    """Say where the tiles pull a problem's cotangent back, or return None."""
    from mha_jax.backends.mosaic_gpu import rules

    # Kernels of keys go over all query heads of a key-value head with one vector of their own.
    read = jax.tree.leaves((problem.mask, problem.bias, [x for _, x in rules.terms(problem)[0]]))
    own = any(x.shape[1] > 1 and x.shape[2] == 1 and x.shape[3] > 1 for x in read)
    if own and problem.groups > 1:
        return "as a mask or a bias has a line of keys for each of the heads that share keys"
    if rules.why_not(problem):
        return "as positions of a rule are data"
    if unsummed := rules.unsummed(problem):
        return f"as that of {unsummed}"
    return None


def _capability() -> str | None:
    """Return the compute capability of this process's GPU, "9.0" say, if it has one."""
    return getattr(jax.devices()[0], "compute_capability", None)


@lru_cache(maxsize=1)
def _ordered_effects() -> set[Any]:
    return jax.make_jaxpr(lambda: io_callback(lambda: None, None, ordered=True))().effects
