"""Schedules against the paper's formula, constraints, and the error for an unknown name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from mha_jax.errors import ConfigError
from mha_jax.train.optimizer import make_optimizer, make_schedule

BASE = {"schedule": "linear", "peak": 0.5, "warmup": 10, "weight_decay": 0.0, "clip": 0.0}


def config(**changes):
    return ConfigDict({**BASE, **changes})


def test_paper_schedule_is_equation_3():
    """The base model's peak and warmup give width^-0.5 * min(step^-0.5, step * warmup^-1.5)."""
    width, warmup = 512, 4000
    peak = width**-0.5 * warmup**-0.5
    schedule = make_schedule(config(schedule="paper", peak=peak, warmup=warmup), 100_000)
    for step in (1, 17, 3999, 4000, 4001, 99_999):
        want = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        np.testing.assert_allclose(schedule(jnp.asarray(step - 1)), want, rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_rise_to_the_peak_and_fall_to_nothing(name):
    schedule = make_schedule(config(schedule=name), 110)
    rates = np.array([schedule(step) for step in range(111)])
    assert rates[0] == 0
    np.testing.assert_allclose(rates.max(), 0.5)
    assert rates.argmax() == 10
    np.testing.assert_allclose(rates[-1], 0, atol=1e-7)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()


def test_unknown_schedule_is_named():
    with pytest.raises(ConfigError, match=r"schedule='stairs'.*Expected paper, linear or cosine"):
        make_optimizer(config(schedule="stairs"), 10)


@jax.numpy_dtype_promotion("standard")  # optax's Adam raises a float to an integer power
def test_clipping_limits_the_whole_gradient():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    clipped, plain = (make_optimizer(config(clip=c), 100) for c in (1.0, 0.0))
    gradients = {"a": jnp.full(2, 30.0), "b": jnp.full(3, 40.0)}
    states = [tx.update(gradients, tx.init(params), params)[1] for tx in (clipped, plain)]
    moments = [optax.tree_utils.tree_get(state, "mu") for state in states]
    first_moments = [jnp.concatenate(list(moment.values())) for moment in moments]
    np.testing.assert_allclose(jnp.linalg.norm(first_moments[0]), 0.1, rtol=1e-5)
    assert jnp.linalg.norm(first_moments[1]) > 1
