"""`run`: a checked problem on the backend that was asked for, or on the best one, shard by shard; and why."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mha_jax.attention.call import Problem, State, after_sinks
from mha_jax.attention.slots import Slots
from mha_jax.engine import by_blocks
from mha_jax.engine import mesh as meshes
from mha_jax.engine.attention_pass import Runner
from mha_jax.engine.choose import STRATEGIES, complete, default_platform, named, reasons
from mha_jax.engine.cuts import plan
from mha_jax.engine.derivative import attend
from mha_jax.engine.mesh import Place, Wanted
from mha_jax.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A backend, and the mesh axes that cut what it computes: to be passed as `backend`.

    Axes that stand in the types of arrays are read off them. Elsewhere batch and heads of what is plain XLA
    are cut by XLA; a kernel, on TPU or inside a `jax.shard_map` over a part of the mesh, and the tokens of an
    example are cut along axes known by name: those given here, or common ones ("data", "batch", "dp",
    "replica", "fsdp"; "model", "heads", "tensor", "tp", "mp"; "context", "seq", "sequence", "cp", "sp").
    The mesh must have every axis that is named.

    Args:
      backend: A name, a backend object, or None to choose by the platform lowered for.
      batch, heads, sequence: Names of the mesh axes that cut the batch, the heads and the tokens, in tuples.
      strategy: How devices that have shards of the tokens attend: "gather" (each gets all keys and values),
        "ring" (keys and values go round), "heads" (each gets all tokens of some heads), or None to choose by
        the bytes that are sent and held. Queries fewer than the devices, a step of decoding say, are on all.

    Raises:
      UnsupportedError: If the names are no tuples of strings, or there is no such strategy; where the program
        is made, if the mesh has no axis that was named, or the strategy cannot run the problem.

    >>> x = jnp.ones((2, 5, 4, 8))
    >>> mj.dot_product_attention(x, x, x, backend=Sharded(batch=("hosts", "chips"))).shape
    (2, 5, 4, 8)
    """

    backend: Any = None
    batch: tuple[str, ...] | None = None
    heads: tuple[str, ...] | None = None
    sequence: tuple[str, ...] | None = None
    strategy: str | None = None

    def __post_init__(self):
        known = isinstance(self.strategy, str) and self.strategy in STRATEGIES
        if self.strategy is not None and not known:
            raise UnsupportedError(
                f"there is no strategy {self.strategy!r}. Expected one of "
                f"{', '.join(map(repr, STRATEGIES))}, or None to choose by bytes."
            )
        for name in ("batch", "heads", "sequence"):
            axes = getattr(self, name)
            if axes is None:
                continue
            if isinstance(axes, str) or not isinstance(axes, (tuple, list)):
                axes = None
            if axes is None or not all(isinstance(axis, str) for axis in axes):
                raise UnsupportedError(
                    f"Sharded({name}={getattr(self, name)!r}) names no mesh axes. Expected a tuple of names, "
                    f'{name}=("x",) for one axis, or None to know common names.'
                )
            object.__setattr__(self, name, tuple(axes))


def run(problem: Problem, backend: Any = None, sinks: Any = None) -> State:
    """Run a problem, differentiable to any order, on a backend or on the best one if None.

    Args:
      problem: The problem.
      backend: As for `attend`.
      sinks: Logits [N] that take part in the denominator of the softmax alone, or None.

    Raises:
      UnsupportedError: If the backend cannot run it.
    """
    if isinstance(problem.k, Slots):
        state = by_blocks.attend(problem, partial(run, backend=backend))
        return after_sinks(state, sinks)
    sharded = backend if isinstance(backend, Sharded) else Sharded(backend)
    chosen = None if sharded.backend is None else named(problem, sharded.backend)
    b, t, n, h = problem.q.shape
    s, v = problem.k.shape[1], problem.v.shape[3]
    if 0 in (b, t, n, s):
        return _nothing(problem)
    if h == 0 or v == 0:  # a feature that says nothing stands for none
        wide = {x: _padded(getattr(problem, x)) for x in "qkv" if getattr(problem, x).shape[3] == 0}
        out, *statistics = run(dataclasses.replace(problem, **wide), backend, sinks)
        return State(out[..., :v], *statistics)
    return attend(Runner(chosen, _wanted(problem, sharded)), problem, sinks)


def explain(problem: Problem, platform: str | None, backend: Any = None) -> dict[str, str]:
    """Say for every backend whether it can run a problem, and how devices share it.

    Raises:
      ShapeError: If the platform is unknown.
      UnsupportedError: If the tokens cannot be cut as the caller wants.
    """
    problem = by_blocks.first(problem) if isinstance(problem.k, Slots) else problem
    found = reasons(problem, platform)
    sharded = backend if isinstance(backend, Sharded) else Sharded(backend)
    place = meshes.place_of_trace(problem.q)
    chosen = None if sharded.backend is None else named(problem, sharded.backend)
    chosen = complete(chosen, problem, platform or default_platform())
    wanted = _wanted(problem, sharded)
    planned = plan(chosen, problem, wanted, place)
    by_xla = planned.cut is None and planned.backend.partitionable() is not None
    says = {"mesh": _of_unknown_axes(wanted, place, by_xla), "sequence": planned.why}
    return found | {name: text for name, text in says.items() if text is not None}


def _of_unknown_axes(wanted: Wanted, place: Place, by_xla: bool) -> str | None:
    """Say what is done along mesh axes of which neither a type nor a name tells what they cut."""
    lengths = place.lengths
    unknown = wanted.unknown(name for name, length in lengths.items() if length > 1)
    if not unknown:
        return None
    axes = ", ".join(f"{name!r} ({lengths[name]} devices)" for name in unknown)
    what = "XLA cuts as it finds best along" if by_xla else "nothing is cut along"
    return (
        f"{what} {axes}: neither types nor names say whether that cuts batch, heads or tokens. Say it by "
        f"backend=mj.sharding.Sharded(batch={unknown!r}), or heads= or sequence=."
    )


def _wanted(problem: Problem, sharded: Sharded) -> Wanted:
    """Return the mesh axes that a problem is cut along: explicit ones, given ones, or common names."""
    letters = zip(meshes.MOVES, (problem.q, problem.k))
    cut = meshes.cut_by_letter(letters, problem.groups)
    typed = meshes.explicit_axes(jax.typeof(problem.q).sharding.mesh)
    names = sharded.batch, sharded.heads, sharded.sequence
    given = tuple((x, axes) for x, axes in zip(("batch", "heads", "sequence"), names) if axes)
    wanted = Wanted(*names, sharded.strategy, typed=typed, given=given)
    if not any(cut.values()):
        return wanted
    wanted = wanted.beside(cut.get("B", ()), cut.get("N") or cut.get("K", ()))
    rows, keys = cut.get("T", ()), cut.get("S", ())
    everywhere = bool(keys) and not rows
    return wanted._replace(sequence=rows or keys or wanted.sequence, everywhere=everywhere)


def _padded(x: Any) -> Any:
    return jnp.zeros((*x.shape[:3], 1), x.dtype)


def _nothing(problem: Problem) -> State:
    """Return what rows see that no key is there for: zeros."""
    b, t, n, _ = problem.q.shape
    shape, dtype = (b, n, t), problem.accumulator
    out = jnp.zeros((b, t, n, problem.v.shape[-1]), problem.v.dtype)
    return State(out, jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))
