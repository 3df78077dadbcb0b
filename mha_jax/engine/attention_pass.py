"""A pass of a backend as one operation that is cut over the devices of a mesh.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size   W words of a random key

A kernel and a loop over groups of heads are closed to XLA's partitioner, which would gather their inputs.
`Plan` says by letters which axes of its flat arrays are those of examples and heads, and runs the pass on
one shard; `bind` makes it one operation, `sharded_attention`, which finds its shards when it is lowered:

* for one device, or inside a `jax.shard_map`: the whole call, as if this module were not there;
* for several: XLA is told the rule, and asks for the program of a shard of the sizes that it has chosen;
* for TPU, where XLA cannot ask, and inside a `jax.shard_map` over a part of the mesh: a `jax.shard_map`
  over the mesh that the program is lowered for, whose axes are known by their names.

Source: Xu et al. 2021, arXiv:2105.04663 and the Shardy documentation (propagation by factors).
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mha_jax.engine.lowering import ordered_effects, turn
from mha_jax.types import Array

BATCH_AXES = ("data", "batch", "dp", "replica", "fsdp")
HEAD_AXES = ("model", "heads", "tensor", "tp", "mp")


@dataclasses.dataclass(frozen=True)
class Axes:
    """Mesh axes over which a call is cut.

    Args:
      batch: Axes that cut the batch.
      heads: Axes that cut the query heads.
      keys: Axes that cut the key-value heads: those of `heads`, or none where K is no multiple.
      mapped: Axes that cut each axis that `vmap` has added, the outermost first.
    """

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    mapped: tuple[tuple[str, ...], ...] = ()

    def spec(self, letters: str, shape: tuple[int, ...], mapped: tuple[bool, ...] = ()) -> Any:
        """Return the PartitionSpec of an array whose axes are `letters`; axes of 1 are not cut."""
        of = {"B": self.batch, "N": self.heads, "K": self.keys}
        outer = [axes for axes, there in zip(self.mapped, mapped) if there]
        inner = [of.get(letter, ()) for letter in letters]
        sizes = zip([*outer, *inner], shape, strict=True)
        return PartitionSpec(*(axes if axes and size > 1 else None for axes, size in sizes))


def fitting(axes: Axes, sizes: dict[str, int], lengths: dict[str, int]) -> Axes:
    """Return the axes that cut a call into equal shards, each of whole groups of heads.

    Args:
      axes: Wanted axes.
      sizes: Of every letter of the call.
      lengths: Of every mesh axis.
    """

    def count(names):
        return math.prod(lengths[name] for name in names)

    def fits(names, taken, size):
        kept: tuple[str, ...] = ()
        for name in names:
            if name not in taken and size % count((*kept, name)) == 0 and lengths[name] > 1:
                kept = (*kept, name)
        return kept

    taken = {name for names in axes.mapped for name in names}
    batch = fits(axes.batch, taken, sizes["B"])
    heads = fits(axes.heads, taken | set(batch), sizes["N"])
    groups = sizes["N"] // sizes["K"]
    while heads and sizes["K"] % count(heads) and groups % (sizes["N"] // count(heads)):
        heads = heads[:-1]
    keys = heads if heads and sizes["K"] % count(heads) == 0 else ()
    return Axes(batch, heads, keys, axes.mapped)


# ---- one shard -----------------------------------------------------------------------------------


def _on_shard(plan: "Plan", axes: Axes, args: tuple) -> Any:
    """Run a pass of a backend on the shard of this device."""
    call, *rest = args
    b, _, n, _ = call.q.shape
    if call.dropout is not None:
        dropout = call.dropout
        dropout = dataclasses.replace(
            dropout,
            batch_start=_int32(dropout.batch_start) + _index(axes.batch) * b,
            head_start=_int32(dropout.head_start) + _index(axes.heads) * n,
        )
        call = dataclasses.replace(call, dropout=dropout)
    kv = call.k.shape[2]
    first = None
    if axes.heads and not axes.keys:
        first = _index(axes.heads) * n // plan.groups
        call = dataclasses.replace(call, k=_head(call.k, first), v=_head(call.v, first))
        if plan.name == "tangent":
            direction = rest[-1]
            moves = {x: _head(a, first) for x in "kv" if (a := getattr(direction, x)) is not None}
            rest = [*rest[:-1], direction._replace(**moves)]
    result = getattr(plan.backend, plan.name)(call, *rest)
    if plan.name != "cotangent":
        return result
    if first is not None:
        dk, dv = (_whole(a, first, kv, axes.heads) for a in (result.k, result.v))
        result = result._replace(k=dk, v=dv)
    if result.bias is None:
        return result
    summed = [name for x in plan.shared for name in (axes.batch if x == "B" else axes.heads)]
    return result._replace(bias=jax.lax.psum(result.bias, summed)) if summed else result


def _int32(x: Any) -> Array:
    return jnp.asarray(x, jnp.int32)


def _index(names: tuple[str, ...]) -> Array:
    return jax.lax.axis_index(names).astype(jnp.int32) if names else jnp.int32(0)


def _head(x: Array, index: Array) -> Array:
    """Return one key-value head of [B, S, K, H]."""
    return jax.lax.dynamic_slice_in_dim(x, index, 1, 2)


def _whole(x: Array, index: Array, count: int, names: tuple[str, ...]) -> Array:
    """Sum the gradients of every device's key-value head into [B, S, K, H]."""
    zeros = jnp.zeros((*x.shape[:2], count, x.shape[3]), x.dtype)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(zeros, x, index, 2), names)


