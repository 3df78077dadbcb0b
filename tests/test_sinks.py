"""Sinks against the oracle, to which they are one more key of value 0, on every backend."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mha_jax as mj
from mha_jax.backends.pallas_tpu import PallasTPU
from mha_jax.backends.pallas_tpu.patterns import Blocks
from mha_jax.backends.pallas_tpu.sizes import Sizes
from tests import oracles
from tests.backends import backends, tiles
from tests.cases import CASES, H, V

TILES = Blocks(rows=128, columns=128)
BACKENDS = backends(
    blockwise=tiles(16, 16),
    pallas_tpu=PallasTPU(
        Sizes((TILES,), (TILES,), vmem=2**24, resident=2**24, outer_resident=2**24), interpret=True
    ),
)
NAMES = ["packed_causal", "soft_cap", "some_rows_nothing", "large_logits", "dense_per_head"]
SOME = {case.name: case for case in CASES if case.name in NAMES}
SINKS = np.random.default_rng(8).standard_normal(6).astype(np.float32)


def with_a_key(case):
    """Return the oracle's arguments with the sinks as a last key, seen by all queries that see any."""
    q, k, v, options = case.plain()
    b, s, kv, _ = k.shape
    (n, _), (t, _) = case.heads, case.lengths
    zero = [np.zeros((b, 1, kv, size), np.float32) for size in (H, V)]
    k, v = (np.concatenate([x, end], 1) for x, end in zip((k, v), zero))

    def wide(x, end):
        x = np.broadcast_to(x, (b, n, t, s))
        return np.concatenate([x, np.broadcast_to(end, (b, n, t, 1))], -1)

    bias = 0.0 if options["bias"] is None else options["bias"]
    visible = np.broadcast_to(options["visible"], (b, n, t, s))
    options |= {
        "bias": wide(bias, SINKS[:, None, None]),
        "visible": wide(visible, visible.any(-1, keepdims=True)),
        "keep": None if options["keep"] is None else wide(options["keep"], True),
    }
    return q, k, v, options


@pytest.mark.parametrize(
    "name, backend",
    [
        (name, backend)
        for name in SOME
        for backend in BACKENDS
        if backend != "pallas_tpu" or name == "packed_causal"
    ],
)
def test_sinks_and_their_gradients_agree_with_the_oracle(name, backend):
    case = SOME[name]
    call, d_out = case.call(), case.arrays()[4]
    arrays = {x: getattr(call, x) for x in "qkv"} | {"sinks": jnp.asarray(SINKS)}

    def forward(arrays):
        return mj.attend(dataclasses.replace(call, **arrays), BACKENDS[backend]).out

    def with_gradients(arrays):
        out, vjp = jax.vjp(forward, arrays)
        return out, vjp(jnp.asarray(d_out))[0]

    out, grads = jax.jit(with_gradients)(arrays)
    q, k, v, options = with_a_key(case)
    want, _, _ = oracles.attention(q, k, v, **options)
    dq, dk, dv, dx = oracles.gradients(q, k, v, d_out, **options)
    dk, dv, d_sinks = dk[:, :-1], dv[:, :-1], dx[..., -1].sum((0, 2))
    epsilon = np.finfo(np.float32).eps * max(1.0, case.magnitude)
    assert oracles.relative_error(out, want) <= 4 * epsilon
    for got, wanted in zip((grads[x] for x in "qkv"), (dq, dk, dv)):
        assert oracles.relative_error(got, wanted) <= 8 * epsilon
    # What is summed over all queries is larger than its sum.
    oracles.assert_close(grads["sinks"], d_sinks, 4 * epsilon * np.abs(dx[..., -1]).sum())


def test_scores_sum_to_less_than_one_and_are_those_of_the_output():
    case = SOME["soft_cap"]
    q, k, v, options = with_a_key(case)
    _, _, want = oracles.attention(q, k, v, **options)
    call = dataclasses.replace(case.call(), sinks=SINKS)
    lse = mj.attend(call).lse
    for scores in (mj.attention_scores(call), mj.attention_scores(call, lse)):
        oracles.assert_close(scores, want[..., :-1], 1e-6)
        assert float(scores.sum(-1).max()) < 1
    some = mj.attention_scores(call, rows=slice(3, 9), heads=np.array([4, 1]))
    oracles.assert_close(some, want[:, [4, 1], 3:9, :-1], 1e-6)
    np.testing.assert_array_equal(lse, mj.attend(case.call()).lse)


def test_the_function_takes_sinks_and_any_batch_axes():
    call = SOME["soft_cap"].call()
    q, k, v = (jnp.stack([x, x]) for x in (call.q, call.k, call.v))
    out = mj.dot_product_attention(q, k, v, sinks=SINKS, mask=mj.Causal())
    alone = mj.attend(mj.Call(call.q, call.k, call.v, mask=mj.Causal(), sinks=SINKS)).out
    np.testing.assert_allclose(out[1], alone, atol=1e-6)


def test_second_derivatives_of_sinks():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 7, 2, 4)), jnp.float32)
    sinks = jnp.asarray([0.3, -0.7])

    def loss(sinks, backend):
        return (mj.dot_product_attention(x, x, x, sinks=sinks, backend=backend) ** 2).sum()

    hessians = [jax.hessian(loss)(sinks, BACKENDS[name]) for name in ("reference", "blockwise")]
    np.testing.assert_allclose(*hessians, atol=1e-5)
    assert np.abs(hessians[0]).min() < np.abs(hessians[0]).max()


def test_the_output_keeps_its_dtype():
    x = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
    assert mj.dot_product_attention(x, x, x, sinks=jnp.zeros(2)).dtype == jnp.bfloat16


@pytest.mark.parametrize("backend", [None, "reference", "blockwise"])
@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, jax.jit, jax.vmap, jax.checkpoint],
    ids=["plain", "jit", "vmap", "remat"],
)
def test_beside_sinks_the_output_is_a_linear_function_of_the_values(wrap, backend):
    q, k, v = (
        jax.random.normal(key, (2, 1, 5, 6, 4)) for key in jax.random.split(jax.random.key(0), 3)
    )
    batch = (q, k, v) if wrap is not jax.vmap else (q[0], k[0], v)
    wanted = jax.random.normal(jax.random.key(1), v.shape)

    def out(v):
        call = mj.Call(*batch[:2], v, mask=mj.Causal(), sinks=jnp.asarray(SINKS))
        return mj.attend(call, backend).out

    back = jax.linear_transpose(wrap(out), v)(wanted)[0]
    (want,) = jax.vjp(wrap(out), v)[1](wanted)
    np.testing.assert_allclose(back, want, atol=1e-6)
    assert float(abs(back).max()) > 0.1


def test_layers_with_sinks_are_linear_in_the_values_weights():
    layer = mj.MultiHeadAttention(num_heads=2, key_dim=4, use_sinks=True, use_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    variables = layer.init(jax.random.key(1), x, x)

    def of(kernel):
        params = variables["params"]
        return layer.apply({"params": params | {"value": {"kernel": kernel}}}, x, x)

    kernel = variables["params"]["value"]["kernel"]
    y, pull = jax.vjp(of, kernel)
    np.testing.assert_allclose(jax.linear_transpose(of, kernel)(y)[0], pull(y)[0], atol=1e-6)
