"""A peer's program made ready: compiled, called, timed, its output laid beside ours."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rows import Data, Row
from benchmarks.timer import Sample, sample

Numbers = dict[str, np.ndarray]


class Costs(NamedTuple):
    """Seconds of tracing with lowering and of compiling, and bytes of temporaries."""

    trace: float
    compile: float
    temporary_bytes: int | None


class Run:
    """One peer ready to run one row."""

    def compile(self) -> Costs | None:
        """Trace, lower and compile anew; None where nothing is compiled."""
        return None

    def call(self) -> Any:
        """Run once and wait for the result."""
        raise NotImplementedError(f"{type(self).__name__} has no call")

    def calls(self, count: int) -> None:
        """Run so many times."""
        for _ in range(count):
            self.call()

    def numbers(self, result: Any) -> Numbers:
        """Return the output and the gradients of the inputs, in float32, in our layout."""
        raise NotImplementedError(f"{type(self).__name__} has no numbers")

    def first(self, compare: bool) -> tuple[float, Numbers | None]:
        """Run once; return the seconds, and the numbers if they are to be compared."""
        begun = time.perf_counter()
        result = self.call()
        taken = time.perf_counter() - begun
        return taken, self.numbers(result) if compare else None

    def sample(self, calls: int) -> Sample:
        """Return the time of one call, the mean of so many."""
        return sample(self.calls, calls)


@dataclasses.dataclass(frozen=True)
class Program:
    """A pure function and its arguments: `apply(weights, inputs, extras) -> out`.

    `extras` is what is not differentiated: masks and the dropout key.
    """

    apply: Callable[[Any, Any, Any], Any]
    weights: Any
    inputs: dict[str, jax.Array]
    extras: dict[str, Any]


class JaxRun(Run):
    """A JAX program, jitted; forward+backward returns (out, gradients of weights and inputs)."""

    def __init__(self, program: Program, row: Row, data: Data):
        self.row = row
        self.arguments: tuple[Any, ...] = (program.weights, program.inputs, program.extras)
        self.apply = program.apply
        if row.backward:
            self.arguments += (jnp.asarray(data.cotangent, jnp.dtype(row.dtype)),)
        self.jitted = jax.jit(self._function())

    def _function(self):
        apply = self.apply

        def forward(weights, inputs, extras):
            return apply(weights, inputs, extras)

        def both(weights, inputs, extras, cotangent):
            out, pull = jax.vjp(lambda w, x: apply(w, x, extras), weights, inputs)
            return out, pull(cotangent)

        return both if self.row.backward else forward

    def compile(self) -> Costs:
        jax.clear_caches()
        begun = time.perf_counter()
        lowered = jax.jit(self._function()).lower(*self.arguments)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        memory = compiled.memory_analysis()
        return Costs(traced - begun, done - traced, memory and memory.temp_size_in_bytes)

    def call(self) -> Any:
        return jax.block_until_ready(self.jitted(*self.arguments))

    def numbers(self, result: Any) -> Numbers:
        if not self.row.backward:
            return {"out": np.asarray(result, np.float32)}
        out, (_, gradients) = result
        gradients = {f"d_{name}": np.asarray(g, np.float32) for name, g in gradients.items()}
        return {"out": np.asarray(out, np.float32), **gradients}


def difference(ours: Numbers, theirs: Numbers) -> float:
    """Return the largest relative distance between two sets of arrays, in the Frobenius norm.

    >>> difference({"out": np.ones(4)}, {"out": np.full(4, 1.5)})
    0.5
    """
    distances = [
        float(np.linalg.norm(ours[name] - theirs[name]) / max(np.linalg.norm(ours[name]), 1e-30))
        for name in ours
    ]
    return max(distances)
