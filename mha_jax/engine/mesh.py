"""What a mesh means to a problem: which axes cut the batch, the heads and the tokens, and what types say.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size   W words of a random key

Attention is independent for every example and every head, so a shard of B and of N is a problem of its own.
Every axis of every array has a letter; mesh axes belong to letters.

Source: Shoeybi et al. 2019, arXiv:1909.08053 (heads over devices); Xu et al. 2021, arXiv:2105.04663 and the
Shardy documentation (propagation of shardings by factors).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import ShapedArray
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from mha_jax.attention.call import Problem
from mha_jax.types import Array

BATCH_AXES = ("data", "batch", "dp", "replica", "fsdp")
HEAD_AXES = ("model", "heads", "tensor", "tp", "mp")
SEQUENCE_AXES = ("context", "seq", "sequence", "cp", "sp")

STATE = ("BTNV", "BNT", "BNT")
OUTPUT = ("BTNV", "BNT")
MOVES = ("BTNH", "BSKH", "BSKV", "BNTS")


def letters_of(problem: Problem) -> tuple[str, ...]:
    """Return the letters of the axes of every array of a problem, in the order of its leaves."""

    def each(value: Any, letters: str) -> list[str]:
        return [letters] * len(jax.tree.leaves(value))

    return (
        *MOVES[:3],
        *each(problem.q_tokens, "BT"),
        *each(problem.k_tokens, "BS"),
        *each(problem.mask, "BNTS"),
        *each(problem.bias, "BNTS"),
        *("?" * np.ndim(a) for a in jax.tree.leaves(problem.bias_rule)),
        *(() if problem.dropout is None else ("W", "", "")),
    )


@dataclasses.dataclass(frozen=True)
class Axes:
    """Mesh axes over which a problem is cut.

    Args:
      batch: Axes that cut the batch.
      heads: Axes that cut the query heads.
      keys: Axes that cut the key-value heads: those of `heads`, or none where K is no multiple.
      mapped: Axes that cut the outermost axis that `vmap` has added.
      sequence: Axes that cut the keys of an example.
      rows: Axes that cut its queries: those of `sequence`, or none where every device has all of them.
    """

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    def of(self, letters: str) -> list[tuple[str, ...]]:
        """Return the mesh axes of every axis of an array.

        A device has the queries of a T x S array that are its own, and all keys.
        """
        whole = letters == "BNTS" and self.rows
        cut = {"B": self.batch, "N": self.heads, "K": self.keys, "T": self.rows}
        cut["S"] = () if whole else self.sequence
        return [cut.get(letter, ()) for letter in letters]

    def missing(self, letters: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Return the mesh axes along which an array that has `letters` is not cut, being of size 1 there."""
        sizes = zip(self.of(letters), shape, strict=True)
        return tuple(name for names, size in sizes if size == 1 for name in names)

    def spec(
        self, letters: str, shape: tuple[int, ...], levels: tuple[bool, ...] = ()
    ) -> PartitionSpec:
        """Return the PartitionSpec of an array whose last axes are `letters`; axes of 1 are not cut.

        Args:
          letters: Of its own axes.
          shape: Of all its axes, those that `vmap` has added first.
          levels: For every `vmap`, the outermost first, whether it maps this array.

        >>> tuple(Axes(batch=("data",), heads=("model",)).spec("BNTS", (4, 1, 5, 5)))
        ('data', None, None, None)
        """
        outer = [self.mapped if level == 0 else () for level, there in enumerate(levels) if there]
        sizes = zip([*outer, *self.of(letters)], shape, strict=True)
        return PartitionSpec(*(axes if axes and size > 1 else None for axes, size in sizes))