# ---- a pass of a backend as one operation ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """One pass of a backend over flat arrays.

    `sizes` holds those of B, N and K; `inputs` and `outputs` the letters of every array; `levels` one
    tuple a `vmap`, the outermost first, that says which inputs it maps, and the size of its axis;
    `shared` the letters, of B and N, over which the bias broadcasts.
    """

    backend: Any
    name: str
    batch: tuple[str, ...] | None
    heads: tuple[str, ...] | None
    tree: Any
    out_tree: Any
    sizes: tuple[tuple[str, int], ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shared: str = ""
    levels: tuple[tuple[tuple[bool, ...], int], ...] = ()

    @property
    def groups(self) -> int:
        """Query heads for each key-value head."""
        sizes = dict(self.sizes)
        return sizes["N"] // sizes["K"]

    def on_shard(self, axes: Axes) -> Callable[..., list[Array]]:
        """Return the pass on one shard, as a function of flat arrays."""

        def function(*leaves):
            args = jax.tree.unflatten(self.tree, leaves)
            return jax.tree.leaves(_on_shard(self, axes, args))

        for mapped, _ in reversed(self.levels):
            function = jax.vmap(function, in_axes=tuple(0 if there else None for there in mapped))
        return function

    def mapped(self, index: int) -> tuple[bool, ...]:
        """Say for every `vmap` whether it maps an input."""
        return tuple(there[index] for there, _ in self.levels)

    def specs(self, axes: Axes, shapes: Any, out_shapes: Any) -> tuple[tuple, list]:
        """Return the PartitionSpecs of the inputs and of the outputs."""
        inputs = [
            axes.spec(letters, a.shape, self.mapped(i))
            for i, (letters, a) in enumerate(zip(self.inputs, shapes, strict=True))
        ]
        everywhere = (True,) * len(self.levels)
        outputs = [
            axes.spec(x, a.shape, everywhere) for x, a in zip(self.outputs, out_shapes, strict=True)
        ]
        return tuple(inputs), outputs

    def axes_of(self, spec: Any, k_spec: Any, lengths: dict[str, int]) -> Axes:
        """Return how a call is cut whose q and k have these specs."""
        q, k = _names(spec, self.inputs[0], self.mapped(0)), _names(k_spec, "BSKH", self.mapped(1))
        mapped = tuple(a or b for a, b in zip(q[0], k[0]))
        wanted = Axes(q[1]["B"] or k[1]["B"], q[1]["N"] or k[1]["K"], (), mapped)
        return fitting(wanted, dict(self.sizes), lengths)

    def axes_by_name(self, lengths: dict[str, int], names: tuple[str, ...] = ()) -> Axes:
        """Return how a call is cut on a mesh with axes `names`, of which those in `lengths` are free.

        Of axes with names of no known meaning the first cuts the batch and the others the heads, where
        no known one does: any cut is right, and one that does not fit the inputs costs an exchange.
        """
        unknown = [name for name in names if name not in (*BATCH_AXES, *HEAD_AXES)]
        batch = self.batch
        if batch is None:
            batch = tuple(name for name in BATCH_AXES if name in names) or tuple(unknown[:1])
        heads = self.heads
        if heads is None:
            known = tuple(name for name in HEAD_AXES if name in names)
            heads = known or tuple(name for name in unknown if name not in batch)
        batch, heads = (tuple(name for name in x if name in lengths) for x in (batch, heads))
        wanted = Axes(batch, heads, (), ((),) * len(self.levels))
        return fitting(wanted, dict(self.sizes), lengths)

    def rule(self, mesh: Any, inputs: Any, results: Any) -> SdyShardingRule:
        """Return which axes of the arrays are cut together, for Shardy."""
        count = iter(range(10**6))

        def array(letters, mapped, sizes):
            outer = [f"m{level}" for level, there in enumerate(mapped) if there]
            inner = [x.lower() for x in letters.replace("K", "N" if self.groups == 1 else "K")]
            names = [*outer, *inner]
            return ArrayMapping(*(x if n > 1 else f"u{next(count)}" for x, n in zip(names, sizes)))

        operands = [
            array(x, self.mapped(i), t.shape)
            for i, (x, t) in enumerate(zip(self.inputs, inputs, strict=True))
        ]
        everywhere = (True,) * len(self.levels)
        outs = [array(x, everywhere, t.shape) for x, t in zip(self.outputs, results, strict=True)]
        in_order = dict.fromkeys(x for a in (*operands, *outs) for x in a)
        still = tuple(x for x in in_order if x in set("tshvw"))
        # Releases before 0.8 cannot be told; there `partition` alone asks for whole sequences.
        told = "need_replication_factors" in inspect.signature(SdyShardingRule).parameters
        options: dict[str, Any] = {"need_replication_factors": still} if told else {}
        return SdyShardingRule(tuple(operands), tuple(outs), **options)


def _names(spec: Any, letters: str, mapped: tuple[bool, ...]) -> tuple[list, dict]:
    """Return the mesh axes of every mapped axis, and of every letter, of a PartitionSpec."""
    names = [() if x is None else (x,) if isinstance(x, str) else tuple(x) for x in spec]
    names += [()] * (len(letters) + sum(mapped) - len(names))
    outer = iter(names[: sum(mapped)])
    return [next(outer) if there else () for there in mapped], dict(
        zip(letters, names[sum(mapped) :])
    )


@lru_cache(maxsize=1024)
def whole_call(plan: Plan) -> Callable[..., list[Array]]:
    return jax.jit(plan.on_shard(Axes(mapped=((),) * len(plan.levels))))


@lru_cache(maxsize=1024)
def _partitioned(plan: Plan) -> Callable[..., list[Array]]:
    """Return the pass as a function that XLA's partitioner asks how to cut."""

    def decide(mesh, shapes, out_shapes):
        shardings = [shape.sharding for shape in shapes]
        if all(isinstance(s, NamedSharding) for s in shardings[:2]):
            axes = plan.axes_of(shardings[0].spec, shardings[1].spec, dict(mesh.shape))
        else:  # a sharding that no mesh describes
            axes = plan.axes_by_name({})
            mesh = Mesh(sorted(shardings[0].device_set, key=lambda d: d.id), ("devices",))
        place = partial(NamedSharding, mesh)
        inputs, outputs = plan.specs(axes, shapes, out_shapes)
        return mesh, axes, tuple(map(place, inputs)), list(map(place, outputs))

    def partition(mesh, shapes, out_shapes):
        mesh, axes, inputs, outputs = decide(mesh, shapes, out_shapes)
        return mesh, plan.on_shard(axes), outputs, inputs

    def infer(mesh, shapes, out_shapes):
        return decide(mesh, shapes, out_shapes)[3]

    function = custom_partitioning(lambda *leaves: whole_call(plan)(*leaves))
    function.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=plan.rule)
    return function


