"""`run`: a checked problem on the backend that was asked for, or on the best one, shard by shard."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from mha_jax.attention.call import Problem, State
from mha_jax.engine import mesh as meshes
from mha_jax.engine.attention_pass import Runner
from mha_jax.engine.choose import named
from mha_jax.engine.derivative import attend
from mha_jax.engine.mesh import Wanted
from mha_jax.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A backend, and the mesh axes that cut a kernel of its: to be passed as `backend`.

    What is plain XLA is cut by XLA, and axes that stand in the types of arrays are read off them. Elsewhere,
    on TPU or inside a `jax.shard_map` over a part of the mesh, a kernel is cut along axes known by name:
    those given here, or common ones ("data", "batch", "dp", "replica", "fsdp"; "model", "heads", "tensor",
    "tp", "mp"). Names that the mesh does not have are passed over.

    Args:
      backend: A name, a backend object, or None to choose by the platform lowered for.
      batch, heads: Names of the mesh axes that cut the batch and the heads, in tuples.

    Raises:
      UnsupportedError: If the names are no tuples of strings.

    >>> x = jnp.ones((2, 5, 4, 8))
    >>> mj.dot_product_attention(x, x, x, backend=Sharded(batch=("hosts", "chips"))).shape
    (2, 5, 4, 8)
    """

    backend: Any = None
    batch: tuple[str, ...] | None = None
    heads: tuple[str, ...] | None = None

    def __post_init__(self):
        for name in ("batch", "heads"):
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


def run(problem: Problem, backend: Any = None) -> State:
    """Run a problem, differentiable to any order, on a backend or on the best one if None.

    Raises:
      UnsupportedError: If the backend cannot run it.
    """
    sharded = backend if isinstance(backend, Sharded) else Sharded(backend)
    chosen = None if sharded.backend is None else named(problem, sharded.backend)
    b, t, n, h = problem.q.shape
    s, v = problem.k.shape[1], problem.v.shape[3]
    if 0 in (b, t, n, s):
        return _nothing(problem)
    if h == 0 or v == 0:  # a feature that says nothing stands for none
        wide = {x: _padded(getattr(problem, x)) for x in "qkv" if getattr(problem, x).shape[3] == 0}
        out, *statistics = run(dataclasses.replace(problem, **wide), backend)
        return State(out[..., :v], *statistics)
    return attend(Runner(chosen, _wanted(problem, sharded)), problem)


def _wanted(problem: Problem, sharded: Sharded) -> Wanted:
    """Return the mesh axes that a kernel is cut along: explicit ones, given ones, or common names."""
    letters = zip(meshes.MOVES, (problem.q, problem.k))
    cut = meshes.cut_by_letter(letters, problem.groups)
    if any(cut.values()):
        return Wanted(cut.get("B", ()), cut.get("N") or cut.get("K", ()))
    return Wanted(sharded.batch, sharded.heads)


def _padded(x: Any) -> Any:
    return jnp.zeros((*x.shape[:3], 1), x.dtype)


def _nothing(problem: Problem) -> State:
    """Return what rows see that no key is there for: zeros."""
    b, t, n, _ = problem.q.shape
    shape, dtype = (b, n, t), problem.accumulator
    out = jnp.zeros((b, t, n, problem.v.shape[-1]), problem.v.dtype)
    return State(out, jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype))
