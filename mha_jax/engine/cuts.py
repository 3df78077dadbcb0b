"""How one problem is cut over a mesh: along which axes, by which strategy, into shards of which sizes.

B batch   T query length   S key length   N query heads   K key-value heads
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mha_jax.attention.call import Problem
from mha_jax.attention.masks import Dense
from mha_jax.attention.tokens import Tokens
from mha_jax.backends.base import Backend
from mha_jax.backends.sequence import Merge, Shards, seen, turns, why_not_in_parts
from mha_jax.engine import mesh as meshes
from mha_jax.engine.choose import STRATEGIES
from mha_jax.engine.mesh import Axes, Place, Wanted, fitting
from mha_jax.errors import UnsupportedError
from mha_jax.types import Array

_CUT = {"batch": "the batch", "heads": "heads", "sequence": "tokens"}


class Cut(NamedTuple):
    """How a problem is cut: along which mesh axes, and what a shard must know of the whole."""

    axes: Axes
    real: tuple[tuple[str, int], ...]  # sizes of T and S
    padded: tuple[tuple[str, int], ...]  # the same in equal shards
    bias: tuple[str, ...] = ()  # mesh axes over which gradients of a bias are summed


class Plan(NamedTuple):
    """What runs a problem: a backend, whole or on shards, and why the tokens' shards attend as they do."""

    backend: Backend
    cut: Cut | None = None
    why: str | None = None