def bind(plan: Plan, leaves: Any) -> list[Array]:
    """The one door to the primitive. Its jaxpr shows what it runs; there no value varies over a mesh."""
    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    jaxpr = jax.make_jaxpr(_partitioned(plan))(*plain)
    types = jaxpr.out_avals
    if any(jax.typeof(x) != ShapedArray(x.shape, x.dtype) for x in leaves):
        types = jax.make_jaxpr(lambda *xs: _varying(jaxpr.out_avals, xs))(*leaves).out_avals
    return sharded_p.bind(*leaves, plan=plan, jaxpr=jaxpr, types=tuple(types))


def _varying(types: Any, leaves: Any) -> list[Array]:
    """Return arrays of these types that vary over every mesh axis of a shard_map that a leaf does."""
    nothing = sum((jnp.sum(x.reshape(-1)[:0], dtype=jnp.float32) for x in leaves), jnp.float32(0))
    return [jnp.zeros(x.shape, x.dtype) + nothing.astype(x.dtype) for x in types]


@lru_cache(maxsize=1024)
def _jitted(plan: Plan) -> Callable[..., list[Array]]:
    return jax.jit(lambda *leaves: bind(plan, leaves))


def _run(*leaves: Any, plan: Plan, **_: Any) -> list[Array]:
    return _jitted(plan)(*leaves)


