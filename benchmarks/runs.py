"""A peer's program made ready: compiled, called, its output laid beside ours."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.base import Peer, Program
from benchmarks.rows import Data, Row


class JaxRun:
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

    def compile(self) -> tuple[float, float, int | None]:
        """Trace, lower and compile anew; return both times and the temporary bytes."""
        jax.clear_caches()
        begun = time.perf_counter()
        lowered = jax.jit(self._function()).lower(*self.arguments)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        memory = compiled.memory_analysis()
        return traced - begun, done - traced, memory and memory.temp_size_in_bytes

    def call(self) -> Any:
        """Run once and wait for the result."""
        return jax.block_until_ready(self.jitted(*self.arguments))

    def numbers(self, result: Any) -> dict[str, np.ndarray]:
        """Return the output and the gradients of the inputs, in float32, in our layout."""
        if not self.row.backward:
            return {"out": np.asarray(result, np.float32)}
        out, (_, gradients) = result
        gradients = {f"d_{name}": np.asarray(g, np.float32) for name, g in gradients.items()}
        return {"out": np.asarray(out, np.float32), **gradients}


class TorchRun:
    """A torch module on its inputs, eagerly."""

    def __init__(self, peer: Any, row: Row, data: Data):
        import torch

        self.torch, self.row = torch, row
        self.module = peer.module(row, data)
        self.inputs = peer.inputs(row, data)
        if row.backward:
            for x in self.inputs.values():
                x.requires_grad_()
            cotangent = data.cotangent
            if row.level == "function":
                cotangent = np.swapaxes(cotangent, 1, 2).copy()
            self.cotangent = torch.tensor(cotangent, dtype=getattr(torch, row.dtype))
            self.leaves = [*self.inputs.values(), *self.module.parameters()]

    def call(self) -> Any:
        """Run once."""
        if not self.row.backward:
            with self.torch.no_grad():
                return self.module(self.inputs)
        out = self.module(self.inputs)
        return out, self.torch.autograd.grad(out, self.leaves, self.cotangent)

    def numbers(self, result: Any) -> dict[str, np.ndarray]:
        """As `JaxRun.numbers`."""

        def array(x):
            x = x.detach().float().numpy()
            return np.swapaxes(x, 1, 2) if self.row.level == "function" else x

        if not self.row.backward:
            return {"out": array(result)}
        out, gradients = result
        named = {f"d_{name}": array(g) for name, g in zip(self.inputs, gradients)}
        return {"out": array(out), **named}


def prepare(peer: Peer, row: Row, data: Data) -> JaxRun | TorchRun:
    """Build a peer's run of a row."""
    if peer.framework == "torch":
        return TorchRun(peer, row, data)
    return JaxRun(peer.program(row, data), row, data)  # type: ignore[attr-defined]


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Return the largest relative distance between two sets of arrays, in the Frobenius norm.

    >>> difference({"out": np.ones(4)}, {"out": np.full(4, 1.5)})
    0.5
    """
    distances = [
        float(np.linalg.norm(ours[name] - theirs[name]) / max(np.linalg.norm(ours[name]), 1e-30))
        for name in ours
    ]
    return max(distances)
