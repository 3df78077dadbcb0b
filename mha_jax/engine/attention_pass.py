"""One pass of one problem as one operation, whose platform and mesh are found when it is lowered.

B batch   T query length   S key length   N query heads   K key-value heads
H query-key head size   V value head size

Tracing a call traces no backend: the operation holds the pass by name, its arrays and their letters.  When
it is lowered, for one platform or for several in one program,

* the backend is chosen for that platform, unless the caller named one;
* a backend that is plain XLA is lowered as it is, in a form that XLA's partitioner can cut where the
  program is for several devices;
* a kernel is cut by a `jax.shard_map` over the mesh lowered for, along the axes that types say explicitly,
  that the caller named, or that have common names.

* tokens of one example that lie on several devices are attended by a backend of `backends.sequence`, which
  holds the chosen one. Their shards have equal lengths: what is added is hidden, and cut off the results.

Where K is no multiple of the head axis, keys and values are held by every device of it, and each takes the
key-value head that its query heads read.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mha_jax.attention.biases import OfHeads
from mha_jax.attention.call import (
    Moves,
    Output,
    Problem,
    State,
    after_sinks,
    kept,
    moving,
    without_constants,
)
from mha_jax.backends.base import Backend
from mha_jax.engine import mesh as meshes
from mha_jax.engine.choose import PLATFORMS, complete, default_platform
from mha_jax.engine.cuts import Cut, pad, padded, plan, without_padded_keys
from mha_jax.engine.mesh import Place, Wanted
from mha_jax.types import Array, ArrayLike


class Level(NamedTuple):
    """One `vmap`: which inputs it maps, and the size of its axis."""

    mapped: tuple[bool, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a backend over flat arrays; hashable, a parameter of the operation.

    Args:
      run: `forward`, `cotangent` or `tangent` of this module.
      backend: What runs it; None chooses by the platform lowered for.
      wanted: Mesh axes that cut a kernel.
      mesh: The mesh that is known while tracing, from the context or from types; None without one.
      tree: Structure of the pass's arguments, a problem first.
      letters: Of the axes of every input.
      outputs: Of the axes of every output.
      levels: One for every `vmap`, the outermost first.
    """

    run: Callable[..., Any]
    backend: Backend | None
    wanted: Wanted
    mesh: Any
    tree: Any
    letters: tuple[str, ...]
    outputs: tuple[str, ...]
    levels: tuple[Level, ...] = ()

    def levels_of(self, index: int) -> tuple[bool, ...]:
        """Say for every `vmap` whether it maps an input."""
        return tuple(level.mapped[index] for level in self.levels)

    def problem(self, kinds: Sequence[Any]) -> Problem:
        """Return the problem of one example of every `vmap`, as shapes."""
        shapes = (x.shape[sum(self.levels_of(i)) :] for i, x in enumerate(kinds))
        leaves = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, kinds)]
        return jax.tree.unflatten(self.tree, leaves)[0]

    def of_leaves(self, backend: Backend, cut: Cut | None = None) -> Callable[..., list[Array]]:
        """Return the pass as a function of flat arrays, whole or those of one shard."""

        run = self.run if cut is None else partial(_on_shard, self.run, cut)

        def function(*leaves):
            return jax.tree.leaves(run(backend, *jax.tree.unflatten(self.tree, leaves)))

        for level in reversed(self.levels):
            in_axes = tuple(0 if there else None for there in level.mapped)
            function = jax.vmap(
                function, in_axes=in_axes
            )  # a shard's axis may be shorter than the level
        return function


# ---- the three passes ---------------------------------------------------------------------------


def forward(backend: Backend, problem: Problem, sinks: Array | None) -> State:
    return after_sinks(backend.forward(problem), sinks)


def cotangent(backend: Backend, problem: Problem, state: State, cotangent: Output) -> Moves:
    return without_constants(problem, backend.cotangent(problem, state, cotangent))


def tangent(backend: Backend, problem: Problem, state: State, direction: Moves) -> Output:
    return backend.tangent(problem, state, direction)