def fitting(wanted: Axes, sizes: dict[str, int], lengths: dict[str, int]) -> Axes:
    """Return the axes that cut a problem into equal shards, each of whole groups of heads.

    Axes of the batch that do not fit it cut the axis that `vmap` has added. Tokens are padded to fit, but
    queries that are fewer than the devices are everywhere.

    Args:
      wanted: The axes that shall cut it.
      sizes: Of B, N, K, T and S, and of "mapped", that axis.
      lengths: Of every mesh axis that may be used.
    """

    def count(names):
        return math.prod(lengths[name] for name in names)

    def fits(names, taken, size):
        kept: tuple[str, ...] = ()
        for name in names:
            free = lengths.get(name, 1) > 1 and name not in taken
            if free and (size is None or size % count((*kept, name)) == 0):
                kept = (*kept, name)
        return kept

    batch = fits(wanted.batch, (), sizes["B"])
    mapped = fits(wanted.batch, batch, sizes["mapped"])
    heads = fits(wanted.heads, (*batch, *mapped), sizes["N"])
    groups = sizes["N"] // sizes["K"]
    while heads and sizes["K"] % count(heads) and groups % (sizes["N"] // count(heads)):
        heads = heads[:-1]
    keys = heads if sizes["K"] % count(heads) == 0 else ()
    sequence = fits(wanted.sequence, (*batch, *mapped, *heads), None)
    if max(sizes["T"] if wanted.rows else 0, sizes["S"]) < count(sequence):
        sequence = ()
    rows = sequence if wanted.rows and sizes["T"] >= count(sequence) else ()
    return Axes(batch, heads, keys, mapped, sequence, rows)


class Wanted(NamedTuple):
    """Names of the mesh axes that shall cut batch, heads and tokens; None for the common names."""

    batch: tuple[str, ...] | None = None
    heads: tuple[str, ...] | None = None
    sequence: tuple[str, ...] | None = None
    strategy: str | None = None  # how the tokens' shards attend, None to choose
    everywhere: bool = False  # whether every device shall have all queries
    typed: tuple[str, ...] = ()  # axes that types speak of: no common name is looked for there
    given: tuple[tuple[str, tuple[str, ...]], ...] = ()  # what the caller named, by argument

    def beside(self, batch: tuple[str, ...], heads: tuple[str, ...]) -> "Wanted":
        """Return this behind explicit axes that cut batch and heads, without what else types speak of."""

        def free(given, common):
            return (x for x in (common if given is None else given) if x not in self.typed)

        batch = (*batch, *free(self.batch, BATCH_AXES))
        heads = (*heads, *free(self.heads, HEAD_AXES))
        return self._replace(batch=batch, heads=heads)

    def on(self, mesh: Any) -> Axes:
        """Return what the axes of a mesh cut: of names without a known meaning nothing."""

        def known(given, common):
            return tuple(x for x in (common if given is None else given) if x in mesh.axis_names)

        common = tuple(name for name in SEQUENCE_AXES if name not in self.typed)
        sequence = known(self.sequence, common)
        rows = () if self.everywhere else sequence
        batch, heads = known(self.batch, BATCH_AXES), known(self.heads, HEAD_AXES)
        return Axes(batch, heads, sequence=sequence, rows=rows)

    def unknown(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of some axes that neither types speak of, nor the caller, nor a common name."""
        common = BATCH_AXES, HEAD_AXES, SEQUENCE_AXES
        given = (self.batch or (), self.heads or (), self.sequence or ())
        known = {name for axes in (*common, *given, self.typed) for name in axes}
        return tuple(name for name in names if name not in known)


# ---- what types say -----------------------------------------------------------------------------


def explicit_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """Return the axes of a mesh whose sharding stands in types."""
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def names_of(spec: PartitionSpec, rank: int) -> list[tuple[str, ...]]:
    """Return the mesh axes that cut every axis of an array."""
    names = [() if x is None else (x,) if isinstance(x, str) else tuple(x) for x in spec]
    return names + [()] * (rank - len(names))


def cut_by_letter(
    arrays: Iterable[tuple[str, Array]], groups: int = 0
) -> dict[str, tuple[str, ...]]:
    """Return the explicit mesh axes of every letter, as the types of arrays say, the first one first.

    With one query head a key-value head (`groups` is 1), N and K are one letter.
    """
    found: dict[str, tuple[str, ...]] = {}
    for letters, x in arrays:
        names = names_of(jax.typeof(x).sharding.spec, len(letters))
        for letter, axes in zip(letters, names):
            if axes and letter != "?" and not found.get(letter):
                found[letter] = axes
    if groups == 1:
        found["N"] = found.get("N") or found.get("K", ())
    return found


def typed_like(x: Array, letters: str, shape: tuple[int, ...], dtype: Any, cut: dict) -> Any:
    """Return the type of an array that lies on the devices of `x`, cut along its letters."""
    kind = jax.typeof(x)
    used: set[str] = set()
    spec: list[Any] = []
    for letter, size in zip(letters, shape, strict=True):
        axes = tuple(name for name in cut.get(letter, ()) if name not in used) if size != 1 else ()
        used |= set(axes)
        spec.append(axes or None)
    sharding = NamedSharding(kind.sharding.mesh, PartitionSpec(*spec))
    return kind.update(shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding)


def plain(kind: Any) -> Any:
    """Return a type without what it says of a mesh."""
    return ShapedArray(kind.shape, kind.dtype)


@contextlib.contextmanager
def types_say_nothing() -> Iterator[None]:
    """Trace as on Auto axes: what is traced has its own types outside, and XLA partitions inside."""
    mesh = jax.sharding.get_abstract_mesh()
    speaks = bool(explicit_axes(mesh))
    with jax.sharding.use_abstract_mesh(_all_auto(mesh)) if speaks else contextlib.nullcontext():
        yield


def varying(x: Any) -> frozenset[str]:
    """Return the manual mesh axes, those of a `jax.shard_map`, over which a value varies."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # jax 0.9 and later
    return kind.vma if manual is None else manual.varying


def vary_alike(leaves: Sequence[Any]) -> list[Any]:
    """Let values vary over every manual mesh axis that one of them does.

    The cotangent of a value that is the same on all devices is then summed over them.
    """
    own = [varying(x) for x in leaves]
    names = frozenset().union(*own)
    return [x if mine == names else _vary(x, names - mine) for x, mine in zip(leaves, own)]


def _vary(x: Any, names: frozenset[str]) -> Any:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, tuple(names), to="varying")
    return jax.lax.pvary(x, tuple(names))  # type: ignore[attr-defined]  # before jax 0.9


# ---- what is lowered for ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program will run: a mesh and those of its axes that no `jax.shard_map` has taken."""

    mesh: Any = None
    free: tuple[str, ...] = ()
    named: bool = True  # whether the axes are called as the caller's are

    @property
    def lengths(self) -> dict[str, int]:
        """Lengths of the free axes."""
        return {name: self.mesh.shape[name] for name in self.free}


def traced_mesh(x: Any) -> AbstractMesh | None:
    """Return the mesh of the context, or that of a value's type; None where neither has one."""
    for mesh in (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh):
        if not mesh.empty:
            return mesh
    return None


def place_of_trace(x: Any) -> Place:
    """Return the place of a program that is traced, as far as it is known then."""
    mesh = traced_mesh(x)
    if mesh is None or mesh.size == 1:
        return Place()
    free = (name for name in mesh.axis_names if name not in mesh.manual_axes)
    return Place(_all_auto(mesh), tuple(free))


def place_of_lowering(context: Any, traced: AbstractMesh | None) -> Place:
    """Return the place of a program, from the axis context that it is lowered in.

    Args:
      context: JAX's; it knows the mesh of arrays where an operation asks for devices.
      traced: The mesh that was known while tracing.
    """
    if hasattr(context, "manual_axes"):
        mesh = getattr(context.mesh, "abstract_mesh", context.mesh)
        taken = {*context.manual_axes, *mesh.manual_axes}
        mesh = _all_auto(mesh).update_axis_types(dict.fromkeys(taken, AxisType.Manual))
        return Place(mesh, tuple(name for name in mesh.axis_names if name not in taken))
    if getattr(context, "num_devices", 1) == 1:
        return Place()
    found = (getattr(context, "abstract_mesh", None), traced)
    mesh = next((x for x in found if x is not None and x.size == context.num_devices), None)
    if mesh is None:
        return _unnamed(context.num_devices)
    mesh = _all_auto(mesh)
    return Place(mesh, tuple(mesh.axis_names))


def place_of_arrays(leaves: Sequence[Array]) -> Place:
    """Return the place of a program that runs on concrete arrays at once."""
    for sharding in (x.sharding for x in leaves):
        if len(sharding.device_set) > 1 and isinstance(sharding, NamedSharding):
            mesh = _all_auto(sharding.mesh)
            return Place(mesh, tuple(mesh.axis_names))
    count = max(len(x.sharding.device_set) for x in leaves)
    return _unnamed(count) if count > 1 else Place()


def _unnamed(count: int) -> Place:
    return Place(AbstractMesh((count,), ("devices",)), ("devices",), named=False)


def _all_auto(mesh: Any) -> Any:
    """Return a mesh, abstract or not, without explicit axes."""
    kinds = tuple(AxisType.Auto if x == AxisType.Explicit else x for x in mesh.axis_types)
    if isinstance(mesh, AbstractMesh):
        return mesh.update_axis_types(dict(zip(mesh.axis_names, kinds)))
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def lower_without_types(function: Any, ctx: Any, values: Sequence[Any]) -> Any:
    """Lower a function of values that say nothing of a mesh, its effects in their order."""
    ins, outs = ([plain(kind) for kind in kinds] for kinds in (ctx.avals_in, ctx.avals_out))
    inside = ctx.replace(avals_in=ins, avals_out=outs)
    with types_say_nothing():
        results = mlir.lower_fun(function, multiple_results=True)(inside, *values)
    if any(explicit_axes(kind.sharding.mesh) for kind in ctx.avals_out):
        # Beside Auto axes XLA would lay the results as it likes, along the explicit ones, too.
        typed = ctx.replace(avals_in=ctx.avals_out, tokens_in=mlir.TokenSet())
        results = mlir.lower_fun(_as_typed, multiple_results=True)(typed, *results)
    if inside.tokens_out is not None:
        ctx.set_tokens_out(inside.tokens_out)
    return results


def _as_typed(*leaves: Array) -> list[Array]:
    kinds = (jax.typeof(x).sharding for x in leaves)
    return [x if s.mesh.empty else jax.sharding.reshard(x, s) for x, s in zip(leaves, kinds)]


def run_at_once(function: Any, leaves: Sequence, types: Sequence[Any]) -> list[Array]:
    """Run a function on concrete arrays as on Auto axes, and give its results their explicit types."""
    meshes = [_explicit_mesh(x) for x in leaves]
    with types_say_nothing():
        results = function(
            *(x if mesh is None else _lying(x, _all_auto(mesh)) for x, mesh in zip(leaves, meshes))
        )
    explicit = next((mesh for mesh in meshes if mesh is not None), None)
    if explicit is None:
        return results
    return [_lying(x, explicit, kind.sharding.spec) for x, kind in zip(results, types)]


def _lying(x: Any, mesh: Any, spec: PartitionSpec | None = None) -> Array:
    """Return a concrete array on a mesh, cut as it is or as `spec` says."""
    return jax.device_put(x, NamedSharding(mesh, x.sharding.spec if spec is None else spec))


def _explicit_mesh(x: Any) -> Any:
    """Return the mesh of a concrete array if some of its axes are explicit."""
    sharding = getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    return sharding.mesh if named and explicit_axes(sharding.mesh.abstract_mesh) else None


def mapped_type(kind: Any, mapped: Array) -> Any:
    """Return the type with the axis in front that `vmap` has added to another array."""
    over, own = jax.typeof(mapped).sharding, kind.sharding
    first, *_ = names_of(over.spec, mapped.ndim)
    rest = names_of(own.spec, len(kind.shape))
    spec = PartitionSpec(
        first or None, *(tuple(x for x in axes if x not in first) or None for axes in rest)
    )
    sharding = NamedSharding(over.mesh if first else own.mesh, spec)
    return kind.update(shape=(mapped.shape[0], *kind.shape), sharding=sharding)
