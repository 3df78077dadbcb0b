"""What a peer is: what it cannot do, and the program it runs for a row.

A JAX peer brings a pure function of (weights, inputs, extras); how it is jitted, differentiated and
timed is the same for all (`benchmarks.runs`). A peer that has only an attention function gets a layer
of four products around it, so that it, too, can be compared as a layer.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from benchmarks.rows import Data, Row
from benchmarks.runs import JaxRun, Program, Run

Array = jax.Array
Tree = Any


class Peer:
    """One way to run a row.

    Attributes:
      name: As in tables.
      framework: "jax", "torch", "floor" for what is no rival but a bound, or "ours" for another checkout.
      packages: Distributions whose versions are reported.
      lacks: Features of `Row.features` that it does not have, each with the reason in words.
      has: Of the features that few have, those that it has.
    """

    name: str
    framework: ClassVar[str] = "jax"
    packages: ClassVar[tuple[str, ...]] = ()
    lacks: ClassVar[dict[str, str]] = {}
    has: ClassVar[tuple[str, ...]] = ()

    def cannot(self, row: Row) -> str | None:
        """Return why the peer cannot run a row, or None."""
        rare = {f: f"no {f}" for f in ("rotary", "bias by buckets") if f not in self.has}
        lacks = rare | self.lacks
        return next((lacks[f] for f in row.features if f in lacks), None)

    def run(self, row: Row, data: Data) -> Run:
        """Return what runs a row."""
        raise NotImplementedError(f"{self.name} runs nothing")


class JaxPeer(Peer):
    """A peer made of JAX: an attention function, a layer, or both."""

    def attend(self, row: Row, q: Array, k: Array, v: Array, extras: dict[str, Any]) -> Any:
        """Attend with [B, T, N, H] arrays."""
        raise NotImplementedError(f"{self.name} has no attention function of its own")

    def run(self, row: Row, data: Data) -> Run:
        return JaxRun(self.program(row, data), row, data)

    def program(self, row: Row, data: Data) -> Program:
        """Return the program of a row."""
        dtype = jnp.dtype(row.dtype)
        inputs = {name: jnp.asarray(x, dtype) for name, x in data.inputs.items()}
        extras = {name: jnp.asarray(x) for name, x in data.masks.items()}
        extras["key"] = jax.random.key(1)
        if row.level == "layer":
            weights = jax.tree.map(lambda x: jnp.asarray(x, dtype), data.weights)
            return self.layer(row, weights, inputs, extras)

        def apply(weights, inputs, extras):
            table = {name: inputs[name] for name in ("table",) if name in inputs}
            q, k, v = (inputs[name] for name in ("query", "key", "value"))
            return self.attend(row, q, k, v, extras | table)

        return Program(apply, {}, inputs, extras)

    def layer(self, row: Row, weights: Tree, inputs: Tree, extras: Tree) -> Program:
        """Return the program of a layer with these weights: here, four products around `attend`."""

        def apply(weights, inputs, extras):
            query, value = sides(inputs)

            def heads(name, x):
                return (
                    jnp.einsum("bsd,dnh->bsnh", x, weights[name]["kernel"]) + weights[name]["bias"]
                )

            out = self.attend(
                row, heads("query", query), heads("key", value), heads("value", value), extras
            )
            last = weights["attention_output"]
            return jnp.einsum("btnh,nhe->bte", out, last["kernel"]) + last["bias"]

        return Program(apply, weights, inputs, extras)


def sides(inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Return (query, value) of a layer's inputs; the same object in self-attention."""
    return (inputs["x"], inputs["x"]) if "x" in inputs else (inputs["query"], inputs["value"])


def dense_mask(row: Row, extras: dict[str, Any], causal: bool = True) -> Array | None:
    """Return the row's mask [#B, #N, #T, #S], True where a query may attend, or None.

    It is made of iotas inside the program, where XLA may fuse it: what such peers do best.
    `causal` says whether to include what the row's `causal` asks for; a window always is.
    """
    parts = []
    t = jnp.arange(row.length)[:, None]
    s = jnp.arange(row.key_length)[None, :]
    if (row.causal and causal) or row.window is not None:
        parts.append((s <= t)[None, None])
    if row.window is not None:
        parts.append((s > t - row.window)[None, None])
    if row.padding:
        parts.append(extras["valid"][:, None, None, :])
    if row.per_head:
        parts.append(extras["heads"])
    mask = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask
