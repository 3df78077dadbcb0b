"""Interpreted kernels of one program run one after the other, and only they have an effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mha_jax import Call, Causal, attend
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.engine.lowering import turn

INTERPRETED = PallasTPU(interpret=pltpu.InterpretParams())


@pytest.fixture(autouse=True)
def interpreter():
    """Leave the interpreter clean: a kernel that fails in it would fail every later one."""
    yield
    pltpu.reset_tpu_interpret_mode_state()


def arrays(length, seed):
    draw = np.random.default_rng(seed).standard_normal((3, 1, length, 1, 4), np.float32)
    return tuple(map(jnp.asarray, draw))


FIRST, SECOND = arrays(5, 0), arrays(7, 1)


def one(qkv, backend):
    out, lse = attend(Call(*qkv, mask=Causal()), backend)
    return jnp.sum(jnp.sin(out)) + jnp.sum(lse)


def both(first, second, backend):
    """Return the sum of two attentions neither of which needs the other."""
    return one(first, backend) + one(second, backend)


def in_a_loop(first, second, backend):
    def step(total, scale):
        return total + one(tuple(x * scale for x in first), backend), None

    return jax.lax.scan(step, 0.0, jnp.array([0.5, 2.0]))[0] + one(second, backend)


def recomputed(first, second, backend):
    return jax.checkpoint(lambda *args: both(*args, backend))(first, second)


def in_functions(first, second, backend):
    inner = jax.jit(one, static_argnums=1)
    return inner(first, backend) + inner(second, backend)


@pytest.mark.parametrize("function", [both, recomputed, in_functions])
def test_independent_kernels_of_one_program_do_not_meet(function):
    run = jax.jit(jax.value_and_grad(function, (0, 1)), static_argnums=2)
    want = run(FIRST, SECOND, "reference")
    for got in [run(FIRST, SECOND, INTERPRETED) for _ in range(3)]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_kernels_in_a_loop_and_outside_do_not_meet():
    run = jax.jit(in_a_loop, static_argnums=2)
    want, got = (run(FIRST, SECOND, backend) for backend in ("reference", INTERPRETED))
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("backend", "effects"),
    [
        (INTERPRETED, True),
        (PallasTPU(interpret=True), False),  # one operation of XLA, which has no shared memory
        ("blockwise", False),
        (None, False),
    ],
    ids=["InterpretParams", "interpret", "blockwise", "automatic"],
)
def test_only_an_interpreted_kernel_has_an_effect(backend, effects):
    run = jax.value_and_grad(lambda *args: both(*args, backend), (0, 1))
    assert jax.make_jaxpr(run)(FIRST, SECOND).effects == ({turn()} if effects else set())
