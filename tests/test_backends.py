"""Every backend runs every case: output, lse and gradients against the float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax import attend
from tests import oracles
from tests.backends import backends, tiles
from tests.cases import CASES

BACKENDS = backends(small_tiles=tiles(16, 8))
# The error against the oracle may be twice that of `reference` in the same dtype, three times for
# gradients, or one rounding of the result's size where `reference` is luckier than that.
FORWARD, BACKWARD = 2, 3


def run(backend, case, dtype):
    """Return out, lse and the gradients with respect to q, k, v and bias."""
    call = case.call(dtype)
    *_, d_out, d_lse = case.arrays(dtype)

    @jax.jit
    def value_and_gradients(arrays):
        def forward(arrays):
            return attend(dataclasses.replace(call, **arrays), backend)

        output, vjp = jax.vjp(forward, arrays)
        d_lse_seen = jnp.where(jnp.isinf(output.lse), 0, jnp.asarray(d_lse))
        return output, vjp(type(output)(jnp.asarray(d_out), d_lse_seen))[0]

    arrays = {name: getattr(call, name) for name in ("q", "k", "v", "bias")}
    return value_and_gradients({k: a for k, a in arrays.items() if a is not None})


def truth(case, dtype):
    """Return the same from the oracle."""
    q, k, v, options = case.plain(dtype)
    *_, d_out, d_lse = case.arrays(dtype)
    out, lse, _ = oracles.attention(q, k, v, **options)
    d_lse = np.where(np.isinf(lse), 0, d_lse)
    dq, dk, dv, dx = oracles.gradients(q, k, v, d_out, d_lse, **options)
    wanted = {"q": dq, "k": dk, "v": dv}
    if options["bias"] is not None:
        bias = options["bias"]
        summed = tuple(i for i, n in enumerate(bias.shape) if n == 1)
        wanted["bias"] = np.broadcast_to(dx, dx.shape).sum(summed, keepdims=True)
    return (out, lse), wanted


_memo = {}


def errors(name, case, dtype):
    """Return the error of every result, relative to the result's size."""
    at = (name, case.name, dtype)
    if at not in _memo:
        (out, lse), grads = run(BACKENDS[name], case, dtype)
        (want_out, want_lse), want_grads = truth(case, dtype)
        pairs = {"out": (out, want_out), "lse": (lse, want_lse)}
        pairs |= {f"d{key}": (grads[key], want) for key, want in want_grads.items()}
        _memo[at] = {key: oracles.relative_error(*pair) for key, pair in pairs.items()}
    return _memo[at]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_agrees_with_the_oracle(case):
    epsilon = np.finfo(np.float32).eps * max(1.0, case.magnitude)
    for key, error in errors("reference", case, np.float32).items():
        assert error <= 4 * epsilon, f"{key}: {error:.3g}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_backend_agrees_with_the_oracle(name, case):
    own, plain = errors(name, case, np.float32), errors("reference", case, np.float32)
    epsilon = np.finfo(np.float32).eps
    lse = truth(case, np.float32)[0][1]
    own_lse = np.abs(lse[np.isfinite(lse)]).max(initial=0.0)
    for key in own:
        multiple = FORWARD if key in ("out", "lse") else BACKWARD
        allowed = max(multiple * plain[key], epsilon)
        if key not in ("out", "lse"):
            # Weights rebuilt from lse carry its rounding: relative, epsilon times its size.
            allowed = max(allowed, epsilon * own_lse)
        assert own[key] <= allowed, f"{name} {key}: {own[key]:.3g}, reference {plain[key]:.3g}"
