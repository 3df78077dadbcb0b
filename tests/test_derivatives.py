"""Every derivative JAX can ask for, to any order, equals that of the plain definition in float64."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax import Call, Causal, Dense, Dropout, Tokens, ValidKeys, Window
from mha_jax.backends.blockwise import Blockwise
from mha_jax.backends.reference import Reference
from tests.drawn import draw, draw_variables

B, T, S, N, K, H, V = 1, 5, 7, 2, 1, 3, 2
TILED = Blockwise(block_q=2, block_k=4)
VALID = np.array([[1, 1, 0, 1, 1, 0, 1]], bool)
PAIRS = np.random.default_rng(9).random((B, N, T, S)) < 0.7
PAIRS[0, 0, 1] = False
CASES = {
    "everything": {
        "mask": Causal() & Window(3, 3) & ValidKeys() & Dense(PAIRS),
        "k_tokens": Tokens(S, valid=VALID),
        "dropout": Dropout(jax.random.key(1), 0.2),
        "logit_cap": 2.0,
    },
    "plain": {},
}


wide = partial(draw, dtype=np.float64)


def arrays():
    return wide(1, B, T, N, H), wide(2, B, S, K, H), wide(3, B, S, K, V), wide(4, B, N, T, S)


def directions():
    return tuple(wide(10 + i, *a.shape) for i, a in enumerate(arrays()))


def loss_of(case, backend):
    """Return a function of (q, k, v, bias) that reads out and lse."""

    def loss(q, k, v, bias):
        call = Call(q, k, v, bias=bias, **CASES[case])
        out, lse = mj.attend(call, backend)
        lse = jnp.where(jnp.isinf(lse), 0, lse)
        return (out**2).sum() + jnp.sin(lse).sum()

    return loss


ALL = (0, 1, 2, 3)


def along(tree, other):
    return sum((a * b).sum() for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other)))


DERIVATIVES = {
    "value": lambda f, x, d: f(*x),
    "grad": lambda f, x, d: jax.grad(f, ALL)(*x),
    "jvp": lambda f, x, d: jax.jvp(f, x, d),
    "jvp_of_one": lambda f, x, d: jax.jvp(lambda k: f(x[0], k, *x[2:]), x[1:2], d[1:2]),
    "linearize": lambda f, x, d: jax.linearize(f, *x)[1](*d),
    "jacfwd": lambda f, x, d: jax.jacfwd(f, 2)(*x),
    "forward_over_reverse": lambda f, x, d: jax.jvp(jax.grad(f, ALL), x, d)[1],
    "reverse_over_reverse": lambda f, x, d: jax.grad(
        lambda *y: along(jax.grad(f, ALL)(*y), d), ALL
    )(*x),
    "reverse_over_forward": lambda f, x, d: jax.grad(lambda *y: jax.jvp(f, y, d)[1], ALL)(*x),
    "forward_over_forward": lambda f, x, d: jax.jvp(lambda *y: jax.jvp(f, y, d)[1], x, d)[1],
    "vmap_of_grad": lambda f, x, d: jax.vmap(jax.grad(f, (0, 1, 2)), (0, None, 0, None))(
        jnp.stack([x[0], d[0]]), x[1], jnp.stack([x[2], d[2]]), x[3]
    ),
    "vmap_of_jvp": lambda f, x, d: jax.vmap(lambda t: jax.jvp(f, x, (t, *d[1:]))[1])(
        jnp.stack([d[0], x[0]])
    ),
    "vmap_of_hvp": lambda f, x, d: jax.vmap(lambda t: jax.jvp(jax.grad(f), x, (t, *d[1:]))[1])(
        jnp.stack([d[0], x[0]])
    ),
    "remat": lambda f, x, d: jax.grad(jax.checkpoint(f), ALL)(*x),
    "scan": lambda f, x, d: jax.grad(
        lambda *y: jax.lax.scan(
            lambda c, s: (c + f(s * y[0], *y[1:]), None), 0.0, jnp.array([1.0, 0.5])
        )[0],
        ALL,
    )(*x),
}


def largest_error(got, want):
    errors = [0.0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype == np.float64
        assert np.isfinite(a).all() and np.isfinite(b).all()
        errors.append(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())))
    return max(errors)


@cache
def derivative(name, case, backend):
    """Return a derivative of the loss, compiled and run once for all tests."""
    x, d = arrays(), directions()
    return jax.jit(lambda *x: DERIVATIVES[name](loss_of(case, backend), x, d))(*x)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_the_tiled_derivative_is_that_of_the_definition(name, x64):
    got, want = (derivative(name, "everything", backend) for backend in (TILED, Reference()))
    assert largest_error(got, want) < 1e-12
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 1e-3


@pytest.mark.parametrize("name", ["grad", "forward_over_reverse"])
def test_the_default_backend_without_options(name, x64):
    got, want = (derivative(name, "plain", backend) for backend in (None, Reference()))
    assert largest_error(got, want) < 1e-12


def test_the_definition_is_that_of_differences(x64):
    x, d = arrays(), directions()
    f = loss_of("everything", Reference())
    step = 1e-5
    gradient = jax.jit(jax.grad(f, ALL))
    up, down = (gradient(*(a + s * step * b for a, b in zip(x, d))) for s in (1, -1))
    numeric = jax.tree.map(lambda a, b: (a - b) / (2 * step), up, down)
    hvp = derivative("forward_over_reverse", "everything", Reference())
    for a, b in zip(hvp, numeric):
        np.testing.assert_allclose(a, b, atol=1e-7 * max(1, np.abs(b).max()))


def test_a_third_derivative(x64):
    x, d = arrays(), directions()

    def third(backend):
        f = loss_of("plain", backend)

        def first(q):
            return jax.jvp(lambda q: f(q, *x[1:]), (q,), d[:1])[1]

        def second(q):
            return jax.jvp(first, (q,), d[:1])[1]

        return jax.jit(jax.grad(second))(x[0])

    assert largest_error(third(TILED), third(Reference())) < 1e-11


def test_integers_and_keys_have_no_gradient_but_break_nothing(x64):
    x = arrays()
    call = Call(*x[:3], bias=x[3], **CASES["everything"])

    def of_call(call):
        return mj.attend(call, TILED).out.sum()

    gradient = jax.jit(jax.grad(of_call, allow_int=True))(dataclasses.replace(call, dropout=None))
    assert gradient.q.shape == call.q.shape
    assert gradient.k_tokens.valid.dtype == jax.dtypes.float0


def test_the_layer_has_second_derivatives(x64):
    def hvp(backend):
        layer = mj.MultiHeadAttention(
            num_heads=2, key_dim=3, param_dtype="float64", use_gate=True, backend=backend
        )
        inputs = wide(1, 2, T, 4)
        params = draw_variables(layer, inputs, inputs)

        def loss(params):
            return (layer.apply(params, inputs, inputs, use_causal_mask=True) ** 2).sum()

        return jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (p,))[1])(params)

    assert largest_error(hvp("blockwise"), hvp("reference")) < 1e-12
