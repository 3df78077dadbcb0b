"""A linear map that autodiff leaves whole, and that brings its own transpose.

Fast attention has two hand-written passes: a forward pass that saves `(out, lse)`, and a backward
pass that rebuilds the weights tile by tile. `jax.custom_vjp` joins the two, but then `jvp`,
`linearize`, `jacfwd` and Hessian-vector products are errors. `jax.custom_jvp` allows all of them,
but reverse mode then takes the tangent rule apart: whatever in it depends on the primals alone,
here every tile of weights, is computed early and kept, T x S in all.

`linear_map` is the piece between them. Called in a `jax.custom_jvp` rule to compute the tangent, it
is one opaque operation to every transformation:

* partial evaluation (`grad`, `linearize`, `jax.checkpoint`) stages it out whole and keeps nothing
  but its residuals;
* its transpose is the given one, a `linear_map` again whose transpose is the first function;
* its derivative along the linear inputs is itself; along the residuals it is a further `linear_map`
  made of `jax.jvp` and `jax.vjp` of the plain function, so that every order exists;
* `vmap` maps both functions, so that the pair stays a pair.

First-order reverse mode is then the very program that `custom_vjp` would run. Higher orders
differentiate the two functions as they are: forward over anything keeps their memory; reverse over
anything needs `jax.checkpoint` on the bodies of their loops to keep it, free at first order.

`jax.custom_derivatives.linear_call` is the same idea, without rules for `vmap` and for residuals
that are perturbed. A random key, a mask or a position is a residual like any other.

Source: Frostig et al., "Decomposing reverse-mode automatic differentiation", arXiv:2105.09469.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mha_jax.engine import mesh as meshes

# A jitted function of flat arrays, residuals first, to be traced once for each set of shapes.
Flat = Callable[..., list[jax.Array]]


def linear_map(
    fun: Callable[[Any, Any], Any],
    transpose: Callable[[Any, Any], Any],
    residuals: Any,
    linear: Any,
    types: Any = None,
) -> Any:
    """Computes `fun(residuals, linear)` as one operation with the given transpose.

    Both functions take everything traced through their arguments. They should be the same objects
    at every call (functions of a module), since their traces are cached by identity; configuration
    can travel in `residuals`, as static fields of a pytree.

    Args:
      fun: linear in its second argument; differentiable JAX code, as is `transpose`, where second
        derivatives are wanted.
      transpose: takes the residuals and a cotangent of what `fun` returns, zeros filled in, and
        returns the cotangent of `linear` in the same structure. Where `linear` has `None` it may
        return anything, which is dropped, and compiled away under `jit`.
      residuals: a pytree of arrays of any dtype.
      linear: a pytree of floating arrays, with `None` for what is not perturbed.
      types: of what `fun` returns, as `jax.typeof` gives them, where they say how it lies on a mesh;
        inside, `fun` and `transpose` are traced without such types, and XLA partitions them.

    Returns:
      What `fun` returns, a pytree of floating arrays.

    Raises:
      TypeError: a function closes over a traced value, or `transpose` does not return a cotangent
        of `linear`.

    Cost:
      That of `fun`, or of `transpose` in reverse mode, and of the residuals in memory between.

    Example:
      >>> import jax
      >>> from mha_jax.engine.linear_map import linear_map
      >>> def scaled(x, t):
      ...     return 3 * x**2 * t
      >>> @jax.custom_jvp
      ... def cube(x):
      ...     return x**3
      >>> @cube.defjvp
      ... def cube_jvp(primals, tangents):
      ...     return cube(*primals), linear_map(scaled, scaled, *primals, *tangents)
      >>> print(jax.grad(cube)(2.0), jax.hessian(cube)(2.0), jax.jacfwd(jax.hessian(cube))(2.0))
      12.0 12.0 6.0
    """
    residuals, linear = jax.tree.map(_as_array, (residuals, linear))
    residual_leaves, residual_tree = jax.tree.flatten(residuals)
    linear_leaves, linear_tree = jax.tree.flatten(linear)
    if types is None:
        like = meshes.vary_alike([*linear_leaves, *residual_leaves])[0]
        kinds = jax.tree.map(lambda x: meshes.plain(jax.typeof(x)), (residuals, linear))
        with meshes.types_say_nothing():
            shapes = jax.eval_shape(fun, *kinds)
        types = jax.tree.map(
            lambda x: meshes.typed_like(like, "?" * x.ndim, x.shape, x.dtype, {}), shapes
        )
    out_types, out_tree = jax.tree.flatten(types)
    flat_fun = _flat(fun, residual_tree, linear_tree, out_tree)
    flat_transpose = _flat(transpose, residual_tree, out_tree, linear_tree)
    out_leaves = _bind(flat_fun, flat_transpose, residual_leaves, linear_leaves, out_types)
    return jax.tree.unflatten(out_tree, out_leaves)


def _as_array(value: Any) -> jax.Array:
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


@lru_cache(maxsize=256)
def _flat(fun: Callable, residual_tree: Any, in_tree: Any, out_tree: Any) -> Flat:
    def flat(*leaves: jax.Array) -> list[jax.Array]:
        residuals, inputs = _split(leaves, residual_tree.num_leaves)
        out = fun(jax.tree.unflatten(residual_tree, residuals), jax.tree.unflatten(in_tree, inputs))
        return _leaves_like(out_tree, out, _name(fun))

    return jax.jit(_named(flat, _name(fun)))


def _name(fun: Callable) -> str:
    return getattr(fun, "__name__", "linear_map")


def _named(fun: Callable, name: str) -> Callable:
    fun.__name__ = fun.__qualname__ = name
    return fun


def _split(values: Sequence, count: int) -> tuple[list, list]:
    return list(values[:count]), list(values[count:])


def _leaves_like(tree: Any, value: Any, name: str) -> list[jax.Array]:
    """The leaves of `value` at the places where `tree` has leaves, not `None`."""
    wanted = jax.tree.unflatten(tree, [True] * tree.num_leaves)
    marks, expected = jax.tree.flatten(wanted, is_leaf=lambda leaf: leaf is None)
    leaves, found = jax.tree.flatten(value, is_leaf=lambda leaf: leaf is None)
    kept = [leaf for mark, leaf in zip(marks, leaves) if mark]
    if found != expected or any(leaf is None for leaf in kept):
        raise TypeError(
            f"{name} returned {jax.tree.structure(value)}, expected {tree}: "
            "a transpose must return one cotangent for each linear input, in their structure."
        )
    return kept


def _bind(
    fun: Flat, transpose: Flat, residuals: Sequence, linear: Sequence, types: Sequence
) -> list[jax.Array]:
    """The one door to the primitive: traces `fun` once, to see that it returns what it should."""
    # The cotangent of a linear input that is the same on all devices is summed over them.
    linear = meshes.vary_alike([*linear, *residuals])[: len(linear)]
    kinds = [meshes.plain(jax.typeof(x)) for x in (*residuals, *linear)]
    with meshes.types_say_nothing():
        jaxpr = jax.make_jaxpr(fun)(*kinds)
    if any(isinstance(const, jax.core.Tracer) for const in jaxpr.consts):
        raise TypeError(
            f"{_name(fun)} closes over a traced value, which a linear_map cannot follow: "
            "pass it in `residuals`."
        )
    for found, wanted in zip(jaxpr.out_avals, types):
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise TypeError(
                f"{_name(fun)} returned a cotangent {found.dtype}{list(found.shape)} for a linear input "
                f"{wanted.dtype}{list(wanted.shape)}: a transpose must keep shapes and dtypes."
            )
    params = {"fun": fun, "transpose": transpose, "num_residuals": len(residuals)}
    # The jaxpr is there to be seen: JAX looks into it for what a program needs.
    return linear_map_p.bind(*residuals, *linear, **params, types=tuple(types), jaxpr=jaxpr)


def _run(*args: Any, fun: Flat, types: Sequence, **_: Any) -> list[jax.Array]:
    return meshes.run_at_once(fun, args, types)


def _lower(ctx: Any, *values: Any, fun: Flat, **_: Any) -> Any:
    return meshes.lower_without_types(fun, ctx, values)


def _jvp(primals: Sequence, tangents: Sequence, **params: Any) -> tuple[list, list]:
    residuals, _ = _split(primals, params["num_residuals"])
    residual_tangents, linear_tangents = _split(tangents, params["num_residuals"])
    out = linear_map_p.bind(*primals, **params)
    terms = []
    if any(type(tangent) is not ad.Zero for tangent in linear_tangents):
        linear_tangents = map(ad.instantiate_zeros, linear_tangents)
        terms.append(linear_map_p.bind(*residuals, *linear_tangents, **params))
    moved = tuple(i for i, t in enumerate(residual_tangents) if type(t) is not ad.Zero)
    if moved:
        fun, transpose = _derivative(params["fun"], len(primals), moved)
        directions = [residual_tangents[i] for i in moved]
        terms.append(_bind(fun, transpose, primals, directions, params["types"]))
    return out, terms[0] if len(terms) == 1 else list(map(jnp.add, *terms))


@lru_cache(maxsize=256)
def _derivative(fun: Flat, num_primals: int, moved: tuple[int, ...]) -> tuple[Flat, Flat]:
    """The derivative of `fun` along the arguments `moved`, all its arguments being residuals."""

    def at(primals: list) -> tuple[Callable, list]:
        def fun_of_moved(*values: jax.Array) -> list[jax.Array]:
            replaced = dict(zip(moved, values))
            return fun(*(replaced.get(i, primal) for i, primal in enumerate(primals)))

        return fun_of_moved, [primals[i] for i in moved]

    def tangent(*args: jax.Array) -> list[jax.Array]:
        primals, directions = _split(args, num_primals)
        fun_of_moved, values = at(primals)
        return jax.jvp(fun_of_moved, values, directions)[1]

    def cotangent(*args: jax.Array) -> list[jax.Array]:
        primals, cotangents = _split(args, num_primals)
        fun_of_moved, values = at(primals)
        return list(jax.vjp(fun_of_moved, *values)[1](cotangents))

    name = _name(fun)
    return jax.jit(_named(tangent, f"{name}_jvp")), jax.jit(_named(cotangent, f"{name}_vjp"))


def _transpose(cotangents: Sequence, *args: Any, **params: Any) -> list[Any]:
    residuals, linear = _split(args, params["num_residuals"])
    cotangents = list(map(ad.instantiate_zeros, cotangents))
    types = [x.aval if ad.is_undefined_primal(x) else jax.typeof(x) for x in linear]
    out = _bind(params["transpose"], params["fun"], residuals, cotangents, types)
    # A linear input with a value here is a zero that stands for no tangent: none is asked for.
    out = [ct if ad.is_undefined_primal(value) else None for ct, value in zip(out, linear)]
    return [None] * len(residuals) + out


def _batch(args: Sequence, dims: Sequence, **params: Any) -> tuple[list, list[int]]:
    (size,) = {arg.shape[dim] for arg, dim in zip(args, dims) if dim is not None}
    residuals, linear = _split(args, params["num_residuals"])
    residual_dims, linear_dims = _split(dims, params["num_residuals"])
    # Every linear input is mapped: the cotangent of one that was not is a sum over the batch,
    # which the transpose of this broadcast takes.
    linear = [
        jnp.broadcast_to(value, (size, *value.shape))
        if dim is None
        else jnp.moveaxis(value, dim, 0)
        for value, dim in zip(linear, linear_dims)
    ]
    residual_dims, num_out = tuple(residual_dims), len(params["types"])
    fun = _mapped(params["fun"], residual_dims, len(linear), size)
    transpose = _mapped(params["transpose"], residual_dims, num_out, size)
    types = [meshes.mapped_type(kind, linear[0]) for kind in params["types"]]
    return _bind(fun, transpose, residuals, linear, types), [0] * num_out


@lru_cache(maxsize=256)
def _mapped(fun: Flat, residual_dims: tuple[int | None, ...], num_linear: int, size: int) -> Flat:
    axes = (*residual_dims, *[0] * num_linear)
    return jax.jit(_named(jax.vmap(fun, in_axes=axes, axis_size=size), _name(fun)))


linear_map_p = Primitive("linear_map")
linear_map_p.multiple_results = True
linear_map_p.def_impl(_run)
linear_map_p.def_effectful_abstract_eval(
    lambda *_, types, jaxpr, **__: (list(types), jaxpr.effects)
)
mlir.register_lowering(linear_map_p, _lower)
ad.primitive_jvps[linear_map_p] = _jvp
ad.primitive_transposes[linear_map_p] = _transpose
batching.primitive_batchers[linear_map_p] = _batch