@dataclasses.dataclass(frozen=True)
class Runner:
    """Who runs the passes of a problem: a backend, None to choose, and how a kernel is cut."""

    backend: Backend | None = None
    wanted: Wanted = Wanted()  # noqa: RUF009

    def forward(self, problem: Problem, sinks: Array | None = None) -> State:
        b, t, n, _ = problem.q.shape
        statistics = ((b, n, t), jnp.dtype(problem.accumulator))
        shapes = ((b, t, n, problem.v.shape[-1]), problem.v.dtype), statistics, statistics
        return State(*self._bind(forward, meshes.STATE, shapes, problem, sinks))

    def cotangent(self, problem: Problem, state: State, ct: Output) -> Moves:
        asked = moving(problem)
        leaves, tree = jax.tree.flatten(asked)
        shapes = [(jnp.shape(x), jnp.result_type(x)) for x in leaves]
        found = self._bind(cotangent, _letters(asked), shapes, problem, state, ct)
        return jax.tree.unflatten(tree, found)

    def tangent(self, problem: Problem, state: State, direction: Moves) -> Output:
        shapes = [(x.shape, x.dtype) for x in (state.out, state.l)]
        return Output(*self._bind(tangent, meshes.OUTPUT, shapes, problem, state, direction))

    def differentiable(self) -> Backend:
        """Return a backend whose passes JAX can differentiate."""
        return (self.backend or Backend()).differentiable()

    def _bind(
        self, run: Callable, outputs: tuple, shapes: Any, problem: Problem, *rest: Any
    ) -> list:
        leaves, tree = jax.tree.flatten((problem, *rest))
        leaves = meshes.vary_alike([_as_array(x) for x in leaves])
        letters = (*meshes.letters_of(problem), *(x for value in rest for x in _letters(value)))
        mesh = meshes.traced_mesh(leaves[0])
        this = Pass(run, self.backend, self.wanted, mesh, tree, letters, outputs)
        cut = meshes.cut_by_letter(zip(letters, leaves), problem.groups)
        types = tuple(
            meshes.typed_like(leaves[0], x, shape, dtype, cut)
            for x, (shape, dtype) in zip(outputs, shapes, strict=True)
        )
        asks = None if mesh is not None else _needs_devices()
        return attention_pass_p.bind(*leaves, this=this, types=types, asks=asks)


@lru_cache(maxsize=1)
def _needs_devices() -> Any:
    """Return a program that is never run: JAX tells the mesh of the arrays when it lowers what holds one."""
    like = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.make_jaxpr(lambda x: jax.pure_callback(lambda x: x, like, x))(like)


def _letters(value: Any) -> tuple[str, ...]:
    """Return the letters of what goes into a pass beside the problem."""
    if not isinstance(value, (State, Output, Moves)):  # sinks
        return () if value is None else ("N",)
    if isinstance(value, State):
        return meshes.STATE
    if isinstance(value, Output):
        return meshes.OUTPUT
    dense = tuple(x for a, x in zip(value, meshes.MOVES) if a is not None)
    return dense + tuple("?" * jnp.ndim(a) for a in jax.tree.leaves(value.bias_rule))


def _as_array(x: Any) -> Array:
    if isinstance(x, jax.Array):
        return x
    return jnp.asarray(x, jnp.int32 if isinstance(x, int) else None)


# ---- one shard ----------------------------------------------------------------------------------


