"""A hundred programs: what is computed of attention, and the programs around it.

A program takes a function of (q, k, v) and returns another. A name is "what" or "around:what".
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.experimental import checkify, io_callback
from jax.experimental.jet import jet
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def loss(f):
    return lambda *args: jnp.sum(jnp.sin(f(*args)))


def hvp(f):
    return lambda *args: jax.jvp(jax.grad(loss(f), (0, 1, 2)), args, args)[1]


def disabled(f):
    def run(*args):
        with jax.disable_jit():
            return f(*args)

    return run


def under(switch, f):
    def run(*args):
        with switch:
            return f(*args)

    return run


THREE = (0, 1, 2)


def scanned(g):
    """Run a program in a `lax.scan`, twice."""
    return lambda *args: jax.lax.scan(lambda c, _: (c, g(*args)), 0, None, length=2)[1]


def looped(g):
    """Run a program in a `lax.while_loop`, twice, whose carry is its result."""

    def run(*args):
        kinds = jax.eval_shape(g, *args)
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kinds)
        step = lambda carry: (carry[0] + 1, g(*args))  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0] < 2, step, (0, start))[1]

    return run


def counted(g):
    return lambda *args: jax.lax.fori_loop(0, 2, lambda _, found: g(*args), g(*args))


def branched(g):
    return lambda q, k, v: jax.lax.cond(q[0, 0, 0, 0] < 9, g, lambda *a: g(*a), q, k, v)


def switched(g):
    return lambda *args: jax.lax.switch(jnp.int32(1), [g, g, g], *args)


def kept_forward(g):
    """A function of the caller's own rule: forward as it is, backward by JAX's `vjp` of it."""
    f = jax.custom_vjp(g)
    f.defvjp(lambda *args: jax.vjp(g, *args), lambda pull, d: pull(d))
    return f


def own_tangent(g):
    f = jax.custom_jvp(g)
    f.defjvp(lambda args, moves: jax.jvp(g, args, moves))
    return f


def examples(g):
    """Run a program of arrays with a batch, once for each example, side by side."""

    def one(q, k, v):
        return jax.tree.map(lambda a: a[0], g(q[None], k[None], v[None]))

    return jax.vmap(one)


def mapped_in_turn(g):
    def one(args):
        return jax.tree.map(lambda a: a[0], g(*(a[None] for a in args)))

    return lambda *args: jax.lax.map(one, args)


def checked(g):
    """Run a program as `checkify` rewrites it."""

    def run(*args):
        error, found = checkify.checkify(g)(*args)
        error.throw()
        return found

    return run


def beside(g):
    """Run a program with a callback to the host beside it."""

    def run(*args):
        found = g(*args)
        kind = jax.ShapeDtypeStruct((), jnp.float32)
        one = io_callback(lambda x: np.float32(1), kind, args[0][0, 0, 0, 0])
        return jax.tree.map(lambda a: a * one, found)

    return run


def printed(g):
    def run(*args):
        jax.debug.callback(lambda x: None, args[0][0, 0, 0, 0])
        return g(*args)

    return run


def exported(g):
    def run(*args):
        kept = export.export(jax.jit(g))(*args).serialize()
        return export.deserialize(kept).call(*args)

    return run


def ahead(g):
    return lambda *args: jax.jit(g).lower(*args).compile()(*args)


def by_jaxpr(g):
    """Make the jaxpr of a program, and run that."""

    def run(*args):
        closed = jax.make_jaxpr(g)(*args)
        leaves = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *args)
        return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(g, *args)), leaves)

    return run


def donated(g):
    run = jax.jit(g, donate_argnums=THREE)

    def copied(*args):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
            return run(*(jnp.array(a, copy=True) for a in args))

    return copied


def over_shards(g):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(g, mesh=mesh, in_specs=P("d"), out_specs=P("d"))


def precisely(g):
    """Run a program where the default precision of products is the highest."""

    def run(*args):
        with jax.default_matmul_precision("highest"):
            return g(*args)

    return run


def grad(f):
    return jax.grad(loss(f), THREE)


def jvp(f):
    return lambda *args: jax.jvp(f, args, args)[1]


def vjp(f):
    return lambda *args: jax.vjp(f, *args)[1](f(*args))


def linearized(f):
    return lambda *args: jax.linearize(f, *args)[1](*args)


def transposed(f):
    return lambda q, k, v: jax.linear_transpose(lambda v: f(q, k, v), v)(f(q, k, v))


def jvp_of_vjp(f):
    return lambda *args: jax.jvp(grad(f), args, args)[1]


def vjp_of_jvp(f):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(jvp(f)(*args))), THREE)


def grad_of_grad(f):
    return jax.grad(lambda *args: sum(jnp.sum(jnp.sin(d)) for d in grad(f)(*args)), THREE)


def hessian_of_two(f):
    """The Hessian of two numbers that the queries and keys are multiplied by."""
    return lambda q, k, v: jax.hessian(lambda a: loss(f)(a[0] * q, a[1] * k, v))(jnp.ones(2))


def forward_jacobian(f):
    return lambda q, k, v: jax.jacfwd(lambda a: f(a * q, k, v))(jnp.float32(1))


def reverse_jacobian(f):
    return lambda q, k, v: jax.jacrev(lambda a: f(a[0] * q, k, a[1] * v)[0, 0, 0])(jnp.ones(2))


def remat(f):
    return grad(jax.checkpoint(f))


def remat_of_scan(f):
    return grad(jax.checkpoint(lambda *args: scanned(f)(*args)[1]))


def value_and_grad(f):
    return jax.value_and_grad(loss(f), THREE)


def third(f):
    """A third derivative along one direction."""
    first = lambda a, q, k, v: loss(f)(q * a, k * a, v)  # noqa: E731
    return lambda *args: jax.grad(jax.grad(jax.grad(first)))(jnp.float32(1), *args)


def series(g):
    """The Taylor series of a program along its own arguments, to the second order."""

    def run(*args):
        flat = lambda *args: jax.tree.leaves(g(*args))  # noqa: E731
        return jet(flat, args, [[a, 0.5 * a] for a in args])

    return run


# What is computed of attention, and the programs around it. Each is run once, by every backend.
DERIVED = {
    "forward": lambda f: f,
    "grad": grad,
    "jvp": jvp,
    "vjp": vjp,
    "linearized": linearized,
    "transposed": transposed,
    "jvp_of_vjp": jvp_of_vjp,
    "vjp_of_jvp": vjp_of_jvp,
    "grad_of_grad": grad_of_grad,
    "hessian": hessian_of_two,
    "jacfwd": forward_jacobian,
    "jacrev": reverse_jacobian,
    "remat": remat,
    "remat_of_scan": remat_of_scan,
    "value_and_grad": value_and_grad,
    "third": third,
    "jet": series,
}
AROUND = {
    "scan": scanned,
    "while": looped,
    "fori": counted,
    "cond": branched,
    "switch": switched,
    "custom_vjp": kept_forward,
    "custom_jvp": own_tangent,
    "vmap": examples,
    "map": mapped_in_turn,
    "checkify": checked,
    "io_callback": beside,
    "debug_callback": printed,
    "export": exported,
    "ahead": ahead,
    "jaxpr": by_jaxpr,
    "donate": donated,
    "shard_map": over_shards,
    "precision": precisely,
    "jit": jax.jit,
    "jit_vmap_jit": lambda g: jax.jit(examples(jax.jit(g))),
    "scan_of_jit": lambda g: scanned(jax.jit(g)),
    "nans": lambda g: under(jax.debug_nans(True), jax.jit(g)),
    "infs": lambda g: under(jax.debug_infs(True), jax.jit(g)),
    "leak": lambda g: under(jax.checking_leaks(), jax.jit(g)),
    "reuse": lambda g: under(jax.debug_key_reuse(True), jax.jit(g)),
    "disabled": lambda g: disabled(g),
}

# What is computed inside of every program around.
_WHOLE = ("forward", "grad", "jvp")
NAMES = [
    *DERIVED,
    *(f"{around}:{what}" for around in AROUND for what in _WHOLE if around != "disabled"),
    "disabled:forward",
    "disabled:grad",
]


def program(name):
    """Return a program of the list."""
    around, _, what = name.rpartition(":")
    return lambda f: AROUND[around](DERIVED[what](f)) if around else DERIVED[what](f)
