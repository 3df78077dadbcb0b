"""linear_map under every transformation, against plain autodiff of the plain definition."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mha_jax.engine.linear_map import linear_map

T, S = 7, 11


class Point(NamedTuple):
    """Attention of heads of size one: enough for every rule, small enough to compile often."""

    q: jax.Array  # [T]
    k: jax.Array  # [S]
    v: jax.Array  # [S]
    order: jax.Array | None = None  # [S] integers: which key meets which value


def dense(x):
    logits = x.q[:, None] * x.k[x.order][None, :]
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(logits - lse[:, None]) @ x.v, lse


def forward(x):
    def row(q):
        logits = q * x.k[x.order]
        lse = jax.nn.logsumexp(logits)
        return jnp.exp(logits - lse) @ x.v, lse

    return lax.map(row, x.q)


def tangent(residuals, direction):
    x, out, lse = residuals

    @jax.checkpoint
    def row(args):
        q, out, lse, dq = args
        p = jnp.exp(q * x.k[x.order] - lse)
        ds = jnp.zeros_like(p)
        if dq is not None:
            ds = ds + dq * x.k[x.order]
        if direction.k is not None:
            ds = ds + q * direction.k[x.order]
        d_lse = p @ ds
        d_out = (p * ds) @ x.v - out * d_lse
        return (d_out if direction.v is None else d_out + p @ direction.v), d_lse

    return lax.map(row, (x.q, out, lse, direction.q))


def cotangent(residuals, cotangents):
    x, out, lse = residuals

    @jax.checkpoint
    def row(sums, args):
        q, out, lse, g_out, g_lse = args
        p = jnp.exp(q * x.k[x.order] - lse)
        ds = p * (g_out * (x.v - out) + g_lse)
        return (sums[0].at[x.order].add(q * ds), sums[1] + g_out * p), x.k[x.order] @ ds

    start = jnp.zeros_like(x.k) + nothing(residuals), jnp.zeros_like(x.v) + nothing(residuals)
    (dk, dv), dq = lax.scan(row, start, (x.q, out, lse, *cotangents))
    return Point(dq, dk, dv, x.order)


def nothing(residuals):
    """Zero, varying over the mesh axes that the residuals vary over: what a carry starts from."""
    return lax.stop_gradient(sum(jnp.sum(r[:0]) for r in (*residuals[0][:3], residuals[1])))


def with_rule(tangent, cotangent):
    @jax.custom_jvp
    def attend(x):
        return forward(x)

    def rule(primals, tangents):
        (x,), (direction,) = primals, tangents
        out, lse = attend(x)

        def still(t):
            return isinstance(t, SymbolicZero) or t.dtype == jax.dtypes.float0

        direction = jax.tree.map(lambda t: None if still(t) else t, direction)
        return (out, lse), linear_map(tangent, cotangent, (x, out, lse), direction)

    attend.defjvp(rule, symbolic_zeros=True)
    return attend


attend = with_rule(tangent, cotangent)


def point(scale=1.0):
    draw = np.random.default_rng(0).normal
    q, k, v = (jnp.asarray(scale * draw(size=n)) for n in (T, S, S))
    return Point(q, k, v, jnp.asarray(np.random.default_rng(1).permutation(S)))


def of_floats(f, x):
    """f as a function of the floating leaves alone."""
    return lambda q, k, v: f(Point(q, k, v, x.order))


def loss(f, x):
    def scalar(q, k, v):
        out, lse = of_floats(f, x)(q, k, v)
        return jnp.sum(jnp.sin(out) * out) + jnp.sum(jnp.cos(lse))

    return scalar


def dot(a, b):
    return sum(map(jnp.vdot, a, b))


def jvp(f, x, d):
    return jax.jvp(of_floats(f, x), x[:3], d)


def grad(f, x, d):
    return jax.grad(loss(f, x), (0, 1, 2))(*x[:3])


def linearize(f, x, d):
    return jax.linearize(of_floats(f, x), *x[:3])[1](*d)


def transposed_twice(f, x, d):
    linear = jax.linearize(of_floats(f, x), *x[:3])[1]

    def back(g):
        return jax.linear_transpose(linear, *d)(g)

    return jax.linear_transpose(back, (x.q, x.q))(d)


def jacfwd(f, x, d):
    return jax.jacfwd(of_floats(f, x), (0, 1))(*x[:3])


def hessian(f, x, d):
    return jax.hessian(loss(f, x), (0, 1, 2))(*x[:3])


def reverse_over_reverse(f, x, d):
    def inner(*y):
        return dot(jax.grad(loss(f, x), (0, 1, 2))(*y), d)

    return jax.grad(inner, (0, 1, 2))(*x[:3])


def reverse_over_forward(f, x, d):
    def inner(*y):
        return jax.jvp(loss(f, x), y, d)[1]

    return jax.grad(inner, (0, 1, 2))(*x[:3])


def third_order(f, x, d):
    return jax.jvp(lambda *y: reverse_over_reverse(f, Point(*y, x.order), d), x[:3], d)


def grad_of_one(f, x, d):
    return [jax.grad(loss(f, x), i)(*x[:3]) for i in range(3)]


def grad_of_direction(f, x, d):
    def inner(dq):
        return jnp.sum(jax.jvp(of_floats(f, x), x[:3], (dq, *d[1:]))[1][0] ** 2)

    return jax.grad(inner)(d[0])


def grad_of_one_output(f, x, d):
    return [jax.grad(lambda *y, i=i: of_floats(f, x)(*y)[i].sum(), (0, 1))(*x[:3]) for i in (0, 1)]


def scan_of_checkpoint(f, x, d):
    @jax.checkpoint
    def body(q, k):
        return q + of_floats(f, x)(q, k, x.v)[0], None

    def last(q, ks):
        return jnp.sum(lax.scan(body, q, ks)[0] ** 2)

    args = x.q, jnp.stack([x.k, x.k / 2])
    return jax.grad(last, (0, 1))(*args), jax.jvp(jax.grad(last), args, args)


def cond(f, x, d):
    return jax.grad(lambda q: lax.cond(q[0] < 9, loss(f, x), loss(dense, x), q, x.k, x.v))(x.q)


def vmap_keys(f, x, d):
    return jax.vmap(lambda k: grad(f, x._replace(k=k), d))(jnp.stack([x.k, x.k / 2]))


def vmap_last_axis(f, x, d):
    both = jnp.stack([x.k, x.k / 2], axis=-1)
    return jax.vmap(lambda k: jvp(f, x._replace(k=k), d), in_axes=-1, out_axes=1)(both)


def vmap_integers(f, x, d):
    return jax.vmap(lambda i: grad(f, x._replace(order=i), d))(jnp.stack([x.order, x.order[::-1]]))


def vmap_twice_hvp(f, x, d):
    def each(q, v):
        return reverse_over_reverse(f, x._replace(q=q, v=v), d)

    def half(a):
        return jnp.stack([a, a / 2])

    return jax.vmap(jax.vmap(each, (None, 0)), (0, None))(half(x.q), half(x.v))


def grad_of_vmap(f, x, d):
    ks = jnp.stack([x.k, x.k / 2])
    return jax.grad(lambda q: jax.vmap(lambda k: loss(f, x)(q, k, x.v))(ks).sum())(x.q)


def platform_dependent(f, x, d):
    if f is attend:

        def wrong(r, y):
            return jax.tree.map(lambda a: a * jnp.nan, tangent(r, y))

        def pick(r, g):
            return tuple(cotangent(r, g)[:3])

        def t(r, y):
            return lax.platform_dependent(r, y, cpu=tangent, default=wrong)

        def c(r, g):
            return Point(*lax.platform_dependent(r, g, cpu=pick, default=pick))

        f = with_rule(t, c)
    return grad(f, x, d), vmap_keys(f, x, d), reverse_over_reverse(f, x, d)


TRANSFORMS = [
    jvp,
    grad,
    linearize,
    transposed_twice,
    jacfwd,
    hessian,
    reverse_over_reverse,
    reverse_over_forward,
    third_order,
    grad_of_one,
    grad_of_direction,
    grad_of_one_output,
    scan_of_checkpoint,
    cond,
    vmap_keys,
    vmap_last_axis,
    vmap_integers,
    vmap_twice_hvp,
    grad_of_vmap,
    platform_dependent,
]


def assert_same(found, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), found, expected)


def run(transform, f, x, d=None):
    lowered = jax.jit(lambda x, d: transform(f, x, d)).lower(x, d)
    # Run once: what the optimiser costs is not won back.
    return lowered.compile({"xla_backend_optimization_level": 0})(x, d)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_equals_plain_autodiff(transform, x64):
    x = point()
    d = tuple(jnp.cos(3 * a) for a in x[:3])
    assert_same(run(transform, attend, x, d), run(transform, dense, x, d))


@pytest.mark.parametrize("transform", [grad, jvp], ids=lambda f: f.__name__)
def test_equals_plain_autodiff_without_jit(transform, x64):
    x = point()
    assert_same(transform(attend, x, x[:3]), run(transform, dense, x, x[:3]))


def test_the_given_transpose_is_the_one_that_runs(x64):
    def tripled(r, g):
        return jax.tree.map(lambda a: 3 * a, cotangent(r, g))

    x = point()
    found = run(grad, with_rule(tangent, tripled), x)
    assert_same(found, tuple(3 * g for g in run(grad, dense, x)))


def temporary_bytes(transform, f, n):
    shape = jax.ShapeDtypeStruct((n,), jnp.float32)
    x = Point(shape, shape, shape, jax.ShapeDtypeStruct((n,), jnp.int32))
    program = jax.jit(lambda x, d: transform(f, x, d)).lower(x, x[:3]).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "transform",
    [grad, jvp, reverse_over_reverse, reverse_over_forward, vmap_keys],
    ids=lambda f: f.__name__,
)
def test_no_array_grows_with_the_product_of_the_lengths(transform):
    n = 1024
    assert temporary_bytes(transform, attend, n) < 4 * n * n / 10


def test_the_plain_definition_keeps_the_product_of_the_lengths():
    n = 1024
    assert temporary_bytes(grad, dense, n) >= 4 * n * n


def test_random_keys_are_residuals(x64):
    def noisy(residuals, t):
        x, key, words = residuals
        return t * jax.random.normal(key, x.shape) * words[0].astype(x.dtype)

    def f(x, key, words):
        return linear_map(noisy, noisy, (x, key, words), x)

    keys, words = jax.random.split(jax.random.key(0), 3), jnp.arange(6, dtype=jnp.uint32)
    x = jnp.arange(4.0)
    batched = jax.vmap(jax.grad(lambda *a: f(*a).sum()), (None, 0, 0))(x, keys, words.reshape(3, 2))
    for i, key in enumerate(keys):
        assert_same(batched[i], jax.random.normal(key, x.shape) * 2 * i)


def test_gradient_of_a_replicated_input_is_summed_over_the_mesh(x64):
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    try:
        from jax import shard_map
    except ImportError:
        from jax.experimental import shard_map as old

        # Its checker of replication refuses every custom_jvp with symbolic zeros.
        shard_map = partial(old.shard_map, check_rep=False)
    x = point()._replace(q=jnp.linspace(-1.0, 2.0, 6))
    specs = P("rows"), P(), P()
    sharded = shard_map(
        of_floats(attend, x), mesh=mesh, in_specs=specs, out_specs=(P("rows"), P("rows"))
    )

    def f(y):
        return sharded(*y[:3])

    for transform in (grad, reverse_over_forward):
        assert_same(run(transform, f, x, x[:3]), run(transform, dense, x, x[:3]))


def test_shapes_without_values():
    found = jax.eval_shape(lambda x: grad(attend, x, None), jax.eval_shape(point))
    assert [leaf.shape for leaf in found] == [(T,), (S,), (S,)]


def double(residuals, t):
    return jax.tree.map(lambda a: 2 * a, t)


def test_a_function_that_closes_over_a_traced_value_is_refused():
    def f(x):
        return linear_map(lambda _, t: t * x, double, (), x)

    with pytest.raises(TypeError, match=r"closes over a traced value.*pass it in `residuals`"):
        jax.jit(f)(jnp.ones(3))


@pytest.mark.parametrize("wrong", [lambda _, g: (g["a"],), lambda _, g: {"a": None}])
def test_a_transpose_without_the_cotangents_is_refused(wrong):
    def f(t):
        return linear_map(double, wrong, (), {"a": t})["a"].sum()

    with pytest.raises(TypeError, match="must return one cotangent for each linear input"):
        jax.grad(f)(jnp.ones(3))


def test_a_transpose_with_another_shape_is_refused():
    def f(t):
        return linear_map(double, lambda _, g: g[:2], (), t).sum()

    message = r"cotangent float32\[2\] for a linear input float32\[3\].*keep shapes and dtypes"
    with pytest.raises(TypeError, match=message):
        jax.grad(f)(jnp.ones(3))