def _on_shard(run: Callable, cut: Cut, backend: Backend, problem: Problem, *args: Any) -> Any:
    """Run a pass of a backend on the shard of this device."""
    rest, axes = list(args), cut.axes
    b, t, n, _ = problem.q.shape
    sides = zip((problem.q_tokens, problem.k_tokens), (t, problem.k.shape[1]))
    q_tokens, k_tokens = (dataclasses.replace(tokens, length=n) for tokens, n in sides)
    problem = dataclasses.replace(problem, q_tokens=q_tokens, k_tokens=k_tokens)
    if problem.dropout is not None:
        dropout = problem.dropout
        dropout = dataclasses.replace(
            dropout,
            batch_start=dropout.batch_start + _index(axes.batch) * b,
            head_start=dropout.head_start + _index(axes.heads) * n,
        )
        problem = dataclasses.replace(problem, dropout=dropout)
    ruled = problem.bias_rule is not None and bool(axes.heads)
    if ruled:  # the rule knows heads by their numbers in the whole
        heads = _index(axes.heads) * n + jnp.arange(n, dtype=jnp.int32)
        problem = dataclasses.replace(problem, bias_rule=OfHeads(problem.bias_rule, heads))
        rest = [_of_rule(x) if isinstance(x, Moves) else x for x in rest]
    problem = without_padded_keys(problem, cut)
    shared = bool(axes.heads) and not axes.keys
    kv = problem.k.shape[2]
    # Where the devices of the head axis hold all key-value heads, each of them reads one.
    whole = jax.lax.axis_size(axes.heads) if shared else 1
    first = _index(axes.heads) * n // (n * whole // kv)
    if shared:
        problem = dataclasses.replace(problem, k=_head(problem.k, first), v=_head(problem.v, first))
        rest = [_of_head(x, first) if isinstance(x, Moves) else x for x in rest]
    result = run(backend, problem, *rest)
    if not isinstance(result, Moves):
        return result
    if shared:
        dk, dv = (_whole(x, first, kv, axes.heads) for x in (result.k, result.v))
        result = result._replace(k=dk, v=dv)
    if result.bias is not None and cut.bias:
        result = result._replace(bias=jax.lax.psum(result.bias, cut.bias))
    moved = result.bias_rule.bias if ruled else result.bias_rule
    everywhere = (*axes.batch, *axes.heads, *axes.sequence)
    if jax.tree.leaves(moved) and everywhere:
        moved = jax.lax.psum(moved, everywhere)
    return result._replace(bias_rule=moved)


def _of_rule(direction: Moves) -> Moves:
    rule = direction.bias_rule
    return direction._replace(bias_rule=None if rule is None else OfHeads(rule, None))


def _index(names: tuple[str, ...]) -> Array:
    return jax.lax.axis_index(names).astype(jnp.int32) if names else jnp.int32(0)


def _head(x: Any, index: Array) -> Any:
    """Return one key-value head of [B, S, K, H]."""
    return None if x is None else jax.lax.dynamic_slice_in_dim(x, index, 1, 2)


def _of_head(direction: Moves, index: Array) -> Moves:
    return direction._replace(k=_head(direction.k, index), v=_head(direction.v, index))


def _whole(x: Any, index: Array, count: int, names: tuple[str, ...]) -> Array:
    """Sum the gradients of every device's key-value head into [B, S, K, H]."""
    zeros = jnp.zeros((*x.shape[:2], count, x.shape[3]), x.dtype)
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(zeros, x, index, 2), names)


# ---- the operation ------------------------------------------------------------------------------


def _program(
    this: Pass, kinds: Sequence[Any], types: Sequence[Any], platform: str, place: Place
) -> Any:
    """Return the pass as a compiled function of flat arrays, for a platform and a place."""
    problem = this.problem(kinds)
    backend = complete(this.backend, problem, platform)
    mapped = this.levels[0].size if this.levels else 1
    backend, cut, _ = plan(backend, problem, this.wanted, place, mapped)
    if cut is None:
        return _whole_program(this, backend)
    everywhere = (True,) * len(this.levels)
    inputs = enumerate(zip(this.letters, kinds, strict=True))
    outputs = zip(this.outputs, types, strict=True)

    def spec(letters, shape, levels):
        return cut.axes.spec(letters, padded(letters, shape, dict(cut.padded)), levels)

    return _cut_program(
        *(this, backend, cut, place),
        tuple(spec(x, a.shape, this.levels_of(i)) for i, (x, a) in inputs),
        tuple(spec(x, a.shape, everywhere) for x, a in outputs),
    )


@lru_cache(maxsize=1024)
def _whole_program(this: Pass, backend: Backend) -> Callable[..., list[Array]]:
    return jax.jit(this.of_leaves(backend))


@lru_cache(maxsize=1024)
def _cut_program(
    this: Pass, backend: Backend, cut: Cut, place: Place, inputs: tuple, outputs: tuple
) -> Callable[..., list[Array]]:
    shards = jax.shard_map(
        this.of_leaves(backend, cut),
        mesh=place.mesh,
        in_specs=inputs,
        out_specs=list(outputs),
        axis_names=set(place.free),
        check_vma=False,
    )

    @meshes.types_say_nothing()  # jit of jax 0.7 brings a context's types back
    def function(*leaves):
        if cut.padded == cut.real:
            return shards(*leaves)
        longer, real = dict(cut.padded), dict(cut.real)
        sides = zip(this.letters, leaves, strict=True)
        shapes = [padded(letters, x.shape, longer) for letters, x in sides]
        results = shards(*map(pad, leaves, shapes))
        shapes = [padded(x, a.shape, real) for x, a in zip(this.outputs, results, strict=True)]
        return [a[tuple(map(slice, shape))] for a, shape in zip(results, shapes)]

    return jax.jit(function)