def plan(backend: Backend, problem: Problem, wanted: Wanted, place: Place, mapped: int = 1) -> Plan:
    """Return how a backend runs a problem in a place.

    Args:
      backend: What was chosen for the whole.
      problem: Its shapes.
      wanted: Mesh axes that shall cut it.
      place: The mesh, and its axes that may.
      mapped: Size of the outermost axis that `vmap` has added.

    Raises:
      UnsupportedError: If the mesh has no axis that was named, or the strategy cannot be.
    """
    _check(wanted, place)
    if not place.free:
        return Plan(backend)
    b, t, n, _ = problem.q.shape
    sizes = {"B": b, "N": n, "K": problem.k.shape[2], "T": t, "S": problem.k.shape[1]}
    whole = backend.partitionable()
    if whole is not None and not all(isinstance(size, int) for size in sizes.values()):
        return Plan(whole)
    axes = fitting(wanted.on(place.mesh), {**sizes, "mapped": mapped}, place.lengths)
    why = None
    if isinstance(backend, Shards) or not (axes.rows or why_not_in_parts(backend) is None):
        axes = dataclasses.replace(axes, sequence=(), rows=())
    if axes.sequence:
        backend, why = _over_sequence(backend, problem, axes, place, wanted.strategy)
    elif whole is not None:
        return Plan(whole)
    multiples = {"T": _count(axes.rows, place), "S": _count(axes.sequence, place)}
    cut = Cut(
        axes,
        tuple((x, sizes[x]) for x in multiples),
        tuple((x, -(-sizes[x] // count) * count) for x, count in multiples.items()),
        () if problem.bias is None else axes.missing("BNTS", problem.bias.shape),
    )
    return Plan(backend, cut, why)


def _check(wanted: Wanted, place: Place) -> None:
    """Refuse axes that a program does not have, and for the tokens those that it has cut already."""
    if place.mesh is None:
        return
    for what, names in wanted.given:
        tokens = what == "sequence"
        there = place.free if tokens else place.mesh.axis_names
        lost = [name for name in names if name not in there]
        if not lost or not (tokens or place.named):
            continue
        fix = "Name one of these."
        if tokens:
            fix = "Name one of these, or make the mesh known to the program by jax.set_mesh."
        if lost[0] in place.mesh.axis_names:
            fix = f'A jax.shard_map has cut it already: pass backend=mj.sharding.Ring("{lost[0]}") there.'
        raise UnsupportedError(
            f"Sharded({what}={names!r}): there is no axis {lost[0]!r} to cut {_CUT[what]} along. The axes "
            f"here are {', '.join(map(repr, there)) or 'none'}. {fix}"
        )


def padded(letters: str, shape: tuple[int, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape of an array whose last axes are `letters` with T and S of other sizes.

    >>> padded("BNTS", (2, 3, 1, 5), {"S": 8, "T": 4})
    (2, 3, 1, 8)
    """
    kept = len(shape) - len(letters)
    inner = zip(letters, shape[kept:])
    broadcast = letters == "BNTS"
    return (
        *shape[:kept],
        *(n if broadcast and n == 1 else sizes.get(letter, n) for letter, n in inner),
    )


def without_padded_keys(problem: Problem, cut: Cut) -> Problem:
    """Hide, on a shard, the keys that were added to make shards equal."""
    (_, real), (_, count) = cut.real[1], cut.padded[1]
    if real == count:
        return problem
    columns = jnp.arange(count, dtype=jnp.int32)
    if not cut.axes.rows:
        length = problem.k.shape[1]
        start = jax.lax.axis_index(cut.axes.sequence).astype(jnp.int32) * length
        columns = start + jnp.arange(length, dtype=jnp.int32)
    rule = Dense((columns < real)[None, None, None])
    return dataclasses.replace(problem, mask=problem.mask & rule)


def pad(x: Array, shape: tuple[int, ...]) -> Array:
    """Pad an array to a shape: data by zeros, facts of tokens by those of the last one."""
    if x.shape == shape:
        return x
    widths = [(0, b - a) for a, b in zip(x.shape, shape)]
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.pad(x, widths) if floating else jnp.pad(x, widths, mode="edge")


# ---- the strategy -------------------------------------------------------------------------------


def _over_sequence(
    inner: Backend, problem: Problem, axes: Axes, place: Place, strategy: str | None
) -> tuple[Backend, str]:
    """Return a backend on shards of the tokens, and why it is that one."""
    parts = _count(axes.sequence, place)
    sides = zip(meshes.MOVES, (problem.q, problem.k, problem.v))
    q, k, v = (_shard_of(x, letters, axes, place) for letters, x in sides)
    if axes.rows:
        name, why = _strategy(inner, dataclasses.replace(problem, q=q, k=k, v=v), parts, strategy)
        backend = STRATEGIES[name](axes.sequence, inner)
    else:
        name, why = "merge", "every device has all queries"
        backend = Merge(axes.sequence, inner)
    over = ", ".join(map(repr, axes.sequence))
    return backend, f"{name} over {over}, {parts} devices: {why}"


def _count(names: tuple[str, ...], place: Place) -> int:
    return math.prod(place.lengths[name] for name in names)


def _shard_of(x: Any, letters: str, axes: Axes, place: Place) -> Any:
    """Return the shape that a device has of an array, all of its tokens."""
    names = zip(letters, x.shape, axes.of(letters))
    shape = [n if a in "TS" else n // _count(cut, place) for a, n, cut in names]
    if letters != "BTNH" and axes.heads and not axes.keys:
        shape[2] = 1
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _strategy(inner: Backend, shard: Problem, parts: int, strategy: str | None) -> tuple[str, str]:
    """Return how devices that have shards of the tokens attend, and why.

    Of the strategies that can be, the one that sends fewest bytes forward; gathered keys and values must not
    take more than a device has of everything. With G = N / K, and as many keys as queries, that is gathering
    where G is at least about the number of devices, else heads where K can be divided, else the ring.

    Args:
      inner: What attends on a device.
      shard: The problem of one device, its tokens whole.
      parts: How many devices have shards of its tokens.
      strategy: The one that was asked for, or None.
    """
    why_not = {x: cls("any", inner).why_not_over(shard, parts) for x, cls in STRATEGIES.items()}
    if strategy is not None:
        if why_not[strategy] is not None:
            raise UnsupportedError(
                f"strategy={strategy!r} cannot run this call: {why_not[strategy]}. "
                "Or pass strategy=None to choose by bytes."
            )
        return strategy, "it was asked for"
    keys = sum(x.size * x.dtype.itemsize for x in (shard.k, shard.v))
    rows = math.prod(shard.q.shape[:3]) * (shard.q.shape[3] + shard.v.shape[3])
    has = (rows * shard.q.dtype.itemsize + keys) // parts
    sent = {
        "gather": keys * (parts - 1) // parts,
        "heads": has * (parts - 1) // parts,
        "ring": keys * _turns(shard, parts) // parts,
    }
    if keys > has:
        why_not["gather"] = (
            f"keys and values take {keys:,} bytes, a device has {has:,} of everything"
        )
    if any(a.shape[2] > 1 for a in jax.tree.leaves((shard.mask, shard.bias))):
        why_not["heads"] = "the queries' shards of a mask array or bias would be sent, too"
    able = [name for name in sent if why_not[name] is None] or ["gather"]
    best = min(able, key=lambda name: sent[name])
    others = [f"{x}: {why_not[x] or f'{n:,} bytes'}" for x, n in sent.items() if x != best]
    return best, f"it sends a device {sent[best]:,} bytes ({'; '.join(others)})"


def _turns(shard: Problem, parts: int) -> int:
    """Return how many turns a ring takes."""
    if jax.tree.leaves((shard.q_tokens, shard.k_tokens)):
        return parts
    sides = shard.q_tokens, shard.k_tokens
    t, s = (-(-tokens.length // parts) for tokens in sides)
    q, k = (Tokens(size * parts, tokens.start) for size, tokens in zip((t, s), sides))
    return turns(seen(shard.mask, q, k, t, s))[1]