def _types(*_: Any, types: Any, jaxpr: Any, **__: Any) -> tuple[list[Any], set[Any]]:
    return list(types), {turn()} if ordered_effects(jaxpr) else set()


def _batch(leaves: Any, dims: Any, *, plan: Plan, **_: Any) -> tuple[list, list[int]]:
    mapped = tuple(dim is not None for dim in dims)
    (size,) = {x.shape[dim] for x, dim in zip(leaves, dims) if dim is not None}
    leaves = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, dims)]
    out = bind(dataclasses.replace(plan, levels=((mapped, size), *plan.levels)), leaves)
    return out, [0] * len(out)


def _lower(ctx: Any, *values: Any, plan: Plan, jaxpr: Any, types: Any, ask: bool) -> Any:
    """Lower for one device, for XLA to ask how to cut, or cut by the names of the mesh's axes."""
    # Inside a shard_map nothing says here that values vary: a pass has no collectives, only loops, whose
    # first values would have to vary as well.
    ins, outs = ([ShapedArray(x.shape, x.dtype) for x in a] for a in (ctx.avals_in, types))
    effects = ordered_effects(jaxpr)
    tokens = mlir.TokenSet({effect: ctx.tokens_in.get(turn()) for effect in effects})
    inner = ctx.replace(avals_in=ins, avals_out=outs, tokens_in=tokens)
    mesh, free, taken = _free_axes(ctx.module_context.axis_context)
    if not free:
        function = whole_call(plan)
    elif ask and not taken:
        function = jaxpr_as_fun(jaxpr)
    else:
        axes = plan.axes_by_name({name: mesh.shape[name] for name in free}, mesh.axis_names)
        inputs, outputs = plan.specs(axes, ins, outs)
        function = jax.shard_map(
            plan.on_shard(axes),
            mesh=mesh,
            in_specs=inputs,
            out_specs=outputs,
            axis_names=set(free),
            check_vma=False,
        )
    results = mlir.lower_fun(function, multiple_results=True)(inner, *values)
    for effect in effects:
        ctx.set_tokens_out(mlir.TokenSet({turn(): inner.tokens_out.get(effect)}))
    return results


def _free_axes(context: Any) -> tuple[Any, tuple[str, ...], bool]:
    """Return the mesh lowered for, its axes that no shard_map has taken, and whether one has taken any."""
    if hasattr(context, "manual_axes"):
        mesh = getattr(context.mesh, "abstract_mesh", context.mesh)
        taken = {*context.manual_axes, *mesh.manual_axes}
        mesh = mesh.update_axis_types(dict.fromkeys(taken, AxisType.Manual))
        return mesh, tuple(name for name in mesh.axis_names if name not in taken), bool(taken)
    if getattr(context, "num_devices", 1) == 1:
        return None, (), False
    mesh = getattr(context, "abstract_mesh", None)
    if mesh is None or not mesh.axis_names:
        mesh = AbstractMesh((context.num_devices,), ("devices",))
    return mesh, tuple(mesh.axis_names), False


sharded_p = Primitive("sharded_attention")
sharded_p.multiple_results = True
sharded_p.def_impl(_run)
sharded_p.def_effectful_abstract_eval(_types)
batching.primitive_batchers[sharded_p] = _batch
mlir.register_lowering(sharded_p, partial(_lower, ask=True))
mlir.register_lowering(sharded_p, partial(_lower, ask=False), platform="tpu")