def _run(*leaves: ArrayLike, this: Pass, types: Any, asks: Any) -> list[Array]:
    arrays = tuple(map(jnp.asarray, leaves))  # numbers stand here for arrays of one
    place = meshes.place_of_arrays(arrays)
    program = _program(this, arrays, types, default_platform(), place)
    return meshes.run_at_once(program, arrays, types)


def _lower(ctx: Any, *values: Any, this: Pass, types: Any, asks: Any, platform: str) -> Any:
    place = meshes.place_of_lowering(ctx.module_context.axis_context, this.mesh)

    def function(*leaves):
        return _program(this, ctx.avals_in, types, platform, place)(*leaves)

    return meshes.lower_without_types(function, ctx, values)


def _types(*_: Any, this: Pass, types: Any, asks: Any) -> tuple[list, Any]:
    return list(types), this.backend.effects() if this.backend else set()


def _batch(leaves: Any, dims: Any, *, this: Pass, types: Any, asks: Any) -> tuple[list, list[int]]:
    mapped = tuple(dim is not None for dim in dims)
    (size,) = {x.shape[dim] for x, dim in zip(leaves, dims) if dim is not None}
    leaves = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(leaves, dims)]
    first = next(x for x, there in zip(leaves, mapped) if there)
    types = tuple(meshes.mapped_type(kind, first) for kind in types)
    this = dataclasses.replace(this, levels=(Level(mapped, size), *this.levels))
    out = attention_pass_p.bind(*leaves, this=this, types=types, asks=asks)
    return out, [0] * len(out)


def _transpose(cotangents: Any, *leaves: Any, this: Pass, **_: Any) -> list[Any]:
    """Transpose the forward pass in the values, of which the output is a linear function."""
    free = [i for i, x in enumerate(leaves) if ad.is_undefined_primal(x)]
    if this.run is not forward or free != [2]:
        raise NotImplementedError(
            "attention is linear in its values alone, and only its output is: got a transpose in other "
            "arrays or passes. Use jax.grad or jax.vjp."
        )
    runner = Runner(this.backend, this.wanted)

    def pull(ct, *leaves):
        problem, sinks = jax.tree.unflatten(this.tree, leaves)
        problem = dataclasses.replace(problem, constants=("bias", "bias_rule"))
        state = runner.forward(problem)
        state, l = state._replace(out=jnp.zeros_like(ct)), state.l
        ct = ct if sinks is None else kept(ct, state, sinks)
        return jnp.asarray(runner.cotangent(problem, state, Output(ct, jnp.zeros_like(l))).v)

    for level in reversed(this.levels):
        axes = tuple(0 if there else None for there in level.mapped)
        pull = jax.vmap(pull, (0, *axes), axis_size=level.size)
    kind = leaves[2].aval
    values = jnp.zeros(kind.shape, kind.dtype)
    ct = pull(ad.instantiate_zeros(cotangents[0]), *leaves[:2], values, *leaves[3:])
    apart = tuple(i for i, there in enumerate(this.levels_of(2)) if not there)
    return [jnp.sum(ct, apart) if i == 2 else None for i in range(len(leaves))]


attention_pass_p = Primitive("attention_pass")
attention_pass_p.multiple_results = True
attention_pass_p.def_impl(_run)
attention_pass_p.def_effectful_abstract_eval(_types)
batching.primitive_batchers[attention_pass_p] = _batch
ad.primitive_transposes[attention_pass_p] = _transpose
# By default too: platforms that nobody has named here run what needs none.
mlir.register_lowering(attention_pass_p, partial(_lower, platform="other"))
for _platform in PLATFORMS:
    mlir.register_lowering(
        attention_pass_p, partial(_lower, platform=_platform), platform=_platform
    )
